"""Training pairs: a noisy map, and the truth coarsened by the FSC of its half-map pair.

The method *gaussian* imitates the intermediates of a refinement without refining: the truth, rotationally
smeared as alignment errors smear it, plus coloured noise that is stronger inside the molecule, cut at a current
image size. The target is the truth times the half-maps' FSC (Kimanius et al. 2021, section 2.4).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from cryored.density import Atoms, check_fits, gaussian_transform, read_atoms
from cryored.errors import InputError
from cryored.fourier import forward, inverse, shell_index, shell_power, spatial_frequency
from cryored.fsc import nominal_resolution, shell_correlation
from cryored.mrc import write_volume
from cryored.star import Star, read_star, write_star
from cryored.volume import Floats, Volume, raised_cosine, soft_sphere

TABLE = "pairs"  # the block of pairs.star
_COPIES = 16  # rotated copies of each atom that make up a smeared map
_TRIES = 100  # orientations of a long molecule that are tried to fit the box
_SHIFT = 3.0  # angstrom by which the molecule leaves the centre, at most
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """One training pair.

    Parameters
    ----------
    noisy, target : (z, y, x) float32
        Unregularised map of one half; truth times `fsc`.
    fsc : (box // 2 + 1,) float64
        Of the two halves, shell by shell, 0 beyond the current image size.
    resolution : float
        Nominal resolution in angstrom (FSC 0.143).
    """

    noisy: Array
    target: Array
    fsc: Floats
    resolution: float


@dataclass(frozen=True)
class Draw:
    """What one draw of the method *gaussian* looks like.

    Parameters
    ----------
    shell : float
        Shell at which the expected FSC is `level`.
    level : float
    cut : int
        Radius of the current image size: nothing is known from this shell on.
    smear, blur : float
        Alignment errors: rms rotation in radian, standard deviation of the position in angstrom.
    slope : float
        The noise power grows with frequency to this power; 1 is white noise in evenly spread images.
    solvent : float
        Amplitude of the noise in the solvent, relative to the molecule.
    bfactor : float
        Decay of the truth's amplitudes in squared angstrom.
    """

    shell: float
    level: float
    cut: int
    smear: float
    blur: float
    slope: float
    solvent: float
    bfactor: float


def draw_map(box: int, angpix: float, *, rng: np.random.Generator) -> Draw:
    """Draw at random: four of five as later iterations of a refinement, one of five as its first.

    Later iterations have a nominal resolution between 1.1 times Nyquist and 18 A and alignment errors of about
    0.7 degrees for each angstrom, as measured in refinements of 600 particles; the first is cut where the FSC is
    still high, and its errors are those of the start.
    """
    nyquist = box // 2
    length = box * angpix
    if rng.random() < 0.2:
        shell = length / rng.uniform(7.0, 14.0)
        level, cut = rng.uniform(0.4, 0.97), int(shell) + 1
        smear = rng.uniform(3.0, 12.0)
    else:
        resolution = np.exp(rng.uniform(np.log(2.2 * angpix), np.log(18.0)))
        shell = length / resolution
        level, cut = 0.143, int(shell) + 1 + int(rng.integers(1, 12))
        smear = 0.7 * resolution * rng.uniform(0.0, 1.3)
    return Draw(
        shell=min(shell, nyquist - 1.0),
        level=level,
        cut=min(cut, nyquist),
        smear=np.deg2rad(min(smear, 15.0)),
        blur=rng.uniform(0.0, 0.12) * length / shell,
        slope=rng.uniform(0.3, 1.7),
        solvent=rng.uniform(0.3, 1.0),
        bfactor=rng.uniform(0.0, 90.0),
    )


def gaussian_pairs(atoms: Atoms, box: int, angpix: float, resolution: float, *, rng: np.random.Generator) -> list[Pair]:
    """Make both halves of one draw of the method *gaussian*.

    Parameters
    ----------
    atoms : Atoms
        Turned at random, so that no direction of the box is special.
    box : int
    angpix : float
        In angstrom.
    resolution : float
        Of the truth's Gaussians, see `gaussian_transform`.

    Returns
    -------
    list of two Pair
    """
    draw = draw_map(box, angpix, rng=rng)
    turned = _turned(atoms, box * angpix, rng)
    shape = (box, box, box)
    s = spatial_frequency(shape, angpix)
    decay = np.exp(-draw.bfactor / 4 * s**2)
    truth = gaussian_transform(turned, box, angpix, resolution) * decay
    decay = decay * np.exp(-2 * (np.pi * draw.blur * s) ** 2)
    halves = [gaussian_transform(_smeared(turned, draw.smear, rng), box, angpix, resolution) * decay for _ in range(2)]
    power = _noise_power(shell_power(halves[0], shape), draw)
    envelope = _envelope(inverse(truth, shape, 1), angpix, draw.solvent)
    maps = [inverse(half + _noise(envelope, power, rng), shape, 1) for half in halves]
    fsc = shell_correlation(maps[0], maps[1], threads=1)
    fsc[draw.cut :] = 0.0
    index = np.minimum(shell_index(shape), box // 2 + 1)
    inside = (index < draw.cut).astype(np.float32)
    weight = np.append(np.clip(fsc, 0.0, 1.0), 0.0).astype(np.float32)[index]
    target = inverse(truth * weight, shape, 1)
    nominal = nominal_resolution(np.arange(box // 2 + 1) / (box * angpix), fsc)
    return [Pair(inverse(forward(noisy, 1) * inside, shape, 1), target, fsc, nominal) for noisy in maps]


def _turned(atoms: Atoms, length: float, rng: np.random.Generator) -> Atoms:
    """Return the atoms turned and shifted at random; a long molecule is turned again until it is in the box."""
    for _ in range(_TRIES):
        turned = atoms.moved(Rotation.random(random_state=rng).as_matrix(), rng.uniform(-_SHIFT, _SHIFT, 3))
        if 2 * np.abs(turned.positions).max() < length:
            return turned
    raise InputError(f"no orientation of the molecule fits a box of {length:g} A; use a larger --box")


def _smeared(atoms: Atoms, smear: float, rng: np.random.Generator) -> Atoms:
    """Spread each atom over turned copies of itself, as errors of the angles do."""
    if smear == 0:
        return atoms
    vectors = rng.normal(scale=smear / np.sqrt(3), size=(_COPIES * len(atoms.weights), 3))
    positions = Rotation.from_rotvec(vectors).apply(np.repeat(atoms.positions, _COPIES, axis=0))
    return Atoms(positions, np.repeat(atoms.weights, _COPIES) / _COPIES)


def _noise_power(signal: Floats, draw: Draw) -> Floats:
    """Return the noise power of each shell that gives the draw's FSC where it asks for it."""
    smooth = np.exp(gaussian_filter1d(np.log(signal + 1e-12 * signal.max()), 1.5))
    at_shell = np.interp(draw.shell, np.arange(len(signal)), smooth)
    grown = (np.arange(len(signal)) / draw.shell) ** draw.slope
    return at_shell * (1 / draw.level - 1) * grown


def _noise(envelope: Array, power: Floats, rng: np.random.Generator) -> npt.NDArray[np.complex64]:
    """Return the transform of noise with the given envelope in real and power in Fourier space."""
    transform = forward(rng.standard_normal(envelope.shape, dtype=np.float32) * envelope, 1)
    mean = float(np.mean(envelope**2)) * envelope.size  # power of each coefficient before colouring
    amplitude = np.append(np.sqrt(power / mean), 0.0).astype(np.float32)
    index = np.minimum(shell_index(envelope.shape), len(power))
    return (transform * amplitude[index]).astype(np.complex64)


def _envelope(truth: Array, angpix: float, solvent: float) -> Array:
    """Return the noise's amplitude: 1 in the molecule, `solvent` around it, fading at the sphere's rim."""
    box = truth.shape[0]
    s = spatial_frequency((box, box, box), angpix)
    blurred = inverse(forward(truth, 1) * np.exp(-((12.0 * s) ** 2)), truth.shape, 1)
    level = 0.15 * np.percentile(blurred, 99.5)
    inside = 1 - raised_cosine(blurred / level)
    sphere = soft_sphere(truth.shape, 0.42 * box, 0.08 * box)
    return ((solvent + (1 - solvent) * inside) * sphere).astype(np.float32)


# --- files ---


@dataclass(frozen=True)
class PairRow:
    """One row of pairs.star, with paths that can be opened from the current folder."""

    noisy: str
    target: str
    structure: str
    half: int
    resolution: float
    fsc: Floats
    method: str
    seed: int


def write_pairs(path: Path, rows: Sequence[PairRow], *, made_by: str) -> None:
    """Write pairs.star; paths are stored relative to its folder."""

    def relative(name: str) -> str:
        return os.path.relpath(name, path.parent)

    columns: dict[str, list[object]] = {
        "cryoredNoisyMap": [relative(row.noisy) for row in rows],
        "cryoredTargetMap": [relative(row.target) for row in rows],
        "cryoredStructure": [row.structure for row in rows],
        "cryoredHalf": [row.half for row in rows],
        "cryoredNominalResolution": [float(row.resolution) for row in rows],
        "cryoredMethod": [row.method for row in rows],
        "cryoredSeed": [row.seed for row in rows],
        "cryoredFscCurve": [",".join(f"{value:.5f}" for value in row.fsc) for row in rows],
    }
    write_star(path, {"made": {"by": made_by}, TABLE: columns})


def read_pairs(path: str | os.PathLike[str]) -> list[PairRow]:
    """Read pairs.star; raise `InputError` for a missing column or a map that is not there."""
    star = read_star(path)
    folder = Path(path).parent

    def column(label: str) -> list[str]:
        return star.texts(TABLE, label)

    rows = [
        PairRow(noisy, target, structure, int(half), resolution, curve, method, int(seed))
        for noisy, target, structure, half, resolution, curve, method, seed in zip(
            [str(folder / name) for name in column("cryoredNoisyMap")],
            [str(folder / name) for name in column("cryoredTargetMap")],
            column("cryoredStructure"),
            column("cryoredHalf"),
            star.numbers(TABLE, "cryoredNominalResolution"),
            _curves(star),
            column("cryoredMethod"),
            column("cryoredSeed"),
            strict=True,
        )
    ]
    missing = [name for row in rows for name in (row.noisy, row.target) if not os.path.exists(name)]
    if missing:
        raise InputError(f"{star.name}: {len(missing)} maps of the table are missing, the first is {missing[0]}")
    return rows


def _curves(star: Star) -> list[Floats]:
    texts = star.texts(TABLE, "cryoredFscCurve")
    try:
        return [np.array(text.split(","), dtype=np.float64) for text in texts]
    except ValueError as error:
        raise InputError(f"{star.name}: _cryoredFscCurve: {error}") from None


def simulate_pairs_files(
    structures: Sequence[str],
    folder: str,
    *,
    number: int,
    box: int,
    angpix: float,
    resolution: float,
    seed: int,
    float16: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `number` draws (two pairs each) of every structure, and their pairs.star.

    The same seed gives the same bytes whatever `jobs` is: each structure has its own stream of random numbers.
    An interrupted run goes on where it stopped.
    """
    target = Path(folder)
    table = target / "pairs.star"
    if table.exists() and not overwrite:
        raise InputError(f"{table}: exists already; add --overwrite to replace it")
    names = [Path(path).name.split(".")[0] for path in structures]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise InputError(f"{twins[0]}: two structures of this name; their pairs would overwrite each other")
    target.mkdir(parents=True, exist_ok=True)
    work = partial(
        _structure_pairs,
        folder=target,
        number=number,
        box=box,
        angpix=angpix,
        resolution=resolution,
        seed=seed,
        float16=float16,
    )
    rows: list[PairRow] = []
    # Control-C reaches the whole group of processes: it is for this one to stop the others.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(jobs, signal.signal, ignore) as pool:
        for done, made in enumerate(pool.imap(work, structures), 1):
            rows += made
            progress(done, len(structures))
    write_pairs(table, rows, made_by=f"simulate pairs gaussian seed {seed} number {number}")
    for name in names:
        (target / f".{name}.star").unlink(missing_ok=True)
    return table


def _structure_pairs(
    path: str, *, folder: Path, number: int, box: int, angpix: float, resolution: float, seed: int, float16: bool
) -> list[PairRow]:
    """Make the pairs of one structure, unless an earlier run has left them with their table."""
    name = Path(path).name.split(".")[0]
    label = f"gaussian {name} seed {seed} number {number} box {box} angpix {angpix:g} resolution {resolution:g}"
    table = folder / f".{name}.star"
    made_by = f"{label} float16" if float16 else label
    if table.exists() and read_star(table).find_text("made", "by") == made_by:
        return read_pairs(table)
    atoms = read_atoms(path)
    check_fits(atoms, box, angpix, path)
    rows = []
    for count in range(number):
        # The name's bytes make the stream the structure's own, in whatever order structures are given.
        rng = np.random.default_rng([seed, count, *name.encode()])
        for half, pair in enumerate(gaussian_pairs(atoms, box, angpix, resolution, rng=rng), 1):
            stem = folder / f"{name}_{count:03d}_half{half}"
            noisy, target = f"{stem}_noisy.mrc", f"{stem}_target.mrc"
            # Densities in electrons per cubic angstrom are of order 1, which float16 holds well.
            write_volume(noisy, Volume(pair.noisy, angpix), label=f"simulate pairs {label}", float16=float16)
            write_volume(target, Volume(pair.target, angpix), label=f"simulate pairs {label}", float16=float16)
            rows.append(PairRow(noisy, target, name, half, pair.resolution, pair.fsc, "gaussian", seed))
    write_pairs(table, rows, made_by=made_by)
    return rows
