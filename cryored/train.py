"""Train a prior on pairs of maps, restartably, and judge it on held-out pairs."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cryored import __version__, device
from cryored.denoise import Denoiser, cube_rotations, rotate
from cryored.errors import InputError, ModelError
from cryored.fourier import apply_shells
from cryored.fsc import crossing_resolution, shell_correlation
from cryored.models import Model, ModelCard, save_model
from cryored.mrc import read_volume
from cryored.network import build_unet
from cryored.output import write_text
from cryored.simulate.pair_table import PairRow, read_pairs
from cryored.standardise import standard_of
from cryored.volume import Volume

logger = logging.getLogger(__name__)

BINS = (0.0, 4.5, 6.0, 8.0, 10.0, np.inf)  # angstrom, edges of the evaluation's table
_GREY_SCALE = (0.5, 1.5)  # range of a random factor: molecules are larger or smaller than those trained on
_STATE = "training.keras"  # network and optimiser of the last checkpoint
_LOG = "training.csv"

Array = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]
Input = Literal["regularised", "unregularised"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Parameters
    ----------
    width, depth : int
        See `build_unet`.
    patch : int
        Edge of the training patches in voxels, a multiple of ``2**depth``.
    batch_size, steps : int
    learning_rate : float
        Of Adam; falls to 0 along a cosine.
    input : {"regularised", "unregularised"}
        The map that the network sees: the noisy map weighted by its FSC, or as it is.
    seed : int
    """

    width: int = 4
    depth: int = 4
    patch: int = 48
    batch_size: int = 4
    steps: int = 3000
    learning_rate: float = 1e-3
    input: Input = "regularised"
    seed: int = 0


class PairStore:
    """Standardised pairs, read when first needed and kept in memory as float16."""

    def __init__(self, rows: Sequence[PairRow], input: Input) -> None:
        if not rows:
            raise InputError("no pairs to train on")
        self.rows = rows
        self.input = input
        self._kept: dict[int, tuple[Half, Half, float]] = {}
        self._voxel_size = 0.0

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Half, Half, float]:
        """Return input, error (input minus target) and the loss weight of a pair, in standardised units.

        The weight is one over the Wiener map's mean squared error, so that each resolution counts the same.
        """
        if index not in self._kept:
            noisy, target = read_pair(self.rows[index])
            self._check_voxel_size(noisy, index)
            wiener = weighted(noisy, self.rows[index])
            volume = wiener if self.input == "regularised" else noisy
            standard = standard_of(volume.data, volume.voxel_size)
            scale = np.float32(1 / standard.deviation)
            mean_square = float(np.mean(np.square((wiener.data - target.data) * scale)))
            self._kept[index] = (
                standard.apply(volume.data).astype(np.float16),
                ((volume.data - target.data) * scale).astype(np.float16),
                1 / max(mean_square, 1e-8),
            )
        return self._kept[index]

    def _check_voxel_size(self, noisy: Volume, index: int) -> None:
        if self._voxel_size == 0:
            self._voxel_size = read_pair(self.rows[0])[0].voxel_size
        if noisy.voxel_size != self._voxel_size:
            raise InputError(
                f"{self.rows[index].noisy}: pixel size {noisy.voxel_size:g} A, expected {self._voxel_size:g} A as in "
                f"{self.rows[0].noisy}; train on pairs of one pixel size"
            )


def read_pair(row: PairRow) -> tuple[Volume, Volume]:
    """Read the noisy and the target map of a row; refuse shapes or voxel sizes that differ."""
    noisy, target = read_volume(row.noisy), read_volume(row.target)
    if noisy.shape != target.shape or noisy.voxel_size != target.voxel_size:
        raise InputError(
            f"{row.target}: {target.shape} voxels of {target.voxel_size} A, expected those of {row.noisy}: "
            f"{noisy.shape} voxels of {noisy.voxel_size} A"
        )
    return noisy, target


def weighted(noisy: Volume, row: PairRow) -> Volume:
    """Return the noisy map times its FSC, the best linear filter (Wiener)."""
    return noisy.with_data(apply_shells(noisy.data, np.clip(row.fsc, 0.0, 1.0), 1))


def draw_batch(store: PairStore, recipe: Recipe, step: int) -> tuple[Array, Array, Array]:
    """Return inputs, errors (batch, z, y, x, 1) and weights (batch,) of a step; the step alone decides them."""
    rng = np.random.default_rng([recipe.seed, step])
    rotations = cube_rotations()
    inputs, errors, weights = [], [], []
    for _ in range(recipe.batch_size):
        index = int(rng.integers(len(store)))
        source, error, weight = store[index]
        if min(source.shape) < recipe.patch:
            raise InputError(f"{store.rows[index].noisy}: a box of {min(source.shape)}, below --patch {recipe.patch}")
        corner = [int(rng.integers(n - recipe.patch + 1)) for n in source.shape]
        place = tuple(slice(start, start + recipe.patch) for start in corner)
        rotation = rotations[int(rng.integers(len(rotations)))]
        scale = np.float32(rng.uniform(*_GREY_SCALE))
        inputs.append(rotate(source[place].astype(np.float32) * scale, rotation))
        errors.append(rotate(error[place].astype(np.float32) * scale, rotation))
        weights.append(weight / float(scale) ** 2)
    return np.stack(inputs)[..., None], np.stack(errors)[..., None], np.array(weights, dtype=np.float32)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step: a short rise, then a cosine down to 0."""
    rise = min(1.0, (step + 1) / 50)
    return recipe.learning_rate * rise * 0.5 * (1 + np.cos(np.pi * step / recipe.steps))


def train_network(
    network: Any,
    store: PairStore,
    recipe: Recipe,
    *,
    first_step: int = 0,
    on_step: Callable[[int, float], None],
) -> None:
    """Run the steps from `first_step` on; `on_step(step, loss)` is called after each."""
    for step, (inputs, errors, weights) in _prefetched(store, recipe, first_step):
        network.optimizer.learning_rate.assign(learning_rate(recipe, step))
        # One weight a patch, shaped to broadcast alike in all back-ends.
        loss = network.train_on_batch(inputs, errors, sample_weight=weights[:, None, None, None])
        on_step(step + 1, float(np.asarray(loss).ravel()[0]))


@dataclass(frozen=True)
class Judgement:
    """One denoised held-out map: errors to the target, and where the FSC to the target falls to 0.5."""

    structure: str
    resolution: float
    error_to_wiener: float
    crossing_wiener: float
    crossing: float


def judge(denoiser: Denoiser, rows: Sequence[PairRow]) -> Iterator[Judgement]:
    """Denoise each pair's map and compare it, and the Wiener map, with the target."""
    for row in rows:
        noisy, target = read_pair(row)
        wiener = weighted(noisy, row)
        result = denoiser(wiener if denoiser.model.card.input == "regularised" else noisy)
        before, after = (float(np.linalg.norm(volume.data - target.data)) for volume in (wiener, result))
        frequency = np.arange(max(target.shape) // 2 + 1) / (max(target.shape) * target.voxel_size)
        crossings = [
            crossing_resolution(frequency, shell_correlation(volume.data, target.data), 0.5)
            for volume in (wiener, result)
        ]
        yield Judgement(row.structure, row.resolution, after / before, crossings[0], crossings[1])


def summarise(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Return medians per bin of nominal resolution: error over the Wiener map's, gain of the 0.5 crossing."""
    table = []
    for low, high in zip(BINS[:-1], BINS[1:], strict=True):
        inside = [item for item in judgements if low <= item.resolution < high]
        if inside:
            ratios = [item.error_to_wiener for item in inside]
            gains = [item.crossing_wiener / item.crossing - 1 for item in inside]
            table.append(
                {
                    "resolution": f"{low:g}-{high:g} A",
                    "maps": len(inside),
                    "median_error_to_wiener": round(float(np.median(ratios)), 3),
                    "worst_error_to_wiener": round(float(np.max(ratios)), 3),
                    "median_crossing_gain_percent": round(100 * float(np.median(gains)), 1),
                }
            )
    return table


def train_files(
    tables: Sequence[str],
    folder: str,
    recipe: Recipe,
    *,
    validation: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    gpu: bool | None = None,
    threads: int | None = None,
    checkpoint_every: int = 250,
    command: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Model:
    """Train on the pairs of `tables` and write a model folder.

    Parameters
    ----------
    tables : sequence of str
        Files pairs.star.
    folder : str
        Gets model.keras and card.json; training.csv and, until the end, the checkpoint.
    validation : str, optional
        pairs.star of structures that are not trained on; judged at the end for the card.
    resume : bool
        Go on from the folder's checkpoint: same recipe, same curve; `steps` alone may differ.
    command : str
        For the card.

    Raises
    ------
    InputError, ModelError
        No pairs, differing pixel sizes, a patch that does not fit; a checkpoint of another recipe.
    """
    target = Path(folder)
    rows = [row for table in tables for row in read_pairs(table)]
    held_out = read_pairs(validation) if validation else []
    shared = {row.structure for row in rows} & {row.structure for row in held_out}
    if shared:
        raise InputError(f"{validation}: {sorted(shared)[0]} is a training structure too; validate on others")
    store = PairStore(rows, recipe.input)
    first = read_pair(rows[0])[0]
    if recipe.patch % 2**recipe.depth or recipe.patch > min(first.shape):
        raise InputError(
            f"patch {recipe.patch}, expected a multiple of {2**recipe.depth} (2**depth) up to the box of "
            f"{min(first.shape)}; change --patch or --depth"
        )
    if (target / "card.json").exists() and not (overwrite or (resume and (target / _STATE).exists())):
        raise InputError(f"{target}: holds a finished model already; add --overwrite to replace it")
    target.mkdir(parents=True, exist_ok=True)
    device_name = device.set_up(gpu, threads)
    network, done, seconds, losses = _start(target, recipe, resume)
    log = _Log(target / _LOG, done)
    begin = time.monotonic() - seconds

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        recent = float(np.mean(losses[-50:]))
        progress(step, recipe.steps, f"loss {recent:.3f}")
        if step % 10 == 0:
            log.write(step, recent, learning_rate(recipe, step))
        if step % checkpoint_every == 0 and step < recipe.steps:
            _checkpoint(target, network, recipe, step, time.monotonic() - begin, losses[-50:])

    train_network(network, store, recipe, first_step=done, on_step=on_step)
    seconds = time.monotonic() - begin
    resolved = [row.resolution for row in rows if np.isfinite(row.resolution)] or [0.0]
    card = ModelCard(
        name=target.resolve().name,
        input=recipe.input,
        pixel_size=first.voxel_size,
        width=recipe.width,
        depth=recipe.depth,
        sha256="",
        resolution_range=(float(min(resolved)), float(max(resolved))),
        training={
            "pairs": len(rows),
            "structures": len({row.structure for row in rows}),
            "methods": sorted({row.method for row in rows}),
            "patch": recipe.patch,
            "batch_size": recipe.batch_size,
            "steps": recipe.steps,
            "learning_rate": recipe.learning_rate,
            "seed": recipe.seed,
            "parameters": int(network.count_params()),
            "seconds": round(seconds),
            "device": f"{device_name}, {platform.machine()}",
            "command": command,
            "cryored": __version__,
        },
    )
    model = save_model(target, network, card)
    if held_out:
        table = summarise(list(judge(Denoiser(model, gpu=gpu, threads=threads), held_out)))
        model = save_model(target, network, _with_evaluation(card, table, held_out))
    for name in (_STATE, "training.json"):
        (target / name).unlink(missing_ok=True)
    return model


def _with_evaluation(card: ModelCard, table: list[dict[str, Any]], rows: Sequence[PairRow]) -> ModelCard:
    structures = sorted({row.structure for row in rows})
    return dataclasses.replace(card, evaluation={"simulated_pairs": table, "structures": structures})


def _start(folder: Path, recipe: Recipe, resume: bool) -> tuple[Any, int, float, list[float]]:
    """Return a compiled network, the steps it has done, the seconds they took and the losses of the last 50."""
    import keras

    if resume and (folder / _STATE).exists():
        state = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        # Another number of steps is allowed: the learning rate goes on along the new, longer or shorter cosine.
        if state["recipe"] != _as_text(recipe):
            raise ModelError(
                f"{folder}: its checkpoint is of another recipe ({state['recipe']}); resume with the same options or "
                "choose another folder"
            )
        network = keras.saving.load_model(folder / _STATE)
        return network, int(state["step"]), float(state["seconds"]), list(state.get("losses", []))
    device.set_seed(recipe.seed)
    network = build_unet(recipe.width, recipe.depth)
    network.compile(optimizer=keras.optimizers.Adam(recipe.learning_rate), loss="mse", jit_compile=False)
    return network, 0, 0.0, []


def _checkpoint(folder: Path, network: Any, recipe: Recipe, step: int, seconds: float, losses: list[float]) -> None:
    partial = folder / f".{_STATE}.keras"
    network.save(partial)
    partial.replace(folder / _STATE)
    state = {"step": step, "seconds": seconds, "recipe": _as_text(recipe), "losses": losses}
    write_text(folder / "training.json", json.dumps(state))


def _as_text(recipe: Recipe) -> str:
    items = dataclasses.asdict(recipe)
    del items["steps"]
    return ", ".join(f"{name}={value}" for name, value in items.items())


class _Log:
    """training.csv: step, loss (mean of 50 steps, 1 = the Wiener map's error) and learning rate."""

    def __init__(self, path: Path, done: int) -> None:
        """Begin a table, or go on after step `done`: what a killed run wrote after its checkpoint comes again."""
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines()[1:] if done and path.exists() else []
        kept = [line for line in lines if int(line.split(",")[0]) <= done]
        path.write_text("\n".join(["step,loss,learning_rate", *kept]) + "\n", encoding="utf-8")

    def write(self, step: int, loss: float, rate: float) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerow([step, f"{loss:.5f}", f"{rate:.3e}"])


def _prefetched(store: PairStore, recipe: Recipe, first_step: int) -> Iterator[tuple[int, tuple[Array, Array, Array]]]:
    """Yield (step, batch) while a thread prepares the next ones."""
    ahead = 4
    with ThreadPoolExecutor(1) as executor:
        pending = [
            executor.submit(draw_batch, store, recipe, step)
            for step in range(first_step, min(first_step + ahead, recipe.steps))
        ]
        for step in range(first_step, recipe.steps):
            batch = pending.pop(0).result()
            if step + ahead < recipe.steps:
                pending.append(executor.submit(draw_batch, store, recipe, step + ahead))
            yield step, batch
