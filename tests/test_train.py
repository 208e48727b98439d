"""Training: the tool from tables to the model folder, interruptions, and the command."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from small_pairs import ANGPIX, BOX, TINY, write_tables

from cryored import __version__
from cryored.cli import cli
from cryored.errors import CryoredError, InputError, ModelError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.volume import Volume
from cryored.prior import device
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import check_weights, find_model, load_network
from cryored.simulation.pair_table import read_pairs, write_pairs
from cryored.training.loop import Recipe, Validation
from cryored.training.train import TrainOptions, read_truths, train_files

# Keras asks TensorFlow's variables for numpy arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return write_tables(folder, "train.star", ["a", "b", "c"]), write_tables(folder, "test.star", ["d", "e"])


def train(tables, folder, recipe=TINY, **options):
    progress = {"progress": options.pop("progress")} if "progress" in options else {}
    return train_files([tables[0]], str(folder), recipe, TrainOptions(gpu=False, **options), **progress)


@pytest.fixture(scope="module")
def uninterrupted(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "prior"
    train(tables, folder, validation=tables[1], command="cryored train train.star")
    return folder


def weights_of(folder):
    return [np.asarray(weight) for weight in load_network(find_model(str(folder))).get_weights()]


# A run


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    """All of the map is error: the network has to hand on its input. It starts with the loss of the Wiener map."""
    table = write_tables(tmp_path, "nothing.star", ["a"], share=0.0)
    losses = []
    recipe = Recipe(width=4, depth=1, patch=BOX, batch_size=1, steps=100, learning_rate=5e-2, schedule="cosine")

    def note_loss(done, total, note):
        losses.append(float(note.split()[1].rstrip(",")))

    train([table], tmp_path / "prior", recipe, progress=note_loss)
    assert len(losses) == 100
    assert losses[0] == pytest.approx(1, rel=0.01)  # pairs are kept as float16
    assert losses[-1] < losses[49] < 0.7  # means of 50 steps
    assert losses[-1] < 0.4


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tables, tmp_path, uninterrupted):
    folder = tmp_path / "prior"
    with pytest.raises(Killed):
        train(tables, folder, validation=tables[1], checkpoint_every=0, progress=killed_at(17))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.npz", "training.csv"]
    steps = []
    train(tables, folder, validation=tables[1], resume=True, progress=lambda done, *_: steps.append(done))
    assert steps == list(range(17, 25))
    found, expected = weights_of(folder), weights_of(uninterrupted)
    assert len(found) == len(expected) > 10
    for a, b in zip(found, expected, strict=True):
        # The same sums, but threads may split them otherwise: rounding that 24 steps of Adam carry on.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert curve_of(folder)["step"] == [8, 10, 16, 20, 24]
    for name, values in curve_of(uninterrupted).items():
        np.testing.assert_allclose(curve_of(folder)[name], values, rtol=1e-3)


def curve_of(folder):
    with (folder / "training.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name] or -1) for row in rows] for name in rows[0]}


@pytest.mark.slow
def test_the_best_of_other_validation_pairs_does_not_count(tables, tmp_path):
    with pytest.raises(Killed):
        train(tables, tmp_path, validation=tables[1], checkpoint_every=0, progress=killed_at(20))
    other = write_tables(tmp_path, "other.star", ["f"])
    model = train(tables, tmp_path, validation=other, resume=True)
    assert model.card.training["kept_step"] == 24


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe_is_refused(tables, tmp_path):
    with pytest.raises(Killed):
        train(tables, tmp_path, checkpoint_every=0, progress=killed_at(3))
    with pytest.raises(ModelError, match=r"its checkpoint is of another recipe \(.*width=2.*\); resume with the same"):
        train(tables, tmp_path, replace(TINY, width=1), resume=True)
    steps = []  # their number alone may be another
    train(tables, tmp_path, replace(TINY, steps=4), resume=True, progress=lambda done, *_: steps.append(done))
    assert steps == [3, 4]


@pytest.mark.slow
def test_resuming_without_a_checkpoint_begins_anew(tables, tmp_path, caplog):
    steps = []
    train(tables, tmp_path / "p", replace(TINY, steps=2), resume=True, progress=lambda done, *_: steps.append(done))
    assert steps == [1, 2]
    assert "p: no checkpoint to go on from; the training begins anew" in caplog.text


@pytest.mark.slow
def test_a_run_that_is_replaced_is_not_gone_on_with(tables, tmp_path):
    """Killed before its first checkpoint, the second run leaves none of the first."""
    for options in ({"checkpoint_every": 0}, {"checkpoint_every": 1e9, "overwrite": True}):
        with pytest.raises(Killed):
            train(tables, tmp_path / "p", progress=killed_at(3), **options)
    assert not (tmp_path / "p" / "checkpoint.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_other_pairs_are_told_of(tables, tmp_path, caplog, same):
    with pytest.raises(Killed):
        train(tables, tmp_path / "p", checkpoint_every=0, progress=killed_at(3))
    others = (tables[0] if same else tables[1],)
    train(others, tmp_path / "p", replace(TINY, steps=4), resume=True)
    assert ("goes on with other pairs than it began with" in caplog.text) is not same


def test_a_finished_model_is_neither_replaced_nor_resumed_unasked(tables, uninterrupted):
    before = (uninterrupted / "model.keras").read_bytes()
    for resume in (False, True):
        with pytest.raises(InputError, match="prior: holds a finished model already; add --overwrite to replace it"):
            train(tables, uninterrupted, resume=resume)
    assert (uninterrupted / "model.keras").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_is_not_thrown_away_unasked(tables, tmp_path):
    with pytest.raises(Killed):
        train(tables, tmp_path, checkpoint_every=0, progress=killed_at(3))
    before = (tmp_path / "checkpoint.npz").read_bytes()
    with pytest.raises(InputError, match="holds the checkpoint of a training that was killed; add --resume"):
        train(tables, tmp_path)
    assert (tmp_path / "checkpoint.npz").read_bytes() == before
    with pytest.raises(Killed):
        train(tables, tmp_path, overwrite=True, progress=killed_at(1))


# The model folder


def test_what_is_left_in_the_folder(uninterrupted):
    assert sorted(path.name for path in uninterrupted.iterdir()) == ["card.json", "model.keras", "training.csv"]
    lines = (uninterrupted / "training.csv").read_text().splitlines()
    assert lines[0] == "step,loss,validation,learning_rate"
    assert [line.split(",")[0] for line in lines[1:]] == ["8", "10", "16", "20", "24"]
    assert [line.split(",")[2] != "" for line in lines[1:]] == [True, False, True, False, True]


@pytest.mark.slow
def test_the_best_step_is_kept(tables, tmp_path):
    """A rate that spoils the network: what is kept is the best step of the curve, and not the last."""
    recipe = replace(TINY, steps=12, schedule="constant", learning_rate=0.3, validate_every=2)
    model = train(tables, tmp_path / "prior", recipe, validation=tables[1])
    curve = curve_of(tmp_path / "prior")
    values = {step: value for step, value in zip(curve["step"], curve["validation"], strict=True) if value > 0}
    best = min(values, key=values.get)
    assert best < 12
    assert model.card.training["kept_step"] == best
    assert model.card.training["validation_loss_to_wiener"] == pytest.approx(values[best], abs=1e-4)
    again = Validation(read_pairs(tables[1]), recipe)(load_network(model))
    assert again == pytest.approx(values[best], rel=1e-3)


@pytest.mark.slow
def test_the_model_is_plain_whatever_trained_it(tables, tmp_path):
    """Neither penalty nor bfloat16 stay in the file."""
    recipe = replace(TINY, steps=2, mixed_precision=True, l2=0.1)
    network = load_network(train(tables, tmp_path / "prior", recipe))
    assert network.losses == []
    assert {layer.compute_dtype for layer in network.layers} == {"float32"}


def test_the_card(uninterrupted, tables):
    model = find_model(str(uninterrupted))
    check_weights(model)
    card = model.card
    assert (card.name, card.input, card.pixel_size, card.width, card.depth) == ("prior", "regularised", ANGPIX, 2, 1)
    assert card.resolution_range == (5.0, 7.0)
    training = card.training
    assert training["command"] == "cryored train train.star"
    assert training["cryored"] == __version__
    assert training["kept_step"] in (8, 16, 24)
    assert training["pairs_left_out"] == 0
    assert training["parameters"] == load_network(model).count_params() > 0
    assert (training["pairs"], training["structures"], training["methods"]) == (6, 3, ["gaussian"])
    for name in ("patch", "batch_size", "steps", "learning_rate", "schedule", "loss", "l2", "synthesise", "seed"):
        assert training[name] == getattr(TINY, name)
    assert training["device"].startswith(("CPU", "torch", "jax"))
    assert card.evaluation["structures"] == ["d", "e"]
    assert [row["maps"] for row in card.evaluation["simulated_pairs"]] == [2, 2, 4]


@pytest.mark.slow
def test_the_curves_are_drawn(tables, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curves.png"
    train(tables, tmp_path / "prior", replace(TINY, steps=8), validation=tables[1], plot=str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CryoredError, match="curves.png: exists already; add --overwrite to replace it"):
        train(tables, tmp_path / "other", TINY, plot=str(plot))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_tensorboard_gets_the_curves(tables, tmp_path):
    import tensorflow as tf
    from tensorflow.core.util import event_pb2

    train(tables, tmp_path, replace(TINY, steps=10), validation=tables[1], tensorboard=True)
    (path,) = (tmp_path / "logs").iterdir()
    events = [event_pb2.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(path))]
    found = {(value.tag, event.step): value for event in events for value in event.summary.value}
    expected = {(name, step) for name in ("loss", "validation", "learning_rate") for step in (8, 10)}
    assert set(found) == expected
    loss = found["loss", 10]
    number = float(tf.make_ndarray(loss.tensor)) if loss.HasField("tensor") else loss.simple_value
    assert number == pytest.approx(curve_of(tmp_path)["loss"][-1], abs=1e-5)


def test_tensorboard_without_anything_that_writes_for_it(tmp_path, monkeypatch):
    for name in ("tensorboardX", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match="--tensorboard needs tensorboardX or TensorFlow: pip install 'cryored"):
        device.summary_writer(tmp_path)


@pytest.mark.slow
def test_pairs_are_made_of_the_truths(tables, tmp_path):
    rows = read_pairs(tables[0])
    truths = read_truths(rows)
    assert truths.shape == (3, BOX, BOX, BOX)  # one for both halves
    np.testing.assert_array_equal(truths[1], read_volume(rows[2].truth).data)
    model = train(tables, tmp_path / "prior", replace(TINY, steps=2, synthesise=0.5))
    assert model.card.training["synthesise"] == 0.5


# What does not fit


def test_validation_structures_are_not_trained_on(tables, tmp_path):
    mixed = write_tables(tmp_path, "mixed.star", ["z", "b"])
    with pytest.raises(InputError, match="mixed.star: b is a training structure too; validate on others"):
        train(tables, tmp_path / "prior", validation=mixed)
    assert not (tmp_path / "prior").exists()


def test_patches_that_do_not_fit(tables, tmp_path):
    with pytest.raises(InputError, match=r"patch 9, expected a multiple of 2 \(2\*\*depth\); change --patch or"):
        train(tables, tmp_path / "prior", replace(TINY, patch=9))
    with pytest.raises(InputError, match=r"noisy.mrc: a box of 16, below --patch 32 \(6 of 6 pairs cannot be used"):
        train(tables, tmp_path / "prior", replace(TINY, patch=32))
    assert not (tmp_path / "prior").exists()


@pytest.mark.slow
def test_bad_pairs_are_refused_or_left_out(tmp_path, caplog):
    table = write_tables(tmp_path, "train.star", ["a", "b"])
    rows = read_pairs(table)
    os.unlink(rows[1].noisy)
    write_volume(rows[2].target, Volume(np.zeros((8, 8, 8), dtype=np.float32), ANGPIX), label="test")
    with pytest.raises(InputError, match="train.star: 1 maps of the table are missing, the first is .*a_0_half2_noisy"):
        train([table], tmp_path / "prior")
    assert not (tmp_path / "prior").exists()
    with caplog.at_level(logging.WARNING, "cryored"):
        model = train([table], tmp_path / "prior", replace(TINY, steps=1), skip_bad=True)
    assert "2 of 4 pairs are left out, the first: " in caplog.text
    assert (model.card.training["pairs"], model.card.training["pairs_left_out"]) == (2, 2)


def test_tables_without_pairs_or_of_other_pixel_sizes(tables, tmp_path):
    write_pairs(tmp_path / "empty.star", [], made_by="test")
    empty = str(tmp_path / "empty.star")
    with pytest.raises(InputError, match="empty.star: no pairs to train on; make some with 'cryored simulate pairs'"):
        train([empty], tmp_path / "prior")
    with pytest.raises(InputError, match="empty.star: no pairs to validate on; make some, or leave --validation out"):
        train(tables, tmp_path / "prior", validation=empty)
    coarse = write_tables(tmp_path, "coarse.star", ["x", "y"], angpix=4.0)
    with pytest.raises(InputError, match="coarse.star: pixel size 4 A, expected 3 A as in .*train.star"):
        train(tables, tmp_path / "prior", validation=coarse)
    with pytest.raises(InputError, match="noisy.mrc: pixel size 4 A, expected 3 A as in .*; train on pairs of one"):
        train_files([tables[0], coarse], str(tmp_path / "prior"), TINY, TrainOptions(gpu=False))


def test_truths_that_are_not_there_or_do_not_fit(tables, tmp_path):
    rows = read_pairs(tables[0])
    with pytest.raises(InputError, match=r"the tables name no truth maps \(_cryoredTruthMap\), and --synthesise makes"):
        read_truths([replace(row, truth=None) for row in rows])
    write_volume(tmp_path / "small.mrc", Volume(np.ones((8, 8, 8), dtype=np.float32), ANGPIX), label="test")
    with pytest.raises(InputError, match=r"small.mrc: \(8, 8, 8\) voxels of 3 A, expected those of .*a_0_truth.mrc"):
        read_truths([rows[0], replace(rows[1], truth=str(tmp_path / "small.mrc"))])


@pytest.mark.slow
def test_a_full_disk_while_the_model_is_saved(tables, tmp_path):
    """The checkpoint stays, and training goes on from it to its end once there is room."""
    script = (
        "import resource\n"
        "from cryored.training import train\n"
        "from cryored.cli import main\n"
        "save = train.save_model\n"
        "def limited(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    return save(*arguments)\n"
        "train.save_model = limited\n"
        "main()\n"
    )
    options = "--steps 2 --width 2 --depth 1 --patch 8 --batch-size 2 --cpu -q"
    command = [sys.executable, "-c", script, *shlex.split(f"train {tables[0]} -o prior {options}")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == "cryored: error: prior/model.keras: cannot be written: File too large\n"
    left = {path.name for path in (tmp_path / "prior").iterdir()}
    assert left == {"checkpoint.npz", "training.csv"}
    steps = []
    recipe = Recipe(width=2, depth=1, patch=8, batch_size=2, steps=2)
    model = train(tables, tmp_path / "prior", recipe, resume=True, progress=lambda done, *_: steps.append(done))
    assert steps == []
    check_weights(model)


def test_a_gpu_that_is_not_there(tables, tmp_path):
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="no GPU is visible to TensorFlow, and --gpu insists on one; .* leave"):
        train_files([tables[0]], str(tmp_path / "prior"), TINY, TrainOptions(gpu=True))


# Command


@pytest.mark.slow
def test_the_example_of_the_help_runs(tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, structure in (("pairs", "a"), ("held_out", "d")):
        (tmp_path / folder).mkdir()
        write_tables(tmp_path / folder, "pairs.star", [structure])
    write_volume("map.mrc", read_volume(read_pairs(tables[0])[0].noisy), label="test")
    runner = CliRunner()
    text = runner.invoke(cli, ["train", "--help"]).stdout
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.strip().startswith("cryored ")]
    assert [words[0] for words in commands] == ["train", "denoise", "train"]
    small = ["--steps", "2", "--width", "1", "--depth", "1", "--patch", "8", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["cryored", *commands[0]])
    done = runner.invoke(cli, [*commands[0], *small])
    assert done.exit_code == 0, done.output
    assert done.stdout == "my_prior\n"
    assert "steps: 2 of 2 loss " in done.stderr
    assert "validation " in done.stderr
    rows = [line.split("\t") for line in done.stderr.splitlines() if "\t" in line]
    assert rows[0][:2] == ["resolution", "maps"]  # the table of --evaluate
    assert [row[1] for row in rows[1:]] == ["2", "2"]
    assert find_model("./my_prior").card.training["command"] == "cryored " + shlex.join(commands[0])
    done = runner.invoke(cli, [*commands[1], "--cpu"])
    assert done.exit_code == 0, done.output
    assert read_volume("denoised.mrc").shape == (BOX, BOX, BOX)
    done = runner.invoke(cli, [*commands[2], "--cpu"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("resolution\t")


def test_epochs_or_steps():
    done = CliRunner().invoke(cli, ["train", "x.star", "-o", "prior", "--epochs", "1", "--steps", "1"])
    assert done.exit_code == 2
    assert "--epochs and --steps exclude each other" in done.stderr


@pytest.mark.parametrize("engine", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_another_engine(tables, tmp_path, engine):
    """Another engine trains a network that TensorFlow runs to the same map."""
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": engine}
    noisy = read_pairs(tables[0])[0].noisy
    small = "--steps 12 --width 2 --depth 1 --patch 8 --batch-size 4 --learning-rate 1e-2 --cpu --threads 1 -q"
    small += f" --synthesise 0.25 --validation {tables[1]}"
    for line in (f"train {tables[0]} -o prior {small}", f"denoise {noisy} -o found.mrc --model ./prior --threads 1 -q"):
        command = [sys.executable, "-m", "cryored", *shlex.split(line)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert [text for text in done.stderr.splitlines() if "\t" not in text] == []  # nothing but the table
    model = find_model(str(tmp_path / "prior"))
    assert model.card.training["device"].startswith(engine)
    expected, found = Denoiser(model, gpu=False)(read_volume(noisy)).data, read_volume(tmp_path / "found.mrc").data
    assert np.linalg.norm(expected - read_volume(noisy).data) > 0  # it has learnt something
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # float32 sums in another order


@pytest.mark.slow
def test_a_start_from_another_model(tables, tmp_path, uninterrupted):
    """With steps too small to change a weight, the result is the start; the card names it."""
    recipe = replace(TINY, steps=1, learning_rate=1e-12, l2=0.0)
    model = train(tables, tmp_path / "prior", recipe, start=str(uninterrupted))
    kernels = [weight for weight in weights_of(uninterrupted) if weight.ndim == 5]
    found = [weight for weight in weights_of(tmp_path / "prior") if weight.ndim == 5]
    for one, other in zip(found, kernels, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    assert model.card.training["start"].startswith("prior ")
    with pytest.raises(ModelError, match="width 2, depth 1, for .*, expected width 3, depth 1, .*another"):
        train(tables, tmp_path / "wider", replace(TINY, width=3), start=str(uninterrupted))
