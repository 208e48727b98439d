"""Train a prior from atomic models alone, on one device, within a budget of minutes: what `bin/train-prior` does.

The half-maps of refinements (`cryored.training.samples`) are kept in a pool on the device, and the network is trained
on crops of it. The time is shared out between refining and training, so the pool is renewed while the network learns.

The network is told the half-maps' FSC and estimates the truth in the shells that the data determine at all. A second
output is the logarithm of the variance of what is left; it learns from the squared error as it stands, so that the
estimate itself remains that of least squares.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryored import __version__
from cryored.errors import InputError, ModelError
from cryored.files.output import append_line, write_text
from cryored.prior import device
from cryored.prior.models import Model, ModelCard, save_model
from cryored.prior.network import LOG_VARIANCE, build_unet, scaled
from cryored.simulation.features import Features
from cryored.training.checkpoint import NETWORK, read_checkpoint, write_checkpoint
from cryored.training.plan import Plan
from cryored.training.samples import Densities, Sample, Samples, Tensor, draw_crops

logger = logging.getLogger(__name__)

_RISE = 0.02  # of the time, over which the learning rate rises
_FEWEST = 16  # half-maps in the pool before the first step
_VALIDATION_TIME = 0.1  # share of a run in which validation data may be made
REPORT = 20.0  # seconds between lines of the log
CHECKPOINT, LOG = "checkpoint.npz", "training.csv"


@dataclass
class State:
    """How far the training is."""

    step: int = 0
    seconds: float = 0.0
    refinements: int = 0
    samples: int = 0
    losses: list[float] = field(default_factory=list)


def loss_of(calibration: float) -> Any:
    """Return the loss: squared error over the regularised map's, and the likelihood of the variance."""

    def loss(true: Tensor, predicted: Tensor) -> Tensor:
        from keras import ops

        square = ops.square(true[..., 0] - predicted[..., 0])
        logarithm = ops.clip(predicted[..., 1], *LOG_VARIANCE)
        likelihood = logarithm + ops.stop_gradient(square) * ops.exp(-logarithm)
        return ops.mean(square * true[..., 1]) + calibration / 2 * ops.mean(likelihood)

    return loss


def build(plan: Plan) -> Any:
    """Return the network, compiled for training."""
    import keras

    device.set_seed(plan.seed)
    network = build_unet(
        plan.width,
        plan.depth,
        dtype="mixed_bfloat16" if plan.mixed_precision else "float32",
        knots=plan.knots,
        uncertainty=True,
    )
    if keras.backend.backend() == "torch":
        import torch

        torch.backends.cudnn.benchmark = True  # the shapes stay the same
        torch.set_float32_matmul_precision("high")
    network.compile(
        optimizer=keras.optimizers.Adam(plan.learning_rate, clipnorm=1.0),
        loss=loss_of(plan.calibration),
        jit_compile=keras.backend.backend() == "jax",
    )
    network.optimizer.build(network.trainable_variables)
    return network


def learning_rate(plan: Plan, done: float, first: float = 0.0) -> float:
    """Return the rate at a share of the time; it rises from the share at which the first step was taken."""
    done = min(max(done, 0.0), 1.0)
    return plan.learning_rate * min(1.0, (done - first + 1e-4) / _RISE) * 0.5 * (1 + math.cos(math.pi * done)) + 1e-7


def save(folder: Path, network: Any, state: State, plan: Plan) -> None:
    """Write weights, optimiser and state as one file, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in vars(state).items() if name != "losses"}
    write_checkpoint(folder / CHECKPOINT, network, {"plan": asdict(plan), **about})


def load(folder: Path, network: Any, plan: Plan) -> State:
    """Give a network what a folder holds.

    Raises
    ------
    InputError
        What was trained there is of another plan; only the minutes may differ.
    ModelError
        It is damaged.
    """
    path = folder / CHECKPOINT
    checkpoint = read_checkpoint(path)
    about = checkpoint.about
    before, now = about.pop("plan"), asdict(plan)
    for name in now.keys() - {"minutes"}:
        if before.get(name) != now[name]:
            raise InputError(
                f"{path}: trained with {name} {before.get(name)}, expected {now[name]} as asked; ask for the same, or "
                "give another folder"
            )
    checkpoint.restore(network)
    return State(**about)


def validate(network: Any, samples: Sequence[Sample], plan: Plan) -> tuple[float, float]:
    """Return the squared error over the regularised map's, and that error over the variance (1 is right)."""
    from keras import ops

    rng = np.random.default_rng(0)
    errors, over = [], []
    for i in range(0, len(samples), plan.batch):
        maps, told, true = draw_crops(samples, plan, rng, min(plan.batch, len(samples) - i), first=i)
        predicted = ops.convert_to_numpy(network.predict_on_batch([maps, told])).astype(np.float32)
        true = ops.convert_to_numpy(true)
        left = np.square(true[..., 0] - predicted[..., 0])
        errors.append(left.sum() / np.square(true[..., 0]).sum())
        over.append(np.mean(left) / np.mean(np.exp(predicted[..., 1])))
    return float(np.mean(errors)), float(np.mean(over))


class _Run:
    """One run of a training: the network, the pool of half-maps, and how the time has been spent.

    Parameters
    ----------
    plan : Plan
    network
        As `build` makes it.
    state : State
        Kept up to date.
    source : Samples
    held_out : sequence of Sample
    targets : sequence of Path
        Folders that get what was learnt.
    start : float
        When the run began, by the monotonic clock.
    """

    def __init__(
        self,
        plan: Plan,
        network: Any,
        state: State,
        source: Samples,
        held_out: Sequence[Sample],
        targets: Sequence[Path],
        start: float,
    ) -> None:
        self._plan, self._network, self._state = plan, network, state
        self._source, self._stream = source, source.stream()
        self._held_out, self._targets = held_out, targets
        self._pool: deque[Sample] = deque(maxlen=plan.pool)
        self._rng = np.random.default_rng([plan.seed, state.step])
        self._refining, self._training = 0.0, 0.0
        self._start, self._seconds_before, self._refinements_before = start, state.seconds, state.refinements
        self._told_at = time.monotonic()
        self._first = 0.0  # share of the time at which the first step was taken; a run that goes on has risen
        self._log = targets[0] / LOG
        if not self._log.exists():
            self._log.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._log, "step,seconds,loss,validation,variance,learning_rate,half_maps\n")

    def go_on(self) -> None:
        """Take a step, or refine where the pool is due for it; report now and then."""
        begin = time.monotonic()
        share = self._refining / max(self._refining + self._training, 1e-9)
        if len(self._pool) < _FEWEST or share < self._plan.refining:
            new = next(self._stream)
            self._pool.extend(new)
            self._state.samples += len(new)
            self._refining += time.monotonic() - begin
            return
        rate = self._step()
        self._training += time.monotonic() - begin
        if begin - self._told_at > REPORT:
            self._told_at = begin
            self._report(rate)
            self.save()

    def _step(self) -> float:
        """Take a step of the optimiser; return its learning rate."""
        plan, state = self._plan, self._state
        state.seconds = self._seconds_before + time.monotonic() - self._start
        done = state.seconds / (60 * plan.minutes)
        if state.step == 0:
            self._first = done
        rate = learning_rate(plan, done, self._first)
        self._network.optimizer.learning_rate = rate
        maps, told, true = draw_crops(self._pool, plan, self._rng, plan.batch)
        found = self._network.train_on_batch([maps, told], true)
        loss = float(np.asarray(found if np.ndim(found) == 0 else found[0]))
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss is {loss} at step {state.step + 1}; begin anew in another folder, with --full-precision or "
                "a smaller --learning-rate"
            )
        state.step += 1
        state.losses = [*state.losses[-99:], loss]
        return rate

    def _report(self, rate: float) -> None:
        state, pool = self._state, len(self._pool)
        ratio, variance = math.nan, math.nan
        if self._held_out:
            ratio, variance = validate(self._network, self._held_out, self._plan)
        loss = np.mean(state.losses)
        row = f"{state.step},{state.seconds:.0f},{loss:.5f},{ratio:.5f},{variance:.4f},{rate:.3e},{pool}"
        append_line(self._log, row)
        logger.info(
            "%.0f s, step %d: loss %.4f, validation %.4f, variance %.2f; %d half-maps of %d refinements, "
            "refining %.0f s, training %.0f s",
            state.seconds,
            state.step,
            loss,
            ratio,
            variance,
            pool,
            self._refinements_before + self._source.refinements,
            self._refining,
            self._training,
        )

    def save(self) -> None:
        """Write what was learnt, and the log, to every folder."""
        self._state.seconds = self._seconds_before + time.monotonic() - self._start
        self._state.refinements = self._refinements_before + self._source.refinements
        for target in self._targets:
            save(target, self._network, self._state, self._plan)
            if target / LOG != self._log:
                write_text(target / LOG, self._log.read_text(encoding="utf-8"))


def _hold_out(validation: Sequence[str], plan: Plan, number: int, processes: int, seconds: float) -> list[Sample]:
    """Make half-maps to validate on, as many as the time allows."""
    if not validation:
        return []
    begin, found = time.monotonic(), list[Sample]()
    with closing(Densities(validation, plan, processes, Features(bfactor=40.0))) as densities:
        stream = Samples(plan, densities.stream(), seed=1, plain=True).stream()
        while len(found) < number and time.monotonic() - begin < seconds:
            found.extend(next(stream))
    logger.info("%.0f s: %d half-maps to validate on", time.monotonic() - begin, len(found))
    return found


def train(
    structures: Sequence[str],
    validation: Sequence[str],
    folder: Path,
    plan: Plan,
    *,
    seconds: float,
    processes: int,
    validation_samples: int = 40,
    outputs: Sequence[Path] = (),
) -> State:
    """Train for some seconds, from where the folder says that the last run ended.

    Parameters
    ----------
    structures, validation : sequence of str
        Atomic models to train on, and others.
    folder : Path
        Gets checkpoint and log; also copied to each of `outputs`.
    plan : Plan
    seconds : float
        Of this run, with what comes before its first step.
    processes : int
        On the host, that make densities.

    Raises
    ------
    InputError
        The folder holds what was trained otherwise.
    ModelError
        What it holds is damaged, or the loss is no number.
    """
    begin = time.monotonic()
    if (folder / "state.json").exists() and not (folder / CHECKPOINT).exists():
        raise InputError(
            f"{folder}: the state of a training by an earlier cryored; go on with that, or give another folder"
        )
    network = build(plan)
    state = load(folder, network, plan) if (folder / CHECKPOINT).exists() else State()
    with closing(Densities(structures, plan, processes)) as densities:
        held_out = _hold_out(validation, plan, validation_samples, max(1, processes // 4), _VALIDATION_TIME * seconds)
        source = Samples(plan, densities.stream(state.refinements), seed=plan.seed + 1000 * (state.step + 1))
        run = _Run(plan, network, state, source, held_out, [folder, *outputs], begin)
        first = state.step
        while time.monotonic() - begin < seconds or state.step == first:
            run.go_on()
        run.save()
    return state


def finish(folder: Path, plan: Plan, target: Path, structures: int, command: str, scale: float = 1.0) -> Model:
    """Write the model folder of what was trained: in float32, for any engine; see `cryored.prior.network.scaled`."""
    network = build_unet(plan.width, plan.depth, knots=plan.knots, uncertainty=True)
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    about = checkpoint.about
    network.set_weights(checkpoint.groups[NETWORK])
    if scale != 1.0:
        network = scaled(network, scale)
    card = ModelCard(
        name=target.resolve().name,
        input="regularised",
        pixel_size=plan.pixel_size,
        width=plan.width,
        depth=plan.depth,
        sha256="",
        resolution_range=(2 * plan.pixel_size, 20.0),
        knots=plan.knots,
        uncertainty=True,
        target="truth",
        training={
            **about["plan"],
            "structures": structures,
            **{name: about[name] for name in ("step", "seconds", "refinements", "samples")},
            "scale": scale,
            "parameters": int(network.count_params()),
            "command": command,
            "cryored": __version__,
        },
    )
    target.mkdir(parents=True, exist_ok=True)
    return save_model(target, network, card)
