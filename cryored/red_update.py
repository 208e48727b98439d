"""Answer one of RELION's reconstruction requests with the MAP or the CW-RED update."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryored import __version__
from cryored.denoise import Denoiser, crossover
from cryored.errors import InputError
from cryored.lambda_schedule import Schedule, model_schedule
from cryored.models import Model, check_weights, find_model
from cryored.mrc import read_array, read_volume, write_volume
from cryored.output import check_target
from cryored.relion import Request, read_request_file
from cryored.update import Accumulators, Array, Denoised, check_accumulators, inverse_prior, reconstruct
from cryored.volume import Volume

logger = logging.getLogger(__name__)

_ROOT = "{root}"  # in the name of a file to write


@dataclass(frozen=True)
class Settings:
    """How requests are to be answered.

    Parameters
    ----------
    lam : float, optional
        Weight of the prior, 0 to 1; None derives it from the request's FSC by `schedule`.
    schedule : Schedule, optional
        None stands for the model's own (`model_schedule`).
    extrapolate : bool
        Let the prior fill what the data do not reach (see `Denoised`).
    threads : int, optional
    """

    lam: float | None = None
    schedule: Schedule | None = None
    extrapolate: bool = False
    threads: int | None = None


@dataclass
class Answer:
    """The maps that a request gave, and what is logged of it.

    Parameters
    ----------
    result : Volume
    unregularised : Volume or None
        Where it was asked for or the model needed it.
    lam : float
    resolution : float or None
        Nominal, in angstrom; None where the request has no FSC.
    power_ratio : float
        Variance of the result over that of the MAP map.
    seconds : dict
        Wall time of each step.
    """

    result: Volume
    unregularised: Volume | None
    lam: float
    resolution: float | None
    power_ratio: float
    seconds: dict[str, float] = field(default_factory=dict)


class Updater:
    """Answers requests with one model, which stays loaded from one request to the next.

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

    def weight(self, request: Request) -> tuple[float, float | None]:
        """Return lambda and the nominal resolution of a request."""
        lam = self.settings.lam
        if lam is not None:
            return lam, request.nominal_resolution() if request.fsc.any() else None
        resolution = request.nominal_resolution()
        return self.schedule(resolution), resolution

    def answer(
        self,
        request: Request,
        sums: Accumulators,
        *,
        denoised: Volume | None = None,
        want_unregularised: bool = False,
    ) -> Answer:
        """Reconstruct a request's map.

        Parameters
        ----------
        denoised : Volume, optional
            Stands in for the network's output.
        want_unregularised : bool
            Return B / K as well.
        """
        lam, resolution = self.weight(request)
        seconds: dict[str, float] = {}
        threads = self.settings.threads
        prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
        with _timed(seconds, "map"):
            regularised = Volume(reconstruct(sums, prior=prior, threads=threads), request.pixel_size)
        raw = None
        if want_unregularised or (lam > 0 and denoised is None and self.model.card.input == "unregularised"):
            with _timed(seconds, "unregularised"):
                raw = Volume(reconstruct(sums, threads=threads), request.pixel_size)
        result = regularised
        if lam > 0:
            if denoised is None:
                with _timed(seconds, "load"):
                    self.denoiser.load()
                with _timed(seconds, "network"):
                    denoised = self.denoiser(raw if self.model.card.input == "unregularised" and raw else regularised)
            fade = crossover(request.frequency, request.pixel_size, self.model.card.pixel_size)
            source = Denoised(denoised.data, lam * fade, self.settings.extrapolate)
            with _timed(seconds, "update"):
                data = reconstruct(sums, prior=prior, denoised=source, threads=threads)
            result = regularised.with_data(data)
        return Answer(result, raw, lam, resolution, _power_ratio(result.data, regularised.data), seconds)


def load_sums(request: Request, threads: int | None = None) -> Accumulators:
    """Map B and K of a request into memory and check every value."""
    files = (request.data_real, request.data_imag, request.weight)
    for path in files:
        if not path.exists():
            raise InputError(
                f"{path}: missing, expected beside {request.star}; paths in the request are relative to RELION's "
                "project folder: run the command there"
            )
    real, imag, weight = (read_array(path, request.array_shape) for path in files)
    sums = Accumulators(real, imag, weight, request.ori, request.pad, request.r_max)
    names = (str(files[0]), str(files[1]), str(files[2]))
    check_accumulators(sums, names, threads)
    return sums


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
    with _timed(seconds, "read"):
        request = read_request_file(job, angpix=angpix)
        target = output if output is not None else str(request.result)
        check_target(target, overwrite or output is None)
        if unregularised is not None:
            # Named after the request, it belongs to it as its result and its log do, and is replaced like these.
            own = _ROOT in unregularised
            unregularised = unregularised.replace(_ROOT, request.root)
            check_target(unregularised, overwrite or own)
        found = find_model(model)
        updater = Updater(settings, Denoiser(found, gpu=gpu, threads=settings.threads))
        lam, resolution = updater.weight(request)
        if lam > 0 or check:
            check_weights(found)
        sums = load_sums(request, settings.threads)
        given = None if denoised is None else _read_denoised(denoised, request)
    record: dict[str, Any] = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cryored": __version__,
        "request": job,
        "result": target,
        "box": request.ori,
        "pixel_size": request.pixel_size,
        "padding": request.pad,
        "current_size": 2 * request.r_max,
        "nominal_resolution": None if resolution is None or np.isinf(resolution) else round(resolution, 3),
        "lambda": round(lam, 4),
        "schedule": updater.schedule.source if settings.lam is None else None,
        "extrapolate": settings.extrapolate,
        "model": found.card.name,
        "model_sha256": found.card.sha256,
        "denoised": denoised,
    }
    if check:
        return record
    answer = updater.answer(request, sums, denoised=given, want_unregularised=unregularised is not None)
    seconds |= answer.seconds
    with _timed(seconds, "write"):
        if unregularised is not None and answer.unregularised is not None:
            write_volume(unregularised, answer.unregularised, label="red-update unregularised")
        label = f"red-update {found.card.name} {found.card.sha256[:8]} lambda {lam:.4f}"
        write_volume(target, answer.result, label=label if lam > 0 else "red-update lambda 0 (MAP)")
        if output is None and request.result_star is not None:
            # RELION would read new tau2 or FSC from it, even one that an earlier run has left.
            request.result_star.unlink(missing_ok=True)
    del sums  # lets go of the memory maps
    seconds["total"] = time.monotonic() - begin
    record |= {
        "device": updater.denoiser.device_name or "CPU, no network",
        "power_ratio": round(answer.power_ratio, 5),
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
    }
    _append_log(request.log, record)
    if clean:
        for path in (request.data_real, request.data_imag, request.weight):
            path.unlink(missing_ok=True)
    return record


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


def _power_ratio(result: Array, reference: Array) -> float:
    if result is reference:
        return 1.0
    variance = _variance(reference)
    return _variance(result) / variance if variance > 0 else 1.0


def _variance(data: Array) -> float:
    # Plane by plane: numpy would make a float64 copy of the whole volume.
    planes = [(float(plane.sum(dtype=np.float64)), float(np.vdot(plane, plane))) for plane in data]
    total, squares = (sum(item) for item in zip(*planes, strict=True))
    return squares / data.size - (total / data.size) ** 2


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    seconds[step] = time.monotonic() - begin
