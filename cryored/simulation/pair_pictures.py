"""A look at training pairs: slices through noisy map, target and truth."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from cryored.files.mrc import read_volume
from cryored.files.plots import new_figure, save_figure
from cryored.simulation.pair_table import PairRow

_SHOWN = 6  # pairs of a picture
_INCH = 1.9  # edge of a slice


def spread(rows: Sequence[PairRow], number: int = _SHOWN) -> list[PairRow]:
    """Return at most `number` first halves, evenly spread over their ranks in resolution, the best first."""
    firsts = sorted((row for row in rows if row.half == 1), key=lambda row: row.resolution)
    picked = np.linspace(0, len(firsts) - 1, min(number, len(firsts)))
    return [firsts[index] for index in np.rint(picked).astype(int)]


def draw_pairs(path: str | os.PathLike[str], rows: Sequence[PairRow]) -> None:
    """Draw the central slices (normal to z) of a few pairs as a PNG file, each with a grey scale of its own.

    Raises
    ------
    CryoredError
        matplotlib is not installed.
    InputError
        A map cannot be read.
    """
    shown = spread(rows)
    figure = new_figure(3 * _INCH + 0.65, len(shown) * _INCH + 0.3)
    grid = figure.subplots(len(shown), 3, squeeze=False)
    for axes, kind in zip(grid[0], ("noisy", "target", "truth"), strict=True):
        axes.set_title(kind, fontsize=10)
    for line, row in zip(grid, shown, strict=True):
        for axes, name in zip(line, (row.noisy, row.target, row.truth), strict=True):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if name is not None:
                data = read_volume(name).data
                section = data[len(data) // 2]
                low, high = np.percentile(section, (0.5, 99.8))
                axes.imshow(section, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
        resolution = f"{row.resolution:.1f} Å" if math.isfinite(row.resolution) else "no FSC\nabove 0.143"
        line[0].set_ylabel(f"{row.structure}\n{resolution}", rotation=0, ha="right", va="center", fontsize=9)
    save_figure(figure, path)
