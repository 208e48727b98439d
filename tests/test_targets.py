"""The comparison of what the network is trained towards: each way counts its error as it says."""

import numpy as np
import pytest
import targets
from small_pairs import ANGPIX, BOX, write_tables

from cryored.maps.fourier import apply_shells
from cryored.simulation.pair_table import read_pairs
from cryored.training.plan import Plan

PLAN = Plan(box=BOX, crop=BOX, batch=3, pixel_size=ANGPIX, knots=4)


@pytest.mark.parametrize("way", targets.WAYS)
def test_the_loss_of_the_regularised_map_is_1(tmp_path, way):
    rows = read_pairs(write_tables(tmp_path, "pairs.star", ["x"]))
    samples = [targets.sample_of(row, PLAN, way) for row in rows]
    (maps, told), true = targets.draw_crops(samples, PLAN, np.random.default_rng(0))
    assert maps.shape == (3, BOX, BOX, BOX, 1)
    assert told.any() == (way != "not told")
    unchanged = np.zeros((3, BOX, BOX, BOX, 2), np.float32)
    loss = targets.loss_of(0.0, filtered=samples[0].shells is not None)(true, unchanged)
    assert float(loss) == pytest.approx(1, rel=0.01)


def test_the_filter_of_the_loss_is_that_of_maps():
    rng = np.random.default_rng(0)
    data = rng.standard_normal((1, BOX, BOX, BOX)).astype(np.float32)
    shells = rng.uniform(size=BOX // 2 + 1)
    radius = np.sqrt(sum(np.square(f) for f in np.meshgrid(*[np.fft.fftfreq(BOX) * BOX] * 3, indexing="ij")))
    index = np.floor(radius + 0.5).astype(int)
    factor = np.where(index <= BOX // 2, shells[np.minimum(index, BOX // 2)], 0.0).astype(np.float32)
    found = np.asarray(targets._filtered(data, factor[None]))
    np.testing.assert_allclose(found[0], apply_shells(data[0], shells), atol=1e-5)
