"""``cryored simulate map``."""

from __future__ import annotations

from typing import Any

import click

from cryored.cli import options


@click.command("map")
@click.argument("structure", type=options.PATH)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="MAP.mrc", help='Map to write, or "-".')
@options.box
@options.grid_angpix
@click.option(
    "--resolution",
    type=options.Range(min=0, min_open=True),
    default=3.0,
    show_default=True,
    metavar="ANGSTROM",
    help="Limit of the map: its transform is multiplied by exp(-(s R)^2), 1/e at s = 1/R.",
)
@click.option(
    "--method",
    type=click.Choice(["gaussian", "potential"]),
    default="gaussian",
    show_default=True,
    help="gaussian: atoms are points weighted by atomic number, limited by --resolution (electrons per cubic "
    "angstrom). potential: electron scattering factors and B factors, limited as well (volt).",
)
@click.option("--chains", metavar="A,B", default="", help="Chains to keep, separated by commas.  [default: all]")
@click.option(
    "--assembly",
    metavar="NAME",
    help="Biological assembly to build from these chains.  [default: coordinates as in the file]",
)
@click.option(
    "--like",
    type=options.PATH,
    metavar="MAP.mrc",
    help="Take box, voxel size, origin and nstart of this map, and leave the model where it is in its frame.",
)
@click.option(
    "--centre/--no-centre",
    default=True,
    show_default=True,
    help="Move the centre of mass to the centre of the box, or count coordinates from the first voxel.",
)
@click.option("--waters/--no-waters", default=False, show_default=True, help="Keep waters.")
@click.option("--hydrogens/--no-hydrogens", default=False, show_default=True, help="Keep hydrogens.")
@click.option(
    "--bfactor", type=options.Number(), default=0.0, show_default=True, metavar="A^2", help="Decay of all amplitudes."
)
@click.option(
    "--bfactor-spread",
    type=options.Range(min=0),
    default=0.0,
    show_default=True,
    metavar="A^2",
    help="Flexible parts: B factors that vary along the chain and grow outwards, up to three times this.",
)
@click.option(
    "--motion",
    type=options.Range(0, 90),
    default=0.0,
    show_default=True,
    metavar="DEGREES",
    help="A domain that turns about a hinge by so much to either side, averaged.",
)
@click.option(
    "--glycans", type=click.IntRange(min=0), default=0, show_default=True, help="Blobs of density on the surface."
)
@click.option(
    "--belt",
    type=options.Range(min=0),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="A micelle or nanodisc around the molecule, of this share of its mean density.",
)
@click.option(
    "--solvent",
    type=options.Range(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Contrast that the solvent takes from the lowest resolutions.",
)
@options.seed
@options.overwrite
@options.common
def simulate_map(structure: str, output: str, chains: str, bfactor_spread: float, glycans: int, **given: Any) -> None:
    """Turn an atomic model (PDB or mmCIF, gzipped or not) into a map.

    The first model is taken and centred on its mass, at voxel n // 2 of each axis. To compare a map with its model
    give --like: the model then stays where it is. What real maps have and ideal ones have not is added to a gaussian
    map by --bfactor to --solvent; where it is depends on --seed.

    \b
    Example:
      cryored simulate map 1abc.pdb.gz -o truth.mrc --box 96 --angpix 1.5
      cryored simulate map 1abc.cif -o volt.mrc --method potential --assembly 1
    """
    from cryored.cli.progress import working
    from cryored.simulation.features import Features
    from cryored.simulation.map_of_model import MapOptions, simulate_map_file

    if given["like"] is not None:
        for name in sorted({"box", "angpix"} & options.named(click.get_current_context())):
            raise click.UsageError(f"--like tells the grid; leave --{name} out.")
    features = options.pick(Features, given, spread=bfactor_spread, blobs=glycans)
    kept = tuple(chains.split(",")) if chains else ()
    chosen = options.pick(MapOptions, given, chains=kept, features=features)
    with working("simulating"):
        simulate_map_file(structure, output, chosen)
