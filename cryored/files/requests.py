"""RELION's external-reconstruct request: what it asks for, and where things lie."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.output import is_stream
from cryored.files.star import Star, read_star
from cryored.maps.fourier import padded_size
from cryored.maps.fsc import nominal_resolution

_GENERAL = "external_reconstruct_general"
_TAU2 = "external_reconstruct_tau2"
ENDING = "_external_reconstruct"  # of a request's name, before ".star"
# A name without it: run_it003_half1_class001, run_ct5_it006_class002 of a run that was continued, run_it002_body001 ...
NAME = re.compile(
    r"(?P<run>.*?)(?P<continued>_ct\d+)?_it(?P<iteration>\d+)(?:_half(?P<half>[12]))?(?:_(?:class|(?P<body>body))\d+)+$"
)
_ITERATION = re.compile(r"_it(\d+)_")

CURRENT = Path()  # the current folder, without its name

Shells = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Request:
    """One call of RELION's hook. Paths are as RELION wrote them: relative to its project folder.

    Parameters
    ----------
    star : Path
        The request itself.
    data_real, data_imag, weight : Path
        B (real and imaginary part) and K of the padded half-transform.
    result : Path
        The map that RELION reads afterwards.
    result_star : Path or None
        A table that RELION would read too; cryored never writes it.
    tau2_fudge, pad : float
    ori : int
        Box of the map in voxels.
    r_max : int
        Half the current image size: the shell from which on nothing is known.
    tau2, fsc : (ori // 2 + 1,) float64
        As in the request, tau2 without the fudge factor and padding that eq. 11 needs.
    pixel_size : float
        In angstrom; 0 where nothing tells it, and nobody needs it.
    estimated : bool
        `fsc` is not RELION's, which has none without half-maps, but derived from tau2 and K.
    mask : Path or None
        The solvent mask that `fsc` is of and was corrected for; None: `fsc` is of the whole box.
    """

    star: Path
    data_real: Path
    data_imag: Path
    weight: Path
    result: Path
    result_star: Path | None
    tau2_fudge: float
    pad: float
    ori: int
    r_max: int
    tau2: Shells
    fsc: Shells
    pixel_size: float
    estimated: bool = False
    mask: Path | None = None

    @property
    def array_shape(self) -> tuple[int, int, int]:
        """Shape of B and K."""
        n = padded_size(self.pad, self.ori)
        return n, n, n // 2 + 1

    @property
    def root(self) -> str:
        """RELION's name for the map, such as ``run/run_it003_half1_class001``."""
        return str(self.star.with_suffix("")).removesuffix(ENDING)

    @property
    def log(self) -> Path:
        """Where cryored logs what it did."""
        return Path(f"{self.root}_cryored.log")

    @property
    def frequency(self) -> Shells:
        """Spatial frequency of each shell in 1/angstrom."""
        return np.arange(self.ori // 2 + 1) / (self.ori * self.pixel_size)

    def nominal_resolution(self) -> float:
        """Return where the half-maps' FSC falls below 0.143, in angstrom.

        Raises
        ------
        InputError
            The FSC is zero throughout, as in Class3D, which has no half-maps, and tau2 is too, from which it is
            estimated there.
        """
        if not self.fsc.any():
            raise InputError(
                f"{self.star}: FSC and tau2 are zero in all shells, so lambda cannot be derived from them; give a "
                "number with --lambda"
            )
        return nominal_resolution(self.frequency, self.fsc)


def parts_of(name: str) -> tuple[int | None, int | None]:
    """Return iteration and half that a name such as ``run_it003_half1_class001`` tells of, None where it does not."""
    match = NAME.match(name)
    if match is None:
        return None, None
    return int(match["iteration"]), int(match["half"]) if match["half"] else None


def is_joined(request: Request) -> bool:
    """Tell whether a request is of the joined halves, which RELION's auto-refine ends with."""
    iteration, half = parts_of(request.root)
    return iteration is not None and half is None and not request.estimated and bool(request.fsc.any())


def is_request(path: str) -> bool:
    """Tell whether a file is a request, without judging it."""
    try:
        return _GENERAL in read_star(path).blocks()
    except InputError:
        return False


def read_request_file(
    path: str, *, folder: Path = CURRENT, angpix: float | None = None, needs_pixel_size: bool = True
) -> Request:
    """Read a request from a file, or for ``-`` from a pipe: it is then taken as lying where its result goes.

    Parameters
    ----------
    path : str
        As RELION names it.
    folder : Path
        RELION's project folder, which relative paths are seen from.
    angpix, needs_pixel_size
        See `read_request`.
    """
    if is_stream(path):
        star = read_star(path)
        result = Path(star.text(_GENERAL, "rlnExtReconsResult"))
        star = dataclasses.replace(star, name=str(result.with_suffix(".star")))
    else:
        star = read_star(folder / path)
    return read_request(star, folder=folder, angpix=angpix, needs_pixel_size=needs_pixel_size)


def project_folder(star: Path) -> Path:
    """Return the folder that a request's paths are relative to: its results lie beside the request.

    Raises
    ------
    InputError
        There is none.
    """
    result = Path(read_star(star).text(_GENERAL, "rlnExtReconsResult"))
    for folder in star.resolve().parents:
        if (folder / result).resolve().parent == star.resolve().parent:
            return folder
    raise InputError(f"{star}: its result {result} lies in another folder, expected beside it")


def read_request(
    star: Star, *, folder: Path = CURRENT, angpix: float | None = None, needs_pixel_size: bool = True
) -> Request:
    """Interpret RELION's request (3.1, 4 or 5).

    Parameters
    ----------
    star : Star
    folder : Path
        RELION's project folder, which relative paths are seen from.
    angpix : float, optional
        Pixel size in angstrom; else the request's (RELION 4 and 5), else that of the run's latest
        ``_model.star`` beside it.
    needs_pixel_size : bool
        Without it, one that cannot be found is 0: the MAP map, RELION's own answer, does not depend on it.

    Raises
    ------
    InputError
        An item is missing or out of range, or the pixel size cannot be found.
    """
    name = star.name

    def path(label: str) -> Path:
        return folder / star.text(_GENERAL, label)

    dimension = _whole_number(star, "rlnReferenceDimensionality")
    if dimension != 3:
        raise InputError(f"{name}: a reconstruction in {dimension}D (Class2D?), expected 3D; the prior is for maps")
    ori = _whole_number(star, "rlnOriginalImageSize")
    if ori % 2 or ori < 4:
        raise InputError(
            f"{name}: box {ori}, expected an even number: RELION itself refines in even boxes only, and an odd one has "
            "its centre elsewhere; re-extract the particles in an even box"
        )
    pad = star.number(_GENERAL, "rlnPaddingFactor")
    if not 1 <= pad <= 8:
        raise InputError(f"{name}: padding factor {pad:g}, expected 1 to 8 (RELION uses 1 or 2)")
    fudge = star.number(_GENERAL, "rlnTau2FudgeFactor")
    if not 0 < fudge < math.inf:
        raise InputError(f"{name}: _rlnTau2FudgeFactor {fudge:g}, expected a positive number")
    current = _whole_number(star, "rlnCurrentImageSize")
    if not 2 <= current <= ori:
        raise InputError(f"{name}: current image size {current}, expected 2 to the box of {ori}")
    tau2, fsc = _tables(star, ori)
    result_star = star.find_text(_GENERAL, "rlnExtReconsResultStarfile")
    return Request(
        star=Path(name),
        data_real=path("rlnExtReconsDataReal"),
        data_imag=path("rlnExtReconsDataImag"),
        weight=path("rlnExtReconsWeight"),
        result=path("rlnExtReconsResult"),
        result_star=None if result_star is None else folder / result_star,
        tau2_fudge=fudge,
        pad=pad,
        ori=ori,
        r_max=current // 2,
        tau2=tau2,
        fsc=fsc,
        pixel_size=_pixel_size(star, ori, angpix, needs_pixel_size),
        mask=_solvent_mask(Path(name), folder),
    )


def _whole_number(star: Star, label: str) -> int:
    number = star.number(_GENERAL, label)
    if not number.is_integer():  # nor are nan and infinity
        raise InputError(f"{star.name}: _{label} is '{star.text(_GENERAL, label)}', expected a whole number")
    return int(number)


def _tables(star: Star, ori: int) -> tuple[Shells, Shells]:
    name = star.name
    if not star.has_column(_TAU2, "rlnReferenceTau2"):
        raise InputError(
            f"{name}: no table of tau2, so a MAP reconstruction is impossible and lambda has no FSC "
            "(relion_reconstruct writes such requests); the hook is for relion_refine --external_reconstruct"
        )
    columns = [star.numbers(_TAU2, label) for label in ("rlnSpectralIndex", "rlnReferenceTau2", "rlnGoldStandardFsc")]
    order = np.argsort(columns[0], kind="stable")  # the rows of a STAR table have no order
    index, tau2, fsc = (column[order] for column in columns)
    if len(index) != ori // 2 + 1 or (index != np.arange(len(index))).any():
        wanted = np.arange(ori // 2 + 1)
        missing = ", ".join(str(shell) for shell in np.setdiff1d(wanted, index)[:3])
        raise InputError(
            f"{name}: {len(index)} shells of tau2 and FSC, expected each of 0 to {ori // 2} once for a box of {ori}"
            + (f"; shell {missing} is missing" if missing else "")
        )
    for label, column in (("rlnReferenceTau2", tau2), ("rlnGoldStandardFsc", fsc)):
        bad = np.flatnonzero(~np.isfinite(column))
        if bad.size:
            raise InputError(f"{name}: _{label} is {column[bad[0]]} in shell {bad[0]}, expected a number")
    if (tau2 < 0).any():
        shell = int(np.argmax(tau2 < 0))
        raise InputError(f"{name}: _rlnReferenceTau2 is {tau2[shell]:g} in shell {shell}, expected 0 or more")
    return tau2, fsc


def _pixel_size(star: Star, ori: int, angpix: float | None, needed: bool) -> float:
    if angpix:
        return angpix
    text = star.find_text(_GENERAL, "rlnPixelSize")
    if text is not None:
        size = star.number(_GENERAL, "rlnPixelSize")
        if 0 < size < math.inf:
            return size
        raise InputError(f"{star.name}: _rlnPixelSize is {text}, expected angstroms; give it with --angpix")
    for path in _beside(Path(star.name), "model"):
        try:
            model = read_star(path)
            size = model.number("model_general", "rlnPixelSize")
            same_box = model.number("model_general", "rlnOriginalImageSize") == ori
        except InputError:
            continue
        if 0 < size < math.inf and same_box:
            return size
    if not needed:
        return 0.0
    raise InputError(
        f"{star.name}: holds no pixel size (RELION 3.1 writes none), and there is no _model.star of this run with a "
        f"box of {ori} beside it; give it with --angpix"
    )


def _solvent_mask(request: Path, folder: Path) -> Path | None:
    """Return the mask that a request's FSC was corrected for, as the run's optimiser file tells."""
    for path in _beside(request, "optimiser"):
        try:
            optimiser = read_star(path)
            corrected, mask = (
                optimiser.text("optimiser_general", label)
                for label in ("rlnDoSolventFscCorrection", "rlnSolventMaskName")
            )
        except InputError:  # RELION is writing it
            continue
        return folder / mask if corrected == "1" and mask not in ("", "None") else None
    return None


def _beside(request: Path, kind: str) -> Iterator[Path]:
    """Yield a kind of RELION's STAR files beside a request: its own run's first, the latest iteration first."""
    match = NAME.match(str(request.with_suffix("").name).removesuffix(ENDING))
    run = match["run"] + (match["continued"] or "") if match else None

    def order(path: Path) -> tuple[bool, int]:
        found = _ITERATION.search(path.name)
        return (run is not None and path.name.startswith(f"{run}_it"), int(found.group(1)) if found else -1)

    yield from sorted(request.parent.glob(f"*_{kind}.star"), key=order, reverse=True)
