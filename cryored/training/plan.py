"""How a prior is trained from atomic models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How the prior is trained.

    Parameters
    ----------
    minutes : float
        Of the whole training, over all runs; the learning rate falls to 0 along a cosine of the time.
    width, depth, knots : int
        See `cryored.prior.network.build_unet`.
    box : int
        Of the refinements, even; a multiple of 16.
    pixel_size : float
        In angstrom.
    crop, batch : int
        Edge and number of the crops in a step.
    learning_rate : float
        Of Adam.
    calibration : float
        Weight of the variance's likelihood beside the squared error.
    pool : int
        Half-maps kept, the newest.
    refining : float
        Share of the time in which data are made.
    mixed_precision : bool
    seed : int
    """

    minutes: float = 10.0
    width: int = 8
    depth: int = 4
    knots: int = 24
    box: int = 96
    pixel_size: float = 1.5
    crop: int = 80
    batch: int = 8
    learning_rate: float = 1.5e-3
    calibration: float = 0.03
    pool: int = 4000
    refining: float = 0.3
    mixed_precision: bool = True
    seed: int = 0
