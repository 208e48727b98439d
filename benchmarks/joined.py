"""Compare what the map of both halves together is weighted by before the network sees it.

    python benchmarks/joined.py STRUCTURE... [--model NAME]

Each structure is refined as in `cryored simulate pairs --method intermediates`, and the halves of the first and of
the last iteration that counts are averaged. Their FSC is F, and W = 2 F / (1 + F). In each place, weighted and told
sqrt(W), as RELION weights its joined map / W, the share of the signal in the average's power:

- denoised, updated: error of what the network makes of it, and of the updated map by the weights in the model's card,
  to the truth within the molecule's mask, over the truth, up to two shells beyond the halves' 0.143;
- FSC, updated: mean FSC of that to the truth within the mask, in these shells and two more;
- 0.5 at: where the FSC of the updated map to the truth crosses 0.5, in angstrom.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from features import ANGLE, Case, pairs_with

from cryored.maps.fourier import apply_shells
from cryored.maps.fsc import crossing_resolution, shell_correlation, whole_set_fsc
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume
from cryored.prior import device
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, find_model
from cryored.prior.weights import Calibration, model_calibration
from cryored.simulation.intermediates import Experiment
from cryored.simulation.pair_table import Array, Pair
from cryored.simulation.structure import read_atoms

FIGURES = ("denoised", "updated", "FSC, updated", "0.5 at")


def joined(pairs: Sequence[Pair]) -> list[tuple[Pair, Pair]]:
    """Return both halves of the first and of the last iteration."""
    found = [(a, b) for a, b in zip(pairs, pairs[1:], strict=False) if a.fsc is b.fsc]
    return [found[0], found[-1]] if found else []


def judge(
    denoise: Denoiser, weights: Calibration, halves: tuple[Pair, Pair], told: np.ndarray, angpix: float
) -> tuple[float, ...]:
    """Return `FIGURES` of the average of two halves that is weighted by an FSC."""
    truth = halves[0].truth
    average = (halves[0].noisy + halves[1].noisy) / 2
    box, shells = len(truth), np.arange(len(told))
    mask = soft_mask(Volume(truth, angpix)).data
    last = int(np.flatnonzero(halves[0].fsc > 0.143)[-1]) + 2

    denoised = denoise(Volume(apply_shells(average, told), angpix), told).data
    # As the update has it, with the prior that belongs to this weight: K tau2 is told / (1 - told).
    known = np.clip(told, 0.001, 0.999)
    of_shells = weights(known, np.ones(len(known)))
    prior = of_shells.precision * (1 - known) / known
    updated = apply_shells(average, 1 / (1 + prior)) + apply_shells(denoised, of_shells.gain * prior / (1 + prior))

    def error(data: Array) -> float:
        left, whole = (apply_shells(one, shells <= last) * mask for one in (data - truth, truth))
        return float(np.linalg.norm(left) / np.linalg.norm(whole))

    correlation = shell_correlation(updated * mask, truth * mask)[1 : last + 3]
    crossing = crossing_resolution(shells / (box * angpix), shell_correlation(updated, truth), 0.5)
    return error(denoised), error(updated), float(correlation.mean()), crossing


@click.command(help=__doc__)
@click.argument("structures", type=click.Path(exists=True), nargs=-1, required=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--box", default=96, show_default=True)
@click.option("--angpix", default=1.5, show_default=True)
@click.option("--number", default=500, show_default=True, help="Particles.")
@click.option("--snr", default=(0.005, 0.01, 0.03), show_default=True, multiple=True)
@click.option("--seed", default=11, show_default=True)
def main(
    structures: Sequence[str], model: str, box: int, angpix: float, number: int, snr: Sequence[float], seed: int
) -> None:
    """Print the table."""
    device.set_up()
    denoise = Denoiser(find_model(model))
    weights = model_calibration(denoise.model)
    if weights is None:
        raise click.ClickException(f"{model} has no weights in its card")
    click.echo("| structure | SNR | resolution, Å | " + " | ".join(FIGURES) + " |")
    click.echo("|---|" + "---|" * (2 + len(FIGURES)))
    rows = []
    for structure in structures:
        for ratio in snr:
            experiment = Experiment(number, ratio, angle=ANGLE)
            how = {"box": box, "angpix": angpix, "seed": seed}
            for halves in joined(list(pairs_with(read_atoms(structure), Case(), experiment, **how))):
                share = whole_set_fsc(np.clip(halves[0].fsc, 0, 1))
                found = [judge(denoise, weights, halves, told, angpix) for told in (np.sqrt(share), share)]
                rows.append(found)
                cells = [f"{root:.3f} / {whole:.3f}" for root, whole in zip(*found, strict=True)]
                name = Path(structure).name.split(".")[0]
                click.echo(f"| {name} | {ratio:g} | {halves[0].resolution:.1f} | " + " | ".join(cells) + " |")
    if rows:
        ratio = np.exp(np.log([np.divide(whole, root) for root, whole in rows]).mean(axis=0))
        click.echo(f"| W over sqrt(W), mean of {len(rows)} | | | " + " | ".join(f"{one:.3f}" for one in ratio) + " |")


if __name__ == "__main__":
    main()
