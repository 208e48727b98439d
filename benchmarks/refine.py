"""A small real refinement with RELION, MAP against CW-RED, judged against the truth.

Everything is made here: the truth from an atomic model, particles with CTF and noise from the truth, then one
``relion_refine_mpi --auto_refine`` a variant, with local searches from perturbed angles. The table compares

- the map that RELION reconstructs from both halves without any prior (``*_unfil.mrc``, averaged): what the prior
  does to the alignment, and nothing else;
- RELION's own half-map resolution.

    python benchmarks/refine.py STRUCTURE -o DIR [--variants map,cwred] [--plot FILE.png]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

HOOK = Path(__file__).resolve().parent.parent / "bin" / "cryored-external-reconstruct"

# What RELION calls in each iteration of a variant.
VARIANTS = {
    "relion": "sh -c 'relion_external_reconstruct \"$1\" --skip_gridding' relion",
    "map": f"{HOOK} --lambda 0",
    "cwred": f"{HOOK}",
    "red": f"{HOOK} --lambda 1",
}


@dataclass(frozen=True)
class Data:
    """A simulated data set in a folder that serves as RELION's project."""

    folder: Path
    box: int
    angpix: float
    diameter: float

    @property
    def truth(self) -> Path:
        """The map that the particles are projections of."""
        return self.folder / "truth.mrc"


def make_data(
    structure: str,
    folder: Path,
    *,
    box: int = 64,
    angpix: float = 1.5,
    number: int = 400,
    snr: float = 0.05,
    perturb: float = 5.0,
    seed: int = 1,
) -> Data:
    """Simulate the truth and its particles, unless they are there already."""
    from cryored.simulate.density import simulate_map_file
    from cryored.simulate.particles import simulate_particles_file
    from cryored.simulate.structure import read_atoms

    folder.mkdir(parents=True, exist_ok=True)
    atoms = read_atoms(structure)
    diameter = 2 * float(np.linalg.norm(atoms.positions, axis=1).max()) + 10
    data = Data(folder, box, angpix, min(diameter, 0.95 * box * angpix))
    if not (folder / "particles_truth.star").exists():
        simulate_map_file(structure, str(data.truth), box=box, angpix=angpix, resolution=3.0, overwrite=True)
        here = Path.cwd()
        os.chdir(folder)  # the stack's name in the STAR is relative to RELION's project folder
        try:
            simulate_particles_file(
                "truth.mrc", "particles", number=number, snr=snr, perturb_angles=perturb, seed=seed, overwrite=True
            )
        finally:
            os.chdir(here)
    return data


def refine(
    data: Data,
    name: str,
    hook: str,
    *,
    timeout: float = 1800,
    on_iteration: Callable[[int], None] = lambda number: None,
) -> float:
    """Run RELION's auto-refine with a hook into ``folder/name``; return the seconds it took.

    Raises
    ------
    RuntimeError
        RELION failed; the message has the end of its output, which also lies in ``name/run.log``.
    """
    target = data.folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    command = ["mpirun", "--oversubscribe", "-n", "3", "relion_refine_mpi", "--auto_refine", "--split_random_halves"]
    command += ["--i", "particles.star", "--ref", "particles_reference.mrc", "--o", f"{name}/run"]
    command += ["--ctf", "--ctf_corrected_ref", "--ini_high", "30", "--pad", "1"]
    command += ["--particle_diameter", f"{data.diameter:.0f}", "--zero_mask", "--flatten_solvent", "--norm", "--scale"]
    command += ["--oversampling", "1", "--healpix_order", "3", "--auto_local_healpix_order", "3", "--sigma_ang", "5"]
    command += ["--offset_range", "2", "--offset_step", "1", "--sym", "C1", "--low_resol_join_halves", "40"]
    command += ["--j", "1", "--pool", "30", "--dont_combine_weights_via_disc", "--random_seed", "7"]
    command += ["--external_reconstruct"]
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE": hook,
        # The hook script takes the cryored of the Python that runs this.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    begin = time.monotonic()
    with (target / "run.log").open("w") as log:
        run = subprocess.Popen(command, cwd=data.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        shown = 0
        while run.poll() is None:
            if time.monotonic() - begin > timeout:
                run.kill()
                run.wait()
            time.sleep(0.2)
            done = _finished_iterations(target)
            if done > shown:
                shown = done
                on_iteration(done)
    if run.returncode:
        end = (target / "run.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"relion_refine_mpi failed with status {run.returncode}; its last words:\n{end}")
    return time.monotonic() - begin


def _finished_iterations(run: Path) -> int:
    # Iteration 0 is the start.
    return max(0, len(list(run.glob("run_it*_half1_model.star"))) - 1)


def iterations(data: Data, name: str) -> int:
    """Return how many iterations a run took, the joined last one included."""
    return _finished_iterations(data.folder / name) + 1


def half_maps(data: Data, name: str) -> list[npt.NDArray[np.float32]]:
    """Return RELION's two unfiltered half-maps, made from B and K alone."""
    from cryored.mrc import read_volume

    return [read_volume(data.folder / name / f"run_half{half}_class001_unfil.mrc").data for half in (1, 2)]


def soft_mask(truth: npt.NDArray[np.float32], angpix: float) -> npt.NDArray[np.float32]:
    """Return a mask around the molecule: the truth at 15 A above a tenth of its peak, with an edge of 9 A."""
    from scipy.ndimage import distance_transform_edt

    from cryored.simulate.particles import low_pass
    from cryored.volume import raised_cosine

    blurred = low_pass(truth, angpix, 15.0)
    outside = distance_transform_edt(blurred < 0.1 * blurred.max()) * angpix
    return raised_cosine((outside - 3.0) / 9.0).astype(np.float32)


def truth_fsc(data: Data, name: str) -> npt.NDArray[np.float64]:
    """Return the masked FSC of a run's averaged half-maps to the truth."""
    from cryored.fsc import shell_correlation
    from cryored.mrc import read_volume

    truth = read_volume(data.truth).data
    mask = soft_mask(truth, data.angpix)
    average = sum(half_maps(data, name)) / 2
    return shell_correlation(average * mask, truth * mask)


def judge(data: Data, names: list[str]) -> list[dict[str, object]]:
    """Return a row for each run: crossing of 0.5 to the truth, mean FSC, half-map resolution, iterations.

    The mean is over the shells 1 up to the first run's 0.5 crossing.
    """
    from cryored.fsc import crossing_resolution, nominal_resolution, shell_correlation

    frequency = np.arange(data.box // 2 + 1) / (data.box * data.angpix)
    curves = {name: truth_fsc(data, name) for name in names}
    below = np.flatnonzero(curves[names[0]][1:] < 0.5)
    last = int(below[0]) if below.size else data.box // 2
    return [
        {
            "run": name,
            "truth_fsc_0.5_A": round(crossing_resolution(frequency, curve, 0.5), 3),
            "mean_truth_fsc": round(float(curve[1 : last + 1].mean()), 4),
            "half_map_0.143_A": round(nominal_resolution(frequency, shell_correlation(*half_maps(data, name))), 2),
            "iterations": iterations(data, name),
        }
        for name, curve in curves.items()
    ]


def draw(data: Data, names: list[str], path: Path) -> None:
    """Draw the FSC to the truth of each run, and a central slice of each."""
    from cryored.mrc import read_volume
    from cryored.plotting import new_figure, save_figure

    figure = new_figure(4 + 2.6 * (len(names) + 1), 3.6)
    axes = figure.subplots(1, len(names) + 2, width_ratios=[1.6] + [1] * (len(names) + 1))
    frequency = np.arange(data.box // 2 + 1) / (data.box * data.angpix)
    for name in names:
        axes[0].plot(frequency, truth_fsc(data, name), label=name)
    axes[0].axhline(0.5, color="0.6", linewidth=0.8, linestyle="--")
    axes[0].set(xlabel="spatial frequency (1/Å)", ylabel="FSC to the truth, masked", xlim=(0, frequency[-1]))
    axes[0].legend(frameon=False)
    maps = {"truth": read_volume(data.truth).data}
    maps |= {name: read_volume(data.folder / name / "run_class001.mrc").data for name in names}
    for axis, (name, values) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(values[data.box // 2], cmap="gray", vmin=0, vmax=float(np.percentile(values, 99.8)))
        axis.set(title=name, xticks=[], yticks=[])
    save_figure(figure, path)


@click.command()
@click.argument("structure", type=click.Path(exists=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--variants", default="map,cwred", show_default=True, help=f"Of {', '.join(VARIANTS)}; commas between.")
@click.option("--box", default=64, show_default=True)
@click.option("--angpix", default=1.5, show_default=True)
@click.option("--number", default=400, show_default=True, help="Particles.")
@click.option("--snr", default=0.05, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="PNG of FSC curves and slices.")
def main(
    structure: str,
    output: Path,
    variants: str,
    box: int,
    angpix: float,
    number: int,
    snr: float,
    seed: int,
    plot: Path | None,
) -> None:
    """Refine simulated particles of STRUCTURE with RELION, once a variant, and compare with the truth."""
    names = variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise click.BadParameter(f"'{unknown[0]}' is none of {', '.join(VARIANTS)}", param_hint="--variants")
    click.echo(f"simulating {number} particles of box {box} ...", err=True)
    data = make_data(structure, output.resolve(), box=box, angpix=angpix, number=number, snr=snr, seed=seed)
    for name in names:
        click.echo(f"refining: {name} ...", err=True)
        try:
            seconds = refine(data, name, VARIANTS[name], on_iteration=_show_iteration)
        except RuntimeError as error:
            sys.exit(str(error))
        click.echo(f"  done in {seconds:.0f} s", err=True)
    rows = judge(data, names)
    click.echo("\t".join(rows[0]))
    for row in rows:
        click.echo("\t".join(str(value) for value in row.values()))
    if plot is not None:
        draw(data, names, plot)


def _show_iteration(number: int) -> None:
    click.echo(f"  iteration {number}", err=True)


if __name__ == "__main__":
    main()
