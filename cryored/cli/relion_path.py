"""``cryored relion-path``."""

from __future__ import annotations

import click

from cryored.cli import options


@click.command("relion-path")
@options.common
def relion_path() -> None:
    """Print the folder that makes RELION 5's Blush check box use cryored.

    With --blush (GUI: Use Blush regularisation) RELION 5 runs the first relion_python_blush on the PATH. In this folder
    lies that of cryored: with the folder in front of the PATH cryored answers, without it Blush.

    \b
    Example, in the shell, a module file or a SLURM script, before RELION starts:
      cryored relion-path  # look at it
      blush=$(cryored relion-path) && export PATH="$blush:$PATH"
    """
    from cryored.files.share import RELION5, share_folders

    click.echo(next(folder for folder in share_folders(RELION5) if folder.is_dir()))
