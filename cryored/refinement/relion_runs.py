"""Refinements of simulated particles by RELION: the data set, the command line, and what a run leaves behind."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cryored.errors import CryoredError, InputError
from cryored.files.belonging import SAME_SIZE
from cryored.files.mrc import read_volume, write_volume
from cryored.files.output import write_text
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Volume
from cryored.refinement.mailbox import PRESENCE
from cryored.refinement.red_update import DENOISED
from cryored.simulation.map_of_model import MapOptions, simulate_map_file
from cryored.simulation.particles import ParticleOptions, simulate_particles_file
from cryored.simulation.structure import read_atoms

# RELION's own reconstruction as hook: the maps of a plain refinement, and the requests stay.
RELION_HOOK = "sh -c 'relion_external_reconstruct \"$1\" --skip_gridding' relion"

# RELION's options for searches about the start angles, which have to be near the truth, and over all angles.
LOCAL_SEARCH = (
    *("--healpix_order", "3", "--auto_local_healpix_order", "3", "--sigma_ang", "5"),
    *("--offset_range", "2", "--offset_step", "1"),
)
GLOBAL_SEARCH = (
    *("--healpix_order", "2", "--auto_local_healpix_order", "4"),
    *("--offset_range", "5", "--offset_step", "2"),
)

MASK = "solvent_mask.mrc"  # in the folder of the run that it was made from
_MASK_THRESHOLD = 0.2  # of the filtered map's peak; the solvent of a map at 15 A lies below

_MAPS = (".mrc", ".map")
_POLL = 0.2  # seconds between looks at a running refinement
_PATIENCE = 10.0  # seconds for mpirun to end its ranks before all are killed
_WATCHERS_PATIENCE = 60.0  # seconds for a watcher to end
_LEAST_MARGIN = 10.0  # angstrom by which the particle diameter exceeds the molecule's


class RefinementError(CryoredError, RuntimeError):
    """RELION is missing, failed, or was stopped."""


@dataclass(frozen=True)
class Data:
    """A simulated data set in a folder that serves as RELION's project.

    Parameters
    ----------
    folder : Path
        Absolute, or relative to a current folder that stays.
    box : int
        Edge of the images in pixels.
    angpix : float
        Pixel size in angstrom.
    diameter : float
        Of RELION's circular mask, in angstrom.
    """

    folder: Path
    box: int
    angpix: float
    diameter: float

    @property
    def truth(self) -> Path:
        """The map that the particles are projections of."""
        return self.folder / "truth.mrc"

    @property
    def stack(self) -> Path:
        """The particle images."""
        return self.folder / "particles.mrcs"


def make_data(
    structure: str,
    folder: Path,
    *,
    box: int = 64,
    angpix: float = 1.5,
    number: int = 400,
    snr: float = 0.05,
    perturb: float = 5.0,
    seed: int = 1,
) -> Data:
    """Simulate the truth and its particles, unless they are there already.

    Parameters
    ----------
    structure : str
        A PDB or mmCIF file, or an MRC file: a map that is the truth itself.
    folder : Path
        Made where it is missing.
    box, angpix : int, float
        Grid of the truth; angstrom.
    number : int
        Particles.
    snr : float
        Variance of the noise-free images over that of the noise.
    perturb : float
        Root mean square error of the start angles, in degrees.
    seed : int

    Raises
    ------
    InputError
        The structure cannot be read or does not fit the box, or the map has another grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = _given_map(structure, box, angpix) if Path(structure).suffix in _MAPS else None
    if given is None:
        reach = float(np.linalg.norm(read_atoms(structure).positions, axis=1).max())
    else:
        inside = np.argwhere(soft_mask(given).data > 0.5) - box // 2
        reach = angpix * float(np.linalg.norm(inside, axis=1).max())
    data = Data(folder, box, angpix, min(2 * reach + _LEAST_MARGIN, 0.95 * box * angpix))
    if not ((folder / "particles_truth.star").exists() and data.stack.exists()):
        if given is None:
            simulate_map_file(structure, str(data.truth), MapOptions(box, angpix, 3.0, overwrite=True))
        else:
            write_volume(str(data.truth), given, label=f"truth {Path(structure).name}")
        chosen = ParticleOptions(number, snr, perturb_angles=perturb, seed=seed, overwrite=True)
        simulate_particles_file(data.truth, data.stack.with_suffix(""), chosen)
        for path in (folder / "particles.star", folder / "particles_truth.star"):
            # The stack as seen from RELION's project folder, so that the folder can be moved.
            write_text(path, path.read_text().replace(f"@{data.stack}", f"@{data.stack.name}"))
    return data


def _given_map(path: str, box: int, angpix: float) -> Volume:
    volume = read_volume(path)
    if volume.shape != (box,) * 3 or abs(volume.voxel_size / angpix - 1) > SAME_SIZE:
        raise InputError(
            f"{path}: {volume.shape} voxels (z, y, x) of {volume.voxel_size:g} A, expected {box} cubed of {angpix:g} "
            "A; give its own box and pixel size"
        )
    return volume.with_voxel_size(angpix)


def make_mask(data: Data, name: str) -> Path:
    """Make a solvent mask as users do, from the map of a finished run; return its file in the run's folder.

    The run's final map, low-pass filtered to 15 A, above a threshold, without islands, extended and with a soft edge:
    what RELION's *Mask creation* does with its initial mask.
    """
    path = data.folder / name / MASK
    volume = read_volume(final_map(data, name, with_prior=False))
    mask = soft_mask(volume, threshold=_MASK_THRESHOLD, largest=True)
    write_volume(str(path), mask, label="solvent mask")
    return path


def solvent_mask(data: Data, path: Path) -> tuple[str, ...]:
    """Return RELION's options of a refinement within a mask, with the FSC in it corrected for the mask."""
    return "--solvent_mask", os.path.relpath(path, data.folder), "--solvent_correct_fsc"


def refine(
    data: Data,
    name: str,
    hook: str,
    *,
    search: Sequence[str] = LOCAL_SEARCH,
    timeout: float = 1800,
    companion: Callable[[Path], AbstractContextManager[object]] = nullcontext,
    on_iteration: Callable[[int], None] = lambda number: None,
    stop: threading.Event | None = None,
) -> float:
    """Run RELION's auto-refine with a hook into ``folder/name``; return the seconds it took.

    Parameters
    ----------
    data : Data
    name : str
        Folder of the run, made anew; its files begin with ``run``.
    hook : str
        Value of RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE.
    search : sequence of str
        Options of ``relion_refine`` on how to search, and any others.
    timeout : float
        Seconds.
    companion : callable
        Takes the folder of the run and returns what is entered before RELION begins and left when it has ended: a
        resident updater.
    on_iteration : callable
        Is told the number of each iteration that has ended.
    stop : threading.Event, optional
        Ends the refinement when it is set.

    Raises
    ------
    RefinementError
        RELION is not installed, failed, or took too long; its output lies in ``name/run.log``.
    """
    check_relion()
    target = data.folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    log = target / "run.log"
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE": hook,
        # A hook script takes the cryored of the Python that runs this.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    begin = time.monotonic()
    with companion(target), log.open("w") as output:
        run = subprocess.Popen(
            _command(data, name, search),
            cwd=data.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Control-C is for this process to pass on, so that no rank is left behind
        )
        try:
            shown = 0
            while run.poll() is None:
                if time.monotonic() - begin > timeout:
                    raise RefinementError(f"{log}: relion_refine_mpi still ran after {timeout:.0f} s and was ended")
                if stop is not None and stop.is_set():
                    raise RefinementError(f"{log}: relion_refine_mpi was stopped")
                time.sleep(_POLL)
                done = finished_iterations(data, name)
                if done > shown:
                    shown = done
                    on_iteration(done)
        finally:
            _end(run)
    if run.returncode:
        raise RefinementError(
            f"{log}: relion_refine_mpi failed with status {run.returncode}: {_complaint(log)}; the log has more"
        )
    return time.monotonic() - begin


@dataclass(frozen=True)
class Reconstruction:
    """What reconstructs in the iterations of a refinement.

    Parameters
    ----------
    options : sequence of str, optional
        Of ``cryored red-update``; without these RELION's own program reconstructs.
    program : str, optional
        A shell command instead.
    mask : Path, optional
        Solvent mask that RELION refines within.
    hook : Path
        ``cryored-external-reconstruct``, for `options`.
    watched : bool
        A watcher with the options answers.
    report : bool
        It keeps a report.html in the run's folder.
    """

    options: Sequence[str] | None = None
    program: str | None = None
    mask: Path | None = None
    hook: Path = Path("cryored-external-reconstruct")
    watched: bool = False
    report: bool = False

    def command(self) -> str:
        """Return the value of RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE."""
        if self.program is not None:
            return self.program
        if self.options is None:
            return RELION_HOOK
        return shlex.join([str(self.hook), *([] if self.watched else self.options)])

    def companion(self, folder: Path) -> AbstractContextManager[None]:
        """Return what lives beside RELION: the watcher of the run's folder, or nothing."""
        if not self.watched or self.options is None:
            return nullcontext()
        report = ["--report", str(folder / "report.html")] if self.report else []
        return resident(folder, options=[*self.options, *report])


def refine_by(
    data: Data,
    name: str,
    how: Reconstruction,
    *,
    search: Sequence[str] = LOCAL_SEARCH,
    timeout: float = 1800,
    on_iteration: Callable[[int], None] = lambda number: None,
    stop: threading.Event | None = None,
) -> float:
    """Refine with a reconstruction; see `refine`."""
    words = [*search, *(solvent_mask(data, how.mask) if how.mask is not None else ())]
    return refine(
        data,
        name,
        how.command(),
        search=words,
        timeout=timeout,
        companion=how.companion,
        on_iteration=on_iteration,
        stop=stop,
    )


@contextmanager
def resident(folder: Path, *, options: Sequence[str]) -> Iterator[None]:
    """Have ``cryored watch`` serve a folder until the block ends: a companion for `refine`.

    Parameters
    ----------
    folder : Path
        Of the run.
    options : sequence of str
        Of ``cryored watch``.

    Raises
    ------
    RefinementError
        It ended before it was ready.
    """
    log = folder / "watch.log"
    with log.open("w") as output:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "cryored", "watch", str(folder), *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Control-C ends RELION first, and then this
        )
        try:
            while not (folder / PRESENCE).exists():
                if watcher.poll() is not None:
                    raise RefinementError(
                        f"{log}: cryored watch ended with status {watcher.returncode}; the log says why"
                    )
                time.sleep(_POLL)
            yield
        finally:
            watcher.terminate()
            try:
                watcher.wait(_WATCHERS_PATIENCE)
            except subprocess.TimeoutExpired:
                watcher.kill()
                watcher.wait()


def check_relion() -> None:
    """Raise `RefinementError` where RELION or MPI is not installed."""
    for program in ("mpirun", "relion_refine_mpi", "relion_external_reconstruct"):
        if shutil.which(program) is None:
            raise RefinementError(
                f"{program}: not found on the PATH, expected RELION 3.1 or later with MPI; install it "
                "(on Debian: apt-get install relion) or load its module"
            )


def finished_iterations(data: Data, name: str) -> int:
    """Return how many iterations with two halves a run has ended."""
    # Iteration 0 is the start.
    return max(0, len(list((data.folder / name).glob("run_it*_half1_model.star"))) - 1)


def iterations(data: Data, name: str) -> int:
    """Return how many iterations a finished run took, the joined last one included."""
    return finished_iterations(data, name) + 1


def half_maps(data: Data, name: str) -> list[npt.NDArray[np.float32]]:
    """Return RELION's two unfiltered half-maps of a finished run, made from B and K alone."""
    return [read_volume(data.folder / name / f"run_half{half}_class001_unfil.mrc").data for half in (1, 2)]


def final_map(data: Data, name: str, *, with_prior: bool = True) -> Path:
    """Return the file of a finished run's final map.

    Parameters
    ----------
    with_prior : bool
        The one with the prior, where RELION got the one without (``red-update --final map``).
    """
    beside = sorted((data.folder / name).glob(f"run_it*_class001{DENOISED}")) if with_prior else []
    return beside[-1] if beside else data.folder / name / "run_class001.mrc"


def _command(data: Data, name: str, search: Sequence[str]) -> list[str]:
    """Return RELION's command line, with one thread a rank."""
    refine = ["relion_refine_mpi", "--auto_refine", "--split_random_halves"]
    refine += ["--i", "particles.star", "--ref", "particles_reference.mrc", "--o", f"{name}/run"]
    refine += ["--ctf", "--ctf_corrected_ref", "--ini_high", "30", "--pad", "1"]
    refine += ["--particle_diameter", f"{data.diameter:.0f}", "--zero_mask", "--flatten_solvent", "--norm", "--scale"]
    refine += ["--oversampling", "1", "--sym", "C1", "--low_resol_join_halves", "40"]
    refine += ["--j", "1", "--pool", "30", "--dont_combine_weights_via_disc", "--random_seed", "7"]
    refine += ["--external_reconstruct", *search]
    # The first rank waits busily for the two that work; with less priority it leaves two cores to them.
    return ["mpirun", "--oversubscribe", "-n", "1", "nice", *refine, ":", "-n", "2", *refine]


def _end(run: subprocess.Popen[bytes]) -> None:
    """End mpirun, which ends its ranks, if it still runs."""
    if run.poll() is not None:
        return
    run.terminate()
    try:
        run.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def _complaint(log: Path) -> str:
    """Return the line of a log that says why RELION failed."""
    lines = [" ".join(line.split()) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # RELION's own words, in the line of ERROR or the next; what mpirun adds is the same for every failure.
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(("ERROR:", "cryored: error:")):
            return (following if line == "ERROR:" else line)[:300]
    return lines[-1][:300] if lines else "no output"
