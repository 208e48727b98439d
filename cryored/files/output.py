"""Files come into being whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cryored.errors import OutputError

STREAM = "-"  # the name of standard input and output on the command line


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Tell whether `path` stands for standard input or output."""
    return os.fspath(path) == STREAM


def stdin_bytes() -> BinaryIO:
    """Return standard input for reading bytes; refuse a terminal."""
    if sys.stdin.isatty():
        raise OutputError("standard input is a terminal: pipe a file into it or name one instead of '-'")
    return sys.stdin.buffer


def stdout_bytes() -> BinaryIO:
    """Return standard output for writing bytes; refuse a terminal."""
    if sys.stdout.isatty():
        raise OutputError("standard output is a terminal: pipe it on or name a file instead of '-'")
    return sys.stdout.buffer


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse early, before any work, what could not be written at the end.

    Raises
    ------
    OutputError
        The file exists and `overwrite` is false, or its folder is missing or not writable.
    """
    if is_stream(path):
        stdout_bytes()
        return
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, expected the name of a file to write")
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already; add --overwrite to replace it")
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(f"{target}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{target}: the folder {folder} is not writable")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name beside `path` to write to; move it into place when the block ends without an error.

    Raises
    ------
    OutputError
        Whatever the file system answers (disk full, no permission), with the name of the target. The previous
        file of that name stays, and no partial file is left behind.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole, or print it for ``-``."""
    if is_stream(path):
        sys.stdout.write(text)
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not at the interpreter's exit
        return
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
