"""What cryored brings besides code: models, and the program that RELION 5 calls."""

from __future__ import annotations

from pathlib import Path

RELION5 = "relion5"  # holds relion_python_blush


def share_folders(name: str) -> tuple[Path, Path]:
    """Return where a folder of ``share`` lies: in a wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent.parent
    return package / "share" / name, package.parent / "share" / name
