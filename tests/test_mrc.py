"""MRC files: what real ones look like, and what is written."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError, OutputError
from cryored.files.mrc import check_finite, new_stack, read_array, read_volume, write_volume
from cryored.maps.volume import Volume

ODD = Path(__file__).parent / "data" / "odd_mrc"
STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"

with (ODD / "manifest.csv").open(newline="") as stream:
    ROWS = list(csv.DictReader(stream))
READABLE = [row for row in ROWS if row["verdict"] == "read"]

REFUSALS = {
    "anisotropic_voxel.mrc": r"voxels of 1\.5 x 1\.5 x 1\.6 A, expected cubes; resample",
    "truncated.mrc": "shorter than its header says",
    "truncated.mrc.gz": "the compressed stream is damaged or ends early",
    "header_only.mrc": "shorter than its header says",
    "empty.mrc": "0 bytes, shorter than the header of an MRC file",
    "text.mrc": r"no MRC file \(its mode would be \d+\), expected a map",
    "nan.mrc": r"1 values are not finite \(NaN or infinity\), the first at z=\d+ y=\d+ x=\d+",
    "inf.mrc": r"\d+ values are not finite \(NaN or infinity\), the first at z=\d+ y=\d+ x=\d+",
    "mode4_complex.mrc": r"MRC mode 4 \(complex\), expected a real map",
    "image_stack.mrcs": "space group 0 with mz 1, a stack of images; expected a map",
    "volume_stack.mrc": "space group 401, a stack of volumes; expected one map",
    "single_image.mrc": "one 2D image, expected a map",
}
WARNINGS = {
    "bad_machine_stamp.mrc": "machine stamp",
    "no_map_id.mrc": "Map ID",
    "too_long.mrc": "the surplus bytes are ignored",
}


@pytest.fixture
def ramp():
    """A map with another value in each voxel, in a box with three different edges, off the origin."""
    data = np.arange(6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8) / 7
    return Volume(data, 1.0961, (-9.0, 4.5, 30.0), (-6, 2, 11))


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)  # the command line turns it off
    caplog.set_level("INFO", logger="cryored")
    return caplog


def same(a, b):
    np.testing.assert_array_equal(a.data, b.data)
    assert a.voxel_size == pytest.approx(b.voxel_size, rel=1e-6)  # the header holds the cell in float32
    assert a.origin == pytest.approx(b.origin, rel=1e-6)
    assert a.nstart == b.nstart


# Reading


def test_the_manifest_lists_every_file():
    assert {row["file"] for row in ROWS} == {path.name for path in ODD.iterdir()} - {"manifest.csv"}
    assert {row["file"] for row in ROWS if row["verdict"] == "refuse"} == set(REFUSALS)


@pytest.mark.parametrize("row", READABLE, ids=lambda row: row["file"])
def test_reads_odd_files(row):
    volume = read_volume(ODD / row["file"])
    assert "x".join(map(str, volume.shape)) == row["shape_zyx"]
    assert volume.data.dtype == np.float32
    assert volume.data.flags.c_contiguous
    assert volume.voxel_size == float(row["voxel_A"])
    assert volume.origin == tuple(map(float, row["origin_xyz_A"].split()))
    assert volume.nstart == ((-6, -6, -6) if row["file"] == "emdb_nstart.map" else (0, 0, 0))
    # The manifest has seven digits.
    assert volume.data.mean(dtype=np.float64) == pytest.approx(float(row["mean"]), rel=1e-6)
    assert volume.data[3, 4, 5] == pytest.approx(float(row["value_z3_y4_x5"]), rel=1e-6)


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_what_is_no_map(name):
    with pytest.raises(InputError, match=f"{name}: ({REFUSALS[name]})") as caught:
        read_volume(ODD / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [row["file"] for row in READABLE])
def test_warns_of_what_is_read_in_spite_of_a_fault(name, heard):
    read_volume(ODD / name)
    messages = [record.getMessage() for record in heard.records]
    if name in WARNINGS:
        assert len(messages) == 1
        assert WARNINGS[name] in messages[0]
        assert name in messages[0]
        assert "\n" not in messages[0]
    else:
        assert messages == []


@pytest.mark.parametrize("name", [row["file"] for row in READABLE])
def test_everything_but_the_axis_order_survives_copying(name, tmp_path):
    volume = read_volume(ODD / name)
    write_volume(tmp_path / "copy.mrc", volume, label="test")
    same(read_volume(tmp_path / "copy.mrc"), volume)


def test_nstart_follows_permuted_axes(tmp_path, ramp):
    """The file's columns run along y, rows along z, sections along x, and so does its nstart (MRC2014)."""
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(np.ascontiguousarray(ramp.data.transpose(2, 0, 1)))  # (x, z, y)
        mrc.header.mapc, mrc.header.mapr, mrc.header.maps = 2, 3, 1
        mrc.header.mx, mrc.header.my, mrc.header.mz = 8, 7, 6
        mrc.header.cella = (8.0, 7.0, 6.0)
        mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = 2, 11, -6
        mrc.header.origin = ramp.origin
    volume = read_volume(tmp_path / "a.mrc")
    same(volume, Volume(ramp.data, 1.0, ramp.origin, ramp.nstart))


def test_a_wrong_axis_order_is_refused(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp, label="test")
    with mrcfile.open(tmp_path / "a.mrc", "r+") as mrc:
        mrc.header.mapc = 3
    with pytest.raises(InputError, match=r"a.mrc: axis order \[3, 2, 3\], expected a permutation of 1, 2, 3"):
        read_volume(tmp_path / "a.mrc")


def test_old_files_without_an_axis_order(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp, label="test")
    with mrcfile.open(tmp_path / "a.mrc", "r+") as mrc:
        mrc.header.mapc = mrc.header.mapr = mrc.header.maps = 0
    same(read_volume(tmp_path / "a.mrc"), ramp)


@pytest.mark.parametrize("length", [np.nan, np.inf])
def test_a_cell_that_is_no_number(tmp_path, ramp, length):
    write_volume(tmp_path / "a.mrc", ramp, label="test")
    with mrcfile.open(tmp_path / "a.mrc", "r+") as mrc:
        mrc.header.cella.y = length
    with pytest.raises(InputError, match=f"a.mrc: a cell of .* x {length:g} x .* A in the header, expected numbers"):
        read_volume(tmp_path / "a.mrc")
    assert read_volume(tmp_path / "a.mrc", angpix=1.5).voxel_size == 1.5


def test_an_origin_that_is_no_number(tmp_path, ramp, caplog):
    write_volume(tmp_path / "a.mrc", ramp, label="test")
    with mrcfile.open(tmp_path / "a.mrc", "r+") as mrc:
        mrc.header.origin.y = np.nan
    assert read_volume(tmp_path / "a.mrc").origin == (0, 0, 0)
    assert "a.mrc: its header has no origin that is a number; taken as 0" in caplog.text


@pytest.mark.parametrize("mode", ["i1", ">i2", ">f4"])
def test_big_endian_files(tmp_path, mode):
    """Mode 0 reads the same in either order: the machine stamp decides."""
    data = np.arange(4**3, dtype=mode).reshape(4, 4, 4)
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(data.astype(data.dtype.newbyteorder("=")))
        mrc.voxel_size = 2.0
    with mrcfile.open(tmp_path / "a.mrc", "r") as mrc:
        header = mrc.header.copy().view(mrc.header.dtype.newbyteorder(">"))
        header[...] = mrc.header.astype(header.dtype)
    header.machst = [0x11, 0x11, 0, 0]
    (tmp_path / "a.mrc").write_bytes(header.tobytes() + data.tobytes())
    found = read_volume(tmp_path / "a.mrc")
    np.testing.assert_array_equal(found.data, data)
    assert found.voxel_size == 2.0


def test_the_angles_of_a_cell(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp, label="test")
    for angles in ((0, 0, 0), (90, 90.01, 89.99), (90, 90, 120)):
        with mrcfile.open(tmp_path / "a.mrc", "r+") as mrc:
            mrc.header.cellb = angles
        if angles[2] != 120:
            same(read_volume(tmp_path / "a.mrc"), ramp)
    for angpix in (None, 1.5):
        with pytest.raises(InputError, match="a.mrc: a cell with angles of 90, 90, 120 degrees, expected 90; resample"):
            read_volume(tmp_path / "a.mrc", angpix=angpix)


def test_a_named_pipe_is_read_once(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp, label="test")
    for name, content in (
        ("plain", (tmp_path / "a.mrc").read_bytes()),
        ("packed", gzip.compress((tmp_path / "a.mrc").read_bytes())),
    ):
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True)
        writer.start()
        same(read_volume(tmp_path / name), ramp)
        writer.join(10)


def test_angpix_replaces_the_headers():
    assert read_volume(ODD / "cell_zero.mrc", angpix=2.5).voxel_size == 2.5
    assert read_volume(ODD / "plain_float32.mrc", angpix=2.5).voxel_size == 2.5
    assert read_volume(ODD / "anisotropic_voxel.mrc", angpix=2.5).voxel_size == 2.5


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match="none.mrc: cannot be read: No such file or directory"):
        read_volume(tmp_path / "none.mrc")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_volume(tmp_path)


# Writing


def test_written_files_are_valid(tmp_path, ramp):
    for name, float16, mode in (("a.mrc", False, 2), ("b.mrc", True, 12)):
        write_volume(tmp_path / name, ramp, label="fsc threshold 0.143", float16=float16)
        messages = io.StringIO()
        assert mrcfile.validate(tmp_path / name, print_file=messages), messages.getvalue()
        with mrcfile.open(tmp_path / name) as mrc:
            assert mrc.header.mode == mode
            assert mrc.header.ispg == 1
            assert mrc.header.nlabl == 1
            assert [mrc.header.mapc, mrc.header.mapr, mrc.header.maps] == [1, 2, 3]
            assert mrc.get_labels()[0].startswith("cryored ")
            assert mrc.get_labels()[0].endswith("fsc threshold 0.143")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mrc", "b.mrc"]


def test_a_label_is_80_characters_at_most(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp, label="denoise Å " + 100 * "x")
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        label = mrc.get_labels()[0]
    assert "denoise ? xxx" in label  # headers are ASCII
    assert len(label) == 79


def test_float16(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp, label="test", float16=True)
    again = read_volume(tmp_path / "a.mrc")
    np.testing.assert_allclose(again.data, ramp.data, rtol=2**-11)  # half a unit of an 11 bit mantissa
    assert (tmp_path / "a.mrc").stat().st_size == 1024 + 2 * ramp.data.size
    with pytest.raises(InputError, match="b.mrc: values up to 70000, but float16 ends at 65504"):
        write_volume(tmp_path / "b.mrc", ramp.with_data(ramp.data * 0 + 7e4), label="test", float16=True)
    assert not (tmp_path / "b.mrc").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_written(tmp_path, ramp, value):
    ramp.data[2, 3, 4] = value
    path = tmp_path / "a.mrc"
    with pytest.raises(InputError, match=r"a.mrc: not written: 1 values are not finite .*the first at z=2 y=3 x=4"):
        write_volume(path, ramp, label="test")
    assert not path.exists()
    ramp.data[2, 3, :5] = 2e38  # whose sum is infinite
    check_finite(ramp.data, "a.mrc")


def test_an_unknown_voxel_size_stays_unknown(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp.with_voxel_size(0.0), label="test")
    assert read_volume(tmp_path / "a.mrc").voxel_size == 0


def test_through_pipes(tmp_path, ramp):
    write_volume(tmp_path / "a.mrc", ramp, label="test")
    program = (
        "from cryored.files.mrc import read_volume, write_volume\n"
        "volume = read_volume('-')\n"
        "write_volume('-', volume.with_data(2 * volume.data), label='test')"
    )
    with (tmp_path / "a.mrc").open("rb") as source, (tmp_path / "b.mrc").open("wb") as sink:
        subprocess.run([sys.executable, "-c", program], stdin=source, stdout=sink, check=True, timeout=60)
    assert mrcfile.validate(tmp_path / "b.mrc", print_file=io.StringIO())
    same(read_volume(tmp_path / "b.mrc"), ramp.with_data(2 * ramp.data))


def test_a_stream_has_the_bytes_of_a_file(tmp_path):
    arguments = ["simulate", "map", str(STRUCTURE), "--box", "96", "--angpix", "1.5", "--resolution", "8", "-o"]
    done = CliRunner().invoke(cli, [*arguments, "-"])
    assert done.exit_code == 0
    assert CliRunner().invoke(cli, [*arguments, str(tmp_path / "a.mrc")]).exit_code == 0
    content = bytearray((tmp_path / "a.mrc").read_bytes())
    assert done.stdout_bytes == content


def test_compressed_streams(tmp_path):
    program = "from cryored.files.mrc import read_volume\nprint(read_volume('-').data.mean())"
    for name in ("gzipped.mrc.gz", "bzipped.mrc.bz2"):
        with (ODD / name).open("rb") as source:
            done = subprocess.run([sys.executable, "-c", program], stdin=source, capture_output=True, timeout=60)
        assert float(done.stdout) == pytest.approx(0.0493303, rel=1e-5)  # as the manifest says


# Whole or not at all


def test_a_failed_write_leaves_the_old_file(tmp_path, ramp, monkeypatch):
    path = tmp_path / "a.mrc"
    write_volume(path, ramp, label="test")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cryored.files.mrc._fill", full)
    with pytest.raises(OutputError, match="a.mrc: cannot be written: No space left on device"):
        write_volume(path, ramp, label="test")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_disk_that_fills_up_while_writing(tmp_path):
    """A limit on the size of files fails in the same call, write(2), as a full disk does."""
    (tmp_path / "a.mrc").write_bytes(b"old")
    command = [sys.executable, "-m", "cryored", "simulate", "map", "-q", str(STRUCTURE), "--box", "64", "-o", "a.mrc"]
    done = subprocess.run(
        [*command, "--overwrite"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1
    assert done.stderr == "cryored: error: a.mrc: cannot be written: File too large\n"
    assert (tmp_path / "a.mrc").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mrc"]


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "room"),
    [
        (["simulate", "map", "-q", str(STRUCTURE), "--box", "64", "-o", "-"], 100_000),
        (["simulate", "map", "-q", str(STRUCTURE), "--box", "64", "-o", "/dev/stdout"], 100_000),
        (["models", "cwred", "--json"], 300),
        (["--help"], 300),
    ],
)
def test_a_disk_that_fills_up_behind_standard_output(tmp_path, words, room, unbuffered):
    with (tmp_path / "a.mrc").open("wb") as sink:
        done = subprocess.run(
            [sys.executable, "-m", "cryored", *words],
            stdout=sink,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        )
    assert done.returncode == 1
    assert re.fullmatch(r"cryored: error: (standard output|/dev/stdout)\b.*: File too large\n", done.stderr)


def test_an_error_of_the_caller_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="halfway"), new_stack(tmp_path / "a.mrcs", 3, 4, 1.5, label="test"):
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


# Stacks and request arrays


def test_a_stack_is_written_in_runs(tmp_path):
    images = np.random.default_rng(1).standard_normal((5, 6, 6)).astype(np.float32)
    with new_stack(tmp_path / "a.mrcs", 5, 6, 1.5, label="simulate particles") as stack:
        stack.write(2, images[2:])
        stack.write(0, images[:2])
        np.testing.assert_array_equal(stack.read(1, 3), images[1:4])
        assert not (tmp_path / "a.mrcs").exists()
    messages = io.StringIO()
    assert mrcfile.validate(tmp_path / "a.mrcs", print_file=messages), messages.getvalue()
    with mrcfile.open(tmp_path / "a.mrcs") as mrc:
        np.testing.assert_array_equal(mrc.data, images)
        assert mrc.is_image_stack()
        assert mrc.voxel_size.x == pytest.approx(1.5)
        assert mrc.get_labels()[0].endswith("simulate particles")
    with pytest.raises(InputError, match="a stack of images"):
        read_volume(tmp_path / "a.mrcs")


def test_request_arrays_are_mapped_and_checked(tmp_path, ramp):
    path = tmp_path / "data.mrc"
    write_volume(path, ramp, label="test")
    np.testing.assert_array_equal(read_array(path, ramp.shape), ramp.data)
    with pytest.raises(InputError, match=r"data.mrc: shape 6 x 7 x 8 \(z, y, x\), expected 8 x 8 x 5 from the request"):
        read_array(path, (8, 8, 5))
    with pytest.raises(InputError, match="none.mrc: cannot be read"):
        read_array(tmp_path / "none.mrc", ramp.shape)
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"data.mrc: (truncated|no readable MRC file)"):
        read_array(path, ramp.shape)
    write_volume(path, ramp, label="test", float16=True)
    with pytest.raises(InputError, match="data.mrc: MRC mode 12, expected 2"):
        read_array(path, ramp.shape)
