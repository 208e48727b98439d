"""The files in which the hook and the watcher speak to each other, seen from the watcher."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from cryored.errors import InputError, OutputError
from cryored.refinement import mailbox as handover
from cryored.refinement.mailbox import PRESENCE, Inbox, Presence

TOKEN = "0123abcd"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(handover, "_PULSE", 0.02)
    monkeypatch.setattr(handover, "_PATIENCE", 0.8)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def present(run, state="serving", beat=7, token="another", host=None, pid=None):
    """Leave the file of another watcher, one that does not beat."""
    host = host or os.uname().nodename
    text = (
        f"cryored-watch 1\nstate {state:<7}\nbeat {beat:010d}\ntoken {token}\nhost {host}\npid {pid or os.getpid()}\n"
    )
    put(run / PRESENCE, text)


def put(path, text):
    partial = path.with_name(".partial")
    partial.write_text(text)
    partial.replace(path)


def hand_over(run, root="run_it003_half1_class001", watcher=TOKEN, id="host.1.abc", extra=""):
    path = run / f"{root}_cryored.request"
    star = f"run/{root}_external_reconstruct.star"
    put(path, f"cryored-request 1\nwatcher {watcher}\ncwd {run.parent}\nstar {star}\nid {id}\n{extra}")
    return path


def lines(path):
    return path.read_text().splitlines()


def eventually(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def only_the_presence(run):
    return [path.name for path in run.iterdir()] == [PRESENCE]


# Presence


def test_a_presence_from_beginning_to_end(run):
    options = ["--model", "my model", "--lambda", "0.5", ""]
    threads = threading.active_count()
    with Presence(run, options) as presence:
        serving = lines(run / PRESENCE)
        assert serving[0] == "cryored-watch 1"
        assert serving[1] == "state serving"
        assert serving[3:6] == [f"token {presence.token}", f"host {os.uname().nodename}", f"pid {os.getpid()}"]
        assert serving[6:] == [f"option {word}" for word in options]
        eventually(lambda: lines(run / PRESENCE)[2] > serving[2])
        assert len(lines(run / PRESENCE)[2]) == len(serving[2]) == len("beat 0000000042")
        presence.check()
    ended = lines(run / PRESENCE)
    assert ended[1] == "state ended  "
    assert ended[3:] == serving[3:]
    assert threading.active_count() == threads
    assert only_the_presence(run)


def test_the_folder_may_be_relative_while_the_watcher_moves(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    with Presence("run", []) as presence:
        hand_over(run, watcher=presence.token)
        inbox = Inbox("run", presence.token)
        monkeypatch.chdir("/")
        begin = lines(run / PRESENCE)[2]
        eventually(lambda: lines(run / PRESENCE)[2] > begin)
        (found,) = inbox.waiting()
        found.done()
    assert lines(run / PRESENCE)[1] == "state ended  "


def test_a_line_break_in_an_option_is_refused(run):
    with pytest.raises(InputError, match=r"'a\\nb': an option with a line break"):
        Presence(run, ["--model", "a\nb"])
    assert not list(run.iterdir())


def test_two_watchers(run):
    with (
        Presence(run, ["--lambda", "1"]) as first,
        pytest.raises(OutputError, match=rf"watcher on .* \(pid {os.getpid()}\) serves this folder, .* end it first"),
        Presence(run, []),
    ):
        pass
    assert first.lost is None
    assert lines(run / PRESENCE)[-1] == "option 1"
    assert only_the_presence(run)


def test_the_place_of_one_that_ended_is_taken_at_once(run, monkeypatch, caplog):
    monkeypatch.setattr(handover, "_PATIENCE", 1e9)
    present(run, state="ended")
    with caplog.at_level(logging.INFO), Presence(run, []) as presence:
        assert f"token {presence.token}" in lines(run / PRESENCE)
        assert only_the_presence(run)
    assert not caplog.records


def test_the_place_of_a_dead_process_is_taken_at_once(run, dead_pid, monkeypatch, caplog):
    monkeypatch.setattr(handover, "_PATIENCE", 1e9)
    present(run, pid=dead_pid)
    with caplog.at_level(logging.INFO), Presence(run, []) as presence:
        assert f"token {presence.token}" in lines(run / PRESENCE)
    assert f"(pid {dead_pid}) is dead, its place is taken" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("host", [None, "elsewhere"])  # on this host the number is another process's now
def test_the_place_of_one_without_beat_is_taken(run, host, caplog):
    present(run, host=host)
    with caplog.at_level(logging.INFO), Presence(run, []) as presence:
        assert f"token {presence.token}" in lines(run / PRESENCE)
    assert "is dead, its place is taken" in caplog.text


def test_one_on_another_host_that_beats_is_left_alone(run, dead_pid):
    present(run, host="elsewhere", pid=dead_pid)
    timer = threading.Timer(0.1, present, [run], {"host": "elsewhere", "pid": dead_pid, "beat": 8})
    timer.start()
    with pytest.raises(OutputError, match=r"watcher on elsewhere \(pid \d+\) serves"), Presence(run, []):
        pass
    timer.join()
    assert "token another" in lines(run / PRESENCE)
    assert only_the_presence(run)


def test_one_that_ends_while_it_is_judged(run):
    present(run, host="elsewhere")
    timer = threading.Timer(0.1, present, [run], {"host": "elsewhere", "beat": 8, "state": "ended"})
    timer.start()
    with Presence(run, []) as presence:
        assert f"token {presence.token}" in lines(run / PRESENCE)
    timer.join()


def test_a_quicker_watcher_is_put_back(run, dead_pid, monkeypatch):
    """Between judging a dead one and moving it away, a third watcher comes, and lives."""
    present(run, pid=dead_pid)
    rename = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        present(run, token="third", host="elsewhere")
        threading.Timer(0.1, present, [run], {"token": "third", "host": "elsewhere", "beat": 8}).start()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(OutputError, match="watcher on elsewhere"), Presence(run, []):
        pass
    assert lines(run / PRESENCE)[2:4] == ["beat 0000000008", "token third"]
    assert only_the_presence(run)


def test_what_is_no_presence_of_this_user_is_left_alone(run, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.write_text("precious")
    (run / PRESENCE).symlink_to(target)
    with pytest.raises(OutputError, match=r"cryored_watch.txt: a link, .* remove it"), Presence(run, []):
        pass
    assert target.read_text() == "precious"
    (run / PRESENCE).unlink()

    os.mkfifo(run / PRESENCE)
    with pytest.raises(OutputError, match="expected a small file of this user"), Presence(run, []):
        pass
    (run / PRESENCE).unlink()

    (run / PRESENCE).write_text("a note of mine")
    with pytest.raises(OutputError, match="not a watcher's file of this version"), Presence(run, []):
        pass
    assert (run / PRESENCE).read_text() == "a note of mine"

    present(run, state="ended")
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(run).st_uid + 1)
    with pytest.raises(OutputError, match="another user's"), Presence(run, []):
        pass
    assert lines(run / PRESENCE)[1] == "state ended  "


def test_a_file_system_that_changes_owners_is_refused(run, monkeypatch):
    """The hook would trust no file there."""
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(run).st_uid + 1)
    with pytest.raises(OutputError, match="another user's"), Presence(run, []):
        pass


def test_folders_that_cannot_be_served(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="missing: no such folder, expected the one .* create it first"):
        Presence(tmp_path / "missing", []).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/cryored_watch.txt: cannot be made: Not a directory"):
        Presence(tmp_path / "file", []).__enter__()

    def no_links(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OutputError, match=r"Operation not permitted; .* hard links"):
        Presence(tmp_path, []).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder(run):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    run.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be made: Permission denied"), Presence(run, []):
        pass


def test_a_full_disk_stops_the_beat_only_while_it_lasts(run, monkeypatch, caplog):
    pwrite, refused = os.pwrite, []

    def full(descriptor, data, offset):
        refused.append(data)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Presence(run, []) as presence:
        monkeypatch.setattr(os, "pwrite", full)
        eventually(lambda: len(refused) > 3)
        monkeypatch.setattr(os, "pwrite", pwrite)
        before = lines(run / PRESENCE)[2]
        eventually(lambda: lines(run / PRESENCE)[2] > before)
        presence.check()
    assert caplog.text.count("cannot be rewritten: No space left on device") == 1


def test_a_deleted_presence_is_noticed(run):
    with Presence(run, []) as presence:
        (run / PRESENCE).unlink()
        eventually(lambda: presence.lost)
        with pytest.raises(OutputError, match=r"cryored_watch.txt: was deleted"):
            presence.check()
    assert not list(run.iterdir())


def test_a_deleted_folder_is_noticed(run):
    with Presence(run, []) as presence:
        inbox = Inbox(run, presence.token)
        run.rename(run.with_name("moved"))
        eventually(lambda: presence.lost)
        assert inbox.waiting() == []
    assert not run.exists()


def test_a_takeover_is_noticed_and_not_written_to(run):
    with Presence(run, []) as presence:
        (run / PRESENCE).unlink()
        present(run, host="elsewhere", pid=5)
        eventually(lambda: presence.lost)
        assert presence.lost.endswith("the watcher on elsewhere (pid 5) took over")
        text = (run / PRESENCE).read_text()
    assert (run / PRESENCE).read_text() == text
    assert "state serving" in text


# Requests


def test_a_request_is_found_answered_and_found_no_more(run):
    path = hand_over(run)
    inbox = Inbox(run, TOKEN)
    (found,) = inbox.waiting()
    assert (found.path, found.id) == (path, "host.1.abc")
    assert (found.folder, found.star) == (run.parent, "run/run_it003_half1_class001_external_reconstruct.star")
    assert inbox.waiting() == [found]  # until it is answered
    assert found.still_wanted()
    found.accept()
    assert inbox.waiting() == []
    assert found.still_wanted()
    found.done()
    assert lines(path)[5:] == ["accepted", "done"]


def test_answers_are_one_line_each(run):
    first, second = hand_over(run, "a"), hand_over(run, "b", id="host.2.abc")
    one, two = Inbox(run, TOKEN).waiting()
    one.failed("B: missing,\nexpected \xe5 and \udcff")
    two.declined("busy")
    assert first.read_bytes().splitlines()[5:] == [b"failed B: missing, expected \xc3\xa5 and \xff"]
    assert lines(second)[5:] == ["declined busy"]


def test_the_folder_is_listed_only_when_there_may_be_something_new(run, monkeypatch):
    monkeypatch.setattr(handover, "_RELIST", 1e9)
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    inbox = Inbox(run, TOKEN)
    inbox.waiting()
    time.sleep(handover._GRANULE + 0.01)
    listed.clear()
    for _ in range(100):
        assert inbox.waiting() == []
    assert not listed
    hand_over(run)
    assert len(inbox.waiting()) == 1


def test_a_folder_whose_time_stands_still_is_listed_again(run, monkeypatch):
    """File systems count time in steps, and NFS remembers it for a while."""
    inbox = Inbox(run, TOKEN)
    assert inbox.waiting() == []
    status = run.stat()
    monkeypatch.setattr(handover, "_GRANULE", 1e9)  # it has just changed
    hand_over(run)
    os.utime(run, ns=(status.st_atime_ns, status.st_mtime_ns))
    (found,) = inbox.waiting()
    found.done()
    assert inbox.waiting() == []
    monkeypatch.setattr(handover, "_GRANULE", 0)
    monkeypatch.setattr(handover, "_RELIST", 0.3)
    hand_over(run, "late")
    os.utime(run, ns=(status.st_atime_ns, status.st_mtime_ns))
    eventually(lambda: len(inbox.waiting()) == 1)


def test_what_is_not_a_request_to_this_watcher_is_ignored(run, tmp_path, monkeypatch):
    def name(stem):
        return run / f"{stem}_cryored.request"

    inbox = Inbox(run, TOKEN)
    good = hand_over(run, "good")
    text = good.read_text()
    hand_over(run, "other", watcher="another")
    hand_over(run, "large", extra="x" * handover._LARGEST)
    hand_over(run, "answered", extra="declined busy\n")
    good.rename(run / "good.request")
    (tmp_path / "elsewhere").write_text(text)
    name("link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(name("pipe"))
    name("folder").mkdir()
    name("version").write_text(text.replace("request 1", "request 2"))
    name("binary").write_bytes(bytes(range(256)))
    name("empty").touch()
    for end in range(0, len(text), 5):
        name(f"cut{end}").write_text(text[:end])
    name("whole").write_text(text)
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(path) or original(path, *rest, **more))
    assert [found.path for found in inbox.waiting()] == [name("whole")]
    assert not {name("link"), name("pipe"), name("folder"), name("large")} & set(opened)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(run).st_uid + 1)
    opened.clear()
    assert inbox.waiting() == []
    assert not opened


def test_a_request_taken_back(run):
    path = hand_over(run)
    (found,) = Inbox(run, TOKEN).waiting()
    path.unlink()
    assert not found.still_wanted()
    found.accept()
    found.done()
    assert not list(run.iterdir())


def test_a_request_put_anew(run):
    path = hand_over(run)
    inbox = Inbox(run, TOKEN)
    (found,) = inbox.waiting()
    found.accept()
    hand_over(run, id="host.2.xyz")  # by a refinement that was continued
    assert not found.still_wanted()
    found.failed("too late")
    assert len(lines(path)) == 5
    (again,) = inbox.waiting()
    assert again.id == "host.2.xyz"
    assert again.still_wanted()


def test_a_request_turned_into_a_link(run, tmp_path):
    path = hand_over(run)
    (found,) = Inbox(run, TOKEN).waiting()
    target = path.rename(tmp_path / "target")
    path.symlink_to(target)
    assert not found.still_wanted()
    found.done()
    assert len(lines(target)) == 5
    assert path.is_symlink()


@pytest.mark.parametrize("written", [0, 3])
def test_an_answer_that_cannot_be_written_takes_the_request_away(run, written, monkeypatch, caplog):
    path = hand_over(run)
    (found,) = Inbox(run, TOKEN).waiting()
    write = os.write

    def full(descriptor, data):
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:written])

    monkeypatch.setattr(os, "write", full)
    found.done()
    assert not path.exists()
    assert "the answer cannot be written: No space left on device" in caplog.text


def test_an_incomplete_answer_is_none(run):
    hand_over(run, extra="acc")
    assert len(Inbox(run, TOKEN).waiting()) == 1


def test_requests_to_earlier_watchers_are_removed(run):
    stale, answered = hand_over(run, "a", watcher="dead"), hand_over(run, "b", watcher="dead", extra="accepted\n")
    mine = hand_over(run, "c")
    garbled = run / "d_cryored.request"
    garbled.write_text("cryored-request 1\nwatcher dead\n")
    inbox = Inbox(run, TOKEN)
    assert not stale.exists()
    assert not answered.exists()
    assert garbled.exists()
    assert [found.path for found in inbox.waiting()] == [mine]


def test_no_file_stays_open(run):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc here")
    before = open_files()
    with Presence(run, []) as presence:
        hand_over(run, watcher=presence.token)
        os.mkfifo(run / "pipe_cryored.request")
        (found,) = Inbox(run, presence.token).waiting()
        found.accept()
        found.done()
    assert open_files() == before
