"""``cryored train``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from cryored.cli import options

# What --evaluate goes with, and what goes with it alone.
_OF_EVALUATION = {"tables", "evaluate", "output", "maps", "shift", "plot", "gpu", "threads", "overwrite"}
_OF_EVALUATION_ALONE = {"maps", "shift"}


@click.command()
@click.argument("tables", type=options.PATH, nargs=-1, required=True, metavar="PAIRS.star...")
@click.option(
    "-o",
    "--output",
    type=options.PATH,
    metavar="DIR",
    help="Folder of the model; with --evaluate the table (TSV).  [required; with --evaluate by default stdout]",
)
@click.option(
    "--evaluate",
    metavar="NAME_OR_PATH",
    shell_complete=options.complete_model,
    help="Train nothing: judge this model on the pairs, by nominal resolution.",
)
@click.option("--maps", type=options.PATH, metavar="FILE.tsv", help="With --evaluate: write a row for each map too.")
@click.option(
    "--shift-fsc",
    "shift",
    envvar="CRYORED_TRAIN_SHIFT_FSC",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="With --evaluate: judge with wrong FSC curves too, N shells shorter and longer, and that of the whole set.",
)
@click.option(
    "--validation",
    type=options.PATH,
    metavar="PAIRS.star",
    help="Pairs of other structures: the best step on them is kept.",
)
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
@click.option("--depth", type=click.IntRange(1, 6), default=5, show_default=True, help="Stages down and up.")
@click.option("--patch", type=click.IntRange(min=2), default=64, show_default=True, help="Edge of patches in voxels.")
@click.option("--batch-size", type=click.IntRange(min=1), default=10, show_default=True, help="Patches in a step.")
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the pairs with one patch a pair.  [default: 27]"
)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps, instead of --epochs.")
@click.option(
    "--learning-rate", type=options.Range(min=0, min_open=True), default=1e-4, show_default=True, help="Of Adam."
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine"]),
    default="constant",
    show_default=True,
    help="The learning rate stays, or rises over 50 steps and falls to 0 along a cosine.",
)
@click.option(
    "--loss",
    type=click.Choice(["mse", "l1"]),
    default="mse",
    show_default=True,
    help="Squared error of a patch over the mean squared error of its whole Wiener map; or absolute error over the "
    "root of that.",
)
@click.option(
    "--l2",
    type=options.Range(min=0),
    default=1e-6,
    show_default=True,
    help="Weight of the sum of squares of the kernels in the loss (the paper's 1e-4, scaled by 0.01).",
)
@click.option("--mixed-precision", is_flag=True, help="Compute in bfloat16, for GPUs that do it faster.")
@click.option(
    "--synthesise",
    type=options.Range(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Share of each batch that the device makes of the tables' truth maps, as `simulate pairs --method gaussian`.",
)
@click.option(
    "--validate-every",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="STEPS",
    help="Steps between validations.",
)
@click.option(
    "--checkpoint-every",
    type=options.Range(min=0),
    default=5.0,
    show_default=True,
    metavar="MINUTES",
    help="What a killed run loses at most.",
)
@click.option(
    "--start",
    metavar="NAME_OR_PATH",
    shell_complete=options.complete_model,
    help="Begin with the weights of this model: train on simple pairs first, then on real ones.",
)
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint; the number of steps may differ.")
@click.option("--skip-bad", is_flag=True, help="Leave out pairs that are missing or cannot be used.")
@click.option(
    "--cache",
    type=options.Range(min=0),
    metavar="GB",
    help="Pairs kept in memory; the others are read again each time.  [default: half of the free memory]",
)
@click.option("--tensorboard", is_flag=True, help="Write the curves to DIR/logs too.")
@options.plot
@options.device
@options.threads
@options.seed
@options.overwrite
@options.common
@click.pass_context
def train(
    ctx: click.Context, /, tables: tuple[str, ...], output: str | None, evaluate: str | None, **given: Any
) -> None:
    """Train a prior on pairs of maps (see `cryored simulate pairs`).

    DIR gets model.keras, card.json and training.csv. A killed run goes on with --resume to the same curve. A loss
    or validation ratio below 1 improves on the best linear filter, the FSC-weighted (Wiener) map. With --validation
    the step that is best on a few patches of other structures is kept, otherwise the last.

    The defaults are those of Kimanius et al. 2021, but for the input. KERAS_BACKEND=torch or jax swaps the engine.
    Several GPUs share each batch (TensorFlow, JAX).

    \b
    Example:
      cryored train pairs/pairs.star -o my_prior --validation held_out/pairs.star
      cryored denoise map.mrc -o denoised.mrc --model ./my_prior
      cryored train --evaluate ./my_prior held_out/pairs.star --plot evaluation.png
    """
    _check_usage(ctx)

    from cryored.files.output import check_folder, check_outputs

    check_outputs((output, given["maps"], given["plot"]), (*tables, given["validation"]))
    if evaluate is not None:
        _judge(evaluate, tables, output or "-", given)
        return

    from cryored.cli.progress import bar
    from cryored.training.evaluation import as_tsv
    from cryored.training.loop import Recipe
    from cryored.training.train import TrainOptions, train_files

    assert output is not None  # by the check
    check_folder(output)
    recipe = options.pick(Recipe, given, epochs=given["epochs"] or Recipe.epochs, input=given["input_kind"])
    chosen = options.pick(TrainOptions, given, command=shlex.join(["cryored", *sys.argv[1:]]))
    with bar("steps", recipe.steps or 1, time_left=False) as advance:
        model = train_files(tables, output, recipe, chosen, progress=advance)
    if model.card.evaluation:
        click.echo(as_tsv(model.card.evaluation["simulated_pairs"]), nl=False, err=True)
    click.echo(model.folder)


def _judge(model: str, tables: tuple[str, ...], output: str, given: Mapping[str, Any]) -> None:
    from cryored.cli.progress import bar
    from cryored.training.evaluation import evaluate_files

    words = {name: given[name] for name in _OF_EVALUATION - {"tables", "evaluate", "output"}}
    with bar("maps", 0) as advance:
        evaluate_files(model, tables, output=output, **words, progress=advance)


def _check_usage(ctx: click.Context) -> None:
    """Refuse options that say nothing together."""
    values = ctx.params
    given = {option for option in values if ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE}
    evaluation = values["evaluate"] is not None
    for option in ctx.command.params:
        if option.name in given and evaluation and option.name not in _OF_EVALUATION:
            raise click.UsageError(f"{option.opts[-1]} has no meaning with --evaluate.")
        if option.name in given and not evaluation and option.name in _OF_EVALUATION_ALONE:
            raise click.UsageError(f"{option.opts[-1]} has no meaning without --evaluate.")
    if evaluation and values["maps"] == "-" == (values["output"] or "-"):
        raise click.UsageError("only one of --output and --maps can be '-'.")
    if not evaluation and values["epochs"] is not None and values["steps"] is not None:
        raise click.UsageError("--epochs and --steps exclude each other")
    if not evaluation and values["output"] is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
