"""The same function for many tasks: in this process, in several, or on a Dask cluster.

Imports neither numpy nor what does, so that a child process can set its threads before numpy looks.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from cryored.errors import CryoredError
from cryored.threads import default_threads

logger = logging.getLogger(__name__)

_AHEAD = 1000  # tasks given out before the first of them is back: enough for hundreds of workers
_ANSWER = 10  # seconds that a scheduler has to answer
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

T = TypeVar("T")
R = TypeVar("R")
Submit = Callable[..., Any]  # function, task -> future


def run_tasks(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[R]:
    """Yield ``function(task)`` of each task, in the order of the tasks.

    Parameters
    ----------
    function : callable
        Where there are other processes: of a module's top level (or a `functools.partial` of one), and with results
        and errors that can be pickled.
    tasks : sequence
    jobs : int
        Processes on this machine; with 1, this process does the work. The cores are divided among them.
    scheduler : str, optional
        Address of a Dask scheduler (``tcp://host:8786``), whose workers do the work instead.
    progress : callable
        Is told the numbers of finished and of all tasks, at first and after each.

    Raises
    ------
    CryoredError
        A process has died, the scheduler does not answer or loses its workers, or `distributed` is not installed.
    Exception
        What `function` has raised; the tasks that are under way are given up.
    """
    if scheduler is not None:
        results = _on_cluster(function, tasks, scheduler)
    elif jobs > 1:
        results = _in_processes(function, tasks, jobs)
    else:
        results = (function(task) for task in tasks)
    progress(0, len(tasks))
    with closing(results):
        for done, result in enumerate(results, 1):
            progress(done, len(tasks))
            yield result


def _recorded(function: Callable[[T], R], task: T) -> tuple[R, list[str]]:
    """Do a task in another process; return the warnings that it has logged beside its result."""
    messages = _Messages(logging.WARNING)
    log = logging.getLogger("cryored")
    log.addHandler(messages)
    try:
        return function(task), messages.texts
    finally:
        log.removeHandler(messages)


class _Messages(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _in_order(submit: Submit, function: Callable[[T], R], tasks: Sequence[T]) -> Generator[R, None, None]:
    """Yield results in order, with a bounded number of tasks under way; repeat each warning once."""
    coming = iter(tasks)
    work = partial(_recorded, function)
    waiting = deque(submit(work, task) for task in islice(coming, _AHEAD))
    told = set()
    while waiting:
        result, warnings = waiting.popleft().result()
        for text in dict.fromkeys(warnings):
            if text not in told:
                logger.warning("%s", text)
        told.update(warnings)
        yield result
        waiting.extend(submit(work, task) for task in islice(coming, 1))


def _in_processes(function: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Generator[R, None, None]:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    threads = max(1, default_threads() // jobs)
    executor = ProcessPoolExecutor(jobs, context, _begin, (reader, threads))
    try:
        yield from _in_order(executor.submit, function, tasks)
    except BrokenProcessPool:
        raise CryoredError(
            f"one of {jobs} processes was killed, for want of memory perhaps; what was finished is kept: use fewer "
            "--jobs and run it again"
        ) from None
    finally:
        writer.close()
        executor.shutdown(cancel_futures=True)
        reader.close()


def _begin(lifeline: Connection, threads: int) -> None:
    """Set up a child process: it leaves Control-C to its parent, and ends when that does or tells it to."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group of processes
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    # The other end closes when the parent has no more to do, stops, or is killed; nothing is ever sent.
    lifeline.poll(None)
    os._exit(1)


def _on_cluster(function: Callable[[T], R], tasks: Sequence[T], scheduler: str) -> Generator[R, None, None]:
    try:
        from distributed import Client
        from distributed.comm import connect
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise CryoredError("--scheduler needs Dask's distributed: pip install 'cryored[cluster]'") from error

    async def ring() -> None:
        connection = await connect(scheduler, timeout=_ANSWER)
        await connection.close()

    try:
        asyncio.run(ring())  # before a client is made: one that fails to connect holds up the interpreter's exit
    except (OSError, ValueError) as error:
        raise CryoredError(
            f"{scheduler}: no Dask scheduler answers ({_one_line(error)}); start one with `dask scheduler`"
        ) from error
    # It prints a traceback when the connection breaks; that is told below in one line.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    # Closing the client gives up the tasks whose results it still waits for.
    with Client(scheduler, timeout=_ANSWER, set_as_default=False) as client:
        if not client.scheduler_info()["workers"]:
            logger.warning("%s: no workers yet; start some with `dask worker --nthreads 1 %s`", scheduler, scheduler)
        # Not pure: an earlier result of the same task says nothing about the files of this run.
        submit = partial(client.submit, pure=False)
        try:
            yield from _in_order(submit, function, tasks)
        except KilledWorker:
            raise CryoredError(
                f"{scheduler}: several workers were killed at the same task, for want of memory perhaps; their logs "
                "tell; what was finished is kept: run it again"
            ) from None
        except RuntimeError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            raise CryoredError(
                f"{scheduler}: a worker cannot load the task ({error.__cause__}); install this version of cryored "
                "where the workers run"
            ) from None
        except CancelledError:
            raise CryoredError(
                f"{scheduler}: the scheduler has gone, or cancelled the work; what was finished is kept: run it again"
            ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
