"""Atomic models to density."""

from __future__ import annotations

import os
from dataclasses import dataclass

import gemmi
import numpy as np
import numpy.typing as npt
import scipy.fft

from cryored.errors import InputError
from cryored.fourier import frequencies, half_frequencies, spatial_frequency
from cryored.output import check_target
from cryored.volume import Floats, Volume

MARGIN = 3.0  # angstrom between the outermost atom and the face of the box
_OVERSAMPLING = 2  # atoms are spread on a grid this much finer, so that aliases stay near 1 %


@dataclass(frozen=True)
class Atoms:
    """Atoms of one model, centred on their mass.

    Parameters
    ----------
    positions : (n, 3) float64
        x, y, z in angstrom.
    weights : (n,) float64
        Atomic number times occupancy.
    """

    positions: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]

    def moved(self, rotation: npt.NDArray[np.float64], shift: npt.NDArray[np.float64] | float = 0.0) -> Atoms:
        """Return the atoms after a rotation (3, 3) and a shift in angstrom."""
        return Atoms(self.positions @ rotation.T + shift, self.weights)


def read_atoms(path: str | os.PathLike[str], chains: tuple[str, ...] = ()) -> Atoms:
    """Read a PDB or mmCIF file, gzipped or not: the first model without waters and hydrogens.

    Parameters
    ----------
    path : path
    chains : tuple of str
        Names of the chains to keep; all if empty.

    Raises
    ------
    InputError
        No readable structure, a chain that is not there, or no atoms left.
    """
    name = os.fspath(path)
    try:
        structure = gemmi.read_structure(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: no readable PDB or mmCIF file ({' '.join(str(error).split())})") from error
    if len(structure) == 0:
        raise InputError(f"{name}: holds no atomic model, expected PDB or mmCIF coordinates")
    model = structure[0]
    present = {chain.name for chain in model}
    missing = [chain for chain in chains if chain not in present]
    if missing:
        raise InputError(f"{name}: no chain {', '.join(missing)}; it has {', '.join(sorted(present))}")
    positions, weights, masses = [], [], []
    for chain in model:
        if chains and chain.name not in chains:
            continue
        for residue in chain:
            if residue.is_water():
                continue
            for atom in residue:
                if atom.is_hydrogen() or atom.element.atomic_number == 0:
                    continue
                positions.append(atom.pos.tolist())
                weights.append(atom.element.atomic_number * atom.occ)
                masses.append(atom.element.weight)
    if not sum(weights) > 0:
        raise InputError(f"{name}: no atoms (waters and hydrogens do not count), expected PDB or mmCIF coordinates")
    coordinates = np.array(positions)
    centre = np.average(coordinates, axis=0, weights=masses)
    return Atoms(coordinates - centre, np.array(weights))


def check_fits(atoms: Atoms, box: int, angpix: float, name: str) -> None:
    """Refuse atoms that come closer than `MARGIN` to a face of the box, naming a box that would do."""
    reach = float(np.abs(atoms.positions).max()) + MARGIN
    if reach > box / 2 * angpix:
        enough = 2 * int(np.ceil(reach / angpix))
        raise InputError(
            f"{name}: reaches {reach:.0f} A from its centre (with a margin of {MARGIN:.0f} A), but a box of {box} at "
            f"{angpix:g} A/pixel ends at {box / 2 * angpix:.0f} A; use --box {enough} or more"
        )


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
