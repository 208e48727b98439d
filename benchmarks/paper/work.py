"""Doing the runs: each in a folder of its own, finished when its record is there.

A record holds all that tables and figures need, in a few kilobytes: the folders of the runs can go, and an experiment
be continued on another machine from its records.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cryored import __version__
from cryored.assessment.noise_substitution import substituted_volumes
from cryored.errors import CryoredError, InputError, ModelError
from cryored.files.mrc import read_volume
from cryored.files.output import write_text
from cryored.maps.fsc import shell_correlation
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import check_weights, find_model
from cryored.refinement.harvest_relion import Display
from cryored.refinement.red_update import DENOISED
from cryored.refinement.relion_runs import (
    MASK,
    Data,
    Reconstruction,
    RefinementError,
    final_map,
    half_maps,
    iterations,
    make_data,
    make_mask,
    refine_by,
)
from cryored.simulation.harvest import HarvestOptions, harvest_files
from cryored.simulation.pair_table import read_pairs
from cryored.simulation.workers import run_tasks
from cryored.training.evaluation import judge, load_pair, shown, weigh
from paper.measure import Record, last_shell, measure, measure_refinement, picture, rounded, swapped_correlation
from paper.plan import LEVELS, RUNS, STRUCTURES, SWAPPED, Cell, Run, Scale

logger = logging.getLogger("cryored.paper")

HOOK = Path(__file__).resolve().parents[2] / "bin" / "cryored-external-reconstruct"
ORACLE = Path(__file__).resolve().parents[1] / "oracle.py"
PLAIN = "map"  # the run that masks and single passes are made from
SUBSTITUTED_FROM = 8.0  # angstrom: from here on noise stands for the signal
_NO_SIGNAL = 1e-12  # signal-to-noise ratio of what stands for none
_EXAMPLE = 7.0  # angstrom: the intermediate nearest to it is shown


@dataclass(frozen=True)
class Experiment:
    """Where and how everything is done.

    Parameters
    ----------
    folder : Path
        Holds all data sets and runs.
    results : Path
        Holds the records of finished runs.
    scale : Scale
    structures : Path
        Folder of the atomic models.
    seed : int
    hook : {"cold", "watch"}
        Start cryored for each request, or have it resident.
    relion : tuple of str
        Further options of ``relion_refine``, for instance ``--gpu``.
    """

    folder: Path
    results: Path
    scale: Scale
    structures: Path
    seed: int = 0
    hook: str = "watch"
    relion: tuple[str, ...] = ()

    def place(self, cell: Cell) -> Path:
        """Folder of a cell: its data set and, by name, its runs."""
        return self.folder / _label(cell)

    def path(self, cell: Cell, name: str) -> Path:
        """File of the record of a run."""
        return self.results / _label(cell) / f"{name}.json"

    def structure(self, cell: Cell) -> Path:
        """Return the file of a cell's atomic model: the paper's own where it is there, else the stand-in.

        Raises
        ------
        InputError
            There is neither.
        """
        names = (cell.structure, STRUCTURES[cell.structure])
        for name in names:
            for path in sorted(self.structures.glob("*")):
                if path.name.split(".")[0].lower() == name.lower():
                    return path
        raise InputError(
            f"{self.structures}: no atomic model {names[0]} or {names[1]}, expected a PDB or mmCIF file of one of "
            "these names; give another --structures"
        )

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return what decides a cell's data set."""
        scale = self.scale
        return {
            "structure": self.structure(cell).name.split(".")[0],
            "snr": 0.0 if cell.is_noise else scale.snr[LEVELS.index(cell.level)],
            "number": scale.number,
            "box": scale.box,
            "angpix": scale.angpix,
            "perturb_angles": scale.perturb,
            "seed": self.seed,
        }

    def method(self, run: Run) -> dict[str, Any]:
        """Return what decides a run, but for the data set; a model counts by its weights and schedule.

        Raises
        ------
        ModelError
            The model is not there.
        """
        prior = None
        if run.model is not None:
            model = find_model(run.model)
            check_weights(model)
            decisive = [model.card.sha256, model.card.input, model.card.schedule]
            weights = (run.masked and model.card.weights_masked) or model.card.weights
            decisive += [weights] if run.calibrated and weights else []
            text = json.dumps(decisive, sort_keys=True)
            prior = hashlib.sha256(text.encode()).hexdigest()[:12]
        # A single pass depends on the refinement that its intermediates are of.
        search = [] if run.kind == "true-angles" else [*self.scale.search, *self.relion]
        if run.masked:
            search += ["--solvent_mask", "--solvent_correct_fsc"]
        return {"kind": run.kind, "model": run.model, "prior": prior, "options": list(run.options), "search": search}

    def hook_of(self, run: Run) -> str | None:
        """Return what reconstructs in a run's refinement, None if there is none."""
        if run.kind != "refine":
            return None
        return "relion" if run.model is None else self.hook

    def record(self, cell: Cell, name: str) -> Record | None:
        """Return what is known of a finished run."""
        path = self.path(cell, name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{path}: no readable JSON ({error}); remove it, and the run is done again") from None

    def state(self, cell: Cell, name: str) -> str:
        """Return ``done``, ``outdated`` (with other data, model or options), ``missing``, or ``no model``."""
        record = self.record(cell, name)
        try:
            decisive = self.settings(cell) | self.method(RUNS[name])
        except ModelError:
            return "no model" if record is None else "outdated"
        if record is None:
            return "missing"
        return "done" if all(record.get(key) == value for key, value in decisive.items()) else "outdated"

    def records(self, cells: Sequence[Cell], names: Sequence[str]) -> dict[tuple[Cell, str], Record]:
        """Return the records of all runs that are finished."""
        found = {
            (cell, name): self.record(cell, name) for cell in cells for name in names if RUNS[name].belongs_to(cell)
        }
        return {key: record for key, record in found.items() if record is not None}


def _label(cell: Cell) -> str:
    return str(cell).replace(":", "_")


def prepare(experiment: Experiment, cell: Cell) -> Data:
    """Make a cell's data set, unless it is there.

    Raises
    ------
    InputError
        The folder holds one that was made otherwise, or the structure cannot be used.
    """
    what, place = experiment.settings(cell), experiment.place(cell)
    path = place / "settings.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in what.items():
            if found.get(key) != value:
                raise InputError(
                    f"{path}: {key} is {found.get(key)}, asked for is {value}; use another --folder or remove {place}"
                )
    else:
        place.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(what, indent=2) + "\n")

    def make(folder: Path, snr: float) -> Data:
        return make_data(
            str(experiment.structure(cell)),
            folder,
            box=what["box"],
            angpix=what["angpix"],
            number=what["number"],
            snr=snr,
            perturb=what["perturb_angles"],
            # The structure's own: its orientations are the same at all levels.
            seed=(what["seed"] + zlib.crc32(cell.structure.encode())) % 2**31,
        )

    data = make(place, what["snr"] or _NO_SIGNAL)
    if cell.is_noise:
        # The reference has the strength that it has at the best level: the strongest temptation.
        signal = make(place / "signal", experiment.scale.snr[0])
        shutil.copyfile(signal.folder / "particles_reference.mrc", place / "particles_reference.mrc")
    return data


def do_run(
    experiment: Experiment,
    cell: Cell,
    name: str,
    on_iteration: Callable[[int], None] = lambda number: None,
    stop: threading.Event | None = None,
) -> Record:
    """Do one run anew, and record it.

    Raises
    ------
    InputError, ModelError, RefinementError
        Data set, model or RELION fail, or what the run needs of others is not there.
    """
    run = RUNS[name]
    method = experiment.method(run)
    data = prepare(experiment, cell)
    path = experiment.path(cell, name)
    begin = time.monotonic()
    path.unlink(missing_ok=True)
    if run.kind == "refine":
        result = _refine(experiment, data, cell, name, on_iteration, stop)
    elif run.kind == "true-angles":
        result = _reconstruct(data, name)
    elif run.kind == "single-pass":
        result = _pass(data, str(run.model))
    elif run.kind == "substituted":
        result = _substitute(data, run, experiment.seed)
    else:
        result = _swap(experiment)
    record = (
        {"cell": str(cell), "run": name}
        | experiment.settings(cell)
        | method
        | {"version": __version__, "date": datetime.date.today().isoformat()}
        | {"seconds": round(time.monotonic() - begin), "hook": experiment.hook_of(run)}
        | result
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record) + "\n")
    return record


def _refine(
    experiment: Experiment,
    data: Data,
    cell: Cell,
    name: str,
    on_iteration: Callable[[int], None],
    stop: threading.Event | None,
) -> Record:
    run, target = RUNS[name], data.folder / name
    mask = _mask(experiment, data) if run.masked else None
    if run.oracle:
        how = Reconstruction(program=shlex.join([sys.executable, str(ORACLE), str(data.truth)]), mask=mask)
    elif run.model is None:
        how = Reconstruction(mask=mask)
    else:
        options = ("--model", run.model, *run.options)
        how = Reconstruction(options, mask=mask, hook=HOOK, watched=experiment.hook == "watch")
    refine_by(
        data,
        name,
        how,
        search=[*experiment.scale.search, *experiment.relion],
        timeout=experiment.scale.timeout,
        on_iteration=on_iteration,
        stop=stop,
    )
    result = measure(data, name) | measure_refinement(data, name) | {"iterations": iterations(data, name)}
    if name == "map" and not cell.is_noise:
        try:
            kept = HarvestOptions(cell.structure, float16=True, overwrite=True)
            harvest_files(str(target), str(data.truth), str(target / "pairs"), kept)
        except InputError as error:  # hopeless: nothing of the truth in any map
            logger.warning("%s: no intermediates for single passes: %s", cell, error)
    for path in target.glob("run_it*"):  # a hundred megabytes and more
        if not path.name.endswith(("_cryored.log", DENOISED)):
            path.unlink()
    return result


def _mask(experiment: Experiment, data: Data) -> Path:
    """Return the solvent mask of a cell, made from its plain run; a record from elsewhere did not bring that along."""
    path = data.folder / PLAIN / MASK
    if not path.exists():
        if not final_map(data, PLAIN).exists():
            search = (*experiment.scale.search, *experiment.relion)
            refine_by(data, PLAIN, Reconstruction(), search=search, timeout=experiment.scale.timeout)
            for left in (data.folder / PLAIN).glob("run_it*"):
                left.unlink()
        make_mask(data, PLAIN)
    return path


def _reconstruct(data: Data, name: str) -> Record:
    """Reconstruct each half with the true angles, padded as in the refinements."""
    target = data.folder / name
    target.mkdir(exist_ok=True)
    for half in (1, 2):
        command = ["relion_reconstruct", "--i", "particles_truth.star", "--ctf", "--pad", "1", "--subset", str(half)]
        command += ["--o", f"{name}/run_half{half}_class001_unfil.mrc"]
        try:
            subprocess.run(command, cwd=data.folder, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        except FileNotFoundError:
            raise RefinementError(
                "relion_reconstruct: not found on the PATH; install RELION or load its module"
            ) from None
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
            raise RefinementError(f"{target}: relion_reconstruct failed: {said[-1]}") from error
    return measure(data, name)


def _pass(data: Data, model: str) -> Record:
    """Denoise the intermediates of one half of the MAP run once, and judge them; picture the one nearest to 7 A."""
    # A hopeless run left nothing usable.
    table = _final_map(data.folder, "map").parent / "pairs" / "pairs.star"
    rows = [row for row in read_pairs(table) if row.half == 1] if table.exists() else []
    if not rows:
        return {"judgements": [], "example": None}
    found = find_model(model)
    denoise = Denoiser(found)
    judgements = [asdict(item) for item in judge(denoise, rows, found.card.input, target=found.card.target)]
    row = min(rows, key=lambda row: abs(row.resolution - _EXAMPLE))
    pair, voxel_size = load_pair(row)
    denoised = denoise(Volume(shown(pair, found.card.input), voxel_size), pair.fsc).data
    maps = {"unregularised": pair.noisy, "FSC-weighted": weigh(pair.noisy, pair.fsc), "denoised": denoised}
    example = {
        "name": Path(row.noisy).name,
        "truth_fsc": {name: rounded(shell_correlation(values, pair.truth)) for name, values in maps.items()},
        "pictures": {name: picture(values, pair.truth) for name, values in {"truth": pair.truth, **maps}.items()},
    }
    return {"judgements": judgements, "example": example}


def _final_map(place: Path, name: str) -> Path:
    """Return the file of a refinement's final map; a record that came from elsewhere does not bring it along."""
    path = final_map(Data(place, 0, 0.0, 0.0), name)
    if not path.exists():
        raise InputError(f"{path}: not there, expected a finished refinement; remove its record and do it again")
    return path


def _swap(experiment: Experiment) -> Record:
    """Correlate the final maps of two proteins, without and with the prior."""
    paths = [_final_map(experiment.place(cell), name) for cell in SWAPPED for name in ("map", "cwred")]
    return {"curves": {name: rounded(curve) for name, curve in swapped_correlation(*paths).items()}}


def _substitute(data: Data, run: Run, seed: int) -> Record:
    """Denoise the half-maps of the MAP run with noise in place of the signal beyond a resolution."""
    _final_map(data.folder, "map")
    halves = half_maps(data, "map")
    truth = read_volume(data.truth)
    mask = soft_mask(truth).data
    if run.limit is None:
        start = round(data.box * data.angpix / SUBSTITUTED_FROM)
    else:
        curve = shell_correlation(*(half * mask for half in halves))
        start = min(last_shell(curve, run.limit) + 1, len(curve) - 1)
    found = substituted_volumes(
        truth.with_data(halves[0]),
        truth.with_data(halves[1]),
        shell_correlation(*halves),
        start,
        model=str(run.model),
        rng=np.random.default_rng(seed),
        mask=mask,
    )
    curves = {
        "noise for signal": found.substituted,
        "noise for signal, denoised": found.denoised_substituted,
        "denoised": found.denoised,
    }
    return {"start": found.start, "curves": {name: rounded(curve) for name, curve in curves.items()}}


def do_on_cluster(
    experiment: Experiment,
    cells: Sequence[Cell],
    names: Sequence[str],
    scheduler: str,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Do what is not done yet on the workers of a Dask scheduler, a cell at a time each; return why runs failed.

    The workers have RELION, the folders under the same paths, and this package on their PYTHONPATH.
    """
    todo = [cell for cell in cells if _missing(experiment, cell, names)]
    found = run_tasks(partial(_do_cell, experiment, names), todo, scheduler=scheduler, progress=progress)
    return {label: reason for failed in found for label, reason in failed.items()}


def _missing(experiment: Experiment, cell: Cell, names: Sequence[str]) -> list[str]:
    return [name for name in names if RUNS[name].belongs_to(cell) and experiment.state(cell, name) != "done"]


def _do_cell(experiment: Experiment, names: Sequence[str], cell: Cell) -> dict[str, str]:
    failed = {}
    for name in _missing(experiment, cell, names):
        try:
            do_run(experiment, cell, name)
        except (CryoredError, OSError, MemoryError) as error:
            failed[f"{cell} {name}"] = str(error) or "not enough memory"
    return failed


def do_all(experiment: Experiment, cells: Sequence[Cell], names: Sequence[str], jobs: int) -> dict[str, str]:
    """Do what is not done yet, several cells at a time; return why runs failed, by name.

    On Control-C the refinements under way are ended and no other is begun.
    """
    todo = {cell: _missing(experiment, cell, names) for cell in cells}
    stop = threading.Event()
    failed: dict[str, str] = {}
    with Display(sum(map(len, todo.values())), jobs) as display:

        def work(cell: Cell) -> None:
            for name in todo[cell]:
                if stop.is_set():
                    return
                label = f"{cell} {name}"
                display.begin(label)
                try:
                    do_run(experiment, cell, name, partial(display.iteration, label), stop)
                except (CryoredError, OSError, MemoryError) as error:
                    failed[label] = str(error) or "not enough memory"
                display.end(label, "failed" if label in failed else "done")

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, cell) for cell in todo]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    return failed
