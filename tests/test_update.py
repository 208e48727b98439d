"""The MAP and the CW-RED update: RELION's answers, a slow transcription of the equations, and exact cases."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cryored.errors import InputError
from cryored.files.mrc import read_array, read_volume
from cryored.files.requests import read_request, read_request_file
from cryored.files.star import read_star
from cryored.reconstruction.sums import load_sums, with_fsc
from cryored.reconstruction.update import (
    Accumulators,
    Denoised,
    check_accumulators,
    estimated_fsc,
    inverse_prior,
    reconstruct,
)

REQUESTS = Path(__file__).parent / "data" / "relion_requests"
STARS = sorted(REQUESTS.glob("*/run/*_external_reconstruct.star"))
NAMES = [f"{path.parents[1].name}/{path.name.removesuffix('_external_reconstruct.star')}" for path in STARS]

# The specification's bound on float32 arithmetic against RELION in double precision, whose files are float32.
FLOAT32 = 1e-6


def named(name):
    return STARS[NAMES.index(name)]


PAD1 = named("box36_pad1_c2/run_it006_half1_class001")
PAD15 = named("box32_pad1.5_fudge2/run_it003_half1_class001")
PAD2 = named("box32_pad2/run_it004_half1_class001")
FIRST = named("pka_box64_pad1/run_it001_half1_class001")  # no tau2 beyond r_max of 13 shells in 32


def load(star):
    """Return a recorded request and its sums; the paths in it are relative to the case's folder."""
    request = read_request(read_star(star))
    files = (request.data_real, request.data_imag, request.weight)
    arrays = [read_array(star.parents[1] / path, request.array_shape) for path in files]
    return request, Accumulators(*arrays, request.ori, request.pad, request.r_max)


def expected(star, kind):
    return read_volume(star.with_name(f"{star.stem}_expected_{kind}.mrc")).data


def difference(found, wanted):
    """Return the relative L2 difference over all voxels."""
    return np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64))


def blob(ori, width=2.5, offset=(1, -2, 0)):
    """Return a Gaussian that neither the sphere nor the Fourier grid cuts: below 1e-8 at both edges."""
    grid = np.indices((ori,) * 3) - ori // 2
    distance2 = sum((axis - shift) ** 2 for axis, shift in zip(grid, offset, strict=True))
    return np.exp(-distance2 / (2 * width**2)).astype(np.float32)


def random_map(ori, seed=0):
    """Return noise in a soft ball, as strong at Nyquist as anywhere."""
    return (np.random.default_rng(seed).standard_normal((ori,) * 3) * (blob(ori, ori / 8) + 0.1)).astype(np.float32)


# The equations once more, in the plainest way: full padded grids, float64, numpy's FFT


def half_up(x):
    return np.floor(np.asarray(x) + 0.5).astype(int)


class Grid:
    """The padded grid of a request."""

    def __init__(self, ori, pad, r_max):
        self.ori, self.pad = ori, pad
        self.n = int(half_up(ori * pad))
        full = np.rint(np.fft.fftfreq(self.n) * self.n)
        half = np.arange(self.n // 2 + 1)
        self.r2 = full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2
        self.s = np.sqrt(self.r2) / pad
        self.shell = np.minimum(half_up(self.s), ori // 2)
        self.inside = self.r2 < half_up(r_max * pad) ** 2
        self.ring = np.floor(self.s).astype(int)
        self.ring_inside = self.r2 < half_up((r_max * pad) ** 2)
        self.distance = np.sqrt(sum((axis - ori // 2) ** 2.0 for axis in np.indices((ori,) * 3)))
        self.sinc2 = np.sinc(self.distance / (ori * pad)) ** 2

    def to_map(self, quotient):
        """Steps 4 to 6 of the MAP update: the map of a half-transform."""
        volume = np.fft.irfftn(quotient, (self.n,) * 3, axes=(0, 1, 2)) * float(self.n) ** 3
        volume = np.roll(volume, self.ori // 2, axis=(0, 1, 2))[: self.ori, : self.ori, : self.ori]
        volume = volume / (self.pad**3 * self.ori)
        edge = np.clip((self.distance - self.ori / 2) / 3, 0, 1)
        outside = 0.5 - 0.5 * np.cos(np.pi * edge)
        background = (volume * outside).sum() / outside.sum()
        return (volume * (1 - outside) + background * outside) / self.sinc2

    def from_map(self, volume):
        """The way back: a map to the scale of B."""
        padded = np.zeros((self.n,) * 3)
        padded[: self.ori, : self.ori, : self.ori] = volume * self.sinc2
        padded = np.roll(padded, -(self.ori // 2), axis=(0, 1, 2))
        return np.fft.rfftn(padded, axes=(0, 1, 2)) * self.pad**3 * self.ori / float(self.n) ** 3


def slow(sums, tau2, fudge, denoised=None, strength=None, extrapolate=False, no_map=False):
    """Eq. 11 (eq. 17 with `denoised`, B / K with `no_map`) as relion-hook's numbered steps say it."""
    grid = Grid(sums.ori, sums.pad, sums.r_max)
    data = np.where(grid.inside, np.asarray(sums.real, np.float64) + 1j * np.asarray(sums.imag, np.float64), 0)
    weight = np.where(grid.inside, np.asarray(sums.weight, np.float64), 0)
    known = tau2[grid.shell] > 0
    prior = 1 / (sums.pad**3 * fudge * np.where(known, tau2[grid.shell], 1.0))
    if not no_map:
        own = np.where(weight > 1e-20, 1 / (0.001 * np.maximum(weight, 1e-20)), 0)
        weight = np.where(grid.inside, weight + np.where(known, prior, own), 0)
    numerator = data
    if denoised is not None:
        transform = grid.from_map(denoised)
        numerator = data + np.where(grid.inside & known, strength[grid.shell] * prior, 0) * transform
    mean = np.bincount(grid.ring[grid.ring_inside], weight[grid.ring_inside])
    mean = mean / np.maximum(np.bincount(grid.ring[grid.ring_inside]), 1)
    weight = np.maximum(weight, mean[np.minimum(grid.ring, sums.r_max - 1)] / 1000)
    quotient = np.divide(numerator, weight, out=np.zeros_like(numerator), where=weight > 0)
    if extrapolate:
        ball = grid.r2 <= half_up(sums.ori // 2 * sums.pad) ** 2
        unknown = ball & (~grid.inside | ~known) & (strength[grid.shell] > 0)
        quotient = np.where(unknown, strength[grid.shell] * transform, quotient)
    return grid.to_map(quotient)


def synthetic(ori, pad, r_max, seed=0):
    """Return sums with coefficients that hold nothing, and a tau2 with empty shells."""
    rng = np.random.default_rng(seed)
    n = int(half_up(ori * pad))
    noise = np.fft.rfftn(rng.standard_normal((n,) * 3))
    weight = rng.gamma(0.3, 100.0, noise.shape)
    weight[rng.random(noise.shape) < 0.1] = 0
    real, imag, weight = (part.astype(np.float32) for part in (noise.real, noise.imag, weight))
    tau2 = np.exp(-np.arange(ori // 2 + 1) / 3.0)
    tau2[[5, 6]] = 0
    return Accumulators(real, imag, weight, ori, pad, r_max), tau2


@pytest.mark.parametrize("star", STARS, ids=NAMES)
def test_gives_relions_map(star):
    request, sums = load(star)
    prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    found = reconstruct(sums, prior=prior)
    assert found.dtype == np.float32
    assert difference(found, expected(star, "map")) <= FLOAT32


@pytest.mark.parametrize("star", STARS, ids=NAMES)
def test_gives_relions_unregularised_map(star):
    _, sums = load(star)
    assert difference(reconstruct(sums), expected(star, "unregularised")) <= FLOAT32


@pytest.mark.parametrize("star", [PAD1, PAD15, PAD2, FIRST], ids=lambda star: star.parents[1].name)
def test_the_transcription_is_relions_too(star):
    """What eq. 17 is judged by below answers as RELION does where there is no denoised map."""
    request, sums = load(star)
    # Float64 here, so what is left is the float32 rounding of RELION's files, 3e-8.
    assert difference(slow(sums, request.tau2, request.tau2_fudge), expected(star, "map")) < 1e-7
    found = slow(sums, request.tau2, request.tau2_fudge, no_map=True)
    assert difference(found, expected(star, "unregularised")) < 1e-7


def change_star(star, target, **items):
    """Copy a request with other values: ``tau2={shell: value}``, and items of the general table."""
    tau2 = {str(shell): value for shell, value in items.pop("tau2", {}).items()}
    lines = []
    for line in star.read_text().splitlines():
        words = line.split()
        if len(words) == 2 and words[0].removeprefix("_") in items:
            line = f"{words[0]} {items[words[0].removeprefix('_')]}"
        elif len(words) == 3 and words[0] in tau2:
            line = f"{words[0]} {tau2[words[0]]} {words[2]}"
        lines.append(line)
    target.write_text("\n".join(lines) + "\n")


@pytest.mark.relion
@pytest.mark.parametrize(
    ("star", "changes"),
    [
        (PAD2, {"tau2": {9: 0, 10: 0, 14: 0}}),
        (PAD15, {"tau2": {4: 0, 12: 0}, "rlnCurrentImageSize": 30}),  # r_max * pad is 22.5
        (PAD1, {"tau2": dict.fromkeys(range(19), 0)}),
        (FIRST, {"tau2": {1: 1e-30, 2: 1e30}, "rlnTau2FudgeFactor": 3.5}),
        (PAD15, {"rlnCurrentImageSize": 10}),
    ],
)
@pytest.mark.parametrize("options", [[], ["--no_map"]], ids=["map", "unregularised"])
def test_gives_what_relion_answers_to_changed_requests(tmp_path, star, changes, options):
    program = shutil.which("relion_external_reconstruct")
    if program is None:
        pytest.skip("relion_external_reconstruct is not on the PATH")
    project = tmp_path / "project"
    shutil.copytree(star.parents[1], project)
    change_star(star, project / "run" / star.name, **dict(changes))
    subprocess.run(
        [program, f"run/{star.name}", "--skip_gridding", *options],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    request, sums = load(project / "run" / star.name)
    prior = None if options else inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    answer = read_volume(project / request.result).data
    assert difference(reconstruct(sums, prior=prior), answer) <= FLOAT32


def strengths(ori):
    shells = np.arange(ori // 2 + 1)
    return {
        "none": np.zeros(ori // 2 + 1),
        "half": np.full(ori // 2 + 1, 0.5),
        "one": np.ones(ori // 2 + 1),
        "fading": np.clip(1.3 - shells / (0.35 * ori), 0, 1),  # 1, then a slope, then 0 from 0.46 of the box on
    }


@pytest.mark.parametrize("extrapolate", [False, True], ids=["", "extrapolate"])
@pytest.mark.parametrize("strength", ["half", "one", "fading"])
@pytest.mark.parametrize("star", [PAD1, PAD15, PAD2, FIRST], ids=lambda star: star.parents[1].name)
def test_equation_17_on_recorded_requests(star, strength, extrapolate):
    request, sums = load(star)
    tau2 = request.tau2.copy()
    tau2[[3, 7]] = 0
    lam = strengths(request.ori)[strength]
    # On the map's own grey scale, but nothing like it.
    denoised = random_map(request.ori) * np.float32(10 * np.std(expected(star, "map")))
    prior = inverse_prior(tau2, request.tau2_fudge, request.pad)
    found = reconstruct(sums, prior=prior, denoised=Denoised(denoised, lam, extrapolate))
    wanted = slow(sums, tau2, request.tau2_fudge, denoised, lam, extrapolate)
    assert difference(found, wanted) <= FLOAT32
    assert difference(found, reconstruct(sums, prior=prior)) > 0.01  # the term is not lost in the rest


@pytest.mark.parametrize("extrapolate", [False, True], ids=["", "extrapolate"])
@pytest.mark.parametrize(
    ("ori", "pad", "r_max"),
    [
        (16, 1, 8),
        (16, 2, 5),
        (18, 1.5, 9),  # an odd padded grid, of 27
        (18, 1.5, 7),
        (22, 1.5, 11),  # 33 points
        (20, 1.3, 9),  # 26 points, and r_max * pad of 11.7
        (26, 1, 2),
        (14, 3, 7),
    ],
)
def test_equation_17_in_awkward_boxes(ori, pad, r_max, extrapolate):
    sums, tau2 = synthetic(ori, pad, r_max)
    denoised, lam = random_map(ori), strengths(ori)["fading"]
    prior = inverse_prior(tau2, 1.7, pad)
    assert difference(reconstruct(sums), slow(sums, tau2, 1.7, no_map=True)) <= FLOAT32
    assert difference(reconstruct(sums, prior=prior), slow(sums, tau2, 1.7)) <= FLOAT32
    found = reconstruct(sums, prior=prior, denoised=Denoised(denoised, lam, extrapolate))
    assert difference(found, slow(sums, tau2, 1.7, denoised, lam, extrapolate)) <= FLOAT32


def test_coefficients_without_weight_in_shells_without_tau2():
    """They stay at the floor, which even weights leave low enough to show what else they would be given."""
    sums, _ = synthetic(16, 1.5, 7)
    sums = replace(sums, weight=np.where(sums.weight > 10, np.float32(30), np.float32(0)))
    tau2 = np.zeros(9)
    assert difference(reconstruct(sums, prior=tau2), slow(sums, tau2, 1.0)) <= FLOAT32


@pytest.mark.parametrize("star", [PAD1, PAD15, PAD2, FIRST], ids=lambda star: star.parents[1].name)
def test_strength_0_is_the_map_to_the_bit(star):
    request, sums = load(star)
    prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    regularised = reconstruct(sums, prior=prior)
    denoised = random_map(request.ori)
    for extrapolate in (False, True):
        source = Denoised(denoised, strengths(request.ori)["none"], extrapolate)
        np.testing.assert_array_equal(reconstruct(sums, prior=prior, denoised=source), regularised)


@pytest.mark.parametrize("extrapolate", [False, True], ids=["", "extrapolate"])
def test_linear_in_the_denoised_map(extrapolate):
    request, sums = load(PAD15)
    prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    lam = strengths(request.ori)["fading"]
    scale = np.float32(np.std(expected(PAD15, "map")))

    def update(denoised):
        source = Denoised(denoised, lam, extrapolate)
        return reconstruct(sums, prior=prior, denoised=source).astype(np.float64)

    first, second = random_map(request.ori, 1) * scale, random_map(request.ori, 2) * scale
    none = update(np.zeros_like(first))
    mixed = update(np.float32(2) * first - np.float32(3) * second)
    wanted = none + 2 * (update(first) - none) - 3 * (update(second) - none)
    # The weights 2 and 3 and the differences multiply float32 rounding by a few.
    assert difference(mixed, wanted) < 5 * FLOAT32


def test_as_many_threads_as_you_like():
    request, sums = load(PAD2)
    prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    source = Denoised(random_map(request.ori), strengths(request.ori)["fading"], True)
    one, four = (reconstruct(sums, prior=prior, denoised=source, threads=threads) for threads in (1, 4))
    np.testing.assert_array_equal(one, four)
    np.testing.assert_array_equal(reconstruct(sums, threads=1), reconstruct(sums, threads=4))


@pytest.mark.slow
def test_large_grids_are_done_in_parts():
    """A box whose slabs are several, in each of the loops over them."""
    sums, tau2 = synthetic(80, 1.5, 37)
    denoised, lam = random_map(80), strengths(80)["fading"]
    found = reconstruct(sums, prior=inverse_prior(tau2, 1.0, 1.5), denoised=Denoised(denoised, lam, True), threads=3)
    assert difference(found, slow(sums, tau2, 1.0, denoised, lam, True)) <= FLOAT32


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not hand freed memory back")
def test_memory_is_not_asked_for_anew_slab_by_slab():
    shape = (256, 256, 129)
    sums = Accumulators(*(np.ones(shape, dtype=np.float32) for _ in range(3)), 256, 1, 128)
    reconstruct(sums)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    reconstruct(sums)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    # Intermediate and result, once each: what the slabs take would be ten times that.
    assert faults * resource.getpagesize() < 4 * sums.real.nbytes


def test_leaves_its_input_alone():
    sums, tau2 = synthetic(16, 1.5, 7)
    denoised = random_map(16)
    copies = [array.copy() for array in (sums.real, sums.imag, sums.weight, denoised, tau2)]
    for array in (sums.real, sums.imag, sums.weight, denoised, tau2):
        array.flags.writeable = False
    source = Denoised(denoised, strengths(16)["half"], True)
    reconstruct(sums, prior=inverse_prior(tau2, 1.0, 1.5), denoised=source)
    for array, copy in zip((sums.real, sums.imag, sums.weight, denoised, tau2), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


# Cases whose answer is known. All shells have a prior, of weight 1 in B's scale.


def gathered(volume, pad, weight, r_max=None):
    """Return the sums that noise-free data on `volume` would give: B = K F."""
    ori = len(volume)
    transform = Grid(ori, pad, ori // 2).from_map(volume)
    weight = np.broadcast_to(np.asarray(weight), transform.shape).astype(np.float32)
    data = transform * weight
    real, imag = data.real.astype(np.float32), data.imag.astype(np.float32)
    return Accumulators(real, imag, weight, ori, pad, r_max or ori // 2)


FLAT = np.ones(17)
TRUTH, OTHER = blob(32), blob(32, 2.2, (-1, 1, 2))
# The tails of the Gaussians that sphere and Fourier grid cut, and float32: some 1e-7 of the maximum each.
TAILS = 2e-6


@pytest.mark.parametrize("pad", [1, 1.5, 2])
@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_without_data_the_prior_is_the_answer(pad, lam):
    sums = gathered(TRUTH, pad, 1e-30)
    found = reconstruct(sums, prior=FLAT, denoised=Denoised(OTHER, lam * FLAT))
    np.testing.assert_allclose(found, lam * OTHER, atol=TAILS)


@pytest.mark.parametrize("pad", [1, 1.5, 2])
def test_with_many_data_the_prior_has_no_say(pad):
    sums = gathered(TRUTH, pad, 1e8)  # against a prior of 1
    found = reconstruct(sums, prior=FLAT, denoised=Denoised(OTHER, FLAT))
    np.testing.assert_allclose(found, TRUTH, atol=TAILS)
    np.testing.assert_allclose(reconstruct(sums), TRUTH, atol=TAILS)


@pytest.mark.parametrize("pad", [1, 1.5, 2])
def test_between_them_weights_decide(pad):
    sums = gathered(TRUTH, pad, 3.0)
    np.testing.assert_allclose(reconstruct(sums, prior=FLAT), 0.75 * TRUTH, atol=TAILS)
    found = reconstruct(sums, prior=FLAT, denoised=Denoised(OTHER, 0.4 * FLAT))
    np.testing.assert_allclose(found, 0.75 * TRUTH + 0.1 * OTHER, atol=TAILS)


@pytest.mark.parametrize("pad", [1, 1.5, 2])
def test_the_truth_is_a_fixed_point(pad):
    """At lambda 1 data and prior that agree change nothing, whatever their weights."""
    shape = gathered(TRUTH, pad, 1.0).weight.shape
    sums = gathered(TRUTH, pad, np.random.default_rng(0).uniform(0.1, 10, shape))
    prior = inverse_prior(np.random.default_rng(1).uniform(0.1, 10, 17), 1.0, pad)
    found = reconstruct(sums, prior=prior, denoised=Denoised(TRUTH, FLAT))
    np.testing.assert_allclose(found, TRUTH, atol=TAILS)
    # The unregularised map is the truth too.
    np.testing.assert_allclose(reconstruct(sums), TRUTH, atol=TAILS)


def test_the_map_as_its_own_denoised_map_goes_half_way_back():
    """With x = w T the MAP map of data w : 1 - w, eq. 17 on x gives w T + lambda (1 - w) x."""
    sums = gathered(TRUTH, 2, 3.0)
    regularised = reconstruct(sums, prior=FLAT)
    found = reconstruct(sums, prior=FLAT, denoised=Denoised(regularised, 0.5 * FLAT))
    np.testing.assert_allclose(found, (0.75 + 0.5 * 0.25 * 0.75) * TRUTH, atol=TAILS)


def test_only_extrapolation_fills_what_the_data_do_not_reach():
    narrow = blob(32, 1.0)  # hardly any power beyond Nyquist, much beyond shell 8
    sums = gathered(narrow, 1, 1.0, r_max=8)
    tau2 = np.where(np.arange(17) < 8, 1e6, 0.0)
    prior = inverse_prior(tau2, 1.0, 1)
    shell = Grid(32, 1, 8).shell

    def power(volume):
        transform = np.abs(Grid(32, 1, 8).from_map(volume)) ** 2
        return np.array([transform[shell == i].sum() for i in range(16)])

    source = Denoised(narrow, FLAT)
    plain, filled = (
        power(reconstruct(sums, prior=prior, denoised=replace(source, extrapolate=extrapolate)))
        for extrapolate in (False, True)
    )
    truth = power(narrow)
    # A sharp cut at shell 8 rings beyond the sphere, which takes up to 3 % of a shell's power off or adds it.
    np.testing.assert_allclose(plain[:7], truth[:7], rtol=0.03)
    assert (plain[9:] < 0.01 * truth[9:]).all()
    np.testing.assert_allclose(filled, truth, rtol=0.03)  # the ball of Nyquist is a sharp cut too


def test_grey_scale_follows_the_data():
    request, sums = load(PAD2)
    prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    lam = strengths(request.ori)["half"]
    denoised = expected(PAD2, "map")
    scaled = replace(sums, real=8 * sums.real, imag=8 * sums.imag)
    found = reconstruct(scaled, prior=prior, denoised=Denoised(8 * denoised, lam))
    wanted = 8 * reconstruct(sums, prior=prior, denoised=Denoised(denoised, lam))
    np.testing.assert_array_equal(found, wanted)  # powers of two are exact


@pytest.mark.parametrize("value", [1e-300, 1e-45, 1e-38, 1e30, 1e300])
@pytest.mark.parametrize("extrapolate", [False, True], ids=["", "extrapolate"])
def test_any_tau2_gives_numbers(value, extrapolate):
    """A shell of absurd power is all prior or all data, never NaN."""
    request, sums = load(PAD1)
    tau2 = request.tau2.copy()
    tau2[[2, 9]] = value
    prior = inverse_prior(tau2, request.tau2_fudge, request.pad)
    denoised, lam = expected(PAD1, "map"), strengths(request.ori)["half"]
    found = reconstruct(sums, prior=prior, denoised=Denoised(denoised, lam, extrapolate))
    assert np.isfinite(found).all()
    # In a power of 1e-30 the data have no say already: smaller ones must agree with it.
    near = tau2.copy()
    near[[2, 9]] = np.clip(value, 1e-30, 1e30)
    wanted = slow(sums, near, request.tau2_fudge, denoised, lam, extrapolate)
    assert difference(found, wanted) <= FLOAT32


# Small things


def test_inverse_prior():
    np.testing.assert_allclose(inverse_prior(np.array([0.5, 0.0, 2.0]), 4.0, 2), [1 / 16, 0, 1 / 64], rtol=1e-15)


def test_the_padded_edge_rounds_half_up():
    empty = np.zeros((1, 1, 1), np.float32)
    assert Accumulators(empty, empty, empty, 17, 1.5, 8).n == 26  # 25.5; Python's round gives 26, 24.5 gives 24
    assert Accumulators(empty, empty, empty, 35, 0.7, 8).n == 25


ONES = np.ones((4, 4, 3), np.float32)


def with_value(value, shape=ONES.shape):
    array = np.ones(shape, np.float32)
    array[1, 2, 0] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((with_value(np.nan), ONES, ONES), "^r.mrc: 1 values are NaN or infinite, expected numbers; RELION's run"),
        ((ONES, with_value(-np.inf), ONES), "^i.mrc: 1 values are NaN or infinite"),
        ((ONES, ONES, with_value(np.inf)), "^k.mrc: 1 values are NaN or infinite"),
        ((ONES, ONES, with_value(-0.5)), r"^k.mrc: weights down to -0.5, expected 0 or more"),
        ((ONES, ONES, 0 * ONES), "^k.mrc: all weights are 0: no particle contributed"),
    ],
)
def test_sums_that_no_refinement_gives(arrays, message):
    with pytest.raises(InputError, match=message):
        check_accumulators(Accumulators(*arrays, 4, 1, 2), ("r.mrc", "i.mrc", "k.mrc"), threads=2)


def test_sums_as_refinements_give_them():
    weight = 0 * ONES
    weight[0, 0, 0] = 1
    check_accumulators(Accumulators(-ONES, 0 * ONES, weight, 4, 1, 2), ("r", "i", "k"))


# The FSC by tau2 and K


# RELION's own signal-to-noise ratios of shells 1 to 6, from the table that it wrote after the iteration: _rlnSsnrMap in
# run_it002_model.star. They hold the tau2 fudge factor of 4.
SSNR = {
    "relion5_class3d_box32/run_it002_class001": [773.268936, 146.068894, 34.373460, 4.456908, 0.403202, 0.075163],
    "relion5_class3d_box32/run_it002_class002": [953.627695, 144.745607, 38.060932, 5.917281, 0.623344, 0.121032],
}


@pytest.mark.parametrize("star", STARS, ids=lambda path: f"{path.parents[1].name}/{path.stem}")
def test_the_estimated_fsc_is_what_relion_made_tau2_from(star, monkeypatch):
    monkeypatch.chdir(star.parents[1])
    request = read_request_file(str(star.relative_to(star.parents[1])), needs_pixel_size=False)
    found = estimated_fsc(load_sums(request), request.tau2)
    assert not found[request.r_max :].any()
    name = f"{star.parents[1].name}/{Path(request.root).name}"
    if name in SSNR:
        ratio = np.array(SSNR[name]) / request.tau2_fudge
        np.testing.assert_allclose(found[1:7], ratio / (1 + ratio), atol=1e-4)
        return
    if not request.fsc.any():
        assert 0.8 < found[4] < 0.9 and found[6] < 0.01  # Class3D, whose reference had 24 A
        return
    # tau2 carries the fudge factor; that of joined halves is for the whole set.
    fsc = np.clip(request.fsc, 0.001, 0.999)
    ratio = request.tau2_fudge * fsc / (1 - fsc)
    expected = ratio / (1 + ratio) if "half" in star.name else np.sqrt(2 * fsc / (1 + fsc))
    np.testing.assert_allclose(found[1 : request.r_max], expected[1 : request.r_max], atol=2e-3)


def test_with_fsc_asks_tau2_and_k_only_where_there_is_none(monkeypatch):
    monkeypatch.chdir(REQUESTS / "class3d_box32_pad2")
    request = read_request_file("run/run_it002_class001_external_reconstruct.star")
    assert with_fsc(request).estimated
    known = replace(request, fsc=np.full_like(request.fsc, 0.5), weight=Path("missing.mrc"))
    assert with_fsc(known) is known
    assert not with_fsc(replace(request, tau2=np.zeros_like(request.tau2))).estimated
