"""The figures, numbered as in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cryored.files.plots import new_figure, save_figure
from paper.measure import Record, frequency, picture_of
from paper.plan import LEVELS, NOISE_RUNS, NOISES, RUNS, STRUCTURES, SWAPPED, Cell
from paper.results import Records

COLOURS = {
    "map": "0.25",
    "red": "tab:red",
    "cwred-paper": "tab:orange",
    "cwred": "tab:blue",
    "cwred-eq17": "tab:olive",
    "map-mask": "0.55",
    "cwred-mask": "tab:cyan",
    "oracle": "tab:pink",
    "cwred-gaussian": "tab:green",
    "cwred-limit": "tab:purple",
    "cwred-forced": "tab:brown",
}
SHOWN = ("map", "map-mask", "cwred-eq17", "cwred", "cwred-mask", "oracle")
PASSES = tuple(name for name, run in RUNS.items() if run.kind == "single-pass")


def draw_figures(records: Records, folder: Path) -> list[Path]:
    """Draw all figures for which runs are finished, as PNG; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in {
        "fig1_single_pass": _single_pass(records),
        "fig2_gaussian": _curves(records, ("map", "cwred-gaussian"), levels=("ii",)),
        "fig3_gaussian_slices": _slices(records, ("map", "cwred-gaussian"), levels=("ii",)),
        "fig4_fsc": _curves(records, SHOWN),
        "fig5_angles": _angles(records, SHOWN),
        "fig6_slices": _slices(records, SHOWN),
        "invented": _invented(records),
    }.items():
        if figure is not None:
            drawn.append(folder / f"{name}.png")
            save_figure(figure, drawn[-1])
    return drawn


def _colour(name: str) -> str:
    return COLOURS[name.removeprefix("pass-")]


def _single_pass(records: Records) -> Any:
    """Draw slices and FSC of one intermediate, and error ratios of all against resolution."""
    passes = {key: record for key, record in records.items() if key[1] in PASSES and record["judgements"]}
    if not passes:
        return None
    cell = next(iter(passes))[0]
    examples = {name: passes[cell, name]["example"] for name in PASSES if (cell, name) in passes}
    pictures: dict[str, str] = {}
    curves: dict[str, tuple[list[float], str]] = {}
    for name, example in examples.items():
        model = name.removeprefix("pass-")
        # The truth and what the models are shown are the same for all.
        pictures |= {(model if key == "denoised" else key): text for key, text in example["pictures"].items()}
        for key, colour in {"unregularised": "0.7", "FSC-weighted": "0.25", "denoised": _colour(name)}.items():
            curves[model if key == "denoised" else key] = (example["truth_fsc"][key], colour)
    figure = new_figure(1.7 * len(pictures), 5.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    for axis, (name, text) in zip(top.subplots(1, len(pictures)), pictures.items(), strict=True):
        _show(axis, text)
        axis.set_title(name, fontsize=8)
    left, middle, right = bottom.subplots(1, 3)
    shells = frequency(next(iter(passes.values())))
    for name, (curve, colour) in curves.items():
        left.plot(shells[1:], curve[1:], color=colour, label=name)
    left.set(xlabel="spatial frequency (1/Å)", ylabel=f"FSC to the truth, {cell}", ylim=(-0.05, 1.02))
    left.legend(frameon=False, fontsize=6)
    for axis, quantity, label in (
        (middle, "error_to_unregularised", "L2 error over the unregularised map's"),
        (right, "l1_error_to_unregularised", "L1 error over the unregularised map's"),
    ):
        for name in PASSES:
            points = [
                (item["resolution"], item[quantity])
                for (_, run), record in passes.items()
                if run == name
                for item in record["judgements"]
                if np.isfinite(item["resolution"])
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), s=6, color=_colour(name), alpha=0.6, linewidths=0)
        axis.set(xlabel="nominal resolution (Å)", ylabel=label)
        axis.set_ylim(bottom=0)
    return figure


def _grid(records: Records, names: Sequence[str], levels: Sequence[str]) -> tuple[Any, dict[Cell, Any]] | None:
    """Return a figure and the axes of each cell that has a run, structures in rows and levels in columns."""
    present = {cell for cell, run in records if run in names and cell.level in levels}
    rows = [structure for structure in STRUCTURES if any(cell.structure == structure for cell in present)]
    columns = [level for level in levels if any(cell.level == level for cell in present)]
    if len(columns) == 1:  # better in one row than in one column
        rows, columns = columns, rows
    if not present:
        return None
    figure = new_figure(1.0 + 2.3 * len(columns), 0.6 + 1.9 * len(rows))
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    placed = {}
    for row, axes_of_row in zip(rows, axes, strict=True):
        for column, axis in zip(columns, axes_of_row, strict=True):
            cell = Cell(row, column) if row in STRUCTURES else Cell(column, row)
            axis.set_title(str(cell), fontsize=8)
            if cell in present:
                placed[cell] = axis
    return figure, placed


def _curves(records: Records, names: Sequence[str], levels: Sequence[str] = LEVELS) -> Any:
    """Draw FSC curves: half-maps dotted, to the truth solid, that with the true angles shaded."""
    if not any(run in names[1:] and cell.level in levels for cell, run in records):
        return None
    grid = _grid(records, names, levels)
    assert grid is not None  # there is a run
    figure, axes = grid
    for cell, axis in axes.items():
        bound = records.get((cell, "true-angles"))
        if bound is not None:
            axis.fill_between(frequency(bound)[1:], 0, bound["truth_fsc"][1:], color="0.9", linewidth=0)
        for name in names:
            if (cell, name) in records:
                _draw(axis, records[cell, name], name)
        axis.set(ylim=(-0.05, 1.02))
    _label(figure, axes, "spatial frequency (1/Å)", "FSC")
    return figure


def _draw(axis: Any, record: Record, name: str) -> None:
    shells = frequency(record)[1:]
    axis.plot(shells, record["half_map_fsc_masked"][1:], ":", color=_colour(name), linewidth=1)
    axis.plot(shells, record["truth_fsc"][1:], color=_colour(name), linewidth=1, label=name)


def _label(figure: Any, axes: Mapping[Cell, Any], x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    handles: dict[str, Any] = {}
    for axis in axes.values():
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)


def _angles(records: Records, names: Sequence[str]) -> Any:
    """Draw what share of particles has an angular error below each value."""
    grid = _grid(records, names, LEVELS)
    if grid is None:
        return None
    figure, axes = grid
    for cell, axis in axes.items():
        for name in names:
            if (cell, name) in records:
                errors = np.sort(records[cell, name]["angular_errors"])
                share = np.arange(1, len(errors) + 1) / len(errors)
                axis.plot(errors, share, color=_colour(name), linewidth=1, label=name)
        axis.set(xscale="log", xlim=(0.1, 180), ylim=(0, 1))
    _label(figure, axes, "angular error (degrees)", "share of particles below")
    return figure


def _slices(records: Records, names: Sequence[str], levels: Sequence[str] = LEVELS) -> Any:
    """Draw central slices of the final maps, a row for each cell."""
    shown = [name for name in names if any(run == name and cell.level in levels for cell, run in records)]
    cells = [cell for cell in dict.fromkeys(cell for cell, _ in records) if cell.level in levels]
    cells = [cell for cell in cells if any((cell, name) in records for name in names[1:])]
    if not cells:
        return None
    figure = new_figure(0.3 + 1.1 * (len(shown) + 1), 0.3 + 1.1 * len(cells))
    axes = figure.subplots(len(cells), len(shown) + 1, squeeze=False)
    for cell, axes_of_row in zip(cells, axes, strict=True):
        pictured = next(records[cell, name]["pictures"] for name in names if (cell, name) in records)
        _show(axes_of_row[0], pictured["truth"])
        axes_of_row[0].set_ylabel(str(cell), fontsize=7)
        for name, axis in zip(shown, axes_of_row[1:], strict=True):
            if (cell, name) in records:
                _show(axis, records[cell, name]["pictures"]["map"])
            else:
                axis.set_axis_off()
    for name, axis in zip(("truth", *shown), axes[0], strict=True):
        axis.set_title(name, fontsize=7)
    return figure


def _show(axis: Any, text: str) -> None:
    axis.imshow(picture_of(text), cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])


def _invented(records: Records) -> Any:
    """Draw the tests for invented detail: refined noise, the swapped prior, noise substitution."""
    noises = [cell for cell in NOISES if (cell, "map") in records]
    tests = {
        "swapped prior": records.get((SWAPPED[1], "swapped")),
        "noise substitution": next((record for (_, run), record in records.items() if run == "substituted"), None),
    }
    tests = {title: record for title, record in tests.items() if record is not None}
    panels = len(noises) + len(tests)
    if not panels:
        return None
    figure = new_figure(0.6 + 2.9 * panels, 2.8)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for cell, axis in zip(noises, axes[: len(noises)], strict=True):
        for name in ("map", *NOISE_RUNS):
            if (cell, name) in records:
                record = records[cell, name]
                axis.plot(frequency(record)[1:], record["half_map_fsc"][1:], ":", color=_colour(name), linewidth=1)
                axis.plot(frequency(record)[1:], record["truth_fsc"][1:], color=_colour(name), linewidth=1, label=name)
        axis.axhline(0.143, color="0.6", linewidth=0.6, linestyle="--")
        axis.set_title(str(cell))
    for (title, record), axis in zip(tests.items(), axes[len(noises) :], strict=True):
        for (name, curve), colour in zip(record["curves"].items(), ("0.25", "tab:cyan", "tab:blue"), strict=True):
            axis.plot(frequency(record)[1:], curve[1:], color=colour, linewidth=1, label=name)
        axis.set_title(title)
    for axis in axes:
        axis.set(xlabel="spatial frequency (1/Å)", ylabel="FSC", ylim=(-0.3, 1.02))
        axis.legend(frameon=False, fontsize=6)
    return figure
