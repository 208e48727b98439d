"""How RELION's hook and ``cryored watch`` speak to each other: small files in the run's folder.

``cryored_watch.txt`` says that a watcher serves the folder, ``ROOT_cryored.request`` hands one request to it and
carries the answer back. Lines are ``key value``. The two may run on hosts with a shared file system and different
clocks: each look opens the file anew, and what counts is its content. The other side is
``bin/cryored-external-reconstruct``.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from cryored.errors import InputError, OutputError

logger = logging.getLogger(__name__)

PRESENCE = "cryored_watch.txt"
_ENDING = "_cryored.request"
_ANSWERS = frozenset({"accepted", "done", "failed", "declined"})
_LARGEST = 64 * 1024  # bytes
_PULSE = 1.0  # seconds from beat to beat
_PATIENCE = 3.5  # seconds without a beat after which a watcher counts as dead
_RELIST = 1.0  # seconds after which a folder is listed even if its time has not changed
_GRANULE = 0.1  # seconds in which a second change of a folder may leave its time as it is


class Presence:
    """A watcher's place in a run's folder, taken when the ``with`` block begins and given up when it ends.

    A thread rewrites the beat each second. The file stays afterwards: the hook goes on with the options in it.

    Parameters
    ----------
    run_dir : path
        Where RELION writes the run's requests.
    options : sequence of str
        All options of red-update that the watcher runs with, word by word.

    Attributes
    ----------
    token : str
        Names this watcher; requests are addressed to it.
    lost : str or None
        Why the place is no longer this watcher's: the folder was deleted, or another watcher took over.

    Raises
    ------
    InputError
        An option contains a line break.
    OutputError
        When the block begins: the folder is missing, cannot be written to, or has a watcher already.
    """

    def __init__(self, run_dir: str | os.PathLike[str], options: Sequence[str]) -> None:
        for word in options:
            if "\n" in word:
                raise InputError(f"{word!r}: an option with a line break, expected one line; rename the file or folder")
        self.path = _absolute(run_dir) / PRESENCE
        self.token = secrets.token_hex(16)
        self.lost: str | None = None
        self._beat = 0
        self._warned = False
        lines = [f"token {self.token}", f"host {_host()}", f"pid {os.getpid()}"]
        lines += [f"option {word}" for word in options]
        self._tail = os.fsencode("".join(f"{line}\n" for line in lines))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="beat", daemon=True)

    @staticmethod
    def look(run_dir: str | os.PathLike[str]) -> Literal["serving", "ended", "died"] | None:
        """Tell what the watcher of a folder does, None where there is none.

        One on another host that has died counts as serving: the beat is not waited for.

        Raises
        ------
        OutputError
            The file is none of a watcher's.
        """
        found = Presence(run_dir, ())._found()
        if found is None:
            return None
        if _has_ended(found):
            return "ended"
        return "died" if _is_dead(found) else "serving"

    @staticmethod
    def left_options(run_dir: str | os.PathLike[str]) -> list[str]:
        """Return the options, word by word, that a watcher has left for the hook; none where there was no watcher.

        Raises
        ------
        OutputError
            The file is none of a watcher's.
        """
        presence = Presence(run_dir, ())
        if presence._found() is None:
            return []
        lines = os.fsdecode(presence.path.read_bytes()).split("\n")
        return [line.removeprefix("option ") for line in lines if line.startswith("option ")]

    def check_free(self) -> None:
        """Refuse, before anything is loaded, a folder that is missing or has a watcher; the place is not taken yet.

        Raises
        ------
        OutputError
            As when the block begins.
        """
        if not self.path.parent.is_dir():
            raise self._no_folder()
        found = self._found()
        if found is not None and not _has_ended(found):
            self._is_left(found)

    def __enter__(self) -> Presence:
        """Take the place and begin to beat."""
        self._take()
        self._show("serving")
        self.check()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say that this watcher has ended."""
        self._stop.set()
        self._thread.join()
        if self.lost is None:
            self._show("ended")

    def check(self) -> None:
        """Raise what has happened if the place is no longer this watcher's."""
        if self.lost is not None:
            raise OutputError(self.lost)

    def _head(self, state: str) -> bytes:
        # Always the same length: it is overwritten in place, which needs no space on the disk.
        return f"cryored-watch 1\nstate {state:<7}\nbeat {self._beat:010d}\n".encode()

    def _take(self) -> None:
        """Make the file, whole and only if there is none; a dead watcher's is removed first."""
        partial = self.path.with_name(f".{PRESENCE}.{self.token}")
        try:
            with partial.open("xb") as stream:
                stream.write(self._head("serving") + self._tail)
            while True:
                with suppress(FileExistsError):
                    os.link(partial, self.path)
                    return
                self._displace()
        except OutputError:
            raise
        except FileNotFoundError as error:
            raise self._no_folder() from error
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be made: {error.strerror or error}; "
                "the watcher needs a folder to write to on a file system with hard links"
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _no_folder(self) -> OutputError:
        return OutputError(
            f"{self.path.parent}: no such folder, expected the one that RELION writes the run to; create it first"
        )

    def _displace(self) -> None:
        """Remove the file of a watcher that has ended or died; refuse if it lives."""
        found = self._found()
        if found is None:
            return
        if not _has_ended(found):
            if not self._is_left(found):
                return  # to be judged anew
            logger.info("%s: %s is dead, its place is taken", self.path, _watcher(found))
        aside = self.path.with_name(f".{PRESENCE}.{self.token}.aside")
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            with _own_file(aside) as (_, renamed):
                if renamed.get("token") != found["token"]:
                    # Another watcher was quicker, and it is not the one that was judged.
                    with suppress(FileExistsError):
                        os.link(aside, self.path)
            aside.unlink()

    def _is_left(self, found: dict[str, str]) -> bool:
        """Tell whether a watcher that has not ended has died, False where another file came; refuse if it lives."""
        if _is_dead(found):
            return True
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            time.sleep(_PATIENCE / 20)
            again = self._found()
            if again == found:
                continue
            if again is None or again["token"] != found["token"] or _has_ended(again):
                return False
            raise OutputError(
                f"{self.path}: {_watcher(found)} serves this folder, and there can be one only; let it, or end it first"
            )
        return True

    def _found(self) -> dict[str, str] | None:
        try:
            with _own_file(self.path) as (_, fields):
                pass
        except FileNotFoundError:
            return None
        if fields.get("cryored-watch") != "1" or "token" not in fields:
            raise OutputError(
                f"{self.path}: not a watcher's file of this version of cryored; remove it if no watcher runs"
            )
        return fields

    def _serve(self) -> None:
        while self.lost is None and not self._stop.wait(_PULSE):
            self._show("serving")

    def _show(self, state: str) -> None:
        """Rewrite state and beat, or find that the place is lost."""
        self._beat += 1
        try:
            # Opened and closed each time: NFS sends the bytes at the close, and a file that was deleted shows.
            with _own_file(self.path, os.O_RDWR) as (descriptor, fields):
                if fields.get("token") == self.token:
                    os.pwrite(descriptor, self._head(state), 0)
                else:
                    self.lost = f"{self.path}: {_watcher(fields)} took over"
        except FileNotFoundError:
            self.lost = f"{self.path}: was deleted; start the watcher again where the run goes on"
        except OutputError as error:
            self.lost = str(error)
        except OSError as error:
            # May pass; meanwhile the hook finds no beat and goes on by itself.
            if not self._warned:
                self._warned = True
                logger.warning("%s: cannot be rewritten: %s", self.path, error.strerror or error)
        with suppress(OSError):
            # The answer to this tells an NFS client that its listing of the folder is outdated.
            os.utime(self.path.parent)


@dataclass(frozen=True)
class Handover:
    """One request that the hook has handed over.

    Parameters
    ----------
    path : Path
        The file that hands it over.
    id : str
        Names this call of the hook.
    star : str
        The request as RELION named it.
    folder : Path
        RELION's project folder, which relative paths are seen from.
    """

    path: Path
    id: str
    star: str
    folder: Path

    def still_wanted(self) -> bool:
        """Tell whether the hook still waits: to be asked just before a result is written."""
        try:
            with _own_file(self.path) as (_, fields):
                return fields.get("id") == self.id
        except OSError:
            return False

    def accept(self) -> None:
        """Say that the work begins."""
        self._answer("accepted")

    def done(self) -> None:
        """Say that the result is in place."""
        self._answer("done")

    def failed(self, message: str) -> None:
        """Say why there is no result; the hook fails with this message."""
        self._answer(f"failed {message}")

    def declined(self, message: str) -> None:
        """Say why the watcher cannot answer; the hook then does it by itself."""
        self._answer(f"declined {message}")

    def _answer(self, text: str) -> None:
        line = " ".join(text.splitlines()).encode(errors="surrogateescape") + b"\n"
        try:
            with _own_file(self.path, os.O_RDWR | os.O_APPEND) as (descriptor, fields):
                if fields.get("id") == self.id and os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (FileNotFoundError, OutputError):
            pass  # the hook does not wait any more
        except OSError as error:
            logger.warning("%s: the answer cannot be written: %s", self.path, error.strerror or error)
            with suppress(OSError):
                self.path.unlink()  # tells the hook to go on by itself


class Inbox:
    """The requests handed to a watcher. What earlier watchers have left is removed at the beginning.

    The folder is listed only when that may bring something new, so one can look as often as one likes.

    Parameters
    ----------
    run_dir : path
    token : str
        Of the watcher.
    """

    def __init__(self, run_dir: str | os.PathLike[str], token: str) -> None:
        self._run_dir = _absolute(run_dir)
        self._token = token
        self._time: int | None = None
        self._changed = self._listed = 0.0
        for path, fields in _handovers(self._run_dir):
            if fields["watcher"] != token:
                logger.info("%s: removed, it was handed to a watcher that is gone", path)
                with suppress(OSError):
                    path.unlink()  # a hook that still waits goes on by itself

    def waiting(self) -> list[Handover]:
        """Return the requests that have no answer yet, by name."""
        now = time.monotonic()
        try:
            changed = self._run_dir.stat().st_mtime_ns
        except OSError:
            return []  # Presence notices when the folder is gone
        if changed != self._time:
            self._time, self._changed = changed, now
        elif now - self._changed > _GRANULE and now - self._listed < _RELIST:
            return []
        self._listed = now
        found = [
            Handover(path, fields["id"], fields["star"], Path(fields["cwd"]))
            for path, fields in _handovers(self._run_dir)
            if fields["watcher"] == self._token and not _ANSWERS & fields.keys()
        ]
        if found:
            self._time = None  # looks again until they are answered
        return found


def _handovers(run_dir: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield what is whole; a folder that is gone holds nothing."""
    try:
        names = sorted(name for name in os.listdir(run_dir) if name.endswith(_ENDING))
    except OSError:
        return
    for name in names:
        path = run_dir / name
        try:
            with _own_file(path) as (_, fields):
                pass
        except OSError as error:
            logger.debug("%s: ignored: %s", path, error)
            continue
        if fields.get("cryored-request") == "1" and {"watcher", "id", "cwd", "star"} <= fields.keys():
            yield path, fields
        else:
            logger.debug("%s: ignored: incomplete, or of another version of cryored", path)


@contextmanager
def _own_file(path: Path, flags: int = os.O_RDONLY) -> Iterator[tuple[int, dict[str, str]]]:
    """Open a regular file of this user, and nothing else, and read its complete lines: key -> value.

    Raises
    ------
    OutputError
        The name is a link, a pipe, a folder or another user's file, or the file is too large.
    OSError
        There is none, or what the file system answers.
    """
    _check_own(path, path.lstat())  # before it is opened: a pipe or a device may do something then
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_own(path, os.fstat(descriptor))
        lines = os.fsdecode(os.read(descriptor, _LARGEST)).split("\n")[:-1]
        yield descriptor, {key: value for key, _, value in (line.partition(" ") for line in lines)}
    finally:
        os.close(descriptor)


def _check_own(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_size > _LARGEST:
        raise OutputError(f"{path}: a link, large or another user's, expected a small file of this user; remove it")


def _absolute(run_dir: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(run_dir))  # the watcher changes its folder for each request


def _host() -> str:
    return os.uname().nodename  # uname -n, as in the hook


def _watcher(fields: dict[str, str]) -> str:
    return f"the watcher on {fields.get('host')} (pid {fields.get('pid')})"


def _has_ended(found: dict[str, str]) -> bool:
    return found.get("state", "").strip() == "ended"


def _is_dead(found: dict[str, str]) -> bool:
    """Tell whether a watcher on this host runs no more; of one on another host only the beat tells."""
    if found.get("host") != _host():
        return False
    try:
        os.kill(int(found.get("pid", "")), 0)
    except (OSError, ValueError, OverflowError):  # not permitted: the number is another user's process now
        return True
    return False
