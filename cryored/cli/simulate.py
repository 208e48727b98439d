"""``cryored simulate``: maps, particles and training pairs."""

from __future__ import annotations

import click

from cryored.cli import options
from cryored.cli.simulate_particles import particles

_resolution = click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    metavar="ANGSTROM",
    help="Width of the atoms' Gaussians: their transform falls to 1/e at 1/resolution.",
)
_box = click.option(
    "--box", type=click.IntRange(min=8), default=96, show_default=True, help="Edge of the maps in voxels."
)
_angpix = click.option(
    "--angpix",
    type=click.FloatRange(min=0, min_open=True),
    default=1.5,
    show_default=True,
    metavar="ANGSTROM",
    help="Voxel size in angstrom.",
)


@click.group()
def simulate() -> None:
    """Make maps, particles and training pairs from atomic models."""


simulate.add_command(particles)


@simulate.command("map")
@click.argument("structure", type=options.PATH)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="MAP.mrc", help='Map to write, or "-".')
@_box
@_angpix
@_resolution
@click.option("--chains", metavar="A,B", default="", help="Chains to keep, separated by commas.  [default: all]")
@options.overwrite
@options.common
def simulate_map(
    structure: str, output: str, box: int, angpix: float, resolution: float, chains: str, overwrite: bool
) -> None:
    """Turn an atomic model (PDB or mmCIF, gzipped or not) into a map.

    Atoms become Gaussians weighted by their atomic number. The first model is taken, waters and hydrogens are
    dropped, and the molecule is centred on its mass.

    \b
    Example:
      cryored simulate map 1abc.pdb.gz -o truth.mrc --box 96 --angpix 1.5
    """
    from cryored.density import simulate_map_file

    simulate_map_file(
        structure,
        output,
        box=box,
        angpix=angpix,
        resolution=resolution,
        chains=tuple(chains.split(",")) if chains else (),
        overwrite=overwrite,
    )


@simulate.command("pairs", short_help="Make training pairs from atomic models.")
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
@_box
@_angpix
@_resolution
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
    from cryored.pairs import simulate_pairs_files

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
