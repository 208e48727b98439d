"""``cryored lambda-schedule``."""

from __future__ import annotations

import logging
from typing import Any

import click

from cryored.cli import options
from cryored.prior.models import DEFAULT_MODEL


@click.command("lambda-schedule")
@click.argument("sources", type=options.PATH, nargs=-1, metavar="[TABLE | PAIRS.star... FOLDER...]")
@click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),  # inf: nothing is resolved
    metavar="ANGSTROM",
    help="Nominal resolution, instead of a table.",
)
@click.option(
    "--low",
    type=options.Number(),
    default=10.0,
    metavar="ANGSTROM",
    help="A line in the schedule's place: at this resolution and coarser lambda is 0.  [default: 10 with --high alone]",
)
@click.option(
    "--high",
    type=options.Number(),
    default=4.5,
    metavar="ANGSTROM",
    help="And at this one and finer it is 1.  [default: 4.5 with --low alone]",
)
@click.option("--schedule", type=options.PATH, metavar="FILE.json", help="A stored schedule, instead of --low, --high.")
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    metavar="NAME_OR_PATH",
    shell_complete=options.complete_model,
    help="The schedule in this model's card, which red-update --lambda auto follows where the card has no weights; "
    "with --fit, which needs it, the model to fit for.",
)
@click.option(
    "--fit", is_flag=True, help="Fit schedule and weights of --model to maps of structures it was not trained on."
)
@click.option(
    "-o", "--output", type=options.PATH, default="-", metavar="FILE.json", help="With --fit, instead of stdout."
)
@click.option(
    "--trust",
    type=options.Range(min=0),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="With --fit, store this factor of the measured precision with the weights.",
)
@click.option("--write-card", is_flag=True, help="Store the fitted schedule and weights in the model's card.")
@options.angpix
@options.plot
@options.device
@options.threads
@options.overwrite
@options.common
@click.pass_context
def lambda_schedule(ctx: click.Context, /, sources: tuple[str, ...], fit: bool, **given: Any) -> None:
    """Print lambda, the weight of the prior, as one number; or fit it with --fit.

    TABLE is an FSC table (of `cryored fsc`, RELION STAR, EMDB XML, "-" for a pipe), one of RELION's requests, or the
    folder of a RELION job, such as Refine3D/job012, whose latest half-map FSC is taken;
    its nominal resolution is where the FSC falls below 0.143. The schedule is that of --model, which red-update
    --lambda auto follows; --low and --high give the paper's line between them.

    --fit takes tables of `cryored simulate pairs` instead, and folders of recorded refinements (truth.mrc, and
    RELION's requests in folders below), and prints as JSON the schedule and the weights by which red-update --lambda
    auto believes the denoised map in each shell.

    \b
    Example:
      cryored lambda-schedule --resolution 7.25
      cryored fsc half1.mrc half2.mrc | cryored lambda-schedule -
      cryored lambda-schedule --fit validation/pairs.star --model ./my_prior -o schedule.json --write-card
    """
    _check_usage(ctx)

    from cryored.files.output import check_outputs, check_target

    check_outputs((given["output"], given["plot"]), (*sources, given["schedule"]))
    if fit:
        from cryored.cli.progress import bar
        from cryored.training.lambda_fit import fit_files

        names = ("output", "trust", "plot", "gpu", "threads", "overwrite")
        words = {name: given[name] for name in names}
        with bar("maps", 0) as advance:
            fit_files(sources, given["model"], **words, write_to_card=given["write_card"], progress=advance)
        return

    from cryored.prior import lambda_schedule as tool
    from cryored.prior.models import find_model

    resolution, plot = given["resolution"], given["plot"]
    if plot is not None:
        check_target(plot, given["overwrite"])
    if given["schedule"] is not None:
        chosen = tool.read_schedule(given["schedule"])
    elif {"low", "high"} & options.named(ctx):
        chosen = tool.linear_schedule(given["low"], given["high"])
    else:
        chosen = tool.model_schedule(find_model(given["model"]))
    if resolution is None:
        resolution = tool.source_resolution(sources[0], given["angpix"])
    click.echo(f"{chosen(resolution):.6g}")
    logging.getLogger("cryored").info("by %s, at %.2f A", chosen.source, resolution)
    if plot is not None:
        tool.draw_schedule(plot, chosen, resolution)


def _check_usage(ctx: click.Context) -> None:
    values, given = ctx.params, options.named(ctx)
    if values["fit"]:
        if not values["sources"] or "model" not in given:
            raise click.UsageError("--fit needs PAIRS.star and --model.")
        for name in ("resolution", "low", "high", "schedule", "angpix"):
            if name in given:
                raise click.UsageError(f"--{name} has no meaning with --fit.")
        return
    for name in ("output", "trust", "write_card"):
        if name in given:
            raise click.UsageError(f"--{name.replace('_', '-')} has no meaning without --fit.")
    if len(values["sources"]) + (values["resolution"] is not None) != 1:
        raise click.UsageError("give either a table or --resolution")
    if len([True for names in ({"low", "high"}, {"schedule"}, {"model"}) if names & given]) > 1:
        raise click.UsageError("--schedule and --model stand for --low and --high: give one of the three")
