"""Train a prior on pairs of maps, restartably, and judge it on held-out pairs."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored import __version__
from cryored.errors import InputError, ModelError
from cryored.files.mrc import read_volume
from cryored.files.output import check_target
from cryored.prior import device
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import Model, ModelCard, find_model, load_network, save_model, write_card
from cryored.prior.network import build_unet
from cryored.simulation.pair_table import PairRow, read_pairs
from cryored.training.batches import PairStore, check_pairs
from cryored.training.evaluation import judge, summarise
from cryored.training.loop import (
    Log,
    Progress,
    Recipe,
    Scalars,
    State,
    Validation,
    batch_maker,
    build_network,
    check_recipe,
    load_checkpoint,
    run,
)

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.npz"
LOG = "training.csv"
LOGS = "logs"  # TensorBoard's folder


@dataclass(frozen=True)
class TrainOptions:
    """What a training begins from, keeps and writes, beside its recipe.

    Parameters
    ----------
    validation : str, optional
        pairs.star of structures that are not trained on. The step that is best on a few patches of them is kept,
        and judged on all of them for the card; without it the last step is kept.
    start : str, optional
        Name or folder of a model of the same kind, to begin with its weights.
    resume : bool
        Go on from the folder's checkpoint: same recipe, same curve; the number of steps alone may differ.
    skip_bad : bool
        Leave out pairs that are missing or cannot be used.
    cache : float, optional
        GiB of pairs kept in memory; half of the free memory by default.
    checkpoint_every : float
        Minutes.
    plot : str, optional
        PNG of the curves.
    tensorboard : bool
        Write the curves for TensorBoard too, to the folder's logs/.
    overwrite : bool
        Replace a finished model.
    gpu, threads
        See `cryored.prior.device.set_up`.
    command : str
        For the card.
    """

    validation: str | None = None
    start: str | None = None
    resume: bool = False
    skip_bad: bool = False
    cache: float | None = None
    checkpoint_every: float = 5.0
    plot: str | None = None
    tensorboard: bool = False
    overwrite: bool = False
    gpu: bool | None = None
    threads: int | None = None
    command: str = ""


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a training: checked, of one voxel size in angstrom."""

    rows: list[PairRow]
    held_out: list[PairRow]
    voxel_size: float
    left_out: int

    def digest(self) -> str:
        """Return what stands for the pairs that are trained on, wherever their files lie."""
        names = sorted(f"{Path(row.noisy).name} {row.structure} {row.resolution:.4f}" for row in self.rows)
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def train_files(
    tables: Sequence[str],
    folder: str,
    recipe: Recipe,
    options: TrainOptions = TrainOptions(),
    *,
    progress: Progress = lambda done, total, note: None,
) -> Model:
    """Train on the pairs of `tables` and write a model folder.

    Parameters
    ----------
    tables : sequence of str
        Files pairs.star.
    folder : str
        Gets model.keras and card.json; training.csv and, until the end, the checkpoint.
    recipe : Recipe
    options : TrainOptions
    progress : callable
        See `cryored.training.loop.run`.

    Returns
    -------
    Model

    Raises
    ------
    InputError, ModelError, OutputError
        Pairs that cannot be used (`check_pairs`), none to train on or to validate on, validation structures that are
        trained on, a patch that does not fit; a checkpoint of another recipe; a file that cannot be written.
    """
    check_recipe(recipe)
    target = Path(folder)
    goes_on = options.resume and (target / CHECKPOINT).exists()
    pairs = _read_pairs(tables, target, recipe, options, goes_on)
    recipe = recipe.with_steps(len(pairs.rows))
    first = None if options.start is None else _start_model(options.start, recipe, pairs.voxel_size)
    truths = read_truths(pairs.rows) if recipe.synthesised else None
    target.mkdir(parents=True, exist_ok=True)
    device_name = device.set_up(options.gpu, options.threads)
    if recipe.mixed_precision and device_name == "torch, CPU":
        raise ModelError(
            "PyTorch pools no bfloat16 on a CPU; leave --mixed-precision out, or use a GPU or another KERAS_BACKEND"
        )
    if not goes_on:
        if options.resume:
            logger.warning("%s: no checkpoint to go on from; the training begins anew", target)
        (target / CHECKPOINT).unlink(missing_ok=True)  # killed before its first, this one shall not go on from that
    weights, state = _steps(target, recipe, pairs, truths, first, options, goes_on, progress)
    facts = {
        "pairs_left_out": pairs.left_out,
        "start": None if first is None else f"{first.card.name} {first.card.sha256[:12]}",
        "device": f"{device_name}, {platform.machine()}",
        "command": options.command,
        "cryored": __version__,
    }
    model = _save(target, recipe, pairs, weights, _account(recipe, pairs.rows, state) | facts)
    if pairs.held_out:
        model = _judged(model, pairs.held_out, options)
    if options.plot is not None:
        draw_curves(options.plot, target / LOG, state.best_step)
    (target / CHECKPOINT).unlink(missing_ok=True)
    return model


def _read_pairs(tables: Sequence[str], target: Path, recipe: Recipe, options: TrainOptions, goes_on: bool) -> _Pairs:
    """Read and check all pairs, and whether the folder may be written to."""
    if options.plot is not None:
        check_target(options.plot, options.overwrite or goes_on)
    validation, skip_bad = options.validation, options.skip_bad
    listed = [row for table in tables for row in read_pairs(table, keep_missing=skip_bad)]
    held_out = read_pairs(validation, keep_missing=skip_bad) if validation else []
    _check_lists(listed, held_out, ", ".join(tables), validation)
    if (target / "card.json").exists() and not (options.overwrite or goes_on):
        raise InputError(f"{target}: holds a finished model already; add --overwrite to replace it")
    if (target / CHECKPOINT).exists() and not (options.overwrite or goes_on):
        raise InputError(
            f"{target}: holds the checkpoint of a training that was killed; add --resume to go on with it, or "
            "--overwrite to begin anew"
        )
    rows, voxel_size = check_pairs(listed, recipe.patch, skip_bad=skip_bad, threads=options.threads)
    if held_out:
        held_out, other = check_pairs(held_out, recipe.patch, skip_bad=skip_bad, threads=options.threads)
        if other != voxel_size:
            raise InputError(f"{validation}: pixel size {other:g} A, expected {voxel_size:g} A as in {tables[0]}")
    return _Pairs(rows, held_out, voxel_size, len(listed) - len(rows))


def _steps(
    target: Path,
    recipe: Recipe,
    pairs: _Pairs,
    truths: npt.NDArray[np.float32] | None,
    first: Model | None,
    options: TrainOptions,
    goes_on: bool,
    progress: Progress,
) -> tuple[Any, State]:
    """Take all steps; return the weights to keep, and where the training has come to."""
    scalars: Scalars = device.summary_writer(target / LOGS) if options.tensorboard else _nothing
    with device.scope(recipe.batch_size):
        network = build_network(recipe)
        if first is not None:
            network.set_weights(load_network(first).get_weights())
        state = load_checkpoint(target / CHECKPOINT, network, recipe) if goes_on else State()
        digest = pairs.digest()
        if state.pairs not in ("", digest):
            logger.warning("%s: the training goes on with other pairs than it began with", target)
        state = dataclasses.replace(state, pairs=digest)
        names = options.validation or ""
        if state.held_out != names:
            state = dataclasses.replace(state, held_out=names, best_step=0, best=np.inf, best_weights=[])
        synthesis = None
        if truths is not None:
            from cryored.training.device_pairs import Synthesis

            synthesis = Synthesis(truths, pairs.voxel_size, patch=recipe.patch, input=recipe.input, seed=recipe.seed)
        cache = None if options.cache is None else int(options.cache * 2**30)
        run(
            network,
            recipe,
            batch_maker(recipe, PairStore(pairs.rows, recipe.input, cache), synthesis),
            state,
            validation=Validation(pairs.held_out, recipe) if pairs.held_out else None,
            checkpoint=target / CHECKPOINT,
            checkpoint_every=options.checkpoint_every,
            log=Log(target / LOG, state.step),
            scalars=scalars,
            threads=options.threads,
            progress=progress,
        )
        return state.best_weights or network.get_weights(), state


def _save(target: Path, recipe: Recipe, pairs: _Pairs, weights: Any, training: dict[str, Any]) -> Model:
    network = build_unet(recipe.width, recipe.depth)  # in float32, without penalty, for one device
    network.set_weights(weights)
    resolved = [row.resolution for row in pairs.rows if np.isfinite(row.resolution)] or [0.0]
    card = ModelCard(
        name=target.resolve().name,
        input=recipe.input,
        pixel_size=pairs.voxel_size,
        width=recipe.width,
        depth=recipe.depth,
        sha256="",
        resolution_range=(float(min(resolved)), float(max(resolved))),
        training=training | {"parameters": int(network.count_params())},
    )
    return save_model(target, network, card)


def _judged(model: Model, held_out: list[PairRow], options: TrainOptions) -> Model:
    """Write into a model's card how good it is on pairs that it has not seen."""
    denoiser = Denoiser(model, gpu=options.gpu, threads=options.threads)
    table = summarise(list(judge(denoiser, held_out, model.card.input)))
    structures = sorted({row.structure for row in held_out})
    card = dataclasses.replace(model.card, evaluation={"simulated_pairs": table, "structures": structures})
    write_card(model.folder, card)
    return dataclasses.replace(model, card=card)


def _start_model(name: str, recipe: Recipe, voxel_size: float) -> Model:
    """Find a model to begin with; refuse one of another kind."""
    model = find_model(name)
    card = model.card
    if card.knots or card.uncertainty:
        raise ModelError(
            f"{model.folder}: a network that is told the FSC, or tells its uncertainty, as bin/train-prior makes it; "
            "expected one of `cryored train`; start from another"
        )
    found = (card.width, card.depth, card.input, card.pixel_size)
    expected = (recipe.width, recipe.depth, recipe.input, voxel_size)
    if found != expected:
        raise ModelError(
            f"{model.folder}: width {found[0]}, depth {found[1]}, for {found[2]} maps of {found[3]:g} A, "
            f"expected width {expected[0]}, depth {expected[1]}, {expected[2]}, {expected[3]:g} A; start from another"
        )
    return model


def _check_lists(rows: list[PairRow], held_out: list[PairRow], tables: str, validation: str | None) -> None:
    if not rows:
        raise InputError(f"{tables}: no pairs to train on; make some with 'cryored simulate pairs'")
    if validation and not held_out:
        raise InputError(f"{validation}: no pairs to validate on; make some, or leave --validation out")
    shared = {row.structure for row in rows} & {row.structure for row in held_out}
    if shared:
        raise InputError(f"{validation}: {sorted(shared)[0]} is a training structure too; validate on others")


def read_truths(rows: Sequence[PairRow]) -> npt.NDArray[np.float32]:
    """Read the truth maps that the rows name, each once: (n, z, y, x) in the order in which they come.

    Raises
    ------
    InputError
        No row names one; a map that cannot be read, or whose shape or voxel size is not that of the first.
    """
    names = list(dict.fromkeys(row.truth for row in rows if row.truth))
    if not names:
        raise InputError(
            "the tables name no truth maps (_cryoredTruthMap), and --synthesise makes pairs of them; make pairs with "
            "this version, or leave --synthesise out"
        )
    first = read_volume(names[0])
    truths = np.empty((len(names), *first.shape), dtype=np.float32)
    for place, name in zip(truths, names, strict=True):
        volume = read_volume(name)
        if volume.shape != first.shape or volume.voxel_size != first.voxel_size:
            raise InputError(
                f"{name}: {volume.shape} voxels of {volume.voxel_size:g} A, expected those of {names[0]}: "
                f"{first.shape} voxels of {first.voxel_size:g} A"
            )
        place[...] = volume.data
    return truths


def draw_curves(path: str, log: Path, best_step: int = 0) -> None:
    """Draw loss and validation ratio of training.csv against the step, as a PNG.

    Parameters
    ----------
    path : str
    log : Path
    best_step : int
        Marked, unless it is 0.
    """
    from cryored.files.plots import new_figure, save_figure

    with log.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    for name, style in (("loss", {"linewidth": 0.9}), ("validation", {"marker": ".", "markersize": 4})):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.axhline(1, color="0.6", linewidth=0.8, linestyle="--")
    if best_step:
        axes.axvline(best_step, color="C1", linewidth=0.8, linestyle=":", label="kept")
    axes.set(xlabel="step", ylabel="error over the Wiener map's", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, path)


def _account(recipe: Recipe, rows: Sequence[PairRow], state: State) -> dict[str, Any]:
    """Return what the card tells of the training, beside program and machine."""
    options = dataclasses.asdict(recipe)
    for name in ("width", "depth", "input", "epochs", "validate_every"):
        del options[name]
    kept = {"kept_step": state.best_step, "validation_loss_to_wiener": round(state.best, 4)} if state.best_step else {}
    return {
        "pairs": len(rows),
        "structures": len({row.structure for row in rows}),
        "methods": sorted({row.method for row in rows}),
        **options,
        "steps": state.step,
        **kept,
        "seconds": round(state.seconds),
    }


def _nothing(step: int, values: dict[str, float]) -> None:
    """Stand for a TensorBoard log that nobody asked for."""
