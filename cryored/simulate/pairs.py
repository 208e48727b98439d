"""The tool that makes training pairs: a folder of maps and its pairs.star."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cryored.errors import InputError
from cryored.mrc import write_volume
from cryored.simulate.gaussian import gaussian_pairs
from cryored.simulate.pair_table import PairRow, read_pairs, write_pairs
from cryored.simulate.structure import check_fits, read_atoms
from cryored.star import read_star
from cryored.volume import Volume


def simulate_pairs_files(
    structures: Sequence[str],
    folder: str,
    *,
    number: int,
    box: int,
    angpix: float,
    resolution: float,
    seed: int,
    float16: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `number` draws (two pairs each) of every structure, and their pairs.star.

    The same seed gives the same bytes whatever `jobs` is: each structure has its own stream of random numbers.
    An interrupted run goes on where it stopped.
    """
    target = Path(folder)
    table = target / "pairs.star"
    if table.exists() and not overwrite:
        raise InputError(f"{table}: exists already; add --overwrite to replace it")
    names = [Path(path).name.split(".")[0] for path in structures]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise InputError(f"{twins[0]}: two structures of this name; their pairs would overwrite each other")
    target.mkdir(parents=True, exist_ok=True)
    work = partial(
        _structure_pairs,
        folder=target,
        number=number,
        box=box,
        angpix=angpix,
        resolution=resolution,
        seed=seed,
        float16=float16,
    )
    rows: list[PairRow] = []
    # Control-C reaches the whole group of processes: it is for this one to stop the others.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(jobs, signal.signal, ignore) as pool:
        for done, made in enumerate(pool.imap(work, structures), 1):
            rows += made
            progress(done, len(structures))
    write_pairs(table, rows, made_by=f"simulate pairs gaussian seed {seed} number {number}")
    for name in names:
        (target / f".{name}.star").unlink(missing_ok=True)
    return table


def _structure_pairs(
    path: str, *, folder: Path, number: int, box: int, angpix: float, resolution: float, seed: int, float16: bool
) -> list[PairRow]:
    """Make the pairs of one structure, unless an earlier run has left them with their table."""
    name = Path(path).name.split(".")[0]
    label = f"gaussian {name} seed {seed} number {number} box {box} angpix {angpix:g} resolution {resolution:g}"
    table = folder / f".{name}.star"
    made_by = f"{label} float16" if float16 else label
    if table.exists() and read_star(table).find_text("made", "by") == made_by:
        return read_pairs(table)
    atoms = read_atoms(path)
    check_fits(atoms, box, angpix, path)
    rows = []
    for count in range(number):
        # The name's bytes make the stream the structure's own, in whatever order structures are given.
        rng = np.random.default_rng([seed, count, *name.encode()])
        for half, pair in enumerate(gaussian_pairs(atoms, box, angpix, resolution, rng=rng), 1):
            stem = folder / f"{name}_{count:03d}_half{half}"
            noisy, target = f"{stem}_noisy.mrc", f"{stem}_target.mrc"
            # Densities in electrons per cubic angstrom are of order 1, which float16 holds well.
            write_volume(noisy, Volume(pair.noisy, angpix), label=f"simulate pairs {label}", float16=float16)
            write_volume(target, Volume(pair.target, angpix), label=f"simulate pairs {label}", float16=float16)
            rows.append(PairRow(noisy, target, name, half, pair.resolution, pair.fsc, "gaussian", seed))
    write_pairs(table, rows, made_by=made_by)
    return rows
