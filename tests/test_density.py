"""Atomic models to density."""

from __future__ import annotations

import gzip
import shlex
from dataclasses import replace
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import spatial_frequency
from cryored.maps.volume import Volume
from cryored.simulation.density import (
    check_scattering,
    gaussian_map,
    gaussian_transform,
    potential_map,
    potential_transform,
)
from cryored.simulation.structure import Atoms, read_atoms

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"

REMARKS = """\
REMARK 350 BIOMOLECULE: 1
REMARK 350 APPLY THE FOLLOWING TO CHAINS: A, B
REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000
REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000
"""

PDB = (
    REMARKS
    + """\
REMARK 350   BIOMT1   2 -1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   2  0.000000 -1.000000  0.000000        0.00000
REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000        0.00000
ATOM      1  CA  ALA A   1       6.000   1.000   1.000  1.00 20.00           C
ATOM      2  HA  ALA A   1      -9.000   1.000   1.000  1.00 20.00           H
ATOM      3  O   ALA B   1       9.000   1.000   1.000  0.50 20.00           O
ATOM      4  N   ALA C   1       9.000   5.000   1.000  1.00 20.00           N
HETATM    5  O   HOH A   2      14.000   9.000   9.000  1.00 20.00           O
TER
END
"""
)


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


# Potential


def scattered(atoms, s):
    """Electron scattering factors times B factors, summed over atoms at the frequencies s (n, 3; z, y, x), in A."""
    total = 0
    square = np.sum(s**2, axis=1)
    for position, number, occupancy, bfactor in zip(
        atoms.positions, atoms.numbers, atoms.occupancies, atoms.bfactors, strict=True
    ):
        five = gemmi.Element(int(number)).c4322
        factor = sum(a * np.exp(-b * square / 4) for a, b in zip(five.a, five.b, strict=True))
        phase = np.exp(-2j * np.pi * s @ position[::-1])
        total = total + occupancy * factor * np.exp(-bfactor * square / 4) * phase
    return total


def few_atoms(length, rng):
    numbers = np.array([1, 6, 7, 8, 15, 16, 30, 6, 6])
    bfactors = np.array([0, 0, 5, 20, 40, 80, 150, 300, 33.3])
    occupancies = rng.uniform(0.3, 1, 9)
    return Atoms(rng.uniform(-length / 2, length / 2, (9, 3)), occupancies * numbers, numbers, bfactors)


@pytest.mark.parametrize(
    ("box", "angpix", "resolution"), [(24, 1.5, 3.0), (25, 1.5, 3.0), (20, 1.0, 0.5), (21, 3.0, 7.0), (8, 4.0, 20.0)]
)
def test_potential_equals_the_sum_over_scattering_factors(box, angpix, resolution):
    atoms = few_atoms(box * angpix, np.random.default_rng(0))
    transform = potential_transform(atoms, box, angpix, resolution)
    assert transform.shape == (box, box, box // 2 + 1)
    assert transform.dtype == np.complex64
    inside = (box - 1) // 2
    axis = np.arange(-inside, inside + 1)
    k = np.stack(np.meshgrid(axis, axis, axis[inside:], indexing="ij"), axis=-1).reshape(-1, 3)
    s = k / (box * angpix)
    volt = 47.87801  # h**2 / (2 pi m e) in V A**2
    direct = volt * scattered(atoms, s) * np.exp(-np.sum(s**2, axis=1) * resolution**2)
    found = transform[k[:, 0], k[:, 1], k[:, 2]]
    shell = np.rint(np.linalg.norm(k, axis=1)).astype(int)
    error = np.sqrt(np.bincount(shell, np.abs(found - direct) ** 2) / np.bincount(shell, np.abs(direct) ** 2))
    assert error.max() < 1e-3  # in every shell to the corners: aliases of 1e-4 along each axis, and gemmi's cut-off


@pytest.mark.parametrize("box", [40, 41])
def test_potential_of_one_atom_lies_where_it_should(box):
    """The five Gaussians and the B factor in real space, in volt, from the voxel n // 2."""
    one = Atoms(np.array([[4.0, -3.0, 2.0]]), np.array([7.0]), np.array([7]), np.array([60.0]))
    data = potential_map(one, box, 1.0, 4.0).data
    five = gemmi.Element("N").c4322
    width = np.array(five.b) + 60 + 4 * 4.0**2  # resolution R is a B factor of 4 R**2
    r = np.arange(5.0)
    expected = 47.87801 * np.sum(
        np.array(five.a)[:, None] * (4 * np.pi / width[:, None]) ** 1.5 * np.exp(-4 * np.pi**2 * r**2 / width[:, None]),
        axis=0,
    )
    z, y, x = box // 2 + 2, box // 2 - 3, box // 2 + 4
    # The transform ends at 1/2 A, at exp(-8) of its height.
    np.testing.assert_allclose(data[z, y, x : x + 5], expected, atol=0.001 * expected[0])
    np.testing.assert_allclose(data[z : z + 5, y, x], expected, atol=0.001 * expected[0])
    assert np.unravel_index(data.argmax(), data.shape) == (z, y, x)


def test_mean_inner_potential_of_ice():
    """Vitreous ice, 0.93 g/cm**3, has 4.53 V for independent atoms (Vulovic et al. 2013, J. Struct. Biol. 183)."""
    molecule = Atoms(np.zeros((3, 3)), np.array([8.0, 1, 1]), np.array([8, 1, 1]), np.zeros(3))
    density = 0.93 / 18.015 * 0.602214  # molecules per cubic angstrom
    assert potential_transform(molecule, 8, 1.0, 2.0)[0, 0, 0].real * density == pytest.approx(4.53, abs=0.01)


def test_both_methods_see_the_same_molecule(atoms):
    """At low resolution potential and density differ by little but their scale."""
    still = replace(atoms, bfactors=np.zeros_like(atoms.bfactors))
    gaussian, potential = (method(still, 33, 3.0, 12.0).data for method in (gaussian_map, potential_map))
    assert np.corrcoef(gaussian.ravel(), potential.ravel())[0, 1] > 0.995
    assert not np.allclose(potential, potential_map(atoms, 33, 3.0, 12.0).data, rtol=0.01, atol=0)  # B factors count


@pytest.mark.parametrize(
    ("numbers", "bfactors", "message"),
    [
        ([6, 7], [20, -1], "a: 1 of 2 B factors are below zero or no number, expected squared angstrom; correct them"),
        ([6, 7], [np.nan, np.inf], "a: 2 of 2 B factors are below zero or no number"),
        ([6, 99], [20, 20], "a: no electron scattering factors of Es; use --method gaussian"),
    ],
)
def test_atoms_that_do_not_scatter(numbers, bfactors, message):
    two = Atoms(np.zeros((2, 3)), np.array(numbers, float), np.array(numbers), np.array(bfactors, float))
    with pytest.raises(InputError, match=message):
        check_scattering(two, "a")
    with pytest.raises(InputError, match=message[2:]):
        potential_transform(two, 16, 1.0, 3.0)
    assert gaussian_map(two, 16, 1.0, 3.0).data.max() > 0


def test_atoms_of_unknown_kind_have_no_potential():
    with pytest.raises(ValueError, match="atoms without atomic numbers and B factors"):
        potential_transform(Atoms(np.zeros((2, 3)), np.ones(2)), 16, 1.0, 3.0)


# Command


def test_the_command(tmp_path, atoms):
    done = run(STRUCTURE, "-o", tmp_path / "a.mrc", "--box", "48", "--angpix", "2", "--resolution", "5")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert done.stderr == f"{STRUCTURE}: 2859 atoms, 37.7 kDa, 50 x 54 x 54 A\n"
    volume = read_volume(tmp_path / "a.mrc")
    np.testing.assert_array_equal(volume.data, gaussian_map(atoms, 48, 2.0, 5.0).data)
    assert volume.voxel_size == 2
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        assert mrc.get_labels()[0].endswith("simulate map gaussian 5 A 6M2B.cif.gz")


def test_the_command_for_a_potential(tmp_path, atoms):
    done = run(STRUCTURE, "-o", tmp_path / "a.mrc", "--box", "41", "--angpix", "2", "--method", "potential", "-q")
    assert done.exit_code == 0, done.output
    assert done.output == ""
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mrc").data, potential_map(atoms, 41, 2.0, 3.0).data)
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        assert mrc.get_labels()[0].endswith("simulate map potential 3 A 6M2B.cif.gz")


def test_atoms_of_the_command(tmp_path, small):
    def total(*arguments):
        done = run(small, "-o", "-", "--box", "16", "--angpix", "4", *arguments)
        assert done.exit_code == 0, done.output
        (tmp_path / "a.mrc").write_bytes(done.stdout_bytes)
        return pytest.approx(read_volume(tmp_path / "a.mrc").data.sum(dtype=float) * 64, rel=1e-5)

    assert total() == 6 + 4 + 7
    assert total("--chains", "B,A") == 6 + 4
    assert total("--chains", "B,A", "--waters") == 6 + 4 + 8
    assert total("--hydrogens") == 6 + 4 + 7 + 1
    assert total("--assembly", "1") == 2 * (6 + 4)
    assert total("--assembly", "1", "--chains", "A") == 2 * 6
    for option, value, message in (
        ("--chains", "B,D", "small.pdb: no chain D; it has A, B, C"),
        ("--assembly", "2", "small.pdb: no assembly 2; it has assemblies 1"),
    ):
        done = run(small, "-o", tmp_path / "b.mrc", "--box", "16", option, value)
        assert done.exit_code == 1
        assert message in done.stderr
        assert not (tmp_path / "b.mrc").exists()


def test_a_negative_b_factor_is_an_error_of_the_potential_only(tmp_path, small):
    small.write_text(PDB.replace("20.00           C", "-5.00           C"))
    words = (small, "-o", tmp_path / "a.mrc", "--box", "16", "--angpix", "4")
    done = run(*words, "--method", "potential")
    assert done.exit_code == 1
    assert f"error: {small}: 1 of 3 B factors are below zero or no number, expected squared" in done.stderr
    assert run(*words).exit_code == 0


def test_too_small_a_box_is_an_error_before_any_work(tmp_path):
    done = run(STRUCTURE, "-o", tmp_path / "a.mrc", "--box", "40")
    assert done.exit_code == 1
    assert "6M2B.cif.gz: reaches 33 A from its centre (with a margin of 3 A)" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_examples_of_the_help_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    structure = gemmi.read_structure(str(STRUCTURE))
    text = structure.make_pdb_string()
    (tmp_path / "1abc.pdb.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "whole.pdb").write_text(REMARKS + text)
    structure = gemmi.read_structure("whole.pdb")
    structure.setup_entities()
    structure.make_mmcif_document().write_file("1abc.cif")
    lines = [line for line in run("--help").stdout.splitlines() if line.strip().startswith("cryored simulate map")]
    assert len(lines) == 2
    for line in lines:
        done = CliRunner().invoke(cli, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert read_volume(tmp_path / "truth.mrc").shape == (96, 96, 96)
    assert read_volume(tmp_path / "volt.mrc").shape == (96, 96, 96)


# In a map's own frame


@pytest.mark.parametrize("kind", ["origin", "nstart"])
def test_like_a_map_leaves_the_model_in_its_frame(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    atoms = read_atoms(STRUCTURE, centre=False)
    low = np.floor(atoms.positions.min(axis=0) / 2.0).astype(int) - 5  # voxels of 2 A, so that all atoms are inside
    edges = np.ceil(np.ptp(atoms.positions, axis=0) / 2.0).astype(int) + [11, 12, 14]
    grid = Volume(np.zeros(edges[::-1], np.float32), 2.0)
    place = {"origin": tuple(2.0 * low)} if kind == "origin" else {"nstart": tuple(int(n) for n in low)}
    write_volume("map.mrc", replace(grid, **place), label="test")
    done = CliRunner().invoke(cli, ["simulate", "map", str(STRUCTURE), "-o", "out.mrc", "--like", "map.mrc"])
    assert done.exit_code == 0, done.output
    assert "outside" not in done.stderr
    found = read_volume("out.mrc")
    assert (found.shape, found.voxel_size, found.origin, found.nstart) == (
        grid.shape,
        2.0,
        *(read_volume("map.mrc").origin, read_volume("map.mrc").nstart),
    )
    # Centres of mass, of the map and of the electrons.
    along = [np.arange(n) for n in found.shape]
    total = found.data.sum()
    mass = [float((found.data.sum(axis=tuple({0, 1, 2} - {axis})) * along[axis]).sum() / total) for axis in range(3)]
    expected = np.average(atoms.positions, axis=0, weights=atoms.weights) / 2.0 - low
    np.testing.assert_allclose(mass[::-1], expected, atol=0.02)


def test_without_centring_coordinates_count_from_the_first_voxel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.pdb").write_text("ATOM      1  CA  ALA A   1      40.000  50.000  60.000  1.00 20.00           C\nEND\n")
    for words, place in ((["--no-centre"], (30, 25, 20)), ([], (24, 24, 24))):
        command = ["simulate", "map", "one.pdb", "-o", "out.mrc", "--box", "48", "--angpix", "2", "--overwrite", *words]
        assert CliRunner().invoke(cli, command).exit_code == 0
        data = read_volume("out.mrc").data
        assert np.unravel_index(data.argmax(), data.shape) == place


def test_a_model_outside_the_map(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_volume("map.mrc", Volume(np.zeros((16, 16, 16), np.float32), 2.0, origin=(500.0, 0.0, 0.0)), label="test")
    done = CliRunner().invoke(cli, ["simulate", "map", str(STRUCTURE), "-o", "out.mrc", "--like", "map.mrc"])
    assert done.exit_code == 1
    assert "all atoms lie outside map.mrc, expected the model in the map's frame" in done.stderr
    assert not Path("out.mrc").exists()
    done = CliRunner().invoke(cli, ["simulate", "map", str(STRUCTURE), "-o", "-", "--like", "map.mrc", "--box", "32"])
    assert done.exit_code == 2
    assert "--like tells the grid; leave --box out" in done.stderr
