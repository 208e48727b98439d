"""A model on real refinement intermediates: its error against that of the best linear filter.

Structures that the model was not trained on are simulated and refined by RELION (with lambda 0, so the prior has no
part in what is measured). Each request that the refinements leave behind, both halves, all iterations, gives

- the MAP map, which is what the model sees in the loop, and its denoised version;
- the FSC-weighted map (unregularised map times FSC), the yardstick: it has the FSC, too, but no network;
- the target, truth times FSC, on the map's grey scale (least squares over the shells with FSC > 0.5).

    python benchmarks/intermediates.py STRUCTURES... -o DIR [--model NAME] [--snr 0.15,0.06,0.02]

Refinements that are in DIR already are not run again, and judged as far as they went. Prints a row a map, then
medians by nominal resolution.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from refine import VARIANTS

from cryored.models import DEFAULT_MODEL
from cryored.simulate.refinement import Data, RefinementError, make_data, refine

BINS = ((0.0, 4.5), (4.5, 6.0), (6.0, 8.0), (8.0, 10.0), (10.0, np.inf))


def requests(data: Data, run: str) -> list[str]:
    """Return the requests of a run's halves, relative to its project folder."""
    found = sorted((data.folder / run).glob("run_it*_half?_class001_external_reconstruct.star"))
    return [str(path.relative_to(data.folder)) for path in found]


def judge_run(data: Data, run: str, denoiser: object) -> Iterator[dict[str, object]]:
    """Yield a row for each request of a run."""
    from cryored.fourier import apply_shells
    from cryored.fsc import crossing_resolution, shell_correlation
    from cryored.mrc import read_volume
    from cryored.red_update import load_sums
    from cryored.relion import read_request
    from cryored.simulate.harvest import grey_scale
    from cryored.star import read_star
    from cryored.update import inverse_prior, reconstruct
    from cryored.volume import Volume

    truth = read_volume(data.truth).data
    here = Path.cwd()
    os.chdir(data.folder)
    try:
        for path in requests(data, run):
            request = read_request(read_star(path))
            sums = load_sums(request)
            regularised = reconstruct(sums, prior=inverse_prior(request.tau2, request.tau2_fudge, request.pad))
            raw = reconstruct(sums)
            weights = np.clip(request.fsc, 0.0, 1.0)
            weighted = apply_shells(raw, weights)
            target = apply_shells(truth, weights) * np.float32(grey_scale(raw, truth, request.fsc))
            denoised = denoiser(Volume(regularised, request.pixel_size)).data  # type: ignore[operator]
            errors = [float(np.linalg.norm(volume - target)) for volume in (weighted, regularised, denoised)]
            crossings = [
                crossing_resolution(request.frequency, shell_correlation(volume, truth), 0.5)
                for volume in (weighted, denoised)
            ]
            yield {
                "structure": data.folder.name,
                "request": Path(path).name.split("_class")[0],
                "resolution_A": round(request.nominal_resolution(), 2),
                "map_to_weighted": round(errors[1] / errors[0], 3),
                "denoised_to_weighted": round(errors[2] / errors[0], 3),
                "crossing_weighted_A": round(crossings[0], 2),
                "crossing_denoised_A": round(crossings[1], 2),
                "gain_percent": round(100 * (crossings[0] / crossings[1] - 1), 1),
            }
    finally:
        os.chdir(here)


@click.command()
@click.argument("structures", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--snr", default="0.15,0.06,0.02", show_default=True, help="One for each structure, in turn.")
@click.option("--number", default=600, show_default=True, help="Particles.")
@click.option("--box", default=96, show_default=True)
@click.option("--update-card", is_flag=True, help="Write the summary into the model's card.")
def main(
    structures: tuple[str, ...], output: Path, model: str, snr: str, number: int, box: int, update_card: bool
) -> None:
    """Refine STRUCTURES and judge a model on the intermediates."""
    from cryored.denoise import Denoiser
    from cryored.models import find_model, write_card

    values = [float(text) for text in snr.split(",")]
    denoiser = Denoiser(find_model(model))
    rows = []
    for index, structure in enumerate(structures):
        value = values[index % len(values)]
        folder = output.resolve() / f"{Path(structure).name.split('.')[0]}_snr{value:g}"
        data = make_data(structure, folder, box=box, number=number, snr=value)
        if not requests(data, "map"):
            click.echo(f"refining {folder.name} ...", err=True)
            try:
                seconds = refine(data, "map", VARIANTS["map"])
            except RefinementError as error:
                sys.exit(str(error))
            click.echo(f"  {seconds:.0f} s", err=True)
        for row in judge_run(data, "map", denoiser):
            if not rows:
                click.echo("\t".join(row))
            rows.append(row)
            click.echo("\t".join(map(str, row.values())))
    table = summary(rows)
    click.echo("\n" + "\t".join(table[0]))
    for line in table:
        click.echo("\t".join(map(str, line.values())))
    if update_card:
        card = denoiser.model.card
        evaluation = card.evaluation | {
            "real_intermediates": table,
            "data": ", ".join(sorted({str(row["structure"]) for row in rows})),
            "command": "python " + shlex.join(["benchmarks/intermediates.py", *map(_base, sys.argv[1:])]),
        }
        write_card(denoiser.model.folder, dataclasses.replace(card, evaluation=evaluation))


def _base(argument: str) -> str:
    """Return an argument without the folders of this machine."""
    return Path(argument).name if os.sep in argument else argument


def summary(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return medians and worst cases by nominal resolution."""
    table: list[dict[str, object]] = []
    for low, high in BINS:
        inside = [row for row in rows if low <= float(str(row["resolution_A"])) < high]
        if inside:
            ratios = [float(str(row["denoised_to_weighted"])) for row in inside]
            gains = [float(str(row["gain_percent"])) for row in inside]
            table.append(
                {
                    "resolution_A": f"{low:g}-{high:g}",
                    "maps": len(inside),
                    "median_error_to_weighted": round(float(np.median(ratios)), 3),
                    "worst_error_to_weighted": max(ratios),
                    "median_crossing_gain_percent": round(float(np.median(gains)), 1),
                    "worst_crossing_gain_percent": min(gains),
                }
            )
    return table


if __name__ == "__main__":
    main()
