"""Training: batches, curves that do not depend on interruptions, and the model folder at the end."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from cryored import __version__
from cryored.cli import cli
from cryored.denoise import Denoiser
from cryored.errors import InputError, ModelError
from cryored.fourier import apply_shells
from cryored.models import check_weights, find_model, load_network
from cryored.mrc import read_volume, write_volume
from cryored.resample import fourier_resize
from cryored.simulate.pair_table import PairRow, read_pairs, write_pairs
from cryored.train import Judgement, PairStore, Recipe, draw_batch, learning_rate, summarise, train_files
from cryored.volume import Volume, soft_sphere

# Keras asks TensorFlow's variables for numpy arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

BOX, ANGPIX = 16, 3.0
TINY = Recipe(width=2, depth=1, patch=8, batch_size=3, steps=24, learning_rate=1e-2)


def write_tables(folder, name, structures, *, box=BOX, angpix=ANGPIX, share=0.5):
    """Write pairs whose target is `share` of a smooth map, beside noise that a network can tell from it."""
    rows = []
    for number, structure in enumerate(structures):
        rng = np.random.default_rng([number, *structure.encode()])
        smooth = fourier_resize(rng.standard_normal((6, 6, 6)), (box,) * 3) * soft_sphere((box,) * 3, box / 3, 3)
        for half in (1, 2):
            noisy = (smooth + 0.3 * rng.standard_normal((box,) * 3)).astype(np.float32)
            paths = [str(folder / f"{structure}_{number}_half{half}_{kind}.mrc") for kind in ("noisy", "target")]
            for path, data in zip(paths, (noisy, share * smooth), strict=True):
                write_volume(path, Volume(data.astype(np.float32), angpix), label="test")
            fsc = np.linspace(1, -0.1, box // 2 + 1)
            rows.append(PairRow(*paths, structure, half, 5.0 + number, fsc, "gaussian", 0))
    write_pairs(folder / name, rows, made_by="test")
    return str(folder / name)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return write_tables(folder, "train.star", ["a", "b", "c"]), write_tables(folder, "test.star", ["d", "e"])


def train(tables, folder, recipe=TINY, **options):
    return train_files([tables[0]], str(folder), recipe, gpu=False, **options)


@pytest.fixture(scope="module")
def uninterrupted(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "prior"
    train(tables, folder, validation=tables[1], checkpoint_every=10, command="cryored train train.star")
    return folder


def weights_of(folder):
    return [np.asarray(weight) for weight in load_network(find_model(str(folder))).get_weights()]


# Batches


def test_a_batch_depends_on_the_step_alone(tables):
    rows = read_pairs(tables[0])
    store = PairStore(rows, "regularised")
    draw_batch(store, TINY, 3)
    first, again = draw_batch(store, TINY, 7), draw_batch(PairStore(rows, "regularised"), TINY, 7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(first[0] != draw_batch(store, TINY, 8)[0])
    assert np.any(first[0] != draw_batch(store, replace(TINY, seed=1), 7)[0])
    inputs, errors, weights = first
    assert inputs.shape == errors.shape == (3, 8, 8, 8, 1)
    assert weights.shape == (3,)
    assert {array.dtype for array in first} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", ["regularised", "unregularised"])
def test_inputs_minus_errors_are_the_target(tables, kind):
    row = read_pairs(tables[0])[2]
    source, error, weight = PairStore([row], kind)[0]
    noisy, target = read_volume(row.noisy).data, read_volume(row.target).data
    wiener = apply_shells(noisy, np.clip(row.fsc, 0, 1))
    shown = wiener if kind == "regularised" else noisy
    # Both are standardised by one scale; level and deviation of the input. float16 keeps 11 bits.
    deviation = np.linalg.norm(shown - target) / np.linalg.norm(error.astype(np.float64))
    level = np.mean(shown - source.astype(np.float64) * deviation)
    found = source.astype(np.float64) * deviation + level
    np.testing.assert_allclose(found, shown, atol=1e-3 * np.abs(shown).max())
    np.testing.assert_allclose(error.astype(np.float64) * deviation, shown - target, atol=1e-3 * np.abs(shown).max())
    # A network that answers 0 for the Wiener map has loss 1, whatever the resolution.
    assert weight * np.mean(((wiener - target) / deviation) ** 2) == pytest.approx(1, rel=1e-2)


def test_the_loss_counts_molecules_of_any_size_alike(tables):
    """The random grey scale is in inputs and errors, and the weight takes it out again."""
    store = PairStore(read_pairs(tables[0])[:1], "regularised")
    inputs, errors, weights = draw_batch(store, replace(TINY, patch=BOX, batch_size=64), 0)
    scales = np.sqrt(store[0][2] / weights)
    assert 0.5 <= scales.min() < 0.6
    assert 1.4 < scales.max() <= 1.5
    losses = weights * np.mean(errors[..., 0] ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(losses, 1, rtol=1e-2)  # float16
    assert len({array.tobytes() for array in (inputs / scales[:, None, None, None, None]).round(2)}) > 20  # turned


def test_the_learning_rate_rises_and_falls():
    recipe = replace(TINY, steps=1000, learning_rate=2e-3)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-3 / 50)
    assert max(rates) == pytest.approx(2e-3, rel=0.01)
    assert np.all(np.diff(rates[:49]) > 0)
    assert np.all(np.diff(rates[50:]) < 0)
    assert rates[-1] < 1e-7


# A run


def test_the_loss_falls(tmp_path):
    """All of the map is error: the network has to hand on its input. It starts with the loss of the Wiener map."""
    table = write_tables(tmp_path, "nothing.star", ["a"], share=0.0)
    losses = []
    recipe = Recipe(width=4, depth=1, patch=BOX, batch_size=1, steps=100, learning_rate=5e-2)
    train([table], tmp_path / "prior", recipe, progress=lambda done, total, note: losses.append(float(note.split()[1])))
    assert len(losses) == 100
    assert losses[0] == pytest.approx(1, rel=0.01)  # pairs are kept as float16
    assert losses[-1] < losses[49] < 0.7  # means of 50 steps
    assert losses[-1] < 0.4


def test_an_untrained_network_changes_nothing(tables, tmp_path):
    model = train(tables, tmp_path / "prior", replace(TINY, steps=1, learning_rate=1e-12))
    volume = read_volume(read_pairs(tables[0])[0].noisy)
    np.testing.assert_allclose(Denoiser(model, gpu=False)(volume).data, volume.data, atol=1e-6)  # of values near 1


class Killed(Exception):
    pass


def killed_at(step):
    def progress(done, total, note):
        if done == step:
            raise Killed

    return progress


def test_a_killed_run_goes_on_to_the_same_weights(tables, tmp_path, uninterrupted):
    folder = tmp_path / "prior"
    with pytest.raises(Killed):
        train(tables, folder, checkpoint_every=8, progress=killed_at(22))
    assert not (folder / "card.json").exists()
    assert json.loads((folder / "training.json").read_text())["step"] == 16
    steps = []
    train(tables, folder, resume=True, checkpoint_every=8, progress=lambda done, *_: steps.append(done))
    assert steps == list(range(17, 25))
    found, expected = weights_of(folder), weights_of(uninterrupted)
    assert len(found) == len(expected) > 10
    for a, b in zip(found, expected, strict=True):
        # The same sums, but threads may split them otherwise: rounding that 24 steps of Adam carry on.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    # 10 and 20; step 20 was written before the kill, too, and the mean of the last 50 losses goes on.
    curves = [np.genfromtxt(path / "training.csv", delimiter=",", skip_header=1) for path in (folder, uninterrupted)]
    assert curves[0][:, 0].tolist() == [10, 20]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)


def test_a_checkpoint_of_another_recipe_is_refused(tables, tmp_path):
    with pytest.raises(Killed):
        train(tables, tmp_path, checkpoint_every=2, progress=killed_at(3))
    with pytest.raises(ModelError, match=r"its checkpoint is of another recipe \(.*width=2.*\); resume with the same"):
        train(tables, tmp_path, replace(TINY, width=1), resume=True)
    steps = []  # their number alone may be another
    train(tables, tmp_path, replace(TINY, steps=4), resume=True, progress=lambda done, *_: steps.append(done))
    assert steps == [3, 4]


def test_resuming_without_a_checkpoint_begins_anew(tables, tmp_path):
    steps = []
    train(tables, tmp_path / "p", replace(TINY, steps=2), resume=True, progress=lambda done, *_: steps.append(done))
    assert steps == [1, 2]


def test_a_finished_model_is_neither_replaced_nor_resumed_unasked(tables, uninterrupted):
    before = (uninterrupted / "model.keras").read_bytes()
    for resume in (False, True):
        with pytest.raises(InputError, match="prior: holds a finished model already; add --overwrite to replace it"):
            train(tables, uninterrupted, resume=resume)
    assert (uninterrupted / "model.keras").read_bytes() == before


# The model folder


def test_what_is_left_in_the_folder(uninterrupted):
    assert sorted(path.name for path in uninterrupted.iterdir()) == ["card.json", "model.keras", "training.csv"]
    lines = (uninterrupted / "training.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate"
    assert len(lines) == 3  # steps 10 and 20
    assert all(len(line.split(",")) == 3 for line in lines)


def test_the_card(uninterrupted, tables):
    model = find_model(str(uninterrupted))
    check_weights(model)
    card = model.card
    assert (card.name, card.input, card.pixel_size, card.width, card.depth) == ("prior", "regularised", ANGPIX, 2, 1)
    assert card.resolution_range == (5.0, 7.0)
    training = card.training
    assert training["command"] == "cryored train train.star"
    assert training["cryored"] == __version__
    assert training["parameters"] == load_network(model).count_params() > 0
    assert (training["pairs"], training["structures"], training["methods"]) == (6, 3, ["gaussian"])
    for name in ("patch", "batch_size", "steps", "learning_rate", "seed"):
        assert training[name] == getattr(TINY, name)
    assert training["device"].startswith(("CPU", "torch", "jax"))
    assert card.evaluation["structures"] == ["d", "e"]
    (row_a, row_b) = card.evaluation["simulated_pairs"]
    assert (row_a["resolution"], row_a["maps"]) == ("4.5-6 A", 2)
    assert (row_b["resolution"], row_b["maps"]) == ("6-8 A", 2)
    assert row_a["median_error_to_wiener"] <= row_a["worst_error_to_wiener"]


def test_the_table_of_judgements():
    rows = [
        Judgement("a", 3.9, 0.8, 4.0, 3.2),
        Judgement("b", 4.4, 0.9, 4.4, 4.0),
        Judgement("c", 4.5, 1.1, 5.0, 5.0),
        Judgement("d", np.inf, 0.5, 20.0, 10.0),
    ]
    table = summarise(rows[:3])
    assert [row["resolution"] for row in table] == ["0-4.5 A", "4.5-6 A"]
    assert table[0] == {
        "resolution": "0-4.5 A",
        "maps": 2,
        "median_error_to_wiener": 0.85,
        "worst_error_to_wiener": 0.9,
        "median_crossing_gain_percent": 17.5,
    }


# What does not fit


def test_validation_structures_are_not_trained_on(tables, tmp_path):
    mixed = write_tables(tmp_path, "mixed.star", ["z", "b"])
    with pytest.raises(InputError, match="mixed.star: b is a training structure too; validate on others"):
        train(tables, tmp_path / "prior", validation=mixed)
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 9}, r"patch 9, expected a multiple of 2 \(2\*\*depth\) up to the box of 16; change --patch or"),
        ({"patch": 12, "depth": 3}, "patch 12, expected a multiple of 8"),
        ({"patch": 32}, "patch 32, expected a multiple of 2 .* up to the box of 16"),
    ],
)
def test_patches_that_do_not_fit(tables, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(tables, tmp_path / "prior", replace(TINY, **changes))
    assert not (tmp_path / "prior").exists()


def test_tables_of_other_pixel_sizes_or_smaller_boxes(tables, tmp_path):
    coarse = write_tables(tmp_path, "coarse.star", ["x", "y"], angpix=4.0)
    with pytest.raises(InputError, match="noisy.mrc: pixel size 4 A, expected 3 A as in .*; train on pairs of one"):
        train_files([tables[0], coarse], str(tmp_path / "a"), replace(TINY, batch_size=16), gpu=False)
    small = write_tables(tmp_path, "small.star", ["v", "w"], box=10)
    with pytest.raises(InputError, match="noisy.mrc: a box of 10, below --patch 16"):
        train_files([tables[0], small], str(tmp_path / "b"), replace(TINY, patch=16, batch_size=16), gpu=False)


def test_a_pair_of_different_shapes(tables, tmp_path):
    row = read_pairs(tables[0])[0]
    write_volume(tmp_path / "target.mrc", Volume(np.zeros((8, 8, 8), dtype=np.float32), ANGPIX), label="test")
    store = PairStore([replace(row, target=str(tmp_path / "target.mrc"))], "regularised")
    with pytest.raises(InputError, match=r"target.mrc: \(8, 8, 8\) voxels of 3.0 A, expected those of .*noisy.mrc"):
        store[0]
    with pytest.raises(InputError, match="no pairs to train on"):
        PairStore([], "regularised")


def test_a_gpu_that_is_not_there(tables, tmp_path):
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="no GPU is visible to TensorFlow, and --gpu insists on one; .* leave"):
        train_files([tables[0]], str(tmp_path / "prior"), TINY, gpu=True)


# Command


def test_the_example_of_the_help_runs(tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    write_tables(tmp_path / "pairs", "pairs.star", ["a"])
    write_volume("map.mrc", read_volume(read_pairs(tables[0])[0].noisy), label="test")
    runner = CliRunner()
    text = runner.invoke(cli, ["train", "--help"]).stdout
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.strip().startswith("cryored ")]
    assert [words[0] for words in commands] == ["train", "denoise"]
    small = ["--steps", "2", "--width", "1", "--depth", "1", "--patch", "8", "--cpu", "--validation", tables[1]]
    monkeypatch.setattr(sys, "argv", ["cryored", *commands[0]])
    done = runner.invoke(cli, [*commands[0], *small])
    assert done.exit_code == 0, done.output
    assert done.stdout == "my_prior\n"
    assert "steps: 2 of 2 loss " in done.stderr
    rows = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [row["maps"] for row in rows] == [2, 2]
    assert find_model("./my_prior").card.training["command"] == "cryored " + shlex.join(commands[0])
    done = runner.invoke(cli, [*commands[1], "--cpu"])
    assert done.exit_code == 0, done.output
    assert read_volume("denoised.mrc").shape == (BOX, BOX, BOX)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_another_engine(tables, tmp_path):
    """PyTorch trains a network that TensorFlow runs to the same map."""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    noisy = read_pairs(tables[0])[0].noisy
    small = "--steps 12 --width 2 --depth 1 --patch 8 --cpu --threads 1 -q"
    for line in (f"train {tables[0]} -o prior {small}", f"denoise {noisy} -o torch.mrc --model ./prior --threads 1 -q"):
        command = [sys.executable, "-m", "cryored", *shlex.split(line)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    model = find_model(str(tmp_path / "prior"))
    assert model.card.training["device"].startswith("torch")
    expected, found = Denoiser(model, gpu=False)(read_volume(noisy)).data, read_volume(tmp_path / "torch.mrc").data
    assert np.linalg.norm(expected - read_volume(noisy).data) > 0  # it has learnt something
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # float32 sums in another order
