"""What a script may import, and the examples of docs/api.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cryored
from cryored.files.mrc import read_volume

REPOSITORY = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
EXAMPLES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "api.md").read_text(), re.S)


def test_every_name_is_there_and_no_other():
    for name in cryored.__all__:
        assert getattr(cryored, name) is not None
    assert dir(cryored) == sorted(cryored.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        cryored.nothing  # noqa: B018


def test_importing_it_loads_nothing():
    code = "import sys, cryored; cryored.__version__; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_examples(number, tmp_path, monkeypatch, capsys):
    shutil.copytree(DATA / "relion_requests" / "pka_box64_pad1" / "run", tmp_path / "run")
    for half in (1, 2):
        shutil.copy(DATA / "postprocess_pka" / f"run_half{half}_class001_unfil.mrc", tmp_path / f"half{half}.mrc")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(EXAMPLES[number], found)
    if number == 0:
        assert capsys.readouterr().out == "3.56 A\n"
    elif number == 1:
        assert read_volume("denoised.mrc").shape == (64, 64, 64)
    elif number == 2:
        expected = read_volume(
            "run/run_it003_half1_class001_external_reconstruct_expected_map.mrc", angpix=request_pixel(found)
        ).data
        assert np.linalg.norm(found["data"] - expected) < 1e-6 * np.linalg.norm(expected)
    else:
        assert 0 < found["answer"].change < 1
    assert len(EXAMPLES) == 4


def request_pixel(found):
    return found["request"].pixel_size
