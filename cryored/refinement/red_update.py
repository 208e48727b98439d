"""Answer one of RELION's reconstruction requests with the MAP or the CW-RED update."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cryored import __version__
from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.files.output import check_target
from cryored.files.requests import Request, Shells, parts_of, read_request_file
from cryored.maps.fsc import whole_set_fsc
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser, crossover, fade_out
from cryored.prior.lambda_schedule import Schedule, model_schedule
from cryored.prior.models import Model, check_weights, find_model
from cryored.prior.weights import Calibration, ShellWeights, model_calibration, published_weights
from cryored.reconstruction.sums import load_sums, with_fsc
from cryored.reconstruction.update import Accumulators, Array, Denoised, inverse_prior, reconstruct

logger = logging.getLogger(__name__)

ROOT = "{root}"  # in the name of a file to write
DENOISED = "_denoised.mrc"  # ending of the map with the prior where RELION gets the one without


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
        Resolution in angstrom beyond which the prior has no weight, so that what is seen there owes it nothing.
    threads : int, optional
    """

    lam: float | None = None
    schedule: Schedule | None = None
    trust: float = 1.0
    final: Literal["map", "prior"] = "map"
    extrapolate: bool = False
    prior_limit: float | None = None
    threads: int | None = None


@dataclass
class Maps:
    """The maps of a request on its way through an `Updater`, and how long they took.

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
        B / K, where it was asked for or the model needs it.
    denoised : Volume or None
        Where lambda is not 0.
    seconds : dict
        Wall time of each step; what maps share is counted for each of them.
    """

    request: Request
    sums: Accumulators
    lam: float
    resolution: float | None
    regularised: Volume
    unregularised: Volume | None = None
    denoised: Volume | None = None
    seconds: dict[str, float] = field(default_factory=dict)


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
    """

    result: Volume
    power_ratio: float
    change: float


class Updater:
    """Answers requests with one model, which stays loaded from one request to the next: arrays in, arrays out.

    The steps are `begin`, `denoise` (any number of requests together) and `finish`.

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

    @property
    def calibration(self) -> Calibration | None:
        """What weighs the denoised map; None stands for eq. 17."""
        if self.settings.lam is not None or self.settings.schedule is not None:
            return None
        return model_calibration(self.model)

    @property
    def rule(self) -> str:
        """Where the weights come from, in words."""
        if self.settings.lam is not None:
            return "eq. 17"
        calibration = self.calibration
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
        """Reconstruct the MAP map, and the unregularised one where the model sees that.

        Parameters
        ----------
        denoised : Volume, optional
            Stands in for the network's output.
        """
        lam, resolution = self.weight(request)
        seconds: dict[str, float] = {}
        with timed(seconds, "map"):
            data = reconstruct(sums, prior=self._prior(request), threads=self.settings.threads)
        maps = Maps(request, sums, lam, resolution, Volume(data, request.pixel_size), seconds=seconds)
        if lam > 0:
            maps.denoised = denoised
            if denoised is None and self.model.card.input == "unregularised":
                self.add_unregularised(maps)
        return maps

    def add_unregularised(self, maps: Maps) -> Volume:
        """Reconstruct B / K, unless it is there already."""
        if maps.unregularised is None:
            with timed(maps.seconds, "unregularised"):
                data = reconstruct(maps.sums, threads=self.settings.threads)
            maps.unregularised = maps.regularised.with_data(data)
        return maps.unregularised

    def denoise(self, several: Sequence[Maps]) -> None:
        """Send the maps of one or more requests through the network, in one call, where they need it."""
        left = [maps for maps in several if maps.lam > 0 and maps.denoised is None]
        if not left:
            return
        seconds: dict[str, float] = {}
        with timed(seconds, "load"):
            self.denoiser.load()
        with timed(seconds, "network"):
            raw = self.model.card.input == "unregularised"
            denoised = self.denoiser.denoise_all(
                [self.add_unregularised(maps) if raw else maps.regularised for maps in left],
                [known_fsc(maps.request) for maps in left],
            )
        for maps, volume in zip(left, denoised, strict=True):
            maps.denoised = volume
            maps.seconds |= seconds

    def finish(self, maps: Maps) -> Answer:
        """Reconstruct the request's map."""
        request, regularised = maps.request, maps.regularised
        if maps.denoised is None:
            return Answer(regularised, 1.0, 0.0)
        weights = self.shell_weights(request, maps.lam)
        source = Denoised(maps.denoised.data, weights.gain, self.settings.extrapolate, weights.precision)
        with timed(maps.seconds, "update"):
            data = reconstruct(maps.sums, prior=self._prior(request), denoised=source, threads=self.settings.threads)
        return Answer(regularised.with_data(data), *_compare(data, regularised.data))

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
        calibration = self.calibration
        if calibration is None:
            return published_weights(strength)
        fsc = known_fsc(request)
        return calibration(request.fsc if fsc is None else fsc, strength, self.settings.trust)

    def answer(self, request: Request, sums: Accumulators, *, denoised: Volume | None = None) -> Answer:
        """Do all the steps for one request."""
        maps = self.begin(request, sums, denoised=denoised)
        self.denoise([maps])
        return self.finish(maps)

    @staticmethod
    def _prior(request: Request) -> Shells:
        return inverse_prior(request.tau2, request.tau2_fudge, request.pad)


@dataclass
class Outputs:
    """A request as files: where it came from, where its maps go, and its line in the log.

    Parameters
    ----------
    request : Request
    target : str
        Map to write; RELION's, or another.
    own_target : bool
        It is the one that the request names.
    unregularised : str or None
        Map without prior to write.
    clean : bool
        Remove RELION's arrays after success.
    record : dict
        What will be logged.
    beside : str, optional
        Where the map with the prior goes while `target` gets the one without.
    """

    request: Request
    target: str
    own_target: bool
    unregularised: str | None
    clean: bool
    record: dict[str, Any]
    beside: str | None = None

    def write(self, updater: Updater, maps: Maps, answer: Answer) -> dict[str, Any]:
        """Write the maps; return what will be logged.

        Raises
        ------
        OutputError
            A map cannot be written; there is then no part of it.
        """
        request, card = self.request, updater.model.card
        raw = None if self.unregularised is None else updater.add_unregularised(maps)
        with timed(maps.seconds, "write"):
            if self.unregularised is not None and raw is not None:
                write_volume(self.unregularised, raw, label="red-update unregularised")
            plain = "red-update lambda 0 (MAP)"
            label = f"red-update {card.name} {card.sha256[:8]} lambda {maps.lam:.4f}"
            if maps.lam == 0:
                write_volume(self.target, answer.result, label=plain)
            elif self.beside is None:
                write_volume(self.target, answer.result, label=label)
            else:
                write_volume(self.beside, answer.result, label=label)
                write_volume(self.target, maps.regularised, label=plain)
            if self.own_target and request.result_star is not None:
                # RELION would read new tau2 or FSC from it, even one that an earlier run has left.
                request.result_star.unlink(missing_ok=True)
        used = maps.denoised is not None and "network" in maps.seconds
        self.record |= {
            "device": updater.denoiser.device_name if used else "CPU, no network",
            "power_ratio": round(answer.power_ratio, 5),
            "change": round(answer.change, 5),
        }
        return self.record

    def log(self, seconds: dict[str, float]) -> None:
        """Append the line to the request's log."""
        self.record["seconds"] = {step: round(value, 3) for step, value in seconds.items()}
        _append_log(self.request.log, self.record)

    def tidy(self) -> None:
        """Remove RELION's arrays, if that was asked for."""
        if self.clean:
            for path in (self.request.data_real, self.request.data_imag, self.request.weight):
                path.unlink(missing_ok=True)


def plan_outputs(
    name: str,
    request: Request,
    updater: Updater,
    by: str,
    *,
    output: str | None = None,
    unregularised: str | None = None,
    denoised: str | None = None,
    clean: bool = False,
    overwrite: bool = False,
) -> Outputs:
    """Check where the answer to a request goes, and begin its line in the log; see `red_update_file`.

    Parameters
    ----------
    name : str
        The request as RELION called it.
    by : str
        The command that answers.
    """
    target = output if output is not None else str(request.result)
    check_target(target, overwrite or output is None)
    if unregularised is not None:
        # Named after the request, it belongs to it as its result and its log do, and is replaced like these.
        own = ROOT in unregularised
        unregularised = unregularised.replace(ROOT, request.root)
        check_target(unregularised, overwrite or own)
    lam, resolution = updater.weight(request)
    card, settings = updater.model.card, updater.settings
    beside = None
    if settings.final == "map" and output is None and lam > 0 and is_joined(request):
        beside = f"{request.root}{DENOISED}"
        check_target(beside, overwrite=True)
    weights = updater.shell_weights(request, lam)
    record: dict[str, Any] = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cryored": __version__,
        "by": by,
        "request": name,
        "result": target,
        "box": request.ori,
        "pixel_size": request.pixel_size,
        "padding": request.pad,
        "current_size": 2 * request.r_max,
        "fsc": "estimated from tau2 and K" if request.estimated else "of the half-maps",
        "nominal_resolution": None if resolution is None or np.isinf(resolution) else round(resolution, 3),
        "lambda": round(lam, 4),
        "schedule": updater.schedule.source if settings.lam is None else None,
        "weights": {
            "rule": updater.rule,
            "trust": settings.trust,
            "precision": _rounded(weights.precision[: request.r_max + 1]),
            "gain": _rounded(weights.gain[: request.r_max + 1]),
        },
        "final": settings.final,
        "extrapolate": settings.extrapolate,
        "prior_limit": settings.prior_limit,
        "model": card.name,
        "model_sha256": card.sha256,
        "denoised": denoised,
        "with_prior": beside if beside is not None else target if lam > 0 else None,
    }
    return Outputs(request, target, output is None, unregularised, clean, record, beside)


def is_joined(request: Request) -> bool:
    """Tell whether a request is of the joined halves, which RELION's auto-refine ends with."""
    iteration, half = parts_of(request.root)
    return iteration is not None and half is None and not request.estimated and bool(request.fsc.any())


def known_fsc(request: Request) -> Shells | None:
    """Return the FSC that half-maps as good as a request's map would have, in its shells; None where none is known.

    That of the request for a half, and the estimate for a class. The joined halves are better: RELION regularises them
    by the FSC that their sum has to the truth, sqrt(2 FSC / (1 + FSC)).
    """
    if not request.fsc.any():
        return None  # nothing is resolved
    return np.sqrt(whole_set_fsc(np.clip(request.fsc, 0.0, 1.0))) if is_joined(request) else request.fsc


def _rounded(values: Shells) -> list[float]:
    return [round(float(value), 3) for value in values]


def red_update_file(
    job: str,
    settings: Settings,
    *,
    model: str,
    angpix: float | None = None,
    output: str | None = None,
    unregularised: str | None = None,
    denoised: str | None = None,
    check: bool = False,
    clean: bool = False,
    gpu: bool | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Answer the request in the file `job`; see the help of ``cryored red-update``.

    Parameters
    ----------
    job : str
        RELION's STAR file; its paths are relative to the current folder.
    settings : Settings
    model : str
        Name or folder.
    angpix : float, optional
        Pixel size in angstrom.
    output : str, optional
        Instead of the request's result.
    unregularised : str, optional
        B / K to write. ``{root}`` in it stands for the request's name up to ``_external_reconstruct``; an existing
        file is then replaced, as RELION's ``--continue`` writes requests anew.
    denoised : str, optional
        A denoised map to use instead of the network.
    check : bool
        Do everything but the update, and write nothing.
    clean : bool
        Remove RELION's arrays after success.

    Returns
    -------
    dict
        What was logged, or would be.
    """
    begin = time.monotonic()
    seconds: dict[str, float] = {}
    with timed(seconds, "read"):
        request = read_request_file(job, angpix=angpix, needs_pixel_size=settings.lam != 0)
        request = with_fsc(request, settings.threads)
        found = find_model(model)
        updater = Updater(settings, Denoiser(found, gpu=gpu, threads=settings.threads))
        outputs = plan_outputs(
            job,
            request,
            updater,
            "red-update",
            output=output,
            unregularised=unregularised,
            denoised=denoised,
            clean=clean,
            overwrite=overwrite,
        )
        if outputs.record["lambda"] > 0 or check:
            check_weights(found)
        sums = load_sums(request, settings.threads)
        given = None if denoised is None else _read_denoised(denoised, request)
    if check:
        return outputs.record
    maps = updater.begin(request, sums, denoised=given)
    updater.denoise([maps])
    outputs.write(updater, maps, updater.finish(maps))
    outputs.log(seconds | maps.seconds | {"total": time.monotonic() - begin})
    outputs.tidy()
    return outputs.record


def _read_denoised(path: str, request: Request) -> Volume:
    volume = read_volume(path)
    if volume.shape != (request.ori,) * 3:
        raise InputError(f"{path}: shape {volume.shape} (z, y, x), expected the request's box of {request.ori} cubed")
    if volume.voxel_size and abs(volume.voxel_size / request.pixel_size - 1) > 0.01:
        raise InputError(f"{path}: pixel size {volume.voxel_size:g} A, expected the request's {request.pixel_size:g} A")
    return volume


def _append_log(path: Path, record: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    except OSError as error:
        # The result is in place: a refinement shall not die of its log.
        logger.warning("%s: the log cannot be written: %s", path, error.strerror)


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
