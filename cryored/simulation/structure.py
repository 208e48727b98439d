"""Atomic models: PDB and mmCIF files to centred atoms."""

from __future__ import annotations

import gzip
import logging
import os
import re
import zlib
from dataclasses import dataclass, field, replace

import gemmi
import numpy as np
import numpy.typing as npt

from cryored.errors import InputError

MARGIN = 3.0  # angstrom between the outermost atom and the face of the box

logger = logging.getLogger(__name__)


def _no_numbers() -> npt.NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Atoms:
    """Atoms of one model.

    Parameters
    ----------
    positions : (n, 3) float64
        x, y, z in angstrom, from the centre of mass unless they were read otherwise.
    weights : (n,) float64
        Atomic number times occupancy.
    numbers : (n,) int64
        Atomic numbers. Empty where only the weights matter, and then nothing is known of masses and occupancies.
    bfactors : (n,) float64
        Isotropic B factors in squared angstrom; empty where they do not matter.
    """

    positions: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    numbers: npt.NDArray[np.int64] = field(default_factory=_no_numbers)
    bfactors: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def occupancies(self) -> npt.NDArray[np.float64]:
        """Occupancies, (n,) float64."""
        return self.weights / self.numbers

    @property
    def masses(self) -> npt.NDArray[np.float64]:
        """Atomic masses times occupancy in dalton, (n,) float64."""
        elements, index = np.unique(self.numbers, return_inverse=True)
        return np.array([gemmi.Element(int(number)).weight for number in elements])[index] * self.occupancies

    def moved(self, rotation: npt.NDArray[np.float64], shift: npt.NDArray[np.float64] | float = 0.0) -> Atoms:
        """Return the atoms after a rotation (3, 3) and a shift in angstrom."""
        return replace(self, positions=self.positions @ rotation.T + shift)


def read_atoms(
    path: str | os.PathLike[str],
    chains: tuple[str, ...] = (),
    *,
    assembly: str | None = None,
    waters: bool = False,
    hydrogens: bool = False,
    centre: bool = True,
) -> Atoms:
    """Read the first model of a PDB or mmCIF file, gzipped or not.

    Atoms of zero occupancy count nothing. What may surprise (several models, atoms of unknown element, which are
    dropped) is logged as a warning.

    Parameters
    ----------
    path : path
    chains : tuple of str
        Names of the chains to keep, as in the file (mmCIF: the author's); all if empty.
    assembly : str, optional
        Name of the biological assembly to build from these chains; by default the coordinates as in the file.
        Atoms on a symmetry axis are not doubled.
    waters, hydrogens : bool
        Whether to keep them.
    centre : bool
        Move the centre of mass to the origin.

    Raises
    ------
    InputError
        No readable structure, a chain or an assembly that is not there, a chain of nothing but CA or P atoms,
        positions or occupancies that are no numbers, or no atoms left.
    """
    name = os.fspath(path)
    structure = _read(name)
    _keep_chains(structure[0], chains, name)
    _refuse_traces(structure[0], name)
    if assembly is not None:
        _build(structure, assembly, name)
    table, unknown = _table(structure[0], waters, hydrogens)
    if unknown and not len(table):
        raise InputError(f"{name}: {unknown} atoms, all of unknown element; fill in the element column")
    if unknown:
        logger.warning("%s: %d atoms of unknown element are dropped", name, unknown)
    if not len(table):
        dropped = " and ".join(word for word, kept in (("waters", waters), ("hydrogens", hydrogens)) if not kept)
        ignored = f" ({dropped} do not count)" if dropped else ""
        raise InputError(f"{name}: no atoms{ignored}, expected PDB or mmCIF coordinates")
    broken = int(np.count_nonzero(~(np.isfinite(table[:, :4]).all(axis=1) & (table[:, 3] >= 0))))
    if broken:
        raise InputError(
            f"{name}: {broken} atoms whose position or occupancy is no number or below zero; correct or remove them"
        )
    table = table[table[:, 3] > 0]
    if not len(table):
        raise InputError(f"{name}: all atoms have occupancy 0, expected some above; set the occupancies to 1")
    numbers = table[:, 4].astype(np.int64)
    atoms = Atoms(table[:, :3], table[:, 3] * numbers, numbers, table[:, 5])
    if not centre:
        return atoms
    return atoms.moved(np.eye(3), -np.average(atoms.positions, axis=0, weights=atoms.masses))


def box_for(atoms: Atoms, angpix: float) -> int:
    """Return the least even box about the origin that no atom comes closer to the faces of than `MARGIN`."""
    return 2 * int(np.ceil((float(np.abs(atoms.positions).max()) + MARGIN) / angpix))


def check_fits(atoms: Atoms, box: int, angpix: float, name: str) -> None:
    """Refuse atoms that come closer than `MARGIN` to a face of the box, naming a box that would do."""
    reach = float(np.abs(atoms.positions).max()) + MARGIN
    if reach > box / 2 * angpix:
        enough = box_for(atoms, angpix)
        raise InputError(
            f"{name}: reaches {reach:.0f} A from its centre (with a margin of {MARGIN:.0f} A), but a box of {box} at "
            f"{angpix:g} A/pixel ends at {box / 2 * angpix:.0f} A; use --box {enough} or more"
        )


def _read(name: str) -> gemmi.Structure:
    """Read a file and leave only its first model."""
    try:
        _check_gzip(name)
        # RCSB calls assemblies 1abc.pdb1, .pdb2 ...: gemmi tells the format by the name, and knows none of these.
        pdb = re.search(r"\.pdb\d+(\.gz)?$", name, re.IGNORECASE)
        structure = gemmi.read_pdb(name) if pdb else gemmi.read_structure(name)
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError, IndexError) as error:
        # gemmi answers an empty mmCIF with an IndexError.
        reason = "empty" if isinstance(error, IndexError) else getattr(error, "strerror", None) or str(error)
        reason = " ".join(reason.split())
        raise InputError(f"{name}: no readable PDB or mmCIF file ({reason})") from error
    if len(structure) == 0:
        raise InputError(f"{name}: holds no atomic model, expected PDB or mmCIF coordinates")
    if len(structure) > 1:
        logger.warning("%s: %d models, of which the first is taken", name, len(structure))
        del structure[1:]
    return structure


def _check_gzip(name: str) -> None:
    """Unpack a gzipped file to its checksum: gemmi takes a PDB file that is cut short for a smaller molecule."""
    if name.endswith(".gz"):
        with gzip.open(name) as stream:
            while stream.read(2**20):
                pass


def _keep_chains(model: gemmi.Model, chains: tuple[str, ...], name: str) -> None:
    """Empty all chains but those named, if any are named."""
    present = sorted({chain.name for chain in model})
    missing = [chain for chain in chains if chain not in present]
    if missing:
        raise InputError(f"{name}: no chain {', '.join(missing)}; it has {', '.join(present)}")
    for chain in model:
        if chains and chain.name not in chains:
            del chain[:]  # it stays by name: gemmi builds no assembly of which a chain is missing


def _refuse_traces(model: gemmi.Model, name: str) -> None:
    """Refuse chains of which only the trace (CA or P atoms) is there: their density would be none of a molecule."""
    for chain in model:
        traced = [_is_trace(residue) for residue in chain if _is_trace(residue) or _is_polymeric(residue)]
        if len(traced) > 1 and all(traced):
            raise InputError(
                f"{name}: all {len(traced)} residues of chain {chain.name} hold only their CA or P atom, expected a "
                "full-atom model; rebuild the chain or leave it out (--chains)"
            )


def _is_trace(residue: gemmi.Residue) -> bool:
    """Tell whether a residue is a lone CA or P atom; calcium is named CA too."""
    return {(atom.name, atom.element.name) for atom in residue} in ({("CA", "C")}, {("P", "P")})


def _is_polymeric(residue: gemmi.Residue) -> bool:
    kind = gemmi.find_tabulated_residue(residue.name)
    return bool(kind.is_amino_acid() or kind.is_nucleic_acid())


def _build(structure: gemmi.Structure, assembly: str, name: str) -> None:
    """Replace the coordinates by those of a biological assembly."""
    present = [found.name for found in structure.assemblies]
    if assembly not in present:
        have = f"assemblies {', '.join(present)}" if present else "none; leave out --assembly"
        raise InputError(f"{name}: no assembly {assembly}; it has {have}")
    try:
        structure.transform_to_assembly(assembly, gemmi.HowToNameCopiedChain.AddNumber)
    except RuntimeError as error:
        raise InputError(f"{name}: assembly {assembly} cannot be built ({error}); leave out --assembly") from error
    if len(structure) == 0 or not any(len(chain) for chain in structure[0]):
        raise InputError(f"{name}: assembly {assembly} has none of the chains kept; choose others by --chains")


def _table(model: gemmi.Model, waters: bool, hydrogens: bool) -> tuple[npt.NDArray[np.float64], int]:
    """List x, y, z, occupancy, atomic number and B factor of the atoms, and count those of unknown element."""
    rows = []
    unknown = 0
    for chain in model:
        for residue in chain:
            if residue.is_water() and not waters:
                continue
            for atom in residue:
                if atom.element.atomic_number == 0:
                    unknown += 1
                elif hydrogens or not atom.is_hydrogen():
                    rows.append((*atom.pos.tolist(), atom.occ, atom.element.atomic_number, atom.b_iso))
    return np.array(rows, dtype=np.float64).reshape(-1, 6), unknown
