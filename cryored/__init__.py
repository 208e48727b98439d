"""A learned prior in cryo-EM structure determination.

What a script may import from here is in ``__all__`` (docs/api.md); it is loaded when it is first asked for, so that
``import cryored`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cryored.files.mrc import read_volume, write_volume
    from cryored.files.requests import Request
    from cryored.files.requests import read_request_file as read_request
    from cryored.maps.fsc import masked_correlation as masked_fsc
    from cryored.maps.fsc import nominal_resolution
    from cryored.maps.fsc import shell_correlation as fsc
    from cryored.maps.mask import relion_mask
    from cryored.maps.volume import Volume
    from cryored.prior.denoiser import Denoiser
    from cryored.prior.models import find_model
    from cryored.reconstruction.sums import load_sums
    from cryored.reconstruction.update import Accumulators, Denoised, inverse_prior, reconstruct
    from cryored.refinement.updater import Settings, Updater
    from cryored.simulation.density import gaussian_map
    from cryored.simulation.structure import Atoms, read_atoms

# Name -> the module that has it, and its name there.
_PLACES = {
    "Accumulators": ("reconstruction.update", "Accumulators"),
    "Atoms": ("simulation.structure", "Atoms"),
    "Denoised": ("reconstruction.update", "Denoised"),
    "Denoiser": ("prior.denoiser", "Denoiser"),
    "Request": ("files.requests", "Request"),
    "Settings": ("refinement.updater", "Settings"),
    "Updater": ("refinement.updater", "Updater"),
    "Volume": ("maps.volume", "Volume"),
    "find_model": ("prior.models", "find_model"),
    "fsc": ("maps.fsc", "shell_correlation"),
    "gaussian_map": ("simulation.density", "gaussian_map"),
    "inverse_prior": ("reconstruction.update", "inverse_prior"),
    "load_sums": ("reconstruction.sums", "load_sums"),
    "masked_fsc": ("maps.fsc", "masked_correlation"),
    "nominal_resolution": ("maps.fsc", "nominal_resolution"),
    "read_atoms": ("simulation.structure", "read_atoms"),
    "read_request": ("files.requests", "read_request_file"),
    "read_volume": ("files.mrc", "read_volume"),
    "reconstruct": ("reconstruction.update", "reconstruct"),
    "relion_mask": ("maps.mask", "relion_mask"),
    "write_volume": ("files.mrc", "write_volume"),
}

__all__ = [
    "Accumulators",
    "Atoms",
    "Denoised",
    "Denoiser",
    "Request",
    "Settings",
    "Updater",
    "Volume",
    "__version__",
    "find_model",
    "fsc",
    "gaussian_map",
    "inverse_prior",
    "load_sums",
    "masked_fsc",
    "nominal_resolution",
    "read_atoms",
    "read_request",
    "read_volume",
    "reconstruct",
    "relion_mask",
    "write_volume",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'cryored' has no attribute '{name}'")
    module, there = _PLACES[name]
    found = getattr(importlib.import_module(f"cryored.{module}"), there)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
