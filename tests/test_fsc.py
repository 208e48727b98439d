"""The correlation itself: by physics, against relion_postprocess and servalcat."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from cryored.assessment.fsc_of_files import FscOptions, fsc_files
from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.files.star import read_star
from cryored.maps.fourier import apply_shells, forward, inverse, shell_index, shell_power
from cryored.maps.fsc import (
    corrected_correlation,
    crossing_resolution,
    masked_correlation,
    nominal_resolution,
    shell_correlation,
    shift_between,
)
from cryored.maps.volume import Volume, soft_sphere
from cryored.prior.denoiser import Denoiser

PKA = Path(__file__).parent / "data" / "postprocess_pka"
HALF1, HALF2 = PKA / "run_half1_class001_unfil.mrc", PKA / "run_half2_class001_unfil.mrc"
MASK = PKA / "mask.mrc"
CORRECTED = "rlnFourierShellCorrelationCorrected"
UNMASKED = "rlnFourierShellCorrelationUnmaskedMaps"
MASKED = "rlnFourierShellCorrelationMaskedMaps"
RANDOMISED = "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"

SHAPES = [(24, 24, 24), (25, 25, 25), (24, 20, 17), (15, 16, 30)]
# Rounding of the transforms alone: a few eps at unit correlation.
EXACT = {np.float32: 1e-6, np.float64: 1e-14}


@pytest.fixture(scope="module")
def relion():
    star = read_star(PKA / "postprocess.star")
    return {label: star.numbers("fsc", label) for label in (CORRECTED, UNMASKED, MASKED, RANDOMISED)}


@pytest.fixture(scope="module")
def maps():
    return [read_volume(path).data for path in (HALF1, HALF2, MASK)]


def noise(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_a_map_with_itself_and_its_negative(shape, dtype):
    data = noise(shape, 0, dtype)
    assert shell_correlation(data, data).shape == (max(shape) // 2 + 1,)
    np.testing.assert_allclose(shell_correlation(data, data), 1, atol=EXACT[dtype])
    np.testing.assert_allclose(shell_correlation(data, -data), -1, atol=EXACT[dtype])


@pytest.mark.parametrize("shape", SHAPES)
def test_of_independent_noise_scatters_as_the_number_of_coefficients_says(shape):
    curve = shell_correlation(noise(shape, 1), noise(shape, 2))[1:]
    # Coefficients that count: Friedel mates on the plane kx = 0 are the same number twice.
    counts = np.bincount(shell_index(shape).ravel())[1 : len(curve) + 1]
    # Variance of a correlation of n complex pairs is 1 / 2n, of fewer independent ones up to 1 / n.
    assert np.all(np.abs(curve) * np.sqrt(counts) < 4)
    assert np.std(curve * np.sqrt(counts)) > 0.4


@pytest.mark.parametrize("shape", [(48, 48, 48), (49, 49, 49), (48, 40, 60)])
@pytest.mark.parametrize("snr", [0.25, 1.0, 4.0])
def test_of_a_signal_in_white_noise_is_snr_over_one_plus_snr(shape, snr):
    signal = math.sqrt(snr) * noise(shape, 3)
    curve = shell_correlation(signal + noise(shape, 4), signal + noise(shape, 5))
    counts = np.bincount(shell_index(shape).ravel())[: len(curve)]
    weight = counts[4:] / counts[4:].sum()
    # Over 1e4 coefficients: a standard error below 0.01.
    assert weight @ curve[4:] == pytest.approx(snr / (1 + snr), abs=0.02)


def test_sees_each_shell_alone():
    """A map whose shells 5 to 8 have the other sign correlates at -1 just there."""
    shape = (32, 32, 32)
    data = noise(shape, 6, np.float64)
    shell = shell_index(shape)
    sign = np.where((shell >= 5) & (shell <= 8), -1.0, 1.0)
    curve = shell_correlation(data, inverse(forward(data) * sign, shape))
    expected = np.where((np.arange(17) >= 5) & (np.arange(17) <= 8), -1.0, 1.0)
    np.testing.assert_allclose(curve, expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_agrees_with_float64(shape):
    data1, data2 = noise(shape, 7, np.float64), noise(shape, 8, np.float64)
    double = shell_correlation(data1, data2)
    single = shell_correlation(data1.astype(np.float32), data2.astype(np.float32))
    np.testing.assert_allclose(single, double, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e15])
def test_knows_no_scale(scale):
    """1e-25: squares of such float32 numbers would be 0."""
    data1, data2 = noise((24, 24, 24), 9), noise((24, 24, 24), 10)
    scaled = shell_correlation(data1 * np.float32(scale), data2)
    np.testing.assert_allclose(scaled, shell_correlation(data1, data2), atol=1e-5)


def test_is_symmetric_and_blind_to_a_common_shift():
    data1, data2 = noise((20, 22, 24), 11), noise((20, 22, 24), 12)
    curve = shell_correlation(data1, data2)
    np.testing.assert_allclose(shell_correlation(data2, data1), curve, atol=1e-12)
    rolled = [np.roll(data, (3, -5, 7), axis=(0, 1, 2)) for data in (data1, data2)]
    np.testing.assert_allclose(shell_correlation(*rolled), curve, atol=1e-5)


def test_is_0_where_there_is_no_power():
    shape = (16, 16, 16)
    cosine = np.cos(2 * np.pi * 3 * np.arange(16) / 16)[None, None, :] * np.ones(shape)
    np.testing.assert_array_equal(shell_correlation(cosine, np.zeros(shape)), 0)


def test_equals_relion_where_no_chance_is_involved(maps, relion):
    result = masked_correlation(*maps, rng=np.random.default_rng(0))
    # relion_postprocess works in double and prints six decimals; float32 maps and transforms give 3e-6.
    np.testing.assert_allclose(shell_correlation(*maps[:2]), relion[UNMASKED], atol=1e-5)
    np.testing.assert_allclose(result.unmasked, relion[UNMASKED], atol=1e-5)
    np.testing.assert_allclose(result.masked, relion[MASKED], atol=1e-5)
    length = 96.0
    star = read_star(PKA / "postprocess.star")
    assert length / result.randomise_from == pytest.approx(star.number("general", "rlnRandomiseFrom"))
    # Shells 0 to 9, two more than have their phases: the masked curve as it is.
    np.testing.assert_allclose(result.corrected[:10], relion[CORRECTED][:10], atol=1e-5)


def test_corrects_relions_own_curves_as_relion_does(relion):
    corrected = corrected_correlation(relion[MASKED], relion[RANDOMISED], 8)
    np.testing.assert_allclose(corrected, relion[CORRECTED], atol=3e-6)  # of six printed decimals
    frequency = np.arange(33) / 96.0
    final = read_star(PKA / "postprocess.star").number("general", "rlnFinalResolution")
    assert nominal_resolution(frequency, corrected) == pytest.approx(final, abs=1e-6)
    assert nominal_resolution(frequency, relion[UNMASKED]) == pytest.approx(96 / 21)  # RELION without a mask


def test_random_phases_scatter_about_relions(maps, relion):
    """RELION's draw is one of ours: the same mean and spread in each shell."""
    draws = [masked_correlation(*maps, rng=np.random.default_rng(seed)) for seed in range(12)]
    randomised = np.array([draw.randomised for draw in draws])
    distance = np.abs(relion[RANDOMISED] - randomised.mean(axis=0))
    # Twelve draws know their spread to a fifth: 4 of it in 33 shells come by chance once in a few hundred.
    assert np.all(distance < 4 * randomised.std(axis=0, ddof=1) + 2e-5)
    # The first random shells keep what leaks in through the mask; a shell early or late is 0.3 off.
    assert randomised.mean(axis=0)[8] == pytest.approx(relion[RANDOMISED][8], abs=0.1)
    # So the resolution is RELION's up to one shell (RELION's own seeds give shells 27 to 29).
    frequency = np.arange(33) / 96.0
    shells = [96 / nominal_resolution(frequency, draw.corrected) for draw in draws]
    assert all(abs(shell - 27) < 2.01 for shell in shells)
    assert np.median(shells) == pytest.approx(28)


@pytest.fixture(scope="module")
def servalcat():
    """Columns by name, and the middle of each bin in 1/angstrom."""
    lines = (PKA / "servalcat_fsc.dat").read_text().splitlines()
    table = dict(zip(lines[1].split(), np.loadtxt(lines[2:]).T, strict=True))
    return table, (1 / table["d_min"] + 1 / table["d_max"]) / 2


# Off by one shell, our curves would be 0.04 away from servalcat's. Bins hold the same coefficients but
# for half a shell at their ends (0.004 measured); the corrected curves differ by the draw (0.017).
SERVALCAT = [
    ("unmasked", "unmasked", 0.01),
    ("masked", "masked", 0.01),
    ("corrected", "masked_corrected", 0.025),
]


@pytest.mark.parametrize(("ours", "theirs", "rms"), SERVALCAT)
def test_runs_where_servalcats_curve_runs(maps, servalcat, ours, theirs, rms):
    table, middle = servalcat
    curve = getattr(masked_correlation(*maps, rng=np.random.default_rng(0)), ours)
    difference = np.interp(middle, np.arange(33) / 96.0, curve) - table[f"fsc_half_{theirs}"]
    assert np.sqrt(np.mean(difference**2)) < rms
    assert abs(difference.mean()) < 0.003  # a shift by one shell gives 0.03


@pytest.mark.parametrize(("ours", "theirs", "shells"), [(a, b, 30 * rms) for a, b, rms in SERVALCAT])
@pytest.mark.parametrize("threshold", [0.143, 0.5])
def test_crosses_where_servalcats_curve_crosses(maps, servalcat, ours, theirs, shells, threshold):
    table, middle = servalcat
    curve = getattr(masked_correlation(*maps, rng=np.random.default_rng(0)), ours)
    found = 96 / crossing_resolution(np.arange(33) / 96.0, curve, threshold)
    expected = 96 / crossing_resolution(middle, table[f"fsc_half_{theirs}"], threshold)
    assert found == pytest.approx(expected, abs=shells)  # 0.3 of a shell, or 0.75 where chance plays


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="relion_postprocess is not on the PATH")
@pytest.mark.parametrize(("box", "randomise"), [(48, None), (50, 9.0)])
def test_against_relion_postprocess_live(tmp_path, box, randomise):
    shape, voxel_size = (box, box, box), 2.0
    signal = 20 * inverse(forward(noise(shape, 20, np.float64) + 0.2) * np.exp(-0.3 * shell_index(shape)), shape)
    for half in (1, 2):
        data = (signal * soft_sphere(shape, 13, 3) + noise(shape, 20 + half, np.float64)).astype(np.float32)
        write_volume(tmp_path / f"run_half{half}.mrc", Volume(data, voxel_size), label="test")
    write_volume(tmp_path / "mask.mrc", Volume(soft_sphere(shape, 15, 4), voxel_size), label="test")
    option = [] if randomise is None else ["--randomize_at_A", str(randomise)]
    tables = []
    for seed in range(1, 9):
        command = ["relion_postprocess", "--i", "run_half1.mrc", "--mask", "mask.mrc", "--angpix", "2"]
        command += ["--force_mask", "--o", f"./post{seed}", "--random_seed", str(seed), *option]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        tables.append(read_star(tmp_path / f"post{seed}.star"))
    files = tmp_path / "run_half1.mrc", tmp_path / "run_half2.mrc"
    results = [
        fsc_files(*files, FscOptions(mask=tmp_path / "mask.mrc", randomise_from=randomise, seed=s)).masked
        for s in range(8)
    ]
    np.testing.assert_allclose(results[0].unmasked, tables[0].numbers("fsc", UNMASKED), atol=1e-5)
    np.testing.assert_allclose(results[0].masked, tables[0].numbers("fsc", MASKED), atol=1e-5)
    found = tables[0].number("general", "rlnRandomiseFrom")
    assert box * voxel_size / results[0].randomise_from == pytest.approx(found, abs=1e-5)
    theirs = np.array([table.numbers("fsc", RANDOMISED) for table in tables])
    ours = np.array([result.randomised for result in results])
    # Means of eight draws each: five standard errors.
    error = np.sqrt((theirs.var(axis=0, ddof=1) + ours.var(axis=0, ddof=1)) / 8)
    assert np.all(np.abs(theirs.mean(axis=0) - ours.mean(axis=0)) < 5 * error + 1e-5)


def test_a_mask_of_ones_changes_nothing(maps):
    result = masked_correlation(*maps[:2], np.ones_like(maps[2]), rng=np.random.default_rng(0))
    np.testing.assert_allclose(result.masked, result.unmasked, atol=1e-12)


def test_random_phases_tell_what_the_mask_makes():
    """Shells 0 to 3 are common, the rest is independent: what correlates there came through the mask."""
    shape = (32, 32, 32)
    mask = soft_sphere(shape, 5, 2)
    masked, randomised = [], []
    for seed in range(40):
        common = inverse(forward(noise(shape, 3 * seed)) * (shell_index(shape) < 4), shape) * 10
        data = [common + noise(shape, 3 * seed + half) for half in (1, 2)]
        result = masked_correlation(*data, mask, rng=np.random.default_rng(seed), randomise_from=4)
        masked.append(result.masked[6:])
        randomised.append(result.randomised[6:])
    assert np.mean(masked, axis=0)[0] > 0.25
    error = np.sqrt((np.var(masked, axis=0) + np.var(randomised, axis=0)) / 40)
    assert np.all(np.abs(np.mean(masked, axis=0) - np.mean(randomised, axis=0)) < 4 * error)


def test_random_phases_follow_the_seed_not_the_threads(maps):
    first = masked_correlation(*maps, rng=np.random.default_rng(3), threads=1)
    again = masked_correlation(*maps, rng=np.random.default_rng(3), threads=2)
    other = masked_correlation(*maps, rng=np.random.default_rng(4), threads=1)
    np.testing.assert_array_equal(first.randomised, again.randomised)
    assert np.abs(first.randomised - other.randomised).max() > 0.01


def test_opposite_means_say_nothing(maps):
    data1, data2, mask = maps
    result = masked_correlation(data1, data2 - 2, mask, rng=np.random.default_rng(0))
    assert result.unmasked[0] == pytest.approx(-1)
    assert result.masked[0] == result.randomised[0] == result.corrected[0] == 1


def test_mask_of_one_voxel_is_all_the_correlation():
    shape = (16, 16, 16)
    mask = np.zeros(shape, dtype=np.float32)
    mask[8, 8, 8] = 1
    result = masked_correlation(noise(shape, 16), noise(shape, 17), mask, rng=np.random.default_rng(1))
    np.testing.assert_allclose(result.randomised, 1, atol=1e-6)
    np.testing.assert_array_equal(result.corrected[result.randomise_from + 2 :], 0)


def test_equal_maps_have_no_shell_to_randomise_from(maps):
    data1, _, mask = maps
    with pytest.raises(InputError, match="never drops below 0.8, expected .* give --randomise-from"):
        masked_correlation(data1, data1, mask, rng=np.random.default_rng(0))
    result = masked_correlation(data1, data1, mask, rng=np.random.default_rng(0), randomise_from=10)
    np.testing.assert_allclose(result.corrected, 1, atol=1e-6)


@pytest.mark.parametrize("shell", [0, 33])
def test_randomises_within_the_shells_only(maps, shell):
    with pytest.raises(InputError, match=f"from shell {shell} on, expected 1 to 32"):
        masked_correlation(*maps, rng=np.random.default_rng(0), randomise_from=shell)


# Noise in place of the signal, with a network


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Make a model that changes nothing, and keeps the maps that it is shown in a list."""
    seen = []

    def keep(self, volume, fsc):
        assert volume.voxel_size == 1.5
        assert len(fsc) == max(volume.shape) // 2 + 1
        seen.append(volume.data)
        return volume

    monkeypatch.setattr(Denoiser, "__call__", keep)

    def make(kind):
        card = {"name": "none", "input": kind, "pixel_size": 1.5, "width": 1, "depth": 1, "resolution_range": [3, 9]}
        (tmp_path / "model.keras").write_bytes(b"weights")
        (tmp_path / "card.json").write_text(json.dumps(card | {"sha256": sha256(b"weights").hexdigest()}))
        return str(tmp_path), seen

    return make


@pytest.mark.parametrize("kind", ["regularised", "unregularised"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_the_network_sees_noise_of_the_strength_of_the_signal(maps, model, kind, mask):
    folder, seen = model(kind)
    result = fsc_files(HALF1, HALF2, FscOptions(mask=mask, substitute_noise_from=6.0, model=folder, seed=7))
    assert result.substituted.start == 16
    originals, noisy = seen[:2], seen[2:]
    weights = shell_correlation(*maps[:2]).clip(0)
    shape = maps[0].shape
    for data, original, substituted in zip(maps[:2], originals, noisy, strict=True):
        expected = apply_shells(data, weights) if kind == "regularised" else data
        np.testing.assert_allclose(original, expected, atol=1e-6 * np.abs(expected).max())
        powers = [shell_power(forward(shown), shape) for shown in (original, substituted)]
        np.testing.assert_allclose(powers[1], powers[0], rtol=1e-4, atol=1e-9 * powers[0].max())
    for curve, shown in ((result.substituted.denoised, originals), (result.substituted.substituted, noisy)):
        first, second = shown if mask is None else (data * maps[2] for data in shown)
        np.testing.assert_allclose(curve, shell_correlation(first, second), atol=1e-6)


@pytest.mark.slow
def test_the_noise_follows_the_seed_and_neither_the_mask_nor_the_threads(model):
    folder, seen = model("regularised")
    for changes in ({"threads": 1}, {"threads": 2}, {"mask": MASK}, {"seed": 1}):
        fsc_files(HALF1, HALF2, FscOptions(substitute_noise_from=6.0, model=folder, **changes))
    first, threads, mask, seed = seen[2::4]
    np.testing.assert_array_equal(threads, first)
    np.testing.assert_array_equal(mask, first)
    assert np.abs(seed - first).max() > 0.1 * np.abs(first).max()


FREQUENCY = np.arange(5) / 100.0


@pytest.mark.parametrize(
    ("curve", "nominal", "crossing"),
    [
        ([1, 0.9, 0.643, 0.043, 0.0], 50.0, 100 / (2 + 0.5 / 0.6)),
        ([1, 0.9, 0.1, 0.9, 0.0], 100.0, 100 / (1 + 0.757 / 0.8)),  # later rises do not count
        ([-1, 0.9, 0.5, 0.4, 0.1], 100 / 3, 100 / (3 + 0.257 / 0.3)),  # shell 0 is not judged
        ([1, 0.1, 0.9, 0.9, 0.9], math.inf, math.inf),
        ([1, 0.9, 0.9, 0.9, 0.2], 25.0, 25.0),
        ([1, 0.9, 0.9, 0.143, 0.1], 100 / 3, 100 / 3),  # at the threshold is not below it
    ],
)
def test_resolution(curve, nominal, crossing):
    curve = np.array(curve, dtype=np.float64)
    assert nominal_resolution(FREQUENCY, curve) == pytest.approx(nominal)
    assert crossing_resolution(FREQUENCY, curve) == pytest.approx(crossing)


def test_crossing_at_another_threshold_moves_with_small_gains():
    worse, better = np.array([1, 0.9, 0.6, 0.1, 0]), np.array([1, 0.9, 0.62, 0.12, 0])
    assert nominal_resolution(FREQUENCY, worse, 0.5) == nominal_resolution(FREQUENCY, better, 0.5) == 50
    assert crossing_resolution(FREQUENCY, better, 0.5) < crossing_resolution(FREQUENCY, worse, 0.5) < 50


def write(path, data, voxel_size=1.5):
    write_volume(path, Volume(data.astype(np.float32), voxel_size), label="test")
    return path


BOX = (8, 8, 8)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            (noise((8, 8, 6), 0), 1.5),
            r"b.mrc: 6 x 8 x 8 voxels \(x, y, z\), expected 8 x 8 x 8 as in .*a.mrc; res",
        ),
        ((noise(BOX, 0), 1.6), r"b.mrc: pixel size 1.6 A, expected 1.5 A as in .*a.mrc; resample"),
        ((np.full(BOX, 2.0), 1.5), "b.mrc: all voxels are 2, expected a map with density"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, second, message):
    a = write(tmp_path / "a.mrc", noise(BOX, 1))
    b = write(tmp_path / "b.mrc", *second)
    with pytest.raises(InputError, match=message):
        fsc_files(a, b)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ones((8, 8, 6)), r"mask.mrc: 6 x 8 x 8 voxels \(x, y, z\), expected 8 x 8 x 8 as in .*a.mrc"),
        (noise(BOX, 0) * 0 + 2, "mask.mrc: values from 2 to 2, expected a mask from 0 to 1; rescale"),
        (np.ones(BOX) - 1.5, "mask.mrc: values from -0.5 to -0.5, expected a mask from 0 to 1"),
        (np.zeros(BOX), "mask.mrc: 0 everywhere, expected a mask from 0 to 1; was the threshold too high"),
    ],
)
def test_files_that_are_no_mask(tmp_path, data, message):
    a, b = (write(tmp_path / f"{name}.mrc", noise(BOX, seed)) for seed, name in enumerate("ab"))
    with pytest.raises(InputError, match=message):
        fsc_files(a, b, FscOptions(mask=write(tmp_path / "mask.mrc", data)))


def test_pixel_sizes(tmp_path):
    """Close ones pass, a known one stands in for an unknown one, and --angpix settles a disagreement."""
    a = write(tmp_path / "a.mrc", noise(BOX, 1), 1.5)
    assert fsc_files(a, write(tmp_path / "b.mrc", noise(BOX, 2), 1.505)).voxel_size == 1.5
    unknown = write(tmp_path / "c.mrc", noise(BOX, 2), 0)
    assert fsc_files(unknown, a).voxel_size == fsc_files(a, unknown).voxel_size == 1.5
    assert fsc_files(a, write(tmp_path / "d.mrc", noise(BOX, 2), 3.0), FscOptions(angpix=2.0)).voxel_size == 2.0
    nothing = fsc_files(unknown, unknown)
    assert nothing.voxel_size == 0
    assert np.isnan(nothing.frequency).all()
    with pytest.raises(InputError, match="c.mrc: no pixel size in the header, expected one; give --angpix"):
        nothing.resolution()
    with pytest.raises(InputError, match="c.mrc: no pixel size in the header, --randomise-from needs it"):
        fsc_files(unknown, unknown, FscOptions(mask=write(tmp_path / "m.mrc", np.ones(BOX)), randomise_from=8.0))
    with pytest.raises(InputError, match="c.mrc: no pixel size in the header, --substitute-noise needs it"):
        fsc_files(unknown, unknown, FscOptions(substitute_noise_from=8.0))


def test_files_equal_arrays(maps, tmp_path):
    result = fsc_files(HALF1, HALF2, FscOptions(mask=MASK, seed=5))
    expected = masked_correlation(*maps, rng=np.random.default_rng(5))
    assert result.box == 64
    assert result.voxel_size == 1.5
    np.testing.assert_array_equal(result.best, expected.corrected)
    np.testing.assert_array_equal(fsc_files(HALF1, HALF2).best, expected.unmasked)
    assert result.frequency[-1] == pytest.approx(1 / 3.0)
    # 12 A is shell 8 of 96 A exactly, whatever the rounding.
    assert fsc_files(HALF1, HALF2, FscOptions(mask=MASK, randomise_from=12.0)).masked.randomise_from == 8


# Maps that lie apart


@pytest.mark.parametrize("shift", [(3, 0, 0), (-2, 5, 1), (0, 0, -9)])
def test_a_shift_is_told(tmp_path, caplog, monkeypatch, shift):
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)
    first = read_volume(HALF1)
    moved = first.with_data(np.roll(read_volume(HALF2).data, shift, axis=(2, 1, 0)))
    assert shift_between(first.data, moved.data) == shift
    write_volume(str(tmp_path / "moved.mrc"), moved, label="test")
    fsc_files(HALF1, tmp_path / "moved.mrc")
    size = ", ".join(f"{1.5 * n:.1f}" for n in shift)
    assert f"moved.mrc looks shifted by {', '.join(map(str, shift))} voxels (x, y, z) ({size} A) against" in caplog.text


def test_no_shift_is_made_up(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)
    fsc_files(HALF1, HALF2)
    assert "shifted" not in caplog.text
    first, second = (noise((24, 20, 17), seed) for seed in (1, 2))
    assert shift_between(first, second) == (0, 0, 0)
