"""The report of a run from its logs, and what a watcher makes of one that is there."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import OutputError
from cryored.files.mrc import read_volume
from cryored.files.requests import read_request_file
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import find_model
from cryored.prior.weights import ShellWeights
from cryored.reconstruction.sums import load_sums
from cryored.refinement.mailbox import Presence
from cryored.refinement.red_update import AS_ASKED
from cryored.refinement.report import Report
from cryored.refinement.run_logs import read_logs
from cryored.refinement.updater import Settings, Updater
from cryored.refinement.watch_table import Entry, Table
from cryored.refinement.watcher import RunEnd, WatchOptions, _shown, watch_folder

CASE = Path(__file__).parent / "data" / "relion_requests" / "box32_pad2"
STARS = [f"run/run_it004_half{half}_class001_external_reconstruct.star" for half in (1, 2)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Make a run in which three requests were answered with lambda 0, the current folder."""
    shutil.copytree(CASE, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    for star in (*STARS, "run/run_it010_class001_external_reconstruct.star"):
        assert CliRunner().invoke(cli, ["red-update", star, "--lambda", "0"]).exit_code == 0
    return Path("run")


def report(*arguments):
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


def test_a_finished_run_has_a_report(run):
    done = report(run)
    assert done.exit_code == 0, done.output
    assert "run/cryored_report.html: 3 answers" in done.stderr
    text = (run / "cryored_report.html").read_text()
    rows = re.findall(r"<tr><td>(run_\w+)</td><td>([\d.]+)</td><td>([\d.]+)</td>", text)
    names = [Path(star).name.removesuffix("_external_reconstruct.star") for star in STARS]
    assert rows == [(name, "9.60", "0.000") for name in names] + [("run_it010_class001", "9.60", "0.000")]
    assert 'aria-label="half-map FSC"' in text
    assert text.count('alt="result, iteration 10, joined"') == 2  # large, and in the strip
    assert "http-equiv" not in text
    # Made anew without being asked; another file is not touched.
    assert report(run).exit_code == 0
    Path("notes.html").write_text("mine")
    done = report(run, "-o", "notes.html")
    assert done.exit_code == 1
    assert Path("notes.html").read_text() == "mine"
    assert report(run, "-o", "notes.html", "--overwrite").exit_code == 0


def test_an_answer_without_a_prior_leaves_no_map_of_an_earlier_one_with_it(run):
    last, half = (run / f"{root}_denoised.mrc" for root in ("run_it010_class001", "run_it004_half1_class001"))
    for path in (last, half):
        path.touch()  # the half's somebody has made by hand
    for star in (STARS[0], "run/run_it010_class001_external_reconstruct.star"):
        assert CliRunner().invoke(cli, ["red-update", star, "--lambda", "0"]).exit_code == 0
    assert half.exists() and not last.exists()


def test_without_maps_and_requests_the_logs_are_enough(run):
    for path in run.glob("*_external_reconstruct*"):
        path.unlink()
    with (run / "run_it004_half1_class001_cryored.log").open("a") as log:
        log.write('{"time": "cut sho')
    done = report(run)
    assert done.exit_code == 0
    assert "run_it004_half1_class001_cryored.log, line 2: no record of an answer" in done.stderr
    assert "run_it010_class001" in (run / "cryored_report.html").read_text()


def test_a_damaged_map_costs_its_picture(run):
    damaged = run / "run_it010_class001_external_reconstruct.mrc"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    done = report(run)
    assert done.exit_code == 0, done.stderr
    assert "run_it010_class001_external_reconstruct.mrc: " in done.stderr and "no picture of it" in done.stderr
    text = (run / "cryored_report.html").read_text()
    assert "run_it010_class001" in text and 'alt="result, iteration 4, half 1"' in text
    assert 'alt="result, iteration 10, joined"' not in text


@pytest.mark.parametrize("line", ["5", "[1, 2]", "null", '{"fsc": null}', '{"time": "now", "weights": {}}'])
def test_a_line_that_is_no_record_is_left_out(run, line):
    with (run / "run_it004_half1_class001_cryored.log").open("a") as log:
        log.write(line + "\n")
    done = report(run)
    assert done.exit_code == 0, done.stderr
    assert "run_it004_half1_class001_cryored.log, line 2: no record of an answer" in done.stderr
    assert "3 answers" in done.stderr


def test_what_is_not_finite_or_not_known_makes_a_page(run):
    path = run / "run_it004_half1_class001_cryored.log"
    record = json.loads(path.read_text()) | {"lambda": 1.0, "change": math.nan, "power_ratio": math.inf}
    record["weights"] |= {"precision": [1.0, math.inf, math.nan], "gain": [0.0, math.inf, 1.0]}
    path.write_text(json.dumps(record) + "\n" + json.dumps(record | {"pixel_size": 0.0}) + "\n")
    done = report(run)
    assert done.exit_code == 0, done.stderr
    text = (run / "cryored_report.html").read_text()
    assert text.count("<td>inf</td>") == 2
    drawn = re.findall(r'points="([^"]*)"', text)
    assert drawn and not re.search("nan|inf", " ".join(drawn))


def test_no_run_of_ours(tmp_path):
    done = report(tmp_path)
    assert done.exit_code == 1
    assert "no ..._cryored.log, expected the folder of a run in which cryored answered RELION" in done.stderr
    assert not list(tmp_path.iterdir())


def test_weights_are_drawn_for_the_latest_iteration(tmp_path):
    page = Report(tmp_path / "r.html", "job", {}, live=True)
    frequency = np.arange(20) / 60
    for iteration, top in ((1, 50.0), (2, 700.0)):
        weights = ShellWeights(np.linspace(top, 1, 12), np.linspace(0.9, 1.4, 12))
        entry = Entry(f"run_it{iteration:03d}_half1_class001", iteration, 1, 8.0, 1.0, {}, 0.1, "CPU", power_ratio=1.25)
        page.add(entry, frequency, np.linspace(1, 0, 20), None, weights)
    page.write()
    text = (tmp_path / "r.html").read_text()
    charts = re.findall(r'aria-label="(precision, τ²/v|gain, g)"', text)
    assert charts == ["precision, τ²/v", "gain, g"]
    assert ">1000</text>" in text and "<h3>iteration 2</h3>" in text
    assert "<td>1.250</td>" in text
    assert 'http-equiv="refresh"' in text
    page.close("ended (run_data.star)")
    text = (tmp_path / "r.html").read_text()
    assert 'http-equiv="refresh"' not in text and "ended (run_data.star)" in text


def watching(run, stop, **options):
    updater = Updater(Settings(lam=0.0), Denoiser(find_model("cwred"), gpu=False))
    thread = threading.Thread(
        target=watch_folder, args=(str(run), updater, AS_ASKED, WatchOptions(**options)), kwargs={"stop": stop.is_set}
    )
    thread.start()
    return thread


def change(log, **changes):
    record = json.loads(log.read_text()) | changes
    log.write_text(json.dumps(record) + "\n")


def test_the_options_are_told_and_where_they_change(run):
    logs = sorted(run.glob("*_cryored.log"))
    for log in logs:
        change(log, schedule="/models/card.json", prior_limit=8.0 if "it010" in log.name else None)
    change(logs[0], prior_limit=None)
    assert report(run).exit_code == 0
    text = (run / "cryored_report.html").read_text()
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["Lambda"] == "auto, schedule in /models/card.json"
    assert facts["Prior limit"] == "none; from iteration 10 on: 8 Å"
    told = [facts[name] for name in ("Last iteration", "Extrapolate", "Weights")]
    assert told == ["plain MAP", "no", "eq. 17"]
    assert "Trust" not in facts  # eq. 17 has none
    change(logs[0], schedule=None)
    assert report(run).exit_code == 0
    assert "<dd>0; from iteration 4 on: auto, schedule in" in (run / "cryored_report.html").read_text()


def test_the_report_tells_which_map_is_plain(run):
    star = "run/run_it010_class001_external_reconstruct.star"
    shutil.copy(Path(star).with_suffix(".mrc"), "denoised.mrc")
    done = CliRunner().invoke(cli, ["red-update", star, "--lambda", "1", "--denoised", "denoised.mrc"])
    assert done.exit_code == 0, done.stderr
    assert (
        "run/run_it010_class001_external_reconstruct.mrc: plain MAP (last iteration), with the prior: "
        "run/run_it010_class001_denoised.mrc, lambda 1.000 at 9.60 A, eq. 17" in done.stderr
    )
    assert report(run).exit_code == 0
    text = (run / "cryored_report.html").read_text()
    assert "<td>run_it010_class001*</td>" in text
    assert "plain MAP (last iteration), with the prior: run_it010_class001_denoised.mrc, which" in text


def test_the_watchers_pictures_are_those_of_the_files(run):
    star = "run/run_it010_class001_external_reconstruct.star"
    request = read_request_file(star)
    updater = Updater(Settings(lam=1.0), Denoiser(find_model("cwred"), gpu=False))
    maps = updater.begin(request, load_sums(request), denoised=read_volume(Path(star).with_suffix(".mrc")))
    answer = updater.finish(maps)
    taken = {}

    class Page:
        def add(self, entry, frequency, fsc, sections, weights):
            taken.update(sections)

    entry = Entry("run_it010_class001", 10, None, 9.6, 1.0, {}, 0.1, "CPU", beside="run_it010_class001_denoised.mrc")
    _shown(updater, Table(), Page())(entry, maps, answer)
    middle = request.ori // 2
    np.testing.assert_array_equal(taken["result"], maps.regularised.data[middle])
    np.testing.assert_array_equal(taken["denoised"], answer.result.data[middle])


def test_a_watcher_says_first_that_the_run_has_ended(run, caplog):
    (run / "RELION_JOB_EXIT_SUCCESS").touch()
    stop = threading.Event()
    stop.set()
    with caplog.at_level("INFO", logger="cryored"):
        watching(run, stop).join(30)
    assert caplog.messages[0] == (
        "run: this run has ended (RELION_JOB_EXIT_SUCCESS); waiting for a new one, or for --continue"
    )


@pytest.mark.parametrize("fault", ["missing", "taken"])
def test_no_model_is_loaded_for_a_folder_that_cannot_be_served(run, fault, monkeypatch):
    monkeypatch.setattr(Denoiser, "load", lambda self: pytest.fail("loaded"))
    updater = Updater(Settings(), Denoiser(find_model("cwred"), gpu=False))
    served = Presence(run, []) if fault == "taken" else nullcontext()
    folder, told = ("run", "serves this folder") if fault == "taken" else ("none", "none: no such folder")
    with served, pytest.raises(OutputError, match=told):
        watch_folder(folder, updater, AS_ASKED, WatchOptions(), stop=lambda: True)


def test_a_watcher_continues_the_report(run):
    stop = threading.Event()
    stop.set()  # no request comes
    report(run, "-o", "page.html")
    for _ in range(2):
        watching(run, stop, report="page.html").join(30)
        assert Path("page.html").read_text().count("<td>run_it") == 3


def test_until_done(run, monkeypatch):
    monkeypatch.setattr("cryored.refinement.watcher._END_EVERY", 0.02)
    (run / "run_data.star").touch()
    (run / "run_half1_class001_unfil.mrc").touch()  # of an earlier run: --continue goes on from it
    stop = threading.Event()
    thread = watching(run, stop, until_done=True, report="page.html")
    time.sleep(0.3)
    assert thread.is_alive()
    (run / "RELION_JOB_EXIT_SUCCESS").touch()
    thread.join(30)
    assert not thread.is_alive() and not stop.is_set()
    assert "ended (RELION_JOB_EXIT_SUCCESS)" in Path("page.html").read_text()


def test_the_end_of_an_earlier_run_is_none(run, monkeypatch):
    monkeypatch.setattr("cryored.refinement.watcher._END_EVERY", 0.0)
    (run / "RELION_JOB_EXIT_FAILURE").touch()
    (run / "run_half1_class001_unfil.mrc").touch()
    end = RunEnd(run)
    assert not end.has_come()
    (run / "RELION_JOB_EXIT_FAILURE").unlink()
    assert not end.has_come()
    (run / "RELION_JOB_EXIT_SUCCESS").touch()
    assert end.has_come()


def test_an_end_is_told_once(run, monkeypatch):
    """--continue leaves what the first end has left there, until it ends itself."""
    monkeypatch.setattr("cryored.refinement.watcher._END_EVERY", 0.0)
    (run / "run_half1_class001_unfil.mrc").touch()
    end = RunEnd(run)
    for name in ("run_class001.mrc", "run_data.star"):
        (run / name).touch()
    assert [end.has_come() for _ in range(3)] == [True, False, False]
    (run / "run_data.star").write_text("of the second end")
    assert [end.has_come() for _ in range(2)] == [True, False]


def test_logs_are_in_the_order_of_their_answers(run):
    star = STARS[0]
    log = run / "run_it004_half1_class001_cryored.log"
    record = json.loads(log.read_text())
    log.write_text(log.read_text() + json.dumps(record | {"time": "2099-01-01T00:00:00+00:00", "request": star}) + "\n")
    assert [one.record["time"] for one in read_logs(run)][-1].startswith("2099")
