"""What a GPU does for cryored: right numbers, seconds, memory, and what happens when memory is short.

    python benchmarks/gpu.py -o gpu.json [--seconds 360] [--engines torch,jax] [--stages setup,training] [--small]

Each engine that is installed (PyTorch, JAX, TensorFlow) takes its turn in processes of its own, as Keras takes one a
process. The stages, in this order:

\b
setup      versions, device, seconds of imports and of the first calls
training   steps a second (`train_step` on one batch that is on the device)
inference  the model on one box in one pass, host to host, by precision; the difference from float32 on the CPU
short      what the denoiser does when memory is short: smaller tiles, the CPU; the difference from doing so at once
           (recovering harms nothing), and with PyTorch from one pass (what tiles themselves change)
tiles      seconds and peak memory of the denoiser by tile
watch      seconds in which `cryored watch` answers both halves; the difference from `red-update --cpu`
large      seconds of the denoiser on large boxes
ceilings   what the card does at best (PyTorch): bfloat16 products, copies (bytes read and written)

Seconds are medians of warm calls unless they are of the first. A measurement that fails, or for which no time is left,
leaves its reason in the file, and the others go on. Peaks are of the device's memory; JAX cannot forget a peak, so
where a measurement did not raise it, it is only known to be at most that. JAX's processes share a cache of compiled
code, empty at the start: what one stage compiles is there for the later ones.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"torch": 1, "jax": 2, "tensorflow": 1}  # share of the time; JAX compiles every operation
# Share of an engine's time that a stage may take; what it leaves goes to the later ones.
STAGES = {"setup": 3, "training": 6, "inference": 6, "short": 3, "tiles": 3, "watch": 4, "large": 3, "ceilings": 1}
# The largest relative difference from float32 on the CPU; what engines do by themselves is TF32 at most.
BOUNDS = {"float32": 1e-4, "tf32": 2e-3, "default": 2e-3, "compiled": 2e-3, "bfloat16": 2e-2}
MODEL = "cwred"
_ENOUGH = 0.6  # of the memory for one pass: too little for it, but enough for smaller tiles
VOXEL = 1.5

Array = npt.NDArray[np.float32]
Row = dict[str, Any]
sys.path.insert(0, str(ROOT))  # cryored of this checkout, installed or not


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    boxes: tuple[int, ...] = (96, 128, 256, 192)
    patch: int = 80
    batch: int = 8
    widths: tuple[int, ...] = (8, 16, 24)
    short: tuple[int, int, int] = (192, 192, 192)
    tiled: int = 256
    tiles: tuple[int, ...] = (96, 144, 192, 256)
    large: tuple[int, ...] = (384, 512)
    product: int = 8192
    copied: int = 2**30  # numbers of four bytes
    each: float = 0.7  # seconds of warm calls


SMALL = Sizes((32,), 16, 2, (4,), (120, 16, 16), 32, (32,), (40,), 256, 2**20, 0.1)


@dataclass
class Book:
    """Writes the rows of an engine's process as they come."""

    path: Path
    engine: str
    sizes: Sizes
    stage: str = ""
    end: float = 0.0
    device: str = ""
    _peak: float = field(default=0.0, init=False)

    def write(self, case: str, row: Row) -> None:
        """Add a row."""
        with self.path.open("a") as file:
            file.write(json.dumps({"engine": self.engine, "stage": self.stage, "case": case, **row}) + "\n")

    def measure(self, case: str, function: Callable[[], Row]) -> None:
        """Write what a function returns, or why it does not."""
        if time.monotonic() > self.end:
            self.write(case, {"skipped": "no time was left"})
            return
        try:
            self._peak = self.memory(reset=True)
            row = function()
            if self.stage not in ("setup", "watch", "ceilings") and self._peak >= 0:
                row |= self._peak_row()
        except Exception as error:
            row = {"error": in_short(f"{type(error).__name__}: {error}")}
        self.write(case, row)
        gc.collect()
        if self.engine == "torch" and "GPU" in self.device:
            import torch

            torch.cuda.empty_cache()

    def _peak_row(self) -> Row:
        peak = self.memory()
        name = "peak_MiB" if self.engine != "jax" or peak > self._peak else "peak_at_most_MiB"
        return {name: round(peak / 2**20)}

    def memory(self, reset: bool = False) -> float:
        """Return the peak of the device's memory in bytes; -1 where there is no GPU."""
        if "GPU" not in self.device:
            return -1
        if self.engine == "torch":
            import torch

            if reset:
                torch.cuda.reset_peak_memory_stats()
            return float(torch.cuda.max_memory_allocated())
        if self.engine == "jax":
            import jax

            return float((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", -1))
        import tensorflow as tf

        if reset:
            tf.config.experimental.reset_memory_stats("GPU:0")
        return float(tf.config.experimental.get_memory_info("GPU:0")["peak"])

    def warm(self, call: Callable[[], Any], most: int = 20) -> float:
        """Return the median of the seconds of calls."""
        seconds: list[float] = []
        while not seconds or (sum(seconds) < self.sizes.each and len(seconds) < most):
            seconds.append(timed(call))
        return rounded(statistics.median(seconds))


def in_short(message: str) -> str:
    """Return a message as one line that fits into a table."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split())[:300]


def rounded(value: float, digits: int = 4) -> float:
    """Return a number with so many digits."""
    return float(f"{value:.{digits}g}")


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def difference(found: Array, wanted: Array) -> float:
    """Return the norm of the difference over that of what was wanted."""
    return rounded(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)), 3)


def make_map(*shape: int) -> Any:
    """Return a map with blobs of density inside a sphere, and some noise."""
    from cryored.maps.fourier import low_pass
    from cryored.maps.volume import Volume, soft_sphere

    rng = np.random.default_rng(shape[0])
    edge = 64
    blobs = np.clip(low_pass(rng.standard_normal((edge,) * 3, dtype=np.float32), VOXEL, 8.0), 0, None)
    z, y, x = shape
    data = np.tile(blobs / blobs.std(), [-(-n // edge) for n in shape])[:z, :y, :x]
    data = data * soft_sphere(shape, 0.35 * z, 4.0) + np.float32(0.1) * rng.standard_normal(shape, dtype=np.float32)
    return Volume(data.astype(np.float32), VOXEL)


def make_input(box: int) -> Array:
    """Return such a map as the network sees it: (1, z, y, x, 1)."""
    from cryored.maps.network_scale import standard_of

    volume = make_map(box, box, box)
    return standard_of(volume.data, VOXEL).apply(volume.data).astype(np.float32)[None, ..., None]


def set_up(engine: str) -> Row:
    """Import everything and choose the device; return how long that took."""
    row: Row = {}
    if engine != "tensorflow":  # which is to be imported by set_up
        row["import_engine_s"] = rounded(timed(lambda: importlib.import_module(engine)))
    from cryored.prior import device

    names: list[str] = []
    row["set_up_s"] = rounded(timed(lambda: names.append(device.set_up())))
    row["import_keras_s"] = rounded(timed(lambda: importlib.import_module("keras")))
    keras, module = sys.modules["keras"], sys.modules[engine]
    row |= {"device": names[0], "python": platform.python_version(), "numpy": np.__version__}
    return row | {"keras": keras.__version__, engine: module.__version__}


def set_precision(engine: str, precision: str | None) -> None:
    """Tell the engine how to multiply float32; None or another word than float32 and tf32 leaves it its own way."""
    if engine == "torch":
        import torch

        exact = {"float32": (False, False), "tf32": (True, True)}
        own = (True, False)  # PyTorch's, for convolutions and for products
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = exact.get(precision or "", own)
    elif engine == "jax":
        import jax

        words = {"float32": "highest", "tf32": "tensorfloat32"}
        jax.config.update("jax_default_matmul_precision", words.get(precision or ""))
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(precision != "float32")


def apply(network: Any, data: Array) -> Array:
    """Return what a network takes for the error; one that is told the FSC is told that it is not known."""
    inputs = [data, *(np.zeros((len(data), told.shape[1]), np.float32) for told in network.inputs[1:])]
    return np.asarray(network.predict_on_batch(inputs if len(inputs) > 1 else data), np.float32)[..., :1]


def stage_setup(book: Book) -> None:
    """Do the first calls."""
    from cryored.prior.models import find_model, load_network

    def calls() -> Row:
        box = book.sizes.boxes[0]
        data = make_input(box)
        begin = time.perf_counter()
        network = load_network(find_model(MODEL))
        loaded = time.perf_counter() - begin
        first = timed(lambda: apply(network, data))
        later = book.warm(lambda: apply(network, data))
        return {"load_s": rounded(loaded), "first_s": rounded(first), "later_s": later}

    book.measure(f"first calls, box {book.sizes.boxes[0]}", calls)


def stage_training(book: Book) -> None:
    """Train on one batch."""
    for width in book.sizes.widths:
        for mixed in (True, False):
            name = f"width {width}, {'mixed_bfloat16' if mixed else 'float32'}"
            book.measure(name, functools.partial(train, book, width, mixed))
        if width == book.sizes.widths[0]:
            name = f"width {width}, told the FSC, mixed_bfloat16"
            book.measure(name, functools.partial(train, book, width, True, told=True))
    if book.engine == "jax":  # slow: last
        width = book.sizes.widths[0]
        name = f"width {width}, mixed_bfloat16, not compiled"
        book.measure(name, functools.partial(train, book, width, True, compiled=False))


def train(book: Book, width: int, mixed: bool, told: bool = False, compiled: bool | None = None) -> Row:
    """Return the rate of steps on random patches."""
    import keras
    from keras import ops

    from cryored.prior.network import build_unet
    from cryored.training.loop import Recipe, build_network, train_step

    patch, count = book.sizes.patch, book.sizes.batch
    recipe = Recipe(width=width, depth=4, patch=patch, batch_size=count, mixed_precision=mixed)
    rng = np.random.default_rng(0)
    shape = (count, patch, patch, patch, 1)
    arrays: list[Any] = [rng.standard_normal(shape, dtype=np.float32) for _ in range(2)]
    inputs, errors, weights = map(ops.convert_to_tensor, (*arrays, np.ones((count, 1, 1, 1), np.float32)))
    if told:
        dtype = "mixed_bfloat16" if mixed else "float32"
        network = build_unet(width, 4, l2=recipe.l2, dtype=dtype, knots=24, uncertainty=True)
        inputs = [inputs, ops.convert_to_tensor(rng.random((count, 25), dtype=np.float32))]
        weights = weights[:, 0, 0, 0]
    else:
        network = build_network(recipe)
    if told or compiled is not None:
        loss = "mse" if not told else lambda wanted, found: ops.mean(ops.square(found[..., :1] - wanted), (1, 2, 3, 4))
        jit = book.engine == "jax" if compiled is None else compiled
        network.compile(optimizer=keras.optimizers.Adam(recipe.learning_rate), loss=loss, jit_compile=jit)

    def step() -> float:
        return train_step(network, recipe, 1, (inputs, errors, weights))

    first = timed(step)
    step()
    return {"first_s": rounded(first), "steps_per_s": rounded(1 / book.warm(step, 50)), "loss": rounded(step())}


def stage_inference(book: Book) -> None:
    """Apply the model in one pass."""
    from cryored.prior import device
    from cryored.prior.models import find_model, load_network
    from cryored.prior.network import build_unet, scaled

    model = find_model(MODEL)
    reference: list[Array] = []

    def on_cpu() -> Row:
        with device.cpu():
            network = load_network(model)
            data = make_input(book.sizes.boxes[0])
            begin = time.perf_counter()
            reference.append(apply(network, data))
        return {"first_s": rounded(time.perf_counter() - begin)}

    def case(box: int, precision: str) -> Row:
        set_precision(book.engine, precision)
        network = load_network(model)
        if precision == "bfloat16":
            card = model.card
            mixed = build_unet(
                card.width, card.depth, dtype="mixed_bfloat16", knots=card.knots, uncertainty=card.uncertainty
            )
            mixed.set_weights(network.get_weights())
            mixed = scaled(mixed, card.training.get("scale", 1.0))
            mixed.compile(jit_compile=False)
            network = mixed
        elif precision == "compiled":
            network.compile(jit_compile=True)
        data = make_input(box)
        found: list[Array] = []
        first = timed(lambda: found.append(apply(network, data)))
        row: Row = {"first_s": rounded(first), "warm_s": book.warm(lambda: apply(network, data))}
        if box == book.sizes.boxes[0] and reference:
            row["difference"] = difference(found[0], reference[0])
            row["bound"] = BOUNDS[precision]
            row["within"] = row["difference"] <= row["bound"]
        return row

    first, *others = book.sizes.boxes
    exact = ("float32", "tf32", *(["compiled"] if book.engine == "jax" else []))
    book.measure(f"box {first}, float32 on the CPU", on_cpu)
    # By itself and in half precision first: JAX shows a peak only where it grows.
    cases = [(first, name) for name in ("bfloat16", "default", *exact)]
    cases += itertools.product(others, ("bfloat16", "default"))
    cases += itertools.product(others, exact)
    for box, precision in cases:
        book.measure(f"box {box}, {precision}", functools.partial(case, box, precision))
    set_precision(book.engine, None)


class _Notes(logging.Handler):
    """Keeps what cryored logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(in_short(record.getMessage()))


@contextmanager
def _limited(book: Book, denoiser: Any, limit: float) -> Iterator[str]:
    """Leave a denoiser so many bytes of the device's memory; say how."""
    if book.engine == "torch" and "GPU" in book.device:
        import torch

        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            yield f"PyTorch may take {limit / 2**20:.0f} MiB"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    elif book.engine == "jax" and "GPU" in book.device:
        yield f"JAX may take {os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION']} of the card"
    else:
        predict = denoiser._predict

        def refuse(data: Array, **told: Array) -> Array:
            if denoiser._network is not denoiser._on_cpu and needed(data.shape[-3:]) > limit:
                raise MemoryError
            return predict(data, **told)

        denoiser._predict, denoiser._loaded_on = refuse, "GPU (not a real one)"
        yield "simulated: no GPU whose memory this engine can limit"


def needed(shape: Sequence[int]) -> float:
    """Return roughly how many bytes a pass over a tile takes."""
    return 0.5e9 * math.prod(shape) / 112**3


def short_cases(sizes: Sizes) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return shapes and the bytes to do them in: too few for one pass, and next to nothing."""
    whole, third = sizes.short, tuple(max(16, n // 3) for n in sizes.short)
    return {
        "smaller tiles": (whole, _ENOUGH * needed(whole)),
        "the CPU": (third, min(48 * 2**20, 0.25 * needed(third))),
    }


def stage_short(book: Book) -> None:
    """Let the denoiser run out of memory."""
    # JAX's limit holds for a whole process: the case is named there.
    for name, (shape, limit) in short_cases(book.sizes).items():
        if os.environ.get("BENCHMARK_SHORT", name) == name:
            book.measure(f"box {shape[0]}, expected: {name}", functools.partial(run_short, book, name, shape, limit))


def run_short(book: Book, name: str, shape: tuple[int, ...], limit: float) -> Row:
    """Return what a denoiser says and does in little memory, beside one that does so from the start."""
    from cryored.prior import device
    from cryored.prior.denoiser import Denoiser
    from cryored.prior.models import find_model

    set_precision(book.engine, "float32")
    volume, model = make_map(*shape), find_model(MODEL)
    denoiser = Denoiser(model, tile=shape[0] + 32)
    denoiser.load()
    row: Row = {}
    whole: Any = None
    if book.engine == "torch" and "GPU" in book.device:
        whole = denoiser(volume)
        limit = _ENOUGH * book.memory() if name == "smaller tiles" else limit
        book.memory(reset=True)
    notes, logger = _Notes(), logging.getLogger("cryored")
    logger.addHandler(notes)
    try:
        with _limited(book, denoiser, limit) as row["how"]:
            begin = time.perf_counter()
            result = denoiser(volume)
            row["seconds"] = rounded(time.perf_counter() - begin)
    except Exception as error:
        row["warnings"] = notes.messages
        return row | {"error": in_short(f"{type(error).__name__}: {error}")}
    finally:
        logger.removeHandler(notes)
    on_cpu = denoiser.device_name.startswith("CPU")
    if whole is not None:
        row["difference_from_one_pass"] = difference(result.data, whole.data)
    with device.cpu() if on_cpu else nullcontext():
        wanted = Denoiser(model, tile=denoiser.edge)(volume)
    apart = difference(result.data, wanted.data)
    smaller = denoiser.edge < shape[0] + 32
    row |= {"tile": denoiser.edge, "device": denoiser.device_name, "warnings": notes.messages}
    row["as_expected"] = on_cpu if name == "the CPU" else smaller and not on_cpu
    return row | {"difference": apart, "bound": 1e-4, "within": apart <= 1e-4}


def denoise(book: Book, box: int, tile: int) -> Row:
    """Return the seconds of the denoiser, the product's own way."""
    from cryored.prior.denoiser import Denoiser
    from cryored.prior.models import find_model

    volume = make_map(box, box, box)
    denoiser = Denoiser(find_model(MODEL), tile=tile)
    denoiser.load()
    first = timed(lambda: denoiser(volume))
    return {"first_s": rounded(first), "warm_s": book.warm(lambda: denoiser(volume), 5), "tile_after": denoiser.edge}


def stage_tiles(book: Book) -> None:
    """Denoise one box in tiles of several sizes."""
    for tile in book.sizes.tiles:
        name = f"box {book.sizes.tiled}, tile {tile}"
        book.measure(name, functools.partial(denoise, book, book.sizes.tiled, tile))


def stage_large(book: Book) -> None:
    """Denoise large boxes."""
    from cryored.prior.denoiser import GPU_TILE

    for box, tile in itertools.product(book.sizes.large, (GPU_TILE, 256)):
        book.measure(f"box {box}, tile {tile}", functools.partial(denoise, book, box, tile))


def stage_watch(book: Book) -> None:
    """Answer requests of random data."""
    book.measure("box 64, both halves", functools.partial(run_watch, book))


def run_watch(book: Book) -> Row:
    """Start a watcher, ask it as RELION does, and compare its answers."""
    from watch import HALVES, write_halves

    from cryored.files.mrc import read_volume

    hook = ROOT / "bin" / "cryored-external-reconstruct"
    options = ["--model", MODEL, "--lambda", "0.5", "-q"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_halves(folder, 64, 1)
        log = (Path(name) / "log").open("w+")
        running: list[subprocess.Popen[bytes]] = []

        def start(*command: str) -> subprocess.Popen[bytes]:
            running.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log))
            return running[-1]

        def done(processes: Sequence[subprocess.Popen[bytes]]) -> None:
            left = max(1.0, book.end - time.monotonic())
            if any([process.wait(left) for process in processes]):
                log.seek(0)
                raise RuntimeError(f"{processes[0].args[-2:]} failed: {log.read()[-250:]}")

        def ask() -> None:
            done([start(str(hook), f"{half}.star") for half in HALVES])

        cryored = (sys.executable, "-m", "cryored")
        try:
            begin = time.perf_counter()
            watcher = start(*cryored, "watch", ".", *options)
            alone = [("red-update", f"{half}.star", "-o", f"cpu{i}.mrc", "--cpu") for i, half in enumerate(HALVES)]
            references = [start(*cryored, *words, *options) for words in alone]
            presence = folder / "cryored_watch.txt"
            while not (presence.exists() and f"pid {watcher.pid}\n" in presence.read_text()):
                if watcher.poll() is not None or time.monotonic() > book.end:
                    log.seek(0)
                    raise RuntimeError(f"the watcher did not start: {log.read()[-250:]}")
                time.sleep(0.02)
            row: Row = {"start_s": rounded(time.perf_counter() - begin)}
            done(references)
            row["first_pair_s"] = rounded(timed(ask))
            row["pair_s"] = book.warm(ask, 7)
            record = Path(folder / f"{HALVES[0].removesuffix('_external_reconstruct')}_cryored.log").read_text()
            row["device"] = json.loads(record.splitlines()[-1])["device"]
            answers = [read_volume(folder / f"{half}.mrc").data for half in HALVES]
            watcher.send_signal(signal.SIGTERM)
            done([watcher])
            wanted = [read_volume(folder / f"cpu{i}.mrc").data for i in range(2)]
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            log.close()
    apart = max(difference(*pair) for pair in zip(answers, wanted, strict=True))
    return row | {"difference": apart, "bound": 1e-3, "within": apart <= 1e-3}


def stage_ceilings(book: Book) -> None:
    """Measure what the card can do."""
    if book.engine != "torch":
        return
    import torch

    place = torch.device("cuda" if "GPU" in book.device else "cpu")

    def rate(call: Callable[[], Any]) -> float:
        def ten() -> None:
            for _ in range(10):
                call()
            if place.type == "cuda":
                torch.cuda.synchronize()

        ten()
        return 10 / book.warm(ten, 5)

    def product() -> Row:
        edge = book.sizes.product
        a, b = (torch.randn(edge, edge, dtype=torch.bfloat16, device=place) for _ in range(2))
        return {"TFLOP_per_s": rounded(2e-12 * edge**3 * rate(lambda: a @ b))}

    def copy() -> Row:
        one, other = (torch.zeros(book.sizes.copied, device=place) for _ in range(2))
        return {"GB_per_s": rounded(8e-9 * book.sizes.copied * rate(lambda: other.copy_(one)))}

    book.measure(f"product of {book.sizes.product}, bfloat16", product)
    book.measure(f"copy of {4 * book.sizes.copied / 2**20:.0f} MiB", copy)


def work(book: Book, stages: Sequence[str], seconds: float) -> None:
    """Do stages of an engine in this process."""
    over = time.monotonic() + 0.9 * seconds
    if list(stages) != ["watch"]:  # which needs the engine in other processes only
        book.stage, book.end = stages[0], over
        row = set_up(book.engine)
        book.device = row["device"]
        if "setup" in stages:
            book.write("imports and device", row)
    for number, stage in enumerate(stages):
        begin = time.monotonic()
        share = STAGES[stage] / sum(STAGES[name] for name in stages[number:])
        book.stage, book.end = stage, begin + share * (over - begin)
        globals()[f"stage_{stage}"](book)
        book.write("all", {"seconds": rounded(time.monotonic() - begin, 3)})


def processes(engine: str, stages: Sequence[str]) -> list[list[str]]:
    """Return which stages share a process; with PyTorch, which can forget peaks and limits, most do."""
    groups: list[list[str]] = []
    for stage in stages:
        joins = stage != "watch" if engine == "torch" else stage == "training"
        if groups and joins and groups[-1][-1] != "watch":
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def run(
    engine: str, stages: Sequence[str], seconds: float, *, small: bool, cache: str, extra: dict[str, str]
) -> list[Row]:
    """Do stages of an engine in a new process; return its rows, whatever becomes of it."""
    paths = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = {
        **os.environ,
        "KERAS_BACKEND": engine,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # JAX compiles each operation, and would do so in each process.
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *paths]),  # absolute: the watcher runs in another folder
        **extra,
    }
    with tempfile.TemporaryDirectory() as name:
        records, log = Path(name) / "records", Path(name) / "log"
        records.touch()
        command = [sys.executable, __file__, "--inside", engine, "--stages", ",".join(stages)]
        command += ["--seconds", f"{seconds:.1f}", "-o", str(records), *(["--small"] if small else [])]
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
            try:
                status = process.wait(seconds)
                reason = f"the process ended with status {status}: {in_short(log.read_text()[-250:])}"
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        rows = []
        for line in records.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break  # it was stopped while it wrote
    finished = {row["stage"] for row in rows if row["case"] == "all"}
    lost = [stage for stage in stages if stage not in finished]
    return rows + [{"engine": engine, "stage": stage, "case": "all", "error": reason} for stage in lost]


def card() -> tuple[str, float]:
    """Return name and driver of the first GPU and its memory in bytes; nothing and 0 without one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
        name, driver, mebibytes = (part.strip() for part in found.split(","))
        return f"{name}, driver {driver}", float(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "", 0.0


def plan(engine: str, stages: Sequence[str], memory: float, sizes: Sizes) -> list[tuple[list[str], dict[str, str]]]:
    """Return the processes of an engine: stages, and what is added to the environment."""
    planned: list[tuple[list[str], dict[str, str]]] = []
    for group in processes(engine, stages):
        if group == ["short"] and engine == "jax" and memory:
            for name, (_, limit) in short_cases(sizes).items():
                added = {"BENCHMARK_SHORT": name, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
                planned.append((group, {**added, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{limit / memory:.5f}"}))
        else:
            planned.append((group, {}))
    return planned


def show(row: Row) -> None:
    """Print a row of the table."""
    where = [str(row.pop(name)) for name in ("engine", "stage", "case")]
    print("\t".join([*where, *(f"{name} {value}" for name, value in row.items())]), flush=True)


def parts(ctx: click.Context, option: click.Parameter, value: str) -> list[str]:
    """Return the words of an option in the order in which they are done."""
    known = tuple(ENGINES if option.name == "engines" else STAGES)
    words = [word.strip() for word in value.split(",")]
    if unknown := [word for word in words if word not in known]:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(known)}")
    return [word for word in known if word in words]


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="gpu.json", show_default=True)
@click.option("--seconds", default=360.0, show_default=True, help="For everything.")
@click.option("--engines", default=",".join(ENGINES), show_default=True, callback=parts)
@click.option("--stages", default=",".join(STAGES), show_default=True, callback=parts)
@click.option("--small", is_flag=True, help="Small sizes: does everything work?")
@click.option("--inside", hidden=True)
def main(output: Path, seconds: float, engines: list[str], stages: list[str], small: bool, inside: str | None) -> None:
    """Measure, print a table and write it."""
    sizes = SMALL if small else Sizes()
    if inside:
        work(Book(output, inside, sizes), stages, seconds)
        return
    begin = time.monotonic()
    gpu, memory = card()
    print(f"# {gpu or 'no GPU'}, {os.cpu_count()} cores, {platform.platform()}")
    rows: list[Row] = []
    found = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "gpu": gpu or None}
    found |= {"cores": os.cpu_count(), "platform": platform.platform(), "small": small}

    def add(new: list[Row]) -> None:
        rows.extend(new)
        for row in new:
            show(dict(row))
        # After each process: what there is stays, whatever becomes of this one.
        took = round(time.monotonic() - begin, 1)
        output.write_text(json.dumps({**found, "seconds": took, "rows": rows}, indent=1) + "\n")

    installed = [engine for engine in engines if importlib.util.find_spec(engine)]
    for engine in engines:
        if engine not in installed:
            add([{"engine": engine, "stage": "all", "case": "all", "skipped": "not installed"}])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for number, engine in enumerate(installed):
            share = ENGINES[engine] / sum(ENGINES[name] for name in installed[number:])
            end = time.monotonic() + (begin + seconds - time.monotonic()) * share
            planned = plan(engine, stages, memory, sizes)
            for place, (group, extra) in enumerate(planned):
                weights = [sum(STAGES[stage] for stage in names) for names, _ in planned[place:]]
                left = max(0.0, end - time.monotonic()) * weights[0] / sum(weights)
                add(run(engine, group, left, small=small, cache=cache, extra=extra))
    print(f"# {time.monotonic() - begin:.0f} s, {output}")


if __name__ == "__main__":
    main()
