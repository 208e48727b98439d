"""The comparison of what features in the training data are worth: what is trained on, and a table that is of it."""

from pathlib import Path

import feature_training
import numpy as np
import pytest
from click.testing import CliRunner
from features import CASES, NONE

from cryored.prior.models import find_model
from cryored.training.plan import Plan

STRUCTURE = str(Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz")
PLAN = Plan(box=32, crop=16, batch=2, pixel_size=4.0)


def sample(name):
    return feature_training.samples_of([STRUCTURE], name, PLAN, 1)[0]


@pytest.fixture(scope="module")
def ideal():
    return sample(NONE)


@pytest.mark.parametrize("name", ["solvent contrast 0.5", "seen within a mask", "seen sharpened by 60 A^2"])
def test_what_is_trained_on_has_the_feature(ideal, name):
    mine = sample(name)
    assert np.mean(mine.weights * mine.error.astype(np.float32) ** 2) == pytest.approx(1, rel=0.01)
    likeness = np.corrcoef(mine.shown.astype(float).ravel(), ideal.shown.astype(float).ravel())[0, 1]
    assert 0.5 < likeness < 0.9999
    np.testing.assert_array_equal(sample(NONE).shown, ideal.shown)


def test_drawn_features_are_the_molecules_own():
    name = feature_training.DRAWN
    assert feature_training.case_of(name, 3) == feature_training.case_of(name, 3)
    assert len({feature_training.case_of(name, seed) for seed in range(5)}) == 5
    assert feature_training.case_of(feature_training.AGAIN, 3) == CASES[NONE]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.slow  # two networks
def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_training, "PARTICLES", 250)
    monkeypatch.setattr(feature_training, "SNR", (0.5, 1.0))
    words = f"{STRUCTURE} --validation {STRUCTURE} --validation {STRUCTURE} -o {tmp_path} --box 32 --angpix 4 --snr 1"
    words += " --crop 16 --steps 2 --width 1 --maps 2 --judged 6"
    shown = CliRunner().invoke(feature_training.main, [*words.split(), "--case", "a micelle's belt"])
    assert shown.exit_code == 0, shown.output
    none, belt = [line.strip("| ").split(" | ") for line in shown.stdout.splitlines()[2:]]
    assert none[0] == NONE
    assert belt[0] == "a micelle's belt"
    for cell in [*belt[1].split(" / "), belt[4], none[-3]]:
        assert 0.5 < float(cell) < 2  # of a network that has learnt nothing: the map as it is
    first, second = (find_model(str(tmp_path / name)).folder for name in ("none", "a_micelle_s_belt"))
    assert (first / "model.keras").read_bytes() != (second / "model.keras").read_bytes()
