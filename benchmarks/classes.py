"""A small real Class3D with RELION, MAP against CW-RED, judged against the truth.

Particles of one or more atomic models go into one ``relion_refine`` with as many classes, from one reference and by
local searches from perturbed angles. Printed are, for each run, the share of particles in the right class and the mean
FSC of the class maps to their truths; with --estimate, for one model, how the FSC that cryored derives from tau2 and K
compares with the square of the one that the unregularised map has to the truth.

    python benchmarks/classes.py STRUCTURE [STRUCTURE] -o DIR [--variants map,cwred]
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from cryored.files.mrc import read_volume, write_volume
from cryored.files.requests import read_request_file
from cryored.files.star import read_star
from cryored.maps.fsc import shell_correlation
from cryored.maps.mask import soft_mask
from cryored.reconstruction.sums import load_sums
from cryored.reconstruction.update import estimated_fsc
from cryored.refinement.relion_runs import LOCAL_SEARCH, Data, make_data

HOOK = Path(__file__).resolve().parent.parent / "bin" / "cryored-external-reconstruct"
KEEP = "--unregularised '{root}_unregularised.mrc'"  # is what the estimate is compared by
VARIANTS = {"map": "--lambda 0", "cwred": "", "half": "--lambda 0.5"}
TAU2_FUDGE = 4  # RELION's default in Class3D

Curve = npt.NDArray[np.float64]


def mix(sets: list[Data], folder: Path) -> None:
    """Write a table of all sets' particles, and the mean of their references."""
    heads, rows = [], []
    for one in sets:
        lines = (one.folder / "particles.star").read_text().splitlines(keepends=True)
        heads.append([line for line in lines if "@" not in line])
        rows += [line.replace("@", f"@{one.folder.name}/") for line in lines if "@" in line]
    (folder / "particles.star").write_text("".join(heads[0] + rows))
    references = [read_volume(one.folder / "particles_reference.mrc") for one in sets]
    mean = np.mean([volume.data for volume in references], axis=0)
    write_volume(str(folder / "reference.mrc"), references[0].with_data(mean), label="mean reference")


def classify(sets: list[Data], folder: Path, name: str, iterations: int) -> Path:
    """Run RELION; return the folder of the run."""
    run = folder / name
    run.mkdir(exist_ok=True)
    command = ["relion_refine", "--i", "particles.star", "--ref", "reference.mrc", "--o", f"{name}/run"]
    command += ["--K", str(len(sets)), "--iter", str(iterations), "--tau2_fudge", str(TAU2_FUDGE)]
    command += ["--ctf", "--ctf_corrected_ref", "--ini_high", "30", "--pad", "1", "--zero_mask", "--flatten_solvent"]
    command += ["--particle_diameter", f"{max(one.diameter for one in sets):.0f}", "--norm", "--scale", "--sym", "C1"]
    command += ["--oversampling", "1", "--j", str(os.cpu_count()), "--pool", "30", "--dont_combine_weights_via_disc"]
    command += ["--random_seed", "7", "--external_reconstruct", *LOCAL_SEARCH]
    hook = f"{HOOK} {VARIANTS[name]} {KEEP}"
    environment = os.environ | {"RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE": hook}
    with (run / "run.log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"{run / 'run.log'}: relion_refine failed")
    return run


def last(run: Path) -> str:
    """Return what the names of the last iteration begin with."""
    return str(sorted(run.glob("run_it*_data.star"))[-1]).removesuffix("_data.star")


def to_truth(sets: list[Data], path: str, index: int) -> Curve:
    """Return the masked FSC of a map to the truth of that number."""
    truth = read_volume(sets[index].truth)
    mask = soft_mask(truth).data
    return shell_correlation(read_volume(path).data * mask, truth.data * mask)


def judge(sets: list[Data], run: Path) -> dict[str, object]:
    """Return the share of particles in the right class, and the mean FSC of the class maps to their truths."""
    stem = last(run)
    table = read_star(f"{stem}_data.star")
    right = np.array([int(name.split("@")[1].split("/")[0]) for name in table.texts("particles", "rlnImageName")])
    found = table.numbers("particles", "rlnClassNumber").astype(int)
    numbers = range(1, len(sets) + 1)
    # Classes have no order of their own.
    order = max(
        itertools.permutations(numbers),
        key=lambda one: sum(int(np.sum((right == n) & (found == c))) for n, c in zip(numbers, one, strict=True)),
    )
    share = np.mean([order[n - 1] == c for n, c in zip(right, found, strict=True)])
    half = sets[0].box // 4  # shells up to half of Nyquist
    curves = [to_truth(sets, f"{stem}_class{c:03d}_unregularised.mrc", n) for n, c in enumerate(order)]
    return {
        "run": run.name,
        "right_class": round(float(share), 4),
        "mean_truth_fsc": " ".join(f"{curve[1:half].mean():.4f}" for curve in curves),
        "particles": " ".join(str(int(np.sum(found == c))) for c in order),
    }


def estimates(sets: list[Data], run: Path) -> list[tuple[str, Curve, Curve]]:
    """Return for each iteration the FSC by tau2 and K, and the squared FSC of the map without a prior to the truth."""
    found = []
    before = Path.cwd()
    os.chdir(run.parent)
    try:
        for star in sorted(Path(run.name).glob("run_it*_class001_external_reconstruct.star")):
            request = read_request_file(str(star), angpix=sets[0].angpix)
            estimate = estimated_fsc(load_sums(request), request.tau2)
            truth = to_truth(sets, f"{request.root}_unregularised.mrc", 0)
            end = request.r_max
            found.append((request.root, estimate[1:end], np.maximum(truth[1:end], 0) ** 2))
    finally:
        os.chdir(before)
    return found


@click.command()
@click.argument("structures", type=click.Path(exists=True), nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--variants", default="map,cwred", show_default=True, help=f"Of {', '.join(VARIANTS)}; commas between.")
@click.option("--box", default=64, show_default=True)
@click.option("--angpix", default=2.0, show_default=True)
@click.option("--number", default=400, show_default=True, help="Particles of each structure.")
@click.option("--snr", default=0.05, show_default=True)
@click.option("--iterations", default=10, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--estimate", is_flag=True, help="Compare the estimated FSC with the true one.")
def main(
    structures: tuple[str, ...],
    output: Path,
    variants: str,
    box: int,
    angpix: float,
    number: int,
    snr: float,
    iterations: int,
    seed: int,
    estimate: bool,
) -> None:
    """Classify simulated particles of STRUCTURES with RELION, once a variant, and compare with the truth."""
    folder = output.resolve()
    sets = [
        make_data(one, folder / str(place), box=box, angpix=angpix, number=number, snr=snr, seed=seed + place)
        for place, one in enumerate(structures, 1)
    ]
    mix(sets, folder)
    rows = []
    for name in variants.split(","):
        click.echo(f"classifying: {name} ...", err=True)
        run = classify(sets, folder, name, iterations)
        rows.append(judge(sets, run))
        if estimate:
            for root, found, true in estimates(sets, run):
                click.echo(f"{Path(root).name}\testimated {_brief(found)}\ttrue {_brief(true)}")
    click.echo("\t".join(rows[0]))
    for row in rows:
        click.echo("\t".join(str(value) for value in row.values()))


def _brief(curve: Curve) -> str:
    return " ".join(f"{value:.2f}" for value in curve)


if __name__ == "__main__":
    main()
