"""How far a denoised map is believed, shell by shell: its calibrated precision and gain.

The update is the MAP estimate with the prior N(g f, v) in place of RELION's N(0, tau2), f the denoised map:

    x = (B + g f / v) / (K + 1 / v)

Eq. 17 of Kimanius et al. 2021 has v = tau2 and g = lambda: it believes f no more than the power of the signal. But
the variance of a prior is the power of its error, and that of f is smaller. As f was made from the very data that B
and K hold, v can't be derived: it is measured on maps of known truth, against the half-maps' FSC, which tells how
good the data of a shell are. So is g: a network that was trained on truth times FSC returns too little of it.

Within a solvent mask RELION's FSC is that of the mask, corrected for it. A map that has it is noisier than one that has
the same FSC in the whole box, and its denoised map is worse: such requests have weights of their own, measured within
the mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.prior.models import CARD, Model

Shells = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ShellWeights:
    """What the update takes of a denoised map in each shell.

    Parameters
    ----------
    precision : (shells,) float64
        tau2 / v: 1 stands for RELION's own prior.
    gain : (shells,) float64
        g; 0 with a precision of 1 is the MAP map.
    """

    precision: Shells
    gain: Shells


def published_weights(strength: Shells) -> ShellWeights:
    """Return the weights of eq. 17, `strength` being its lambda in each shell."""
    return ShellWeights(np.ones_like(strength), strength)


@dataclass(frozen=True)
class Calibration:
    """Precision and gain of a model's denoised maps against the FSC of the shell.

    Straight lines of their logarithms over the logit of the FSC, constant beyond the last point. Below the first,
    where there is little to calibrate on, both go linearly to 1 at an FSC of 0, trust and all: eq. 17 with lambda 1.

    Parameters
    ----------
    fsc : tuple of float
        Between 0 and 1, increasing.
    precision, gain : tuple of float
        At these; see `ShellWeights`. Precisions are 1 at least.
    trust : float
        Factor of the precision: what refinements showed to be best, where a single pass can't tell.
    source : str
        Where they come from, for logs.
    """

    fsc: tuple[float, ...]
    precision: tuple[float, ...]
    gain: tuple[float, ...]
    trust: float = 1.0
    source: str = field(default="calibration", compare=False)

    def __post_init__(self) -> None:
        """Refuse points that are no calibration."""
        if not len(self.fsc) == len(self.precision) == len(self.gain) >= 2:
            raise InputError(f"{self.source}: as many fsc as precision and gain expected, two at least")
        if not (0 < self.fsc[0] and self.fsc[-1] < 1 and (np.diff(self.fsc) > 0).all()):
            raise InputError(f"{self.source}: fsc {list(self.fsc)}, expected increasing values between 0 and 1")
        for name, values, least in (("precision", self.precision, 1.0), ("gain", self.gain, 1e-3)):
            if not all(least <= value < np.inf for value in values):
                raise InputError(f"{self.source}: {name} {list(values)}, expected numbers from {least:g} on")
        if not 0 <= self.trust < np.inf:
            raise InputError(f"{self.source}: trust {self.trust:g}, expected 0 or more")

    def __call__(self, fsc: Shells, strength: Shells, trust: float = 1.0, prior: Shells | float = 1.0) -> ShellWeights:
        """Return the weights of a request's shells.

        Parameters
        ----------
        fsc : (shells,) float64
            Of the half-maps.
        strength : (shells,) float64
            1: as calibrated; 0: the MAP map.
        trust : float
            Further factor of the precision, which never falls below 1.
        prior : (shells,) float64 or float
            Of how many of the request's inverse tau2 the precision is a multiple.
        """
        place = np.clip(fsc, self.fsc[0], self.fsc[-1])
        share = np.clip(fsc / self.fsc[0], 0.0, 1.0)

        def at(values: tuple[float, ...]) -> Shells:
            found: Shells = np.exp(np.interp(_logit(place), _logit(np.array(self.fsc)), np.log(values)))
            return found

        full = prior * (1 + share * (np.maximum(1.0, self.trust * trust * at(self.precision)) - 1))
        gain = 1 + share * (at(self.gain) - 1)
        precision = 1 + strength * (full - 1)
        return ShellWeights(precision, strength * full * gain / precision)


def _logit(fsc: Shells) -> Shells:
    return np.log(fsc / (1 - fsc))


def parse_calibration(content: Any, name: str) -> Calibration:
    """Return the calibration in a stored object: the lists ``fsc``, ``precision`` and ``gain``, and ``trust`` (1).

    Parameters
    ----------
    content : dict
        Other entries (`cryored.training.calibration`) are for people.
    name : str
        Its file, for messages and logs.

    Raises
    ------
    InputError
        The lists are missing or are no calibration.
    """
    try:
        lists = [tuple(map(float, content[key])) for key in ("fsc", "precision", "gain")]
        trust = float(content.get("trust", 1.0))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: no calibration ({error}); expected the lists fsc, precision and gain") from error
    return Calibration(lists[0], lists[1], lists[2], trust, name)


def model_calibration(model: Model, masked: bool = False) -> Calibration | None:
    """Return the calibration in a model's card, None where it has none.

    Parameters
    ----------
    model : Model
    masked : bool
        For an FSC within a solvent mask, corrected for it. A card without such weights has one calibration for all.
    """
    card, name = model.card, str(model.folder / CARD)
    if masked and card.weights_masked:
        return parse_calibration(card.weights_masked, f"{name}, weights_masked")
    return parse_calibration(card.weights, name) if card.weights else None
