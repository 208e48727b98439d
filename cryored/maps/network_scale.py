"""Grey-scale standardisation: what a network sees does not depend on scale, offset or the solvent around.

Nor, for molecules larger than those it was trained on, on their size: the deviation of `standard_of` grows with the
root of the molecule's volume, so that a large molecule would be shown fainter than any in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryored.maps.resample import plan_axis, to_grid
from cryored.maps.volume import Floats

REFERENCE_VOLUME = (96 * 1.5) ** 3  # cubic angstrom: the box of Kimanius et al. 2021
_COARSE = 10.0  # angstrom: pixel size at which a molecule is weighed, so nothing finer than 20 A counts
_VOLUME_PER_KDA = 1370.0  # cubic angstrom; 34 structures of 38 to 610 kDa, proteins and nucleosomes: 1300 to 1450


@dataclass(frozen=True)
class Standard:
    """Level and deviation that stand for a map; see `standard_of`."""

    level: float
    deviation: float

    def apply(self, data: Floats) -> Floats:
        """Return (data - level) / deviation in float32."""
        return ((data - np.float32(self.level)) / np.float32(self.deviation)).astype(np.float32, copy=False)


def molecular_mass(data: Floats, voxel_size: float, level: float) -> float:
    """Estimate the mass of what a map shows, in kDa, by the volume that its density takes up.

    With b the density above the solvent, at 20 A, the volume is ``(sum b**2)**2 / sum b**4`` times that of a voxel: of
    a uniform body its own. RELION's half-maps of molecules of 50 to 91 kDa give that of the truth within 4 %; a map of
    noise alone gives a third of the box.

    Parameters
    ----------
    data : (z, y, x) float32
    voxel_size : float
        In angstrom.
    level : float
        Of the solvent.
    """
    z, y, x = (plan_axis(n, voxel_size, _COARSE) for n in data.shape)
    coarse = to_grid(data, (z, y, x), level) - level
    voxel = np.prod([grid.padded * voxel_size / grid.resampled for grid in (z, y, x)])
    squares = np.square(coarse, dtype=np.float64)
    fourth = float(np.square(squares).sum())
    return float(squares.sum() ** 2 * voxel / fourth / _VOLUME_PER_KDA) if fourth > 0 else 0.0


def contrast_of(mass: float, typical: float, largest: float) -> float:
    """Return by what a network's input is multiplied for a molecule larger than those that it was trained on.

    Parameters
    ----------
    mass, typical, largest : float
        Of the molecule, and in training, in kDa.

    Returns
    -------
    float
        1 up to the largest, and from some way beyond on what shows the molecule as a typical one was shown.
    """
    return max(1.0, min(mass / largest, (mass / typical) ** 0.5))


def standard_of(data: Floats, voxel_size: float) -> Standard:
    """Return solvent level and standard deviation, normalised to a reference volume V = (144 A)**3.

    With b the solvent level (mean over the faces of the box), v the volume of a voxel and the sum over the map::

        level = b        deviation = sqrt(sum((data - b)**2) v / V)

    In a box of V this is the standard deviation about the solvent level. More solvent at the level b changes
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
    faces = [data[0], data[-1], data[:, 0], data[:, -1], data[:, :, 0], data[:, :, -1]]
    level = float(np.mean([face.mean(dtype=np.float64) for face in faces]))
    total = float(np.square(data - np.float32(level)).sum(dtype=np.float64))
    # The rounding errors of a constant map must not pass for contrast.
    if total <= data.size * (1e-6 * abs(level)) ** 2:
        return Standard(level, 0.0)
    return Standard(level, float(np.sqrt(total * voxel_size**3 / REFERENCE_VOLUME)))
