"""``cryored simulate pairs``."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from cryored.cli import options
from cryored.simulation.methods import METHODS

# Options that say how to simulate, which a refinement that has been run leaves no choice of.
_OF_SIMULATION = ("method", "number", "box", "resolution", "seed", "shard", "skip_bad", "jobs", "scheduler")


@click.command("pairs", short_help="Make training pairs from atomic models, or of a refinement.")
@click.argument("structures", type=options.PATH, nargs=-1)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR", help="Folder of the pairs.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="gaussian",
    show_default=True,
    help="gaussian: smeared truth plus coloured noise. intermediates: a refinement in miniature, each of its "
    "iterations a pair of each half. featured: the same of density with what real maps have, drawn at random.",
)
@click.option(
    "--number",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Draws of each structure; a draw makes a pair of each half of one or more intermediates.",
)
@options.box
@options.grid_angpix
@options.gaussian_width
@click.option("--float16", is_flag=True, help="Write maps of half the size (MRC mode 12).")
@click.option(
    "--split",
    type=options.PATH,
    metavar="FILE.csv",
    help="Table with the columns id, file and split: refuse structures that are not of --part.",
)
@click.option("--part", default="train", show_default=True, metavar="NAME", help="Part that the pairs are for.")
@click.option("--skip-bad", is_flag=True, help="Leave out, and list, structures that cannot be used.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option(
    "--shard",
    callback=options.read_shard,
    metavar="i/n",
    help="For job arrays: do the i-th of n parts of the work. When all are done, the same command without --shard "
    "collects them.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Dask scheduler (tcp://host:8786) whose workers do the work; they need this folder under the same path, and "
    "--nthreads 1.",
)
@click.option(
    "--from-relion",
    type=options.PATH,
    metavar="RUN",
    help="Take the pairs from a refinement with --external_reconstruct: its folder, or what RELION's --o was.",
)
@click.option("--truth", type=options.PATH, metavar="MAP.mrc", help="With --from-relion: the map it should have found.")
@click.option("--name", help="With --from-relion: the structure's name.  [default: that of the truth's file]")
@options.seed
@options.plot
@options.overwrite
@options.common
@click.pass_context
def simulate_pairs(
    ctx: click.Context,
    /,
    structures: tuple[str, ...],
    output: str,
    from_relion: str | None,
    plot: str | None,
    **given: Any,
) -> None:
    """Make training pairs: DIR/pairs.star and the maps that it lists.

    The noisy map is unregularised, the target is the truth times the FSC of the two halves.

    An interrupted run goes on where it stopped when the same command is given again. The same seed gives the same
    bytes, however the work is divided.

    \b
    Example:
      cryored simulate pairs structures/*.pdb.gz -o pairs --float16 --jobs 2
      cryored simulate pairs --from-relion Refine3D/run --truth truth.mrc -o pairs
    """
    _check_usage(ctx)

    from cryored.files.output import check_folder, check_outputs, check_target

    check_folder(output)
    check_outputs((output, plot), (*structures, given["truth"], given["split"]))
    if plot is not None:
        check_target(plot, given["overwrite"])

    from cryored.cli.progress import bar
    from cryored.simulation.pair_table import log_summary, read_pairs

    if from_relion is not None:
        from cryored.simulation.harvest import HarvestOptions, harvest_files

        own = given["angpix"] if "angpix" in options.named(ctx) else None
        wanted = options.pick(HarvestOptions, given, angpix=own, manifest=given["split"])
        with bar("requests", 0) as advance:
            table = harvest_files(from_relion, given["truth"], output, wanted, progress=advance)
    else:
        from cryored.simulation.pairs import PairOptions, simulate_pairs_files

        chosen = options.pick(PairOptions, given, manifest=given["split"])
        with bar("draws", 0) as advance:
            table = simulate_pairs_files(structures, output, chosen, progress=advance)
    rows = read_pairs(table)
    log_summary(rows)
    if plot is not None:
        from cryored.simulation.pair_pictures import draw_pairs

        draw_pairs(plot, rows)
    click.echo(table)


def _given(ctx: click.Context, option: str) -> bool:
    # Not in the environment, where it may be meant for other calls.
    return ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE


def _check_usage(ctx: click.Context) -> None:
    values = ctx.params
    from_relion = values["from_relion"] is not None
    if from_relion and values["structures"]:
        raise click.UsageError("STRUCTURES and --from-relion exclude each other.")
    if not (from_relion or values["structures"]):
        raise click.UsageError("Missing argument 'STRUCTURES...' or option '--from-relion'.")
    if from_relion and values["truth"] is None:
        raise click.UsageError("--from-relion needs --truth.")
    for option in ("truth", "name"):
        if not from_relion and values[option] is not None:
            raise click.UsageError(f"--{option} has no meaning without --from-relion.")
    for option in _OF_SIMULATION:
        if from_relion and _given(ctx, option):
            raise click.UsageError(f"--{option.replace('_', '-')} has no meaning with --from-relion.")
    if _given(ctx, "part") and values["split"] is None:
        raise click.UsageError("--part has no meaning without --split.")
    if _given(ctx, "jobs") and values["scheduler"] is not None:
        raise click.UsageError("--jobs and --scheduler exclude each other.")
