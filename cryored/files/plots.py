"""Pictures, drawn with matplotlib where it is installed."""

from __future__ import annotations

import os
from typing import Any

from cryored.errors import CryoredError
from cryored.files.output import whole_file


def check_plotting() -> None:
    """Refuse early, before any work, to draw where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise CryoredError("--plot needs matplotlib: pip install 'cryored[plot]'") from error


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches, without a window system or global state."""
    check_plotting()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")
