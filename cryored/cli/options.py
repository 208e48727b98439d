"""Options that several commands share, each defined once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import click

from cryored.models import DEFAULT_MODEL

F = TypeVar("F", bound=Callable[..., Any])

# Paths stay strings: "-" is a stream, and the tools report missing files in their own words.
PATH = click.Path(readable=False)


def verbosity(ctx: click.Context) -> int:
    """Return -1 (quiet), 0, 1 or 2 (traceback) as asked of the innermost command."""
    return int(ctx.find_root().meta.get("cryored.verbosity", 0))


def common(function: F) -> F:
    """Add -q and -v, and set up the log on standard error accordingly."""

    def remember(step: int) -> Callable[[click.Context, click.Parameter, int], None]:
        def callback(ctx: click.Context, _: click.Parameter, value: int) -> None:
            level = verbosity(ctx) + step * int(value)
            ctx.find_root().meta["cryored.verbosity"] = level
            _set_up_log(level)

        return callback

    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=remember(-1), help="Only errors.")
    verbose = click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=remember(1), help="More; -vv with traceback."
    )
    return quiet(verbose(function))


def _set_up_log(level: int) -> None:
    logger = logging.getLogger("cryored")
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        handler = _Console()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel({-1: logging.ERROR, 0: logging.INFO}.get(level, logging.DEBUG))


class _Console(logging.Handler):
    """Writes to what sys.stderr is at the time: a test runner may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "cryored: warning: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


overwrite = click.option("--overwrite", is_flag=True, help="Replace existing output files.")
angpix = click.option(
    "--angpix",
    type=click.FloatRange(min=0, min_open=True),
    metavar="ANGSTROM",
    help="Pixel size in angstrom, instead of the one in the file.",
)
model = click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    metavar="NAME_OR_PATH",
    help="Model: a name (see CRYORED_MODEL_PATH) or a folder.",
)
seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random numbers.")
threads = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads for FFTs and arrays.  [default: all cores]"
)
device = click.option(
    "--gpu/--cpu",
    "gpu",
    default=None,
    help="Insist on a GPU, or keep off it.  [default: a GPU where there is one]",
)
plot = click.option("--plot", type=PATH, metavar="FILE.png", help="Draw the result (needs matplotlib).")
gaussian_width = click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    metavar="ANGSTROM",
    help="Width of the atoms' Gaussians: their transform falls to 1/e at 1/resolution.",
)
box = click.option(
    "--box", type=click.IntRange(min=8), default=96, show_default=True, help="Edge of the maps in voxels."
)
grid_angpix = click.option(
    "--angpix",
    type=click.FloatRange(min=0, min_open=True),
    default=1.5,
    show_default=True,
    metavar="ANGSTROM",
    help="Voxel size in angstrom.",
)
