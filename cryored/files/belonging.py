"""Maps that are used together: whether two half-maps, a mask, a truth and a request belong to each other."""

from __future__ import annotations

import logging
import os

import numpy as np

from cryored.errors import InputError
from cryored.files.mrc import read_volume
from cryored.files.output import is_stream
from cryored.files.requests import Request
from cryored.maps.mask import relion_mask
from cryored.maps.network_scale import solvent_level
from cryored.maps.volume import Floats, Volume

AnyPath = str | os.PathLike[str]

SAME_SIZE = 0.01  # relative difference of pixel sizes below which two maps share a grid
_MASK_TOLERANCE = 1e-6
_LEVEL = 0.5  # of the solvent over the standard deviation, from which on it changes what is told of the molecule

logger = logging.getLogger(__name__)


def name_of(path: AnyPath) -> str:
    """Return what messages call a file."""
    return "standard input" if is_stream(path) else os.fspath(path)


def check_pair(names: tuple[str, str], first: Volume, second: Volume) -> float:
    """Refuse two maps that cannot be compared; return their voxel size in angstrom, 0 where neither tells.

    Raises
    ------
    InputError
        A map is constant, or their grids differ.
    """
    for name, volume in zip(names, (first, second), strict=True):
        if np.ptp(volume.data) == 0:
            raise InputError(f"{name}: all voxels are {volume.data.flat[0]:g}, expected a map with density")
    _check_shape(names[1], second, names[0], first)
    size1, size2 = first.voxel_size, second.voxel_size
    if size1 and size2 and abs(size1 - size2) > SAME_SIZE * max(size1, size2):
        raise InputError(
            f"{names[1]}: pixel size {size2:g} A, expected {size1:g} A as in {names[0]}; resample one map, "
            "or give --angpix if a header is wrong"
        )
    return size1 or size2


def read_mask(path: AnyPath, name: str, volume: Volume, angpix: float | None = None) -> Floats:
    """Read the mask of a map of that name; its pixel size in the header, or the one given instead, does not count.

    Raises
    ------
    InputError
        It cannot be read, is of another shape, empty, or not from 0 to 1.
    """
    mask = read_volume(path, angpix=angpix)
    _check_shape(name_of(path), mask, name, volume)
    low, high = float(mask.data.min()), float(mask.data.max())
    if low < -_MASK_TOLERANCE or high > 1 + _MASK_TOLERANCE:
        raise InputError(
            f"{name_of(path)}: values from {low:.8g} to {high:.8g}, expected a mask from 0 to 1; rescale it"
        )
    if high <= 0:
        raise InputError(f"{name_of(path)}: 0 everywhere, expected a mask from 0 to 1; was the threshold too high?")
    return mask.data


def auto_mask(name: str, volume: Volume) -> Floats:
    """Return the mask that `cryored mask` makes of a map of that name.

    Raises
    ------
    InputError
        None can be made: the pixel size is unknown, the map is inverted or has no molecule.
    """
    try:
        return relion_mask(volume)[0].data
    except InputError as error:
        remedy = "or make a mask with cryored mask --threshold DENSITY and give that"
        raise InputError(f"{name}: no mask can be made by itself: {error}; {remedy}") from None


def check_truth(name: str, truth: Volume, request: Request) -> None:
    """Refuse a truth in another box or of another pixel size than a request's.

    Raises
    ------
    InputError
    """
    same_size = not truth.voxel_size or abs(truth.voxel_size / request.pixel_size - 1) <= SAME_SIZE
    if truth.shape != (request.ori,) * 3 or not same_size:
        found = " x ".join(map(str, reversed(truth.shape)))
        raise InputError(
            f"{name}: {found} voxels of {truth.voxel_size:g} A, expected the run's {request.ori} of "
            f"{request.pixel_size:g} A; make it with cryored simulate map --box {request.ori} --angpix "
            f"{request.pixel_size:g}, or resample and crop it"
        )


def warn_of_level(name: str, volume: Volume, expected: str) -> None:
    """Warn of solvent that is not at 0: it counts as signal, within a mask as in projections."""
    level, deviation = solvent_level(volume.data), float(volume.data.std())
    if abs(level) > _LEVEL * deviation:
        logger.warning(
            "%s: solvent at %.3g, %.1f times the map's standard deviation, expected %s: subtract it",
            name,
            level,
            abs(level) / deviation,
            expected,
        )


def _check_shape(name: str, volume: Volume, other_name: str, other: Volume) -> None:
    if volume.shape != other.shape:
        found, expected = (" x ".join(map(str, reversed(v.shape))) for v in (volume, other))
        raise InputError(
            f"{name}: {found} voxels (x, y, z), expected {expected} as in {other_name}; resample or crop one"
        )
