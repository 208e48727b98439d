"""A refinement outlives its watcher: real processes, killed, late, twice, on full and lost disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cryored.files.mrc import read_volume

REPOSITORY = Path(__file__).parents[1]
HOOK = REPOSITORY / "bin" / "cryored-external-reconstruct"
REQUESTS = Path(__file__).parent / "data" / "relion_requests"
HALVES = [f"run/run_it004_half{half}_class001" for half in (1, 2)]
PRESENCE = Path("run/cryored_watch.txt")

# The command line with a pause before each result, so that there is a middle of a request to kill it in.
SLOW = """
import sys, time
from cryored.refinement import red_update
write = red_update.Outputs.write
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(3)
    return write(*arguments)
red_update.Outputs.write = slow
from cryored.cli import main
main()
"""

# A watcher that waits, 40 times over: SIGTERM comes at its first call of a Python function, its second, ...
EACH_CALL = """
import signal, sys
from cryored.cli.watch import _ending
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import find_model
from cryored.refinement.mailbox import Inbox
from cryored.refinement.red_update import AS_ASKED
from cryored.refinement.updater import Settings, Updater
from cryored.refinement.watcher import WatchOptions, watch_folder

updater = Updater(Settings(lam=0.0), Denoiser(find_model("cwred"), gpu=False))
for last in range(40):
    calls = None
    def count(frame, event, argument):
        global calls
        if event == "call" and (calls is not None or frame.f_code is Inbox.waiting.__code__):
            calls = (calls or 0) + 1
            if calls > last:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGTERM)
    with _ending() as stop:
        sys.setprofile(count)
        watch_folder("run", updater, AS_ASKED, WatchOptions(), stop=stop)
    print("ended")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of a recorded case, the current folder, and a ``cryored`` on the PATH that the hook takes."""
    folder = tmp_path / "project"
    shutil.copytree(REQUESTS / "box32_pad2", folder)
    programs = tmp_path / "bin"
    programs.mkdir()
    shutil.copy(HOOK, programs)
    launcher = programs / "cryored"
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m cryored "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def watch(project):
    """Start a watcher of run/ that is ended, whatever becomes of the test."""
    started = []

    def start(*options, program=("-m", "cryored"), wait=True):
        log = open(f"watch{len(started)}.log", "w+")
        command = [sys.executable, *program, "watch", "run", "--lambda", "0", *options]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        process.log = log
        started.append(process)
        if wait:
            until(lambda: presence().get("pid") == str(process.pid) or process.poll() is not None)
            assert process.poll() is None, said(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.log.close()


def presence():
    lines = PRESENCE.read_text().splitlines() if PRESENCE.exists() else []
    return dict(line.partition(" ")[::2] for line in lines)


def said(process):
    return Path(process.log.name).read_text()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not come true in {seconds:g} s"
        time.sleep(0.02)


def hook(root):
    return subprocess.Popen(
        ["cryored-external-reconstruct", f"{root}_external_reconstruct.star"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, seconds=20.0):
    """Return exit status and standard error of a hook."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def result(root):
    return Path(f"{root}_external_reconstruct.mrc")


def check(root, updaters):
    """The map is RELION's (lambda 0), the log says whose it is, and no hand-over file stays."""
    found = read_volume(result(root)).data
    expected = read_volume(f"{root}_external_reconstruct_expected_map.mrc").data
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)  # float32 arithmetic
    records = [json.loads(line) for line in Path(f"{root}_cryored.log").read_text().splitlines()]
    assert [record["by"] for record in records] == updaters
    assert not list(Path("run").glob("*.request")) + list(Path("run").glob(".*"))


@pytest.mark.slow
def test_both_halves_are_served_and_the_watcher_ends_cleanly(watch):
    watcher = watch()
    hooks = [hook(root) for root in HALVES]
    assert [ended(one) for one in hooks] == [(0, ""), (0, "")]
    for root in HALVES:
        check(root, ["watch"])
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(10) == 0
    assert presence()["state"].strip() == "ended"
    assert said(watcher).count("run_it004_half1_class001: ") == 1  # a line a request
    status, errors = ended(hook(HALVES[0]))
    assert status == 0
    assert "has ended; going on by itself with its options: --model cwred --lambda 0.0" in errors
    check(HALVES[0], ["watch", "red-update"])


@pytest.mark.slow
def test_under_nohup_it_outlives_the_terminal(watch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what a child inherits of nohup
    try:
        process = watch()
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    call = hook(HALVES[0])
    assert ended(call) == (0, "")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.slow
def test_killed_before_a_request(watch):
    watcher = watch()
    watcher.kill()
    watcher.wait()
    status, errors = ended(hook(HALVES[0]), 10)
    assert status == 0
    assert f"(pid {watcher.pid}) has died; going on by itself" in errors
    check(HALVES[0], ["red-update"])


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_killed_during_a_request(watch, stopped):
    """Killed, or stopped so that only its beat tells: the hook does it itself, and a result of both is one result."""
    watcher = watch(program=("-c", SLOW))
    waiting = hook(HALVES[0])
    until(lambda: "writing" in said(watcher))
    assert not result(HALVES[0]).exists()
    watcher.send_signal(signal.SIGSTOP if stopped else signal.SIGKILL)
    if not stopped:
        watcher.wait()  # a process that nobody has waited for still answers to its number
    begin = time.monotonic()
    until(lambda: not Path(f"{HALVES[0]}_cryored.request").exists(), 6)
    assert time.monotonic() - begin < 5.5  # noticed within 5 s, and a look each second
    status, errors = ended(waiting)
    assert status == 0
    assert ("gives no sign of life" if stopped else "has died") in errors
    check(HALVES[0], ["red-update"])


@pytest.mark.slow
def test_killed_after_a_request(watch):
    watcher = watch()
    assert ended(hook(HALVES[0])) == (0, "")
    watcher.kill()
    watcher.wait()
    check(HALVES[0], ["watch"])
    assert ended(hook(HALVES[1]))[0] == 0
    check(HALVES[1], ["red-update"])


@pytest.mark.slow
def test_started_late(watch, monkeypatch):
    monkeypatch.setenv("CRYORED_RED_UPDATE_LAMBDA", "0")
    assert ended(hook(HALVES[0]))[0] == 0
    check(HALVES[0], ["red-update"])
    monkeypatch.delenv("CRYORED_RED_UPDATE_LAMBDA")  # else it counts, and no watcher is asked
    watch()
    assert ended(hook(HALVES[1])) == (0, "")
    check(HALVES[1], ["watch"])


@pytest.mark.slow
def test_of_two_watchers_the_second_refuses(watch):
    first = watch()
    second = watch(wait=False)
    assert second.wait(20) == 1
    assert f"(pid {first.pid}) serves this folder" in said(second)
    assert said(second).count("\n") == 1
    assert ended(hook(HALVES[0])) == (0, "")
    check(HALVES[0], ["watch"])


@pytest.mark.slow
def test_a_dead_watchers_place_is_taken_and_its_hand_overs_are_swept(watch):
    first = watch()
    first.send_signal(signal.SIGSTOP)
    stale = Path("run/run_it001_half1_class001_cryored.request")
    token = presence()["token"]
    stale.write_text(f"cryored-request 1\nwatcher {token}\ncwd {os.getcwd()}\nstar nowhere.star\nid old\n")
    first.kill()
    first.wait()
    watch()
    until(lambda: not stale.exists())
    assert ended(hook(HALVES[0])) == (0, "")
    check(HALVES[0], ["watch"])


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1])
def test_the_clock_of_another_host_does_not_matter(watch, hours):
    then = time.time() + 3600 * hours
    for path in Path("run").iterdir():
        os.utime(path, (then, then))
    os.utime("run", (then, then))
    watch()
    os.utime(PRESENCE, (then, then))
    waiting = [hook(root) for root in HALVES]
    assert [ended(one) for one in waiting] == [(0, ""), (0, "")]
    for root in HALVES:
        check(root, ["watch"])


@pytest.mark.slow
def test_a_request_that_continue_writes_anew(watch):
    watch()
    assert ended(hook(HALVES[0])) == (0, "")
    request = Path(f"{HALVES[0]}_external_reconstruct.star")
    # Another request under the same name: that of the other half.
    for ending in ("", "_data_real", "_data_imag", "_weight"):
        suffix = ".star" if not ending else ".mrc"
        shutil.copy(
            f"{HALVES[1]}_external_reconstruct{ending}{suffix}", f"{HALVES[0]}_external_reconstruct{ending}{suffix}"
        )
    request.write_text(request.read_text().replace("half2", "half1"))
    assert ended(hook(HALVES[0])) == (0, "")
    found = read_volume(result(HALVES[0])).data
    expected = read_volume(f"{HALVES[1]}_external_reconstruct_expected_map.mrc").data
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.slow
def test_one_half_fails_and_the_other_stays(watch):
    watch()
    Path(f"{HALVES[1]}_external_reconstruct_weight.mrc").unlink()
    first, second = (ended(one) for one in [hook(root) for root in HALVES])
    assert first == (0, "")
    check(HALVES[0], ["watch"])
    status, errors = second
    assert status == 1
    assert errors.startswith("cryored: error: ")
    assert "_weight.mrc: missing" in errors
    assert errors.count("\n") == 1
    assert not result(HALVES[1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_ends_it_after_the_request(watch, number):
    watcher = watch(program=("-c", SLOW))
    waiting = hook(HALVES[0])
    until(lambda: "writing" in said(watcher))
    watcher.send_signal(number)
    assert ended(waiting) == (0, "")
    assert watcher.wait(10) == 0
    check(HALVES[0], ["watch"])
    assert presence()["state"].strip() == "ended"


@pytest.mark.slow
def test_a_signal_may_come_at_any_moment(project):
    done = subprocess.run([sys.executable, "-c", EACH_CALL], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n" * 40, "")


@pytest.mark.slow
def test_a_folder_that_is_deleted_ends_it(watch):
    watcher = watch("--report", "page.html")
    assert ended(hook(HALVES[0])) == (0, "")
    until(Path("page.html").exists)
    assert 'http-equiv="refresh"' in Path("page.html").read_text()
    shutil.rmtree("run")
    assert watcher.wait(10) == 1
    assert "was deleted; start the watcher again where the run goes on" in said(watcher)
    assert 'http-equiv="refresh"' not in Path("page.html").read_text()


@pytest.mark.slow
def test_a_folder_that_is_missing(watch):
    shutil.rmtree("run")
    watcher = watch(wait=False)
    assert watcher.wait(20) == 1
    assert "run: no such folder" in said(watcher)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(watch):
    Path("run").chmod(0o500)
    try:
        watcher = watch(wait=False)
        assert watcher.wait(20) == 1
        assert "cannot be made" in said(watcher)
        status, errors = ended(hook(HALVES[0]))
        assert status == 1
        assert "not writable" in errors
    finally:
        Path("run").chmod(0o700)


@pytest.mark.slow
def test_a_full_disk(watch, tmp_path):
    """Files of more than 64 KiB cannot be written: the maps fail with the cause, and the watcher stays."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); from cryored.cli import main; main()"
    watcher = watch(program=("-c", limited))
    status, errors = ended(hook(HALVES[0]))
    assert status == 1
    assert f"{result(HALVES[0]).resolve()}: cannot be written: File too large" in errors
    assert not result(HALVES[0]).exists()
    assert watcher.poll() is None
    assert not [path for path in Path("run").iterdir() if path.name.endswith(".part")]


@pytest.mark.slow
def test_its_files_follow_the_users_umask(watch):
    before = os.umask(0o027)
    try:
        watch()
        assert ended(hook(HALVES[0])) == (0, "")
    finally:
        os.umask(before)
    for path in (PRESENCE, result(HALVES[0]), Path(f"{HALVES[0]}_cryored.log")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


@pytest.mark.slow
def test_polling_needs_no_hook(watch):
    watch("--poll")
    roots = [str(path).removesuffix("_external_reconstruct.star") for path in Path("run").glob("*_reconstruct.star")]
    assert set(HALVES) < set(roots)  # others wait too: until those are answered files come and go
    until(lambda: all(result(root).exists() for root in roots))
    until(lambda: all(Path(f"{root}_cryored.log").exists() for root in roots))
    for root in roots:
        check(root, ["watch"])
