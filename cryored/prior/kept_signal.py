"""How much of the signal that the FSC tells of a denoised map keeps: a check of both that needs no truth.

Of data x = T + N in a shell the FSC says that FSC <x, x> is the power S of the signal T. An estimate f of T that is not
made from the noise has <f, x> = <f, T>, which is S where f is right. Weighted by the FSC, as networks are shown it, the
map is w = FSC x, so that

    kept = <f, x> / S = <f, w> / <w, w>

Near 1 the network finds in the data what the FSC promises. Far below it does not: the FSC is of something that is no
signal - halves aligned to the same noise, a mask's edge - or the map is of a kind that the network does not know. What
f has there it has made from other shells.

For the average of both halves the FSC is that of two such averages, 2 FSC / (1 + FSC).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cryored.maps.fourier import Complexes, forward, multiplicity, shell_index, shell_mean, shell_power
from cryored.maps.volume import Volume
from cryored.prior.models import ModelCard

LEAST_KEPT = 0.5  # below, a shell is in doubt; maps of proteins keep 0.6 to 1.3, noise in their place 0.05 to 0.4
_RESOLVED = 0.143  # FSC of the halves below which nobody believes a shell anyway
_FEWEST = 3  # resolved shells in doubt from which on it is said; of 140 maps of proteins one has so many
_LEAST_FSC = 0.05  # below, the power of the signal is not known

Curve = npt.NDArray[np.floating]
Array = npt.NDArray[np.float32]


def can_judge(card: ModelCard) -> bool:
    """Tell whether a model's maps can be judged: it estimates the truth, not the truth times the FSC, from w."""
    return card.input == "regularised" and card.target == "truth"


def kept_signal(weighted: Volume, denoised: Volume, fsc: Curve, *, threads: int | None = None) -> Curve:
    """Return the share of the signal told that a denoised map keeps in each shell.

    Parameters
    ----------
    weighted, denoised : Volume
        What the network was shown, and what it made of it.
    fsc : (max(shape) // 2 + 1,) float
        By which the one is weighted.
    threads : int, optional
        For the transforms; all cores by default.

    Returns
    -------
    (max(shape) // 2 + 1,) float64
        NaN at zero frequency and where the FSC is too low to tell the signal's power.
    """
    given, found = forward(weighted.data, threads), forward(denoised.data, threads)
    return _kept(given, found, weighted.shape, fsc)


def resolved_shells(fsc: Curve) -> npt.NDArray[np.bool_]:
    """Return which shells but the first have an FSC between the halves of 0.143."""
    resolved = np.asarray(fsc) >= _RESOLVED
    resolved[0] = False
    return resolved


def shells_in_doubt(kept: Curve, fsc: Curve) -> npt.NDArray[np.intp]:
    """Return the shells, resolved by the halves' FSC, that keep less than half of the signal told; none if but two."""
    found = np.flatnonzero(resolved_shells(fsc) & (kept < LEAST_KEPT))
    return found if len(found) >= _FEWEST else found[:0]


def raise_sigma(sigma: Array, weighted: Volume, denoised: Volume, fsc: Curve, *, threads: int | None = None) -> Array:
    """Return the sigma of a denoised map that keeps less than half of the signal told in some shells.

    If nothing of the signal is kept, its power S is missing, and the power F of what stands in its place is wrong; with
    half of it the error is what the network expects; in between the share is linear. Where in the map that error lies
    was found with noise in the signal's place (``benchmarks/uncertainty.py --noise-from``): its variance goes by the
    third power of the network's sigma, so it is in the molecule.

    Parameters
    ----------
    sigma : (z, y, x) float32
        As the network tells it.
    weighted, denoised, fsc, threads
        See `kept_signal`.

    Returns
    -------
    (z, y, x) float32
        `sigma` itself where no shell is in doubt.
    """
    shape = weighted.shape
    given, found = forward(weighted.data, threads), forward(denoised.data, threads)
    doubt = np.nan_to_num(np.clip(1 - _kept(given, found, shape, fsc) / LEAST_KEPT, 0, 1))
    if not doubt.any() or not sigma.any():
        return sigma
    told = shell_power(given, shape) / np.maximum(fsc, _LEAST_FSC)
    missed = doubt * (told + shell_power(found, shape))
    variance = float(missed @ _coefficients(shape)) / weighted.data.size**2  # mean over the voxels
    relative = sigma / np.float32(sigma.max())
    return np.sqrt(sigma**2 + np.float32(variance / np.mean(relative**3, dtype=np.float64)) * relative**3)


def _coefficients(shape: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Return how many coefficients of the whole transform are in each shell up to Nyquist."""
    index = shell_index(shape)
    size = max(shape) // 2 + 1
    count = np.bincount(
        index.ravel(), weights=np.broadcast_to(multiplicity(shape[2]), index.shape).ravel(), minlength=size
    )
    return np.asarray(count[:size], dtype=np.float64)


def _kept(given: Complexes, found: Complexes, shape: tuple[int, int, int], fsc: Curve) -> npt.NDArray[np.float64]:
    power = shell_power(given, shape)
    common = shell_mean((given.conj() * found).real, shape)
    known = (np.asarray(fsc) > _LEAST_FSC) & (power > 0)
    known[0] = False
    return np.where(known, common / np.where(known, power, 1), np.nan)
