"""What a network's sigma is worth: measured against its errors on maps of known truth, for all its maps alike.

A network trained on the likelihood of its errors tells too large a sigma where density is high and too small a one in
the solvent. One curve puts both right: the sigma told against the sigma measured, on the network's own grey scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.prior.models import CARD, Model

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SigmaCurve:
    """The sigma that a network should have told against the one that it has.

    Straight lines of the logarithm of their ratio over that of the sigma told, constant beyond the ends.

    Parameters
    ----------
    told, measured : tuple of float
        Of a standardised map (`cryored.maps.network_scale.standard_of`); positive. What is told larger is not smaller.
    source : str
        Where they come from, for messages.
    """

    told: tuple[float, ...]
    measured: tuple[float, ...]
    source: str = field(default="sigma", compare=False)

    def __post_init__(self) -> None:
        """Refuse points that are no curve."""
        if not len(self.told) == len(self.measured) >= 2:
            raise InputError(f"{self.source}: as many told as measured expected, two at least")
        if not (0 < self.told[0] and self.told[-1] < np.inf and (np.diff(self.told) > 0).all()):
            raise InputError(f"{self.source}: told {list(self.told)}, expected increasing positive numbers")
        if not (0 < self.measured[0] and self.measured[-1] < np.inf and (np.diff(self.measured) >= 0).all()):
            raise InputError(
                f"{self.source}: measured {list(self.measured)}, expected positive numbers that don't fall"
            )

    def __call__(self, sigma: Array) -> Array:
        """Return the sigma that stands for one that was told; 0 stays 0."""
        told, measured = np.log(self.told), np.log(self.measured)
        place = np.log(np.maximum(sigma, np.finfo(np.float32).tiny))
        return (sigma * np.exp(np.interp(place, told, measured - told))).astype(np.float32)


def model_sigma(model: Model) -> SigmaCurve | None:
    """Return the curve in a model's card, None where it has none.

    Raises
    ------
    InputError
        What the card holds is no curve.
    """
    stored: Any = model.card.sigma
    if not stored:
        return None
    name = str(model.folder / CARD)
    try:
        lists = [tuple(map(float, stored[key])) for key in ("told", "measured")]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: no sigma ({error}); expected the lists told and measured") from error
    return SigmaCurve(lists[0], lists[1], name)
