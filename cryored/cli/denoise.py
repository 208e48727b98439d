"""``cryored denoise``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from cryored.cli import options
from cryored.files.output import STREAM, is_stream


@click.command()
@click.argument("map_path", type=options.PATH, metavar="[MAP.mrc | JOB]", required=False)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="OUT.mrc", help='Map to write, or "-".')
@options.model
@click.option("--half1", type=options.PATH, metavar="MAP1.mrc", help="With --half2, instead of MAP: their average.")
@click.option("--half2", type=options.PATH, metavar="MAP2.mrc", help="The other half-map: their FSC weights MAP first.")
@click.option(
    "--fsc", type=options.PATH, metavar="TABLE", help="FSC table (TSV, STAR, EMDB XML): weight MAP by it first."
)
@click.option(
    "--request",
    type=options.PATH,
    metavar="JOB.star",
    help="MAP is RELION's answer to this request (red-update --lambda 0), which it has weighted: tell the network the "
    "request's FSC, as red-update does.",
)
@click.option(
    "--mask",
    type=options.PATH,
    metavar="MASK.mrc",
    help="Soft mask: the half-maps' FSC is that within it, corrected as `cryored fsc` does, and the results are cut "
    "out by it, with a solvent of 0; auto makes one.",
)
@click.option(
    "--uncertainty",
    type=options.PATH,
    metavar="SIGMA.mrc",
    help="Also write the standard deviation of the error that is left in each voxel, in units of the map.",
)
@click.option(
    "--difference", type=options.PATH, metavar="DIFF.mrc", help="Also write the result minus what the network got."
)
@click.option(
    "--chimerax",
    type=options.PATH,
    metavar="FILE.cxc",
    help="Also write a ChimeraX script that shows MAP, the result and --difference side by side, the result coloured "
    "by --uncertainty.",
)
@options.plot
@click.option(
    "--bfactor",
    type=options.BFactor(),
    metavar="A^2|auto",
    help="Sharpen the result: negative values as in relion_postprocess --adhoc_bfac; auto as its --auto_bfac, from the "
    "half-maps.",
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
    metavar="VOXELS",
    help="Edge of the tiles, at the model's pixel size; smaller ones need less memory and more time.  [default: 208 on "
    "a CPU, 144 on a GPU]",
)
@click.option("--force", is_flag=True, help="Insist on a map that the model is not made for, or that takes very long.")
@options.device
@options.threads
@options.overwrite
@options.common
def denoise(map_path: str | None, output: str, half1: str | None, **given: Any) -> None:
    """Denoise one map with a trained prior, in any box and at any pixel size.

    A raw half-map (unfiltered, _unfil.mrc) needs its FSC: give --half2 or --fsc. Without them the map is taken as
    filtered already: RELION's own maps in a refinement, or a post-processed map, whose sharpening is undone for the
    network. --half1 and --half2 without MAP, or the folder of a RELION job (Refine3D, PostProcess) in its place, give
    the average of both half-maps. The output has the input's grid, origin and pixel size. Models that take notice of
    the FSC are told it; --uncertainty needs a model that tells it.

    \b
    Example:
      cryored denoise run_half1_class001_unfil.mrc --half2 run_half2_class001_unfil.mrc -o half1_denoised.mrc
      cryored denoise Refine3D/job012 -o denoised.mrc --plot denoised.png
    """
    job = _check_usage(map_path, output, half1, given)

    from cryored.cli.progress import bar
    from cryored.prior.denoise_files import DenoiseOptions, denoise_file, denoise_halves, denoise_job

    chosen = options.pick(DenoiseOptions, given)
    with bar("tiles" if given["rotations"] == 1 else "passes", 0) as advance:  # of each tile in each rotation

        def tell(done: int, total: int) -> None:
            if total > 1:
                advance(done, total)

        if job:
            denoise_job(str(map_path), output, chosen, progress=tell)
        elif half1 is not None:
            denoise_halves(half1, given["half2"], output, chosen, progress=tell)
        else:
            denoise_file(str(map_path), output, chosen, progress=tell)


def _check_usage(map_path: str | None, output: str, half1: str | None, given: Mapping[str, Any]) -> bool:
    """Refuse options that say nothing together; tell whether MAP is the folder of a RELION job."""
    from cryored.files.jobs import is_job

    job = map_path is not None and is_job(map_path)
    half2, fsc, uncertainty = given["half2"], given["fsc"], given["uncertainty"]
    if (map_path is None) != (half1 is not None) or (half1 is not None and half2 is None):
        raise click.UsageError("give MAP, the folder of a RELION job, or both --half1 and --half2")
    if job and (half2 is not None or fsc is not None):
        raise click.UsageError("the job's own half-maps are taken; leave --half2 and --fsc out")
    if given["request"] is not None:
        if job or half2 is not None or fsc is not None:
            raise click.UsageError("--request is for a map that is weighted already; leave --half2 and --fsc out")
        if given["bfactor"] == "auto":
            raise click.UsageError("--bfactor auto needs the raw half-maps; give a number beside --request")
    if half2 is not None and fsc is not None:
        raise click.UsageError("--half2 and --fsc both say how to weight the map; give one")
    if given["bfactor"] is not None and uncertainty is not None:
        raise click.UsageError("--uncertainty is of the map as it is, not of one that --bfactor sharpens; give one")
    if [map_path, half1, half2, fsc, given["mask"], given["request"]].count(STREAM) > 1:
        raise click.UsageError("only one of MAP, --half1, --half2, --fsc, --mask and --request can be '-'.")
    shown = (output, given["difference"], uncertainty)
    if given["chimerax"] is not None and any(path is not None and is_stream(path) for path in shown):
        raise click.UsageError("--chimerax opens the maps by name; none can be '-'")
    return job
