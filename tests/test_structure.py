"""Atomic models: reading, chains, assemblies, and what cannot be used."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import gemmi
import numpy as np
import pytest

from cryored.errors import InputError
from cryored.simulation.structure import MARGIN, Atoms, check_fits, read_atoms

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"

PDB = """\
ATOM      1  CA  ALA A   1      10.000  10.000  10.000  1.00 20.00           C
ATOM      2  HA  ALA A   1      99.000  10.000  10.000  1.00 20.00           H
ATOM      3  O   ALA B   1      14.000  10.000  10.000  0.50 30.00           O
HETATM    4  O   HOH A   2      50.000  50.000  50.000  1.00 20.00           O
TER
END
"""

# A twofold axis along z, of chains A (a residue and an ion on the axis) and B.
DIMER = """\
REMARK 350 BIOMOLECULE: 1
REMARK 350 APPLY THE FOLLOWING TO CHAINS: A
REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000
REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000
REMARK 350   BIOMT1   2 -1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   2  0.000000 -1.000000  0.000000        0.00000
REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000        0.00000
REMARK 350 BIOMOLECULE: 2
REMARK 350 APPLY THE FOLLOWING TO CHAINS: B
REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000
REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000
ATOM      1  N   ALA A   1      10.000   0.000   0.000  1.00 20.00           N
ATOM      2  CA  ALA A   1      11.000   1.000   0.000  1.00 20.00           C
HETATM    3 ZN    ZN A   2       0.000   0.000   0.000  0.50 20.00          ZN
ATOM      4  N   ALA B   1      20.000   0.000   0.000  1.00 20.00           N
END
"""

CIF = """\
data_x
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.auth_asym_id
_atom_site.auth_seq_id
_atom_site.pdbx_PDB_ins_code
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
"""


def atom(name, residue, number, element, *, x=0.0, chain="A", occupancy="1.00", insertion=" "):
    return (
        f"ATOM      1 {name:<4} {residue:>3} {chain}{number:4d}{insertion}   {x:8.3f}   0.000   0.000"
        f"{occupancy:>6} 20.00          {element:>2}"
    )


def write(path, *lines):
    path.write_text("\n".join([*lines, "END", ""]))
    return path


@pytest.fixture(scope="module")
def atoms():
    return read_atoms(STRUCTURE)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.pdb"
    path.write_text(PDB)
    return path


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The warnings that were logged, also after a command has set up the log of its own."""
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)

    def found():
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    return found


# What is taken


def test_waters_and_hydrogens_are_dropped(small):
    atoms = read_atoms(small)
    np.testing.assert_array_equal(atoms.numbers, [6, 8])
    np.testing.assert_allclose(atoms.weights, [6, 4])  # electrons of carbon, and half of oxygen's
    np.testing.assert_allclose(atoms.occupancies, [1, 0.5])
    np.testing.assert_allclose(atoms.bfactors, [20, 30])
    np.testing.assert_allclose(atoms.masses, [12.011, 15.999 / 2], rtol=1e-4)
    centre = 4 * (15.999 / 2) / (15.999 / 2 + 12.011)
    np.testing.assert_allclose(atoms.positions, [[-centre, 0, 0], [4 - centre, 0, 0]], atol=1e-3)


@pytest.mark.parametrize(
    ("kept", "numbers"),
    [({"waters": True}, [6, 8, 8]), ({"hydrogens": True}, [1, 6, 8]), ({"waters": True, "hydrogens": True}, None)],
)
def test_waters_and_hydrogens_are_kept_when_asked(small, kept, numbers):
    np.testing.assert_array_equal(np.sort(read_atoms(small, **kept).numbers), numbers or [1, 6, 8, 8])


def test_the_centre_is_that_of_mass(atoms):
    np.testing.assert_allclose(atoms.masses @ atoms.positions / atoms.masses.sum(), 0, atol=1e-9)
    assert np.linalg.norm(atoms.positions.mean(axis=0)) > 1e-3  # which is not the mean position


def test_chains(small):
    np.testing.assert_allclose(read_atoms(small, ("B",)).weights, [4])
    np.testing.assert_allclose(read_atoms(small, ("B",)).positions, 0)
    assert len(read_atoms(small, ("B", "A")).weights) == 2
    with pytest.raises(InputError, match="small.pdb: no chain C, D; it has A, B"):
        read_atoms(small, ("A", "C", "D"))


def test_formats(tmp_path, atoms):
    """mmCIF and PDB, gzipped or not, hold the same atoms."""
    structure = gemmi.read_structure(str(STRUCTURE))
    cif, pdb = structure.make_mmcif_document().as_string(), structure.make_pdb_string()
    for name, text in (("a.cif", cif), ("a.pdb", pdb), ("a.ent", pdb)):
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for path in tmp_path.iterdir():
        found = read_atoms(path)
        np.testing.assert_allclose(found.weights, atoms.weights, rtol=1e-6)
        np.testing.assert_allclose(found.positions, atoms.positions, atol=1e-3)  # PDB has three decimals
        np.testing.assert_allclose(found.bfactors, atoms.bfactors, atol=0.01)  # and two


def test_the_first_of_several_models_with_a_warning(tmp_path, warnings):
    lines = [line for line in PDB.splitlines() if line.startswith("ATOM")]
    other = [line.replace("14.000", "44.000") for line in lines]
    path = write(tmp_path / "a.pdb", "MODEL        1", *lines, "ENDMDL", "MODEL        2", *other, "ENDMDL")
    assert np.ptp(read_atoms(path).positions[:, 0]) == pytest.approx(4)
    assert warnings() == [f"{path}: 2 models, of which the first is taken"]


def test_what_belongs_to_atoms_moves_with_them(atoms):
    moved = atoms.moved(np.diag([1.0, -1.0, -1.0]), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(moved.positions, atoms.positions * [1, -1, -1] + [1, 2, 3])
    np.testing.assert_array_equal(moved.masses, atoms.masses)
    np.testing.assert_array_equal(moved.bfactors, atoms.bfactors)


def test_insertion_codes_and_alternatives_are_atoms_of_their_own(tmp_path):
    lines = [atom(" N", "ALA", 52, "N", insertion=code, x=x) for code, x in ((" ", 0), ("A", 3), ("B", 6))]
    halves = [atom(f" CB {a}LA"[:4], "ALA", 52, "C", occupancy="0.50").replace(" ALA", f"{a}ALA", 1) for a in "AB"]
    found = read_atoms(write(tmp_path / "a.pdb", *lines, *halves))
    np.testing.assert_array_equal(np.sort(found.numbers), [6, 6, 7, 7, 7])
    assert found.masses.sum() == pytest.approx(3 * 14.007 + 12.011, rel=1e-4)


def test_long_names_of_mmcif(tmp_path):
    """Residues of five letters and chains of several; no B factor is gemmi's 20."""
    (tmp_path / "a.cif").write_text(
        CIF + "HETATM 1 C C1 . A1ABC A . Axp 1 ? 0 0 1 1 30\nHETATM 2 O O1 . A1ABC A . Axp 1 ? 0 0 2 1 ?\n"
    )
    found = read_atoms(tmp_path / "a.cif", ("Axp",))
    np.testing.assert_array_equal(found.numbers, [6, 8])
    np.testing.assert_allclose(found.bfactors, [30, 20])


# Assemblies


@pytest.mark.parametrize("name", ["a.pdb", "a.cif"])
def test_an_assembly(tmp_path, name):
    (tmp_path / "a.pdb").write_text(DIMER)
    if name == "a.cif":
        structure = gemmi.read_structure(str(tmp_path / "a.pdb"))
        structure.setup_entities()
        (tmp_path / name).write_text(structure.make_mmcif_document().as_string())
    path = tmp_path / name
    assert len(read_atoms(path).weights) == 4
    dimer = read_atoms(path, assembly="1")
    np.testing.assert_array_equal(np.sort(dimer.numbers), [6, 6, 7, 7, 30])
    zinc = dimer.numbers == 30
    np.testing.assert_allclose(dimer.positions[zinc], 0, atol=1e-6)  # on the axis: two halves are one ion
    np.testing.assert_allclose(dimer.occupancies, 1)
    np.testing.assert_allclose(np.sort(dimer.positions[~zinc, 0]), [-11, -10, 10, 11])
    np.testing.assert_array_equal(read_atoms(path, assembly="2").numbers, [7])
    np.testing.assert_array_equal(np.sort(read_atoms(path, ("A",), assembly="1").numbers), [6, 6, 7, 7, 30])


def test_an_assembly_that_is_not_there(tmp_path, small):
    (tmp_path / "a.pdb").write_text(DIMER)
    with pytest.raises(InputError, match="a.pdb: no assembly 3; it has assemblies 1, 2"):
        read_atoms(tmp_path / "a.pdb", assembly="3")
    with pytest.raises(InputError, match="small.pdb: no assembly 1; it has none; leave out --assembly"):
        read_atoms(small, assembly="1")
    with pytest.raises(InputError, match="a.pdb: assembly 1 has none of the chains kept; choose others by --chains"):
        read_atoms(tmp_path / "a.pdb", ("B",), assembly="1")
    (tmp_path / "a.pdb").write_text(DIMER.replace("TO CHAINS: B", "TO CHAINS: B, C"))
    with pytest.raises(InputError, match=r"a.pdb: assembly 2 cannot be built \(no chain C\); leave out --assembly"):
        read_atoms(tmp_path / "a.pdb", assembly="2")


# What cannot be used


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdb", PDB.splitlines()[3] + "\nEND\n", r"no atoms \(waters and hydrogens do not count\), expected PDB or"),
        ("a.pdb", "hello\n", "no atoms"),
        ("a.pdb", "", "no atoms"),
        ("a.cif", "", r"no readable PDB or mmCIF file \(empty\)"),
        ("a.cif", "data_x\n_entry.id x\n", "holds no atomic model, expected PDB or mmCIF coordinates"),
        ("a.cif", "hello\n", "no readable PDB or mmCIF file"),
        ("a.mrc", "hello\n", "no readable PDB or mmCIF file .*Unknown format"),
        ("a.cif.gz", "hello\n", "no readable PDB or mmCIF file"),
    ],
)
def test_what_is_no_structure(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: {message}") as caught:
        read_atoms(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_no_atoms_though_all_would_count(tmp_path):
    with pytest.raises(InputError, match="a.pdb: no atoms, expected PDB"):
        read_atoms(write(tmp_path / "a.pdb"), waters=True, hydrogens=True)
    with pytest.raises(InputError, match=r"a.pdb: no atoms \(hydrogens do not count\), expected PDB"):
        read_atoms(write(tmp_path / "a.pdb"), waters=True)


def test_a_missing_file(tmp_path):
    for name in ("none.cif", "none.pdb.gz"):
        with pytest.raises(InputError, match=f"{name}: no readable PDB or mmCIF file .*No such file"):
            read_atoms(tmp_path / name)


@pytest.mark.parametrize("name", ["1abc.pdb1", "1abc.PDB12", "1abc.pdb2.gz"])
def test_rcsbs_names_of_assemblies(tmp_path, small, name):
    content = small.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    np.testing.assert_array_equal(read_atoms(tmp_path / name).positions, read_atoms(small).positions)


@pytest.mark.parametrize("kind", ["pdb", "cif"])
def test_gzipped_files_that_are_cut_short_or_damaged(tmp_path, kind):
    """Half a file is no smaller molecule."""
    structure = gemmi.read_structure(str(STRUCTURE))
    text = structure.make_pdb_string() if kind == "pdb" else structure.make_mmcif_document().as_string()
    whole = gzip.compress(text.encode())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path = tmp_path / f"a.{kind}.gz"
    for content in (whole[: len(whole) // 2], whole[:-1], b"", bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"a.{kind}.gz: no ") as caught:
            read_atoms(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert len(read_atoms(path).weights) > 2000


@pytest.mark.parametrize(
    ("residue", "name", "element"), [("ALA", " CA", "C"), ("DA", " P", "P"), ("UNK", " CA", "C"), ("XYZ", " CA", "C")]
)
def test_a_trace_is_no_molecule(tmp_path, residue, name, element):
    lines = [atom(name, residue, i, element, x=3.8 * i) for i in range(1, 6)]
    ligand = [atom(" N", "ALA", i, "N", chain="B", x=i) for i in range(1, 4)]
    path = write(tmp_path / "a.pdb", *lines, *ligand)
    expected = "a.pdb: all 5 residues of chain A hold only their CA or P atom, expected a full-atom model"
    with pytest.raises(InputError, match=expected) as caught:
        read_atoms(path)
    assert "\n" not in str(caught.value)
    assert len(read_atoms(path, ("B",)).weights) == 3
    full = atom(" CB", "ALA", 9, "C")
    assert len(read_atoms(write(path, *lines, full)).weights) == 6  # one residue with more


def test_calcium_is_no_trace(tmp_path):
    lines = [atom("CA", "CA", i, "CA", x=5.0 * i) for i in range(1, 4)]
    np.testing.assert_array_equal(read_atoms(write(tmp_path / "a.pdb", *lines)).numbers, 20)


def test_atoms_of_unknown_element(tmp_path, warnings):
    unknown = [atom(" X1", "UNX", 2, "X"), atom(" Q", "UNX", 3, "")]
    path = write(tmp_path / "a.pdb", atom(" N", "ALA", 1, "N"), *unknown)
    np.testing.assert_array_equal(read_atoms(path).numbers, [7])
    assert warnings() == [f"{path}: 2 atoms of unknown element are dropped"]
    with pytest.raises(InputError, match="a.pdb: 2 atoms, all of unknown element; fill in the element column"):
        read_atoms(write(path, *unknown))


def test_atoms_of_no_occupancy_count_nothing(tmp_path):
    """They neither move the centre nor reach out of the box."""
    far = atom(" C", "ALA", 1, "C", x=500.0, occupancy="0.00")
    path = write(tmp_path / "a.pdb", atom(" N", "ALA", 1, "N", x=7.0), far)
    found = read_atoms(path)
    np.testing.assert_array_equal(found.numbers, [7])
    np.testing.assert_allclose(found.positions, 0)
    with pytest.raises(InputError, match="a.pdb: all atoms have occupancy 0, expected some above; set"):
        read_atoms(write(path, far))


@pytest.mark.parametrize(
    ("position", "occupancy"), [("?", "1.0"), (".", "1.0"), ("nan", "1.0"), ("1.0", "none"), ("1.0", "-0.5")]
)
def test_positions_and_occupancies_that_are_no_numbers(tmp_path, position, occupancy):
    good = "ATOM 1 N N . ALA A 1 A 1 ? 0 0 1 1 30\n"
    bad = f"ATOM 2 C C . ALA A 1 A 1 ? {position} 0 2 {occupancy} 30\n"
    (tmp_path / "a.cif").write_text(CIF + good + bad)
    with pytest.raises(InputError, match="a.cif: 1 atoms whose position or occupancy is no number or below zero; corr"):
        read_atoms(tmp_path / "a.cif")


# The box


def test_a_box_that_is_too_small_names_one_that_fits(atoms):
    with pytest.raises(InputError, match=r"6M2B: reaches \d+ A from its centre .* use --box \d+ or more") as caught:
        check_fits(atoms, 40, 1.5, "6M2B")
    enough = int(str(caught.value).split("--box ")[1].split()[0])
    check_fits(atoms, enough, 1.5, "6M2B")
    with pytest.raises(InputError, match=f"use --box {enough} or more"):
        check_fits(atoms, enough - 2, 1.5, "6M2B")


def test_the_margin():
    check_fits(Atoms(np.array([[0, 0, 16 - MARGIN]]), np.ones(1)), 32, 1.0, "a")
    with pytest.raises(InputError, match="a: reaches 16 A .* a box of 32 at 1 A/pixel ends at 16 A; use --box 34"):
        check_fits(Atoms(np.array([[0, 0, 16.1 - MARGIN]]), np.ones(1)), 32, 1.0, "a")
