"""The MAP update as RELION computes it, and the CW-RED update (Kimanius et al. 2021, eqs. 11 and 17).

Arrays in, arrays out. All arithmetic on volumes is in float32, because RELION's B and K and its maps are float32
files and nothing would be gained; spectra, tables and sums are float64.

Volumes are worked on in slabs, and each axis is transformed only where something is: the padded transform never
exists as a whole, which takes half the time and a fraction of the memory of one padded FFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.fft

from cryored.errors import InputError
from cryored.maps.fourier import frequencies, padded_size, relion_scale
from cryored.maps.volume import squared_distance
from cryored.threads import default_threads, parallel, parts

_SLAB = 1 << 17  # elements worked on at a time: a few arrays of it fit a core's cache
_MASK_EDGE = 3.0  # voxels, RELION's soft edge of the sphere
_FLOOR = 1e-3  # fraction of a shell's mean weight below which no weight falls
_LEAST = 1e-30  # least pad**3 * tau2_fudge * tau2: no data outweigh its inverse, which float32 still holds

Array = npt.NDArray[np.float32]
Shells = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
T = TypeVar("T")


@dataclass(frozen=True)
class Accumulators:
    """RELION's B and K: the sums of the back-projected images and of their weights.

    Parameters
    ----------
    real, imag, weight : (N, N, N // 2 + 1) float32
        Half-transforms, zero frequency at [0, 0, 0]; may be memory maps.
    ori : int
        Box of the map.
    pad : float
        Padding factor: N = round(pad * ori).
    r_max : int
        Half the current image size; beyond it B and K count as 0.
    """

    real: Array
    imag: Array
    weight: Array
    ori: int
    pad: float
    r_max: int
    # Sums of K by shell, once they are known: a request's maps share them, and the pass takes as long as an FFT.
    _shell_sums: list[Shells] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def n(self) -> int:
        """Edge of the padded transform."""
        return padded_size(self.pad, self.ori)


@dataclass(frozen=True)
class Denoised:
    """A denoised map f and how far to trust it: x = (B + g f / v) / (K + 1 / v), eq. 17 where v is tau2's term.

    Parameters
    ----------
    data : (ori, ori, ori) float32
        In real space, on the grey scale of the map.
    gain : (ori // 2 + 1,) float64
        g of each shell, the lambda of eq. 17.
    extrapolate : bool
        Where tau2 is 0 and beyond r_max, take g f itself, the limit of the equation.
    precision : (ori // 2 + 1,) float64, optional
        By what factor 1 / v exceeds the inverse prior of the shell; 1 by default.
    """

    data: Array
    gain: Shells
    extrapolate: bool = False
    precision: Shells | None = None


def inverse_prior(tau2: Shells, tau2_fudge: float, pad: float) -> Shells:
    """Return 1 / (pad**3 * tau2_fudge * tau2) of each shell, at most 1e30, and 0 where tau2 is 0."""
    scaled = pad**3 * tau2_fudge * np.asarray(tau2, dtype=np.float64)
    return np.divide(1.0, np.maximum(scaled, _LEAST), out=np.zeros_like(scaled), where=scaled > 0)


def check_accumulators(sums: Accumulators, names: tuple[str, str, str], threads: int | None = None) -> None:
    """Refuse B and K that are not finite, and a weight that is negative or zero throughout.

    Parameters
    ----------
    names : (str, str, str)
        Files of the real part, the imaginary part and the weight, for the message.
    """
    planes = max(1, _SLAB // sums.weight[0].size)

    def extremes(array: Array) -> Callable[[slice], tuple[float, float]]:
        return lambda part: (float(array[part].min()), float(array[part].max()))

    for name, array in zip(names, (sums.real, sums.imag, sums.weight), strict=True):
        found = parallel(extremes(array), parts(len(array), planes), threads)
        low, high = min(item[0] for item in found), max(item[1] for item in found)
        if not np.isfinite([item for pair in found for item in pair]).all():
            bad = int((~np.isfinite(array)).sum())
            raise InputError(f"{name}: {bad} values are NaN or infinite, expected numbers; RELION's run has diverged")
    if low < 0:
        raise InputError(f"{names[2]}: weights down to {low:g}, expected 0 or more")
    if high == 0:
        raise InputError(f"{names[2]}: all weights are 0: no particle contributed to this reconstruction")


def reconstruct(
    sums: Accumulators,
    *,
    prior: Shells | None = None,
    denoised: Denoised | None = None,
    threads: int | None = None,
) -> Array:
    """Reconstruct a map from B and K.

    Parameters
    ----------
    sums : Accumulators
    prior : (ori // 2 + 1,) float64, optional
        `inverse_prior` of each shell: the MAP map, eq. 11. Without it the unregularised map B / K.
    denoised : Denoised, optional
        With `prior`: the CW-RED map.
    threads : int, optional

    Returns
    -------
    (ori, ori, ori) float32
        Equal to ``relion_external_reconstruct --skip_gridding`` (with ``--no_map`` without `prior`) to float32
        rounding: BackProjector::reconstruct and softMaskOutsideMap of RELION 3.1 to 5.
    """
    threads = threads or default_threads()
    tables = _Tables.build(sums, prior, denoised, threads)
    source = None if denoised is None else _partial_forward(sums, denoised, tables.reach, threads)
    columns = _quotient_columns(sums, tables, source, threads)
    return _finish(sums, columns, tables.reach, threads)


def estimated_fsc(sums: Accumulators, tau2: Shells, *, threads: int | None = None) -> Shells:
    """Return the FSC that a map should have to another one from as many images, by its own tau2 and K.

    S / (1 + S) with the signal-to-noise ratio S = pad**3 tau2 K of each shell, K its mean. In auto-refine tau2 is made
    from the FSC by this equation, so that it comes back exactly where the tau2 fudge factor, which is in tau2, is 1. In
    Class3D tau2 is the power of the last iteration's map.

    Parameters
    ----------
    sums : Accumulators
    tau2 : (ori // 2 + 1,) float64
        As in the request.
    threads : int, optional

    Returns
    -------
    (ori // 2 + 1,) float64; 0 from r_max on.
    """
    bins = np.minimum(_round_array(np.sqrt(np.arange(_known(sums), dtype=np.float64)) / sums.pad), sums.r_max)
    mean = _radial_sums(sums, bins, threads or default_threads()) / np.maximum(_radial_counts(sums, bins), 1)
    ratio = sums.pad**3 * tau2[: sums.r_max] * mean
    fsc = np.zeros(len(tau2))
    fsc[: sums.r_max] = ratio / (1 + ratio)
    return fsc


@dataclass(frozen=True)
class _Tables:
    """What the update needs to know of a coefficient, as functions of its integer k**2.

    The last entry stands for everything outside: there the denominator is infinite, so the quotient is 0.
    """

    reach: int  # no coefficient has a larger frequency along any axis
    end: int  # k**2 from which on all is outside
    prior: npt.NDArray[np.float32]  # what is added to K
    floor: npt.NDArray[np.float32]  # the least denominator
    pull: npt.NDArray[np.float32]  # g / v: weight of the denoised transform
    empty: npt.NDArray[np.bool_] | None  # where tau2 is 0 although there are data
    limit: npt.NDArray[np.float32] | None  # where not 0: the result is this times the denoised transform

    @classmethod
    def build(cls, sums: Accumulators, prior: Shells | None, denoised: Denoised | None, threads: int) -> _Tables:
        known = _known(sums)
        extrapolate = denoised is not None and denoised.extrapolate
        size = _round(sums.ori // 2 * sums.pad) ** 2 + 1 if extrapolate else known
        radius = np.sqrt(np.arange(size + 1, dtype=np.float64))
        shell = np.minimum(_round_array(radius / sums.pad), sums.ori // 2)
        inside = np.arange(size + 1) < known
        inverse = prior
        if prior is not None and denoised is not None and denoised.precision is not None:
            inverse = prior * denoised.precision
        added = np.zeros(size + 1) if inverse is None else np.where(inside, inverse[shell], 0.0)
        empty = None
        if prior is not None and (prior[shell[inside]] == 0).any():
            empty = inside & (prior[shell] == 0)
        floor = _floor(sums, added, empty, threads)[np.minimum((radius / sums.pad).astype(int), sums.r_max - 1)]
        # A shell without any weight has nothing to divide: 0, as outside.
        floor[~inside] = np.inf
        floor[(floor == 0) & (added == 0)] = np.inf
        pull, limit = np.zeros(size + 1), None
        if denoised is not None and prior is not None:
            pull = denoised.gain[shell] * added
            if extrapolate:
                unknown = ~inside if empty is None else ~inside | empty
                limit = np.where(unknown, denoised.gain[shell], 0.0).astype(np.float32)
                limit[-1] = 0.0
        return cls(
            reach=min(int(np.sqrt(size - 1)), sums.n // 2),
            end=size,
            prior=added.astype(np.float32),
            floor=floor.astype(np.float32),
            pull=pull.astype(np.float32),
            empty=empty,
            limit=limit,
        )


def _floor(sums: Accumulators, added: Shells, empty: npt.NDArray[np.bool_] | None, threads: int) -> Shells:
    """Return a thousandth of the mean denominator in each shell FLOOR(|k| / pad) below r_max."""
    end = _round((sums.r_max * sums.pad) ** 2)  # RELION's bound here, not the square of the rounded radius
    bins = np.minimum((np.sqrt(np.arange(end, dtype=np.float64)) / sums.pad).astype(np.intp), sums.r_max)
    if not sums._shell_sums:
        sums._shell_sums.append(_radial_sums(sums, bins, threads))
    total = sums._shell_sums[0] + _radial_counts(sums, bins, added)
    if empty is not None:

        def own(weight: Array, k2: Indices) -> Array:
            return np.where(np.take(empty, k2, mode="clip") & (weight > 1e-20), _own_prior(weight), 0)

        total += _radial_sums(sums, bins, threads, own)
    return _FLOOR * total / np.maximum(_radial_counts(sums, bins), 1)


def _own_prior(weight: Array) -> Array:
    """Return what is added to K where tau2 is 0 although there are data."""
    return 1 / (np.float32(1e-3) * np.maximum(weight, np.float32(1e-20)))


def _radial_sums(
    sums: Accumulators, bins: Indices, threads: int, value: Callable[[Array, Indices], Array] | None = None
) -> Shells:
    """Return the sum of K, or of a function of K and k**2, over the known coefficients of each bin below r_max.

    Parameters
    ----------
    bins : (end,) intp
        Bin of each k**2; from `end` on none is counted.
    """
    end = min(len(bins), _known(sums))
    ends = np.append(bins[:end], sums.r_max)  # what comes after the last goes into a bin that is left out
    kz, rows, kx = _kept(sums.n, min(int(np.sqrt(end - 1)), sums.n // 2))
    mirrored = _mirrored(rows)
    above = len(rows) - mirrored
    z2 = _squares(sums.n)[kz]
    in_plane = _squares(sums.n)[rows][:, None] + (kx**2)[None, :]

    def shell_sums(part: slice) -> Shells:
        k2 = z2[part, None, None] + in_plane
        found = _pick(sums.weight, kz[part], rows, len(kx))
        if value is not None:
            found = value(found, k2)
        # Of y and -y together, which halves the work.
        found[:, 1 : mirrored + 1] += found[:, : -mirrored - 1 : -1]
        bin_of = np.take(ends, k2[:, :above], mode="clip")
        return np.bincount(bin_of.ravel(), found[:, :above].ravel(), sums.r_max + 1).astype(np.float64)

    planes = max(1, _SLAB // in_plane.size)
    return np.sum(parallel(shell_sums, parts(len(kz), planes), threads), axis=0)[: sums.r_max]


def _radial_counts(sums: Accumulators, bins: Indices, weights: Shells | None = None) -> Shells:
    """Return how many coefficients each bin below r_max has, or the sum of a function of k**2 over them.

    Parameters
    ----------
    bins : (end,) intp
        Bin of each k**2.
    weights : (any,) float64, optional
        Of each k**2; the last one of all beyond.
    """
    count = _lattice(sums.n, len(bins))
    if weights is not None:
        count = count * np.take(weights, np.arange(len(bins)), mode="clip")
    return np.bincount(bins, count, sums.r_max + 1)[: sums.r_max].astype(np.float64)


@lru_cache(maxsize=4)
def _lattice(n: int, end: int) -> Shells:
    """Return how many coefficients of a half-transform there are at each k**2 below `end`."""
    squares, times = np.unique(_squares(n), return_counts=True)
    line, plane, count = np.zeros(end), np.zeros(end), np.zeros(end)
    line[squares[squares < end]] = times[squares < end]
    for square, number in zip(squares[squares < end], times, strict=False):
        plane[square:] += number * line[: end - square]
    for square in squares[squares < end]:
        count[square:] += plane[: end - square]
    return count


def _known(sums: Accumulators) -> int:
    """Return the k**2 from which on B and K count as 0."""
    return _round(sums.r_max * sums.pad) ** 2


def _quotient_columns(
    sums: Accumulators, tables: _Tables, source: npt.NDArray[np.complex64] | None, threads: int
) -> npt.NDArray[np.complex64]:
    """Divide, and transform along z; return the map's z window: (ori, rows kept, columns kept) complex64.

    It takes the place of the source.
    """
    n, ori = sums.n, sums.ori
    kz, rows, kx = _kept(n, tables.reach)
    mirrored = _mirrored(kz)
    above = len(kz) - mirrored  # the planes of z >= 0 and, where it is kept, Nyquist; the others mirror them
    whole = len(kz) == n
    z2, y2 = _squares(n)[kz[:above]], _squares(n)[rows]
    result = np.empty((ori, len(rows), len(kx)), dtype=np.complex64) if source is None else source

    def divide(part: slice) -> None:
        row = rows[part]
        width = min(math.isqrt(max(tables.end - 1 - int(y2[part].min()), 0)) + 1, len(kx))  # what the sphere reaches
        k2 = z2[:, None, None] + y2[part][None, :, None] + (kx[:width] ** 2)[None, None, :]

        def apply(operation: np.ufunc, array: npt.NDArray[Any], table: npt.NDArray[Any]) -> None:
            # Clipped as an index: the last entry of a table stands for everything outside.
            values = np.take(table, k2, mode="clip")
            operation(array[:above], values, out=array[:above])
            operation(array[above:], values[mirrored:0:-1], out=array[above:])

        denominator = _pick(sums.weight, kz, row, width)
        if tables.empty is not None:
            here = np.zeros(denominator.shape, dtype=np.bool_)
            apply(np.logical_or, here, tables.empty)
            denominator += np.where(here & (denominator > 1e-20), _own_prior(denominator), 0)
        apply(np.add, denominator, tables.prior)
        apply(np.maximum, denominator, tables.floor)
        quotient = np.empty(denominator.shape, dtype=np.complex64)
        quotient.real = _pick(sums.real, kz, row, width)
        quotient.imag = _pick(sums.imag, kz, row, width)
        if source is not None:
            prior = _transform_z(source[:, part, :width], n)
            if not whole:
                prior = prior[kz]
            pulled = prior.copy() if tables.limit is not None else prior
            apply(np.multiply, pulled, tables.pull)
            quotient += pulled
        # Part by part: a complex division rounds otherwise, and strength 0 is to be the MAP map to the bit.
        quotient.real /= denominator
        quotient.imag /= denominator
        if source is not None and tables.limit is not None:
            limit = np.zeros(denominator.shape, dtype=np.float32)
            apply(np.add, limit, tables.limit)
            np.copyto(quotient, limit * prior, where=limit > 0)
        column = quotient
        if not whole:
            column = np.zeros((n, len(row), width), dtype=np.complex64)
            column[kz] = quotient
        column = scipy.fft.ifft(column, axis=0, norm="forward", overwrite_x=True, workers=1)
        result[: ori // 2, part, :width] = column[n - ori // 2 :]
        result[ori // 2 :, part, :width] = column[: ori - ori // 2]
        result[:, part, width:] = 0

    parallel(divide, parts(len(rows), max(1, _SLAB // (n * len(kx)))), threads)
    return result


def _finish(sums: Accumulators, columns: npt.NDArray[np.complex64], reach: int, threads: int) -> Array:
    """Transform along y and x, cut the window, apply RELION's scale, soft mask and gridding correction."""
    n, ori = sums.n, sums.ori
    half = ori // 2
    _, rows, kx = _kept(n, reach)
    scale = np.float32(1 / relion_scale(sums.pad, ori))
    data = np.empty((ori, ori, ori), dtype=np.float32)
    outside, gridding = _real_space_tables(ori, sums.pad)
    kept, filled = (1 - outside) * gridding, outside * gridding

    def transform(part: slice) -> tuple[float, float]:
        plane = np.zeros((part.stop - part.start, n, len(kx)), dtype=np.complex64)
        plane[:, rows] = columns[part]
        plane = scipy.fft.ifft(plane, axis=1, norm="forward", overwrite_x=True, workers=1)
        plane = np.concatenate((plane[:, n - half :], plane[:, : ori - half]), axis=1)
        lines = scipy.fft.irfft(plane, n, axis=2, norm="forward", overwrite_x=True, workers=1)
        slab = data[part]
        slab[:, :, :half] = lines[:, :, n - half :]
        slab[:, :, half:] = lines[:, :, : ori - half]
        slab *= scale
        weight = np.take(outside, distance(part))
        return float((slab * weight).sum(dtype=np.float64)), float(weight.sum(dtype=np.float64))

    def distance(part: slice) -> npt.NDArray[np.int32]:
        z = (np.arange(part.start, part.stop, dtype=np.int32) - half) ** 2
        return z[:, None, None] + in_plane

    def mask(part: slice) -> None:
        slab, d2 = data[part], distance(part)
        slab *= np.take(kept, d2)
        slab += background * np.take(filled, d2)

    in_plane = squared_distance((ori, ori))
    slabs = list(parts(ori, max(1, _SLAB // (n * len(kx)))))
    totals = parallel(transform, slabs, threads)
    background = np.float32(sum(item[0] for item in totals) / max(sum(item[1] for item in totals), 1e-30))
    parallel(mask, slabs, threads)
    return data


def _partial_forward(sums: Accumulators, denoised: Denoised, reach: int, threads: int) -> npt.NDArray[np.complex64]:
    """Take a map back to the scale of B along x and y: the inverse of `_finish` without the mask.

    Returns
    -------
    (ori, rows kept, columns kept) complex64
        Still in real space along z, as a centred window.
    """
    n, ori = sums.n, sums.ori
    half = ori // 2
    _, rows, kx = _kept(n, reach)
    _, gridding = _real_space_tables(ori, sums.pad)
    scale = np.float32(relion_scale(sums.pad, ori) / float(n) ** 3)
    in_plane = squared_distance((ori, ori))
    result = np.empty((ori, len(rows), len(kx)), dtype=np.complex64)

    def transform(part: slice) -> None:
        z = (np.arange(part.start, part.stop, dtype=np.int32) - half) ** 2
        slab = denoised.data[part] * scale / np.take(gridding, z[:, None, None] + in_plane)
        lines = np.zeros((len(slab), ori, n), dtype=np.float32)
        lines[:, :, n - half :] = slab[:, :, :half]
        lines[:, :, : ori - half] = slab[:, :, half:]
        transformed = scipy.fft.rfft(lines, axis=2, workers=1)[:, :, : len(kx)]
        plane = np.zeros((len(slab), n, len(kx)), dtype=np.complex64)
        plane[:, n - half :] = transformed[:, :half]
        plane[:, : ori - half] = transformed[:, half:]
        result[part] = scipy.fft.fft(plane, axis=1, overwrite_x=True, workers=1)[:, rows]

    parallel(transform, parts(ori, max(1, _SLAB // (n * len(kx)))), threads)
    return result


def _transform_z(window: npt.NDArray[np.complex64], n: int) -> npt.NDArray[np.complex64]:
    ori = len(window)
    half = ori // 2
    column = np.zeros((n, *window.shape[1:]), dtype=np.complex64)
    column[n - half :] = window[:half]
    column[: ori - half] = window[half:]
    return scipy.fft.fft(column, axis=0, overwrite_x=True, workers=1)


def _real_space_tables(ori: int, pad: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return, against the squared distance from the centre, the weight of the outside and the gridding factor.

    RELION's softMaskOutsideMap with radius ori / 2, and the square of sinc for its trilinear interpolation.
    """
    distance = np.sqrt(np.arange(3 * (ori // 2) ** 2 + 1, dtype=np.float64))
    edge = np.clip((distance - ori / 2) / _MASK_EDGE, 0.0, 1.0)
    outside = 0.5 - 0.5 * np.cos(np.pi * edge)
    gridding = 1 / np.sinc(distance / (ori * pad)) ** 2
    return outside.astype(np.float32), gridding.astype(np.float32)


def _kept(n: int, reach: int) -> tuple[Indices, Indices, Indices]:
    """Return the indices along z and y of |k| <= reach, and the frequencies 0 to reach along x."""
    index = np.flatnonzero(np.abs(frequencies(n)) <= reach)
    return index, index, np.arange(min(reach, n // 2) + 1)


def _mirrored(index: Indices) -> int:
    """Return how many indices along an axis, the last ones of `_kept`, stand for minus a frequency that is kept too."""
    return (len(index) - 1) // 2


def _squares(n: int) -> Indices:
    """Return k**2 along an axis."""
    return frequencies(n).astype(np.intp) ** 2


def _pick(array: Array, z: npt.NDArray[np.intp], y: npt.NDArray[np.intp], width: int) -> Array:
    """Copy the coefficients of some rows and columns out of a memory map."""
    if len(z) == len(array):
        return np.ascontiguousarray(array[:, y, :width])
    return np.ascontiguousarray(array[z[:, None], y[None, :], :width])


def _round(value: float) -> int:
    """Round half up, as RELION's ROUND does for positive numbers."""
    return int(np.floor(value + 0.5))


def _round_array(values: Shells) -> npt.NDArray[np.intp]:
    return np.floor(values + 0.5).astype(np.intp)
