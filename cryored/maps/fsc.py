"""Fourier shell correlation of two maps, with and without a mask, as RELION computes it.

Shell i holds the coefficients whose distance from the origin rounds to i; its spatial frequency is
``i / (box * voxel_size)`` in 1/angstrom with `box` the longest edge, and shell ``box // 2`` is Nyquist.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.mrc import read_volume
from cryored.files.output import is_stream
from cryored.maps.fourier import Complexes, forward, inverse, shell_index, spatial_frequency
from cryored.maps.volume import Floats, Volume
from cryored.prior.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from cryored.assessment.noise_substitution import SubstitutedFsc

logger = logging.getLogger(__name__)

Curve = npt.NDArray[np.float64]
Shells = npt.NDArray[np.intp]
AnyPath = str | os.PathLike[str]

_RANDOMISE_BELOW = 0.8  # relion_postprocess --randomize_at_fsc
_KEPT_SHELLS = 2  # from the first randomised shell on, where the correction would show its edge
_NOTHING_LEFT = 1e-6  # 1 - randomised FSC below which the correction has no meaning
_VOXEL_TOLERANCE = 0.01  # relative difference of pixel sizes below which two maps share a grid
_MASK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class FscCurve:
    """A correlation by spatial frequency.

    Parameters
    ----------
    frequency : (n,) float64
        In 1/angstrom, rising; shell 0 at 0.
    fsc : (n,) float64
        Correlation of each shell.
    """

    frequency: Curve
    fsc: Curve


@dataclass(frozen=True)
class MaskedFsc:
    """The four curves of a masked comparison.

    Parameters
    ----------
    unmasked, masked : (n_shells,) float64
        FSC before and after multiplication by the mask.
    randomised : (n_shells,) float64
        FSC of the masked maps whose phases were random from `randomise_from` on: what the mask alone adds.
    corrected : (n_shells,) float64
        `masked` without that share.
    randomise_from : int
        First shell with random phases.
    """

    unmasked: Curve
    masked: Curve
    randomised: Curve
    corrected: Curve
    randomise_from: int


@dataclass(frozen=True)
class FscResult:
    """What a comparison of two files gave.

    Parameters
    ----------
    maps : (str, str)
        Names of the two files.
    mask : str or None
        Name of the mask's file.
    box : int
        Longest edge in voxels.
    voxel_size : float
        In angstrom; 0 where it is unknown.
    unmasked : (n_shells,) float64
        FSC of the maps as they are.
    masked : MaskedFsc or None
        The curves with the mask.
    substituted : SubstitutedFsc or None
        The test for invented detail.
    """

    maps: tuple[str, str]
    mask: str | None
    box: int
    voxel_size: float
    unmasked: Curve
    masked: MaskedFsc | None
    substituted: SubstitutedFsc | None = None

    @property
    def best(self) -> Curve:
        """Return the curve to judge by: the corrected one where there is a mask."""
        return self.unmasked if self.masked is None else self.masked.corrected

    @property
    def frequency(self) -> Curve:
        """Return the spatial frequency of each shell in 1/angstrom; nan where the voxel size is unknown."""
        length = self.box * self.voxel_size or math.nan
        return np.arange(len(self.unmasked)) / length

    def curve(self) -> FscCurve:
        """Return the curve to judge by; raise `InputError` where the voxel size is unknown."""
        if not self.voxel_size:
            raise InputError(f"{self.maps[0]}: no pixel size in the header, expected one; give --angpix")
        return FscCurve(self.frequency, self.best)

    def resolution(self, threshold: float = 0.143) -> float:
        """Return the nominal resolution in angstrom (see `nominal_resolution`)."""
        curve = self.curve()
        return nominal_resolution(curve.frequency, curve.fsc, threshold)


def whole_set_fsc(fsc: Floats) -> Floats:
    """Return the FSC that two whole data sets would have, where that of their halves is `fsc`: 2 f / (1 + f).

    Its root is what theory expects between the whole set's map and the truth (Rosenthal & Henderson 2003).
    """
    positive = np.maximum(fsc, 0.0)
    return 2 * positive / (1 + positive)


def shell_correlation(data1: Floats, data2: Floats, *, threads: int | None = None) -> Curve:
    """Correlate two maps shell by shell (RELION's getFSC, src/fftw.cpp).

    ``Re sum(F1* F2) / sqrt(sum |F1|**2  sum |F2|**2)`` over the coefficients of the half-transform, each
    counted once although most stand for two.

    Parameters
    ----------
    data1, data2 : (z, y, x) float
        Maps of one shape. float32 maps are transformed in float32, sums are float64.
    threads : int, optional
        For the transforms; all cores by default.

    Returns
    -------
    (max(shape) // 2 + 1,) float64; 0 in a shell where a map has no power.
    """
    return transform_correlation(forward(data1, threads), forward(data2, threads), data1.shape)


def transform_correlation(transform1: Complexes, transform2: Complexes, shape: tuple[int, int, int]) -> Curve:
    """Return the FSC of two maps of `shape` from their half-transforms; see `shell_correlation`."""
    return _correlate((transform1, transform2), *_shells(shape))


def masked_correlation(
    data1: Floats,
    data2: Floats,
    mask: Floats,
    *,
    rng: np.random.Generator,
    randomise_from: int | None = None,
    threads: int | None = None,
) -> MaskedFsc:
    """Correlate two masked maps and take off what the mask adds (relion_postprocess, Postprocessing::run).

    The phases of both maps become random, independently, from a shell on; what correlates there after masking
    comes from the mask (see `corrected_correlation`). It is one draw: shells scatter by a few hundredths from
    seed to seed, and a curve that lingers near the threshold may cross it a shell earlier or later.

    Parameters
    ----------
    data1, data2, mask : (z, y, x) float
        Maps and mask of one shape; the mask from 0 to 1.
    rng : numpy.random.Generator
        Source of the random phases.
    randomise_from : int, optional
        First shell with random phases; by default the first one after shell 0 with an unmasked FSC below 0.8.
    threads : int, optional
        For the transforms; all cores by default.

    Raises
    ------
    InputError
        The unmasked FSC never drops below 0.8, or `randomise_from` is shell 0 or beyond Nyquist.
    """
    shape = data1.shape
    index, shells = _shells(shape)
    transforms = forward(data1, threads), forward(data2, threads)
    unmasked = _correlate(transforms, index, shells)
    if randomise_from is None:
        randomise_from = _first_below(unmasked, _RANDOMISE_BELOW)
        if randomise_from is None:
            raise InputError(
                f"the unmasked FSC never drops below {_RANDOMISE_BELOW}, expected a shell from which to "
                "randomise phases; give --randomise-from, and check that the maps are independent"
            )
    check_shell(randomise_from, shells, "phases to be randomised", "--randomise-from")
    masked = _correlate((forward(data1 * mask, threads), forward(data2 * mask, threads)), index, shells)
    # By the radius itself, not the rounded shell, as RELION does: half of the first shell keeps its phases.
    beyond = spatial_frequency(shape, 1.0 / max(shape)) >= randomise_from
    noise1, noise2 = (
        forward(inverse(_randomise(transform, beyond, rng), shape, threads) * mask, threads) for transform in transforms
    )
    randomised = _correlate((noise1, noise2), index, shells)
    for curve in (masked, randomised):
        if curve[0] <= 0:  # the means of the maps may have opposite signs, which says nothing
            curve[0] = 1.0
    corrected = corrected_correlation(masked, randomised, randomise_from)
    return MaskedFsc(unmasked, masked, randomised, corrected, randomise_from)


def corrected_correlation(masked: Curve, randomised: Curve, randomise_from: int) -> Curve:
    """Take the mask's share off a masked FSC (Postprocessing::calculateFSCtrue).

    ``(masked - randomised) / (1 - randomised)`` from two shells after `randomise_from` on, `masked` before:
    the formula shows artefacts at the edge of randomisation. Chen et al. 2013, Ultramicroscopy 135, 24-35.

    Parameters
    ----------
    masked, randomised : (n_shells,) float64
        FSC of the masked maps, as they are and with random phases.
    randomise_from : int
        First shell with random phases.

    Returns
    -------
    (n_shells,) float64; 0 where the mask alone explains all correlation.
    """
    start = randomise_from + _KEPT_SHELLS
    excess, rest = masked[start:] - randomised[start:], 1 - randomised[start:]
    tail = np.divide(excess, rest, out=np.zeros_like(rest), where=rest > _NOTHING_LEFT)
    return np.concatenate((masked[:start], tail))


def nominal_resolution(frequency: Curve, curve: Curve, threshold: float = 0.143) -> float:
    """Return the resolution in angstrom of the last shell before the curve first drops below a threshold.

    RELION's convention (Postprocessing::run): no interpolation, and later rises do not count.

    Parameters
    ----------
    frequency, curve : (n,) float
        Spatial frequency in 1/angstrom and correlation; shell 0 comes first and is not judged.
    threshold : float
        0.143 between half-maps (Rosenthal and Henderson 2003), 0.5 against a model.

    Returns
    -------
    float; infinity where the curve is below the threshold from shell 1 on, the resolution of the last shell
    where it never drops.
    """
    shell = _last_above(curve, threshold)
    return float(1 / frequency[shell]) if shell else math.inf


def crossing_resolution(frequency: Curve, curve: Curve, threshold: float = 0.143) -> float:
    """Return the resolution in angstrom at which a curve first crosses a threshold, between shells.

    As `nominal_resolution`, but linear in frequency between the last shell above the threshold and the next,
    so that small gains show.
    """
    shell = _last_above(curve, threshold)
    if shell == 0:
        return math.inf
    if shell == len(curve) - 1:
        return float(1 / frequency[shell])
    fraction = (curve[shell] - threshold) / (curve[shell] - curve[shell + 1])
    return float(1 / (frequency[shell] + fraction * (frequency[shell + 1] - frequency[shell])))


def _first_below(curve: Curve, threshold: float) -> int | None:
    below = np.flatnonzero(curve[1:] < threshold)
    return int(below[0]) + 1 if below.size else None


def _last_above(curve: Curve, threshold: float) -> int:
    first = _first_below(curve, threshold)
    return (len(curve) if first is None else first) - 1


def check_shell(shell: int, shells: int, what: str, option: str) -> None:
    """Raise `InputError` where `what` would begin at shell 0 or beyond the last of so many shells."""
    if not 0 < shell < shells:
        raise InputError(f"{what} from shell {shell} on, expected 1 to {shells - 1}; give another {option}")


def _shells(shape: tuple[int, int, int]) -> tuple[Shells, int]:
    """Return the shell of each coefficient, flat, and the number of shells up to Nyquist."""
    # In bincount's own type, or it would convert at each of its calls.
    return shell_index(shape).ravel().astype(np.intp), max(shape) // 2 + 1


def _correlate(transforms: tuple[Complexes, Complexes], index: Shells, shells: int) -> Curve:
    first, second = transforms
    cross = _sum_product(first, second, index, shells)
    norm = np.sqrt(_sum_product(first, first, index, shells) * _sum_product(second, second, index, shells))
    return np.divide(cross, norm, out=np.zeros(shells), where=norm > 0)


def _sum_product(transform1: Complexes, transform2: Complexes, index: Shells, shells: int) -> Curve:
    """Sum Re(F1* F2) over each shell."""
    # In double from the product on: squares of small float32 densities would underflow.
    product = np.multiply(transform1.real, transform2.real, dtype=np.float64)
    product += np.multiply(transform1.imag, transform2.imag, dtype=np.float64)
    total = np.bincount(index, weights=product.ravel(), minlength=shells)[:shells]
    return total.astype(np.float64, copy=False)


def _randomise(transform: Complexes, beyond: npt.NDArray[np.bool_], rng: np.random.Generator) -> Complexes:
    """Replace phases by random ones where `beyond` says so (RELION's randomizePhasesBeyond).

    As in RELION, Friedel mates in the plane kx = 0 get phases of their own, of which the inverse transform
    keeps what makes a real map.
    """
    angles = rng.random(transform.shape, dtype=np.float32) * np.float32(2 * np.pi)
    phases = np.cos(angles) + 1j * np.sin(angles)
    return np.where(beyond, np.abs(transform) * phases, transform)


def fsc_files(
    map1: AnyPath,
    map2: AnyPath,
    *,
    mask: AnyPath | None = None,
    angpix: float | None = None,
    randomise_from: float | None = None,
    substitute_noise_from: float | None = None,
    model: str = DEFAULT_MODEL,
    gpu: bool | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> FscResult:
    """Compare two map files, within a mask where one is given.

    Parameters
    ----------
    map1, map2, mask : path
        MRC files or, for one of them, ``-``. The mask goes from 0 to 1.
    angpix : float, optional
        Pixel size in angstrom that replaces those of the headers.
    randomise_from : float, optional
        Resolution in angstrom beyond which phases are randomised; see `masked_correlation` for the default.
    substitute_noise_from : float, optional
        Resolution in angstrom beyond which noise replaces the signal in a test of a model; see
        `cryored.assessment.noise_substitution.substituted_correlation`. The maps are then raw half-maps.
    model : str
        Name or folder of the model under test.
    gpu : bool, optional
        See `cryored.prior.device.set_up`.
    seed : int
        Of the random phases and of the noise.
    threads : int, optional
        For the transforms; all cores by default.

    Raises
    ------
    InputError
        A file cannot be read, the grids differ, a map is constant, the mask is no mask, or a resolution lies
        outside the shells.
    ModelError
        The model cannot be found or used.
    """
    names = (_name(map1), _name(map2))
    volume1, volume2 = (read_volume(path, angpix=angpix) for path in (map1, map2))
    for name, volume in zip(names, (volume1, volume2), strict=True):
        if np.ptp(volume.data) == 0:
            raise InputError(f"{name}: all voxels are {volume.data.flat[0]:g}, expected a map with density")
    _check_shape(names[1], volume2, names[0], volume1)
    voxel_size = _common_voxel_size(names, volume1.voxel_size, volume2.voxel_size)
    box = max(volume1.shape)

    def shell_at(resolution: float, option: str) -> int:
        if not voxel_size:
            raise InputError(f"{names[0]}: no pixel size in the header, {option} needs it; give --angpix")
        # Downwards, as RELION does; the small number keeps 12 A of 96 A at shell 8.
        return math.floor(box * voxel_size / resolution + 1e-6)

    masked = envelope = None
    if mask is None:
        unmasked = shell_correlation(volume1.data, volume2.data, threads=threads)
    else:
        envelope = read_volume(mask, angpix=angpix)
        _check_shape(_name(mask), envelope, names[0], volume1)
        _check_mask(_name(mask), envelope.data)
        masked = masked_correlation(
            volume1.data,
            volume2.data,
            envelope.data,
            rng=np.random.default_rng(seed),
            randomise_from=None if randomise_from is None else shell_at(randomise_from, "--randomise-from"),
            threads=threads,
        )
        unmasked = masked.unmasked
    substituted = None
    if substitute_noise_from is not None:
        from cryored.assessment.noise_substitution import substituted_volumes

        substituted = substituted_volumes(
            volume1.with_voxel_size(voxel_size),
            volume2.with_voxel_size(voxel_size),
            unmasked,
            shell_at(substitute_noise_from, "--substitute-noise"),
            model=model,
            # Random numbers of its own, so that the noise is the same with and without a mask.
            rng=np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0]),
            mask=None if envelope is None else envelope.data,
            gpu=gpu,
            threads=threads,
        )
    _warn_of_doubtful(names, volume1, volume2)
    return FscResult(names, None if mask is None else _name(mask), box, voxel_size, unmasked, masked, substituted)


def _warn_of_doubtful(names: tuple[str, str], volume1: Volume, volume2: Volume) -> None:
    """Warn of two maps that are one, or that their headers place differently."""
    if np.array_equal(volume1.data, volume2.data):
        logger.warning("%s and %s hold the same map: its FSC with itself is 1 and tells nothing", *names)
    places = [(volume.origin, volume.nstart) for volume in (volume1, volume2)]
    if places[0] != places[1]:
        words = [f"origin {origin} A, start {start}" for origin, start in places]
        logger.warning(
            "%s has %s, %s has %s: compared voxel by voxel all the same; shift one of them if they lie apart",
            names[0],
            words[0],
            names[1],
            words[1],
        )


def log_summary(result: FscResult, threshold: float = 0.143) -> None:
    """Log the resolution at a threshold; warn, as relion_postprocess does, of what makes it doubtful."""
    shell = _last_above(result.best, threshold)
    kind = "unmasked" if result.masked is None else "corrected"
    place = f"{1 / result.frequency[shell]:.2f} A" if shell and result.voxel_size else f"shell {shell}"
    if shell == 0:
        logger.warning("no resolution: the %s FSC is below %g from the first shell on", kind, threshold)
    elif shell == len(result.best) - 1:
        logger.info("resolution %s (Nyquist) or better: the %s FSC never drops below %g", place, kind, threshold)
    else:
        logger.info("resolution %s: the last shell before the %s FSC drops below %g", place, kind, threshold)
    if not result.voxel_size:
        logger.warning("%s: no pixel size in the header, so no frequencies; give --angpix", result.maps[0])
    if result.substituted is not None:
        _log_invented(result.substituted, result.frequency)
    if result.masked is None:
        return
    logger.info("phases randomised from shell %d on", result.masked.randomise_from)
    if _last_above(result.unmasked, threshold) > shell:
        logger.warning("the unmasked FSC reaches further than the corrected one: does the mask cut density?")
    elif shell and result.masked.randomised[shell] > 0.1:
        logger.warning("the FSC of random phases is above 0.1 at the resolution: use a wider or softer mask")


def _log_invented(test: SubstitutedFsc, frequency: Curve) -> None:
    beyond = test.denoised_substituted[test.start :]
    logger.info(
        "beyond %.2f A: mean FSC %.3f denoised; with noise for signal %.3f denoised (invented; at most %.3f, at "
        "%.2f A), %.3f not denoised",
        1 / frequency[test.start],
        test.denoised[test.start :].mean(),
        beyond.mean(),
        beyond.max(),
        1 / frequency[test.start + beyond.argmax()],
        test.substituted[test.start :].mean(),
    )


def _name(path: AnyPath) -> str:
    return "standard input" if is_stream(path) else os.fspath(path)


def _check_shape(name: str, volume: Volume, other_name: str, other: Volume) -> None:
    if volume.shape != other.shape:
        found, expected = (" x ".join(map(str, reversed(v.shape))) for v in (volume, other))
        raise InputError(
            f"{name}: {found} voxels (x, y, z), expected {expected} as in {other_name}; resample or crop one"
        )


def _common_voxel_size(names: tuple[str, str], size1: float, size2: float) -> float:
    if size1 and size2 and abs(size1 - size2) > _VOXEL_TOLERANCE * max(size1, size2):
        raise InputError(
            f"{names[1]}: pixel size {size2:g} A, expected {size1:g} A as in {names[0]}; resample one map, "
            "or give --angpix if a header is wrong"
        )
    return size1 or size2


def _check_mask(name: str, mask: Floats) -> None:
    low, high = float(mask.min()), float(mask.max())
    if low < -_MASK_TOLERANCE or high > 1 + _MASK_TOLERANCE:
        raise InputError(f"{name}: values from {low:g} to {high:g}, expected a mask from 0 to 1; rescale it")
    if high <= 0:
        raise InputError(f"{name}: 0 everywhere, expected a mask from 0 to 1; was the threshold too high?")
