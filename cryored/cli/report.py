"""``cryored report``."""

from __future__ import annotations

import click

from cryored.cli import options


@click.command()
@click.argument("run_dir", type=options.PATH, metavar="RUN_DIR")
@click.option(
    "-o",
    "--output",
    type=options.PATH,
    metavar="FILE.html",
    help="Page to write.  [default: cryored_report.html in RUN_DIR]",
)
@options.overwrite
@options.common
def report(run_dir: str, output: str | None, overwrite: bool) -> None:
    """Make the report of a refinement in which cryored answered, from its logs: at any time, with or without a watcher.

    Half-map FSC, weights and change by iteration, slices of the maps that are still there, and all answers. A report
    that is there already is made anew.

    \b
    Example:
      cryored report Refine3D/job012 -o job012.html
    """
    import logging
    from pathlib import Path

    from cryored.refinement.report import report_folder

    target = str(Path(run_dir) / "cryored_report.html") if output is None else output
    number = report_folder(run_dir, target, overwrite=overwrite)
    logging.getLogger("cryored").info("%s: %d answers", target, number)
