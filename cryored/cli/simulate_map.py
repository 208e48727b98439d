"""``cryored simulate map``."""

from __future__ import annotations

import click

from cryored.cli import options


@click.command("map")
@click.argument("structure", type=options.PATH)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="MAP.mrc", help='Map to write, or "-".')
@options.box
@options.grid_angpix
@options.gaussian_width
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
    from cryored.simulate.density import simulate_map_file

    simulate_map_file(
        structure,
        output,
        box=box,
        angpix=angpix,
        resolution=resolution,
        chains=tuple(chains.split(",")) if chains else (),
        overwrite=overwrite,
    )
