"""Training from atomic models: features of real maps, refinements on the device, samples, and the whole, small."""

import logging
import re
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli.train_prior import train_prior
from cryored.errors import InputError
from cryored.maps.fourier import low_pass
from cryored.maps.fsc import shell_correlation
from cryored.maps.truth_scale import grey_scale
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import find_model
from cryored.prior.network import build_unet, condition, scaled
from cryored.simulation.density import gaussian_map
from cryored.simulation.features import Features, draw_features, featured_map
from cryored.simulation.intermediates import Experiment
from cryored.simulation.structure import Atoms, read_atoms
from cryored.training import from_atoms
from cryored.training.checkpoint import read_checkpoint
from cryored.training.device_refinements import Refiner
from cryored.training.from_atoms import learning_rate, loss_of
from cryored.training.plan import Plan
from cryored.training.samples import Densities, Samples, draw_crops

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)  # Keras on NumPy 2

MODEL = str(Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz")
BOX, PIXEL = 24, 5.0


@pytest.fixture(scope="module")
def atoms():
    return read_atoms(MODEL)


@pytest.fixture(scope="module")
def truth(atoms):
    return gaussian_map(atoms, BOX, PIXEL, 6.0).data


def rng(seed=0):
    return np.random.default_rng(seed)


# Features


def test_without_features_it_is_the_models_density(atoms, truth):
    np.testing.assert_allclose(
        featured_map(atoms, BOX, PIXEL, 6.0, Features(), rng=rng()), truth, atol=1e-5 * truth.max()
    )


@pytest.mark.parametrize(
    "features",
    [
        Features(bfactor=100.0),
        Features(spread=60.0),
        Features(motion=12.0),
        Features(solvent=0.6),
        Features(blobs=10),
        Features(belt=0.8),
    ],
)
def test_each_feature_changes_the_density_and_leaves_the_molecule(atoms, truth, features):
    changed = featured_map(atoms, BOX, PIXEL, 6.0, features, rng=rng())
    assert changed.dtype == np.float32
    difference = np.linalg.norm(changed - truth) / np.linalg.norm(truth)
    assert 0.02 < difference < 0.9
    assert np.corrcoef(changed.ravel(), truth.ravel())[0, 1] > 0.7


def test_bfactors_and_motion_keep_the_mass(atoms, truth):
    for features in (Features(bfactor=80.0, spread=60.0), Features(motion=10.0)):
        assert featured_map(atoms, BOX, PIXEL, 6.0, features, rng=rng()).sum() == pytest.approx(truth.sum(), rel=1e-3)


def ball(centre):
    points = rng().normal(size=(400, 3))
    points *= 18 * rng(1).random((400, 1)) ** (1 / 3) / np.linalg.norm(points, axis=1, keepdims=True)
    return Atoms(points + centre, np.full(400, 6.0))


@pytest.mark.parametrize("seed", range(4))
def test_a_belt_is_a_cylinder_about_the_molecule(seed):
    box, angpix, shift = 48, 3.0, (3, -2, 4)
    maps = [
        featured_map(ball(np.multiply(place, angpix)), box, angpix, 9.0, Features(belt=belt), rng=rng(seed))
        for place, belt in (((0, 0, 0), 0.0), ((0, 0, 0), 0.8), (shift, 0.8))
    ]
    plain, belted, moved = maps
    np.testing.assert_allclose(moved, np.roll(belted, shift[::-1], (0, 1, 2)), atol=0.02 * belted.max())
    belt = belted - plain
    z, y, x = (np.argwhere(belt > 0.5 * np.percentile(belt, 99)) - box // 2).T * angpix
    places = np.stack([x, y, z], axis=1)
    places -= places.mean(axis=0)
    along = places @ np.linalg.svd(places, full_matrices=False)[2][2]  # across the belt it is thinnest
    radius = np.sqrt((places**2).sum(axis=1) - along**2)
    above, below = (np.percentile(radius[side], 90) for side in (along > 5, along < -5))
    assert above == pytest.approx(below, abs=2.5)


def test_glycans_that_do_not_fit_are_told_of(atoms, caplog):
    caplog.set_level(logging.INFO, "cryored")
    featured_map(atoms, BOX, PIXEL, 6.0, Features(blobs=10), rng=rng())
    assert not caplog.records
    featured_map(ball((0, 0, 0)), 16, 3.0, 9.0, Features(blobs=10), rng=rng())
    assert "glycans; a larger box has more" in caplog.text


def test_a_third_is_as_ideal_as_the_model():
    drawn = [draw_features(rng=rng(seed)) for seed in range(300)]
    ideal = [one for one in drawn if one == Features(bfactor=one.bfactor)]
    assert 0.25 < len(ideal) / len(drawn) < 0.5


# Refinements


def test_transforms_are_those_of_the_library(truth):
    from keras import ops

    refiner = Refiner(BOX, PIXEL)
    data = ops.convert_to_tensor(truth)
    np.testing.assert_allclose(
        ops.convert_to_numpy(refiner.inverse(refiner.forward(data))), truth, atol=1e-5 * truth.max()
    )
    shells = np.exp(-np.arange(BOX // 2 + 1) / 4.0)
    from cryored.maps.fourier import apply_shells

    np.testing.assert_allclose(
        ops.convert_to_numpy(refiner.filtered(data, shells)), apply_shells(truth, shells), atol=2e-5 * truth.max()
    )


@pytest.mark.slow
def test_good_particles_give_the_truth_on_its_grey_scale(truth):
    from keras import ops

    experiment = Experiment(number=120, snr=5.0, angle=2.0)
    data = ops.convert_to_tensor(truth)
    (iteration,) = Refiner(BOX, PIXEL).run(data, data, experiment, diameter=110.0, iterations=1, rng=rng())
    assert iteration.fsc[1:5].min() > 0.95
    for half in iteration.halves:
        found = ops.convert_to_numpy(half.unregularised)
        assert grey_scale(found, truth, iteration.fsc) == pytest.approx(1, abs=0.02)
        assert shell_correlation(found, truth)[1:5].min() > 0.9
        # The prior takes away.
        assert np.linalg.norm(ops.convert_to_numpy(half.regularised)) < np.linalg.norm(found)


@pytest.mark.slow
def test_better_particles_resolve_more_and_a_seed_repeats(truth):
    from keras import ops

    data = ops.convert_to_tensor(truth)
    start = ops.convert_to_tensor(low_pass(truth, PIXEL, 30.0))

    def resolution(snr, seed=0):
        experiment = Experiment(number=80, snr=snr, angle=5.0)
        found = list(Refiner(BOX, PIXEL).run(data, start, experiment, diameter=110.0, iterations=3, rng=rng(seed)))
        return min(iteration.resolution for iteration in found)

    assert resolution(2.0) < resolution(0.003)
    assert resolution(0.1) == resolution(0.1)


# Samples and the loss


@pytest.fixture(scope="module")
def samples(truth):
    plan = Plan(box=BOX, pixel_size=PIXEL, crop=16, batch=2)
    stream = Samples(plan, iter([("one", truth, 110.0), ("two", truth[::-1].copy(), 110.0)] * 20), seed=1).stream()
    found = []
    while len(found) < 8:
        found += next(stream)
    return plan, found


@pytest.mark.slow
def test_samples_are_standardised_and_weighted(samples):
    from keras import ops

    for sample in samples[1]:
        shown, error = (ops.convert_to_numpy(data).astype(np.float32) for data in (sample.shown, sample.error))
        assert np.square(shown).sum() * PIXEL**3 / (96 * 1.5) ** 3 == pytest.approx(1, rel=0.02)
        assert sample.weight * np.square(error).mean() == pytest.approx(1, rel=0.02)
        assert sample.told.shape == (25,)
        assert sample.told[-1] in (0, 1)


def test_noise_takes_the_signals_place_where_there_is_no_target(truth):
    from keras import ops

    plan = Plan(box=BOX, pixel_size=PIXEL, crop=16, batch=2)
    maker = Samples(plan, iter([]), seed=1)
    determined = (np.arange(BOX // 2 + 1) < 9).astype(float)
    shown, known = maker._substituted(ops.convert_to_tensor(truth), determined)
    start = int(known.sum())
    assert 3 <= start < 9
    fsc = shell_correlation(ops.convert_to_numpy(shown), truth)
    assert fsc[:start].min() > 0.999
    assert np.abs(fsc[start + 1 : -1]).max() < 0.35
    # The power stays.
    assert np.square(ops.convert_to_numpy(shown)).sum() == pytest.approx(np.square(truth).sum(), rel=0.01)
    few = np.zeros(BOX // 2 + 1)
    assert maker._substituted(shown, few)[1] is few


def test_crops_keep_map_and_error_together(samples):
    from keras import ops

    plan, found = samples
    maps, told, true = (ops.convert_to_numpy(part) for part in draw_crops(found[:1], plan, rng(), 12))
    assert maps.shape == (12, 16, 16, 16, 1)
    assert told.shape == (12, 25)
    assert true.shape == (12, 16, 16, 16, 2)
    shown, error = (ops.convert_to_numpy(data).astype(np.float32) for data in (found[0].shown, found[0].error))
    for one, two in zip(maps[..., 0], true, strict=True):
        scale = np.sqrt(found[0].weight / two[0, 0, 0, 1])
        # Every voxel's pair of values is one of the sample's, on another scale.
        pairs = {(a, b) for a, b in zip(shown.ravel(), error.ravel(), strict=True)}
        crop = np.stack([one.ravel(), two[..., 0].ravel()], axis=1) / scale
        assert {(a, b) for a, b in np.float16(crop).astype(np.float32)} <= pairs


def test_the_loss_is_least_where_estimate_and_variance_are_right():
    from keras import ops

    error = rng().normal(scale=0.3, size=(1, 8, 8, 8)).astype(np.float32)
    true = ops.convert_to_tensor(np.stack([error, np.full_like(error, 1 / 0.09)], axis=-1))

    def loss(estimate, logarithm):
        found = np.stack([estimate, np.full_like(error, logarithm)], axis=-1)
        return float(loss_of(0.1)(true, ops.convert_to_tensor(found)))

    right = loss(np.zeros_like(error), np.log(0.09))
    assert right < loss(np.zeros_like(error), np.log(0.03))
    assert right < loss(np.zeros_like(error), np.log(0.3))
    assert loss(0.5 * error, np.log(0.0225)) < right


def test_the_rate_rises_and_falls():
    plan = Plan()
    assert learning_rate(plan, 0.0) < 0.01 * plan.learning_rate
    assert learning_rate(plan, 0.02) == pytest.approx(plan.learning_rate, rel=0.02)
    assert learning_rate(plan, 1.0) == pytest.approx(1e-7)


# The network


def test_what_is_told_is_the_fsc_at_fixed_frequencies():
    frequency = np.arange(13) / (BOX * PIXEL)
    told = condition(np.linspace(1, 0, 13), frequency, PIXEL, 4)
    np.testing.assert_allclose(told, [0.875, 0.625, 0.375, 0.125, 1])
    np.testing.assert_array_equal(condition(None, frequency, PIXEL, 4), 0)
    # A map that is coarser than the model says nothing beyond its own Nyquist frequency.
    np.testing.assert_allclose(condition(np.ones(13), frequency, PIXEL / 2, 4), [1, 1, 0, 0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("uncertainty", [False, True])
def test_a_scaled_network_scales_its_estimate(uncertainty):
    network = build_unet(2, 1, uncertainty=uncertainty, knots=3)
    network.set_weights([rng(i).normal(size=w.shape, scale=0.3) ** 2 for i, w in enumerate(network.get_weights())])
    data = [rng(1).normal(size=(1, 4, 4, 4, 1)).astype(np.float32), np.ones((1, 4), dtype=np.float32)]
    before, after = (np.asarray(one.predict_on_batch(data)) for one in (network, scaled(network, 1.25)))
    np.testing.assert_allclose(data[0] - after[..., :1], 1.25 * (data[0] - before[..., :1]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(after[..., 1:], before[..., 1:] + 2 * np.log(1.25), rtol=1e-5)


# The whole


def test_a_training_goes_on_as_it_began(tmp_path):
    plan = Plan(width=2, depth=1, knots=3, mixed_precision=False)
    network = from_atoms.build(plan)
    from_atoms.save(tmp_path, network, from_atoms.State(step=7), plan)
    assert from_atoms.load(tmp_path, network, replace(plan, minutes=99.0)).step == 7
    for name, value, before in (("width", 4, 2), ("pixel_size", 3.0, 1.5), ("batch", 1, 8)):
        told = rf"checkpoint.npz: trained with {name} {before}, expected {value} as asked"
        with pytest.raises(InputError, match=told):
            from_atoms.load(tmp_path, network, replace(plan, **{name: value}))


def test_a_state_of_an_earlier_version_is_not_begun_anew(tmp_path):
    (tmp_path / "state.json").touch()
    with pytest.raises(InputError, match="the state of a training by an earlier cryored; go on with that, or"):
        from_atoms.train([MODEL], [], tmp_path, Plan(), seconds=1.0, processes=1)


def test_all_samples_are_validated_on(monkeypatch):
    seen = []

    def crops(samples, plan, rng, number, first):
        seen.append((first, number))
        return np.zeros((number, 1)), np.zeros((number, 1)), np.ones((number, 1, 2))

    class Nothing:
        def predict_on_batch(self, inputs):
            return np.zeros((len(inputs[0]), 1, 2))

    monkeypatch.setattr(from_atoms, "draw_crops", crops)
    ratio, _ = from_atoms.validate(Nothing(), [None] * 10, Plan(batch=4))
    assert seen == [(0, 4), (4, 4), (8, 2)]
    assert ratio == 1


def test_the_rate_rises_from_the_first_step():
    plan = Plan(learning_rate=1.0)
    assert learning_rate(plan, 0.1, 0.1) < 0.01
    assert learning_rate(plan, 0.11, 0.1) == pytest.approx(0.5 * learning_rate(plan, 0.11), rel=0.02)
    assert learning_rate(plan, 0.5, 0.1) == learning_rate(plan, 0.5)


def test_a_structure_that_fits_now_and_then_is_used(monkeypatch):
    class Now:
        def __init__(self, *_, **__):
            pass

        def submit(self, function, *arguments):
            future = Future()
            if next(fits):
                future.set_result((np.ones(1), 1.0, None))
            else:
                future.set_exception(InputError("no orientation"))
            return future

    monkeypatch.setattr("cryored.training.samples.ProcessPoolExecutor", Now)
    fits = iter([False] * 10 + [True] + [False] * 40 + [True] * 3)
    stream = Densities(["a.pdb"], Plan(), 1).stream()
    assert [next(stream)[0] for _ in range(2)] == ["a", "a"]
    fits = iter([False] * 100)
    with pytest.raises(InputError, match="none of 2 structures can be used; the last: no orientation"):
        next(Densities(["a.pdb", "b.pdb"], Plan(), 1).stream())


@pytest.mark.slow
def test_structures_that_cannot_be_used_are_told_of(tmp_path):
    (tmp_path / "README.txt").write_text("no structure\n")
    words = [str(tmp_path), "-o", str(tmp_path / "out"), "--box", "32", "--pixel-size", "5", "--crop", "16"]
    done = CliRunner().invoke(train_prior, [*words, "--width", "2", "--cpu", "--full-precision", "--minutes", "9"])
    assert done.exit_code == 1
    assert re.search(r"error: none of 1 structures can be used; the last: \S*README.txt: ", done.stderr)


@pytest.mark.slow
def test_a_prior_from_an_atomic_model(tmp_path, monkeypatch):
    monkeypatch.setattr(from_atoms, "REPORT", 2.0)
    monkeypatch.setattr("cryored.training.samples.draw_experiment", lambda rng: Experiment(40, snr=0.5, angle=3.0))
    out = tmp_path / "tiny"
    common = [MODEL, "-o", str(out), "--box", "32", "--pixel-size", "5", "--crop", "16"]
    common += ["--batch", "2", "--width", "2", "--full-precision", "--cpu"]
    part = ["--minutes", "9", "--seconds", "8", "--copy", str(tmp_path / "copy")]
    first = CliRunner().invoke(train_prior, [*common, *part])
    assert first.exit_code == 0, first.output
    assert not (out / "model.keras").exists()
    begun = read_checkpoint(out / "state" / "checkpoint.npz").about
    assert (tmp_path / "copy" / "checkpoint.npz").exists()
    second = CliRunner().invoke(train_prior, [*common, "--minutes", "0.2"])
    assert second.exit_code == 0, second.exception
    found = find_model(str(out))
    assert found.card.target == "truth"
    assert found.card.training["step"] > begun["step"]
    assert (out / "state" / "training.csv").read_text().startswith("step,seconds,loss")
    volume = Volume(rng().normal(size=(24, 24, 24)).astype(np.float32), 5.0)
    assert Denoiser(found, gpu=False)(volume).shape == volume.shape
