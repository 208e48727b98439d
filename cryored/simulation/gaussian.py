"""Training pairs of the method *gaussian*: intermediates of a refinement, imitated without refining.

The truth, rotationally smeared as alignment errors smear it, plus coloured noise that is stronger inside the
molecule, cut at a current image size. The target is the truth times the half-maps' FSC (Kimanius et al. 2021,
section 2.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from cryored.errors import InputError
from cryored.maps.fourier import forward, inverse, shell_index, shell_power, spatial_frequency
from cryored.maps.fsc import nominal_resolution, shell_correlation
from cryored.maps.volume import Floats, raised_cosine, soft_sphere
from cryored.simulation.density import gaussian_transform
from cryored.simulation.pair_table import Array, Pair
from cryored.simulation.structure import Atoms

_COPIES = 16  # rotated copies of each atom that make up a smeared map
_TRIES = 100  # orientations of a long molecule that are tried to fit the box
_SHIFT = 3.0  # angstrom by which the molecule leaves the centre, at most
SMOOTHING = 1.5  # shells over which the signal's power is smoothed before noise is measured by it
MOLECULE_BLUR = 12.0  # angstrom: 1/e of the amplitude at this resolution, when noise tells molecule from solvent
SPHERE = (0.42, 0.08)  # radius and soft edge of the sphere that holds noise, as shares of the box


@dataclass(frozen=True)
class Draw:
    """What one draw of the method *gaussian* looks like.

    Parameters
    ----------
    shell : float
        Shell at which the expected FSC is `level`.
    level : float
    cut : int
        Radius of the current image size: nothing is known from this shell on.
    smear, blur : float
        Alignment errors: rms rotation in radian, standard deviation of the position in angstrom.
    slope : float
        The noise power grows with frequency to this power; 1 is white noise in evenly spread images.
    solvent : float
        Amplitude of the noise in the solvent, relative to the molecule.
    bfactor : float
        Decay of the truth's amplitudes in squared angstrom.
    """

    shell: float
    level: float
    cut: int
    smear: float
    blur: float
    slope: float
    solvent: float
    bfactor: float


def draw_map(box: int, angpix: float, *, rng: np.random.Generator) -> Draw:
    """Draw at random: four of five as later iterations of a refinement, one of five as its first.

    Later iterations have a nominal resolution between 1.1 times Nyquist and 18 A (at coarser pixels 1.1 times Nyquist)
    and alignment errors of about 0.7 degrees for each angstrom, as measured in refinements of 600 particles; the first
    is cut where the FSC is still high, and its errors are those of the start.
    """
    nyquist = box // 2
    length = box * angpix
    if rng.random() < 0.2:
        shell = length / rng.uniform(7.0, 14.0)
        level, cut = rng.uniform(0.4, 0.97), int(shell) + 1
        smear = rng.uniform(3.0, 12.0)
    else:
        resolution = np.exp(rng.uniform(np.log(2.2 * angpix), np.log(max(2.2 * angpix, 18.0))))
        shell = length / resolution
        level, cut = 0.143, int(shell) + 1 + int(rng.integers(1, 12))
        smear = 0.7 * resolution * rng.uniform(0.0, 1.3)
    return Draw(
        shell=min(shell, nyquist - 1.0),
        level=level,
        cut=min(cut, nyquist),
        smear=np.deg2rad(min(smear, 15.0)),
        blur=rng.uniform(0.0, 0.12) * length / shell,
        slope=rng.uniform(0.3, 1.7),
        solvent=rng.uniform(0.3, 1.0),
        bfactor=rng.uniform(0.0, 90.0),
    )


def gaussian_pairs(
    atoms: Atoms, box: int, angpix: float, resolution: float, *, rng: np.random.Generator
) -> Iterator[tuple[Pair, Pair]]:
    """Make both halves of one draw of the method *gaussian*.

    Parameters
    ----------
    atoms : Atoms
        Turned at random, so that no direction of the box is special.
    box : int
    angpix : float
        In angstrom.
    resolution : float
        Of the truth's Gaussians, see `gaussian_transform`.

    Yields
    ------
    Two Pair, once.
    """
    draw = draw_map(box, angpix, rng=rng)
    placed = turned(atoms, box * angpix, rng)
    shape = (box, box, box)
    s = spatial_frequency(shape, angpix)
    decay = np.exp(-draw.bfactor / 4 * s**2)
    truth = gaussian_transform(placed, box, angpix, resolution) * decay
    decay = decay * np.exp(-2 * (np.pi * draw.blur * s) ** 2)
    halves = [gaussian_transform(_smeared(placed, draw.smear, rng), box, angpix, resolution) * decay for _ in range(2)]
    power = _noise_power(shell_power(halves[0], shape), draw)
    truth_map = inverse(truth, shape, 1)
    envelope = _envelope(truth_map, angpix, draw.solvent)
    maps = [inverse(half + _noise(envelope, power, rng), shape, 1) for half in halves]
    fsc = shell_correlation(maps[0], maps[1], threads=1)
    fsc[draw.cut :] = 0.0
    index = np.minimum(shell_index(shape), box // 2 + 1)
    inside = (index < draw.cut).astype(np.float32)
    weight = np.append(np.clip(fsc, 0.0, 1.0), 0.0).astype(np.float32)[index]
    target = inverse(truth * weight, shape, 1)
    nominal = nominal_resolution(np.arange(box // 2 + 1) / (box * angpix), fsc)
    first, second = (inverse(forward(noisy, 1) * inside, shape, 1) for noisy in maps)
    yield Pair(first, target, fsc, nominal, truth_map), Pair(second, target, fsc, nominal, truth_map)


def turned(atoms: Atoms, length: float, rng: np.random.Generator) -> Atoms:
    """Return the atoms turned and shifted at random; a long molecule is turned again until it is in the box.

    Parameters
    ----------
    atoms : Atoms
    length : float
        Edge of the box in angstrom.
    rng : Generator

    Raises
    ------
    InputError
        None of many orientations fits.
    """
    for _ in range(_TRIES):
        placed = atoms.moved(Rotation.random(random_state=rng).as_matrix(), rng.uniform(-_SHIFT, _SHIFT, 3))
        if 2 * np.abs(placed.positions).max() < length:
            return placed
    raise InputError(f"no orientation of the molecule fits a box of {length:g} A; use a larger --box")


def _smeared(atoms: Atoms, smear: float, rng: np.random.Generator) -> Atoms:
    """Spread each atom over turned copies of itself, as errors of the angles do."""
    if smear == 0:
        return atoms
    vectors = rng.normal(scale=smear / np.sqrt(3), size=(_COPIES * len(atoms.weights), 3))
    positions = Rotation.from_rotvec(vectors).apply(np.repeat(atoms.positions, _COPIES, axis=0))
    return Atoms(positions, np.repeat(atoms.weights, _COPIES) / _COPIES)


def _noise_power(signal: Floats, draw: Draw) -> Floats:
    """Return the noise power of each shell that gives the draw's FSC where it asks for it."""
    smooth = np.exp(gaussian_filter1d(np.log(signal + 1e-12 * signal.max()), SMOOTHING))
    at_shell = np.interp(draw.shell, np.arange(len(signal)), smooth)
    grown = (np.arange(len(signal)) / draw.shell) ** draw.slope
    return at_shell * (1 / draw.level - 1) * grown


def _noise(envelope: Array, power: Floats, rng: np.random.Generator) -> npt.NDArray[np.complex64]:
    """Return the transform of noise with the given envelope in real and power in Fourier space."""
    transform = forward(rng.standard_normal(envelope.shape, dtype=np.float32) * envelope, 1)
    mean = float(np.mean(envelope**2)) * envelope.size  # power of each coefficient before colouring
    amplitude = np.append(np.sqrt(power / mean), 0.0).astype(np.float32)
    index = np.minimum(shell_index(envelope.shape), len(power))
    return (transform * amplitude[index]).astype(np.complex64)


def molecule(truth: Array, angpix: float) -> tuple[Array, float]:
    """Return a truth blurred to `MOLECULE_BLUR`, and the level from which on a voxel lies in the molecule.

    Parameters
    ----------
    truth : (z, y, x) float32
    angpix : float
        In angstrom.

    Returns
    -------
    blurred : (z, y, x) float32
    level : float
    """
    s = spatial_frequency((truth.shape[0],) * 3, angpix)
    blurred = inverse(forward(truth, 1) * np.exp(-((MOLECULE_BLUR * s) ** 2)), truth.shape, 1)
    return blurred, 0.15 * np.percentile(blurred, 99.5)


def _envelope(truth: Array, angpix: float, solvent: float) -> Array:
    """Return the noise's amplitude: 1 in the molecule, `solvent` around it, fading at the sphere's rim."""
    blurred, level = molecule(truth, angpix)
    inside = 1 - raised_cosine(blurred / level)
    sphere = soft_sphere(truth.shape, *(share * truth.shape[0] for share in SPHERE))
    return ((solvent + (1 - solvent) * inside) * sphere).astype(np.float32)
