"""``cryored doctor``."""

from __future__ import annotations

import click

from cryored.cli import options


@click.command()
@click.argument("job", required=False, type=options.PATH, metavar="[RUN_DIR]")
@click.option(
    "--box", type=click.IntRange(min=8), help="Edge of the images in voxels.  [default: that of RUN_DIR's run]"
)
@click.option("--pad", type=options.Range(min=1), default=2.0, show_default=True, help="RELION's padding factor.")
@options.model
@options.device
@click.option("--json", "as_json", envvar="CRYORED_DOCTOR_JSON", is_flag=True, help="Print the findings as JSON.")
@options.common
def doctor(job: str | None, box: int | None, pad: float, model: str, gpu: bool | None, as_json: bool) -> None:
    """Look whether everything is in place for a refinement with cryored, before it runs for a week.

    Model, device, memory, RELION, the hook (called as RELION calls it, with a request made on the spot; RELION 5's
    Blush call too), the folder and its watcher, MPI. Each line is ok, a warning or an error with its remedy; the exit
    status is 1 if there is an error. Run it where RELION will run, with the same environment: inside the job's script.

    \b
    Example:
      cryored doctor Refine3D/job012 --box 256
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    from cryored.refinement.doctor import Setup, examine, hook_model

    ctx = click.get_current_context()
    quiet = options.verbosity(ctx) < 0
    chosen = model if "model" in options.named(ctx) else hook_model() or model
    setup = Setup(None if job is None else Path(job), box, pad, chosen, gpu)
    found = []
    for finding in examine(setup):
        found.append(finding)
        if not as_json and (finding.state == "error" or not quiet):
            colour = {"ok": "green", "warning": "yellow", "error": "red"}[finding.state]
            remedy = f"\n{'':<20}-> {finding.remedy}" if finding.remedy else ""
            click.echo(f"{click.style(f'{finding.state:<8}', fg=colour)}{finding.subject:<12}{finding.text}{remedy}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    if any(finding.state == "error" for finding in found):
        ctx.exit(1)
