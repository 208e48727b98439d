"""Files come into being whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cryored.errors import InputError, OutputError

STREAM = "-"  # the name of standard input and output on the command line


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Tell whether `path` stands for standard input or output."""
    return os.fspath(path) == STREAM


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Tell whether an output stands for standard output, by that name or another such as /dev/stdout."""
    if is_stream(path):
        return True
    try:
        place = os.stat(path)
        if sys.stdout is None or os.path.samestat(place, os.stat(os.devnull)):
            return False
        return os.path.samestat(place, os.fstat(sys.stdout.fileno()))
    except OSError:  # no such file yet, or a standard output that is none of the system's
        return False


def stdin_bytes() -> BinaryIO:
    """Return standard input for reading bytes; refuse a terminal, and one that is closed."""
    if sys.stdin is None:
        raise InputError("standard input is closed: pipe a file into it or name one instead of '-'")
    if sys.stdin.isatty():
        raise InputError("standard input is a terminal: pipe a file into it or name one instead of '-'")
    return sys.stdin.buffer


def stdout_bytes() -> BinaryIO:
    """Return standard output for writing bytes; refuse a terminal, and one that is closed."""
    _check_open()
    if sys.stdout.isatty():
        raise OutputError("standard output is a terminal: pipe it on or name a file instead of '-'")
    return sys.stdout.buffer


def _check_open() -> None:
    if sys.stdout is None:
        raise OutputError("standard output is closed: open it, or name a file to write")


def check_target(path: str | os.PathLike[str], overwrite: bool, *, text: bool = False) -> None:
    """Refuse early, before any work, what could not be written at the end.

    A link stands for what it points to. A named pipe or a device such as /dev/null takes what is written, and nothing
    is replaced.

    Parameters
    ----------
    text : bool
        A terminal may show it.

    Raises
    ------
    OutputError
        The file exists and `overwrite` is false, standard output is a terminal or closed, or the file's folder is
        missing or not writable.
    """
    if is_stdout(path):
        if text:
            _check_open()
        else:
            stdout_bytes()
        return
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, expected the name of a file to write")
    if _is_channel(target):
        return
    if target.exists() and not target.is_file():
        raise OutputError(f"{target}: is a disk or a socket, expected the name of a file to write")
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already; add --overwrite to replace it")
    folder = _behind_links(target).parent
    if not folder.is_dir():
        raise OutputError(f"{target}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{target}: the folder {folder} is not writable")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse early what cannot be a folder for results; it need not be there yet.

    Raises
    ------
    OutputError
        It is a file.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise OutputError(f"{os.fspath(path)}: is a file, expected a folder; give the results another name")


def check_outputs(
    outputs: Iterable[str | os.PathLike[str] | None], inputs: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Refuse early outputs of which one would replace another, or an input; links are followed.

    Parameters
    ----------
    outputs, inputs : iterable of path or None
        None stands for what was not asked for, ``-`` for standard output or input.

    Raises
    ------
    OutputError
        Two names are the same file.
    """
    read = {os.path.realpath(path) for path in inputs if path is not None and not is_stream(path)}
    seen: set[str] = set()
    for path in outputs:
        if path is None or (_is_channel(Path(path)) and not is_stdout(path)):
            continue
        place = STREAM if is_stdout(path) else os.path.realpath(path)
        name = "standard output" if is_stream(path) else os.fspath(path)
        if place in seen:
            raise OutputError(f"{name}: named for two outputs, expected a name of its own for each")
        if place in read:
            raise OutputError(f"{name}: is an input, which would be lost; give the output another name")
        seen.add(place)


def _is_channel(path: Path) -> bool:
    """Tell whether a path is a pipe or a device that takes bytes as they come, which must not become a file."""
    return path.is_fifo() or path.is_char_device()


def _behind_links(path: Path) -> Path:
    """Return the file that a link points to, existing or not; else the path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def _opened(channel: Path) -> Iterator[BinaryIO]:
    if not is_stdout(channel):
        with channel.open("wb") as stream:
            yield stream
        return
    yield sys.stdout.buffer  # opened anew, a file would begin again
    sys.stdout.buffer.flush()


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name beside `path` to write to; move it into place when the block ends without an error.

    A link stays, and the file that it points to is replaced; a pipe or a device gets the bytes.

    Raises
    ------
    OutputError
        Whatever the file system answers (disk full, no permission), with the name of the target. The previous
        file of that name stays, and no partial file is left behind.
    """
    target = Path(path)
    try:
        if _is_channel(target) or is_stdout(target):
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder) / "whole"
                yield partial
                with partial.open("rb") as source, _opened(target) as channel:
                    shutil.copyfileobj(source, channel)
            return
        place = _behind_links(target)
        partial = place.with_name(f".{place.name}.{os.getpid()}.part")
        try:
            yield partial
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)
    except OutputError:
        raise
    except OSError as error:
        if isinstance(error, BrokenPipeError) and is_stdout(target):
            raise  # the reader has what it wants
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole, or print it for ``-``."""
    if is_stream(path):
        _check_open()
        sys.stdout.write(text)
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not at the interpreter's exit
        return
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
