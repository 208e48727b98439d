"""``cryored mask``."""

from __future__ import annotations

import click

from cryored.cli import options


@click.command()
@click.argument("map_path", type=options.PATH, metavar="MAP.mrc|JOB")
@click.option("-o", "--output", type=options.PATH, required=True, metavar="MASK.mrc", help='Mask to write, or "-".')
@click.option(
    "--threshold",
    type=options.Number(),
    metavar="DENSITY",
    help="Of the filtered map, from which on a voxel is inside.  [default: a fifth of the way from the solvent to its "
    "peak]",
)
@click.option(
    "--lowpass",
    type=options.Range(min=0),
    default=15.0,
    show_default=True,
    metavar="ANGSTROM",
    help="Filter the map first; 0 leaves it as it is.",
)
@click.option(
    "--extend", type=options.Range(min=0), default=3.0, show_default=True, metavar="VOXELS", help="Grow by so much."
)
@click.option(
    "--edge",
    type=options.Range(min=0),
    default=6.0,
    show_default=True,
    metavar="VOXELS",
    help="Width of the soft edge beyond.",
)
@click.option("--islands", is_flag=True, help="Keep what is not connected with the largest part, as RELION does.")
@options.angpix
@options.plot
@options.overwrite
@options.common
def mask(
    map_path: str,
    output: str,
    threshold: float | None,
    lowpass: float,
    extend: float,
    edge: float,
    islands: bool,
    angpix: float | None,
    plot: str | None,
    overwrite: bool,
) -> None:
    """Make a soft-edged mask from a map, or from the map of a RELION job (Refine3D, Class3D).

    Low-pass filter, threshold, largest connected part, grow, soft edge: with the same numbers and --islands it is the
    mask of relion_mask_create. --plot shows slices of the map with the mask's outline: look at it.

    \b
    Example:
      cryored mask Refine3D/job012 -o mask.mrc --plot mask.png
    """
    from cryored.assessment.mask_of_map import MaskOptions, mask_file
    from cryored.cli.progress import working

    chosen = MaskOptions(threshold, lowpass or None, extend, edge, islands, angpix, plot, overwrite)
    with working("masking"):
        mask_file(map_path, output, chosen)
