"""Simulate particles of atomic models, refine them with RELION, harvest training pairs: what `harvest-relion` does."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

from cryored.errors import CryoredError, InputError
from cryored.simulation.workers import run_tasks

logger = logging.getLogger(__name__)

ARRAYS = ("data_real", "data_imag", "weight")  # what RELION leaves of each request


@dataclass(frozen=True)
class Settings:
    """What decides a data set and its refinement; recorded beside it.

    Parameters
    ----------
    structure : str
        Name of the atomic model's file, without its folder.
    snr : float
        Variance of the noise-free particles over that of the noise.
    number, box : int
        Particles, and their edge in pixels.
    angpix : float
        Pixel size in angstrom.
    perturb_angles : float
        Root mean square error of the start angles in degrees.
    seed : int
    """

    structure: str
    snr: float
    number: int
    box: int
    angpix: float
    perturb_angles: float
    seed: int


@dataclass(frozen=True)
class Task:
    """One refinement to be done."""

    path: str
    folder: Path
    settings: Settings

    @property
    def name(self) -> str:
        """Name of the structure."""
        return _name(self.path)

    @property
    def label(self) -> str:
        """What the task is called in messages."""
        return self.folder.name

    @property
    def table(self) -> Path:
        """The pairs that it gives."""
        return self.folder / "pairs" / "pairs.star"


@dataclass(frozen=True)
class Options:
    """How pairs are made of the refinements, the same for all.

    Parameters
    ----------
    float16 : bool
        Write maps of half the size.
    keep : bool
        Leave RELION's arrays and the stack of particles.
    timeout : float
        Seconds that a refinement may take.
    manifest, part : str or None, str
        Table of a split, and the part that the structures have to be of.
    """

    float16: bool = False
    keep: bool = False
    timeout: float = 7200
    manifest: str | None = None
    part: str = "train"


def do_task(task: Task, opts: Options, on_iteration: Callable[[int], None], stop: threading.Event) -> None:
    """Do a task, or what is left of it: data set, refinement and pairs are each made once.

    A refinement that was interrupted is begun anew.

    Parameters
    ----------
    task : Task
    opts : Options
    on_iteration, stop
        See `cryored.refinement.relion_runs.refine`.

    Raises
    ------
    InputError
        The folder holds a data set of other settings, or the structure does not fit the box.
    RefinementError
        RELION failed or was stopped.
    """
    from cryored.refinement.relion_runs import RELION_HOOK, make_data, refine
    from cryored.simulation.harvest import HarvestOptions, harvest_files

    check_settings(task)
    run = task.folder / "run"
    if not task.table.exists():
        what = task.settings
        data = make_data(
            task.path,
            task.folder,
            box=what.box,
            angpix=what.angpix,
            number=what.number,
            snr=what.snr,
            perturb=what.perturb_angles,
            seed=what.seed,
        )
        refined = run / "refined"
        if not refined.exists():
            refine(data, run.name, RELION_HOOK, timeout=opts.timeout, on_iteration=on_iteration, stop=stop)
            refined.touch()
        kept = HarvestOptions(task.name, float16=opts.float16, manifest=opts.manifest, part=opts.part)
        harvest_files(str(run), str(data.truth), str(task.table.parent), kept)
    if not opts.keep:
        for kind in ARRAYS:
            for path in run.glob(f"*_external_reconstruct_{kind}.mrc"):
                path.unlink()
        (task.folder / "particles.mrcs").unlink(missing_ok=True)


def check_settings(task: Task) -> None:
    """Record what a folder is made with; refuse one that was made with something else."""
    from cryored.files.output import write_text

    record = task.folder / "settings.json"
    asked = asdict(task.settings)
    if record.exists():
        try:
            found = json.loads(record.read_text())
        except ValueError as error:
            raise InputError(f"{record}: no readable JSON ({error}); remove {task.folder}") from None
        for key, value in asked.items():
            if found.get(key) != value:
                raise InputError(
                    f"{record}: {key} is {found.get(key)}, asked for is {value}; use another --output or remove it"
                )
        return
    task.folder.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(asked, indent=2) + "\n")


def _name(path: str) -> str:
    return Path(path).name.split(".")[0]


def plan(
    structures: Sequence[str],
    output: Path,
    *,
    snr: Sequence[float],
    number: int,
    box: int,
    angpix: float,
    perturb_angles: float,
    seed: int,
    shard: tuple[int, int] = (1, 1),
) -> list[Task]:
    """Lay out the tasks of a shard; the signal-to-noise ratios go round over all structures.

    Raises
    ------
    InputError
        Two structures have the same name.
    """
    names = [_name(path) for path in structures]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise InputError(f"{twins[0]}: two structures of this name; their refinements would overwrite each other")
    tasks = []
    for index, (path, name) in enumerate(zip(structures, names, strict=True)):
        ratio = snr[index % len(snr)]
        # The name makes the seed the structure's own, in whatever order structures are given.
        own = (seed + zlib.crc32(name.encode())) % 2**31
        settings = Settings(Path(path).name, ratio, number, box, angpix, perturb_angles, own)
        tasks.append(Task(path, output / f"{name}_snr{ratio:g}", settings))
    first, step = shard
    return tasks[first - 1 :: step]


class Display:
    """Progress on standard error: a line for each running refinement on a terminal, a line a step without one."""

    def __init__(self, total: int, jobs: int) -> None:
        from rich.console import Console
        from rich.progress import Progress, TextColumn, TimeElapsedColumn

        self._total, self._jobs = total, jobs
        self._seconds: list[float] = []  # of each task that has ended
        self._begin: dict[str, float] = {}
        console = Console(stderr=True)
        self._live = console.is_terminal and logger.isEnabledFor(logging.INFO)
        self._rich = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._bars = {"": self._rich.add_task(f"{total} refinements", total=None, state="")}

    def __enter__(self) -> Display:
        """Show the progress until the block ends."""
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take it off the terminal."""
        self._rich.stop()

    def begin(self, label: str) -> None:
        """Show that a task has begun."""
        self._begin[label] = time.monotonic()
        if self._live:
            self._bars[label] = self._rich.add_task(label, total=None, state="making particles")
        else:
            logger.info("%s: begun", label)

    def iteration(self, label: str, number: int) -> None:
        """Show that a refinement has ended an iteration."""
        if self._live:
            self._rich.update(self._bars[label], state=f"iteration {number}")
        else:
            logger.info("%s: iteration %d, %.0f s", label, number, time.monotonic() - self._begin[label])

    def end(self, label: str, outcome: str) -> None:
        """Show that a task has ended."""
        begin = self._begin.pop(label, None)
        if begin is None:
            return  # it was finished before
        self._seconds.append(time.monotonic() - begin)
        done = len(self._seconds)
        left = (self._total - done) * sum(self._seconds) / done / self._jobs
        state = f"{done} of {self._total} refinements, {_duration(left)} left"
        logger.info("%s: %s in %s; %s", label, outcome, _duration(self._seconds[-1]), state)
        if self._live:
            self._rich.remove_task(self._bars.pop(label))
            self._rich.update(self._bars[""], description=state)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def run_all(tasks: Sequence[Task], opts: Options, jobs: int) -> dict[str, str]:
    """Do tasks, several at a time; return why those that failed did, by label.

    On Control-C the refinements under way are ended and no other is begun.
    """
    stop = threading.Event()
    failed: dict[str, str] = {}
    waiting = [task.table for task in tasks if not task.table.exists()]
    with Display(len(waiting), jobs) as display:

        def work(task: Task) -> None:
            if task.table in waiting:
                display.begin(task.label)
            do_task(task, opts, lambda number: display.iteration(task.label, number), stop)

        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(work, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    label = futures[future].label
                    try:
                        future.result()
                    except (CryoredError, OSError, MemoryError) as error:
                        failed[label] = str(error) or "not enough memory"
                    display.end(label, "failed" if label in failed else "harvested")
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def run_on_cluster(
    tasks: Sequence[Task], opts: Options, scheduler: str, progress: Callable[[int, int], None]
) -> dict[str, str]:
    """Do tasks on the workers of a Dask scheduler; return why those that failed did, by label.

    Parameters
    ----------
    tasks, opts
        See `run_all`. The workers see the tasks' folders under the same paths, and have RELION.
    scheduler : str
        As ``tcp://host:8786``.
    progress : callable
        Is told how many tasks are done, and of how many.

    Raises
    ------
    CryoredError
        The scheduler does not answer, or loses its workers.
    """
    # The workers have other current folders.
    there = [replace(task, path=os.path.abspath(task.path), folder=task.folder.absolute()) for task in tasks]
    reasons = run_tasks(partial(_try_task, opts), there, scheduler=scheduler, progress=progress)
    return {task.label: reason for task, reason in zip(tasks, reasons, strict=True) if reason}


def _try_task(opts: Options, task: Task) -> str:
    """Do a task; return why it failed, or nothing."""
    try:
        do_task(task, opts, lambda number: None, threading.Event())
    except (CryoredError, OSError, MemoryError) as error:
        return str(error) or "not enough memory"
    return ""


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Make what ends a batch job end the refinements, as Control-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # nohup's choice to ignore SIGHUP stays.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
