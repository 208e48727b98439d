"""What a prior is trained on from atomic models: half-maps of refinements in miniature, and crops of them.

Processes on the host make densities with the features of real maps (`cryored.simulation.features`); the device
refines simulated particles of them (`cryored.training.device_refinements`).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.maps.network_scale import standard_of
from cryored.prior.denoiser import cube_rotations
from cryored.prior.network import condition
from cryored.reconstruction.projection import EVEN
from cryored.simulation.features import Features, draw_features, draw_views, featured_map
from cryored.simulation.gaussian import turned
from cryored.simulation.intermediates import Experiment
from cryored.simulation.structure import Atoms, read_atoms
from cryored.training.batches import GREY_SCALE
from cryored.training.device_refinements import Iteration, Refiner
from cryored.training.plan import Plan

logger = logging.getLogger(__name__)

_RESOLUTION = 3.0  # angstrom, of the atoms' Gaussians
_DETERMINED = 0.143  # half-map FSC from which on a shell of the truth counts in full
_UNKNOWN = 0.1  # share of the half-maps whose FSC the network is not told
_MASKED, _SHARPENED = 0.2, 0.2  # shares of the half-maps
_SUBSTITUTED = 0.15  # share of the half-maps with noise for signal beyond a shell, which the FSC does not tell
_FAILURES = 20  # of each structure, none of which has worked, after which none will
_FEWEST_SHELLS = 3  # that keep their signal

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tensor = Any  # of the back-end


@dataclass(frozen=True)
class Sample:
    """A half-map as the network sees it, on the device.

    Parameters
    ----------
    shown, error : (n, n, n) float16
        The standardised map, and that minus its target.
    told : (knots + 1,) float32
    weight : float
        One over the mean squared error of the regularised map, in these units.
    label : str
        Structure, iteration and resolution.
    """

    shown: Tensor
    error: Tensor
    told: Array
    weight: float
    label: str


def density(name: str, box: int, pixel_size: float, features: Features | None, seed: int) -> tuple[Array, float, Atoms]:
    """Make one density; return it, the diameter of the molecule in angstrom, and its atoms as they are placed."""
    rng = np.random.default_rng(seed)
    atoms = turned(_atoms(name), box * pixel_size, rng)
    drawn = draw_features(rng=rng) if features is None else features
    diameter = 2 * float(np.linalg.norm(atoms.positions, axis=1).max()) + 10.0
    return featured_map(atoms, box, pixel_size, _RESOLUTION, drawn, rng=rng), diameter, atoms


_known: dict[str, Atoms] = {}


def _atoms(name: str) -> Atoms:
    if name not in _known:
        _known[name] = read_atoms(name)
    return _known[name]


class Densities:
    """Densities from processes on the host, in the order of their seeds."""

    def __init__(self, names: Sequence[str], plan: Plan, processes: int, features: Features | None = None) -> None:
        self._names, self._plan, self._features = list(names), plan, features
        # A fresh interpreter each: a process that holds a GPU must not be copied.
        self._executor = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
        self._pending: deque[Future[tuple[Array, float, Atoms]]] = deque()
        self._waiting: deque[str] = deque()
        self._ahead = 2 * processes

    def stream(self, first: int = 0) -> Iterator[tuple[str, Array, float]]:
        """Yield structure, density and diameter, without end; a structure that cannot be used is left out.

        Raises
        ------
        InputError
            None can be used.
        """
        plan = self._plan
        number = first
        worked: set[str] = set()
        failed: Counter[str] = Counter()
        while True:
            while len(self._pending) < self._ahead:
                rng = np.random.default_rng([plan.seed, number])
                name = self._names[int(rng.integers(len(self._names)))]
                seed = int(rng.integers(2**31))
                self._pending.append(
                    self._executor.submit(density, name, plan.box, plan.pixel_size, self._features, seed)
                )
                self._waiting.append(name)
                number += 1
            future, name = self._pending.popleft(), self._waiting.popleft()
            try:
                data, diameter, _ = future.result()
            except ValueError as error:
                failed[name] += 1
                if failed[name] == 1 and name not in worked:
                    logger.warning("%s: left out (%s)", name, error)
                if not worked and all(failed[one] >= _FAILURES for one in self._names):
                    raise InputError(f"none of {len(failed)} structures can be used; the last: {error}") from error
                continue
            worked.add(name)
            yield Path(name).name.split(".")[0], data, diameter

    def close(self) -> None:
        """End the processes."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def draw_experiment(*, rng: np.random.Generator) -> Experiment:
    """Draw a data set: from what stays at 20 A to what reaches Nyquist."""
    return Experiment(
        number=int(np.exp(rng.uniform(np.log(150), np.log(700)))),
        snr=float(np.exp(rng.uniform(np.log(0.004), np.log(0.5)))),
        angle=float(rng.uniform(3.0, 20.0)),
        shift=float(rng.uniform(0.0, 1.5)),
        ini_high=float(rng.uniform(20.0, 45.0)),
    )


def determined_share(fsc: Doubles) -> Doubles:
    """Return what of the truth in each shell is the target, by the half-maps' FSC: 1 where the data determine it."""
    smooth = np.convolve(np.pad(np.clip(fsc, 0, 1), 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
    return np.clip(smooth / _DETERMINED, 0.0, 1.0) * (fsc != 0)


class Samples:
    """Samples of refinements, without end.

    Parameters
    ----------
    plan : Plan
    densities : iterator
        Of `Densities.stream`.
    seed : int
    plain : bool
        Nothing that is drawn for robustness: for validation.
    """

    def __init__(
        self, plan: Plan, densities: Iterator[tuple[str, Array, float]], seed: int, plain: bool = False
    ) -> None:
        self._plan, self._densities, self._plain = plan, densities, plain
        self._refiner = Refiner(plan.box, plan.pixel_size)
        self._rng = np.random.default_rng(seed)
        self._frequency = np.arange(plan.box // 2 + 1) / (plan.box * plan.pixel_size)
        self.refinements = 0

    def stream(self) -> Iterator[list[Sample]]:
        """Yield both halves of an iteration at a time."""
        from keras import ops

        before: Tensor = None
        for name, data, diameter in self._densities:
            truth = ops.convert_to_tensor(data)
            start = truth if before is None or self._plain else self._wrong_start(truth, before)
            views = EVEN if self._plain else draw_views(rng=self._rng)
            experiment = draw_experiment(rng=self._rng)
            self.refinements += 1
            for iteration in self._refiner.run(truth, start, experiment, diameter=diameter, views=views, rng=self._rng):
                if np.isfinite(iteration.resolution):
                    yield self._samples(name, truth, iteration)
            before = truth

    def _wrong_start(self, truth: Tensor, other: Tensor) -> Tensor:
        """Return a first reference that is not the truth: mixed with another molecule, or of uneven density."""
        from keras import ops

        kind = self._rng.random()
        if kind < 0.5:
            return truth
        if kind < 0.75:
            share = float(self._rng.uniform(0.1, 0.5))
            level = float(ops.sum(truth) / ops.maximum(ops.sum(other), 1e-6))
            return truth * (1 - share) + other * (share * level)
        box = self._plan.box
        field = ops.convert_to_tensor(self._rng.standard_normal((box,) * 3, dtype=np.float32))
        smooth = self._refiner.filtered(field, np.exp(-((self._frequency * 40.0) ** 2)))
        deviation = ops.sqrt(ops.mean(ops.square(smooth)))
        return truth * (1 + 0.6 * smooth / deviation)

    def _samples(self, name: str, truth: Tensor, iteration: Iteration) -> list[Sample]:
        fsc = iteration.fsc
        determined = determined_share(fsc)
        result = []
        for half in iteration.halves:
            rng = self._rng
            # What the molecule's amplitudes are multiplied by after the reconstruction.
            bfactor = 0.0
            if not self._plain and rng.random() < _SHARPENED:
                bfactor = float(rng.uniform(-60, 60))
            decay = np.exp(-bfactor / 4 * self._frequency**2)
            if not self._plain and rng.random() < 0.3:
                shown = self._refiner.filtered(half.unregularised, np.clip(fsc, 0, 1) * decay)
            elif bfactor:
                shown = self._refiner.filtered(half.regularised, decay)
            else:
                shown = half.regularised
            known = determined
            if not self._plain and rng.random() < _SUBSTITUTED:
                shown, known = self._substituted(shown, determined)
            target = self._refiner.filtered(truth, known * decay)
            if not self._plain and rng.random() < _MASKED:
                shown = shown * self._mask(truth)
            told = condition(self._told(fsc), self._frequency, self._plan.pixel_size, self._plan.knots)
            label = f"{name} it{iteration.number:03d} {iteration.resolution:.1f}"
            sample = self._sample(shown, target, told, label)
            if sample is not None:
                result.append(sample)
        return result

    def _substituted(self, shown: Tensor, determined: Doubles) -> tuple[Tensor, Doubles]:
        """Replace the signal by noise beyond a shell: `cryored.assessment.noise_substitution`, on the device.

        The network learns to look for the signal and not to believe the FSC alone: there is no target there.
        """
        from keras import ops

        last = int(np.flatnonzero(determined)[-1]) if determined.any() else 0
        if last < _FEWEST_SHELLS:
            return shown, determined
        start = int(self._rng.integers(_FEWEST_SHELLS, last + 1))
        beyond = self._refiner.by_shell(np.arange(len(determined)) >= start)[:, None]
        box = self._plan.box
        transform = self._refiner.forward(shown)
        white = self._rng.standard_normal((box,) * 3, dtype=np.float32)
        noise = self._refiner.forward(ops.convert_to_tensor(white))
        phase = noise / ops.sqrt(ops.sum(ops.square(noise), axis=1, keepdims=True) + 1e-20)
        amplitude = ops.sqrt(ops.sum(ops.square(transform), axis=1, keepdims=True))
        mixed = transform + beyond * (amplitude * phase - transform)
        return self._refiner.inverse(mixed), determined * (np.arange(len(determined)) < start)

    def _told(self, fsc: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """Return the FSC, not always exactly that of the map, or None."""
        if self._plain:
            return fsc
        if self._rng.random() < _UNKNOWN:
            return None
        stretched = np.arange(len(fsc)) * self._rng.uniform(0.93, 1.07)
        return np.interp(stretched, np.arange(len(fsc)), fsc, right=0.0)

    def _mask(self, truth: Tensor) -> Tensor:
        """Return a soft mask of the molecule, wide as a user's or tight."""
        from keras import ops

        blurred = self._refiner.filtered(truth, np.exp(-((self._frequency * self._rng.uniform(12, 25)) ** 2)))
        level = ops.max(blurred) * float(self._rng.uniform(0.03, 0.12))
        return ops.clip(blurred / level - 0.5, 0.0, 1.0)

    def _sample(self, shown: Tensor, target: Tensor, told: Array, label: str) -> Sample | None:
        from keras import ops

        # As `cryored.maps.network_scale.standard_of` has it; the border is solvent.
        standard = standard_of(ops.convert_to_numpy(shown), self._plan.pixel_size)
        if standard.deviation == 0:
            return None
        error = (shown - target) / standard.deviation
        weight = 1 / max(float(ops.mean(ops.square(error))), 1e-6)
        seen = (shown - standard.level) / standard.deviation
        return Sample(ops.cast(seen, "float16"), ops.cast(error, "float16"), told, weight, label)


def draw_crops(
    samples: Sequence[Sample], plan: Plan, rng: np.random.Generator, number: int, first: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps (b, c, c, c, 1), what is told (b, knots + 1), and errors and weights (b, c, c, c, 2).

    With `first` the crops are the middles of the samples from there on, unturned.
    """
    from keras import ops

    rotations = cube_rotations()
    maps: list[Tensor] = []
    errors: list[Tensor] = []
    told = []
    for i in range(number):
        sample = samples[int(rng.integers(len(samples)))] if first is None else samples[first + i]
        corner = rng.integers(plan.box - plan.crop + 1, size=3) if first is None else [(plan.box - plan.crop) // 2] * 3
        axes, signs = rotations[int(rng.integers(24))] if first is None else rotations[0]
        scale = float(rng.uniform(*GREY_SCALE)) if first is None else 1.0
        flipped = [axis for axis, sign in enumerate(signs) if sign < 0]
        place = tuple(slice(int(start), int(start) + plan.crop) for start in corner)
        for stored, list_ in ((sample.shown, maps), (sample.error, errors)):
            part = ops.transpose(stored[place], axes)
            part = ops.flip(part, axis=flipped) if flipped else part
            list_.append(ops.cast(part, "float32") * scale)
        errors[-1] = ops.stack([errors[-1], ops.full_like(errors[-1], sample.weight / scale**2)], axis=-1)
        told.append(sample.told)
    return ops.stack(maps)[..., None], ops.convert_to_tensor(np.stack(told)), ops.stack(errors)
