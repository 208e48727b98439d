"""Apply a trained network to a map: any box, any pixel size."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored import device
from cryored.errors import InputError, ModelError
from cryored.fourier import apply_shells, forward, inverse, low_pass, spatial_frequency
from cryored.models import Model, check_weights, find_model, load_network
from cryored.resample import SAME_PIXEL, Grid, from_grid, plan_axis, to_grid
from cryored.standardise import standard_of
from cryored.volume import Floats, Volume, raised_cosine, window

logger = logging.getLogger(__name__)

DEFAULT_TILE = 144  # voxels at the model's pixel size; 112 voxels cubed need about 0.5 GB
_MARGIN = 8  # voxels of solvent around the map: what convolutions pad with at the faces is not quite solvent to them
_OVERLAP = 48  # voxels that neighbouring tiles share, blended over the inner half of them
_BLUR = 15.0  # angstrom at which noise is gone and a molecule is a blob
_SKEWED = 0.3  # skewness of the blurred map; molecules have 0.7 to 5, noise 0
_CROSSOVER = 0.9  # fraction of the model's Nyquist frequency at which the prior begins to fade

Array = npt.NDArray[np.float32]
Network = Callable[[Array], Array]
Grids = tuple[Grid, Grid, Grid]


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


def predict_tiled(network: Network, data: Array, *, tile: int, multiple: int) -> Array:
    """Run a network over a map in overlapping tiles.

    Parameters
    ----------
    network : callable
        Takes and returns (..., z, y, x) float32; edges must be multiples of `multiple`.
    data : (..., z, y, x) float32
        Standardised; the solvent is 0. Several maps go through the network together.
    tile : int
        Edge of a tile; a map that is not larger is done in one pass.
    multiple : int
        Tiles start at multiples of it, so that the network pools the same voxels together as in one pass.

    Returns
    -------
    (..., z, y, x) float32
    """
    tile = max(_round_up(tile, multiple), _least_tile(multiple))
    *maps, z, y, x = data.shape
    padded_shape = tuple(_round_up(n, multiple) for n in (z, y, x))
    padded = window(data, (*maps, *padded_shape))
    result = np.zeros(padded.shape, dtype=np.float32)
    weight = np.zeros(padded_shape, dtype=np.float32)
    for corner in itertools.product(*(list(_starts(n, tile, multiple)) for n in padded_shape)):
        part = tuple(slice(start, min(start + tile, n)) for start, n in zip(corner, padded_shape, strict=True))
        ramps = [_ramp(along, n) for along, n in zip(part, padded_shape, strict=True)]
        blend = ramps[0][:, None, None] * ramps[1][None, :, None] * ramps[2][None, None, :]
        place: tuple[Any, ...] = (..., *part)
        result[place] += network(np.ascontiguousarray(padded[place])) * blend
        weight[part] += blend
    return window(result / weight, data.shape)


@dataclass(frozen=True)
class _Seen:
    """What the network sees of a map: standardised, at its own pixel size; `data` is None where it sees nothing."""

    grids: Grids
    deviation: float
    data: Array | None


@dataclass
class Denoiser:
    """A model ready to be applied to maps; the network is loaded when it is first needed.

    Parameters
    ----------
    model : Model
    gpu : bool, optional
        See `cryored.device.set_up`.
    threads : int, optional
    tile : int
        Edge of the tiles in voxels of the model's size.
    rotations : int
        Average over the first so many of the 24 cube rotations.
    """

    model: Model
    gpu: bool | None = None
    threads: int | None = None
    tile: int = DEFAULT_TILE
    rotations: int = 1
    device_name: str = ""  # where the last maps went through the network
    _network: Any = None
    _loaded_on: str = ""
    _on_cpu: Any = None  # the network again, for when the GPU's memory does not suffice

    def __call__(self, volume: Volume) -> Volume:
        """Denoise a map: the input minus what the network takes for its error.

        The map is resampled to the model's pixel size, standardised as a whole, and the network's output is
        scaled and resampled back. Beyond the model's Nyquist frequency a regularised map stays as it is, and an
        unregularised one, which is mostly noise there, is cut.

        Raises
        ------
        InputError
            The pixel size is unknown.
        ModelError
            The machine's memory does not suffice, even in the smallest tiles.
        """
        return self.denoise_all([volume])[0]

    def denoise_all(self, volumes: Sequence[Volume]) -> list[Volume]:
        """Denoise several maps as `__call__` does, in one network call where their grids are alike."""
        seen = [self._see(volume) for volume in volumes]
        results = list(volumes)
        shapes = {one.data.shape for one in seen if one.data is not None}
        for shape in shapes:
            alike = [i for i, one in enumerate(seen) if one.data is not None and one.data.shape == shape]
            errors = self._errors(np.stack([seen[i].data for i in alike]))  # type: ignore[misc]
            for i, error in zip(alike, errors, strict=True):
                results[i] = self._subtract(volumes[i], seen[i], error * np.float32(seen[i].deviation))
        for i, one in enumerate(seen):
            # All power lies beyond what the network sees; a constant map stays as it is.
            if one.data is None and one.deviation > 0:
                results[i] = self._subtract(volumes[i], one, np.zeros([g.resampled for g in one.grids], np.float32))
        return results

    def load(self) -> None:
        """Load the network now instead of at the first map."""
        if self._network is None:
            self._loaded_on = device.set_up(self.gpu, self.threads)
            self._network = load_network(self.model)

    def _see(self, volume: Volume) -> _Seen:
        if volume.voxel_size <= 0:
            raise InputError("the map's pixel size is unknown (0); give it with --angpix")
        z, y, x = (plan_axis(n, volume.voxel_size, self.model.card.pixel_size) for n in volume.shape)
        grids = (z, y, x)
        standard = standard_of(volume.data, volume.voxel_size)
        if standard.deviation == 0:
            return _Seen(grids, 0.0, None)
        sampled = to_grid(volume.data, grids, standard.level)
        # The scale is taken at the model's pixel size, where the network was trained.
        inner = standard_of(sampled, volume.voxel_size * z.padded / z.resampled)
        if inner.deviation == 0:
            return _Seen(grids, standard.deviation, None)
        return _Seen(grids, inner.deviation, inner.apply(sampled).astype(np.float32, copy=False))

    def _subtract(self, volume: Volume, seen: _Seen, error: Array) -> Volume:
        card = self.model.card
        error = from_grid(error, seen.grids).astype(np.float32, copy=False)
        if volume.voxel_size >= card.pixel_size * (1 - SAME_PIXEL):
            return volume.with_data(volume.data - error)
        weight = crossover(spatial_frequency(volume.shape, volume.voxel_size), volume.voxel_size, card.pixel_size)
        faded = forward(error, self.threads) * weight
        kept = forward(volume.data, self.threads) * (1 if card.input == "regularised" else weight)
        return volume.with_data(inverse(kept - faded, volume.shape, self.threads).astype(np.float32))

    def _errors(self, data: Array) -> Array:
        """Return the network's output for (map, z, y, x); where memory is short in smaller pieces, then on the CPU."""
        self.load()
        self.device_name = self._loaded_on
        try:
            return self._rotated(data)
        except Exception as error:
            if not device.is_out_of_memory(error):
                raise
            smaller = self._smaller_tile(data.shape)
            if len(data) > 1:
                logger.warning("%s: not enough memory for %d maps at once, so one by one", self.device_name, len(data))
            elif smaller:
                logger.warning("%s: not enough memory; tiles of %d voxels from now on", self.device_name, smaller)
                self.tile = smaller
            elif "GPU" in self._loaded_on:
                logger.warning(
                    "%s: not enough memory for the smallest tiles; this map goes to the CPU", self._loaded_on
                )
                return self._errors_on_cpu(data)
            else:
                raise ModelError(
                    f"not enough memory for the network with tiles of {self.tile} voxels, the smallest; free some, "
                    "or use a machine with more"
                ) from error
        return np.concatenate([self._errors(data[i : i + 1]) for i in range(len(data))])

    def _errors_on_cpu(self, data: Array) -> Array:
        with device.cpu():
            if self._on_cpu is None:
                self._on_cpu = load_network(self.model)
            # The next map tries the GPU again: RELION may have let go of its memory by then.
            gpu, self._network = self._network, self._on_cpu
            try:
                errors = self._rotated(data)
            finally:
                self._network = gpu
        self.device_name = f"CPU (memory of {self._loaded_on} too small)"
        return errors

    def _rotated(self, data: Array) -> Array:
        """Return the network's output averaged over rotations."""
        multiple = 2**self.model.card.depth
        total = np.zeros_like(data)
        padded = window(data, (len(data), *(n + 2 * _MARGIN for n in data.shape[1:])))
        for rotation in cube_rotations()[: self.rotations]:
            turned = np.stack([rotate(one, rotation) for one in padded])
            turned = predict_tiled(self._predict, turned, tile=self.tile, multiple=multiple)
            for sum_, one in zip(total, turned, strict=True):
                sum_ += window(rotate_back(one, rotation), sum_.shape)
        return total / np.float32(self.rotations)

    def _smaller_tile(self, shape: tuple[int, ...]) -> int | None:
        """Return the next smaller tile for maps of a shape, if there is one."""
        multiple = 2**self.model.card.depth
        now = min(self.tile, max(shape) + 2 * _MARGIN)
        smaller = max(_round_up(now // 2, multiple), _least_tile(multiple))
        return smaller if smaller < _round_up(now, multiple) else None

    def _predict(self, data: Array) -> Array:
        return np.asarray(self._network.predict_on_batch(data[..., None]), dtype=np.float32)[..., 0]


def denoise_file(
    path: str,
    output: str,
    *,
    model: str,
    half2: str | None = None,
    fsc: str | None = None,
    mask: str | None = None,
    angpix: float | None = None,
    rotations: int = 1,
    tile: int = DEFAULT_TILE,
    gpu: bool | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Denoise one map file; see `Denoiser` and the help of ``cryored denoise``.

    Parameters
    ----------
    path, output : str
        MRC files, or ``-``.
    model : str
        Name or folder.
    half2, fsc : str, optional
        The other half-map, or an FSC table: `path` is then a raw half-map and is weighted by the FSC first.
    mask : str, optional
        Soft mask that multiplies the result.
    """
    from cryored.mrc import read_volume, write_volume
    from cryored.output import check_target

    check_target(output, overwrite)
    found = find_model(model)
    check_weights(found)
    volume = read_volume(path, angpix=angpix)
    if volume.voxel_size <= 0:
        raise InputError(f"{path}: pixel size 0 (unknown) in the header, expected angstrom; give it with --angpix")
    mask_data = None
    if mask is not None:
        mask_data = read_volume(mask).data
        if mask_data.shape != volume.shape:
            raise InputError(f"{mask}: shape {mask_data.shape} (z, y, x), expected that of {path}, {volume.shape}")
    if _is_inverted(volume):
        logger.warning(
            "%s: density is dark on bright (at %g A the map is skewed to negative values), as of particles whose "
            "contrast was not inverted; the prior knows bright density only: multiply the map by -1 first",
            path,
            max(_BLUR, 4 * volume.voxel_size),
        )
    volume = _weighted(volume, path, half2, fsc, found, threads)
    denoiser = Denoiser(found, gpu=gpu, threads=threads, tile=tile, rotations=rotations)
    result = denoiser(volume)
    if denoiser.device_name:
        logger.info("denoised with %s on %s", found.card.name, denoiser.device_name)
    else:
        logger.info("%s is constant: returned as it is", path)
    if mask_data is not None:
        result = result.with_data(result.data * mask_data)
    write_volume(output, result, label=f"denoise {found.card.name} {found.card.sha256[:8]} rotations {rotations}")


def _is_inverted(volume: Volume) -> bool:
    """Tell whether molecules are dark: blurred, they are the few values that differ from the solvent's many."""
    blurred = low_pass(volume.data, volume.voxel_size, max(_BLUR, 4 * volume.voxel_size)).astype(np.float64)
    spread = blurred.std()
    return bool(spread > 0 and ((blurred - blurred.mean()) ** 3).mean() < -_SKEWED * spread**3)


def _weighted(
    volume: Volume, path: str, half2: str | None, fsc: str | None, model: Model, threads: int | None
) -> Volume:
    """Weight a raw half-map by its FSC, where the network wants that."""
    from cryored.fsc import shell_correlation
    from cryored.fsc_table import read_fsc_table
    from cryored.mrc import read_volume

    weights: Floats
    if model.card.input == "unregularised":
        if half2 or fsc:
            logger.info("%s takes raw maps: %s is not weighted by an FSC", model.card.name, path)
        return volume
    if half2 is not None:
        other = read_volume(half2)
        if other.shape != volume.shape:
            raise InputError(f"{half2}: shape {other.shape} (z, y, x), expected that of {path}, {volume.shape}")
        if np.array_equal(volume.data, other.data):
            raise InputError(
                f"{path} and {half2} are the same map, expected the two independent half-maps; an FSC of 1 would "
                "pass all noise to the network"
            )
        weights = shell_correlation(volume.data, other.data, threads=threads)
    elif fsc is not None:
        curve = read_fsc_table(fsc)
        shells = np.arange(max(volume.shape) // 2 + 1) / (max(volume.shape) * volume.voxel_size)
        # A table that ends early knows nothing beyond: no weight there.
        weights = np.interp(shells, curve.frequency, curve.fsc, right=0.0)
    else:
        logger.info(
            "%s is taken as filtered already (a post-processed map, RELION's own output); for a raw half-map give "
            "--half2 or --fsc",
            path,
        )
        return volume
    return volume.with_data(apply_shells(volume.data, np.clip(weights, 0.0, 1.0), threads))


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
