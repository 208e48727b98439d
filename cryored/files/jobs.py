"""A RELION job's folder as an input: what lies in it, whichever kind of job and version (3.1 to 5) made it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryored.errors import InputError
from cryored.files.star import Star, read_star

_ITERATION = re.compile(r"_it(\d+)_")
_RUN = re.compile(r"(?P<run>.+?)(?P<continued>_ct\d+)?(_it\d+)?_optimiser\.star")
_SUCCESS, _ENDS = "RELION_JOB_EXIT_SUCCESS", ("RELION_JOB_EXIT_FAILURE", "RELION_JOB_EXIT_ABORTED")


@dataclass(frozen=True)
class Job:
    """What a job's folder holds; None stands for what it has not.

    Parameters
    ----------
    folder : Path
    halves : (Path, Path) or None
        The unfiltered half-maps: of a converged auto-refine, and those that a PostProcess job was made from.
    names_halves : bool
        Its STAR file names half-maps, whether they were found or not.
    map : Path or None
        The final map, or that of the last iteration.
    mask_file : Path or None
        The solvent mask that the job used or made, whether it is still there or not.
    pixel_size : float or None
        In angstrom.
    fsc : Path or None
        STAR file with the latest half-map FSC.
    iteration : int or None
        The last one that is complete; None in other jobs than refinements.
    end : Path or None
        The file that says that the job has ended.
    """

    folder: Path
    halves: tuple[Path, Path] | None = None
    names_halves: bool = False
    map: Path | None = None
    mask_file: Path | None = None
    pixel_size: float | None = None
    fsc: Path | None = None
    iteration: int | None = None
    end: Path | None = None

    @property
    def mask(self) -> Path | None:
        """The solvent mask that the job used or made; raise `InputError` where it is gone."""
        if self.mask_file is not None and not self.mask_file.is_file():
            raise InputError(
                f"{self.folder}: its mask {self.mask_file} is missing, expected the one that the job used; give it "
                "with --mask, or the half-maps themselves"
            )
        return self.mask_file

    def need_halves(self) -> tuple[Path, Path]:
        """Return the unfiltered half-maps; raise `InputError` where there are none yet."""
        if self.halves is None:
            raise InputError(f"{self.folder}: no unfiltered half-maps (run_half1_class001_unfil.mrc), {self._reason()}")
        return self.halves

    def need_fsc(self) -> Path:
        """Return the file of the half-map FSC; raise `InputError` where there is none."""
        if self.fsc is None:
            raise InputError(f"{self.folder}: no half-map FSC (a _model.star or postprocess.star), {self._reason()}")
        return self.fsc

    def _reason(self) -> str:
        if self.names_halves:
            return "which it names, but not in a folder above; give the half-maps themselves, and --mask"
        if self.iteration is None:
            return "expected the folder of an auto-refine or PostProcess job, such as Refine3D/job012"
        if self.fsc is not None and self.end is None:
            return f"RELION writes them when the run has converged, and it is at iteration {self.iteration}"
        return "as in Class3D, which has no halves"


def is_job(path: str) -> bool:
    """Tell whether a path stands for a job: a folder."""
    return path != "-" and Path(path).is_dir()


def read_job(path: str | Path) -> Job:
    """Find what a job's folder holds.

    Parameters
    ----------
    path : path
        Such as ``Refine3D/job012``, seen from anywhere.

    Raises
    ------
    InputError
        It is none of RELION's folders.
    """
    folder = Path(path)
    for kind in (_postprocess, _refinement, _mask):
        found = kind(folder)
        if found is not None:
            return found
    raise InputError(
        f"{folder}: no job of RELION's, expected the folder of a Refine3D, Class3D or PostProcess job: one "
        "with an ..._optimiser.star or postprocess.star"
    )


def job_end(folder: Path) -> Path | None:
    """Return the file that says that a job has ended, None before; the pipeline's counts in any folder.

    Raises
    ------
    InputError
        It is none of RELION's folders.
    """
    return _exit(folder) or read_job(folder).end


def last_request(path: str | Path) -> Path:
    """Return the request of a run's latest iteration, of the first half or class.

    Raises
    ------
    InputError
        The folder holds no request.
    """
    stars = sorted(Path(path).glob("*_external_reconstruct.star"), key=lambda star: (-_iteration(star), star.name))
    if not stars:
        raise InputError(
            f"{path}: no ..._external_reconstruct.star, expected the folder of a run with --external_reconstruct or "
            "--blush"
        )
    return stars[0]


def _postprocess(folder: Path) -> Job | None:
    path = folder / "postprocess.star"
    if not path.is_file():
        return None
    star = read_star(path)
    names = [star.find_text("general", f"rlnUnfilteredMapHalf{half}") for half in (1, 2)]
    mask = star.find_text("general", "rlnMaskName")
    # A job that was handed on with its maps beside it: what its project has under their names is another one's.
    halves = [_beside(folder, name) for name in names]
    handed_on = None not in halves and halves[0] != halves[1]
    if not handed_on:
        halves = [_seen_from(folder, name) for name in names]
    return Job(
        folder,
        halves=(halves[0], halves[1]) if halves[0] and halves[1] else None,
        names_halves=None not in names,
        map=_first(folder / "postprocess.mrc"),
        mask_file=(_beside(folder, mask) if handed_on else None) or _mask_file(folder, mask),
        pixel_size=_number(_option(folder, "angpix")),
        fsc=path,
        end=path,
    )


def _refinement(folder: Path) -> Job | None:
    latest = max(folder.glob("*_optimiser.star"), key=_order, default=None)
    if latest is None and not (folder / "run_half1_class001_unfil.mrc").exists():
        return None
    iteration = None if latest is None else _iteration(latest)
    stem = "" if latest is None else str(latest).removesuffix("_optimiser.star")
    runs = _runs(latest)
    model = _first(*(folder / f"{run}_model.star" for run in runs), f"{stem}_half1_model.star", f"{stem}_model.star")
    halves = [_first(*(folder / f"{run}_half{half}_class001_unfil.mrc" for run in runs)) for half in (1, 2)]
    star = None if latest is None else read_star(latest)
    mask = None if star is None else star.find_text("optimiser_general", "rlnSolventMaskName")
    split = star is None or star.find_text("optimiser_general", "rlnDoSplitRandomHalves") != "0"
    size = None if model is None else read_star(model).find_text("model_general", "rlnPixelSize")
    return Job(
        folder,
        halves=(halves[0], halves[1]) if halves[0] and halves[1] else None,
        map=_first(
            *(folder / f"{run}_class001.mrc" for run in runs), f"{stem}_class001.mrc", f"{stem}_half1_class001.mrc"
        ),
        mask_file=_mask_file(folder, mask),
        pixel_size=_number(size),
        fsc=model if split else None,
        iteration=iteration,
        end=_end(folder, runs, star),
    )


def _mask(folder: Path) -> Job | None:
    path = folder / "mask.mrc"
    return Job(folder, mask_file=path, end=path) if path.is_file() else None


def _order(optimiser: Path) -> tuple[bool, bool, int]:
    """Return what sorts a folder's optimisers: the latest iteration last, of a run that the pipeline named."""
    return optimiser.name.startswith("run_"), _ITERATION.search(optimiser.name) is not None, _iteration(optimiser)


def _runs(optimiser: Path | None) -> list[str]:
    """Return the names that a run's files may begin with, as RELION's --o had it: a continuation's before the first."""
    match = None if optimiser is None else _RUN.fullmatch(optimiser.name)
    if match is None:
        return ["run"]
    return [match["run"] + match["continued"], match["run"]] if match["continued"] else [match["run"]]


def _exit(folder: Path) -> Path | None:
    """Return the file by which RELION's pipeline says that a job has ended."""
    return next((folder / name for name in (_SUCCESS, *_ENDS) if (folder / name).exists()), None)


def _end(folder: Path, runs: list[str], star: Star | None) -> Path | None:
    """Return the file by which a refinement has ended; the pipeline's, or what RELION writes last."""
    found = _exit(folder)
    if found is not None:
        return found
    for run in runs:
        final = folder / f"{run}_data.star"  # auto-refine has one without an iteration, of the joined halves
        if final.is_file() and (folder / f"{run}_class001.mrc").is_file():
            return final
    if star is None:
        return None
    done, asked = (
        _number(star.find_text("optimiser_general", f"rln{name}"))
        for name in ("CurrentIteration", "NumberOfIterations")
    )
    split = star.find_text("optimiser_general", "rlnDoSplitRandomHalves") != "0"
    return Path(star.name) if not split and done is not None and done == asked else None


def _option(folder: Path, name: str) -> str | None:
    """Return a choice of the GUI's, from the job.star of RELION 3.1 and later."""
    path = folder / "job.star"
    if not path.is_file():
        return None
    star = read_star(path)
    if not star.has_column("joboptions_values", "rlnJobOptionVariable"):
        return None
    names = star.texts("joboptions_values", "rlnJobOptionVariable")
    values = star.texts("joboptions_values", "rlnJobOptionValue")
    return dict(zip(names, values, strict=True)).get(name)


def _seen_from(folder: Path, name: str | None) -> Path | None:
    """Return a file that RELION names from its project folder, which is one of those above."""
    if name is None or name in ("", "None"):
        return None
    # The folder may be a link to elsewhere. The current folder is none of them by itself: it may be another project.
    for project in (*folder.resolve().parents, *Path(os.path.abspath(folder)).parents):
        if (project / name).is_file():
            return _from_here(project, name)
    return None


def _from_here(project: Path, name: str) -> Path:
    return Path(name) if project == Path.cwd() else project / name


def _beside(folder: Path, name: str | None) -> Path | None:
    """Return what lies in a job's own folder under the base name of a file."""
    return _first(folder / Path(name or "").name)


def _mask_file(folder: Path, name: str | None) -> Path | None:
    """Return the mask that a job names; one that is not found where it should be, two folders up as RELION has it."""
    if name is None or name in ("", "None"):
        return None
    above = Path(os.path.abspath(folder)).parents
    return _seen_from(folder, name) or _from_here(above[min(1, len(above) - 1)] if above else folder, name)


def _first(*paths: Path | str) -> Path | None:
    """Return the first that is there."""
    return next((Path(path) for path in paths if Path(path).is_file()), None)


def _iteration(path: Path) -> int:
    match = _ITERATION.search(path.name)
    return int(match.group(1)) if match else 0


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if value > 0 else None
