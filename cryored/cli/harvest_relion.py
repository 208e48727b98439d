"""``harvest-relion``: a program of its own rather than a subcommand, for it runs for hours and needs RELION.

``bin/harvest-relion`` starts it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from cryored import __version__
from cryored.cli import Program, options, run_program
from cryored.errors import CryoredError

logger = logging.getLogger("cryored.cli.harvest_relion")  # run as a program, the module has another name


def ratios(_: click.Context, __: click.Parameter, value: str) -> tuple[float, ...]:
    """Read signal-to-noise ratios as in 0.15,0.06: a callback of an option."""
    try:
        found = tuple(float(text) for text in value.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < ratio < float("inf") for ratio in found):
        raise click.BadParameter(f"'{value}', expected numbers above 0 as in 0.15,0.06")
    return found


@click.command(
    "harvest-relion",
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CRYORED_HARVEST_RELION"},
    epilog="\b\nExample:\n  harvest-relion structures/*.pdb.gz -o harvest --jobs 4 --float16",
)
@click.argument("structures", type=options.PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR", help="Folder of the refinements.")
@click.option(
    "--snr",
    callback=ratios,
    default="0.15,0.06,0.02,0.01",
    show_default=True,
    metavar="RATIO,...",
    help="Variance of the noise-free particles over that of the noise; one for each structure, in turn.",
)
@click.option("--number", type=click.IntRange(min=10), default=600, show_default=True, help="Particles of each.")
@options.box
@options.grid_angpix
@click.option(
    "--perturb-angles",
    type=options.Range(0, 180),
    default=5.0,
    show_default=True,
    metavar="DEGREES",
    help="Root mean square error of the angles that local searches start from.",
)
@options.seed
@click.option("--split", "manifest", type=options.PATH, metavar="FILE.csv", help="Table of a split: id, file, split.")
@click.option("--part", default="train", show_default=True, help="Part of the split that all structures have to be of.")
@click.option(
    "--shard",
    callback=options.read_shard,
    default="1/1",
    show_default=True,
    metavar="I/N",
    help="Do every N-th structure from the I-th on, for N machines with one folder.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Refinements at a time, of two working processes each.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Dask scheduler (tcp://host:8786) whose workers refine, each one structure at a time with --nthreads 1; they "
    "need RELION, and DIR and the structures under the same paths.",
)
@click.option(
    "--timeout",
    type=options.Range(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="MINUTES",
    help="End a refinement that takes longer.",
)
@click.option("--keep", is_flag=True, help="Leave the particles and RELION's arrays, a hundred megabytes and more.")
@click.option("--float16", is_flag=True, help="Write maps of half the size (MRC mode 12).")
@options.common
@click.version_option(__version__, prog_name="harvest-relion", message="%(prog)s %(version)s")
def harvest_relion(
    structures: tuple[str, ...], output: str, jobs: int, scheduler: str | None, timeout: float, **given: Any
) -> None:
    """Harvest training pairs from RELION's refinements of simulated particles of STRUCTURES (PDB or mmCIF).

    Each structure gets a folder DIR/NAME_snrX with the truth, the refinement (local searches from perturbed angles)
    and pairs/pairs.star, a pair for each half of each iteration. The names of these tables are printed. Run again, it
    goes on where it was interrupted; a structure that fails does not stop the others.
    """
    if scheduler is not None and "jobs" in options.named(click.get_current_context()):
        raise click.UsageError("--jobs and --scheduler exclude each other.")

    from cryored.cli.progress import bar
    from cryored.files.output import check_folder
    from cryored.refinement.harvest_relion import Options, plan, run_all, run_on_cluster, signals_interrupt
    from cryored.refinement.relion_runs import check_relion
    from cryored.simulation.split import check_split

    check_folder(output)
    chosen = options.pick(Options, given, timeout=60 * timeout)
    if chosen.manifest is not None:
        check_split(structures, chosen.manifest, chosen.part)
    experiment = ("snr", "number", "box", "angpix", "perturb_angles", "seed", "shard")
    tasks = plan(structures, Path(output), **{name: given[name] for name in experiment})
    finished = sum(task.table.exists() for task in tasks)
    if finished:
        logger.info("%d of %d refinements were finished before", finished, len(tasks))
    if finished < len(tasks) and scheduler is None:
        check_relion()
    if scheduler is not None:
        with bar("refinements", len(tasks)) as advance:
            failed = run_on_cluster(tasks, chosen, scheduler, advance)
    else:
        with signals_interrupt():
            failed = run_all(tasks, chosen, jobs)
    for task in tasks:
        if task.label in failed:
            logger.warning("%s failed: %s", task.label, failed[task.label])
        else:
            click.echo(task.table)
    if tasks and len(failed) == len(tasks):
        raise CryoredError(f"none of {len(tasks)} refinements gave pairs: {next(iter(failed.values()))}")


def main() -> None:
    """Run the program and exit."""
    run_program(harvest_relion, "harvest-relion", if_interrupted="interrupted; run it again to go on")


if __name__ == "__main__":
    main()
