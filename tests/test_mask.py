"""The mask around a map whose shape is known."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume, squared_distance

DATA = Path(__file__).parent / "data"
WIDTH = 15.0  # angstrom: so wide that the low-pass filter at 15 A leaves it as it is


def gaussian(box, voxel_size):
    return Volume(np.exp(-squared_distance((box,) * 3) * (voxel_size / WIDTH) ** 2 / 2).astype(np.float32), voxel_size)


def radius_at(fraction):
    """Return where the Gaussian has fallen to a fraction, in angstrom."""
    return WIDTH * np.sqrt(-2 * np.log(fraction))


@pytest.mark.parametrize(("box", "voxel_size"), [(48, 3.0), (80, 1.8), (45, 3.2)])
@pytest.mark.parametrize("changes", [{}, {"threshold": 0.3}, {"extend": 9.0, "edge": 5.0}, {"edge": 0.0}])
def test_is_1_around_the_density_and_falls_over_the_edge(box, voxel_size, changes):
    volume = gaussian(box, voxel_size)
    mask = soft_mask(volume, **changes)
    values = {"threshold": 0.1, "extend": 3.0, "edge": 9.0} | changes
    distance = np.sqrt(squared_distance(volume.shape)) * voxel_size - radius_at(values["threshold"])
    # Distances are from the nearest voxel inside, so they are off by up to a voxel's diagonal, and never short.
    slack = np.sqrt(3) * voxel_size
    assert mask.voxel_size == voxel_size
    assert mask.data.dtype == np.float32
    assert np.all(mask.data[distance < values["extend"] - slack] == 1)
    assert not mask.data[distance > values["extend"] + values["edge"] + 0.1].any()
    inside = (distance > values["extend"] + 0.1) & (distance < values["extend"] + values["edge"] - slack)
    expected = 0.5 + 0.5 * np.cos(np.pi * (distance[inside] - values["extend"]) / max(values["edge"], 1))
    assert np.all(mask.data[inside] <= expected + 0.01)
    assert np.all(mask.data[inside] > 0)


def test_the_picture_of_a_map_below_0(tmp_path):
    volume = gaussian(48, 3.0)
    write_volume(tmp_path / "low.mrc", volume.with_data(volume.data - 5), label="t")
    words = ["mask", str(tmp_path / "low.mrc"), "-o", str(tmp_path / "mask.mrc"), "--plot", str(tmp_path / "mask.png")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_follows_the_shape_not_the_scale_or_the_detail():
    volume = gaussian(48, 3.0)
    mask = soft_mask(volume).data
    np.testing.assert_allclose(soft_mask(volume.with_data(7 * volume.data)).data, mask, atol=1e-6)
    noise = np.random.default_rng(0).standard_normal(volume.shape).astype(np.float32)
    beyond = np.arange(25) > 48 * 3.0 / 15.0 + 1  # the filter is two shells wide
    detail = volume.with_data(volume.data + apply_shells(noise, beyond.astype(np.float32)))
    assert detail.data.std() > 2 * volume.data.std()
    np.testing.assert_allclose(soft_mask(detail).data, mask, atol=1e-6)
    assert np.abs(soft_mask(detail, resolution=6.0).data - mask).max() > 0.5


def test_maps_without_a_mask():
    volume = gaussian(16, 3.0)
    with pytest.raises(InputError, match=r"pixel size is 0 \(unknown\), expected angstrom"):
        soft_mask(volume.with_voxel_size(0.0))
    with pytest.raises(InputError, match="at most -.* at 15 A, expected positive density; is it inverted"):
        soft_mask(volume.with_data(-volume.data - 1))


# As RELION makes it


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_mask_create") is None, reason="relion_mask_create is not on the PATH")
@pytest.mark.parametrize(("lowpass", "extend", "edge"), [(15, 3, 6), (10, 0, 5), (0, 2.5, 0), (20, 4, 3.5)])
def test_is_relions_mask(tmp_path, monkeypatch, lowpass, extend, edge):
    monkeypatch.chdir(tmp_path)
    volume = read_volume(DATA / "relion_requests" / "pka_box64_pad1" / "truth.mrc")
    rng = np.random.default_rng(0)
    noisy = volume.data + 0.15 * volume.data.std() * rng.standard_normal(volume.shape).astype(np.float32)
    write_volume("map.mrc", volume.with_data(noisy), label="test")
    threshold = 0.8 * float(noisy.std())
    numbers = {"lowpass": lowpass or -1, "ini_threshold": threshold, "extend_inimask": extend, "width_soft_edge": edge}
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    subprocess.run(["relion_mask_create", "--i", "map.mrc", "--o", "relion.mrc", "--angpix", "1.5", *words], check=True)
    ours = ["--threshold", threshold, "--lowpass", lowpass, "--extend", extend, "--edge", edge, "--islands"]
    done = CliRunner().invoke(cli, ["mask", "map.mrc", "-o", "ours.mrc", *map(str, ours)])
    assert done.exit_code == 0, done.output
    found, expected = (read_volume(name).data for name in ("ours.mrc", "relion.mrc"))
    # A voxel at the threshold itself may fall on either side by rounding.
    assert np.mean(np.abs(found - expected) > 1e-5) < 1e-4


@pytest.mark.slow
def test_islands_are_left_out_and_the_threshold_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    volume = gaussian(48, 3.0)
    island = np.roll(gaussian(48, 3.0).data, 20, axis=0)
    data = volume.data.copy()
    data[38:] += 0.5 * island[38:]
    write_volume("map.mrc", volume.with_data(data), label="test")
    for words, most in (([], 0), (["--islands"], 1)):
        command = ["mask", "map.mrc", "-o", "mask.mrc", "--plot", "mask.png", "--overwrite", *words]
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.output
        assert "threshold 0.2" in done.stderr
        assert read_volume("mask.mrc").data[44:].max() == most
    assert Path("mask.png").read_bytes().startswith(b"\x89PNG")


def test_a_threshold_above_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_volume("map.mrc", gaussian(24, 3.0), label="test")
    done = CliRunner().invoke(cli, ["mask", "map.mrc", "-o", "mask.mrc", "--threshold", "7"])
    assert done.exit_code == 1
    assert "map.mrc: nothing lies above the threshold of 7; the filtered map goes from" in done.stderr
    assert not Path("mask.mrc").exists()


@pytest.mark.parametrize(
    ("box", "shift", "warned"), [(48, 0, (False, False)), (48, 14, (False, True)), (16, 0, (True, True))]
)
def test_a_mask_that_leaves_no_solvent_is_warned_of(tmp_path, monkeypatch, box, shift, warned):
    monkeypatch.chdir(tmp_path)
    volume = gaussian(box, 3.0)
    write_volume("map.mrc", volume.with_data(np.roll(volume.data, shift, axis=1)), label="test")
    done = CliRunner().invoke(cli, ["mask", "map.mrc", "-o", "mask.mrc", "--lowpass", "0"])
    assert done.exit_code == 0, done.output
    assert ("% of the box is inside, expected less than half" in done.stderr) == warned[0]
    assert ("mask.mrc: 1 on a face of the box, expected" in done.stderr) == warned[1]
