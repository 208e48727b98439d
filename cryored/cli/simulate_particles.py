"""``cryored simulate particles``."""

from __future__ import annotations

from typing import Any

import click

from cryored.cli import options


def _range(_: click.Context, __: click.Parameter, value: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"'{value}', expected two numbers as in 0.2,2.0") from None
    return low, high


@click.command(
    short_help="Make a stack of particles that RELION can refine from a map.",
    epilog="Example: noisy particles with start angles 5 degrees off, for local searches.\n\n"
    "\b\n"
    "  cryored simulate particles map.mrc -o sim --number 400 --snr 0.05 --perturb-angles 5",
)
@click.argument("map_path", metavar="MAP", type=options.PATH)
@click.option(
    "-o", "--output", type=options.PATH, required=True, metavar="STEM", help="The outputs' names up to the ending."
)
@click.option("--number", type=click.IntRange(min=1), default=10000, show_default=True, help="Number of particles.")
@click.option(
    "--snr",
    type=float,
    default=0.002,
    show_default=True,
    help="Variance of the noise-free pixels over that of the noise; 'inf' for no noise.",
)
@click.option("--scale", type=options.Number(), help="Multiply the map by this instead; the noise has variance 1.")
@click.option(
    "--noise",
    type=options.PATH,
    metavar="white|FILE.star",
    default="white",
    show_default=True,
    help="White noise, or that of the spectrum in a _model.star of RELION.",
)
@click.option(
    "--ctf/--no-ctf",
    "apply_ctf",
    envvar="CRYORED_SIMULATE_PARTICLES_CTF",
    default=True,
    show_default=True,
    help="Apply a contrast transfer function.",
)
@click.option(
    "--defocus",
    "defocus_range",
    envvar="CRYORED_SIMULATE_PARTICLES_DEFOCUS",
    callback=_range,
    metavar="LOW,HIGH",
    default="0.2,2.0",
    show_default=True,
    help="Range of the underfocus, in micrometre.",
)
@click.option("--voltage", type=options.Number(), default=300.0, show_default=True, help="In kilovolt.")
@click.option(
    "--cs", type=options.Number(), default=2.7, show_default=True, help="Spherical aberration, in millimetre."
)
@click.option(
    "--amplitude-contrast",
    type=options.Number(),
    default=0.1,
    show_default=True,
    help="Fraction of amplitude contrast.",
)
@click.option(
    "--uneven",
    type=options.Range(-20, 20),
    default=0.0,
    show_default=True,
    metavar="K",
    help="Views with a density of exp(K cos(a)^2) at an angle a to the map's z axis: above 0 they prefer it, below 0 "
    "they avoid it.",
)
@click.option(
    "--missing-cone",
    type=options.Range(0, 80),
    default=0.0,
    show_default=True,
    metavar="DEGREES",
    help="Half angle of a cone about the map's z axis of which no view tells anything.",
)
@click.option(
    "--shift",
    type=options.Number(),
    default=0.0,
    show_default=True,
    help="Standard deviation of the particles' x and y, in pixels.",
)
@click.option(
    "--perturb-angles",
    type=options.Number(),
    default=0.0,
    show_default=True,
    help="Root mean square error of the start orientations, in degrees.",
)
@click.option(
    "--ini-high",
    type=options.Number(),
    default=30.0,
    show_default=True,
    help="Resolution of the reference, in angstrom.",
)
@options.angpix
@options.seed
@options.threads
@options.overwrite
@options.common
@click.pass_context
def particles(
    ctx: click.Context, /, map_path: str, output: str, uneven: float, missing_cone: float, **given: Any
) -> None:
    """Make a stack of particles that RELION can refine, from MAP.

    Orientations are uniform, unless --uneven or --missing-cone says otherwise. The pixels get noise of variance 1, as
    RELION wants it, and MAP is multiplied so that the particles have the signal-to-noise ratio asked for. The noise is
    white, or has the spectrum that a refinement of RELION measured, averaged over its groups.

    Written are STEM.mrcs, the particles; STEM.star, to refine from; STEM_truth.star, with the true
    orientations and shifts; and STEM_reference.mrc, MAP on the particles' grey scale and low-pass filtered.
    Run it in RELION's project folder: the STAR files name the stack as STEM does. The name of STEM.star is
    printed.

    MAP is a cube with an even box; "-" reads it from standard input.
    """
    from cryored.cli.progress import bar
    from cryored.reconstruction.projection import Views
    from cryored.simulation.particles import Microscope, ParticleOptions, simulate_particles_file

    if given["scale"] is not None and "snr" in options.named(ctx):
        raise click.UsageError("--snr and --scale exclude each other: give one of them")
    if not given["apply_ctf"] and "defocus_range" in options.named(ctx):
        raise click.UsageError("--defocus has no meaning with --no-ctf.")
    views = Views(uneven, missing_cone, axis=(0.0, 0.0, 1.0))
    chosen = options.pick(ParticleOptions, given, microscope=options.pick(Microscope, given), views=views)
    with bar("particles", chosen.number) as advance:
        result = simulate_particles_file(map_path, output, chosen, progress=advance)
    click.echo(result.star)
