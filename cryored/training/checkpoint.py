"""All that a training needs to go on, in one file: the network, its optimiser, and what is to be told of both."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.errors import ModelError
from cryored.files.output import whole_file

Arrays = Sequence[npt.NDArray[Any]]

NETWORK, OPTIMIZER = "network", "optimizer"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Parameters
    ----------
    about : dict
        As it was given to `write_checkpoint`.
    groups : dict of str to list of ndarray
        The network's weights, the optimiser's variables, and further groups, by name.
    """

    about: dict[str, Any]
    groups: dict[str, list[npt.NDArray[Any]]]

    def restore(self, network: Any) -> None:
        """Give a network that is compiled for training its weights and its optimiser's state."""
        network.set_weights(self.groups[NETWORK])
        for variable, array in zip(network.optimizer.variables, self.groups[OPTIMIZER], strict=True):
            variable.assign(array)


def write_checkpoint(path: Path, network: Any, about: Mapping[str, Any], **more: Arrays) -> None:
    """Write a network that is trained, whole: what is there stays if the disk is full.

    Parameters
    ----------
    path : Path
    network
    about : mapping
        Numbers and words, as JSON takes them.
    more : sequence of ndarray
        Further groups of arrays by name, without digits.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    groups: dict[str, Arrays] = {
        NETWORK: network.get_weights(),
        OPTIMIZER: [variable.numpy() for variable in network.optimizer.variables],
        **more,
    }
    arrays: dict[str, Any] = {f"{name}{i}": array for name, group in groups.items() for i, array in enumerate(group)}
    with whole_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, about=json.dumps(about), **arrays)


def read_checkpoint(path: Path, *more: str) -> Checkpoint:
    """Read what `write_checkpoint` wrote; groups that are not there are empty.

    Raises
    ------
    ModelError
        The file is missing or damaged.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as content:
            about = json.loads(str(content["about"]))
            groups = {
                name: [content[f"{name}{i}"] for i in range(sum(key.rstrip("0123456789") == name for key in content))]
                for name in (NETWORK, OPTIMIZER, *more)
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path}: no checkpoint that can be read ({error}); remove it to begin anew") from error
    return Checkpoint(about, groups)
