"""The scripts of the checkout, with stand-ins for what they call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with the scripts, and a RELION on the PATH."""
    for name in ("quickstart", "set-up-environment", "cryored-external-reconstruct"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / "bin" / name, tmp_path / "bin" / name)
    (tmp_path / "pyproject.toml").touch()
    script(tmp_path / "path" / "relion_refine_mpi", "exit 1")
    return tmp_path


def run(checkout, *words, **environment):
    path = f"{checkout / 'path'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words, cwd=checkout, env=os.environ | {"PATH": path} | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("status", [0, 1])
def test_quickstart_ends_as_its_refinement_does(checkout, status):
    script(
        checkout / ".venv" / "bin" / "python",
        f'case $1 in benchmarks/refine.py) echo table; echo "refining: map ..." >&2; exit {status} ;; esac',
    )
    done = run(checkout, "bin/quickstart")
    assert done.returncode == status
    assert ("Two refinements" in done.stdout) == ("table\n" in done.stdout) == (status == 0)
    assert "refining: map ..." in done.stderr
    assert (checkout / "quickstart" / "map_against_cwred.tsv").read_text() == "table\n"


def test_half_an_environment_is_made_whole(checkout):
    """Debian's python without ensurepip leaves one without pip."""
    script(checkout / ".venv" / "bin" / "python", "exit 1")
    script(checkout / "path" / "python", f"[ $1 != -m ] || echo 'exit 0' >{checkout}/.venv/bin/python")
    done = run(checkout, "sh", "-c", ". bin/set-up-environment && set_up_environment .", PYTHON="python")
    assert done.returncode == 0, done.stderr
    assert "making a virtual environment" in done.stderr
    again = run(checkout, "sh", "-c", ". bin/set-up-environment && set_up_environment .", PYTHON="python")
    assert (again.returncode, again.stderr) == (0, "")
