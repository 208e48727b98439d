"""A small subtomogram average with RELION 5, MAP against CW-RED, judged against the truth.

Each particle is a stack of tilted images with CTF and white noise, as ``relion_tomo_subtomo --stack2d`` cuts them from
tilt series; ``relion_refine_mpi`` of RELION 5, first on the PATH, refines them with local searches from perturbed
angles, once a variant. Printed are, for each run, the mean FSC of its half-maps' average to the truth over the shells
up to half of Nyquist, the median angular error, the half-maps' resolution, the number of requests, and the largest
relative difference between an answer with lambda 0 and that of RELION's own ``relion_external_reconstruct``.

    python benchmarks/subtomograms.py STRUCTURE -o DIR [--variants map,cwred]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import numpy as np

from cryored.files.mrc import new_stack, read_volume, write_volume
from cryored.files.star import Column, write_star
from cryored.maps.fourier import low_pass
from cryored.maps.fsc import nominal_resolution, shell_correlation
from cryored.maps.mask import soft_mask
from cryored.reconstruction.orientations import angular_error_file
from cryored.reconstruction.projection import Doubles, Projector, euler_angles, perturb, rotation_matrices
from cryored.refinement.relion_runs import Data, Reconstruction, RefinementError, half_maps, refine_by
from cryored.simulation.map_of_model import MapOptions, simulate_map_file
from cryored.simulation.particles import Microscope, Particles, clean_images, draw_particles
from cryored.simulation.structure import read_atoms

HOOK = Path(__file__).resolve().parent.parent / "bin" / "cryored-external-reconstruct"
VARIANTS = {"map": ["--lambda", "0"], "cwred": []}
MICROSCOPE = Microscope()
TOMOGRAM = "tomogram1"
DEFOCUS = (5000.0, 20000.0)  # angstrom, of the tilts
INI_HIGH = 30.0
SEARCH = (
    *("--healpix_order", "3", "--auto_local_healpix_order", "3", "--sigma_ang", "5"),
    *("--offset_range", "1", "--offset_step", "1"),  # in three dimensions
    *("--tomograms", "tomograms.star"),
)


def simulate(
    structure: str, folder: Path, box: int, angpix: float, number: int, tilts: int, snr: float, seed: int
) -> Data:
    """Write what RELION refines: stacks, particles, tomograms, tilt series and reference; and the truth."""
    (folder / "stacks").mkdir(parents=True, exist_ok=True)
    reach = float(np.linalg.norm(read_atoms(structure).positions, axis=1).max())
    data = Data(folder, box, angpix, min(2 * reach + 10, 0.95 * box * angpix))
    simulate_map_file(structure, str(data.truth), MapOptions(box, angpix, 3.0, overwrite=True))
    truth = read_volume(data.truth)
    rng = np.random.default_rng(seed)
    rotations = draw_particles(number, shift=0, defocus_range=None, rng=rng).rotations
    angles = np.linspace(-60, 60, tilts)
    # RELION's tilt is right-handed about y, and its Euler angle is not.
    beams = rotation_matrices(np.zeros(tilts), -angles, np.zeros(tilts))
    defocus = rng.uniform(*DEFOCUS, size=tilts)

    projector = Projector(truth.data)
    views = (Particles(beams @ one, np.zeros((tilts, 2)), defocus) for one in rotations)
    clean = np.stack([clean_images(projector, one, angpix, MICROSCOPE) for one in views])
    scale = np.float32(np.sqrt(snr / clean.var(axis=(2, 3)).mean()))
    noisy = scale * clean + rng.standard_normal(clean.shape, dtype=np.float32)
    names = [f"stacks/{one:04d}_stack2d.mrcs" for one in range(1, number + 1)]
    for name, images in zip(names, noisy, strict=True):
        with new_stack(folder / name, tilts, box, angpix, label="subtomogram") as stack:
            stack.write(0, images)
    reference = truth.with_data(scale * low_pass(truth.data, angpix, INI_HIGH))
    write_volume(str(folder / "particles_reference.mrc"), reference, label=f"reference {INI_HIGH:g} A")
    write_tomograms(data, angles, defocus, names[0])
    write_particles(data, "particles_truth.star", names, rotations, tilts)
    write_particles(data, "particles.star", names, perturb(rotations, 5, rng=rng), tilts)
    return data


def optics(data: Data) -> dict[str, Column]:
    """Return what the tables of tomograms and of particles both say."""
    return {
        "rlnVoltage": [MICROSCOPE.voltage],
        "rlnSphericalAberration": [MICROSCOPE.cs],
        "rlnAmplitudeContrast": [MICROSCOPE.amplitude_contrast],
        "rlnTomoTiltSeriesPixelSize": [data.angpix],
    }


def write_tomograms(data: Data, angles: Doubles, defocus: Doubles, stack: str) -> None:
    """Write one tomogram without shifts and radiation damage, all of whose particles lie in its centre."""
    tilts = len(angles)
    tomogram: dict[str, Column] = {
        "rlnTomoName": [TOMOGRAM],
        "rlnTomoTiltSeriesStarFile": ["tilt_series.star"],
        "rlnTomoTiltSeriesName": [stack],  # read for the size of its images only
        "rlnTomoFrameCount": [tilts],
        "rlnTomoHand": [-1.0],
        **{f"rlnTomoSize{axis}": [data.box] for axis in "XYZ"},
    }
    write_star(data.folder / "tomograms.star", {"global": tomogram | optics(data)})
    flat = ("TomoXTilt", "TomoZRot", "TomoXShiftAngst", "TomoYShiftAngst", "DefocusAngle", "MicrographPreExposure")
    series: dict[str, Column] = {"rlnTomoYTilt": angles, "rlnDefocusU": defocus, "rlnDefocusV": defocus}
    series |= {f"rln{label}": np.zeros(tilts) for label in flat}
    write_star(data.folder / "tilt_series.star", {TOMOGRAM: series})


def write_particles(data: Data, file: str, names: list[str], rotations: Doubles, tilts: int) -> None:
    """Write a table of particles with these orientations."""
    number = len(names)
    group: dict[str, Column] = {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnImagePixelSize": [data.angpix],
        "rlnImageSize": [data.box],
        "rlnImageDimensionality": [2],
        "rlnTomoSubtomogramBinning": [1.0],
        "rlnCtfDataAreCtfPremultiplied": [0],
    }
    particles: dict[str, Column] = {
        "rlnTomoName": [TOMOGRAM] * number,
        "rlnTomoParticleName": [f"{TOMOGRAM}/{one}" for one in range(1, number + 1)],
        "rlnImageName": names,
        "rlnTomoVisibleFrames": ["[" + ",".join("1" * tilts) + "]"] * number,
        "rlnOpticsGroup": [1] * number,
        "rlnRandomSubset": [1 + one % 2 for one in range(number)],
        **{f"rlnCenteredCoordinate{axis}Angst": np.zeros(number) for axis in "XYZ"},
        **{f"rlnOrigin{axis}Angst": np.zeros(number) for axis in "XYZ"},
        **dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), euler_angles(rotations), strict=True)),
    }
    write_star(
        data.folder / file,
        {"general": {"rlnTomoSubTomosAre2DStacks": 1}, "optics": group | optics(data), "particles": particles},
    )


def differences(data: Data, name: str) -> list[float]:
    """Return by how much each answer of a run differs from that of RELION's own program."""
    found = []
    for star in sorted((data.folder / name).glob("run_it*_external_reconstruct.star")):
        own = star.with_name("relions_own.mrc")
        command = ["relion_external_reconstruct", f"{name}/{star.name}", "--skip_gridding", "--o", f"{name}/{own.name}"]
        subprocess.run(command, cwd=data.folder, check=True, stdout=subprocess.DEVNULL)
        expected = read_volume(own).data
        found.append(
            float(np.linalg.norm(read_volume(star.with_suffix(".mrc")).data - expected) / np.linalg.norm(expected))
        )
    return found


def judge(data: Data, name: str) -> dict[str, object]:
    """Return the row of a run."""
    truth = read_volume(data.truth)
    mask = soft_mask(truth).data
    halves = half_maps(data, name)
    curve = shell_correlation(sum(halves) / 2 * mask, truth.data * mask)
    frequency = np.arange(data.box // 2 + 1) / (data.box * data.angpix)
    errors = angular_error_file(data.folder / name / "run_data.star", data.folder / "particles_truth.star")
    return {
        "run": name,
        "mean_truth_fsc": f"{curve[1 : data.box // 4 + 1].mean():.4f}",
        "angular_error_deg": f"{np.median(errors):.3f}",
        "half_map_0.143_A": f"{nominal_resolution(frequency, shell_correlation(*halves)):.2f}",
        "requests": len(list((data.folder / name).glob("run_it*_external_reconstruct.star"))),
        "from_relions_own": f"{max(differences(data, name)):.1e}" if name == "map" else "",
    }


@click.command()
@click.argument("structure", type=click.Path(exists=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--variants", default="map,cwred", show_default=True, help=f"Of {', '.join(VARIANTS)}; commas between.")
@click.option("--box", default=48, show_default=True)
@click.option("--angpix", default=2.0, show_default=True)
@click.option("--number", default=60, show_default=True, help="Particles.")
@click.option("--tilts", default=9, show_default=True, help="Images of each, from -60 to 60 degrees.")
@click.option("--snr", default=0.05, show_default=True, help="Of an image.")
@click.option("--seed", default=1, show_default=True)
def main(
    structure: str, output: Path, variants: str, box: int, angpix: float, number: int, tilts: int, snr: float, seed: int
) -> None:
    """Refine simulated subtomograms of STRUCTURE with RELION 5, once a variant, and compare with the truth."""
    data = simulate(structure, output.resolve(), box, angpix, number, tilts, snr, seed)
    for place, name in enumerate(variants.split(",")):
        click.echo(f"refining: {name} ...", err=True)
        try:
            refine_by(data, name, Reconstruction(VARIANTS[name], hook=HOOK, watched=True), search=SEARCH, timeout=3600)
        except RefinementError as error:
            sys.exit(str(error))
        row = judge(data, name)
        if not place:
            click.echo("\t".join(row))
        click.echo("\t".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
