"""``train-prior``: a program of its own, which ``bin/train-prior`` starts where a model for the package is trained."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cryored.cli import Program

logger = logging.getLogger("cryored.cli.train_prior")  # run as a program, the module has another name


@click.command(cls=Program, context_settings={"max_content_width": 100, "show_default": True})
@click.argument("structures", nargs=-1, required=True, type=click.Path(exists=True), metavar="MODEL.pdb...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the model.")
@click.option("--validation", multiple=True, type=click.Path(exists=True), help="Atomic models, or a folder of them.")
@click.option("--minutes", default=10.0, help="Of the whole training, over all runs.")
@click.option("--seconds", type=float, help="Of this run; the next one goes on.  [default: --minutes]")
@click.option("--copy", multiple=True, type=click.Path(path_type=Path), help="Keep the state here too.")
@click.option("--processes", default=1, help="That make densities beside the training.")
@click.option("--width", default=8)
@click.option("--box", default=96)
@click.option("--pixel-size", default=1.5, help="Of the maps, in angstrom.")
@click.option("--crop", default=80)
@click.option("--batch", default=8)
@click.option("--learning-rate", default=1.5e-3)
@click.option("--refining", default=0.3, help="Share of the time in which data are made.")
@click.option("--seed", default=0)
@click.option("--mixed-precision/--full-precision", default=True, help="Compute in bfloat16.")
@click.option("--gpu/--cpu", default=None, help="Insist on a GPU, or keep off it.")
def train_prior(
    structures: tuple[str, ...],
    output: Path,
    validation: tuple[str, ...],
    seconds: float | None,
    copy: tuple[Path, ...],
    processes: int,
    gpu: bool | None,
    **options: Any,
) -> None:
    """Train a prior from atomic models within a budget of minutes."""
    from cryored.prior import device
    from cryored.training.from_atoms import REPORT, finish, train
    from cryored.training.plan import Plan

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = Plan(**options)
    logger.info("training on %s", device.set_up(gpu, None))
    models = _models(structures)
    state = train(
        models,
        _models(validation),
        output / "state",
        plan,
        seconds=60 * plan.minutes if seconds is None else seconds,
        processes=processes,
        outputs=copy,
    )
    if seconds is None or state.seconds > 60 * plan.minutes - REPORT:
        finish(output / "state", plan, output, len(models), " ".join(sys.argv))


def _models(names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        path = Path(name)
        found += [str(file) for file in sorted(path.iterdir())] if path.is_dir() else [name]
    return found


if __name__ == "__main__":
    train_prior()
