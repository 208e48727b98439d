"""Projections of a map as RELION makes them: rotations, central slices and the contrast transfer function.

A rotation is RELION's matrix A (``Euler_angles2matrix`` in euler.cpp): it takes x, y, z coordinates of the
map to those of the image, whose z axis is the beam. Row i of a matrix holds the image's axis i in the map's
coordinates. Images are y, x with their centre at ``n // 2``; their half-transforms are
(n, n // 2 + 1), with the zero frequency at [0, 0] and no factor on the forward transform, as in
`cryored.maps.fourier`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.fft

from cryored.errors import InputError
from cryored.maps.fourier import Complexes, forward, frequencies, half_frequencies, padded_size
from cryored.maps.volume import Floats, squared_distance, window
from cryored.reconstruction.compiled import extract_slices, log_likelihoods
from cryored.threads import default_threads, parallel, parts

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

_TRIED = 200_000  # rotations drawn at a time, of which those that suit are kept
_RUN = 64  # slices that a thread takes at a time
_POLE = 1e-8  # sin(tilt) below which rot and psi turn about the same axis


def rotation_matrices(rot: npt.ArrayLike, tilt: npt.ArrayLike, psi: npt.ArrayLike) -> Doubles:
    """Return RELION's matrices for Euler angles: about z by rot, the new y by tilt, the new z by psi.

    Parameters
    ----------
    rot, tilt, psi : (n,) float
        Degrees.

    Returns
    -------
    (n, 3, 3) float64
    """
    about_z = np.array([[[0, 1, 0], [-1, 0, 0], [0, 0, 0]]], dtype=np.float64)
    about_y = np.array([[[0, 0, -1], [0, 0, 0], [1, 0, 0]]], dtype=np.float64)
    return _turn(about_z, psi) @ _turn(about_y, tilt) @ _turn(about_z, rot)


def euler_angles(matrices: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Return rot, tilt, psi in degrees, each (n,), with tilt in [0, 180] and the others in [-180, 180].

    Where tilt is 0 or 180, only one turn about z is defined: it is put into psi, and rot is 0.
    """
    pole = np.hypot(matrices[:, 2, 0], matrices[:, 2, 1])
    tilt = np.arctan2(pole, matrices[:, 2, 2])
    free = pole < _POLE
    rot = np.where(free, 0.0, np.arctan2(matrices[:, 2, 1], matrices[:, 2, 0]))
    psi = np.where(
        free,
        np.arctan2(matrices[:, 0, 1], matrices[:, 1, 1]),
        np.arctan2(matrices[:, 1, 2], -matrices[:, 0, 2]),
    )
    return np.rad2deg(rot), np.rad2deg(tilt), np.rad2deg(psi)


def random_rotations(n: int, *, rng: np.random.Generator) -> Doubles:
    """Draw `n` rotations uniformly on SO(3), as matrices (n, 3, 3).

    Normally distributed four-vectors point uniformly on the sphere of unit quaternions (Shoemake, 1992).
    """
    quaternions = rng.standard_normal((n, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    scalar, vector = quaternions[:, :1, None], quaternions[:, 1:]
    cross = _cross_matrices(vector)
    return np.eye(3) + 2.0 * (scalar * cross + cross @ cross)


@dataclass(frozen=True)
class Views:
    """From where a molecule is seen, about an axis of its own.

    Parameters
    ----------
    unevenness : float
        The density of a beam's direction at an angle a to the axis is proportional to ``exp(unevenness cos(a)**2)``:
        above 0 views along the axis are preferred, below 0 views from the side.
    missing_cone : float
        In degrees: no beam is further than 90 minus so many from the axis, so that of the transform a cone of this half
        angle about it is never seen.
    axis : (x, y, z), optional
        Drawn at random by default.
    """

    unevenness: float = 0.0
    missing_cone: float = 0.0
    axis: tuple[float, float, float] | None = None

    @property
    def are_even(self) -> bool:
        """Whether all directions are alike."""
        return self.unevenness == 0 and self.missing_cone == 0

    def draw(self, n: int, *, rng: np.random.Generator) -> Doubles:
        """Draw `n` rotations, as matrices (n, 3, 3)."""
        if self.are_even:
            return random_rotations(n, rng=rng)
        axis = rng.standard_normal(3) if self.axis is None else np.asarray(self.axis, dtype=np.float64)
        axis = axis / np.linalg.norm(axis)
        least = np.sin(np.deg2rad(self.missing_cone))
        most = max(self.unevenness, self.unevenness * least**2)  # that the exponent reaches where views are allowed
        found: list[Doubles] = []
        while sum(map(len, found)) < n:
            many = random_rotations(min(20 * n, _TRIED), rng=rng)
            along = np.abs(many[:, 2] @ axis)
            kept = rng.random(len(many)) < np.exp(self.unevenness * along**2 - most)
            found.append(many[kept & (along >= least)])
        return np.concatenate(found)[:n]


EVEN = Views()


def perturb(matrices: Doubles, degrees: float, *, rng: np.random.Generator) -> Doubles:
    """Turn each rotation further by a small random one.

    The rotation vector (axis times angle, in the image's frame) has three independent normal components,
    each of standard deviation ``degrees / sqrt(3)``. Its axis is uniform on the sphere, and the root mean
    square of its angle is `degrees` (the mean is 0.92 of that), as long as angles beyond 180 degrees, which
    wrap, are rare.

    Parameters
    ----------
    matrices : (n, 3, 3) float64
    degrees : float
        Root mean square angle between input and output.
    """
    vectors = rng.standard_normal((len(matrices), 3)) * (degrees / np.sqrt(3.0))
    angles = np.linalg.norm(vectors, axis=1)
    axes = vectors / np.maximum(angles, np.finfo(np.float64).tiny)[:, None]
    return _turn(_cross_matrices(axes), angles) @ matrices


def angular_distance(a: Doubles, b: Doubles) -> Doubles:
    """Return the angle in degrees, (n,), of the rotation that takes each of `a` to its partner in `b`."""
    # |A - B| = sqrt(8) sin(angle / 2) keeps the small angles that the arccos of the trace loses in rounding.
    chord: Doubles = np.linalg.norm(a - b, axis=(1, 2)) / np.sqrt(8.0)
    return np.rad2deg(2.0 * np.arcsin(np.minimum(chord, 1.0)))


def _turn(generators: Doubles, degrees: npt.ArrayLike) -> Doubles:
    """Rotate by angles about unit axes given as cross-product matrices (Rodrigues' formula)."""
    angle = np.deg2rad(np.atleast_1d(np.asarray(degrees, dtype=np.float64)))[:, None, None]
    return np.eye(3) + np.sin(angle) * generators + (1.0 - np.cos(angle)) * (generators @ generators)


def _cross_matrices(vectors: Doubles) -> Doubles:
    """Return for each vector v the matrix that takes w to the vector product v x w."""
    matrices = np.zeros((len(vectors), 3, 3))
    for i, (j, k) in enumerate(((1, 2), (2, 0), (0, 1))):
        matrices[:, k, j] = vectors[:, i]
        matrices[:, j, k] = -vectors[:, i]
    return matrices


class Projector:
    """Central slices of a map's transform, as RELION's ``Projector`` makes them (projector.cpp).

    The map is padded to a multiple of its box. Linear interpolation between Fourier coefficients multiplies the map
    by a squared sinc, so the map is divided by it beforehand (``griddingCorrect``, a function of the
    distance from the centre). A projection is the sum of the map along the beam. Coefficients at and beyond
    Nyquist (``|k| >= n / 2``) are 0: half of those at Nyquist have no partner in an even box.

    Parameters
    ----------
    data : (n, n, n) float32
        The map with its centre at ``n // 2``; n may be odd.
    padding : float
        RELION projects particles with 2, and references as ``--pad`` says.
    threads : int, optional
        All cores by default.
    """

    def __init__(self, data: Floats, *, padding: float = 2.0, threads: int | None = None) -> None:
        if len(set(data.shape)) != 1 or data.ndim != 3:
            raise InputError(f"a map of {' x '.join(map(str, data.shape))} voxels, expected a cube")
        self.box = len(data)
        self._threads = threads or default_threads()
        self.padding = padding
        padded = padded_size(padding, self.box)
        distance = np.sqrt(squared_distance(data.shape), dtype=np.float32)
        corrected = data.astype(np.float32, copy=False) / np.sinc(distance / np.float32(padded)) ** 2
        self._transform = forward(window(corrected, (padded,) * 3), self._threads)

    def slices(self, rotations: Doubles) -> Complexes:
        """Return the half-transforms (m, n, n // 2 + 1) complex64 of the projections for m `rotations`."""
        result = np.empty((len(rotations), self.box, self.box // 2 + 1), dtype=np.complex64)

        def extract(part: slice) -> None:
            extract_slices(self._transform, rotations[part], self.padding, result[part])

        parallel(extract, parts(len(rotations), _RUN), self._threads)
        return result

    def log_likelihoods(
        self, slices: Complexes, weights: Singles, rotations: Doubles, shifts: Doubles, r_max: int
    ) -> Doubles:
        """Compare each of m images with the map in c poses of its own (see `compiled.log_likelihoods`).

        Parameters
        ----------
        slices : (m, n, n // 2 + 1) complex64
            Half-transforms of the images, times CTF over noise power.
        weights : (m, n, n // 2 + 1) float32
            CTF squared over noise power.
        rotations : (m, c, 3, 3) float64
        shifts : (m, c, 2) float64
            x and y of the particle in pixels.
        r_max : int
            Radius up to which coefficients are compared.

        Returns
        -------
        (m, c) float64
        """
        result = np.empty(rotations.shape[:2])

        def compare(part: slice) -> None:
            log_likelihoods(
                self._transform,
                self.padding,
                slices[part],
                weights[part],
                rotations[part],
                shifts[part],
                r_max,
                result[part],
            )

        parallel(compare, parts(len(slices), _RUN), self._threads)
        return result

    def project(self, rotations: Doubles) -> Singles:
        """Return the projections (m, n, n) float32 for `rotations` (m, 3, 3)."""
        return images(self.slices(rotations), self.box, self._threads)


def images(slices: Complexes, box: int, threads: int | None = None) -> Singles:
    """Transform half-transforms (m, n, n // 2 + 1) back to images (m, n, n), their centre at ``n // 2``."""
    real = scipy.fft.irfft2(slices, s=(box, box), workers=threads or default_threads())
    return np.asarray(scipy.fft.fftshift(real, axes=(1, 2)), dtype=np.float32)


def shift_phases(box: int, x: npt.ArrayLike, y: npt.ArrayLike) -> Complexes:
    """Return the factors (m, n, n // 2 + 1) complex64 that move images by x and y pixels, each (m,)."""
    ramps = [
        np.exp(-2j * np.pi / box * np.multiply.outer(np.asarray(shift, dtype=np.float64), axis))
        for shift, axis in ((y, frequencies(box)), (x, half_frequencies(box)))
    ]
    return (ramps[0][:, :, None] * ramps[1][:, None, :]).astype(np.complex64)


def ctf(
    box: int,
    voxel_size: float,
    defocus_u: npt.ArrayLike,
    defocus_v: npt.ArrayLike,
    angle: npt.ArrayLike,
    voltage_kv: float,
    cs_mm: float,
    amplitude_contrast: float,
) -> Singles:
    """Return the contrast transfer function with RELION's sign (``CTF::getCTF`` in ctf.cpp).

    ``sin(pi lambda D k^2 - pi/2 Cs lambda^3 k^4 + arcsin(Q))``: it is Q, positive, at the zero frequency, so
    dense matter is bright in the images.

    Parameters
    ----------
    box : int
        Edge n of the images in pixels.
    voxel_size : float
        Edge of a pixel in angstrom.
    defocus_u, defocus_v : float or (m,)
        Underfocus in angstrom along the axis at `angle` and across it.
    angle : float or (m,)
        Angle from the x axis to that of `defocus_u`, in degrees.
    voltage_kv, cs_mm : float
        Acceleration voltage in kilovolt, spherical aberration in millimetre.
    amplitude_contrast : float
        Fraction Q of amplitude contrast, 0 to 1.

    Returns
    -------
    (n, n // 2 + 1) or (m, n, n // 2 + 1) float32, zero frequency at [..., 0, 0]
    """
    u, v, axis = (np.asarray(a, dtype=np.float64)[..., None, None] for a in (defocus_u, defocus_v, angle))
    y = frequencies(box)[:, None] / (box * voxel_size)
    x = half_frequencies(box)[None, :] / (box * voxel_size)
    squared = x**2 + y**2
    azimuth = np.arctan2(y, x) - np.deg2rad(axis)
    defocus = 0.5 * (u + v + (u - v) * np.cos(2.0 * azimuth))
    return ctf_at(squared, defocus, voltage_kv, cs_mm, amplitude_contrast)


def ctf_at(squared: Doubles, defocus: Doubles, voltage_kv: float, cs_mm: float, amplitude_contrast: float) -> Singles:
    """Return `ctf` at squared frequencies in 1/angstrom**2, of an underfocus in angstrom; the two are broadcast."""
    volt = 1e3 * voltage_kv
    wavelength = 12.2643247 / np.sqrt(volt * (1.0 + 0.978466e-6 * volt))  # angstrom, relativistic
    phase = np.pi * wavelength * defocus * squared - 0.5 * np.pi * 1e7 * cs_mm * wavelength**3 * squared**2
    return np.asarray(np.sin(phase + np.arcsin(amplitude_contrast)), dtype=np.float32)
