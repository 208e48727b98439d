"""Work shared by threads: numpy, scipy and the compiled loops let go of the interpreter's lock."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_M_TOP_PAD, _KEPT = -2, 16 * 2**20  # of glibc's malloc.h; bytes for each thread


def default_threads() -> int:
    """Return the number of cores that this process may use, at most OMP_NUM_THREADS where that is set."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) > 0 else cores


@functools.cache
def _keep_freed_memory() -> None:
    """Let malloc keep the arrays that a loop over slabs makes again and again, where the C library is glibc.

    By default it hands each back to the system, and the page faults of the next one take longer than the arithmetic.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_TOP_PAD, _KEPT)


def parts(length: int, step: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of at most `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def parallel(work: Callable[[slice], T], pieces: Iterable[slice], threads: int | None = None) -> list[T]:
    """Do the pieces in threads, all cores by default; return the results in the pieces' order."""
    _keep_freed_memory()
    pieces = list(pieces)
    threads = min(threads or default_threads(), len(pieces))
    if threads <= 1:
        return [work(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(work, pieces))
