"""Pairs of the method *gaussian*, made by the device that trains on them, so that a GPU never waits for a CPU.

They are what `cryored.simulation.gaussian` makes of atoms, made of stored truths by Keras' own operations, whatever
the back-end: random scalars come from the host, volumes never leave the device.

A half-transform is here a pair of tensors, real and imaginary part, of shape (..., n // 2 + 1, n, n): kx, kz, ky,
because Keras transforms the last two axes at once. Every filter is radial, so nothing asks for the order of the axes
or for a map's centre.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d

from cryored.errors import InputError
from cryored.maps.fourier import multiplicity, shell_index, spatial_frequency
from cryored.maps.fsc import nominal_resolution
from cryored.maps.network_scale import REFERENCE_VOLUME
from cryored.maps.volume import soft_sphere, squared_distance
from cryored.prior.denoiser import Rotation, cube_rotations
from cryored.simulation.gaussian import MOLECULE_BLUR, SMOOTHING, SPHERE, draw_map, molecule
from cryored.simulation.pair_table import Pair
from cryored.training.batches import GREY_SCALE

_BLURS = (0.0, 0.25, 0.6, 1.0)  # blurred truths between which smearing goes, as shares of the blur at the box's edge
_UNEVEN = 0.1  # share by which the alignment errors of a half may differ from the draw's
_FULL_PRECISION = 2**31  # bytes of truths up to which they are kept as float32, above as float16
_LEAST_ERROR = 1e-8  # mean square in standardised units: the loss weight of a pair without errors stays finite

Array = npt.NDArray[np.float32]
Tensor = Any  # of the back-end
Transform = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Whole:
    """Whole boxes of a batch on the device, before anything is standardised or cut.

    Parameters
    ----------
    noisy, truth : Transform
        Of one half's map, cut at the current image size, and of the truth with its B factor.
    fsc, weight : (size, shells + 1) tensor
        Of the two halves, 0 from the current image size on, and the same between 0 and 1; the last is 0 and stands
        for all beyond Nyquist.
    """

    noisy: Transform
    truth: Transform
    fsc: Tensor
    weight: Tensor


class Synthesis:
    """Truths on the device, and the batches that are made of them.

    Parameters
    ----------
    truths : (n, z, y, x) float32
        Cubes of one box; kept on the device, as float16 where they are many, each on a grey scale of its own.
    voxel_size : float
        In angstrom.
    patch : int
        Edge of the patches in voxels, up to the box.
    input : {"regularised", "unregularised"}
        The map that the network sees: weighted by its FSC, or as it is.
    seed : int

    Raises
    ------
    InputError
        Truths that are no cubes, hold no molecule or no finite number; a patch larger than the box.
    """

    def __init__(
        self,
        truths: Array,
        voxel_size: float,
        *,
        patch: int,
        input: Literal["regularised", "unregularised"],
        seed: int,
    ) -> None:
        if truths.ndim != 4 or not len(truths) or len(set(truths.shape[1:])) != 1:
            raise InputError(f"truths of shape {truths.shape}, expected (n, z, y, x): one or more cubes of one box")
        box = truths.shape[1]
        if patch > box:
            raise InputError(f"patch {patch}, expected at most the truths' box of {box}; change --patch")
        self._box, self._voxel_size, self._patch, self._input, self._seed = box, voxel_size, patch, input, seed
        self._shells = box // 2 + 1
        stored = np.empty(truths.shape, np.float16 if truths.size * 4 > _FULL_PRECISION else np.float32)
        levels = np.empty(len(truths), dtype=np.float32)
        for number, truth in enumerate(truths):
            scale = float(np.sqrt(np.mean(np.square(truth, dtype=np.float64))))
            level = molecule(truth, voxel_size)[1] if 0 < scale < np.inf else 0.0
            if not level > 0:
                raise InputError(f"truth {number + 1} of {len(truths)}: no molecule in it, or NaN; leave it out")
            # Standardisation takes the grey scale out in the end; this one fits float16.
            stored[number], levels[number] = truth / np.float32(scale), level / scale
        shape = (box, box, box)
        s = _kx_first(spatial_frequency(shape, voxel_size))
        index = np.minimum(_kx_first(shell_index(shape)), self._shells)
        self._truths = _on_device(stored, stored.dtype.name)
        self._levels = _on_device(levels)
        self._index = _on_device(index, "int32")
        self._square = _on_device(s**2)  # of the frequency, in 1/angstrom**2
        self._counts = _on_device(np.bincount(index.ravel(), minlength=self._shells + 1))
        self._multiplicity = _on_device(multiplicity(box)[:, None, None])
        self._radius = _on_device(2 / box * np.sqrt(squared_distance(shape)))  # of a voxel, in halves of the box
        self._sphere = _on_device(soft_sphere(shape, *(share * box for share in SPHERE)))
        self._smoothing = _on_device(gaussian_filter1d(np.eye(self._shells), SMOOTHING, axis=0))

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make the batch of a step; step and seed alone decide it, but for the rounding of sums.

        Nothing here is meant to be differentiated: call it outside of what records gradients.

        Parameters
        ----------
        step, size : int

        Returns
        -------
        inputs, errors : (size, patch, patch, patch, 1) float32
            Patches of the standardised map, and the same patches of that map minus its target; one random grey
            scale on both.
        weights : (size,) float32
            One over the mean squared error of the Wiener map over the whole box, in the units of `errors`.
        """
        from keras import ops

        rng = np.random.default_rng([self._seed, step])
        whole = self._make(rng, size)
        spread = self._spread(whole.weight)
        target = _times(whole.truth, spread)
        wiener = _times(whole.noisy, spread)
        error = self._mean_square((wiener[0] - target[0], wiener[1] - target[1]))
        shown = inverse(wiener if self._input == "regularised" else whole.noisy, self._box)
        level, deviation = self._standard(shown)
        scale = _on_device(rng.uniform(*GREY_SCALE, size=size))
        place = self._patches(rng, size)
        seen, aim = (self._cut(maps, place) for maps in (shown, inverse(target, self._box)))
        factor = _column(scale / deviation)[..., None]
        weights = 1 / (ops.maximum(error / deviation**2, _LEAST_ERROR) * scale**2)
        return (seen - _column(level)[..., None]) * factor, (seen - aim) * factor, weights

    def pairs(self, step: int, size: int) -> list[Pair]:
        """Return the pairs that `batch` cuts its patches from, whole and on the host: to look at, or to store."""
        from keras import ops

        whole = self._make(np.random.default_rng([self._seed, step]), size)
        spread = self._spread(whole.weight)
        transforms = (whole.noisy, _times(whole.truth, spread), whole.truth)
        maps = [ops.convert_to_numpy(inverse(transform, self._box)) for transform in transforms]
        curves = ops.convert_to_numpy(whole.fsc)[:, :-1].astype(np.float64)
        frequency = np.arange(self._shells) / (self._box * self._voxel_size)
        return [
            Pair(noisy, target, fsc, nominal_resolution(frequency, fsc), truth)
            for noisy, target, truth, fsc in zip(*maps, curves, strict=True)
        ]

    def _make(self, rng: np.random.Generator, size: int) -> _Whole:
        """Draw `size` intermediates and make one half-map of each; the other half is there for the FSC."""
        import keras
        from keras import ops

        draws = [draw_map(self._box, self._voxel_size, rng=rng) for _ in range(size)]
        chosen = rng.integers(len(self._truths), size=size)
        strengths = rng.uniform(1 - _UNEVEN, 1 + _UNEVEN, size=(2, size))
        seeds = [int(number) for number in rng.integers(2**31, size=2)]
        shell = np.arange(self._shells + 1)
        known = _on_device([(shell < draw.cut) & (shell < self._shells) for draw in draws])
        at_shell = _on_device([np.maximum(1 - np.abs(shell - draw.shell), 0) for draw in draws])
        growth = _on_device([(1 / draw.level - 1) * (shell / draw.shell) ** draw.slope for draw in draws]) * known
        smear, blur, solvent, bfactor = (
            _column(_on_device([getattr(draw, name) for draw in draws]))
            for name in ("smear", "blur", "solvent", "bfactor")
        )
        chosen = _on_device(chosen, "int32")
        truth = ops.cast(ops.take(self._truths, chosen, axis=0), "float32")
        transform = forward(truth)
        decay = ops.exp(self._square * (-bfactor / 4))
        blurred = decay * ops.exp(self._square * (-2 * (np.pi * blur) ** 2))
        signals = [_times(forward(half), blurred) for half in self._smeared(truth, transform, smear, strengths)]
        envelope = self._envelope(transform, _column(ops.take(self._levels, chosen, axis=0)), solvent)
        power = self._noise_power(signals[0], at_shell, growth)
        amplitude = self._spread(ops.sqrt(power / ops.sum(envelope**2, axis=(1, 2, 3))[:, None]))
        halves = []
        for signal, number in zip(signals, seeds, strict=True):
            white = keras.random.normal(envelope.shape, dtype="float32", seed=number)
            noise = _times(forward(white * envelope), amplitude)
            halves.append((signal[0] + noise[0], signal[1] + noise[1]))
        fsc = self._correlation(*halves) * known
        return _Whole(_times(halves[0], self._spread(known)), _times(transform, decay), fsc, ops.clip(fsc, 0.0, 1.0))

    def _smeared(
        self, truth: Tensor, transform: Transform, smear: Tensor, strengths: npt.NDArray[np.float64]
    ) -> list[Tensor]:
        """Smear maps as errors of the angles do, once for each row of `strengths` (halves, size).

        A random rotation of rms angle a spreads what lies at radius r along the sphere, by a r / sqrt(3) in each of
        the two tangential directions. This is approximated by an isotropic blur of the same mean square shift,
        ``a r sqrt(2) / 3`` in each of three directions, which also blurs along the radius; and a blur that grows
        with the radius by going between `_BLURS`, linearly in the variance. For a protein of 80 A at 1.5 A a voxel
        that leaves 11 % (a of 3 degrees) and 23 % (8 degrees) of difference to atoms that are truly turned (relative
        L2); without smearing it would be 29 and 82 %.
        """
        from keras import ops

        halves = [truth for _ in strengths]
        widest = smear * (np.sqrt(2) / 3 * self._box * self._voxel_size / 2)  # standard deviation at the edge
        squares = [(_column(_on_device(strength)) * self._radius) ** 2 for strength in strengths]
        before = truth
        for low, high in zip(_BLURS[:-1], _BLURS[1:], strict=True):
            after = inverse(_times(transform, ops.exp(self._square * (-2 * (np.pi * high * widest) ** 2))), self._box)
            shares = [ops.clip((square - low**2) / (high**2 - low**2), 0.0, 1.0) for square in squares]
            halves = [half + share * (after - before) for half, share in zip(halves, shares, strict=True)]
            before = after
        return halves

    def _envelope(self, transform: Transform, level: Tensor, solvent: Tensor) -> Tensor:
        """Return the noise's amplitude: 1 in the molecule, `solvent` around it, fading at the sphere's rim."""
        from keras import ops

        blurred = inverse(_times(transform, ops.exp(self._square * -(MOLECULE_BLUR**2))), self._box)
        inside = 0.5 - 0.5 * ops.cos(np.pi * ops.clip(blurred / level, 0.0, 1.0))
        return (solvent + (1 - solvent) * inside) * self._sphere

    def _noise_power(self, signal: Transform, at_shell: Tensor, growth: Tensor) -> Tensor:
        """Return the noise power of each shell that gives the FSC asked for at a shell of the signal."""
        from keras import ops

        (power,) = self._shell_sums([signal[0] ** 2 + signal[1] ** 2])
        power = (power / self._counts)[:, :-1]
        logarithm = ops.log(power + 1e-12 * ops.max(power, axis=1, keepdims=True))
        # A sum and no matrix product, which some GPUs shorten to ten bits.
        smooth = ops.exp(ops.sum(logarithm[:, None, :] * self._smoothing, axis=-1))
        return ops.sum(smooth * at_shell[:, :-1], axis=1)[:, None] * growth

    def _correlation(self, first: Transform, second: Transform) -> Tensor:
        """Return the FSC, (size, shells + 1), as `cryored.maps.fsc.shell_correlation` counts coefficients."""
        from keras import ops

        products = [a[0] * b[0] + a[1] * b[1] for a, b in ((first, second), (first, first), (second, second))]
        cross, *powers = self._shell_sums(products)
        norm = ops.sqrt(powers[0]) * ops.sqrt(powers[1])
        return cross / ops.where(norm > 0, norm, ops.ones_like(norm))

    def _shell_sums(self, values: list[Tensor]) -> Tensor:
        """Sum over shells: tensors of (size, kx, kz, ky) to (len(values), size, shells + 1)."""
        from keras import ops

        rows = ops.reshape(ops.stack(values), (len(values) * values[0].shape[0], -1))
        index = ops.reshape(self._index, (-1,))
        sums = ops.segment_sum(ops.transpose(rows), index, num_segments=self._shells + 1)
        return ops.reshape(ops.transpose(sums), (len(values), -1, self._shells + 1))

    def _spread(self, table: Tensor) -> Tensor:
        """Give each coefficient the value of its shell: (size, shells + 1) to (size, kx, kz, ky)."""
        from keras import ops

        return ops.take(table, self._index, axis=1)

    def _mean_square(self, transform: Transform) -> Tensor:
        """Return the mean square over the voxels of maps (Parseval)."""
        from keras import ops

        squares = (transform[0] ** 2 + transform[1] ** 2) * self._multiplicity
        return ops.sum(squares, axis=(1, 2, 3)) / float(self._box) ** 6

    def _standard(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return level and deviation of each map as `cryored.maps.network_scale.standard_of` defines them."""
        from keras import ops

        faces = [ops.take(maps, [0, self._box - 1], axis=axis) for axis in (1, 2, 3)]
        level = sum(ops.mean(face, axis=(1, 2, 3)) for face in faces) / 3
        total = ops.sum((maps - _column(level)) ** 2, axis=(1, 2, 3))
        return level, ops.sqrt(total * (self._voxel_size**3 / REFERENCE_VOLUME))

    def _patches(self, rng: np.random.Generator, size: int) -> Tensor:
        """Draw patches in random places and rotations; return for each the index of its first voxel and three steps.

        Steps are along z, y, x of the patch, in voxels of the flat box: cutting and turning is then one gather, with
        shapes that never change.
        """
        rotations = cube_rotations()
        last = self._box - self._patch
        rows = [
            _first_and_steps(rng.integers(last + 1, size=3), rotations[rng.integers(24)], self._box, self._patch)
            for _ in range(size)
        ]
        return _on_device(rows, "int32")

    def _cut(self, maps: Tensor, place: Tensor) -> Tensor:
        """Cut patches as `_patches` placed them: (size, z, y, x) to (size, patch, patch, patch, 1)."""
        from keras import ops

        size, patch = maps.shape[0], self._patch
        along = ops.arange(patch, dtype="int32")
        first, z, y, x = (_column(place[:, column]) for column in range(4))
        index = first + z * along[:, None, None] + y * along[:, None] + x * along
        voxels = ops.take_along_axis(ops.reshape(maps, (size, -1)), ops.reshape(index, (size, -1)), axis=1)
        return ops.reshape(voxels, (size, patch, patch, patch, 1))


def forward(maps: Tensor) -> Transform:
    """Transform real maps (..., z, y, x) to half-transforms (..., kx, kz, ky) without a factor."""
    from keras import ops

    real, imaginary = ops.rfft(maps)
    return ops.fft2((ops.moveaxis(real, -1, -3), ops.moveaxis(imaginary, -1, -3)))


def inverse(transform: Transform, box: int) -> Tensor:
    """Transform half-transforms back to maps (..., z, y, x) of `box` voxels a side."""
    from keras import ops

    real, imaginary = ops.ifft2(transform)
    return ops.irfft((ops.moveaxis(real, -3, -1), ops.moveaxis(imaginary, -3, -1)), fft_length=box)


def _times(transform: Transform, factor: Tensor) -> Transform:
    return transform[0] * factor, transform[1] * factor


def _column(values: Tensor) -> Tensor:
    """Give (size,) the axes of (size, z, y, x)."""
    return values[:, None, None, None]


def _on_device(values: npt.ArrayLike | Iterable[npt.ArrayLike], dtype: str = "float32") -> Tensor:
    from keras import ops

    return ops.convert_to_tensor(np.asarray(values, dtype=dtype))


def _kx_first(half: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Order the axes of a half-transform (kz, ky, kx) as they are here."""
    return np.moveaxis(half, -1, 0)


def _first_and_steps(corner: npt.NDArray[np.int64], rotation: Rotation, box: int, patch: int) -> list[int]:
    """Return flat index of the first voxel and steps along the axes of ``rotate(data[corner ...], rotation)``."""
    strides = (box * box, box, 1)
    axes, signs = rotation
    steps = [sign * strides[axis] for axis, sign in zip(axes, signs, strict=True)]
    first = int(np.dot(corner, strides)) - sum(step * (patch - 1) for step in steps if step < 0)
    return [first, *steps]
