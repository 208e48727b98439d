"""Training pairs: what is in them, and files that come out the same however they are made."""

from __future__ import annotations

import dataclasses
import gzip
import shlex
import shutil
from pathlib import Path

import gemmi
import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.fourier import apply_shells, forward, inverse, shell_index, spatial_frequency
from cryored.fsc import nominal_resolution, shell_correlation
from cryored.mrc import read_volume
from cryored.simulate import gaussian, pairs
from cryored.simulate.density import gaussian_transform
from cryored.simulate.gaussian import draw_map, gaussian_pairs
from cryored.simulate.pair_table import read_pairs, write_pairs
from cryored.simulate.pairs import simulate_pairs_files
from cryored.simulate.structure import Atoms, read_atoms
from cryored.star import read_star

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
BOX, ANGPIX, RESOLUTION = 32, 3.0, 6.0  # 6M2B with its margin needs 67 A


@pytest.fixture(scope="module")
def atoms():
    return read_atoms(STRUCTURE)


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    """Two structures: 6M2B and its first half."""
    folder = tmp_path_factory.mktemp("structures")
    shutil.copy(STRUCTURE, folder / "6M2B.cif.gz")
    structure = gemmi.read_structure(str(STRUCTURE))
    chain = structure[0]["A"]
    for number in reversed(range(150, len(chain))):
        del chain[number]
    (folder / "half.pdb").write_text(structure.make_pdb_string())
    return [str(folder / "6M2B.cif.gz"), str(folder / "half.pdb")]


def simulate(structures, folder, **changes):
    arguments = {"number": 2, "box": BOX, "angpix": ANGPIX, "resolution": RESOLUTION, "seed": 3, **changes}
    return simulate_pairs_files(structures, str(folder), **arguments)


@pytest.fixture(scope="module")
def made(structures, tmp_path_factory):
    """A folder of pairs that one process made."""
    folder = tmp_path_factory.mktemp("made")
    simulate(structures, folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# One draw


def test_draws_stay_in_their_ranges():
    rng = np.random.default_rng(0)
    draws = [draw_map(96, 1.5, rng=rng) for _ in range(2000)]
    first = [draw for draw in draws if draw.level != 0.143]
    assert 0.17 < len(first) / len(draws) < 0.23  # one of five, three standard deviations of 0.009
    for draw in draws:
        assert 0 < draw.shell <= 47
        assert draw.shell < draw.cut <= 48
        assert 0 <= draw.smear <= np.deg2rad(15)
        assert 0 <= draw.blur <= 0.12 * 144 / draw.shell
        assert 0.3 <= draw.slope <= 1.7
        assert 0.3 <= draw.solvent <= 1
        assert 0 <= draw.bfactor <= 90
    resolutions = [144 / draw.shell for draw in draws if draw.level == 0.143]
    assert 3.0 < min(resolutions) < 3.4  # 1.1 times Nyquist, or one shell before it
    assert 17 < max(resolutions) <= 18.001
    assert all(0.4 <= draw.level <= 0.97 for draw in first)


def test_a_long_box_and_a_coarse_grid_draw_what_they_can_hold():
    rng = np.random.default_rng(0)
    for box, angpix in ((16, 6.0), (32, 4.0), (256, 0.8)):
        for _ in range(200):
            draw = draw_map(box, angpix, rng=rng)
            assert 0 < draw.shell <= box // 2 - 1
            assert draw.cut <= box // 2


@pytest.mark.parametrize("seed", range(4))
def test_the_halves_correlate_as_the_curve_says(atoms, seed):
    first, second = gaussian_pairs(atoms, BOX, ANGPIX, RESOLUTION, rng=np.random.default_rng(seed))
    cut = draw_map(BOX, ANGPIX, rng=np.random.default_rng(seed)).cut
    np.testing.assert_array_equal(first.fsc, second.fsc)
    np.testing.assert_array_equal(first.target, second.target)
    found = shell_correlation(first.noisy, second.noisy)
    np.testing.assert_allclose(found[:cut], first.fsc[:cut], atol=1e-4)  # of float32 maps, cut after the curve
    np.testing.assert_array_equal(first.fsc[cut:], 0)
    assert np.any(first.noisy != second.noisy)
    frequency = np.arange(BOX // 2 + 1) / (BOX * ANGPIX)
    assert first.resolution == nominal_resolution(frequency, first.fsc)


@pytest.mark.parametrize("seed", range(4))
def test_the_target_is_the_truth_times_the_fsc(atoms, seed):
    """In each shell: the correlation of target and truth is 1, their ratio the FSC, and beyond the cut is nothing."""
    pair = gaussian_pairs(atoms, BOX, ANGPIX, RESOLUTION, rng=np.random.default_rng(seed))[0]
    rng = np.random.default_rng(seed)
    draw = draw_map(BOX, ANGPIX, rng=rng)
    turned = gaussian._turned(atoms, BOX * ANGPIX, rng)
    s = spatial_frequency((BOX,) * 3, ANGPIX)
    truth = gaussian_transform(turned, BOX, ANGPIX, RESOLUTION) * np.exp(-draw.bfactor / 4 * s**2)
    target = forward(pair.target)
    index = shell_index((BOX,) * 3)
    scale = np.abs(truth).max()
    for shell in range(BOX // 2):  # at Nyquist itself a real map keeps half of it
        here = index == shell
        expected = np.clip(pair.fsc[shell], 0, 1) * truth[here]
        np.testing.assert_allclose(target[here], expected, atol=1e-5 * scale)  # float32 there and back
    np.testing.assert_allclose(target[index > BOX // 2], 0, atol=1e-6 * scale)
    np.testing.assert_allclose(forward(pair.noisy)[index >= draw.cut], 0, atol=1e-6 * scale)
    assert np.max(np.abs(pair.target - apply_shells(inverse(truth, (BOX,) * 3), np.clip(pair.fsc, 0, 1)))) < 1e-4 * (
        np.abs(pair.target).max()
    )


def test_the_noise_is_stronger_in_the_molecule(atoms):
    envelope = gaussian._envelope(inverse(gaussian_transform(atoms, BOX, ANGPIX, 6.0), (BOX,) * 3), ANGPIX, 0.4)
    assert envelope.dtype == np.float32
    assert envelope[BOX // 2, BOX // 2, BOX // 2] == pytest.approx(1, abs=1e-6)
    assert 0.39 < np.median(envelope[(envelope > 0.2) & (envelope < 0.6)]) < 0.42
    np.testing.assert_array_equal(envelope[0], 0)


def test_coloured_noise_has_the_power_that_was_asked_for(atoms):
    power = np.linspace(0.5, 4, BOX // 2 + 1)
    envelope = np.ones((BOX,) * 3, dtype=np.float32)
    noise = gaussian._noise(envelope, power, np.random.default_rng(0))
    found = np.bincount(shell_index((BOX,) * 3).ravel(), weights=(np.abs(noise) ** 2).ravel())
    count = np.bincount(shell_index((BOX,) * 3).ravel())
    outer = slice(5, BOX // 2)  # hundreds of coefficients a shell: 10 % is two standard deviations and more
    np.testing.assert_allclose((found / count)[outer], power[outer], rtol=0.2)


def test_a_molecule_that_fits_in_no_orientation():
    rod = Atoms(np.array([[-60.0, 0, 0], [60.0, 0, 0]]), np.ones(2))
    with pytest.raises(InputError, match="no orientation of the molecule fits a box of 60 A; use a larger --box"):
        gaussian._turned(rod, 60.0, np.random.default_rng(0))
    turned = gaussian._turned(rod, 110.0, np.random.default_rng(0))
    assert np.abs(turned.positions).max() < 55


# Files


def test_the_table_holds_what_was_made(made):
    rows = read_pairs(made / "pairs.star")
    assert [(row.structure, row.half) for row in rows] == [(name, i) for name in ("6M2B", "half") for i in (1, 2, 1, 2)]
    assert {row.method for row in rows} == {"gaussian"}
    assert {row.seed for row in rows} == {3}
    assert len({row.noisy for row in rows}) == 8
    assert sorted(path.suffix for path in made.iterdir()) == 16 * [".mrc"] + [".star"]  # no hidden leftovers
    for row in rows:
        noisy, target = read_volume(row.noisy), read_volume(row.target)
        assert noisy.shape == target.shape == (BOX, BOX, BOX)
        assert noisy.voxel_size == target.voxel_size == ANGPIX
        assert len(row.fsc) == BOX // 2 + 1
        frequency = np.arange(len(row.fsc)) / (BOX * ANGPIX)
        assert row.resolution == pytest.approx(nominal_resolution(frequency, row.fsc), abs=1e-5)  # six decimals
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        found = shell_correlation(read_volume(first.noisy).data, read_volume(second.noisy).data)
        known = np.flatnonzero(first.fsc)
        np.testing.assert_allclose(found[known], first.fsc[known], atol=2e-4)  # five decimals, float32 maps
        assert Path(first.target).read_bytes() == Path(second.target).read_bytes()


def test_same_seed_same_bytes_whatever_the_processes(made, structures, tmp_path):
    simulate(structures[::-1], tmp_path, jobs=2)
    ours, theirs = contents(tmp_path), contents(made)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name != "pairs.star":  # its rows come in the order of the structures
            assert ours[name] == theirs[name], name


def test_another_seed_makes_other_pairs(made, structures, tmp_path):
    simulate(structures[:1], tmp_path, seed=4, number=1)
    name = "6M2B_000_half1_noisy.mrc"
    assert (tmp_path / name).read_bytes() != (made / name).read_bytes()


def test_an_interrupted_run_goes_on(made, structures, tmp_path, monkeypatch):
    """The first structure is done, the second has stopped in the middle."""
    options = {"number": 2, "box": BOX, "angpix": ANGPIX, "resolution": RESOLUTION, "seed": 3, "float16": False}
    pairs._structure_pairs(structures[0], folder=tmp_path, **options)
    monkeypatch.setattr(pairs, "gaussian_pairs", interrupted(pairs.gaussian_pairs))
    with pytest.raises(KeyboardInterrupt):
        pairs._structure_pairs(structures[1], folder=tmp_path, **options)
    assert not (tmp_path / "pairs.star").exists()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("6M2B*.mrc")}
    assert len(times) == 8
    seen = []
    simulate(structures, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert contents(tmp_path) == contents(made)
    assert seen == [(1, 2), (2, 2)]


def interrupted(function):
    calls = []

    def once(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return once


def test_what_was_left_of_other_options_is_not_taken(structures, tmp_path):
    options = {"number": 1, "box": BOX, "angpix": ANGPIX, "resolution": RESOLUTION, "seed": 3}
    pairs._structure_pairs(structures[0], folder=tmp_path, float16=False, **options)
    simulate(structures[:1], tmp_path, number=1, float16=True)
    assert {path.stat().st_size for path in tmp_path.glob("*.mrc")} == {1024 + 2 * BOX**3}


def test_float16_keeps_the_maps(made, structures, tmp_path):
    simulate(structures[:1], tmp_path, number=1, float16=True)
    for row in read_pairs(tmp_path / "pairs.star"):
        full = read_volume(made / Path(row.noisy).name).data
        np.testing.assert_allclose(read_volume(row.noisy).data, full, rtol=2**-10, atol=1e-6)  # 11 bit mantissa


def test_a_table_moves_with_its_folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "elsewhere")
    rows = read_pairs(tmp_path / "elsewhere" / "pairs.star")
    assert all(Path(row.noisy).parent == tmp_path / "elsewhere" for row in rows)


def test_missing_maps_are_counted(made, tmp_path):
    shutil.copy(made / "pairs.star", tmp_path)
    with pytest.raises(InputError, match="pairs.star: 16 maps of the table are missing, the first is .*noisy.mrc"):
        read_pairs(tmp_path / "pairs.star")


@pytest.mark.parametrize("label", ["cryoredNoisyMap", "cryoredHalf", "cryoredFscCurve", "cryoredNominalResolution"])
def test_missing_columns_are_named(made, tmp_path, label):
    text = (made / "pairs.star").read_text().replace(f"_{label} ", "_other ")
    (tmp_path / "pairs.star").write_text(text)
    with pytest.raises(InputError, match=f"pairs.star: the column _{label} is missing from data_pairs"):
        read_pairs(tmp_path / "pairs.star")


def test_broken_curves_are_refused(made, tmp_path):
    rows = read_pairs(made / "pairs.star")
    write_pairs(tmp_path / "a.star", [dataclasses.replace(rows[0], fsc=np.ones(3))], made_by="test")
    text = (tmp_path / "a.star").read_text()
    assert "1.00000,1.00000,1.00000" in text
    (tmp_path / "a.star").write_text(text.replace("1.00000,1.00000", "1.00000,x"))
    with pytest.raises(InputError, match="a.star: _cryoredFscCurve: .*'x'"):
        read_pairs(tmp_path / "a.star")
    with pytest.raises(InputError, match="found data_other, expected a block data_pairs"):
        (tmp_path / "b.star").write_text("data_other\n_a 1\n")
        read_pairs(tmp_path / "b.star")


def test_refusals(made, structures, tmp_path):
    with pytest.raises(InputError, match="pairs.star: exists already; add --overwrite to replace it"):
        simulate(structures, made)
    (tmp_path / "other").mkdir()
    shutil.copy(structures[1], tmp_path / "other" / "half.cif")
    with pytest.raises(InputError, match="half: two structures of this name; their pairs would overwrite each other"):
        simulate([structures[1], str(tmp_path / "other" / "half.cif")], tmp_path / "twins")
    with pytest.raises(InputError, match=r"6M2B.cif.gz: reaches 33 A .*; use --box 24 or more"):
        simulate(structures[:1], tmp_path / "small", box=16)


def test_the_example_of_the_help_runs(structures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "structures").mkdir()
    content = Path(structures[1]).read_bytes()
    (tmp_path / "structures" / "half.pdb.gz").write_bytes(gzip.compress(content))
    runner = CliRunner()
    text = runner.invoke(cli, ["simulate", "pairs", "--help"]).stdout
    lines = [line for line in text.splitlines() if line.strip().startswith("cryored simulate pairs")]
    assert len(lines) == 1
    words = shlex.split(lines[0].replace("structures/*.pdb.gz", "structures/half.pdb.gz"))  # as a shell would
    done = runner.invoke(cli, [*words[1:], "--box", "32", "--angpix", "3", "--number", "1"])  # a smaller one
    assert done.exit_code == 0, done.output
    assert done.stdout == "pairs/pairs.star\n"
    assert "structures: 1 of 1" in done.stderr
    assert len(read_pairs("pairs/pairs.star")) == 2
    assert read_star("pairs/pairs.star").text("made", "by") == "simulate pairs gaussian seed 0 number 1"
