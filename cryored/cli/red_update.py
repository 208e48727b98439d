"""``cryored red-update``."""

from __future__ import annotations

import click

from cryored.cli import options


class _Lambda(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    name = "auto|paper|0..1"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value in ("auto", "paper"):
            return str(value)
        try:
            number = float(str(value))
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1:
            self.fail(f"'{value}' is not auto, paper or a number between 0 and 1", param, ctx)
        return number


@click.command()
@click.argument("job", type=options.PATH, metavar="JOB.star")
@options.model
@click.option(
    "--lambda",
    "lam",
    type=_Lambda(),
    envvar="CRYORED_RED_UPDATE_LAMBDA",  # click would make it of the name "lam"
    default="auto",
    show_default=True,
    help="Weight of the prior: 0 is RELION's own MAP map; auto follows the FSC of the request by the schedule in the "
    "model's card, or by the paper's where it has none; paper is 1 at 4.5 A, 0 at 10 A, linear between.",
)
@click.option(
    "--schedule",
    type=options.PATH,
    metavar="FILE.json",
    help="Schedule for auto, instead of the model's.",
)
@options.angpix
@click.option(
    "-o", "--output", type=options.PATH, metavar="OUT.mrc", help='Map to write, or "-".  [default: the request\'s]'
)
@click.option(
    "--unregularised",
    type=options.PATH,
    metavar="OUT.mrc",
    help="Write the map without any prior too. {root} in the name stands for the request's up to "
    "_external_reconstruct, and such a file is replaced: within RELION, '{root}_unregularised.mrc' with --clean "
    "keeps what `cryored simulate pairs --from-relion` needs.",
)
@click.option(
    "--denoised", type=options.PATH, metavar="IN.mrc", help="Use this denoised map instead of running the network."
)
@click.option("--check", is_flag=True, help="Validate everything, print what would be done, write nothing.")
@click.option("--clean", is_flag=True, help="Remove RELION's three arrays after success.")
@click.option(
    "--extrapolate/--no-extrapolate",
    default=False,
    show_default=True,
    help="Let the prior fill the shells without data, as the paper's script does; else they are as in plain MAP.",
)
@options.device
@options.threads
@options.overwrite
@options.common
def red_update(
    job: str,
    model: str,
    lam: float | str,
    schedule: str | None,
    angpix: float | None,
    output: str | None,
    unregularised: str | None,
    denoised: str | None,
    check: bool,
    clean: bool,
    extrapolate: bool,
    gpu: bool | None,
    threads: int | None,
    overwrite: bool,
) -> None:
    """Answer one reconstruction request of RELION (relion_refine --external_reconstruct).

    Computes x = (B + lambda f / tau2) / (K + 1 / tau2), with f the denoised MAP map, and writes the map that the
    request names. A line of JSON about it is appended to ROOT_cryored.log beside the request. To put it into a
    refinement set RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE to cryored-external-reconstruct.

    \b
    Example, step by step what one call does, in RELION's project folder:
      cryored red-update JOB.star --lambda 0 -o map.mrc
      cryored denoise map.mrc -o denoised.mrc
      cryored red-update JOB.star --denoised denoised.mrc -o result.mrc
    """
    import json

    from cryored.output import is_stream

    if output is not None and unregularised is not None and is_stream(output) and is_stream(unregularised):
        raise click.UsageError("only one of --output and --unregularised can be '-'.")
    if denoised is not None and is_stream(job) and is_stream(denoised):
        raise click.UsageError("only one of JOB.star and --denoised can be '-'.")
    if lam != "auto" and schedule is not None:
        raise click.UsageError("--schedule is for --lambda auto; give one of the two.")

    from cryored.lambda_schedule import Schedule, read_schedule
    from cryored.red_update import Settings, red_update_file

    if lam == "paper":
        followed: Schedule | None = Schedule()
    else:
        followed = None if schedule is None else read_schedule(schedule)
    settings = Settings(
        lam=None if isinstance(lam, str) else lam,
        schedule=followed,
        extrapolate=extrapolate,
        threads=threads,
    )
    record = red_update_file(
        job,
        settings,
        model=model,
        angpix=angpix,
        output=output,
        unregularised=unregularised,
        denoised=denoised,
        check=check,
        clean=clean,
        gpu=gpu,
        overwrite=overwrite,
    )
    if check:
        click.echo(json.dumps(record, indent=2))
    else:
        import logging

        resolution = record["nominal_resolution"]
        logging.getLogger("cryored").info(
            "%s: lambda %.3f%s%s, %s, %.2f s",
            record["result"],
            record["lambda"],
            "" if resolution is None else f" at {resolution:.2f} A",
            "" if record["schedule"] is None else f" by {record['schedule']}",
            record["device"],
            record["seconds"]["total"],
        )
