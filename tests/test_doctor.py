"""The doctor finds faults that are made on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.cli.watch import _hook_options, watch
from cryored.prior.models import find_model
from cryored.refinement import doctor
from cryored.refinement.doctor import VARIABLE, Setup
from cryored.refinement.mailbox import PRESENCE, Presence

REPOSITORY = Path(__file__).parents[1]
HOOK = REPOSITORY / "bin" / "cryored-external-reconstruct"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Make a folder with a run the current one, with a hook that works, and a cryored of this checkout for it."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    shutil.copy(HOOK, programs)
    (programs / "cryored").write_text(
        f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m cryored "$@" --lambda 0\n'
    )
    (programs / "cryored").chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(programs / HOOK.name))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    return programs


def ask(question, **setup):
    return list(question(Setup(**setup)))


def only(question, **setup):
    (finding,) = ask(question, **setup)
    return finding


@pytest.mark.slow
def test_all_is_well(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    done = CliRunner().invoke(cli, ["doctor", "run", "--box", "64", "--cpu", "--json"])
    assert done.exit_code == 0, done.output
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert {"model", "device", "memory", "RELION", "hook", "folder", "watcher", "numba", "MPI"} <= set(found)
    assert found["hook"]["state"] == found["device"]["state"] == "ok"
    assert "is answered in" in found["hook"]["text"]
    assert not [path for path in Path("run").iterdir()]


def test_an_error_is_the_exit_status_and_has_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "QUESTIONS", (doctor.hook,))
    monkeypatch.delenv(VARIABLE)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1
    assert done.stdout.startswith("error   hook")
    assert f"-> export {VARIABLE}=" in done.stdout


# Ten faults


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("/nowhere/cryored-external-reconstruct", "is not there"),
        ("'", "no command"),
        ("false", "status 1, no word"),
        ("true", "status 0, no word"),
    ],
)
def test_a_wrong_variable(monkeypatch, value, told):
    monkeypatch.setenv(VARIABLE, value)
    finding = only(doctor.hook)
    assert finding.state == "error"
    assert told in finding.text and finding.remedy


def test_a_missing_model(monkeypatch):
    finding = only(doctor.model, model="none")
    assert (finding.state, finding.remedy) == ("error", "see `cryored models`")


def test_damaged_weights(tmp_path):
    shutil.copytree(find_model("cwred").folder, tmp_path / "mine")
    (tmp_path / "mine" / "model.keras").write_bytes(b"x")
    finding = only(doctor.model, model="./mine")
    assert finding.state == "error"
    assert "the file is damaged" in finding.text


def test_a_full_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 2**30))
    finding = only(doctor.folder, folder=Path("run"), box=256)
    assert finding.state == "error"
    assert "1.0 GiB are free, an iteration of box 256 leaves 1.5 GiB" in finding.text


def test_a_read_only_folder(monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cryored.refinement.doctor.tempfile.TemporaryFile", refuse)
    finding = only(doctor.folder, folder=Path("run"))
    assert (finding.state, finding.text) == ("error", "run: cannot be written to: Permission denied")
    assert only(doctor.folder, folder=Path("none")).text == "none: no such folder"


def test_no_gpu_where_one_is_asked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    finding = only(doctor.compute, gpu=True)
    assert finding.state == "error"
    assert "no GPU is visible" in finding.text


def test_an_old_watchers_file():
    Path("run", PRESENCE).write_text("cryored-watch 0\nstate serving\n")
    finding = only(doctor.watcher, folder=Path("run"))
    assert (finding.state, finding.remedy) == ("error", f"remove run/{PRESENCE}")


def test_a_watcher_that_died_and_one_that_serves():
    with Presence("run", []):
        assert only(doctor.watcher, folder=Path("run")).text == "serves run"
    assert "has ended" in only(doctor.watcher, folder=Path("run")).text
    path = Path("run", PRESENCE)
    dead = path.read_text().replace("state ended  ", "state serving").replace(f"pid {os.getpid()}", "pid 999999999")
    path.write_text(dead)
    finding = only(doctor.watcher, folder=Path("run"))
    assert (finding.state, finding.remedy) == ("warning", "start one: cryored watch run")


def test_options_in_the_environment_are_told(monkeypatch):
    for name in doctor._COUNTING:
        assert f" {name}" in HOOK.read_text().split("for name in", 1)[1].split("; do", 1)[0].replace(";", " ")
    monkeypatch.setenv("CRYORED_RED_UPDATE_TRUST", "0.5")
    monkeypatch.setenv("CRYORED_RED_UPDATE_THREADS", "1")
    with Presence("run", ()):
        finding = only(doctor.watcher, folder=Path("run"))
    assert (finding.state, finding.remedy.split(",")[0]) == ("warning", "unset CRYORED_RED_UPDATE_TRUST")


def test_what_a_watcher_left_is_told():
    def left(*words):
        given = watch.make_context("watch", ["run", *words])
        with given, Presence("run", _hook_options(given)):
            pass
        return only(doctor.watcher, folder=Path("run"))

    assert left().state == "ok"
    finding = left("--clean", "--trust", "0.5")
    assert finding.state == "warning"
    assert "has ended; the hook goes on by itself with its options: --model cwred" in finding.text
    assert "--trust 0.5" in finding.text and finding.text.endswith("--clean")
    assert finding.remedy.endswith(f"to go on without these: rm run/{PRESENCE}")


@pytest.mark.parametrize(
    ("answer", "state", "told"),
    [
        ("RELION version: 5.0.1", "ok", "version 5.0"),
        ("RELION version: 3.0.8", "error", "version 3.0"),
        ("hello", "error", "does not tell its version: hello"),
    ],
)
def test_a_wrong_relion(project, answer, state, told):
    (project / "relion_refine_mpi").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (project / "relion_refine_mpi").chmod(0o755)
    finding = only(doctor.relion)
    assert finding.state == state
    assert told in finding.text


def test_a_relion_that_hangs(project, monkeypatch):
    def hang(*command, **options):
        raise subprocess.TimeoutExpired("relion_refine_mpi", options["timeout"])

    (project / "relion_refine_mpi").touch(0o755)
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    finding = only(doctor.relion)
    assert finding.state == "error"
    assert "--version: no answer in 60 s" in finding.text


def test_an_engine_that_cannot_compute(monkeypatch):
    """As one whose driver is too old: each engine has its own error for that."""
    import keras

    class DriverError(Exception):
        pass

    def fail(*tensors, **options):
        raise DriverError("no kernel image\nis available")

    monkeypatch.setattr(keras.ops, "conv", fail)
    finding = only(doctor.compute, gpu=False)
    assert finding.state == "error"
    assert finding.text.endswith("a convolution failed: DriverError: no kernel image is available")


def test_a_question_that_fails_is_an_answer(monkeypatch):
    def broken(setup):
        yield 1 / 0

    monkeypatch.setattr(doctor, "QUESTIONS", (broken, doctor.model))
    first, second = doctor.examine(Setup())
    assert (first.subject, first.state, first.text) == ("broken", "error", "ZeroDivisionError: division by zero")
    assert second.state == "ok"


@pytest.mark.parametrize("where", ["command", "environment"])
def test_a_hook_that_the_second_request_would_stop_at(project, monkeypatch, where):
    if where == "command":
        monkeypatch.setenv(VARIABLE, f"{project / HOOK.name} --unregularised raw.mrc")
    else:
        monkeypatch.setenv("CRYORED_RED_UPDATE_UNREGULARISED", "raw.mrc")
    finding = only(doctor.hook)
    assert finding.state == "error"
    assert "--unregularised without {root} in the name: one file for all requests" in finding.text
    assert not Path("raw.mrc").exists()
    monkeypatch.setenv(VARIABLE, f"{project / HOOK.name} --unregularised raw.mrc --overwrite")
    assert "one file for all requests" not in only(doctor.hook).text


@pytest.mark.parametrize(
    ("hook", "variable", "words", "expected"),
    [
        ("hook", "", [], "cwred"),
        ("hook --model cwred-paper", "", [], "cwred-paper"),
        ("hook --model=cwred-paper", "cwred-gaussian", [], "cwred-paper"),
        ("hook", "cwred-gaussian", [], "cwred-gaussian"),
        ("hook --model cwred-paper", "", ["--model", "cwred"], "cwred"),
    ],
)
def test_the_model_is_that_of_the_hook(monkeypatch, hook, variable, words, expected):
    monkeypatch.setattr(doctor, "QUESTIONS", (doctor.model,))
    monkeypatch.setenv(VARIABLE, hook)
    monkeypatch.setenv("CRYORED_RED_UPDATE_MODEL", variable)
    done = CliRunner().invoke(cli, ["doctor", *words])
    assert done.exit_code == 0
    assert f"model       {expected} (" in done.stdout
    assert CliRunner().invoke(cli, ["doctor", "-q", *words]).stdout == ""  # only errors


def test_a_hook_whose_path_reads_like_the_placeholder(project, monkeypatch):
    folder = project / "STARLING"
    folder.mkdir()
    for name in (HOOK.name, "cryored"):
        (project / name).rename(folder / name)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(VARIABLE, str(folder / HOOK.name))
    finding = only(doctor.hook)
    assert finding.state == "ok", finding
    assert f"{folder / HOOK.name} STAR: a request of 16 voxels cubed is answered" in finding.text


def test_no_permission_to_execute(project):
    (project / HOOK.name).chmod(0o644)
    finding = only(doctor.hook)
    assert finding.state == "error"
    assert "may not be executed" in finding.text
    assert finding.remedy.startswith("chmod +x ")


def test_a_folder_that_other_nodes_do_not_see(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setattr(doctor, "_file_system", lambda place: "tmpfs")
    finding = ask(doctor.folder, folder=Path("run"), box=16)[-1]
    assert finding.state == "error"
    assert "run lies on a tmpfs of this machine, and the job has several nodes" in finding.text


# Others


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: 4 << 30)
    assert only(doctor.memory, box=96).state == "ok"
    finding = only(doctor.memory, box=512)
    assert finding.state == "error"
    assert "GiB for both halves of box 512 at padding 2, 4.0 GiB are free" in finding.text
    assert only(doctor.memory).remedy == "give --box"
    finding = only(doctor.memory, box=320)
    assert (finding.state, finding.remedy.split(",")[0]) == ("warning", "the halves will be answered one by one")


def test_memory_is_that_of_the_runs_pixel_size(monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: 6 << 30)
    finding = only(doctor.memory, folder=Path("run"), box=256)
    assert (finding.state, finding.remedy.split(",")[0]) == ("warning", "the halves will be answered one by one")
    assert finding.text.endswith("; at 1.5 A, the model's: the run's pixel size is not known")
    Path("run/run_it001_optimiser.star").write_text("data_optimiser_general\n_rlnDoSplitRandomHalves 1\n")
    Path("run/run_it001_half1_model.star").write_text("data_model_general\n_rlnPixelSize 0.8\n")
    finding = only(doctor.memory, folder=Path("run"), box=256)
    assert (finding.state, finding.text[-10:]) == ("ok", "; at 0.8 A")
    # What is compared is what is told: RELION's arrays too.
    monkeypatch.setattr(doctor, "free_memory", lambda: 3 << 30)
    finding = only(doctor.memory, folder=Path("run"), box=256)
    assert finding.state == "warning" and finding.remedy.startswith("RELION's arrays will be read from the disk")


@pytest.mark.slow
def test_the_blush_call(project, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    theirs = project / "relion_python_blush"
    theirs.write_text("#!/bin/sh\necho success\n")
    theirs.chmod(0o755)
    first, second = ask(doctor.hook)
    assert (first.state, second.state) == ("error", "ok")
    assert "RELION's own: --blush runs Blush" in second.text
    monkeypatch.setenv("PATH", f"{REPOSITORY / 'share' / 'relion5'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RELION_BLUSH_ARGS", "")
    monkeypatch.setenv("CRYORED_RED_UPDATE_LAMBDA", "0")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    finding = only(doctor.hook)
    assert (finding.subject, finding.state) == ("Blush call", "ok"), finding
    assert "relion_python_blush STAR --gpu -1 : a request of 16 voxels cubed is answered" in finding.text


def test_another_program_is_told(monkeypatch, project):
    other = project / "other"
    other.write_text("#!/bin/sh\ncp ${1%.star}_weight.mrc ${1%.star}.mrc\n")
    other.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(other))
    finding = only(doctor.hook)
    assert finding.state == "warning"
    assert "by another program than cryored" in finding.text
