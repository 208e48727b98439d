"""A small real refinement with RELION, MAP against CW-RED, judged against the truth.

Everything is made here: the truth from an atomic model, particles with CTF and noise from the truth, then one
``relion_refine_mpi --auto_refine`` a variant, with local searches from perturbed angles. The table compares

- the map that RELION reconstructs from both halves without any prior (``*_unfil.mrc``, averaged): what the prior
  does to the alignment, and nothing else;
- RELION's own half-map resolution.

    python benchmarks/refine.py STRUCTURE -o DIR [--variants map,cwred] [--watch] [--plot FILE.png]

With ``--model FOLDER`` the model in that folder, NAME, is a variant too: ``--variants map,NAME,NAME-mask``.
STRUCTURE may also be an MRC file, which is then the truth: a real map, prepared by benchmarks/real_truth.py.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from cryored.prior.models import CARD, DEFAULT_MODEL, ModelError, find_model
from cryored.refinement.relion_runs import (
    LOCAL_SEARCH,
    Data,
    Reconstruction,
    RefinementError,
    final_map,
    half_maps,
    iterations,
    make_data,
    make_mask,
    refine_by,
)

HERE = Path(__file__).resolve().parent
HOOK = HERE.parent / "bin" / "cryored-external-reconstruct"


@dataclass(frozen=True)
class Variant:
    """What reconstructs in each iteration.

    Parameters
    ----------
    options : str, optional
        Of ``cryored red-update``; without, RELION's own program or the oracle reconstructs.
    masked : bool
        With a solvent mask made from the final map of ``map``, which is refined first.
    oracle : bool
        The truth stands in for the denoised map.
    model : str, optional
        Name or folder; None: the default one.
    weights : dict, optional
        In the model's card in place of its own.
    """

    options: str | None = None
    masked: bool = False
    oracle: bool = False
    model: str | None = None
    weights: dict[str, tuple[float, ...]] | None = None

    def arguments(self, data: Data) -> list[str]:
        """Return the options of ``cryored red-update``, with a model that has the weights."""
        words = (self.options or "").split()
        if self.weights is None:
            return words if self.model is None else [*words, "--model", self.model]
        model, own = find_model(self.model or DEFAULT_MODEL), data.folder / "models" / "alone"
        shutil.copytree(model.folder, own, dirs_exist_ok=True)
        card = json.loads((own / CARD).read_text(encoding="utf-8"))
        card |= {"name": own.name, "weights": self.weights, "weights_masked": {}}
        (own / CARD).write_text(json.dumps(card), encoding="utf-8")
        return [*words, "--model", str(own)]

    def reconstruction(self, data: Data, watched: bool = False) -> Reconstruction:
        """Return what RELION calls; a mask is made from the run `PLAIN`."""
        mask = make_mask(data, PLAIN) if self.masked else None
        if self.oracle:
            program = shlex.join([sys.executable, str(HERE / "oracle.py"), str(data.truth)])
            return Reconstruction(program=program, mask=mask)
        if self.options is None:
            return Reconstruction(mask=mask)
        return Reconstruction(self.arguments(data), mask=mask, hook=HOOK, watched=watched, report=watched)


# The denoised map alone in every shell with a half-map FSC above 1/7, the MAP map alone in the others: what RELION 5
# makes of Blush's network.
ALONE_TO_1_7 = {
    "fsc": (1e-6, 1 / 7 - 1e-6, 1 / 7, 0.999),
    "precision": (1.0, 1.0, 1e6, 1e6),
    "gain": (1e-3, 1e-3, 1.0, 1.0),
}

VARIANTS = {
    "relion": Variant(),
    "map": Variant("--lambda 0"),
    "cwred": Variant(""),
    "eq17": Variant("--lambda 1"),
    "cwred-weak": Variant("--trust 0.25"),
    "cwred-strong": Variant("--trust 4"),
    "paper": Variant("--lambda paper"),
    "red": Variant("--lambda 1", model="cwred-paper"),
    "denoised": Variant("", weights=ALONE_TO_1_7),
    "oracle": Variant(oracle=True),
}
MASKED = "-mask"  # ends the name of a variant with a mask
VARIANTS |= {name + MASKED: replace(one, masked=True) for name, one in VARIANTS.items() if name != "relion"}
PLAIN = "map"  # what the mask is made from


def with_models(folders: Sequence[Path]) -> dict[str, Variant]:
    """Return `VARIANTS` and each folder's model, without and with a mask, under the folder's name."""
    known = dict(VARIANTS)
    for folder in folders:
        path = folder.resolve()
        if path.name in known:
            raise click.BadParameter(f"'{path.name}' is a variant's name: rename {folder}", param_hint="--model")
        try:  # now, not after the first refinement
            find_model(str(path))
        except ModelError as error:
            raise click.BadParameter(str(error), param_hint="--model") from error
        one = Variant("", model=str(path))
        known |= {path.name: one, path.name + MASKED: replace(one, masked=True)}
    return known


def truth_fsc(data: Data, name: str) -> npt.NDArray[np.float64]:
    """Return the masked FSC of a run's averaged half-maps to the truth."""
    from cryored.files.mrc import read_volume
    from cryored.maps.fsc import shell_correlation
    from cryored.maps.mask import soft_mask

    truth = read_volume(data.truth)
    mask = soft_mask(truth).data
    average = sum(half_maps(data, name)) / 2
    return shell_correlation(average * mask, truth.data * mask)


def judge(data: Data, names: list[str]) -> list[dict[str, object]]:
    """Return a row for each run.

    Mean FSCs to the truth are over the shells 1 up to the first run's 0.5 crossing. ``regularised`` is the final map
    with what regularised it, prior or tau2; all other columns are of the unfiltered half-maps. Inflation: half-map
    0.143 over truth 0.5, in spatial frequency, within one mask. Excess: by how much the half-maps promise more than the
    truth holds, as a mean over shells up to their 0.143; it doesn't jump where a curve is flat at a threshold.
    """
    from cryored.files.mrc import read_volume
    from cryored.maps.fsc import crossing_resolution, nominal_resolution, shell_correlation, whole_set_fsc
    from cryored.maps.mask import soft_mask
    from cryored.reconstruction.orientations import angular_error_file

    truth = read_volume(data.truth)
    mask = soft_mask(truth).data
    frequency = np.arange(data.box // 2 + 1) / (data.box * data.angpix)
    curves = {name: truth_fsc(data, name) for name in names}
    below = np.flatnonzero(curves[names[0]][1:] < 0.5)
    last = int(below[0]) if below.size else data.box // 2
    rows: list[dict[str, object]] = []
    for name, curve in curves.items():
        halves = half_maps(data, name)
        half_curve = shell_correlation(*(half * mask for half in halves))
        resolution, truth_resolution = (
            nominal_resolution(frequency, half_curve),
            crossing_resolution(frequency, curve, 0.5),
        )
        promised = np.sqrt(whole_set_fsc(half_curve))
        resolved = int(np.argmax(np.append(half_curve[1:] < 0.143, True)))
        regularised = shell_correlation(read_volume(final_map(data, name)).data * mask, truth.data * mask)
        errors = angular_error_file(data.folder / name / "run_data.star", data.folder / "particles_truth.star")
        rows.append(
            {
                "run": name,
                "truth_fsc_0.5_A": round(truth_resolution, 3),
                "mean_truth_fsc": round(float(curve[1 : last + 1].mean()), 4),
                "regularised_0.5_A": round(crossing_resolution(frequency, regularised, 0.5), 3),
                "regularised_mean_fsc": round(float(regularised[1 : last + 1].mean()), 4),
                "angular_error_deg": round(float(np.median(errors)), 3),
                "half_map_0.143_A": round(nominal_resolution(frequency, shell_correlation(*halves)), 2),
                "masked_0.143_A": round(resolution, 3),
                "inflation": round(truth_resolution / resolution, 3),
                "excess": round(float(np.mean((promised - curve)[1 : resolved + 1])), 4),
                "iterations": iterations(data, name),
            }
        )
    return rows


def draw(data: Data, names: list[str], path: Path) -> None:
    """Draw the FSC to the truth of each run, unfiltered and regularised, and a central slice of each final map.

    All slices have one grey scale; the truth is brought to that of the first run's map.
    """
    from cryored.files.mrc import read_volume
    from cryored.files.plots import new_figure, save_figure
    from cryored.maps.fsc import shell_correlation
    from cryored.maps.mask import soft_mask

    truth = read_volume(data.truth)
    mask = soft_mask(truth).data
    maps = {name: read_volume(final_map(data, name)).data for name in names}
    first = maps[names[0]]
    scale = float(np.vdot(first, truth.data)) / float(np.vdot(truth.data, truth.data))
    shown = {"truth": truth.data * scale, **maps}
    white = float(np.percentile(shown["truth"], 99.8))

    figure = new_figure(6.4 + 2.2 * len(shown), 3.2)
    axes = figure.subplots(1, len(shown) + 2, width_ratios=[1.5, 1.5] + [1] * len(shown))
    frequency = np.arange(data.box // 2 + 1) / (data.box * data.angpix)
    for name in names:
        axes[0].plot(frequency[1:], truth_fsc(data, name)[1:], label=name)
        axes[1].plot(frequency[1:], shell_correlation(maps[name] * mask, truth.data * mask)[1:], label=name)
    for axis, title in zip(axes, ("unfiltered half-maps, averaged", "regularised final map"), strict=False):
        axis.axhline(0.5, color="0.6", linewidth=0.8, linestyle="--")
        axis.set(xlabel="spatial frequency (1/Å)", xlim=(0, frequency[-1]), ylim=(-0.05, 1.02), title=title)
    axes[0].set(ylabel="FSC to the truth, masked")
    axes[0].legend(frameon=False)
    for axis, (name, values) in zip(axes[2:], shown.items(), strict=True):
        axis.imshow(values[data.box // 2], cmap="gray", vmin=-0.1 * white, vmax=white)
        axis.set(title=name, xticks=[], yticks=[])
    save_figure(figure, path)


@click.command()
@click.argument("structure", type=click.Path(exists=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--variants", default="map,cwred", show_default=True, help=f"Of {', '.join(VARIANTS)}; commas between.")
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a model: a further variant of that name, and NAME-mask. Can be repeated.",
)
@click.option("--box", default=64, show_default=True)
@click.option("--angpix", default=1.5, show_default=True)
@click.option("--number", default=400, show_default=True, help="Particles.")
@click.option("--snr", default=0.05, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--watch", is_flag=True, help="Keep cryored watch beside each refinement; its report lies in the run.")
@click.option("--relion", "extra", default="", help="Further options of relion_refine, as one word.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG of FSC curves and slices.")
def main(
    structure: str,
    output: Path,
    variants: str,
    models: tuple[Path, ...],
    box: int,
    angpix: float,
    number: int,
    snr: float,
    seed: int,
    watch: bool,
    extra: str,
    plot: Path | None,
) -> None:
    """Refine simulated particles of STRUCTURE with RELION, once a variant, and compare with the truth."""
    names, known = variants.split(","), with_models(models)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"'{unknown[0]}' is none of {', '.join(known)}", param_hint="--variants")
    click.echo(f"simulating {number} particles of box {box} ...", err=True)
    data = make_data(structure, output.resolve(), box=box, angpix=angpix, number=number, snr=snr, seed=seed)
    todo = list(names)
    if any(known[name].masked for name in names) and PLAIN not in names and not final_map(data, PLAIN).exists():
        todo.insert(0, PLAIN)
    todo.sort(key=lambda name: known[name].masked)  # the mask needs the plain run
    for name in todo:
        click.echo(f"refining: {name} ...", err=True)
        try:
            run(data, name, known[name], watch, extra.split())
        except RefinementError as error:
            sys.exit(str(error))
    rows = judge(data, names)
    click.echo("\t".join(rows[0]))
    for row in rows:
        click.echo("\t".join(str(value) for value in row.values()))
    if plot is not None:
        draw(data, names, plot)


def run(data: Data, name: str, variant: Variant, watch: bool, extra: Sequence[str] = ()) -> None:
    """Refine one variant, in a folder of that name."""
    how = variant.reconstruction(data, watch)
    seconds = refine_by(data, name, how, search=[*LOCAL_SEARCH, *extra], on_iteration=_show_iteration)
    click.echo(f"  done in {seconds:.0f} s", err=True)


def _show_iteration(number: int) -> None:
    click.echo(f"  iteration {number}", err=True)


if __name__ == "__main__":
    main()
