"""The curve that puts a network's sigma right (see `cryored.prior.sigma`), from its errors on maps of known truth.

A voxel's error is below 0.994 sigma in 68 % of all cases and below 1.96 sigma in 95 %, if sigma is right. So in a range
of sigmas, and for each map inside and outside the molecule, the two quantiles tell by what factor it is wrong. A map
counts as one, whatever its size, and so do its two parts: a curve for what is inside would be wrong outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError

KNOTS = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # sigmas told, on the network's grey scale
QUANTILES = ((0.68, 0.994), (0.95, 1.96))  # share of a normal distribution's values below so many sigma
_LEAST_VOXELS, _LEAST_PARTS = 50, 10

Array = npt.NDArray[np.float32]


def sigma_factors(error: Array, sigma: Array) -> npt.NDArray[np.float64]:
    """Return the logarithm of the factor by which sigma is too small near each of `KNOTS`.

    Parameters
    ----------
    error, sigma : (voxels,) float32
        Of one map, inside the molecule or outside, on the network's grey scale.

    Returns
    -------
    (KNOTS,) float64
        The mean over both quantiles; NaN where there are too few voxels.
    """
    place, reach = np.log(np.maximum(sigma, np.finfo(np.float32).tiny)), np.log(2) / 2
    found = np.full(len(KNOTS), np.nan)
    for i, knot in enumerate(KNOTS):
        near = np.abs(place - np.log(knot)) < reach
        if near.sum() >= _LEAST_VOXELS:
            ratio = np.abs(error[near]) / sigma[near]
            found[i] = np.mean([np.log(np.quantile(ratio, share) / sigmas) for share, sigmas in QUANTILES])
    return found


def fit_sigma(factors: Sequence[npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Return the curve as `cryored.prior.sigma.model_sigma` takes it from a card: ``told`` and ``measured``.

    Parameters
    ----------
    factors : sequence of (KNOTS,) float64
        `sigma_factors` of each part of each map.

    Raises
    ------
    InputError
        Too few maps tell anything.
    """
    table = np.stack([*factors]) if factors else np.empty((0, len(KNOTS)))
    known = np.isfinite(table).sum(axis=0) >= _LEAST_PARTS
    if known.sum() < 2:
        raise InputError(
            f"{len(table)} parts of maps have enough voxels in {int(known.sum())} ranges of sigma, expected two at "
            f"least with {_LEAST_PARTS} parts each"
        )
    told = np.array(KNOTS)[known]
    measured = told * np.exp(np.nanmean(table[:, known], axis=0))
    # What is told larger is larger: a step back is chance.
    measured = np.maximum.accumulate(measured)
    return {"told": told.tolist(), "measured": [round(float(value), 4) for value in measured]}
