"""Turnaround of RELION's hook with a warm watcher, beside the bare computation, the cold path and RELION's own program.

    python benchmarks/watch.py [--box 96] [--pad 1] [--repeats 7] [--model cwred]

The two halves of an iteration, random data, are asked for at the same moment, as RELION does, and the time runs from
the start of the first hook to the end of the last. *bare* is the same work inside a process that has everything loaded:
reading, FFTs, network, writing. The ways take turns; seconds are medians. Then the watcher answers ``--requests`` more,
and its memory is compared with what it was after 20. Last a single cold hook takes turns with TensorFlow's own import.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from update import ROOT, write_request

HOOK = Path(__file__).resolve().parent.parent / "bin" / "cryored-external-reconstruct"
HALVES = [ROOT, ROOT.replace("half1", "half2")]


@dataclass
class Order:
    """An order that nobody waits for."""

    star: str
    folder: Path

    def accept(self) -> None:
        """Nothing to tell."""

    def still_wanted(self) -> bool:
        """Say yes."""
        return True

    done = accept

    def failed(self, message: str) -> None:
        """End the benchmark."""
        sys.exit(message)

    declined = failed


def write_halves(folder: Path, box: int, pad: int, angpix: float = 1.5) -> None:
    """Write the requests of both halves, of the same data."""
    write_request(folder, box, pad, angpix)
    for path in folder.glob(f"{HALVES[0]}*"):
        other = path.with_name(path.name.replace("half1", "half2"))
        if path.suffix == ".star":
            other.write_text(path.read_text().replace("half1", "half2"))
        else:
            shutil.copy(path, other)


def together(folder: Path, *command: str, halves: Sequence[str] = HALVES) -> float:
    """Run a command on both halves at once; return seconds."""
    begin = time.perf_counter()
    running = [subprocess.Popen([*command, f"{half}.star"], cwd=folder, stdout=subprocess.DEVNULL) for half in halves]
    status = [process.wait() for process in running]
    if any(status):
        sys.exit(f"{command[0]} failed")
    return time.perf_counter() - begin


def reconstruct(folder: Path) -> float:
    """Run RELION's program on both halves at once; it wants its options last."""
    return together(folder, "sh", "-c", 'relion_external_reconstruct "$1" --skip_gridding', "relion")


def import_tensorflow() -> float:
    """Import TensorFlow in a new process; return seconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tensorflow"], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a watcher and wait until it serves."""
    command = [sys.executable, "-m", "cryored", "watch", ".", *options]
    watcher = subprocess.Popen(command, cwd=folder)
    presence = folder / "cryored_watch.txt"
    while not (presence.exists() and f"pid {watcher.pid}\n" in presence.read_text()):
        if watcher.poll() is not None:
            sys.exit("the watcher did not start")
        time.sleep(0.05)
    return watcher


def end(watcher: subprocess.Popen[bytes], folder: Path) -> None:
    """End a watcher, and let the hook forget it."""
    watcher.send_signal(signal.SIGTERM)
    watcher.wait()
    (folder / "cryored_watch.txt").unlink()


def memory(process: subprocess.Popen[bytes]) -> float:
    """Return the resident memory of a process in MiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def bare(folder: Path, lam: float, model: str) -> Callable[[], float]:
    """Return a function that does the work of both halves in this process, and says how long it took."""
    from cryored.prior.denoiser import Denoiser
    from cryored.prior.models import find_model
    from cryored.refinement.updater import Settings, Updater
    from cryored.refinement.watcher import Server

    server = Server(folder, Updater(Settings(lam=lam), Denoiser(find_model(model))))

    def serve() -> float:
        begin = time.perf_counter()
        server.serve([Order(f"{half}.star", folder) for half in HALVES])
        return time.perf_counter() - begin

    serve()
    return serve


@click.command(help=__doc__)
@click.option("--box", default=96, show_default=True)
@click.option("--pad", default=1, show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--model", default="cwred", show_default=True)
@click.option("--requests", default=500, show_default=True)
def main(box: int, pad: int, repeats: int, model: str, requests: int) -> None:
    """Print a table of seconds."""
    hook = str(HOOK)
    click.echo("lambda\twatched_s\tbare_s\toverhead_s\tcold_s\trelion_s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_halves(folder, box, pad)
        for lam in (1.0, 0.0):
            options = ("-q", "--lambda", str(lam), "--model", model)
            inside = bare(folder, lam, model)
            watcher = start(folder, *options)
            together(folder, hook)  # the first is slower: the network is compiled
            turns = [(together(folder, hook), inside(), reconstruct(folder)) for _ in range(repeats)]
            watched, alone, relion = (statistics.median(column) for column in zip(*turns, strict=True))
            if lam:
                requested = 2 * (repeats + 1)
                while requested < 20:
                    together(folder, hook)
                    requested += 2
                first, early = requested, memory(watcher)
                while requested < requests:
                    together(folder, hook)
                    requested += 2
                late = memory(watcher)
                note = f"memory after {first} requests {early:.0f} MiB, after {requested} {late:.0f} MiB: "
                note += f"{late / early:.3f}"
                click.echo(note, err=True)
            end(watcher, folder)
            cold = statistics.median(together(folder, hook, *options) for _ in range(3))
            click.echo(f"{lam:g}\t{watched:.3f}\t{alone:.3f}\t{watched - alone:.3f}\t{cold:.2f}\t{relion:.3f}")
        begun = [(together(folder, hook, "-q", halves=HALVES[:1]), import_tensorflow()) for _ in range(repeats)]
    first, load = (statistics.median(column) for column in zip(*begun, strict=True))
    click.echo(f"one cold hook {first:.2f} s, import tensorflow {load:.2f} s: {first / load:.2f}", err=True)
    click.echo(f"box {box}, padding {pad}, {os.cpu_count()} cores, medians of {repeats}", err=True)


if __name__ == "__main__":
    main()
