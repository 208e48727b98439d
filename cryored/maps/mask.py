"""Soft-edged masks around what a map shows."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, label

from cryored.errors import InputError
from cryored.maps.fourier import forward, inverse, low_pass, spatial_frequency
from cryored.maps.network_scale import solvent_level
from cryored.maps.volume import Volume, raised_cosine


def soft_mask(
    volume: Volume,
    *,
    resolution: float = 15.0,
    threshold: float = 0.1,
    extend: float = 3.0,
    edge: float = 9.0,
    largest: bool = False,
) -> Volume:
    """Return a mask on the grid of a map: 1 around the molecule, 0 in the solvent, a raised cosine between.

    It is cut from the low-pass filtered map, so that it follows the shape and no detail: a mask with the map's own
    detail would correlate with it. The defaults leave room for errors of the maps that it is used on.

    Parameters
    ----------
    volume : Volume
        A map with solvent near 0: a map simulated from a model, or a refined one.
    resolution : float
        Of the low-pass filter, in angstrom.
    threshold : float
        The molecule is where the filtered map is above this fraction of its peak: the lower, the larger the mask.
    extend : float
        Angstrom around that where the mask is still 1.
    edge : float
        Width of the soft edge beyond, in angstrom.
    largest : bool
        Leave out what is not connected with the largest part: noise in the solvent of a refined map.

    Raises
    ------
    InputError
        The voxel size is unknown, or the filtered map has no positive density.
    """
    if volume.voxel_size <= 0:
        raise InputError("the map's pixel size is 0 (unknown), expected angstrom; a mask needs it")
    blurred = low_pass(volume.data, volume.voxel_size, resolution)
    peak = blurred.max()
    if peak <= 0:
        raise InputError(f"a map of at most {peak:g} at {resolution:g} A, expected positive density; is it inverted?")
    inside = blurred >= threshold * peak
    if largest:
        parts, number = label(inside)
        if number > 1:
            inside = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    outside = distance_transform_edt(~inside) * volume.voxel_size
    return volume.with_data(raised_cosine((outside - extend) / max(edge, 1e-6)).astype(np.float32))


AUTO = "auto"  # in place of a mask's file: the one made from the maps themselves
_AUTOMATIC = 0.2  # of the filtered map's peak: above the solvent's noise, within the molecule's density
_FILTER_EDGE = 2.0  # shells


def relion_mask(
    volume: Volume,
    *,
    threshold: float | None = None,
    resolution: float | None = 15.0,
    extend: float = 3.0,
    edge: float = 6.0,
    largest: bool = True,
) -> tuple[Volume, float]:
    """Return the mask that relion_mask_create makes (RELION's autoMask, src/mask.cpp), and the threshold.

    Parameters
    ----------
    volume : Volume
    threshold : float, optional
        Density of the filtered map from which on a voxel is inside; by default a fifth of the way from the solvent
        (median over the box's faces) to its peak.
    resolution : float, optional
        Of the low-pass filter, in angstrom; None leaves the map as it is.
    extend, edge : float
        Voxels by which what is inside grows, and over which the mask then falls to 0.
    largest : bool
        Leave out what is not connected with the largest part, before it grows. RELION keeps it.

    Raises
    ------
    InputError
        The voxel size is unknown, the map is inverted, or nothing or everything lies above the threshold.
    """
    data = volume.data
    if resolution is not None:
        if volume.voxel_size <= 0:
            raise InputError("the map's pixel size is 0 (unknown), expected angstrom; a low-pass filter needs it")
        box = max(volume.shape)
        radius = spatial_frequency(volume.shape, 1.0 / box)
        shell = np.floor(box * volume.voxel_size / resolution + 0.5)
        data = inverse(forward(data) * raised_cosine((radius - shell) / _FILTER_EDGE + 0.5), volume.shape)
    if threshold is None:
        level = solvent_level(data)
        if level - float(data.min()) > float(data.max()) - level:
            raise InputError(
                f"the filtered map goes from {data.min():g} to {data.max():g} about a solvent of {level:g}, expected "
                "bright density; is it inverted? If not, give a threshold"
            )
        threshold = level + _AUTOMATIC * (float(data.max()) - level)
    inside = data >= threshold
    if not inside.any() or inside.all():
        raise InputError(
            f"{'everything' if inside.any() else 'nothing'} lies above the threshold of {threshold:g}; the filtered "
            f"map goes from {data.min():g} to {data.max():g}"
        )
    if largest:
        parts, number = label(inside)
        if number > 1:
            inside = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    if extend > 0:
        inside = distance_transform_edt(~inside) < extend
    mask = inside.astype(np.float32)
    if edge > 0:
        distance = distance_transform_edt(~inside)
        mask = np.where(inside | (distance < edge), raised_cosine(distance / edge), 0.0).astype(np.float32)
    return volume.with_data(mask), threshold
