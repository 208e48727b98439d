"""Denoisers side by side: the numbers are the evaluation's, a stopped run goes on, others get their best settings."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from dataclasses import replace

import click
import numpy as np
import pytest
import side_by_side
from click.testing import CliRunner
from side_by_side import Method, choose, compare, smoothing, summary, topaz_methods, tune, weighting
from small_pairs import write_tables

from cryored.maps.fourier import apply_shells
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import find_model
from cryored.simulation.pair_table import PairRow, read_pairs, write_pairs
from cryored.training.evaluation import judge, load_pair, summarise


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("pairs"), "pairs.star", ["1AAA", "2BBB", "3CCC"])


@pytest.fixture(scope="module")
def other_table(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("others"), "pairs.star", ["4DDD", "5EEE"])


def halve(name="halve"):
    return Method(name, "unregularised", "-", lambda volume, fsc: volume.data / 2)


def pull_to_zero(data, amount):
    """Stand for a smoother: the larger the amount, the closer to nothing."""
    return data / (1 + amount / data.std())


def invoke(*arguments):
    return CliRunner().invoke(side_by_side.main, [str(argument) for argument in arguments])


# The numbers


def test_the_numbers_are_those_of_the_evaluation(table, tmp_path):
    rows = read_pairs(table)
    results = compare([weighting(), halve()], rows, tmp_path / "results.tsv")
    expected = list(judge(lambda volume, fsc: volume.with_data(volume.data / 2), rows, "unregularised"))
    assert [result.judgement for result in results if result.method == "halve"] == expected
    for found, row in zip(summary(results)[-len(summarise(expected)) :], summarise(expected), strict=True):
        assert found["method"] == "halve"
        assert {name: row[name] for name in found if name in row} == {
            name: value for name, value in found.items() if name in row
        }
    for row in summary(results):
        if row["method"] == "FSC weighting":
            assert row["median_error_to_wiener"] == row["worst_error_to_wiener"] == 1
            assert row["median_crossing_gain_percent"] == 0


@pytest.mark.slow
def test_the_shipped_model(table, tmp_path):
    row = read_pairs(table)[0]
    (result,) = compare([side_by_side.model_method("cwred")], [row], tmp_path / "results.tsv")
    (expected,) = judge(Denoiser(find_model("cwred"), gpu=False), [row], "regularised")
    # Two threads add up in another order.
    assert result.judgement.error_to_wiener == pytest.approx(expected.error_to_wiener, rel=1e-4)
    assert result.seconds > 0


def test_seconds_are_without_the_start(table, tmp_path):
    late = replace(halve(), start=100.0)
    (result,) = compare([late], read_pairs(table)[:1], tmp_path / "results.tsv")
    assert -100 < result.seconds < -50
    assert float(summary([result])[0]["median_seconds"]) == float(f"{result.seconds:.2g}")


# A run that was stopped


def test_what_is_done_is_not_done_again(table, tmp_path):
    rows, path = read_pairs(table), tmp_path / "results.tsv"
    calls = []

    def denoise(volume, fsc):
        calls.append(volume)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return volume.data / 2

    method = Method("slow", "unregularised", "-", denoise)
    with pytest.raises(KeyboardInterrupt):
        compare([weighting(), method], rows, path)
    results = compare([weighting(), method], rows, path)
    assert len(calls) == len(rows) + 1  # only the one that was stopped came twice
    with path.open(newline="") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t"))
    assert Counter(line["method"] for line in lines) == {"slow": len(rows), "FSC weighting": len(rows)}
    # All digits are in the file.
    assert compare([weighting(), method], rows, path) == results
    assert len(calls) == len(rows) + 1
    # Other settings are another method.
    compare([replace(method, settings="stronger")], rows, path)
    assert len(calls) == 2 * len(rows) + 1


def test_another_file_is_refused(table, tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text("resolution\tmaps\n4\t2\n")
    with pytest.raises(click.ClickException, match=r"results\.tsv: no results of this program"):
        compare([halve()], read_pairs(table), path)
    assert path.read_text() == "resolution\tmaps\n4\t2\n"


# Which maps


def row(structure, iteration, resolution, half=1):
    name = f"dir/{structure}_run_it{iteration:03}_half{half}_class001_noisy.mrc"
    return PairRow(name, "t", structure, half, resolution, np.ones(3), "relion", 0)


def test_maps_are_spread_over_resolution_and_structures():
    rows = [row("1AAA", 1, 9.6), row("2BBB", 1, 9.6), row("1AAA", 2, 9.0)]
    rows += [row("1AAA", number, 5.0) for number in range(3, 23)]
    rows += [row("2BBB", number, 5.5) for number in range(3, 23)]
    chosen = choose(rows, 7)
    assert Counter(item.resolution for item in chosen) == {9.6: 2, 9.0: 1, 5.0: 2, 5.5: 2}
    assert choose(rows[::-1], 7) == chosen
    assert {item.noisy for item in choose(rows, 100)} == {item.noisy for item in rows}
    assert len(choose(rows, 100)) == len(rows)
    assert len(choose(rows, 1)) == 1


def test_first_iterations_are_a_bin_of_their_own():
    rows = [row("1AAA", number, 5.0) for number in range(2, 12)]
    first = row("1AAA", 1, 5.0)
    assert first in choose([*rows, first], 2)


# Strengths


def test_strength_is_in_units_of_the_noise(table):
    """White noise of deviation 2 whose FSC is c: sqrt(1 - c) of it is noise."""
    rng = np.random.default_rng(3)
    data = (2 * rng.standard_normal((16, 16, 16))).astype(np.float32)
    amounts = []

    def watch(data, amount):
        amounts.append(amount)
        return data

    method = smoothing("watch", watch, "unregularised", 1.5)
    for share in (0.0, 0.75, 1.0):
        method.denoise(Volume(data, 3.0), np.full(9, share))
    # The corners beyond the last shell are cut by `apply_shells`.
    inside = apply_shells(data, np.ones(9)).std()
    assert amounts == pytest.approx([1.5 * inside, 0.75 * inside, 0.0], rel=1e-5)


@pytest.mark.slow
def test_tuning_finds_input_and_strength_of_the_least_error(table):
    rows = read_pairs(table)
    found = tune("pull", pull_to_zero, rows)
    errors = {}
    for given in ("unregularised", "regularised"):
        for strength in side_by_side.STRENGTHS:
            method = smoothing("pull", pull_to_zero, given, strength)
            items = [side_by_side.apply(method, item).judgement.error_to_wiener for item in rows]
            errors[given, method.settings] = np.median(items)
    assert (found.input, found.settings) == min(errors, key=errors.get)
    assert len(set(errors.values())) > len(errors) / 2


@pytest.mark.parametrize("name", ["total variation", "wavelet"])
def test_smoothers(name, table):
    """They take out noise, and grey scale does not matter to them."""
    pytest.importorskip("skimage")
    pytest.importorskip("pywt")
    pair, voxel_size = load_pair(read_pairs(table)[0])
    method = smoothing(name, side_by_side.smoothers()[name], "unregularised", 1.0)
    once = method.denoise(Volume(pair.noisy, voxel_size), pair.fsc)
    assert np.linalg.norm(once - pair.truth) < 0.8 * np.linalg.norm(pair.noisy - pair.truth)
    larger = method.denoise(Volume(1000 * pair.noisy, voxel_size), pair.fsc)
    np.testing.assert_allclose(larger / 1000, once, atol=1e-4 * np.abs(once).max())


def test_without_scikit_image(table, other_table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    monkeypatch.setattr(side_by_side, "model_method", lambda name: halve(name))
    done = invoke(table, "-o", tmp_path / "results.tsv", "--tune", other_table)
    assert done.exit_code == 1
    assert "pip install scikit-image PyWavelets" in done.stderr


# Topaz, for which a script stands

STAND_IN = """#!{python}
import shutil, sys
from pathlib import Path
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*arguments, file=log)
if arguments[0] == "-c":
    print("9.9.9")
elif "--output" in arguments:
    source, target = Path(arguments[-1]), Path(arguments[-2])
    target.mkdir()
    shutil.copy(source, target)
"""


def stand_in(folder, text=STAND_IN):
    path = folder / "python"
    path.write_text(text.format(python=sys.executable, log=str(folder / "log")))
    path.chmod(0o755)
    return str(path)


def test_topaz_gets_both_inputs(table, tmp_path):
    rows = read_pairs(table)[:1]
    methods = topaz_methods(stand_in(tmp_path))
    raw, weighted = compare(methods, rows, tmp_path / "results.tsv")
    assert raw.settings == weighted.settings == "topaz-em 9.9.9, unet-3d-10a, its defaults"
    assert (raw.input, weighted.input) == ("unregularised", "regularised")
    assert raw.judgement.error_to_unregularised == 1  # the stand-in gives back what it is shown
    assert weighted.judgement.error_to_wiener == 1
    assert methods[0].start > 0
    command = "-m topaz.main denoise3d --model unet-3d-10a --device -1 --num-threads 2"
    _, start, *calls = (tmp_path / "log").read_text().splitlines()
    assert start == command
    assert len(calls) == 2
    assert all(call.startswith(f"{command} --output ") for call in calls)


def test_topaz_that_fails(tmp_path):
    python = stand_in(tmp_path, "#!{python}\nimport sys\nsys.exit('Unable to load model')\n")
    with pytest.raises(click.ClickException, match="Unable to load model; expected the Python .* pip install topaz-em"):
        topaz_methods(python)


# The command


@pytest.mark.slow
def test_the_command(table, other_table, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "model_method", lambda name: halve(name))
    monkeypatch.setattr(side_by_side, "smoothers", lambda: {"pull": pull_to_zero})
    output = tmp_path / "results.tsv"
    arguments = (table, "-o", output, "--models", "a,b", "--tune", other_table, "--topaz", stand_in(tmp_path))
    done = invoke(*arguments, "--maps", 2)
    assert done.exit_code == 0, done.output
    lines = list(csv.DictReader(done.stdout.splitlines(), delimiter="\t"))
    assert [line["method"] for line in lines if line["resolution"] == "all"] == [
        *("FSC weighting", "a", "b", "pull", "Topaz", "Topaz")
    ]
    assert {line["maps"] for line in lines if line["resolution"] == "all"} == {"2"}
    assert len(output.read_text().splitlines()) == 1 + 6 * 2


def test_what_the_command_refuses(table, other_table, tmp_path):
    output = tmp_path / "results.tsv"
    done = invoke(table, table, "-o", output)
    assert "is listed 2 times" in done.stderr
    done = invoke(table, "-o", output, "--tune", other_table, "--tune", table)
    assert "--tune: 1AAA is judged by too" in done.stderr
    empty = tmp_path / "pairs.star"
    write_pairs(empty, [], made_by="test")
    done = invoke(empty, "-o", output)
    assert "no pairs" in done.stderr
    assert not output.exists()
