"""The comparison of the features of real maps: an experiment that differs by the feature alone, and its figures."""

from pathlib import Path

import features
import numpy as np
import pytest

from cryored.prior.models import find_model
from cryored.simulation.features import Features
from cryored.simulation.intermediates import Experiment
from cryored.simulation.structure import read_atoms

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
ANGPIX = 4.0


def pairs(**what):
    case, experiment = features.Case(Features(**what)), Experiment(100, 0.2, angle=8.0)
    return list(features.pairs_with(read_atoms(STRUCTURE), case, experiment, box=32, angpix=ANGPIX, seed=0))


@pytest.fixture(scope="module")
def ideal():
    return pairs()


def test_what_differs_is_the_feature(ideal):
    again, other = pairs(), pairs(bfactor=200)
    assert len(ideal) >= 2
    np.testing.assert_array_equal(ideal[0].noisy, again[0].noisy)
    likeness = np.corrcoef(ideal[0].truth.ravel(), other[0].truth.ravel())[0, 1]
    assert 0.5 < likeness < 0.999


@pytest.mark.parametrize("how", [{}, {"masked": True}, {"sharpening": 60.0}])
def test_a_denoised_map_that_is_the_truth_has_no_error(ideal, how):
    pair, seen = ideal[0], []

    def denoise(volume, fsc):
        seen.append(volume.data)
        frequency = np.arange(17) / (32 * ANGPIX)
        sharper = np.exp(how.get("sharpening", 0) / 4 * frequency**2)
        return volume.with_data(features.apply_shells(pair.truth, sharper))

    fsc, whole, inside, alone, update = features.judge(find_model("cwred"), denoise, pair, ANGPIX, features.Case(**how))
    assert 0.143 < fsc < 1
    assert max(whole, inside, alone) < 0.02
    assert update < 0.4  # the weights know of no truth
    weighted = features.evaluation.weigh(pair.noisy, pair.fsc)
    assert (np.linalg.norm(seen[0]) < 0.99 * np.linalg.norm(weighted)) == ("masked" in how)
    plain = features.judge(find_model("cwred"), lambda volume, fsc: volume, pair, ANGPIX, features.Case())
    assert plain[3] == pytest.approx(1, abs=0.05)  # the mask comes after the filter there, before it here
