"""The resident updater: serve the requests of a running refinement with the model loaded once."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cryored.errors import CryoredError, InputError, in_words
from cryored.files.jobs import job_end
from cryored.files.requests import ENDING, Request, is_request, parts_of, project_folder, read_request_file
from cryored.memory import free_memory
from cryored.prior.budget import memory_in_use
from cryored.prior.models import check_weights
from cryored.prior.weights import ShellWeights
from cryored.reconstruction.sums import load_sums, with_fsc
from cryored.refinement.bounds import check_memory, expect, expect_at_most
from cryored.refinement.mailbox import Inbox, Presence
from cryored.refinement.red_update import (
    AS_ASKED,
    DENOISED,
    ROOT,
    Files,
    Outputs,
    plan_outputs,
    told_lambda,
    told_options,
)
from cryored.refinement.report import Report, add_logged, check_report, run_state
from cryored.refinement.run_logs import read_logs
from cryored.refinement.updater import Answer, Maps, Updater, timed
from cryored.refinement.watch_table import Entry, Table

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

_LOOK_EVERY = 0.01  # seconds between looks for hand-overs
_POLL_EVERY = 0.5  # seconds between looks for requests that nobody hands over
_END_EVERY = 2.0  # seconds between looks for the end of the run


class Order(Protocol):
    """A request that somebody waits for."""

    @property
    def star(self) -> str:
        """The request as RELION names it."""

    @property
    def folder(self) -> Path:
        """RELION's project folder."""

    def accept(self) -> None:
        """Say that it is being answered."""

    def still_wanted(self) -> bool:
        """Tell whether the answer still has a reader; otherwise somebody else is about to write it."""

    def done(self) -> None:
        """Say that the result is in place."""

    def failed(self, message: str) -> None:
        """Say why there is no result."""

    def declined(self, message: str) -> None:
        """Say why somebody else has to do it."""


Shown = tuple[Entry, Maps, Answer]


@dataclass(frozen=True)
class _Case:
    """An order that is being worked on."""

    order: Order
    outputs: Outputs
    maps: Maps
    seconds: Mapping[str, float]
    begin: float


class Server:
    """Answers orders with one updater, and shows each.

    Parameters
    ----------
    folder : Path
        Nothing outside it is written or removed.
    updater : Updater
    files : Files
        Its output and denoised map are not looked at.
    show : callable
        Gets the entry of each order, and its maps and answer where there is one.
    """

    def __init__(
        self,
        folder: Path,
        updater: Updater,
        files: Files = AS_ASKED,
        *,
        show: Callable[[Entry, Maps | None, Answer | None], None] = lambda *shown: None,
    ) -> None:
        self._folder = folder.resolve()
        self._updater = updater
        self._files = files
        self._show = show
        self._told: set[tuple[int, float]] = set()  # boxes and paddings whose bounds were told

    def serve(self, orders: Sequence[Order], more: Callable[[], Sequence[Order]] = lambda: ()) -> None:
        """Answer orders, two together where memory allows: the halves of an iteration.

        Parameters
        ----------
        orders : sequence of Order
        more : callable
            Is asked for what has come while a single one was read, most often the other half of the iteration: waiting
            for it would be wrong where RELION reconstructs the halves one after the other.
        """
        if not self._fit_together(orders):
            for order in orders:
                self._answer([order])
            return
        waiting = list(orders)
        while waiting:
            pair, waiting = waiting[:2], waiting[2:]
            waiting += self._answer(pair, more)

    def _fit_together(self, orders: Sequence[Order]) -> bool:
        """Tell whether memory suffices for the halves together; say of a new box what it takes."""
        try:
            request = self._read(orders[0])
            expected = expect_at_most(request, self._updater, 2)
        except (CryoredError, OSError, ValueError):
            return True  # whoever answers it will say what is wrong
        room, free = self._updater.denoiser.max_memory, free_memory()
        if room is None and free is not None:
            room = free + memory_in_use()
        together = room is None or expected.memory <= room
        shape = request.ori, request.pad
        if shape not in self._told:
            self._told.add(shape)
            logger.info(
                "box %d, padding %g: %s for %s",
                request.ori,
                request.pad,
                (expected if together else expect_at_most(request, self._updater, 1)).in_words(),
                "both halves together" if together else "a half; memory does not suffice for both together",
            )
        return together

    def _read(self, order: Order) -> Request:
        return read_request_file(
            order.star,
            folder=order.folder,
            angpix=self._files.angpix,
            needs_pixel_size=self._updater.settings.lam != 0,
        )

    def _answer(self, orders: Sequence[Order], more: Callable[[], Sequence[Order]] = lambda: ()) -> Sequence[Order]:
        """Answer one order, and one that has come in the meantime, or two; return what else has come."""
        cases = list(self._begin(orders))
        came = more() if len(orders) == 1 else ()
        cases += self._begin(came[:1])
        try:
            denoised = self._updater.denoise([case.maps for case in cases])
        except Exception as error:
            for case in cases:
                self._fail(case.order, error)
            return came[1:]
        # Pictures take time: first all answers, then what is shown of them.
        for shown in [self._finish(case, maps) for case, maps in zip(cases, denoised, strict=True)]:
            if shown is not None:
                _keep(partial(self._show, *shown))
        return came[1:]

    def _begin(self, orders: Sequence[Order]) -> Iterator[_Case]:
        seen = time.monotonic()
        for order in orders:
            seconds: dict[str, float] = {}
            begin = time.monotonic()
            seconds["waited"] = begin - seen
            try:
                order.accept()
                with timed(seconds, "read"):
                    request = self._read(order)
                    outside = self._outside(request)
                    if outside is not None:
                        logger.warning("%s: %s lies outside %s: declined", order.star, outside, self._folder)
                        order.declined(f"{outside} lies outside {self._folder}, which is what the watcher serves")
                        continue
                    request = with_fsc(request, self._updater.settings.threads)
                    outputs = plan_outputs(order.star, request, self._updater, "watch", self._files)
                    check_memory(expect(request, self._updater), self._updater.denoiser.max_memory, order.star)
                    sums = load_sums(request, self._updater.settings.threads)
                maps = self._updater.begin(request, sums)
            except Exception as error:
                self._fail(order, error)
                continue
            yield _Case(order, outputs, maps, seconds, begin)

    def _finish(self, case: _Case, maps: Maps) -> Shown | None:
        order = case.order
        try:
            answer = self._updater.finish(maps)
            if not order.still_wanted():
                logger.warning("%s: the hook did not wait for the answer; nothing written", order.star)
                return None
            record = case.outputs.write(self._updater, maps, answer)
            line = case.outputs.log(record, {**case.seconds, "total": time.monotonic() - case.begin})
            if order.still_wanted():  # a hook that gave up in this moment needs the arrays itself
                case.outputs.tidy()
        except Exception as error:
            self._fail(order, error)
            return None
        order.done()
        name = _name(order)
        entry = Entry(
            name,
            *parts_of(name),
            maps.resolution,
            maps.lam,
            line["seconds"],
            answer.change,
            line["device"],
            estimated=maps.request.estimated,
            power_ratio=answer.power_ratio,
            beside=Path(case.outputs.beside or "").name,
            options=told_options(line),
        )
        return entry, maps, answer

    def _fail(self, order: Order, error: Exception) -> None:
        message = _message(error)
        order.failed(message)
        name = _name(order)
        entry = Entry(name, *parts_of(name), None, 0.0, {}, 0.0, "", message)
        _keep(partial(self._show, entry, None, None))

    def _outside(self, request: Request) -> Path | None:
        """Return a file that would be written or removed outside the folder, if there is one."""
        touched = [request.result, request.log, Path(request.root + DENOISED)]
        touched += [] if request.result_star is None else [request.result_star]
        touched += [request.data_real, request.data_imag, request.weight] if self._files.clean else []
        if self._files.unregularised is not None:
            touched.append(Path(self._files.unregularised.replace(ROOT, request.root)))
        for path in touched:
            if not path.resolve().is_relative_to(self._folder):
                return path
        return None


def _name(order: Order) -> str:
    """Return RELION's name for the map that is asked for, such as ``run_it003_half1_class001``."""
    return Path(order.star).with_suffix("").name.removesuffix(ENDING)


def _message(error: Exception) -> str:
    logger.debug("%s", error, exc_info=True)
    return in_words(error)


@dataclass
class _Found:
    """An order of `Poll`: nobody waits but for the result itself."""

    star: str
    folder: Path

    def accept(self) -> None:
        pass

    def still_wanted(self) -> bool:
        return True

    def done(self) -> None:
        pass

    def failed(self, message: str) -> None:
        pass

    def declined(self, message: str) -> None:
        pass


@dataclass
class Poll:
    """Looks for requests without a result that nobody hands over.

    Parameters
    ----------
    folder : Path
    """

    folder: Path
    _looked: float = -np.inf
    # What a request was when it was last seen: one that RELION has just written is left to the next look.
    _seen: dict[Path, tuple[int, int]] = field(default_factory=dict)
    # What it was when it was answered: one that --continue writes anew comes again.
    _answered: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def orders(self) -> list[_Found]:
        """Return the requests to answer now."""
        now = time.monotonic()
        if now - self._looked < _POLL_EVERY:
            return []
        self._looked = now
        found = []
        for star in sorted(self.folder.glob(f"*{ENDING}.star")):
            state = _state(star)
            if state is None or self._answered.get(star) == state:
                continue
            if star not in self._answered and star.with_suffix(".mrc").exists():
                self._answered[star] = state  # by an earlier run, or a hook by itself
            elif self._seen.get(star) == state and is_request(str(star)):
                self._answered[star] = state
                try:
                    project = project_folder(star)
                    found.append(_Found(os.path.relpath(star.resolve(), project), project))
                except InputError as error:
                    logger.warning("%s", error)
            self._seen[star] = state
        return found

    def leave(self, star: Path) -> None:
        """Take no notice of a request that was handed over, until it is written anew."""
        star = self.folder / star.name
        state = _state(star)
        if state is not None:
            self._answered[star] = state


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


@dataclass(frozen=True)
class WatchOptions:
    """What a watcher does besides answering as red-update does.

    Parameters
    ----------
    hook_options : tuple of str
        With which the hook goes on by itself where this process no longer answers.
    poll : bool
        Look for requests that nobody hands over, too.
    report : str, optional
        HTML file. One that is there is continued, with what was logged in the folder before.
    overwrite : bool
        Of the report, where another file is there.
    until_done : bool
        End when RELION has ended the run.
    """

    hook_options: tuple[str, ...] = ()
    poll: bool = False
    report: str | None = None
    overwrite: bool = False
    until_done: bool = False


def watch_folder(
    folder: str,
    updater: Updater,
    files: Files,
    options: WatchOptions,
    *,
    console: Console | None = None,
    stop: Callable[[], bool],
) -> None:
    """Serve the requests of one folder until `stop` says so; see the help of ``cryored watch``.

    Parameters
    ----------
    folder : str
        Where RELION writes its requests.
    updater : Updater
    files : Files
        Its output and denoised map are not looked at.
    options : WatchOptions
    console : rich.console.Console, optional
        Terminal for a live table; without one each request is a line in the log.
    stop : callable
        Tells whether to end; the current requests are answered first.

    Raises
    ------
    OutputError
        The folder is missing or not writable, is served by another watcher, or has gone.
    """
    place, settings, card = Path(folder), updater.settings, updater.model.card
    rule = told_lambda(settings.lam, updater.schedule.source if settings.lam is None else None)
    model = f"{card.name} ({card.sha256[:8]})"
    pages, end = None, RunEnd(place)
    # Before the model is loaded, which takes long.
    presence = Presence(place, options.hook_options)
    presence.check_free()
    if end.before is not None:
        logger.info("%s: this run has ended (%s); waiting for a new one, or for --continue", folder, end.before)
    if options.report is not None:
        check_report(options.report, options.overwrite)
        facts = {"Folder": folder, "Model": model, "Lambda": rule, "Weights": updater.rule()}
        pages = Report(options.report, f"cryored watch {folder}", facts, live=True)
        _keep(partial(add_logged, pages, read_logs(place)))
    if settings.lam != 0:
        check_weights(updater.model)
        logger.info("%s: loading model %s ...", folder, model)
        updater.denoiser.load()
    titles = (f"cryored watch {folder}", f"model {model}", f"lambda {rule}; weights {updater.rule()}")
    with presence, Table(*titles, console=console) as table:
        server = Server(place, updater, files, show=_shown(updater, table, pages))
        inbox, looking = Inbox(place, presence.token), Poll(place) if options.poll else None

        def handed_over() -> Sequence[Order]:
            orders = inbox.waiting()
            if looking is not None:
                for order in orders:
                    looking.leave(Path(order.star))
            return orders

        told = False
        table.state("waiting")
        try:
            while not stop() and not (told and options.until_done):
                presence.check()
                orders: Sequence[Order] = handed_over() or (looking.orders() if looking else [])
                if orders:
                    table.state(f"busy {_name(orders[0])}")
                    server.serve(orders, handed_over)
                    if pages is not None and (stop() or not inbox.waiting()):
                        _keep(pages.write)
                    table.state("waiting")
                    told = False
                elif end.has_come() and not told:  # looked for in any case: one end may leave several traces
                    told = True
                    logger.info("%s: RELION has ended the run", folder)
                    table.state("RELION has ended the run")
                else:
                    time.sleep(_LOOK_EVERY)
        finally:  # also where the place is lost
            if pages is not None:
                _keep(lambda: pages.close(run_state(place)))
        table.state("ended")


def _keep(show: Callable[[], None]) -> None:
    """Show an order or write the report; a refinement shall not die of it."""
    try:
        show()
    except Exception as error:
        logger.warning("not shown: %s", _message(error))


def _shown(updater: Updater, table: Table, pages: Report | None) -> Callable[[Entry, Maps | None, Answer | None], None]:
    """Return what takes in each order: the table, and the report with its maps."""

    def show(entry: Entry, maps: Maps | None, answer: Answer | None) -> None:
        table.add(entry)
        if pages is None:
            return
        if maps is None or answer is None:
            pages.add(entry)
            return
        request = maps.request
        # As from the files afterwards: what RELION got, and in its last iteration the map with the prior beside that.
        denoised, result = (answer.result, maps.regularised) if entry.beside else (maps.denoised, answer.result)
        shown = {"unregularised": updater.unregularised(maps), "denoised": denoised, "result": result}
        sections = {name: volume.data[len(volume.data) // 2] for name, volume in shown.items() if volume is not None}
        weights = updater.shell_weights(request, maps.lam)
        known = ShellWeights(weights.precision[: request.r_max + 1], weights.gain[: request.r_max + 1])
        frequency = request.frequency if request.pixel_size else None  # which lambda 0 does without
        pages.add(entry, frequency, request.fsc, sections, known)

    return show


class RunEnd:
    """Tells when RELION has ended a run since this was made; one that had ended before may be continued.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looked = time.monotonic()
        self._before = self._mark()

    @property
    def before(self) -> str | None:
        """Name of the file by which the run had ended when this was made."""
        return None if self._before is None else self._before[0].name

    def has_come(self) -> bool:
        """Look, at most every two seconds; an end is told once, also where a continued run leaves its traces there."""
        if time.monotonic() - self._looked < _END_EVERY:
            return False
        self._looked = time.monotonic()
        mark = self._mark()
        if mark is None or mark == self._before:
            return False
        self._before = mark
        return True

    def _mark(self) -> tuple[Path, tuple[int, int] | None] | None:
        try:
            end = job_end(self._folder)
        except (InputError, OSError):  # nothing there yet, or RELION is writing it
            return None
        return None if end is None else (end, _state(end))
