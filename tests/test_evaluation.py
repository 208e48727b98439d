"""Judging a denoiser on pairs, and fitting its lambda schedule to them. What stands for the network is a function."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError, ModelError, OutputError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells
from cryored.maps.fsc import crossing_resolution, shell_correlation
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume, soft_sphere
from cryored.prior.lambda_schedule import model_schedule, parse_schedule, read_schedule
from cryored.prior.models import find_model
from cryored.simulation.pair_table import Pair, PairRow, read_pairs, write_pairs
from cryored.training import evaluation, lambda_fit
from cryored.training.evaluation import FIRST, Judgement, evaluate_files, judge, judge_map, load_pair, summarise
from cryored.training.lambda_fit import Regression, falling, fit, fit_files, regress, shell_sums

BOX, ANGPIX = 24, 3.0
SHELLS = np.arange(BOX // 2 + 1)
# 1 up to shell 2, 0 from shell 10 on.
FSC = np.interp(SHELLS, [2, 10], [1.0, 0.0])


def density(seed):
    """Return a made-up molecule: noise within a sphere, weaker towards Nyquist, as density is."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((BOX,) * 3) * soft_sphere((BOX,) * 3, 7, 3)
    return apply_shells(noise, np.exp(-((SHELLS / 8) ** 2))).astype(np.float32)


def make_pair(seed, *, noise=0.05, fsc=FSC, resolution=8.0):
    truth = density(seed)
    rng = np.random.default_rng([seed, 1])
    noisy = (truth + noise * rng.standard_normal(truth.shape)).astype(np.float32)
    return Pair(noisy, apply_shells(truth, fsc).astype(np.float32), fsc, resolution, truth)


def write_table(folder, pairs, names=None, *, truths=True):
    """Write pairs and their table, and return its name."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, pair in enumerate(pairs):
        name = f"s{number}_run_it00{2 + number}_half1" if names is None else names[number]
        files = {kind: str(folder / f"{name}_{kind}.mrc") for kind in ("noisy", "target", "truth")}
        for kind, path in files.items():
            write_volume(path, Volume(getattr(pair, kind), ANGPIX), label="test")
        truth = files["truth"] if truths else None
        structure = f"s{number}"
        rows.append(PairRow(files["noisy"], files["target"], structure, 1, pair.resolution, pair.fsc, "t", 0, truth))
    write_pairs(folder / "pairs.star", rows, made_by="test")
    return str(folder / "pairs.star")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    resolutions = (4.0, 5.0, 7.0, 12.0, np.inf)
    return write_table(
        tmp_path_factory.mktemp("pairs"), [make_pair(i, resolution=r) for i, r in enumerate(resolutions)]
    )


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model whose network is the identity."""
    folder = tmp_path / "prior"
    folder.mkdir()
    (folder / "model.keras").write_bytes(b"no network")
    card = {"name": "prior", "input": "regularised", "pixel_size": ANGPIX, "width": 1, "depth": 1}
    card |= {"sha256": hashlib.sha256(b"no network").hexdigest(), "resolution_range": [4.0, 12.0]}
    (folder / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr("cryored.prior.denoiser.Denoiser", lambda model, gpu, threads: unchanged)
    return str(folder)


def unchanged(volume, fsc):
    return volume


def judge_pair(pair, denoised):
    return judge_map(pair, denoised, ANGPIX, structure="s", name="m")


def norm(data):
    return float(np.linalg.norm(data.astype(np.float64)))


# One map


def test_a_denoiser_that_returns_its_input_is_the_wiener_filter(table):
    for item in judge(unchanged, read_pairs(table), "regularised", shift=2):
        assert item.error_to_wiener == item.l1_error_to_wiener == 1
        assert item.gain == 0
        assert item.error_to_unregularised < 1
        assert item.misled == {"lower": 1, "higher": 1, "full": 1}
    for item in judge(unchanged, read_pairs(table), "unregularised"):
        assert item.error_to_unregularised == item.l1_error_to_unregularised == 1
        assert item.misled == {}


def test_what_a_mask_would_do_is_told_apart():
    """A denoiser that only empties the solvent is better than Wiener, and inside the molecule just as good."""
    truth = soft_sphere((BOX,) * 3, 3.0, 1.0)
    noise = np.random.default_rng(1).standard_normal(truth.shape, dtype=np.float32)
    pair = Pair(truth + noise, truth, FSC, 6.0, truth)
    molecule = soft_mask(Volume(truth, ANGPIX)).data
    emptied = np.where(molecule > 0, apply_shells(pair.noisy, FSC), 0)
    found = judge_map(pair, emptied, ANGPIX, structure="s", name="n")
    assert found.error_to_wiener < 0.9
    assert found.inside_error_to_wiener == pytest.approx(1, abs=1e-6)
    assert judge_map(pair, pair.target, ANGPIX, structure="s", name="n").inside_error_to_wiener == 0


def test_errors_are_those_of_their_definition():
    pair = make_pair(3)
    wiener = apply_shells(pair.noisy, FSC)
    found = judge_pair(pair, pair.truth)
    # Sums in float32 and in float64.
    assert found.error_to_wiener == pytest.approx(norm(pair.truth - pair.target) / norm(wiener - pair.target), rel=1e-5)
    assert found.error_to_unregularised == pytest.approx(
        norm(pair.truth - pair.target) / norm(pair.noisy - pair.target), rel=1e-5
    )
    ratio = np.abs(pair.truth - pair.target).mean() / np.abs(wiener - pair.target).mean()
    assert found.l1_error_to_wiener == pytest.approx(ratio, rel=1e-5)
    ratio = np.abs(pair.truth - pair.target).mean() / np.abs(pair.noisy - pair.target).mean()
    assert found.l1_error_to_unregularised == pytest.approx(ratio, rel=1e-5)
    assert judge_pair(pair, pair.target).error_to_wiener == 0


def test_the_crossing_is_that_of_the_fsc_to_the_truth():
    pair = make_pair(4, noise=0.2)
    found = judge_pair(pair, pair.truth)
    frequency = SHELLS / (BOX * ANGPIX)
    expected = crossing_resolution(frequency, shell_correlation(apply_shells(pair.noisy, FSC), pair.truth), 0.5)
    assert found.crossing_wiener == pytest.approx(expected)
    assert found.crossing == 2 * ANGPIX  # the truth is right up to Nyquist
    assert found.gain == pytest.approx(expected / (2 * ANGPIX) - 1)
    assert judge_pair(pair, -pair.truth).crossing == BOX * ANGPIX  # never
    assert judge_pair(pair, -pair.truth).gain < 0


def test_a_pair_of_nothing():
    """Where no shell is shared the target is empty, and so is the Wiener map: leaving it so is right."""
    pair = make_pair(1, fsc=np.zeros(BOX // 2 + 1), resolution=np.inf)
    assert judge_pair(pair, np.zeros_like(pair.noisy)).error_to_wiener == 1
    assert judge_pair(pair, pair.noisy).error_to_wiener == np.inf


def test_the_target_stands_for_a_truth_that_is_not_there(tmp_path):
    pair = make_pair(5)
    (row,) = read_pairs(write_table(tmp_path / "old", [pair], truths=False))
    (found,) = judge(unchanged, [row], "regularised")
    target = replace(pair, truth=pair.target)
    assert found.crossing == pytest.approx(judge_pair(target, apply_shells(pair.noisy, FSC)).crossing)


def test_what_a_denoiser_is_shown(table):
    row = read_pairs(table)[1]
    noisy = read_volume(row.noisy)
    seen = []

    def watch(volume, fsc):
        seen.append(volume)
        return volume

    list(judge(watch, [row], "regularised", shift=2))
    curves = [row.fsc, *evaluation.wrong_curves(row.fsc, 2).values()]
    assert len(seen) == len(curves) == 4
    for volume, curve in zip(seen, curves, strict=True):
        assert volume.voxel_size == ANGPIX
        np.testing.assert_array_equal(volume.data, apply_shells(noisy.data, curve))
    seen.clear()
    list(judge(watch, [row], "unregularised"))
    np.testing.assert_array_equal(seen[0].data, noisy.data)


def test_wrong_curves():
    fsc = np.array([1.0, 1.0, 0.8, 0.5, 0.2, -0.1])
    curves = evaluation.wrong_curves(fsc, 2)
    np.testing.assert_array_equal(curves["lower"], [0.8, 0.5, 0.2, -0.1, -0.1, -0.1])
    np.testing.assert_array_equal(curves["higher"], [1.0, 1.0, 1.0, 1.0, 0.8, 0.5])
    np.testing.assert_allclose(curves["full"], [1.0, 1.0, 8 / 9, 2 / 3, 1 / 3, 0.0])


# The table


def judgement(resolution, error=0.5, gain=0.25, name="run_it005_half1", **misled):
    return Judgement(
        "s", name, resolution, error / 2, error / 4, error, error / 3, error / 5, 10.0, 10 / (1 + gain), misled
    )


def test_bins_begin_at_their_lower_edge():
    rows = [judgement(r).row for r in (3.0, 4.5, 6.0, 8.0, 10.0, np.inf)]
    assert rows == ["below 4.5 A", "4.5-6 A", "6-8 A", "8-10 A", "above 10 A", "above 10 A"]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("7P4C_run_it001_half2_class001_noisy.mrc", True),
        ("run_it001_half1_class001", True),
        ("run_it010_half1_class001", False),
        ("3OL6_000_01_half1_noisy.mrc", False),
    ],
)
def test_first_iterations_are_told_by_their_names(name, first):
    assert (judgement(5.0, name=name).row == FIRST) == first


def test_the_summary():
    items = [
        judgement(5.0, 0.4, 0.5, off=0.9),
        judgement(5.5, 0.8, 0.3, off=1.1),
        judgement(5.9, 1.2, -0.1, off=1.0),
        judgement(9.6, 1.0, 0.0, "run_it001_half1", off=1.0),
    ]
    table = summarise(items)
    assert [(row["resolution"], row["maps"]) for row in table] == [("4.5-6 A", 3), (FIRST, 1), ("all", 4)]
    assert table[0] == {
        "resolution": "4.5-6 A",
        "maps": 3,
        "median_error_to_unregularised": 0.4,
        "median_l1_error_to_unregularised": 0.2,
        "median_error_to_wiener": 0.8,
        "median_l1_error_to_wiener": 0.267,
        "median_inside_error_to_wiener": 0.16,
        "worst_error_to_wiener": 1.2,
        "error_not_worse_percent": 66.7,
        "median_crossing_gain_percent": 30.0,
        "worst_crossing_gain_percent": -10.0,
        "crossing_not_worse_percent": 66.7,
        "median_error_fsc_off": 1.0,
        "worst_error_fsc_off": 1.1,
    }
    assert table[1]["error_not_worse_percent"] == table[1]["crossing_not_worse_percent"] == 100
    assert summarise([]) == []
    json.dumps(table)  # goes into model cards


# Files


@pytest.mark.slow
def test_evaluation_of_files(table, model, tmp_path, capsys):
    done = []
    rows = evaluate_files(
        model,
        [table, table],
        maps=str(tmp_path / "maps.tsv"),
        plot=str(tmp_path / "plot.png"),
        shift=1,
        progress=lambda *now: done.append(now),
    )
    assert done == [(number, 10) for number in range(1, 11)]
    header, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert [dict(zip(header, line, strict=True)) for line in lines] == [
        {name: str(value) for name, value in row.items()} for row in rows
    ]
    assert [row["maps"] for row in rows] == [2, 2, 2, 4, 10]
    assert {row["median_error_to_wiener"] for row in rows} == {1.0}
    header, *lines = (line.split("\t") for line in (tmp_path / "maps.tsv").read_text().splitlines())
    assert len(lines) == 10
    first = dict(zip(header, lines[0], strict=True))
    assert (first["structure"], first["name"]) == ("s0", "s0_run_it002_half1_noisy.mrc")
    assert (first["error_to_wiener"], first["crossing_gain_percent"], first["error_fsc_full"]) == ("1", "0", "1")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_replaced_unasked(table, model, tmp_path):
    for name in ("output", "maps", "plot"):
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(OutputError, match=f"{name}: exists already; add --overwrite to replace it"):
            evaluate_files(model, [table], **{"output": str(tmp_path / "new"), name: str(path)})
        assert path.read_text() == "mine"


def test_what_cannot_be_evaluated(table, model, tmp_path):
    empty = write_table(tmp_path / "empty", [])
    with pytest.raises(InputError, match="pairs.star: lists no pairs, expected some to judge by"):
        evaluate_files(model, [empty])
    with pytest.raises(ModelError, match="no model"):
        evaluate_files(str(tmp_path / "none"), [table])
    Path(model, "model.keras").write_bytes(b"others")
    with pytest.raises(ModelError, match="sha256"):
        evaluate_files(model, [table])


def test_a_truth_on_another_grid(table, tmp_path):
    row = read_pairs(table)[0]
    truth = str(tmp_path / "truth.mrc")
    for shape, voxel_size in (((16,) * 3, ANGPIX), ((BOX,) * 3, 2.0)):
        write_volume(truth, Volume(np.zeros(shape, np.float32), voxel_size), label="test")
        with pytest.raises(InputError, match=rf"truth.mrc: \(.*\) voxels of {voxel_size} A, expected those of .*noisy"):
            load_pair(replace(row, truth=truth))


def test_an_fsc_that_is_none(table):
    row = read_pairs(table)[0]
    with pytest.raises(InputError, match="noisy.mrc: the FSC curve of its table is not finite"):
        load_pair(replace(row, fsc=np.full(BOX // 2 + 1, np.nan)))


# Command


def evaluate(*arguments):
    return CliRunner().invoke(cli, ["train", "--evaluate", *map(str, arguments)])


def test_the_command_evaluates(table, model, tmp_path, monkeypatch):
    """The help's example, with other names."""
    monkeypatch.chdir(tmp_path)
    example = "train --evaluate ./my_prior held_out/pairs.star --plot evaluation.png"
    assert f"cryored {example}" in CliRunner().invoke(cli, ["train", "--help"]).stdout
    done = CliRunner().invoke(cli, example.replace("held_out/pairs.star", table).replace("./my_prior", model).split())
    assert done.exit_code == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["below 4.5 A", "4.5-6 A", "6-8 A", "above 10 A", "all"]
    assert "fsc" not in header
    assert done.stderr == "maps: 5 of 5 \n"
    assert Path("evaluation.png").exists()
    done = evaluate(model, table, "--shift-fsc", 2, "-o", "table.tsv", "--maps", "-", "-q")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 6
    assert "worst_error_fsc_higher" in Path("table.tsv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate", "m", "p.star", "--steps", "3"], "--steps has no meaning with --evaluate"),
        (["--evaluate", "m", "p.star", "--input", "regularised"], "--input has no meaning with --evaluate"),
        (["--evaluate", "m", "p.star", "--plot", "-"], "--plot needs the name of a file"),
        (["--evaluate", "m", "p.star", "--maps", "-"], "only one of --output and --maps can be '-'"),
        (["p.star", "-o", "prior", "--shift-fsc", "2"], "--shift-fsc has no meaning without --evaluate"),
        (["p.star", "-o", "prior", "--maps", "m.tsv"], "--maps has no meaning without --evaluate"),
        (["p.star"], "Missing option '-o' / '--output'"),
        (["--evaluate", "m"], "Missing argument 'PAIRS.star...'"),
    ],
)
def test_usage_of_evaluate(arguments, message):
    done = CliRunner().invoke(cli, ["train", *arguments])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr


def test_errors_of_evaluate_are_one_line(table, model, assert_one_line_error):
    assert_one_line_error(evaluate(model, "none.star"), "none.star: cannot be read")
    assert_one_line_error(evaluate("none", table), "no model named 'none'")


# Lambda of a map


def lam_of(pair, denoised):
    return shell_sums(pair, denoised.astype(np.float32), ANGPIX).total.slope


@pytest.mark.parametrize(("share", "slope"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5), (-1.0, -1.0)])
def test_lambda_of_a_denoiser_that_knows_the_truth(share, slope):
    """Without noise the regression is exact: what the data leave open of the truth is (1 - FSC) times the truth."""
    pair = make_pair(6, noise=0.0)
    assert lam_of(pair, share * pair.truth) == pytest.approx(slope, rel=1e-5)
    # With noise, FSC times it remains, which does not correlate with the truth.
    assert lam_of(make_pair(6), share * pair.truth) == pytest.approx(slope, rel=0.02)


def test_lambda_of_garbage_is_0():
    slopes = [lam_of(make_pair(seed), density(seed + 100)) for seed in range(20)]
    assert abs(np.mean(slopes)) < 0.05
    for nonsense in (-make_pair(0).truth, np.zeros((BOX,) * 3, np.float32)):
        sums = shell_sums(make_pair(0), nonsense, ANGPIX)
        assert sums.total.lam == 0
        assert all(shell.lam == 0 for shell in sums.shells)


def test_lambda_gives_the_update_of_least_error():
    """Against eq. 17 written out, over the shells that count: 1 to the last with an FSC above 0."""
    pair = make_pair(7, noise=0.2)
    denoised = apply_shells(pair.noisy, FSC**2).astype(np.float32)
    total = shell_sums(pair, denoised, ANGPIX).total
    counted = ((SHELLS > 0) & (FSC > 0)).astype(float)

    def error(lam):
        update = apply_shells(pair.noisy, FSC) + lam * apply_shells(denoised, 1 - FSC)
        return norm(apply_shells(update - pair.truth, counted))

    around = [error(total.slope + step) for step in (-0.05, 0.0, 0.05)]
    assert around[1] == min(around)
    for lam in (0.3, 1.0):
        assert total.error(lam) == pytest.approx(error(lam) / error(0), rel=1e-5)
    assert total.error(0) == 1
    assert total.error(total.slope) < total.error(1.0)


def test_shells_that_are_known_or_empty_do_not_count():
    pair = make_pair(8)
    expected = shell_sums(pair, pair.truth, ANGPIX)
    nonsense = density(9)
    for inside in (FSC == 1, FSC == 0):
        other = apply_shells(pair.truth, 1.0 - inside) + apply_shells(nonsense, inside.astype(float))
        found = shell_sums(pair, other.astype(np.float32), ANGPIX)
        assert found.total.slope == pytest.approx(expected.total.slope, rel=1e-5)
        assert found.total.power == pytest.approx(expected.total.power, rel=1e-5)
    assert len(expected.shells) == 10  # 0 to 9
    assert [shell.power > 0 for shell in expected.shells] == [False] * 3 + [True] * 7
    assert expected.edge == BOX * ANGPIX


def test_maps_count_the_same_whatever_their_grey_scale():
    pair = make_pair(10)
    louder = replace(pair, noisy=7 * pair.noisy, target=7 * pair.target, truth=7 * pair.truth)
    one, other = (shell_sums(item, item.target, ANGPIX).total for item in (pair, louder))
    assert (one.product, one.power, one.rest) == pytest.approx((other.product, other.power, other.rest), rel=1e-5)


# The schedule


def test_lambdas_do_not_rise():
    def lams(*slopes, powers=None):
        powers = powers or [1.0] * len(slopes)
        return falling([Regression(slope * power, power, 1.0) for slope, power in zip(slopes, powers, strict=True)])

    assert lams(0.9, 0.5, 0.1) == [0.9, 0.5, 0.1]
    assert lams(0.2, 0.8) == pytest.approx([0.5, 0.5])
    assert lams(0.2, 0.8, powers=[3.0, 1.0]) == pytest.approx([0.35, 0.35])
    assert lams(0.9, 0.2, 0.6, 0.0) == pytest.approx([0.9, 0.4, 0.4, 0.0])
    assert lams(0.3, 0.6, 0.9) == pytest.approx([0.6, 0.6, 0.6])
    assert lams(1.7, 0.5, -0.4) == [1.0, 0.5, 0.0]
    # The best one under the constraint, by trying all.
    rng = np.random.default_rng(1)
    grid = np.linspace(0, 1, 21)
    for _ in range(20):
        slopes, powers = rng.uniform(-0.5, 1.5, 3), rng.uniform(0.1, 1, 3)
        found = np.array(lams(*slopes, powers=list(powers)))
        assert (np.diff(found) <= 0).all()
        candidates = np.array([(a, b, c) for a in grid for b in grid for c in grid if a >= b >= c])
        costs = (powers * (candidates - slopes) ** 2).sum(axis=1)
        assert (powers * (found - slopes) ** 2).sum() <= costs.min() + 1e-12


def sums_of(resolution, slope, *, power=1.0):
    """A map whose shells 1 to 8 all have one slope."""
    shells = (Regression(), *[Regression(slope * power / 8, power / 8, 1.0)] * 8)
    return lambda_fit.ShellSums(resolution, BOX * ANGPIX, shells)


def test_the_fit_follows_the_maps_and_ends_where_they_end():
    maps = [sums_of(4.0, 1.3), sums_of(5.0, 0.8), sums_of(5.5, 0.6), sums_of(12.0, 0.2), sums_of(14.0, 0.4)]
    stored = fit([*maps, sums_of(np.inf, 1.0), sums_of(30.0, 1.0)])
    assert stored["resolution"] == [4.0, 5.25, 13.0, 14.0, 18.0]
    assert stored["lambda"] == [1.0, 0.7, 0.3, 0.3, 0.0]
    assert stored["pairs"] == 5
    schedule = parse_schedule(stored, "fit")
    assert [schedule(r) for r in (2.0, 4.0, 5.25, 13.0, 14.0, 18.0, 29.0, np.inf)] == [1, 1, 0.7, 0.3, 0.3, 0, 0, 0]
    values = [schedule(r) for r in np.linspace(2, 40, 200)]
    assert (np.diff(values) <= 0).all()
    first, second, third = stored["bins"]
    assert (first["resolution"], first["pairs"], first["least_squares"]) == ("0-4.5 A", 1, 1.3)
    assert first["error"] == first["error_lambda_1"] == first["error_paper"]  # all are lambda 1
    assert (second["resolution"], second["pairs"]) == ("4.5-6 A", 2)
    assert second["error"] < second["error_lambda_1"]
    assert third["error_paper"] == 1  # lambda 0 beyond 10 A
    json.dumps(stored)


def test_no_trust_in_what_pure_noise_reaches():
    stored = fit([sums_of(14.9999999, 1.0)])
    assert stored["lambda"][0] == 1
    assert parse_schedule(stored, "fit")(18.0) == 0


def test_no_trust_beyond_the_last_bin_with_maps():
    stored = fit([sums_of(7.0, 1.0)])
    assert parse_schedule(stored, "fit")(8.0) == 0


def test_lambda_by_shell():
    """A denoiser that is right inside the nominal resolution and the opposite beyond."""
    resolution = BOX * ANGPIX / 5.25  # between shells 5 and 6
    maps = []
    for seed in range(3):
        pair = make_pair(seed, noise=0.01, resolution=resolution)
        maps.append(shell_sums(pair, apply_shells(pair.truth, np.where(SHELLS > 5, -1.0, 1.0)), ANGPIX))
    per_shell = fit(maps)["per_shell"]
    inside = np.array(per_shell["u"]) < 1
    np.testing.assert_allclose(np.array(per_shell["lambda"])[inside], 1.0, atol=0.05)
    np.testing.assert_array_equal(np.array(per_shell["lambda"])[~inside], 0.0)
    # Shells 3 to 9, at 3 / 5.25 = 0.57 and so on.
    assert per_shell["u"] == [0.55, 0.75, 0.95, 1.15, 1.35, 1.55, 1.75]


@pytest.mark.parametrize("maps", [[], [sums_of(np.inf, 1.0)], [sums_of(35.0, 1.0)], [sums_of(5.0, 1.0, power=0.0)]])
def test_maps_that_tell_nothing(maps):
    message = f"none of {len(maps)} maps tells a lambda, expected some with a nominal resolution better than 15 A and"
    with pytest.raises(InputError, match=message):
        fit(maps)


def test_a_fit_needs_the_truth(tmp_path):
    rows = read_pairs(write_table(tmp_path / "old", [make_pair(1)], truths=False))
    with pytest.raises(InputError, match="noisy.mrc: its table names no truth map, expected one; make the pairs anew"):
        list(regress(unchanged, rows, "regularised"))


def test_the_fit_shows_a_denoiser_what_it_sees_in_use(table):
    row = read_pairs(table)[1]
    seen = []

    def watch(volume, fsc):
        seen.append(volume.data)
        return volume

    list(regress(watch, [row], "regularised"))
    np.testing.assert_array_equal(seen[0], apply_shells(read_volume(row.noisy).data, row.fsc))


@pytest.mark.slow
def test_fit_of_files(table, model, tmp_path):
    done = []
    path = tmp_path / "schedule.json"
    card = find_model(model).card
    stored = fit_files(
        [table], model, output=str(path), plot=str(tmp_path / "plot.png"), progress=lambda *now: done.append(now)
    )
    assert done == [(number, 4) for number in range(1, 5)]  # one of five resolves nothing
    assert stored == json.loads(path.read_text())
    assert (stored["model"], stored["sha256"]) == ("prior", card.sha256)
    assert stored["structures"] == ["s0", "s1", "s2", "s3"]
    assert read_schedule(path) == parse_schedule(stored, "fit")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert find_model(model).card == card  # unless it is asked for
    with pytest.raises(OutputError, match="schedule.json: exists already; add --overwrite"):
        fit_files([table], model, output=str(path))
    fit_files([table], model, output=str(path), overwrite=True, write_to_card=True)
    assert "weights" not in stored  # so few shells tell none, and the card's stay
    assert find_model(model).card == replace(card, schedule=stored)
    assert model_schedule(find_model(model)) == read_schedule(path)


def test_the_command_fits(table, model, tmp_path, monkeypatch):
    """The help's example, with other names."""
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(cli, ["lambda-schedule", "--help"]).stdout
    example = "lambda-schedule --fit validation/pairs.star --model ./my_prior -o schedule.json --write-card"
    assert f"cryored {example}" in text
    command = example.replace("validation/pairs.star", table).replace("./my_prior", model).split()
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert "1 of 5 pairs left out, at 15 A or worse" in done.stderr
    # The card is what red-update and lambda-schedule follow from now on.
    schedule = read_schedule("schedule.json")
    for resolution in (5.0, 11.0):
        done = CliRunner().invoke(cli, ["lambda-schedule", "--resolution", str(resolution), "--model", model])
        assert done.stdout == f"{schedule(resolution):.6g}\n"
    done = CliRunner().invoke(cli, ["lambda-schedule", "--fit", table, "--model", model, "-q"])
    assert json.loads(done.stdout)["lambda"] == list(schedule.lambdas)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "--model", "m"], "--fit needs PAIRS.star and --model"),
        (["--fit", "pairs.star"], "--fit needs PAIRS.star and --model"),
        (["--fit", "pairs.star", "--model", "m", "--resolution", "5"], "--resolution has no meaning with --fit"),
        (["--fit", "pairs.star", "--model", "m", "--low", "12"], "--low has no meaning with --fit"),
        (["--fit", "pairs.star", "--model", "m", "--plot", "-"], "--plot needs the name of a file"),
        (["--resolution", "5", "--write-card"], "--write-card has no meaning without --fit"),
        (["--resolution", "5", "-o", "s.json"], "--output has no meaning without --fit"),
    ],
)
def test_usage_of_fit(arguments, message):
    done = CliRunner().invoke(cli, ["lambda-schedule", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
