"""Make the man pages from the commands' own help, whenever a wheel is built: a build hook of hatchling.

python docs/man_pages.py FOLDER
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import click
from click_man.core import write_man_pages
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PAGES = Path("build") / "man"  # from here `shared-data` in pyproject.toml takes them


class ManPages(BuildHookInterface):
    """Called by hatchling before it collects the files of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the pages."""
        sys.path.insert(0, self.root)
        write_pages(Path(self.root) / PAGES)


def write_pages(folder: Path) -> None:
    """Write a page for each command."""
    from cryored import __version__
    from cryored.cli import COMMANDS, cli

    context = click.Context(cli, info_name="cryored")
    cli.short_help = "a learned prior in cryo-EM structure determination"
    # The group loads a command when it is called; click-man wants them all.
    cli.commands = {}
    for name, line in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        command.short_help = line.rstrip(".")
        for one in [command, *getattr(command, "commands", {}).values()]:
            _prepare(one)
        cli.commands[name] = command
    folder.mkdir(parents=True, exist_ok=True)
    write_man_pages("cryored", cli, version=__version__, target_dir=str(folder))


def _prepare(command: click.Command) -> None:
    """Shape a command's help for man: its first sentence whole, and the lines of examples as they are."""
    text = inspect.cleandoc(command.help or "")
    command.short_help = command.short_help or text.split("\n\n")[0].replace("\n", " ").rstrip(".")
    # Click's mark for lines that are not to be filled means nothing to man.
    command.help = re.sub(r"^\x08\n(.*?)(?=\n\n|\Z)", r".nf\n\1\n.fi", text, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write_pages(Path(sys.argv[1]))
