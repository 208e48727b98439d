"""Atoms to density."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import scipy.fft

from cryored.fourier import frequencies, half_frequencies, spatial_frequency
from cryored.output import check_target
from cryored.simulate.structure import Atoms, check_fits, read_atoms
from cryored.volume import Floats, Volume

_OVERSAMPLING = 2  # atoms are spread on a grid this much finer, so that aliases stay near 1 %


def gaussian_transform(atoms: Atoms, box: int, angpix: float, resolution: float) -> npt.NDArray[np.complex64]:
    """Transform of atoms as Gaussians weighted by atomic number, free of aliases.

    Each atom is ``exp(-(pi r / resolution)**2)`` as in EMAN2's e2pdb2mrc: its transform falls to 1/e at
    1/resolution. The amplitude is in electrons.

    Parameters
    ----------
    atoms : Atoms
    box : int
        Edge in voxels.
    angpix : float
        Voxel size in angstrom.
    resolution : float
        In angstrom.

    Returns
    -------
    (box, box, box // 2 + 1) complex64
        Half-transform, zero frequency at [0, 0, 0], phases relative to the map's centre.
    """
    fine = box * _OVERSAMPLING
    grid = _spread(atoms, fine, angpix / _OVERSAMPLING)
    # The grid's first voxel is the centre, so no shift is needed before the transform.
    transform = scipy.fft.rfftn(grid)
    full = np.r_[0 : (box + 1) // 2, fine - box // 2 : fine]
    cropped = transform[full[:, None], full[None, :], : box // 2 + 1]
    for axis, k in enumerate((frequencies(box), frequencies(box), half_frequencies(box))):
        # The cubic B-spline that spread the atoms is divided out again.
        kernel = np.sinc(k / fine) ** -4
        cropped *= kernel.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    s = spatial_frequency((box, box, box), angpix)
    cropped *= np.exp(-((s * resolution) ** 2))
    return cropped


def gaussian_map(atoms: Atoms, box: int, angpix: float, resolution: float) -> Volume:
    """Density of atoms as Gaussians (see `gaussian_transform`), in electrons per cubic angstrom."""
    transform = gaussian_transform(atoms, box, angpix, resolution)
    data = scipy.fft.fftshift(scipy.fft.irfftn(transform, s=(box, box, box)))
    return Volume(data / np.float32(angpix**3), angpix)


def simulate_map_file(
    structure: str,
    output: str,
    *,
    box: int,
    angpix: float,
    resolution: float,
    chains: tuple[str, ...] = (),
    overwrite: bool = False,
) -> None:
    """Write the density of an atomic model as a map; see `gaussian_transform`."""
    from cryored.mrc import write_volume

    check_target(output, overwrite)
    atoms = read_atoms(structure, chains)
    check_fits(atoms, box, angpix, structure)
    volume = gaussian_map(atoms, box, angpix, resolution)
    write_volume(output, volume, label=f"simulate map gaussian {resolution:g} A {os.path.basename(structure)}")


def _spread(atoms: Atoms, n: int, spacing: float) -> npt.NDArray[np.float32]:
    """Spread weights on a periodic (z, y, x) grid by cubic B-splines; the first voxel is the origin."""
    position = atoms.positions[:, ::-1] / spacing  # z, y, x
    base = np.floor(position).astype(np.int64)
    fraction = position - base
    offsets = np.arange(-1, 3)
    index = (base[:, :, None] + offsets) % n  # (atoms, axis, 4)
    weight = _cubic_spline(np.abs(fraction[:, :, None] - offsets))
    flat = (index[:, 0, :, None, None] * n + index[:, 1, None, :, None]) * n + index[:, 2, None, None, :]
    value = (
        atoms.weights[:, None, None, None]
        * weight[:, 0, :, None, None]
        * weight[:, 1, None, :, None]
        * weight[:, 2, None, None, :]
    )
    grid = np.bincount(flat.ravel(), weights=value.ravel(), minlength=n**3)
    return grid.astype(np.float32).reshape(n, n, n)


def _cubic_spline(t: Floats) -> Floats:
    """Cubic B-spline at distance t >= 0 in grid steps."""
    near = 2 / 3 - t**2 + t**3 / 2
    far = np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, near, far)
