"""What the answers in a run's folder left behind: the logs beside the requests, the requests, the maps."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.mrc import read_volume
from cryored.files.requests import ENDING, parts_of, read_request
from cryored.files.star import read_star
from cryored.refinement.red_update import DENOISED, beside, told_options
from cryored.refinement.watch_table import Entry

logger = logging.getLogger(__name__)

LOG = "_cryored.log"

Curve = npt.NDArray[np.float64]
Section = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Logged:
    """One answer, as its log tells it.

    Parameters
    ----------
    entry : Entry
    record : dict
        The log's line.
    path : Path
        The log.
    """

    entry: Entry
    record: dict[str, Any]
    path: Path

    def fsc(self) -> Curve | None:
        """Return the half-map FSC in the request, None where it is gone or has none."""
        star = self.path.with_name(f"{self.entry.name}{ENDING}.star")
        try:
            found = read_request(read_star(star), angpix=self.record.get("pixel_size") or 1.0).fsc
        except InputError:
            return None
        return found if found.any() else None

    def frequency(self, shells: int) -> Curve | None:
        """Return the spatial frequency of the first shells in 1/angstrom, None where the pixel size is not known."""
        width = self.record["box"] * self.record["pixel_size"]
        return np.arange(shells) / width if width else None

    def sections(self) -> dict[str, Section]:
        """Return central sections (y, x) of the maps that are there: what RELION got, and the one with the prior."""
        files = {"denoised": DENOISED, "result": f"{ENDING}.mrc"}
        found = {}
        for kind, ending in files.items():
            path = self.path.with_name(f"{self.entry.name}{ending}")
            if not path.is_file():
                continue
            try:
                data = read_volume(path).data
            except InputError as error:
                logger.warning("%s; no picture of it", error)
                continue
            found[kind] = data[len(data) // 2]
        return found


def read_logs(folder: Path) -> list[Logged]:
    """Return all answers that are logged in a folder, in the order in which they were given.

    A line that is no record, as one that a full disk has cut short, is left out with a warning.
    """
    found = [one for path in sorted(folder.glob(f"*{LOG}")) for one in _read_log(path)]
    return sorted(found, key=lambda one: str(one.record["time"]))


def _read_log(path: Path) -> Iterator[Logged]:
    name = path.name.removesuffix(LOG)
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            yield Logged(_entry(name, record), record, path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s, line %d: no record of an answer (%s); left out", path, number, error)


def _entry(name: str, record: Any) -> Entry:
    if not isinstance(record, dict):
        raise TypeError(f"'{record}', expected an object")
    estimated = record.get("fsc", "").startswith("estimated")
    resolution = record["nominal_resolution"]
    # What is needed later.
    record["box"], record["pixel_size"], record["time"], record["model"], record["model_sha256"]
    record["weights"]["rule"], record["weights"]["precision"], record["weights"]["gain"]
    return Entry(
        name,
        *parts_of(name),
        resolution,
        float(record["lambda"]),
        dict(record["seconds"]),
        float(record["change"]),
        str(record["device"]),
        estimated=estimated,
        power_ratio=float(record["power_ratio"]),
        beside=Path(beside(record) or "").name,
        options=told_options(record),
    )
