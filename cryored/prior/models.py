"""Models on disk: ``NAME/model.keras`` and ``NAME/card.json``; finding, checking, loading, saving.

A name is looked up in the folders of CRYORED_MODEL_PATH (separated by colons), then among the models that came
with cryored. The card says what the weights are for and holds their checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryored.errors import ModelError
from cryored.files.output import whole_file, write_text
from cryored.files.share import share_folders

DEFAULT_MODEL = "cwred"
WEIGHTS = "model.keras"
_WIDEST, _DEEPEST = 256, 7  # a network of depth 8 sees tiles of 512 voxels at once
_MOST_KNOTS = 1024
CARD = "card.json"
PATH_VARIABLE = "CRYORED_MODEL_PATH"


@dataclass(frozen=True)
class ModelCard:
    """What a model is for.

    Parameters
    ----------
    name : str
    input : {"regularised", "unregularised"}
        The map that the network sees: filtered by its FSC (eq. 11 in the loop), or raw as in the paper.
    pixel_size : float
        Voxel size in angstrom that it was trained on; maps are resampled to it.
    width, depth : int
        See `cryored.prior.network.build_unet`.
    sha256 : str
        Of ``model.keras``.
    resolution_range : (float, float)
        Nominal resolutions in the training data, best and worst, in angstrom.
    training, evaluation : dict
        For people: data, command, time; errors on held-out structures.
    schedule : dict
        Lambda against nominal resolution as ``cryored lambda-schedule --fit`` found it for this model (see
        `cryored.prior.lambda_schedule.parse_schedule`); empty where none was fitted.
    weights : dict
        Precision and gain of its maps against the FSC, by the same command (see
        `cryored.prior.weights.parse_calibration`); empty where none were fitted: the update is then eq. 17.
    weights_masked : dict
        The same for refinements within a solvent mask, against the FSC corrected for it; empty: `weights` hold there.
    knots : int
        Numbers that tell the network how good the data are (`cryored.prior.network.condition`); 0: it sees the map
        alone.
    uncertainty : bool
        The network also tells the variance of what is left of the error.
    target : {"weighted", "truth"}
        What it was trained towards: the truth times the FSC, or the truth itself in all shells that the data determine.
    sigma : dict
        The sigma that it should tell against the one that it tells (see `cryored.prior.sigma.model_sigma`); empty where
        that was not measured.
    """

    name: str
    input: Literal["regularised", "unregularised"]
    pixel_size: float
    width: int
    depth: int
    sha256: str
    resolution_range: tuple[float, float]
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    weights_masked: dict[str, Any] = field(default_factory=dict)
    knots: int = 0
    uncertainty: bool = False
    target: Literal["weighted", "truth"] = "weighted"
    sigma: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model that was found and whose card was read; the weights are loaded by `load_network`."""

    folder: Path
    card: ModelCard

    @property
    def weights(self) -> Path:
        """The Keras file."""
        return self.folder / WEIGHTS


def model_folders() -> list[Path]:
    """Return the folders in which names are looked up, in order."""
    added = [Path(entry) for entry in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if entry]
    return [*added, *share_folders("models")]


def find_model(name_or_path: str) -> Model:
    """Find a model and read its card.

    Raises
    ------
    ModelError
        No model of that name (the message lists those there are), or a card that cannot be used.
    """
    folder = _find_folder(name_or_path)
    path = folder / CARD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["resolution_range"] = tuple(content["resolution_range"])
        card = ModelCard(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: no usable model card ({error}); train writes one") from error
    _check_card(card, path)
    return Model(folder, card)


def list_models() -> list[tuple[str, Model | ModelError]]:
    """Return all models in `model_folders` by name; in place of one whose card cannot be used, the reason."""
    found: dict[str, Model | ModelError] = {}
    for folder in model_folders():
        for path in sorted(folder.glob(f"*/{CARD}")):
            name = path.parent.name
            if name not in found:  # the first folder wins, as in `find_model`
                try:
                    found[name] = find_model(name)
                except ModelError as error:
                    found[name] = error
    return sorted(found.items())


def _check_card(card: ModelCard, path: Path) -> None:
    """Refuse a card whose fields are not what `ModelCard` says, naming field, found and expected."""

    def number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf

    def whole(value: object, most: int, least: int = 1) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    ends = card.resolution_range
    for name, good, expected in (
        ("name", isinstance(card.name, str) and bool(card.name), "a name"),
        ("input", card.input in ("regularised", "unregularised"), "'regularised' or 'unregularised'"),
        ("pixel_size", number(card.pixel_size), "a positive number of angstroms"),
        ("width", whole(card.width, _WIDEST), f"a whole number from 1 to {_WIDEST}"),
        ("depth", whole(card.depth, _DEEPEST), f"a whole number from 1 to {_DEEPEST}"),
        ("sha256", isinstance(card.sha256, str), "the checksum of the weights"),
        (
            "resolution_range",
            len(ends) == 2 and all(map(number, ends)) and ends[0] <= ends[1],
            "two positive numbers of angstroms, the better one first",
        ),
        *(
            (name, isinstance(getattr(card, name), dict), "an object")
            for name in ("training", "evaluation", "schedule", "weights", "weights_masked", "sigma")
        ),
        ("knots", whole(card.knots, _MOST_KNOTS, 0), f"a whole number from 0 to {_MOST_KNOTS}"),
        ("uncertainty", isinstance(card.uncertainty, bool), "true or false"),
        ("target", card.target in ("weighted", "truth"), "'weighted' or 'truth'"),
    ):
        if not good:
            raise ModelError(f"{path}: {name} is {getattr(card, name)!r}, expected {expected}")


def check_weights(model: Model) -> None:
    """Compare the weights with the card's checksum; raise `ModelError` if they differ."""
    try:
        found = _sha256(model.weights)
    except OSError as error:
        raise ModelError(f"{model.weights}: cannot be read: {error.strerror}") from error
    if found != model.card.sha256:
        raise ModelError(
            f"{model.weights}: sha256 {found[:12]}..., but its card says {model.card.sha256[:12]}...; "
            "the file is damaged or was replaced: install the model again"
        )


def check_uncertainty(model: Model) -> None:
    """Raise `ModelError` if the network does not tell how uncertain it is."""
    if not model.card.uncertainty:
        raise ModelError(
            f"{model.folder}: the model tells no uncertainty, expected one with uncertainty true in its {CARD}; take "
            "another with --model, or leave --uncertainty out"
        )


def load_network(model: Model) -> Any:
    """Check the weights and load the Keras network. The device must be set up before (`cryored.prior.device`).

    Raises
    ------
    ModelError
        The file cannot be loaded, or its inputs and outputs are not those of the card.
    """
    check_weights(model)
    import keras

    try:
        network = keras.saving.load_model(model.weights, compile=False, safe_mode=True)
    except (ValueError, OSError, TypeError) as error:
        raise ModelError(f"{model.weights}: no Keras model that can be loaded ({error})") from error
    _check_fit(model, network)
    # TensorFlow's own operations are faster than XLA's on a CPU, and need no minutes to be compiled. JAX has XLA alone:
    # it compiles the whole in half of the time that it needs for one operation after another.
    network.compile(jit_compile=keras.config.backend() == "jax")
    return network


def _check_fit(model: Model, network: Any) -> None:
    """Refuse a network whose inputs and outputs are not what the card says."""
    card = model.card
    found = [[tensor.shape[-1] for tensor in tensors] for tensors in (network.inputs, network.outputs)]
    expected = [[1, card.knots + 1] if card.knots else [1], [2 if card.uncertainty else 1]]
    if found != expected:
        raise ModelError(
            f"{model.weights}: a network with channels {found[0]} in and {found[1]} out, but by its card (knots "
            f"{card.knots}, uncertainty {str(card.uncertainty).lower()}) it has {expected[0]} and {expected[1]}; "
            "install the model again"
        )


def save_model(folder: Path, network: Any, card: ModelCard) -> Model:
    """Write weights and card whole; the card gets the checksum of what was written."""
    import keras

    folder.mkdir(parents=True, exist_ok=True)
    # A model of the same layers that was never compiled: without the optimiser's state, which is twice the weights.
    bare = keras.Model(network.input, network.output, name=network.name)
    with whole_file(folder / WEIGHTS) as partial:
        # Keras insists on the suffix.
        named = partial.with_suffix(".keras")
        try:
            bare.save(named)
            named.replace(partial)
        finally:
            named.unlink(missing_ok=True)
    card = dataclasses.replace(card, sha256=_sha256(folder / WEIGHTS))
    write_card(folder, card)
    return Model(folder, card)


def write_card(folder: Path, card: ModelCard) -> None:
    """Write a model's card whole."""
    write_text(folder / CARD, json.dumps(dataclasses.asdict(card), indent=2) + "\n")


def _find_folder(name_or_path: str) -> Path:
    direct = Path(name_or_path)
    if direct.parent != Path(".") or direct.is_absolute() or name_or_path.startswith("."):
        if (direct / CARD).is_file():
            return direct
        raise ModelError(f"{direct}: no model here, expected a folder with {WEIGHTS} and {CARD}")
    known = []
    for folder in model_folders():
        if (folder / name_or_path / CARD).is_file():
            return folder / name_or_path
        known += sorted(path.parent.name for path in folder.glob(f"*/{CARD}"))
    if (direct / CARD).is_file():  # a folder here, where no model is known by that name
        return direct
    names = ", ".join(dict.fromkeys(known)) or "none"
    raise ModelError(
        f"no model named '{name_or_path}'; there is: {names}. Give a folder as ./NAME or add folders to {PATH_VARIABLE}"
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
