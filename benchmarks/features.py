"""What does each feature of real maps change for a prior? One at a time, on structures that it was not trained on.

    python benchmarks/features.py STRUCTURE... [--model NAME] [--plain]

Each structure's density is made as it is and once with each feature (`cryored.simulation.features`), and refined as in
`cryored simulate pairs --method intermediates`: the same orientation, particles and noise, so that rows differ by the
feature alone. Each row is a mean over structures and the later iterations of

- FSC: between the half-maps, over the shells up to their 0.143: how good the data are;
- whole, inside: the denoised map's error to the truth times FSC over the FSC-weighted map's, in the box and in the
  molecule's mask;
- alone: the squared error of the denoised map to the truth over the MAP map's, within the mask, mean of these shells;
- update: the same of the updated map, by the weights in the model's card.

The last two rows are of the same half-maps as the first, which the network sees otherwise. With --plain there are no
features, and a row for each structure. What a feature is worth in training is the matter of feature_training.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import numpy as np

from cryored.maps.fourier import apply_shells
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, Model, find_model
from cryored.prior.weights import model_calibration
from cryored.reconstruction.projection import EVEN, Views
from cryored.simulation.features import Features, featured_map
from cryored.simulation.gaussian import turned
from cryored.simulation.intermediates import Experiment, pairs_of, trajectory
from cryored.simulation.pair_table import Array, Pair
from cryored.simulation.structure import Atoms, read_atoms
from cryored.training import calibration, evaluation


@dataclass(frozen=True)
class Case:
    """A feature of the density, of its views, or of how the network sees the map.

    Parameters
    ----------
    features : Features
    views : Views
    masked : bool
        The network sees what is within the molecule's mask.
    sharpening : float
        In squared angstrom: what the network sees is sharpened, and its answer blurred again.
    """

    features: Features = Features()
    views: Views = EVEN
    masked: bool = False
    sharpening: float = 0.0

    def sharpen(self, data: Array, angpix: float, sign: int = 1) -> Array:
        """Return a map sharpened, or blurred with a sign of -1."""
        if not self.sharpening:
            return data
        frequency = np.arange(len(data) // 2 + 1) / (len(data) * angpix)
        return apply_shells(data, np.exp(sign * self.sharpening / 4 * frequency**2))

    def shown(self, pair: Pair, angpix: float) -> Array:
        """Return what the network sees of a half-map."""
        seen = self.sharpen(evaluation.weigh(pair.noisy, pair.fsc), angpix)
        return seen * soft_mask(Volume(pair.truth, angpix)).data if self.masked else seen


NONE = "none"
CASES: dict[str, Case] = {
    NONE: Case(),
    "fall-off, B 80 A^2": Case(Features(bfactor=80)),
    "B factors spread by 60 A^2": Case(Features(spread=60)),
    "a domain turned by 8 degrees": Case(Features(motion=8)),
    "8 glycans": Case(Features(blobs=8)),
    "a micelle's belt": Case(Features(belt=0.6)),
    "solvent contrast 0.5": Case(Features(solvent=0.5)),
    "views along an axis": Case(views=Views(unevenness=4)),
    "views from the side": Case(views=Views(unevenness=-4)),
    "a missing cone of 30 degrees": Case(views=Views(missing_cone=30)),
    "seen within a mask": Case(masked=True),
    "seen sharpened by 60 A^2": Case(sharpening=60),
}
SKIPPED = 2  # iterations, whose maps are the starting reference's
LARGEST = 12.0  # angstrom, of a map that counts
ANGLE = 8.0  # degrees that the particles' orientations are off at first


def pairs_with(
    atoms: Atoms, case: Case, experiment: Experiment, *, box: int, angpix: float, seed: int
) -> Iterator[Pair]:
    """Yield the half-maps of an experiment's later iterations; all but the features is decided by the seed."""
    molecule = turned(atoms, box * angpix, np.random.default_rng(seed))
    truth = featured_map(molecule, box, angpix, 2 * angpix, case.features, rng=np.random.default_rng(seed + 1))
    diameter = 2 * float(np.linalg.norm(molecule.positions, axis=1).max()) + 10.0
    rng = np.random.default_rng(seed + 2)
    path = trajectory(truth, angpix, experiment, diameter=diameter, views=case.views, rng=rng)
    for intermediate in islice(path, SKIPPED, None):
        for pair in pairs_of(intermediate, truth, angpix):
            if pair.resolution <= LARGEST:
                yield pair


def denoised_map(denoise: Denoiser, pair: Pair, angpix: float, case: Case) -> Array:
    """Return what the network makes of a half-map, with the map's own fall-off."""
    return case.sharpen(denoise(Volume(case.shown(pair, angpix), angpix), pair.fsc).data, angpix, sign=-1)


def sums_of(pair: Pair, denoised: Array, angpix: float, structure: str = "") -> calibration.Moments:
    """Return the sums within the molecule's mask, over the shells up to the half-maps' 0.143."""
    mask = soft_mask(Volume(pair.truth, angpix)).data
    resolved = int(np.flatnonzero(pair.fsc > 0.143).max(initial=1)) + 1
    maps = (pair.truth, pair.noisy, denoised)
    return calibration.moments(structure, pair.resolution, *maps, pair.fsc[:resolved], mask)


def judge(model: Model, denoise: Denoiser, pair: Pair, angpix: float, case: Case) -> tuple[float, ...]:
    """Return FSC, whole, inside, alone and update of a half-map."""
    denoised = denoised_map(denoise, pair, angpix, case)
    weighted = evaluation.weigh(denoised, pair.fsc) if model.card.target == "truth" else denoised
    judged = evaluation.judge_map(pair, weighted, angpix, structure="", name="")
    sums = sums_of(pair, denoised, angpix)
    plain = sums.error(sums.fsc, np.zeros_like(sums.fsc))
    alone = sums.error(np.zeros_like(sums.fsc), np.ones_like(sums.fsc))
    weights = model_calibration(model)
    update = alone if weights is None else sums.error(*calibration.shares(weights, sums.fsc))
    figures = sums.fsc.mean(), judged.error_to_wiener, judged.inside_error_to_wiener
    return (*map(float, figures), float((alone / plain).mean()), float((update / plain).mean()))


@click.command(help=__doc__)
@click.argument("structures", type=click.Path(exists=True), nargs=-1, required=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--box", default=96, show_default=True)
@click.option("--angpix", default=1.5, show_default=True)
@click.option("--number", default=500, show_default=True, help="Particles.")
@click.option("--snr", default=0.02, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--plain", is_flag=True, help="Structures as they are, one by one.")
def main(
    structures: Sequence[str], model: str, box: int, angpix: float, number: int, snr: float, seed: int, plain: bool
) -> None:
    """Print the table."""
    found = find_model(model)
    denoise = Denoiser(found)
    experiment = Experiment(number, snr, angle=ANGLE)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for structure in structures:
        atoms = read_atoms(structure)
        made: dict[tuple[Features, Views], list[Pair]] = {}
        for name, case in {Path(structure).name.split(".")[0]: Case()}.items() if plain else CASES.items():
            same = case.features, case.views
            if same not in made:
                made[same] = list(pairs_with(atoms, case, experiment, box=box, angpix=angpix, seed=seed))
            rows.setdefault(name, []).extend(judge(found, denoise, pair, angpix, case) for pair in made[same])
        click.echo(f"{structure}: {len(made[Features(), EVEN])} half-maps without any feature", err=True)
    click.echo(f"| {'structure' if plain else 'feature'} | maps | FSC | whole | inside | alone | update |")
    click.echo("|---|---|---|---|---|---|---|")
    for name, figures in rows.items():
        if figures:
            means = " | ".join(f"{value:.3f}" for value in np.mean(figures, axis=0))
            click.echo(f"| {name} | {len(figures)} | {means} |")


if __name__ == "__main__":
    main()
