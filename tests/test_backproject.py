"""Back-projection: identities, and RELION's own B, K, FSC and tau2."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cryored.errors import InputError
from cryored.files.mrc import read_array, write_volume
from cryored.files.requests import read_request_file
from cryored.files.star import read_star
from cryored.maps.fourier import squared_radius
from cryored.maps.fsc import shell_correlation
from cryored.maps.volume import Volume
from cryored.reconstruction.back_projection import BackProjector, half_map_correlation
from cryored.reconstruction.projection import Projector, images, random_rotations, rotation_matrices, shift_phases
from cryored.reconstruction.sums import load_sums
from cryored.reconstruction.update import reconstruct
from cryored.simulation.particles import ParticleOptions, simulate_particles_file

BOX = 32
REQUESTS = Path(__file__).parent / "data" / "relion_requests"


def rng(seed=0):
    return np.random.default_rng(seed)


def blobs(box=BOX, number=30):
    """A map of narrow Gaussians in the middle half of the box."""
    z, y, x = np.indices((box,) * 3) - box // 2
    centres = rng(1).uniform(-box / 5, box / 5, (number, 3))
    return sum(np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 1.5) for a, b, c in centres).astype(np.float32)


def ones(box=BOX):
    return np.ones((box, box // 2 + 1), dtype=np.float32)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def arrays(sums):
    return np.asarray(sums.real) + 1j * np.asarray(sums.imag), np.asarray(sums.weight)


@pytest.mark.slow
@pytest.mark.parametrize("pad", [1.0, 1.5, 2.0])
def test_projected_and_back_projected_a_map_is_itself(pad):
    truth = blobs()
    rotations = random_rotations(600, rng=rng(2))
    projector = BackProjector(BOX, pad=pad, r_max=BOX // 2 - 1)
    projector.add(Projector(truth).slices(rotations), ones(), rotations)
    found = reconstruct(projector.sums())
    assert shell_correlation(found, truth)[: BOX // 2 - 2].min() > (0.98 if pad == 1 else 0.99)
    # The scale is the map's own; at padding 1 linear interpolation costs a few per cent.
    assert np.vdot(found, truth) / np.vdot(truth, truth) == pytest.approx(1.0, abs=0.06 if pad == 1 else 0.02)


@pytest.mark.parametrize("pad", [1.0, 2.0])
def test_runs_add_up(pad):
    rotations = random_rotations(9, rng=rng(3))
    slices = Projector(blobs()).slices(rotations)
    together, apart = (BackProjector(BOX, pad=pad, r_max=10) for _ in range(2))
    together.add(slices, ones(), rotations)
    for i in range(9):
        apart.add(slices[i : i + 1], ones(), rotations[i : i + 1])
    for a, b in zip(arrays(together.sums()), arrays(apart.sums()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())  # float32 sums in the same order


def test_one_slice_at_several_rotations_counts_by_its_factors():
    slices = Projector(blobs()).slices(random_rotations(2, rng=rng(4)))
    weights = rng(5).uniform(0.5, 1.5, (2, *ones().shape)).astype(np.float32)
    rotations = random_rotations(3, rng=rng(6))
    index, factors = np.array([1, 0, 1]), np.array([0.25, 1.0, 0.75])
    found, expected = BackProjector(BOX), BackProjector(BOX)
    found.add(slices, weights, rotations, index=index, factors=factors)
    scale = factors[:, None, None].astype(np.float32)
    expected.add(slices[index] * scale, weights[index] * scale, rotations)
    for a, b in zip(arrays(found.sums()), arrays(expected.sums()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_shifted_particles_are_brought_back():
    rotations = random_rotations(20, rng=rng(7))
    slices = Projector(blobs()).slices(rotations)
    shifts = rng(8).normal(scale=3.0, size=(20, 2))
    found, expected = BackProjector(BOX, r_max=12), BackProjector(BOX, r_max=12)
    found.add(slices * shift_phases(BOX, *shifts.T), ones(), rotations, shifts=shifts)
    expected.add(slices, ones(), rotations)
    assert relative(arrays(found.sums())[0], arrays(expected.sums())[0]) < 1e-5
    np.testing.assert_array_equal(found.sums().weight, expected.sums().weight)


def test_friedel_mates_are_conjugates():
    rotations = random_rotations(40, rng=rng(9))
    projector = BackProjector(BOX)
    projector.add(Projector(blobs()).slices(rotations), ones(), rotations)
    data, weight = (array[:, :, 0] for array in arrays(projector.sums()))
    minus = -np.arange(BOX) % BOX
    mates = data[np.ix_(minus, minus)].conj()
    mates[0, 0] = data[0, 0]  # its own mate; its imaginary part is left alone, as by RELION, and means nothing
    np.testing.assert_allclose(data, mates, atol=1e-6 * np.abs(data).max())
    np.testing.assert_allclose(weight, weight[np.ix_(minus, minus)], rtol=1e-6)


def test_weight_is_neither_lost_nor_made():
    """A slice's weight is spread over eight neighbours whose parts add up to it."""
    projector = BackProjector(BOX, r_max=10)
    rotations = random_rotations(5, rng=rng(10))
    y, x = np.indices(ones().shape)
    y = np.where(y <= BOX // 2, y, y - BOX)
    inside = x**2 + y**2 < 100  # at radius 10 itself rounding decides
    projector.add(np.zeros((5, *ones().shape), np.complex64), inside.astype(np.float32), rotations)
    weight = projector.sums().weight
    # In x > 0 once, in the plane x = 0 twice (each point and its mate), but for the zero frequency.
    total = weight[:, :, 1:].sum() + (weight[:, :, 0].sum() + weight[0, 0, 0]) / 2
    assert total == pytest.approx(5 * (inside & ((x > 0) | (y >= 0))).sum(), rel=1e-5)


def test_wrong_shapes():
    projector = BackProjector(BOX)
    with pytest.raises(InputError, match="slices of shape .* for 2 rotations and a box of 32"):
        projector.add(np.zeros((3, BOX, BOX // 2 + 1), np.complex64), ones(), np.stack([np.eye(3)] * 2))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("box32_pad2", "run_it004_half{}_class001_external_reconstruct.star"),
        ("pka_box64_pad1", "run_it003_half{}_class001_external_reconstruct.star"),
    ],
)
def test_fsc_of_recorded_halves_is_what_relion_found(monkeypatch, case, name):
    monkeypatch.chdir(REQUESTS / case)
    requests = [read_request_file("run/" + name.format(half)) for half in (1, 2)]
    found = half_map_correlation(*(load_sums(request) for request in requests))
    known = slice(0, requests[0].ori // 2)  # beyond padding 1, RELION's Nyquist shell lacks half of its mates
    np.testing.assert_allclose(found[known], requests[0].fsc[known], atol=1e-6)  # six decimals in the STAR


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="relion_reconstruct is not on the PATH")
@pytest.mark.parametrize("pad", [1, 2])
def test_sums_are_those_of_relion_reconstruct(tmp_path, monkeypatch, pad):
    """With unit weights. RELION drops the images' zero frequency here, and rounding decides on |k| = r_max."""
    monkeypatch.chdir(tmp_path)
    write_volume("map.mrc", Volume(blobs(), 3.0), label="test")
    simulate_particles_file("map.mrc", "sim", ParticleOptions(50, float("inf"), apply_ctf=False))
    command = f"relion_reconstruct --i sim_truth.star --o rec.mrc --pad {pad} --external_reconstruct"
    # The hook has only to end well, and this one does.
    monkeypatch.setenv("RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE", "cp map.mrc rec_external_reconstruct.mrc; true")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    star = read_star("sim_truth.star")
    rotations = rotation_matrices(*(star.numbers("particles", f"rlnAngle{a}") for a in ("Rot", "Tilt", "Psi")))
    particles = read_array("sim.mrcs", (50, BOX, BOX))
    slices = np.fft.rfft2(np.fft.ifftshift(particles, axes=(1, 2))).astype(np.complex64)
    slices[:, 0, 0] = 0.0
    projector = BackProjector(BOX, pad=pad)
    projector.add(slices, ones(), rotations)
    sums = projector.sums()
    n = sums.n
    inside = squared_radius(n) < (pad * BOX // 2 - 2) ** 2  # two voxels from there
    for name, found in (("data_real", sums.real), ("data_imag", sums.imag), ("weight", sums.weight)):
        expected = read_array(f"rec_external_reconstruct_{name}.mrc", (n, n, n // 2 + 1))
        assert relative(found[inside], expected[inside]) < 1e-6


def test_images_of_slices_are_what_was_added():
    """The factor of RELION's transforms: B / K of one image at no rotation is the image's transform over box**2."""
    projector = BackProjector(BOX)
    slices = Projector(blobs()).slices(np.eye(3)[None])
    projector.add(slices, ones(), np.eye(3)[None])
    data, _ = arrays(projector.sums())
    np.testing.assert_allclose(data[0, :, 1:10] * BOX**2, slices[0, :, 1:10], atol=1e-5 * np.abs(slices).max())
    assert images(slices, BOX).shape == (1, BOX, BOX)
