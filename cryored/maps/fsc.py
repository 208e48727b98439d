"""Fourier shell correlation of two maps, with and without a mask, as RELION computes it.

Shell i holds the coefficients whose distance from the origin rounds to i; its spatial frequency is
``i / (box * voxel_size)`` in 1/angstrom with `box` the longest edge, and shell ``box // 2`` is Nyquist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.maps.fourier import Complexes, forward, inverse, shell_index, spatial_frequency
from cryored.maps.volume import Floats

Curve = npt.NDArray[np.float64]
Shells = npt.NDArray[np.intp]

_RANDOMISE_BELOW = 0.8  # relion_postprocess --randomize_at_fsc
_KEPT_SHELLS = 2  # from the first randomised shell on, where the correction would show its edge
_PEAK = 8.0  # standard deviations by which a phase correlation's peak stands out
_NOTHING_LEFT = 1e-6  # 1 - randomised FSC below which the correction has no meaning


@dataclass(frozen=True)
class FscCurve:
    """A correlation by spatial frequency.

    Parameters
    ----------
    frequency : (n,) float64
        In 1/angstrom, rising; shell 0 at 0.
    fsc : (n,) float64
        Correlation of each shell.
    masked : bool
        Within a mask and corrected for it, as far as the file tells.
    """

    frequency: Curve
    fsc: Curve
    masked: bool = False


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
class SubstitutedFsc:
    """What a denoiser makes common to two maps that have nothing in common beyond a shell.

    Parameters
    ----------
    start : int
        First shell in which noise stands for the signal.
    substituted : (n_shells,) float64
        FSC of the maps with noise, before the denoiser: the control, about 0 from `start` on but for the mask.
    denoised : (n_shells,) float64
        FSC of the denoised maps.
    denoised_substituted : (n_shells,) float64
        FSC of the denoised maps with noise: from `start` on it is invented.
    """

    start: int
    substituted: Curve
    denoised: Curve
    denoised_substituted: Curve


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


class NothingToRandomiseError(InputError):
    """Two maps are alike in all shells, so none tells what a mask adds."""


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
    NothingToRandomiseError
        The unmasked FSC never drops below 0.8.
    InputError
        `randomise_from` is shell 0 or beyond Nyquist.
    """
    shape = data1.shape
    index, shells = _shells(shape)
    transforms = forward(data1, threads), forward(data2, threads)
    unmasked = _correlate(transforms, index, shells)
    if randomise_from is None:
        randomise_from = _first_below(unmasked, _RANDOMISE_BELOW)
        if randomise_from is None:
            raise NothingToRandomiseError(
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


def shift_between(data1: Floats, data2: Floats, *, threads: int | None = None) -> tuple[int, int, int]:
    """Return by how many whole voxels (x, y, z) the second map lies off the first, as far as they tell.

    Where the phase correlation of the coarse half of the shells peaks (Kuglin & Hines 1975). 0 unless the peak stands
    out and is well above what the maps have in common where they are.

    Parameters
    ----------
    data1, data2 : (z, y, x) float
        Maps of one shape.
    """
    shape = data1.shape
    cross = forward(data2, threads) * np.conj(forward(data1, threads))
    index = shell_index(shape)
    coarse = (index > 0) & (index <= max(shape) // 4)
    size = np.abs(cross)
    cross = np.divide(cross, size, out=np.zeros_like(cross), where=coarse & (size > 0))
    # `inverse` puts a shift of nothing at the centre.
    found = inverse(cross, shape, threads)
    peak = np.unravel_index(int(found.argmax()), shape)
    here = found[tuple(n // 2 for n in shape)]
    if found[peak] < _PEAK * found.std() or found[peak] < 2 * here:
        return 0, 0, 0
    z, y, x = (int(at) - n // 2 for at, n in zip(peak, shape, strict=True))
    return x, y, z


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
    shell = last_above(curve, threshold)
    return float(1 / frequency[shell]) if shell else math.inf


def crossing_resolution(frequency: Curve, curve: Curve, threshold: float = 0.143) -> float:
    """Return the resolution in angstrom at which a curve first crosses a threshold, between shells.

    As `nominal_resolution`, but linear in frequency between the last shell above the threshold and the next,
    so that small gains show.
    """
    shell = last_above(curve, threshold)
    if shell == 0:
        return math.inf
    if shell == len(curve) - 1:
        return float(1 / frequency[shell])
    fraction = (curve[shell] - threshold) / (curve[shell] - curve[shell + 1])
    return float(1 / (frequency[shell] + fraction * (frequency[shell + 1] - frequency[shell])))


def _first_below(curve: Curve, threshold: float) -> int | None:
    below = np.flatnonzero(curve[1:] < threshold)
    return int(below[0]) + 1 if below.size else None


def last_above(curve: Curve, threshold: float) -> int:
    """Return the last shell before a curve first drops below a threshold; 0 where it is below from shell 1 on."""
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
