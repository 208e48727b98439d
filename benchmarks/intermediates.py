"""A model on real refinement intermediates as it sees them in the loop: RELION's MAP maps.

`cryored train --evaluate` shows a regularised model the unregularised map times its FSC, as in training. Here it gets
the MAP map of eq. 11, which also knows how uneven the weights K are. Structures that the model was not trained on are
simulated and refined by RELION (with lambda 0, so the prior has no part in what is measured). Each request that the
refinements leave behind, both halves, all iterations, is harvested and judged like a pair, the MAP map in place of the
noisy one as input.

    python benchmarks/intermediates.py STRUCTURES... -o DIR [--model NAME] [--snr 0.15,0.06,0.02]

Refinements that are in DIR already are not run again, and judged as far as they went. Prints a row a map, with the
error of the MAP map itself (map_to_wiener), then the summary by nominal resolution.
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

from cryored.prior.models import DEFAULT_MODEL
from cryored.refinement.relion_runs import Data, RefinementError, make_data, refine_by
from cryored.training.evaluation import Denoise, Judgement, as_row, as_tsv, judge_map, summarise


def requests(data: Data, run: str) -> list[str]:
    """Return the requests of a run's halves, relative to its project folder."""
    found = sorted((data.folder / run).glob("run_it*_half?_class001_external_reconstruct.star"))
    return [str(path.relative_to(data.folder)) for path in found]


def judge_run(data: Data, run: str, denoise: Denoise) -> Iterator[tuple[Judgement, float]]:
    """Yield for each request of a run how the denoised MAP map does, and the MAP map's error over the Wiener map's."""
    from cryored.files.mrc import read_volume
    from cryored.files.requests import read_request
    from cryored.files.star import read_star
    from cryored.maps.truth_scale import grey_scale
    from cryored.maps.volume import Volume
    from cryored.reconstruction.sums import load_sums
    from cryored.reconstruction.update import inverse_prior, reconstruct
    from cryored.simulation.harvest import harvest_request

    truth = read_volume(data.truth).data
    here = Path.cwd()
    os.chdir(data.folder)
    try:
        for path in requests(data, run):
            request = read_request(read_star(path))
            sums = load_sums(request)
            raw = reconstruct(sums)
            pair = harvest_request(request, raw, truth)
            scale = np.float32(grey_scale(raw, truth, request.fsc))
            regularised = reconstruct(sums, prior=inverse_prior(request.tau2, request.tau2_fudge, request.pad)) / scale
            denoised = denoise(Volume(regularised, request.pixel_size), request.fsc).data
            name = Path(path).name.removesuffix("_external_reconstruct.star")
            found, plain = (
                judge_map(pair, volume, request.pixel_size, structure=data.folder.name, name=name)
                for volume in (denoised, regularised)
            )
            yield found, plain.error_to_wiener
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
    from cryored.prior.denoiser import Denoiser
    from cryored.prior.models import find_model, write_card

    values = [float(text) for text in snr.split(",")]
    denoiser = Denoiser(find_model(model))
    judgements: list[Judgement] = []
    for index, structure in enumerate(structures):
        value = values[index % len(values)]
        folder = output.resolve() / f"{Path(structure).name.split('.')[0]}_snr{value:g}"
        data = make_data(structure, folder, box=box, number=number, snr=value)
        if not requests(data, "map"):
            click.echo(f"refining {folder.name} ...", err=True)
            try:
                seconds = refine_by(data, "map", VARIANTS["map"].reconstruction(data))
            except RefinementError as error:
                sys.exit(str(error))
            click.echo(f"  {seconds:.0f} s", err=True)
        for judgement, plain in judge_run(data, "map", denoiser):
            header, line = as_tsv([as_row(judgement) | {"map_to_wiener": f"{plain:.4g}"}]).splitlines()
            click.echo(line if judgements else f"{header}\n{line}")
            judgements.append(judgement)
    table = summarise(judgements)
    click.echo("\n" + as_tsv(table), nl=False)
    if update_card:
        card = denoiser.model.card
        evaluation = card.evaluation | {
            "real_intermediates": table,
            "data": ", ".join(sorted({item.structure for item in judgements})),
            "command": "python " + shlex.join(["benchmarks/intermediates.py", *map(_base, sys.argv[1:])]),
        }
        write_card(denoiser.model.folder, dataclasses.replace(card, evaluation=evaluation))


def _base(argument: str) -> str:
    """Return an argument without the folders of this machine."""
    return Path(argument).name if os.sep in argument else argument


if __name__ == "__main__":
    main()
