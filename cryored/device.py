"""Sets up the network's back-end and its device: the only module that imports TensorFlow."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from cryored.errors import ModelError


def set_up(gpu: bool | None = None, threads: int | None = None) -> str:
    """Choose the device before the network is built, and return its name (``CPU`` or ``GPU:0 ...``).

    Parameters
    ----------
    gpu : bool, optional
        True insists on a GPU, False keeps off it; None takes one where there is one.
    threads : int, optional
        CPU threads of the network.

    Raises
    ------
    ModelError
        A GPU was insisted on and there is none.
    """
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        return backend
    os.environ["KERAS_BACKEND"] = backend
    with _hushed():
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    if gpu and not gpus:
        raise ModelError(
            "no GPU is visible to TensorFlow, and --gpu insists on one; check nvidia-smi and CUDA_VISIBLE_DEVICES, "
            "install cryored[gpu], or leave --gpu out"
        )
    try:
        if gpu is False:
            tf.config.set_visible_devices([], "GPU")
            gpus = []
        for device in gpus:
            # Take memory as it is needed: RELION shares the card.
            tf.config.experimental.set_memory_growth(device, True)
        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError:
        pass  # TensorFlow runs already in this process: its devices are as the first call left them
    if not gpus:
        return "CPU"
    return f"GPU {tf.config.experimental.get_device_details(gpus[0]).get('device_name', '')}".strip()


def set_seed(seed: int) -> None:
    """Seed what the network draws at random. Keras imports TensorFlow for that, if it is there, for any back-end."""
    with _hushed():
        import keras

        keras.utils.set_random_seed(seed)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep TensorFlow's start-up notes, which it writes past Python, from standard error; show them if it fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
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
