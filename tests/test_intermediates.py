"""The refinement in miniature: what a refinement must do, and RELION's own rules in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cryored.errors import InputError
from cryored.files.requests import read_request_file
from cryored.maps.fourier import apply_shells
from cryored.maps.fsc import shell_correlation
from cryored.reconstruction.projection import Views, angular_distance, random_rotations
from cryored.reconstruction.sums import load_sums
from cryored.reconstruction.update import inverse_prior, reconstruct
from cryored.simulation import intermediates
from cryored.simulation.density import gaussian_map
from cryored.simulation.intermediates import Experiment, intermediate_pairs, map_prior, pairs_of, trajectory
from cryored.simulation.structure import read_atoms

DATA = Path(__file__).parent / "data"
BOX, ANGPIX, RESOLUTION, DIAMETER = 32, 3.0, 6.0, 80.0
EASY = Experiment(number=200, snr=0.5, angle=8.0, shift=0.7, pad=2.0)


@pytest.fixture(scope="module")
def atoms():
    return read_atoms(DATA / "structures" / "6M2B.cif.gz")


@pytest.fixture(scope="module")
def truth(atoms):
    return gaussian_map(atoms, BOX, ANGPIX, RESOLUTION).data


def refine(truth, experiment, seed=0, **options):
    return list(trajectory(truth, ANGPIX, experiment, diameter=DIAMETER, rng=np.random.default_rng(seed), **options))


@pytest.fixture(scope="module")
def easy(truth):
    return refine(truth, EASY)


def pose_errors(monkeypatch, truth, experiment):
    """Return root mean square angles (degrees) and shifts (pixels) to the truth, before and after refining."""
    true, seen = [], []

    def drawn(views, number, *, rng):
        true.append(random_rotations(number, rng=rng))
        return true[0]

    class Spy(intermediates._Half):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(self)
            starts.append((self._rotations, self._shifts))

    starts = []
    monkeypatch.setattr(Views, "draw", drawn)
    monkeypatch.setattr(intermediates, "_Half", Spy)
    refine(truth, experiment)

    def error(poses):
        angles = angular_distance(np.concatenate([rotations for rotations, _ in poses]), true[0])
        shifts = np.concatenate([shifts for _, shifts in poses])
        return np.sqrt(np.mean(angles**2)), np.sqrt(np.mean(shifts**2))

    return error(starts), error([(half._rotations, half._shifts) for half in seen])


@pytest.mark.slow
def test_the_particles_find_their_poses(monkeypatch, truth):
    before, after = pose_errors(monkeypatch, truth, EASY)
    assert before[0] == pytest.approx(8.0, rel=0.1)
    assert before[1] == pytest.approx(0.7, rel=0.1)
    assert after[0] < 0.65 * before[0]  # measured: 0.56
    assert after[1] < 0.5 * before[1]


@pytest.mark.slow
def test_noise_limits_the_poses(monkeypatch, truth):
    good, bad = (
        pose_errors(monkeypatch, truth, dataclasses.replace(EASY, snr=snr))[1][0] for snr in (EASY.snr, EASY.snr / 50)
    )
    assert bad > 1.5 * good


@pytest.mark.slow
def test_without_noise_and_errors_the_truth_comes_back(truth):
    experiment = Experiment(number=400, snr=1e4, angle=0.0, pad=2.0)
    last = refine(truth, experiment)[-1]
    first, second = pairs_of(last, truth, ANGPIX)
    # The search still tries poses around the true ones, and Nyquist stays half empty.
    for pair in (first, second):
        assert shell_correlation(pair.noisy, truth)[: BOX // 2 - 3].min() > 0.95
        assert np.vdot(pair.noisy, truth) / np.vdot(truth, truth) == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_resolution_improves_and_follows_the_noise(truth, easy):
    def resolved(run):
        return [pairs_of(item, truth, ANGPIX)[0].resolution for item in run]

    assert resolved(easy)[-1] < resolved(easy)[0]
    noisy = refine(truth, dataclasses.replace(EASY, snr=0.01))
    assert min(resolved(noisy)) > min(resolved(easy))


def test_pairs_are_what_the_table_says(truth, easy):
    for item in easy:
        first, second = pairs_of(item, truth, ANGPIX)
        np.testing.assert_array_equal(first.fsc, item.fsc)
        np.testing.assert_array_equal(item.fsc[item.r_max + 1 :], 0)
        np.testing.assert_allclose(first.target, apply_shells(truth, np.clip(item.fsc, 0, 1)), atol=1e-6)
        assert first.noisy.dtype == np.float32
        assert np.any(first.noisy != second.noisy)
        # The FSC is of B and K, before soft mask and gridding correction: that of the maps is close to it.
        known = slice(2, item.r_max - 1)
        np.testing.assert_allclose(shell_correlation(first.noisy, second.noisy)[known], item.fsc[known], atol=0.15)


def test_low_resolution_is_joined(truth, easy):
    first, second = easy[0].halves
    np.testing.assert_array_equal(first.weight[:6, 0, 0], second.weight[:6, 0, 0])  # twice 40 A: the padding
    assert np.any(first.weight[6:12, 0, 0] != second.weight[6:12, 0, 0])
    np.testing.assert_allclose(easy[0].fsc[:3], 1.0, atol=1e-6)
    assert easy[0].fsc[3] < 1


@pytest.mark.slow
def test_halves_of_noise_correlate_by_chance_alone(truth):
    """The halves share the start and nothing else. Poses fitted to noise make each half, not both, look better."""
    run = refine(truth, Experiment(number=200, snr=1e-7), iterations=4)
    last = np.concatenate([item.fsc[8 : item.r_max] for item in run[1:]])
    assert abs(last.mean()) < 0.1  # a shell of 400 coefficients scatters by 0.05


@pytest.mark.slow
def test_same_seed_same_bytes(truth, monkeypatch):
    experiment = dataclasses.replace(EASY, number=60)
    one = refine(truth, experiment, seed=5, iterations=2)
    monkeypatch.setattr("cryored.threads.default_threads", lambda: 1)
    monkeypatch.setattr("cryored.reconstruction.projection.default_threads", lambda: 1)
    two = refine(truth, experiment, seed=5, iterations=2)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.fsc, b.fsc)
        np.testing.assert_array_equal(reconstruct(a.halves[0]), reconstruct(b.halves[0]))
    other = refine(truth, experiment, seed=6, iterations=1)
    assert np.any(other[0].fsc != one[0].fsc)


@pytest.mark.slow
def test_a_drawn_molecule_is_refined_whole(atoms):
    couples = list(intermediate_pairs(atoms, BOX, ANGPIX, RESOLUTION, rng=np.random.default_rng(0)))
    assert 3 <= len(couples) <= 12
    for first, second in couples:
        np.testing.assert_array_equal(first.truth, couples[0][0].truth)
        np.testing.assert_array_equal(first.target, second.target)


def test_an_odd_box_is_refused(atoms):
    with pytest.raises(InputError, match="box 33, expected an even number, as RELION refines; use --box 34"):
        next(intermediate_pairs(atoms, 33, ANGPIX, RESOLUTION, rng=np.random.default_rng(0)))


def test_draws_stay_in_their_ranges():
    draws = [intermediates.draw_experiment(rng=np.random.default_rng(seed)) for seed in range(300)]
    assert {draw.pad for draw in draws} == {1.0, 2.0}
    for low, high, values in (
        (150, 1200, [draw.number for draw in draws]),
        (0.002, 0.4, [draw.snr for draw in draws]),
        (3, 20, [draw.angle for draw in draws]),
        (0, 1.5, [draw.shift for draw in draws]),
    ):
        assert low <= min(values) and max(values) <= high
        assert min(values) < low + 0.1 * (high - low) and max(values) > 0.8 * high


@pytest.mark.parametrize("case", ["box32_pad2", "pka_box64_pad1", "box36_pad1_c2"])
def test_prior_is_relions(monkeypatch, case):
    """What tau2 of a recorded request adds to K follows from K and the FSC of the same request."""
    folder = DATA / "relion_requests" / case
    monkeypatch.chdir(folder)
    for path in sorted(Path("run").glob("*_half?_*_external_reconstruct.star")):
        request = read_request_file(str(path))
        found = map_prior(load_sums(request), request.fsc)
        expected = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
        np.testing.assert_allclose(found[1 : request.r_max - 1], expected[1 : request.r_max - 1], rtol=2e-3)


def curve(box, half, tail, end):
    """An FSC above 0.5 up to shell `half`, then `tail` up to shell `end`, then 0."""
    fsc = np.zeros(box // 2 + 1)
    fsc[: end + 1] = tail
    fsc[: half + 1] = 0.9
    return fsc


@pytest.mark.parametrize(
    ("half", "tail", "r_max", "first", "expected"),
    [  # the first four were recorded in a refinement of box 96: iterations 1 to 4
        (15, 0.3, 15, True, 25),
        (17, 0.3, 25, False, 29),
        (16, 0.3, 29, False, 28),
        (11, 0.3, 26, False, 23),
        (12, 0.1, 23, False, 22),
        (47, 0.3, 48, False, 48),
        (0, 0.0, 15, True, 11),
    ],
)
def test_the_current_image_size_grows_as_in_relion(half, tail, r_max, first, expected):
    fsc = curve(96, half, tail, r_max - 1)
    assert intermediates.next_radius(fsc, r_max, 96, first=first) == expected
