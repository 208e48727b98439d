"""A small real refinement with RELION, MAP against CW-RED, judged against the truth.

Everything is made here: the truth from an atomic model, particles with CTF and noise from the truth, then one
``relion_refine_mpi --auto_refine`` a variant, with local searches from perturbed angles. The table compares

- the map that RELION reconstructs from both halves without any prior (``*_unfil.mrc``, averaged): what the prior
  does to the alignment, and nothing else;
- RELION's own half-map resolution.

    python benchmarks/refine.py STRUCTURE -o DIR [--variants map,cwred] [--watch] [--plot FILE.png]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from cryored.simulate.refinement import (
    RELION_HOOK,
    Data,
    RefinementError,
    half_maps,
    iterations,
    make_data,
    refine,
    resident,
)

HOOK = Path(__file__).resolve().parent.parent / "bin" / "cryored-external-reconstruct"

# What RELION calls in each iteration of a variant.
VARIANTS = {
    "relion": RELION_HOOK,
    "map": f"{HOOK} --lambda 0",
    "cwred": f"{HOOK}",
    "paper": f"{HOOK} --lambda paper",
    "red": f"{HOOK} --lambda 1",
}


def truth_fsc(data: Data, name: str) -> npt.NDArray[np.float64]:
    """Return the masked FSC of a run's averaged half-maps to the truth."""
    from cryored.fsc import shell_correlation
    from cryored.mask import soft_mask
    from cryored.mrc import read_volume

    truth = read_volume(data.truth)
    mask = soft_mask(truth).data
    average = sum(half_maps(data, name)) / 2
    return shell_correlation(average * mask, truth.data * mask)


def watched(variant: str) -> Callable[[Path], AbstractContextManager[None]]:
    """Return the companion that answers a variant's requests, and keeps a report of them in the run's folder."""
    options = VARIANTS[variant].split()[1:]
    return lambda folder: resident(folder, options=[*options, "--report", str(folder / "report.html")])


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
@click.option("--watch", is_flag=True, help="Keep cryored watch beside each refinement; its report lies in the run.")
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
    watch: bool,
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
            hook, companion = VARIANTS[name], nullcontext
            if watch and name != "relion":
                hook, companion = str(HOOK), watched(name)
            seconds = refine(data, name, hook, companion=companion, on_iteration=_show_iteration)
        except RefinementError as error:
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
