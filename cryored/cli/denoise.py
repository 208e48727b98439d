"""``cryored denoise``."""

from __future__ import annotations

import click

from cryored.cli import options
from cryored.files.output import is_stream


@click.command()
@click.argument("map_path", type=options.PATH, metavar="MAP.mrc")
@click.option("-o", "--output", type=options.PATH, required=True, metavar="OUT.mrc", help='Map to write, or "-".')
@options.model
@click.option("--half2", type=options.PATH, metavar="MAP2.mrc", help="The other half-map: their FSC weights MAP first.")
@click.option(
    "--fsc", type=options.PATH, metavar="TABLE", help="FSC table (TSV, STAR, EMDB XML): weight MAP by it first."
)
@click.option("--mask", type=options.PATH, metavar="MASK.mrc", help="Multiply the results by a soft mask.")
@click.option(
    "--uncertainty",
    type=options.PATH,
    metavar="SIGMA.mrc",
    help="Also write the standard deviation of the error that is left in each voxel, in units of the map.",
)
@click.option(
    "--chimerax",
    type=options.PATH,
    metavar="FILE.cxc",
    help="Also write a ChimeraX script: the denoised surface, coloured by --uncertainty.",
)
@options.angpix
@click.option(
    "--rotations",
    type=click.IntRange(1, 24),
    default=1,
    show_default=True,
    metavar="N",
    help="Average over N of the 24 rotations of the cube.",
)
@click.option(
    "--tile",
    type=click.IntRange(min=16),
    default=144,
    show_default=True,
    metavar="VOXELS",
    help="Edge of the tiles, at the model's pixel size; smaller ones need less memory.",
)
@options.device
@options.threads
@options.overwrite
@options.common
def denoise(
    map_path: str,
    output: str,
    model: str,
    half2: str | None,
    fsc: str | None,
    mask: str | None,
    uncertainty: str | None,
    chimerax: str | None,
    angpix: float | None,
    rotations: int,
    tile: int,
    gpu: bool | None,
    threads: int | None,
    overwrite: bool,
) -> None:
    """Denoise one map with a trained prior, in any box and at any pixel size.

    A raw half-map (unfiltered, _unfil.mrc) needs its FSC: give --half2 or --fsc. Without them the map is taken as
    filtered already: RELION's own maps in a refinement, or a post-processed map. The output has the input's grid,
    origin and pixel size. Models that take notice of the FSC are told it; --uncertainty needs a model that tells it.

    \b
    Example:
      cryored denoise run_half1_class001_unfil.mrc --half2 run_half2_class001_unfil.mrc -o half1_denoised.mrc
    """
    if half2 is not None and fsc is not None:
        raise click.UsageError("--half2 and --fsc both say how to weight the map; give one")
    if uncertainty == output:
        raise click.UsageError(f"--output and --uncertainty are both '{output}'; give them names of their own")
    if chimerax is not None:
        if uncertainty is None:
            raise click.UsageError("--chimerax shows what --uncertainty writes; give both")
        if is_stream(output) or is_stream(uncertainty):
            raise click.UsageError("--chimerax opens the two maps by name; neither can be '-'")

    from cryored.prior.denoiser import denoise_file

    denoise_file(
        map_path,
        output,
        model=model,
        half2=half2,
        fsc=fsc,
        mask=mask,
        uncertainty=uncertainty,
        chimerax=chimerax,
        angpix=angpix,
        rotations=rotations,
        tile=tile,
        gpu=gpu,
        threads=threads,
        overwrite=overwrite,
    )
