"""Errors of orientations: known turns, and files that list particles in any order."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryored.errors import InputError
from cryored.files.star import write_star
from cryored.reconstruction.orientations import angular_error, angular_error_file, common_rotation
from cryored.reconstruction.projection import (
    angular_distance,
    euler_angles,
    perturb,
    random_rotations,
    rotation_matrices,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def turns(degrees, seed):
    """One turn by `degrees` about a random axis for each of 200 particles."""
    axes = rng(seed).standard_normal((200, 3))
    return Rotation.from_rotvec(degrees * axes / np.linalg.norm(axes, axis=1, keepdims=True), degrees=True).as_matrix()


@pytest.mark.parametrize("degrees", [0.0, 0.01, 5.0, 120.0, 180.0])
@pytest.mark.parametrize("side", ["image", "map"])
def test_a_turn_is_an_error_of_its_angle(degrees, side):
    truth = random_rotations(200, rng=rng())
    turn = turns(degrees, 1)
    refined = turn @ truth if side == "image" else truth @ turn
    # The arcsine near 180 degrees turns a rounding error of 1e-16 into its square root, a few 1e-6 degrees.
    np.testing.assert_allclose(angular_error(refined, truth), degrees, atol=1e-5)
    np.testing.assert_allclose(angular_error(truth, refined), degrees, atol=1e-5)


def test_euler_angles_that_differ_may_be_one_orientation():
    """At the pole rot and psi turn about one axis; and rot, tilt, psi is rot + 180, -tilt, psi - 180."""
    refined = rotation_matrices([10.0, 30.0], [0.0, 50.0], [20.0, 70.0])
    truth = rotation_matrices([20.0, 210.0], [0.0, -50.0], [10.0, -110.0])
    np.testing.assert_allclose(angular_error(refined, truth), 0, atol=1e-12)


def test_align_takes_off_the_turn_of_the_map_alone():
    truth = random_rotations(500, rng=rng())
    refined = perturb(truth, 4.0, rng=rng(1))
    whole = rotation_matrices([20.0], [25.0], [-40.0])[0]
    turn = angular_distance(whole[None], np.eye(3)[None])[0]
    assert angular_error(truth @ whole, truth) == pytest.approx(turn)
    np.testing.assert_allclose(angular_error(truth @ whole, truth, align=True), 0, atol=1e-10)
    # The errors that are left do not depend on how the map lay.
    left = angular_error(refined, truth, align=True)
    np.testing.assert_allclose(angular_error(refined @ whole, truth, align=True), left, atol=1e-10)
    # The mean of 500 errors of 4 degrees is known to 0.18 degrees.
    np.testing.assert_allclose(left, angular_error(refined, truth), atol=0.6)
    # A turn of the images is no turn of the map: nothing to take off.
    assert np.median(angular_error(whole @ truth, truth, align=True)) > 0.8 * turn


def test_the_common_rotation_stands_particles_that_are_lost():
    truth = random_rotations(1000, rng=rng())
    whole = rotation_matrices([20.0], [25.0], [-40.0])[0]
    refined = np.concatenate([truth[:500] @ whole, random_rotations(500, rng=rng(1))])
    # 500 random matrices add up to sqrt(500 / 3) an element, against 500: 1.5 degrees for each of three axes.
    assert angular_distance(common_rotation(refined, truth)[None], whole[None])[0] < 6


def test_the_common_rotation_is_no_reflection():
    reflections = 0
    for seed in range(20):
        refined, truth = random_rotations(5, rng=rng(seed)), random_rotations(5, rng=rng(seed + 100))
        reflections += np.linalg.det((truth.transpose(0, 2, 1) @ refined).sum(axis=0)) < 0
        rotation = common_rotation(refined, truth)
        assert np.linalg.det(rotation) == pytest.approx(1)
        best = np.sum((refined - truth @ rotation) ** 2)
        for other in random_rotations(200, rng=rng(seed + 200)):
            assert np.sum((refined - truth @ other) ** 2) >= best
    assert reflections  # such sums did occur


def write(path, rotations, names):
    rot, tilt, psi = euler_angles(rotations)
    particles = {"rlnImageName": names, "rlnAngleRot": rot, "rlnAngleTilt": tilt, "rlnAnglePsi": psi}
    write_star(path, {"optics": {"rlnOpticsGroup": [1], "rlnImagePixelSize": [1.5]}, "particles": particles})
    return path


def names(n):
    return [f"{i:06d}@particles.mrcs" for i in range(1, n + 1)]


@pytest.mark.parametrize("align", [False, True])
def test_files_are_matched_by_image(tmp_path, align):
    truth = random_rotations(30, rng=rng())
    refined = perturb(truth, 5.0, rng=rng(1))
    order = rng(2).permutation(30)[:20]
    star = write(tmp_path / "run_data.star", refined[order], [names(30)[i] for i in order])
    found = angular_error_file(star, write(tmp_path / "truth.star", truth, names(30)), align=align)
    expected = angular_error(refined[order], truth[order], align=align)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # angles are written with six decimals


def test_files_that_do_not_match(tmp_path):
    truth = random_rotations(5, rng=rng())
    five = write(tmp_path / "five.star", truth, names(5))
    three = write(tmp_path / "three.star", truth[:3], names(3))
    twice = write(tmp_path / "twice.star", truth[:3], [*names(2), names(1)[0]])
    with pytest.raises(InputError, match=r"five.star: 2 of 5 particles are not in .*three.star, the first .000004@"):
        angular_error_file(five, three)
    for pair in ((twice, five), (five, twice)):
        with pytest.raises(InputError, match="twice.star: '000001@particles.mrcs' 2 times in _rlnImageName"):
            angular_error_file(*pair)
    write_star(tmp_path / "other.star", {"particles": {"rlnImageName": names(5)}})
    with pytest.raises(InputError, match="other.star: the column _rlnAngleRot is missing from data_particles"):
        angular_error_file(tmp_path / "other.star", five)
