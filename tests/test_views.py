"""Views that are not even, and density with what real maps have, as `simulate` makes them."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.files.mrc import read_volume
from cryored.files.star import read_star
from cryored.maps.fourier import forward, frequencies, half_frequencies
from cryored.maps.fsc import shell_correlation
from cryored.reconstruction.back_projection import BackProjector
from cryored.reconstruction.projection import EVEN, Views, random_rotations
from cryored.simulation.features import draw_views
from cryored.simulation.pair_table import read_pairs

MODEL = str(Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz")
Z = (0.0, 0.0, 1.0)


def rng(seed=0):
    return np.random.default_rng(seed)


def beams(views, n=400):
    return views.draw(n, rng=rng())[:, 2]


def test_even_views_are_the_uniform_ones():
    np.testing.assert_array_equal(EVEN.draw(30, rng=rng()), random_rotations(30, rng=rng()))


@pytest.mark.parametrize("axis", [None, Z])
def test_views_prefer_or_avoid_an_axis(axis):
    def spread(unevenness):
        found = beams(Views(unevenness, axis=axis))
        return np.linalg.eigvalsh(found.T @ found / len(found))

    assert spread(4.0)[-1] > 0.5
    assert spread(-4.0)[0] < 0.2
    np.testing.assert_allclose(spread(0.0), 1 / 3, atol=0.07)


def test_the_density_is_what_is_said():
    along = np.abs(beams(Views(2.0, axis=Z), 4000)[:, 2])
    found, edges = np.histogram(along, 10, (0, 1))
    middle = (edges[1:] + edges[:-1]) / 2
    expected = np.exp(2 * middle**2)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=0.2)


@pytest.mark.parametrize("cone", [20.0, 45.0])
def test_of_a_missing_cone_no_coefficient_is_seen(cone):
    box = 24
    rotations = Views(missing_cone=cone, axis=Z).draw(200, rng=rng())
    projector = BackProjector(box, pad=1.0, r_max=box // 2)
    slices = np.ones((len(rotations), box, box // 2 + 1), dtype=np.complex64)
    projector.add(slices, np.ones(slices.shape, dtype=np.float32), rotations)
    seen = projector.sums().weight > 0
    z, y, x = np.meshgrid(frequencies(box), frequencies(box), half_frequencies(box), indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    angle = np.degrees(np.arccos(np.abs(z) / np.maximum(radius, 1)))
    far = (radius > 8) & (radius < box // 2 - 1)
    # Interpolation reaches one voxel beyond a slice: 7 degrees at radius 8.
    assert not seen[far & (angle < cone - 8)].any()
    assert seen[far & (angle > cone + 8)].mean() > 0.98


@pytest.mark.parametrize("unevenness", [-20.0, 20.0])
def test_the_most_uneven_views_are_found_at_once(unevenness):
    """Views that avoid the axis although only those near it are left: nearly all that is drawn would be refused."""
    along = np.abs(beams(Views(unevenness, missing_cone=80.0, axis=Z), 50)[:, 2])
    assert len(along) == 50
    assert along.min() >= np.sin(np.deg2rad(80)) - 1e-9


def test_half_of_the_data_sets_are_even():
    drawn = [draw_views(rng=rng(seed)) for seed in range(300)]
    assert 0.4 < sum(one.are_even for one in drawn) / len(drawn) < 0.6
    assert 0.1 < sum(one.missing_cone > 0 for one in drawn) / len(drawn) < 0.2


def run(*words):
    done = CliRunner().invoke(cli, ["simulate", *map(str, words)])
    assert done.exit_code == 0, done.stderr
    return done


def test_particles_with_a_missing_cone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("map", MODEL, "-o", "map.mrc", "--box", 24, "--angpix", 5)
    run("particles", "map.mrc", "-o", "sim", "--number", 60, "--missing-cone", 60, "-q")
    tilt = read_star("sim_truth.star").numbers("particles", "rlnAngleTilt")
    along = np.abs(np.cos(np.deg2rad(tilt)))
    assert along.min() >= np.sin(np.deg2rad(60)) - 1e-6
    assert np.ptp(along) > 0.05


@pytest.mark.parametrize(
    "option",
    [
        ("--bfactor", 200),
        ("--bfactor-spread", 80),
        ("--motion", 15),
        ("--glycans", 12),
        ("--belt", 0.9),
        ("--solvent", 0.7),
    ],
)
def test_each_feature_has_its_option(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    grid = ("--box", 24, "--angpix", 5, "--resolution", 6)
    run("map", MODEL, "-o", "plain.mrc", *grid)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("map", MODEL, "-o", f"{name}.mrc", *grid, *option, "--seed", seed)
    plain, first, again, other = (read_volume(f"{name}.mrc").data for name in ("plain", "a", "b", "c"))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (option[0] in ("--bfactor", "--solvent"))
    change = np.linalg.norm(first - plain) / np.linalg.norm(plain)
    assert 0.02 < change < 0.9
    assert shell_correlation(first, plain)[:4].min() > 0.6


def test_a_bfactor_is_a_bfactor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = ("--box", 24, "--angpix", 5)
    run("map", MODEL, "-o", "plain.mrc", *grid)
    run("map", MODEL, "-o", "decayed.mrc", *grid, "--bfactor", 300)
    before, after = (forward(read_volume(f"{name}.mrc").data) for name in ("plain", "decayed"))
    for k in (2, 5, 8):
        expected = np.exp(-300 / 4 * (k / 120) ** 2)
        assert abs(after[k, 0, 0] / before[k, 0, 0]) == pytest.approx(expected, rel=1e-3)


def test_features_are_for_gaussian_maps(tmp_path, assert_one_line_error):
    words = ["simulate", "map", MODEL, "-o", str(tmp_path / "a.mrc"), "--method", "potential", "--glycans", "3"]
    assert_one_line_error(CliRunner().invoke(cli, words), "features of real maps are for the method gaussian")


@pytest.mark.slow
def test_pairs_of_featured_density(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("featured", "intermediates"):
        run("pairs", MODEL, "-o", method, "--method", method, "--number", 2, "--box", 24, "--angpix", 5, "-q")
    rows = read_pairs("featured/pairs.star")
    assert {row.half for row in rows} == {1, 2}
    assert {row.method for row in rows} == {"featured"}
    truths = [read_volume(f"{method}/6M2B_001_truth.mrc").data for method in ("featured", "intermediates")]
    assert np.linalg.norm(truths[0] - truths[1]) > 0.01 * np.linalg.norm(truths[1])
