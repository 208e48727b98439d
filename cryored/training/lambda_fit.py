"""The lambda schedule of a model, fitted to pairs of known truth.

Where RELION's weights K are even within a shell, tau2 = FSC / (1 - FSC) / K, and eq. 17 of Kimanius et al. 2021 becomes

    x = FSC r + lambda (1 - FSC) f

with r the unregularised map and f the denoised one. For a known truth t the lambda of the least error |x - t|**2 is
that of a linear regression, over all shells or in each:

    lambda* = <t - FSC r, (1 - FSC) f> / |(1 - FSC) f|**2

The truth here is the whole one, not the truth times FSC that networks are trained on: it is what the update is to
bring back. Where the FSC is 1 the data decide, and such shells do not count.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryored.errors import InputError
from cryored.files.output import check_target, write_text
from cryored.maps.fourier import Complexes, forward, multiplicity, shell_index
from cryored.maps.volume import Floats, Volume
from cryored.prior.lambda_schedule import Schedule
from cryored.prior.models import check_weights, find_model, write_card
from cryored.simulation.pair_table import Pair, PairRow, read_pairs
from cryored.training.batches import Input
from cryored.training.calibration import (
    Moments,
    by_kind,
    draw_weights,
    fit_weights,
    moments,
    recorded,
    refinement_moments,
)
from cryored.training.evaluation import Array, Denoise, load_pair, shown

logger = logging.getLogger(__name__)

BINS = (0.0, 4.5, 6.0, 8.0, 10.0, 15.0)  # angstrom, edges by nominal resolution
OFF = 18.0  # angstrom: refinements of images without any signal claim 20 A, so what claims no better gets no prior
FALLBACK = {"weights": "eq. 17", "weights_masked": "that without a mask"}
_STEP = 0.1  # width of the bins in spatial frequency times nominal resolution


@dataclass(frozen=True)
class Regression:
    """What the least-squares lambda of one map, or of several, needs; sums add.

    Parameters
    ----------
    product : float
        <t - FSC r, (1 - FSC) f>.
    power : float
        |(1 - FSC) f|**2.
    rest : float
        |t - FSC r|**2, the squared error of lambda 0. All three are in units of |t|**2.
    """

    product: float = 0.0
    power: float = 0.0
    rest: float = 0.0

    def __add__(self, other: Regression) -> Regression:
        """Return the regression over both."""
        return Regression(self.product + other.product, self.power + other.power, self.rest + other.rest)

    @property
    def slope(self) -> float:
        """The lambda of least squares, whatever its sign and size; 0 where the prior has nothing to say."""
        return self.product / self.power if self.power > 0 else 0.0

    @property
    def lam(self) -> float:
        """The best lambda between 0 and 1."""
        return min(1.0, max(0.0, self.slope))

    def error(self, lam: float) -> float:
        """Return the error of a lambda over that of lambda 0, the MAP map."""
        if self.rest == 0:
            return 1.0
        return float(np.sqrt(max(0.0, 1 + lam * (lam * self.power - 2 * self.product) / self.rest)))


@dataclass(frozen=True)
class ShellSums:
    """The regression of one map, shell by shell from shell 0 (left empty) on.

    Parameters
    ----------
    resolution : float
        Nominal, in angstrom.
    edge : float
        Of the box, in angstrom.
    shells : tuple of Regression
    moments : Moments, optional
        For the calibrated weights.
    """

    resolution: float
    edge: float
    shells: tuple[Regression, ...]
    moments: Moments | None = None

    @property
    def total(self) -> Regression:
        """Over all shells."""
        return sum(self.shells, Regression())


def shell_sums(pair: Pair, denoised: Array, voxel_size: float) -> ShellSums:
    """Compare what the data leave open of the truth with the denoised map.

    Parameters
    ----------
    pair : Pair
    denoised : (z, y, x) float32
        On the grey scale of the pair.
    voxel_size : float
        In angstrom.

    Returns
    -------
    ShellSums
        Of the shells 1 up to the last with an FSC above 0.
    """
    shape = pair.truth.shape
    index = shell_index(shape)
    size = max(shape) // 2 + 1
    fsc = np.zeros(int(index.max()) + 1, dtype=np.float32)
    fsc[: min(len(pair.fsc), size)] = np.clip(pair.fsc[:size], 0.0, 1.0)
    last = int(np.flatnonzero(fsc).max(initial=0))
    truth = forward(pair.truth)
    open_part = truth - fsc[index] * forward(pair.noisy)
    prior = (1 - fsc)[index] * forward(denoised)

    twice = multiplicity(shape[2])

    def by_shell(a: Complexes, b: Complexes) -> Floats:
        weights = (a.real * b.real + a.imag * b.imag) * twice
        return np.bincount(index.ravel(), weights=weights.ravel()).astype(np.float64)[1 : last + 1]

    norm = max(float(by_shell(truth, truth).sum()), np.finfo(np.float32).tiny)
    sums = [by_shell(*maps) / norm for maps in ((open_part, prior), (prior, prior), (open_part, open_part))]
    shells = tuple(Regression(*map(float, values)) for values in zip(*sums, strict=True))
    return ShellSums(pair.resolution, max(shape) * voxel_size, (Regression(), *shells))


def regress(denoise: Denoise, rows: Sequence[PairRow], input: Input) -> Iterator[ShellSums]:
    """Denoise each pair's map as it would be in use and yield its sums.

    Parameters
    ----------
    denoise, rows, input
        As of `cryored.training.evaluation.judge`.

    Raises
    ------
    InputError
        A row has no truth.
    """
    for row in rows:
        if row.truth is None:
            raise InputError(f"{row.noisy}: its table names no truth map, expected one; make the pairs anew")
        pair, voxel_size = load_pair(row)
        denoised = np.asarray(denoise(Volume(shown(pair, input), voxel_size), pair.fsc).data, dtype=np.float32)
        sums = shell_sums(pair, denoised, voxel_size)
        known = row.fsc[: len(sums.shells)]
        found = moments(row.structure, row.resolution, pair.truth, pair.noisy, denoised, known)
        yield dataclasses.replace(sums, moments=found)


def fit(maps: Sequence[ShellSums]) -> dict[str, Any]:
    """Fit lambda against nominal resolution, and against spatial frequency over the nominal one.

    Each map counts the same. Lambda lies between 0 and 1 and never rises as resolution gets worse. A bin's point is at
    the mean resolution of its maps. The last one's lambda holds for its worst map; where that bin ends it is 0, since
    nothing speaks for the prior beyond.

    Returns
    -------
    dict
        As `cryored.prior.lambda_schedule.parse_schedule` takes it: ``resolution`` in angstrom, ``lambda``. Beside these
        ``per_shell`` with ``u``, the middles of bins of spatial frequency times nominal resolution, and ``lambda``;
        ``bins`` with, for each, the number of maps, its own lambda without any bounds, and the error of the fitted
        lambda, of lambda 1 and of the paper's over that of lambda 0; ``pairs``.

    Raises
    ------
    InputError
        No map tells anything.
    """
    groups: list[tuple[tuple[float, float], list[ShellSums]]] = []
    for low, high in zip(BINS[:-1], BINS[1:], strict=True):
        inside = [item for item in maps if low <= item.resolution < high and item.total.power > 0]
        if inside:
            groups.append(((low, high), inside))
    if not groups:
        raise InputError(
            f"none of {len(maps)} maps tells a lambda, expected some with a nominal resolution better than "
            f"{BINS[-1]:g} A and an FSC below 1"
        )
    sums = [sum((item.total for item in inside), Regression()) for _, inside in groups]
    resolutions = [float(np.mean([item.resolution for item in inside])) for _, inside in groups]
    lambdas = falling(sums)
    paper = Schedule()
    bins = [
        {
            "resolution": f"{low:g}-{high:g} A",
            "pairs": len(inside),
            "least_squares": round(total.slope, 4),
            "error": round(total.error(lam), 4),
            "error_lambda_1": round(total.error(1.0), 4),
            "error_paper": round(total.error(paper(resolution)), 4),
        }
        for ((low, high), inside), total, resolution, lam in zip(groups, sums, resolutions, lambdas, strict=True)
    ]
    used = [item for _, inside in groups for item in inside]
    points = dict(zip(resolutions, lambdas, strict=True))
    end = groups[-1][0][1]
    points |= {max(item.resolution for item in used): lambdas[-1], OFF if end == BINS[-1] else end: 0.0}
    return {
        "resolution": list(points),
        "lambda": [round(lam, 4) for lam in points.values()],
        "per_shell": _per_shell(used),
        "bins": bins,
        "pairs": len(used),
    }


def falling(sums: Sequence[Regression]) -> list[float]:
    """Return the lambdas of least total error that do not rise from one regression to the next.

    Neighbours that would rise are joined until none does (pool adjacent violators; Barlow et al. 1972, Statistical
    Inference under Order Restrictions).
    """
    blocks: list[tuple[Regression, int]] = []
    for item in sums:
        block, length = item, 1
        while blocks and blocks[-1][0].lam < block.lam:
            before, number = blocks.pop()
            block, length = before + block, number + length
        blocks.append((block, length))
    return [block.lam for block, length in blocks for _ in range(length)]


def _per_shell(maps: Sequence[ShellSums]) -> dict[str, list[float]]:
    """Return lambda in bins of spatial frequency times nominal resolution, where there is anything to tell."""
    found: dict[int, Regression] = {}
    for item in maps:
        for shell, regression in enumerate(item.shells):
            place = int(shell / item.edge * item.resolution / _STEP)
            found[place] = found.get(place, Regression()) + regression
    known = {place: regression for place, regression in sorted(found.items()) if regression.power > 0}
    return {
        "u": [round((place + 0.5) * _STEP, 3) for place in known],
        "lambda": [round(regression.lam, 4) for regression in known.values()],
    }


def fit_files(
    tables: Sequence[str],
    model: str,
    *,
    output: str = "-",
    trust: float = 1.0,
    write_to_card: bool = False,
    plot: str | None = None,
    gpu: bool | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Fit the schedule and the weights of a model on maps of structures that it was not trained on.

    Parameters
    ----------
    tables : sequence of str
        Files pairs.star, and folders of recorded refinements (see `cryored.training.calibration.refinement_moments`).
        The schedule (`fit`) comes from pairs alone, weights within a mask from refinements with
        ``--solvent_correct_fsc``; where there are none the card's stay.
    model : str
        Name or folder.
    output : str
        JSON file, or ``-``; with the names of model and structures, and the model's checksum.
    trust : float
        Stored with the weights (see `cryored.prior.weights.Calibration`).
    write_to_card : bool
        Store schedule and weights in the model's card, where red-update finds them.
    plot : str, optional
        PNG.
    progress : callable
        Is told how many maps are done, and of how many.

    Returns
    -------
    dict, as stored.

    Raises
    ------
    InputError, ModelError, OutputError
        No pairs, maps that are missing or do not fit, no such model, a file that is in the way.
    """
    from cryored.prior.denoiser import Denoiser

    for path in filter(None, (output, plot)):
        check_target(path, overwrite, text=path == output)
    folders = [path for path in tables if Path(path).is_dir()]
    rows = [row for table in tables if table not in folders for row in read_pairs(table)]
    resolved = [row for row in rows if row.resolution < BINS[-1]]
    if len(resolved) < len(rows):
        left_out = len(rows) - len(resolved)
        logger.info("%d of %d pairs left out, at %g A or worse", left_out, len(rows), BINS[-1])
    found = find_model(model)
    check_weights(found)
    denoiser = Denoiser(found, gpu=gpu, threads=threads)
    total = len(resolved) + sum(len(recorded(folder)) for folder in folders)
    maps: list[ShellSums] = []
    measured: list[Moments] = []
    for sums in regress(denoiser, resolved, found.card.input):
        maps.append(sums)
        measured += [] if sums.moments is None else [sums.moments]
        progress(len(measured), total)
    for folder in folders:
        for item in refinement_moments(folder, denoiser, found.card.input):
            measured.append(item)
            progress(len(measured), total)
    of_model = {"model": found.card.name, "sha256": found.card.sha256}
    schedule = found.card.schedule
    if resolved or not folders:
        schedule = fit(maps) | {"structures": sorted({row.structure for row in resolved})} | of_model
    fitted: dict[str, dict[str, Any]] = {}
    for kind, maps_ in by_kind(measured).items():
        try:
            fitted[kind] = fit_weights(maps_) | {"trust": trust} | of_model
        except InputError as error:
            stays = "as the card has it" if getattr(found.card, kind) else FALLBACK[kind]
            logger.warning("no %s: %s; the update stays %s", kind, error, stays)
        else:
            _tell(kind, fitted[kind])
    if write_to_card:
        changes: dict[str, Any] = {"schedule": schedule, **fitted}
        write_card(found.folder, dataclasses.replace(found.card, **changes))
    stored = schedule | fitted
    write_text(output, json.dumps(stored, indent=2) + "\n")
    if plot is not None:
        draw_weights(plot, fitted, measured)
    return stored


def _tell(kind: str, fitted: Mapping[str, Any]) -> None:
    """Log the error that fitted weights leave; warn where it speaks against the prior, or is flattering."""
    error, structures = fitted["error"], fitted["structures"]
    held_out = error.get("weights_held_out")
    logger.info(
        "%s: they leave %.3f of MAP's error%s, eq. 17 with lambda 1 leaves %.3f",
        kind,
        error["weights"],
        "" if held_out is None else f" (held out {held_out:.3f})",
        error["eq_17"],
    )
    if held_out is None:
        logger.warning(
            "%s: judged on %s alone, to which they were fitted; expected maps of two structures, to hold one out",
            kind,
            structures[0],
        )
    judged = error["weights"] if held_out is None else held_out
    if judged >= 1:
        logger.warning(
            "%s: by these maps the prior is no help: with it the update leaves %.3f of MAP's error, expected less than "
            "1; train it further before red-update uses it",
            kind,
            judged,
        )
