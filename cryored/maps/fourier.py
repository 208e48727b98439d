"""The Fourier convention, and RELION's scale factors. All other modules refer to this one.

A map is real, with its centre at ``n // 2`` of each axis. Its transform is ``rfftn`` over z, y, x of the map
rolled so that the centre comes first: half-complex shape (nz, ny, nx // 2 + 1), zero frequency at [0, 0, 0],
no factor on the forward transform (scipy's default).

RELION's padded arrays B and K have ``N = round(pad * ori)`` points a side, and
``map = inverse(B / K) / (pad**3 * ori)`` where *inverse* has no factor 1/N**3.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.fft

from cryored.maps.volume import Floats, raised_cosine
from cryored.threads import default_threads

Complexes = npt.NDArray[np.complexfloating]
Integers = npt.NDArray[np.int32]

_LOWPASS_EDGE = 2  # shells over which a low-pass filter falls, as in RELION


def forward(data: Floats, threads: int | None = None) -> Complexes:
    """Transform a centred map (z, y, x) to its half-transform; float32 gives complex64."""
    return scipy.fft.rfftn(scipy.fft.ifftshift(data), workers=threads or default_threads())


def inverse(transform: Complexes, shape: tuple[int, int, int], threads: int | None = None) -> Floats:
    """Transform a half-transform back to a centred map of `shape`."""
    data = scipy.fft.irfftn(transform, s=shape, workers=threads or default_threads())
    return scipy.fft.fftshift(data)


def frequencies(n: int) -> Integers:
    """Return the integer frequencies 0, 1, ..., -1 of an axis with `n` points."""
    return np.rint(np.fft.fftfreq(n) * n).astype(np.int32)


def half_frequencies(n: int) -> Integers:
    """Return the integer frequencies 0, 1, ..., n // 2 of a half axis."""
    return np.arange(n // 2 + 1, dtype=np.int32)


def multiplicity(n: int) -> npt.NDArray[np.float32]:
    """Return of how many coefficients of the whole transform those of a half-transform's n // 2 + 1 columns stand."""
    # All but those of x = 0 and of Nyquist have a conjugate that is left out.
    return np.where((2 * half_frequencies(n)) % n == 0, 1, 2).astype(np.float32)


def squared_radius(n: int) -> Integers:
    """Return k**2 of the half-transform of a cube, in squared Fourier voxels: (n, n, n // 2 + 1) int32."""
    full = frequencies(n) ** 2
    return full[:, None, None] + full[None, :, None] + (half_frequencies(n) ** 2)[None, None, :]


def spatial_frequency(shape: tuple[int, int, int], voxel_size: float) -> npt.NDArray[np.float32]:
    """Return |k| in 1/angstrom of the half-transform of a map of any shape."""
    squares = [(frequencies(n) / (n * voxel_size)) ** 2 for n in shape[:2]]
    half = (half_frequencies(shape[2]) / (shape[2] * voxel_size)) ** 2
    total = squares[0][:, None, None] + squares[1][None, :, None] + half[None, None, :]
    return np.sqrt(total, dtype=np.float32)


def shell_index(shape: tuple[int, int, int]) -> Integers:
    """Return RELION's shell ROUND(radius) of each coefficient, in units of 1 / (longest edge).

    Shell i is at i / (n * voxel_size) 1/angstrom with n the longest edge; a cube has n // 2 + 1 shells up to
    Nyquist, and its corners reach beyond.
    """
    longest = max(shape)
    # Half up, as RELION rounds; numpy's rint goes to the even neighbour.
    return np.floor(spatial_frequency(shape, 1.0 / longest) + 0.5).astype(np.int32)


def apply_filter(data: Floats, weights: Floats, threads: int | None = None) -> Floats:
    """Multiply the half-transform of a map by weights of its shape; where the centre is makes no difference."""
    workers = threads or default_threads()
    transform = scipy.fft.rfftn(data, workers=workers)
    transform *= weights
    return scipy.fft.irfftn(transform, s=data.shape, overwrite_x=True, workers=workers)


def apply_shells(data: Floats, weights: Floats, threads: int | None = None) -> Floats:
    """Multiply each shell of a map by a weight; beyond the last weight the map becomes 0."""
    index = np.minimum(shell_index(data.shape), len(weights))
    return apply_filter(data, np.append(weights, 0.0).astype(np.float32)[index], threads)


def low_pass(data: Floats, voxel_size: float, resolution: float, threads: int | None = None) -> Floats:
    """Filter a map to `resolution` in angstrom, by a raised cosine two shells wide centred there."""
    longest = max(data.shape)
    shell = longest * voxel_size / resolution
    radius = np.arange(longest // 2 + 1)
    return apply_shells(data, raised_cosine((radius - shell) / _LOWPASS_EDGE + 0.5), threads)


def shell_power(transform: Complexes, shape: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Return the mean power |F|**2 of each shell up to Nyquist."""
    return shell_mean(transform.real**2 + transform.imag**2, shape)


def shell_mean(values: Floats, shape: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Return the mean over each shell up to Nyquist of numbers on the half-transform of a map of `shape`."""
    index = shell_index(shape).ravel()
    size = max(shape) // 2 + 1
    total = np.bincount(index, weights=values.ravel(), minlength=size)[:size]
    return total / np.maximum(np.bincount(index, minlength=size)[:size], 1)


def relion_scale(pad: float, ori: int) -> float:
    """Return pad**3 * ori, by which RELION's transform of a map is larger than its mean over voxels."""
    return pad**3 * ori


def padded_size(pad: float, ori: int) -> int:
    """Return N, the edge of RELION's padded transform."""
    return math.floor(pad * ori + 0.5)
