"""The grey scale on which a noisy map and its truth are compared."""

from __future__ import annotations

import numpy as np

from cryored.errors import InputError
from cryored.maps.fourier import apply_shells
from cryored.maps.volume import Floats

RELIABLE = 0.5  # half-map FSC above which a shell is compared with the truth


def grey_scale(volume: Floats, truth: Floats, fsc: Floats) -> float:
    """Return the factor that puts a truth on the grey scale of an unregularised map.

    Least squares over the shells up to the first with an FSC of 0.5 or less, without shell 0: the noise is all in
    the map, so the map is regressed on the truth.

    Parameters
    ----------
    volume, truth : (z, y, x) float32
    fsc : (box // 2 + 1,) float64
        Between the run's two halves.

    Raises
    ------
    InputError
        There is no such shell, or the truth is empty there.
    """
    shells = reliable_shells(fsc)
    known = apply_shells(truth, (shells > 0).astype(float))
    power = float(np.vdot(known, known))
    if power == 0:
        raise InputError(f"no shell but 0 with an FSC above {RELIABLE} and density in the truth to compare with")
    return float(np.vdot(volume, known)) / power


def reliable_shells(fsc: Floats) -> Floats:
    """Return the indices of the shells to compare with a truth, and 0 for the others."""
    return np.arange(len(fsc), dtype=np.float64) * (np.cumprod(fsc > RELIABLE) > 0)
