"""Rotations, projections and the CTF against analytic answers and RELION's own."""

import math

import numpy as np
import pytest
import scipy.stats

from cryored.errors import InputError
from cryored.maps.volume import squared_distance
from cryored.reconstruction.projection import (
    Projector,
    angular_distance,
    ctf,
    euler_angles,
    images,
    perturb,
    random_rotations,
    rotation_matrices,
    shift_phases,
)

CHANCE = 1e-3  # p-value below which a sample is called not uniform; seeds are fixed, so this decides once


def rng(seed=0):
    return np.random.default_rng(seed)


def gaussians(box, centres, sigma):
    """Sum of Gaussians of height 1 at `centres` (m, 3), x, y, z in voxels from the map's centre."""
    z, y, x = np.indices((box,) * 3) - box // 2
    squares = sum((axis[..., None] - centres[:, i]) ** 2 for i, axis in enumerate((x, y, z)))
    return np.exp(-squares / (2 * sigma**2)).sum(axis=-1).astype(np.float32)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# Rotations


def test_matrices_are_those_that_relion_writes_out():
    rot, tilt, psi = np.deg2rad([30.0, 50.0, 70.0])
    ca, cb, cg = np.cos([rot, tilt, psi])
    sa, sb, sg = np.sin([rot, tilt, psi])
    expected = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    np.testing.assert_allclose(rotation_matrices([30], [50], [70])[0], expected, atol=1e-15)


def test_euler_angles_and_back():
    matrices = random_rotations(500, rng=rng())
    rot, tilt, psi = euler_angles(matrices)
    assert tilt.min() >= 0 and tilt.max() <= 180
    np.testing.assert_allclose(rotation_matrices(rot, tilt, psi), matrices, atol=1e-14)


@pytest.mark.parametrize("tilt", [0.0, 1e-9, 180.0])
def test_euler_angles_at_the_poles(tilt):
    matrices = rotation_matrices([20.0, -170.0], [tilt, tilt], [35.0, 80.0])
    rot, _, _ = angles = euler_angles(matrices)
    assert not rot.any()
    np.testing.assert_allclose(rotation_matrices(*angles), matrices, atol=1e-10)


def test_random_rotations_are_proper_and_uniform():
    matrices = random_rotations(20000, rng=rng(1))
    identity = np.broadcast_to(np.eye(3), matrices.shape)
    np.testing.assert_allclose(matrices @ matrices.transpose(0, 2, 1), identity, atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(matrices), 1.0, atol=1e-13)
    rot, tilt, psi = euler_angles(matrices)
    turned = np.deg2rad(angular_distance(matrices, identity))
    uniform = {
        "rot": (rot + 180) / 360,
        "tilt": (1 - np.cos(np.deg2rad(tilt))) / 2,
        "psi": (psi + 180) / 360,
        "angle of turn": (turned - np.sin(turned)) / np.pi,
    }
    for name, sample in uniform.items():
        assert scipy.stats.kstest(sample, "uniform").pvalue > CHANCE, name


@pytest.mark.parametrize("degrees", [0.01, 5.0])
def test_perturb_has_the_rms_angle_and_no_preferred_axis(degrees):
    true = random_rotations(20000, rng=rng(2))
    turned = perturb(true, degrees, rng=rng(3))
    angles = angular_distance(true, turned)
    assert np.sqrt(np.mean(angles**2)) == pytest.approx(degrees, rel=0.02)
    assert angles.mean() / degrees == pytest.approx(math.sqrt(8 / (3 * math.pi)), rel=0.02)
    step = turned @ true.transpose(0, 2, 1)
    odd = step - step.transpose(0, 2, 1)
    axes = np.stack([odd[:, 2, 1], odd[:, 0, 2], odd[:, 1, 0]])
    axes /= np.linalg.norm(axes, axis=0)
    for component in axes:  # of a uniform direction each component is uniform (Archimedes)
        assert scipy.stats.kstest((component + 1) / 2, "uniform").pvalue > CHANCE


def test_perturb_by_nothing_changes_nothing():
    true = random_rotations(5, rng=rng())
    np.testing.assert_array_equal(perturb(true, 0.0, rng=rng(1)), true)


@pytest.mark.parametrize("angle", [1e-7, 1.0, 90.0, 180.0])
def test_angular_distance(angle):
    a = rotation_matrices([10.0], [20.0], [30.0])
    b = rotation_matrices([10.0], [20.0], [30.0 + angle])
    assert angular_distance(a, b)[0] == pytest.approx(angle, rel=1e-6)


# Projections


@pytest.mark.parametrize("box", [32, 33, 45])
@pytest.mark.parametrize(("spread", "tolerance"), [(0.0, 0.005), (1 / 6, 0.02)])
def test_projected_gaussians_are_gaussians(box, spread, tolerance):
    """What remains is the error of linear interpolation, which grows towards the edge: 0.3 % and 1.8 %."""
    sigma = 2.0
    centres = rng(4).uniform(-box * spread, box * spread, (6, 3))
    rotations = random_rotations(20, rng=rng(5))
    y, x = np.indices((box, box)) - box // 2
    expected = np.zeros((20, box, box))
    for image, matrix in zip(expected, rotations, strict=True):
        for cx, cy, _ in centres @ matrix.T:
            image += np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))
    expected *= math.sqrt(2 * math.pi) * sigma
    projections = Projector(gaussians(box, centres, sigma)).project(rotations)
    assert projections.dtype == np.float32
    assert relative(projections, expected) < tolerance


@pytest.mark.parametrize("box", [16, 17])
def test_an_impulse_at_the_centre_stays_there(box):
    impulse = np.zeros((box,) * 3, dtype=np.float32)
    impulse[box // 2, box // 2, box // 2] = 1.0
    projector = Projector(impulse)
    rotations = random_rotations(100, rng=rng(6))
    slices = projector.slices(rotations)
    inside = slices[0] != 0
    np.testing.assert_allclose(slices[:, inside], 1.0, atol=1e-6)
    for image in projector.project(rotations):
        assert np.unravel_index(image.argmax(), image.shape) == (box // 2, box // 2)


@pytest.mark.parametrize("box", [16, 17])
def test_slices_reach_up_to_nyquist(box):
    impulse = np.zeros((box,) * 3, dtype=np.float32)
    impulse[(box // 2,) * 3] = 1.0
    inside = Projector(impulse).slices(np.eye(3)[None])[0] != 0
    y, x = np.indices(inside.shape)
    y = (y + box // 2) % box - box // 2
    np.testing.assert_array_equal(inside, np.hypot(x, y) < box / 2)


def test_many_at_once_are_as_one_by_one():
    projector = Projector(gaussians(24, np.array([[3.0, -2.0, 1.0]]), 1.5))
    rotations = random_rotations(7, rng=rng(7))
    together = projector.project(rotations)
    single = np.concatenate([projector.project(rotation[None]) for rotation in rotations])
    np.testing.assert_array_equal(together, single)


def test_projection_is_linear_in_the_map():
    a, b = (gaussians(20, rng(seed).uniform(-4, 4, (3, 3)), 1.5) for seed in (8, 9))
    rotations = random_rotations(4, rng=rng(10))
    both = Projector(a + 2 * b).project(rotations)
    np.testing.assert_allclose(
        both, Projector(a).project(rotations) + 2 * Projector(b).project(rotations), atol=1e-5 * both.max()
    )


def test_a_map_that_is_no_cube_is_refused():
    with pytest.raises(InputError, match="a map of 8 x 8 x 10 voxels, expected a cube"):
        Projector(np.zeros((8, 8, 10), dtype=np.float32))


@pytest.mark.parametrize("box", [16, 17])
def test_shift_by_whole_pixels(box):
    image = np.exp(-squared_distance((box, box)) / 8.0)
    transform = np.fft.rfft2(np.fft.ifftshift(image))[None]
    moved = images(transform * shift_phases(box, [3], [-2]), box)[0]
    np.testing.assert_allclose(moved, np.roll(image, (-2, 3), axis=(0, 1)), atol=1e-6)


# Contrast transfer function


def ctf_along_x(box, voxel_size, defocus, angle=0.0, other=None):
    return ctf(box, voxel_size, defocus, defocus if other is None else other, angle, 300.0, 2.7, 0.1)


def test_ctf_starts_at_the_amplitude_contrast():
    assert ctf_along_x(32, 1.5, 10000.0)[0, 0] == pytest.approx(0.1)


def test_ctf_of_pure_phase_contrast_vanishes_where_the_formula_says():
    wavelength = 0.0196875  # 300 kV, in angstrom
    defocus, box, index = 15000.0, 64, 16
    # First zero at sin(pi): lambda D k^2 = 1 without Cs and amplitude contrast.
    voxel_size = index / box * math.sqrt(wavelength * defocus)
    values = ctf(box, voxel_size, defocus, defocus, 0.0, 300.0, 0.0, 0.0)[0]
    assert abs(values[index]) < 1e-3
    assert values[1:index].min() > 0 > values[index + 1]


def test_spherical_aberration_counteracts_underfocus():
    wavelength, cs = 0.0196875, 2.7e7
    defocus, box, index = 1000.0, 64, 20
    # Both terms cancel at k^2 = 2 D / (Cs lambda^2).
    voxel_size = index / box / math.sqrt(2 * defocus / (cs * wavelength**2))
    assert abs(ctf(box, voxel_size, defocus, defocus, 0.0, 300.0, 2.7, 0.0)[0, index]) < 1e-3


def test_astigmatism_is_measured_from_x():
    astigmatic = ctf_along_x(32, 2.0, 12000.0, other=8000.0)
    np.testing.assert_allclose(astigmatic[0], ctf_along_x(32, 2.0, 12000.0)[0], atol=1e-6)
    np.testing.assert_allclose(astigmatic[:, 0], ctf_along_x(32, 2.0, 8000.0)[:, 0], atol=1e-6)
    turned = ctf_along_x(32, 2.0, 12000.0, angle=90.0, other=8000.0)
    np.testing.assert_allclose(turned[0], ctf_along_x(32, 2.0, 8000.0)[0], atol=1e-6)


def test_ctf_of_many_is_that_of_each():
    many = ctf_along_x(17, 2.0, np.array([5000.0, 9000.0]))
    assert many.shape == (2, 17, 9) and many.dtype == np.float32
    np.testing.assert_array_equal(many[1], ctf_along_x(17, 2.0, 9000.0))
