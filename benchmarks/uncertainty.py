"""Is sigma right? A model's uncertainty against the error that it makes, on pairs whose truth is known.

    python benchmarks/uncertainty.py PAIRS.star... [--model NAME] [--plot FILE.png] [--fit] [--write-card]
        [--noise-from FSC]

PAIRS.star lists pairs that the model was not trained on. Each half is weighted by its FSC and denoised with
`denoise --uncertainty`; the error is that to what the model was trained towards: the truth in the shells that the data
determine (or the truth times the FSC, by the card's `target`). For each range of resolution, inside the molecule and
outside:

- ratio: root of the mean squared error over that of sigma; 1 is right, above 1 sigma is too small;
- 68 %, 95 %: share of the voxels whose error is below 0.994 and 1.96 sigma, for a normal distribution 68 and 95 %;
- rank: Spearman's correlation of sigma with the error's size, averaged over cubes of six voxels: does sigma say where?
- kept: share of the signal told that the denoised map keeps (`cryored.prior.kept_signal`), median of the resolved
  shells, of those with noise where there is any; doubted: maps of which `cryored denoise` warns.

With --noise-from noise of the same power takes the signal's place from the shell on where the FSC falls below that, as
in `cryored fsc --substitute-noise`, and the network is told that all is well. What it then makes is invented, so sigma
should rise: *rise* is the root mean square of sigma over that of the untouched map.

The plot has the error against sigma in classes of sigma.

With --fit sigma is taken as the network tells it, and put right by a curve (`cryored.training.sigma_fit`) that is
fitted without the structure that is judged; the one of all structures is printed last, and --write-card stores it in
the card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np

from cryored.prior import models

RANGES = ((0.0, 4.5), (4.5, 6.0), (6.0, 8.0), (8.0, 12.0), (12.0, np.inf))
CLASSES = 20
BLOCK = 6  # voxels


@dataclass(frozen=True)
class Part:
    """Errors and sigmas of the voxels of one map, inside the molecule or outside, on the network's grey scale."""

    structure: str
    resolution: float
    place: str
    error: np.ndarray
    sigma: np.ndarray
    rank: float
    rise: float  # of sigma, where noise stands for the signal
    kept: float
    doubted: bool


def parts_of(tables: tuple[str, ...], model: models.Model, noise_from: float | None = None) -> Iterator[Part]:
    """Denoise every pair, and yield what is inside the molecule and what is outside."""
    from scipy.stats import spearmanr

    from cryored.assessment.noise_substitution import substitute_noise
    from cryored.maps.fourier import apply_shells
    from cryored.maps.mask import soft_mask
    from cryored.maps.network_scale import standard_of
    from cryored.maps.volume import Volume
    from cryored.prior.denoiser import Denoiser
    from cryored.prior.kept_signal import kept_signal, resolved_shells, shells_in_doubt
    from cryored.simulation.pair_table import read_pairs
    from cryored.training.evaluation import load_pair
    from cryored.training.samples import determined_share

    denoiser = Denoiser(model)
    rng = np.random.default_rng(1)
    for row in [row for table in tables for row in read_pairs(table)]:
        pair, voxel_size = load_pair(row)
        if not np.isfinite(row.resolution):
            continue
        weighted = Volume(apply_shells(pair.noisy, np.clip(pair.fsc, 0, 1)), voxel_size)
        denoised, sigma = denoiser.with_uncertainty(weighted, pair.fsc)
        untouched, start = sigma.data, 1
        if noise_from is not None:
            low = np.flatnonzero(pair.fsc[1:] < noise_from)
            if not len(low):
                continue
            start = int(low[0]) + 1
            noisy = substitute_noise(weighted.data, start, rng=rng)
            weighted = weighted.with_data(noisy.astype(np.float32))
            denoised, sigma = denoiser.with_uncertainty(weighted, pair.fsc)
        kept = kept_signal(weighted, denoised, pair.fsc)
        resolved = kept[start:][resolved_shells(pair.fsc)[start:]]
        shares = np.median(resolved) if len(resolved) else np.nan, len(shells_in_doubt(kept, pair.fsc)) > 0
        known = determined_share(pair.fsc) if model.card.target == "truth" else np.clip(pair.fsc, 0, 1)
        scale = np.float32(1 / standard_of(weighted.data, voxel_size).deviation)
        error, sigma = (denoised.data - apply_shells(pair.truth, known)) * scale, sigma.data * scale
        inside = soft_mask(Volume(pair.truth, voxel_size)).data > 0.5
        blocks = [_blocks(values)[_blocks(inside.astype(np.float32)) > 0.5] for values in (np.abs(error), sigma)]
        rank = float(spearmanr(*blocks).statistic)
        for place, mask in (("inside", inside), ("outside", ~inside)):
            rise = float(np.sqrt(np.mean(sigma[mask] ** 2) / np.mean((untouched[mask] * scale) ** 2)))
            rank_here = rank if place == "inside" else np.nan
            yield Part(row.structure, row.resolution, place, error[mask], sigma[mask], rank_here, rise, *shares)


def held_out(parts: list[Part]) -> tuple[list[Part], dict[str, Any]]:
    """Return the parts with their sigmas put right by the other structures, and the curve of all."""
    from cryored.prior.sigma import SigmaCurve
    from cryored.training.sigma_fit import fit_sigma, sigma_factors

    factors = [sigma_factors(part.error, part.sigma) for part in parts]
    found = []
    for part in parts:
        others = [item for item, other in zip(factors, parts, strict=True) if other.structure != part.structure]
        curve = fit_sigma(others)
        found.append(replace(part, sigma=SigmaCurve(tuple(curve["told"]), tuple(curve["measured"]))(part.sigma)))
    maps = {"structures": sorted({part.structure for part in parts}), "maps": len(parts) // 2}
    return found, fit_sigma(factors) | maps


def _blocks(data: np.ndarray) -> np.ndarray:
    """Return the means of cubes."""
    n = len(data) // BLOCK
    return data[: n * BLOCK, : n * BLOCK, : n * BLOCK].reshape((n, BLOCK) * 3).mean(axis=(1, 3, 5))


@click.command()
@click.argument("tables", type=click.Path(exists=True), nargs=-1, required=True)
@click.option("--model", default=models.DEFAULT_MODEL, show_default=True)
@click.option("--plot", type=click.Path())
@click.option("--fit", is_flag=True)
@click.option("--write-card", is_flag=True)
@click.option("--noise-from", type=float)
def main(
    tables: tuple[str, ...], model: str, plot: str | None, fit: bool, write_card: bool, noise_from: float | None
) -> None:
    """Print the figures as a table."""
    if noise_from is not None and (fit or write_card):
        raise click.UsageError("--noise-from has no meaning with --fit and --write-card")
    found = models.find_model(model)
    if fit or write_card:
        told = replace(found, card=replace(found.card, sigma={}))
        parts, curve = held_out(list(parts_of(tables, told)))
    else:
        parts, curve = list(parts_of(tables, found, noise_from)), {}
    click.echo("resolution\tplace\tmaps\tratio\t68 %\t95 %\trank\trise\tkept\tdoubted")
    for place in ("inside", "outside"):
        for low, high in (*RANGES, (0.0, np.inf)):
            some = [part for part in parts if part.place == place and low <= part.resolution < high]
            if not some:
                continue
            # A map counts as one, however large its molecule: medians over maps.
            ratio = [np.sqrt(np.mean(part.error**2) / np.mean(part.sigma**2)) for part in some]
            within = [[np.mean(np.abs(part.error) < k * part.sigma) for part in some] for k in (0.994, 1.96)]
            name = "all" if low == 0 and high == np.inf else f"{low:g}-{high:g}"
            kept = [part.kept for part in some if np.isfinite(part.kept)]  # none where no resolved shell has noise
            rank = "" if place == "outside" else f"{np.median([part.rank for part in some]):.2f}"
            click.echo(
                f"{name}\t{place}\t{len(some)}\t{np.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})"
                f"\t{100 * np.median(within[0]):.0f}\t{100 * np.median(within[1]):.0f}\t{rank}"
                f"\t{np.median([part.rise for part in some]):.2f}\t{np.median(kept) if kept else np.nan:.2f}"
                f"\t{sum(part.doubted for part in some)}"
            )
    if curve:
        click.echo(json.dumps(curve))
    if write_card:
        models.write_card(found.folder, replace(found.card, sigma=curve))
    if plot is not None:
        draw(plot, parts)


def draw(path: str, parts: list[Part]) -> None:
    """Draw the error against sigma, both over the map's own largest sigma inside."""
    from cryored.files.plots import new_figure, save_figure

    figure = new_figure(9.0, 4.0)
    for axis, place in zip(figure.subplots(1, 2), ("inside", "outside"), strict=True):
        for low, high in RANGES:
            some = [part for part in parts if part.place == place and low <= part.resolution < high]
            if not some:
                continue
            curves = []
            for part in some:
                unit = np.percentile(part.sigma, 99)
                edges = np.quantile(part.sigma, np.linspace(0, 1, CLASSES + 1))
                which = np.clip(np.searchsorted(edges, part.sigma) - 1, 0, CLASSES - 1)
                count = np.maximum(np.bincount(which, minlength=CLASSES), 1)
                curves.append(
                    [
                        np.sqrt(np.bincount(which, values.astype(np.float64) ** 2, CLASSES) / count) / unit
                        for values in (part.sigma, part.error)
                    ]
                )
            x, y = np.median(curves, axis=0)
            axis.plot(x, y, "o-", markersize=3, label=f"{low:g}-{high:g} A, {len(some)} maps")
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        axis.set(title=place, xlabel="sigma", ylabel="error, root mean square", xlim=(0, None), ylim=(0, None))
        axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
