"""Options that several commands share, each defined once."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from cryored.prior.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from cryored.refinement.updater import Settings

F = TypeVar("F", bound=Callable[..., Any])

D = TypeVar("D")

# Paths stay strings: "-" is a stream, and the tools report missing files in their own words.
PATH = click.Path(readable=False)


class _Finite(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Refuses nan and infinity, which compare false with every limit."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a finite number", param, ctx)
        return number


class Number(_Finite, click.types.FloatParamType):
    """Any finite number."""


class Range(_Finite, click.FloatRange):
    """A finite number within limits."""


def pick(kind: type[D], given: Mapping[str, Any], **more: Any) -> D:
    """Return a tool's options, a dataclass, from those of a command that are its fields; what else is named wins."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if name in names} | more)


def named(ctx: click.Context) -> set[str]:
    """Return the options that the user named, in the shell or in the environment."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}


def read_shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Read which part of the work a machine does, as in 2/8: a callback of an option."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"'{value}', expected i/n with i from 1 to n, as in 2/8")
    return int(match[1]), int(match[2])


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
        if sys.stderr is None:
            return
        # Not click.echo: it goes round a live table's or bar's hold on sys.stderr, and the line lands inside.
        with suppress(OSError, ValueError):  # a full disk behind it, or it is closed: no work is lost for a message
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "cryored: warning: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


overwrite = click.option("--overwrite", is_flag=True, help="Replace existing output files.")
angpix = click.option(
    "--angpix",
    type=Range(min=0, min_open=True),
    metavar="ANGSTROM",
    help="Pixel size in angstrom, instead of the one in the file.",
)


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of models that begin so."""
    from cryored.prior.models import list_models

    return [name for name, _ in list_models() if name.startswith(incomplete)]


model = click.option(
    "--model",
    shell_complete=complete_model,
    default=DEFAULT_MODEL,
    show_default=True,
    metavar="NAME_OR_PATH",
    help="Model: a name (see CRYORED_MODEL_PATH) or a folder.",
)
seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),  # what every generator takes
    default=0,
    show_default=True,
    help="Seed of all random numbers.",
)
threads = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads for FFTs and arrays.  [default: all cores]"
)
device = click.option(
    "--gpu/--cpu",
    "gpu",
    default=None,
    help="Insist on a GPU, or keep off it.  [default: a GPU where there is one]",
)


class _Gib(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of GiB above 0, as bytes."""

    name = "GIB"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        try:
            number = float(str(value))
        except ValueError:
            number = 0.0
        if not 0 < number < 1e6:
            self.fail(f"'{value}' is not a number of GiB above 0", param, ctx)
        return int(number * 2**30)


max_memory = click.option(
    "--max-memory",
    type=_Gib(),
    metavar="GIB",
    help="Memory that this process may take, RELION's arrays apart: it decides the network's tiles and whether two "
    "maps go through it together.  [default: what the machine, its control group and SLURM leave free]",
)


def _plotted(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Refuse before the work, whose results would be lost with the picture."""
    if value is not None and not ctx.resilient_parsing:
        from cryored.files.output import is_stream
        from cryored.files.plots import check_plotting

        if is_stream(value):
            raise click.UsageError("--plot needs the name of a file.", ctx)
        check_plotting()
    return value


plot = click.option(
    "--plot", type=PATH, callback=_plotted, metavar="FILE.png", help="Draw the result (needs matplotlib)."
)
gaussian_width = click.option(
    "--resolution",
    type=Range(min=0, min_open=True),
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
    type=Range(min=0, min_open=True),
    default=1.5,
    show_default=True,
    metavar="ANGSTROM",
    help="Voxel size in angstrom.",
)


class BFactor(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of square angstrom, or ``auto``."""

    name = "A^2|auto"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Return the number, or ``auto``."""
        if value == "auto":
            return "auto"
        try:
            number = float(str(value))
        except ValueError:
            number = float("nan")
        if not -1000 <= number <= 1000:
            self.fail(f"'{value}' is not auto or a number from -1000 to 1000", param, ctx)
        return number


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


def update(command: str) -> Callable[[F], F]:
    """Add the options that say how requests are answered; `settings` takes them.

    Parameters
    ----------
    command : str
        Name of the environment variables' middle part; click would make that of --lambda of the name "lam".
    """

    def add(function: F) -> F:
        for option in reversed(
            (
                model,
                click.option(
                    "--lambda",
                    "lam",
                    type=_Lambda(),
                    envvar=f"CRYORED_{command}_LAMBDA",
                    default="auto",
                    show_default=True,
                    help="Weight of the prior. auto: the calibrated weights in the model's card, by the FSC of each "
                    "shell; where it has none eq. 17, with lambda by its schedule or by the paper's. A number: eq. 17 "
                    "with that lambda; 0 is RELION's own MAP map. paper: eq. 17, 1 at 4.5 A, 0 at 10 A, linear "
                    "between.",
                ),
                click.option(
                    "--schedule",
                    type=PATH,
                    metavar="FILE.json",
                    help="Eq. 17 with lambda by this schedule, instead of the model's weights.",
                ),
                click.option(
                    "--trust",
                    type=Range(min=0),
                    default=1.0,
                    show_default=True,
                    metavar="FACTOR",
                    help="Multiply the calibrated precision of the denoised map: 0.5 believes it half as much, but "
                    "never less than RELION's own prior; 0 is near eq. 17, and --lambda 0 is MAP.",
                ),
                click.option(
                    "--final",
                    type=click.Choice(["map", "prior"]),
                    default="map",
                    show_default=True,
                    help="What RELION gets in the last iteration, of the joined halves: the plain MAP map, and the "
                    "one with the prior lies beside it (ROOT_denoised.mrc), or the one with the prior.",
                ),
                angpix,
                click.option(
                    "--extrapolate/--no-extrapolate",
                    default=False,
                    show_default=True,
                    help="Let the prior fill the shells without data, as the paper's script does; else they are as in "
                    "plain MAP.",
                ),
                click.option(
                    "--prior-limit",
                    type=Range(min=0, min_open=True),
                    metavar="ANGSTROM",
                    help="Use the prior only up to this resolution (it fades over the last tenth): what is seen "
                    "beyond owes it nothing but a few per cent that the mask smears.",
                ),
                click.option(
                    "--clean",
                    is_flag=True,
                    help="Remove RELION's three arrays after success; not with -o, when RELION still waits.",
                ),
            )
        ):
            function = option(function)
        return function

    return add


def settings(given: Mapping[str, Any]) -> Settings:
    """Return what the options of `update` ask for."""
    lam, schedule = given["lam"], given["schedule"]
    if lam != "auto" and schedule is not None:
        raise click.UsageError("--schedule is for --lambda auto; give one of the two.")
    if given["trust"] != 1 and (lam != "auto" or schedule is not None):
        raise click.UsageError("--trust is for the calibrated weights of --lambda auto; eq. 17 knows none.")

    from cryored.prior.lambda_schedule import Schedule, read_schedule
    from cryored.refinement.updater import Settings

    followed = Schedule() if lam == "paper" else None if schedule is None else read_schedule(schedule)
    return pick(Settings, given, lam=None if isinstance(lam, str) else lam, schedule=followed)
