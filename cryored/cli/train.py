"""``cryored train``."""

from __future__ import annotations

import shlex
import sys

import click

from cryored.cli import options


@click.command()
@click.argument("tables", type=options.PATH, nargs=-1, required=True, metavar="PAIRS.star...")
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR", help="Folder of the model.")
@click.option("--validation", type=options.PATH, metavar="PAIRS.star", help="Pairs of other structures, to judge by.")
@click.option(
    "--input",
    "input_kind",
    envvar="CRYORED_TRAIN_INPUT",
    type=click.Choice(["regularised", "unregularised"]),
    default="regularised",
    show_default=True,
    help="What the network sees: the noisy map weighted by its FSC, or raw as in the paper.",
)
@click.option("--width", type=click.IntRange(min=1), default=4, show_default=True, help="Channels of the first layer.")
@click.option("--depth", type=click.IntRange(1, 6), default=4, show_default=True, help="Stages down and up.")
@click.option("--patch", type=click.IntRange(min=2), default=48, show_default=True, help="Edge of patches in voxels.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Patches in a step.")
@click.option("--steps", type=click.IntRange(min=1), default=3000, show_default=True, help="Training steps.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Of Adam, at the start; it falls along a cosine.",
)
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint; --steps may differ.")
@options.device
@options.threads
@options.seed
@options.overwrite
@options.common
def train(
    tables: tuple[str, ...],
    output: str,
    validation: str | None,
    input_kind: str,
    width: int,
    depth: int,
    patch: int,
    batch_size: int,
    steps: int,
    learning_rate: float,
    resume: bool,
    gpu: bool | None,
    threads: int | None,
    seed: int,
    overwrite: bool,
) -> None:
    """Train a prior on pairs of maps (see `cryored simulate pairs`).

    DIR gets model.keras, card.json and training.csv. A killed run goes on with --resume to the same curve. The
    loss is the squared error over that of the FSC-weighted (Wiener) map: below 1 the network improves on the best
    linear filter. KERAS_BACKEND=torch or jax swaps the engine; on CPUs PyTorch trains several times as fast as
    TensorFlow.

    \b
    Example:
      cryored train pairs/pairs.star -o my_prior --steps 3000
      cryored denoise map.mrc -o denoised.mrc --model ./my_prior
    """
    import json

    from cryored.cli.progress import bar
    from cryored.train import Recipe, train_files

    recipe = Recipe(
        width=width,
        depth=depth,
        patch=patch,
        batch_size=batch_size,
        steps=steps,
        learning_rate=learning_rate,
        input=input_kind,  # type: ignore[arg-type]
        seed=seed,
    )
    with bar("steps", steps) as advance:
        model = train_files(
            tables,
            output,
            recipe,
            validation=validation,
            resume=resume,
            overwrite=overwrite,
            gpu=gpu,
            threads=threads,
            command=shlex.join(["cryored", *sys.argv[1:]]),
            progress=advance,
        )
    for row in model.card.evaluation.get("simulated_pairs", []):
        click.echo(json.dumps(row), err=True)
    click.echo(model.folder)
