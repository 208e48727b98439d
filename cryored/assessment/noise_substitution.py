"""A test for detail that a denoiser invents: noise takes the signal's place beyond a resolution."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from cryored.maps.fourier import apply_shells, forward, inverse, shell_index
from cryored.maps.fsc import Curve, SubstitutedFsc, check_shell, shell_correlation
from cryored.maps.volume import Floats, Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import check_weights, find_model

logger = logging.getLogger(__name__)


def substitute_noise(data: Floats, start: int, *, rng: np.random.Generator, threads: int | None = None) -> Floats:
    """Replace the signal by noise of the same power from shell `start` on; the shells before stay as they are.

    Each coefficient keeps its amplitude, and its phase becomes that of a map of white noise: no phase is left, as in
    the noise substitution of Chen et al. 2013, and Friedel mates agree, so that the power is kept exactly.

    Parameters
    ----------
    data : (z, y, x) float
    start : int
    rng : numpy.random.Generator
    threads : int, optional
        For the transforms; all cores by default.
    """
    transform = forward(data, threads)
    noise = forward(rng.standard_normal(data.shape, dtype=np.float32), threads)
    substituted = np.abs(transform) * np.exp(1j * np.angle(noise))
    return inverse(np.where(shell_index(data.shape) >= start, substituted, transform), data.shape, threads)


def substituted_correlation(
    data1: Floats,
    data2: Floats,
    denoise: Callable[[Floats], Floats],
    start: int,
    *,
    rng: np.random.Generator,
    mask: Floats | None = None,
    threads: int | None = None,
) -> SubstitutedFsc:
    """Denoise two half-maps with noise in place of the signal: what they then share was invented.

    Parameters
    ----------
    data1, data2 : (z, y, x) float
        Maps as the denoiser expects them; one that expects filtered maps gets those filtered by the FSC of the
        true halves. Noise is put in afterwards, so with the weight that the signal had: filtered by an FSC of its own,
        which is 0 from `start` on, it would vanish before the denoiser could mistake it.
    denoise : callable
        Takes and returns a map.
    start : int
        First shell with noise (see `substitute_noise`), independent in the two maps.
    rng : numpy.random.Generator
    mask : (z, y, x) float, optional
        Multiplies the maps before they are compared, never before they are denoised.
    threads : int, optional
        For the transforms; all cores by default.

    Raises
    ------
    InputError
        `start` is shell 0 or beyond Nyquist.
    """
    check_shell(start, max(data1.shape) // 2 + 1, "noise", "--substitute-noise")
    halves = [data1, data2]
    noisy = [substitute_noise(data, start, rng=rng, threads=threads) for data in halves]

    def compare(maps: list[Floats]) -> Curve:
        first, second = maps if mask is None else (data * mask for data in maps)
        return shell_correlation(first, second, threads=threads)

    return SubstitutedFsc(
        start,
        substituted=compare(noisy),
        denoised=compare([denoise(data) for data in halves]),
        denoised_substituted=compare([denoise(data) for data in noisy]),
    )


def substituted_volumes(
    half1: Volume,
    half2: Volume,
    fsc: Curve,
    start: int,
    *,
    model: str,
    rng: np.random.Generator,
    mask: Floats | None = None,
    gpu: bool | None = None,
    threads: int | None = None,
) -> SubstitutedFsc:
    """Test a model on two raw half-maps; see `substituted_correlation`.

    Parameters
    ----------
    half1, half2 : Volume
    fsc : (n_shells,) float64
        Of the two, which filters them for a model that expects that.
    model : str
        Name or folder.
    gpu : bool, optional
        See `cryored.prior.device.set_up`.

    Raises
    ------
    InputError, ModelError
        `start` is shell 0 or beyond Nyquist; the model cannot be found or used.
    """
    denoiser = Denoiser(find_model(model), gpu=gpu, threads=threads)
    check_weights(denoiser.model)
    maps = [half1.data, half2.data]
    if denoiser.model.card.input == "regularised":
        maps = [apply_shells(data, np.clip(fsc, 0.0, 1.0), threads) for data in maps]
    result = substituted_correlation(
        maps[0],
        maps[1],
        lambda data: denoiser(half1.with_data(data), fsc).data,
        start,
        rng=rng,
        mask=mask,
        threads=threads,
    )
    logger.info("denoised with %s on %s", denoiser.model.card.name, denoiser.device_name)
    return result
