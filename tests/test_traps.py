"""What people ran into: each with its whole kind."""

import bz2
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.files.requests import read_request_file
from cryored.maps.volume import Volume


@pytest.fixture
def volume():
    return Volume(np.random.default_rng(0).standard_normal((16, 16, 16), dtype=np.float32), 1.5)


def damaged(path, place, value, order="<"):
    data = bytearray(path.read_bytes())
    data[place : place + 4] = np.array([value], f"{order}i4").tobytes()
    return bytes(data)


@pytest.mark.parametrize("place", [0, 4, 8, 92])  # nx, ny, nz, length of the extended header
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_header_that_lies_costs_nothing(volume, tmp_path, place, pack):
    path = tmp_path / "map.mrc"
    write_volume(path, volume, label="t")
    path.write_bytes(pack(damaged(path, place, 2**27)))
    code = f"""
from cryored.errors import InputError
from cryored.files.mrc import read_volume
try:
    read_volume({str(path)!r})
except InputError as error:
    print(error)
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, kilobytes = done.stdout.splitlines()
    assert "map.mrc: shorter than its header says" in message
    assert int(kilobytes) < 200_000


@pytest.mark.parametrize(("ending", "unpack"), [(".mrc.gz", gzip.decompress), (".map.bz2", bz2.decompress)])
def test_a_name_says_how_a_map_is_written(volume, tmp_path, ending, unpack):
    path = tmp_path / f"map{ending}"
    write_volume(path, volume, label="t")
    assert unpack(path.read_bytes())[208:211] == b"MAP"
    np.testing.assert_array_equal(read_volume(path).data, volume.data)


def test_shells_in_another_order_are_the_same_shells(tmp_path):
    source = Path(__file__).parent / "data" / "relion_requests" / "box36_pad1_c2" / "run"
    text = (source / "run_it006_half1_class001_external_reconstruct.star").read_text()
    head, _, rows = text.partition("_rlnGoldStandardFsc #3 \n")
    if not rows:
        head, _, rows = text.partition("_rlnGoldStandardFsc #3\n")
    lines = [line for line in rows.splitlines() if line.strip()]
    names = []
    for name, order in (("a", lines), ("b", lines[::-1])):
        path = tmp_path / f"{name}.star"
        path.write_text(f"{head}_rlnGoldStandardFsc #3 \n" + "\n".join(order) + "\n")
        names.append(read_request_file(str(path), angpix=1.0))
    for key in ("tau2", "fsc"):
        np.testing.assert_array_equal(getattr(names[0], key), getattr(names[1], key))
    (tmp_path / "b.star").write_text(f"{head}_rlnGoldStandardFsc #3 \n" + "\n".join([*lines[:5], *lines[6:]]) + "\n")
    with pytest.raises(InputError, match=r"18 shells .*, expected each of 0 to 18 once .*; shell 5 is missing"):
        read_request_file(str(tmp_path / "b.star"), angpix=1.0)


def test_a_mistyped_command_gets_a_suggestion():
    done = CliRunner().invoke(cli, ["denose", "map.mrc"])
    assert done.exit_code == 2
    assert "No such command 'denose'; did you mean denoise?" in done.stderr
    assert "there are simulate, train" in CliRunner().invoke(cli, ["xyz"]).stderr


def test_help_and_version_as_people_ask_for_them():
    def said(*words):
        done = CliRunner().invoke(cli, words, prog_name="cryored")
        assert done.exit_code == 0
        return done.stdout

    assert said("help", "fsc") == said("fsc", "--help")
    assert said("help") == said("--help")
    assert said("help", "simulate", "map") == said("simulate", "map", "--help")
    assert said("-V") == said("--version")


@pytest.fixture
def halves(volume, tmp_path, monkeypatch):
    """Write two half-maps of a blob, a copy of one, one that lies elsewhere and one of the wrong sign."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    axis = np.arange(24) - 12
    blob = np.exp(-np.add.outer(np.add.outer(axis**2, axis**2), axis**2) / 18).astype(np.float32)
    half1, half2 = (blob + 0.05 * rng.standard_normal(blob.shape, dtype=np.float32) for _ in range(2))
    write_volume("half1.mrc", Volume(half1, 3.0), label="t")
    write_volume("half2.mrc", Volume(half2, 3.0), label="t")
    write_volume("copy.mrc", Volume(half1, 3.0), label="another label")
    write_volume("elsewhere.mrc", Volume(half2, 3.0, (3.0, 0.0, 0.0)), label="t")
    write_volume("inverted.mrc", Volume(-half1, 3.0), label="t")


def run(*words):
    return CliRunner().invoke(cli, list(words))


def test_one_map_twice_is_no_pair_of_half_maps(halves):
    done = run("fsc", "half1.mrc", "copy.mrc")
    assert "warning: half1.mrc and copy.mrc hold the same map" in done.stderr
    assert "hold the same map" not in run("fsc", "half1.mrc", "half2.mrc").stderr
    done = run("denoise", "half1.mrc", "--half2", "copy.mrc", "-o", "out.mrc")
    assert done.exit_code == 1
    assert "half1.mrc and copy.mrc are the same map, expected the two independent half-maps" in done.stderr
    assert not Path("out.mrc").exists()


def test_maps_in_different_places_are_named(halves):
    done = run("fsc", "half1.mrc", "elsewhere.mrc")
    assert done.exit_code == 0
    assert "half1.mrc has origin (0.0, 0.0, 0.0) A, start (0, 0, 0), elsewhere.mrc has origin (3.0, 0.0, 0.0) A" in (
        done.stderr
    )
    assert "has origin" not in run("fsc", "half1.mrc", "half2.mrc").stderr


def test_dark_density_is_noticed(halves, monkeypatch):
    monkeypatch.setattr("cryored.prior.denoiser.Denoiser.__call__", lambda self, volume, fsc: volume)
    assert "density is dark on bright" in run("denoise", "inverted.mrc", "-o", "a.mrc").stderr
    assert "dark on bright" not in run("denoise", "half1.mrc", "-o", "b.mrc").stderr


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("pixel_size", 0, "a positive number of angstroms"),
        ("pixel_size", "x", "a positive number of angstroms"),
        ("pixel_size", None, "a positive number of angstroms"),
        ("pixel_size", float("nan"), "a positive number of angstroms"),
        ("pixel_size", True, "a positive number of angstroms"),
        ("depth", -1, "a whole number from 1 to 7"),
        ("depth", 9, "a whole number from 1 to 7"),
        ("width", 2.5, "a whole number from 1 to 256"),
        ("name", None, "a name"),
        ("input", "raw", "'regularised' or 'unregularised'"),
        ("sha256", None, "the checksum of the weights"),
        ("resolution_range", [20, 3], "two positive numbers of angstroms"),
        ("resolution_range", [3], "two positive numbers of angstroms"),
        ("schedule", [], "an object"),
        ("weights", "x", "an object"),
        ("knots", -1, "a whole number from 0 to 1024"),
        ("knots", True, "a whole number from 0 to 1024"),
        ("uncertainty", 1, "true or false"),
        ("target", "half", "'weighted' or 'truth'"),
    ],
)
def test_a_card_is_checked_when_it_is_read(tmp_path, field, value, expected):
    source = Path(__file__).parents[1] / "share" / "models" / "cwred" / "card.json"
    (tmp_path / "card.json").write_text(json.dumps(json.loads(source.read_text()) | {field: value}))
    done = run("denoise", "map.mrc", "-o", "out.mrc", "--model", str(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/card.json: {field} is " in done.stderr
    assert f"expected {expected}" in done.stderr


def test_lambda_0_needs_no_pixel_size(tmp_path, monkeypatch):
    """RELION's own program does not ask for it either."""
    source = Path(__file__).parent / "data" / "relion_requests" / "box32_pad2"
    root = "run/run_it004_half1_class001_external_reconstruct"
    shutil.copytree(source, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    for path in Path("run").glob("*_model.star"):
        path.unlink()
    done = run("red-update", f"{root}.star")
    assert done.exit_code == 1
    assert "holds no pixel size" in done.stderr
    done = run("red-update", f"{root}.star", "--lambda", "0")
    assert done.exit_code == 0, done.stderr
    expected = read_volume(f"{root}_expected_map.mrc").data
    found = read_volume(f"{root}.mrc")
    assert np.linalg.norm(found.data - expected) <= 1e-6 * np.linalg.norm(expected)
    assert found.voxel_size == 0
