"""Atoms to density."""

from __future__ import annotations

import gemmi
import numpy as np
import numpy.typing as npt
import scipy.constants
import scipy.fft

from cryored.errors import InputError
from cryored.maps.fourier import Complexes, frequencies, half_frequencies, inverse, spatial_frequency
from cryored.maps.volume import Floats, Volume
from cryored.simulation.structure import Atoms

_OVERSAMPLING = 2  # atoms are put on a grid this much finer, so that aliases stay near 1 % (gaussian)
_ALIAS = 1e-4  # and near this (potential)
_CUTOFF = 1e-6  # density (1/A**2) at which gemmi ends an atom: errors of some 1e-5

# Potential (V) of a unit of scattering-length density (1/A**2): h**2 / (2 pi m e), CODATA; 47.878 V A**2.
VOLT = scipy.constants.h**2 / (2 * np.pi * scipy.constants.m_e * scipy.constants.e) * 1e20


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
    transform = _cropped_transform(_spread(atoms, fine, angpix / _OVERSAMPLING), box)
    for axis, k in enumerate((frequencies(box), frequencies(box), half_frequencies(box))):
        # The cubic B-spline that spread the atoms is divided out again.
        kernel = np.sinc(k / fine) ** -4
        transform *= kernel.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    s = spatial_frequency((box, box, box), angpix)
    transform *= np.exp(-((s * resolution) ** 2))
    return transform


def gaussian_map(atoms: Atoms, box: int, angpix: float, resolution: float) -> Volume:
    """Density of atoms as Gaussians (see `gaussian_transform`), in electrons per cubic angstrom."""
    return _volume(gaussian_transform(atoms, box, angpix, resolution), angpix)


def potential_transform(atoms: Atoms, box: int, angpix: float, resolution: float) -> npt.NDArray[np.complex64]:
    """Transform of the electrostatic potential of independent neutral atoms in vacuo, free of aliases.

    Each atom is its electron scattering factor (five Gaussians, International Tables C, table 4.3.2.2, from
    gemmi) times ``exp(-B s**2 / 4)`` and its occupancy. As with `gaussian_transform`, all is limited by
    ``exp(-(s resolution)**2)``, which is 1/e at s = 1/resolution: what the atoms' Gaussian is there, comes on top
    of form factor and B factor here.

    gemmi sums the atoms in real space on a finer grid, blurred by a B factor that is taken off again.

    Parameters
    ----------
    atoms : Atoms
        With atomic numbers and B factors.
    box : int
        Edge in voxels.
    angpix : float
        Voxel size in angstrom.
    resolution : float
        In angstrom.

    Returns
    -------
    (box, box, box // 2 + 1) complex64
        Half-transform in V A**3, zero frequency at [0, 0, 0], phases relative to the map's centre.

    Raises
    ------
    InputError
        B factors below zero, or an element beyond the tables.
    ValueError
        Atoms without atomic numbers and B factors.
    """
    check_scattering(atoms, "atoms")
    fine = box * _OVERSAMPLING
    spacing = angpix / _OVERSAMPLING
    # A frequency s folds back to 1/spacing - s. At the map's Nyquist frequency the squares of the two differ by
    # 2 / angpix**2 (at twofold oversampling), by which the blur makes the alias `_ALIAS` of the true coefficient.
    blur = -4 * np.log(_ALIAS) / (2 / angpix**2)
    calculator = gemmi.DensityCalculatorE()
    calculator.blur = blur
    calculator.cutoff = _CUTOFF
    calculator.grid.set_size(fine, fine, fine)
    edge = box * angpix
    calculator.grid.set_unit_cell(gemmi.UnitCell(edge, edge, edge, 90, 90, 90))
    for position, number, occupancy, bfactor in zip(
        atoms.positions.tolist(),
        atoms.numbers.tolist(),
        atoms.occupancies.tolist(),
        atoms.bfactors.tolist(),
        strict=True,
    ):
        atom = gemmi.Atom()  # without charge and anisotropy
        atom.pos = gemmi.Position(*position)
        atom.element = gemmi.Element(number)
        atom.occ = occupancy
        atom.b_iso = bfactor
        calculator.add_atom_density_to_grid(atom)  # the cell is periodic: its corner is the map's centre
    transform = _cropped_transform(calculator.grid.array.T, box)
    s = spatial_frequency((box, box, box), angpix)
    transform *= np.float32(VOLT * spacing**3) * np.exp(np.float32(blur / 4 - resolution**2) * s**2)
    return transform


def potential_map(atoms: Atoms, box: int, angpix: float, resolution: float) -> Volume:
    """Electrostatic potential of atoms (see `potential_transform`), in volt."""
    return _volume(potential_transform(atoms, box, angpix, resolution), angpix)


def check_scattering(atoms: Atoms, name: str) -> None:
    """Refuse atoms that have no B factor or no electron scattering factor: gemmi would read beyond its table."""
    if not len(atoms.numbers) == len(atoms.bfactors) == len(atoms.weights):
        raise ValueError("atoms without atomic numbers and B factors have no potential")
    bad = int(np.count_nonzero(~(atoms.bfactors >= 0) | np.isinf(atoms.bfactors)))
    if bad:
        raise InputError(
            f"{name}: {bad} of {len(atoms.bfactors)} B factors are below zero or no number, expected squared angstrom; "
            "correct them or use --method gaussian"
        )
    elements = [gemmi.Element(number) for number in np.unique(atoms.numbers).tolist()]
    beyond = [element.name for element in elements if element.c4322 is None]
    if beyond:
        raise InputError(f"{name}: no electron scattering factors of {', '.join(beyond)}; use --method gaussian")


def _cropped_transform(grid: npt.NDArray[np.float32], box: int) -> Complexes:
    """Transform a fine grid whose first voxel is the centre; keep the coefficients of a map of `box` voxels."""
    fine = grid.shape[0]
    transform = scipy.fft.rfftn(grid)
    full = np.r_[0 : (box + 1) // 2, fine - box // 2 : fine]
    return transform[full[:, None], full[None, :], : box // 2 + 1]


def _volume(transform: Complexes, angpix: float) -> Volume:
    """Turn the half-transform of a density (density times cubic angstrom) into the centred map."""
    box = transform.shape[0]
    return Volume(inverse(transform, (box, box, box)) / np.float32(angpix**3), angpix)


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
