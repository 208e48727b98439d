"""A training pair, and pairs.star, the table that lists pairs with all that is known of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.mrc import write_volume
from cryored.files.star import Star, read_star, write_star
from cryored.maps.volume import Floats, Volume

logger = logging.getLogger(__name__)

TABLE = "pairs"  # the block of pairs.star
BINS = (0.0, 4.5, 6.0, 8.0, 10.0, 15.0, 30.0, np.inf)  # angstrom, edges of the summary's bins; the last has no FSC too
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """One training pair.

    Parameters
    ----------
    noisy, target : (z, y, x) float32
        Unregularised map of one half; truth times `fsc`.
    fsc : (box // 2 + 1,) float64
        Of the two halves, shell by shell, 0 beyond the current image size.
    resolution : float
        Nominal resolution in angstrom (FSC 0.143).
    truth : (z, y, x) float32
        The whole truth, on the same grid and grey scale; one for all pairs of a draw or a refinement.
    """

    noisy: Array
    target: Array
    fsc: Floats
    resolution: float
    truth: Array


@dataclass(frozen=True)
class PairRow:
    """One row of pairs.star, with paths that can be opened from the current folder.

    Halves may share the file of their target; the pairs of a draw share that of their truth, which old tables lack.
    """

    noisy: str
    target: str
    structure: str
    half: int
    resolution: float
    fsc: Floats
    method: str
    seed: int
    truth: str | None = None


def write_pair(
    stem: str | os.PathLike[str],
    pair: Pair,
    *,
    structure: str,
    half: int,
    method: str,
    seed: int,
    angpix: float,
    label: str,
    float16: bool = False,
    target: str | None = None,
    truth: str | None = None,
) -> PairRow:
    """Write the maps of a pair, STEM_noisy.mrc and STEM_target.mrc, and return its row.

    Parameters
    ----------
    stem : path
        Beginning of the files' names.
    pair : Pair
    structure, half, method, seed
        As in the row.
    angpix : float
        Voxel size in angstrom.
    label : str
        For the maps' headers.
    float16 : bool
        Write maps of half the size (MRC mode 12).
    target, truth : str, optional
        Files that hold the pair's target or truth already; the truth is never written here.
    """
    noisy = f"{os.fspath(stem)}_noisy.mrc"
    write_volume(noisy, Volume(pair.noisy, angpix), label=label, float16=float16)
    if target is None:
        target = f"{os.fspath(stem)}_target.mrc"
        write_volume(target, Volume(pair.target, angpix), label=label, float16=float16)
    return PairRow(noisy, target, structure, half, pair.resolution, pair.fsc, method, seed, truth)


def write_pairs(path: Path, rows: Sequence[PairRow], *, made_by: str, split: str | None = None) -> None:
    """Write pairs.star; paths are stored relative to its folder.

    Parameters
    ----------
    path : Path
    rows : sequence of PairRow
    made_by : str
        Command and key numbers.
    split : str, optional
        Part of a data set (train, validation, ...) that all structures have been checked to be of.
    """

    def relative(name: str) -> str:
        return os.path.relpath(name, path.parent)

    columns: dict[str, list[object]] = {
        "cryoredNoisyMap": [relative(row.noisy) for row in rows],
        "cryoredTargetMap": [relative(row.target) for row in rows],
        "cryoredStructure": [row.structure for row in rows],
        "cryoredHalf": [row.half for row in rows],
        "cryoredNominalResolution": [float(row.resolution) for row in rows],
        "cryoredMethod": [row.method for row in rows],
        "cryoredSeed": [row.seed for row in rows],
        "cryoredFscCurve": [",".join(f"{value:.5f}" for value in row.fsc) for row in rows],
    }
    if any(row.truth for row in rows):
        columns["cryoredTruthMap"] = [relative(row.truth) if row.truth else "" for row in rows]
    made = {"by": made_by} if split is None else {"by": made_by, "split": split}
    write_star(path, {"made": made, TABLE: columns})


def read_pairs(path: str | os.PathLike[str], *, keep_missing: bool = False) -> list[PairRow]:
    """Read pairs.star; raise `InputError` for a missing column or, unless `keep_missing`, a map that is not there."""
    star = read_star(path)
    folder = Path(path).parent

    def column(label: str) -> list[str]:
        return star.texts(TABLE, label)

    def whole_numbers(label: str) -> list[int]:
        values = star.numbers(TABLE, label)
        for value in values:
            if not value.is_integer():
                raise InputError(f"{star.name}: {label} {value:g}, expected a whole number")
        return [round(value) for value in values]

    noisy = column("cryoredNoisyMap")
    truth = column("cryoredTruthMap") if star.has_column(TABLE, "cryoredTruthMap") else [""] * len(noisy)
    rows = [
        PairRow(noisy, target, structure, half, resolution, curve, method, seed, truth)
        for noisy, target, structure, half, resolution, curve, method, seed, truth in zip(
            [str(folder / name) for name in noisy],
            [str(folder / name) for name in column("cryoredTargetMap")],
            column("cryoredStructure"),
            whole_numbers("cryoredHalf"),
            star.numbers(TABLE, "cryoredNominalResolution"),
            _curves(star),
            column("cryoredMethod"),
            whole_numbers("cryoredSeed"),
            [str(folder / name) if name else None for name in truth],
            strict=True,
        )
    ]
    if keep_missing:
        return rows
    named = dict.fromkeys(name for row in rows for name in (row.noisy, row.target, row.truth) if name)
    missing = [name for name in named if not os.path.exists(name)]
    if missing:
        raise InputError(f"{star.name}: {len(missing)} maps of the table are missing, the first is {missing[0]}")
    return rows


def log_summary(rows: Sequence[PairRow]) -> None:
    """Log how many pairs there are of each method in each bin of nominal resolution."""
    methods = sorted({row.method for row in rows})
    counts = {
        method: np.histogram([row.resolution for row in rows if row.method == method], BINS)[0] for method in methods
    }
    labels = [f"{low:g} - {high:g}" for low, high in zip(BINS, BINS[1:], strict=False)]
    labels[0], labels[-1] = f"below {BINS[1]:g}", f"above {BINS[-2]:g}"
    lines = [(label, [int(counts[method][i]) for method in methods]) for i, label in enumerate(labels)]
    lines.append(("all", [int(counts[method].sum()) for method in methods]))
    width = max(8, *map(len, methods))
    logger.info("%-14s %s", "resolution (A)", " ".join(f"{method:>{width}}" for method in methods))
    for label, numbers in lines:
        logger.info("%-14s %s", label, " ".join(f"{number:{width}}" for number in numbers))


def _curves(star: Star) -> list[Floats]:
    texts = star.texts(TABLE, "cryoredFscCurve")
    try:
        return [np.array(text.split(","), dtype=np.float64) for text in texts]
    except ValueError as error:
        raise InputError(f"{star.name}: _cryoredFscCurve: {error}") from None
