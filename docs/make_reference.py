"""Write each command's ``--help`` into its page: between the two marks of docs/COMMAND.md.

python docs/make_reference.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cryored.cli import COMMANDS, cli

BEGIN, END = "<!-- begin help -->", "<!-- end help -->"


def help_texts(name: str) -> str:
    """Return the help of a command and of its subcommands as Markdown."""
    root = click.Context(cli, info_name="cryored", **cli.context_settings)
    command = cli.get_command(root, name)
    assert command is not None
    contexts = [(command, click.Context(command, info_name=name, parent=root))]
    if isinstance(command, click.Group):
        parent = contexts[0][1]
        contexts += [
            (sub, click.Context(sub, info_name=sub_name, parent=parent)) for sub_name, sub in command.commands.items()
        ]
    blocks = []
    for one, context in contexts:
        context.max_content_width = context.terminal_width = 100
        blocks.append(f"```text\n$ {context.command_path} --help\n{one.get_help(context)}\n```")
    return "\n\n".join(blocks)


def main() -> int:
    """Rewrite the pages, or with --check tell which are out of date."""
    stale = []
    for name in COMMANDS:
        page = Path(__file__).parent / f"{name}.md"
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        fresh = f"{before}{BEGIN}\n{help_texts(name)}\n{END}{after}"
        if fresh != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(fresh, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run python docs/make_reference.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
