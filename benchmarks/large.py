"""Boxes as users have them: time, memory and what was told beforehand, beside RELION's own program.

    python benchmarks/large.py [--boxes 256,384,512] [--pads 1,2] [--angpix 1.0] [--lambdas 0,1]

For each box and padding the requests of both halves are written, random data under a smooth weight, and answered:

- by ``relion_external_reconstruct --skip_gridding``, one half;
- by ``cryored red-update``, one half, in a new process: *cold*;
- by ``cryored watch`` through RELION's hook, both halves at once: the first time, and again: *warm*.

Seconds are wall time, memory is the peak of the process, with what it has mapped of the arrays. *told* is what
``red-update --check`` says beforehand, arrays included. Steps are those of the first half's last answer.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
from update import ROOT, run_relion
from watch import HOOK, end, start, together, write_halves

LOG = f"{ROOT.removesuffix('_external_reconstruct')}_cryored.log"


def run(folder: Path, *words: str) -> tuple[float, float]:
    """Run cryored; return seconds and peak GiB."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "cryored", *words], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"cryored {' '.join(words)}: failed")
    return time.perf_counter() - begin, usage.ru_maxrss / 2**20


def told(folder: Path, lam: str, gpu: list[str]) -> dict[str, float]:
    """Return what is told beforehand of one request."""
    command = [sys.executable, "-m", "cryored", "red-update", f"{ROOT}.star", "--lambda", lam, "--check", *gpu]
    return json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout)["expected"]


def peak(process: subprocess.Popen[bytes]) -> float:
    """Return the peak memory of a running process in GiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


@click.command()
@click.option("--boxes", default="256,384,512", show_default=True)
@click.option("--pads", default="1,2", show_default=True)
@click.option("--angpix", default=1.0, show_default=True)
@click.option("--lambdas", default="0,1", show_default=True)
@click.option("--gpu/--cpu", default=None)
@click.option("--no-watch", is_flag=True, help="Only one half.")
@click.option("--no-relion", is_flag=True)
@click.option("--scratch", type=click.Path(exists=True), help="Room for 13 GB at box 512, padding 2.")
def main(
    boxes: str,
    pads: str,
    angpix: float,
    lambdas: str,
    gpu: bool | None,
    no_watch: bool,
    no_relion: bool,
    scratch: str | None,
) -> None:
    """Print a table, a line for each box, padding and lambda."""
    device = [] if gpu is None else ["--gpu" if gpu else "--cpu"]
    click.echo(
        "box\tpad\tarrays_GiB\trelion_s\trelion_GiB\tlambda\tcold_s\tcold_GiB\ttold_GiB\ttold_s\tfirst_both_s\twarm_both_s\t"
        "watch_GiB\tsteps"
    )
    for box in map(int, boxes.split(",")):
        for pad in map(int, pads.split(",")):
            with tempfile.TemporaryDirectory(dir=scratch) as name:
                folder = Path(name)
                # In a process of its own: Linux counts the memory of the parent at the fork as the child's.
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
                    aside.submit(write_halves, folder, box, pad, angpix).result()
                os.sync()  # or the disk still writes the arrays while the first answers are timed
                relion = ["", ""]
                if not no_relion and shutil.which("relion_external_reconstruct") is not None:
                    seconds, mebibytes = run_relion(folder)
                    relion = [f"{seconds:.1f}", f"{mebibytes / 1024:.1f}"]
                for lam in lambdas.split(","):
                    cells = rows_of(folder, lam, device, watched=not no_watch)
                    click.echo("\t".join([str(box), str(pad), cells[0], *relion, f"{float(lam):g}", *cells[1:]]))


def rows_of(folder: Path, lam: str, device: list[str], *, watched: bool) -> list[str]:
    """Answer one half cold, and both through the watcher; return the cells of a line."""
    words = ("--lambda", lam, *device, "-q")
    expected = told(folder, lam, device)
    arrays = expected["arrays_gib"]
    seconds, memory = run(folder, "red-update", f"{ROOT}.star", *words)
    cells = [f"{arrays:.2f}", f"{seconds:.1f}", f"{memory:.2f}"]
    cells += [f"{expected['memory_gib'] + arrays:.2f}", f"{expected['seconds']:.1f}"]
    if watched:
        watcher = start(folder, *words)
        turns = [together(folder, str(HOOK)) for _ in range(2)]
        cells += [f"{turns[0]:.1f}", f"{turns[1]:.1f}", f"{peak(watcher):.2f}"]
        end(watcher, folder)
    else:
        cells += ["", "", ""]
    steps = json.loads((folder / LOG).read_text().splitlines()[-1])["seconds"]
    return [*cells, " ".join(f"{step} {value:.1f}" for step, value in steps.items())]


if __name__ == "__main__":
    main()
