"""The comparison of weights for both halves together: a network that finds the truth, and one that finds nothing."""

from pathlib import Path

import joined
import numpy as np
import pytest
from features import Case, pairs_with

from cryored.maps.fsc import whole_set_fsc
from cryored.prior.models import find_model
from cryored.prior.weights import model_calibration
from cryored.simulation.intermediates import Experiment
from cryored.simulation.structure import read_atoms

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
ANGPIX = 4.0


def test_the_figures_are_of_the_average():
    how = {"box": 32, "angpix": ANGPIX, "seed": 0}
    pairs = list(pairs_with(read_atoms(STRUCTURE), Case(), Experiment(100, 0.2, angle=8.0), **how))
    first, last = joined.joined(pairs)
    assert first[0] is pairs[0] and last[1] is pairs[-1]
    assert all(not np.array_equal(a.noisy, b.noisy) and np.array_equal(a.fsc, b.fsc) for a, b in (first, last))
    weights = model_calibration(find_model("cwred"))
    told = whole_set_fsc(np.clip(last[0].fsc, 0, 1))

    def judge(network):
        return joined.judge(lambda volume, fsc: volume.with_data(network(volume)), weights, last, told, ANGPIX)

    right = judge(lambda volume: last[0].truth)
    nothing = judge(lambda volume: 0 * volume.data)
    assert right[0] == pytest.approx(0, abs=0.01)
    assert right[1] < 0.2
    assert nothing[0] == pytest.approx(1, abs=0.01)
    assert right[1] < nothing[1] and right[2] > nothing[2] and right[3] < nothing[3]
