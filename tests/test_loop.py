"""The training loop: schedule, precision, validation, checkpoints, several devices."""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from small_pairs import BOX, TINY, write_tables

from cryored.errors import InputError, ModelError, OutputError
from cryored.prior import device
from cryored.prior.models import find_model, load_network
from cryored.prior.network import build_unet
from cryored.simulation.pair_table import read_pairs
from cryored.training.batches import PairStore, draw_batch
from cryored.training.loop import (
    Log,
    Recipe,
    State,
    Validation,
    batch_maker,
    build_network,
    check_recipe,
    learning_rate,
    load_checkpoint,
    run,
    save_checkpoint,
    train_step,
)

# Keras asks TensorFlow's variables for numpy arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("pairs"), "train.star", ["a", "b", "c"])


@pytest.fixture(scope="module")
def store(table):
    device.set_up(gpu=False)
    return PairStore(read_pairs(table), "regularised")


# Recipe


def test_the_defaults_are_the_papers():
    recipe = Recipe()
    assert (recipe.learning_rate, recipe.batch_size, recipe.epochs, recipe.patch) == (1e-4, 10, 27, 64)
    assert (recipe.width, recipe.depth, recipe.schedule, recipe.loss, recipe.l2) == (4, 5, "constant", "mse", 1e-6)


def test_epochs_become_steps():
    assert Recipe().with_steps(301).steps == math.ceil(27 * 30.1)
    assert Recipe(steps=7).with_steps(301).steps == 7


def test_the_constant_rate_is_constant():
    recipe = Recipe(steps=100)
    assert {learning_rate(recipe, step) for step in range(100)} == {1e-4}


def test_the_cosine_rises_and_falls():
    recipe = replace(TINY, steps=1000, learning_rate=2e-3)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-3 / 50)
    assert max(rates) == pytest.approx(2e-3, rel=0.01)
    assert np.all(np.diff(rates[:49]) > 0)
    assert np.all(np.diff(rates[50:]) < 0)
    assert rates[-1] < 1e-7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 9}, r"patch 9, expected a multiple of 2 \(2\*\*depth\); change --patch or --depth"),
        ({"patch": 12, "depth": 3}, "patch 12, expected a multiple of 8"),
        ({"synthesise": 0.1}, "a share of 0.1 of 4 patches is less than one, expected at least 0.25; raise --synth"),
    ],
)
def test_recipes_at_odds_with_themselves(changes, message):
    with pytest.raises(InputError, match=message):
        check_recipe(replace(TINY, **changes))


# Network


def test_the_penalty_is_the_sum_of_squares_of_the_kernels():
    network = build_unet(2, 1, l2=3e-3)
    kernels = [weight.numpy() for weight in network.weights if weight.path.endswith("kernel")]
    assert len(kernels) == 9
    expected = 3e-3 * sum(float(np.sum(kernel.astype(np.float64) ** 2)) for kernel in kernels)
    assert float(sum(float(loss) for loss in network.losses)) == pytest.approx(expected, rel=1e-5)
    assert build_unet(2, 1).losses == []


@pytest.mark.slow
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32():
    rng = np.random.default_rng(0)
    exact, mixed = build_unet(4, 1), build_unet(4, 1, dtype="mixed_bfloat16")
    weights = [weight + 0.3 * rng.standard_normal(weight.shape) for weight in exact.get_weights()]
    weights = [np.abs(weight) if weight.ndim == 1 else weight for weight in weights]  # variances
    exact.set_weights(weights)
    mixed.set_weights(weights)
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    data = rng.standard_normal((1, 8, 8, 8, 1)).astype(np.float32)
    expected, found = (np.asarray(network.predict_on_batch(data)) for network in (exact, mixed))
    assert found.dtype == np.float32
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < difference < 3e-2  # eight bits a layer


# Batches


class Ones:
    """Makes patches of ones."""

    def batch(self, step, size):
        return np.ones((size, 8, 8, 8, 1)), np.full((size, 8, 8, 8, 1), step), np.full(size, 9.0)


@pytest.mark.parametrize(("loss", "root"), [("mse", 1), ("l1", 0.5)])
def test_a_batch_of_stored_and_synthesised_patches(store, loss, root):
    recipe = replace(TINY, loss=loss, synthesise=0.26)
    inputs, errors, weights = (np.asarray(part) for part in batch_maker(recipe, store, Ones())(5))
    stored = draw_batch(store, 5, 3, patch=8, seed=0)
    for found, expected in zip((inputs, errors), stored, strict=False):
        np.testing.assert_array_equal(found[:3], expected)
    assert np.all(inputs[3] == 1) and np.all(errors[3] == 5)
    np.testing.assert_allclose(weights.ravel(), np.append(stored[2], 9) ** root, rtol=1e-6)
    assert weights.shape == (4, 1, 1, 1)
    everything = batch_maker(replace(recipe, synthesise=1.0), store, Ones())(5)[0]
    assert np.all(np.asarray(everything) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_the_loss_of_an_untrained_network_is_that_of_its_input(store, loss):
    """Its output is 0, so that the error stays; whole boxes, whose weights hold exactly."""
    recipe = replace(TINY, loss=loss, patch=BOX, l2=0.0)
    batch = batch_maker(recipe, store)(0)
    found = train_step(build_network(recipe), recipe, 0, batch)
    if loss == "mse":
        assert found == pytest.approx(1, rel=1e-2)  # float16
    else:
        errors = np.asarray(batch[1])
        ratios = np.mean(np.abs(errors), axis=(1, 2, 3, 4)) / np.sqrt(np.mean(errors**2, axis=(1, 2, 3, 4)))
        assert found == pytest.approx(np.mean(ratios), rel=1e-2)


# Validation


class Answers:
    """A network that gives prepared outputs in turn."""

    def __init__(self, outputs):
        self.outputs = iter(outputs)

    def predict_on_batch(self, inputs):
        return next(self.outputs)


@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize("kind", ["regularised", "unregularised"])
def test_the_ratio_is_1_for_the_wiener_map_and_0_for_the_target(table, loss, kind):
    rows = read_pairs(table)
    recipe = replace(TINY, loss=loss, input=kind)
    seen, wiener = (
        [draw_batch(PairStore(rows, name), step, 4, patch=8, seed=0) for step in range(8)]
        for name in (kind, "regularised")
    )
    validation = Validation(rows, replace(recipe, seed=5))
    assert validation(Answers(errors for _, errors, _ in seen)) == 0
    # The Wiener map's error on the scale of what the network sees, from the weights, which know both scales.
    scales = [np.sqrt(b[2] / a[2])[:, None, None, None, None] for a, b in zip(seen, wiener, strict=True)]
    left = [a[1] - scale * b[1] for a, b, scale in zip(seen, wiener, scales, strict=True)]
    assert validation(Answers(left)) == pytest.approx(1, rel=1e-5)
    half = [a[1] - 0.5 * scale * b[1] for a, b, scale in zip(seen, wiener, scales, strict=True)]
    assert validation(Answers(half)) == pytest.approx(0.25 if loss == "mse" else 0.5, rel=1e-5)


# Checkpoints


def start(store, recipe=TINY):
    return build_network(recipe), batch_maker(recipe, store)


def go(folder, network, make, state, recipe=TINY, **options):
    run(
        network,
        recipe,
        make,
        state,
        checkpoint=folder / "checkpoint.npz",
        checkpoint_every=0,
        log=Log(folder / "training.csv", state.step),
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"mixed_precision": True}, {"schedule": "constant", "loss": "l1"}])
def test_a_run_in_two_pieces_is_the_run_in_one(store, table, tmp_path, changes):
    """The same curve, the same best step and the same weights, there and at the end."""
    recipe = replace(TINY, **changes)
    validation = Validation(read_pairs(table), recipe)
    whole, first = State(), State()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    network, make = start(store, recipe)
    go(tmp_path / "one", network, make, whole, recipe, validation=validation)

    class Killed(Exception):
        pass

    def kill(done, total, note):
        if done == 14:
            raise Killed

    piece, make = start(store, recipe)
    with pytest.raises(Killed):
        go(tmp_path / "two", piece, make, first, recipe, validation=validation, progress=kill)
    with (tmp_path / "two" / "training.csv").open("a") as stream:
        stream.write("20,9,9,9\n")  # as if it had been killed later
    piece, make = start(store, recipe)
    second = load_checkpoint(tmp_path / "two" / "checkpoint.npz", piece, recipe)
    assert second.step == 13
    go(tmp_path / "two", piece, make, second, recipe, validation=validation)
    assert second.step == whole.step == 24
    assert second.best_step == whole.best_step > 0
    curves = [
        np.genfromtxt(tmp_path / name / "training.csv", delimiter=",", skip_header=1, filling_values=-1)
        for name in ("one", "two")
    ]
    assert curves[0][:, 0].tolist() == [8, 10, 16, 20, 24]
    # Threads may split sums otherwise: rounding that Adam carries on, of eight bits in bfloat16.
    tolerance = 3e-2 if recipe.mixed_precision else 1e-3
    np.testing.assert_allclose(curves[0], curves[1], rtol=tolerance)
    for a, b in ((network.get_weights(), piece.get_weights()), (whole.best_weights, second.best_weights)):
        assert len(a) == len(b) > 10
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(store, tmp_path, monkeypatch):
    network, make = start(store)
    state = State()
    saved = []

    def savez(stream, **arrays):
        if len(saved) == 3:
            stream.write(b"the beginning")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(None)
        original(stream, **arrays)

    original = np.savez
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OutputError, match=r"checkpoint.npz: cannot be written: No space left on device$"):
        go(tmp_path, network, make, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.npz", "training.csv"]
    assert load_checkpoint(tmp_path / "checkpoint.npz", network, TINY).step == 3


def test_the_log_names_its_file_when_the_disk_is_full(tmp_path):
    log = Log(tmp_path / "training.csv", 0)
    log._path = type(log._path)("/dev/full")
    if not log._path.exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(OutputError, match="/dev/full: cannot be written: No space left on device"):
        log.write(10, 1.0, None, 1e-3)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"PK", lambda data: b""])
def test_a_damaged_checkpoint(store, tmp_path, damage):
    network, _ = start(store)
    path = tmp_path / "checkpoint.npz"
    save_checkpoint(path, network, TINY, State())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=r"checkpoint.npz: no checkpoint that can be read \(.*\); remove it to"):
        load_checkpoint(path, network, TINY)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"width": 1}, {"depth": 2}, {"learning_rate": 1.0}, {"loss": "l1"}, {"l2": 0.0}])
def test_a_checkpoint_of_another_recipe(store, tmp_path, changes):
    network, _ = start(store)
    save_checkpoint(tmp_path / "checkpoint.npz", network, TINY, State(step=2))
    other = replace(TINY, **changes)
    with pytest.raises(ModelError, match=r"its checkpoint is of another recipe \(width=2, .*\); resume with the same"):
        load_checkpoint(tmp_path / "checkpoint.npz", network, other)
    assert load_checkpoint(tmp_path / "checkpoint.npz", network, replace(TINY, steps=99, epochs=1)).step == 2


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run(store, tmp_path):
    network, make = start(store)

    def spoilt(step):
        inputs, errors, weights = make(step)
        return (inputs, errors * np.nan, weights) if step == 2 else (inputs, errors, weights)

    with pytest.raises(ModelError, match="the loss is nan at step 3; lower --learning-rate, or look for a pair out"):
        go(tmp_path, network, spoilt, State())
    assert load_checkpoint(tmp_path / "checkpoint.npz", network, TINY).step == 2


@pytest.mark.slow
def test_the_note_tells_loss_validation_and_time_left(store, table, tmp_path):
    notes = []
    network, make = start(store)
    validation = Validation(read_pairs(table), TINY)
    go(tmp_path, network, make, State(), validation=validation, progress=lambda *told: notes.append(told))
    assert [told[:2] for told in notes] == [(step, 24) for step in range(1, 25)]
    number = r"\d+\.\d{3}"
    assert notes[6][2].startswith("loss ") and notes[6][2].endswith(" min left") and "validation" not in notes[6][2]
    assert re.fullmatch(rf"loss {number}, validation {number}, best {number} at step 8, \d+ min left", notes[7][2])


# Several devices

TWO_DEVICES = """
import sys
from dataclasses import replace
import numpy as np
from cryored.prior import device
from cryored.training.train import TrainOptions, train_files
from small_pairs import TINY
{prepare}
train_files([sys.argv[1]], sys.argv[2], TINY, TrainOptions(validation=sys.argv[3], gpu=False))
"""
ENGINES = {
    "tensorflow": """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
with device.scope(4):
    assert tf.distribute.get_strategy().num_replicas_in_sync == 2
""",
    "jax": """
import keras
with device.scope(4):
    assert keras.distribution.distribution().device_mesh.shape == (2,)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tensorflow", pytest.param("jax", marks=pytest.mark.slow)])
def test_two_devices_train_as_one(table, tmp_path, engine):
    """Each takes half of the batch; normalisation, gradients and loss are those of the whole."""
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    held_out = write_tables(tmp_path, "held_out.star", ["x"])
    environment = {
        **os.environ,
        "KERAS_BACKEND": engine,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
    }
    for name, flags in (("one", ""), ("two", "--xla_force_host_platform_device_count=2")):
        script = TWO_DEVICES.format(prepare=ENGINES[engine] if name == "two" else "")
        done = subprocess.run(
            [sys.executable, "-c", script, table, str(tmp_path / name), held_out],
            env=environment | {"XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_network(find_model(str(tmp_path / name))).get_weights() for name in ("one", "two"))
    assert len(one) == len(two) > 10
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    curves = [np.genfromtxt(tmp_path / name / "training.csv", delimiter=",", skip_header=1) for name in ("one", "two")]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)


def test_as_many_devices_as_divide_the_batch(caplog):
    names = [f"GPU:{number}" for number in range(4)]
    assert device._shares(names, 12) == names
    with caplog.at_level("WARNING", "cryored"):
        assert device._shares(names, 10) == names[:2]
    assert "a batch of 10 is no multiple of 4 devices: 2 are used; change --batch-size" in caplog.text
    assert device._shares(["CPU:0"], 7) == ["CPU:0"]
    assert device._shares([], 7) == []
