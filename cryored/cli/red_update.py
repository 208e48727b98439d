"""``cryored red-update``."""

from __future__ import annotations

from typing import Any

import click

from cryored.cli import options


@click.command()
@click.argument("job", type=options.PATH, metavar="REQUEST.star|JOB")
@options.update("RED_UPDATE")
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
@click.option(
    "--check",
    is_flag=True,
    help="Validate everything, print what would be done, write nothing; of a JOB's last request.",
)
@options.device
@options.max_memory
@options.threads
@options.overwrite
@options.common
def red_update(job: str, check: bool, **given: Any) -> None:
    """Answer one reconstruction request of RELION (relion_refine --external_reconstruct).

    Computes x = (B + g f / v) / (K + 1 / v), with f the denoised MAP map, g its gain and v its variance in each
    shell, and writes the map that the request names. A line of JSON about it is appended to ROOT_cryored.log beside
    the request. To put it into a refinement set RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE to cryored-external-reconstruct,
    which asks `cryored watch` where that serves the request's folder, and becomes red-update where it does not.

    \b
    Example, step by step what one call does, in RELION's project folder:
      cryored red-update JOB.star --lambda 0 -o map.mrc
      cryored denoise map.mrc --request JOB.star -o denoised.mrc
      cryored red-update JOB.star --denoised denoised.mrc -o result.mrc
    """
    import json

    from cryored.cli.progress import working
    from cryored.files.jobs import is_job, last_request
    from cryored.files.output import is_stream
    from cryored.refinement.red_update import Files, red_update_file

    if is_job(job):
        if not check:
            raise click.UsageError("the folder of a job is for --check; to answer a request name it.")
        job = str(last_request(job))
    files = options.pick(Files, given)
    if all(path is not None and is_stream(path) for path in (files.output, files.unregularised)):
        raise click.UsageError("only one of --output and --unregularised can be '-'.")
    if files.denoised is not None and is_stream(job) and is_stream(files.denoised):
        raise click.UsageError("only one of JOB.star and --denoised can be '-'.")
    network = {name: given[name] for name in ("model", "gpu", "max_memory")}
    with working("updating"):
        record = red_update_file(job, options.settings(given), files, check=check, **network)
    if check:
        click.echo(json.dumps(record, indent=2))
    else:
        import logging

        from cryored.refinement.red_update import beside

        resolution, prior = record["nominal_resolution"], beside(record)
        logging.getLogger("cryored").info(
            "%s: %slambda %.3f%s%s, %s, %.2f s",
            record["result"],
            "" if prior is None else f"plain MAP (last iteration), with the prior: {prior}, ",
            record["lambda"],
            "" if resolution is None else f" at {resolution:.2f} A",
            f", {record['weights']['rule']}" if record["lambda"] else "",
            record["device"],
            record["seconds"]["total"],
        )
