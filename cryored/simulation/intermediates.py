"""Training pairs of the method *intermediates*: a refinement in miniature, in seconds instead of minutes.

Particles of the truth are made as slices, with CTF and noise, and refined as RELION refines them from perturbed
angles: two independent halves, each aligned to its own MAP map by local searches with soft assignment, and
back-projected with RELION's interpolation up to its current image size. So the errors of the maps are those of a
refinement: noise coloured by CTF and uneven views, angles that are wrong because the reference is noisy, and the
noise of the particles in the reference that they are aligned to. What is left out is what makes RELION slow: the
search tries a few dozen random poses around the last one instead of all of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np
from scipy.spatial.transform import Rotation
from scipy.special import softmax

from cryored.errors import InputError
from cryored.maps.fourier import Complexes, apply_shells, frequencies, half_frequencies, low_pass, squared_radius
from cryored.maps.fsc import nominal_resolution
from cryored.maps.truth_scale import grey_scale, reliable_shells
from cryored.maps.volume import soft_sphere
from cryored.reconstruction.back_projection import BackProjector, half_map_correlation
from cryored.reconstruction.projection import EVEN, Doubles, Projector, Singles, Views, ctf, perturb, shift_phases
from cryored.reconstruction.update import Accumulators, Shells, reconstruct
from cryored.simulation.density import gaussian_map
from cryored.simulation.features import draw_features, draw_views, featured_map
from cryored.simulation.gaussian import turned
from cryored.simulation.pair_table import Array, Pair
from cryored.simulation.particles import Microscope
from cryored.simulation.structure import Atoms

ROUNDS = (1.0, 0.5, 0.25)  # width of the search about the best pose so far, in spreads; one round after the other
POSES = 24  # that a particle tries in a round
_LEAST = 0.01  # probability, over the best pose's, below which a pose is not used
NARROWER = 0.7  # from one iteration's spread of the search to the next
LEAST_ANGLE, LEAST_SHIFT = 3.0, 0.5  # degrees and pixels: the spread never falls below
INCREASE = 10  # shells by which the current image size exceeds the resolution (RELION's incr_size)
_HIGH_FSC = 0.2  # at the current image size's limit: then it grows faster
JOIN = 40.0  # angstrom down to which the halves are joined, so that they do not drift apart
PATIENCE = 2  # iterations without a better resolution that end a refinement


@dataclass(frozen=True)
class Experiment:
    """A data set and the start of its refinement.

    Parameters
    ----------
    number : int
        Particles, of both halves together.
    snr : float
        Variance of the noise-free pixels over that of the noise.
    angle, shift : float
        Start errors: root mean square angle in degrees, standard deviation of x and of y in pixels.
    defocus : (float, float)
        Range of the underfocus in angstrom.
    pad : float
        RELION's padding factor.
    ini_high : float
        Resolution of the starting reference in angstrom.
    """

    number: int
    snr: float
    angle: float = 5.0
    shift: float = 0.0
    defocus: tuple[float, float] = (2000.0, 20000.0)
    pad: float = 1.0
    ini_high: float = 30.0


@dataclass(frozen=True)
class Intermediate:
    """What an iteration gives: B and K of both halves, their FSC, half the current image size."""

    halves: tuple[Accumulators, Accumulators]
    fsc: Shells
    r_max: int


def draw_experiment(*, rng: np.random.Generator) -> Experiment:
    """Draw at random: from a few noisy particles that stay at 30 A to what reaches Nyquist."""
    return Experiment(
        number=int(np.exp(rng.uniform(np.log(150), np.log(1200)))),
        snr=float(np.exp(rng.uniform(np.log(0.002), np.log(0.4)))),
        angle=float(rng.uniform(3.0, 20.0)),
        shift=float(rng.uniform(0.0, 1.5)),
        pad=float(rng.choice([1.0, 2.0])),
    )


def intermediate_pairs(
    atoms: Atoms, box: int, angpix: float, resolution: float, *, rng: np.random.Generator
) -> Iterator[tuple[Pair, Pair]]:
    """Yield both halves of each iteration of one drawn experiment.

    Parameters
    ----------
    atoms : Atoms
        Turned at random, so that no direction of the box is special.
    box : int
        Even.
    angpix : float
        In angstrom.
    resolution : float
        Of the truth's Gaussians, see `cryored.simulation.density.gaussian_transform`.

    Raises
    ------
    InputError
        The box is odd, or the molecule does not fit it.
    """
    _check_box(box)
    molecule = turned(atoms, box * angpix, rng)
    truth = gaussian_map(molecule, box, angpix, resolution).data
    yield from _refined(truth, molecule, angpix, EVEN, rng)


def featured_pairs(
    atoms: Atoms, box: int, angpix: float, resolution: float, *, rng: np.random.Generator
) -> Iterator[tuple[Pair, Pair]]:
    """Yield what `intermediate_pairs` does, of density with the features of real maps, seen unevenly.

    Draws of `cryored.simulation.features`.
    """
    _check_box(box)
    molecule = turned(atoms, box * angpix, rng)
    truth = featured_map(molecule, box, angpix, resolution, draw_features(rng=rng), rng=rng)
    yield from _refined(truth, molecule, angpix, draw_views(rng=rng), rng)


def _check_box(box: int) -> None:
    if box % 2:
        raise InputError(f"box {box}, expected an even number, as RELION refines; use --box {box + 1}")


def _refined(
    truth: Array, molecule: Atoms, angpix: float, views: Views, rng: np.random.Generator
) -> Iterator[tuple[Pair, Pair]]:
    extent = 2 * float(np.linalg.norm(molecule.positions, axis=1).max()) + 10.0
    experiment = draw_experiment(rng=rng)
    for intermediate in trajectory(truth, angpix, experiment, diameter=extent, views=views, rng=rng):
        yield pairs_of(intermediate, truth, angpix)


def pairs_of(intermediate: Intermediate, truth: Array, angpix: float) -> tuple[Pair, Pair]:
    """Reconstruct both halves without a prior, on the truth's grey scale; the target is the truth times their FSC.

    Errors of the angles weaken the map. As in a harvest of real data, whose scale is not known otherwise, that is
    undone (see `grey_scale`); where no shell is reliable, the map stays as it is.
    """
    fsc = intermediate.fsc
    box = len(truth)
    target = apply_shells(truth, np.clip(fsc, 0.0, 1.0))
    nominal = nominal_resolution(np.arange(box // 2 + 1) / (box * angpix), fsc)
    matched = []
    for sums in intermediate.halves:
        noisy = reconstruct(sums)
        if reliable_shells(fsc).any():
            noisy = noisy / np.float32(grey_scale(noisy, truth, fsc))
        matched.append(Pair(noisy, target, fsc, nominal, truth))
    return matched[0], matched[1]


def trajectory(
    truth: Array,
    angpix: float,
    experiment: Experiment,
    *,
    diameter: float,
    iterations: int = 12,
    views: Views = EVEN,
    rng: np.random.Generator,
) -> Iterator[Intermediate]:
    """Refine an experiment and yield each iteration.

    Parameters
    ----------
    truth : (n, n, n) float32
    angpix : float
        In angstrom.
    experiment : Experiment
    diameter : float
        Of the spherical mask on the references, in angstrom.
    iterations : int
        At most; fewer where the resolution stays the same.
    views : Views
    """
    box = len(truth)
    halves = _make_halves(truth, angpix, experiment, views, rng)
    mask = soft_sphere(truth.shape, diameter / angpix / 2, 5.0)
    references = [low_pass(truth, angpix, experiment.ini_high)] * 2
    r_max = min(box // 2, round(box * angpix / experiment.ini_high) + INCREASE)
    angle, shift = experiment.angle, max(experiment.shift, 1.0)
    best, stalled = math.inf, 0
    for iteration in range(iterations):
        sums = [
            half.step(Projector(reference * mask, padding=experiment.pad), r_max, np.deg2rad(angle), shift)
            for half, reference in zip(halves, references, strict=True)
        ]
        _join(sums[0], sums[1], math.ceil(box * angpix / JOIN))
        fsc = half_map_correlation(sums[0], sums[1])
        yield Intermediate((sums[0], sums[1]), fsc, r_max)
        resolution = nominal_resolution(np.arange(box // 2 + 1) / (box * angpix), fsc)
        stalled = 0 if resolution < best else stalled + 1
        if stalled == PATIENCE:
            return
        best = min(best, resolution)
        references = [reconstruct(half, prior=map_prior(half, fsc)) for half in sums]
        r_max = next_radius(fsc, r_max, box, first=iteration == 0)
        angle, shift = max(NARROWER * angle, LEAST_ANGLE), max(NARROWER * shift, LEAST_SHIFT)


def map_prior(sums: Accumulators, fsc: Shells) -> Shells:
    """Return what the MAP update adds to K in each shell: its mean weight over the signal-to-noise ratio.

    The ratio is FSC / (1 - FSC), as RELION estimates tau2 in a refinement of halves (updateSSNRarrays). Shells
    without weight get 0.
    """
    radius = np.sqrt(squared_radius(sums.n))
    inside = radius < sums.r_max * sums.pad
    shell = np.floor(radius[inside] / sums.pad + 0.5).astype(np.intp)
    length = sums.ori // 2 + 1
    mean = np.bincount(shell, sums.weight[inside], length) / np.maximum(np.bincount(shell, minlength=length), 1)
    known = np.clip(fsc, 0.001, 0.999)
    return mean * (1 - known) / known


class _Half:
    """The particles of one half, where they are believed to be, and how strong their noise is believed to be.

    Parameters
    ----------
    images : (m, n, n // 2 + 1) complex64
        Half-transforms, with CTF and noise.
    transfer : (m, n, n // 2 + 1) float32
        CTF.
    rotations : (m, 3, 3) float64
    shifts : (m, 2) float64
        In pixels.
    rng : numpy.random.Generator
    """

    def __init__(
        self, images: Complexes, transfer: Singles, rotations: Doubles, shifts: Doubles, rng: np.random.Generator
    ) -> None:
        self._images = images
        self._transfer = transfer
        self._rotations = rotations
        self._shifts = shifts
        self._rng = rng
        # Like RELION, start from the power of the images themselves: the first search is a vague one.
        self._set_noise(images)

    def _set_noise(self, residuals: Complexes) -> None:
        """Take the mean power of each shell as the noise's."""
        box = residuals.shape[1]
        y, x = frequencies(box)[:, None], half_frequencies(box)[None, :]
        index = np.floor(np.hypot(y, x) + 0.5).astype(np.intp)
        power = np.mean(residuals.real**2 + residuals.imag**2, axis=0)
        mean = np.bincount(index.ravel(), power.ravel()) / np.bincount(index.ravel())
        noise = mean[index].astype(np.float32)
        self._slices = self._images * (self._transfer / noise)
        self._weights = self._transfer**2 / noise

    def step(self, reference: Projector, r_max: int, angle: float, shift: float) -> Accumulators:
        """Align the particles to a reference and back-project them.

        A pose is written as five numbers: rotation vector and shift, in units of their spreads, seen from the
        last pose. The prior is a standard normal distribution of them, and the poses tried are drawn from normal
        distributions that narrow about the best pose so far; a pose's probability is its posterior over the
        density of the poses tried around it.
        """
        count = len(self._slices)
        centre = np.zeros((count, 1, 5))
        tried, likelihood, density = [], [], []
        for width in ROUNDS:
            poses = centre + width * self._rng.standard_normal((count, POSES, 5))
            rotations, shifts = self._poses(poses, angle, shift)
            likelihood.append(reference.log_likelihoods(self._slices, self._weights, rotations, shifts, r_max))
            tried.append(poses)
            density.append((centre, width))
            so_far = np.concatenate(tried, axis=1)
            score = np.concatenate(likelihood, axis=1) - np.square(so_far).sum(axis=2) / 2
            centre = np.take_along_axis(so_far, score.argmax(axis=1)[:, None, None], axis=1)
        drawn = sum(
            np.exp(-np.square(so_far - middle).sum(axis=2) / (2 * width**2)) / width**5 for middle, width in density
        )
        probability = softmax(score - np.log(drawn), axis=1)
        index, which = np.nonzero(probability > _LEAST * probability.max(axis=1, keepdims=True))
        factors = probability[index, which]
        factors /= np.bincount(index, factors)[index]
        rotations, shifts = self._poses(so_far, angle, shift)
        projector = BackProjector(reference.box, pad=reference.padding, r_max=r_max)
        projector.add(
            self._slices,
            self._weights,
            rotations[index, which],
            index=index,
            factors=factors,
            shifts=shifts[index, which],
        )
        best_rotations, best_shifts = self._poses(centre, angle, shift)
        self._rotations, self._shifts = best_rotations[:, 0], best_shifts[:, 0]
        expected = reference.slices(self._rotations) * shift_phases(reference.box, *self._shifts.T)
        self._set_noise(self._images - self._transfer * expected)
        return projector.sums()

    def _poses(self, poses: Doubles, angle: float, shift: float) -> tuple[Doubles, Doubles]:
        """Return rotations (m, c, 3, 3) and shifts (m, c, 2) of poses (m, c, 5)."""
        vectors = poses[..., :3].reshape(-1, 3) * angle
        turns = Rotation.from_rotvec(vectors).as_matrix().reshape(*poses.shape[:2], 3, 3)
        return turns @ self._rotations[:, None], self._shifts[:, None] + shift * poses[..., 3:]


def _make_halves(
    truth: Array, angpix: float, experiment: Experiment, views: Views, rng: np.random.Generator
) -> list[_Half]:
    box = len(truth)
    number = experiment.number
    rotations = views.draw(number, rng=rng)
    slices = Projector(truth).slices(rotations)
    defocus = rng.uniform(*experiment.defocus, size=number)
    transfer = ctf(box, angpix, defocus, defocus, 0.0, *astuple(Microscope()))
    slices *= transfer
    # Pixel variance of the clean images, by Parseval: the columns x > 0 of a half-transform stand for two.
    power = slices.real**2 + slices.imag**2
    variance = float(2 * power[:, :, 1:].sum(dtype=np.float64) + power[:, 1:, 0].sum(dtype=np.float64))
    noise = variance / (number * box**2) / experiment.snr  # mean of |noise|^2 of a coefficient
    for part in (slices.real, slices.imag):
        part += np.float32(math.sqrt(noise / 2)) * rng.standard_normal(part.shape, dtype=np.float32)
    start = perturb(rotations, experiment.angle, rng=rng)
    shifts = experiment.shift * rng.standard_normal((number, 2))
    middle = number // 2
    return [
        _Half(slices[part], transfer[part], start[part], shifts[part], own)
        for part, own in zip((slice(middle), slice(middle, number)), rng.spawn(2), strict=True)
    ]


def _join(first: Accumulators, second: Accumulators, shell: int) -> None:
    """Give both halves the same B and K below a shell, each the mean (joinTwoHalvesAtLowResolution)."""
    inside = squared_radius(first.n) < round(shell * first.pad) ** 2
    for a, b in ((first.real, second.real), (first.imag, second.imag), (first.weight, second.weight)):
        a[inside] = b[inside] = (a[inside] + b[inside]) / 2


def next_radius(fsc: Shells, r_max: int, box: int, *, first: bool) -> int:
    """Return half the next current image size (updateImageSizeAndResolutionPointers in RELION's ml_optimiser.cpp).

    In the first iteration the poses are too uncertain for the faster growth.
    """
    below = np.flatnonzero(fsc < 0.5)
    resolved = int(below[0]) - 1 if below.size else r_max
    high = fsc[r_max - 1] > _HIGH_FSC
    increase = round(0.25 * (box // 2)) if high and not first else INCREASE
    return min(max(resolved, 1) + increase, box // 2)
