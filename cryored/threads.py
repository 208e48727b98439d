"""Work shared by threads: numpy, scipy and the compiled loops let go of the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def default_threads() -> int:
    """Return the number of cores that this process may use, at most OMP_NUM_THREADS where that is set."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) > 0 else cores


def parts(length: int, step: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of at most `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def parallel(work: Callable[[slice], T], pieces: Iterable[slice], threads: int | None = None) -> list[T]:
    """Do the pieces in threads, all cores by default; return the results in the pieces' order."""
    pieces = list(pieces)
    threads = min(threads or default_threads(), len(pieces))
    if threads <= 1:
        return [work(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(work, pieces))
