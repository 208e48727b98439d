"""Denoising: the numerics around the network with operators of known effect, and the model that is shipped."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.ndimage import uniform_filter

from cryored.cli import cli
from cryored.errors import InputError, ModelError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells, forward, shell_index, spatial_frequency
from cryored.maps.fsc import shell_correlation
from cryored.maps.network_scale import solvent_level, standard_of
from cryored.maps.resample import SAME_PIXEL, fourier_resize, plan_axis
from cryored.maps.volume import Volume, soft_sphere, window
from cryored.prior import denoiser as denoise
from cryored.prior.denoise_files import DenoiseOptions, denoise_file
from cryored.prior.denoiser import Denoiser, crossover, cube_rotations, predict_tiled, rotate, rotate_back
from cryored.prior.models import DEFAULT_MODEL, Model, ModelCard, find_model
from cryored.simulation.gaussian import gaussian_pairs
from cryored.simulation.structure import check_fits, read_atoms

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
FLOAT32 = 1e-5  # of values of order 1 that went through two or three float32 transforms


def card(**changes):
    facts = {
        "name": "linear",
        "input": "regularised",
        "pixel_size": 1.5,
        "width": 1,
        "depth": 2,
        "sha256": sha256(b"weights").hexdigest(),
        "resolution_range": (3.0, 18.0),
    }
    return ModelCard(**{**facts, **changes})


def model_with(monkeypatch, operator, **changes):
    """Return a model whose network is `operator` on (z, y, x) arrays."""
    monkeypatch.setattr(Denoiser, "load", lambda self: setattr(self, "_loaded_on", "CPU"))
    monkeypatch.setattr(
        Denoiser, "_predict", lambda self, data: np.stack([operator(one) for one in data]).astype(np.float32)
    )
    return Model(Path("nowhere"), card(**changes))


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def local_mean(data):
    return uniform_filter(data, 3, mode="constant")


def shrink(data):
    """What a network does and no linear operator: it takes small values for noise, and large ones for density."""
    smooth = local_mean(data)
    return data - smooth * smooth**2 / (1 + smooth**2)


def blob(box, voxel_size, *, seed=1, width=7.0):
    """A molecule-like map, band-limited well below Nyquist and zero at the faces: Gaussians near the centre."""
    rng = np.random.default_rng(seed)
    axis = (np.arange(box) - box // 2) * voxel_size
    z, y, x = axis[:, None, None], axis[None, :, None], axis[None, None, :]
    data = np.zeros((box, box, box))
    for _ in range(12):
        cz, cy, cx = rng.uniform(-9, 9, 3)
        data += rng.uniform(0.5, 1.5) * np.exp(-np.pi * ((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) / width**2)
    return Volume(data.astype(np.float32), voxel_size)


def difference(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# Rotations


def test_the_rotations_of_a_cube():
    data = noise((3, 3, 3))
    rotations = cube_rotations()
    assert len({rotate(data, rotation).tobytes() for rotation in rotations}) == len(rotations) == 24
    np.testing.assert_array_equal(rotate(data, rotations[0]), data)
    for axes, signs in rotations:  # rotations, no mirrors
        assert np.linalg.det(np.eye(3)[list(axes)] * signs) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 4, 5)])
def test_rotating_back(shape):
    data = noise(shape)
    for rotation in cube_rotations():
        np.testing.assert_array_equal(rotate_back(rotate(data, rotation), rotation), data)


def test_the_average_over_rotations_knows_no_direction(monkeypatch):
    """A gradient along x is as lopsided as an operator can be; its absolute value keeps it from cancelling."""
    model = model_with(monkeypatch, lambda data: np.abs(np.diff(data, axis=2, append=0)))
    one, all24 = (Denoiser(model, rotations=n) for n in (1, 24))
    volume = Volume(blob(20, 1.5).data + 0.1 * noise((20, 20, 20)), 1.5)
    for rotation in cube_rotations()[6::5]:
        turned = volume.with_data(np.ascontiguousarray(rotate(volume.data, rotation)))
        assert difference(one(turned).data, rotate(one(volume).data, rotation)) > 0.01
        assert difference(all24(turned).data, rotate(all24(volume).data, rotation)) < FLOAT32


# Tiles


@pytest.mark.parametrize("shape", [(5, 37, 50), (33, 33, 33), (1, 2, 3), (100, 9, 64)])
@pytest.mark.parametrize("multiple", [2, 16, 32])
def test_any_box_is_padded_inside_and_cropped(shape, multiple):
    data = noise(shape)
    seen = []

    def network(tile):
        seen.append(tile.shape)
        assert tile.flags.c_contiguous
        assert tile.dtype == np.float32
        return tile

    result = predict_tiled(network, data, tile=64, multiple=multiple)
    np.testing.assert_allclose(result, data, atol=1e-6)  # times a weight and divided by it again
    assert result.dtype == np.float32
    assert all(edge % multiple == 0 for edges in seen for edge in edges)


def test_a_map_no_larger_than_the_tile_is_one_pass():
    for shape, passes in (((64, 64, 64), 1), ((60, 50, 64), 1), ((66, 64, 64), 2)):
        seen = []
        predict_tiled(lambda tile, seen=seen: seen.append(tile) or tile, noise(shape), tile=64, multiple=2)
        assert len(seen) == passes


def in_blocks(edge):
    """An operator that pools as a U-Net does: the mean of each block, in all its voxels."""

    def operator(data):
        z, y, x = (n // edge for n in data.shape)
        means = data.reshape(z, edge, y, edge, x, edge).mean(axis=(1, 3, 5))
        return means.repeat(edge, 0).repeat(edge, 1).repeat(edge, 2)

    return operator


@pytest.mark.parametrize(
    ("operator", "multiple"), [(local_mean, 4), (shrink, 4), (in_blocks(8), 8), (in_blocks(4), 16)]
)
@pytest.mark.parametrize("shape", [(144, 16, 160), (61, 75, 17), (130, 130, 10)])
def test_tiles_equal_one_pass(operator, multiple, shape):
    """Exactly so for an operator that reaches no further than the 12 voxels of a tile's rim that have no weight."""
    data = noise(shape)
    whole = predict_tiled(operator, data, tile=512, multiple=multiple)
    tiled = predict_tiled(operator, data, tile=64, multiple=multiple)
    # The rim's weight is 1e-6, not 0, where the operator sees the tile's face.
    np.testing.assert_allclose(tiled, whole, atol=1e-5)


@pytest.mark.parametrize(("n", "tile", "multiple"), [(300, 128, 16), (256, 128, 32), (160, 96, 32), (112, 64, 16)])
def test_ramps(n, tile, multiple):
    starts = list(denoise._starts(n, tile, multiple))
    total = np.zeros(n)
    for start in starts:
        total[start : start + tile] += denoise._ramp(slice(start, start + tile), n)
    assert starts[0] == 0
    assert starts[-1] + tile >= n
    assert all(start % multiple == 0 for start in starts if n % multiple == 0)
    # Tiles that share 48 voxels sum to one; they may share more, and the sum is divided out.
    assert total.min() > 0.5
    if len(starts) > 1 and starts[1] == tile - 48:
        third = starts[2] if len(starts) > 2 else n
        alone = min(third + 12, tile)  # where the first two tiles are alone
        np.testing.assert_allclose(total[:alone], 1, atol=3e-6)  # the least weight, twice


# Grids


def test_planned_grids_hit_the_voxel_size():
    for size in [*range(24, 400, 7), 31, 32, 33, 96, 128, 255, 256, 257, 360, 512]:
        for voxel_size in (0.5, 0.66, 0.731, 0.83, 1.0, 1.0961, 1.244, 1.35, 1.48, 1.5, 1.52, 1.77, 2.0, 2.62, 4.1):
            grid = plan_axis(size, voxel_size, 1.5)
            reached = grid.padded * voxel_size / grid.resampled
            assert grid.size == size
            assert size <= grid.padded < size + 32
            if abs(voxel_size / 1.5 - 1) <= SAME_PIXEL:
                assert (grid.padded, grid.resampled) == (size, size)
            else:
                error = abs(reached / 1.5 - 1)
                padded = np.arange(size, size + 32)
                best = np.abs(padded * voxel_size / (1.5 * np.rint(padded * voxel_size / 1.5)) - 1).min()
                assert error <= max(0.002, best + 1e-12), (size, voxel_size, grid)
                # Voxels 1.3 % too small are the hardest: 32 of them more shift the rest by less than half a voxel.
                assert error <= (0.003 if size >= 48 else 0.006), (size, voxel_size, grid)


@pytest.mark.parametrize("old", [24, 25, 32, 33])
@pytest.mark.parametrize("new", [20, 21, 36, 37, 48])
def test_resampling_keeps_values_and_the_centre(old, new):
    """A map of known shape, sampled coarser or finer: the same values at the same places, centre at n // 2."""
    length = 60.0
    fine, coarse = (blob(n, length / n, width=11.0).data for n in (old, new))
    resized = fourier_resize(fine, (new, new, new))
    assert resized.dtype == np.float32
    # Gaussians of 11 A have exp(-11**2 / 6**2) = 3 % of their transform at 1/6 A, 1e-4 of the whole; 5 A at least here.
    np.testing.assert_allclose(resized, coarse, atol=2e-3 * coarse.max())


def test_resampling_of_boxes_that_are_no_cubes():
    data = fourier_resize(noise((6, 7, 9)), (24, 28, 35))
    np.testing.assert_allclose(fourier_resize(fourier_resize(data, (12, 33, 18)), (24, 28, 35)), data, atol=FLOAT32)


# Standardisation


def test_standardised_maps_do_not_depend_on_scale_offset_box_or_sampling():
    volume = blob(40, 1.5)
    standard = standard_of(volume.data, 1.5)
    other = standard_of(volume.data * np.float32(-3) + np.float32(7), 1.5)
    assert other.deviation == pytest.approx(3 * standard.deviation, rel=1e-5)  # float32 about an offset of 7
    assert other.level == pytest.approx(7 - 3 * standard.level, rel=1e-6)
    # The Gaussians' tails at the faces of the smaller box make the difference.
    large = standard_of(blob(80, 1.5).data, 1.5)
    assert large.deviation == pytest.approx(standard.deviation, rel=1e-3)
    fine = standard_of(blob(60, 1.0).data, 1.0)
    assert fine.deviation == pytest.approx(standard.deviation, rel=1e-3)


def test_the_level_is_the_solvents_not_the_mean():
    data = np.full((20, 20, 20), 0.25, dtype=np.float32)
    data[5:15, 5:15, 5:15] = 2.25
    standard = standard_of(data, 1.5)
    assert standard.level == 0.25
    assert standard.deviation == pytest.approx(2 * np.sqrt(10**3 * 1.5**3 / 144**3))
    assert standard.apply(data)[0, 0, 0] == 0


@pytest.mark.parametrize("value", [0.0, 3.0, -0.1, 1e6])
def test_a_constant_map_has_no_contrast(value):
    assert standard_of(np.full((9, 8, 7), value, dtype=np.float32), 1.5).deviation == 0


# The denoiser around the network


@pytest.mark.parametrize("voxel_size", [1.5, 1.1, 2.0])
@pytest.mark.parametrize("kind", ["regularised", "unregularised"])
@pytest.mark.parametrize("rotations", [1, 3])
def test_grey_scale(monkeypatch, voxel_size, kind, rotations):
    denoiser = Denoiser(model_with(monkeypatch, shrink, input=kind), rotations=rotations)
    volume = Volume(blob(30, voxel_size).data + 0.1 * noise((30, 30, 30)), voxel_size)
    plain = denoiser(volume).data
    assert difference(plain, volume.data) > 0.05
    for a, b in ((2.5, 0.0), (1.0, 4.0), (1e-4, -0.003), (300.0, 1000.0)):
        scaled = denoiser(volume.with_data(np.float32(a) * volume.data + np.float32(b))).data
        # Rounding is relative to the largest value, which an offset may be.
        np.testing.assert_allclose(scaled, a * plain + b, atol=20 * 6e-8 * (a * np.abs(plain).max() + abs(b)))


@pytest.mark.parametrize("shape", [(30, 30, 30), (31, 33, 35), (17, 40, 64)])
@pytest.mark.parametrize("voxel_size", [0.8, 1.5, 3.1])
def test_a_network_that_finds_no_error_changes_nothing(monkeypatch, shape, voxel_size):
    volume = Volume(noise(shape), voxel_size, (1.0, 2.0, 3.0), (-4, 5, 6))
    result = Denoiser(model_with(monkeypatch, np.zeros_like))(volume)
    np.testing.assert_allclose(result.data, volume.data, atol=FLOAT32)
    assert result.data.dtype == np.float32
    assert (result.voxel_size, result.origin, result.nstart) == (voxel_size, volume.origin, volume.nstart)


@pytest.mark.parametrize("box", [40, 41])
def test_a_box_twice_as_large(monkeypatch, box):
    """The surroundings say nothing: the network works at the same places and on the same scale."""
    denoiser = Denoiser(model_with(monkeypatch, shrink))
    small = blob(box, 1.5, width=6.0)
    small = small.with_data(small.data * soft_sphere(small.shape, box / 2 - 6, 5))
    large = Volume(window(small.data, (2 * box,) * 3), 1.5)
    inside = window(denoiser(large).data, small.shape)
    assert difference(inside, denoiser(small).data) < FLOAT32


@pytest.mark.parametrize(("box", "voxel_size"), [(60, 1.0), (45, 4 / 3), (50, 1.2)])
def test_another_sampling(monkeypatch, box, voxel_size):
    """Boxes of 60 A hold whole numbers of the model's voxels: the network sees the same map."""
    denoiser = Denoiser(model_with(monkeypatch, shrink))
    coarse = Volume(fourier_resize(noise((20, 20, 20)) * soft_sphere((20,) * 3, 6, 3), (40, 40, 40)), 1.5)
    fine = Volume(fourier_resize(coarse.data, (box,) * 3), voxel_size)
    expected = denoiser(coarse).data
    found = fourier_resize(denoiser(fine).data, expected.shape)
    shells = np.ones(18)  # where the bands overlap: 0.9 of the model's 20
    assert difference(apply_shells(found, shells), apply_shells(expected, shells)) < FLOAT32
    assert difference(expected, coarse.data) > 0.05


def test_crossover():
    frequency = np.linspace(0, 0.6, 61)
    np.testing.assert_array_equal(crossover(frequency, 1.5, 1.5), 1)
    np.testing.assert_array_equal(crossover(frequency, 3.0, 1.5), 1)
    np.testing.assert_array_equal(crossover(frequency, 1.5 * (1 - SAME_PIXEL / 2), 1.5), 1)
    weight = crossover(frequency, 0.8, 1.5)
    np.testing.assert_array_equal(weight[frequency <= 0.3], 1)  # 0.9 / (2 * 1.5 A)
    np.testing.assert_array_equal(weight[frequency >= 1 / 3], 0)
    assert np.all(np.diff(weight) <= 0)
    assert crossover(np.array([0.95 / 3]), 0.8, 1.5)[0] == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "kept"), [("regularised", 1), ("unregularised", 0)])
def test_beyond_the_models_nyquist_frequency(monkeypatch, kind, kept):
    volume = Volume(noise((48, 48, 48)), 0.75)
    transform = forward(volume.data)
    found = forward(Denoiser(model_with(monkeypatch, local_mean, input=kind))(volume).data)
    s = spatial_frequency(volume.shape, 0.75)
    scale = np.abs(transform).max()
    np.testing.assert_allclose(found[s >= 1 / 3], kept * transform[s >= 1 / 3], atol=FLOAT32 * scale)
    below = s < 0.3
    assert difference(found[below], transform[below]) > 0.1


def test_a_map_that_is_empty_at_the_models_voxel_size(monkeypatch):
    """All its power lies beyond what the network sees."""
    z, y, x = np.indices((18, 18, 18))  # 9 A: needs no padding
    volume = Volume(((-1.0) ** (x + y + z)).astype(np.float32), 0.5)
    np.testing.assert_allclose(Denoiser(model_with(monkeypatch, shrink))(volume).data, volume.data, atol=FLOAT32)


def test_a_constant_map_is_returned_as_it_is():
    volume = Volume(np.full((12, 12, 12), 3, dtype=np.float32), 1.5)
    assert Denoiser(Model(Path("nowhere"), card()))(volume) is volume


def test_the_pixel_size_must_be_known():
    with pytest.raises(InputError, match=r"the map's pixel size is unknown \(0\); give it with --angpix"):
        Denoiser(Model(Path("nowhere"), card()))(Volume(noise((8, 8, 8)), 0.0))


# Files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with two half-maps in a box that is no cube, and a model whose network finds no error."""
    monkeypatch.chdir(tmp_path)
    for name, facts in (("linear", card()), ("raw", card(name="raw", input="unregularised"))):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.keras").write_bytes(b"weights")
        (tmp_path / "models" / name / "card.json").write_text(json.dumps(vars(facts)))
    monkeypatch.setenv("CRYORED_MODEL_PATH", str(tmp_path / "models"))
    monkeypatch.setattr(Denoiser, "load", lambda self: setattr(self, "_loaded_on", "CPU"))
    monkeypatch.setattr(Denoiser, "_predict", lambda self, data: np.zeros_like(data))
    truth = 2 * window(blob(24, 1.5).data, (20, 24, 22))
    for i in (1, 2):
        half = Volume(truth + 0.3 * noise(truth.shape, i), 1.5, (-9.0, 4.5, 30.0), (-6, 2, 11))
        write_volume(f"half{i}.mrc", half, label="test")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli, ["denoise", *map(str, arguments), "--model", "linear"])


def weights_of_halves():
    return np.clip(shell_correlation(read_volume("half1.mrc").data, read_volume("half2.mrc").data), 0, 1)


def test_half2_weights_the_map(folder):
    done = run("half1.mrc", "--half2", "half2.mrc", "-o", "out.mrc")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    half1, result = read_volume("half1.mrc"), read_volume("out.mrc")
    np.testing.assert_allclose(result.data, apply_shells(half1.data, weights_of_halves()), atol=FLOAT32)
    assert (result.voxel_size, result.origin, result.nstart) == (half1.voxel_size, half1.origin, half1.nstart)


def test_a_table_weights_the_map_as_the_halves_do(folder):
    table = CliRunner().invoke(cli, ["fsc", "half1.mrc", "half2.mrc"]).stdout
    Path("fsc.tsv").write_text(table)
    assert run("half1.mrc", "--fsc", "fsc.tsv", "-o", "out.mrc").exit_code == 0
    expected = apply_shells(read_volume("half1.mrc").data, weights_of_halves())
    np.testing.assert_allclose(read_volume("out.mrc").data, expected, atol=2e-5)  # the table has six digits


def test_a_short_table_gives_no_weight_beyond_its_end(folder):
    lines = CliRunner().invoke(cli, ["fsc", "half1.mrc", "half2.mrc"]).stdout.splitlines()
    Path("fsc.tsv").write_text("\n".join(lines[:6]) + "\n")  # shells 0 to 4
    assert run("half1.mrc", "--fsc", "fsc.tsv", "-o", "out.mrc").exit_code == 0
    power = np.abs(forward(read_volume("out.mrc").data))
    beyond = shell_index((20, 24, 22)) > 4
    assert power[beyond].max() < 1e-5 * power.max()


def test_without_either_the_map_is_taken_as_filtered(folder):
    done = run("half1.mrc", "-o", "out.mrc")
    assert done.exit_code == 0
    np.testing.assert_allclose(read_volume("out.mrc").data, read_volume("half1.mrc").data, atol=FLOAT32)
    assert "half1.mrc is taken as filtered already" in done.stderr
    assert "for a raw half-map give --half2 or --fsc" in done.stderr
    assert "denoised with linear on CPU" in done.stderr
    assert run("half1.mrc", "-o", "out.mrc", "--overwrite", "-q").stderr == ""


def test_a_model_of_raw_maps_gets_them_raw(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)  # the command line turns it off
    with caplog.at_level("INFO", logger="cryored"):
        denoise_file("half1.mrc", "out.mrc", DenoiseOptions(model="raw", half2="half2.mrc"))
    np.testing.assert_allclose(read_volume("out.mrc").data, read_volume("half1.mrc").data, atol=FLOAT32)
    assert "raw takes raw maps: half1.mrc is not weighted by an FSC" in caplog.text


def test_mask(folder):
    mask = soft_sphere((20, 24, 22), 6, 3)
    write_volume("mask.mrc", Volume(mask, 1.5), label="test")
    assert run("half1.mrc", "--mask", "mask.mrc", "-o", "out.mrc").exit_code == 0
    data = read_volume("half1.mrc").data
    np.testing.assert_allclose(read_volume("out.mrc").data, (data - solvent_level(data)) * mask, atol=FLOAT32)


def test_through_a_pipe(folder):
    content = Path("half1.mrc").read_bytes()
    done = CliRunner().invoke(cli, ["denoise", "-", "-o", "-", "--model", "./models/linear", "-q"], input=content)
    assert done.exit_code == 0, done.stderr
    Path("out.mrc").write_bytes(done.stdout_bytes)
    np.testing.assert_allclose(read_volume("out.mrc").data, read_volume("half1.mrc").data, atol=FLOAT32)


def test_the_label_says_what_was_done(folder):
    assert run("half1.mrc", "-o", "out.mrc", "--rotations", "3").exit_code == 0
    header = Path("out.mrc").read_bytes()[224:304].decode()
    assert re.match(rf"cryored \S+ denoise linear {card().sha256[:8]} rotations 3", header)


def test_angpix_replaces_the_headers(folder):
    write_volume("unknown.mrc", read_volume("half1.mrc").with_voxel_size(0.0), label="test")
    assert run("unknown.mrc", "-o", "out.mrc", "--angpix", "1.5").exit_code == 0
    assert read_volume("out.mrc").voxel_size == 1.5


def test_a_constant_file(folder):
    write_volume("flat.mrc", Volume(np.full((8, 8, 8), 3, dtype=np.float32), 1.5), label="test")
    done = run("flat.mrc", "-o", "out.mrc")
    assert done.exit_code == 0
    assert "flat.mrc is constant: returned as it is" in done.stderr
    np.testing.assert_array_equal(read_volume("out.mrc").data, 3)


def test_errors_name_the_file(folder):
    write_volume("unknown.mrc", read_volume("half1.mrc").with_voxel_size(0.0), label="test")
    write_volume("cube.mrc", Volume(noise((8, 8, 8)), 1.5), label="test")
    for arguments, message in [
        (["unknown.mrc"], "unknown.mrc: pixel size 0 (unknown) in the header, expected angstrom; give it with"),
        (["half1.mrc", "--half2", "cube.mrc"], "cube.mrc: 8 x 8 x 8 voxels (x, y, z), expected "),
        (["half1.mrc", "--mask", "cube.mrc"], "cube.mrc: 8 x 8 x 8 voxels (x, y, z), expected "),
        (["half1.mrc", "--fsc", "none.tsv"], "none.tsv: cannot be read"),
    ]:
        done = run(*arguments, "-o", "out.mrc")
        assert done.exit_code == 1
        assert f"cryored: error: {message}" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("cryored: error: ")
        assert not Path("out.mrc").exists()


def test_an_unknown_model_lists_those_there_are(folder):
    with pytest.raises(ModelError, match=r"no model named 'none'; there is: linear, raw.*CRYORED_MODEL_PATH"):
        denoise_file("half1.mrc", "out.mrc", DenoiseOptions(model="none"))


def test_damaged_models_are_refused(folder):
    Path("models/linear/model.keras").write_bytes(b"other")
    with pytest.raises(ModelError, match="model.keras: sha256 .* the file is damaged or was replaced"):
        denoise_file("half1.mrc", "out.mrc", DenoiseOptions(model="linear"))
    Path("models/linear/model.keras").unlink()
    with pytest.raises(ModelError, match="model.keras: cannot be read: No such file"):
        denoise_file("half1.mrc", "out.mrc", DenoiseOptions(model="linear"))
    Path("models/linear/card.json").write_text("{}")
    with pytest.raises(ModelError, match="card.json: no usable model card .*; train writes one"):
        denoise_file("half1.mrc", "out.mrc", DenoiseOptions(model="linear"))
    Path("models/linear/card.json").write_text(json.dumps({**vars(card()), "input": "half"}))
    with pytest.raises(ModelError, match="card.json: input is 'half', expected 'regularised' or 'unregularised'"):
        denoise_file("half1.mrc", "out.mrc", DenoiseOptions(model="linear"))


# The shipped model

keras_on_numpy_2 = pytest.mark.filterwarnings(
    # Keras asks TensorFlow's variables for numpy arrays in the way of numpy 1.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
shipped = [keras_on_numpy_2, pytest.mark.slow]

BOX, ANGPIX = 64, 1.5
DRAW = 0  # a draw of `simulate pairs` with a nominal resolution of 5.1 A, cut at shell 23 of 32


@pytest.fixture(scope="module")
def network():
    """The shipped model, loaded once."""
    try:
        found = find_model(DEFAULT_MODEL)
    except ModelError as error:
        pytest.skip(str(error))
    denoiser = Denoiser(found, gpu=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "tensorflow"))
        denoiser.load()
    return denoiser


@pytest.fixture(scope="module")
def noisy():
    """A simulated map of 6M2B as the model sees it in a refinement: noise everywhere, weighted by its FSC."""
    atoms = read_atoms(STRUCTURE)
    check_fits(atoms, BOX, ANGPIX, "6M2B")
    pair = next(gaussian_pairs(atoms, BOX, ANGPIX, 3.0, rng=np.random.default_rng(DRAW)))[0]
    return Volume(apply_shells(pair.noisy, np.clip(pair.fsc, 0, 1)), ANGPIX)


@pytest.fixture(scope="module")
def denoised(network, noisy):
    return network(noisy)


class TestShipped:
    pytestmark = shipped

    def test_it_denoises(self, noisy, denoised):
        atoms = read_atoms(STRUCTURE)
        pair = next(gaussian_pairs(atoms, BOX, ANGPIX, 3.0, rng=np.random.default_rng(DRAW)))[0]
        # The network estimates the truth; the pair's target is the truth times the FSC, as the noisy map is weighted.
        weighted = apply_shells(denoised.data, np.clip(pair.fsc, 0, 1))
        before, after = (np.linalg.norm(data - pair.target) for data in (noisy.data, weighted))
        assert after < before

    @pytest.mark.parametrize(("a", "b"), [(1e-3, 0.0), (1.0, 5.0), (40.0, -300.0)])
    def test_grey_scale(self, network, noisy, denoised, a, b):
        found = network(noisy.with_data(np.float32(a) * noisy.data + np.float32(b))).data
        # Rounding of the scaled input, relative to the largest value, through some thirty float32 layers.
        rounding = 6e-8 * (a * np.abs(noisy.data).max() + abs(b))
        np.testing.assert_allclose(found, a * denoised.data + b, atol=100 * rounding)

    def test_sampling(self, network, noisy, denoised):
        fine = Volume(fourier_resize(noisy.data, (96, 96, 96)), 1.0)
        found = fourier_resize(network(fine).data, noisy.shape)
        shells = np.ones(int(0.9 * BOX / 2))  # below 0.9 of the model's Nyquist frequency, where the prior is whole
        assert difference(apply_shells(found, shells), apply_shells(denoised.data, shells)) < 0.03

    @pytest.mark.parametrize("larger", [BOX + 16, 2 * BOX])
    def test_box(self, network, noisy, larger):
        masked = noisy.with_data(noisy.data * soft_sphere(noisy.shape, BOX / 2 - 7, 6))
        inside = window(network(Volume(window(masked.data, (larger,) * 3), ANGPIX)).data, noisy.shape)
        assert difference(inside, network(masked).data) < 0.03

    @pytest.mark.parametrize("tile", [64, 96])
    def test_tiles(self, network, noisy, tile):
        """Two molecules side by side, and tiles that cut each of them."""
        one = noisy.data * soft_sphere(noisy.shape, BOX / 2 - 7, 6)
        long = Volume(np.concatenate([one, rotate(one, cube_rotations()[9])], axis=0), ANGPIX)
        whole, tiled = (
            Denoiser(network.model, tile=edge, _network=network._network)(long).data for edge in (len(long.data), tile)
        )
        assert np.any(whole != tiled)
        assert difference(tiled, whole) < 0.02

    def test_from_the_shell(self, network, noisy, denoised, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_volume("map.mrc", noisy, label="test")
        done = CliRunner().invoke(cli, ["denoise", "map.mrc", "-o", "out.mrc", "--cpu"])
        assert done.exit_code == 0, done.output
        np.testing.assert_allclose(read_volume("out.mrc").data, denoised.data, atol=1e-5 * np.abs(denoised.data).max())


# Several maps at once, and too little memory


def test_two_maps_share_one_network_call(monkeypatch):
    model = model_with(monkeypatch, lambda data: 0.3 * local_mean(data))
    single = Denoiser._predict
    passes = []
    monkeypatch.setattr(Denoiser, "_predict", lambda self, data: passes.append(len(data)) or single(self, data))
    maps = [blob(24, 1.5, seed=seed) for seed in (1, 2)]
    together = Denoiser(model).denoise_all(maps)
    assert passes == [2]
    for volume, result in zip(maps, together, strict=True):
        np.testing.assert_array_equal(result.data, Denoiser(model)(volume).data)


def test_maps_of_different_boxes_and_a_constant_one(monkeypatch):
    model = model_with(monkeypatch, lambda data: 0.3 * local_mean(data))
    maps = [blob(24, 1.5), Volume(np.ones((24,) * 3, np.float32), 1.5), blob(20, 2.0)]
    for volume, result in zip(maps, Denoiser(model).denoise_all(maps), strict=True):
        np.testing.assert_array_equal(result.data, Denoiser(model)(volume).data)


class ResourceExhaustedError(Exception):
    """Named as TensorFlow's."""


def short_of_memory(monkeypatch, most, device_name):
    """Return a model whose network fails for more than `most` voxels at a time on the device of that name."""
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)  # the command line turns it off
    model = model_with(monkeypatch, local_mean)
    monkeypatch.setattr(
        Denoiser, "load", lambda self: self.__dict__.update(_loaded_on=device_name, _network=self._network or "first")
    )
    whole = Denoiser._predict

    def predict(self, data):
        if data.size > most and self._network == "first":
            raise ResourceExhaustedError("OOM when allocating")
        return whole(self, data)

    monkeypatch.setattr(Denoiser, "_predict", predict)
    monkeypatch.setattr("cryored.prior.denoiser.load_network", lambda model: "on the CPU")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "warning"),
    [(100**3, "one by one"), (70**3, "tiles of 56 voxels")],
)
def test_short_of_memory_in_smaller_pieces(monkeypatch, caplog, most, warning):
    maps = [blob(80, 1.5, seed=seed) for seed in (1, 2)]
    expected = Denoiser(model_with(monkeypatch, local_mean)).denoise_all(maps)
    denoiser = Denoiser(short_of_memory(monkeypatch, most, "GPU H1"))
    for one, other in zip(denoiser.denoise_all(maps), expected, strict=True):
        np.testing.assert_allclose(one.data, other.data, atol=FLOAT32 * np.abs(other.data).max())
    assert warning in caplog.text
    assert denoiser.device_name == "GPU H1"


@pytest.mark.slow
def test_short_of_all_memory_goes_to_the_cpu_and_says_so(monkeypatch, caplog):
    volume = blob(80, 1.5)
    denoiser = Denoiser(short_of_memory(monkeypatch, 10**3, "GPU H1"))
    first = denoiser(volume)
    assert "this map goes to the CPU" in caplog.text
    assert denoiser.device_name == "CPU (memory of GPU H1 too small)"
    monkeypatch.setattr(Denoiser, "_predict", lambda self, data: np.stack([local_mean(one) for one in data]))
    second = denoiser(volume)  # by then the GPU has room
    assert denoiser.device_name == "GPU H1"
    np.testing.assert_allclose(first.data, second.data, atol=FLOAT32 * np.abs(second.data).max())


def test_short_of_memory_on_the_cpu_is_an_error(monkeypatch):
    with pytest.raises(ModelError, match="not enough memory .* the smallest"):
        Denoiser(short_of_memory(monkeypatch, 10**3, "CPU"))(blob(80, 1.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mebibytes", "warning"),
    [(1000, ""), (250, "not enough memory for 2 maps at once, so one by one"), (150, "tiles of 56 voxels from now on")],
)
def test_granted_memory_decides_the_pieces_beforehand(monkeypatch, caplog, mebibytes, warning):
    maps = [blob(80, 1.5, seed=seed) for seed in (1, 2)]
    model = short_of_memory(monkeypatch, 10**9, "CPU")
    model = replace(model, card=replace(model.card, width=8))
    monkeypatch.setattr("cryored.prior.denoiser.memory_in_use", lambda: 0)
    expected = Denoiser(model).denoise_all(maps)
    assert not caplog.text
    for one, other in zip(Denoiser(model, max_memory=mebibytes << 20).denoise_all(maps), expected, strict=True):
        np.testing.assert_allclose(one.data, other.data, atol=FLOAT32 * np.abs(other.data).max())
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)


def test_granted_memory_that_does_not_suffice_is_an_error(monkeypatch):
    model = short_of_memory(monkeypatch, 10**9, "CPU")
    with pytest.raises(ModelError, match=r"the smallest \(0.0 GiB, and 0.0 are left\); free some"):
        Denoiser(model, max_memory=1 << 20)(blob(80, 1.5))


def test_scarce_free_memory_makes_small_tiles_and_goes_on(monkeypatch, caplog):
    model = short_of_memory(monkeypatch, 10**9, "CPU")
    monkeypatch.setattr("cryored.prior.denoiser.free_memory", lambda: 1 << 20)
    denoiser = Denoiser(model)
    assert np.isfinite(denoiser(blob(80, 1.5)).data).all()
    assert denoiser.tile == 56  # the smallest of a network without levels
    # A GPU has memory of its own.
    on_gpu = Denoiser(short_of_memory(monkeypatch, 10**9, "GPU H1"))
    on_gpu(blob(80, 1.5))
    assert on_gpu.tile is None
    assert on_gpu.edge == 144


def test_other_failures_of_the_network_are_not_taken_for_memory(monkeypatch):
    model = model_with(monkeypatch, local_mean)
    monkeypatch.setattr(Denoiser, "_predict", lambda self, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Denoiser(model)(blob(24, 1.5))
