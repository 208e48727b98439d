"""MRC files and streams: the only module that knows the format (https://www.ccpem.ac.uk/mrc-format)."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import mrcfile
import numpy as np
import numpy.typing as npt
from mrcfile.mrcinterpreter import MrcInterpreter

from cryored import __version__
from cryored.errors import InputError
from cryored.files.output import is_stream, stdin_bytes, stdout_bytes, whole_file
from cryored.maps.volume import Volume

logger = logging.getLogger(__name__)

_MODES = (0, 1, 2, 3, 4, 6, 12, 101)
_COMPLEX_MODES = (3, 4)
_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 6: 2, 12: 2}  # of a value, by mode; 101 packs two into one
_HEADER_BYTES = 1024
_BIG_ENDIAN = 0x11  # first byte of the machine stamp
_DEFLATE_RATIO = 1032  # by which gzip can shrink at most (zlib's technical details)
_FLOAT16_MAX = 65504.0
_ISOTROPY = 1e-3  # relative difference of voxel edges below which they are called equal
_RIGHT = 0.1  # degrees by which the angles of a cell may differ from 90


def read_volume(path: str | os.PathLike[str], *, angpix: float | None = None) -> Volume:
    """Read a map from an MRC file (modes 0, 1, 2, 6, 12; plain, gzip or bzip2) or, for ``-``, from a stream.

    Parameters
    ----------
    path : path
        Compression is told by the content, not by the name.
    angpix : float, optional
        Voxel size in angstrom that replaces the header's.

    Returns
    -------
    Volume
        float32 data in the order z, y, x whatever the file's axis order, both byte orders.

    Raises
    ------
    InputError
        The file is missing, shorter than its header says, no single map, complex, not finite, or its voxels
        are not cubes or of no finite size. What can be read in spite of a fault (bad machine stamp, surplus bytes) is
        a warning.
    """
    name = "standard input" if is_stream(path) else os.fspath(path)
    try:
        with _open(path) as stream, warnings.catch_warnings(record=True) as caught:
            # mrcfile tells of a file's faults by RuntimeWarning; other kinds are between it and numpy.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RuntimeWarning)
            header, data, surplus = _parse(stream, name)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise InputError(f"{name}: the compressed stream is damaged or ends early ({error})") from error
    for warning in caught:
        logger.warning("%s: %s", name, " ".join(str(warning.message).split()))
    if surplus:
        logger.warning("%s: the file goes on after the map; the surplus bytes are ignored", name)
    _check_is_map(header, data, name)
    _check_right_angles(header, name)
    voxel_size = angpix if angpix else _voxel_size(header, name)
    order = _axis_order(header, name)
    starts = (int(header.nxstart), int(header.nystart), int(header.nzstart))
    nstart = [0, 0, 0]
    for axis, start in zip(order, starts, strict=True):
        nstart[axis] = start
    # The file's array axes are (section, row, column); say for z, y, x which of them holds it.
    transposed = data.transpose([2 - order.index(axis) for axis in (2, 1, 0)])
    values = np.ascontiguousarray(transposed, dtype=np.float32)
    check_finite(values, name)
    origin = (float(header.origin.x), float(header.origin.y), float(header.origin.z))
    if not np.isfinite(origin).all():
        logger.warning("%s: its header has no origin that is a number; taken as 0", name)
        origin = (0.0, 0.0, 0.0)
    return Volume(values, voxel_size, origin, (nstart[0], nstart[1], nstart[2]), _labels(header))


def read_array(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Map one of RELION's request arrays into memory.

    Parameters
    ----------
    path : path
        Mode 2. Nothing else in its header is trusted but its shape.
    shape : (z, y, x) int
        The shape that the request implies.

    Raises
    ------
    InputError
        Missing, truncated, of another mode or shape.
    """
    name = os.fspath(path)
    expected = " x ".join(map(str, shape))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mrcfile.mmap(path, mode="r", permissive=True) as mrc:
                mode, data = int(mrc.header.mode), mrc.data
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{name}: no readable MRC file ({_one_line(error)})") from error
    if data is None:
        raise InputError(f"{name}: truncated, expected a map of {expected} values; was the disk full?")
    if mode != 2:
        raise InputError(f"{name}: MRC mode {mode}, expected 2 (float32) as RELION writes it")
    if data.shape != shape:
        found = " x ".join(map(str, data.shape))
        raise InputError(f"{name}: shape {found} (z, y, x), expected {expected} from the request's box and padding")
    return np.asarray(data)


def write_volume(path: str | os.PathLike[str], volume: Volume, *, label: str, float16: bool = False) -> None:
    """Write a map whole (see `whole_file`), or to standard output for ``-``.

    Parameters
    ----------
    path : path
        An existing file is replaced: commands ask before (`check_target`). Compressed where the name ends in .gz or
        .bz2.
    volume : Volume
        Written as mode 2, or mode 12 with `float16`; axis order x fastest; space group 1.
    label : str
        Command and key numbers for the header; the version is added.

    Raises
    ------
    OutputError
        The file cannot be written.
    InputError
        Values that are not finite, or too large for `float16`.
    """
    text = f"cryored {__version__} {label}"[:79]
    check_finite(volume.data, f"{'standard output' if is_stream(path) else os.fspath(path)}: not written")
    largest = float(np.abs(volume.data).max()) if float16 else 0.0
    if largest > _FLOAT16_MAX:
        raise InputError(f"{os.fspath(path)}: values up to {largest:g}, but float16 ends at 65504; write float32")
    if is_stream(path):
        stdout_bytes().write(_encode(volume, text, float16))
        sys.stdout.flush()
        return
    suffix = Path(path).suffix.lower()
    with whole_file(path) as partial:
        if suffix in (".gz", ".bz2"):
            data = _encode(volume, text, float16)
            partial.write_bytes(gzip.compress(data) if suffix == ".gz" else bz2.compress(data))
            return
        with mrcfile.new(partial) as mrc:
            _fill(mrc, volume, text, float16)


def check_finite(data: npt.NDArray[Any], name: str) -> None:
    """Refuse a map (z, y, x) with NaN or infinity, saying how many there are and where the first is."""
    # A sum shows NaN and infinity in one fast pass; only a suspect sum is worth the exact count.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(data.sum()):
            return
    # Plane by plane, for maps may be large: a sum may also be infinite because the values are.
    count = sum(plane.size - np.count_nonzero(np.isfinite(plane)) for plane in data)
    if count:
        z, plane = next((z, plane) for z, plane in enumerate(data) if not np.isfinite(plane).all())
        y, x = np.argwhere(~np.isfinite(plane))[0]
        raise InputError(
            f"{name}: {count} values are not finite (NaN or infinity), the first at z={z} y={y} x={x}; "
            "expected numbers only"
        )


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file or a stream for reading, decompressed."""
    source: Path | io.BytesIO
    if is_stream(path) or Path(path).is_fifo():  # a pipe, by whatever name, can be read but once
        source = io.BytesIO(stdin_bytes().read() if is_stream(path) else Path(path).read_bytes())
        magic = source.getvalue()[:3]
    else:
        source = Path(path)
        with source.open("rb") as stream:
            magic = stream.read(3)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(source)  # type: ignore[return-value]
    if magic == b"BZh":
        return bz2.open(source)  # type: ignore[return-value]
    return source if isinstance(source, io.BytesIO) else source.open("rb")


def _parse(stream: BinaryIO, name: str) -> tuple[Any, npt.NDArray[Any], bool]:
    """Return header, data and whether bytes are left over."""
    _check_header(stream, name, _most_bytes(stream))
    try:
        mrc = MrcInterpreter(iostream=stream, permissive=True)
    except ValueError as error:
        raise InputError(f"{name}: no readable MRC file ({_one_line(error)})") from error
    header, data = mrc.header, mrc.data
    if header is None:
        raise InputError(f"{name}: no MRC header of 1024 bytes")
    mode = int(header.mode)
    if mode in _COMPLEX_MODES:
        raise InputError(f"{name}: MRC mode {mode} (complex), expected a real map (modes 0, 1, 2, 6, 12)")
    if data is None or data.size == 0:
        raise InputError(f"{name}: shorter than its header says, or no MRC file at all")
    return header, data, bool(stream.read(1))


def _most_bytes(stream: BinaryIO) -> float:
    """Return how many bytes a stream can hold at most, decompressed."""
    if isinstance(stream, bz2.BZ2File):
        return np.inf  # a run of zeros shrinks to next to nothing
    source = stream.fileobj if isinstance(stream, gzip.GzipFile) else stream
    at = source.tell()
    size = source.seek(0, os.SEEK_END)
    source.seek(at)
    return size * _DEFLATE_RATIO if isinstance(stream, gzip.GzipFile) else size


def _check_header(stream: BinaryIO, name: str, most: float) -> None:
    """Refuse what is no MRC file before mrcfile makes room for the gigabytes that its first bytes ask for.

    Parameters
    ----------
    most : float
        Bytes that the file can hold.
    """
    header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise InputError(f"{name}: {len(header)} bytes, shorter than the header of an MRC file")
    modes = [int.from_bytes(header[12:16], order) for order in ("little", "big")]
    if not set(modes) & set(_MODES):
        raise InputError(f"{name}: no MRC file (its mode would be {modes[0]}), expected a map")
    order = "<" if modes[0] in _MODES else ">"
    if modes[0] == modes[1] and header[212] == _BIG_ENDIAN:  # mode 0 reads the same in either
        order = ">"
    nx, ny, nz, mode = np.frombuffer(header[:16], f"{order}i4").tolist()
    extended = int(np.frombuffer(header[92:96], f"{order}i4")[0])
    asked = _HEADER_BYTES + max(extended, 0) + abs(nx * ny * nz) * _BYTES.get(mode, 1)
    if asked > most:
        beside = f" and an extended header of {extended} bytes" if extended else ""
        raise InputError(
            f"{name}: shorter than its header says: {nx} x {ny} x {nz} values{beside} need {asked} bytes, the file "
            f"holds at most {most:.0f}; "
            "it was cut off, or its header is damaged"
        )
    stream.seek(0)


def _check_is_map(header: Any, data: npt.NDArray[Any], name: str) -> None:
    group = int(header.ispg)
    if data.ndim == 4 or group >= 401:
        raise InputError(f"{name}: space group {group}, a stack of volumes; expected one map")
    if data.ndim != 3 or int(header.nz) == 1:
        raise InputError(f"{name}: one 2D image, expected a map")
    if group == 0 and int(header.mz) == 1:
        raise InputError(f"{name}: space group 0 with mz 1, a stack of images; expected a map")


def _check_right_angles(header: Any, name: str) -> None:
    angles = [float(header.cellb[axis]) for axis in ("alpha", "beta", "gamma")]
    # Old writers leave the angles at 0.
    if not all(angle == 0 or abs(angle - 90) <= _RIGHT for angle in angles):
        found = ", ".join(f"{angle:g}" for angle in angles)
        raise InputError(
            f"{name}: a cell with angles of {found} degrees, expected 90; resample the map on a cubic grid"
        )


def _voxel_size(header: Any, name: str) -> float:
    counts = (int(header.mx), int(header.my), int(header.mz))
    cell = (float(header.cella.x), float(header.cella.y), float(header.cella.z))
    if not np.isfinite(cell).all():
        found = " x ".join(f"{length:g}" for length in cell)
        raise InputError(
            f"{name}: a cell of {found} A in the header, expected numbers; give the pixel size by --angpix"
        )
    if min(counts) <= 0 or min(cell) <= 0:
        return 0.0
    sizes = [length / count for length, count in zip(cell, counts, strict=True)]
    if max(sizes) - min(sizes) > _ISOTROPY * max(sizes):
        found = " x ".join(f"{size:.5g}" for size in sizes)
        raise InputError(f"{name}: voxels of {found} A, expected cubes; resample the map first")
    # Six digits undo the float32 rounding of the cell, so that 144 A / 96 gives 1.5 and 1.0961 stays 1.0961.
    return float(f"{sizes[0]:.6g}")


def _labels(header: Any) -> tuple[str, ...]:
    texts = (bytes(label).split(b"\0")[0].decode("ascii", "replace").strip() for label in header.label)
    return tuple(text for text in texts if text)


def _axis_order(header: Any, name: str) -> list[int]:
    """Return which spatial axis (0 = x, 1 = y, 2 = z) columns, rows and sections run along."""
    order = [int(header.mapc) - 1, int(header.mapr) - 1, int(header.maps) - 1]
    if sorted(order) == [0, 1, 2]:
        return order
    if set(order) == {-1}:  # old writers leave the words empty
        return [0, 1, 2]
    raise InputError(f"{name}: axis order {[axis + 1 for axis in order]}, expected a permutation of 1, 2, 3")


def _fill(mrc: Any, volume: Volume, label: str, float16: bool) -> None:
    mrc.set_data(volume.data.astype(np.float16 if float16 else np.float32, copy=False))
    mrc.voxel_size = volume.voxel_size  # after the data: mrcfile needs the shape
    mrc.header.origin = volume.origin
    mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = volume.nstart
    mrc.header.label[0] = label.encode("ascii", "replace")
    mrc.header.nlabl = 1


def _encode(volume: Volume, label: str, float16: bool) -> bytes:
    stream = io.BytesIO()
    mrc = MrcInterpreter()
    mrc._iostream = stream
    mrc._create_default_attributes()
    _fill(mrc, volume, label, float16)
    mrc.flush()
    return stream.getvalue()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Stack:
    """The images of an open stack, read and written in runs, so that they are never in memory together."""

    def __init__(self, stream: io.BufferedRandom, box: int) -> None:
        self._stream = stream
        self._box = box

    def write(self, first: int, images: npt.NDArray[np.float32]) -> None:
        """Write images (m, box, box) from image `first` on, counted from 0."""
        self._seek(first)
        self._stream.write(np.ascontiguousarray(images, dtype=np.float32).data)

    def read(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """Return `count` images (count, box, box) from image `first` on; they may be changed in place."""
        self._seek(first)
        images = np.empty((count, self._box, self._box), dtype=np.float32)
        self._stream.readinto(images.data)
        return images

    def _seek(self, first: int) -> None:
        self._stream.seek(_HEADER_BYTES + first * self._box**2 * 4)


@contextmanager
def new_stack(path: str | os.PathLike[str], count: int, box: int, voxel_size: float, *, label: str) -> Iterator[Stack]:
    """Make a stack of images (mode 2, space group 0); it appears as `path` once the block has ended well.

    Parameters
    ----------
    path : path
        An existing file is replaced: commands ask before (`check_target`).
    count, box : int
        Number of images, and edge of each in pixels.
    voxel_size : float
        Edge of a pixel in angstrom.
    label : str
        Command and key numbers for the header; the version is added.
    """
    with whole_file(path) as partial:
        # Mapped only for header and length: writing to a map, a full disk would kill the process.
        with mrcfile.new_mmap(partial, (count, box, box), mrc_mode=2) as mrc:
            mrc.set_image_stack()
            mrc.voxel_size = voxel_size
            mrc.header.label[0] = f"cryored {__version__} {label}"[:79].encode("ascii", "replace")
            mrc.header.nlabl = 1
        with partial.open("r+b") as stream:
            yield Stack(stream, box)
