"""The weights of a model's denoised maps in the update, measured on maps of known truth (see `cryored.prior.weights`).

Of each map t is the truth, r the unregularised map, f the denoised one, and c the FSC of the shell between half-maps.
In bins of c, each structure counting the same and each shell as a fraction of its power |t|**2,

    g = <t, f> / |f|**2        v = |t - g f|**2        precision = |t|**2 / v

which is what the prior N(g f, v) asks for; tau2 is RELION's estimate of |t|**2. Where the weights K are even within
a shell the update is x = a r + b f with a = c / (c + p (1 - c)) and b = g p (1 - c) / (c + p (1 - c)), so that six
sums a shell tell the error of any weights without a reconstruction.

Where c is of a solvent mask, t, r and f are taken within it: RELION takes away what is outside.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cryored.errors import InputError
from cryored.files.belonging import check_truth, read_mask
from cryored.files.mrc import read_volume
from cryored.files.requests import ENDING, parts_of, read_request_file
from cryored.maps.fourier import forward, multiplicity, shell_index
from cryored.maps.truth_scale import grey_scale
from cryored.maps.volume import Floats, Volume
from cryored.prior.weights import Calibration
from cryored.reconstruction.sums import load_sums
from cryored.reconstruction.update import inverse_prior, reconstruct
from cryored.training.batches import Input
from cryored.training.evaluation import Array, Denoise

logger = logging.getLogger(__name__)

# FSC, edges of the bins. Fewer points than shells in a map, so that the noise of one shell's FSC decides nothing.
EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995, 0.9999)
_BLUSH = 1 / 7  # FSC at which RELION's Blush stops to use its denoised map
_LEAST_SHELLS = 8  # that a bin needs

Weigh = Callable[[Floats], tuple[Floats, Floats]]  # FSC -> the shares a, b of r and f


@dataclass(frozen=True)
class Moments:
    """The six sums of a map's shells 1 to the last with data, in units of |t|**2 of the shell.

    Parameters
    ----------
    structure : str
    resolution : float
        Nominal, in angstrom.
    fsc, rr, ff, tr, tf, rf : (shells,) float64
        Sums of the truth t, the unregularised map r and the denoised map f; tr is <t, r>.
    masked : bool
        All within the solvent mask that RELION corrected the FSC for.
    """

    structure: str
    resolution: float
    fsc: Floats
    rr: Floats
    ff: Floats
    tr: Floats
    tf: Floats
    rf: Floats
    masked: bool = field(default=False, kw_only=True)

    def error(self, a: Floats, b: Floats) -> Floats:
        """Return |t - a r - b f|**2 of each shell."""
        found: Floats = 1 + a * a * self.rr + b * b * self.ff + 2 * (a * b * self.rf - a * self.tr - b * self.tf)
        return found


def moments(
    structure: str,
    resolution: float,
    truth: Array,
    noisy: Array,
    denoised: Array,
    fsc: Floats,
    mask: Array | None = None,
) -> Moments:
    """Return the sums of one map.

    Parameters
    ----------
    structure : str
    resolution : float
        Nominal, in angstrom.
    truth, noisy, denoised : (z, y, x) float32
        On one grey scale; `noisy` is the unregularised map.
    fsc : (shells,) float64
        Of the shells from 0 to the last with data.
    mask : (z, y, x) float32, optional
        The solvent mask that the FSC is of.
    """
    shape, shells = truth.shape, len(fsc)
    if mask is not None:
        truth, noisy, denoised = truth * mask, noisy * mask, denoised * mask
    index = shell_index(shape).ravel()
    twice = multiplicity(shape[2])
    t, r, f = forward(truth), forward(noisy), forward(denoised)

    def by_shell(a: Any, b: Any) -> Floats:
        products = (a.real * b.real + a.imag * b.imag) * twice
        found: Floats = np.bincount(index, weights=products.ravel())[1:shells].astype(np.float64)
        return found

    power = np.maximum(by_shell(t, t), np.finfo(np.float32).tiny)
    sums = (by_shell(*maps) / power for maps in ((r, r), (f, f), (t, r), (t, f), (r, f)))
    return Moments(structure, resolution, np.clip(fsc[1:], 0.0, 1.0), *sums, masked=mask is not None)


def refinement_moments(folder: str, denoise: Denoise, input: Input) -> Iterator[Moments]:
    """Yield the sums of the half-maps of recorded refinements: B and K as RELION wrote them.

    Parameters
    ----------
    folder : str
        RELION's project folder as `cryored.refinement.relion_runs.make_data` makes it: ``truth.mrc``, and requests with
        their arrays in folders below. Its name stands for the structure.
    denoise : callable
        The model.
    input : {"regularised", "unregularised"}
        What it sees.

    Raises
    ------
    InputError
        There is no truth, or no request; or truth or mask have another box.
    """
    place = Path(folder)
    truth = read_volume(place / "truth.mrc")
    stars = [star for star in recorded(folder) if parts_of(star.stem.removesuffix(ENDING))[1] is not None]
    if not stars:
        raise InputError(
            f"{folder}: no request of a half-map with its arrays in a folder below, expected */*{ENDING}.star"
        )
    for star in stars:
        request = read_request_file(os.path.relpath(star, place), folder=place, angpix=truth.voxel_size)
        check_truth(str(place / "truth.mrc"), truth, request)
        sums = load_sums(request)
        raw = reconstruct(sums)
        plain = reconstruct(sums, prior=inverse_prior(request.tau2, request.tau2_fudge, request.pad))
        try:
            scale = grey_scale(raw, truth.data, request.fsc)
        except InputError:  # nothing resolved
            continue
        seen = raw if input == "unregularised" else plain
        denoised = np.asarray(denoise(Volume(seen, truth.voxel_size), request.fsc).data, dtype=np.float32)
        yield moments(
            place.resolve().name,
            request.nominal_resolution(),
            truth.data * np.float32(scale),
            raw,
            denoised,
            request.fsc[: request.r_max],
            None if request.mask is None else read_mask(request.mask, str(star), truth),
        )


def recorded(folder: str) -> list[Path]:
    """Return the requests below a folder whose arrays are still there, in order."""
    return [
        star
        for star in sorted(Path(folder).glob(f"*/*{ENDING}.star"))
        if star.with_name(f"{star.stem}_weight.mrc").exists()
    ]


def measure_weights(maps: Sequence[Moments]) -> dict[str, list[float]]:
    """Return ``fsc``, ``precision`` and ``gain`` as `cryored.prior.weights.parse_calibration` takes them.

    Raises
    ------
    InputError
        The maps have shells in less than two bins.
    """
    fsc = np.concatenate([item.fsc for item in maps])
    tf, ff = (np.concatenate([getattr(item, name) for item in maps]) for name in ("tf", "ff"))
    structure = np.concatenate([[item.structure] * len(item.fsc) for item in maps])
    points: list[tuple[float, float, float]] = []
    for low, high in zip(EDGES[:-1], EDGES[1:], strict=True):
        inside = (fsc >= low) & (fsc < high)
        if inside.sum() < _LEAST_SHELLS:
            continue
        _, which, counts = np.unique(structure[inside], return_inverse=True, return_counts=True)
        share = 1 / counts[which] / len(counts)
        gain = float(share @ tf[inside]) / max(float(share @ ff[inside]), 1e-30)
        left = 1 - 2 * gain * float(share @ tf[inside]) + gain**2 * float(share @ ff[inside])
        if gain > 0:
            points.append((float(share @ fsc[inside]), 1 / max(left, 1e-4), gain))
    if len(points) < 2:
        raise InputError(f"{len(maps)} maps have shells in {len(points)} bins of FSC, expected two at least")
    places, precision, gain_ = zip(*points, strict=True)
    return {
        "fsc": [round(value, 4) for value in places],
        # Better data never make the network's map worse: a dip is chance.
        "precision": [round(float(value), 3) for value in np.maximum.accumulate(precision)],
        "gain": [round(value, 4) for value in gain_],
    }


def fit_weights(maps: Sequence[Moments]) -> dict[str, Any]:
    """Return `measure_weights` of all maps, with the evidence.

    Returns
    -------
    dict
        Beside the three lists: ``error``, the mean over shells and maps of |x - t|**2 over that of the MAP map, for
        eq. 17 with lambda 1, the denoised map alone up to the shell where the FSC falls below 1/7 (MAP beyond), the
        measured weights, and these measured without the structure that they are judged on.
    """
    stored: dict[str, Any] = measure_weights(maps)
    rules: dict[str, Weigh] = {"eq_17": _published, "denoised_to_1_7": _alone, "weights": _weigh(stored)}
    errors: dict[str, list[float]] = {name: [] for name in (*rules, "weights_held_out")}
    structures = sorted({item.structure for item in maps})
    for structure in structures:
        mine = [item for item in maps if item.structure == structure]
        others = [item for item in maps if item.structure != structure]
        judged = dict(rules)
        if others:
            try:
                judged["weights_held_out"] = _weigh(measure_weights(others))
            except InputError as error:
                logger.warning("%s is judged by no weights of the others: %s", structure, error)
        for name, weigh in judged.items():
            ratios = [item.error(*weigh(item.fsc)) / item.error(item.fsc, np.zeros_like(item.fsc)) for item in mine]
            errors[name].append(float(np.mean(np.concatenate(ratios))))
    stored["error"] = {name: round(float(np.mean(values)), 4) for name, values in errors.items() if values}
    stored["maps"] = len(maps)
    stored["structures"] = structures
    return stored


def _published(fsc: Floats) -> tuple[Floats, Floats]:
    return fsc, 1 - fsc


def _alone(fsc: Floats) -> tuple[Floats, Floats]:
    used = np.cumprod(fsc >= _BLUSH).astype(np.float64)
    return fsc * (1 - used), used


def _weigh(stored: dict[str, Any]) -> Weigh:
    return partial(shares, Calibration(tuple(stored["fsc"]), tuple(stored["precision"]), tuple(stored["gain"])))


def shares(calibration: Calibration, fsc: Floats) -> tuple[Floats, Floats]:
    """Return what the update takes of the unregularised and of the denoised map in shells of an FSC, K being even."""
    weights = calibration(fsc.astype(np.float64), np.ones(len(fsc)))
    pull = weights.precision * (1 - fsc)
    whole = np.maximum(fsc + pull, 1e-9)
    return fsc / whole, weights.gain * pull / whole


def by_kind(maps: Sequence[Moments]) -> dict[str, list[Moments]]:
    """Return maps of the whole box and within a mask apart, by the field of the card that weights from them are for."""
    kinds = {"weights": [one for one in maps if not one.masked], "weights_masked": [one for one in maps if one.masked]}
    return {kind: some for kind, some in kinds.items() if some}


def draw_weights(path: str, stored: Mapping[str, dict[str, Any]], maps: Sequence[Moments]) -> None:
    """Draw precision and gain with each shell's own, and the error that they leave beside eq. 17's, as a PNG.

    Parameters
    ----------
    stored : mapping
        Of `fit_weights`, by kind (`by_kind`); of a kind without it only the shells are drawn.
    """
    from cryored.files.plots import new_figure, save_figure

    kinds = by_kind(maps)
    figure = new_figure(11, 3.4 * len(kinds))
    for row, (kind, some) in zip(figure.subplots(len(kinds), 3, squeeze=False), kinds.items(), strict=True):
        _draw_kind(row, stored.get(kind), some, "FSC of the half-maps" + (", within a mask" if some[0].masked else ""))
    save_figure(figure, path)


def _draw_kind(row: Any, stored: dict[str, Any] | None, maps: Sequence[Moments], title: str) -> None:
    left, middle, right = row
    fsc = np.concatenate([item.fsc for item in maps])
    tf, ff = (np.concatenate([getattr(item, name) for item in maps]) for name in ("tf", "ff"))
    own = tf / np.maximum(ff, 1e-30)
    values = {"gain": own, "precision": 1 / np.maximum(1 - own * tf, 1e-4)}
    for axes, name, published in ((left, "precision", "eq. 17"), (middle, "gain", "eq. 17, lambda 1")):
        axes.plot(fsc, values[name], ".", markersize=1.5, color="0.7", label="shells")
        if stored:
            axes.plot(stored["fsc"], stored[name], "o-", markersize=3, label="weights")
        axes.axhline(1, color="C1", linestyle="--", linewidth=0.9, label=published)
        axes.set(xlabel=title, ylabel=name, xlim=(0, 1))
        axes.legend(frameon=False)
    left.set(yscale="log", ylabel="precision (τ² / v)", ylim=(0.8, 2e3))
    middle.set(ylim=(0, 8))
    grid = np.linspace(0.0, 1.0, 21)
    place = np.digitize(fsc, grid) - 1
    rules = {"eq. 17, lambda 1": _published} | ({"weights": _weigh(stored)} if stored else {})
    top = 1.1
    for name, weigh in rules.items():
        ratio = np.concatenate(
            [item.error(*weigh(item.fsc)) / item.error(item.fsc, np.zeros_like(item.fsc)) for item in maps]
        )
        means = [ratio[place == k].mean() if (place == k).any() else np.nan for k in range(20)]
        top = float(np.nanmax([top, *np.multiply(1.05, means)]))
        right.plot((grid[1:] + grid[:-1]) / 2, means, "o-", markersize=3, label=name)
    right.axhline(1, color="0.6", linestyle="--", linewidth=0.9)
    right.set(xlabel=title, ylabel="error power over MAP's", xlim=(0, 1), ylim=(0, top))
    right.legend(frameon=False)
