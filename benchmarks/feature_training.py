"""What is a feature of real maps worth in the training data? One at a time, the same small network, at equal cost.

    python benchmarks/feature_training.py STRUCTURE... --validation STRUCTURE --validation STRUCTURE -o DIR

One network is trained on density as it is, and one for each case of benchmarks/features.py on the same molecules,
particles and noise with that feature, from the same weights and for as many steps (with the same crops, where as many
half-maps are resolved); the last on features and views drawn at random for each molecule, as `bin/train-prior` draws
them. A second seed of the first tells what chance does. Each row is of half-maps of the --validation structures: of
those with the row's feature, by the network that was trained on density as it is / by that of the row; then of those
without, by that of the row. nan: too few maps are resolved for weights.

- inside: error to the truth times FSC over the FSC-weighted map's, within the molecule's mask;
- update: squared error to the truth over the MAP map's within the mask, by weights fitted to the network's maps of the
  other structures (`cryored.training.calibration`);
- alone: the same of the denoised map, up to an FSC of 1/7.

What was trained stays in DIR, and is not trained again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from features import ANGLE, CASES, LARGEST, NONE, Case, denoised_map, pairs_with, sums_of
from targets import Sample, thinned, train

from cryored.errors import InputError
from cryored.maps.fourier import apply_shells
from cryored.maps.network_scale import standard_of
from cryored.prior import device, models
from cryored.prior.denoiser import Denoiser
from cryored.prior.network import condition
from cryored.simulation.features import draw_features, draw_views
from cryored.simulation.intermediates import Experiment
from cryored.simulation.pair_table import Pair
from cryored.simulation.structure import read_atoms
from cryored.training import calibration, evaluation
from cryored.training.plan import Plan
from cryored.training.samples import determined_share

DRAWN = "all, drawn at random"
AGAIN = "none, another seed"
SNR = (0.01, 0.2)  # drawn between, for the molecules to train on
PARTICLES = 500
VALIDATION_SEED = 1000  # of the first molecule to validate on; the others' begin at 0


def case_of(name: str, seed: int) -> Case:
    """Return the case of a row for the molecule of a seed."""
    if name == DRAWN:
        rng = np.random.default_rng(seed)
        return Case(draw_features(rng=rng), draw_views(rng=rng))
    return CASES[NONE if name == AGAIN else name]


def sample_of(pair: Pair, plan: Plan, case: Case) -> Sample:
    """Return a half-map as it is trained on: the target is the truth in the shells that the data determine."""
    angpix = plan.pixel_size
    seen = case.shown(pair, angpix)
    standard = standard_of(seen, angpix)
    target = case.sharpen(apply_shells(pair.truth, determined_share(pair.fsc)), angpix)
    error = (seen - target) / standard.deviation
    frequency = np.arange(plan.box // 2 + 1) / (plan.box * angpix)
    told = condition(pair.fsc, frequency, angpix, plan.knots)
    weights = np.full_like(error, 1 / np.mean(error**2))
    return Sample(standard.apply(seen).astype(np.float16), error.astype(np.float16), told, weights)


def pairs_of(structures: Sequence[str], name: str, plan: Plan, snr: float | None) -> Iterator[tuple[int, list[Pair]]]:
    """Yield each molecule's seed and half-maps; without a signal-to-noise ratio, to train on, it is drawn."""
    for number, structure in enumerate(structures, 0 if snr is None else VALIDATION_SEED):
        drawn = np.exp(np.random.default_rng(number).uniform(*np.log(SNR)))
        experiment = Experiment(PARTICLES, float(drawn) if snr is None else snr, angle=ANGLE)
        how = {"box": plan.box, "angpix": plan.pixel_size, "seed": number}
        pairs = list(pairs_with(read_atoms(structure), case_of(name, number), experiment, **how))
        if pairs:
            yield number, pairs
        else:
            click.echo(f"{structure}, {name}: no half-map better than {LARGEST:g} A; left out", err=True)


def samples_of(structures: Sequence[str], name: str, plan: Plan, maps: int) -> list[Sample]:
    """Return samples of the molecules with a feature, so many of each at most."""
    found = []
    for number, pairs in pairs_of(structures, name, plan, None):
        found += [sample_of(pair, plan, case_of(name, number)) for pair in thinned(pairs, maps)]
    return found


def judge(model: models.Model, held: Sequence[tuple[int, list[Pair]]], name: str) -> tuple[float, float, float]:
    """Return inside, update and alone of a model on maps with a feature; NaN where too few are resolved for a fit."""
    denoise, angpix = Denoiser(model), model.card.pixel_size
    inside, sums = [], []
    for number, pairs in held:
        for pair in pairs:
            denoised = denoised_map(denoise, pair, angpix, case_of(name, number))
            weighted = evaluation.weigh(denoised, pair.fsc)
            judged = evaluation.judge_map(pair, weighted, angpix, structure="", name="")
            inside.append(judged.inside_error_to_wiener)
            sums.append(sums_of(pair, denoised, angpix, str(number)))
    try:
        error = calibration.fit_weights(sums)["error"]
    except InputError:
        error = {}
    update, alone = (float(error.get(name, np.nan)) for name in ("weights_held_out", "denoised_to_1_7"))
    return float(np.mean(inside)), update, alone


@click.command(help=__doc__)
@click.argument("structures", type=click.Path(exists=True), nargs=-1, required=True)
@click.option("--validation", type=click.Path(exists=True), multiple=True, required=True, help="Two at least.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--case", "cases", multiple=True, help="Only this row. Can be repeated.")
@click.option("--steps", default=600, show_default=True)
@click.option("--width", default=4, show_default=True)
@click.option("--crop", default=48, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--maps", default=6, show_default=True, help="Half-maps of each structure to train on, at most.")
@click.option("--judged", default=6, show_default=True, help="Half-maps of each structure to validate on, at most.")
@click.option("--snr", default=0.02, show_default=True, help="Of the particles of the structures to validate on.")
@click.option("--box", default=96, show_default=True)
@click.option("--angpix", default=1.5, show_default=True)
def main(
    structures: Sequence[str],
    validation: Sequence[str],
    output: Path,
    cases: tuple[str, ...],
    steps: int,
    width: int,
    crop: int,
    batch: int,
    maps: int,
    judged: int,
    snr: float,
    box: int,
    angpix: float,
) -> None:
    """Train each case, and print the table."""
    click.echo(f"training on {device.set_up()}", err=True)

    def held_with(name: str) -> list[tuple[int, list[Pair]]]:
        found = pairs_of(validation, name, plan_of(name), snr)
        return [(number, thinned(pairs, judged)) for number, pairs in found]

    def plan_of(name: str) -> Plan:
        how = {"box": box, "pixel_size": angpix, "width": width, "crop": crop, "batch": batch}
        return Plan(mixed_precision=False, seed=int(name == AGAIN), **how)

    def trained(name: str) -> models.Model:
        folder = output / "".join(letter if letter.isalnum() else "_" for letter in name)
        if (folder / "card.json").exists():
            return models.find_model(str(folder))
        samples = samples_of(structures, name, plan_of(name), maps)
        if not samples:
            raise click.ClickException(f"{name}: no half-map to train on is better than {LARGEST:g} A")
        return train(name, samples, plan_of(name), steps, folder)

    first, ideal = trained(NONE), held_with(NONE)
    click.echo("| trained on | inside, without / with | update | alone | maps without it: inside | update | alone |")
    click.echo("|---|---|---|---|---|---|---|")
    names = cases or (AGAIN, *list(CASES)[1:], DRAWN)
    plain = judge(first, ideal, NONE)
    click.echo(f"| {NONE} | - | - | - | " + " | ".join(f"{value:.3f}" for value in plain) + " |")
    for name in names:
        own, held = trained(name), ideal if case_of(name, 0) == CASES[NONE] else held_with(name)
        with_it = zip(judge(first, held, name), judge(own, held, name), strict=True)
        cells = [f"{without:.3f} / {mine:.3f}" for without, mine in with_it]
        cells += [f"{value:.3f}" for value in judge(own, ideal, NONE)]
        click.echo(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
