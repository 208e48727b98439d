"""What a network takes, memory by its tiles and time: measured once, for what is told beforehand.

With TensorFlow on two cores with AVX2 and, for a GPU, PyTorch on an H200 (docs/results.md). Other engines and machines
differ: take the times as an order of magnitude.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from cryored.prior.models import ModelCard
from cryored.threads import default_threads

ENGINE = 750 << 20  # bytes of Python with TensorFlow and a network, before the first map
_TILE = 34  # bytes for each voxel of a tile and feature of the first level
_MAP = 50  # bytes for each voxel of a map at the model's pixel size
_CPU = 5.0e-8  # core seconds for each voxel of the tiles and feature of the first level
_GPU = 2.5e-9


def network_memory(card: ModelCard, shape: tuple[int, ...], tile: int, maps: int = 1) -> int:
    """Return the bytes that maps take in the network at once, beyond `ENGINE`.

    Parameters
    ----------
    card : ModelCard
    shape : (int, int, int)
        Of a map at the model's pixel size.
    tile : int
        Edge of the tiles.
    maps : int
        In one call.
    """
    multiple = 2**card.depth  # what the network sees is filled up to
    in_tile = math.prod(-(-min(tile, n) // multiple) * multiple for n in shape)
    return maps * (_TILE * card.width * in_tile + _MAP * math.prod(shape))


def network_seconds(card: ModelCard, voxels: int, *, gpu: bool, threads: int | None = None) -> float:
    """Return about how long tiles of so many voxels take, all together."""
    if gpu:
        return _GPU * card.width * voxels
    return _CPU * card.width * voxels / (threads or default_threads())


def memory_in_use() -> int:
    """Return the bytes that this process holds for itself, mapped files not counted; 0 where nothing tells."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
