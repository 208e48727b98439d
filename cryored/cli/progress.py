"""Progress on standard error: a bar on a terminal, a line now and then without one."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

_LINE_EVERY = 60.0  # seconds between lines where there is no terminal

Advance = Callable[..., None]


def terminal() -> Console | None:
    """Return a console on standard error where somebody looks: a terminal, and no --quiet."""
    if sys.stderr is None or not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO):
        return None  # without loading rich, for which RELION's hook has no time
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal else None


@contextmanager
def bar(what: str, total: int, *, time_left: bool = True) -> Iterator[Advance]:
    """Give a function ``advance(done, total, note="")`` that shows how far a long job is.

    Parameters
    ----------
    time_left : bool
        Show it; False where the note does.
    """
    console = terminal()
    if console is None:
        yield _lines(what)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TimeRemainingColumn()] if time_left else []),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total or None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield advance


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that something lasts whose end is not known."""
    console = terminal()
    if console is None:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _lines(what: str) -> Advance:
    last = time.monotonic()

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _LINE_EVERY:
            last = time.monotonic()
            logger.info("%s: %d of %d %s", what, done, total, note)

    return advance
