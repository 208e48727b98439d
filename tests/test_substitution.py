"""The test for invented detail: the noise that stands for the signal, and denoisers that invent or do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cryored.assessment.noise_substitution import substitute_noise, substituted_correlation
from cryored.errors import InputError
from cryored.maps.fourier import apply_shells, forward, shell_index, shell_power
from cryored.maps.fsc import shell_correlation
from cryored.maps.volume import soft_sphere

SHAPES = [(24, 24, 24), (25, 25, 25), (24, 20, 17), (15, 16, 30)]
# Rounding of the transforms alone: a few eps at unit correlation.
EXACT = {np.float32: 1e-6, np.float64: 1e-14}


def noise(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_has_the_power_of_what_it_replaces(shape, dtype):
    data = noise(shape, 30, dtype) + noise(shape, 31, dtype)[::-1]
    result = substitute_noise(data, 5, rng=np.random.default_rng(0))
    assert result.dtype == dtype
    old, new = forward(data), forward(result)
    size = np.abs(old).max()
    np.testing.assert_allclose(np.abs(new), np.abs(old), atol=EXACT[np.float32] * size)
    np.testing.assert_allclose(shell_power(new, shape), shell_power(old, shape), rtol=1e-5)
    before = shell_index(shape) < 5
    np.testing.assert_allclose(new[before], old[before], atol=EXACT[dtype] * size)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_has_nothing_in_common_with_the_signal_or_other_noise(shape):
    data = noise(shape, 32)
    rng = np.random.default_rng(1)
    noisy = [substitute_noise(data, 5, rng=rng) for _ in range(2)]
    counts = np.bincount(shell_index(shape).ravel())[: max(shape) // 2 + 1]
    for pair in ((data, noisy[0]), noisy):
        curve = shell_correlation(*pair)
        np.testing.assert_allclose(curve[:5], 1, atol=1e-5)
        assert np.all(np.abs(curve) * np.sqrt(counts) < 4, where=np.arange(len(curve)) >= 5)
        assert np.std((curve * np.sqrt(counts))[5:]) > 0.4


@pytest.fixture(scope="module")
def halves():
    """Two half-maps of a signal that is as strong as the noise in all shells."""
    shape = (40, 40, 40)
    return [noise(shape, 33) + noise(shape, 34 + half) for half in range(2)]


def test_a_denoiser_that_does_nothing_invents_nothing(halves):
    result = substituted_correlation(*halves, lambda data: data, 8, rng=np.random.default_rng(2))
    np.testing.assert_array_equal(result.denoised, shell_correlation(*halves))
    np.testing.assert_array_equal(result.denoised_substituted, result.substituted)
    np.testing.assert_allclose(result.substituted[:8], result.denoised[:8], atol=1e-5)
    counts = np.bincount(shell_index((40, 40, 40)).ravel())[8:21]
    assert np.all(np.abs(result.substituted[8:]) * np.sqrt(counts) < 4)
    assert result.denoised[8:].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("masked", [False, True])
def test_detail_that_a_denoiser_puts_into_both_halves_is_found(halves, masked):
    """As strong as the map it correlates at 1/2, wherever the maps come from."""
    shape = halves[0].shape
    detail = math.sqrt(2) * apply_shells(noise(shape, 40), np.arange(21) >= 8)
    result = substituted_correlation(
        *halves,
        lambda data: data + detail,
        8,
        rng=np.random.default_rng(3),
        mask=soft_sphere(shape, 15, 3) if masked else None,
    )
    # A shell of 600 coefficients and more is known to 0.02, within the mask, a fifth of the box, to 0.05.
    np.testing.assert_allclose(result.denoised_substituted[10:], 0.5, atol=0.2)
    assert result.denoised_substituted[10:].mean() == pytest.approx(0.5, abs=0.05)
    assert abs(result.substituted[10:].mean()) < 0.05
    if not masked:  # a mask mixes the shells
        np.testing.assert_allclose(result.denoised_substituted[:8], result.denoised[:8], atol=1e-5)


def test_detail_that_follows_from_the_shape_is_found_too():
    """A sharp envelope, made of the shells below the limit: each half extrapolates, and both alike."""
    shape = (40, 40, 40)
    blob = 50 * apply_shells(noise(shape, 41) * soft_sphere(shape, 9, 4), np.arange(21) < 5)
    halves = [blob + noise(shape, 42 + half) for half in range(2)]

    def binarise(data):
        return (apply_shells(data, np.arange(21) < 5) > 5).astype(np.float32)

    result = substituted_correlation(*halves, binarise, 8, rng=np.random.default_rng(4))
    assert result.substituted[8:].max() < 0.15
    assert result.denoised_substituted[8:].min() > 0.5


def test_the_share_of_the_mask_is_in_the_control():
    shape = (32, 32, 32)
    common = 10 * apply_shells(noise(shape, 43), np.arange(17) < 6)
    halves = [common + noise(shape, 44 + half) for half in range(2)]
    curves = [
        substituted_correlation(*halves, lambda data: data, 6, rng=np.random.default_rng(5), mask=mask).substituted
        for mask in (None, soft_sphere(shape, 5, 2))
    ]
    assert abs(curves[0][6]) < 0.1
    assert curves[1][6] > 0.5


@pytest.mark.parametrize("start", [0, 21])
def test_noise_begins_within_the_shells_only(halves, start):
    with pytest.raises(InputError, match=f"noise from shell {start} on, expected 1 to 20; give another --subst"):
        substituted_correlation(*halves, lambda data: data, start, rng=np.random.default_rng(0))
