"""Back-projection as RELION makes it: B and K from slices, and the FSC of two halves (backprojector.cpp)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.maps.fourier import Complexes, frequencies, half_frequencies, padded_size, squared_radius
from cryored.maps.fsc import transform_correlation
from cryored.reconstruction.compiled import insert_slices
from cryored.reconstruction.projection import Doubles, Singles
from cryored.reconstruction.update import Accumulators


class BackProjector:
    """B and K that slices are added to, run by run.

    RELION's transforms of images carry a factor 1 / box**2, and so does B here. Sums are float32 like RELION's
    files: thousands of terms leave an error of about 1e-5, and the loops run in the processor's cache.

    Parameters
    ----------
    box : int
        Edge n of the images, even.
    pad : float
        RELION's padding factor.
    r_max : int
        Radius up to which coefficients of the images are added: half the current image size.
    """

    def __init__(self, box: int, *, pad: float = 1.0, r_max: int | None = None) -> None:
        self.box = box
        self.pad = pad
        self.r_max = box // 2 if r_max is None else r_max
        n = padded_size(pad, box)
        self._data = np.zeros((n, n, n // 2 + 1), dtype=np.complex64)
        self._weight = np.zeros(self._data.shape, dtype=np.float32)

    def add(
        self,
        slices: Complexes,
        weights: Singles,
        rotations: Doubles,
        *,
        index: npt.NDArray[np.int64] | None = None,
        factors: Doubles | None = None,
        shifts: Doubles | None = None,
    ) -> None:
        """Add slices at rotations.

        Parameters
        ----------
        slices : (m, n, n // 2 + 1) complex64
            Unnormalised half-transforms of the images, times their weights: images times CTF over noise power.
        weights : (n, n // 2 + 1) or (m, n, n // 2 + 1) float32
            CTF squared over noise power.
        rotations : (j, 3, 3) float64
            RELION's matrices (see `cryored.reconstruction.projection`).
        index : (j,) int64, optional
            The slice that each rotation is of, where there are several of one slice; else j is m.
        factors : (j,) float64, optional
            Probabilities of the rotations; 1 by default.
        shifts : (j, 2) float64, optional
            Where the particles are, x and y in pixels from the images' centre.
        """
        count = len(rotations)
        if slices.shape[1:] != (self.box, self.box // 2 + 1) or (index is None and len(slices) != count):
            raise InputError(f"slices of shape {slices.shape} for {count} rotations and a box of {self.box}")
        insert_slices(
            slices,
            weights if weights.ndim == 3 else weights[None],
            np.arange(count) if index is None else index,
            np.ones(count) if factors is None else factors,
            np.zeros((count, 2)) if shifts is None else shifts,
            rotations,
            self.r_max,
            self.pad,
            self._data,
            self._weight,
        )

    def sums(self) -> Accumulators:
        """Return B and K as RELION writes them out."""
        data, weight = self._data * np.float32(1 / self.box**2), self._weight.copy()
        # Friedel mates in the plane x = 0 lie both in the half-transform: each gets what came to either. The zero
        # frequency is its own mate and counts once.
        for plane, mates in (
            (data[:, :, 0], _at_minus(data[:, :, 0]).conj()),
            (weight[:, :, 0], _at_minus(weight[:, :, 0])),
        ):
            mates[0, 0] = 0
            plane += mates
        return Accumulators(data.real, data.imag, weight, self.box, self.pad, self.r_max)


def half_map_correlation(first: Accumulators, second: Accumulators) -> npt.NDArray[np.float64]:
    """Return the FSC of two halves from their B and K, as RELION takes it in a refinement.

    Not of the maps: B and K of the padded transforms are summed up to the unpadded grid and divided there
    (getDownsampledAverage, calculateDownSampledFourierShellCorrelation).

    Returns
    -------
    (ori // 2 + 1,) float64
        1 in shell 0, and 0 beyond r_max.
    """
    n = first.ori
    outside = squared_radius(n) > first.r_max**2
    averages = []
    for sums in (first, second):
        average = _downsampled_average(sums)
        average[outside] = 0.0
        averages.append(average)
    fsc = transform_correlation(averages[0], averages[1], (n, n, n))
    fsc[0] = 1.0
    return fsc


def _downsampled_average(sums: Accumulators) -> npt.NDArray[np.complex64]:
    """Return B / K on the unpadded grid: (ori, ori, ori // 2 + 1), zero frequency first."""
    data = _downsampled(np.asarray(sums.real) + 1j * np.asarray(sums.imag), sums)
    weight = _downsampled(np.asarray(sums.weight), sums)
    return np.divide(data, weight, out=np.zeros_like(data), where=weight > 0)


def _downsampled(array: npt.NDArray[np.inexact], sums: Accumulators) -> npt.NDArray[np.inexact]:
    n, ori = sums.n, sums.ori
    if n == ori:
        return array
    for axis, k in enumerate((frequencies(n), frequencies(n), half_frequencies(n))):
        nearest = np.trunc(k / sums.pad + np.copysign(0.5, k)).astype(np.intp)  # half away from 0, as RELION rounds
        length = ori if axis < 2 else ori // 2 + 1
        moved = np.moveaxis(array, axis, 0)
        smaller = np.zeros((length, *moved.shape[1:]), dtype=array.dtype)
        np.add.at(smaller, nearest % length if axis < 2 else np.minimum(nearest, length - 1), moved)
        array = np.moveaxis(smaller, 0, axis)
    return array


def _at_minus(plane: npt.NDArray[np.inexact]) -> npt.NDArray[np.inexact]:
    """Return for each point (z, y) of a periodic plane the value at (-z, -y)."""
    return np.roll(plane[::-1, ::-1], 1, axis=(0, 1))
