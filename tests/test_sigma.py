"""The curve that puts a network's sigma right: what it does, how it is fitted, what a card may hold."""

import dataclasses

import numpy as np
import pytest

from cryored.errors import InputError, ModelError
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import ModelCard, find_model, save_model, write_card
from cryored.prior.network import build_unet
from cryored.prior.sigma import SigmaCurve, model_sigma
from cryored.training.sigma_fit import KNOTS, fit_sigma, sigma_factors

pytestmark = pytest.mark.filterwarnings(
    # Keras asks TensorFlow's variables for numpy arrays in the way of numpy 1.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

CURVE = SigmaCurve((0.1, 1.0, 10.0), (0.2, 1.0, 2.0))


def test_at_its_points_between_them_and_beyond():
    told = np.array([[0.1, 1.0, 10.0], [0.01, 100.0, 0.0]], dtype=np.float32)
    expected = [[0.2, 1.0, 2.0], [0.02, 20.0, 0.0]]
    np.testing.assert_allclose(CURVE(told), expected, rtol=1e-6)
    np.testing.assert_allclose(CURVE(np.float32([np.sqrt(0.1)])), np.sqrt(0.2), rtol=1e-6)
    assert CURVE(told).dtype == np.float32


@pytest.mark.parametrize(
    ("told", "measured", "message"),
    [
        ((0.1,), (0.1,), "two at least"),
        ((0.1, 1.0), (0.1, 1.0, 2.0), "as many told as measured"),
        ((1.0, 0.1), (0.1, 1.0), "told .* increasing"),
        ((0.0, 0.1), (0.1, 1.0), "told .* increasing"),
        ((0.1, 1.0), (1.0, 0.1), "measured .* don't fall"),
        ((0.1, 1.0), (0.1, np.inf), "measured .* don't fall"),
    ],
)
def test_what_is_no_curve(told, measured, message):
    with pytest.raises(InputError, match=message):
        SigmaCurve(told, measured)


def parts(rng, curve, number=24, voxels=20000):
    """Parts of maps whose errors have the sigma that a curve gives, in general a part a bit more and another less."""
    for _ in range(number):
        told = np.exp(rng.uniform(np.log(0.02), np.log(2.5), voxels)).astype(np.float32)
        yield told, rng.normal(0, curve(told) * np.exp(rng.normal(0, 0.1))).astype(np.float32)


def test_the_fit_finds_the_curve_and_the_coverage_is_right():
    rng = np.random.default_rng(0)
    truth = SigmaCurve((0.03, 0.25, 2.0), (0.06, 0.2, 1.0))
    stored = fit_sigma([sigma_factors(error, told) for told, error in parts(rng, truth)])
    assert stored["told"] == [knot for knot in KNOTS if knot <= 2]  # what is told ends at 2.5
    curve = SigmaCurve(tuple(stored["told"]), tuple(stored["measured"]))
    inner = np.array([0.06, 0.12, 0.5, 1.0])  # the curve bends at the others, and the bins average over that
    np.testing.assert_allclose(curve(inner), truth(inner), rtol=0.1)
    told, error = next(parts(rng, truth, 1))
    for share, sigmas in ((0.68, 0.994), (0.95, 1.96)):
        for some in (told < 0.06, told > 1):
            assert np.mean(np.abs(error) < sigmas * curve(told), where=some) == pytest.approx(share, abs=0.07)
    assert np.mean(np.abs(error) < told, where=told < 0.06) < 0.5
    assert np.mean(np.abs(error) < told, where=told > 1) > 0.9


def test_a_sigma_that_is_right_stays():
    rng = np.random.default_rng(1)
    identity = SigmaCurve((0.1, 1.0), (0.1, 1.0))
    stored = fit_sigma([sigma_factors(error, told) for told, error in parts(rng, identity)])
    np.testing.assert_allclose(stored["measured"], stored["told"], rtol=0.06)


def test_too_few_maps():
    rng = np.random.default_rng(0)
    few = [sigma_factors(error, told) for told, error in parts(rng, CURVE, number=9)]
    with pytest.raises(InputError, match="9 parts of maps have enough voxels in 0 ranges of sigma, expected two"):
        fit_sigma(few)
    with pytest.raises(InputError, match="0 parts"):
        fit_sigma([])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "m"
    rng = np.random.default_rng(0)
    network = build_unet(2, 1, uncertainty=True)
    network.set_weights([0.3 * rng.standard_normal(w.shape) if w.ndim > 1 else w for w in network.get_weights()])
    return save_model(folder, network, ModelCard("m", "regularised", 1.5, 2, 1, "", (3.0, 18.0), uncertainty=True))


@pytest.mark.parametrize("voxel_size", [1.5, 1.1])
def test_the_denoiser_follows_the_card(model, tmp_path, voxel_size):
    volume = Volume(np.random.default_rng(2).standard_normal((16, 16, 16)).astype(np.float32), voxel_size)
    told = Denoiser(model, gpu=False)
    half = dataclasses.replace(
        model, card=dataclasses.replace(model.card, sigma={"told": [1, 2], "measured": [0.5, 1]})
    )
    results, sigmas = zip(*(one.with_uncertainty(volume) for one in (told, Denoiser(half, gpu=False))), strict=True)
    np.testing.assert_array_equal(results[0].data, results[1].data)
    np.testing.assert_allclose(sigmas[1].data, sigmas[0].data / 2, rtol=1e-5)


def test_a_card_keeps_it_and_one_without_has_none(model):
    assert model_sigma(model) is None
    stored = {"told": [0.1, 1.0], "measured": [0.2, 0.9], "maps": 3}
    write_card(model.folder, dataclasses.replace(model.card, sigma=stored))
    found = find_model(str(model.folder))
    assert found.card.sigma == stored
    assert model_sigma(found) == SigmaCurve((0.1, 1.0), (0.2, 0.9))


@pytest.mark.parametrize(
    "stored", [{"told": [0.1, 1.0]}, {"told": ["a", "b"], "measured": [1, 2]}, {"told": 3, "measured": 4}]
)
def test_a_card_with_something_else(model, stored):
    damaged = dataclasses.replace(model, card=dataclasses.replace(model.card, sigma=stored))
    with pytest.raises(InputError, match=r"card\.json: no sigma .*expected the lists told and measured"):
        model_sigma(damaged)
    write_card(model.folder, dataclasses.replace(model.card, sigma=[1]))
    with pytest.raises(ModelError, match="sigma is .*expected an object"):
        find_model(str(model.folder))


def test_the_shipped_curve_is_one():
    curve = model_sigma(find_model("cwred"))
    assert curve is not None
    assert curve(np.float32([4.0])) < 4.0  # where density is high the network tells too much
    assert curve(np.float32([0.03])) > 0.03
