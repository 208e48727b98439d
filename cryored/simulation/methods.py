"""The methods of making training pairs, by name; a method's module is loaded only when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from cryored.simulation.pair_table import Pair
    from cryored.simulation.structure import Atoms

METHODS = {
    "gaussian": "cryored.simulation.gaussian:gaussian_pairs",
    "intermediates": "cryored.simulation.intermediates:intermediate_pairs",
    "featured": "cryored.simulation.intermediates:featured_pairs",
}


class Method(Protocol):
    """What a method does: one draw, that is the two halves of one or more intermediates with one truth."""

    def __call__(
        self, atoms: Atoms, box: int, angpix: float, resolution: float, *, rng: np.random.Generator
    ) -> Iterator[tuple[Pair, Pair]]:
        """Yield the halves of each intermediate; `rng` alone decides what they are.

        Parameters
        ----------
        atoms : Atoms
        box : int
            Edge of the maps in voxels.
        angpix : float
            Voxel size in angstrom.
        resolution : float
            Width of the truth's Gaussians in angstrom, see `gaussian_transform`.
        """


def find_method(name: str) -> Method:
    """Return the method of a name in `METHODS`."""
    module, function = METHODS[name].split(":")
    method: Method = getattr(importlib.import_module(module), function)
    return method
