"""Networks that are told the FSC and tell their uncertainty: tiny ones of random weights."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError, ModelError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells, low_pass
from cryored.maps.fsc import shell_correlation
from cryored.maps.network_scale import solvent_level
from cryored.maps.resample import interpolate, plan_axis
from cryored.maps.volume import Volume, soft_sphere
from cryored.prior.denoiser import Denoiser, predict_tiled
from cryored.prior.kept_signal import raise_sigma
from cryored.prior.models import ModelCard, check_uncertainty, find_model, load_network, save_model, write_card
from cryored.prior.network import build_unet, condition
from cryored.refinement.updater import known_fsc

pytestmark = pytest.mark.filterwarnings(
    # Keras asks TensorFlow's variables for numpy arrays in the way of numpy 1.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

ANGPIX = 1.5
BOX = 24
KINDS = {
    "plain": {},
    "told": {"knots": 4},
    "sure": {"uncertainty": True},
    "both": {"knots": 4, "uncertainty": True, "target": "truth"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "tensorflow"))
        for name, facts in KINDS.items():
            card = ModelCard(name, "regularised", ANGPIX, 2, 2, "", (3.0, 18.0), **facts)
            network = build_unet(2, 2, knots=card.knots, uncertainty=card.uncertainty)
            network.set_weights(random_weights(network.get_weights(), np.random.default_rng(0)))
            save_model(folder / name, network, card)
        yield folder


def random_weights(weights, rng):
    """Return kernels that neither raise nor lower a signal much, also where they begin at 0; the rest as it was."""
    return [w if w.ndim == 1 else rng.standard_normal(w.shape) * np.sqrt(1.5 / np.prod(w.shape[:-1])) for w in weights]


@pytest.fixture
def model(models):
    return lambda name: find_model(str(models / name))


def denoiser(model, **options):
    return Denoiser(model, gpu=False, threads=2, **options)


def molecule(box=BOX, voxel_size=ANGPIX, seed=0):
    """Noise up to 5 A in a sphere, zero at the faces."""
    data = low_pass(np.random.default_rng(seed).standard_normal((box,) * 3), voxel_size, 5.0)
    data *= soft_sphere((box,) * 3, box / 2 - 7, 5)
    return Volume(data.astype(np.float32), voxel_size)


def falling(box=BOX, end=0.5):
    return np.clip(1 - np.arange(box // 2 + 1) / (end * box), 0.0, 1.0)


def difference(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# The FSC


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "sure"])
def test_a_model_without_knots_takes_no_notice_of_the_fsc(model, name):
    found = denoiser(model(name))
    np.testing.assert_array_equal(found(molecule(), falling()).data, found(molecule()).data)
    found(molecule(), falling()[:3])  # of whatever length


@pytest.mark.slow
def test_a_plain_network_is_called_as_ever(model):
    """The map alone in, one channel out; the result is the map without it."""
    found = denoiser(model("plain"))
    found.load()
    seen = []
    predict = found._network.predict_on_batch
    found._network.predict_on_batch = lambda x: seen.append(x) or predict(x)
    found(molecule())
    (data,) = seen
    assert data.shape == (1, BOX, BOX, BOX, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["told", "both"])
def test_the_fsc_reaches_the_network(model, name):
    found = denoiser(model(name))
    results = [found(molecule(), fsc).data for fsc in (None, falling(), falling(end=0.2))]
    for i in range(3):
        assert difference(results[i], results[i - 1]) > 1e-4
    np.testing.assert_array_equal(found(molecule(), falling()).data, results[1])


def test_the_network_is_told_the_fsc_at_the_frequencies_of_its_own_pixel_size(model):
    """Of half the voxel size in twice the box the shells are the same, and there are twice as many."""
    found = denoiser(model("told"))
    for fsc, voxel_size, box in ((falling(), 1.5, 24), (falling(48, 0.25), 0.75, 48)):
        told = found._told(Volume(np.zeros((box, 20, 22), np.float32), voxel_size), fsc)
        np.testing.assert_allclose(told, condition(falling(), np.arange(13) / 36, 1.5, 4), atol=1e-6)
    np.testing.assert_array_equal(found._told(molecule(), None), 0)
    assert denoiser(model("plain"))._told(molecule(), falling()) is None


@pytest.mark.slow
def test_each_map_has_its_own_fsc_in_all_tiles_and_rotations(model):
    options = {"tile": 56, "rotations": 2}
    maps = [Volume(molecule(52, seed=seed).data[:, 10:42, 10:42], ANGPIX) for seed in (1, 2)] + [molecule(20, seed=3)]
    fscs = [falling(52), None, falling(20, 0.3)]
    together = denoiser(model("both"), **options).denoise_all(maps, fscs)
    for volume, fsc, result in zip(maps, fscs, together, strict=True):
        np.testing.assert_allclose(result.data, denoiser(model("both"), **options)(volume, fsc).data, atol=1e-5)


def test_an_fsc_of_another_box(model):
    with pytest.raises(InputError, match="an FSC of 13 shells, expected 21 for a box of 40"):
        denoiser(model("told"))(Volume(np.zeros((24, 40, 20), np.float32), ANGPIX), falling())


def test_the_fsc_of_a_request():
    @dataclasses.dataclass
    class Asked:
        root: str
        fsc: np.ndarray
        estimated: bool = False

    fsc = np.array([1.0, 0.5, -0.1])
    np.testing.assert_array_equal(known_fsc(Asked("run/run_it003_half1_class001", fsc)), fsc)
    joined = known_fsc(Asked("run/run_it009_class001", fsc))
    np.testing.assert_allclose(joined, [1, 2 / 3, 0])
    assert known_fsc(Asked("run/run_it001_half1_class001", 0 * fsc)) is None


# Sigma


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sure", "both"])
@pytest.mark.parametrize(("box", "voxel_size"), [(24, 1.5), (25, 1.5), (36, 1.0), (20, 2.1)])
def test_sigma_is_positive_and_on_the_grid_of_the_map(model, name, box, voxel_size):
    found = denoiser(model(name))
    fsc = falling(box)
    volume = dataclasses.replace(molecule(box, voxel_size), origin=(1.0, 2.0, 3.0), nstart=(4, 5, 6))
    result, sigma = found.with_uncertainty(volume, fsc)
    np.testing.assert_array_equal(result.data, found(volume, fsc).data)
    assert dataclasses.replace(sigma, data=volume.data) == volume
    assert sigma.data.shape == volume.shape
    assert sigma.data.dtype == np.float32
    assert sigma.data.min() > 0
    assert sigma.data.std() > 0.01 * sigma.data.mean()


@pytest.mark.slow
def test_sigma_has_the_maps_units(model):
    found = denoiser(model("both"))
    volume = molecule()
    plain = found.with_uncertainty(volume, falling())[1].data
    for a, b in ((3.0, 0.0), (1e-3, 0.2), (-50.0, 7.0)):
        scaled = found.with_uncertainty(volume.with_data(np.float32(a) * volume.data + np.float32(b)), falling())[1]
        if a > 0:
            np.testing.assert_allclose(scaled.data, a * plain, rtol=2e-3)  # rounding about the offset
        assert scaled.data.min() > 0


@pytest.mark.slow
def test_sigma_is_the_networks_own(model):
    """On the model's grid it is exp of half the second channel, times the standard deviation of the map."""
    found = denoiser(model("sure"))
    volume = molecule()
    sigma = found.with_uncertainty(volume)[1].data
    seen = found._see(volume, None)
    log_variance = found._network.predict_on_batch(seen.data[None, ..., None])[0, ..., 1]
    assert np.abs(log_variance).max() < 6  # where the logarithm would be cut
    np.testing.assert_allclose(sigma, seen.deviation * np.exp(0.5 * np.asarray(log_variance)), rtol=1e-5)


@pytest.mark.parametrize("name", ["sure", "both"])
def test_sigma_rises_where_little_of_the_signal_told_is_kept(model, monkeypatch, name):
    """A network that takes four fifths of the map away; of one trained towards truth times FSC nothing can be said."""

    def predict(self, data, told=None):
        return np.stack([0.8 * data, np.full_like(data, 0.04)], axis=1).reshape(-1, *data.shape[1:])

    monkeypatch.setattr(Denoiser, "_predict", predict)
    found, volume, fsc = denoiser(model(name)), molecule(), np.full(BOX // 2 + 1, 0.5)
    result, sigma = found.with_uncertainty(volume, fsc)
    plain = found.with_uncertainty(volume)[1].data
    np.testing.assert_allclose(plain, 0.2 * found._see(volume, fsc).deviation, rtol=1e-5)
    expected = plain if name == "sure" else raise_sigma(plain, volume, result, fsc)
    np.testing.assert_allclose(sigma.data, expected, rtol=1e-5)
    assert (expected.mean() > 1.1 * plain.mean()) == (name == "both")


@pytest.mark.slow
def test_one_pass_and_tiles(model):
    volume = Volume(np.concatenate([molecule(48, seed=i).data for i in range(2)]), ANGPIX)
    whole, tiled = (denoiser(model("both"), tile=tile).with_uncertainty(volume) for tile in (128, 56))
    for one, other in zip(whole, tiled, strict=True):
        assert difference(other.data, one.data) < 0.02


@pytest.mark.slow
def test_variances_are_blended_and_not_their_logarithms(model):
    volume = molecule()
    first, both = (denoiser(model("sure"), rotations=n).with_uncertainty(volume)[1].data for n in (1, 2))
    rotated = 2 * both**2 - first**2  # the second rotation's variance
    assert rotated.min() > 0
    assert difference(rotated, first**2) > 1e-3


def test_tiles_of_a_network_with_more_maps_out_than_in():
    data = np.random.default_rng(0).standard_normal((2, 70, 20, 90)).astype(np.float32)
    result = predict_tiled(lambda x: np.stack([x, 2 * x], axis=1).reshape(-1, *x.shape[1:]), data, tile=64, multiple=4)
    np.testing.assert_allclose(result, np.stack([data[0], 2 * data[0], data[1], 2 * data[1]]), atol=1e-5)


def test_a_map_without_contrast_has_no_sigma(model):
    flat = Volume(np.ones((12, 12, 12), np.float32), ANGPIX)
    result, sigma = denoiser(model("both")).with_uncertainty(flat)
    assert result is flat
    np.testing.assert_array_equal(sigma.data, 0)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize("voxel_size", [0.8, 1.2, 2.0])
def test_interpolation_keeps_the_place(box, voxel_size):
    """A ramp in angstrom from the centre is the same ramp on the other grid."""
    grid = plan_axis(box, voxel_size, ANGPIX)
    pixel = grid.padded * voxel_size / grid.resampled
    ramp = (np.arange(grid.resampled, dtype=np.float32) - grid.resampled // 2) * np.float32(pixel)
    data = np.broadcast_to(ramp, (grid.resampled,) * 3)
    found = interpolate(data, (grid, grid, grid))
    expected = (np.arange(box) - box // 2) * voxel_size
    np.testing.assert_allclose(found[box // 2, box // 2], expected.clip(ramp[0], ramp[-1]), atol=1e-4)


# What does not fit


def test_a_model_that_tells_none_is_refused(model):
    with pytest.raises(ModelError, match="told: the model tells no uncertainty, expected one with uncertainty true"):
        denoiser(model("told")).with_uncertainty(molecule())
    check_uncertainty(model("both"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "plain",
            {"knots": 4},
            r"channels \[1\] in and \[1\] out, .*knots 4, uncertainty false.* has \[1, 5\] and \[1\]",
        ),
        ("plain", {"uncertainty": True}, r"channels \[1\] in and \[1\] out, .*uncertainty true.* has \[1\] and \[2\]"),
        ("both", {"knots": 6}, r"channels \[1, 5\] in and \[2\] out, .*knots 6.* has \[1, 7\] and \[2\]"),
        ("both", {"knots": 0}, r"channels \[1, 5\] in and \[2\] out, .* has \[1\] and \[2\]; install the model again"),
    ],
)
def test_a_network_that_does_not_fit_its_card(model, name, changes, message):
    found = model(name)
    with pytest.raises(ModelError, match=f"model.keras: a network with {message}") as caught:
        load_network(dataclasses.replace(found, card=dataclasses.replace(found.card, **changes)))
    assert "\n" not in str(caught.value)


def test_cards_of_before(model, tmp_path):
    """They say nothing of knots, uncertainty and target."""
    write_card(tmp_path, model("both").card)
    content = json.loads((tmp_path / "card.json").read_text())
    assert (content["knots"], content["uncertainty"], content["target"]) == (4, True, "truth")
    old = {key: value for key, value in content.items() if key not in ("knots", "uncertainty", "target")}
    (tmp_path / "card.json").write_text(json.dumps(old))
    card = find_model(str(tmp_path)).card
    assert (card.knots, card.uncertainty, card.target) == (0, False, "weighted")


# The command


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """The current folder, with two half-maps, a mask and a folder for results."""
    monkeypatch.chdir(tmp_path)
    truth = molecule().data
    for i in (1, 2):
        noise = 0.3 * np.random.default_rng(i).standard_normal(truth.shape)
        write_volume(f"half{i}.mrc", Volume((truth + noise).astype(np.float32), ANGPIX), label="test")
    write_volume("mask.mrc", Volume(soft_sphere(truth.shape, 6, 3), ANGPIX), label="test")
    Path("maps").mkdir()


@pytest.fixture
def run(halves, models):
    def run(*arguments, model="both", **options):
        arguments = ["denoise", *map(str, arguments), "--model", str(models / model), "--cpu", "--threads", "2"]
        return CliRunner().invoke(cli, arguments, **options)

    return run


@pytest.mark.slow
def test_the_command_writes_both_maps_and_the_script(run, model):
    outputs = ["-o", "maps/a b.mrc", "--uncertainty", "sigma.mrc", "--chimerax", "maps/show.cxc"]
    done = run("half1.mrc", "--half2", "half2.mrc", *outputs)
    assert done.exit_code == 0, done.stderr
    half1, half2 = (read_volume(f"half{i}.mrc") for i in (1, 2))
    fsc = shell_correlation(half1.data, half2.data)
    fsc[0] = 1  # that of the means says nothing
    result, sigma = read_volume("maps/a b.mrc"), read_volume("sigma.mrc")
    assert sigma.data.min() > 0
    assert b"denoise uncertainty both" in Path("sigma.mrc").read_bytes()[:1024]
    *opened, _, _, hidden, coloured, tiled, _ = Path("maps/show.cxc").read_text().splitlines()
    # As seen from the script.
    assert opened == ['open "../half1.mrc"', 'open "a b.mrc"', 'open "../sigma.mrc"']
    assert hidden == "volume #3 hide"
    assert tiled == "tile #1,2 columns 2"
    ends = re.fullmatch(r"color sample #2 map #3 palette blue:white:red range (\S+),(\S+) key true", coloured)
    low, high = map(float, ends.groups())
    assert 0 < low < high <= sigma.data.max()

    # The FSC weighted the map and told the network.
    assert run("half1.mrc", "--half2", "half2.mrc", "-o", "again.mrc").exit_code == 0
    np.testing.assert_array_equal(read_volume("again.mrc").data, result.data)
    assert run("half1.mrc", "-o", "filtered.mrc").exit_code == 0
    weighted = half1.with_data(apply_shells(half1.data, fsc.clip(0, 1)))
    found = denoiser(model("both"))
    np.testing.assert_allclose(result.data, found(weighted, fsc).data, atol=1e-5)
    assert difference(found(weighted).data, result.data) > 1e-4

    done = run("half1.mrc", "--half2", "half2.mrc", *outputs)
    assert done.exit_code == 1
    assert "exists already; add --overwrite" in done.stderr
    assert run("half1.mrc", "--half2", "half2.mrc", *outputs, "--overwrite").exit_code == 0


@pytest.mark.slow
def test_the_script_without_uncertainty_shows_the_difference(run):
    outputs = ["-o", "out.mrc", "--difference", "diff.mrc", "--chimerax", "show.cxc"]
    done = run("half1.mrc", "--half2", "half2.mrc", *outputs)
    assert done.exit_code == 0, done.stderr
    *opened, before, after, change, tiled, view = Path("show.cxc").read_text().splitlines()
    assert opened == ['open "half1.mrc"', 'open "out.mrc"', 'open "diff.mrc"']
    level = np.percentile(read_volume("out.mrc").data, 98)
    for line, model in ((before, 1), (after, 2)):
        assert line.startswith(f"volume #{model} style surface step 1 level ")
        assert float(line.split()[-1]) == pytest.approx(level, rel=1e-4)
    limits = re.fullmatch(r"volume #3 style surface step 1 level (\S+) color orange level (\S+) color \w+", change)
    taken, added = map(float, limits.groups())
    assert taken == -added < 0
    assert (tiled, view) == ("tile #1,2,3 columns 3", "view")
    # Of the average of both halves there is no file.
    done = run("--half1", "half1.mrc", "--half2", "half2.mrc", "-o", "b.mrc", "--chimerax", "b.cxc")
    assert done.exit_code == 0, done.stderr
    assert Path("b.cxc").read_text().splitlines()[0] == 'open "b.mrc"'
    assert "tile" not in Path("b.cxc").read_text()


@pytest.mark.slow
def test_a_table_tells_what_the_other_half_does(run):
    Path("fsc.tsv").write_text(CliRunner().invoke(cli, ["fsc", "half1.mrc", "half2.mrc"]).stdout)
    for option, name in ((["--half2", "half2.mrc"], "half"), (["--fsc", "fsc.tsv"], "table")):
        done = run("half1.mrc", *option, "-o", f"{name}.mrc", "--uncertainty", f"{name}_sigma.mrc")
        assert done.exit_code == 0, done.stderr
    for ending in (".mrc", "_sigma.mrc"):
        assert difference(read_volume(f"table{ending}").data, read_volume(f"half{ending}").data) < 1e-4


@pytest.mark.slow
def test_the_mask_multiplies_both(run):
    for name, option in (("whole", []), ("masked", ["--mask", "mask.mrc"])):
        done = run("half1.mrc", "-o", f"{name}.mrc", "--uncertainty", f"{name}_sigma.mrc", *option)
        assert done.exit_code == 0, done.stderr
    mask = read_volume("mask.mrc").data
    for ending in (".mrc", "_sigma.mrc"):
        masked, whole = (read_volume(f"{name}{ending}").data for name in ("masked", "whole"))
        level = np.float32(solvent_level(read_volume("half1.mrc").data) if ending == ".mrc" else 0)
        np.testing.assert_allclose(masked, (whole - level) * mask, rtol=1e-6)


@pytest.mark.slow
def test_sigma_through_a_pipe(run):
    assert run("half1.mrc", "-o", "a.mrc", "--uncertainty", "sigma.mrc").exit_code == 0
    done = run("half1.mrc", "-o", "b.mrc", "--uncertainty", "-", "-q")
    assert done.exit_code == 0, done.stderr
    Path("piped.mrc").write_bytes(done.stdout_bytes)
    np.testing.assert_array_equal(read_volume("piped.mrc").data, read_volume("sigma.mrc").data)


@pytest.mark.parametrize("model", ["plain", "told"])
def test_the_command_refuses_a_model_that_tells_none(run, assert_one_line_error, model):
    done = run("half1.mrc", "-o", "out.mrc", "--uncertainty", "sigma.mrc", model=model)
    assert_one_line_error(done, "the model tells no uncertainty, expected one with uncertainty true in its card.json")
    assert not Path("out.mrc").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "-", "--uncertainty", "a.mrc", "--chimerax", "a.cxc"], "none can be '-'"),
        (["-o", "a.mrc", "--uncertainty", "-", "--chimerax", "a.cxc"], "none can be '-'"),
    ],
)
def test_options_that_do_not_go_together(run, options, message):
    done = run("half1.mrc", *options)
    assert done.exit_code == 2
    assert message in done.stderr
