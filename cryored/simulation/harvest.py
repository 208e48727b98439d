"""Training pairs from what a refinement by RELION has left behind."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryored.errors import InputError
from cryored.files.belonging import check_truth
from cryored.files.mrc import read_volume, write_volume
from cryored.files.requests import ENDING, NAME, Request, read_request_file
from cryored.maps.fourier import apply_shells
from cryored.maps.fsc import shell_correlation
from cryored.maps.truth_scale import RELIABLE, grey_scale, reliable_shells
from cryored.maps.volume import Floats, Volume
from cryored.reconstruction.sums import load_sums
from cryored.reconstruction.update import Accumulators, reconstruct
from cryored.simulation.pair_table import Array, Pair, PairRow, write_pair, write_pairs
from cryored.simulation.split import check_split

logger = logging.getLogger(__name__)

_LEAST_OVERLAP = 0.3  # the wrong hand or origin gives less than 0.2, the right ones give 0.6 and more


def overlap(volume: Array, truth: Array, fsc: Floats) -> float:
    """Return how far a truth is the truth of a map: their correlation, every coefficient counting the same.

    Over the shells of `grey_scale`, each weighted by its number of coefficients. It is the correlation in real space
    of the two maps sharpened to a flat spectrum. As they are, low resolution would decide: a molecule's mirror image
    has much the same envelope and correlates by 0.6.

    Parameters
    ----------
    volume, truth, fsc
        As in `grey_scale`.

    Returns
    -------
    float, -1 to 1.
    """
    shells = reliable_shells(fsc)
    size = shells**2  # of a shell, up to a factor
    return float(size @ shell_correlation(volume, truth)) / max(float(size.sum()), 1.0)


def harvest_request(
    request: Request, source: Accumulators | Array, truth: Array, *, threads: int | None = None
) -> Pair:
    """Make a training pair of one of RELION's requests and the truth.

    Parameters
    ----------
    request : Request
        Of one half; its FSC becomes the pair's.
    source : Accumulators or (ori, ori, ori) float32
        B and K, or the unregularised map that was made from them.
    truth : (ori, ori, ori) float32
    threads : int, optional

    Returns
    -------
    Pair
        The unregularised map, divided by its `grey_scale`; the truth times the FSC between 0 and 1.

    Raises
    ------
    InputError
        The boxes differ, or the FSC leaves no shell to match the grey scales by.
    """
    volume = source if isinstance(source, np.ndarray) else reconstruct(source, threads=threads)
    if volume.shape != truth.shape:
        raise InputError(f"{request.star}: a map of shape {volume.shape} (z, y, x), the truth has {truth.shape}")
    try:
        scale = grey_scale(volume, truth, request.fsc)
    except InputError as error:
        raise InputError(f"{request.star}: {error}") from None
    target = apply_shells(truth, np.clip(request.fsc, 0.0, 1.0), threads)
    return Pair(volume / np.float32(scale), target, request.fsc, request.nominal_resolution(), truth)


@dataclass(frozen=True)
class HarvestOptions:
    """How a run's pairs are named and written.

    Parameters
    ----------
    name : str, optional
        Of the structure; by default that of the truth's file.
    angpix : float, optional
        Pixel size in angstrom, of run and truth, instead of what the files say.
    float16 : bool
        Write maps of half the size.
    manifest, part : str, optional
        Table of a split into parts, and the part that the structure has to be of.
    overwrite : bool
        Whether an existing pairs.star is replaced.
    """

    name: str | None = None
    angpix: float | None = None
    float16: bool = False
    manifest: str | None = None
    part: str = "train"
    overwrite: bool = False


def harvest_files(
    run: str,
    truth: str,
    folder: str,
    options: HarvestOptions = HarvestOptions(),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a pair for each half of each iteration of a refinement, and their pairs.star.

    Used are the requests that RELION leaves (B and K), or where these are gone, what ``cryored red-update
    --unregularised '{root}_unregularised.mrc'`` has kept. What cannot be used is left out and listed in the log. The
    last call, of the joined halves, is none of a half.

    Parameters
    ----------
    run : str
        Folder of the run, or the beginning of its files' names as RELION's ``--o`` has it.
    truth : str
        Map that the particles are projections of, in the run's box: a model's density, or the map of the complete
        data set where the run used a part of it. Only its grid counts, not its origin in the header.
    folder : str
        Where maps and pairs.star go.
    options : HarvestOptions
    progress : callable
        Is told how many requests are done, and of how many.

    Returns
    -------
    Path of pairs.star.

    Raises
    ------
    InputError
        There is no such run or there are several, no request can be used, the name is none of a file, the structure is
        not of the part, or the truth does not fit: other box or pixel size, or an `overlap` below 0.3 with the best
        map.
    """
    target = Path(folder)
    table = target / "pairs.star"
    if table.exists() and not options.overwrite:
        raise InputError(f"{table}: exists already; add --overwrite to replace it")
    name = options.name or Path(truth).name.split(".")[0]
    if Path(name).name != name:
        raise InputError(
            f"{name}: expected a structure's name without '/', as it begins its files'; give another with --name"
        )
    if options.manifest is not None:
        check_split([name], options.manifest, options.part)
    label = f"simulate pairs relion {name}"
    answer = read_volume(truth, angpix=options.angpix)
    left_out: list[str] = []
    requests = _half_requests(find_requests(run), options.angpix, left_out)
    # The best-resolved one first: it tells best whether the truth is the run's.
    requests.sort(key=Request.nominal_resolution)
    if requests:
        check_truth(truth, answer, requests[0])
    rows: list[PairRow] = []
    targets: dict[bytes, str] = {}  # by FSC: that of the two halves is one
    for done, request in enumerate(requests, 1):
        volume = _unregularised(request, left_out)
        if volume is not None:
            if not rows:
                _check_overlap(truth, overlap(volume, answer.data, request.fsc), request)
                target.mkdir(parents=True, exist_ok=True)
                table.unlink(missing_ok=True)  # before its maps are replaced
                copy = str(target / f"{name}_truth.mrc")
                whole = Volume(answer.data, request.pixel_size)
                write_volume(copy, whole, label=label, float16=options.float16)
            rows.append(_write(request, volume, answer, target, name, copy, targets, options.float16))
        progress(done, len(requests))
    if not rows:
        reason = left_out[0] if left_out else "there is only the last one, of the joined halves"
        raise InputError(f"{run}: none of its requests can be used: {reason}")
    if left_out:
        logger.warning("%s: %d of %d requests left out:", run, len(left_out), len(left_out) + len(rows))
        for reason in left_out:
            logger.warning("%s", reason)
    rows.sort(key=lambda row: row.noisy)
    write_pairs(table, rows, made_by=label, split=None if options.manifest is None else options.part)
    return table


def _write(
    request: Request,
    volume: Array,
    answer: Volume,
    target: Path,
    name: str,
    copy: str,
    targets: dict[bytes, str],
    float16: bool,
) -> PairRow:
    """Write one half's pair; the target of the other half, if it is there, is its own too."""
    match = _match(request.star)
    assert match is not None  # or the request would not be among those of halves
    row = write_pair(
        target / f"{name}_{match.group()}",
        harvest_request(request, volume, answer.data),
        structure=name,
        half=int(match.group("half")),
        method="relion",
        seed=0,
        angpix=request.pixel_size,
        label=f"simulate pairs relion {name}",
        float16=float16,
        target=targets.get(request.fsc.tobytes()),
        truth=copy,
    )
    targets[request.fsc.tobytes()] = row.target
    return row


def find_requests(run: str) -> list[Path]:
    """Return the requests of a run, those of its continuations (``_ct5``) among them, in the order of their names.

    Parameters
    ----------
    run : str
        As in `harvest_files`.

    Raises
    ------
    InputError
        There are none, or the folder holds those of several runs.
    """
    path = Path(run)
    stars = _stars(path)
    if stars:
        roots = sorted({match.group("run") for match in map(_match, stars) if match})
        if len(roots) > 1:
            raise InputError(
                f"{run}: holds {len(roots)} runs ({', '.join(roots)}), expected one; name one as RELION's --o does: "
                f"{path / roots[0]}"
            )
        return stars
    begins = (f"{path.name}_it", f"{path.name}_ct")
    stars = [star for star in _stars(path.parent) if star.name.startswith(begins)]
    if not stars:
        raise InputError(
            f"{run}: neither a folder with requests (*{ENDING}.star) nor the beginning of their names, expected a run "
            "of relion_refine --external_reconstruct"
        )
    return stars


def _stars(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{ENDING}.star"))


def _match(star: Path) -> re.Match[str] | None:
    return NAME.match(star.name.removesuffix(f"{ENDING}.star"))


def _half_requests(stars: list[Path], angpix: float | None, left_out: list[str]) -> list[Request]:
    """Read the requests that can give a pair; say of the others why not, but for those of the joined halves."""
    requests = []
    for star in stars:
        try:
            request = read_request_file(str(star), angpix=angpix)
            match = _match(star)
            if match and match.group("body"):
                raise InputError(f"{star}: of one body, expected the whole map, which is what the truth shows")
            if not request.fsc.any():
                raise InputError(f"{star}: the FSC is zero in all shells (Class3D?), expected that of two halves")
            if not reliable_shells(request.fsc).any():
                raise InputError(f"{star}: no shell with an FSC above {RELIABLE} to compare with the truth")
        except InputError as error:
            left_out.append(str(error))
        else:
            if match and match.group("half"):
                requests.append(request)
    return requests


def _unregularised(request: Request, left_out: list[str]) -> Array | None:
    """Return B / K; None, with the reason in `left_out`, where it cannot be had."""
    try:
        kept = Path(f"{request.root}_unregularised.mrc")
        request = _found(request)
        arrays = (request.data_real, request.data_imag, request.weight)
        if all(path.exists() for path in arrays) or not kept.exists():
            return reconstruct(load_sums(request))
        volume = read_volume(kept)
        if volume.shape != (request.ori,) * 3:
            raise InputError(f"{kept}: shape {volume.shape} (z, y, x), expected the run's box of {request.ori} cubed")
        return np.asarray(volume.data, dtype=np.float32)
    except InputError as error:
        left_out.append(str(error))
        return None


def _found(request: Request) -> Request:
    """Return a request whose arrays are those beside it, where there are any.

    Their names in the request are relative to RELION's project folder, wherever that is now: from the current one
    they might lead to another run. RELION writes arrays and request into one folder.
    """
    real, imag, weight = (
        request.star.with_name(path.name) for path in (request.data_real, request.data_imag, request.weight)
    )
    if not (real.exists() or imag.exists() or weight.exists()):
        return request
    return dataclasses.replace(request, data_real=real, data_imag=imag, weight=weight)


def _check_overlap(name: str, correlation: float, request: Request) -> None:
    """Refuse a truth of something else than the map."""
    if correlation < _LEAST_OVERLAP:
        raise InputError(
            f"{name}: correlates with the map of {request.star} by {correlation:.2f}, expected {_LEAST_OVERLAP} or "
            "more: another hand, origin or molecule; mirror it or align it with the run's map"
        )
