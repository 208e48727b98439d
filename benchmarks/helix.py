"""What the prior does to a helix, which fills the box as no molecule does that it was trained on.

Subunits of an atomic model on a helix through the box, white noise on two halves, one of them weighted by their FSC and
denoised: FSC to the truth before and after, by resolution, and the error's power inside the molecule over that of the
weighted half. A second model, in an empty box, stands beside it at about the same FSC.

    python benchmarks/helix.py SUBUNIT GLOBULAR
"""

from __future__ import annotations

import click
import numpy as np

from cryored.maps.fourier import apply_shells
from cryored.maps.fsc import shell_correlation
from cryored.maps.volume import Volume, window
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, find_model
from cryored.simulation.density import gaussian_map
from cryored.simulation.structure import Atoms, read_atoms

BOX, ANGPIX = 96, 1.5
RISE, TWIST, RADIUS = 24.0, 55.0, 24.0  # angstrom, degrees, angstrom
BANDS = ((150.0, 20.0), (20.0, 10.0), (10.0, 6.0), (6.0, 4.5))
MOLECULE = 0.1  # of the truth's peak


def helix(subunit: Atoms) -> Volume:
    """Return the density of a helix that goes through both ends of the box."""
    copies = range(-5, 6)
    positions = []
    for number in copies:
        angle = np.deg2rad(number * TWIST)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        positions.append((subunit.positions + [RADIUS, 0, 0]) @ turn.T + [0, 0, number * RISE])
    atoms = Atoms(np.concatenate(positions), np.tile(subunit.weights, len(copies)))
    return Volume(window(gaussian_map(atoms, 256, ANGPIX, 3.0).data, (BOX,) * 3), ANGPIX)


@click.command()
@click.argument("subunit", type=click.Path(exists=True))
@click.argument("globular", type=click.Path(exists=True))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
def main(subunit: str, globular: str, model: str) -> None:
    """Denoise a helix of SUBUNIT, and GLOBULAR beside it."""
    denoiser = Denoiser(find_model(model))
    maps = {"helix": helix(read_atoms(subunit)), "globular": gaussian_map(read_atoms(globular), BOX, ANGPIX, 3.0)}
    frequency = np.arange(BOX // 2 + 1) / (BOX * ANGPIX)
    click.echo("map\tnoise\t" + "\t".join(f"{low:g}-{high:g} A" for low, high in BANDS) + "\tinside")
    for noise in (2, 4, 8):
        for name, truth in maps.items():
            strength = noise * (1 if name == "helix" else 2) * truth.data.std()
            rng = np.random.default_rng(1)
            halves = [truth.data + (strength * rng.standard_normal(truth.shape)).astype(np.float32) for _ in (1, 2)]
            fsc = np.clip(shell_correlation(*halves), 0, 1)
            given = truth.with_data(apply_shells(halves[0], fsc))
            found = denoiser(given, fsc)
            before, after = (shell_correlation(one.data, truth.data) for one in (given, found))
            bands = [(frequency > 1 / low) & (frequency <= 1 / high) for low, high in BANDS]
            inside = truth.data > MOLECULE * truth.data.max()
            left, there = (float(np.sum((one.data - truth.data)[inside] ** 2)) for one in (found, given))
            told = "\t".join(f"{before[band].mean():.3f} {after[band].mean():.3f}" for band in bands)
            click.echo(f"{name}\t{noise}\t{told}\t{left / there:.2f}")


if __name__ == "__main__":
    main()
