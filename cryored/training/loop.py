"""The training loop: recipe, steps, validation on the way, checkpoints that a killed run goes on from, the log."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError, ModelError
from cryored.files.output import append_line, write_text
from cryored.prior import device
from cryored.prior.network import build_unet
from cryored.simulation.pair_table import PairRow
from cryored.training.batches import PairStore, draw_batch, prefetched
from cryored.training.checkpoint import read_checkpoint, write_checkpoint

LOG_COLUMNS = ("step", "loss", "validation", "learning_rate")
_RISE = 50  # steps over which the rate of a cosine schedule rises at the start
_SMOOTHED = 50  # steps whose mean loss is shown
_LOG_EVERY = 10  # steps
_VALIDATION_PATCHES = 32
_VALIDATION_SEED = 0  # whatever the recipe's, so that runs can be compared

Array = npt.NDArray[np.float32]
Tensor = Any  # of the back-end
Batch = tuple[Tensor, Tensor, Tensor]
Progress = Callable[[int, int, str], None]
Scalars = Callable[[int, dict[str, float]], None]


class PatchMaker(Protocol):
    """What makes batches on the device, such as `cryored.training.device_pairs.Synthesis`."""

    def batch(self, step: int, size: int) -> Batch:
        """Return inputs, errors and weights of a step as `draw_batch` does."""


@dataclass(frozen=True)
class Recipe:
    """How to train; by default as Kimanius et al. 2021 did, but for the input.

    Parameters
    ----------
    width, depth : int
        See `build_unet`.
    patch : int
        Edge of the training patches in voxels, a multiple of ``2**depth``.
    batch_size : int
        Patches of a step.
    epochs : int
        Passes over the pairs with one patch a pair.
    steps : int, optional
        Instead of epochs.
    learning_rate : float
        Of Adam.
    schedule : {"constant", "cosine"}
        See `learning_rate`.
    loss : {"mse", "l1"}
        Squared or absolute error, over the (root) mean square of the whole Wiener map's error.
    l2 : float
        Adds `l2` times the sum of squares of the kernels to the loss.
    mixed_precision : bool
        Compute in bfloat16; weights and sums stay float32.
    input : {"regularised", "unregularised"}
        The map that the network sees: the noisy map weighted by its FSC, or as it is.
    synthesise : float
        Share of each batch, 0 to 1, that the device makes of truths; rounded to patches.
    validate_every : int
        Steps between validations.
    seed : int
    """

    width: int = 4
    depth: int = 5
    patch: int = 64
    batch_size: int = 10
    epochs: int = 27
    steps: int | None = None
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    loss: Literal["mse", "l1"] = "mse"
    l2: float = 1e-6
    mixed_precision: bool = False
    input: Literal["regularised", "unregularised"] = "regularised"
    synthesise: float = 0.0
    validate_every: int = 100
    seed: int = 0

    @property
    def synthesised(self) -> int:
        """Patches of a batch that the device makes."""
        return round(self.synthesise * self.batch_size)

    def with_steps(self, pairs: int) -> Recipe:
        """Return the recipe with the number of steps that its epochs are for so many pairs."""
        if self.steps is not None:
            return self
        return dataclasses.replace(self, steps=math.ceil(self.epochs * pairs / self.batch_size))

    def as_text(self) -> str:
        """Return what a run that goes on must have in common; how long it is may change."""
        items = dataclasses.asdict(self)
        del items["steps"], items["epochs"]
        return ", ".join(f"{name}={value}" for name, value in items.items())


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step: the same throughout, or a short rise and then a cosine down to 0."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    rise = min(1.0, (step + 1) / _RISE)
    return recipe.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / (recipe.steps or 1)))


def build_network(recipe: Recipe) -> Any:
    """Return the network of a recipe, compiled for training, inside `cryored.prior.device.scope` where that is used."""
    import keras

    device.set_seed(recipe.seed)
    network = build_unet(
        recipe.width,
        recipe.depth,
        l2=recipe.l2,
        dtype="mixed_bfloat16" if recipe.mixed_precision else "float32",
        synchronized=device.needs_synchronising(),
    )
    network.compile(
        optimizer=keras.optimizers.Adam(recipe.learning_rate),
        loss={"mse": "mse", "l1": "mae"}[recipe.loss],
        # JAX is nothing without its compiler; XLA under TensorFlow takes minutes, and is slower on a CPU.
        jit_compile=keras.backend.backend() == "jax",
    )
    network.optimizer.build(network.trainable_variables)
    if device.needs_synchronising():
        # Keras builds loss and metrics at the first batch, and cannot from one that is shared out already.
        edge = 2**recipe.depth
        nothing = np.zeros((1, edge, edge, edge, 1), dtype=np.float32)
        network.test_on_batch(nothing, nothing, sample_weight=np.ones((1, 1, 1, 1), dtype=np.float32))
    return network


def batch_maker(recipe: Recipe, store: PairStore, synthesis: PatchMaker | None = None) -> Callable[[int], Batch]:
    """Return the function that makes the batch of a step on the device: stored patches, then synthesised ones."""
    from keras import ops

    made = recipe.synthesised if synthesis else 0

    def make(step: int) -> Batch:
        parts: list[Batch] = []
        if made < recipe.batch_size:
            parts.append(draw_batch(store, step, recipe.batch_size - made, patch=recipe.patch, seed=recipe.seed))
        if synthesis and made:
            parts.append(synthesis.batch(step, made))
        inputs, errors, weights = (
            ops.concatenate([ops.convert_to_tensor(part, dtype="float32") for part in kind])
            for kind in zip(*parts, strict=True)
        )
        # One weight a patch, shaped to broadcast alike in all back-ends.
        weights = ops.reshape(ops.sqrt(weights) if recipe.loss == "l1" else weights, (-1, 1, 1, 1))
        return inputs, errors, weights

    return make


def train_step(network: Any, recipe: Recipe, step: int, batch: Batch) -> float:
    """Take one step of Adam; return the loss, which is 1 for a batch of Wiener maps left as they are."""
    network.optimizer.learning_rate = learning_rate(recipe, step)
    inputs, errors, weights = device.share_out(batch)
    loss = network.train_on_batch(inputs, errors, sample_weight=weights)
    return float(np.asarray(loss).ravel()[0])


class Validation:
    """A fixed set of patches of held-out pairs, and the loss on them over that of the Wiener map.

    Parameters
    ----------
    rows : sequence of PairRow
        Checked already (`check_pairs`). Their patches are drawn as in training, the same ones whatever the seed.
    recipe : Recipe
    """

    def __init__(self, rows: Sequence[PairRow], recipe: Recipe) -> None:
        self._power = 1 if recipe.loss == "l1" else 2
        steps = range(math.ceil(_VALIDATION_PATCHES / recipe.batch_size))

        def draw(kind: Literal["regularised", "unregularised"]) -> list[tuple[Array, Array, Array]]:
            store = PairStore(rows, kind, cache=0)
            return [
                draw_batch(store, step, recipe.batch_size, patch=recipe.patch, seed=_VALIDATION_SEED) for step in steps
            ]

        self._batches = draw(recipe.input)
        # The same patches of the Wiener map: on another scale, but the weights are in the same units as the errors.
        wiener = self._batches if recipe.input == "regularised" else draw("regularised")
        self._wiener = sum(self._loss(errors, weights) for _, errors, weights in wiener)

    def __call__(self, network: Any) -> float:
        """Return the ratio: below 1 the network improves on the best linear filter."""
        total = 0.0
        for inputs, errors, weights in self._batches:
            (shared,) = device.share_out((inputs,))
            total += self._loss(errors - np.asarray(network.predict_on_batch(shared), dtype=np.float32), weights)
        return total / self._wiener if self._wiener else 1.0

    def _loss(self, errors: Array, weights: Array) -> float:
        means = np.mean(np.abs(errors) ** self._power, axis=(1, 2, 3, 4), dtype=np.float64)
        return float(np.sum(means * weights ** (self._power / 2)))


@dataclass
class State:
    """How far a run is, beside the network's and the optimiser's weights.

    Parameters
    ----------
    step : int
        Steps done.
    seconds : float
        That they took.
    losses : list of float
        Of the last steps.
    pairs : str
        Stands for the pairs that are trained on.
    held_out : str
        Names the validation pairs: the best of others does not count.
    best_step, best : int, float
        Where the validation was best, and how good.
    best_weights : list of ndarray
        The network's there.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    pairs: str = ""
    held_out: str = ""
    best_step: int = 0
    best: float = math.inf
    best_weights: list[Array] = field(default_factory=list)

    @property
    def recent_loss(self) -> float:
        """Mean over the last steps."""
        return float(np.mean(self.losses[-_SMOOTHED:]))


def save_checkpoint(path: Path, network: Any, recipe: Recipe, state: State) -> None:
    """Write all that a run needs to go on, as one file, whole: what is there stays if the disk is full.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    about = {name: value for name, value in vars(state).items() if name != "best_weights"}
    about |= {"recipe": recipe.as_text(), "losses": state.losses[-_SMOOTHED:]}
    write_checkpoint(path, network, about, best=state.best_weights)


def load_checkpoint(path: Path, network: Any, recipe: Recipe) -> State:
    """Give a network of `build_network` the weights of a checkpoint, and return the rest.

    Raises
    ------
    ModelError
        The checkpoint is damaged, or of another recipe.
    """
    checkpoint = read_checkpoint(path, "best")
    about = checkpoint.about
    found = about.pop("recipe")
    if found != recipe.as_text():
        raise ModelError(
            f"{path.parent}: its checkpoint is of another recipe ({found}); resume with the same options or choose "
            "another folder"
        )
    checkpoint.restore(network)
    return State(**about, best_weights=checkpoint.groups["best"])


class Log:
    """training.csv: step, loss (mean of 50 steps, 1 = the Wiener map's error), validation ratio and learning rate.

    Parameters
    ----------
    path : Path
    done : int
        Go on after this step: what a killed run wrote after its checkpoint comes again.
    """

    def __init__(self, path: Path, done: int) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines()[1:] if done and path.exists() else []
        kept = [line for line in lines if int(line.split(",")[0]) <= done]
        write_text(path, "\n".join([",".join(LOG_COLUMNS), *kept]) + "\n")

    def write(self, step: int, loss: float, validation: float | None, rate: float) -> None:
        """Add a row."""
        shown = "" if validation is None else f"{validation:.5f}"
        append_line(self._path, f"{step},{loss:.5f},{shown},{rate:.3e}")


def run(
    network: Any,
    recipe: Recipe,
    make: Callable[[int], Batch],
    state: State,
    *,
    validation: Validation | None = None,
    checkpoint: Path,
    checkpoint_every: float,
    log: Log,
    scalars: Scalars = lambda step, values: None,
    threads: int | None = None,
    progress: Progress = lambda done, total, note: None,
) -> None:
    """Take the steps that are left, and change `state` accordingly.

    Parameters
    ----------
    network : keras.Model
        Of `build_network`.
    recipe : Recipe
        With steps.
    make : callable
        Of `batch_maker`.
    state : State
    validation : Validation, optional
        Its best step's weights are kept.
    checkpoint : Path
        File of the checkpoint.
    checkpoint_every : float
        Minutes.
    log, scalars : Log, callable
        Get the curves.
    threads : int, optional
        That prepare batches.
    progress : callable
        Is told the steps done, their number and a note with loss, validation ratio and time left.

    Raises
    ------
    ModelError
        The loss is no longer finite.
    OutputError
        A checkpoint cannot be written; the last one stays.
    """
    steps = recipe.steps or 0
    first, begin = state.step, time.monotonic()
    before, saved = state.seconds, begin
    shown = ""
    with closing(prefetched(make, range(first, steps), threads)) as batches:
        for index, batch in batches:
            loss = train_step(network, recipe, index, batch)
            if not math.isfinite(loss):
                instead = "leave out --mixed-precision" if recipe.mixed_precision else "look for a pair out of scale"
                raise ModelError(f"the loss is {loss} at step {index + 1}; lower --learning-rate, or {instead}")
            state.step = index + 1
            state.losses = [*state.losses[1 - _SMOOTHED :], loss]
            ratio = None
            if validation and (state.step % recipe.validate_every == 0 or state.step == steps):
                ratio = validation(network)
                if ratio < state.best:
                    state.best_step, state.best, state.best_weights = state.step, ratio, network.get_weights()
                shown = f", validation {ratio:.3f}, best {state.best:.3f} at step {state.best_step}"
            if state.step % _LOG_EVERY == 0 or ratio is not None:
                rate = learning_rate(recipe, index)
                log.write(state.step, state.recent_loss, ratio, rate)
                scalars(state.step, {"loss": state.recent_loss, "learning_rate": rate})
                if ratio is not None:
                    scalars(state.step, {"validation": ratio})
            now = time.monotonic()
            state.seconds = before + now - begin
            left = (now - begin) / (state.step - first) * (steps - state.step)
            progress(state.step, steps, f"loss {state.recent_loss:.3f}{shown}, {_duration(left)} left")
            if now - saved >= 60 * checkpoint_every or state.step == steps:
                save_checkpoint(checkpoint, network, recipe, state)
                saved = now


def _duration(seconds: float) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that is at odds with itself.

    Raises
    ------
    InputError
        A patch that the network cannot halve often enough; a share of a batch that is no patch.
    """
    if recipe.patch % 2**recipe.depth:
        raise InputError(
            f"patch {recipe.patch}, expected a multiple of {2**recipe.depth} (2**depth); change --patch or --depth"
        )
    if recipe.synthesise and not recipe.synthesised:
        raise InputError(
            f"a share of {recipe.synthesise:g} of {recipe.batch_size} patches is less than one, expected at least "
            f"{1 / recipe.batch_size:g}; raise --synthesise or --batch-size"
        )
