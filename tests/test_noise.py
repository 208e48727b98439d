"""Noise of a measured spectrum: what is drawn, and what is no spectrum."""

from pathlib import Path

import numpy as np
import pytest

from cryored.errors import InputError
from cryored.files.star import read_star
from cryored.simulation.noise import Spectrum, draw_noise, noise_filter, read_spectrum

MODEL = Path(__file__).parent / "data/relion_requests/pka_box64_pad1/run/run_it002_half1_model.star"


def streams(number, seed=0):
    return [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(number)]


def radius(box):
    """Distance from the zero frequency, in Fourier pixels, of the coefficients of a full transform."""
    axis = np.fft.fftfreq(box) * box
    return np.hypot(axis[:, None], axis)


def measured(noise):
    """Mean power of each coefficient, for a variance of 1 of white noise, over a full transform."""
    return (abs(np.fft.fft2(noise.astype(np.float64))) ** 2).mean(axis=0) / noise[0].size


def write_model(path, groups, kind="model_group"):
    """Lay out groups of (frequency, power) as RELION does."""
    lines = ["data_model_general", "", "_rlnPixelSize 1.5", ""]
    for number, (frequency, power) in enumerate(groups, 1):
        lines += [f"data_{kind}_{number}", "", "loop_"]
        lines += ["_rlnSpectralIndex #1", "_rlnResolution #2", "_rlnSigma2Noise #3"]
        lines += [f"{i} {f} {p}" for i, (f, p) in enumerate(zip(frequency, power, strict=True))]
        lines += [""]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(("box", "voxel_size"), [(32, 3.0), (30, 2.0), (33, 4.0)])
def test_noise_has_the_power_asked_for_at_each_spatial_frequency(box, voxel_size):
    # Steep and then flat, and known to 0.14 1/A only: a box of 2 A a pixel reaches 0.25.
    spectrum = Spectrum(np.array([0.0, 0.04, 0.08, 0.14]), 7.0 * np.array([6.0, 2.0, 1.0, 0.5]))
    noise = draw_noise(streams(1500), box, noise_filter(spectrum, box, voxel_size))
    assert noise.shape == (1500, box, box) and noise.dtype == np.float32
    frequency = radius(box) / (box * voxel_size)
    asked = np.interp(frequency, spectrum.frequency, spectrum.power)
    asked /= asked.mean()
    found = measured(noise)
    shells = np.rint(radius(box)).astype(int)
    for shell in range(shells.max() + 1):  # to the corners
        inside = shells == shell
        # Power is exponentially distributed, and half of the coefficients are the others' conjugates.
        error = np.sqrt(2.0 / (1500 * inside.sum()))
        assert (found / asked)[inside].mean() == pytest.approx(1.0, abs=5 * error), shell
    assert noise.var() == pytest.approx(1.0, rel=0.01)


def test_noise_is_the_same_in_all_directions_and_new_in_each_image():
    spectrum = Spectrum(np.array([0.0, 0.2]), np.array([4.0, 1.0]))
    noise = draw_noise(streams(2000), 32, noise_filter(spectrum, 32, 2.5))
    power = measured(noise)
    ring = np.rint(radius(32)) == 8
    y, x = np.indices((32, 32))
    along_x, along_y = (abs((i + 16) % 32 - 16) < 4 for i in (y, x))
    # A ring's half has 20 coefficients or so: 2000 images know its power to 1 %.
    assert power[ring & along_x].mean() == pytest.approx(power[ring & along_y].mean(), rel=0.04)
    assert abs((noise[1:] * noise[:-1]).mean()) < 10 / np.sqrt(noise.size)


def test_a_flat_spectrum_changes_nothing():
    flat = noise_filter(Spectrum(np.array([0.0, 0.1]), np.array([3e-4, 3e-4])), 24, 2.0)
    np.testing.assert_allclose(flat, 1.0, rtol=1e-6)
    np.testing.assert_allclose(draw_noise(streams(3), 24, flat), draw_noise(streams(3), 24), atol=1e-5)


@pytest.mark.parametrize("colour", [None, noise_filter(Spectrum(np.array([0.0, 0.1]), np.array([3.0, 1.0])), 30, 3.0)])
def test_an_image_is_the_same_whatever_is_drawn_beside_it(colour):
    together = draw_noise(streams(7), 30, colour)
    for number in range(7):
        np.testing.assert_array_equal(draw_noise(streams(7)[number : number + 1], 30, colour)[0], together[number])


def test_the_filter_does_not_depend_on_the_unit_of_power():
    frequency, power = np.linspace(0, 0.2, 9), np.linspace(3, 1, 9)
    np.testing.assert_allclose(
        noise_filter(Spectrum(frequency, 1e-4 * power), 32, 2.0),
        noise_filter(Spectrum(frequency, power), 32, 2.0),
        rtol=1e-6,
    )


# Files


def test_recorded_model():
    spectrum = read_spectrum(MODEL)
    table = read_star(MODEL)
    np.testing.assert_array_equal(spectrum.frequency, table.numbers("model_group_1", "rlnResolution"))
    sigma2 = table.numbers("model_group_1", "rlnSigma2Noise")
    np.testing.assert_allclose(spectrum.power, sigma2 / sigma2.mean())


def test_groups_are_averaged_whatever_their_unit_and_grid(tmp_path):
    """Optics groups of another box and pixel size: 100 times the power, twice as many frequencies."""
    coarse, fine = np.linspace(0, 0.2, 5), np.linspace(0, 0.2, 9)
    groups = [(coarse, 1 + coarse), (coarse, np.zeros(5)), (fine, 100 * (1.2 - fine))]
    spectrum = read_spectrum(write_model(tmp_path / "model.star", groups, "model_optics_group"))
    np.testing.assert_array_equal(spectrum.frequency, coarse)
    np.testing.assert_allclose(spectrum.power, 1.0, rtol=1e-6)  # one rises as the other falls


GOOD = [0.0, 0.1, 0.2]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(GOOD, [1, 0, 1])], "_rlnSigma2Noise in data_model_group_1 is 0 at 0.1 1/A, expected a power above 0"),
        ([(GOOD, [1, 1, -2])], "_rlnSigma2Noise in data_model_group_1 is -2 at 0.2 1/A"),
        ([(GOOD, [1, 1, 1]), (GOOD, ["nan", 1, 1])], "_rlnSigma2Noise in data_model_group_2 is nan at 0 1/A"),
        ([(GOOD, [1, "inf", 1])], "_rlnSigma2Noise in data_model_group_1 is inf at 0.1 1/A"),
        ([(GOOD, [1, "much", 1])], "_rlnSigma2Noise in data_model_group_1: could not convert"),
        ([(GOOD, [0, 0, 0])], "_rlnSigma2Noise is 0 throughout, expected the measured power of noise"),
        ([([0.0, 0.1, 0.1], [1, 1, 1])], "_rlnResolution in data_model_group_1 does not increase"),
        ([(["nan", 0.1, 0.2], [1, 1, 1])], "_rlnResolution in data_model_group_1 does not increase"),
        ([([-0.1, 0.1, 0.2], [1, 1, 1])], "_rlnResolution in data_model_group_1 does not increase"),
        ([], "found data_model_general, expected data_model_group_1 or data_model_optics_group_1"),
    ],
)
def test_spectra_that_are_none(tmp_path, groups, message):
    with pytest.raises(InputError) as caught:
        read_spectrum(write_model(tmp_path / "model.star", groups))
    assert str(caught.value).startswith(f"{tmp_path}/model.star: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"loop_ nonsense", "no STAR file"),
        (b"\x00\xff\xfe", "no STAR file"),
        (b"", "found no block at all, expected data_model_group_1"),
        (b"data_model_group_1\nloop_\n_rlnResolution\n0.0\n", "the column _rlnSigma2Noise is missing"),
        (b"data_model_group_1\nloop_\n_rlnSigma2Noise\n1.0\n", "the column _rlnResolution is missing"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, message):
    path = tmp_path / "model.star"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_spectrum(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="gone.star: cannot be read: No such file"):
        read_spectrum(tmp_path / "gone.star")
