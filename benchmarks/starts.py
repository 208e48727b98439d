"""Judge a prior in first iterations whose starting references are wrong in ways that it was not trained on.

    python benchmarks/starts.py STRUCTURE... -o DIR [--model NAME] [--snr RATIO,...]

Particles of each structure as `bin/harvest-relion` makes them are refined by RELION (MAP, local searches, two
iterations) from each of `STARTS`, at 30 A. In training a refinement starts from the molecule at 20 to 45 A, half of
the time with 10 to 50 % of another molecule mixed in or with uneven density. A part cut off, a wrong size or shape, a
density beside the molecule and noise the prior has not seen. For each start, of both halves of all structures:

- whole, inside: error of the denoised map to the truth times FSC over that of the FSC-weighted (Wiener) map, median, in
  the box and in the molecule's mask, as `cryored train --evaluate` tells it; worst: the largest of whole;
- gain: worst gain of the 0.5 crossing to the truth.

DIR keeps the pairs; run again it goes on where it stopped, or judges another --model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from scipy import ndimage

from cryored.cli.harvest_relion import ratios
from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume
from cryored.prior import device
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, find_model
from cryored.refinement.harvest_relion import Task, check_settings, plan
from cryored.refinement.relion_runs import LOCAL_SEARCH, RELION_HOOK, make_data, refine
from cryored.simulation.harvest import HarvestOptions, harvest_files
from cryored.simulation.pair_table import Array, read_pairs
from cryored.training.evaluation import Judgement, judge

ITERATIONS = 2
DONE = "refined"  # an empty file: RELION has done its part, also where nothing of it can be used

Start = Callable[[Volume, Array, np.random.Generator], Array]  # of the reference, and that of another structure


def itself(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Return the molecule as it is."""
    return reference.data


def coarse(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Return it at 60 A."""
    return _filtered(reference, 60.0)


def cut(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Cut off a third of the density, by a plane."""
    normal = rng.standard_normal(3)
    along = np.tensordot(normal / np.linalg.norm(normal), _places(reference), axes=1)
    order = np.argsort(along, axis=None)
    mass = np.cumsum(np.maximum(reference.data, 0).ravel()[order])
    limit = along.ravel()[order[np.searchsorted(mass, 2 / 3 * mass[-1])]]
    return reference.data * (along < limit)


def larger(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Enlarge it by a tenth, as a wrong pixel size does."""
    centre = len(reference.data) // 2
    matrix = np.eye(3) / 1.1
    return ndimage.affine_transform(reference.data, matrix, centre - matrix @ np.full(3, centre), order=1)


def smeared(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Smear it along one axis, by 15 A."""
    return ndimage.gaussian_filter1d(reference.data, 15.0 / reference.voxel_size, axis=int(rng.integers(3)))


def noisy(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Add noise of its power, at the resolution of the reference."""
    noise = _filtered(reference.with_data(rng.standard_normal(reference.shape, dtype=np.float32)), 30.0)
    return reference.data + noise * np.float32(reference.data.std() / noise.std())


def beside(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Add a ball beside it, of a third of its mass."""
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    inside = soft_mask(reference).data > 0.5
    reach = np.tensordot(direction, _places(reference), axes=1)[inside].max()
    radius = (inside.sum() / 3 / (4 / 3 * np.pi)) ** (1 / 3)
    offset = _places(reference) - (direction * reach).reshape(3, 1, 1, 1)
    found = np.linalg.norm(offset, axis=0) < radius
    return reference.data + found * np.float32(reference.data.sum() / 3 / max(found.sum(), 1))


def ball(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Return a ball of its volume in its place."""
    volume = (soft_mask(reference).data > 0.5).sum()
    found = np.linalg.norm(_places(reference), axis=0) < (volume / (4 / 3 * np.pi)) ** (1 / 3)
    return found * np.float32(reference.data.sum() / found.sum())


def another(reference: Volume, other: Array, rng: np.random.Generator) -> Array:
    """Return another molecule in its place."""
    return other * np.float32(reference.data.sum() / other.sum())


STARTS: dict[str, Start] = {
    "the molecule": itself,
    "at 60 A": coarse,
    "a third cut off": cut,
    "a tenth larger": larger,
    "smeared along an axis": smeared,
    "with noise of its power": noisy,
    "a ball beside it": beside,
    "a ball in its place": ball,
    "another molecule": another,
}


def _places(volume: Volume) -> np.ndarray:
    """Return the voxels' coordinates (3, z, y, x) from the origin, in voxels."""
    return np.indices(volume.shape, dtype=np.float32) - len(volume.data) // 2


def _filtered(volume: Volume, resolution: float) -> Array:
    """Return a map whose amplitudes have fallen to 1/e at a resolution in angstrom."""
    shells = np.arange(len(volume.data) // 2 + 1) / (len(volume.data) * volume.voxel_size)
    return apply_shells(volume.data, np.exp(-((shells * resolution) ** 2)))


def harvest(task: Task, other: Task, name: str) -> Path:
    """Refine a structure from a start, unless that is done; return its table of pairs."""
    check_settings(task)
    folder = task.folder / name.replace(" ", "_")
    table = folder / "pairs" / "pairs.star"
    if table.exists():
        return table
    data, stranger = (
        make_data(
            one.path,
            one.folder,
            box=one.settings.box,
            angpix=one.settings.angpix,
            number=one.settings.number,
            snr=one.settings.snr,
            perturb=one.settings.perturb_angles,
            seed=one.settings.seed,
        )
        for one in (task, other)
    )
    paths = [one.folder / "particles_reference.mrc" for one in (data, stranger)]
    kept = [path.with_name("own_reference.mrc") for path in paths]
    for path, copy in zip(paths, kept, strict=True):
        if not copy.exists():
            shutil.copyfile(path, copy)
    reference, strange = (read_volume(copy) for copy in kept)
    rng = np.random.default_rng(task.settings.seed)
    start = STARTS[name](reference, strange.data, rng).astype(np.float32)
    write_volume(str(paths[0]), reference.with_data(start), label=f"starting reference: {name}")
    search = (*LOCAL_SEARCH, "--auto_iter_max", str(ITERATIONS))
    if not (folder / DONE).exists():
        refine(data, folder.name, RELION_HOOK, search=search)
        (folder / DONE).touch()
    harvest_files(str(folder), str(data.truth), str(table.parent), HarvestOptions(task.name, float16=True))
    for left in folder.glob("run*"):
        left.unlink()
    return table


def row(name: str, iteration: int, judgements: Sequence[Judgement]) -> str:
    """Return a row of the table."""
    of_iteration = [one for one in judgements if f"_it{iteration:03d}_half" in one.name]
    if not of_iteration:
        return f"| {name} | {iteration} | 0 | | | | |"
    whole, inside, gain = (
        [getattr(one, key) for one in of_iteration] for key in ("error_to_wiener", "inside_error_to_wiener", "gain")
    )
    figures = f"{np.median(whole):.2f} | {np.median(inside):.2f} | {max(whole):.2f} | {100 * min(gain):+.0f} %"
    return f"| {name} | {iteration} | {len(of_iteration)} | {figures} |"


@click.command(help=__doc__)
@click.argument("structures", type=click.Path(exists=True), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--box", default=96, show_default=True)
@click.option("--angpix", default=1.5, show_default=True)
@click.option("--number", default=600, show_default=True, help="Particles.")
@click.option("--snr", default="0.15,0.06,0.02,0.01", callback=ratios, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--start", "starts", type=click.Choice(list(STARTS)), multiple=True, help="By default all.")
def main(
    structures: Sequence[str],
    output: Path,
    model: str,
    box: int,
    angpix: float,
    number: int,
    snr: Sequence[float],
    seed: int,
    starts: Sequence[str],
) -> None:
    """Print the table."""
    device.set_up()
    found = find_model(model)
    denoise = Denoiser(found)
    chosen = starts or list(STARTS)
    if "another molecule" in chosen and len(structures) < 2:
        raise click.UsageError("another molecule needs a second structure; name other starts by --start")
    how = {"box": box, "angpix": angpix, "perturb_angles": 5.0}
    tasks = plan(structures, output, snr=snr, number=number, seed=seed, **how)
    click.echo("| start | iteration | maps | whole | inside | worst | gain |")
    click.echo("|---|---|---|---|---|---|---|")
    for name in chosen:
        judgements: list[Judgement] = []
        for task, other in zip(tasks, [*tasks[1:], tasks[0]], strict=True):
            try:
                rows = read_pairs(harvest(task, other, name))
            except InputError as error:  # nothing of the truth in any map
                click.echo(f"{task.label}, {name}: {error}", err=True)
                continue
            judgements.extend(judge(denoise, rows, found.card.input, target=found.card.target))
        for iteration in range(1, ITERATIONS + 1):
            click.echo(row(name, iteration, judgements))


if __name__ == "__main__":
    main()
