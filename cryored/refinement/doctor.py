"""Is everything in place for a run of a week? What ``cryored doctor`` looks at, one function a question."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cryored.errors import CryoredError, InputError, OutputError, in_words
from cryored.files.jobs import read_job
from cryored.files.mrc import read_volume, write_volume
from cryored.files.share import RELION5, share_folders
from cryored.files.star import read_star, write_star
from cryored.maps.fourier import squared_radius
from cryored.maps.volume import Volume
from cryored.memory import free_memory
from cryored.prior import device
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, check_weights, find_model
from cryored.refinement.bounds import array_bytes, bounds
from cryored.refinement.mailbox import PRESENCE, Presence
from cryored.refinement.red_update import ROOT

VARIABLE = "RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE"
BLUSH = "relion_python_blush"
_HOOK = "cryored-external-reconstruct"
_OLDEST = (3, 1)
_ROOM = 1.5  # times the arrays of one request that should be free on the disk
_LOCAL = {"tmpfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "ramfs"}  # of one machine
_BOX = 16  # of the dry request
_PREFIX = "CRYORED_RED_UPDATE_"
# What the hook takes for options of its own from the environment (bin/cryored-external-reconstruct).
_COUNTING = (
    "ANGPIX CHECK CLEAN DENOISED EXTRAPOLATE FINAL LAMBDA MODEL OUTPUT PRIOR_LIMIT SCHEDULE TRUST UNREGULARISED".split()
)
# What a watcher leaves without options.
_USUAL = f"--model {DEFAULT_MODEL} --lambda auto --trust 1.0 --final map --no-extrapolate"

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Parameters
    ----------
    subject : str
    state : {"ok", "warning", "error"}
    text : str
        What was found.
    remedy : str
        What to do; empty where all is well.
    """

    subject: str
    state: State
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Setup:
    """What is to be run.

    Parameters
    ----------
    folder : Path or None
        Of the run; the current one where none is named.
    box : int or None
        Of the images; None where nobody says, and the folder does not tell.
    pad : float
    model : str
    gpu : bool or None
        See `cryored.prior.device.set_up`.
    timeout : float
        Seconds for the dry request.
    """

    folder: Path | None = None
    box: int | None = None
    pad: float = 2.0
    model: str = DEFAULT_MODEL
    gpu: bool | None = None
    timeout: float = 300.0


def examine(setup: Setup) -> Iterator[Finding]:
    """Ask all questions, one after the other."""
    for question in QUESTIONS:
        try:
            yield from question(setup)
        except Exception as error:  # what is broken may fail in any way; the other questions are still asked
            yield Finding(question.__name__, "error", in_words(error))


def model(setup: Setup) -> Iterator[Finding]:
    """Tell whether the model is there and whole."""
    try:
        found = find_model(setup.model)
        check_weights(found)
    except CryoredError as error:
        yield Finding("model", "error", str(error), "see `cryored models`")
        return
    weights = "" if found.card.weights else ", no calibrated weights: the update is eq. 17"
    yield Finding("model", "ok", f"{found.card.name} ({found.card.sha256[:8]}) in {found.folder}{weights}")


def compute(setup: Setup) -> Iterator[Finding]:
    """Tell whether the network's engine computes what it should, on the device that is wanted."""
    try:
        name = device.set_up(setup.gpu)
    except (CryoredError, ImportError) as error:
        yield Finding("device", "error", in_words(error), "leave --gpu out, or mend the engine's installation")
        return
    import keras

    rng = np.random.default_rng(0)
    data = rng.standard_normal((1, 24, 24, 24, 1)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 3, 1, 1)).astype(np.float32)

    def convolve() -> np.ndarray:
        result = keras.ops.conv(keras.ops.convert_to_tensor(data), keras.ops.convert_to_tensor(kernel), padding="same")
        return np.asarray(keras.ops.convert_to_numpy(result))

    try:
        first = convolve()
    except Exception as error:  # each engine has its own errors
        yield Finding("device", "error", f"{name}: a convolution failed: {in_words(error)}", "reinstall the engine")
        return
    begin = time.monotonic()
    convolve()
    seconds = time.monotonic() - begin
    padded = np.pad(data[0, ..., 0].astype(np.float64), 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3))
    expected = np.einsum("zyxijk,ijk->zyx", windows, kernel[..., 0, 0].astype(np.float64))
    off = float(np.abs(first[0, ..., 0] - expected).max() / np.abs(expected).max())
    if off > 1e-2:
        yield Finding(
            "device", "error", f"{name}: a convolution is off by {off:.1e}", "the engine is broken: reinstall it"
        )
        return
    yield Finding(
        "device", "ok", f"{name}: a convolution of 24 voxels cubed in {1000 * seconds:.0f} ms, off by {off:.0e}"
    )


def memory(setup: Setup) -> Iterator[Finding]:
    """Tell whether there is memory for the box."""
    known_box, pixel_size = _run_of(setup.folder)
    box = setup.box or known_box
    if box is None:
        yield Finding("memory", "warning", "the box is not known, so the memory that it takes is not", "give --box")
        return
    model = find_model(setup.model)
    used = pixel_size or model.card.pixel_size
    found = bounds(box, setup.pad, Denoiser(model), pixel_size=used, r_max=box // 2, requests=2)
    needed, free = found.memory + found.arrays, free_memory()
    text = f"about {needed / 2**30:.1f} GiB for both halves of box {box} at padding {setup.pad:g}"
    text += "" if free is None else f", {free / 2**30:.1f} GiB are free"
    text += f"; at {used:g} A" + ("" if pixel_size else ", the model's: the run's pixel size is not known")
    if free is None:
        yield Finding("memory", "ok", text)
    elif found.least > free:
        yield Finding("memory", "error", text, "ask for more memory, or use padding 1")
    elif found.memory > free:
        yield Finding("memory", "warning", text, "the halves will be answered one by one, and slower; ask for more")
    elif needed > free:
        remedy = "RELION's arrays will be read from the disk more than once, which is slower; ask for more"
        yield Finding("memory", "warning", text, remedy)
    else:
        yield Finding("memory", "ok", text)


def relion(setup: Setup) -> Iterator[Finding]:
    """Tell whether RELION is there, and one that calls."""
    path = shutil.which("relion_refine_mpi") or shutil.which("relion_refine")
    if path is None:
        text = "no relion_refine on the PATH"
        yield Finding("RELION", "warning", text, "load RELION's module, unless it runs elsewhere")
        return
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        yield Finding("RELION", "error", f"{path} --version: no answer in 60 s", "try it by hand")
        return
    match = re.search(r"version:?\s*(\d+)\.(\d+)", answer.stdout + answer.stderr)
    if match is None:
        text = f"{path} does not tell its version: {(answer.stdout + answer.stderr).strip()[:80]}"
        yield Finding("RELION", "error", text, "another program of that name comes first on the PATH?")
        return
    version = int(match.group(1)), int(match.group(2))
    text = f"{path}, version {version[0]}.{version[1]}"
    if version < _OLDEST:
        yield Finding("RELION", "error", text, "--external_reconstruct needs RELION 3.1 or later")
    else:
        yield Finding("RELION", "ok", text)


def hook(setup: Setup) -> Iterator[Finding]:
    """Tell whether RELION's call reaches cryored: made as RELION makes it, on a request made on the spot."""
    value, blush = os.environ.get(VARIABLE), _blush()
    if value is None and blush != "ours":
        remedy = (
            f"export {VARIABLE}={_our_hook()}, or for RELION 5's --blush: "
            + 'blush=$(cryored relion-path) && export PATH="$blush:$PATH"'
        )
        yield Finding("hook", "error", f"{VARIABLE} is not set, so RELION reconstructs by itself", remedy)
    elif value is not None:
        yield _call(setup, "hook", value, "", lambda out, status: status == 0)
    if blush == "ours":
        yield _call(setup, "Blush call", BLUSH, " --gpu -1 ", lambda out, status: out.strip() == "success")
    elif blush == "RELION's":
        text = f"{shutil.which(BLUSH)} is RELION's own: --blush runs Blush, not cryored"
        yield Finding("Blush call", "ok", text)


def hook_model() -> str | None:
    """Return the model that the hook is told to take, None where it takes the default."""
    try:
        words = shlex.split(os.environ.get("RELION_BLUSH_ARGS" if VARIABLE not in os.environ else VARIABLE, ""))
    except ValueError:
        words = []
    for number, word in enumerate(words):
        if word == "--model":
            return next(iter(words[number + 1 :]), None)
        if word.startswith("--model="):
            return word.partition("=")[2]
    return os.environ.get(f"{_PREFIX}MODEL") or None


def _blush() -> Literal["ours", "RELION's", "none"]:
    """Tell whose relion_python_blush comes first on the PATH."""
    path = shutil.which(BLUSH)
    if path is None:
        return "none"
    ours = [folder.resolve() for folder in share_folders(RELION5)]
    return "ours" if Path(path).resolve().parent in ours else "RELION's"


def _our_hook() -> str:
    return shutil.which(_HOOK) or f"/path/to/{_HOOK}"


def _call(setup: Setup, subject: str, value: str, options: str, good: Callable[[str, int], bool]) -> Finding:
    """Have a request of ours answered through a shell, as RELION does, with options after it."""
    command = f"{value} STAR{options}"  # as it is told
    try:
        program = shlex.split(value)[0]
    except (ValueError, IndexError):
        return Finding(subject, "error", f"{VARIABLE} is {value!r}, no command", f"export {VARIABLE}={_our_hook()}")
    kept = value if "--unregularised" in value else os.environ.get(f"{_PREFIX}UNREGULARISED") or ROOT
    if ROOT not in kept and "--overwrite" not in value:
        text = f"{value}: --unregularised without {ROOT} in the name: one file for all requests"
        return Finding(subject, "error", text, f"--unregularised '{ROOT}_unregularised.mrc'")
    path = shutil.which(program)
    if path is None:
        there = Path(program).is_file()
        text = f"{program} {'may not be executed' if there else 'is not there'}"
        return Finding(subject, "error", text, f"chmod +x {program}" if there else f"the hook is {_our_hook()}")
    with tempfile.TemporaryDirectory(prefix="cryored-doctor-") as place:
        star = _dry_request(Path(place))
        begin = time.monotonic()
        try:
            done = subprocess.run(
                f"{value} {star}{options}",
                shell=True,
                capture_output=True,
                text=True,
                timeout=setup.timeout,
            )
        except subprocess.TimeoutExpired:
            text = f"{command}: no answer in {setup.timeout:.0f} s"
            return Finding(subject, "error", text, "try it by hand")
        seconds = time.monotonic() - begin
        result = Path(place) / "run_it001_half1_class001_external_reconstruct.mrc"
        if not good(done.stdout, done.returncode) or not result.is_file():
            told = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}, no word"]
            return Finding(
                subject, "error", f"{command}: {told[-1].strip()}", "mend what the message says, and try again"
            )
        if not np.isfinite(read_volume(result).data).all():
            return Finding(subject, "error", f"{command}: the answer is no map of numbers", "reinstall cryored")
        by_us = (Path(place) / "run_it001_half1_class001_cryored.log").is_file()
    if not by_us:
        text = f"{command}: answered in {seconds:.1f} s, by another program than cryored"
        return Finding(subject, "warning", text, f"the hook is {_our_hook()}")
    return Finding(subject, "ok", f"{command}: a request of {_BOX} voxels cubed is answered in {seconds:.1f} s")


def _dry_request(place: Path) -> str:
    """Write a request such as RELION 5 writes, of a blob with noise, and return its name."""
    root = str(place.resolve() / "run_it001_half1_class001_external_reconstruct")
    rng = np.random.default_rng(0)
    shape = (_BOX, _BOX, _BOX // 2 + 1)
    weight = np.full(shape, 100.0, dtype=np.float32)
    signal = 1e3 * np.exp(-squared_radius(_BOX) / 8)
    arrays = {
        "data_real": signal * weight + 30 * rng.standard_normal(shape),
        "data_imag": 30 * rng.standard_normal(shape),
        "weight": weight,
    }
    for name, array in arrays.items():
        write_volume(f"{root}_{name}.mrc", Volume(np.asarray(array, dtype=np.float32), 0.0), label="doctor")
    shells = np.arange(_BOX // 2 + 1)
    fsc = np.clip(1.2 - shells / 6, 0.0, 0.999)
    general = {
        "rlnExtReconsDataReal": f"{root}_data_real.mrc",
        "rlnExtReconsDataImag": f"{root}_data_imag.mrc",
        "rlnExtReconsWeight": f"{root}_weight.mrc",
        "rlnExtReconsResult": f"{root}.mrc",
        "rlnExtReconsResultStarfile": f"{root}_out.star",
        "rlnTau2FudgeFactor": 1.0,
        "rlnPaddingFactor": 1.0,
        "rlnReferenceDimensionality": 3,
        "rlnOriginalImageSize": _BOX,
        "rlnCurrentImageSize": _BOX,
        "rlnPixelSize": 3.0,
    }
    table = {
        "rlnSpectralIndex": shells,
        "rlnReferenceTau2": fsc / (1 - fsc) / 100,
        "rlnGoldStandardFsc": fsc,
    }
    write_star(f"{root}.star", {"external_reconstruct_general": general, "external_reconstruct_tau2": table})
    return f"{root}.star"


def folder(setup: Setup) -> Iterator[Finding]:
    """Tell whether the folder can be written to, has room, and is seen by all nodes."""
    place = setup.folder
    if place is None:
        return
    if not place.is_dir():
        yield Finding("folder", "error", f"{place}: no such folder", f"mkdir -p {shlex.quote(str(place))}")
        return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding(
            "folder", "error", f"{place}: cannot be written to: {error.strerror}", "chmod u+w, or another folder"
        )
        return
    free = shutil.disk_usage(place).free / 2**30
    box = setup.box or _run_of(place)[0]
    needed = _ROOM * 2 * array_bytes(box or 256, setup.pad) / 2**30
    if free < needed:
        text = f"{place}: {free:.1f} GiB are free, an iteration of box {box or 256} leaves {needed / _ROOM:.1f} GiB"
        yield Finding("folder", "error" if box else "warning", text, "free some, or use --clean")
    else:
        yield Finding("folder", "ok", f"{place}: can be written to, {free:.0f} GiB are free")
    kind = _file_system(place)
    if kind in _LOCAL and _several_nodes():
        text = f"{place} lies on a {kind} of this machine, and the job has several nodes"
        yield Finding("folder", "error", text, "use a folder that all nodes share")


def watcher(setup: Setup) -> Iterator[Finding]:
    """Tell whether a watcher serves the folder."""
    if setup.folder is None or not setup.folder.is_dir():
        return
    remedy = f"start one: cryored watch {setup.folder}"
    try:
        state, left = Presence.look(setup.folder), shlex.join(Presence.left_options(setup.folder))
    except OutputError as error:
        yield Finding("watcher", "error", str(error), f"remove {setup.folder / PRESENCE}")
        return
    if state is None:
        yield Finding("watcher", "ok", "none: each call loads the model by itself (some seconds)")
        return
    counting = [name for name in (f"{_PREFIX}{one}" for one in _COUNTING) if os.environ.get(name)]
    if counting:
        text = f"{', '.join(counting)} set: the hook goes by that, and asks no watcher of {setup.folder}"
        yield Finding("watcher", "warning", text, f"unset {' '.join(counting)}, and give the watcher its options")
        return
    if state == "serving":
        yield Finding("watcher", "ok", f"serves {setup.folder}")
        return
    own = left not in ("", _USUAL)
    text = "has ended" if state == "ended" else f"has died and left {PRESENCE}"
    if own:
        text += f"; the hook goes on by itself with its options: {left}"
        remedy += f"; to go on without these: rm {shlex.quote(str(setup.folder / PRESENCE))}"
    if own or state == "died":
        yield Finding("watcher", "warning", text, remedy)
    else:
        yield Finding("watcher", "ok", f"{text}: the hook goes on by itself with its options, the usual ones")


def cache(setup: Setup) -> Iterator[Finding]:
    """Tell whether compiled loops are kept from call to call."""
    place = Path(os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parents[1] / "reconstruction" / "__pycache__")
    if os.access(place if place.exists() else place.parent, os.W_OK):
        yield Finding("numba", "ok", f"compiled loops are kept in {place}")
    else:
        text = f"{place} cannot be written to, so simulations compile anew each time"
        yield Finding("numba", "warning", text, "export NUMBA_CACHE_DIR to a folder of yours")


def mpi(setup: Setup) -> Iterator[Finding]:
    """Tell what mpirun has to be told here."""
    if shutil.which("mpirun") is None:
        yield Finding(
            "MPI", "warning", "no mpirun on the PATH", "auto-refine needs relion_refine_mpi; load MPI's module"
        )
        return
    hints = []
    if os.geteuid() == 0:
        hints.append("--allow-run-as-root")
    if (os.cpu_count() or 1) < 3:
        hints.append("--oversubscribe")
    if _several_nodes():
        hints.append(f"-x {VARIABLE}")
    told = f"mpirun {' '.join(hints)} -n 3 relion_refine_mpi ..." if hints else "nothing special"
    yield Finding("MPI", "ok", f"Open MPI needs here: {told}")


QUESTIONS: tuple[Callable[[Setup], Iterator[Finding]], ...] = (
    model,
    compute,
    memory,
    relion,
    hook,
    folder,
    watcher,
    cache,
    mpi,
)


def _several_nodes() -> bool:
    """Tell whether SLURM gives the job more than one node."""
    return os.environ.get("SLURM_JOB_NUM_NODES", "1") not in ("", "0", "1")


def _run_of(place: Path | None) -> tuple[int | None, float | None]:
    """Return box and pixel size in angstrom of a job's last model, None for what it does not tell."""
    if place is None:
        return None, None
    try:
        job = read_job(place)
        size = None if job.fsc is None else read_star(job.fsc).find_text("model_general", "rlnOriginalImageSize")
    except InputError:
        return None, None
    return int(size) if size and size.isdigit() else None, job.pixel_size


def _file_system(place: Path) -> str:
    """Return the kind of file system that a folder lies on; empty where nothing tells."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    inside = [(point, kind) for point, kind in mounts if place.resolve().is_relative_to(point)]
    return max(inside, key=lambda item: len(item[0]), default=("", ""))[1]
