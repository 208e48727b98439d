"""``cryored simulate pairs``."""

from __future__ import annotations

import click

from cryored.cli import options


@click.command("pairs", short_help="Make training pairs from atomic models.")
@click.argument("structures", type=options.PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR", help="Folder of the pairs.")
@click.option(
    "--method",
    type=click.Choice(["gaussian"]),
    default="gaussian",
    show_default=True,
    help="gaussian: smeared truth plus coloured noise.",
)
@click.option(
    "--number",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Draws of each structure; a draw makes two pairs, one of each half.",
)
@options.box
@options.grid_angpix
@options.gaussian_width
@click.option("--float16", is_flag=True, help="Write maps of half the size (MRC mode 12).")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@options.seed
@options.overwrite
@options.common
def simulate_pairs(
    structures: tuple[str, ...],
    output: str,
    method: str,
    number: int,
    box: int,
    angpix: float,
    resolution: float,
    float16: bool,
    jobs: int,
    seed: int,
    overwrite: bool,
) -> None:
    """Make training pairs from atomic models: DIR/pairs.star and the maps that it lists.

    The noisy map is unregularised, the target is the truth times the FSC of the two halves; resolutions run
    from just above Nyquist to 18 A.

    \b
    Example:
      cryored simulate pairs structures/*.pdb.gz -o pairs --float16 --jobs 2
    """
    from cryored.cli.progress import bar
    from cryored.simulate.pairs import simulate_pairs_files

    with bar("structures", len(structures)) as advance:
        table = simulate_pairs_files(
            structures,
            output,
            number=number,
            box=box,
            angpix=angpix,
            resolution=resolution,
            seed=seed,
            float16=float16,
            jobs=jobs,
            overwrite=overwrite,
            progress=advance,
        )
    click.echo(table)
