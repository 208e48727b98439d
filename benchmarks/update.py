"""Speed and memory of the update, against RELION's own program on the same requests in the same run.

    python benchmarks/update.py [--boxes 96,256] [--repeats 5]

For each box and padding a request of random data is written, and these are run in turn:
``relion_external_reconstruct --skip_gridding`` as a process, and ``red-update --lambda 0`` inside a Python process
whose imports are done (the watcher's case), timed from reading the STAR to the written map. Peak memory is the whole
process's. The last columns are the ratios ours / RELION's; medians of the repeats.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import numpy as np

ROOT = "run_it001_half1_class001_external_reconstruct"
OURS = """
import json, resource, sys, time
from cryored.prior.models import DEFAULT_MODEL
from cryored.refinement.red_update import red_update_file
from cryored.refinement.updater import Settings
begin = time.perf_counter()
red_update_file(sys.argv[1], Settings(lam=0.0), model=DEFAULT_MODEL)
seconds = time.perf_counter() - begin
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def write_request(folder: Path, box: int, pad: int, angpix: float = 1.5) -> float:
    """Write a request of random data with a smooth weight; return the size of its arrays in MiB."""
    import mrcfile

    from cryored.files.star import write_star
    from cryored.maps.fourier import squared_radius

    n = box * pad
    rng = np.random.default_rng(1)
    radius = np.sqrt(squared_radius(n), dtype=np.float32)
    weight = 1000 / (1 + radius) + rng.random(radius.shape, dtype=np.float32)
    amplitude = weight * np.exp(-radius / (0.2 * n))
    arrays = {
        "data_real": amplitude * rng.standard_normal(radius.shape, dtype=np.float32),
        "data_imag": amplitude * rng.standard_normal(radius.shape, dtype=np.float32),
        "weight": weight,
    }
    for name, array in arrays.items():
        with mrcfile.new(folder / f"{ROOT}_{name}.mrc", overwrite=True) as mrc:
            mrc.set_data(array.astype(np.float32))
    shells = np.arange(box // 2 + 1)
    general = {
        "rlnExtReconsDataReal": f"{ROOT}_data_real.mrc",
        "rlnExtReconsDataImag": f"{ROOT}_data_imag.mrc",
        "rlnExtReconsWeight": f"{ROOT}_weight.mrc",
        "rlnExtReconsResult": f"{ROOT}.mrc",
        "rlnExtReconsResultStarfile": f"{ROOT}_out.star",
        "rlnTau2FudgeFactor": 1.0,
        "rlnPaddingFactor": float(pad),
        "rlnReferenceDimensionality": 3,
        "rlnOriginalImageSize": box,
        "rlnCurrentImageSize": box,
        "rlnPixelSize": angpix,
    }
    tables = {
        "rlnSpectralIndex": shells,
        "rlnReferenceTau2": 1e-3 * np.exp(-shells / (0.1 * box)),
        "rlnGoldStandardFsc": np.clip(1 - shells / (0.4 * box), 0, 1),
    }
    write_star(folder / f"{ROOT}.star", {"external_reconstruct_general": general, "external_reconstruct_tau2": tables})
    return 3 * radius.nbytes / 2**20


def run_relion(folder: Path) -> tuple[float, float]:
    """Run RELION's program; return seconds and peak MiB."""
    command = ["relion_external_reconstruct", f"{ROOT}.star", "--skip_gridding", "--j", str(os.cpu_count())]
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"relion_external_reconstruct failed with status {status}")
    return seconds, usage.ru_maxrss / 1024


def run_ours(folder: Path) -> tuple[float, float]:
    """Run our update in a fresh Python; return seconds inside it and its peak MiB."""
    found = subprocess.run(
        [sys.executable, "-c", OURS, f"{ROOT}.star"], cwd=folder, check=True, capture_output=True, text=True
    )
    seconds, memory = json.loads(found.stdout)
    return seconds, memory


def compare(path: Path, expected: Path) -> float:
    """Return the relative L2 difference of two maps."""
    from cryored.files.mrc import read_volume

    found, wanted = read_volume(path).data, read_volume(expected).data
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@click.command()
@click.option("--boxes", default="96,256", show_default=True)
@click.option("--pads", default="1,2", show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(boxes: str, pads: str, repeats: int) -> None:
    """Print a table of seconds and memory, ours against RELION's."""
    if shutil.which("relion_external_reconstruct") is None:
        sys.exit("relion_external_reconstruct is not on the PATH")
    click.echo(
        "box\tpad\tarrays_MiB\trelion_s\tours_s\trelion_MiB\tours_MiB\ttime_ratio\tmemory_ratio\tours/arrays\tL2"
    )
    for box in map(int, boxes.split(",")):
        for pad in map(int, pads.split(",")):
            with tempfile.TemporaryDirectory() as name:
                click.echo("\t".join(_row(Path(name), box, pad, repeats)))


def _row(folder: Path, box: int, pad: int, repeats: int) -> list[str]:
    # Volumes are handled in a process of their own: Linux counts the memory of the parent at the fork as the child's.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
        arrays = aside.submit(write_request, folder, box, pad).result()
    run_relion(folder)  # warms the file cache
    relion, ours = [], []
    for _ in range(repeats):
        relion.append(run_relion(folder))
        shutil.copy(folder / f"{ROOT}.mrc", folder / "expected.mrc")
        ours.append(run_ours(folder))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
        difference = aside.submit(compare, folder / f"{ROOT}.mrc", folder / "expected.mrc").result()
    (relion_s, relion_mib), (ours_s, ours_mib) = (
        (statistics.median(item[0] for item in runs), statistics.median(item[1] for item in runs))
        for runs in (relion, ours)
    )
    ratios = [
        statistics.median(our[0] / theirs[0] for our, theirs in zip(ours, relion, strict=True)),
        ours_mib / relion_mib,
        ours_mib / arrays,
    ]
    return [
        str(box),
        str(pad),
        f"{arrays:.0f}",
        f"{relion_s:.3f}",
        f"{ours_s:.3f}",
        f"{relion_mib:.0f}",
        f"{ours_mib:.0f}",
        *(f"{ratio:.2f}" for ratio in ratios),
        f"{difference:.1e}",
    ]


if __name__ == "__main__":
    main()
