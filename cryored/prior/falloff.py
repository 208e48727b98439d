"""How a map's amplitudes fall with resolution, against those of the maps that a prior is trained on.

A post-processed map is sharpened: its coarse shells are weak against its fine ones, as in no map inside a refinement.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.maps.fourier import forward, inverse, shell_index, shell_power, spatial_frequency
from cryored.maps.volume import Floats, Volume

# Logarithm of the amplitude of proteins whose atoms are Gaussians of 3 A, the mean of 40 structures (their scatter is
# 0.03), at these resolutions in angstrom.
_RESOLUTION = (12.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.5, 5.0, 4.7, 4.4, 4.0, 3.7, 3.4, 3.1)
_PROTEIN = (0.673, 0.468, 0.313, 0.152, 0.001, -0.078, -0.066, -0.028, -0.031, -0.096, -0.256, -0.395, -0.591, -0.835)
_COARSEST = 10.0  # angstrom, at which a Guinier plot's line begins (relion_postprocess --autob_lowres)
_LEAST_SHELLS = 5  # for a line through them
_BEFORE = 0.8  # of the frequency of that, up to which nothing but sharpening shapes the spectrum
_FALLEN = 0.15  # of the amplitude before it, after which a map is low-pass filtered

Shells = npt.NDArray[np.float64]


def sharpening(volume: Volume) -> float:
    """Return by which B factor a map is sharpened against unsharpened proteins, in square angstrom; about 0 for these.

    The slope of a Guinier plot of their ratio, from 12 A to where the map is low-pass filtered. 0 where too few shells
    are left to tell, and for noise, which has no fall.
    """
    box = max(volume.shape)
    amplitude = np.sqrt(shell_power(forward(volume.data), volume.shape))
    frequency = np.arange(len(amplitude)) / (box * volume.voxel_size)
    known = (frequency >= 1 / _RESOLUTION[0]) & (frequency <= 1 / _RESOLUTION[-1]) & (amplitude > 0)
    coarse = known & (frequency <= 1 / 6)
    if not coarse.any():
        return 0.0
    level = float(np.median(amplitude[coarse]))
    fallen = np.flatnonzero((frequency > 1 / _RESOLUTION[0]) & (amplitude < _FALLEN * level))
    if not fallen.size:
        return 0.0  # nobody has filtered it: noise goes on to Nyquist
    used = known & (frequency <= _BEFORE * frequency[fallen[0]])
    if used.sum() < _LEAST_SHELLS:
        return 0.0
    protein = np.interp(frequency[used], [1 / one for one in _RESOLUTION], _PROTEIN)
    slope = np.polyfit(frequency[used] ** 2, np.log(amplitude[used]) - protein, 1)[0]
    return float(4 * slope)


def guinier_bfactor(volume: Volume, fsc: Shells) -> float:
    """Return the B factor that relion_postprocess --auto_bfac sharpens by, in square angstrom; negative sharpens.

    Four times the slope of the logarithm of the signal's mean amplitude against 1 / d**2, from 10 A to the shell before
    the FSC first drops below 0.0001 (Postprocessing::sharpenMap, which weights the average of both halves by
    sqrt(2 FSC / (1 + FSC)), the root of the signal's share).

    Parameters
    ----------
    volume : Volume
        A raw half-map, or the average of both.
    fsc : (max(shape) // 2 + 1,) float64
        To another map as good, the signal's share of the power: that of the half-maps, or 2 FSC / (1 + FSC).

    Raises
    ------
    InputError
        Fewer than two shells are left for the line.
    """
    box = max(volume.shape)
    amplitude = np.bincount(shell_index(volume.shape).ravel(), np.abs(forward(volume.data)).ravel())[: box // 2 + 1]
    count = np.bincount(shell_index(volume.shape).ravel())[: box // 2 + 1]
    frequency = np.arange(box // 2 + 1) / (box * volume.voxel_size)
    below = np.flatnonzero(np.asarray(fsc[1:]) < 1e-4) + 1  # the FSC of the means says nothing
    amplitude = amplitude * np.sqrt(np.maximum(fsc, 0))
    used = (frequency >= 1 / _COARSEST) & (amplitude > 0)
    if below.size:
        used[below[0] :] = False
    if used.sum() < 2:
        raise InputError("fewer than two shells beyond 10 A hold signal, too few for a Guinier plot; give a number")
    return float(4 * np.polyfit(frequency[used] ** 2, np.log(amplitude[used] / count[used]), 1)[0])


def sharpened(data: Floats, voxel_size: float, bfactor: float, threads: int | None = None) -> Floats:
    """Multiply a map's transform by exp(bfactor s**2 / 4): positive values sharpen, negative ones blur.

    As in RELION (applyBFactorToMap) the corners beyond Nyquist, whose noise it would raise most, are set to 0.
    """
    frequency = spatial_frequency(data.shape, voxel_size)
    factor = np.exp(np.float32(bfactor / 4) * frequency**2)
    factor[frequency > np.float32((1 + 1e-6) * 0.5 / voxel_size)] = 0
    return inverse(forward(data, threads) * factor, data.shape, threads).astype(np.float32)
