"""The starting references of benchmarks/starts.py, and its table by RELION."""

from pathlib import Path

import numpy as np
import pytest
import starts
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter

from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
BOX, ANGPIX = 48, 4.0


@pytest.fixture(scope="module")
def made():
    """Each start of an ellipsoid; in the place of another molecule a rod."""
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    molecule = ((z / 9) ** 2 + (y / 7) ** 2 + (x / 6) ** 2 < 1).astype(np.float32)
    rod = ((z / 4) ** 2 + (y / 4) ** 2 + (x / 14) ** 2 < 1).astype(np.float32)
    reference = Volume(gaussian_filter(molecule, 1.5), ANGPIX)
    return reference, {name: start(reference, rod, np.random.default_rng(3)) for name, start in starts.STARTS.items()}


def spread(data):
    """Root mean square distance from the centre of mass along each axis, in voxels."""
    places = np.indices(data.shape)
    weight = np.maximum(data, 0) / np.maximum(data, 0).sum()
    centre = (places * weight).sum(axis=(1, 2, 3))
    return np.sqrt((((places.T - centre).T ** 2) * weight).sum(axis=(1, 2, 3)))


def test_every_start_has_the_grid_and_is_finite(made):
    reference, found = made
    assert all(data.shape == reference.shape and np.isfinite(data).all() for data in found.values())
    wrong = [name for name, data in found.items() if np.allclose(data, reference.data)]
    assert wrong == ["the molecule"]


def test_the_mass_is_kept_where_nothing_is_cut_or_added(made):
    reference, found = made
    mass = {name: float(data.sum() / reference.data.sum()) for name, data in found.items()}
    for name in ("at 60 A", "smeared along an axis", "a ball in its place", "another molecule"):
        assert mass[name] == pytest.approx(1, abs=0.01)
    assert mass["a third cut off"] == pytest.approx(2 / 3, abs=0.05)
    assert mass["a tenth larger"] == pytest.approx(1.1**3, abs=0.05)
    assert mass["a ball beside it"] == pytest.approx(4 / 3, abs=0.01)


def test_shapes_are_what_their_names_say(made):
    reference, found = made
    own = spread(reference.data)
    assert spread(found["a tenth larger"]) == pytest.approx(1.1 * own, rel=0.03)
    ball = spread(found["a ball in its place"])
    assert ball.max() / ball.min() < 1.02 < own.max() / own.min()
    smeared = np.sort(spread(found["smeared along an axis"]) ** 2 - own**2)
    assert np.sqrt(smeared[2]) == pytest.approx(15.0 / ANGPIX, rel=0.15)
    assert np.abs(smeared[:2]).max() < 1.0
    noise = found["with noise of its power"] - reference.data
    assert noise.std() == pytest.approx(reference.data.std(), rel=0.01)


def test_the_ball_beside_the_molecule_is_at_its_rim(made):
    reference, found = made
    added = found["a ball beside it"] - reference.data
    inside = soft_mask(reference).data > 0.5
    share = (added[inside] > 0.5 * added.max()).sum() / (added > 0.5 * added.max()).sum()
    assert 0.1 < share < 0.6


@pytest.mark.slow
@pytest.mark.relion
def test_the_table_is_of_refinements_from_each_start(tmp_path):
    arguments = [str(STRUCTURE), "-o", str(tmp_path / "out"), "--box", "32", "--angpix", "4", "--number", "60"]
    arguments += ["--snr", "1", "--start", "the molecule", "--start", "at 60 A"]
    first = CliRunner().invoke(starts.main, arguments, catch_exceptions=False)
    rows = [line.split(" | ") for line in first.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[f"| {name}", i] for name in ("the molecule", "at 60 A") for i in ("1", "2")]
    for row in rows:
        assert row[2] == "2"
        assert all(0 < float(value) < 3 for value in row[3:6])
    assert rows[0] != rows[2]
    kept = sorted(tmp_path.glob("out/*/*/pairs/*.mrc"))
    assert kept
    times = [path.stat().st_mtime_ns for path in kept]
    again = CliRunner().invoke(starts.main, arguments, catch_exceptions=False)
    assert again.stdout == first.stdout
    assert [path.stat().st_mtime_ns for path in kept] == times
