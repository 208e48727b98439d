"""Refinements in miniature where the network is trained: what `cryored.simulation.intermediates` does on CPUs.

Slices of a truth with CTF and noise are aligned, in two halves, to their own MAP maps by local searches with soft
assignment, and back-projected by linear interpolation. All of it is Keras' own operations on the device, so a GPU
makes a refinement of some hundred particles in about a second. Padding is 1; of a particle's poses the most probable
few are back-projected.

A volume's transform is here a row of complex numbers (two columns) for each coefficient of the whole cube, z slowest,
zero frequency first, phases relative to the map's centre.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.maps.fourier import frequencies
from cryored.maps.fsc import nominal_resolution
from cryored.maps.truth_scale import RELIABLE
from cryored.maps.volume import soft_sphere, squared_distance
from cryored.reconstruction.projection import EVEN, Views, ctf_at, perturb
from cryored.simulation.intermediates import (
    INCREASE,
    JOIN,
    LEAST_ANGLE,
    LEAST_SHIFT,
    NARROWER,
    PATIENCE,
    POSES,
    ROUNDS,
    Experiment,
    next_radius,
)
from cryored.simulation.particles import Microscope

_USED = 16  # most probable poses of a particle that are back-projected
_AT_A_TIME = 1 << 22  # interpolated coefficients
_STEPS = 6  # radii of the image size: few, because compilers make a program for each shape

Doubles = npt.NDArray[np.float64]
Tensor = Any  # of the back-end


@dataclass(frozen=True)
class Half:
    """A half-map of an iteration, on the truth's grey scale, on the device.

    Parameters
    ----------
    regularised, unregularised : (n, n, n) float32
        The MAP map, and B / K.
    """

    regularised: Tensor
    unregularised: Tensor


@dataclass(frozen=True)
class Iteration:
    """Both halves of an iteration.

    Parameters
    ----------
    number : int
        From 1.
    halves : (Half, Half)
    fsc : (n // 2 + 1,) float64
        0 from the current image size on.
    resolution : float
        Nominal, in angstrom.
    """

    number: int
    halves: tuple[Half, Half]
    fsc: Doubles
    resolution: float


class Refiner:
    """What refinements of one box have in common.

    Parameters
    ----------
    box : int
        Even.
    voxel_size : float
        In angstrom.
    """

    def __init__(self, box: int, voxel_size: float) -> None:
        from keras import ops

        self._box = box
        self._voxel_size = voxel_size
        half = box // 2
        y, x = (axis.ravel() for axis in np.meshgrid(frequencies(box), np.arange(half), indexing="ij"))
        independent = (np.hypot(x, y) < half) & ((x > 0) | (y >= 0))
        order = np.argsort(np.hypot(x, y)[independent], kind="stable")
        self._plane = np.stack([x[independent][order], y[independent][order]], axis=1).astype(np.float32)
        self._plane_radius = np.hypot(*self._plane.T)
        cube = np.meshgrid(*[frequencies(box)] * 3, indexing="ij")
        radius = np.sqrt(sum(np.square(axis, dtype=np.float64) for axis in cube)).ravel()
        self._radius = ops.convert_to_tensor(radius.astype(np.float32))
        shell = np.minimum(np.floor(radius + 0.5), half + 1)
        self._shell = ops.convert_to_tensor(shell.astype(np.int32))
        self._count = np.bincount(shell.astype(int), minlength=half + 2)[: half + 1]
        self._sphere = ops.convert_to_tensor(soft_sphere((box,) * 3, box / 2, 3.0))
        distance = np.sqrt(squared_distance((box, box, box)))
        self._gridding, self._fine_gridding = (
            ops.convert_to_tensor((1 / np.sinc(distance / size) ** 2).astype(np.float32)) for size in (box, 2 * box)
        )

    def run(
        self,
        truth: Tensor,
        start: Tensor,
        experiment: Experiment,
        *,
        diameter: float,
        views: Views = EVEN,
        iterations: int = 12,
        rng: np.random.Generator,
    ) -> Iterator[Iteration]:
        """Refine an experiment.

        Parameters
        ----------
        truth : (n, n, n) float32
            On the device.
        start : (n, n, n) float32
            The first reference, before it is filtered to `experiment.ini_high`.
        experiment : Experiment
            Its `pad` does not count.
        diameter : float
            Of the spherical mask on the references, in angstrom.
        views : Views
        iterations : int
            At most.
        rng : numpy.random.Generator
        """
        from keras import ops

        box, length = self._box, self._box * self._voxel_size
        particles = self._particles(truth, experiment, views, rng)
        mask = ops.convert_to_tensor(soft_sphere((box,) * 3, diameter / self._voxel_size / 2, 5.0))
        cutoff = ops.cast(self._radius < length / experiment.ini_high, "float32")[:, None]
        first = self.inverse(self.forward(start) * cutoff)
        references = [first, first]
        r_max = self._allowed(round(length / experiment.ini_high) + INCREASE)
        angle, shift = experiment.angle, max(experiment.shift, 1.0)
        known = self.forward(truth)
        best, stalled = math.inf, 0
        for number in range(1, iterations + 1):
            sums = particles.step([reference * mask for reference in references], r_max, np.deg2rad(angle), shift, rng)
            sums = self._joined(sums, math.ceil(length / JOIN))
            average = [one[:, :2] / ops.maximum(one[:, 2:], 1e-30) for one in sums]
            fsc = self.correlation(average[0], average[1])
            fsc[r_max:] = 0.0
            resolution = nominal_resolution(np.arange(box // 2 + 1) / length, fsc)
            factor = self._grey_scale(average, known, fsc)
            maps = [self._reconstruct(one, fsc) for one in sums]
            yield Iteration(
                number,
                (
                    Half(maps[0][0] / factor, maps[0][1] / factor),
                    Half(maps[1][0] / factor, maps[1][1] / factor),
                ),
                fsc,
                resolution,
            )
            stalled = 0 if resolution < best else stalled + 1
            if stalled == PATIENCE:
                return
            best = min(best, resolution)
            references = [regularised for regularised, _ in maps]
            r_max = self._allowed(next_radius(fsc, r_max, self._box, first=number == 1))
            angle, shift = max(NARROWER * angle, LEAST_ANGLE), max(NARROWER * shift, LEAST_SHIFT)

    def forward(self, data: Tensor) -> Tensor:
        """Transform a map, centred, (n, n, n) to (n**3, 2)."""
        from keras import ops

        shifted = ops.roll(data, (data.shape[0] // 2,) * 3, axis=(0, 1, 2))
        real, imaginary = ops.fft2((shifted, ops.zeros_like(shifted)))
        real, imaginary = (ops.moveaxis(part, 0, -1) for part in (real, imaginary))
        real, imaginary = ops.fft((real, imaginary))
        return ops.stack([ops.reshape(ops.moveaxis(part, -1, 0), (-1,)) for part in (real, imaginary)], axis=1)

    def inverse(self, transform: Tensor) -> Tensor:
        """Transform (n**3, 2) back to a centred map (n, n, n)."""
        from keras import ops

        cube = (self._box,) * 3
        # The inverse is the conjugate of the forward transform of the conjugate.
        real, imaginary = (ops.reshape(transform[:, i], cube) * sign for i, sign in ((0, 1.0), (1, -1.0)))
        real, imaginary = ops.fft2((real, imaginary))
        real, imaginary = (ops.moveaxis(part, 0, -1) for part in (real, imaginary))
        real, _ = ops.fft((real, imaginary))
        return ops.roll(ops.moveaxis(real, -1, 0), (self._box // 2,) * 3, axis=(0, 1, 2)) / float(self._box**3)

    def filtered(self, data: Tensor, shells: npt.ArrayLike) -> Tensor:
        """Multiply the shells of a map by (n // 2 + 1,) factors; 0 beyond Nyquist."""
        return self.inverse(self.forward(data) * self.by_shell(shells)[:, None])

    def correlation(self, first: Tensor, second: Tensor) -> Doubles:
        """Return the FSC of two transforms, on the host."""
        from keras import ops

        cross, one, two = (
            self.shell_sums(ops.sum(a * b, axis=1)) for a, b in ((first, second), (first, first), (second, second))
        )
        return np.divide(cross, np.sqrt(one * two), out=np.zeros_like(cross), where=one * two > 0)

    def shell_sums(self, values: Tensor) -> Doubles:
        """Sum (n**3,) over the shells up to Nyquist; on the host."""
        from keras import ops

        sums = ops.segment_sum(values, self._shell, num_segments=self._box // 2 + 2)
        return np.asarray(ops.convert_to_numpy(sums), dtype=np.float64)[:-1]

    def by_shell(self, shells: npt.ArrayLike) -> Tensor:
        """Return for each coefficient (n**3,) its shell's value of (n // 2 + 1,); 0 beyond Nyquist."""
        from keras import ops

        table = np.append(np.asarray(shells, dtype=np.float32), np.float32(0))
        return ops.take(ops.convert_to_tensor(table), self._shell)

    def _allowed(self, radius: int) -> int:
        step = self._box // 2 / _STEPS
        return min(self._box // 2, math.ceil(math.ceil(radius / step) * step))

    def _grey_scale(self, average: list[Tensor], known: Tensor, fsc: Doubles) -> float:
        """Return what to divide by: least squares on the truth in the shells before the first poor one."""
        from keras import ops

        reliable = (np.arange(len(fsc)) > 0) & (np.cumprod(fsc > RELIABLE) > 0)
        if not reliable.any():
            return 1.0
        # Linear interpolation has left the averages weaker towards the faces of the box.
        mean = self.forward(self.inverse((average[0] + average[1]) / 2) * self._gridding)
        power = self.shell_sums(ops.sum(known * known, axis=1))[reliable].sum()
        cross = self.shell_sums(ops.sum(mean * known, axis=1))[reliable].sum()
        return float(max(cross / power, 1e-3))

    def _joined(self, sums: list[Tensor], shell: int) -> list[Tensor]:
        from keras import ops

        inside = ops.cast(self._radius < shell, "float32")[:, None]
        mean = (sums[0] + sums[1]) / 2
        return [one + inside * (mean - one) for one in sums]

    def _reconstruct(self, sums: Tensor, fsc: Doubles) -> tuple[Tensor, Tensor]:
        """Return the MAP map (see `cryored.simulation.intermediates.map_prior`) and the unregularised one."""
        from keras import ops

        weight = sums[:, 2]
        mean = self.shell_sums(weight) / self._count
        known = np.clip(fsc, 0.001, 0.999)
        inside = self.by_shell(fsc != 0)
        floor = self.by_shell(1e-3 * mean + 1e-30)
        maps = []
        for prior in (mean * (1 - known) / known, np.zeros_like(mean)):
            denominator = ops.maximum(weight + self.by_shell(prior), floor) + 1e-30
            maps.append(self.inverse(sums[:, :2] * (inside / denominator)[:, None]) * self._gridding * self._sphere)
        return maps[0], maps[1]

    def _particles(self, truth: Tensor, experiment: Experiment, views: Views, rng: np.random.Generator) -> _Particles:
        return _Particles(self, truth, views.draw(experiment.number, rng=rng), experiment, rng)


class _Particles:
    """The images of an experiment, both halves, and where they are believed to be."""

    def __init__(
        self, refiner: Refiner, truth: Tensor, rotations: Doubles, experiment: Experiment, rng: np.random.Generator
    ) -> None:
        from keras import ops

        self._refiner = refiner
        self._box = box = refiner._box
        number = len(rotations)
        self._number = number
        self._half = (np.arange(number) >= number // 2).astype(np.int32)
        plane = refiner._plane
        self._plane = ops.convert_to_tensor(plane)
        self._index = np.floor(refiner._plane_radius + 0.5).astype(np.int32)
        true = self._true_slices(truth, rotations)
        defocus = rng.uniform(*experiment.defocus, size=number)
        squared = (refiner._plane_radius / (box * refiner._voxel_size)) ** 2
        self._ctf = _tensor(ctf_at(squared, defocus[:, None], *astuple(Microscope())))
        images = true * self._ctf[:, :, None]
        power = float(ops.sum(ops.square(images[:, 1:]))) * 2 / number  # the mean of an image is no signal
        noise = power / box**2 / experiment.snr
        white = rng.standard_normal((number, len(plane), 2), dtype=np.float32)
        self._images = images + _tensor(white * np.float32(math.sqrt(noise / 2)))
        self._rotations = _tensor(perturb(rotations, experiment.angle, rng=rng))
        self._shifts = _tensor(experiment.shift * rng.standard_normal((number, 2)))
        self._set_noise(self._images)

    def step(
        self, references: list[Tensor], r_max: int, angle: float, shift: float, rng: np.random.Generator
    ) -> list[Tensor]:
        """Align to the references and back-project: for each half B (two columns) and K, (n**3, 3)."""
        from keras import ops

        refiner, number = self._refiner, self._number
        used = int(np.searchsorted(refiner._plane_radius, r_max))
        volume = ops.concatenate([refiner.forward(reference * refiner._gridding) for reference in references])
        offset = self._half * self._box**3
        noise = self._noise[:, :used]
        weighted = self._images[:, :used] * (self._ctf[:, :used] / noise)[:, :, None]
        weights = self._ctf[:, :used] ** 2 / noise
        counts = np.ones(used, dtype=np.float32)
        counts[0] = 0.0  # the zero frequency tells nothing of the pose
        compared, comparing = weighted * _tensor(counts)[:, None], weights * _tensor(counts)
        centre = ops.zeros((number, 1, 5))
        tried, likelihood, middles = [], [], []
        for width in ROUNDS:
            draws = rng.standard_normal((number, POSES, 5), dtype=np.float32)
            poses = centre + _tensor(width * draws)
            rotations, shifts = self._poses(poses, angle, shift)
            likelihood.append(self._likelihood(volume, offset, compared, comparing, rotations, shifts))
            tried.append(poses)
            middles.append((centre, width))
            so_far = ops.concatenate(tried, axis=1)
            score = ops.concatenate(likelihood, axis=1) - ops.sum(ops.square(so_far), axis=2) / 2
            best = ops.argmax(score, axis=1)
            centre = ops.take_along_axis(
                so_far, ops.cast(best, "int32")[:, None, None] + ops.zeros((1, 1, 5), "int32"), 1
            )
        drawn = ops.logsumexp(
            ops.stack(
                [
                    -ops.sum(ops.square(so_far - middle), axis=2) / (2 * width**2) - 5 * math.log(width)
                    for middle, width in middles
                ]
            ),
            axis=0,
        )
        probability = ops.softmax(score - drawn, axis=1)
        share, which = ops.top_k(probability, _USED)
        share = share / ops.sum(share, axis=1, keepdims=True)
        which = ops.cast(which, "int32")[:, :, None] + ops.zeros((1, 1, 5), "int32")
        rotations, shifts = self._poses(ops.take_along_axis(so_far, which, 1), angle, shift)
        sums = self._back_project(weighted, weights, share, rotations, shifts, offset)
        rotations, shifts = self._poses(centre, angle, shift)
        expected = self._turned(self._slices(volume, offset, rotations, used), shifts)[:, 0]
        self._rotations, self._shifts = rotations[:, 0], shifts[:, 0]
        # Beyond r_max the reference says nothing: there the noise is the power of the images.
        expected = ops.pad(expected, ((0, 0), (0, len(self._index) - used), (0, 0)))
        self._set_noise(self._images - expected * self._ctf[:, :, None])
        return sums

    def _true_slices(self, truth: Tensor, rotations: Doubles) -> Tensor:
        """Return (m, c, 2) from the truth padded to twice its box, as RELION projects particles."""
        from keras import ops

        margin = self._box // 2
        volume = self._refiner.forward(ops.pad(truth * self._refiner._fine_gridding, ((margin, margin),) * 3))
        offset = np.zeros(self._number, np.int32)
        return self._slices(volume, offset, _tensor(rotations[:, None]), len(self._plane), padding=2)[:, 0]

    def _set_noise(self, residuals: Tensor) -> None:
        """Take the mean power of each shell in each half as the noise's."""
        from keras import ops

        power = ops.convert_to_numpy(ops.sum(ops.square(residuals), axis=2))
        noise = np.empty((2, len(self._index)), dtype=np.float32)
        for half in (0, 1):
            mean = power[self._half == half].mean(axis=0, dtype=np.float64)
            noise[half] = (np.bincount(self._index, mean) / np.maximum(np.bincount(self._index), 1))[self._index]
        self._noise = ops.take(_tensor(noise), ops.convert_to_tensor(self._half), axis=0)

    def _poses(self, poses: Tensor, angle: float, shift: float) -> tuple[Tensor, Tensor]:
        """Return rotations (m, c, 3, 3) and shifts (m, c, 2) of poses (m, c, 5), in spreads from the last ones."""
        from keras import ops

        turns = _turns(poses[..., :3] * float(angle))
        rotations = ops.sum(turns[..., :, :, None] * self._rotations[:, None, None, :, :], axis=-2)
        return rotations, self._shifts[:, None] + float(shift) * poses[..., 3:]

    def _likelihood(
        self,
        volume: Tensor,
        offset: npt.NDArray[np.int32],
        data: Tensor,
        weights: Tensor,
        rotations: Tensor,
        shifts: Tensor,
    ) -> Tensor:
        """Return (m, c): what `cryored.reconstruction.compiled.log_likelihoods` returns."""
        from keras import ops

        used = data.shape[1]
        found = []
        for part in self._runs(rotations.shape[1] * used):
            slices = self._slices(volume, offset[part], rotations[part], used)
            turned = self._turned(slices, shifts[part])
            cross = ops.sum(turned * data[part][:, None], axis=(2, 3))
            found.append(2 * cross - ops.sum(ops.sum(ops.square(slices), axis=3) * weights[part][:, None], axis=2))
        return ops.concatenate(found)

    def _back_project(
        self,
        data: Tensor,
        weights: Tensor,
        share: Tensor,
        rotations: Tensor,
        shifts: Tensor,
        offset: npt.NDArray[np.int32],
    ) -> list[Tensor]:
        from keras import ops

        used, cube = data.shape[1], self._box**3
        total = ops.zeros((2 * cube, 3))
        for part in self._runs(rotations.shape[1] * used):
            back = self._turned(data[part][:, None] * ops.ones((1, rotations.shape[1], 1, 1)), -shifts[part])
            back = ops.concatenate([back, weights[part][:, None, :, None] * ops.ones_like(back[..., :1])], axis=-1)
            rows = ops.reshape(back * share[part][:, :, None, None], (-1, 3))
            for index, factor in self._corners(offset[part], rotations[part], used):
                total = _added(total, ops.reshape(index, (-1,)), rows * ops.reshape(factor, (-1, 1)))
        sums = []
        for half in (0, 1):
            own = ops.reshape(total[half * cube : (half + 1) * cube], (self._box,) * 3 + (3,))
            mirrored = ops.roll(ops.flip(own, axis=(0, 1, 2)), (1, 1, 1), axis=(0, 1, 2))
            both = own + mirrored * _tensor(np.array([1, -1, 1]))
            sums.append(ops.reshape(both, (cube, 3)))
        return sums

    def _slices(
        self, volume: Tensor, offset: npt.NDArray[np.int32], rotations: Tensor, used: int, padding: int = 1
    ) -> Tensor:
        """Return central slices (m, c, used, 2) of padded volumes."""
        from keras import ops

        result = []
        for part in self._runs(rotations.shape[1] * used, len(offset)):
            result.append(
                sum(
                    ops.take(volume, index, axis=0) * factor[..., None]
                    for index, factor in self._corners(offset[part], rotations[part], used, padding)
                )
            )
        return result[0] if len(result) == 1 else ops.concatenate(result)

    def _corners(
        self, offset: npt.NDArray[np.int32], rotations: Tensor, used: int, padding: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield index and weight (m, c, used) of the eight coefficients around each point of central slices."""
        from keras import ops

        plane, size = self._plane[:used] * float(padding), self._box * padding
        # Rows 0 and 1 of a rotation are the image's axes in the map's x, y, z.
        points = [
            plane[:, 0] * rotations[:, :, None, 0, axis] + plane[:, 1] * rotations[:, :, None, 1, axis]
            for axis in range(3)
        ]
        base = [ops.floor(point) for point in points]
        rest = [point - low for point, low in zip(points, base, strict=True)]
        lower = [ops.cast(low, "int32") % size for low in base]
        upper = [(low + 1) % size for low in lower]
        start = ops.convert_to_tensor(offset)[:, None, None]
        for dz in (0, 1):
            z = (upper if dz else lower)[2] * size**2 + start
            wz = rest[2] if dz else 1 - rest[2]
            for dy in (0, 1):
                zy = z + (upper if dy else lower)[1] * size
                wzy = wz * (rest[1] if dy else 1 - rest[1])
                for dx in (0, 1):
                    yield zy + (upper if dx else lower)[0], wzy * (rest[0] if dx else 1 - rest[0])

    def _turned(self, slices: Tensor, shifts: Tensor) -> Tensor:
        """Move images (m, c, used, 2) by shifts (m, c, 2) in pixels."""
        from keras import ops

        plane = self._plane[: slices.shape[2]] * (-2 * math.pi / self._box)
        phase = plane[:, 0] * shifts[..., 0:1] + plane[:, 1] * shifts[..., 1:2]
        cosine, sine = ops.cos(phase), ops.sin(phase)
        real, imaginary = slices[..., 0], slices[..., 1]
        return ops.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], axis=-1)

    def _runs(self, each: int, number: int | None = None) -> Iterator[slice]:
        count = self._number if number is None else number
        step = max(1, _AT_A_TIME // each)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _turns(vectors: Tensor) -> Tensor:
    """Return rotation matrices (..., 3, 3) of rotation vectors (..., 3), in radian (Rodrigues' formula)."""
    from keras import ops

    angle = ops.sqrt(ops.sum(ops.square(vectors), axis=-1, keepdims=True) + 1e-12)
    x, y, z = (vectors[..., i] / angle[..., 0] for i in range(3))
    zero = ops.zeros_like(x)
    cross = ops.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1)
    cross = ops.reshape(cross, (*cross.shape[:-1], 3, 3))
    square = ops.sum(cross[..., :, :, None] * cross[..., None, :, :], axis=-2)
    identity = _tensor(np.eye(3))
    return identity + ops.sin(angle)[..., None] * cross + (1 - ops.cos(angle))[..., None] * square


def _added(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add rows to those of `total` that `index` names, some several times."""
    import keras
    from keras import ops

    if keras.backend.backend() == "torch":  # Keras' own repeats the index for each column and copies the total
        return total.index_add_(0, index, rows)
    return total + ops.segment_sum(rows, index, num_segments=total.shape[0])


def _tensor(values: npt.ArrayLike) -> Tensor:
    from keras import ops

    return ops.convert_to_tensor(np.asarray(values, dtype=np.float32))
