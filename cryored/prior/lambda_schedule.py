"""The weight of the prior, lambda, from the nominal resolution (Kimanius et al. 2021, section 2.2).

Where a schedule comes from: the paper's line, a file, or the card of a model for which one was fitted.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryored.errors import InputError
from cryored.prior.models import CARD, Model

logger = logging.getLogger(__name__)

LOW, HIGH = 10.0, 4.5  # angstrom: the prior is off at LOW and worse, fully trusted at HIGH and better


@dataclass(frozen=True)
class Schedule:
    """Lambda against nominal resolution: straight lines between points, constant beyond the outermost.

    Parameters
    ----------
    resolutions : tuple of float
        In angstrom, increasing.
    lambdas : tuple of float
        Between 0 and 1.
    source : str
        Where it comes from, for logs.
    """

    resolutions: tuple[float, ...] = (HIGH, LOW)
    lambdas: tuple[float, ...] = (1.0, 0.0)
    source: str = field(default="the paper's line", compare=False)

    def __post_init__(self) -> None:
        """Refuse points that are no schedule."""
        steps = zip(self.resolutions[:-1], self.resolutions[1:], strict=True)
        if len(self.resolutions) != len(self.lambdas) or len(self.resolutions) < 2:
            raise InputError("a schedule needs as many resolutions as lambdas, two at least")
        if not all(0 < low < high < math.inf for low, high in steps):
            raise InputError(f"schedule: resolutions {list(self.resolutions)}, expected increasing angstroms")
        if not all(0 <= lam <= 1 for lam in self.lambdas):
            raise InputError(f"schedule: lambdas {list(self.lambdas)}, expected values between 0 and 1")

    def __call__(self, resolution: float) -> float:
        """Return lambda at a nominal resolution in angstrom; 0 where nothing is resolved (infinity)."""
        if math.isinf(resolution):
            return 0.0
        if not resolution > 0:
            raise InputError(f"resolution {resolution:g} A, expected a positive number")
        return float(np.interp(resolution, self.resolutions, self.lambdas))


def linear_schedule(low: float = LOW, high: float = HIGH) -> Schedule:
    """Return the paper's line: 0 at `low` angstrom and worse, 1 at `high` and better."""
    if not 0 < high < low:
        raise InputError(f"--high {high:g} and --low {low:g} A: expected 0 < high < low")
    return Schedule((high, low), (1.0, 0.0), f"1 at {high:g} A, 0 at {low:g} A")


def read_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a stored schedule: JSON as `parse_schedule` takes it."""
    name = os.fspath(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _no_schedule(name, error) from error
    return parse_schedule(content, name)


def parse_schedule(content: Any, name: str) -> Schedule:
    """Return the schedule in a stored object: the lists ``resolution`` (angstrom) and ``lambda``, in any order.

    Parameters
    ----------
    content : dict
        Other entries (`cryored.training.lambda_fit.Fit`) are for people.
    name : str
        Its file, for messages and logs.

    Raises
    ------
    InputError
        The lists are missing or are no schedule.
    """
    try:
        points = sorted(zip(map(float, content["resolution"]), map(float, content["lambda"]), strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise _no_schedule(name, error) from error
    try:
        return Schedule(tuple(point[0] for point in points), tuple(point[1] for point in points), name)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _no_schedule(name: str, error: Exception) -> InputError:
    return InputError(
        f'{name}: no schedule ({error}); expected JSON like {{"resolution": [4.5, 10], "lambda": [1, 0]}}'
    )


def model_schedule(model: Model) -> Schedule:
    """Return what ``--lambda auto`` means: the schedule in the model's card, the paper's line where it has none."""
    if not model.card.schedule:
        return Schedule()
    return parse_schedule(model.card.schedule, str(model.folder / CARD))


def source_resolution(path: str, angpix: float | None = None) -> float:
    """Return the nominal resolution (FSC 0.143) that an FSC table or one of RELION's requests implies.

    Parameters
    ----------
    path : str
        TSV, STAR or EMDB XML as `read_fsc_table` reads them, ``-``, a RELION request, or the folder of a job, whose
        latest half-map FSC is taken.
    angpix : float, optional
        For a request that lacks the pixel size.
    """
    from cryored.files.fsc_tables import read_fsc_table
    from cryored.files.jobs import is_job, read_job
    from cryored.files.requests import is_request, project_folder, read_request_file
    from cryored.maps.fsc import nominal_resolution

    if is_job(path):
        path = str(read_job(path).need_fsc())
        logger.info("FSC of %s", path)
    if Path(path).is_file() and is_request(path):  # a pipe can be read but once, and holds a table
        from cryored.reconstruction.sums import with_fsc

        request = read_request_file(path, angpix=angpix)
        if not request.fsc.any():
            project = project_folder(Path(path))
            request = with_fsc(read_request_file(os.path.relpath(path, project), folder=project, angpix=angpix))
        return request.nominal_resolution()
    if angpix is not None:
        raise InputError(f"{path}: a table with resolutions of its own, to which --angpix does not apply; leave it out")
    curve = read_fsc_table(path)
    return nominal_resolution(curve.frequency, curve.fsc)


def draw_schedule(path: str, schedule: Schedule, resolution: float | None = None) -> None:
    """Draw lambda against resolution as a PNG, with a mark at `resolution`."""
    from cryored.files.plots import new_figure, save_figure

    figure = new_figure(5, 3.2)
    axes = figure.add_subplot()
    grid = np.linspace(2.0, max(16.0, schedule.resolutions[-1] * 1.2), 400)
    axes.plot(grid, [schedule(value) for value in grid])
    if resolution is not None and not math.isinf(resolution):
        lam = schedule(resolution)
        axes.plot([resolution], [lam], "o")
        # Away from the nearer edge: fine resolutions stand at the right.
        side, place = (-6, "right") if resolution < grid.mean() else (6, "left")
        text = f"{resolution:.2f} Å: {lam:.3f}"
        axes.annotate(text, (resolution, lam), xytext=(side, 6), textcoords="offset points", ha=place)
    axes.set(xlabel="nominal resolution (Å)", ylabel="lambda", ylim=(-0.05, 1.15))
    axes.invert_xaxis()
    save_figure(figure, path)
