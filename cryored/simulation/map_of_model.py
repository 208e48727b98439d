"""An atomic model to a map file: what ``cryored simulate map`` does."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import numpy as np

from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.files.output import check_outputs, check_target
from cryored.maps.volume import Volume, window
from cryored.simulation.density import check_scattering, gaussian_map, potential_map
from cryored.simulation.features import Features, featured_map
from cryored.simulation.structure import Atoms, box_for, check_fits, read_atoms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MapOptions:
    """How a map is made of an atomic model.

    Parameters
    ----------
    box, angpix, resolution
        See `gaussian_transform` and `potential_transform`.
    method : {"gaussian", "potential"}
    chains, assembly, waters, hydrogens
        What of the structure to take, see `read_atoms`.
    like : str, optional
        MRC file: the map gets its box, voxel size, origin and nstart, and the atoms stay where they are in its frame.
    features : Features
        What real maps have besides; of the method gaussian.
    seed : int
        Of where they are.
    centre : bool
        Move the molecule's centre of mass to the centre of the box; else its coordinates count from the first voxel,
        as those of deposited models do. Without a meaning with `like`.
    overwrite : bool
        Whether an existing output may be replaced.
    """

    box: int = 96
    angpix: float = 1.5
    resolution: float = 3.0
    method: str = "gaussian"
    chains: tuple[str, ...] = ()
    assembly: str | None = None
    waters: bool = False
    hydrogens: bool = False
    like: str | None = None
    centre: bool = True
    features: Features = Features()
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse features that the method cannot have."""
        if self.method != "gaussian" and self.features != Features():
            raise InputError(f"method {self.method}: features of real maps are for the method gaussian")

    def density(self, atoms: Atoms, box: int, angpix: float) -> Volume:
        """Return the map of atoms in a box."""
        if self.method == "potential":
            return potential_map(atoms, box, angpix, self.resolution)
        if self.features == Features():
            return gaussian_map(atoms, box, angpix, self.resolution)
        rng = np.random.default_rng(self.seed)
        return Volume(featured_map(atoms, box, angpix, self.resolution, self.features, rng=rng), angpix)


def simulate_map_file(structure: str, output: str, options: MapOptions) -> None:
    """Write the density of an atomic model as a map.

    Parameters
    ----------
    structure, output : str
        PDB or mmCIF file; MRC file or "-".
    options : MapOptions

    Raises
    ------
    InputError
        A structure that cannot be used or does not fit the box.
    OutputError
        The map cannot be written.
    """
    check_outputs((output,), (structure, options.like))
    check_target(output, options.overwrite)
    centre = options.centre and options.like is None
    atoms = read_atoms(
        structure,
        options.chains,
        assembly=options.assembly,
        waters=options.waters,
        hydrogens=options.hydrogens,
        centre=centre,
    )
    extent = np.ptp(atoms.positions, axis=0)
    mass = atoms.masses.sum() / 1000
    logger.info("%s: %d atoms, %.1f kDa, %.0f x %.0f x %.0f A", structure, len(atoms.weights), mass, *extent)
    if options.method == "potential":
        check_scattering(atoms, structure)
    volume = _like(atoms, structure, options) if options.like is not None else _boxed(atoms, structure, options)
    label = f"simulate map {options.method} {options.resolution:g} A {os.path.basename(structure)}"
    write_volume(output, volume, label=label)


def _boxed(atoms: Atoms, name: str, options: MapOptions) -> Volume:
    if not options.centre:
        # From the first voxel instead of the centre.
        atoms = atoms.moved(np.eye(3), -float(options.box // 2) * options.angpix)
    check_fits(atoms, options.box, options.angpix, name)
    return options.density(atoms, options.box, options.angpix)


def _like(atoms: Atoms, name: str, options: MapOptions) -> Volume:
    """Return the map on the grid of another; atoms beyond its faces are left out."""
    grid = read_volume(str(options.like))
    if grid.voxel_size <= 0:
        raise InputError(f"{options.like}: pixel size 0 (unknown) in the header, expected angstrom")
    # ORIGIN is the place of the first voxel where it is set, else NSTART is.
    start = np.array(grid.origin if any(grid.origin) else np.multiply(grid.nstart, grid.voxel_size))
    edges = np.array(grid.shape[::-1])
    atoms = atoms.moved(np.eye(3), -(start + edges // 2 * grid.voxel_size))
    outside = int(np.any(np.abs(atoms.positions) > edges / 2 * grid.voxel_size, axis=1).sum())
    if outside == len(atoms.positions):
        raise InputError(
            f"{name}: all atoms lie outside {options.like}, expected the model in the map's frame; leave --like out to "
            "centre it"
        )
    if outside:
        logger.warning("%s: %d of %d atoms lie outside %s", name, outside, len(atoms.positions), options.like)
    box = max(int(edges.max()) + int(edges.max()) % 2, box_for(atoms, grid.voxel_size))
    made = options.density(atoms, box, grid.voxel_size)
    return grid.with_data(window(made.data, grid.shape))
