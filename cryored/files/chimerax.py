"""Scripts that show results in UCSF ChimeraX."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryored.maps.volume import Volume

_SURFACE = 98.0  # percentile of the density about which ChimeraX draws its first surface
_ENDS = (5.0, 95.0)  # percentiles of sigma there that get the ends of the palette
_ADDED, _TAKEN = "cornflowerblue", "orange"  # of the difference


@dataclass(frozen=True)
class Shown:
    """A denoised map and what goes with it, each with the file that holds it.

    Parameters
    ----------
    result : (str, Volume)
    given : str, optional
        File of the map before.
    difference : (str, Volume), optional
    sigma : (str, Volume), optional
        Standard deviation of the error that is left.
    """

    result: tuple[str, Volume]
    given: str | None = None
    difference: tuple[str, Volume] | None = None
    sigma: tuple[str, Volume] | None = None


def denoised_surfaces(script: str, shown: Shown) -> str:
    """Return a ChimeraX script: the map before, the denoised one and their difference side by side.

    The two maps have one threshold; of the difference one surface shows what was added and one what was taken away. The
    denoised surface is coloured by sigma, where it is there: its values at high density set the range, blue to red.

    Parameters
    ----------
    script : str
        Where it will lie: its paths are relative to that, as ChimeraX runs a script in the script's folder.
    shown : Shown
    """
    folder = Path(script).resolve().parent
    lines, beside = [], []

    def opened(path: str) -> str:
        lines.append(f'open "{os.path.relpath(Path(path).resolve(), folder)}"')
        return str(len(lines))

    before = None if shown.given is None else opened(shown.given)
    after = opened(shown.result[0])
    change = None if shown.difference is None else opened(shown.difference[0])
    error = None if shown.sigma is None else opened(shown.sigma[0])
    density = shown.result[1].data
    level = float(np.percentile(density, _SURFACE))
    for model in (before, after):
        if model is not None:
            lines.append(f"volume #{model} style surface step 1 level {level:.5g}")
            beside.append(model)
    if change is not None and shown.difference is not None:
        limit = float(np.percentile(np.abs(shown.difference[1].data), _SURFACE))
        lines.append(
            f"volume #{change} style surface step 1 level {-limit:.5g} color {_TAKEN} level {limit:.5g} color {_ADDED}"
        )
        beside.append(change)
    if error is not None and shown.sigma is not None:
        low, high = np.percentile(shown.sigma[1].data[density >= level], _ENDS)
        lines.append(f"volume #{error} hide")
        lines.append(f"color sample #{after} map #{error} palette blue:white:red range {low:.5g},{high:.5g} key true")
    if len(beside) > 1:
        lines.append(f"tile #{','.join(beside)} columns {len(beside)}")
    return "\n".join([*lines, "view", ""])
