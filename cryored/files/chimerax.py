"""Scripts that show results in UCSF ChimeraX."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cryored.maps.volume import Volume

_SURFACE = 98.0  # percentile of the density about which ChimeraX draws its first surface
_ENDS = (5.0, 95.0)  # percentiles of sigma there that get the ends of the palette


def coloured_surface(script: str, density_path: str, sigma_path: str, density: Volume, sigma: Volume) -> str:
    """Return a ChimeraX script that colours a denoised map's surface by the standard deviation of its error.

    Parameters
    ----------
    script : str
        Where it will lie: its paths are relative to that, as ChimeraX runs a script in the script's folder.
    density_path, sigma_path : str
    density, sigma : Volume
        What is in the two files: sigma where the density is high sets the range of the colours, blue to red.
    """
    low, high = np.percentile(sigma.data[density.data >= np.percentile(density.data, _SURFACE)], _ENDS)
    folder = Path(script).resolve().parent
    names = [os.path.relpath(Path(path).resolve(), folder) for path in (density_path, sigma_path)]
    return "\n".join(
        [
            *(f'open "{name}"' for name in names),
            "volume #1 style surface step 1",
            "volume #2 hide",
            f"color sample #1 map #2 palette blue:white:red range {low:.5g},{high:.5g} key true",
            "",
        ]
    )
