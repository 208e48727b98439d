"""How good a prior is on pairs that it has not seen, against no filter and against the best linear one (Wiener)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.mrc import read_volume
from cryored.files.output import check_target, write_text
from cryored.maps.fourier import apply_shells
from cryored.maps.fsc import crossing_resolution, shell_correlation, whole_set_fsc
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Floats, Volume
from cryored.simulation.pair_table import Pair, PairRow, read_pairs
from cryored.training.batches import Input, read_pair

BINS = (0.0, 4.5, 6.0, 8.0, 10.0, np.inf)  # angstrom, edges of the table's rows
FIRST = "first iterations"
_LABELS = ("below 4.5 A", "4.5-6 A", "6-8 A", "8-10 A", "above 10 A")
_FIRST_ITERATION = re.compile(r"_it001_half")  # in the names of RELION's files, and of the maps harvested from them

Array = npt.NDArray[np.float32]
Denoise = Callable[[Volume, Floats], Volume]  # a map and its half-maps' FSC
Target = Literal["weighted", "truth"]  # what a network was trained towards, see `cryored.prior.models.ModelCard`


@dataclass(frozen=True)
class Judgement:
    """One denoised map. Errors are to the target, L2 where nothing else is said, as ratios to another map's.

    Parameters
    ----------
    structure, name : str
        Of the structure and of the map.
    resolution : float
        Nominal, in angstrom.
    error_to_unregularised, l1_error_to_unregularised : float
        Over the unregularised map's (Kimanius et al. 2021, Fig. 1c).
    error_to_wiener, l1_error_to_wiener : float
        Over the FSC-weighted map's.
    inside_error_to_wiener : float
        The same within the molecule's soft mask: what is left if a mask takes the solvent away.
    crossing_wiener, crossing : float
        Where the FSC to the truth falls to 0.5, in angstrom: the weighted and the denoised map's. The box's edge
        where it is lower throughout.
    misled : dict of str to float
        `error_to_wiener` by each of `wrong_curves`.
    """

    structure: str
    name: str
    resolution: float
    error_to_unregularised: float
    l1_error_to_unregularised: float
    error_to_wiener: float
    l1_error_to_wiener: float
    inside_error_to_wiener: float
    crossing_wiener: float
    crossing: float
    misled: dict[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Relative gain in the spatial frequency at which the FSC to the truth falls to 0.5."""
        return self.crossing_wiener / self.crossing - 1

    @property
    def row(self) -> str:
        """Row of the table: first iterations are apart, because their errors are those of the reference."""
        if _FIRST_ITERATION.search(self.name):
            return FIRST
        return _LABELS[int(np.searchsorted(BINS[1:-1], self.resolution, side="right"))]


def judge_map(pair: Pair, denoised: Array, voxel_size: float, *, structure: str, name: str) -> Judgement:
    """Compare a denoised map with the target and the truth of its pair.

    Parameters
    ----------
    pair : Pair
    denoised : (z, y, x) float32
        On the grey scale of the pair.
    voxel_size : float
        In angstrom.
    structure, name : str
        For the judgement.
    """
    wiener = weigh(pair.noisy, pair.fsc)
    errors = [volume - pair.target for volume in (pair.noisy, wiener, denoised)]
    raw, before, after = (float(np.linalg.norm(error)) for error in errors)
    molecule = _molecule(pair.truth, voxel_size)
    inside = [float(np.linalg.norm(error * molecule)) for error in errors[1:]]
    raw_l1, before_l1, after_l1 = (float(np.abs(error).sum(dtype=np.float64)) for error in errors)
    edge = max(pair.truth.shape) * voxel_size
    frequency = np.arange(max(pair.truth.shape) // 2 + 1) / edge
    crossings = [
        min(edge, crossing_resolution(frequency, shell_correlation(volume, pair.truth), 0.5))
        for volume in (wiener, denoised)
    ]
    return Judgement(
        structure,
        name,
        pair.resolution,
        error_to_unregularised=_ratio(after, raw),
        l1_error_to_unregularised=_ratio(after_l1, raw_l1),
        error_to_wiener=_ratio(after, before),
        l1_error_to_wiener=_ratio(after_l1, before_l1),
        inside_error_to_wiener=_ratio(inside[1], inside[0]),
        crossing_wiener=crossings[0],
        crossing=crossings[1],
    )


def judge(
    denoise: Denoise, rows: Sequence[PairRow], input: Input, *, target: Target = "weighted", shift: int = 0
) -> Iterator[Judgement]:
    """Denoise each pair's map as it would be in use, and judge the result.

    Parameters
    ----------
    denoise : callable
        A `Denoiser`, or anything else that takes a `Volume` and an FSC and returns a `Volume`.
    rows : sequence of PairRow
        Where a table has no truth the target stands for it.
    input : {"regularised", "unregularised"}
        What `denoise` is shown: the noisy map weighted by its FSC, or as it is.
    target : {"weighted", "truth"}
        What it returns. Maps are compared with truth times FSC, so an estimate of the truth is weighted first.
    shift : int
        Unless 0, judge with `wrong_curves` too, shifted by so many shells.
    """
    for row in rows:
        pair, voxel_size = load_pair(row)
        name = Path(row.noisy).name
        curves = {"": pair.fsc} | (wrong_curves(pair.fsc, shift) if shift else {})
        found = {}
        for kind, curve in curves.items():
            believed = dataclasses.replace(pair, fsc=curve)
            denoised = np.asarray(denoise(Volume(shown(believed, input), voxel_size), curve).data, dtype=np.float32)
            if target == "truth":
                denoised = weigh(denoised, curve)
            found[kind] = judge_map(believed, denoised, voxel_size, structure=row.structure, name=name)
        judgement = found.pop("")
        yield dataclasses.replace(judgement, misled={kind: item.error_to_wiener for kind, item in found.items()})


def weigh(noisy: Array, curve: Floats) -> Array:
    """Return a map times an FSC between 0 and 1: the best linear filter (Wiener), if the FSC is right."""
    return apply_shells(noisy, np.clip(curve, 0.0, 1.0)).astype(np.float32, copy=False)


def shown(pair: Pair, input: Input) -> Array:
    """Return what a model is shown of a pair."""
    return weigh(pair.noisy, pair.fsc) if input == "regularised" else pair.noisy


def wrong_curves(fsc: Floats, shift: int) -> dict[str, Floats]:
    """Return curves that a user might take for a half-map's FSC.

    Parameters
    ----------
    fsc : (n,) float
        The right one.
    shift : int
        Shells by which the curve ends earlier (``lower``) or later (``higher``).

    Returns
    -------
    dict
        ``lower``, ``higher``, and ``full``: that of the map of all particles (see `whole_set_fsc`).
    """
    shells = np.arange(len(fsc))
    return {
        "lower": fsc[np.minimum(shells + shift, len(fsc) - 1)],
        "higher": fsc[np.maximum(shells - shift, 0)],
        "full": whole_set_fsc(fsc),
    }


def load_pair(row: PairRow) -> tuple[Pair, float]:
    """Read the maps of a row and return them with their voxel size in angstrom; the target may stand for the truth.

    Raises
    ------
    InputError
        Shapes or voxel sizes differ, or the FSC is not finite.
    """
    noisy, target = read_pair(row)
    if not np.all(np.isfinite(row.fsc)):
        raise InputError(f"{row.noisy}: the FSC curve of its table is not finite")
    truth = target if row.truth is None else read_volume(row.truth)
    if truth.shape != noisy.shape or truth.voxel_size != noisy.voxel_size:
        raise InputError(
            f"{row.truth}: {truth.shape} voxels of {truth.voxel_size} A, expected those of {row.noisy}: "
            f"{noisy.shape} voxels of {noisy.voxel_size} A"
        )
    maps = [np.asarray(volume.data, dtype=np.float32) for volume in (noisy, target, truth)]
    return Pair(maps[0], maps[1], row.fsc, row.resolution, maps[2]), noisy.voxel_size


def summarise(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Return a row for each bin of nominal resolution that has maps, one for first iterations and one for all.

    Errors and gains are medians where nothing else is said; shares count the maps that the prior did not make worse.
    """
    table = []
    for label in (*_LABELS, FIRST, "all"):
        inside = [item for item in judgements if label in (item.row, "all")]
        if inside:
            table.append({"resolution": label, "maps": len(inside)} | _statistics(inside))
    return table


def _statistics(judgements: Sequence[Judgement]) -> dict[str, float]:
    def every(name: str) -> Floats:
        return np.array([getattr(item, name) for item in judgements])

    errors, gains = every("error_to_wiener"), every("gain")
    result = {
        "median_error_to_unregularised": np.median(every("error_to_unregularised")),
        "median_l1_error_to_unregularised": np.median(every("l1_error_to_unregularised")),
        "median_error_to_wiener": np.median(errors),
        "median_l1_error_to_wiener": np.median(every("l1_error_to_wiener")),
        "median_inside_error_to_wiener": np.median(every("inside_error_to_wiener")),
        "worst_error_to_wiener": errors.max(),
        "error_not_worse_percent": 100 * np.mean(errors <= 1),
        "median_crossing_gain_percent": 100 * np.median(gains),
        "worst_crossing_gain_percent": 100 * gains.min(),
        "crossing_not_worse_percent": 100 * np.mean(gains >= 0),
    }
    for kind in judgements[0].misled:
        ratios = [item.misled[kind] for item in judgements]
        result |= {
            f"median_error_fsc_{kind}": np.median(ratios),
            f"worst_error_fsc_{kind}": max(ratios),
        }
    return {name: round(float(value), 1 if name.endswith("percent") else 3) for name, value in result.items()}


def _molecule(truth: Array, voxel_size: float) -> Array:
    """Return the mask of a truth; of one without positive density, which no molecule is, the whole box."""
    try:
        return soft_mask(Volume(truth, voxel_size)).data
    except InputError:
        return np.ones_like(truth)


def _ratio(after: float, before: float) -> float:
    """Return after / before; 1 where there was no error and none has come."""
    if before == 0:
        return 1.0 if after == 0 else np.inf
    return after / before


def evaluate_files(
    model: str,
    tables: Sequence[str],
    *,
    output: str = "-",
    maps: str | None = None,
    plot: str | None = None,
    shift: int = 0,
    gpu: bool | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Judge a model on the pairs of `tables` and write the summary as TSV; see `summarise`.

    Parameters
    ----------
    model : str
        Name or folder.
    tables : sequence of str
        Files pairs.star, of structures that the model was not trained on.
    output : str
        TSV of the summary, or ``-``.
    maps : str, optional
        TSV with a row for each map.
    plot : str, optional
        PNG of error and gain against nominal resolution.
    shift : int
        See `judge`.
    progress : callable
        Is told how many maps are done, and of how many.

    Returns
    -------
    list of dict
        The rows of the summary.

    Raises
    ------
    InputError, ModelError, OutputError
        No pairs, maps that are missing or do not fit, no such model, a file that is in the way.
    """
    from cryored.prior.denoiser import Denoiser
    from cryored.prior.models import check_weights, find_model

    for path in filter(None, (output, maps, plot)):
        check_target(path, overwrite, text=path != plot)
    rows = [row for table in tables for row in read_pairs(table)]
    if not rows:
        raise InputError(f"{tables[0]}: lists no pairs, expected some to judge by")
    found = find_model(model)
    check_weights(found)
    judgements: list[Judgement] = []
    for judgement in judge(
        Denoiser(found, gpu=gpu, threads=threads), rows, found.card.input, target=found.card.target, shift=shift
    ):
        judgements.append(judgement)
        progress(len(judgements), len(rows))
    table = summarise(judgements)
    if maps is not None:
        write_text(maps, as_tsv([as_row(item) for item in judgements]))
    write_text(output, as_tsv(table))
    if plot is not None:
        draw_judgements(plot, judgements)
    return table


def draw_judgements(path: str, judgements: Sequence[Judgement]) -> None:
    """Draw error over the Wiener map's and gain of the crossing against nominal resolution, a dot a map, as a PNG."""
    from cryored.files.plots import new_figure, save_figure

    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    shown = [item for item in judgements if np.isfinite(item.resolution)]
    groups = {
        "others": [item for item in shown if item.row != FIRST],
        FIRST: [item for item in shown if item.row == FIRST],
    }
    for (label, items), colour in zip(groups.items(), ("C0", "C1"), strict=True):
        style = {"s": 12, "color": colour, "alpha": 0.6, "linewidths": 0, "label": label}
        resolutions = [item.resolution for item in items]
        left.scatter(resolutions, [item.error_to_wiener for item in items], **style)
        right.scatter(resolutions, [100 * item.gain for item in items], **style)
    for axes, unchanged in ((left, 1), (right, 0)):
        axes.axhline(unchanged, color="0.6", linewidth=0.8, linestyle="--")
        axes.set(xlabel="nominal resolution (Å)")
    # From 0, and above the topmost dot by as much as of the whole height: the margin of the dots alone may be tiny.
    left.set(ylabel="error over the Wiener map's", ylim=(0, 1.05 * left.dataLim.y1))
    right.set(ylabel="FSC-0.5 crossing, gain in frequency (%)")
    if groups[FIRST]:
        left.legend(frameon=False)
    save_figure(figure, path)


def as_row(item: Judgement) -> dict[str, object]:
    """Return the row of a map for TSV."""
    values = dataclasses.asdict(item)
    misled = {f"error_fsc_{kind}": value for kind, value in values.pop("misled").items()}
    values |= {"crossing_gain_percent": 100 * item.gain} | misled
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}


def as_tsv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of the same names as a table with a header."""
    return "".join("\t".join(map(str, line)) + "\n" for line in (rows[0], *(row.values() for row in rows)))
