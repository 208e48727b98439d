"""The FSC of two files: what ``cryored fsc`` does."""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass, replace

import numpy as np

from cryored.assessment.noise_substitution import substituted_volumes
from cryored.errors import InputError
from cryored.files.belonging import AnyPath, auto_mask, check_pair, name_of, read_mask, warn_of_level
from cryored.files.jobs import read_job
from cryored.files.mrc import read_volume
from cryored.maps.fsc import (
    Curve,
    FscResult,
    SubstitutedFsc,
    last_above,
    masked_correlation,
    shell_correlation,
    shift_between,
)
from cryored.maps.mask import AUTO
from cryored.maps.volume import Volume
from cryored.prior.models import DEFAULT_MODEL

logger = logging.getLogger(__name__)


# Labels of `denoise` and `red-update`; with lambda 0, and of the unregularised map, no network had a say.
_BY_NETWORK = re.compile(r"cryored \S+ ((?:denoise|red-update(?! lambda 0 \(MAP\)$| unregularised$)) .*)")


@dataclass(frozen=True)
class FscOptions:
    """How two maps are compared.

    Parameters
    ----------
    mask : path, optional
        MRC file or ``-``, from 0 to 1; ``auto`` makes it from the average of the two maps (see
        `cryored.files.belonging.auto_mask`).
    angpix : float, optional
        Pixel size in angstrom that replaces those of the headers.
    randomise_from : float, optional
        Resolution in angstrom beyond which phases are randomised; see `masked_correlation` for the default.
    substitute_noise_from : float, optional
        Resolution in angstrom beyond which noise replaces the signal in a test of a model; see
        `cryored.assessment.noise_substitution.substituted_correlation`. The maps are then raw half-maps.
    model : str
        Name or folder of the model under test.
    gpu : bool, optional
        See `cryored.prior.device.set_up`.
    seed : int
        Of the random phases and of the noise.
    threads : int, optional
        For the transforms; all cores by default.
    """

    mask: AnyPath | None = None
    angpix: float | None = None
    randomise_from: float | None = None
    substitute_noise_from: float | None = None
    model: str = DEFAULT_MODEL
    gpu: bool | None = None
    seed: int = 0
    threads: int | None = None


def fsc_files(map1: AnyPath, map2: AnyPath, options: FscOptions = FscOptions()) -> FscResult:
    """Compare two map files, within a mask where one is given.

    Parameters
    ----------
    map1, map2 : path
        MRC files or, for one of them and the mask, ``-``.
    options : FscOptions

    Raises
    ------
    InputError
        A file cannot be read, the grids differ, a map is constant, the mask is no mask, or a resolution lies
        outside the shells.
    ModelError
        The model cannot be found or used.
    """
    names = (name_of(map1), name_of(map2))
    first, second = (read_volume(path, angpix=options.angpix) for path in (map1, map2))
    voxel_size = check_pair(names, first, second)
    mask = None
    if options.mask == AUTO:
        mask = auto_mask(names[0], first.with_data((first.data + second.data) / 2).with_voxel_size(voxel_size))
    elif options.mask is not None:
        mask = read_mask(options.mask, names[0], first, options.angpix)

    def shell_at(resolution: float, option: str) -> int:
        if not voxel_size:
            raise InputError(f"{names[0]}: no pixel size in the header, {option} needs it; give --angpix")
        # Downwards, as RELION does; the small number keeps 12 A of 96 A at shell 8.
        return math.floor(max(first.shape) * voxel_size / resolution + 1e-6)

    masked = substituted = None
    if mask is None:
        unmasked = shell_correlation(first.data, second.data, threads=options.threads)
    else:
        start = options.randomise_from
        masked = masked_correlation(
            first.data,
            second.data,
            mask,
            rng=np.random.default_rng(options.seed),
            randomise_from=None if start is None else shell_at(start, "--randomise-from"),
            threads=options.threads,
        )
        unmasked = masked.unmasked
    if options.substitute_noise_from is not None:
        substituted = substituted_volumes(
            first.with_voxel_size(voxel_size),
            second.with_voxel_size(voxel_size),
            unmasked,
            shell_at(options.substitute_noise_from, "--substitute-noise"),
            model=options.model,
            # Random numbers of its own, so that the noise is the same with and without a mask.
            rng=np.random.default_rng(np.random.SeedSequence(options.seed).spawn(1)[0]),
            mask=mask,
            gpu=options.gpu,
            threads=options.threads,
        )
    _warn_of_doubtful(names, first, second)
    if mask is not None:
        for name, volume in zip(names, (first, second), strict=True):
            warn_of_level(name, volume, "0 for an FSC within a mask")
    mask_name = None if options.mask is None else name_of(options.mask)
    return FscResult(names, mask_name, max(first.shape), voxel_size, unmasked, masked, substituted)


def fsc_job(folder: AnyPath, options: FscOptions = FscOptions()) -> FscResult:
    """Compare the unfiltered half-maps of a RELION job; its mask and pixel size stand in for those not given.

    Raises
    ------
    InputError
        As `fsc_files`; the folder is no job's, or holds no half-maps (yet), or no mask where one is needed.
    """
    job = read_job(os.fspath(folder))
    halves = job.need_halves()
    mask = job.mask if options.mask is None else options.mask
    if mask is None and options.randomise_from is not None:
        raise InputError(f"{folder}: no mask in this job, and --randomise-from has no meaning without; give --mask")
    angpix = job.pixel_size if options.angpix is None else options.angpix
    logger.info("%s and %s, %s", *halves, "no mask" if mask is None else f"mask {mask}")
    return fsc_files(*halves, replace(options, mask=mask, angpix=angpix))


def _warn_of_doubtful(names: tuple[str, str], volume1: Volume, volume2: Volume) -> None:
    """Warn of two maps that are one, denoised both, that lie apart, or that their headers place differently."""
    if np.array_equal(volume1.data, volume2.data):
        logger.warning("%s and %s hold the same map: its FSC with itself is 1 and tells nothing", *names)
    by = [next(filter(None, map(_BY_NETWORK.match, volume.labels)), None) for volume in (volume1, volume2)]
    if by[0] and by[1]:
        logger.warning(
            "%s and %s both went through the network (labels: %s; %s) and agree on what it adds: their FSC is no "
            "resolution; compare raw half-maps, or one map with the truth (docs/validation.md)",
            *names,
            by[0][1],
            by[1][1],
        )
    shift = shift_between(volume1.data, volume2.data)
    if any(shift):
        unit = volume1.voxel_size or volume2.voxel_size
        size = f" ({', '.join(f'{unit * n:.1f}' for n in shift)} A)" if unit else ""
        logger.warning(
            "%s looks shifted by %d, %d, %d voxels (x, y, z)%s against %s, and their FSC is too low; `cryored simulate "
            "map --like` puts a model into a map's frame",
            names[1],
            *shift,
            size,
            names[0],
        )
    places = [(volume.origin, volume.nstart) for volume in (volume1, volume2)]
    if places[0] != places[1]:
        words = [f"origin {origin} A, start {start}" for origin, start in places]
        logger.warning(
            "%s has %s, %s has %s: compared voxel by voxel all the same; shift one of them if they lie apart",
            names[0],
            words[0],
            names[1],
            words[1],
        )


def log_summary(result: FscResult, threshold: float = 0.143) -> None:
    """Log the resolution at a threshold; warn, as relion_postprocess does, of what makes it doubtful."""
    shell = last_above(result.best, threshold)
    kind = "unmasked" if result.masked is None else "corrected"
    place = f"{1 / result.frequency[shell]:.2f} A" if shell and result.voxel_size else f"shell {shell}"
    if shell == 0:
        logger.warning("no resolution: the %s FSC is below %g from the first shell on", kind, threshold)
    elif shell == len(result.best) - 1:
        logger.info("resolution %s (Nyquist) or better: the %s FSC never drops below %g", place, kind, threshold)
    else:
        logger.info("resolution %s: the last shell before the %s FSC drops below %g", place, kind, threshold)
    if not result.voxel_size:
        logger.warning("%s: no pixel size in the header, so no frequencies; give --angpix", result.maps[0])
    if result.substituted is not None:
        _log_invented(result.substituted, result.frequency)
    if result.masked is None:
        return
    logger.info("phases randomised from shell %d on", result.masked.randomise_from)
    if last_above(result.unmasked, threshold) > shell:
        logger.warning("the unmasked FSC reaches further than the corrected one: does the mask cut density?")
    elif shell and result.masked.randomised[shell] > 0.1:
        logger.warning("the FSC of random phases is above 0.1 at the resolution: use a wider or softer mask")


def _log_invented(test: SubstitutedFsc, frequency: Curve) -> None:
    # Not the last shell: Nyquist's planes hold what the network's strides leave there.
    tail = slice(test.start, max(len(frequency) - 1, test.start + 1))
    beyond = test.denoised_substituted[tail]
    logger.info(
        "beyond %.2f A: mean FSC %.3f denoised; with noise for signal %.3f denoised (invented; at most %.3f, at "
        "%.2f A), %.3f not denoised",
        1 / frequency[test.start],
        test.denoised[tail].mean(),
        beyond.mean(),
        beyond.max(),
        1 / frequency[test.start + beyond.argmax()],
        test.substituted[tail].mean(),
    )
