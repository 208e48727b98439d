"""Make a mask from a map in a file: what ``cryored mask`` does."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from cryored.errors import InputError
from cryored.files.jobs import is_job, read_job
from cryored.files.mrc import read_volume, write_volume
from cryored.files.output import check_outputs, check_target
from cryored.files.plots import new_figure, save_figure
from cryored.maps.mask import relion_mask
from cryored.maps.network_scale import solvent_level
from cryored.maps.volume import Volume

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskOptions:
    """How a mask is made; see `cryored.maps.mask.relion_mask`.

    Parameters
    ----------
    threshold : float, optional
        Density; by default a fifth of the way from the solvent to the filtered map's peak.
    lowpass : float, optional
        Angstrom; None leaves the map as it is.
    extend, edge : float
        Voxels.
    islands : bool
        Keep what is not connected with the largest part.
    angpix : float, optional
        Pixel size in angstrom, instead of the one in the file.
    plot : str, optional
        PNG of the map with the mask's outline.
    overwrite : bool
        Replace existing files.
    """

    threshold: float | None = None
    lowpass: float | None = 15.0
    extend: float = 3.0
    edge: float = 6.0
    islands: bool = False
    angpix: float | None = None
    plot: str | None = None
    overwrite: bool = False


def mask_file(path: str, output: str, options: MaskOptions) -> None:
    """Write the mask of a map, or of a RELION job's.

    Raises
    ------
    InputError, OutputError
        The map cannot be used, or a file cannot be written.
    """
    check_outputs((output, options.plot), (path,))
    for target in (output, options.plot):
        if target is not None:
            check_target(target, options.overwrite)
    if is_job(path):
        job = read_job(path)
        if job.map is None:
            raise InputError(f"{path}: no map (run_class001.mrc) in this job yet, expected one to make the mask from")
        path = str(job.map)
        check_outputs((output, options.plot), (path,))
        logger.info("mask of %s", path)
    volume = read_volume(path, angpix=options.angpix)
    try:
        mask, threshold = relion_mask(
            volume,
            threshold=options.threshold,
            resolution=options.lowpass,
            extend=options.extend,
            edge=options.edge,
            largest=not options.islands,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    write_volume(output, mask, label="mask")
    share = 100 * float(mask.data.mean(dtype=np.float64))
    logger.info("%s: threshold %.4g, %.1f %% of the box is inside", output, threshold, share)
    if share > 50:
        logger.warning(
            "%s: %.0f %% of the box is inside, expected less than half: solvent counts as molecule; raise --threshold "
            "(%.4g), or use a larger box",
            output,
            share,
            threshold,
        )
    if any((mask.data.take((0, -1), axis) >= 1).any() for axis in range(3)):
        logger.warning(
            "%s: 1 on a face of the box, expected a soft edge and solvent there; raise --threshold (%.4g), or use a "
            "larger box",
            output,
            threshold,
        )
    if options.plot is not None:
        _draw(options.plot, volume, mask)


def _draw(path: str, volume: Volume, mask: Volume) -> None:
    figure = new_figure(9, 3.3)
    level, white = solvent_level(volume.data), float(np.percentile(volume.data, 99.8))
    black = min(level, white) - 0.3 * abs(white - level)
    for place, axis in enumerate(figure.subplots(1, 3)):
        middle = volume.shape[place] // 2
        axis.imshow(np.take(volume.data, middle, place), cmap="gray", vmin=black, vmax=max(level, white))
        outline = np.take(mask.data, middle, place)
        axis.contour(outline, levels=[0.05, 0.95], colors=["tab:orange", "tab:red"], linewidths=0.9)
        axis.set(title=f"normal to {'zyx'[place]}", xticks=[], yticks=[])
    save_figure(figure, path)
