"""``cryored watch``: announced, not there yet."""

from __future__ import annotations

import click


@click.command()
@click.argument("run_dir", required=False)
def watch(run_dir: str | None) -> None:
    """Serve the requests of a running refinement with the model resident (not in this version)."""
    from cryored.errors import CryoredError

    raise CryoredError(
        "watch is not in this version; set RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE to cryored-external-reconstruct, "
        "which answers each request by itself"
    )
