"""The command ``cryored fsc``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from cryored.cli import options


@click.command(
    short_help="Compare two maps by Fourier shell correlation.",
    epilog="Example: the resolution of two half-maps within a mask, with the files for a deposition.\n\n"
    "\b\n"
    "  cryored fsc run_half1_class001_unfil.mrc run_half2_class001_unfil.mrc \\\n"
    "      --mask mask.mrc --xml fsc.xml --plot fsc.png > fsc.tsv\n"
    "  cryored fsc run_half1_class001_unfil.mrc run_half2_class001_unfil.mrc \\\n"
    "      --mask mask.mrc --resolution-only\n"
    "  cryored fsc Refine3D/job012 > fsc.tsv\n\n"
    "What the prior invents beyond 6 A, from the same half-maps:\n\n"
    "\b\n"
    "  cryored fsc run_half1_class001_unfil.mrc run_half2_class001_unfil.mrc \\\n"
    "      --substitute-noise 6 --plot invented.png > invented.tsv",
)
@click.argument("map1", type=options.PATH)
@click.argument("map2", type=options.PATH, required=False)
@click.option(
    "--mask", type=options.PATH, metavar="FILE.mrc", help="Mask from 0 to 1, in the same box; auto makes one."
)
@options.angpix
@click.option(
    "--threshold",
    type=options.Range(0, 1, min_open=True, max_open=True),
    default=0.143,
    show_default=True,
    help="Correlation at which the resolution is read off.",
)
@click.option("--resolution-only", is_flag=True, help="Print nothing but the resolution in angstrom.")
@click.option(
    "--randomise-from",
    type=options.Range(min=0, min_open=True),
    metavar="ANGSTROM",
    help="With --mask: randomise phases beyond this resolution.  "
    "[default: where the unmasked FSC first drops below 0.8]",
)
@click.option(
    "--substitute-noise",
    type=options.Range(min=0, min_open=True),
    metavar="ANGSTROM",
    help="Test --model for invented detail: replace the signal beyond this resolution by noise of the same power "
    "in both maps, denoise them, and compare them again.",
)
@options.model
@options.device
@click.option("--star", type=options.PATH, metavar="FILE.star", help="Write a table as relion_postprocess does.")
@click.option("--xml", type=options.PATH, metavar="FILE.xml", help="Write the curve for a deposition at EMDB.")
@options.plot
@options.overwrite
@options.seed
@options.threads
@options.common
def fsc(map1: str, map2: str | None, threshold: float, resolution_only: bool, **given: Any) -> None:
    """Compare MAP1 and MAP2 by Fourier shell correlation (FSC).

    MAP1 alone may be the folder of a RELION job (Refine3D, PostProcess), whose unfiltered half-maps, mask and pixel
    size are then taken.

    Prints a line for each shell: shell, frequency (1/angstrom), resolution (angstrom) and fsc; with --mask
    also fsc_masked, fsc_randomised (the part that the mask makes) and fsc_corrected (without that part). The
    numbers are those of relion_postprocess. The resolution is that of the last shell before the curve (the
    corrected one with --mask) first drops below the threshold, inf if there is none.

    --substitute-noise takes raw half-maps and adds fsc_substituted (with noise beyond ANGSTROM), fsc_denoised
    (the maps denoised by the model) and fsc_denoised_substituted: what that has beyond ANGSTROM is invented.

    MAP1, MAP2 or the mask may be "-" for standard input, and --star or --xml "-" for standard output.
    """
    star, xml, plot = given["star"], given["xml"], given["plot"]
    _check_usage(map1, map2, resolution_only, given)

    from cryored.assessment.fsc_of_files import FscOptions, fsc_files, fsc_job, log_summary
    from cryored.cli.progress import working
    from cryored.files.fsc_tables import draw_fsc, format_tsv, format_xml, star_blocks
    from cryored.files.output import STREAM, write_text
    from cryored.files.star import write_star

    chosen = options.pick(FscOptions, given, substitute_noise_from=given["substitute_noise"])
    with working("comparing"):
        result = fsc_job(map1, chosen) if map2 is None else fsc_files(map1, map2, chosen)
    log_summary(result, threshold)
    if star is not None:
        write_star(star, star_blocks(result, threshold))
    if xml is not None:
        write_text(xml, format_xml(result))
    if plot is not None:
        draw_fsc(plot, result, threshold)
    if resolution_only:
        click.echo(f"{result.resolution(threshold):.4f}")
    elif STREAM not in (star, xml):
        write_text(STREAM, format_tsv(result))


def _check_usage(map1: str, map2: str | None, resolution_only: bool, given: Mapping[str, Any]) -> None:
    """Refuse options that say nothing together, and outputs that are there."""
    from cryored.files.jobs import is_job
    from cryored.files.output import STREAM, check_outputs, check_target

    star, xml, plot, mask = (given[name] for name in ("star", "xml", "plot", "mask"))
    if map2 is None and not is_job(map1):
        raise click.UsageError("Missing argument 'MAP2': give it, or the folder of a RELION job alone.")
    if [map1, map2, mask].count(STREAM) > 1:
        raise click.UsageError("only one of MAP1, MAP2 and --mask can be '-'.")
    if [star, xml].count(STREAM) + resolution_only > 1:
        raise click.UsageError("--resolution-only, --star - and --xml - all print: choose one.")
    if given["randomise_from"] is not None and mask is None and map2 is not None:
        raise click.UsageError("--randomise-from has no meaning without --mask.")
    check_outputs((star, xml, plot), (map1, map2, mask))
    for target in (star, xml, plot):
        if target is not None and target != STREAM:
            check_target(target, given["overwrite"])
