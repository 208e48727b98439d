"""Does the data pipeline starve the network? Rate of bare training steps, and of those that get new batches.

    KERAS_BACKEND=torch python benchmarks/train.py [PAIRS.star ...] [--width 4 --depth 5 --patch 64 --batch-size 10]

One network takes the same batch, which is on the device already, again and again (*bare*), and then batches as
training gets them: of pairs kept in memory (*kept*), of pairs read from disk each time (*read*), and, with
``--synthesise SHARE`` and truths in the table, made on the device in part (*made*). Kinds take turns, so that other
work on the machine slows all of them; rates are medians over the turns, in steps a second, and the last column is the
share of the bare rate. Without tables, pairs of noise with a box of 96 voxels are written to a temporary folder.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

BOX = 96


def write_noise(folder: Path, structures: int) -> str:
    """Write pairs of noise beside a sphere; return the name of their table."""
    from cryored.files.mrc import write_volume
    from cryored.maps.volume import Volume, soft_sphere
    from cryored.simulation.pair_table import PairRow, write_pairs

    rng = np.random.default_rng(0)
    truth = soft_sphere((BOX,) * 3, 0.3 * BOX, 4.0)
    fsc = np.clip(np.linspace(2, -0.5, BOX // 2 + 1), 0, 1)
    rows = []
    for number in range(structures):
        names = {kind: str(folder / f"{number}_{kind}.mrc") for kind in ("noisy", "target", "truth")}
        noise = rng.standard_normal(truth.shape, dtype=np.float32)
        for kind, data in (("noisy", truth + noise), ("target", truth), ("truth", truth)):
            write_volume(names[kind], Volume(data, 1.5), label="benchmark", float16=True)
        rows.append(
            PairRow(names["noisy"], names["target"], f"{number}", 1, 6.0, fsc, "gaussian", number, names["truth"])
        )
    write_pairs(folder / "pairs.star", rows, made_by="benchmark")
    return str(folder / "pairs.star")


@click.command(help=__doc__)
@click.argument("tables", nargs=-1, type=click.Path(exists=True))
@click.option("--width", default=4, show_default=True)
@click.option("--depth", default=5, show_default=True)
@click.option("--patch", default=64, show_default=True)
@click.option("--batch-size", default=10, show_default=True)
@click.option("--mixed-precision", is_flag=True)
@click.option("--synthesise", default=0.0, show_default=True)
@click.option("--steps", default=20, show_default=True, help="In a turn.")
@click.option("--turns", default=5, show_default=True)
@click.option("--threads", type=int)
def main(tables: tuple[str, ...], steps: int, turns: int, threads: int | None, **options: Any) -> None:
    """Print a table of rates."""
    from cryored.prior import device
    from cryored.simulation.pair_table import read_pairs
    from cryored.training.batches import PairStore, prefetched
    from cryored.training.device_pairs import Synthesis
    from cryored.training.loop import Recipe, batch_maker, build_network, train_step
    from cryored.training.train import read_truths

    recipe = Recipe(steps=10**9, **options)
    stored = replace(recipe, synthesise=0.0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        names = tables or (write_noise(Path(folder), 24),)
        rows = [row for name in names for row in read_pairs(name)]
        print(f"# {device.set_up(threads=threads)}, {recipe.as_text()}, {len(rows)} pairs")
        stack.enter_context(device.scope(recipe.batch_size))
        network = build_network(recipe)
        kept, read = (PairStore(rows, recipe.input, cache) for cache in (None, 0))
        for index in range(len(rows)):
            kept[index]
        endless = range(recipe.steps or 0)
        batches = {"kept": prefetched(batch_maker(stored, kept), endless, threads)}
        batches["read"] = prefetched(batch_maker(stored, read), endless, threads)
        if recipe.synthesised:
            synthesis = Synthesis(read_truths(rows), 1.5, patch=recipe.patch, input=recipe.input, seed=0)
            batches["made"] = prefetched(batch_maker(recipe, kept, synthesis), endless, threads)
        bare = itertools.repeat((0, batch_maker(stored, kept)(0)))
        kinds: dict[str, Iterator[Any]] = {"bare": bare, **batches}
        rates = measure(kinds, lambda step, batch: train_step(network, recipe, step, batch), steps, turns)
        for generator in batches.values():
            generator.close()
    print("batches\tsteps_per_second\tshare_of_bare")
    for name, rate in rates.items():
        print(f"{name}\t{rate:.3f}\t{rate / rates['bare']:.3f}")


def measure(
    kinds: dict[str, Iterator[Any]], step: Callable[[int, Any], float], steps: int, turns: int
) -> dict[str, float]:
    """Return the median rate of each kind of batches, in steps a second."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(turns + 1):
        for name, batches in kinds.items():
            # The first batches of a turn were made ahead while others trained: take them before the clock starts.
            for index, batch in itertools.islice(batches, 1 if name == "bare" else 2):
                step(index, batch)
            begin = time.perf_counter()
            for index, batch in itertools.islice(batches, steps):
                step(index, batch)
            if turn:  # the first turn compiles
                found[name].append(steps / (time.perf_counter() - begin))
    return {name: statistics.median(rates) for name, rates in found.items()}


if __name__ == "__main__":
    main()
