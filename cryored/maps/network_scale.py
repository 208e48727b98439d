"""Grey-scale standardisation: what a network sees does not depend on scale, offset or the solvent around."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryored.maps.volume import Floats

REFERENCE_VOLUME = (96 * 1.5) ** 3  # cubic angstrom: the box of Kimanius et al. 2021


@dataclass(frozen=True)
class Standard:
    """Level and deviation that stand for a map; see `standard_of`."""

    level: float
    deviation: float

    def apply(self, data: Floats) -> Floats:
        """Return (data - level) / deviation in float32."""
        return ((data - np.float32(self.level)) / np.float32(self.deviation)).astype(np.float32, copy=False)


def solvent_level(data: Floats) -> float:
    """Return the median over the faces of a map's box: the solvent's, also where a filament or a slab crosses some."""
    return float(np.median(np.concatenate([face.ravel() for face in _faces(data)])))


def standard_of(data: Floats, voxel_size: float) -> Standard:
    """Return level and standard deviation, normalised to a reference volume V = (144 A)**3.

    With b the level (mean over the faces of the box, the solvent's), v the volume of a voxel and the sum over the
    map::

        level = b        deviation = sqrt(sum((data - b)**2) v / V)

    In a box of V this is the standard deviation about that level. More solvent at the level b changes
    nothing, nor does finer sampling; ``a * x + c`` has ``|a|`` times the deviation of x. The level is the
    solvent's and not the mean, because the mean over V means nothing for a molecule larger than V, and because
    the solvent then equals the zeros with which convolutions pad.

    Parameters
    ----------
    data : (z, y, x) float32
        The whole map, before any tile or patch is cut.
    voxel_size : float
        In angstrom.

    Returns
    -------
    Standard
        Deviation 0 for a constant map.
    """
    level = float(np.mean([face.mean(dtype=np.float64) for face in _faces(data)]))
    total = float(np.square(data - np.float32(level)).sum(dtype=np.float64))
    # The rounding errors of a constant map must not pass for contrast.
    if total <= data.size * (1e-6 * abs(level)) ** 2:
        return Standard(level, 0.0)
    return Standard(level, float(np.sqrt(total * voxel_size**3 / REFERENCE_VOLUME)))


def _faces(data: Floats) -> list[Floats]:
    return [data[0], data[-1], data[:, 0], data[:, -1], data[:, :, 0], data[:, :, -1]]
