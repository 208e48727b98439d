"""From a request's arrays to its answer, with one model: arrays in, arrays out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from cryored.files.requests import Request, Shells, is_joined
from cryored.maps.fsc import whole_set_fsc
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser, crossover, fade_out
from cryored.prior.lambda_schedule import Schedule, model_schedule
from cryored.prior.models import Model
from cryored.prior.weights import Calibration, ShellWeights, model_calibration, published_weights
from cryored.reconstruction.update import Accumulators, Array, Denoised, inverse_prior, reconstruct

logger = logging.getLogger(__name__)

_LEAST_FSC = 0.001  # RELION makes tau2 of none that is smaller


@dataclass(frozen=True)
class Settings:
    """How requests are to be answered.

    Parameters
    ----------
    lam : float, optional
        Weight of the prior in eq. 17, 0 to 1; None derives it from the request's FSC.
    schedule : Schedule, optional
        By which lambda follows the resolution, in eq. 17. None stands for the model's own (`model_schedule`) and its
        calibrated weights (`model_calibration`), if it has these.
    trust : float
        Factor of the calibrated precision.
    final : {"map", "prior"}
        What RELION gets for the joined halves, in its last iteration: with "map" the map without the prior, and the
        one with it lies beside that.
    extrapolate : bool
        Let the prior fill what the data do not reach (see `Denoised`).
    prior_limit : float, optional
        Resolution in angstrom beyond which the prior has no weight, so that what is seen there owes it nothing but
        what RELION's mask smears over the shells.
    threads : int, optional
    """

    lam: float | None = None
    schedule: Schedule | None = None
    trust: float = 1.0
    final: Literal["map", "prior"] = "map"
    extrapolate: bool = False
    prior_limit: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Maps:
    """What one step of an `Updater` hands to the next: the maps of a request so far, and how long they took.

    Parameters
    ----------
    request : Request
    sums : Accumulators
    lam : float
    resolution : float or None
        Nominal, in angstrom; None where the request has no FSC.
    regularised : Volume
        The MAP map.
    unregularised : Volume or None
        B / K, where the model sees it.
    weighted : Volume or None
        What the model sees of joined halves: see `joined_prior`.
    denoised : Volume or None
        Where lambda is not 0.
    seconds : mapping
        Wall time of each step; what maps share is counted for each of them.
    """

    request: Request
    sums: Accumulators
    lam: float
    resolution: float | None
    regularised: Volume
    unregularised: Volume | None = None
    weighted: Volume | None = None
    denoised: Volume | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The map that a request asked for, and how it compares with the MAP map.

    Parameters
    ----------
    result : Volume
    power_ratio : float
        Variance of the result over that of the MAP map.
    change : float
        Relative L2 difference of the result to the MAP map.
    seconds : mapping
        Wall time of the update, and of each step before it.
    """

    result: Volume
    power_ratio: float
    change: float
    seconds: Mapping[str, float] = field(default_factory=dict)


class Updater:
    """Answers requests with one model, which stays loaded from one request to the next: arrays in, arrays out.

    The steps are `begin`, `denoise` (any number of requests together) and `finish`; each takes what the one before it
    has returned.

    Parameters
    ----------
    settings : Settings
    denoiser : Denoiser
        Not touched while lambda is 0.
    """

    def __init__(self, settings: Settings, denoiser: Denoiser) -> None:
        self.settings = settings
        self.denoiser = denoiser

    @property
    def model(self) -> Model:
        """The prior."""
        return self.denoiser.model

    @property
    def schedule(self) -> Schedule:
        """What lambda follows unless it is given as a number."""
        return self.settings.schedule or model_schedule(self.model)

    def calibration(self, masked: bool = False) -> Calibration | None:
        """Return what weighs the denoised map; None stands for eq. 17.

        Parameters
        ----------
        masked : bool
            For a request whose FSC is of a solvent mask (`Request.mask`).
        """
        if self.settings.lam is not None or self.settings.schedule is not None:
            return None
        return model_calibration(self.model, masked)

    def rule(self, masked: bool = False) -> str:
        """Return in words where the weights come from."""
        if self.settings.lam is not None:
            return "eq. 17"
        calibration = self.calibration(masked)
        if calibration is None:
            return f"eq. 17, lambda by {self.schedule.source}"
        return f"calibrated in {calibration.source}"

    def weight(self, request: Request) -> tuple[float, float | None]:
        """Return lambda and the nominal resolution of a request."""
        lam = self.settings.lam
        if lam is not None:
            known = request.pixel_size > 0 and request.fsc.any()
            return lam, request.nominal_resolution() if known else None
        resolution = request.nominal_resolution()
        return self.schedule(resolution), resolution

    def begin(self, request: Request, sums: Accumulators, *, denoised: Volume | None = None) -> Maps:
        """Reconstruct the MAP map, and the one that the model sees where it sees another.

        Parameters
        ----------
        denoised : Volume, optional
            Stands in for the network's output.
        """
        lam, resolution = self.weight(request)
        seconds: dict[str, float] = {}
        with timed(seconds, "map"):
            data = reconstruct(sums, prior=self._prior(request), threads=self.settings.threads)
        regularised = Volume(data, request.pixel_size)
        if lam == 0:
            return Maps(request, sums, lam, resolution, regularised, seconds=seconds)
        raw = weighted = None
        if denoised is None and self.model.card.input == "unregularised":
            with timed(seconds, "unregularised"):
                raw = self._unregularised(sums, regularised)
        elif denoised is None and is_joined(request):
            with timed(seconds, "weighted"):
                prior = self._prior(request) * joined_prior(request.fsc)
                weighted = regularised.with_data(reconstruct(sums, prior=prior, threads=self.settings.threads))
        return Maps(request, sums, lam, resolution, regularised, raw, weighted, denoised, seconds)

    def unregularised(self, maps: Maps) -> Volume:
        """Return B / K, reconstructed unless it is there already."""
        return maps.unregularised or self._unregularised(maps.sums, maps.regularised)

    def denoise(self, several: Sequence[Maps]) -> list[Maps]:
        """Send the maps of one or more requests through the network, in one call, where they need it."""
        left = [i for i, maps in enumerate(several) if maps.lam > 0 and maps.denoised is None]
        result = list(several)
        if not left:
            return result
        seconds: dict[str, float] = {}
        with timed(seconds, "load"):
            self.denoiser.load()
        with timed(seconds, "network"):
            denoised = self.denoiser.denoise_all(
                [several[i].unregularised or several[i].weighted or several[i].regularised for i in left],
                [known_fsc(several[i].request) for i in left],
            )
        for i, volume in zip(left, denoised, strict=True):
            result[i] = replace(several[i], denoised=volume, weighted=None, seconds={**several[i].seconds, **seconds})
        return result

    def finish(self, maps: Maps) -> Answer:
        """Reconstruct the request's map."""
        request, regularised = maps.request, maps.regularised
        if maps.denoised is None:
            return Answer(regularised, 1.0, 0.0, maps.seconds)
        weights = self.shell_weights(request, maps.lam)
        source = Denoised(maps.denoised.data, weights.gain, self.settings.extrapolate, weights.precision)
        seconds = dict(maps.seconds)
        with timed(seconds, "update"):
            data = reconstruct(maps.sums, prior=self._prior(request), denoised=source, threads=self.settings.threads)
        return Answer(regularised.with_data(data), *_compare(data, regularised.data), seconds)

    def shell_weights(self, request: Request, lam: float) -> ShellWeights:
        """Return what the update takes of the denoised map in each shell.

        Parameters
        ----------
        lam : float
            Of eq. 17, or the share of the calibrated weights.
        """
        if lam == 0:
            return published_weights(np.zeros_like(request.fsc))
        strength = lam * crossover(request.frequency, request.pixel_size, self.model.card.pixel_size)
        if self.settings.prior_limit is not None:
            strength = strength * fade_out(request.frequency, 1 / self.settings.prior_limit)
        calibration = self.calibration(request.mask is not None)
        if calibration is None:
            return published_weights(strength)
        fsc = known_fsc(request)
        if fsc is None:
            return calibration(request.fsc, strength, self.settings.trust)
        prior = joined_prior(request.fsc) if is_joined(request) else np.ones_like(fsc)
        return calibration(fsc, strength, self.settings.trust, prior)

    def answer(self, request: Request, sums: Accumulators, *, denoised: Volume | None = None) -> Answer:
        """Do all the steps for one request."""
        (maps,) = self.denoise([self.begin(request, sums, denoised=denoised)])
        return self.finish(maps)

    def _unregularised(self, sums: Accumulators, like: Volume) -> Volume:
        return like.with_data(reconstruct(sums, threads=self.settings.threads))

    @staticmethod
    def _prior(request: Request) -> Shells:
        return inverse_prior(request.tau2, request.tau2_fudge, request.pad)


def known_fsc(request: Request) -> Shells | None:
    """Return the FSC that half-maps as good as a request's map would have, in its shells; None where none is known.

    That of the request for a half, and the estimate for a class. The joined halves are better: 2 FSC / (1 + FSC).
    """
    if not request.fsc.any():
        return None  # nothing is resolved
    return np.asarray(whole_set_fsc(np.clip(request.fsc, 0.0, 1.0))) if is_joined(request) else request.fsc


def joined_prior(fsc: Shells) -> Shells:
    """Return by how much the inverse power of the signal exceeds RELION's 1 / tau2 in a request of joined halves.

    RELION takes for the signal-to-noise ratio of their sum C / (1 - C), where C = sqrt(2 FSC / (1 + FSC)) is its FSC to
    the truth. It is W / (1 - W) with W = C**2, as FSC / (1 - FSC) is that of a half: maps that the model knows, and
    its weights, are of that one.

    Parameters
    ----------
    fsc : (shells,) float64
        Of the request, between the halves.

    Returns
    -------
    (shells,) float64
        (1 + C) / C, from 2 on.
    """
    to_truth = np.sqrt(whole_set_fsc(np.clip(fsc, _LEAST_FSC, 1.0)))
    return (1 + to_truth) / to_truth


def _compare(result: Array, reference: Array) -> tuple[float, float]:
    """Return the ratio of the variances, and the relative L2 difference."""
    variance = _variance(reference)
    ratio = _variance(result) / variance if variance > 0 else 1.0
    norm = np.linalg.norm(reference.ravel())
    return ratio, float(np.linalg.norm((result - reference).ravel()) / norm) if norm > 0 else 0.0


def _variance(data: Array) -> float:
    # Plane by plane: numpy would make a float64 copy of the whole volume.
    planes = [(float(plane.sum(dtype=np.float64)), float(np.vdot(plane, plane))) for plane in data]
    total, squares = (sum(item) for item in zip(*planes, strict=True))
    return squares / data.size - (total / data.size) ** 2


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Note how long the block took, in seconds."""
    begin = time.monotonic()
    yield
    seconds[step] = time.monotonic() - begin
