"""Training pairs: what is in them, and files that come out the same however they are made."""

from __future__ import annotations

import dataclasses
import gzip
import inspect
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gemmi
import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.cli.simulate_pairs import simulate_pairs
from cryored.errors import InputError
from cryored.files.mrc import read_volume
from cryored.files.star import read_star, write_star
from cryored.maps.fourier import apply_shells, forward, inverse, shell_index, spatial_frequency
from cryored.maps.fsc import nominal_resolution, shell_correlation
from cryored.simulation import gaussian, pairs
from cryored.simulation.density import gaussian_transform
from cryored.simulation.gaussian import draw_map, gaussian_pairs
from cryored.simulation.methods import METHODS, find_method
from cryored.simulation.pair_pictures import draw_pairs, spread
from cryored.simulation.pair_table import Pair, log_summary, read_pairs, write_pairs
from cryored.simulation.pairs import PairOptions, simulate_pairs_files
from cryored.simulation.structure import Atoms, read_atoms

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
    progress = {"progress": changes.pop("progress")} if "progress" in changes else {}
    chosen = {"number": 2, "box": BOX, "angpix": ANGPIX, "resolution": RESOLUTION, "seed": 3, **changes}
    return simulate_pairs_files(structures, str(folder), PairOptions(**chosen), **progress)


@pytest.fixture(scope="module")
def made(structures, tmp_path_factory):
    """A folder of pairs that one process made."""
    folder = tmp_path_factory.mktemp("made")
    simulate(structures, folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_couple(*arguments, **options):
    """The two halves of the only intermediate that a draw of the method gaussian has."""
    (couple,) = gaussian_pairs(*arguments, **options)
    return couple


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
    for box, angpix in ((16, 6.0), (16, 10.0), (32, 4.0), (256, 0.8)):
        for _ in range(200):
            draw = draw_map(box, angpix, rng=rng)
            assert 0 < draw.shell <= box // 2 - 1
            assert draw.cut <= box // 2


@pytest.mark.parametrize("seed", range(4))
def test_the_halves_correlate_as_the_curve_says(atoms, seed):
    first, second = one_couple(atoms, BOX, ANGPIX, RESOLUTION, rng=np.random.default_rng(seed))
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
    pair, other = one_couple(atoms, BOX, ANGPIX, RESOLUTION, rng=np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    draw = draw_map(BOX, ANGPIX, rng=rng)
    turned = gaussian.turned(atoms, BOX * ANGPIX, rng)
    s = spatial_frequency((BOX,) * 3, ANGPIX)
    truth = gaussian_transform(turned, BOX, ANGPIX, RESOLUTION) * np.exp(-draw.bfactor / 4 * s**2)
    np.testing.assert_array_equal(pair.truth, inverse(truth, (BOX,) * 3, 1))
    np.testing.assert_array_equal(pair.truth, other.truth)
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
        gaussian.turned(rod, 60.0, np.random.default_rng(0))
    turned = gaussian.turned(rod, 110.0, np.random.default_rng(0))
    assert np.abs(turned.positions).max() < 55


# Files


def test_the_table_holds_what_was_made(made):
    rows = read_pairs(made / "pairs.star")
    assert [(row.structure, row.half) for row in rows] == [(name, i) for name in ("6M2B", "half") for i in (1, 2, 1, 2)]
    assert {row.method for row in rows} == {"gaussian"}
    assert {row.seed for row in rows} == {3}
    assert len({row.noisy for row in rows}) == 8
    assert [row.truth for row in rows[:3]] == [str(made / f"6M2B_{draw:03d}_truth.mrc") for draw in (0, 0, 1)]
    named = {Path(name) for row in rows for name in (row.noisy, row.target, row.truth)}
    assert set(made.iterdir()) == named | {made / "pairs.star"}  # no hidden leftovers
    for row in rows:
        noisy, target, truth = read_volume(row.noisy), read_volume(row.target), read_volume(row.truth)
        assert noisy.shape == target.shape == truth.shape == (BOX, BOX, BOX)
        assert noisy.voxel_size == target.voxel_size == truth.voxel_size == ANGPIX
        assert len(row.fsc) == BOX // 2 + 1
        frequency = np.arange(len(row.fsc)) / (BOX * ANGPIX)
        assert row.resolution == pytest.approx(nominal_resolution(frequency, row.fsc), abs=1e-5)  # six decimals
        found = apply_shells(truth.data, np.clip(row.fsc, 0, 1))  # the curve has five decimals
        np.testing.assert_allclose(target.data, found, atol=1e-4 * np.abs(truth.data).max())
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        found = shell_correlation(read_volume(first.noisy).data, read_volume(second.noisy).data)
        known = np.flatnonzero(first.fsc)
        np.testing.assert_allclose(found[known], first.fsc[known], atol=2e-4)  # five decimals, float32 maps
        assert first.target == second.target


def several(atoms, box, angpix, resolution, *, rng):
    """A method with three intermediates; in the last the halves have targets of their own."""
    truth = rng.standard_normal((box,) * 3, dtype=np.float32)
    for share in (0.2, 0.5, 0.7):
        fsc = np.full(box // 2 + 1, share)
        noisy = rng.standard_normal((2, *truth.shape), dtype=np.float32)
        other = truth * np.float32(share - 0.1 if share == 0.7 else share)
        targets = truth * np.float32(share), other
        yield tuple(Pair(*maps, fsc, 20 - 10 * share, truth) for maps in zip(noisy, targets, strict=True))


def test_a_draw_of_several_intermediates(structures, tmp_path, monkeypatch):
    """Each has its files, all share the truth, the halves share a target that is the same."""
    monkeypatch.setitem(METHODS, "several", f"{__name__}:several")
    rows = read_pairs(simulate(structures[1:], tmp_path, method="several", number=1))
    names = [[Path(name).name.removeprefix("half_000_") for name in (row.noisy, row.target, row.truth)] for row in rows]
    assert names == [
        ["00_half1_noisy.mrc", "00_target.mrc", "truth.mrc"],
        ["00_half2_noisy.mrc", "00_target.mrc", "truth.mrc"],
        ["01_half1_noisy.mrc", "01_target.mrc", "truth.mrc"],
        ["01_half2_noisy.mrc", "01_target.mrc", "truth.mrc"],
        ["02_half1_noisy.mrc", "02_half1_target.mrc", "truth.mrc"],
        ["02_half2_noisy.mrc", "02_half2_target.mrc", "truth.mrc"],
    ]
    assert [row.resolution for row in rows] == [18, 18, 15, 15, 13, 13]
    rng = np.random.default_rng([3, 0, *b"half"])
    couples = several(None, BOX, ANGPIX, RESOLUTION, rng=rng)
    for row, pair in zip(rows, [pair for couple in couples for pair in couple], strict=True):
        for name, data in ((row.noisy, pair.noisy), (row.target, pair.target), (row.truth, pair.truth)):
            np.testing.assert_array_equal(read_volume(name).data, data)


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_processes(made, structures, tmp_path):
    """And whatever the order of the structures: only the rows come in it."""
    simulate(structures[::-1], tmp_path, jobs=2)
    ours, theirs = contents(tmp_path), contents(made)
    rows = [read_pairs(folder / "pairs.star") for folder in (tmp_path, made)]
    assert [row.structure for row in rows[0]] == [row.structure for row in rows[1]][::-1]
    del ours["pairs.star"], theirs["pairs.star"]
    assert ours == theirs


@pytest.mark.slow
def test_same_seed_same_bytes_in_shards(made, structures, tmp_path):
    """Job arrays: two shards, in any order, and a run that collects them and makes nothing anew."""
    for shard in ((2, 3), (1, 3), (3, 3)):
        table = simulate(structures, tmp_path, shard=shard)
        assert table == tmp_path / f"pairs_00{shard[0]}_of_003.star"
        assert not (tmp_path / "pairs.star").exists()
    shards = [tmp_path / f"pairs_00{i}_of_003.star" for i in (1, 2, 3)]
    assert [[Path(row.noisy).name[:8] for row in read_pairs(path)[::2]] for path in shards] == [
        ["6M2B_000", "half_001"],
        ["6M2B_001"],
        ["half_000"],
    ]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mrc")}
    simulate(structures, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mrc")} == times
    for path in shards:
        path.unlink()
    assert contents(tmp_path) == contents(made)


@pytest.mark.slow
def test_same_seed_same_bytes_on_a_cluster(made, structures, tmp_path, monkeypatch):
    """Workers in another folder find what a relative path means."""
    distributed = pytest.importorskip("distributed")
    (tmp_path / "here").mkdir()
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", local_directory=str(tmp_path)
    ) as cluster:
        monkeypatch.chdir(tmp_path / "here")
        seen = []
        simulate(
            [os.path.relpath(path) for path in structures],
            "pairs",
            scheduler=cluster.scheduler_address,
            progress=lambda *numbers: seen.append(numbers),
        )
    assert contents(tmp_path / "here" / "pairs") == contents(made)
    assert seen == [(done, 4) for done in range(5)]


def test_another_seed_makes_other_pairs(made, structures, tmp_path):
    simulate(structures[:1], tmp_path, seed=4, number=1)
    name = "6M2B_000_00_half1_noisy.mrc"
    assert (tmp_path / name).read_bytes() != (made / name).read_bytes()


def test_more_draws_begin_with_the_same(made, structures, tmp_path):
    simulate(structures[:1], tmp_path, number=1)
    for name, content in contents(tmp_path).items():
        assert name == "pairs.star" or (made / name).read_bytes() == content


# Interrupted


def start(*words, folder):
    """Start the command in a group of processes of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "cryored", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="module")
def undisturbed(structures, tmp_path_factory):
    """What a run that was left alone makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    simulate(structures[1:], folder, number=40, seed=0)
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "sent"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_killed_run_goes_on_where_it_was(structures, undisturbed, tmp_path, jobs, sent):
    """Stopped anywhere: the same command makes the rest, and the bytes of a run that was left alone."""
    numbers = ["--number", "40", "--box", str(BOX), "--angpix", str(ANGPIX), "--resolution", str(RESOLUTION)]
    words = ["simulate", "pairs", structures[1], "-o", "pairs", "--jobs", str(jobs), *numbers]
    process = start(*words, folder=tmp_path)
    with process:
        try:
            for _ in range(1200):  # until it is well at work, a minute at most
                if len(list(tmp_path.glob("pairs/.half_*.star"))) > 3:
                    break
                time.sleep(0.05)
            if sent == signal.SIGKILL:
                process.kill()  # its children have to see for themselves
            else:
                os.killpg(process.pid, sent)
            output, messages = process.communicate(timeout=60)  # ends when the last child does
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert output == ""
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert messages.strip() == "cryored: interrupted"
    folder = tmp_path / "pairs"
    assert not (folder / "pairs.star").exists()
    tables = sorted(folder.glob(".half_*.star"))
    assert 3 < len(tables) < 40
    finished = {Path(row.noisy) for table in tables for row in read_pairs(table)}
    times = {path: path.stat().st_mtime_ns for path in finished}
    (folder / ".half_039_00_half1_noisy.mrc.99999.part").write_bytes(b"half")  # as a killed process may leave it
    simulate(structures[1:], folder, number=40, seed=0)
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    assert contents(folder) == undisturbed


def test_what_was_left_of_other_options_is_not_taken(structures, tmp_path):
    """Nor is it taken once its maps have been replaced, when the first options return."""
    pairs._do_task(plan_of(tmp_path), pairs.Task(structures[1], 0))
    table = tmp_path / ".half_000.star"
    before = table.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "write_pair", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pairs._do_task(plan_of(tmp_path, float16=True), pairs.Task(structures[1], 0))
    assert not table.exists()
    assert (tmp_path / "half_000_truth.mrc").stat().st_size == 1024 + 2 * BOX**3
    pairs._do_task(plan_of(tmp_path), pairs.Task(structures[1], 0))
    assert table.read_bytes() == before
    assert {path.stat().st_size for path in tmp_path.glob("*.mrc")} == {1024 + 4 * BOX**3}


def plan_of(folder, **changes):
    options = {"method": "gaussian", "box": BOX, "angpix": ANGPIX, "resolution": RESOLUTION, "seed": 3, **changes}
    return pairs.Plan(folder=folder, **{"float16": False, **options})


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["cut", "map"])
def test_a_finished_draw_that_is_damaged_is_made_anew(made, structures, tmp_path, damage):
    simulate(structures[1:], tmp_path, shard=(1, 2))
    table = tmp_path / ".half_000.star"
    if damage == "cut":
        table.write_bytes(table.read_bytes()[:60])
    else:
        (tmp_path / "half_000_00_half2_noisy.mrc").unlink()
    simulate(structures[1:], tmp_path)
    for path in tmp_path.glob("*.mrc"):
        assert path.read_bytes() == (made / path.name).read_bytes()


# Structures that cannot be used


@pytest.fixture
def with_bad(structures, tmp_path):
    """A good structure between one that is too large for the box and one that is none."""
    (tmp_path / "empty.pdb").write_text("REMARK nothing here\n")
    structure = gemmi.read_structure(structures[1])
    for site in structure[0].all():
        site.atom.pos = gemmi.Position(3 * site.atom.pos)
    structure.write_pdb(str(tmp_path / "large.pdb"))
    return [str(tmp_path / "large.pdb"), structures[1], str(tmp_path / "empty.pdb")]


@pytest.mark.slow
def test_a_bad_structure_stops_the_run_and_what_is_finished_stays(made, with_bad, tmp_path):
    folder = tmp_path / "pairs"
    with pytest.raises(InputError, match=r"empty.pdb: "):
        simulate(with_bad[1:], folder, jobs=2)
    assert not (folder / "pairs.star").exists()
    assert len(list(folder.glob(".half_*.star"))) == 2
    simulate(with_bad[1:2], folder)
    for path in folder.glob("*.mrc"):
        assert path.read_bytes() == (made / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_bad_structures_are_left_out_and_listed(made, with_bad, tmp_path, caplog, jobs):
    table = simulate(with_bad, tmp_path / "pairs", skip_bad=True, jobs=jobs)
    rows = read_pairs(table)
    theirs = [row for row in read_pairs(made / "pairs.star") if row.structure == "half"]
    assert [Path(row.noisy).name for row in rows] == [Path(row.noisy).name for row in theirs]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[0] == "2 structures were left out, in part or altogether:"
    assert warnings[1].startswith(f"large: 2 draws, {with_bad[0]}: reaches ")
    assert warnings[2].startswith(f"empty: 2 draws, {with_bad[2]}: ")
    assert len(warnings) == 3


def test_no_structure_left(with_bad, tmp_path):
    with pytest.raises(
        InputError, match="no pairs: all 4 draws were left out, the first because of .*large.pdb: reach"
    ):
        simulate([with_bad[0], with_bad[2]], tmp_path / "pairs", skip_bad=True)
    assert not (tmp_path / "pairs" / "pairs.star").exists()


# Tables


def test_float16_keeps_the_maps(made, structures, tmp_path):
    simulate(structures[:1], tmp_path, number=1, float16=True)
    for row in read_pairs(tmp_path / "pairs.star"):
        for name in (row.noisy, row.target, row.truth):
            assert Path(name).stat().st_size == 1024 + 2 * BOX**3
            full = read_volume(made / Path(name).name).data
            np.testing.assert_allclose(read_volume(name).data, full, rtol=2**-10, atol=1e-6)  # 11 bit mantissa


def test_a_table_moves_with_its_folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "elsewhere")
    rows = read_pairs(tmp_path / "elsewhere" / "pairs.star")
    assert all(Path(name).parent == tmp_path / "elsewhere" for row in rows for name in (row.noisy, row.truth))


def test_missing_maps_are_counted_once_each(made, tmp_path):
    shutil.copy(made / "pairs.star", tmp_path)
    with pytest.raises(InputError, match="pairs.star: 16 maps of the table are missing, the first is .*noisy.mrc"):
        read_pairs(tmp_path / "pairs.star")


@pytest.mark.parametrize(("label", "value"), [("cryoredHalf", "1.5"), ("cryoredSeed", "nan"), ("cryoredSeed", "x")])
def test_halves_and_seeds_are_whole_numbers(made, tmp_path, label, value):
    loop = read_star(made / "pairs.star").block("pairs").find_loop("_cryoredHalf").get_loop()
    columns = {tag[1:]: [loop[row, column] for row in range(loop.length())] for column, tag in enumerate(loop.tags)}
    columns[label][1] = value
    write_star(tmp_path / "pairs.star", {"pairs": columns})
    with pytest.raises(InputError, match=f"pairs.star: .*{label}.*{value}"):
        read_pairs(tmp_path / "pairs.star")


@pytest.mark.parametrize("label", ["cryoredNoisyMap", "cryoredHalf", "cryoredFscCurve", "cryoredNominalResolution"])
def test_missing_columns_are_named(made, tmp_path, label):
    text = (made / "pairs.star").read_text().replace(f"_{label} ", "_other ")
    (tmp_path / "pairs.star").write_text(text)
    with pytest.raises(InputError, match=f"pairs.star: the column _{label} is missing from data_pairs"):
        read_pairs(tmp_path / "pairs.star")


def test_a_table_made_before_there_were_truths(made, tmp_path):
    rows = [dataclasses.replace(row, truth=None) for row in read_pairs(made / "pairs.star")]
    write_pairs(tmp_path / "old.star", rows, made_by="test")
    assert "cryoredTruthMap" not in (tmp_path / "old.star").read_text()
    again = read_pairs(tmp_path / "old.star")
    assert {row.truth for row in again} == {None}
    assert [Path(row.noisy).name for row in again] == [Path(row.noisy).name for row in rows]
    truth = str(made / "6M2B_000_truth.mrc")
    write_pairs(tmp_path / "mixed.star", [dataclasses.replace(rows[0], truth=truth), *rows[1:]], made_by="test")
    found = [row.truth for row in read_pairs(tmp_path / "mixed.star")]
    assert os.path.samefile(found[0], truth)
    assert set(found[1:]) == {None}


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
    with pytest.raises(InputError, match=r"pairs_001_of_005.star: there are 4 draws, too few for 5 shards; use fewer"):
        simulate(structures, tmp_path / "shards", shard=(1, 5))


@pytest.mark.slow
def test_no_table_outlives_its_maps(structures, tmp_path):
    """Tables of runs with other options, whose maps would be replaced: refused, or removed when that is asked for."""
    structure = structures[1:]
    shard = simulate(structure, tmp_path, shard=(1, 2))
    (tmp_path / "pairs_mine.star").write_text("data_mine\n")
    with pytest.raises(InputError, match="pairs_001_of_002.star: exists already; add --overwrite to replace it"):
        simulate(structure, tmp_path, seed=4)
    table = simulate(structure, tmp_path, seed=4, overwrite=True)
    assert not shard.exists()
    with pytest.raises(InputError, match="pairs.star: exists already"):
        simulate(structure, tmp_path, shard=(1, 2))
    assert simulate(structure, tmp_path, shard=(1, 2), overwrite=True) == shard
    assert not table.exists()
    assert (tmp_path / "pairs_mine.star").exists()


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_refusal_leaves_an_older_table(structures, tmp_path, skip_bad):
    table = simulate(structures[1:], tmp_path, number=1)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"nothere\.pdb"):
        simulate(["nothere.pdb"], tmp_path, overwrite=True, skip_bad=skip_bad)
    assert contents(tmp_path) == before
    if skip_bad:  # one that can be used is enough
        made = simulate(["nothere.pdb", structures[1]], tmp_path, number=1, overwrite=True, skip_bad=True)
        assert made == table


def test_no_map_outlives_its_table(structures, tmp_path, monkeypatch):
    """A draw that now has fewer intermediates; but what belongs to others stays."""
    monkeypatch.setitem(METHODS, "several", f"{__name__}:several")
    simulate(structures[1:], tmp_path, method="several", number=1)
    others = [tmp_path / "half_000_000_truth.mrc", tmp_path / "half_000_000_00_target.mrc", tmp_path / "half_000_x.mrc"]
    for path in others:
        path.write_bytes(b"of a structure half_000")
    rows = read_pairs(simulate(structures[1:], tmp_path, number=1, overwrite=True))
    named = {Path(name) for row in rows for name in (row.noisy, row.target, row.truth)}
    assert set(tmp_path.glob("*.mrc")) == named | set(others)


def test_only_structures_of_the_part(structures, tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,file,split\n6M2B,train/6M2B.pdb,train\nhalf,test/half.pdb,test\n")
    with pytest.raises(InputError, match=r"1 of 2 structures are not of part 'train': half.pdb \(test\); leave them"):
        simulate(structures, tmp_path / "pairs", manifest=str(manifest))
    assert not (tmp_path / "pairs").exists()
    table = simulate(structures[1:], tmp_path / "pairs", manifest=str(manifest), part="test", number=1)
    made = read_star(table)
    assert made.text("made", "split") == "test"
    assert made.text("made", "by").startswith("simulate pairs gaussian seed 3 ")
    assert len(read_pairs(table)) == 2


def test_the_summary_counts_each_method_in_each_bin(made, caplog):
    row = read_pairs(made / "pairs.star")[0]
    of = {"gaussian": [3.3, 4.4, 4.5, 12.0, np.inf], "intermediates": [4.5, 29.0, 31.0]}
    rows = [dataclasses.replace(row, method=method, resolution=r) for method in of for r in of[method]]
    with caplog.at_level("INFO", "cryored"):
        log_summary(rows)
    assert [record.getMessage().split() for record in caplog.records] == [
        ["resolution", "(A)", "gaussian", "intermediates"],
        ["below", "4.5", "2", "0"],
        ["4.5", "-", "6", "1", "1"],
        ["6", "-", "8", "0", "0"],
        ["8", "-", "10", "0", "0"],
        ["10", "-", "15", "1", "0"],
        ["15", "-", "30", "0", "1"],
        ["above", "30", "1", "1"],
        ["all", "5", "3"],
    ]
    assert len({len(record.getMessage()) for record in caplog.records}) == 1  # aligned


# Picture


def test_the_pairs_of_a_picture_are_spread_over_resolution(made):
    row = read_pairs(made / "pairs.star")[0]
    rows = [dataclasses.replace(row, resolution=r, half=half) for r in (9, 3, 5, np.inf, 7) for half in (1, 2)]
    assert [shown.resolution for shown in spread(rows, 3)] == [3, 7, np.inf]
    assert [shown.resolution for shown in spread(rows)] == [3, 5, 7, 9, np.inf]
    assert {shown.half for shown in spread(rows)} == {1}
    assert [shown.resolution for shown in spread(rows[:2])] == [9]


def test_a_picture(made, tmp_path):
    """Of maps with and without a truth; a column each for noisy, target and truth."""
    matplotlib_image = pytest.importorskip("matplotlib.image")
    rows = read_pairs(made / "pairs.star")
    draw_pairs(tmp_path / "pairs.png", [rows[0], dataclasses.replace(rows[2], truth=None, resolution=np.inf)])
    picture = matplotlib_image.imread(tmp_path / "pairs.png")[..., :3]
    height, width = picture.shape[:2]
    assert width > height
    grey = picture.mean(axis=-1)
    dark = [[(cell < 0.5).mean() for cell in np.array_split(line, 4, axis=1)] for line in np.array_split(grey, 2)]
    assert min(dark[0][1:]) > 0.2
    assert dark[1][3] < 0.05  # no truth


# Command


def test_methods_can_be_found_and_chosen():
    method = next(option for option in simulate_pairs.params if option.name == "method")
    for name in METHODS:
        assert name in method.type.choices
        assert f"{name}: " in method.help
        assert list(inspect.signature(find_method(name)).parameters) == ["atoms", "box", "angpix", "resolution", "rng"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing argument 'STRUCTURES...' or option '--from-relion'"),
        (["a.pdb", "--from-relion", "run", "--truth", "t.mrc"], "STRUCTURES and --from-relion exclude each other"),
        (["--from-relion", "run"], "--from-relion needs --truth"),
        (["a.pdb", "--truth", "t.mrc"], "--truth has no meaning without --from-relion"),
        (["a.pdb", "--name", "a"], "--name has no meaning without --from-relion"),
        (["--from-relion", "run", "--truth", "t.mrc", "--box", "64"], "--box has no meaning with --from-relion"),
        (["--from-relion", "run", "--truth", "t.mrc", "--skip-bad"], "--skip-bad has no meaning with --from-relion"),
        (["a.pdb", "--part", "test"], "--part has no meaning without --split"),
        (["a.pdb", "--jobs", "2", "--scheduler", "tcp://a:1"], "--jobs and --scheduler exclude each other"),
        (["a.pdb", "--plot", "-"], "--plot needs the name of a file"),
        *[(["a.pdb", "--shard", value], f"'{value}', expected i/n with i") for value in ("0/4", "5/4", "x", "1/2/3")],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["simulate", "pairs", "-o", "pairs", *words])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "pairs").exists()


def test_a_refinement_is_handed_on(made, tmp_path, monkeypatch):
    calls = []

    def harvest_files(*arguments, **options):
        calls.append((arguments, options))
        return made / "pairs.star"

    monkeypatch.setattr("cryored.simulation.harvest.harvest_files", harvest_files)
    words = ["--from-relion", "run", "--truth", "t.mrc", "-o", str(tmp_path), "--split", "m.csv", "--name", "x"]
    variable = {"CRYORED_SIMULATE_PAIRS_ANGPIX": "1.25"}
    for angpix, env in (([], {}), (["--angpix", "1.5"], {}), ([], variable)):
        done = CliRunner(env=env).invoke(cli, ["simulate", "pairs", *words, *angpix])
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{made / 'pairs.star'}\n"
    assert [arguments[:3] for arguments, _ in calls] == 3 * [("run", "t.mrc", str(tmp_path))]
    given = [vars(arguments[3]).copy() for arguments, _ in calls]
    assert [options.pop("angpix") for options in given] == [None, 1.5, 1.25]  # the default is for simulated maps
    assert given[0] == {"name": "x", "float16": False, "manifest": "m.csv", "part": "train", "overwrite": False}


def test_an_existing_picture_is_seen_before_the_work(structures, tmp_path, assert_one_line_error):
    (tmp_path / "a.png").write_bytes(b"mine")
    words = ["simulate", "pairs", structures[0], "-o", str(tmp_path / "pairs"), "--plot", str(tmp_path / "a.png")]
    assert_one_line_error(CliRunner().invoke(cli, words), "a.png: exists already; add --overwrite to replace it")
    assert not (tmp_path / "pairs").exists()


@pytest.mark.slow
def test_the_example_of_the_help_runs(structures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "structures").mkdir()
    content = Path(structures[1]).read_bytes()
    (tmp_path / "structures" / "half.pdb.gz").write_bytes(gzip.compress(content))
    runner = CliRunner()
    text = runner.invoke(cli, ["simulate", "pairs", "--help"]).stdout
    lines = [line for line in text.splitlines() if line.strip().startswith("cryored simulate pairs")]
    assert len(lines) == 2
    words = shlex.split(lines[0].replace("structures/*.pdb.gz", "structures/half.pdb.gz"))  # as a shell would
    small = ["--box", "32", "--angpix", "3", "--number", "1", "--plot", "pairs.png"]
    done = runner.invoke(cli, [*words[1:], *small])
    assert done.exit_code == 0, done.output
    assert done.stdout == "pairs/pairs.star\n"
    assert "draws: 1 of 1" in done.stderr
    assert len(read_pairs("pairs/pairs.star")) == 2
    made_by = "simulate pairs gaussian seed 0 box 32 angpix 3.0 resolution 3.0 float16 number 1"
    assert read_star("pairs/pairs.star").text("made", "by") == made_by
    assert [line.split() for line in done.stderr.splitlines()][-1] == ["all", "2"]
    assert Path("pairs.png").read_bytes()[1:4] == b"PNG"
    assert "--from-relion Refine3D/run --truth truth.mrc" in lines[1]  # run with requests in test_harvest.py


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_leaves_no_folder(structures, tmp_path):
    words = ["simulate", "pairs", structures[1], "-o", str(tmp_path / "pairs"), "--scheduler", "tcp://127.0.0.1:1"]
    done = CliRunner().invoke(cli, [*words, "--box", "32", "--angpix", "3", "--number", "1"])
    assert done.exit_code == 1
    assert not (tmp_path / "pairs").exists()
