"""Sets up the network's back-end and its device: the only module that imports TensorFlow."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cryored.errors import ModelError

logger = logging.getLogger(__name__)

NUMBER = "CRYORED_GPU_NUMBER"  # which of the visible GPUs, from 0; the variable that a hook can set for its command


def set_up(gpu: bool | None = None, threads: int | None = None) -> str:
    """Choose the device before the network is built, and return its name (``CPU``, ``GPU ...``, ``torch, CPU``).

    Parameters
    ----------
    gpu : bool, optional
        True insists on a GPU, False keeps off it; None takes one where there is one. With CRYORED_GPU_NUMBER in the
        environment it is that one of the visible GPUs.
    threads : int, optional
        CPU threads of the network; JAX takes all.

    Raises
    ------
    ModelError
        KERAS_BACKEND names no engine that is here; a GPU was insisted on and there is none; CRYORED_GPU_NUMBER is none
        of the visible ones.
    """
    name = _backend()
    finders = {"tensorflow": _set_up_tensorflow, "torch": _set_up_torch, "jax": _set_up_jax}
    if name not in finders:
        raise ModelError(f"KERAS_BACKEND is '{name}', expected one of {', '.join(finders)}; set it, or unset it")
    find = finders[name]
    engine = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX"}[name]
    try:
        found = find(gpu is not False, threads)
    except ImportError as error:
        raise ModelError(
            f"KERAS_BACKEND is '{name}', but {engine} cannot be loaded ({error}); pip install {name}, or unset "
            "KERAS_BACKEND"
        ) from error
    if gpu and found is None:
        remedy = "install cryored[gpu]" if name == "tensorflow" else f"install {engine} for CUDA"
        raise ModelError(
            f"no GPU is visible to {engine}, and --gpu insists on one; check nvidia-smi and CUDA_VISIBLE_DEVICES, "
            f"{remedy}, or leave --gpu out"
        )
    described = "CPU" if found is None else f"GPU {found}".strip()
    return described if name == "tensorflow" else f"{name}, {described}"


def _choose(gpus: list[Any]) -> Any:
    """Return that one of the visible GPUs which CRYORED_GPU_NUMBER asks for, by default the first."""
    number = os.environ.get(NUMBER) or "0"
    if not number.isdecimal() or int(number) >= len(gpus):
        raise ModelError(
            f"{NUMBER} is '{number}', expected 0 to {len(gpus) - 1}: {len(gpus)} GPUs are visible; it counts within "
            "CUDA_VISIBLE_DEVICES"
        )
    return gpus[int(number)]


def _backend() -> str:
    """Return the name of Keras' back-end, and see to it that Keras takes the same."""
    return os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def _set_up_tensorflow(use_gpu: bool, threads: int | None) -> str | None:
    """Return the name of the first GPU in use, if there is one."""
    # By itself TensorFlow takes oneDNN only on CPUs with AVX512-VNNI; on others a network is 3.5 times as fast with it.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    with _hushed(), _unseen("jax", "matplotlib"):
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    try:
        gpus = gpus if use_gpu else []
        if os.environ.get(NUMBER) and gpus:
            gpus = [_choose(gpus)]
        tf.config.set_visible_devices(gpus, "GPU")
        for device in gpus:
            # Take memory as it is needed: RELION shares the card.
            tf.config.experimental.set_memory_growth(device, True)
        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError:
        pass  # TensorFlow runs already in this process: its devices are as the first call left them
    return str(tf.config.experimental.get_device_details(gpus[0]).get("device_name", "")) if gpus else None


def _set_up_torch(use_gpu: bool, threads: int | None) -> str | None:
    import torch

    if threads:
        torch.set_num_threads(threads)
    if use_gpu and torch.cuda.is_available():
        torch.cuda.set_device(_choose(list(range(torch.cuda.device_count()))))
        return str(torch.cuda.get_device_name())
    os.environ["KERAS_TORCH_DEVICE"] = "cpu"
    return None


def _set_up_jax(use_gpu: bool, threads: int | None) -> str | None:
    if not use_gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return None
    chosen = _choose(devices)
    if os.environ.get(NUMBER):
        jax.config.update("jax_default_device", chosen)
    return str(chosen.device_kind)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a network failed for want of memory; each back-end has its own error for that."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "ResourceExhaustedError", "OutOfMemoryError"}) or (
        bool(names & {"XlaRuntimeError", "JaxRuntimeError"}) and "RESOURCE_EXHAUSTED" in str(error)
    )


def is_engines(error: BaseException) -> bool:
    """Tell whether an error is a back-end's own, as of a driver that fails."""
    engines = ("tensorflow", "torch", "jax", "jaxlib", "keras")
    return isinstance(error, RuntimeError) or type(error).__module__.split(".")[0] in engines


def cpu() -> AbstractContextManager[Any]:
    """Give a context in which networks are built and run on the CPU, whatever else there is."""
    import keras

    return keras.device("cpu:0")


@contextmanager
def scope(batch_size: int) -> Iterator[None]:
    """Give a context in which a network is built and trained so that each visible device gets its share of a batch.

    The back-end's own engine does it: ``tf.distribute.MirroredStrategy`` or ``keras.distribution.DataParallel``.
    PyTorch under Keras has none. Of the devices as many are used as divide the batch.

    Parameters
    ----------
    batch_size : int
        Of all devices together.
    """
    if _backend() == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        used = _shares([device.name for device in devices], batch_size)
        if len(used) > 1:
            with tf.distribute.MirroredStrategy(used).scope():
                yield
            return
    elif _backend() == "jax":
        import keras

        used = _shares(keras.distribution.list_devices(), batch_size)
        if len(used) > 1:
            with keras.distribution.DataParallel(devices=used).scope():
                yield
            return
    yield


def _shares(devices: list[str], batch_size: int) -> list[str]:
    count = next((count for count in range(len(devices), 0, -1) if batch_size % count == 0), 0)
    if len(devices) > 1:
        logger.info("training on %d of %d devices", count, len(devices))
    if count < len(devices):
        logger.warning(
            "a batch of %d is no multiple of %d devices: %d are used; change --batch-size",
            batch_size,
            len(devices),
            count,
        )
    return devices[:count]


def needs_synchronising() -> bool:
    """Tell whether batch normalisation must be told that the current `scope` has several devices."""
    return _backend() == "tensorflow" and _replicas() > 1


def share_out(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Split tensors along their first axis among the devices of the current `scope`, where Keras does not do it."""
    if _backend() != "tensorflow" or _replicas() == 1:
        return batch
    import tensorflow as tf

    def split(tensor: Any) -> Any:
        parts = tf.split(tensor, _replicas())
        return tf.distribute.get_strategy().experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )

    return tuple(split(tensor) for tensor in batch)


def _replicas() -> int:
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def summary_writer(folder: Path) -> Callable[[int, dict[str, float]], None]:
    """Return a function that writes numbers of a step for TensorBoard, through tensorboardX or else TensorFlow.

    Raises
    ------
    ModelError
        Neither is installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        pass
    else:
        writer = SummaryWriter(str(folder))

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return write
    try:
        with _hushed():
            import tensorflow as tf
    except ImportError as error:
        raise ModelError(
            "--tensorboard needs tensorboardX or TensorFlow: pip install 'cryored[tensorboard]'"
        ) from error
    stream = tf.summary.create_file_writer(str(folder))
    # What TensorBoard's own tf.summary.scalar says of a value; TensorFlow comes without TensorBoard.
    plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
    metadata = tf.compat.v1.SummaryMetadata(plugin_data=plugin)

    def write_tensors(step: int, values: dict[str, float]) -> None:
        with stream.as_default():
            for name, value in values.items():
                tf.summary.write(name, tf.constant(value, tf.float32), step, metadata)
        stream.flush()

    return write_tensors


def set_seed(seed: int) -> None:
    """Seed what the network draws at random. Keras imports TensorFlow for that, if it is there, for any back-end."""
    with _hushed():
        import keras

        keras.utils.set_random_seed(seed)


@contextmanager
def _unseen(*names: str) -> Iterator[None]:
    """Keep packages from being imported that are only tried for: installed, they cost a third of TensorFlow's start.

    It tries for JAX to convert its models to TFLite, Keras for Matplotlib to show pictures of a training set.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # to Python: as if it were not installed
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep TensorFlow's start-up notes, which it writes past Python, from standard error; show them if it fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if sys.stderr is not None:
        sys.stderr.flush()
    with tempfile.TemporaryFile() as notes:
        kept = os.dup(2)
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(kept, notes.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
