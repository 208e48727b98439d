"""RELION 5's Blush call, made as RELION makes it: popen of one command line, and an answer on standard output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import ModelError
from cryored.files.mrc import read_volume, write_volume
from cryored.prior import device
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, find_model
from cryored.refinement.mailbox import Inbox, Presence
from cryored.refinement.updater import Settings, Updater
from cryored.refinement.watcher import Server

REPOSITORY = Path(__file__).parents[1]
CASES = REPOSITORY / "tests" / "data" / "relion_requests"
HALF = "run/run_it003_half1_class001"
JOINED = "run/run_it009_class001"
CLASSES = ["run/run_it002_class001", "run/run_it002_class002"]
BODIES = ["run/run_it003_half1_body001", "run/run_it003_half1_body002"]
STAR = f"{HALF}_external_reconstruct.star"

# Stands for cryored beside the hook: notes its arguments and the GPU's number.
NOTE = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done >called
echo "$CRYORED_GPU_NUMBER" >number
echo noise
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Make a project folder the current one that holds the requests of the recorded runs, all of other names."""
    for case in CASES.glob("relion5_*"):
        shutil.copytree(case, tmp_path / "project", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "project")
    for name in [name for name in os.environ if name.startswith(("CRYORED_", "RELION_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    return tmp_path / "project"


def call(star, arguments, folder=REPOSITORY / "share" / "relion5", **environment):
    """Do what RELION 5 does, and return its verdict, standard output and standard error."""
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        f"relion_python_blush {star} {arguments}",
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)} | environment,
    )
    return done.stdout.strip() == "success", done.stdout, done.stderr


@pytest.fixture
def noting(tmp_path):
    """Lay the program out as in a checkout, with a cryored that notes how it was called."""
    for name in ("share/relion5/relion_python_blush", "bin/cryored-external-reconstruct"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "bin" / "cryored").write_text(NOTE)
    (tmp_path / "bin" / "cryored").chmod(0o755)
    return tmp_path / "share" / "relion5"


def read(root, ending=""):
    return read_volume(f"{root}_external_reconstruct{ending}.mrc")


def difference(found, expected):
    """Return the relative L2 difference over all voxels."""
    return np.linalg.norm(found.data - expected.data) / np.linalg.norm(expected.data)


def log(root):
    (line,) = Path(f"{root}_cryored.log").read_text().splitlines()
    return json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize("root", [HALF, JOINED, *CLASSES, *BODIES])
def test_lambda_0_is_relion_5s_own_answer(root):
    good, out, err = call(f"{root}_external_reconstruct.star", "--lambda 0 --gpu -1 ")
    assert good, err
    assert out == "success\n"
    assert difference(read(root), read(root, "_expected_map")) < 1e-6
    # From the request itself, for there is no _model.star.
    assert read(root).voxel_size == (2.0 if root in (HALF, JOINED) else 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("root", CLASSES)
def test_a_class_goes_by_its_own_tau2_and_k(root):
    good, _, err = call(f"{root}_external_reconstruct.star", " --gpu -1 ")
    assert good, err
    record = log(root)
    assert record["fsc"] == "estimated from tau2 and K"
    assert record["nominal_resolution"] == 24.0  # shell 4 of 96 A: the estimate is 0.09 and 0.13 in shell 5
    # The prior has no weight at less than 18 A.
    assert record["lambda"] == 0
    assert difference(read(root), read(root, "_expected_map")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("root", "resolution"), [(BODIES[0], 9.6), (BODIES[1], 10.667)])
def test_a_body_goes_by_its_own_fsc(root, resolution):
    """What stands in for the network is an empty map, which pulls the answer towards it."""
    expected = read(root, "_expected_map")
    write_volume("empty.mrc", expected.with_data(np.zeros_like(expected.data)).with_voxel_size(3.0), label="test")
    good, _, err = call(f"{root}_external_reconstruct.star", "--denoised empty.mrc --gpu -1 ")
    assert good, err
    record = log(root)
    assert (record["fsc"], record["nominal_resolution"]) == ("of the half-maps", resolution)
    assert record["lambda"] == 1  # the calibrated weights, as they are
    assert record["request"] == f"{root}_external_reconstruct.star"
    assert np.linalg.norm(read(root).data) < 0.99 * np.linalg.norm(expected.data)


@pytest.mark.parametrize(
    ("arguments", "words", "number"),
    [
        (" --gpu -1 ", [], ""),
        (" --gpu  ", [], ""),
        (" --gpu 0,1, ", [], "0"),
        (" --gpu 1, ", [], "1"),
        (" --skip-spectral-trailing  --gpu 2,3, ", [], "2"),
        (" --gpu --skip-spectral-trailing", [], ""),
        ("-m v2.1 -s 10 --batch_size 4 --device_timeout=9 --debug --gpu -1 ", [], ""),
        ("--lambda 0.5 --model 'my prior' --gpu 1, ", ["--lambda", "0.5", "--model", "my prior"], "1"),
        ("--model=other -g 0 -m v1.0", ["--model=other"], "0"),
        ("--trust 2 --gpu", ["--trust", "2"], ""),
    ],
)
def test_arguments(noting, arguments, words, number):
    good, out, err = call(STAR, arguments, noting)
    assert good and out == "success\n"
    assert Path("called").read_text().splitlines() == ["red-update", *words, STAR]
    assert Path("number").read_text().strip() == number
    assert "noise" in err
    assert ("without a meaning here" in err) == any(word in arguments for word in ("-m ", "-s ", "--skip"))


def test_the_second_half_takes_the_second_gpu(noting):
    star = STAR.replace("half1", "half2")
    twelve = f"--gpu {','.join(map(str, range(12)))}, "
    for arguments, number in (("--gpu 2,5,7, ", "5"), ("--gpu 2, ", "2"), ("--gpu -1", ""), (twelve, "1")):
        assert call(star, arguments, noting)[0]
        assert Path("number").read_text().strip() == number
    call(star, "--gpu 2,5, ", noting, CRYORED_GPU_NUMBER="9")
    assert Path("number").read_text().strip() == "9"


@pytest.mark.slow
def test_a_failure_is_no_success_and_shows_its_cause():
    Path(f"{HALF}_external_reconstruct_weight.mrc").unlink()
    good, out, err = call(STAR, "--gpu -1 ")
    assert not good
    assert f"status 1 for {STAR}" in out
    assert "_weight.mrc: missing, expected beside" in err
    good, out, _ = call("", "--gpu -1 ")
    assert not good
    assert "the first argument is '--gpu', expected RELION's request" in out


def test_without_arguments_as_relions_build_calls_it():
    done = subprocess.run([REPOSITORY / "share" / "relion5" / "relion_python_blush"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == ""


def test_the_watcher_answers():
    """With the arguments that RELION always gives: only a user's own options go round the watcher."""
    with Presence("run", ["--lambda", "0"]) as presence:
        inbox = Inbox("run", presence.token)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(call(STAR, " --gpu 0,1, ")))
        thread.start()
        order = None
        while order is None and thread.is_alive():
            order = next(iter(inbox.waiting()), None)
        order.accept()
        order.done()
        thread.join()
    assert answers[0][0], answers[0][2]
    assert not Path(f"{HALF}_external_reconstruct.mrc").exists()  # nobody else did it


def test_the_watcher_shows_classes_and_bodies():
    shown = []
    updater = Updater(Settings(lam=0.0), Denoiser(find_model(DEFAULT_MODEL), gpu=False))
    server = Server(Path("run"), updater, show=lambda entry, *rest: shown.append(entry))
    roots = [*CLASSES, *BODIES]
    server.serve([mock.Mock(star=f"{root}_external_reconstruct.star", folder=Path.cwd()) for root in roots])
    assert [entry.error for entry in shown] == [""] * 4
    assert [entry.label for entry in shown] == ["class 1", "class 2", "half 1 body 1", "half 1 body 2"]


def test_relion_path():
    done = CliRunner().invoke(cli, ["relion-path"])
    assert done.exit_code == 0
    assert os.access(Path(done.output.strip()) / "relion_python_blush", os.X_OK)


# The number of the GPU


def torch_with(monkeypatch, count):
    chosen = []
    cuda = SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        set_device=chosen.append,
        get_device_name=lambda: f"card {chosen[-1]}",
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("KERAS_TORCH_DEVICE", "")


@pytest.mark.parametrize(("number", "name"), [("", "card 0"), ("1", "card 1")])
def test_the_gpu_of_that_number(monkeypatch, number, name):
    torch_with(monkeypatch, 2)
    monkeypatch.setenv(device.NUMBER, number)
    assert device.set_up() == f"torch, GPU {name}"


@pytest.mark.parametrize("number", ["2", "-1", "first"])
def test_a_gpu_that_there_is_not(monkeypatch, number):
    torch_with(monkeypatch, 2)
    monkeypatch.setenv(device.NUMBER, number)
    with pytest.raises(ModelError, match=f"CRYORED_GPU_NUMBER is '{number}', expected 0 to 1: 2 GPUs are visible"):
        device.set_up()


def test_without_a_gpu_the_number_says_nothing(monkeypatch):
    torch_with(monkeypatch, 0)
    monkeypatch.setenv(device.NUMBER, "1")
    assert device.set_up() == "torch, CPU"


@pytest.mark.parametrize(("backend", "engine"), [("jax", "JAX"), ("torch", "PyTorch")])
def test_an_engine_that_is_not_installed_is_one_line(monkeypatch, backend, engine):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    monkeypatch.setitem(sys.modules, backend, None)
    told = f"KERAS_BACKEND is '{backend}', but {engine} cannot be loaded .*; pip install {backend}, or unset "
    with pytest.raises(ModelError, match=told):
        device.set_up()
