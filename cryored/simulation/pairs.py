"""The tool that makes training pairs: a folder of maps and its pairs.star."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from cryored import __version__
from cryored.errors import InputError
from cryored.files.mrc import write_volume
from cryored.files.star import read_star
from cryored.maps.volume import Volume
from cryored.simulation.methods import find_method
from cryored.simulation.pair_table import Array, PairRow, read_pairs, write_pair, write_pairs
from cryored.simulation.split import check_split
from cryored.simulation.structure import Atoms, check_fits, read_atoms
from cryored.simulation.workers import run_tasks

logger = logging.getLogger(__name__)

_MAP = re.compile(r"_(truth|\d{2,}_(half[12]_)?(noisy|target))\.mrc")  # after a task's stem
_TABLE = re.compile(r"pairs(_\d{3,}_of_\d{3,})?\.star")


@dataclass(frozen=True)
class Task:
    """One draw of one structure, the unit of work: what is finished of an interrupted run are whole tasks.

    Parameters
    ----------
    structure : str
        Path of a PDB or mmCIF file.
    draw : int
        Counted from 0.
    """

    structure: str
    draw: int

    @property
    def name(self) -> str:
        """Name of the structure."""
        return Path(self.structure).name.split(".")[0]

    @property
    def stem(self) -> str:
        """Beginning of the names of the task's files."""
        return f"{self.name}_{self.draw:03d}"


@dataclass(frozen=True)
class Plan:
    """What the tasks of a run have in common; see `simulate_pairs_files`."""

    folder: Path
    method: str
    box: int
    angpix: float
    resolution: float
    seed: int
    float16: bool

    def __str__(self) -> str:
        """Tell all that the bytes of the files depend on, but for structure and draw."""
        return (
            f"{self.method} seed {self.seed} box {self.box} angpix {self.angpix} resolution {self.resolution} "
            f"{'float16' if self.float16 else 'float32'}"
        )


@dataclass(frozen=True)
class PairOptions:
    """Which pairs are made, and by whom.

    Parameters
    ----------
    method : str
        One of `METHODS`.
    number : int
        Draws of each structure.
    box : int
        Edge of the maps in voxels.
    angpix : float
        Voxel size in angstrom.
    resolution : float
        Width of the atoms' Gaussians in angstrom, see `gaussian_transform`.
    seed : int
    float16 : bool
        Write maps of half the size (MRC mode 12).
    manifest, part : str
        Table of a split into parts, and the part that all structures have to be of (see `check_split`).
    shard : (i, n), optional
        Do only the i-th (from 1) of n parts of the work, and write pairs_iii_of_nnn.star. When all parts are done,
        a run without `shard` collects them in pairs.star.
    skip_bad : bool
        Leave out draws whose structure cannot be used, and list them in the log, rather than stop at the first.
    jobs, scheduler
        See `run_tasks`.
    overwrite : bool
        Whether an existing table is replaced.
    """

    method: str = "gaussian"
    number: int = 3
    box: int = 96
    angpix: float = 1.5
    resolution: float = 3.0
    seed: int = 0
    float16: bool = False
    manifest: str | None = None
    part: str = "train"
    shard: tuple[int, int] | None = None
    skip_bad: bool = False
    jobs: int = 1
    scheduler: str | None = None
    overwrite: bool = False

    def plan(self, folder: Path) -> Plan:
        """Return what the tasks have in common."""
        return Plan(folder, self.method, self.box, self.angpix, self.resolution, self.seed, self.float16)


def simulate_pairs_files(
    structures: Sequence[str],
    folder: str,
    options: PairOptions,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `options.number` draws of every structure, and their pairs.star.

    The same seed gives the same bytes however the work is divided: each draw of each structure has its own stream
    of random numbers. An interrupted run goes on after the last finished draw.

    Parameters
    ----------
    structures : sequence of str
        Paths of PDB or mmCIF files.
    folder : str
        Where maps and table go; with a scheduler, one that its workers see under the same path.
    options : PairOptions
    progress : callable
        Is told how many draws are done, and of how many.

    Returns
    -------
    Path of the table.

    Raises
    ------
    InputError
        A table exists already, two structures have one name, a structure is not of the part, cannot be read or does
        not fit the box, or none is left. What was finished before stays.
    """
    if options.manifest is not None:
        check_split(structures, options.manifest, options.part)
    names = [Path(path).name.split(".")[0] for path in structures]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise InputError(f"{twins[0]}: two structures of this name; their pairs would overwrite each other")
    tasks = [Task(path, draw) for path in structures for draw in range(options.number)]
    table = Path(folder) / "pairs.star"
    shard = options.shard
    if shard is not None:
        table = Path(folder) / "pairs_{:03d}_of_{:03d}.star".format(*shard)
        if shard[1] > len(tasks):
            raise InputError(f"{table}: there are {len(tasks)} draws, too few for {shard[1]} shards; use fewer")
        tasks = tasks[shard[0] - 1 :: shard[1]]
    plan = options.plan(table.parent)
    if options.scheduler is not None:  # whose workers have other current folders
        plan = replace(plan, folder=plan.folder.absolute())
        tasks = [replace(task, structure=os.path.abspath(task.structure)) for task in tasks]
    made_by = f"simulate pairs {plan} number {options.number}"
    if _outdated(table, made_by, options.overwrite):
        _check_structures(plan, tasks, options)
        for path in _outdated(table, made_by, options.overwrite):  # once more: other shards may have written theirs
            path.unlink(missing_ok=True)
    new = not table.parent.exists()
    table.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows, left_out = _run(plan, tasks, options, progress)
    except BaseException:
        if new:
            with suppress(OSError):  # not empty: what was finished stays
                table.parent.rmdir()
        raise
    if not rows:
        raise InputError(f"no pairs: all {len(tasks)} draws were left out, the first because of {left_out[0]}")
    write_pairs(table, rows, made_by=made_by, split=options.part if options.manifest is not None else None)
    if shard is None:
        _remove_traces(table.parent, tasks)
    return table


def _outdated(table: Path, made_by: str, overwrite: bool) -> list[Path]:
    """Refuse, or return, the table and others whose maps would be replaced: those of runs with other options."""
    found = []
    for path in sorted(table.parent.glob("pairs*.star")):
        if not _TABLE.fullmatch(path.name):
            continue
        if path != table and read_star(path).find_text("made", "by") == made_by:
            continue
        if not overwrite:
            raise InputError(f"{path}: exists already; add --overwrite to replace it")
        found.append(path)
    return found


def _run(
    plan: Plan,
    tasks: Sequence[Task],
    options: PairOptions,
    progress: Callable[[int, int], None],
) -> tuple[list[PairRow], list[str]]:
    """Do all tasks; return the rows of all, and why others were left out."""
    work = partial(_try_task if options.skip_bad else _do_task, plan)
    rows: list[PairRow] = []
    reasons: dict[str, list[str]] = {}
    results = run_tasks(work, tasks, jobs=options.jobs, scheduler=options.scheduler, progress=progress)
    for task, result in zip(tasks, results, strict=True):
        if isinstance(result, str):
            reasons.setdefault(task.name, []).append(result)
        else:
            rows += result
    if reasons:
        logger.warning("%d structures were left out, in part or altogether:", len(reasons))
    for name, found in reasons.items():
        logger.warning("%s: %d draws, %s", name, len(found), found[0])
    return rows, [reason for found in reasons.values() for reason in found]


def _check_structures(plan: Plan, tasks: Sequence[Task], options: PairOptions) -> None:
    """Refuse structures that cannot be used, with `skip_bad` only where that is all of them."""
    structures = list(dict.fromkeys(task.structure for task in tasks))
    found = run_tasks(partial(_unusable, plan), structures, jobs=options.jobs, scheduler=options.scheduler)
    reasons = [reason for reason in found if reason]
    if reasons and not (options.skip_bad and len(reasons) < len(structures)):
        raise InputError(reasons[0])


def _unusable(plan: Plan, structure: str) -> str:
    """Return why a structure cannot be used; empty where it can."""
    try:
        _read(plan, structure)
    except InputError as error:
        return str(error)
    return ""


def _read(plan: Plan, structure: str) -> Atoms:
    """Read a structure that fits the box."""
    atoms = read_atoms(structure)
    check_fits(atoms, plan.box, plan.angpix, structure)
    return atoms


def _try_task(plan: Plan, task: Task) -> list[PairRow] | str:
    """Do a task, or say why its structure cannot be used."""
    try:
        return _do_task(plan, task)
    except InputError as error:
        return str(error)


def _do_task(plan: Plan, task: Task) -> list[PairRow]:
    """Make the pairs of a draw, unless an earlier run has left them with their table."""
    made_by = f"cryored {__version__} simulate pairs {task.stem} {plan}"
    table = plan.folder / f".{task.stem}.star"
    rows = _finished(table, made_by)
    if rows is not None:
        return rows
    table.unlink(missing_ok=True)  # of other options; its maps are about to be replaced
    for path in plan.folder.glob(f"{glob.escape(task.stem)}_*.mrc"):
        if _MAP.fullmatch(path.name.removeprefix(task.stem)):
            path.unlink(missing_ok=True)  # there may be more than will be made now
    atoms = _read(plan, task.structure)
    # The name's bytes make the stream the structure's own, in whatever order structures are given.
    rng = np.random.default_rng([plan.seed, task.draw, *task.name.encode()])
    stem = plan.folder / task.stem
    label = f"simulate pairs {plan.method} {task.stem} seed {plan.seed} resolution {plan.resolution:g}"

    def write(kind: str, data: Array) -> str:
        # Densities, per cubic angstrom or per voxel, are of order 1, which float16 holds well.
        write_volume(f"{stem}_{kind}.mrc", Volume(data, plan.angpix), label=label, float16=plan.float16)
        return f"{stem}_{kind}.mrc"

    couples = find_method(plan.method)(atoms, plan.box, plan.angpix, plan.resolution, rng=rng)
    rows = []
    for number, couple in enumerate(couples):
        if number == 0:
            truth = write("truth", couple[0].truth)
        same = np.array_equal(couple[0].target, couple[1].target)
        target = write(f"{number:02d}_target", couple[0].target) if same else None
        for half, pair in enumerate(couple, 1):
            rows.append(
                write_pair(
                    f"{stem}_{number:02d}_half{half}",
                    pair,
                    structure=task.name,
                    half=half,
                    method=plan.method,
                    seed=plan.seed,
                    angpix=plan.angpix,
                    label=label,
                    float16=plan.float16,
                    target=target,
                    truth=truth,
                )
            )
    write_pairs(table, rows, made_by=made_by)
    return rows


def _finished(table: Path, made_by: str) -> list[PairRow] | None:
    """Return the rows of a task that has been done with the same options."""
    try:
        if read_star(table).find_text("made", "by") == made_by:
            return read_pairs(table)
    except InputError:
        pass  # not there, cut short when the power failed, or maps have been deleted: do it again
    return None


def _remove_traces(folder: Path, tasks: Sequence[Task]) -> None:
    """Remove the tables of single tasks, and what killed processes have left half written."""
    hidden = tuple(f".{task.stem}" for task in tasks)
    for stem in hidden:
        (folder / f"{stem}.star").unlink(missing_ok=True)
    for path in folder.glob(".*.part"):
        if path.name.startswith(hidden):
            path.unlink(missing_ok=True)
