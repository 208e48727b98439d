"""The paper's experiment: its definitions, what is done again and what is not, tables and figures."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner
from paper import measure, plan, results, work
from paper.plan import RUNS, Cell, parse_cells, parse_runs
from paper.work import Experiment

from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.files.star import read_star, write_star
from cryored.maps.fourier import apply_shells, low_pass
from cryored.maps.fsc import SubstitutedFsc, shell_correlation
from cryored.reconstruction.projection import euler_angles, perturb, rotation_matrices
from cryored.refinement import relion_runs
from cryored.refinement.relion_runs import LOCAL_SEARCH, RefinementError
from cryored.simulation.pair_table import Pair, write_pair, write_pairs

REPOSITORY = Path(__file__).parents[1]
STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
TINY = plan.Scale("tiny", 24, 30, 4.0, (0.5, 0.2, 0.1, 0.05), 5.0, LOCAL_SEARCH, 60.0)
A, B = Cell("4m82", "i"), Cell("4btf", "i")
NOISE = Cell("4ail", "noise")


@pytest.fixture
def experiment(tmp_path):
    structures = tmp_path / "structures"
    structures.mkdir()
    for name in ("4ail", "4m82", "7NF3"):  # two of the paper's own, and a stand-in
        shutil.copyfile(STRUCTURE, structures / f"{name}.cif.gz")
    return Experiment(tmp_path / "runs", tmp_path / "kept", TINY, structures, seed=3)


@pytest.fixture
def refined(monkeypatch):
    """Stand in for RELION: maps that are the truth with noise, angles that are the true ones with errors."""
    calls = []

    def refine(data, name, hook, *, search, timeout, companion, on_iteration, stop):
        calls.append((data.folder.name, name, hook))
        target = data.folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        truth = read_volume(data.truth)
        rng = np.random.default_rng(5)  # all runs have the same noise: they differ by its strength
        noise = {"map": 1.0, "cwred": 0.5}.get(name, 2.0) * truth.data.std()
        for half in (1, 2):
            halves = truth.data + noise * rng.standard_normal(truth.shape).astype(np.float32)
            write_volume(target / f"run_half{half}_class001_unfil.mrc", truth.with_data(halves), label="t")
        write_volume(target / "run_class001.mrc", truth.with_data(halves), label="t")
        for iteration in range(3):
            (target / f"run_it00{iteration}_half1_model.star").touch()
        (target / "run_it001_half1_class001_external_reconstruct_data_real.mrc").touch()
        log = '{"lambda": 0.25}\n{"lambda": 0.5}\n'
        (target / "run_it001_half1_class001_cryored.log").write_text(log if name != "map" else "")
        fsc = np.where(np.arange(13) < 9, 1.0, 0.0)
        write_star(target / "run_model.star", {"model_class_1": {"rlnGoldStandardFsc": fsc}})
        star = read_star(data.folder / "particles_truth.star")
        angles = [star.numbers("particles", f"rlnAngle{angle}") for angle in ("Rot", "Tilt", "Psi")]
        found = perturb(rotation_matrices(*angles), 2.0, rng=rng)
        columns = dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), euler_angles(found), strict=True))
        write_star(
            target / "run_data.star",
            {"particles": {"rlnImageName": star.texts("particles", "rlnImageName")} | columns},
        )

    monkeypatch.setattr(relion_runs, "refine", refine)
    return calls


def names_of(calls):
    return [name for _, name, _ in calls]


# What is run


def test_cells_and_runs_are_parsed():
    assert parse_cells("4ail:i,4m82:iv") == [Cell("4ail", "i"), Cell("4m82", "iv")]
    assert list(map(str, parse_cells("4ail,4ail:i"))) == ["4ail:i", "4ail:ii", "4ail:iii", "4ail:iv", "4ail:noise"]
    assert parse_runs("cwred,map") == ["map", "cwred"]  # MAP comes first
    for wrong in ("4ail:v", "", "4bb9:noise", "4ail:i,"):
        with pytest.raises(InputError, match="is no cell, expected one as 4ail:i"):
            parse_cells(wrong)
    with pytest.raises(InputError, match="'cwrde' is no run, expected some of map, true-angles, pass-cwred"):
        parse_runs("map,cwrde")


def test_each_cell_has_the_runs_that_the_experiment_asks_for():
    def runs(cell):
        return {name for name, run in RUNS.items() if run.belongs_to(cell) and run.kind == "refine"}

    assert len(plan.SIGNAL) == 16
    for cell in plan.SIGNAL:
        assert {"map", "red", "cwred-paper", "cwred"} <= runs(cell)
    assert [runs(cell) for cell in plan.NOISES] == [{"map", "cwred", "cwred-forced"}]
    assert [str(cell) for cell in plan.CELLS if "cwred-gaussian" in runs(cell)] == [
        f"{name}:ii" for name in plan.STRUCTURES
    ]
    assert sum("cwred-limit" in runs(cell) for cell in plan.CELLS) == 2
    for cell in plan.SIGNAL:
        assert {"map-mask", "cwred-mask", "cwred-eq17"} <= runs(cell)
        assert ("oracle" in runs(cell)) == (cell.level == "ii")  # one level of each structure


def test_both_scales_span_the_same_resolutions():
    products = [np.array(scale.snr) * scale.number for scale in plan.SCALES.values()]
    np.testing.assert_allclose(products[0], products[1])


# Definitions


def record(halves, truth, box=24, angpix=2.0, **more):
    def curve(shell):
        """Fall from 1 to 0 between two shells: the crossing of a threshold lies between."""
        return [1.0 if i <= shell else 0.0 for i in range(box // 2 + 1)]

    return {
        "box": box,
        "angpix": angpix,
        "half_map_fsc": curve(halves),
        "half_map_fsc_masked": curve(halves),
        "truth_fsc": curve(truth),
    } | more


def test_inflation_is_how_much_further_the_half_maps_agree():
    # Shell 8 of 48 A and 0.857 of the way to the next, over shell 4 and half of the way.
    assert measure.inflation(record(8, 4)) == pytest.approx((8 + 0.857) / 4.5)
    assert measure.inflation(record(4, 8)) == pytest.approx((4 + 0.857) / 8.5)
    assert math.isnan(measure.inflation(record(0, 0)))
    assert measure.inflation(record(4, 0)) == math.inf


def test_half_maps_and_truth_agree_where_theory_says():
    """A signal in white noise that weakens with resolution: 0.143 of halves is 0.5 of their mean, inflation is 1."""
    shape, rng = (48, 48, 48), np.random.default_rng(1)
    signal = apply_shells(rng.standard_normal(shape), 10.0 ** (-np.arange(25) / 12))
    halves = [signal + 0.1 * rng.standard_normal(shape) for _ in range(2)]
    found = {
        "box": 48,
        "angpix": 1.0,
        "half_map_fsc_masked": measure.shell_correlation(*halves),
        "truth_fsc": measure.shell_correlation(sum(halves) / 2, signal),
    }
    # Both curves fall by 0.05 a shell there and a shell of thousands of coefficients scatters by 0.01.
    assert measure.inflation(found) == pytest.approx(1, abs=0.02)
    assert measure.excess(found) == pytest.approx(0, abs=0.005)
    # Something in both halves that the truth does not have.
    shared = 0.1 * rng.standard_normal(shape)
    found["half_map_fsc_masked"] = measure.shell_correlation(*(half + shared for half in halves))
    found["truth_fsc"] = measure.shell_correlation(sum(halves) / 2 + shared, signal)
    assert measure.inflation(found) > 1.2
    assert measure.excess(found) > 0.1


def test_the_mean_goes_as_far_as_map_shows_the_truth():
    plain = record(8, 6)
    assert measure.mean_truth_fsc(plain, plain) == 1
    assert measure.mean_truth_fsc(record(8, 3), plain) == 0.5
    assert measure.mean_truth_fsc(record(8, 12), plain) == 1
    assert measure.mean_truth_fsc(record(8, 0), record(0, 0)) == 0  # one shell at least


def test_shells_that_only_the_prior_makes_agree_are_found():
    assert measure.invented_shells(record(6, 0), record(4, 0)) == pytest.approx([48 / 5, 48 / 6])
    assert measure.invented_shells(record(4, 0), record(6, 0)) == []


@pytest.mark.slow
def test_measures_a_run(experiment, refined):
    found = work.do_run(experiment, A, "cwred")
    assert found["iterations"] == 3
    assert found["lambda"] == [0.25, 0.5]
    # Rotation vectors of three normal components, 2 / sqrt(3) each: the median of their length is 1.538 of that.
    assert measure.median_angular_error(found) == pytest.approx(1.538 * 2 / math.sqrt(3), rel=0.25)
    assert measure.relion_resolution(found) == pytest.approx(96 / 8)
    assert len(found["truth_fsc"]) == 13
    assert found["truth_fsc"][2] > found["half_map_fsc_masked"][2] > 0.5
    assert found["structure"] == "4m82"
    assert found["snr"] == 0.5
    assert found["prior"]
    left = {path.name for path in (experiment.place(A) / "cwred").iterdir()}
    assert "run_it001_half1_class001_cryored.log" in left
    assert "run_it001_half1_class001_external_reconstruct_data_real.mrc" not in left


def test_the_hook_gets_the_runs_options(experiment, refined):
    cold = replace(experiment, hook="cold")
    for name in ("map", "cwred", "cwred-limit"):
        work.do_run(cold, A, name)
    hooks = [hook for _, _, hook in refined]
    assert "relion_external_reconstruct" in hooks[0]
    assert "cryored" not in hooks[0]
    assert hooks[1].endswith("bin/cryored-external-reconstruct --model cwred --lambda auto")
    assert hooks[2].endswith("--model cwred --lambda auto --prior-limit 6")


def test_noise_has_no_signal_but_the_reference_of_the_best_level(experiment, refined):
    data, signal = work.prepare(experiment, NOISE), work.prepare(experiment, Cell("4ail", "i"))
    reference = [read_volume(item.folder / "particles_reference.mrc").data for item in (data, signal)]
    np.testing.assert_array_equal(*reference)
    images = [mrcfile.read(item.stack) for item in (data, signal)]
    assert images[0].var() == pytest.approx(1, abs=0.05)  # 17 000 pixels
    assert images[1].var() == pytest.approx(1.5, abs=0.1)


# What is done, and what is done again


def test_a_run_is_outdated_by_the_weights_that_it_uses(experiment, monkeypatch, tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "share" / "models" / "cwred", tmp_path / "models" / "cwred")
    monkeypatch.setenv("CRYORED_MODEL_PATH", str(tmp_path / "models"))
    path = tmp_path / "models" / "cwred" / "card.json"
    card = json.loads(path.read_text())

    def priors(**changes):
        path.write_text(json.dumps(card | changes))
        return {name: experiment.method(plan.RUNS[name])["prior"] for name in ("map", "cwred", "cwred-mask")}

    before = priors()
    masked = priors(weights_masked=card["weights"] | {"trust": 2.0})
    assert masked == before | {"cwred-mask": masked["cwred-mask"]} != before
    alone = priors(weights=card["weights"] | {"trust": 2.0})
    assert alone == before | {"cwred": alone["cwred"]} != before


@pytest.mark.slow
def test_what_is_done_is_kept(experiment, refined):
    assert work.do_all(experiment, [A, B], ["map", "cwred"], 2) == {}
    assert sorted(names_of(refined)) == ["cwred", "cwred", "map", "map"]
    assert work.do_all(experiment, [A, B], ["map", "cwred"], 1) == {}
    assert len(refined) == 4
    assert experiment.record(B, "map")["structure"] == "7NF3"
    experiment.path(A, "cwred").unlink()
    work.do_all(experiment, [A, B], ["map", "cwred"], 1)
    assert refined[4:] == [("4m82_i", "cwred", refined[4][2])]


def test_a_failure_does_not_stop_the_others_and_leaves_no_record(experiment, refined, monkeypatch):
    good = relion_runs.refine

    def fail(data, name, *arguments, **more):
        if name == "cwred":
            raise RefinementError("run.log: out of patience")
        good(data, name, *arguments, **more)

    work.do_run(experiment, A, "cwred")
    monkeypatch.setattr(relion_runs, "refine", fail)
    experiment = dataclasses.replace(experiment, relion=("--gpu",))  # all is outdated
    assert experiment.state(A, "cwred") == "outdated"
    failed = work.do_all(experiment, [A], ["map", "cwred", "cwred-limit"], 1)
    assert failed == {"4m82:i cwred": "run.log: out of patience"}
    assert [experiment.state(A, name) for name in ("map", "cwred", "cwred-limit")] == ["done", "missing", "done"]


def test_an_interrupt_ends_what_runs_and_begins_no_other(experiment, monkeypatch):
    begun = []

    def refine(data, name, hook, *, stop, **more):
        begun.append(name)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(10)
        raise RefinementError("stopped")

    monkeypatch.setattr(relion_runs, "refine", refine)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what runs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            work.do_all(experiment, [A, B], ["map", "cwred"], 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun == ["map"]
    assert experiment.state(A, "map") == "missing"


def test_another_model_makes_a_run_outdated(experiment, refined, monkeypatch, tmp_path):
    work.do_run(experiment, A, "map")
    work.do_run(experiment, A, "cwred")
    shutil.copytree(REPOSITORY / "share" / "models" / "cwred", tmp_path / "models" / "cwred")
    monkeypatch.setenv("CRYORED_MODEL_PATH", str(tmp_path / "models"))
    assert experiment.state(A, "cwred") == "done"
    card = tmp_path / "models" / "cwred" / "card.json"
    content = json.loads(card.read_text())
    card.write_text(json.dumps(content | {"evaluation": {}}))
    assert experiment.state(A, "cwred") == "done"
    card.write_text(json.dumps(content | {"schedule": {"resolution": [4.0, 11.5], "lambda": [1.0, 0.0]}}))
    assert experiment.state(A, "cwred") == "outdated"
    assert experiment.state(A, "map") == "done"


@pytest.mark.slow
def test_records_suffice_to_go_on_elsewhere(done, refined, tmp_path):
    """Nothing that is done is done again, and tables and figures need no maps."""
    from paper.figures import draw_figures

    before = draw_figures(records(done), tmp_path / "before")
    shutil.rmtree(done.folder)
    refined.clear()
    assert work.do_all(done, [B, A], ["map", "cwred", "swapped"], 1) == {}
    assert refined == []
    after = draw_figures(records(done), tmp_path / "after")
    assert [path.read_bytes() for path in after] == [path.read_bytes() for path in before]
    # What needs the maps of a run says so.
    with pytest.raises(InputError, match="4m82_i/map/run_class001.mrc: not there.*remove its record"):
        work.do_run(done, A, "pass-cwred")
    with pytest.raises(InputError, match="4btf_i/map/run_class001.mrc: not there.*remove its record"):
        work.do_run(done, A, "swapped")


def test_pictures_keep_what_is_shown():
    values = np.random.default_rng(0).normal(size=(6, 6, 6)).astype(np.float32)
    grey = measure.picture_of(measure.picture(values, values)) / 255
    np.testing.assert_allclose(grey, np.clip(values[3] / np.percentile(values, 99.8), 0, 1), atol=0.5 / 255 + 1e-6)
    assert not measure.picture_of(measure.picture(0 * values, 0 * values)).any()


def test_a_data_set_of_other_settings_is_refused(experiment, refined):
    work.do_run(experiment, A, "map")
    other = dataclasses.replace(experiment, seed=4)
    assert (experiment.state(A, "map"), other.state(A, "map")) == ("done", "outdated")
    with pytest.raises(InputError, match=r"settings.json: seed is 3, asked for is 4; use another --folder"):
        work.prepare(other, A)


def test_a_structure_that_is_not_there(experiment):
    with pytest.raises(InputError, match="no atomic model 4bb9 or 2XZP, expected a PDB or mmCIF"):
        experiment.structure(Cell("4bb9", "i"))


def test_single_passes_need_the_map_run(experiment):
    with pytest.raises(InputError, match="4m82_i/map/run_class001.mrc: not there"):
        work.do_run(experiment, A, "pass-cwred")


# The resident updater


@pytest.mark.slow
def test_the_watcher_serves_while_the_block_runs(tmp_path):
    with relion_runs.resident(tmp_path, options=("--lambda", "0")):
        presence = (tmp_path / "cryored_watch.txt").read_text()
        assert "state serving" in presence
        assert "option --lambda\noption 0" in presence
    assert "state ended" in (tmp_path / "cryored_watch.txt").read_text()


@pytest.mark.slow
def test_a_watcher_that_cannot_start_is_an_error(tmp_path):
    with (
        pytest.raises(RefinementError, match=r"watch.log: cryored watch ended with status 1; the log says why"),
        relion_runs.resident(tmp_path, options=("--model", "none-such")),
    ):
        pytest.fail("the block must not run")
    assert "none-such" in (tmp_path / "watch.log").read_text()


# Tables, report, check, figures


@pytest.fixture
def done(experiment, refined, monkeypatch):
    """An experiment with two cells, a noise cell, and single passes by a model that changes nothing."""

    def harvest(run, truth, folder, options):
        answer = read_volume(truth)
        Path(folder).mkdir()
        rows = []
        for number, resolution in enumerate((12.0, 8.0)):
            noisy = answer.data + np.float32(answer.data.std()) * np.random.default_rng(number).standard_normal(
                answer.shape, dtype=np.float32
            )
            fsc = np.linspace(1, 0, 13)
            pair = Pair(noisy, apply_shells(answer.data, fsc), fsc, resolution, answer.data)
            stem = Path(folder) / f"it{number}"
            rows.append(
                write_pair(
                    stem, pair, structure="s", half=1, method="relion", seed=0, angpix=4.0, label="t", truth=truth
                )
            )
        write_pairs(Path(folder) / "pairs.star", rows, made_by="t")

    class Copying:
        def __init__(self, model):
            pass

        def __call__(self, volume, fsc):
            return volume

    monkeypatch.setattr(work, "harvest_files", harvest)
    monkeypatch.setattr(work, "Denoiser", Copying)
    find = work.find_model

    def weighted(name):
        """What copies the weighted map estimates truth times FSC."""
        found = find(name)
        return dataclasses.replace(found, card=dataclasses.replace(found.card, target="weighted"))

    monkeypatch.setattr(work, "find_model", weighted)
    assert work.do_all(experiment, [B, A, NOISE], ["map", "cwred", "pass-cwred", "swapped"], 1) == {}
    return experiment


def test_what_the_network_makes_of_substituted_noise_is_recorded(experiment, monkeypatch):
    grid = np.random.default_rng(1).standard_normal((24, 24, 24), dtype=np.float32)
    monkeypatch.setattr(work, "half_maps", lambda data, name: [grid, grid])
    monkeypatch.setattr(work, "_final_map", lambda place, name: place)
    monkeypatch.setattr(work, "substituted_volumes", lambda *args, **options: SubstitutedFsc(args[3], *np.eye(3, 13)))
    cell = Cell("4m82", "ii")
    record = work.do_run(experiment, cell, "substituted")
    assert record["start"] == 12  # 24 voxels of 4 A over 8 A
    assert [curve.index(1) for curve in record["curves"].values()] == [0, 2, 1]
    text = results.report({(cell, "substituted"): record}, "c")
    assert "**Noise substitution**, 4m82:ii: mean FSC of the half-maps from 8.0 Å on:" in text


def test_noise_can_begin_at_the_resolution_of_the_cell(experiment, monkeypatch):
    first, second = np.random.default_rng(1).standard_normal((2, 24, 24, 24), dtype=np.float32)
    common = low_pass(first, 4.0, 16.0)  # shells up to 6
    monkeypatch.setattr(work, "half_maps", lambda data, name: [common + 0.02 * half for half in (first, second)])
    monkeypatch.setattr(work, "soft_mask", lambda truth: truth.with_data(np.ones((24, 24, 24), dtype=np.float32)))
    monkeypatch.setattr(work, "_final_map", lambda place, name: place)
    monkeypatch.setattr(work, "substituted_volumes", lambda *args, **options: SubstitutedFsc(args[3], *np.eye(3, 13)))
    cell = Cell("4m82", "ii")
    record = work.do_run(experiment, cell, "substituted-143")
    halves = work.half_maps(None, "")
    curve = shell_correlation(*halves)
    assert curve[record["start"] - 1] >= 0.143 > curve[record["start"]]
    text = results.report({(cell, "substituted-143"): record}, "c")
    limit = 24 * 4.0 / record["start"]
    assert f"4m82:ii: mean FSC of the half-maps from {limit:.1f} Å on, but for 3 shells: " in text


def records(experiment):
    return experiment.records(plan.CELLS, list(RUNS))


def test_a_single_pass_is_judged(done):
    found = done.record(A, "pass-cwred")
    assert [item["resolution"] for item in found["judgements"]] == [12.0, 8.0]
    assert found["judgements"][0]["error_to_wiener"] == pytest.approx(1, abs=1e-6)  # nothing was changed
    example = found["example"]
    assert example["name"].startswith("it1")  # the one that is nearer to 7 A
    assert example["truth_fsc"]["denoised"] == pytest.approx(example["truth_fsc"]["FSC-weighted"], abs=1e-6)


def test_the_table_tells_how_it_was_made(done, tmp_path):
    rows = results.table_rows(records(done))
    assert [(row["cell"], row["run"]) for row in rows] == [
        (cell, run) for cell in ("4btf:i", "4m82:i", "4ail:noise") for run in ("map", "cwred")
    ]
    path = tmp_path / "table.tsv"
    path.write_text(results.format_table(rows, "python benchmarks/paper --table table.tsv"))
    assert path.read_text().startswith("# python benchmarks/paper --table table.tsv\ncell\trun\t")
    stored = results.read_table(path)
    plain, prior = stored["4m82:i", "map"], stored["4m82:i", "cwred"]
    assert float(prior["mean_truth_fsc"]) > float(plain["mean_truth_fsc"])
    assert plain["inflation_to_map"] == "1.000"
    assert float(plain["inflation"]) == pytest.approx(
        float(plain["truth_0.5_A"]) / float(plain["half_map_0.143_A"]), abs=2e-3
    )
    assert prior["lambda"] == "0.25-0.50"
    assert plain["lambda"] == "-"
    for row in rows:
        assert row["seed"] == "3"
        assert row["hook"] == ("relion" if row["run"] == "map" else "watch")
        assert row["version"]
        assert row["date"]


def test_the_published_table_follows_from_the_records_that_are_kept():
    """Records may be ahead of it, while the experiment goes on."""
    docs = REPOSITORY / "docs"
    kept = Experiment(docs, docs / "paper", plan.SCALES["small"], docs)
    rows = results.table_rows(kept.records(plan.CELLS, list(RUNS)))
    found = {(row["cell"], row["run"]): row for row in rows}
    published = results.read_table(docs / "paper.tsv")
    assert len(published) >= 48
    assert {key: found[key] for key in published} == published


def test_the_published_report_follows_from_the_records_that_are_kept():
    docs = REPOSITORY / "docs"
    kept = Experiment(docs, docs / "paper", plan.SCALES["small"], docs)
    command = "python benchmarks/paper --results docs/paper --report -q"
    published = (docs / "paper_report.md").read_text(encoding="utf-8")
    assert results.report(kept.records(plan.CELLS, list(RUNS)), command) == published  # else run it anew


def test_without_map_there_is_no_mean(done):
    rows = results.table_rows({(A, "cwred"): done.record(A, "cwred")})
    assert rows[0]["mean_truth_fsc"] == rows[0]["inflation_to_map"] == "-"


def test_the_report_says_how_often_and_where(done):
    found = dict(records(done))
    text = results.report(found, "python benchmarks/paper --report")
    rows = results.table_rows(found)
    map_, prior = (
        next(row for row in rows if (row["cell"], row["run"]) == ("4m82:i", name)) for name in ("map", "cwred")
    )
    keys = ("half_map_0.143_A", "truth_0.5_A", "regularised_0.5_A")
    resolutions = [" / ".join(row[key] for key in keys) for row in (map_, prior)]
    assert "| cell | map | cwred |\n| --- | --- | --- |" in text
    assert f"| 4m82:i | {resolutions[0]} | {resolutions[1]} |" in text
    assert f"| {prior['mean_truth_fsc']} / {prior['angular_error_deg']} |" in text
    assert "refinements 6, 0.0 hours" in text
    assert "| cwred | all | 4 | " in text  # two maps of each cell with signal
    assert "**cwred against map**, 2 cells: mean FSC to the truth at or above in 2, above in 2" in text
    assert "**4ail:noise**: half-map FSC of cwred (lambda 0.25-0.50) above 0.143 where MAP's is not:" in text
    noise = found[NOISE, "cwred"]
    beyond = [
        value for shell, value in enumerate(noise["truth_fsc"]) if shell / (noise["box"] * noise["angpix"]) > 1 / 20
    ]
    assert f"mean FSC to the protein of the reference beyond 20 Å {np.mean(beyond):+.3f}" in text
    # The stand-ins are one and the same molecule: the test must see that.
    assert "**Swapped prior**, A = 4btf, B = 4m82: mean FSC" in text
    curves = found[A, "swapped"]["curves"]
    assert min(min(curve[1:4]) for curve in curves.values()) > 0.5
    assert "inflation over 1.05 times that of map in 0; excess over that of map " in text
    # Half-maps that agree much further than the truth allows.
    found[A, "cwred"] = found[A, "cwred"] | {"half_map_fsc_masked": [1.0] * 13, "truth_fsc": [1.0] * 5 + [0.0] * 8}
    assert re.search(r"of map in 1 \(4m82:i [2-9]\.\d\d\)", results.report(found, "c"))
    assert "Nothing is finished yet" in results.report({}, "c")
    noise_alone = results.report({key: record for key, record in found.items() if key[0] == NOISE}, "c")
    assert "**4ail:noise**" in noise_alone
    assert "| cell |" not in noise_alone


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, []),
        ({"truth_0.5_A": "10.100"}, []),
        ({"truth_0.5_A": "10.300"}, ["truth_0.5_A 10.000, stored 10.300, expected within 2 %"]),
        ({"truth_0.5_A": "-"}, ["truth_0.5_A 10.000, stored -, expected within 2 %"]),
        ({"truth_0.5_A": "inf"}, ["truth_0.5_A 10.000, stored inf, expected within 2 %"]),
        ({"seed": "8"}, ["seed 7, stored 8"]),
        ({"seconds": "8"}, []),
    ],
)
def test_differences_are_told(change, complaint):
    row = dict.fromkeys(results.SAME, "7") | dict.fromkeys(results.TOLERANCE, "10.000") | {"seconds": "7"}
    assert results.differences(row, row | change) == complaint


def test_check_does_a_cell_again(done, refined, tmp_path):
    path = tmp_path / "table.tsv"
    text = results.format_table(results.table_rows(records(done)), "c")
    path.write_text(text)
    refined.clear()
    said = []
    assert results.check(done, A, path, list(RUNS), said.append)
    assert names_of(refined) == ["map", "cwred"]
    assert said[-2:] == ["4m82:i map: agrees", "4m82:i cwred: agrees"]
    value = measure.median_angular_error(done.record(A, "cwred"))
    path.write_text(text.replace(f"{value:.3f}", f"{value * 1.5:.3f}"))
    assert not results.check(done, A, path, ["cwred"], said.append)
    assert "angular_error_deg" in said[-1]
    with pytest.raises(InputError, match="has none of the runs asked for of 4ail:ii"):
        results.check(done, Cell("4ail", "ii"), path, list(RUNS))
    path.write_text("a\tb\n1\t2\n")
    with pytest.raises(InputError, match="no column angpix, expected a table that --table wrote"):
        results.check(done, A, path, list(RUNS))


@pytest.mark.slow
def test_figures_are_drawn_of_what_there_is(done, tmp_path):
    from paper.figures import draw_figures

    drawn = draw_figures(records(done), tmp_path / "figures")
    assert [path.stem for path in drawn] == ["fig1_single_pass", "fig4_fsc", "fig5_angles", "fig6_slices", "invented"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert draw_figures({}, tmp_path / "none") == []


# The command


@pytest.fixture
def run(experiment, monkeypatch):
    command = importlib.import_module("paper.__main__")
    monkeypatch.setitem(command.SCALES, "small", TINY)
    monkeypatch.setattr(command, "check_relion", lambda: None)
    folder, structures = str(experiment.folder), str(experiment.structures)

    def call(*arguments):
        options = ["--folder", folder, "--structures", structures, "--seed", "3", *arguments]
        return CliRunner().invoke(command.paper, options)

    return call


def test_the_command_runs_and_then_reports(run, refined, tmp_path):
    chosen = ["--cells", "4m82:i", "--runs", "map,cwred"]
    assert run(*chosen, "--status").output == "4m82:i\tmap missing, cwred missing\n"
    done = run(*chosen)
    assert done.exit_code == 0, done.output
    assert names_of(refined) == ["map", "cwred"]
    assert run(*chosen, "--status").output == "4m82:i\tmap done, cwred done\n"
    done = run(*chosen, "--table", str(tmp_path / "t.tsv"), "--report")
    assert "| cell | map | cwred |" in done.output
    assert len(results.read_table(tmp_path / "t.tsv")) == 2
    assert len(refined) == 2
    assert run("--check", "4m82:i", *chosen[2:], "--table", str(tmp_path / "t.tsv")).exit_code == 0
    assert len(refined) == 4


def test_the_command_refuses_before_it_begins(run, refined, monkeypatch):
    monkeypatch.setenv("CRYORED_MODEL_PATH", "")
    monkeypatch.setitem(RUNS, "red", plan.Run(model="none-such"))
    done = run("--cells", "4m82:i", "--runs", "map,red")
    assert done.exit_code == 1
    assert "error: no model named 'none-such'" in done.stderr
    assert refined == []
    assert run("--check", "4m82", "--table", "t").exit_code == 2
    assert run("--check", "4m82:i").exit_code == 2
    command = importlib.import_module("paper.__main__")
    for arguments, complaint in ((["--results", "r"], "name a --folder"), (["--report"], "or its --results")):
        done = CliRunner().invoke(command.paper, arguments)
        assert done.exit_code == 2
        assert complaint in done.stderr


@pytest.mark.slow
def test_it_starts_as_the_documentation_says(experiment):
    command = [sys.executable, "benchmarks/paper", "--results", str(experiment.results), "--status"]
    command += ["--structures", str(experiment.structures), "--cells"]
    done = subprocess.run([*command, "4m82:i"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4m82:i\tmap missing, true-angles missing, pass-cwred missing")
    done = subprocess.run([*command, "x"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("benchmarks/paper: error: 'x' is no cell")


# With RELION


@pytest.mark.relion
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="RELION is not on the PATH")
def test_with_relion(experiment):
    """With the resident updater; the cold hook is in test_refinement.py."""
    scale = dataclasses.replace(TINY, box=32, angpix=3.0, number=60, timeout=600.0)
    experiment = dataclasses.replace(experiment, scale=scale, hook="watch")
    assert work.do_all(experiment, [A], ["map", "true-angles", "cwred", "pass-cwred"], 1) == {}
    plain, bound, prior, single = (experiment.record(A, name) for name in ("map", "true-angles", "cwred", "pass-cwred"))
    assert plain["lambda"] is None
    assert prior["lambda"][1] > 0
    for record in (plain, prior):
        assert measure.truth_resolution(record) < 20  # far better than the reference, at 30 A
        assert measure.median_angular_error(record) < 5  # the start angles are off by 4.6 in the median
    assert measure.mean_truth_fsc(bound, plain) > measure.mean_truth_fsc(plain, plain)
    logs = list((experiment.place(A) / "cwred").glob("run_it*_cryored.log"))
    assert {json.loads(log.read_text())["by"] for log in logs} == {"watch"}
    assert len(logs) == 2 * prior["iterations"] - 1  # two halves, and the joined last one
    assert len(single["judgements"]) == plain["iterations"] - 1


@pytest.mark.relion
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="RELION is not on the PATH")
def test_a_cluster_does_what_one_machine_does(experiment, tmp_path, monkeypatch):
    """Two processes do a cell each, and what is done is not done again; a cell that fails does not stop the other."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "benchmarks")]))
    (tmp_path / "elsewhere").mkdir()
    (experiment.structures / "2XZP.pdb").write_text("END\n")
    empty = Cell("4bb9", "i")
    steps = []
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", local_directory=str(tmp_path / "elsewhere")
    ) as cluster:

        def run():
            there = cluster.scheduler_address
            return work.do_on_cluster(experiment, [A, empty, B], ["map"], there, lambda *n: steps.append(n))

        failed = run()
        made = [experiment.path(cell, "map").stat().st_mtime_ns for cell in (A, B)]
        assert run().keys() == failed.keys()
        again = [experiment.path(cell, "map").stat().st_mtime_ns for cell in (A, B)]
    assert failed.keys() == {f"{empty} map"}
    assert steps[-1] == (1, 1)
    assert again == made
    alone = dataclasses.replace(experiment, folder=tmp_path / "alone", results=tmp_path / "alone" / "results")
    assert work.do_all(alone, [A], ["map"], 1) == {}
    assert alone.record(A, "map")["truth_fsc"] == experiment.record(A, "map")["truth_fsc"]
