"""What should the network be trained towards, and what told? The same small network, trained in several ways.

    python benchmarks/targets.py PLAIN.star FEATURED.star -o DIR --validation HELD.star --validation HELD_FEATURED.star

The tables are of `cryored simulate pairs --method intermediates` and `--method featured`; those to validate on are of
other structures. Each way of training sees the same crops in the same order, for the same number of steps:

- truth: the truth in the shells that the data determine, as `bin/train-prior` has it; told the FSC
- truth times FSC: the target of Kimanius et al. 2021
- inside: the truth, the error counted a tenth outside the molecule's mask
- by shell: the truth, the error of each shell over that of the MAP map
- eq. 17: the truth, the error of what eq. 17 with lambda 1 makes of the estimate
- update: the truth, the error of what the calibrated update makes of it, by the weights of the shipped model
- not told: the truth; the network is not told the FSC
- featured: as truth, on the second table

For each table to validate on: the error (L2, to the truth times FSC) over the FSC-weighted map's, in the whole box and
in the molecule's mask, medians over maps; and what counts in the end, the mean over shells of the squared error of the
updated map over the MAP map's, both within the mask: by weights fitted without the structure that is judged
(`cryored.training.calibration`), and by the denoised map alone up to an FSC of 1/7. What was trained stays in DIR, and
is not trained again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np

from cryored.maps.fourier import apply_shells, forward, shell_power
from cryored.prior import device, models
from cryored.prior.weights import Calibration, model_calibration
from cryored.simulation.pair_table import PairRow, read_pairs
from cryored.training import calibration, evaluation, from_atoms
from cryored.training.plan import Plan

WAYS = ("truth", "truth times FSC", "inside", "by shell", "eq. 17", "update", "not told", "featured")
FIGURES = ("whole", "inside", "weights", "alone")
OUTSIDE = 0.1  # weight of the error there, of the way *inside*
LEAST = 0.01  # of the MAP map's error in a shell over the largest, of the way *by shell*


@dataclass(frozen=True)
class Sample:
    """A half-map and how the estimate's error counts: |filter * (f - target) + rest|**2, times the weights.

    Parameters
    ----------
    shown, error : (n, n, n) float16
        The standardised regularised map, and that minus its target.
    told : (knots + 1,) float32
    weights : (n, n, n) float32
        Of a voxel's error, and one over the regularised map's mean squared error.
    rest : (n, n, n) float16, optional
        None: 0.
    shells : (n // 2 + 1,) float32, optional
        The filter, by shell; None: 1.
    """

    shown: np.ndarray
    error: np.ndarray
    told: np.ndarray
    weights: np.ndarray
    rest: np.ndarray | None = None
    shells: np.ndarray | None = None


def sample_of(row: PairRow, plan: Plan, way: str) -> Sample:
    """Return a pair as a way of training sees it."""
    from cryored.maps.mask import soft_mask
    from cryored.maps.network_scale import standard_of
    from cryored.maps.volume import Volume
    from cryored.prior.network import condition
    from cryored.training.samples import determined_share

    pair, voxel_size = evaluation.load_pair(row)
    fsc = np.clip(pair.fsc, 0.0, 1.0)
    regularised = apply_shells(pair.noisy, fsc)
    standard = standard_of(regularised, voxel_size)
    target = apply_shells(pair.truth, fsc if way == "truth times FSC" else determined_share(pair.fsc))
    error = (regularised - target) / standard.deviation
    weights = np.ones_like(error)
    rest = shells = None
    if way == "inside":
        weights = OUTSIDE + (1 - OUTSIDE) * soft_mask(Volume(pair.truth, voxel_size)).data
    if way == "by shell":
        power = shell_power(forward(error.astype(np.float32)), error.shape)
        shells = 1 / np.sqrt(np.maximum(power / power.max(), LEAST))
    if way == "eq. 17":
        shells = 1 - fsc
        rest = (regularised - apply_shells(pair.truth, fsc)) / standard.deviation
    if way == "update":
        of_data, shells = calibration.shares(_shipped_weights(), fsc)
        left = apply_shells(pair.noisy, of_data) + apply_shells(target, shells) - target
        rest = left / standard.deviation
    counted = error if shells is None else apply_shells(error, shells)
    if rest is not None:
        counted = counted + rest
    weights = weights / np.mean(weights * counted**2)
    frequency = np.arange(plan.box // 2 + 1) / (plan.box * voxel_size)
    told = condition(None if way == "not told" else pair.fsc, frequency, plan.pixel_size, plan.knots)
    half = np.float16
    return Sample(
        standard.apply(regularised).astype(half),
        error.astype(half),
        told,
        weights.astype(np.float32),
        None if rest is None else rest.astype(half),
        None if shells is None else shells.astype(np.float32),
    )


@cache
def _shipped_weights() -> Calibration:
    weights = model_calibration(models.find_model(models.DEFAULT_MODEL))
    assert weights is not None
    return weights


def draw_crops(samples: Sequence[Sample], plan: Plan, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Return maps (b, c, c, c, 1) and what is told; and for the loss (b, c, c, c, 4): error, weight, rest, filter."""
    from cryored.prior.denoiser import cube_rotations, rotate

    size = plan.crop
    radius = np.sqrt(sum(np.square(f) for f in np.meshgrid(*[np.fft.fftfreq(size) * plan.box] * 3, indexing="ij")))
    index = np.minimum(np.floor(radius + 0.5).astype(int), plan.box // 2 + 1)  # as `apply_shells` has it
    maps, told, true = [], [], []
    for _ in range(plan.batch):
        sample = samples[int(rng.integers(len(samples)))]
        place = tuple(slice(int(start), int(start) + size) for start in rng.integers(plan.box - size + 1, size=3))
        rotation = cube_rotations()[int(rng.integers(24))]
        empty = np.zeros((size,) * 3, np.float32)
        parts = (sample.shown, sample.error, sample.weights, sample.rest)
        shown, error, weights, rest = (
            empty if part is None else rotate(part[place], rotation).astype(np.float32) for part in parts
        )
        shells = np.ones(plan.box // 2 + 1, np.float32) if sample.shells is None else sample.shells
        factor = np.append(shells, 0)[index]
        maps.append(shown[..., None])
        told.append(sample.told)
        true.append(np.stack([error, weights, rest, factor], axis=-1))
    return [np.stack(maps), np.stack(told)], np.stack(true).astype(np.float32)


def loss_of(share: float, filtered: bool) -> Any:
    """Return the loss of `cryored.training.from_atoms`, or the same with the squared error of what is counted."""
    if not filtered:
        return from_atoms.loss_of(share)

    def loss(true: Any, predicted: Any) -> Any:
        from keras import ops

        from cryored.prior.network import LOG_VARIANCE

        error = true[..., 0] - predicted[..., 0]
        counted = _filtered(error, true[..., 3]) + true[..., 2]
        logarithm = ops.clip(predicted[..., 1], *LOG_VARIANCE)
        likelihood = logarithm + ops.stop_gradient(ops.square(error)) * ops.exp(-logarithm)
        return ops.mean(ops.square(counted) * true[..., 1]) + share / 2 * ops.mean(likelihood)

    return loss


def _filtered(data: Any, factor: Any) -> Any:
    """Multiply the transforms of maps (b, c, c, c) by an even, real factor."""
    from keras import ops

    def transform(real: Any, imaginary: Any) -> tuple[Any, Any]:
        real, imaginary = ops.fft2((real, imaginary))
        real, imaginary = ops.fft((ops.moveaxis(real, 1, 3), ops.moveaxis(imaginary, 1, 3)))
        return ops.moveaxis(real, 3, 1), ops.moveaxis(imaginary, 3, 1)

    real, imaginary = transform(data, ops.zeros_like(data))
    # The inverse is the conjugate of the transform of the conjugate.
    real, _ = transform(real * factor, -imaginary * factor)
    return real / float(data.shape[1] ** 3)


def train(way: str, samples: Sequence[Sample], plan: Plan, steps: int, target: Path) -> models.Model:
    """Train a network, and return the model in `target`."""
    network = from_atoms.build(plan)
    network.compile(
        optimizer=network.optimizer,
        loss=loss_of(plan.calibration, filtered=samples[0].shells is not None),
        jit_compile=False,
    )
    rng = np.random.default_rng(plan.seed)
    losses = []
    for step in range(steps):
        network.optimizer.learning_rate = from_atoms.learning_rate(plan, step / steps)
        maps, true = draw_crops(samples, plan, rng)
        losses.append(float(network.train_on_batch(maps, true)))
        if (step + 1) % 100 == 0:
            click.echo(f"{way}: step {step + 1}, loss {np.mean(losses[-100:]):.4f}", err=True)
    state = from_atoms.State(step=steps)
    from_atoms.save(target / "state", network, state, plan)
    model = from_atoms.finish(target / "state", plan, target, 0, " ".join(sys.argv))
    if way == "truth times FSC":
        models.write_card(model.folder, replace(model.card, target="weighted"))
    return models.find_model(str(target))


def judge(model: models.Model, rows: Sequence[PairRow], told: bool) -> dict[str, float]:
    """Return `FIGURES` of a model on the rows of a table."""
    from cryored.maps.mask import soft_mask
    from cryored.maps.volume import Volume
    from cryored.prior.denoiser import Denoiser

    denoiser = Denoiser(model)
    judgements, moments = [], []
    for row in rows:
        pair, voxel_size = evaluation.load_pair(row)
        fsc = pair.fsc
        seen = Volume(evaluation.weigh(pair.noisy, fsc), voxel_size)
        denoised = denoiser(seen, fsc if told else None).data
        weighted = evaluation.weigh(denoised, fsc) if model.card.target == "truth" else denoised
        judgements.append(evaluation.judge_map(pair, weighted, voxel_size, structure=row.structure, name=row.noisy))
        mask = soft_mask(Volume(pair.truth, voxel_size)).data
        masked = (data * mask for data in (pair.truth, pair.noisy, denoised))
        known = fsc[: int(np.flatnonzero(fsc > 0).max(initial=0)) + 1]
        moments.append(calibration.moments(row.structure, row.resolution, *masked, known))
    error = calibration.fit_weights(moments)["error"]
    values = (
        np.median([item.error_to_wiener for item in judgements]),
        np.median([item.inside_error_to_wiener for item in judgements]),
        error["weights_held_out"],
        error["denoised_to_1_7"],
    )
    return dict(zip(FIGURES, map(float, values), strict=True))


@click.command(help=__doc__)
@click.argument("plain", type=click.Path(exists=True))
@click.argument("featured", type=click.Path(exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--validation", type=click.Path(exists=True), multiple=True, required=True)
@click.option("--ways", default=",".join(WAYS), show_default=True)
@click.option("--steps", default=600, show_default=True)
@click.option("--width", default=4, show_default=True)
@click.option("--crop", default=48, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--maps", default=8, show_default=True, help="Half-maps of each structure to train on, at most.")
@click.option("--judged", default=30, show_default=True, help="Half-maps of each table to validate on, at most.")
@click.option("--seed", default=0, show_default=True)
def main(
    plain: str,
    featured: str,
    output: Path,
    validation: tuple[str, ...],
    ways: str,
    steps: int,
    width: int,
    crop: int,
    batch: int,
    maps: int,
    judged: int,
    seed: int,
) -> None:
    """Train each way, and print the table."""
    click.echo(f"training on {device.set_up()}", err=True)
    plan = Plan(width=width, crop=crop, batch=batch, mixed_precision=False, seed=seed)
    held = [thinned(usable(read_pairs(table)), judged) for table in validation]
    columns = [f"{figure} {number + 1}" for number in range(len(held)) for figure in FIGURES]
    click.echo("\t".join(["way", *columns]))
    for way in ways.split(","):
        folder = output / way.replace(" ", "_").replace(".", "")
        if (folder / "card.json").exists():
            model = models.find_model(str(folder))
        else:
            rows = read_pairs(featured if way == "featured" else plain)
            model = train(way, samples_of(rows, plan, way, maps), plan, steps, folder)
        found = [judge(model, rows, told=way != "not told") for rows in held]
        click.echo("\t".join([way, *(f"{one[figure]:.3f}" for one in found for figure in FIGURES)]))


def samples_of(rows: Sequence[PairRow], plan: Plan, way: str, maps: int) -> list[Sample]:
    """Return samples of a table, so many of each structure."""
    found = []
    for structure in sorted({row.structure for row in rows}):
        mine = [row for row in usable(rows) if row.structure == structure]
        found += [sample_of(row, plan, way) for row in thinned(mine, maps)]
    return found


def usable(rows: Sequence[PairRow]) -> list[PairRow]:
    """Return the rows in which anything is resolved."""
    return [row for row in rows if np.isfinite(row.resolution)]


def thinned(rows: Sequence[Any], number: int) -> list[Any]:
    """Return so many rows at most, evenly spread."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int))]


if __name__ == "__main__":
    main()
