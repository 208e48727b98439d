"""``cryored lambda-schedule``."""

from __future__ import annotations

import click
from click.core import ParameterSource

from cryored.cli import options


@click.command("lambda-schedule")
@click.argument("source", type=options.PATH, required=False, metavar="[TABLE]")
@click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    metavar="ANGSTROM",
    help="Nominal resolution, instead of a table.",
)
@click.option(
    "--low", type=float, default=10.0, show_default=True, metavar="ANGSTROM", help="The prior is off here and worse."
)
@click.option(
    "--high", type=float, default=4.5, show_default=True, metavar="ANGSTROM", help="It is trusted here and better."
)
@click.option("--schedule", type=options.PATH, metavar="FILE.json", help="A stored schedule, instead of --low, --high.")
@options.angpix
@options.plot
@options.overwrite
@options.common
@click.pass_context
def lambda_schedule(
    ctx: click.Context,
    source: str | None,
    resolution: float | None,
    low: float,
    high: float,
    schedule: str | None,
    angpix: float | None,
    plot: str | None,
    overwrite: bool,
) -> None:
    """Print lambda, the weight of the prior, as one number.

    TABLE is an FSC table (of `cryored fsc`, RELION STAR, EMDB XML, "-" for a pipe) or one of RELION's requests;
    its nominal resolution is where the FSC falls below 0.143.

    \b
    Example:
      cryored lambda-schedule --resolution 7.25
      cryored fsc half1.mrc half2.mrc | cryored lambda-schedule -
    """
    if (source is None) == (resolution is None):
        raise click.UsageError("give either a table or --resolution")
    ends = [ctx.get_parameter_source(name) for name in ("low", "high")]
    if schedule is not None and ends != [ParameterSource.DEFAULT] * 2:
        raise click.UsageError("--schedule stands for --low and --high: give one or the other")

    from cryored import lambda_schedule as tool
    from cryored.output import check_target, is_stream

    if plot is not None and is_stream(plot):
        raise click.UsageError("--plot needs the name of a file.")
    if plot is not None:
        check_target(plot, overwrite)
    chosen = tool.linear_schedule(low, high) if schedule is None else tool.read_schedule(schedule)
    if resolution is None and source is not None:
        resolution = tool.source_resolution(source, angpix)
    assert resolution is not None
    click.echo(f"{chosen(resolution):.6g}")
    if plot is not None:
        tool.draw_schedule(plot, chosen, resolution)
