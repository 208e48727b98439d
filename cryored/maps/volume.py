"""A map with its grid: the value that all numerics pass around."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Volume:
    """A real-space map.

    Parameters
    ----------
    data : (z, y, x) float32
        Density. The centre of the map is the voxel ``n // 2`` of each axis.
    voxel_size : float
        Edge of a voxel in angstrom; 0 where it is unknown.
    origin : (x, y, z) float
        ORIGIN of the MRC header, in angstrom.
    nstart : (x, y, z) int
        NXSTART, NYSTART, NZSTART of the MRC header, in voxels.
    labels : tuple of str
        Those of the MRC header that it was read from: what was done to these densities.
    """

    data: Floats
    voxel_size: float
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    nstart: tuple[int, int, int] = (0, 0, 0)
    labels: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along z, y, x."""
        z, y, x = self.data.shape
        return z, y, x

    def with_data(self, data: Floats) -> Volume:
        """Return other densities on the same grid."""
        if data.shape != self.data.shape:
            raise InputError(f"data of shape {data.shape} do not fit a grid of shape {self.data.shape}")
        return dataclasses.replace(self, data=data, labels=())

    def with_voxel_size(self, voxel_size: float) -> Volume:
        """Return the same densities with another voxel size in angstrom."""
        return dataclasses.replace(self, voxel_size=voxel_size)


def window(data: Floats, shape: tuple[int, ...], fill: float = 0.0) -> Floats:
    """Crop or pad an array about its centre ``n // 2``, axis by axis.

    Parameters
    ----------
    data : ndarray
        Any number of axes.
    shape : tuple of int
        New length of each axis.
    fill : float
        Value of the voxels that `data` does not cover.

    Returns
    -------
    ndarray of `shape`, dtype of `data`; a view where nothing has to be filled.
    """
    inner, outer = [], []
    for old, new in zip(data.shape, shape, strict=True):
        start = old // 2 - new // 2
        inner.append(slice(max(start, 0), min(start + new, old)))
        offset = max(-start, 0)
        outer.append(slice(offset, offset + min(start + new, old) - max(start, 0)))
    cropped = data[tuple(inner)]
    if cropped.shape == tuple(shape):
        return cropped
    padded = np.full(shape, fill, dtype=data.dtype)
    padded[tuple(outer)] = cropped
    return padded


def squared_distance(shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Return the squared distance in voxels from the centre ``n // 2``, as integers."""
    total = np.zeros((1,) * len(shape), dtype=np.int32)
    for axis, n in enumerate(shape):
        squares = (np.arange(n, dtype=np.int32) - n // 2) ** 2
        total = total + squares.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return total


def soft_sphere(shape: tuple[int, int, int], radius: float, edge: float) -> npt.NDArray[np.float32]:
    """Return a spherical mask: 1 up to `radius` voxels, then a raised cosine of width `edge` down to 0."""
    distance = np.sqrt(squared_distance(shape), dtype=np.float32)
    return raised_cosine((distance - radius) / max(edge, 1e-6)).astype(np.float32)


def raised_cosine(t: Floats) -> Floats:
    """Fall from 1 at t <= 0 to 0 at t >= 1 along half a cosine."""
    return 0.5 + 0.5 * np.cos(np.pi * np.clip(t, 0.0, 1.0))
