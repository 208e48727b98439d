"""Answer one of RELION's reconstruction requests: from its files to its result and its log."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryored import __version__
from cryored.errors import InputError
from cryored.files.belonging import SAME_SIZE
from cryored.files.mrc import read_volume, write_volume
from cryored.files.output import check_outputs, check_target
from cryored.files.requests import Request, Shells, is_joined, read_request_file
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.lambda_schedule import Schedule
from cryored.prior.models import check_weights, find_model
from cryored.reconstruction.sums import load_sums, with_fsc
from cryored.refinement.bounds import check_memory, expect
from cryored.refinement.updater import Answer, Maps, Settings, Updater, timed

logger = logging.getLogger(__name__)

ROOT = "{root}"  # in the name of a file to write
DENOISED = "_denoised.mrc"  # ending of the map with the prior where RELION gets the one without


@dataclass(frozen=True)
class Files:
    """Where an answer goes, and what becomes of the request's files.

    Parameters
    ----------
    angpix : float, optional
        Pixel size in angstrom, instead of the one found.
    output : str, optional
        Instead of the request's result.
    unregularised : str, optional
        B / K to write. ``{root}`` in it stands for the request's name up to ``_external_reconstruct``; an existing
        file is then replaced, as RELION's ``--continue`` writes requests anew.
    denoised : str, optional
        A denoised map to use instead of the network.
    clean : bool
        Remove RELION's arrays after success.
    overwrite : bool
        Replace existing files other than the request's own.
    """

    angpix: float | None = None
    output: str | None = None
    unregularised: str | None = None
    denoised: str | None = None
    clean: bool = False
    overwrite: bool = False


AS_ASKED = Files()


@dataclass(frozen=True)
class Outputs:
    """A request as files: where it came from, where its maps go, and what its line in the log begins with.

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
    record : mapping
        What is known of the line in the log before there is an answer.
    beside : str, optional
        Where the map with the prior goes while `target` gets the one without.
    """

    request: Request
    target: str
    own_target: bool
    unregularised: str | None
    clean: bool
    record: Mapping[str, Any]
    beside: str | None = None

    def write(self, updater: Updater, maps: Maps, answer: Answer) -> dict[str, Any]:
        """Write the maps; return what is to be logged.

        Raises
        ------
        OutputError
            A map cannot be written; there is then no part of it.
        """
        request, card = self.request, updater.model.card
        seconds = dict(answer.seconds)
        raw = None
        if self.unregularised is not None:
            with timed(seconds, "unregularised"):
                raw = updater.unregularised(maps)
        with timed(seconds, "write"):
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
            if self.own_target:  # nothing that an earlier answer has left is this one's
                if request.result_star is not None:  # RELION would read new tau2 or FSC from it
                    request.result_star.unlink(missing_ok=True)
                if self.beside is None and self.record["denoised"] is None and is_joined(request):
                    Path(f"{request.root}{DENOISED}").unlink(missing_ok=True)
        return {
            **self.record,
            "device": updater.denoiser.device_name if "network" in seconds else "CPU, no network",
            "power_ratio": round(answer.power_ratio, 5),
            "change": round(answer.change, 5),
            "seconds": seconds,
        }

    def log(self, record: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
        """Append a line to the request's log, and return it.

        Parameters
        ----------
        record : mapping
            Of `write`.
        seconds : mapping
            Of what is not in the record: the steps before the first map, and the total.
        """
        taken = {**record["seconds"], **seconds}
        line = {**record, "seconds": {step: round(value, 3) for step, value in taken.items()}}
        _append_log(self.request.log, line)
        return line

    def tidy(self) -> None:
        """Remove RELION's arrays, if that was asked for; the request is answered, also where they cannot be."""
        if not self.clean:
            return
        for path in (self.request.data_real, self.request.data_imag, self.request.weight):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s: cannot be removed: %s", path, error.strerror)


def plan_outputs(name: str, request: Request, updater: Updater, by: str, files: Files) -> Outputs:
    """Check where the answer to a request goes, and begin its line in the log.

    Parameters
    ----------
    name : str
        The request as RELION called it.
    by : str
        The command that answers.

    Raises
    ------
    OutputError
        A file cannot be written, is there already, or is an input or another output.
    """
    target = str(request.result) if files.output is None else files.output
    check_target(target, files.overwrite or files.output is None)
    unregularised = files.unregularised
    if unregularised is not None:
        # Named after the request, it belongs to it as its result and its log do, and is replaced like these.
        own = ROOT in unregularised
        unregularised = unregularised.replace(ROOT, request.root)
        check_target(unregularised, files.overwrite or own)
    beside = None
    lam, _ = updater.weight(request)
    if updater.settings.final == "map" and files.output is None and lam > 0 and is_joined(request):
        beside = f"{request.root}{DENOISED}"
        check_target(beside, overwrite=True)
    own_files = (request.star, request.data_real, request.data_imag, request.weight, request.log)
    check_outputs((target, unregularised, beside), (*own_files, request.mask, files.denoised))
    record: dict[str, Any] = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cryored": __version__,
    }
    record |= {"by": by, "request": name, "result": target}
    record |= _described(request, updater)
    record |= {
        "denoised": files.denoised,
        "with_prior": beside if beside is not None else target if lam > 0 else None,
    }
    # Of a map for somebody else RELION's arrays are still to be answered.
    clean = files.clean and files.output is None
    return Outputs(request, target, files.output is None, unregularised, clean, record, beside)


def _described(request: Request, updater: Updater) -> dict[str, Any]:
    """Return what the log tells of a request, and of how it is answered."""
    lam, resolution = updater.weight(request)
    card, settings = updater.model.card, updater.settings
    weights = updater.shell_weights(request, lam)
    return {
        "box": request.ori,
        "pixel_size": request.pixel_size,
        "padding": request.pad,
        "current_size": 2 * request.r_max,
        "fsc": "estimated from tau2 and K" if request.estimated else "of the half-maps",
        "mask": None if request.mask is None else str(request.mask),
        "nominal_resolution": None if resolution is None or np.isinf(resolution) else round(resolution, 3),
        "lambda": round(lam, 4),
        "schedule": updater.schedule.source if settings.lam is None else None,
        "weights": {
            "rule": updater.rule(request.mask is not None),
            "trust": settings.trust,
            "precision": _rounded(weights.precision[: request.r_max + 1]),
            "gain": _rounded(weights.gain[: request.r_max + 1]),
        },
        "final": settings.final,
        "extrapolate": settings.extrapolate,
        "prior_limit": settings.prior_limit,
        "model": card.name,
        "model_sha256": card.sha256,
    }


def beside(record: Mapping[str, Any]) -> str | None:
    """Return the map with the prior of a log's line where RELION got the plain one, None elsewhere."""
    found = record.get("with_prior")
    return None if found is None or found == record.get("result") else str(found)


def told_lambda(number: float | None, schedule: str | None) -> str:
    """Return in words where lambda comes from: a number, or the source of a schedule."""
    if schedule is None:
        return f"{number:g}"
    return f"by {schedule}" if schedule == Schedule().source else f"auto, schedule in {schedule}"


def told_options(record: Mapping[str, Any]) -> dict[str, str]:
    """Return in words the options that a log's line tells of; one of an earlier version may lack some."""
    schedule, limit = record.get("schedule"), record.get("prior_limit")
    told = {
        "Model": f"{record['model']} ({record['model_sha256'][:8]})",
        "Lambda": told_lambda(record["lambda"], schedule),
        "Weights": str(record["weights"]["rule"]),
    }
    if "trust" in record["weights"] and str(record["weights"]["rule"]).startswith("calibrated"):
        told["Trust"] = f"{record['weights']['trust']:g}"
    if "final" in record and not str(record.get("fsc", "")).startswith("estimated"):  # classes are never joined
        told["Last iteration"] = {"map": "plain MAP", "prior": "with the prior"}[record["final"]]
    if "prior_limit" in record:
        told["Prior limit"] = "none" if limit is None else f"{limit:g} Å"
    if "extrapolate" in record:
        told["Extrapolate"] = "yes" if record["extrapolate"] else "no"
    return told


def _rounded(values: Shells) -> list[float]:
    return [round(float(value), 3) for value in values]


def red_update_file(
    job: str,
    settings: Settings,
    files: Files = AS_ASKED,
    *,
    model: str,
    check: bool = False,
    gpu: bool | None = None,
    max_memory: int | None = None,
) -> dict[str, Any]:
    """Answer the request in the file `job`; see the help of ``cryored red-update``.

    Parameters
    ----------
    job : str
        RELION's STAR file; its paths are relative to the current folder.
    settings : Settings
    files : Files
    model : str
        Name or folder.
    check : bool
        Do everything but the update, and write nothing.
    max_memory : int, optional
        Bytes that this process may take, RELION's arrays apart.

    Returns
    -------
    dict
        What was logged, or would be; with `check` also what it is expected to take.
    """
    begin = time.monotonic()
    seconds: dict[str, float] = {}
    with timed(seconds, "read"):
        request = read_request_file(job, angpix=files.angpix, needs_pixel_size=settings.lam != 0)
        request = with_fsc(request, settings.threads)
        found = find_model(model)
        updater = Updater(settings, Denoiser(found, gpu=gpu, threads=settings.threads, max_memory=max_memory))
        outputs = plan_outputs(job, request, updater, "red-update", files)
        if outputs.record["lambda"] > 0 or check:
            check_weights(found)
        if check and outputs.record["lambda"] > 0:
            updater.denoiser.find_device()
        expected = expect(request, updater)
        check_memory(expected, max_memory, job)
        sums = load_sums(request, settings.threads)
        given = None if files.denoised is None else _read_denoised(files.denoised, request)
    if check:
        return {**outputs.record, "expected": expected.rounded()}
    (maps,) = updater.denoise([updater.begin(request, sums, denoised=given)])
    record = outputs.write(updater, maps, updater.finish(maps))
    line = outputs.log(record, {**seconds, "total": time.monotonic() - begin})
    outputs.tidy()
    return line


def _read_denoised(path: str, request: Request) -> Volume:
    volume = read_volume(path)
    if volume.shape != (request.ori,) * 3:
        raise InputError(f"{path}: shape {volume.shape} (z, y, x), expected the request's box of {request.ori} cubed")
    known = volume.voxel_size and request.pixel_size  # with lambda 0 nobody needs that of the request
    if known and abs(volume.voxel_size / request.pixel_size - 1) > SAME_SIZE:
        raise InputError(f"{path}: pixel size {volume.voxel_size:g} A, expected the request's {request.pixel_size:g} A")
    return volume


def _append_log(path: Path, record: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    except OSError as error:
        # The result is in place: a refinement shall not die of its log.
        logger.warning("%s: the log cannot be written: %s", path, error.strerror)
