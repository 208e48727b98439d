"""What real maps have and density made of atoms has not: each feature drawn at random, for training.

- B factors that vary along the chain: flexible loops and ends are weaker than the core.
- A domain that moves: part of the molecule, averaged over a range of small turns about a hinge.
- Blurred density outside the model: glycans on the surface, a micelle or nanodisc around a belt.
- The contrast of the solvent, which weakens the lowest resolutions (Jiang & Brunger 1994, J Mol Biol 243, 100-115).
- A fall-off of the amplitudes as a whole.
- Views that prefer or avoid an axis, up to a cone of the transform that nobody has seen.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from cryored.maps.fourier import forward, inverse, spatial_frequency
from cryored.reconstruction.projection import EVEN, Views
from cryored.simulation.density import gaussian_transform
from cryored.simulation.pair_table import Array
from cryored.simulation.structure import Atoms

logger = logging.getLogger(__name__)

_CLASSES = 4  # of B factors that are told apart
_COPIES = 5  # of a domain that moves
_TRIES = 20  # for each glycan
_SMOOTH = 12.0  # angstrom over which B factors are alike

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """One draw.

    Parameters
    ----------
    bfactor, spread : float
        Decay of all amplitudes, and how far that of the atoms varies, in squared angstrom: a quarter of them each has
        0, 0.5, 1.2 and 3 times the spread.
    motion : float
        Largest turn of a domain in degrees; 0: rigid.
    blobs : int
        Glycans.
    belt : float
        Density of a micelle's belt over the molecule's mean; 0: none.
    solvent, solvent_bfactor : float
        The transform is multiplied by ``1 - solvent exp(-solvent_bfactor s**2 / 4)``.
    """

    bfactor: float = 0.0
    spread: float = 0.0
    motion: float = 0.0
    blobs: int = 0
    belt: float = 0.0
    solvent: float = 0.0
    solvent_bfactor: float = 400.0


def draw_features(*, rng: np.random.Generator) -> Features:
    """Draw: a third of the maps has nothing but a fall-off, the others have some of the features."""
    if rng.random() < 1 / 3:
        return Features(bfactor=float(rng.uniform(0, 60)))
    return Features(
        bfactor=float(rng.uniform(0, 100)),
        spread=float(rng.uniform(20, 80)) if rng.random() < 0.6 else 0.0,
        motion=float(rng.uniform(2, 12)) if rng.random() < 0.3 else 0.0,
        blobs=int(rng.integers(2, 12)) if rng.random() < 0.25 else 0,
        belt=float(rng.uniform(0.3, 0.9)) if rng.random() < 0.15 else 0.0,
        solvent=float(rng.uniform(0.1, 0.7)) if rng.random() < 0.5 else 0.0,
        solvent_bfactor=float(rng.uniform(150, 900)),
    )


def draw_views(*, rng: np.random.Generator) -> Views:
    """Draw: half of the data sets see all sides alike, the others prefer or avoid an axis, some leave a cone out."""
    if rng.random() < 0.5:
        return EVEN
    return Views(
        unevenness=float(rng.uniform(-4, 4)), missing_cone=float(rng.uniform(5, 35)) if rng.random() < 0.3 else 0.0
    )


def featured_map(
    atoms: Atoms, box: int, angpix: float, resolution: float, features: Features, *, rng: np.random.Generator
) -> Array:
    """Return the density of atoms with some features, (box, box, box) float32, in electrons per cubic angstrom.

    Parameters
    ----------
    atoms : Atoms
        In the box already.
    box : int
    angpix, resolution : float
        See `cryored.simulation.density.gaussian_transform`.
    features : Features
    """
    shape = (box, box, box)
    s = spatial_frequency(shape, angpix)
    decays = _decays(atoms, features.spread, rng)
    moved = _moved(atoms, features.motion, rng) if features.motion else atoms
    copies = len(moved.weights) // len(atoms.weights) if features.motion else 1
    bfactors = np.tile(decays, copies)
    transform = np.zeros((box, box, box // 2 + 1), dtype=np.complex64)
    for bfactor in np.unique(bfactors):
        chosen = bfactors == bfactor
        part = Atoms(moved.positions[chosen], moved.weights[chosen])
        transform += gaussian_transform(part, box, angpix, resolution) * np.exp(np.float32(-bfactor / 4) * s**2)
    if features.blobs or features.belt:
        transform += forward(_surroundings(inverse(transform, shape, 1), atoms, angpix, features, rng), 1)
    factor = np.exp(-features.bfactor / 4 * s**2)
    factor *= 1 - features.solvent * np.exp(-features.solvent_bfactor / 4 * s**2)
    return inverse((transform * (factor / angpix**3)).astype(np.complex64), shape, 1).astype(np.float32)


def _decays(atoms: Atoms, spread: float, rng: np.random.Generator) -> Doubles:
    """Return a B factor for each atom, of a few classes, alike among neighbours and larger outside."""
    if spread == 0:
        return np.zeros(len(atoms.weights))
    waves = rng.standard_normal((12, 3)) / _SMOOTH
    field = np.cos(atoms.positions @ waves.T + rng.uniform(0, 2 * np.pi, 12)).sum(axis=1) / np.sqrt(6)
    distance = np.linalg.norm(atoms.positions - atoms.positions.mean(axis=0), axis=1)
    value = field + 2 * distance / max(distance.max(), 1.0)
    rank = np.argsort(np.argsort(value)) / len(value)
    levels = np.array([0.0, 0.5, 1.2, 3.0]) * spread
    return levels[np.minimum((rank * _CLASSES).astype(int), _CLASSES - 1)]


def _moved(atoms: Atoms, degrees: float, rng: np.random.Generator) -> Atoms:
    """Turn the part beyond a random plane about a hinge in it, over a range; each copy has its share."""
    axis = rng.standard_normal(3)
    axis /= np.linalg.norm(axis)
    along = atoms.positions @ axis
    start = np.quantile(along, rng.uniform(0.55, 0.8))
    domain = along > start
    hinge = atoms.positions[np.abs(along - start) < 4.0].mean(axis=0)
    about = np.cross(axis, rng.standard_normal(3))
    about /= np.linalg.norm(about)
    copies = []
    for angle in np.linspace(-degrees, degrees, _COPIES):
        turn = Rotation.from_rotvec(np.deg2rad(angle) * about)
        positions = atoms.positions.copy()
        positions[domain] = turn.apply(positions[domain] - hinge) + hinge
        copies.append(positions)
    return Atoms(np.concatenate(copies), np.tile(atoms.weights, _COPIES) / _COPIES)


def _surroundings(density: Array, atoms: Atoms, angpix: float, features: Features, rng: np.random.Generator) -> Array:
    """Return the density of glycans and of a belt around the molecule."""
    box = len(density)
    axis = (np.arange(box) - box // 2) * angpix
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    inside = density > 0.1 * np.percentile(density, 99.5)
    level = float(density[inside].mean()) if inside.any() else 0.0
    added = np.zeros_like(density)
    centre = atoms.positions.mean(axis=0)
    placed = 0
    for _ in range(_TRIES * features.blobs):
        if placed == features.blobs:
            break
        start = atoms.positions[rng.integers(len(atoms.positions))]
        outwards = (start - centre) / max(np.linalg.norm(start - centre), 1.0)
        reach = ((atoms.positions - centre) @ outwards).max()
        place = start + outwards * max(0.0, reach - (start - centre) @ outwards) * rng.uniform(0.7, 1.0) + 4 * outwards
        if np.abs(place).max() > box * angpix / 2 - 12:
            continue  # it would not fit the box
        placed += 1
        width = rng.uniform(3.0, 6.0)
        square = (x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2
        added += level * rng.uniform(0.3, 1.0) * np.exp(-square / (2 * width**2))
    if placed < features.blobs:
        logger.info("room for %d of %d glycans; a larger box has more", placed, features.blobs)
    if features.belt:
        normal = rng.standard_normal(3)
        normal /= np.linalg.norm(normal)
        from_centre = x - centre[0], y - centre[1], z - centre[2]
        along = sum(one * n for one, n in zip(from_centre, normal, strict=True))
        radius = np.sqrt(np.maximum(sum(one**2 for one in from_centre) - along**2, 0))
        height = along - rng.uniform(-15, 15)
        width = np.linalg.norm(atoms.positions - centre, axis=1).mean() + rng.uniform(8, 18)
        belt = 1 / (1 + np.exp((np.abs(height) - rng.uniform(12, 18)) / 3)) / (1 + np.exp((radius - width) / 3))
        added += level * features.belt * belt * ~inside
    smooth = np.exp(-((4.0 * spatial_frequency(density.shape, angpix)) ** 2))
    return inverse((forward(added.astype(np.float32), 1) * smooth).astype(np.complex64), density.shape, 1)
