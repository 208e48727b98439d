"""The command line: a group that loads a command only when it is called."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn, TextIO

import click

from cryored import __version__

# Command, its module and its line in `cryored --help`, so that the help imports no numpy.
COMMANDS = {
    "simulate": "Make maps, particles and training pairs from atomic models.",
    "train": "Train a prior on pairs of maps.",
    "denoise": "Denoise one map with a trained prior.",
    "red-update": "Answer one reconstruction request of RELION with the CW-RED update.",
    "fsc": "Compare two maps by Fourier shell correlation.",
    "lambda-schedule": "Derive the weight of the prior from a resolution.",
    "watch": "Serve the requests of a running refinement with the model resident.",
    "report": "Make the report of a refinement from its logs.",
    "doctor": "Look whether everything is in place for a refinement.",
    "models": "List the models, or tell of one what it is for.",
    "mask": "Make a soft-edged mask from a map.",
    "relion-path": "Print the folder that makes RELION 5's Blush check box use cryored.",
}


class _Failure(click.ClickException):
    """An error whose cause is the input or the machine: one line, exit status 1."""

    exit_code = 1

    def __init__(self, program: str, message: str) -> None:
        super().__init__(message)
        self._program = program

    def show(self, file: Any = None) -> None:
        click.echo(f"{self._program}: error: {self.message}", err=True)


def _drop_unwritten(stream: TextIO | None) -> None:
    """Keep the interpreter from writing once more, as it exits, what a stream did not take: the status would be 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fill_closed() -> None:
    """Open to nowhere what the shell has closed (2>&-): the next file would get its number, and what C prints there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free


def _buffer() -> None:
    """Give standard output a buffer, which writes all or fails; with PYTHONUNBUFFERED there is none: a part passes."""
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):
        buffer = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(buffer, sys.stdout.encoding, sys.stdout.errors, line_buffering=True)


class Program(click.Command):
    """A command that tells of its errors in one line; see `run_program`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and turn what the input or the machine is at fault for into a message; -vv lets it through."""
        from cryored.cli.options import verbosity
        from cryored.errors import CryoredError

        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _with_variables(error) from None
        except BrokenPipeError:
            # `cryored ... | head -1`: the reader has what it wants.
            _drop_unwritten(sys.stdout)
            ctx.exit(141)
        except (CryoredError, OSError, MemoryError) as error:
            _drop_unwritten(sys.stdout)
            if verbosity(ctx) >= 2:
                raise
            raise _Failure(str(ctx.find_root().info_name), _told(error)) from error


def _with_variables(error: click.UsageError) -> click.UsageError:
    """Return a usage error that names the environment variables that options were taken from."""
    ctx = error.ctx
    if ctx is None or type(error) not in (click.UsageError, click.BadParameter):
        return error
    at_fault = [error.param] if isinstance(error, click.BadParameter) else ctx.command.params
    variables = [
        one.envvar if isinstance(one.envvar, str) else f"{ctx.auto_envvar_prefix}_{one.name.upper()}"
        for one in at_fault
        if one is not None
        and one.name is not None
        and ctx.get_parameter_source(one.name) is click.core.ParameterSource.ENVIRONMENT
    ]
    if not variables:
        return error
    told = f"{error.message} (Set in the environment: {', '.join(variables)}.)"
    if isinstance(error, click.BadParameter):
        return click.BadParameter(told, ctx, error.param, error.param_hint)
    return click.UsageError(told, ctx)


def _told(error: BaseException) -> str:
    from cryored.errors import CryoredError, in_words

    if isinstance(error, OSError) and not isinstance(error, CryoredError) and error.strerror and error.filename is None:
        return f"standard output: {in_words(error)}"  # the only stream that has no name
    return in_words(error)


class _LazyGroup(Program, click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"cryored.cli.{module}"), module)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take ``help COMMAND`` for ``COMMAND --help``, and suggest a command for one that there is not."""
        if args[0] == "help":
            if len(args) == 1:
                click.echo(ctx.get_help())
                ctx.exit()
            args = [*args[1:], "--help"]
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command '{args[0]}'; {hint}", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    "cryored",
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CRYORED"},
    epilog="Every option can be set through the environment: CRYORED_RED_UPDATE_MODEL for --model of red-update, "
    "CRYORED_RED_UPDATE_GPU=0 for --cpu. "
    "CRYORED_MODEL_PATH adds folders of models.",
)
@click.version_option(__version__, "-V", "--version", prog_name="cryored", message="%(prog)s %(version)s")
def cli() -> None:
    """Put a learned prior into cryo-EM structure determination.

    The commands read and write MRC and STAR files, "-" stands for a pipe; results go to standard output,
    everything else to standard error.
    """


def main() -> None:
    """Run the command line and exit."""
    run_program(cli, "cryored")


def run_program(command: click.Command, name: str, *, if_interrupted: str = "interrupted") -> NoReturn:
    """Run a command and exit: 0 done, 1 input or machine at fault, 2 usage, 130 interrupted.

    A message that cannot be printed, as on a full disk, changes none of these.
    """
    _fill_closed()
    _buffer()
    try:
        status = command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        _say(f"{name}: {if_interrupted}")
        status = 130
    except click.ClickException as error:
        if sys.stderr is not None:
            with suppress(OSError):
                error.show()
        status = error.exit_code
    except OSError as error:  # of --help and --version, which print before a command is invoked
        _drop_unwritten(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _say(f"{name}: error: {_told(error)}")
        status = 141 if isinstance(error, BrokenPipeError) else 1
    _drop_unwritten(sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _say(line: str) -> None:
    with suppress(OSError):
        click.echo(line, err=True)
