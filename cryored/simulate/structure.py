"""Atomic models: PDB and mmCIF files to centred atoms."""

from __future__ import annotations

import os
from dataclasses import dataclass

import gemmi
import numpy as np
import numpy.typing as npt

from cryored.errors import InputError

MARGIN = 3.0  # angstrom between the outermost atom and the face of the box


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
