"""Denoise maps in files: what ``cryored denoise`` does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.belonging import SAME_SIZE, auto_mask, check_pair, name_of, read_mask
from cryored.files.chimerax import Shown, denoised_surfaces
from cryored.files.fsc_tables import read_fsc_table
from cryored.files.jobs import read_job
from cryored.files.mrc import read_volume, write_volume
from cryored.files.output import check_outputs, check_target, is_stream, write_text
from cryored.files.requests import is_joined, read_request_file
from cryored.maps.fourier import apply_shells, forward, low_pass, shell_power
from cryored.maps.fsc import (
    NothingToRandomiseError,
    masked_correlation,
    nominal_resolution,
    shell_correlation,
    whole_set_fsc,
)
from cryored.maps.mask import AUTO
from cryored.maps.network_scale import solvent_level
from cryored.maps.volume import Volume
from cryored.prior.budget import ENGINE, network_memory, network_seconds
from cryored.prior.denoiser import CPU_TILE, Denoiser, Progress, silent, tile_voxels
from cryored.prior.falloff import guinier_bfactor, sharpened, sharpening
from cryored.prior.kept_signal import can_judge, kept_signal, resolved_shells, shells_in_doubt
from cryored.prior.models import DEFAULT_MODEL, Model, ModelCard, check_uncertainty, check_weights, find_model
from cryored.reconstruction.sums import with_fsc

logger = logging.getLogger(__name__)

_BLUR = 15.0  # angstrom at which noise is gone and a molecule is a blob
_SKEWED = 0.3  # skewness of the blurred map; molecules have 0.7 to 5, noise 0
_SHARPENED = 25.0  # B factor in square angstrom from which on a map counts as sharpened; others have -20 to 20
_DEAR = 2.0e8  # voxels at the model's pixel size, from which on a map takes ten minutes and more on a CPU
_RAW = "_unfil.mrc"  # ending of RELION's raw half-maps
_ACTIVE = 0.01  # relative change of a shell from which on the prior did something there

Curve = npt.NDArray[np.floating]


@dataclass(frozen=True)
class DenoiseOptions:
    """How a map is denoised, and what is written besides.

    Parameters
    ----------
    model : str
        Name or folder.
    half2, fsc : str, optional
        The other half-map, or an FSC table: the map is then a raw half-map and is weighted by the FSC first.
    request : str, optional
        The map is RELION's own answer to this request, of a half or a class: it is weighted already, and the network is
        told the request's FSC.
    mask : str, optional
        Soft mask: the FSC of two half-maps is that within it, corrected; and the results are within it, their
        solvent 0. ``auto`` makes it from the map (see `cryored.files.belonging.auto_mask`).
    uncertainty : str, optional
        MRC file for the standard deviation of the remaining error, or ``-``.
    difference : str, optional
        MRC file for the result minus what the network got.
    chimerax : str, optional
        Script that shows the maps that are in files (see `cryored.files.chimerax`).
    plot : str, optional
        PNG of slices, FSC and power.
    bfactor : float or "auto", optional
        Sharpen the result by so many square angstrom, negative as RELION has it; "auto" finds it by a Guinier plot of
        the weighted map (see `guinier_bfactor`).
    angpix : float, optional
        Pixel size in angstrom, instead of the one in the file.
    rotations, tile, gpu, threads
        See `Denoiser`.
    force : bool
        Insist on a map for which the model is not made, or that takes very long.
    overwrite : bool
        Replace existing outputs.
    """

    model: str = DEFAULT_MODEL
    half2: str | None = None
    fsc: str | None = None
    request: str | None = None
    mask: str | None = None
    uncertainty: str | None = None
    difference: str | None = None
    chimerax: str | None = None
    plot: str | None = None
    bfactor: float | Literal["auto"] | None = None
    angpix: float | None = None
    rotations: int = 1
    tile: int | None = None
    gpu: bool | None = None
    threads: int | None = None
    force: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class _Source:
    """A map on its way to the network.

    Parameters
    ----------
    name : str
    volume : Volume
        As the network gets it: weighted where that is called for, not sharpened.
    given : Volume
        As it was.
    fsc : (max(shape) // 2 + 1,) float64 or None
        What the network is told of it, and by which it is weighted: the FSC that it has to another map as good.
    halves : (max(shape) // 2 + 1,) float64 or None
        FSC between the half-maps: `fsc` itself, unless the map is their average.
    masked : bool
        Whether that is of what is within a mask.
    sharpening : float
        By how many square angstrom it was sharpened, which is undone in `volume`.
    path : str or None
        The file that holds it as it was, if one does.
    """

    name: str
    volume: Volume
    given: Volume
    fsc: Curve | None
    halves: Curve | None
    masked: bool = False
    sharpening: float = 0.0
    path: str | None = None


def denoise_file(
    path: str, output: str, options: DenoiseOptions = DenoiseOptions(), *, progress: Progress = silent
) -> None:
    """Denoise one map file; see `Denoiser` and the help of ``cryored denoise``.

    Parameters
    ----------
    path, output : str
        MRC files, or ``-``. With ``options.half2`` the result is of the first half alone.
    options : DenoiseOptions
    progress : callable
        Is told how many tiles are done, and of how many.

    Raises
    ------
    InputError, OutputError, ModelError
        An input cannot be used, an output cannot be written, or the model tells no uncertainty that is asked for.
    """
    model = _begin((path, options.half2), output, options)
    volume = _read(path, options)
    mask = _read_mask(options, path, volume)
    fsc, masked = _given_fsc(path, volume, mask, options)
    source = replace(_source(path, volume, fsc, model, options), masked=masked)
    if not is_stream(path):
        source = replace(source, path=path)
    _denoise(source, mask, output, model, options, progress)


def denoise_halves(
    half1: str, half2: str, output: str, options: DenoiseOptions = DenoiseOptions(), *, progress: Progress = silent
) -> None:
    """Denoise the average of two raw half-maps, weighted as a half-map would be that is as good.

    To another whole data set's map it would have an FSC of 2 f / (1 + f) (Rosenthal & Henderson 2003): the share of the
    signal in its power, as f is that of a half. The network knows maps that are weighted by this share; RELION weights
    its joined map by the root.

    Parameters
    ----------
    half1, half2, output : str
        MRC files, one of them or the output ``-``.
    options : DenoiseOptions
        Its ``half2`` and ``fsc`` are not looked at.
    """
    model = _begin((half1, half2), output, options)
    first, second = _read(half1, options), _read(half2, options)
    check_pair((name_of(half1), name_of(half2)), first, second)
    average = first.with_data((first.data + second.data) / 2)
    mask = _read_mask(options, half1, average)
    halves = _half_fsc(half1, first, half2, second, mask, options)
    source = _source(f"the average of {half1} and {half2}", average, whole_set_fsc(halves), model, options)
    _denoise(replace(source, halves=halves, masked=mask is not None), mask, output, model, options, progress)


def denoise_job(
    folder: str, output: str, options: DenoiseOptions = DenoiseOptions(), *, progress: Progress = silent
) -> None:
    """Denoise the average of a RELION job's unfiltered half-maps; its mask and pixel size stand in for those not given.

    Raises
    ------
    InputError
        The folder is no job's, or holds no half-maps (yet).
    """
    job = read_job(folder)
    half1, half2 = job.need_halves()
    mask = options.mask if options.mask is not None or job.mask is None else str(job.mask)
    logger.info("%s and %s, %s", half1, half2, "no mask" if mask is None else f"mask {mask}")
    angpix = job.pixel_size if options.angpix is None else options.angpix
    denoise_halves(str(half1), str(half2), output, replace(options, mask=mask, angpix=angpix), progress=progress)


def _begin(maps: tuple[str | None, ...], output: str, options: DenoiseOptions) -> Model:
    """Check where results go, and the model, before anything large is read."""
    outputs = (output, options.uncertainty, options.difference, options.chimerax, options.plot)
    check_outputs(outputs, (*maps, options.mask, options.fsc, options.request))
    for target in outputs:
        if target is not None:
            check_target(target, options.overwrite)
    model = find_model(options.model)
    if options.uncertainty is not None:
        check_uncertainty(model)
    check_weights(model)
    return model


def _read(path: str, options: DenoiseOptions) -> Volume:
    volume = read_volume(path, angpix=options.angpix)
    if volume.voxel_size <= 0:
        raise InputError(f"{path}: pixel size 0 (unknown) in the header, expected angstrom; give it with --angpix")
    return volume


def _read_mask(options: DenoiseOptions, path: str, volume: Volume) -> npt.NDArray[np.float32] | None:
    if options.mask is None:
        return None
    if options.mask == AUTO:
        return np.asarray(auto_mask(name_of(path), volume), dtype=np.float32)
    return np.asarray(read_mask(options.mask, name_of(path), volume, options.angpix), dtype=np.float32)


def _source(path: str, volume: Volume, fsc: Curve | None, model: Model, options: DenoiseOptions) -> _Source:
    """Return what the network gets, and say what was made of the map for that."""
    _check_range(path, volume, model.card, options)
    if _is_inverted(volume):
        logger.warning(
            "%s: density is dark on bright (at %g A the map is skewed to negative values), as of particles whose "
            "contrast was not inverted; the prior knows bright density only: multiply the map by -1 first",
            path,
            max(_BLUR, 4 * volume.voxel_size),
        )
    if model.card.input == "unregularised":
        if options.request:
            raise InputError(f"{path}: weighted by RELION, expected a raw map for {model.card.name}; use another model")
        if options.half2 or options.fsc:
            logger.info("%s takes raw maps: %s is not weighted by an FSC", model.card.name, path)
        return _Source(path, volume, volume, fsc, fsc)
    if options.request is not None:
        return _Source(path, volume, volume, fsc, fsc)
    if fsc is not None:
        if not (fsc[1:] > 0).any():
            raise InputError(f"{path}: an FSC of 0 or less in all shells, expected one that resolves something")
        weights = np.clip(fsc, 0.0, 1.0)
        weighted = volume.with_data(apply_shells(volume.data, weights, options.threads))
        return _Source(path, weighted, volume, fsc, fsc)
    if path.endswith(_RAW):
        logger.warning(
            "%s is taken as filtered already, but a raw half-map by its name: its noise passes for signal; give %s",
            path,
            _how_to_weight(Path(path)),
        )
    else:
        logger.info(
            "%s is taken as filtered already (a post-processed map, RELION's own output); for a raw half-map give "
            "--half2 or --fsc",
            path,
        )
    bfactor = sharpening(volume)
    if bfactor < _SHARPENED:
        return _Source(path, volume, volume, None, None)
    if options.uncertainty is not None:
        raise InputError(
            f"{path}: sharpened, by a B factor of about -{bfactor:.0f} A^2, expected an unsharpened map for "
            "--uncertainty; a voxel's sigma says nothing of the sharpened one's; give the half-maps"
        )
    logger.warning(
        "%s is sharpened, by a B factor of about -%.0f A^2 against maps inside a refinement, which the prior knows: it "
        "is blurred by as much for the network, and the result sharpened again",
        path,
        bfactor,
    )
    blurred = sharpened(volume.data, volume.voxel_size, -bfactor, options.threads)
    return _Source(path, volume.with_data(blurred), volume, None, None, sharpening=bfactor)


def _how_to_weight(path: Path) -> str:
    """Return the option that weights a raw half-map, with the other half where that lies beside it."""
    for mine, others in (("half1", "half2"), ("half2", "half1")):
        other = path.with_name(path.name.replace(mine, others))
        if other.name != path.name and other.exists():
            return f"--half2 {other}"
    return "--half2 or --fsc"


def _check_range(path: str, volume: Volume, card: ModelCard, options: DenoiseOptions) -> None:
    """Refuse a map in which the model knows nothing, or that takes very long; warn of one that ends early."""
    fine, coarse = card.resolution_range
    end = 2 * volume.voxel_size
    shape = tuple(round(n * volume.voxel_size / card.pixel_size) for n in volume.shape)
    known = f"{card.name} is made for maps resolved to {fine:.3g} to {coarse:.3g} A, at {card.pixel_size:g} A/pixel"
    if end >= coarse and volume.voxel_size > 2 * card.pixel_size and not options.force:
        raise InputError(
            f"{path}: pixel size {volume.voxel_size:g} A, so nothing finer than {end:g} A is in it; {known}: expected "
            "a finer map; --force insists"
        )
    if math.prod(shape) > _DEAR and not options.force:
        tile = options.tile or CPU_TILE
        memory = ENGINE + network_memory(card, shape, tile)
        voxels = options.rotations * tile_voxels(shape, tile, card)
        minutes = network_seconds(card, voxels, gpu=False, threads=options.threads) / 60
        size = " x ".join(map(str, reversed(volume.shape)))
        raise InputError(
            f"{path}: {size} voxels of {volume.voxel_size:g} A are {math.prod(shape):.2g} at the model's "
            f"{card.pixel_size:g} A: about {memory / 2**30:.0f} GiB of memory and {minutes:.0f} min on a CPU; crop the "
            "map to the molecule, or --force"
        )
    if end > (fine * coarse) ** 0.5:
        logger.warning("%s ends at %g A; %s", path, end, known)


def _given_fsc(
    path: str, volume: Volume, mask: npt.NDArray[np.float32] | None, options: DenoiseOptions
) -> tuple[Curve | None, bool]:
    """Return the half-maps' FSC in the map's shells, where it is given, and whether it is that within a mask."""
    if options.half2 is not None:
        second = read_volume(options.half2, angpix=options.angpix)
        return _half_fsc(path, volume, options.half2, second, mask, options), mask is not None
    if options.request is not None:
        return _request_fsc(path, volume, options.request), False
    if options.fsc is None:
        return None, False
    # The FSC within a mask is better than the map that no mask is put on: its solvent is all noise.
    table = read_fsc_table(options.fsc, masked=mask is not None)
    if table.masked and mask is None:
        logger.warning(
            "%s: an FSC within a mask alone, by which the solvent of %s gets too much weight; give --mask, too",
            name_of(options.fsc),
            path,
        )
    longest = max(volume.shape)
    shells = np.arange(longest // 2 + 1) / (longest * volume.voxel_size)
    # A table that ends early knows nothing beyond: no weight there. Its last shell may differ by rounding.
    inside = shells <= table.frequency[-1] * (1 + 1e-4)
    known = np.where(table.frequency == 0, 1.0, table.fsc)
    return np.where(inside, np.interp(shells, table.frequency, known), 0.0), table.masked


def _request_fsc(path: str, volume: Volume, name: str) -> Curve | None:
    """Return the FSC of a request whose answer the map is; None where nothing is resolved."""
    request = with_fsc(read_request_file(name, needs_pixel_size=False))
    name = name_of(name)
    if request.pixel_size and abs(volume.voxel_size / request.pixel_size - 1) > SAME_SIZE:
        raise InputError(
            f"{path}: pixel size {volume.voxel_size:g} A, expected that of {name}, {request.pixel_size:g} A; give it "
            "with --angpix if the header is wrong"
        )
    if volume.shape != (request.ori,) * 3:
        raise InputError(f"{path}: shape {volume.shape} (z, y, x), expected the box of {name}, {request.ori} cubed")
    if is_joined(request):
        raise InputError(
            f"{name}: of the joined halves, whose map RELION weights otherwise than the network knows; expected the "
            "request of a half or a class; give --half1 and --half2, or use `cryored red-update`"
        )
    return request.fsc if request.fsc.any() else None


def _half_fsc(
    path1: str,
    first: Volume,
    path2: str,
    second: Volume,
    mask: npt.NDArray[np.float32] | None,
    options: DenoiseOptions,
) -> Curve:
    """Return the FSC of two half-maps, corrected for the mask where there is one; 1 at zero frequency.

    There it is the sign of the product of the maps' means, which says nothing.
    """
    check_pair((name_of(path1), name_of(path2)), first, second)
    if np.array_equal(first.data, second.data):
        raise InputError(
            f"{path1} and {path2} are the same map, expected the two independent half-maps; an FSC of 1 would "
            "pass all noise to the network"
        )
    if mask is None:
        fsc = shell_correlation(first.data, second.data, threads=options.threads)
    else:
        # Within a mask a level of the solvent would be signal that both share.
        data1, data2 = (volume.data - np.float32(solvent_level(volume.data)) for volume in (first, second))
        correlate = partial(masked_correlation, data1, data2, mask, threads=options.threads)
        try:
            fsc = correlate(rng=np.random.default_rng(0)).corrected
        except NothingToRandomiseError:
            logger.warning("%s and %s are alike to Nyquist: their FSC within the mask is not corrected", path1, path2)
            fsc = correlate(rng=np.random.default_rng(0), randomise_from=max(first.shape) // 2).corrected
    fsc[0] = 1.0
    return fsc


def _denoise(
    source: _Source,
    mask: npt.NDArray[np.float32] | None,
    output: str,
    model: Model,
    options: DenoiseOptions,
    progress: Progress,
) -> None:
    denoiser = Denoiser(
        model,
        gpu=options.gpu,
        threads=options.threads,
        tile=options.tile,
        rotations=options.rotations,
        progress=progress,
    )
    finish = _finisher(source, mask, options)
    if options.uncertainty is None:
        found = [denoiser(source.volume, source.fsc)]
    else:
        found = [*denoiser.with_uncertainty(source.volume, source.fsc)]
    kept = None
    # A mask without any 0 leaves the solvent in.
    level = 0.0 if mask is None or mask.min() > 0 else solvent_level(source.volume.data)
    given = finish(source.volume, level)
    results = [finish(found[0], level), *(finish(sigma, 0.0) for sigma in found[1:])]
    if denoiser.device_name:
        logger.info("denoised with %s on %s", model.card.name, denoiser.device_name)
        _tell(source, given, results[0], options)
        kept = _kept(source, found[0], model, options)
    else:
        logger.info("%s is constant: returned as it is", source.name)
    by = f"{model.card.name} {model.card.sha256[:8]} rotations {options.rotations}"
    write_volume(output, results[0], label=f"denoise {by}")
    difference = sigma = None
    if options.difference is not None:
        difference = options.difference, results[0].with_data(results[0].data - given.data)
        write_volume(*difference, label=f"denoise difference {by}")
    if options.uncertainty is not None:
        sigma = options.uncertainty, results[1]
        write_volume(*sigma, label=f"denoise uncertainty {by}")
    if options.chimerax is not None:
        shown = Shown((output, results[0]), source.path, difference, sigma)
        write_text(options.chimerax, denoised_surfaces(options.chimerax, shown))
    if options.plot is not None:
        from cryored.prior.denoise_pictures import draw_denoised

        draw_denoised(options.plot, given, results[0], kept)


def _finisher(
    source: _Source, mask: npt.NDArray[np.float32] | None, options: DenoiseOptions
) -> Callable[[Volume, float], Volume]:
    """Return what is done with every map that is written, of a solvent level: sharpened (again), masked."""
    wanted = options.bfactor or 0.0
    if wanted == "auto":
        if source.fsc is None:
            raise InputError(f"{source.name}: no FSC, expected that of half-maps for --bfactor auto; give a number")
        wanted = guinier_bfactor(source.given, np.asarray(source.fsc, dtype=np.float64))
        logger.info("%s: sharpened by a B factor of %.1f A^2, by the Guinier plot from 10 A on", source.name, wanted)
    bfactor = source.sharpening - wanted

    def finish(volume: Volume, level: float) -> Volume:
        data = volume.data
        if bfactor:
            data = sharpened(data, volume.voxel_size, bfactor, options.threads)
        return volume.with_data(data if mask is None else (data - np.float32(level)) * mask)

    return finish


def _tell(
    source: _Source,
    given: Volume,
    result: Volume,
    options: DenoiseOptions,
) -> None:
    """Say by what the map was weighted, by how much it was changed, and to which resolution."""
    frequency = np.arange(max(given.shape) // 2 + 1) / (max(given.shape) * given.voxel_size)
    weighted, at = "not weighted", 0.0
    if source.halves is not None:
        at = nominal_resolution(frequency, np.asarray(source.halves, dtype=np.float64))
    if source.halves is not None and source.volume is not source.given:
        inside = " within the mask" if source.masked else ""
        weighted = f"weighted by its FSC{inside} (between the halves 0.143 at {at:.2f} A)"
    elif options.request is not None:
        weighted = f"weighted by RELION, by the FSC of {name_of(options.request)}"
    difference = result.data - given.data
    norm = float(np.linalg.norm(given.data - np.float32(solvent_level(given.data))))
    changed = float(np.linalg.norm(difference)) / norm if norm else 0.0
    before = shell_power(forward(given.data, options.threads), given.shape)
    after = shell_power(forward(difference, options.threads), given.shape)
    active = np.flatnonzero(after > _ACTIVE**2 * np.maximum(before, before[1:].max() * 1e-9))
    active = active[active > 0]
    reach = "active nowhere"
    if active.size:
        end = float(1 / frequency[active[-1]])
        alone = f", beyond {at:.2f} A on the prior's word alone" if end < at else ""
        reach = f"active to {end:.2f} A{alone}"
    logger.info("%s: %s, changed by %.0f %%, %s", source.name, weighted, 100 * changed, reach)


def _kept(source: _Source, denoised: Volume, model: Model, options: DenoiseOptions) -> Curve | None:
    """Return the share of the signal told that the result keeps, NaN where nothing is resolved; warn if it is small."""
    if source.fsc is None or source.halves is None or not can_judge(model.card):
        return None
    kept = kept_signal(source.volume, denoised, source.fsc, threads=options.threads)
    doubted = shells_in_doubt(kept, source.halves)
    if len(doubted):
        edge = max(denoised.shape) * denoised.voxel_size
        logger.warning(
            "%s: in %d shells from %.1f to %.1f A the result keeps %.0f %% of the signal that the FSC tells, where 60 "
            "to 130 %% is usual: the FSC is too good there (overfitting, a mask's edge), or %s does not know such a "
            "map; do not rely on what it shows there",
            source.name,
            len(doubted),
            edge / doubted[0],
            edge / doubted[-1],
            100 * max(float(np.median(kept[doubted])), 0.0),
            model.card.name,
        )
    return np.where(resolved_shells(source.halves), kept, np.nan)


def _is_inverted(volume: Volume) -> bool:
    """Tell whether molecules are dark: blurred, they are the few values that differ from the solvent's many."""
    blurred = low_pass(volume.data, volume.voxel_size, max(_BLUR, 4 * volume.voxel_size)).astype(np.float64)
    spread = blurred.std()
    return bool(spread > 0 and ((blurred - blurred.mean()) ** 3).mean() < -_SKEWED * spread**3)
