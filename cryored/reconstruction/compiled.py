"""The inner loops of projection and back-projection, compiled: the only module that imports numba.

Linear interpolation is RELION's: a slice's point k lies at A^T k of the map's transform (see
`cryored.reconstruction.projection`), scaled by the padding, between eight grid points; where its x is negative, minus
the point is taken, and the complex conjugate. Frequencies serve as indices: negative ones count from the axis's end.
The loops let go of the interpreter's lock, so that threads can share the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

F = TypeVar("F", bound=Callable[..., Any])
Complexes = npt.NDArray[np.complex64]
Singles = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def _compiled(function: F) -> F:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder where the compiled code could be kept
        return numba.njit(nogil=True)(function)


@_compiled
def _ramps(x: float, y: float, box: int, along_x: Complexes, along_y: Complexes) -> None:
    """Fill the factors that move an image by x and y pixels: (n // 2 + 1,) and (n,) complex64."""
    for k in range(len(along_x)):
        angle = -2.0 * math.pi * k * x / box
        along_x[k] = complex(math.cos(angle), math.sin(angle))
    for i in range(box):
        k = i if i < len(along_x) else i - box
        angle = -2.0 * math.pi * k * y / box
        along_y[i] = complex(math.cos(angle), math.sin(angle))


@_compiled
def _interpolated(transform: Complexes, x: float, y: float, z: float) -> Any:
    """Return the value between eight grid points; x is not negative."""
    x0, y0, z0 = math.floor(x), math.floor(y), math.floor(z)
    fx, fy, fz = np.float32(x - x0), np.float32(y - y0), np.float32(z - z0)
    x1, y1, z1 = min(x0 + 1, transform.shape[2] - 1), y0 + 1, z0 + 1  # at the axis's very end the weight of x1 is 0
    gx = np.float32(1) - fx
    c00 = gx * transform[z0, y0, x0] + fx * transform[z0, y0, x1]
    c01 = gx * transform[z0, y1, x0] + fx * transform[z0, y1, x1]
    c10 = gx * transform[z1, y0, x0] + fx * transform[z1, y0, x1]
    c11 = gx * transform[z1, y1, x0] + fx * transform[z1, y1, x1]
    c0 = c00 + fy * (c01 - c00)
    c1 = c10 + fy * (c11 - c10)
    return c0 + fz * (c1 - c0)


@_compiled
def extract_slices(transform: Complexes, rotations: Doubles, padding: float, out: Complexes) -> None:
    """Read central slices; what is at or beyond Nyquist becomes 0.

    Parameters
    ----------
    transform : (N, N, N // 2 + 1) complex64
        Padded map, zero frequency at [0, 0, 0].
    rotations : (m, 3, 3) float64
    padding : float
        N over the box of the slices.
    out : (m, n, n // 2 + 1) complex64
    """
    box, half = out.shape[1], out.shape[2]
    for m in range(len(out)):
        a = rotations[m] * padding
        for i in range(box):
            y = i if i <= (box - 1) // 2 else i - box
            for x in range(half):
                if 4 * (x * x + y * y) >= box * box:
                    out[m, i, x] = 0.0
                    continue
                xp = a[0, 0] * x + a[1, 0] * y
                yp = a[0, 1] * x + a[1, 1] * y
                zp = a[0, 2] * x + a[1, 2] * y
                mirrored = xp < 0
                if mirrored:
                    xp, yp, zp = -xp, -yp, -zp
                value = _interpolated(transform, xp, yp, zp)
                out[m, i, x] = value.conjugate() if mirrored else value


@_compiled
def insert_slices(
    slices: Complexes,
    weights: Singles,
    index: Integers,
    factors: Doubles,
    shifts: Doubles,
    rotations: Doubles,
    r_max: int,
    padding: float,
    data: Complexes,
    weight: Singles,
) -> None:
    """Add central slices and their weights to a padded half-transform, up to radius `r_max` of the slices.

    Parameters
    ----------
    slices : (m, n, n // 2 + 1) complex64
        Already multiplied by their weights (images times CTF over noise power, in a refinement).
    weights : (m or 1, n, n // 2 + 1) float32
        CTF squared over noise power; one for all slices, or one each.
    index : (j,) int64
        Which slice each of j insertions takes: a slice may be inserted at several rotations.
    factors : (j,) float64
        Multiplies slice and weight: the probability of the rotation.
    shifts : (j, 2) float64
        Where the particle is, x and y in pixels from the centre; it is brought back.
    rotations : (j, 3, 3) float64
    r_max : int
    padding : float
    data, weight : (N, N, N // 2 + 1) complex64, float32
        Added to. In the plane x = 0 a point and its mate at minus the point hold a part of the sum each: see
        `cryored.reconstruction.back_projection.BackProjector.sums`.
    """
    box, half = slices.shape[1], slices.shape[2]
    limit = (r_max * padding) ** 2
    ramp_x = np.empty(half, np.complex64)
    ramp_y = np.empty(box, np.complex64)
    for j in range(len(index)):
        m = index[j]
        own = m if len(weights) > 1 else 0
        factor = np.float32(factors[j])
        a = rotations[j] * padding
        _ramps(-shifts[j, 0], -shifts[j, 1], box, ramp_x, ramp_y)
        for i in range(box):
            y = i if i < half else i - box  # Nyquist is positive, as in RELION
            # Of the line x = 0, the half at negative y repeats the other.
            for x in range(0 if y >= 0 else 1, half):
                if x * x + y * y > r_max * r_max:
                    break
                w = factor * weights[own, i, x]
                if w <= 0:
                    continue
                value = factor * slices[m, i, x] * ramp_x[x] * ramp_y[i]
                xp = a[0, 0] * x + a[1, 0] * y
                yp = a[0, 1] * x + a[1, 1] * y
                zp = a[0, 2] * x + a[1, 2] * y
                if xp * xp + yp * yp + zp * zp > limit:
                    continue
                if xp < 0:
                    xp, yp, zp = -xp, -yp, -zp
                    value = value.conjugate()
                x0, y0, z0 = math.floor(xp), math.floor(yp), math.floor(zp)
                fx, fy, fz = np.float32(xp - x0), np.float32(yp - y0), np.float32(zp - z0)
                for dz in range(2):
                    wz = fz if dz else np.float32(1) - fz
                    iz = z0 + dz
                    for dy in range(2):
                        wzy = wz * (fy if dy else np.float32(1) - fy)
                        iy = y0 + dy
                        part = wzy * (np.float32(1) - fx)
                        data[iz, iy, x0] += part * value
                        weight[iz, iy, x0] += part * w
                        if x0 + 1 < data.shape[2]:
                            part = wzy * fx
                            data[iz, iy, x0 + 1] += part * value
                            weight[iz, iy, x0 + 1] += part * w


@_compiled
def log_likelihoods(
    transform: Complexes,
    padding: float,
    slices: Complexes,
    weights: Singles,
    rotations: Doubles,
    shifts: Doubles,
    r_max: int,
    out: Doubles,
) -> None:
    """Compare images with a reference in several poses each.

    The logarithm of the likelihood, up to a constant of the image: the sum over independent coefficients up to
    `r_max`, without the zero frequency, of ``2 Re(conj(image) CTF ref) / noise - CTF^2 |ref|^2 / noise``.

    Parameters
    ----------
    transform : (N, N, N // 2 + 1) complex64
        The reference, padded.
    padding : float
    slices : (m, n, n // 2 + 1) complex64
        Images times CTF over noise power.
    weights : (m, n, n // 2 + 1) float32
        CTF squared over noise power, the mean of |noise|^2 of a coefficient.
    rotations : (m, c, 3, 3) float64
    shifts : (m, c, 2) float64
        x and y of the particle in pixels.
    r_max : int
    out : (m, c) float64
    """
    box, half = slices.shape[1], slices.shape[2]
    ramp_x = np.empty(half, np.complex64)
    ramp_y = np.empty(box, np.complex64)
    for m in range(len(slices)):
        for c in range(rotations.shape[1]):
            a = rotations[m, c] * padding
            _ramps(-shifts[m, c, 0], -shifts[m, c, 1], box, ramp_x, ramp_y)
            total = 0.0
            for i in range(box):
                y = i if i < half else i - box
                if abs(y) > r_max:
                    continue
                line = 0.0
                for x in range(0 if y > 0 else 1, half):
                    if x * x + y * y > r_max * r_max:
                        break
                    xp = a[0, 0] * x + a[1, 0] * y
                    yp = a[0, 1] * x + a[1, 1] * y
                    zp = a[0, 2] * x + a[1, 2] * y
                    mirrored = xp < 0
                    if mirrored:
                        xp, yp, zp = -xp, -yp, -zp
                    value = _interpolated(transform, xp, yp, zp)
                    if mirrored:
                        value = value.conjugate()
                    image = slices[m, i, x] * ramp_x[x] * ramp_y[i]
                    cross = value.real * image.real + value.imag * image.imag
                    square = value.real * value.real + value.imag * value.imag
                    line += np.float32(2) * cross - weights[m, i, x] * square
                total += line
            out[m, c] = total
