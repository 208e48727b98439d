"""The errors of the method *intermediates* beside those of real refinements by RELION.

For each run that bin/harvest-relion has left, the same experiment (truth, number of particles, SNR, start angles) is
refined in miniature, and each of RELION's maps is compared with the intermediate of the nearest nominal resolution:

- error power in each shell up to the current image size, of the map minus the truth;
- error against radius: the mean square of the same error at each distance from the centre, over its mean.

    python benchmarks/stand_in.py DIR/NAME_snr0.06... [--plot FILE.png]

Prints a row for each of RELION's iterations: the geometric mean over shells of the stand-in's error power over
RELION's (1 is alike), the mean of its logarithm's size as a factor, and how far the shapes over radius differ at most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

Curve = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]
_RINGS = 6  # of radius, up to the molecule's


@dataclass(frozen=True)
class Errors:
    """Errors of an iteration, averaged over its halves."""

    resolution: float
    power: Curve  # of each shell, from 1 up to the current image size
    rings: Curve  # mean square error at a distance from the centre, over its mean

    @classmethod
    def of(cls, halves: list[Array], fsc: Curve, resolution: float, truth: Array, radius: float) -> Errors:
        """Measure halves on the truth's grey scale."""
        from cryored.maps.fourier import apply_shells, forward, shell_power
        from cryored.maps.volume import squared_distance

        last = int(np.flatnonzero(fsc)[-1])
        known = np.zeros(len(fsc))
        known[1 : last + 1] = 1.0
        ring = np.minimum(np.sqrt(squared_distance(truth.shape)) / radius * _RINGS, _RINGS).astype(int).ravel()
        powers, rings = [], []
        for half in halves:
            error = apply_shells(half - truth, known)
            powers.append(shell_power(forward(error), error.shape)[1:last])
            rings.append(np.bincount(ring, (error**2).ravel())[:_RINGS] / np.bincount(ring)[:_RINGS])
        profile = np.mean(rings, axis=0)
        return cls(resolution, np.mean(powers, axis=0), profile / profile.mean())


def relion_errors(folder: Path, truth: Array, radius: float) -> list[Errors]:
    """Measure what was harvested from a run, iteration by iteration."""
    from cryored.files.mrc import read_volume
    from cryored.simulation.pair_table import read_pairs

    couples: dict[str, list[object]] = {}
    for row in read_pairs(folder / "pairs" / "pairs.star"):
        couples.setdefault(re.sub(r"_half\d.*", "", Path(row.noisy).name), []).append(row)
    return [
        Errors.of([read_volume(row.noisy).data for row in rows], rows[0].fsc, rows[0].resolution, truth, radius)  # type: ignore[attr-defined]
        for rows in couples.values()
    ]


def stand_in_errors(truth: Array, angpix: float, number: int, snr: float, diameter: float, seed: int) -> list[Errors]:
    """Refine the same experiment in miniature and measure each iteration."""
    from cryored.simulation.intermediates import Experiment, pairs_of, trajectory

    result = []
    rng = np.random.default_rng(seed)
    for intermediate in trajectory(truth, angpix, Experiment(number, snr), diameter=diameter, rng=rng):
        couple = pairs_of(intermediate, truth, angpix)
        halves = [pair.noisy for pair in couple]
        result.append(Errors.of(halves, couple[0].fsc, couple[0].resolution, truth, diameter / angpix / 2))
    return result


def mask_diameter(truth: Array, angpix: float) -> float:
    """Return the diameter in angstrom of a sphere around the molecule, with RELION's margin of 10 A."""
    from cryored.maps.volume import squared_distance

    reach = np.sqrt(squared_distance(truth.shape)[truth > 0.05 * truth.max()].max())
    return min(2 * float(reach) * angpix + 10.0, 0.95 * len(truth) * angpix)


def compare(real: Errors, stand_in: Errors) -> dict[str, float]:
    """Return how alike two iterations are."""
    shells = min(len(real.power), len(stand_in.power))
    logarithm = np.log(stand_in.power[:shells] / real.power[:shells])
    return {
        "resolution_A": round(real.resolution, 2),
        "stand_in_A": round(stand_in.resolution, 2),
        "power_ratio": round(float(np.exp(logarithm.mean())), 2),
        "factor": round(float(np.exp(np.abs(logarithm).mean())), 2),
        "worst_shell": round(float(np.exp(np.abs(logarithm).max())), 2),
        "radius_shape": round(float(np.abs(stand_in.rings - real.rings).max()), 2),
    }


def draw(runs: dict[str, tuple[list[Errors], list[Errors]]], path: Path) -> None:
    """Draw error power over shells and errors over radius: the first, second and last iteration of each run."""
    from cryored.files.plots import new_figure, save_figure

    figure = new_figure(2.7 * len(runs), 5.0)
    axes = figure.subplots(2, len(runs), squeeze=False)
    for column, (name, (real, stand_ins)) in enumerate(runs.items()):
        for color, index in zip(("tab:blue", "tab:orange", "tab:green"), (0, 1, -1), strict=True):
            one, other = real[index], nearest(real[index], index % len(real), stand_ins)
            for errors, style in ((one, "-"), (other, "--")):
                axes[0, column].semilogy(np.arange(1, len(errors.power) + 1), errors.power, style, color=color)
                axes[1, column].plot((np.arange(_RINGS) + 0.5) / _RINGS, errors.rings, style, color=color)
            axes[0, column].plot([], [], color=color, label=f"{one.resolution:.1f} Å")
        axes[0, column].set(title=name, xlabel="shell")
        axes[1, column].set(xlabel="radius / molecule's", ylim=(0, None))
        axes[0, column].legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("error power")
    axes[1, 0].set_ylabel("error over its mean")
    figure.suptitle("RELION (lines) and its stand-in (dashes): first, second and last iteration")
    save_figure(figure, path)


def nearest(real: Errors, index: int, stand_ins: list[Errors]) -> Errors:
    """Return the stand-in of the nearest resolution, of equal ones that of the nearest iteration.

    The first iteration, whose errors are those of the start, has the first for a partner, and no other has it.
    """
    if index == 0:
        return stand_ins[0]
    return min(
        enumerate(stand_ins[1:], 1),
        key=lambda item: (round(abs(np.log(item[1].resolution / real.resolution)), 2), abs(item[0] - index)),
    )[1]


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--number", default=600, show_default=True, help="Particles of each run.")
@click.option("--seed", default=1, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path))
def main(folders: tuple[Path, ...], number: int, seed: int, plot: Path | None) -> None:
    """Compare the runs in FOLDERS, each named NAME_snrX and harvested, with their stand-ins."""
    from cryored.files.mrc import read_volume

    runs, rows = {}, []
    for folder in folders:
        found = re.fullmatch(r"(.+)_snr([0-9.e-]+)", folder.resolve().name)
        if found is None:
            raise click.BadParameter(f"{folder}: expected a name like 1ABC_snr0.06")
        volume = read_volume(folder / "truth.mrc")
        diameter = mask_diameter(volume.data, volume.voxel_size)
        real = relion_errors(folder, volume.data, diameter / volume.voxel_size / 2)
        stand_ins = stand_in_errors(volume.data, volume.voxel_size, number, float(found[2]), diameter, seed)
        runs[found[1]] = real, stand_ins
        for index, one in enumerate(real):
            row = {"run": folder.resolve().name, "iteration": index + 1} | compare(one, nearest(one, index, stand_ins))
            if not rows:
                click.echo("\t".join(row))
            rows.append(row)
            click.echo("\t".join(map(str, row.values())))
    for label in ("power_ratio", "factor", "worst_shell", "radius_shape"):
        values = [float(row[label]) for row in rows]
        click.echo(f"{label}: median {np.median(values):.2f}, from {min(values):.2f} to {max(values):.2f}", err=True)
    if plot is not None:
        draw(runs, plot)


if __name__ == "__main__":
    main()
