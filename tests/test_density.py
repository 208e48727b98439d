"""Atomic models to density."""

from __future__ import annotations

import gzip
import shlex
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.fourier import spatial_frequency
from cryored.mrc import read_volume
from cryored.simulate.density import gaussian_map, gaussian_transform
from cryored.simulate.structure import MARGIN, Atoms, check_fits, read_atoms

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"

PDB = """\
ATOM      1  CA  ALA A   1      10.000  10.000  10.000  1.00 20.00           C
ATOM      2  HA  ALA A   1      99.000  10.000  10.000  1.00 20.00           H
ATOM      3  O   ALA B   1      14.000  10.000  10.000  0.50 20.00           O
HETATM    4  O   HOH A   2      50.000  50.000  50.000  1.00 20.00           O
TER
END
"""


@pytest.fixture(scope="module")
def atoms():
    return read_atoms(STRUCTURE)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.pdb"
    path.write_text(PDB)
    return path


def run(*arguments):
    return CliRunner().invoke(cli, ["simulate", "map", *map(str, arguments)])


# Reading


def test_waters_and_hydrogens_are_dropped(small):
    atoms = read_atoms(small)
    np.testing.assert_allclose(atoms.weights, [6, 4])  # electrons of carbon, and half of oxygen's
    centre = 4 * 15.999 / (15.999 + 12.011)  # of mass, which knows no occupancy
    np.testing.assert_allclose(atoms.positions, [[-centre, 0, 0], [4 - centre, 0, 0]], atol=1e-3)


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


def test_the_first_of_several_models(tmp_path):
    lines = [line for line in PDB.splitlines() if line.startswith("ATOM")]
    other = [line.replace("14.000", "44.000") for line in lines]
    text = "\n".join(["MODEL        1", *lines, "ENDMDL", "MODEL        2", *other, "ENDMDL", "END", ""])
    (tmp_path / "a.pdb").write_text(text)
    assert np.ptp(read_atoms(tmp_path / "a.pdb").positions[:, 0]) == pytest.approx(4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdb", PDB.splitlines()[3] + "\nEND\n", r"no atoms \(waters and hydrogens do not count\), expected PDB or"),
        ("a.pdb", "hello\n", "no atoms"),
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


def test_missing_and_cut_short_files(tmp_path):
    with pytest.raises(InputError, match="none.cif: no readable PDB or mmCIF file .*No such file"):
        read_atoms(tmp_path / "none.cif")
    (tmp_path / "cut.cif.gz").write_bytes(STRUCTURE.read_bytes()[:20000])
    with pytest.raises(InputError, match="cut.cif.gz: no readable"):
        read_atoms(tmp_path / "cut.cif.gz")


# Density


@pytest.mark.parametrize(("box", "angpix", "resolution"), [(24, 4.0, 8.0), (25, 4.0, 8.0), (64, 1.5, 3.0)])
def test_transform_equals_the_sum_over_atoms(atoms, box, angpix, resolution):
    transform = gaussian_transform(atoms, box, angpix, resolution)
    assert transform.shape == (box, box, box // 2 + 1)
    assert transform.dtype == np.complex64
    rng = np.random.default_rng(0)
    inside = (box - 1) // 2
    k = rng.integers(-inside, inside + 1, (300, 3))  # z, y, x
    k[:, 2] = np.abs(k[:, 2])
    s = k / (box * angpix)
    falloff = np.exp(-((np.linalg.norm(s, axis=1) * resolution) ** 2))
    direct = np.exp(-2j * np.pi * s @ atoms.positions[:, ::-1].T) @ atoms.weights * falloff
    found = transform[k[:, 0], k[:, 1], k[:, 2]]
    # Aliases of the spline grid: near 1 % of the atoms' random sum towards Nyquist, far less below.
    typical = np.sqrt(np.sum(atoms.weights**2)) * falloff
    assert np.max(np.abs(found - direct) / typical) < 0.03
    assert np.linalg.norm(found - direct) / np.linalg.norm(direct) < 0.005


def test_the_total_charge(atoms):
    volume = gaussian_map(atoms, 40, 3.0, 9.0)
    assert volume.data.dtype == np.float32
    total = volume.data.sum(dtype=np.float64) * 3.0**3
    assert total == pytest.approx(atoms.weights.sum(), rel=1e-5)  # float32 sums of 64000 voxels


@pytest.mark.parametrize("box", [20, 21])
def test_an_atom_lies_where_it_should(box):
    """x, y, z in angstrom from the voxel n // 2, with the Gaussian's height and width."""
    atoms = Atoms(np.array([[6.0, -3.0, 1.5]]), np.array([7.0]))
    data = gaussian_map(atoms, box, 1.5, 8.0).data
    peak = np.unravel_index(data.argmax(), data.shape)
    assert peak == (box // 2 + 1, box // 2 - 2, box // 2 + 4)
    # exp(-(8 s)**2) in Fourier space is (pi / 64)**1.5 exp(-(pi r / 8)**2) in real space.
    height = 7 * (np.pi / 64) ** 1.5
    assert data.max() == pytest.approx(height, rel=0.003)  # the transform ends at 1/3 A, at exp(-7) of its height
    assert data[peak[0], peak[1], peak[2] - 2] == pytest.approx(height * np.exp(-((np.pi * 3 / 8) ** 2)), rel=0.01)


def test_turning_and_shifting_the_atoms_turns_and_shifts_the_map(atoms):
    rotation = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])  # x to y
    turned = gaussian_map(atoms.moved(rotation.astype(float)), 33, 3.0, 9.0).data
    plain = gaussian_map(atoms, 33, 3.0, 9.0).data
    np.testing.assert_allclose(turned, np.rot90(plain, axes=(2, 1)), atol=1e-3 * plain.max())  # aliases
    shifted = gaussian_map(atoms.moved(np.eye(3), np.array([3.0, 0, -6.0])), 33, 3.0, 9.0).data
    np.testing.assert_allclose(shifted, np.roll(plain, (-2, 0, 1), (0, 1, 2)), atol=1e-4 * plain.max())


def test_the_falloff_is_a_gaussian():
    one = Atoms(np.zeros((1, 3)), np.ones(1))
    s = spatial_frequency((16, 16, 16), 2.0)
    found = gaussian_transform(one, 16, 2.0, 5.0)
    expected = np.exp(-((5 * s) ** 2))
    # Aliases of the spline on the finer grid, (1/3)**4 = 1.2 % at Nyquist along each axis, and next to none below.
    np.testing.assert_allclose(found, expected, rtol=0.05)
    inner = s < 0.5 * 0.25
    np.testing.assert_allclose(found[inner], expected[inner], rtol=1e-3)


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


# Command


def test_the_command(tmp_path, atoms):
    done = run(STRUCTURE, "-o", tmp_path / "a.mrc", "--box", "48", "--angpix", "2", "--resolution", "5")
    assert done.exit_code == 0, done.output
    assert done.output == ""
    volume = read_volume(tmp_path / "a.mrc")
    np.testing.assert_array_equal(volume.data, gaussian_map(atoms, 48, 2.0, 5.0).data)
    assert volume.voxel_size == 2
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        assert mrc.get_labels()[0].endswith("simulate map gaussian 5 A 6M2B.cif.gz")


def test_chains_of_the_command(tmp_path, small):
    assert run(small, "-o", tmp_path / "a.mrc", "--box", "16", "--angpix", "2", "--chains", "B,A").exit_code == 0
    total = read_volume(tmp_path / "a.mrc").data.sum() * 8
    assert total == pytest.approx(10, rel=1e-5)
    done = run(small, "-o", tmp_path / "b.mrc", "--box", "16", "--chains", "B,C")
    assert done.exit_code == 1
    assert "no chain C; it has A, B" in done.stderr


def test_too_small_a_box_is_an_error_before_any_work(tmp_path):
    done = run(STRUCTURE, "-o", tmp_path / "a.mrc", "--box", "40")
    assert done.exit_code == 1
    assert "6M2B.cif.gz: reaches 33 A from its centre (with a margin of 3 A)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_help_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = gemmi.read_structure(str(STRUCTURE)).make_pdb_string()
    (tmp_path / "1abc.pdb.gz").write_bytes(gzip.compress(text.encode()))
    lines = [line for line in run("--help").stdout.splitlines() if line.strip().startswith("cryored simulate map")]
    assert len(lines) == 1
    assert CliRunner().invoke(cli, shlex.split(lines[0])[1:]).exit_code == 0
    assert read_volume(tmp_path / "truth.mrc").shape == (96, 96, 96)
