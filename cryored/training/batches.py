"""Batches of patches from stored pairs: read, checked, standardised, cut and turned by threads ahead of the network."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.mrc import read_volume
from cryored.maps.fourier import apply_shells
from cryored.maps.network_scale import standard_of
from cryored.maps.volume import Volume
from cryored.memory import free_memory
from cryored.prior.denoiser import cube_rotations, rotate
from cryored.simulation.pair_table import PairRow
from cryored.threads import default_threads

logger = logging.getLogger(__name__)

GREY_SCALE = (0.5, 1.5)  # range of a random factor: molecules are larger or smaller than those trained on
_LEAST_ERROR = 1e-8  # mean square in standardised units: the loss weight of a pair without errors stays finite
_UNKNOWN_MEMORY = 4 << 30  # bytes that count as free where nothing tells
_MOST_THREADS = 8  # more prepare no batch faster: they wait for the interpreter

Array = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]
Input = Literal["regularised", "unregularised"]
T = TypeVar("T")


def read_pair(row: PairRow) -> tuple[Volume, Volume]:
    """Read the noisy and the target map of a row; refuse shapes or voxel sizes that differ."""
    noisy, target = read_volume(row.noisy), read_volume(row.target)
    if noisy.shape != target.shape or noisy.voxel_size != target.voxel_size:
        raise InputError(
            f"{row.target}: {target.shape} voxels of {target.voxel_size} A, expected those of {row.noisy}: "
            f"{noisy.shape} voxels of {noisy.voxel_size} A"
        )
    return noisy, target


def weighted(noisy: Volume, row: PairRow) -> Volume:
    """Return the noisy map times its FSC, the best linear filter (Wiener)."""
    return noisy.with_data(apply_shells(noisy.data, np.clip(row.fsc, 0.0, 1.0), 1))


def check_pairs(
    rows: Sequence[PairRow], patch: int, *, skip_bad: bool = False, threads: int | None = None
) -> tuple[list[PairRow], float]:
    """Read all pairs once, before hours of training depend on them.

    Parameters
    ----------
    rows : sequence of PairRow
    patch : int
        Edge of the patches that will be cut, in voxels.
    skip_bad : bool
        Leave out, with a warning, the pairs that cannot be used.
    threads : int, optional

    Returns
    -------
    rows : list of PairRow
        Those that can be used.
    voxel_size : float
        Theirs, in angstrom.

    Raises
    ------
    InputError
        A map that is missing, damaged, constant, not finite or of unknown pixel size, an FSC that is not finite or of
        another box, maps of a pair whose shapes or voxel sizes differ, a voxel size unlike the first pair's, a box
        smaller than the patch; no pair is left.
    """

    def problem_or_voxel_size(row: PairRow) -> str | float:
        try:
            noisy, _ = read_pair(row)
        except InputError as error:
            return str(error)
        if not np.all(np.isfinite(row.fsc)):
            return f"{row.noisy}: the FSC curve of its table is not finite"
        if min(noisy.shape) < patch:
            return f"{row.noisy}: a box of {min(noisy.shape)}, below --patch {patch}"
        shells = max(noisy.shape) // 2 + 1
        if len(row.fsc) != shells:
            return f"{row.noisy}: an FSC of {len(row.fsc)} shells in its table, expected {shells} for its box"
        if noisy.voxel_size <= 0:
            return f"{row.noisy}: pixel size 0 (unknown) in the header, expected angstrom"
        if not noisy.data.std():
            return f"{row.noisy}: a constant map, expected one with a molecule in it"
        return noisy.voxel_size

    with ThreadPoolExecutor(_threads(threads)) as executor:
        found = list(executor.map(problem_or_voxel_size, rows))
    good = [(row, size) for row, size in zip(rows, found, strict=True) if isinstance(size, float)]
    problems = [problem for problem in found if isinstance(problem, str)]
    for row, size in good:
        if size != good[0][1]:
            problems.append(
                f"{row.noisy}: pixel size {size:g} A, expected {good[0][1]:g} A as in {good[0][0].noisy}; "
                "train on pairs of one pixel size"
            )
    kept = [row for row, size in good if size == good[0][1]]
    if problems and not (skip_bad and kept):
        rest = "mend them" if skip_bad else "mend them, or leave them out with --skip-bad"
        count = f" ({len(problems)} of {len(rows)} pairs cannot be used: {rest})" if len(rows) > 1 else ""
        raise InputError(problems[0] + count)
    if problems:
        logger.warning("%d of %d pairs are left out, the first: %s", len(problems), len(rows), problems[0])
    return kept, good[0][1] if good else 0.0


class PairStore:
    """Standardised pairs, read when they are needed and kept in memory as float16 as long as there is room.

    Parameters
    ----------
    rows : sequence of PairRow
    input : {"regularised", "unregularised"}
        The map that the network sees.
    cache : int, optional
        Bytes of pairs that are kept; the others are read again each time. Half of the free memory by default.

    Raises
    ------
    InputError
        There are no pairs.
    """

    def __init__(self, rows: Sequence[PairRow], input: Input, cache: int | None = None) -> None:
        if not rows:
            raise InputError("no pairs to train on")
        self.rows = rows
        self.input = input
        self._room = (free_memory() or _UNKNOWN_MEMORY) // 2 if cache is None else cache
        self._kept: dict[int, tuple[Half, Half, float]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Half, Half, float]:
        """Return input, error (input minus target) and the loss weight of a pair, in standardised units.

        The weight is one over the Wiener map's mean squared error, so that each resolution counts the same; 0 where
        the input is constant, because the FSC is 0 throughout.
        """
        kept = self._kept.get(index)
        if kept is None:
            kept = self._read(self.rows[index])
            size = kept[0].nbytes + kept[1].nbytes
            with self._lock:
                # First come, first kept: each pass needs each pair once, and throwing out would only cost.
                if index not in self._kept and size <= self._room:
                    self._kept[index] = kept
                    self._room -= size
        return kept

    def _read(self, row: PairRow) -> tuple[Half, Half, float]:
        noisy, target = read_pair(row)
        wiener = weighted(noisy, row)
        volume = wiener if self.input == "regularised" else noisy
        standard = standard_of(volume.data, volume.voxel_size)
        if standard.deviation == 0:
            nothing = np.zeros(volume.shape, dtype=np.float16)
            return nothing, nothing, 0.0
        scale = np.float32(1 / standard.deviation)
        error = (volume.data - target.data) * scale
        wiener_error = error if volume is wiener else (wiener.data - target.data) * scale
        mean_square = float(np.vdot(wiener_error, wiener_error)) / error.size
        return (
            standard.apply(volume.data).astype(np.float16),
            error.astype(np.float16),
            1 / max(mean_square, _LEAST_ERROR),
        )


def draw_batch(store: PairStore, step: int, size: int, *, patch: int, seed: int) -> tuple[Array, Array, Array]:
    """Cut the patches of a step; step and seed alone decide which.

    Each pass over the pairs takes one patch of each, in a new order, from a random place, in one of the 24 rotations
    of the cube and on a random grey scale.

    Parameters
    ----------
    store : PairStore
    step, size : int
        All steps have the same number of patches.
    patch : int
        Edge in voxels.
    seed : int

    Returns
    -------
    inputs, errors : (size, patch, patch, patch, 1) float32
        Patches of the standardised map, and the same patches of that map minus its target.
    weights : (size,) float32
        One over the mean squared error of the Wiener map over the whole box, in the units of `errors`.
    """
    rng = np.random.default_rng([seed, step])
    rotations = cube_rotations()
    inputs = np.empty((size, patch, patch, patch, 1), dtype=np.float32)
    errors = np.empty_like(inputs)
    weights = np.empty(size, dtype=np.float32)
    for i in range(size):
        epoch, position = divmod(step * size + i, len(store))
        source, error, weight = store[int(_order(len(store), seed, epoch)[position])]
        corner = [int(rng.integers(n - patch + 1)) for n in source.shape]
        place = tuple(slice(start, start + patch) for start in corner)
        rotation = rotations[int(rng.integers(len(rotations)))]
        scale = np.float32(rng.uniform(*GREY_SCALE))
        # float16 to float32, scale and turn in one pass.
        for data, patches in ((source, inputs), (error, errors)):
            np.multiply(rotate(data[place], rotation), scale, out=patches[i, ..., 0], dtype=np.float32)  # type: ignore[arg-type]
        weights[i] = weight / float(scale) ** 2
    return inputs, errors, weights


@lru_cache(maxsize=4)
def _order(pairs: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of the pairs in a pass; the 1 keeps these numbers apart from those of the steps."""
    return np.random.default_rng([seed, epoch, 1]).permutation(pairs)


def prefetched(
    make: Callable[[int], T], steps: Sequence[int], threads: int | None = None
) -> Generator[tuple[int, T], None, None]:
    """Yield (step, make(step)) in order, while threads prepare the next ones.

    Two batches a thread are ready or in preparation at most. Close the generator to stop the threads early.
    """
    workers = _threads(threads)
    with ThreadPoolExecutor(workers) as executor:
        remaining = iter(steps)
        pending: deque[tuple[int, Future[T]]] = deque()
        try:
            for step in itertools.islice(remaining, 2 * workers):
                pending.append((step, executor.submit(make, step)))
            while pending:
                step, future = pending.popleft()
                result = future.result()
                for following in itertools.islice(remaining, 1):
                    pending.append((following, executor.submit(make, following)))
                yield step, result
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _threads(asked: int | None) -> int:
    return min(asked or default_threads(), _MOST_THREADS)
