"""Speed and memory of the simulation: projections beside relion_project's, particles, pairs of *intermediates*.

    python benchmarks/simulate.py [--number 10000] [--repeat 3]

Times of a line are taken in turn within one run, and their medians compared: machines are noisy.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

STRUCTURE = Path(__file__).resolve().parent.parent / "tests" / "data" / "structures" / "6M2B.cif.gz"
BOX, ANGPIX = 96, 1.5


def projections(folder: Path, number: int, repeat: int) -> list[float]:
    """Return seconds for `number` projections: relion_project, ours with all cores, ours with one."""
    from cryored.files.mrc import read_volume
    from cryored.files.star import read_star
    from cryored.reconstruction.projection import Projector, rotation_matrices
    from cryored.simulation.particles import ParticleOptions, simulate_particles_file

    os.chdir(folder)
    simulate_particles_file("map.mrc", "angles", ParticleOptions(number, float("inf"), apply_ctf=False))
    star = read_star("angles_truth.star")
    rotations = rotation_matrices(*(star.numbers("particles", f"rlnAngle{a}") for a in ("Rot", "Tilt", "Psi")))
    data = read_volume("map.mrc").data
    os.remove("angles.mrcs")
    command = ["relion_project", "--i", "map.mrc", "--ang", "angles_truth.star", "--o", "relion", "--angpix", "1.5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def ours(threads: int | None) -> None:
        projector = Projector(data, threads=threads)
        with open("ours.mrcs", "wb") as stream:
            for first in range(0, number, 500):
                stream.write(projector.project(rotations[first : first + 500]).data)

    ours(None)  # compiles
    seconds = []
    for _ in range(repeat):
        row = []
        for work in (
            lambda: subprocess.run(command, env=environment, check=True, capture_output=True),
            lambda: ours(None),
            lambda: ours(1),
        ):
            begin = time.monotonic()
            work()
            row.append(time.monotonic() - begin)
        seconds.append(row)
    return [float(value) for value in np.median(seconds, axis=0)]


def particles(folder: Path, number: int) -> tuple[float, float]:
    """Return seconds and peak memory in GB of ``cryored simulate particles`` as a process of its own."""
    command = [sys.executable, "-m", "cryored", "simulate", "particles", "map.mrc", "-o", "sim"]
    begin = time.monotonic()
    subprocess.run([*command, "--number", str(number), "--snr", "0.05", "-q"], cwd=folder, check=True)
    seconds = time.monotonic() - begin
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def intermediates(repeat: int) -> tuple[float, int]:
    """Return seconds for a pair, the median over `repeat` draws, and the number of pairs."""
    from cryored.simulation.intermediates import intermediate_pairs
    from cryored.simulation.structure import read_atoms

    atoms = read_atoms(STRUCTURE)
    list(intermediate_pairs(atoms, 32, 3.0, 6.0, rng=np.random.default_rng(0)))  # compiles
    seconds, pairs = [], 0
    for draw in range(repeat):
        begin = time.monotonic()
        made = 2 * sum(1 for _ in intermediate_pairs(atoms, BOX, ANGPIX, 3.0, rng=np.random.default_rng(draw)))
        seconds.append((time.monotonic() - begin) / made)
        pairs += made
    return float(np.median(seconds)), pairs


@click.command()
@click.option("--number", default=10000, show_default=True, help="Projections and particles.")
@click.option("--repeat", default=3, show_default=True)
def main(number: int, repeat: int) -> None:
    """Print the figures of docs/results.md."""
    from cryored.simulation.map_of_model import MapOptions, simulate_map_file

    with tempfile.TemporaryDirectory() as folder:
        simulate_map_file(str(STRUCTURE), f"{folder}/map.mrc", MapOptions(BOX, ANGPIX, 3.0))
        seconds, memory = particles(Path(folder), number)
        click.echo(f"{number} particles of box {BOX}\t{seconds:.1f} s\t{memory:.2f} GB")
        relion, ours, single = projections(Path(folder), number, repeat)
        click.echo(f"{number} projections: relion_project (one core)\t{relion:.2f} s")
        click.echo(f"cryored, all cores\t{ours:.2f} s\t{relion / ours:.1f} times as fast")
        click.echo(f"cryored, one core\t{single:.2f} s\t{relion / single:.1f} times as fast")
        os.chdir("/")
    seconds, pairs = intermediates(2 * repeat)
    click.echo(f"a pair of intermediates, box {BOX}\t{seconds:.2f} s\tmedian over draws, {pairs} pairs")


if __name__ == "__main__":
    main()
