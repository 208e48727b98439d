"""Apply a trained network to a map: any box, any pixel size."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError, ModelError, in_words
from cryored.maps.fourier import apply_filter, spatial_frequency
from cryored.maps.network_scale import standard_of
from cryored.maps.resample import SAME_PIXEL, Grid, from_grid, interpolate, plan_axis, to_grid
from cryored.maps.volume import Volume, raised_cosine, window
from cryored.memory import free_memory
from cryored.prior import device
from cryored.prior.budget import memory_in_use, network_memory
from cryored.prior.kept_signal import can_judge, raise_sigma
from cryored.prior.models import Model, ModelCard, check_uncertainty, load_network
from cryored.prior.network import LOG_VARIANCE, condition
from cryored.prior.sigma import model_sigma

logger = logging.getLogger(__name__)

# Edges of tiles, in voxels at the model's pixel size. Overlaps cost: a map of 171 takes 2.7 times as long in tiles of
# 144 as in one pass. But the memory that a network has had on a GPU it keeps, and RELION wants it back.
CPU_TILE, GPU_TILE = 208, 144
_OVERLAP = 48  # voxels that neighbouring tiles share, blended over the inner half of them
_CROSSOVER = 0.9  # fraction of the model's Nyquist frequency at which the prior begins to fade

Array = npt.NDArray[np.float32]
Curve = npt.NDArray[np.floating]
Network = Callable[[Array], Array]
Grids = tuple[Grid, Grid, Grid]
Progress = Callable[[int, int], None]


def crossover(frequency: npt.NDArray[Any], voxel_size: float, model_pixel: float) -> npt.NDArray[Any]:
    """Weight of the prior against spatial frequency: it fades where the model's Nyquist frequency ends it.

    Parameters
    ----------
    frequency : ndarray
        In 1/angstrom.
    voxel_size, model_pixel : float
        Of the map and of the model, in angstrom.

    Returns
    -------
    ndarray
        1 everywhere for a map that is not finer than the model; else 1 up to 0.9 of the model's Nyquist
        frequency and a raised cosine down to 0 at it.
    """
    if voxel_size >= model_pixel * (1 - SAME_PIXEL):
        return np.ones_like(frequency)
    return fade_out(frequency, 0.5 / model_pixel)


def fade_out(frequency: npt.NDArray[Any], end: float) -> npt.NDArray[Any]:
    """Return 1 up to 0.9 of a spatial frequency, and a raised cosine down to 0 at it."""
    return raised_cosine((frequency / end - _CROSSOVER) / (1 - _CROSSOVER))


Rotation = tuple[tuple[int, ...], tuple[int, ...]]  # permutation of the axes, steps of +1 or -1


def cube_rotations() -> list[Rotation]:
    """Return the 24 rotations of a cube as (permutation of the axes, steps of +1 or -1), the identity first."""
    rotations = []
    for axes in itertools.permutations((0, 1, 2)):
        parity = np.linalg.det(np.eye(3)[list(axes)])
        for signs in itertools.product((1, -1), repeat=3):
            if parity * np.prod(signs) > 0:
                rotations.append((axes, signs))
    return rotations


def rotate(data: Array, rotation: Rotation) -> Array:
    """Rotate a map as one of `cube_rotations` says."""
    axes, signs = rotation
    return data.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]


def rotate_back(data: Array, rotation: Rotation) -> Array:
    """Undo `rotate`."""
    axes, signs = rotation
    return data[tuple(slice(None, None, sign) for sign in signs)].transpose(np.argsort(axes))


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def predict_tiled(network: Network, data: Array, *, tile: int, multiple: int, progress: Progress = silent) -> Array:
    """Run a network over a map in overlapping tiles.

    Parameters
    ----------
    network : callable
        Takes (..., z, y, x) float32, with edges that are multiples of `multiple`; returns any number of maps of that
        shape.
    data : (..., z, y, x) float32
        Standardised; the solvent is 0. Several maps go through the network together.
    tile : int
        Edge of a tile; a map that is not larger is done in one pass.
    multiple : int
        Tiles start at multiples of it, so that the network pools the same voxels together as in one pass.
    progress : callable
        Is told how many tiles are done, and of how many.

    Returns
    -------
    (..., z, y, x) float32
        The maps that the network returns.
    """
    tile = max(_round_up(tile, multiple), _least_tile(multiple))
    padded_shape = tuple(_round_up(n, multiple) for n in data.shape[-3:])
    padded = window(data, (*data.shape[:-3], *padded_shape))
    corners = list(itertools.product(*(list(_starts(n, tile, multiple)) for n in padded_shape)))
    if len(corners) == 1:
        found = network(np.ascontiguousarray(padded))
        progress(1, 1)
        return window(found, (*found.shape[:-3], *data.shape[-3:]))
    result: Array | None = None
    weight = np.zeros(padded_shape, dtype=np.float32)
    for done, corner in enumerate(corners, 1):
        part = tuple(slice(start, min(start + tile, n)) for start, n in zip(corner, padded_shape, strict=True))
        ramps = [_ramp(along, n) for along, n in zip(part, padded_shape, strict=True)]
        blend = ramps[0][:, None, None] * ramps[1][None, :, None] * ramps[2][None, None, :]
        place: tuple[Any, ...] = (..., *part)
        found = network(np.ascontiguousarray(padded[place]))
        if result is None:
            result = np.zeros((*found.shape[:-3], *padded_shape), dtype=np.float32)
        result[place] += found * blend
        weight[part] += blend
        progress(done, len(corners))
    assert result is not None
    return window(result / weight, (*result.shape[:-3], *data.shape[-3:]))


@dataclass(frozen=True)
class _Seen:
    """What the network sees of a map: standardised, at its own pixel size; `data` is None where it sees nothing.

    `told` is what a network with knots is told of the data, (knots + 1,).
    """

    grids: Grids
    deviation: float
    data: Array | None
    told: Array | None


class _TooLarge(MemoryError):
    """More than the memory that there is, by what is known beforehand."""


@dataclass
class Denoiser:
    """A model ready to be applied to maps; the network is loaded when it is first needed.

    Parameters
    ----------
    model : Model
    gpu : bool, optional
        See `cryored.prior.device.set_up`.
    threads : int, optional
    tile : int, optional
        Edge of the tiles in voxels of the model's size; by default 208 on a CPU and 144 on a GPU.
    rotations : int
        Average over the first so many of the 24 cube rotations.
    progress : callable
        Is told how many tiles are done, and of how many, over all rotations.
    max_memory : int, optional
        Bytes that this process may take; on a CPU tiles are made so small, and maps sent one by one, that it does
        with them. By default what is free; a GPU tells when it has no more.
    """

    model: Model
    gpu: bool | None = None
    threads: int | None = None
    tile: int | None = None
    rotations: int = 1
    progress: Progress = silent
    max_memory: int | None = None
    device_name: str = ""  # where the last maps went through the network
    _network: Any = None
    _loaded_on: str = ""
    _on_cpu: Any = None  # the network again, for when the GPU's memory does not suffice

    def __call__(self, volume: Volume, fsc: Curve | None = None) -> Volume:
        """Denoise a map: the input minus what the network takes for its error.

        The map is resampled to the model's pixel size, standardised as a whole, and the network's output is
        scaled and resampled back. Beyond the model's Nyquist frequency a regularised map stays as it is, and an
        unregularised one, which is mostly noise there, is cut.

        Parameters
        ----------
        volume : Volume
        fsc : (max(shape) // 2 + 1,) float64, optional
            Of the half-maps, in the shells k / (max(shape) * voxel_size) of the map's own box: a model with knots is
            told how good the data are, others take no notice. None: unknown.

        Raises
        ------
        InputError
            The pixel size is unknown, or the FSC is of another box.
        ModelError
            The machine's memory does not suffice, even in the smallest tiles, or the network's engine fails.
        """
        return self.denoise_all([volume], [fsc])[0]

    def denoise_all(self, volumes: Sequence[Volume], fscs: Sequence[Curve | None] | None = None) -> list[Volume]:
        """Denoise several maps as `__call__` does, in one network call where their grids are alike."""
        seen = [self._see(*one) for one in zip(volumes, fscs or [None] * len(volumes), strict=True)]
        found = self._find(seen)
        return [self._subtract(*one) for one in zip(volumes, seen, (outputs[0] for outputs in found), strict=True)]

    def with_uncertainty(self, volume: Volume, fsc: Curve | None = None) -> tuple[Volume, Volume]:
        """Denoise a map as `__call__` does, and tell how far it may be off.

        Parameters
        ----------
        volume : Volume
        fsc : (max(shape) // 2 + 1,) float64, optional
            By which the map is weighted, if the model's input is regularised.

        Returns
        -------
        Volume
            The denoised map.
        Volume
            On its grid and in its units the standard deviation that the model expects of each voxel's remaining error,
            the difference to what it was trained towards (`ModelCard.target`), put right by its `sigma`, and raised
            in shells that keep little of the signal that the FSC tells (`cryored.prior.kept_signal`). It counts
            errors up to the model's Nyquist frequency, whatever the map's: a finer map has others beyond, which nobody
            has estimated. Over tiles and rotations it is the variance that is averaged, although the mean of several
            estimates is better than each. 0 for a map without contrast at the model's pixel size.

        Raises
        ------
        InputError, ModelError
            As `__call__`; and the model tells no uncertainty.
        """
        check_uncertainty(self.model)
        seen = self._see(volume, fsc)
        curve = model_sigma(self.model)
        (error, variance) = self._find([seen])[0]
        if curve is not None:
            for plane in variance:  # one by one: the arithmetic is in float64
                plane[:] = curve(np.sqrt(plane)) ** 2
        # Linear interpolation: the ringing of a Fourier transform would make small variances negative.
        sigma = np.sqrt(interpolate(variance, seen.grids)) * np.float32(seen.deviation)
        denoised = self._subtract(volume, seen, error)
        if fsc is not None and seen.data is not None and can_judge(self.model.card):
            sigma = raise_sigma(sigma, volume, denoised, fsc, threads=self.threads)
        return denoised, volume.with_data(sigma)

    @property
    def edge(self) -> int:
        """Edge of the tiles, in voxels of the model's size."""
        return self.tile or (GPU_TILE if self.on_gpu else CPU_TILE)

    @property
    def on_gpu(self) -> bool:
        """Whether the network runs on a GPU, as far as the device has been found."""
        return "GPU" in self._loaded_on

    def find_device(self) -> str:
        """Set up the device that the network will run on, and return its name."""
        if not self._loaded_on:
            self._loaded_on = device.set_up(self.gpu, self.threads)
        return self._loaded_on

    def load(self) -> None:
        """Load the network now instead of at the first map."""
        if self._network is None:
            begin = time.monotonic()
            self.find_device()
            self._network = load_network(self.model)
            logger.debug("%s loaded on %s in %.1f s", self.model.card.name, self._loaded_on, time.monotonic() - begin)

    def _see(self, volume: Volume, fsc: Curve | None) -> _Seen:
        if volume.voxel_size <= 0:
            raise InputError("the map's pixel size is unknown (0); give it with --angpix")
        z, y, x = (plan_axis(n, volume.voxel_size, self.model.card.pixel_size) for n in volume.shape)
        grids, told = (z, y, x), self._told(volume, fsc)
        standard = standard_of(volume.data, volume.voxel_size)
        if standard.deviation == 0:
            return _Seen(grids, 0.0, None, told)
        sampled = to_grid(volume.data, grids, standard.level)
        # The scale is taken at the model's pixel size, where the network was trained.
        inner = standard_of(sampled, volume.voxel_size * z.padded / z.resampled)
        if inner.deviation == 0:
            return _Seen(grids, standard.deviation, None, told)
        return _Seen(grids, inner.deviation, inner.apply(sampled).astype(np.float32, copy=False), told)

    def _told(self, volume: Volume, fsc: Curve | None) -> Array | None:
        card = self.model.card
        if not card.knots:
            return None
        longest = max(volume.shape)
        if fsc is not None and len(fsc) != longest // 2 + 1:
            raise InputError(f"an FSC of {len(fsc)} shells, expected {longest // 2 + 1} for a box of {longest}")
        frequency = np.arange(longest // 2 + 1) / (longest * volume.voxel_size)
        return condition(fsc, frequency, card.pixel_size, card.knots)

    def _find(self, seen: Sequence[_Seen]) -> list[Array]:
        """Return the network's output for each map: (channels, z, y, x), standardised; 0 where it sees nothing."""
        channels = 2 if self.model.card.uncertainty else 1
        found = [np.zeros((channels, *(grid.resampled for grid in one.grids)), np.float32) for one in seen]
        shapes = {one.data.shape for one in seen if one.data is not None}
        for shape in shapes:
            alike = [i for i, one in enumerate(seen) if one.data is not None and one.data.shape == shape]
            data = np.stack([seen[i].data for i in alike])  # type: ignore[misc]
            told = np.stack([seen[i].told for i in alike]) if self.model.card.knots else None  # type: ignore[misc]
            outputs = self._outputs(data, told).reshape(len(alike), channels, *shape)
            for i, output in zip(alike, outputs, strict=True):
                found[i] = output
        return found

    def _subtract(self, volume: Volume, seen: _Seen, error: Array) -> Volume:
        """Return a map without its error (z, y, x), which is standardised and at the model's pixel size."""
        if seen.deviation == 0:
            return volume  # constant
        card, data, weights = self.model.card, volume.data, None
        if volume.voxel_size < card.pixel_size * (1 - SAME_PIXEL):
            # On the network's grid, which is the smaller one and holds all frequencies that the weight leaves.
            z, y, x = seen.grids
            shape = z.resampled, y.resampled, x.resampled
            weights = self._fading(shape, volume.voxel_size * z.padded / z.resampled, volume)
            if card.input == "unregularised":
                data = apply_filter(data, self._fading(volume.shape, volume.voxel_size, volume), self.threads)
        error = from_grid(error * np.float32(seen.deviation), seen.grids, weights)
        return volume.with_data(data - error.astype(np.float32, copy=False))

    def _fading(self, shape: tuple[int, int, int], voxel_size: float, volume: Volume) -> Array:
        """Return the prior's weight for a map that is finer than the model, on the half-transform of a grid."""
        weight = crossover(spatial_frequency(shape, voxel_size), volume.voxel_size, self.model.card.pixel_size)
        return weight.astype(np.float32, copy=False)

    def _outputs(self, data: Array, told: Array | None) -> Array:
        """Return what `_predict` does, of maps of any size; short of memory in smaller pieces, then on the CPU."""
        self.load()
        self.device_name = self._loaded_on
        try:
            self._make_fit(data)
            return self._rotated(data, told)
        except Exception as error:
            if not device.is_out_of_memory(error):
                if device.is_engines(error):
                    raise ModelError(f"{self.device_name}: the network failed: {in_words(error)}") from error
                raise
            smaller = self._smaller_tile(data.shape)
            if len(data) > 1:
                logger.warning("%s: not enough memory for %d maps at once, so one by one", self.device_name, len(data))
            elif smaller:
                logger.warning("%s: not enough memory; tiles of %d voxels from now on", self.device_name, smaller)
                self.tile = smaller
            elif self.on_gpu:
                logger.warning(
                    "%s: not enough memory for the smallest tiles; this map goes to the CPU", self._loaded_on
                )
                return self._outputs_on_cpu(data, told)
            else:
                raise ModelError(
                    f"not enough memory for the network with tiles of {self.edge} voxels, the smallest"
                    f"{f' ({error})' if isinstance(error, _TooLarge) else ''}; free some, or use a machine with more"
                ) from error
        parts = [slice(i, i + 1) for i in range(len(data))]
        return np.concatenate([self._outputs(data[part], None if told is None else told[part]) for part in parts])

    def _make_fit(self, data: Array) -> None:
        """Raise `_TooLarge` where the maps would take more memory than there is, and something can be done about it."""
        if self.on_gpu:
            return
        room = free_memory() if self.max_memory is None else self.max_memory - memory_in_use()
        needed = network_memory(self.model.card, data.shape[1:], self.edge, len(data))
        if room is None or needed <= room:
            return
        # What is free is a guess: the smallest tiles are tried all the same.
        if self.max_memory is not None or len(data) > 1 or self._smaller_tile(data.shape):
            raise _TooLarge(f"{needed / 2**30:.1f} GiB, and {max(room, 0) / 2**30:.1f} are left")

    def _outputs_on_cpu(self, data: Array, told: Array | None) -> Array:
        with device.cpu():
            if self._on_cpu is None:
                self._on_cpu = load_network(self.model)
            # The next map tries the GPU again: RELION may have let go of its memory by then.
            gpu, self._network = self._network, self._on_cpu
            try:
                outputs = self._rotated(data, told)
            finally:
                self._network = gpu
        self.device_name = f"CPU (memory of {self._loaded_on} too small)"
        return outputs

    def _rotated(self, data: Array, told: Array | None) -> Array:
        """Return what `_predict` does, in tiles and averaged over rotations."""
        multiple = 2**self.model.card.depth
        network = self._predict if told is None else partial(self._predict, told=told)
        total: Array | None = None
        for number, rotation in enumerate(cube_rotations()[: self.rotations]):
            turned = np.stack([rotate(one, rotation) for one in data])
            turned = predict_tiled(
                network, turned, tile=self.edge, multiple=multiple, progress=partial(self._tell, number)
            )
            if total is None:
                total = np.zeros((len(turned), *data.shape[1:]), dtype=np.float32)
            for sum_, one in zip(total, turned, strict=True):
                sum_ += rotate_back(one, rotation)
        assert total is not None
        return total / np.float32(self.rotations)

    def _tell(self, rotation: int, done: int, tiles: int) -> None:
        self.progress(rotation * tiles + done, self.rotations * tiles)

    def _smaller_tile(self, shape: tuple[int, ...]) -> int | None:
        """Return the next smaller tile for maps of a shape, if there is one."""
        multiple = 2**self.model.card.depth
        now = min(self.edge, max(shape))
        smaller = max(_round_up(now // 2, multiple), _least_tile(multiple))
        return smaller if smaller < _round_up(now, multiple) else None

    def _predict(self, data: Array, told: Array | None = None) -> Array:
        """Run the network on (maps, z, y, x).

        Returns
        -------
        (maps * channels, z, y, x) float32
            The error of each map, followed by the variance of what is left of it where the model tells that: variances
            add up over tiles and rotations, their logarithms do not.
        """
        inputs = data[..., None] if told is None else [data[..., None], told]
        output = np.asarray(self._network.predict_on_batch(inputs), dtype=np.float32)
        if not self.model.card.uncertainty:
            return output[..., 0]
        variance = np.exp(np.clip(output[..., 1], *LOG_VARIANCE))
        return np.stack([output[..., 0], variance], axis=1).reshape(-1, *data.shape[1:])


def tile_voxels(shape: tuple[int, ...], tile: int, card: ModelCard) -> int:
    """Return the voxels of all tiles together that maps of a shape, at the model's pixel size, are cut into."""
    multiple = 2**card.depth
    tile = max(_round_up(tile, multiple), _least_tile(multiple))
    padded = [_round_up(n, multiple) for n in shape]
    return math.prod(sum(min(tile, n) for _ in _starts(n, tile, multiple)) for n in padded)


def smallest_tile(card: ModelCard) -> int:
    """Return the edge of a model's smallest tiles."""
    return _least_tile(2**card.depth)


def _least_tile(multiple: int) -> int:
    """Return the edge below which a tile is nearly all overlap."""
    return _round_up(_OVERLAP, multiple) + 2 * multiple


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _starts(n: int, tile: int, multiple: int) -> Iterator[int]:
    """Yield where tiles begin along an axis of `n` voxels."""
    step = max(multiple, (tile - _OVERLAP) // multiple * multiple)
    start = 0
    while start + tile < n:
        yield start
        start += step
    yield start if start == 0 else max(0, n - tile)


def _ramp(part: slice, n: int) -> Array:
    """Weight of a tile along one axis: it rises over the inner half of the overlap, but at the map's own faces."""
    size = part.stop - part.start
    position = np.arange(size, dtype=np.float32) + 0.5
    quarter = _OVERLAP / 4
    low = np.ones(size) if part.start == 0 else raised_cosine((3 * quarter - position) / (2 * quarter))
    high = np.ones(size) if part.stop == n else raised_cosine((3 * quarter - position[::-1]) / (2 * quarter))
    # Never quite zero, so that the sum of weights can be divided by.
    return np.maximum(low * high, 1e-6).astype(np.float32)
