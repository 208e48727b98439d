"""A training pair, and pairs.star, the table that lists pairs with all that is known of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.star import Star, read_star, write_star
from cryored.volume import Floats

TABLE = "pairs"  # the block of pairs.star
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
    """

    noisy: Array
    target: Array
    fsc: Floats
    resolution: float


@dataclass(frozen=True)
class PairRow:
    """One row of pairs.star, with paths that can be opened from the current folder."""

    noisy: str
    target: str
    structure: str
    half: int
    resolution: float
    fsc: Floats
    method: str
    seed: int


def write_pairs(path: Path, rows: Sequence[PairRow], *, made_by: str) -> None:
    """Write pairs.star; paths are stored relative to its folder."""

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
    write_star(path, {"made": {"by": made_by}, TABLE: columns})


def read_pairs(path: str | os.PathLike[str]) -> list[PairRow]:
    """Read pairs.star; raise `InputError` for a missing column or a map that is not there."""
    star = read_star(path)
    folder = Path(path).parent

    def column(label: str) -> list[str]:
        return star.texts(TABLE, label)

    rows = [
        PairRow(noisy, target, structure, int(half), resolution, curve, method, int(seed))
        for noisy, target, structure, half, resolution, curve, method, seed in zip(
            [str(folder / name) for name in column("cryoredNoisyMap")],
            [str(folder / name) for name in column("cryoredTargetMap")],
            column("cryoredStructure"),
            column("cryoredHalf"),
            star.numbers(TABLE, "cryoredNominalResolution"),
            _curves(star),
            column("cryoredMethod"),
            column("cryoredSeed"),
            strict=True,
        )
    ]
    missing = [name for row in rows for name in (row.noisy, row.target) if not os.path.exists(name)]
    if missing:
        raise InputError(f"{star.name}: {len(missing)} maps of the table are missing, the first is {missing[0]}")
    return rows


def _curves(star: Star) -> list[Floats]:
    texts = star.texts(TABLE, "cryoredFscCurve")
    try:
        return [np.array(text.split(","), dtype=np.float64) for text in texts]
    except ValueError as error:
        raise InputError(f"{star.name}: _cryoredFscCurve: {error}") from None
