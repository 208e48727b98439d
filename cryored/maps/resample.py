"""Change the voxel size of a map in Fourier space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.fft

from cryored.maps.fourier import frequencies
from cryored.maps.volume import Floats, window
from cryored.threads import default_threads

SAME_PIXEL = 0.01  # relative difference below which two voxel sizes need no resampling
_GOOD_MATCH = 0.002  # relative error of the new voxel size that ends the search for a better padding


@dataclass(frozen=True)
class Grid:
    """How an axis is resampled: padded from `size` to `padded` voxels, which become `resampled` voxels."""

    size: int
    padded: int
    resampled: int


def plan_axis(size: int, voxel_size: float, target: float) -> Grid:
    """Choose the smallest padding of an axis for which a whole number of `target` voxels fits.

    Parameters
    ----------
    size : int
        Voxels along the axis.
    voxel_size, target : float
        Voxel sizes in angstrom, before and after.

    Returns
    -------
    Grid
        ``padded * voxel_size / resampled`` is within 0.2 % of `target` (or as near as 32 voxels more allow).
    """
    if abs(voxel_size / target - 1) <= SAME_PIXEL:
        return Grid(size, size, size)
    best, best_error = Grid(size, size, size), np.inf
    for padded in range(size, size + 32):
        resampled = max(1, round(padded * voxel_size / target))
        error = abs(padded * voxel_size / (resampled * target) - 1)
        if error < best_error:
            best, best_error = Grid(size, padded, resampled), error
        if error <= _GOOD_MATCH:
            break
    return best


def to_grid(data: Floats, grids: tuple[Grid, Grid, Grid], fill: float) -> Floats:
    """Resample a map forward along z, y, x; voxels that the padding adds get the value `fill`."""
    padded = window(data, tuple(grid.padded for grid in grids), fill)
    return fourier_resize(padded, tuple(grid.resampled for grid in grids))


def from_grid(data: Floats, grids: tuple[Grid, Grid, Grid], weights: Floats | None = None) -> Floats:
    """Resample a map back along z, y, x and cut the padding off; `weights` filter it first, see `fourier_resize`."""
    padded = fourier_resize(data, tuple(grid.padded for grid in grids), weights=weights)
    return window(padded, tuple(grid.size for grid in grids))


def interpolate(data: Floats, grids: tuple[Grid, Grid, Grid]) -> Floats:
    """Resample as `from_grid` does, but linearly: blurred, and no value leaves the range of the data."""
    from scipy.ndimage import affine_transform

    step = [grid.resampled / grid.padded for grid in grids]
    first = [grid.resampled // 2 - grid.size // 2 * along for grid, along in zip(grids, step, strict=True)]
    shape = tuple(grid.size for grid in grids)
    return affine_transform(data, step, first, output_shape=shape, order=1, mode="nearest")


def fourier_resize(
    data: Floats, shape: tuple[int, ...], threads: int | None = None, *, weights: Floats | None = None
) -> Floats:
    """Crop or pad the transform of a centred map so that it has `shape`; densities keep their values.

    The lone Nyquist coefficients of even axes are dropped where an axis changes: they have no partner to stay real
    with. `weights`, of the shape of the half-transform of `data`, multiply it.
    """
    if data.shape == tuple(shape) and weights is None:
        return data
    workers, last = threads or default_threads(), data.ndim - 1
    # Each axis is cropped as soon as it is transformed, and padded just before it is transformed back.
    transform = scipy.fft.rfft(data, workers=workers)
    for axis in range(last, -1, -1):
        if axis != last:
            transform = scipy.fft.fft(transform, axis=axis, overwrite_x=True, workers=workers)
        if weights is None and shape[axis] < data.shape[axis]:
            transform = _resize_axis(transform, axis, data.shape[axis], shape[axis], half=axis == last)
    if weights is not None:
        transform *= weights
    for axis, (old, new) in enumerate(zip(data.shape, shape, strict=True)):
        if old != new:
            shift = _shift(transform.shape[axis], old, new, half=axis == last).astype(transform.dtype)
            transform *= shift.reshape((-1,) + (1,) * (last - axis))
            if weights is not None or new > old:
                transform = _resize_axis(transform, axis, old, new, half=axis == last)
        if axis != last:
            transform = scipy.fft.ifft(transform, axis=axis, overwrite_x=True, workers=workers)
    return scipy.fft.irfft(transform, shape[last], overwrite_x=True, workers=workers)


def _shift(points: int, old: int, new: int, half: bool) -> npt.NDArray[np.complex128]:
    """Return by what the coefficients of an axis are multiplied when its edge changes from `old` to `new`.

    The centre n // 2 moves by a fraction of a voxel where an edge is odd, and densities keep their values.
    """
    frequency = np.arange(points) if half else frequencies(points)
    return new / old * np.exp(2j * np.pi * frequency * (old // 2 / old - new // 2 / new))


def _resize_axis(
    transform: npt.NDArray[np.complexfloating], axis: int, old: int, new: int, half: bool
) -> npt.NDArray[np.complexfloating]:
    kept = (min(old, new) - 1) // 2  # frequencies -kept .. kept
    shape = list(transform.shape)
    shape[axis] = new // 2 + 1 if half else new
    resized = np.zeros(shape, dtype=transform.dtype)
    before = (slice(None),) * axis
    positive, negative = (*before, slice(0, kept + 1)), (*before, slice(-kept, None))
    resized[positive] = transform[positive]
    if not half and kept > 0:
        resized[negative] = transform[negative]
    return resized
