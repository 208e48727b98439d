"""Noise of images: white, or with the power spectrum that RELION measured in a data set."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.fft

from cryored.errors import InputError
from cryored.files.star import Star, read_star
from cryored.maps.fourier import frequencies, half_frequencies, multiplicity

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

WHITE = "white"  # in the place of a spectrum's file
# RELION 3 measures the noise of each group of particles, RELION 4 and 5 that of each optics group.
_GROUP = re.compile(r"model_(optics_)?group_\d+")


@dataclass(frozen=True)
class Spectrum:
    """A radial power spectrum; only its shape is used.

    Parameters
    ----------
    frequency : (m,) float64
        Spatial frequency in 1/angstrom, increasing.
    power : (m,) float64
        Mean power of the Fourier coefficients at that frequency, in any unit.
    """

    frequency: Doubles
    power: Doubles


def noise_filter(spectrum: Spectrum, box: int, voxel_size: float) -> Singles:
    """Return what turns white noise into noise of a spectrum, without a change of its variance.

    The power is interpolated linearly in spatial frequency; outside the spectrum's range it keeps the nearest
    value, so that of the last shell in the corners of the transform.

    Parameters
    ----------
    spectrum : Spectrum
    box : int
        Edge n of the images in pixels.
    voxel_size : float
        Edge of a pixel in angstrom.

    Returns
    -------
    (n, n // 2 + 1) float32
        Amplitudes, zero frequency at [0, 0]; the mean of their squares over all n * n coefficients is 1.
    """
    x, y = half_frequencies(box), frequencies(box)[:, None]
    power = np.interp(np.hypot(y, x) / (box * voxel_size), spectrum.frequency, spectrum.power)
    return np.sqrt(power / ((multiplicity(box) * power).sum() / box**2)).astype(np.float32)


def draw_noise(streams: Sequence[np.random.Generator], box: int, colour: Singles | None = None) -> Singles:
    """Draw images of normally distributed noise with mean 0 and variance 1.

    Parameters
    ----------
    streams : sequence of m Generators
        One an image: so an image's noise depends neither on its neighbours nor on who draws it when.
    box : int
        Edge n of the images in pixels.
    colour : (n, n // 2 + 1) float32, optional
        See `noise_filter`; white noise without.

    Returns
    -------
    (m, n, n) float32
    """
    noise = np.stack([rng.standard_normal((box, box), dtype=np.float32) for rng in streams])
    if colour is None:
        return noise
    # Filtered white noise has the symmetry of a real image's transform by itself.
    return np.asarray(scipy.fft.irfft2(scipy.fft.rfft2(noise) * colour, s=(box, box)), dtype=np.float32)


def read_spectrum(path: str | os.PathLike[str]) -> Spectrum:
    """Read the spectrum of the noise from RELION's ``_model.star``; ``-`` is standard input.

    Several groups are averaged, each normalised to the same mean power first, on the frequencies of the
    first: boxes and pixel sizes of optics groups may differ, and so the unit of their power. Groups whose
    power is 0 throughout, those without particles, are passed over.

    Raises
    ------
    InputError
        The file is no STAR file or has no group with a spectrum that is finite and positive.
    """
    star = read_star(path)
    names = [name for name in star.blocks() if _GROUP.fullmatch(name)]
    if not names:
        found = ", ".join(f"data_{name}" for name in star.blocks()) or "no block at all"
        raise InputError(
            f"{star.name}: found {found}, expected data_model_group_1 or data_model_optics_group_1 "
            "as in RELION's run_it010_model.star"
        )
    spectra = [spectrum for name in names if (spectrum := _read_group(star, name)).power.any()]
    if not spectra:
        raise InputError(f"{star.name}: _rlnSigma2Noise is 0 throughout, expected the measured power of noise")
    shared = spectra[0].frequency
    powers = [np.interp(shared, spectrum.frequency, spectrum.power / spectrum.power.mean()) for spectrum in spectra]
    return Spectrum(shared, np.mean(powers, axis=0))


def _read_group(star: Star, block: str) -> Spectrum:
    frequency = star.numbers(block, "rlnResolution")
    power = star.numbers(block, "rlnSigma2Noise")
    if not (np.isfinite(frequency).all() and frequency[0] >= 0 and (np.diff(frequency) > 0).all()):
        raise InputError(
            f"{star.name}: _rlnResolution in data_{block} does not increase, expected frequencies in 1/A from 0 on"
        )
    bad = ~(np.isfinite(power) & (power > 0))
    if bad.any() and power.any():
        worst = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{star.name}: _rlnSigma2Noise in data_{block} is {power[worst]:g} at {frequency[worst]:g} 1/A, "
            "expected a power above 0"
        )
    return Spectrum(frequency, power)
