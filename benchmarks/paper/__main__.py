"""MAP against RED and CW-RED in refinements by RELION: ``python benchmarks/paper``; docs/paper.md explains it."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cryored.cli import Program, options, run_program
from cryored.cli.progress import bar
from cryored.errors import CryoredError
from cryored.files.output import write_text
from cryored.refinement.relion_runs import check_relion
from paper.plan import CELLS, RUNS, SCALES, parse_cells, parse_runs
from paper.results import check, format_table, report, table_rows
from paper.work import Experiment, do_all, do_on_cluster

REPOSITORY = Path(__file__).resolve().parents[2]

logger = logging.getLogger("cryored.paper")


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Holds data sets and runs: gigabytes. Needed to do any."
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Holds what is kept of finished runs: kilobytes.  [default: FOLDER/results]",
)
@click.option("--scale", type=click.Choice(list(SCALES)), default="small", show_default=True)
@click.option("--cells", default=",".join(dict.fromkeys(cell.structure for cell in CELLS)), show_default=True)
@click.option("--runs", default=",".join(RUNS), show_default=True)
@click.option(
    "--structures",
    type=click.Path(path_type=Path),
    default=REPOSITORY.parent / "shared" / "structures" / "test",
    help="Folder of the atomic models: 4ail.pdb and so on, or their stand-ins.",
)
@options.seed
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Cells at a time.")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Dask scheduler whose workers do a cell at a time each; start them with --nthreads 1, RELION, these folders "
    "under the same paths, and PYTHONPATH=benchmarks.",
)
@click.option(
    "--hook",
    type=click.Choice(["cold", "watch"]),
    default="watch",
    show_default=True,
    help="Start cryored for each request, or keep cryored watch beside each refinement.",
)
@click.option("--relion", default="", metavar="'OPTION ...'", help="More options of relion_refine, as '--gpu --j 4'.")
@click.option("--status", is_flag=True, help="Print what is done of each cell, and do nothing.")
@click.option("--table", type=click.Path(path_type=Path), help="Write the numbers of what is done as TSV.")
@click.option("--report", "show_report", is_flag=True, help="Print the results so far as Markdown.")
@click.option("--figures", type=click.Path(path_type=Path), metavar="DIR", help="Draw what is done.")
@click.option("--check", "checked", metavar="CELL", help="Do one cell again and compare it with what --table holds.")
@options.common
def paper(
    folder: Path | None,
    results: Path | None,
    scale: str,
    cells: str,
    runs: str,
    structures: Path,
    seed: int,
    jobs: int,
    scheduler: str | None,
    hook: str,
    relion: str,
    status: bool,
    table: Path | None,
    show_report: bool,
    figures: Path | None,
    checked: str | None,
) -> None:
    """Do the runs that are missing or outdated; with --status, --table, --report, --figures or --check only that.

    What is done stays done; an interrupted run is begun anew.
    """
    does_runs = checked is not None or not (status or table or figures or show_report)
    if folder is None and does_runs:
        raise click.UsageError("name a --folder for data sets and runs.")
    if folder is None and results is None:
        raise click.UsageError("name the --folder of an experiment, or its --results.")
    place = (folder or results or Path()).resolve()
    kept = results.resolve() if results else place / "results"
    experiment = Experiment(place, kept, SCALES[scale], structures.resolve(), seed, hook, tuple(shlex.split(relion)))
    chosen, names = parse_cells(cells), parse_runs(runs)
    # Where the folder lies is nobody's business.
    words = ["DIR" if folder is not None and Path(word) == folder else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/paper", *words])
    if checked is not None:
        cell, *more = parse_cells(checked)
        if more:
            raise click.UsageError("--check takes one cell, as 4ail:i.")
        if table is None:
            raise click.UsageError("--check compares with a table: name it with --table.")
        check_relion()
        if not check(experiment, cell, table, names, show=logger.info):
            raise CryoredError(f"{cell}: does not agree with {table}")
        return
    if status:
        for cell in chosen:
            states = [f"{name} {experiment.state(cell, name)}" for name in names if RUNS[name].belongs_to(cell)]
            click.echo(f"{cell}\t" + ", ".join(states))
        return
    if does_runs:
        if scheduler is None:
            check_relion()
        for name in names:
            experiment.method(RUNS[name])  # a model that is missing shows now, not in hours
        if scheduler is None:
            failed = do_all(experiment, chosen, names, jobs)
        else:
            with bar("cells", len(chosen)) as advance:
                failed = do_on_cluster(experiment, chosen, names, scheduler, advance)
        for label, reason in failed.items():
            logger.warning("%s failed: %s", label, reason)
        if failed:
            raise CryoredError(f"{len(failed)} runs failed; run the command again to go on")
        return
    records = experiment.records(chosen, names)
    outdated = [f"{cell} {name}" for cell, name in records if experiment.state(cell, name) == "outdated"]
    if outdated:
        logger.warning("made with other data, model or options than now: %s", ", ".join(outdated))
    if table is not None:
        rows = table_rows(records)
        if not rows:
            raise CryoredError(f"{kept}: nothing is finished yet, expected runs; do some first")
        write_text(table, format_table(rows, command))
    if figures is not None:
        from paper.figures import draw_figures

        for path in draw_figures(records, figures):
            logger.info("%s", path)
    if show_report:
        click.echo(report(records, command), nl=False)


def main() -> None:
    """Run the command and exit."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup's choice stays
            signal.signal(number, signal.default_int_handler)  # ends the refinements, as Control-C does
    run_program(paper, "benchmarks/paper", if_interrupted="interrupted; run it again to go on")


if __name__ == "__main__":
    main()
