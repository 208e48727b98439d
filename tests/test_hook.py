"""The script that RELION calls, with a watcher, without one, and with one that leaves in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cryored.refinement.mailbox import PRESENCE, Inbox, Presence

REPOSITORY = Path(__file__).parents[1]
ROOT = "run/run_it003_half1_class001"
STAR = f"{ROOT}_external_reconstruct.star"
HANDOVER = Path(f"{ROOT}_cryored.request")
HOST = os.uname().nodename
OPTIONS = ["--model", "my model", "--lambda", "0.5", "--unregularised", "{root}_$HOME*.mrc", ""]

SHELLS = [["sh"], ["bash", "--posix"], ["busybox", "sh"]]
SHELLS = [shell for shell in SHELLS if shutil.which(shell[0])]

# Beside the script it stands for cryored: it notes its arguments.
CRYORED = """#!/bin/sh
for word; do printf '%s\\n' "$word" >>called; done
exit 7
"""

# Sleeps no time, so that minutes of waiting pass at once, and lets the watcher beat.
SLEEP = f"""#!/bin/sh
case $1 in *.*) exit 1 ;; esac
cd run && sed "s/^beat .*/beat $$/" {PRESENCE} >new && mv new {PRESENCE}
"""


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Make RELION's project folder the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CRYORED_WATCH_WAIT", raising=False)
    Path("run").mkdir()
    Path("bin").mkdir()
    shutil.copy(REPOSITORY / "bin" / "cryored-external-reconstruct", "bin/hook")
    program(Path("bin/cryored"), CRYORED)


@pytest.fixture(params=SHELLS, ids="_".join)
def shell(request):
    return request.param


def start(*arguments, shell=("sh",), **environment):
    return subprocess.Popen(
        [*shell, "bin/hook", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # pytest may have been started where these are ignored.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )


def end(process):
    try:
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()  # ends what hangs, and is nothing to one that has ended
    assert out == ""
    return process.returncode, err


def hook(*arguments, **options):
    return end(start(*arguments, **options))


def called():
    """Return what red-update was called with, None if it was not."""
    path = Path("called")
    return path.read_text().splitlines() if path.exists() else None


def nothing_left():
    return {path.name for path in Path("run").iterdir()} <= {PRESENCE}


def present(state="serving", beat=7, token="another", host=HOST, pid=None, options=("--lambda", "0.5"), first=1):
    """Leave the file of a watcher that does nothing."""
    lines = [f"cryored-watch {first}", f"state {state:<7}", f"beat {beat:010d}", f"token {token}", f"host {host}"]
    lines += [f"pid {pid or os.getpid()}", *(f"option {word}" for word in options)]
    partial = Path("run/.partial")
    partial.write_text("".join(f"{line}\n" for line in lines))
    partial.replace(Path("run") / PRESENCE)


@contextmanager
def watcher(answer):
    """Serve the folder; each request goes to `answer`."""
    stop = threading.Event()
    answered = []

    def serve():
        inbox = Inbox("run", presence.token)
        while not stop.wait(0.01):
            for handed in inbox.waiting():
                handed.accept()
                answered.append(handed)
                answer(handed)

    with Presence("run", OPTIONS) as presence:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield answered
        finally:
            stop.set()
            thread.join()


def eventually(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


# Without a watcher


def test_without_a_watcher_the_script_is_red_update(shell):
    assert hook(STAR, shell=shell) == (7, "")
    assert called() == ["red-update", STAR]
    Path("called").unlink()
    assert hook("--model", "a b", "--lambda", "0", STAR, shell=shell) == (7, "")
    assert called() == ["red-update", "--model", "a b", "--lambda", "0", STAR]


def test_options_alone_are_no_request(shell):
    present()
    shutil.copy(Path("run") / PRESENCE, PRESENCE)
    assert hook("--help", shell=shell) == (7, "")
    assert called() == ["red-update", "--help"]


def test_no_request(shell):
    code, err = hook(shell=shell)
    assert code == 2
    assert err.startswith("cryored: error: no request given")


def test_a_watcher_that_has_ended_leaves_its_options(shell):
    with Presence("run", OPTIONS):
        pass
    code, err = hook(STAR, shell=shell)
    assert code == 7
    assert err.startswith(
        "cryored: the watcher of run has ended; going on by itself with its options: --model my model "
    )
    assert err.count("\n") == 1
    assert err.endswith(f"; to end these: rm run/{PRESENCE}\n")
    assert called() == ["red-update", *OPTIONS, STAR]


def test_a_watcher_that_has_died_leaves_its_options(shell):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    present(pid=process.pid, options=OPTIONS)
    code, err = hook(STAR, shell=shell)
    assert code == 7
    assert f"the watcher of run on {HOST} (pid {process.pid}) has died; going on by itself" in err
    assert called() == ["red-update", *OPTIONS, STAR]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "version", "cut", "owner"])
def test_a_presence_that_cannot_be_trusted_is_not_regarded(kind, shell):
    path = Path("run") / PRESENCE
    present(first=2 if kind == "version" else 1)
    if kind == "link":
        path.rename("target")
        path.symlink_to("../target")
    elif kind in ("pipe", "folder"):
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    elif kind == "cut":
        path.write_text("cryored-watch 1\nstate serving\n")
    elif kind == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(path, 12345, -1)
    code, err = hook(STAR, shell=shell)
    assert code == 7
    assert err == (
        f"cryored: run/{PRESENCE} is a link, another user's or of another version of cryored, so no watcher is asked\n"
    )
    assert called() == ["red-update", STAR]


# With one


def test_done(shell):
    with watcher(lambda handed: handed.done()) as answered:
        assert hook(STAR, shell=shell) == (0, "")
    assert [(handed.star, handed.folder) for handed in answered] == [(STAR, Path.cwd())]
    assert answered[0].path == Path.cwd() / HANDOVER
    assert called() is None
    assert nothing_left()


@pytest.mark.parametrize(
    ("folder", "star", "name"),
    [("run", "run it003_external_reconstruct.star", "run it003"), (".", "../run/other.star", "other")],
)
def test_names_of_requests(folder, star, name, shell):
    """With a space, in the current folder, outside it, with another ending."""
    command = [*shell, str(Path("bin/hook").absolute()), star]
    with watcher(lambda handed: handed.done()) as answered:
        done = subprocess.run(
            command, cwd="run" if folder == "run" else "bin", capture_output=True, text=True, timeout=20
        )
    assert (done.returncode, done.stderr) == (0, "")
    (handed,) = answered
    assert handed.star == star
    assert handed.path.name == f"{name}_cryored.request"
    assert (handed.folder / handed.star).parent.resolve() == Path("run").resolve()


def test_failed(shell):
    with watcher(lambda handed: handed.failed("run/B.mrc: missing,\n  expected it")):
        assert hook(STAR, shell=shell) == (1, "cryored: error: run/B.mrc: missing,   expected it\n")
    assert called() is None
    assert nothing_left()


def test_declined(shell):
    with watcher(lambda handed: handed.declined("it lies elsewhere")):
        code, err = hook(STAR, shell=shell)
    assert code == 7
    assert err.startswith("cryored: the watcher of run on ")
    assert "declined: it lies elsewhere; going on by itself with its options: --model" in err
    assert called() == ["red-update", *OPTIONS, STAR]
    assert nothing_left()


def test_a_late_answer_is_waited_for(shell):
    def late(handed):
        time.sleep(0.3)
        assert handed.still_wanted()
        handed.done()

    with watcher(late):
        assert hook(STAR, shell=shell) == (0, "")
    assert called() is None


def test_both_halves_at_once():
    stars = [STAR, STAR.replace("half1", "half2")]
    with watcher(lambda handed: handed.done()) as answered:
        assert [end(process) for process in map(start, stars)] == [(0, "")] * 2
    assert sorted(handed.star for handed in answered) == stars


def test_options_of_the_hook_count(shell):
    with watcher(lambda handed: handed.done()) as answered:
        code, err = hook("--lambda", "0", STAR, shell=shell)
    assert code == 7
    assert (
        err == f"cryored: options given to the hook count, so the watcher on {HOST} (pid {os.getpid()}) is not asked\n"
    )
    assert called() == ["red-update", "--lambda", "0", STAR]
    assert not answered


def test_options_in_the_environment_count(shell):
    with watcher(lambda handed: handed.done()) as answered:
        assert hook(STAR, shell=shell, CRYORED_RED_UPDATE_LAMBDA="", CRYORED_RED_UPDATE_THREADS="1") == (0, "")
        code, err = hook(STAR, shell=shell, CRYORED_RED_UPDATE_TRUST="0.5", CRYORED_RED_UPDATE_MODEL="a b")
    assert code == 7
    assert err == (
        "cryored: options given to the hook count (CRYORED_RED_UPDATE_MODEL CRYORED_RED_UPDATE_TRUST), so the watcher "
        f"on {HOST} (pid {os.getpid()}) is not asked\n"
    )
    # One that has ended has no say either.
    code, err = hook(STAR, shell=shell, CRYORED_RED_UPDATE_TRUST="0.5")
    assert code == 7
    assert err == (
        "cryored: options given to the hook count (CRYORED_RED_UPDATE_TRUST), and those of the watcher that has ended "
        "do not\n"
    )
    assert called() == ["red-update", STAR] * 2
    assert len(answered) == 1


def test_a_removed_request(shell):
    with watcher(lambda handed: handed.path.unlink()):
        code, err = hook(STAR, shell=shell)
    assert code == 7
    assert f"{HANDOVER}, handed to the watcher of run" in err
    assert "was removed; going on by itself" in err
    assert called() == ["red-update", *OPTIONS, STAR]


def test_a_request_of_another_hook_is_left_alone(shell):
    """A refinement was continued while a hook of before still waits."""
    other = "cryored-request 1\nwatcher x\ncwd /\nstar s\nid other\ndone\n"

    def replace(handed):
        Path("new").write_text(other)
        Path("new").replace(handed.path)

    with watcher(replace):
        code, err = hook(STAR, shell=shell)
    assert code == 7
    assert "was removed; going on by itself" in err
    assert HANDOVER.read_text() == other


# With one that leaves


@pytest.mark.slow
def test_a_watcher_killed_in_the_middle():
    program = """
import sys, time
from cryored.refinement.mailbox import Inbox, Presence
with Presence("run", sys.argv[1:]) as presence:
    inbox = Inbox("run", presence.token)
    while not (orders := inbox.waiting()):
        time.sleep(0.01)
    orders[0].accept()
    time.sleep(600)
"""
    victim = subprocess.Popen([sys.executable, "-c", program, *OPTIONS], env=os.environ | {"PYTHONPATH": REPOSITORY})
    try:
        eventually((Path("run") / PRESENCE).exists)
        process = start(STAR)
        eventually(lambda: HANDOVER.exists() and "accepted" in HANDOVER.read_text())
    finally:
        victim.kill()
        victim.wait()
    code, err = end(process)
    assert code == 7
    assert f"(pid {victim.pid}) has died; going on by itself with its options: --model" in err
    assert called() == ["red-update", *OPTIONS, STAR]
    assert nothing_left()


@pytest.mark.slow
def test_a_watcher_that_ends_without_an_answer():
    present()
    process = start(STAR)
    eventually(HANDOVER.exists)
    present(state="ended", beat=8)
    code, err = end(process)
    assert code == 7
    assert "has ended; going on by itself with its options: --lambda 0.5\n" in err
    assert called() == ["red-update", "--lambda", "0.5", STAR]


@pytest.mark.slow
@pytest.mark.parametrize("after", ["another", None])
def test_a_watcher_whose_place_is_lost(after):
    present()
    process = start(STAR)
    eventually(HANDOVER.exists)
    present(token="second", options=["--lambda", "1"]) if after else (Path("run") / PRESENCE).unlink()
    code, err = end(process)
    assert code == 7
    assert "is gone; going on by itself" in err
    assert err.count("\n") == 1
    assert called() == ["red-update", "--lambda", "0.5", STAR]
    assert nothing_left()


def test_without_a_beat_the_script_does_not_wait(shell):
    """On another host the beat alone tells; the time is what was slept, so that no clock matters."""
    present(host="elsewhere", pid=1)
    program(Path("bin/sleep"), '#!/bin/sh\necho "$1" >>slept\n')
    code, err = hook(STAR, shell=shell, PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert code == 7
    assert "the watcher of run on elsewhere (pid 1) gives no sign of life; going on by itself" in err
    slept = sum(map(float, Path("slept").read_text().split()))
    assert 3 <= slept < 3.05  # the looks do not fall on whole seconds
    assert nothing_left()


@pytest.mark.slow
def test_the_whole_wait_is_bounded(shell):
    present(host="elsewhere", pid=1)
    program(Path("bin/sleep"), SLEEP)
    path = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    code, err = hook(STAR, shell=shell, PATH=path, CRYORED_WATCH_WAIT="130")
    assert code == 7
    assert err.splitlines() == [
        f"cryored: waiting for the watcher on elsewhere (pid 1) to answer {ROOT}, 60 s",
        f"cryored: waiting for the watcher on elsewhere (pid 1) to answer {ROOT}, 120 s",
        "cryored: the watcher of run on elsewhere (pid 1) has not answered in 130 s; going on by itself with its "
        "options: --lambda 0.5",
    ]
    assert nothing_left()


def test_a_bound_that_is_no_number(shell):
    present()
    code, err = hook(STAR, shell=shell, CRYORED_WATCH_WAIT="5 min")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("cryored: error: CRYORED_WATCH_WAIT is '5 min', expected seconds")
    assert nothing_left()


def test_an_answer_that_comes_while_the_script_gives_up(shell):
    present(host="elsewhere")
    # Answers just before the request is taken back, which is the second mv.
    program(Path("bin/sleep"), "#!/bin/sh\n")
    program(Path("bin/mv"), f'#!/bin/sh\n[ "$2" != {HANDOVER} ] || echo done >>"$2"\nexec {shutil.which("mv")} "$@"\n')
    path = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    assert hook(STAR, shell=shell, PATH=path) == (0, "")
    assert called() is None
    assert nothing_left()


@pytest.mark.parametrize("broken", ["mktemp", "mv"])
def test_a_request_that_cannot_be_written(broken, shell):
    """As in a folder that is read-only, and on a disk that is full."""
    program(Path(f"bin/{broken}"), "#!/bin/sh\necho refused >&2\nexit 1\n")
    path = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    with watcher(lambda handed: handed.done()) as answered:
        code, err = hook(STAR, shell=shell, PATH=path)
    assert code == 7
    assert err.startswith(f"cryored: nothing can be handed to the watcher of run on {HOST} (pid {os.getpid()}): ")
    assert err.count("\n") == 1
    assert called() == ["red-update", *OPTIONS, STAR]
    assert not answered
    assert nothing_left()


def test_a_full_disk(shell):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    program(
        Path("bin/mktemp"), "#!/bin/sh\nln -s /dev/full run/.cryored_request.abc && echo run/.cryored_request.abc\n"
    )
    path = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    with watcher(lambda handed: handed.done()):
        code, err = hook(STAR, shell=shell, PATH=path)
    assert code == 7
    assert err.startswith("cryored: nothing can be handed to")
    assert err.count("\n") == 1
    assert nothing_left()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_the_request_back(number, shell):
    present()
    process = start(STAR, shell=shell)
    eventually(HANDOVER.exists)
    process.send_signal(number)
    assert end(process) == (128 + number, "")
    assert called() is None
    assert nothing_left()
