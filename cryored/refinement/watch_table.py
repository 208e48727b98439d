"""What ``cryored watch`` shows of each request: a live table on a terminal, else a line in the log."""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

import rich.box
import rich.table
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

logger = logging.getLogger(__name__)

# A column and the steps of `Entry.seconds` that it adds up.
STEPS = {
    "waited": ("waited",),
    "read": ("read",),
    "FFT": ("map", "unregularised", "update"),
    "network": ("load", "network"),
    "write": ("write",),
}

_ROWS = 20
_REASONS = 3  # failures whose reason stays in sight
_PART = re.compile(r"_(class|body)0*(\d+)")


@dataclass(frozen=True)
class Entry:
    """One request that was answered, or could not be.

    Parameters
    ----------
    name : str
        RELION's for the map, such as ``run_it003_half1_class001``.
    iteration : int or None
    half : int or None
        None in Class3D, and for the map of all particles that ends an auto-refinement.
    resolution : float or None
        Nominal, in angstrom: infinity where nothing is resolved, None where the request has no FSC.
    lam : float
        Weight of the prior.
    seconds : dict
        Wall time of each step; those that were not needed may be missing.
    change : float
        Relative L2 difference of the result to the MAP map.
    device : str
        Where the network ran.
    error : str
        Why it failed, else empty.
    estimated : bool
        The resolution is not by half-maps, which a class has not, but by tau2 and K.
    power_ratio : float
        Variance of the result over that of the MAP map.
    beside : str
        Name of the map with the prior, which lambda, change and power ratio are of, where RELION got plain MAP: in
        its last iteration. Else empty.
    options : mapping of str to str
        What it was answered with, in words.
    """

    name: str
    iteration: int | None
    half: int | None
    resolution: float | None
    lam: float
    seconds: dict[str, float]
    change: float
    device: str
    error: str = ""
    estimated: bool = False
    power_ratio: float = 1.0
    beside: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> str:
        """Say of an answer that RELION got plain MAP, and where the map with the prior is; empty of others."""
        return f"plain MAP (last iteration), with the prior: {self.beside}" if self.beside else ""

    @property
    def _is_class(self) -> bool:
        """Whether there are no half-maps: only Class3D asks without an FSC."""
        return self.half is None and (self.resolution is None or self.estimated)

    @property
    def part(self) -> str:
        """What there is one map of beside others: "class 2" in Class3D, "body 1"; empty in a plain refinement."""
        parts = dict(_PART.findall(self.name))
        if "body" in parts:
            return f"body {parts['body']}"
        return f"class {parts['class']}" if self._is_class and "class" in parts else ""

    @property
    def label(self) -> str:
        """Which of an iteration's maps it is: "half 1", "half 2 body 1", "joined", "class 2"."""
        joined = "" if self._is_class else "joined"
        return f"{joined if self.half is None else f'half {self.half}'} {self.part}".strip()


class Table:
    """The latest requests, as a context manager.

    Parameters
    ----------
    titles : str
        Lines above the table: folder, model, where lambda comes from.
    console : rich.console.Console, optional
        Terminal to draw on. Without one each request is a line in the log, a failed one a warning.
    """

    def __init__(self, *titles: str, console: Console | None = None) -> None:
        self._titles = titles
        self._latest: deque[Entry] = deque(maxlen=_ROWS)
        self._failed: deque[Entry] = deque(maxlen=_REASONS)
        self._served = self._failures = 0
        self._state = "starting"
        # Drawn when something happens, not by a thread. Log lines appear above it; standard output is for results.
        live = None if console is None else Live(self, console=console, auto_refresh=False, redirect_stdout=False)
        self._live = live

    def __enter__(self) -> Table:
        """Begin to show."""
        if self._live is None:
            for title in self._titles:
                logger.info("%s", title)
        else:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last table on the terminal."""
        if self._live is not None:
            self._live.stop()

    def add(self, entry: Entry) -> None:
        """Show a request."""
        self._latest.append(entry)
        if entry.error:
            self._failures += 1
            self._failed.append(entry)
        else:
            self._served += 1
        if self._live is not None:
            self._live.refresh()
        elif entry.error:
            logger.warning("%s: failed: %s", entry.name, entry.error)
        else:
            logger.info("%s", _line(entry))

    def state(self, text: str) -> None:
        """Say what is being done: "waiting", "busy run_it003_half1_class001". Only a terminal shows it."""
        self._state = text
        if self._live is not None:
            self._live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw: titles, counts and state, table, reasons of failures."""
        for title in self._titles:
            yield Text(title, overflow="ellipsis", no_wrap=True)
        failures = (f", {self._failures} failed", "red") if self._failures else ""
        yield Text.assemble(f"{self._served} served", failures, "; ", (self._state, "bold"), no_wrap=True)
        # Lines of more than the terminal's height could not be drawn over; the table takes five beside its rows.
        plain = [entry for entry in self._latest if entry.plain][-_REASONS:]
        room = console.height - len(self._titles) - 6 - 2 * (len(self._failed) + len(plain))
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=0)
        table.add_column("\niter", justify="right", no_wrap=True)
        table.add_column("\nmap", no_wrap=True)
        for head in ("resol.\nA", "lambda\n", *(f"{column}\ns" for column in STEPS), "change\n%"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("\ndevice")  # the one that gives way in a narrow terminal
        for entry in list(self._latest)[-max(room, 1) :]:
            cells = (Text(cell, no_wrap=True, overflow="ellipsis") for cell in _cells(entry))
            table.add_row(*cells, style="red" if entry.error else None)
        yield table
        for entry in plain:
            yield Text(f"* {entry.plain}")
        for entry in self._failed:
            yield Text(f"{entry.name}: {entry.error}", style="red")


def add_steps(seconds: dict[str, float]) -> dict[str, float]:
    """Return the seconds of each column of `STEPS`, without those of which no step was taken."""
    taken = {column: [seconds[step] for step in steps if step in seconds] for column, steps in STEPS.items()}
    return {column: sum(values) for column, values in taken.items() if values}


def resolution_text(resolution: float | None) -> str:
    """Return a nominal resolution in angstrom with two decimals, "none" for infinity, nothing without an FSC."""
    if resolution is None:
        return ""
    return "none" if math.isinf(resolution) else f"{resolution:.2f}"


def _cells(entry: Entry) -> list[str]:
    seconds = add_steps(entry.seconds)
    return [
        "" if entry.iteration is None else str(entry.iteration),
        f"{entry.label}{'*' if entry.plain else ''}",
        resolution_text(entry.resolution),
        "" if entry.error else f"{entry.lam:.3f}",
        *(f"{seconds[column]:.2f}" if column in seconds else "" for column in STEPS),
        "failed" if entry.error else f"{100 * entry.change:.2f}",
        entry.device,
    ]


def _line(entry: Entry) -> str:
    resolution = resolution_text(entry.resolution)
    if resolution:
        resolution = "nothing resolved, " if resolution == "none" else f"resolution {resolution} A, "
    seconds = ", ".join(f"{column} {value:.2f}" for column, value in add_steps(entry.seconds).items())
    change = f"lambda {entry.lam:.3f}, change {100 * entry.change:.2f} %"
    plain = f"{entry.plain}, " if entry.plain else ""
    return f"{entry.name}: {plain}{resolution}{change}; {seconds} s; {entry.device}"
