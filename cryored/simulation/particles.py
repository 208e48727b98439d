"""Stacks of simulated particles, with the STAR files that RELION 3.1 and later refine them from."""

from __future__ import annotations

import glob
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cryored.errors import InputError
from cryored.files.belonging import warn_of_level
from cryored.files.mrc import Stack, new_stack, read_volume, write_volume
from cryored.files.output import check_outputs, check_target, is_stream
from cryored.files.star import Column, Table, write_star
from cryored.maps.fourier import low_pass
from cryored.maps.volume import Volume
from cryored.reconstruction.projection import (
    EVEN,
    Doubles,
    Projector,
    Singles,
    Views,
    ctf,
    euler_angles,
    images,
    perturb,
    shift_phases,
)
from cryored.simulation.noise import WHITE, draw_noise, noise_filter, read_spectrum
from cryored.threads import parallel, parts

logger = logging.getLogger(__name__)

_CHUNK_PIXELS = 2**20  # pixels in memory at a time: about 0.1 GB in all
_RUN = 16  # images that a thread takes at a time


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Microscope:
    """The optics of a data set.

    Parameters
    ----------
    voltage : float
        Acceleration voltage in kilovolt.
    cs : float
        Spherical aberration in millimetre.
    amplitude_contrast : float
        Fraction of amplitude contrast.
    """

    voltage: float = 300.0
    cs: float = 2.7
    amplitude_contrast: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what no microscope has."""
        if not (0 < self.voltage < math.inf and 0 <= self.cs < math.inf and 0 <= self.amplitude_contrast <= 1):
            raise InputError(
                f"a microscope of {self.voltage:g} kV, Cs {self.cs:g} mm and amplitude contrast "
                f"{self.amplitude_contrast:g}, expected more than 0, 0 or more, and 0 to 1"
            )


@dataclass(frozen=True)
class Particles:
    """What RELION knows of each of n particles.

    Parameters
    ----------
    rotations : (n, 3, 3) float64
        RELION's matrices (see `cryored.reconstruction.projection`).
    origins : (n, 2) float64
        x and y in pixels by which an image has to be moved to centre its particle.
    defocus : (n,) float64, optional
        Underfocus in angstrom, without astigmatism; None where no contrast transfer function is applied.
    """

    rotations: Doubles
    origins: Doubles
    defocus: Doubles | None

    def part(self, part: slice) -> Particles:
        """Return some of the particles."""
        defocus = None if self.defocus is None else self.defocus[part]
        return Particles(self.rotations[part], self.origins[part], defocus)


@dataclass(frozen=True)
class Simulation:
    """What a simulation wrote, and the factor by which the map was multiplied for unit noise."""

    stack: Path
    star: Path
    truth: Path
    reference: Path
    scale: float


def draw_particles(
    number: int,
    *,
    shift: float,
    defocus_range: tuple[float, float] | None,
    views: Views = EVEN,
    rng: np.random.Generator,
) -> Particles:
    """Draw orientations, normal shifts and uniform defocus.

    Parameters
    ----------
    number : int
    shift : float
        Standard deviation of x and of y, in pixels.
    defocus_range : (float, float), optional
        Least and largest underfocus in angstrom.
    views : Views
        Uniform on SO(3) by default.
    """
    rotations = views.draw(number, rng=rng)
    origins = shift * rng.standard_normal((number, 2))
    defocus = None if defocus_range is None else rng.uniform(*defocus_range, size=number)
    return Particles(rotations, origins, defocus)


def clean_images(
    projector: Projector,
    particles: Particles,
    voxel_size: float,
    microscope: Microscope,
    threads: int | None = None,
) -> Singles:
    """Return noise-free images (m, n, n) float32: projected, moved off centre, CTF applied."""
    result = np.empty((len(particles.rotations), projector.box, projector.box), dtype=np.float32)

    def make(part: slice) -> None:
        some = particles.part(part)
        slices = projector.slices(some.rotations)
        if some.origins.any():
            # The origin is what brings the particle back, so it lies at minus that.
            slices *= shift_phases(projector.box, -some.origins[:, 0], -some.origins[:, 1])
        if some.defocus is not None:
            slices *= ctf(
                projector.box,
                voxel_size,
                some.defocus,
                some.defocus,
                0.0,
                microscope.voltage,
                microscope.cs,
                microscope.amplitude_contrast,
            )
        result[part] = images(slices, projector.box, threads=1)

    parallel(make, parts(len(result), _RUN), threads)
    return result


def add_noise(
    data: Singles,
    streams: Sequence[np.random.Generator],
    colour: Singles | None = None,
    threads: int | None = None,
) -> None:
    """Add noise of variance 1 to images (m, n, n) in place; see `cryored.simulation.noise.draw_noise`."""

    def add(part: slice) -> None:
        data[part] += draw_noise(streams[part], data.shape[-1], colour)

    parallel(add, parts(len(data), _RUN), threads)


@dataclass(frozen=True)
class ParticleOptions:
    """What is simulated.

    Parameters
    ----------
    number : int
        Number of particles.
    snr : float
        Signal-to-noise ratio: the variance over the pixels of a noise-free image (CTF applied), averaged
        over all images, divided by the variance of the noise. The map is multiplied by what it takes. With
        infinity the images are without noise and the map is as it is.
    scale : float, optional
        Multiply the map by this instead, whatever the signal-to-noise ratio becomes.
    noise : path
        ``white``, or a ``_model.star`` of RELION: noise of the power spectrum that is measured there (see
        `cryored.simulation.noise`).
    apply_ctf : bool
        Whether the images carry a contrast transfer function; without, the STAR files have no defocus.
    defocus_range : (float, float)
        Least and largest underfocus in micrometre; uniform in between, no astigmatism.
    microscope : Microscope
        The STAR files need it with or without CTF.
    views : Views
        From where they are seen; an axis that is not given is drawn.
    shift : float
        Standard deviation, in pixels, of the particles' x and y about the centre of the image.
    perturb_angles : float
        Root mean square angle in degrees from the true to the start orientation (see
        `cryored.reconstruction.projection.perturb`).
    ini_high : float
        Resolution of the reference in angstrom.
    angpix : float, optional
        Pixel size in angstrom, instead of the map's.
    seed : int
        The same seed gives the same bytes, whatever the number of threads: each image has a random stream of
        its own for its noise. `perturb_angles` changes no image, and `snr` and `noise` no orientation.
    threads : int, optional
        All cores by default.
    overwrite : bool
        Whether existing outputs may be replaced.

    Raises
    ------
    InputError
        A value makes no sense.
    """

    number: int = 10000
    snr: float = 0.002
    scale: float | None = None
    noise: str | os.PathLike[str] = WHITE
    apply_ctf: bool = True
    defocus_range: tuple[float, float] = (0.2, 2.0)
    microscope: Microscope = field(default_factory=Microscope)
    views: Views = EVEN
    shift: float = 0.0
    perturb_angles: float = 0.0
    ini_high: float = 30.0
    angpix: float | None = None
    seed: int = 0
    threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        if self.number < 1:
            raise InputError(f"{self.number} particles, expected at least 1")
        if not self.snr > 0:
            raise InputError(f"signal-to-noise ratio {self.snr:g}, expected more than 0; 'inf' stands for no noise")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise InputError(f"scale {self.scale:g}, expected a number above 0")
        low, high = self.defocus_range
        if not 0 <= low <= high < math.inf:
            raise InputError(f"defocus from {low:g} to {high:g} micrometre, expected a range from 0 upwards")
        if not (0 <= self.shift < math.inf and 0 <= self.perturb_angles <= 180):
            raise InputError(
                f"shift of {self.shift:g} pixels and angles perturbed by {self.perturb_angles:g} degrees, "
                "expected 0 or more, and no angle above 180"
            )
        if not self.ini_high > 0:
            raise InputError(f"reference at {self.ini_high:g} A, expected a resolution above 0")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}, expected 0 or more")
        if self.is_coloured and not self.is_noisy:
            name = os.fspath(self.noise)
            raise InputError(f"{name}: a spectrum of noise, but the signal-to-noise ratio is infinite")

    @property
    def is_noisy(self) -> bool:
        """Whether there is any noise."""
        return self.scale is not None or math.isfinite(self.snr)

    @property
    def is_coloured(self) -> bool:
        """Whether the noise has a measured spectrum."""
        return os.fspath(self.noise) != WHITE

    @property
    def label(self) -> str:
        """What the stack's header tells."""
        strength = f"snr={self.snr:g}" if self.scale is None else f"scale={self.scale:g}"
        noise = f" noise={os.path.basename(self.noise)}" if self.is_coloured else ""
        return f"simulate particles number={self.number} seed={self.seed} {strength}{noise}"


def simulate_particles_file(
    map_path: str | os.PathLike[str],
    stem: str | os.PathLike[str],
    options: ParticleOptions = ParticleOptions(),
    *,
    progress: Progress = lambda done, total: None,
) -> Simulation:
    """Simulate particles of a map, with noise of variance 1 as RELION wants it.

    Written are STEM.mrcs (the images), STEM.star (start angles, no shifts), STEM_truth.star (the angles and
    shifts that the images were made with) and STEM_reference.mrc (the map on the images' grey scale, low-pass
    filtered). The STAR files name the stack as `stem` does: from the current folder, RELION's project.

    Parameters
    ----------
    map_path : path
        A cubic map with an even box, as RELION wants; ``-`` for standard input.
    stem : path
        The outputs' names up to the ending.
    options : ParticleOptions
    progress : callable
        Is told how many images are made, and of how many.

    Raises
    ------
    InputError
        The map does not fit, or the noise cannot be used.
    OutputError
        An output exists or cannot be written. The stack appears last, so with it the data set is whole.
    """
    outputs = _outputs(stem)
    check_outputs(outputs, (map_path, options.noise))
    for path in outputs:
        check_target(path, options.overwrite)
    stack_path, star_path, truth_path, reference_path = outputs
    name = "standard input" if is_stream(map_path) else os.fspath(map_path)
    volume = read_volume(map_path, angpix=options.angpix)
    _check_map(name, volume)
    if options.scale is None and options.is_noisy:
        warn_of_level(name, volume, "0, as the signal is all that is projected")
    box, voxel_size = len(volume.data), volume.voxel_size
    colour = noise_filter(read_spectrum(options.noise), box, voxel_size) if options.is_coloured else None

    draw, disturb, noise_seeds = np.random.SeedSequence(options.seed).spawn(3)
    low, high = options.defocus_range
    angstrom = (1e4 * low, 1e4 * high) if options.apply_ctf else None
    truth = draw_particles(
        options.number,
        shift=options.shift,
        defocus_range=angstrom,
        views=options.views,
        rng=np.random.default_rng(draw),
    )
    rotations = perturb(truth.rotations, options.perturb_angles, rng=np.random.default_rng(disturb))
    start = Particles(rotations, np.zeros_like(truth.origins), truth.defocus)

    for path in outputs:
        _remove_leftovers(path)
    with new_stack(stack_path, options.number, box, voxel_size, label=options.label) as stack:
        scale = _write_images(stack, volume, name, truth, options, colour, noise_seeds, progress)
        optics = _optics(box, voxel_size, options.microscope)
        for path, particles in ((star_path, start), (truth_path, truth)):
            table = _table(particles, os.fspath(stack_path), voxel_size)
            write_star(path, {"optics": optics, "particles": table})
        reference = volume.with_data(scale * low_pass(volume.data, voxel_size, options.ini_high, options.threads))
        label = f"simulate particles reference {options.ini_high:g} A x {scale:.6g}"
        write_volume(reference_path, reference, label=label)
    logger.info("%d particles of box %d; the map times %.6g", options.number, box, scale)
    return Simulation(stack_path, star_path, truth_path, reference_path, scale)


def _write_images(
    stack: Stack,
    volume: Volume,
    name: str,
    truth: Particles,
    options: ParticleOptions,
    colour: npt.NDArray[np.float32] | None,
    seeds: np.random.SeedSequence,
    progress: Progress,
) -> float:
    """Fill a stack; return what the map was multiplied by."""
    number, scale = options.number, options.scale
    chunks = list(parts(number, max(1, _CHUNK_PIXELS // len(volume.data) ** 2)))
    projector = Projector(volume.data, threads=options.threads)
    variance = 0.0
    for chunk in chunks:
        clean = clean_images(projector, truth.part(chunk), volume.voxel_size, options.microscope, options.threads)
        variance += float(clean.var(axis=(1, 2), dtype=np.float64).sum()) / number
        stack.write(chunk.start, clean)
        progress(chunk.stop, number)
    if scale is None:
        scale = _scale(options.snr, variance, name)
    if options.is_noisy:  # in a second pass, as the scale depends on all images
        for chunk in chunks:
            own = seeds.spawn(chunk.stop - chunk.start)  # of one image after the other
            data = stack.read(chunk.start, len(own))
            data *= np.float32(scale)
            add_noise(data, [np.random.default_rng(seed) for seed in own], colour, options.threads)
            stack.write(chunk.start, data)
    return scale


def _outputs(stem: str | os.PathLike[str]) -> tuple[Path, Path, Path, Path]:
    """Return the names of stack, start STAR, true STAR and reference."""
    name = os.fspath(stem)
    if not os.path.basename(name).strip("-") or any(character.isspace() for character in name):
        raise InputError(f"'{name}': RELION cannot read such a name, expected a stem without spaces")
    stack, start, truth, reference = (
        Path(name + ending) for ending in (".mrcs", ".star", "_truth.star", "_reference.mrc")
    )
    return stack, start, truth, reference


def _check_map(name: str, volume: Volume) -> None:
    found = " x ".join(map(str, volume.shape))
    if len(set(volume.shape)) != 1:
        raise InputError(f"{name}: a map of {found} voxels (z, y, x), expected a cube; pad or crop it first")
    if len(volume.data) % 2:
        raise InputError(f"{name}: a map of {found} voxels, RELION expects an even box; pad or crop it first")
    if volume.voxel_size <= 0:
        raise InputError(f"{name}: the header has no voxel size; give it with --angpix")


def _scale(snr: float, variance: float, name: str) -> float:
    """Return the factor that gives images of a variance the signal-to-noise ratio in noise of variance 1."""
    if math.isinf(snr):
        return 1.0
    if variance == 0.0:
        raise InputError(f"{name}: its projections are flat, expected a map with density that varies")
    return math.sqrt(snr / variance)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed runs left of `target`: the partial files of `cryored.files.output.whole_file`."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        number = path.name.split(".")[-2]
        if not number.isdecimal() or _is_another_process(int(number)):
            continue
        try:
            path.unlink()
        except OSError:  # another user's, or gone already
            continue
        logger.warning("%s: removed, as an interrupted run had left it", path)


def _is_another_process(number: int) -> bool:
    """Tell whether a process runs under this number, other than the present one."""
    if number == os.getpid():  # in a container each run may get the number of the last
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _optics(box: int, voxel_size: float, microscope: Microscope) -> Table:
    return {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnVoltage": [microscope.voltage],
        "rlnSphericalAberration": [microscope.cs],
        "rlnAmplitudeContrast": [microscope.amplitude_contrast],
        "rlnImagePixelSize": [voxel_size],
        "rlnImageSize": [box],
        "rlnImageDimensionality": [2],
    }


def _table(particles: Particles, stack_name: str, voxel_size: float) -> Table:
    """Lay out particles as RELION's table; its local searches start from the angles there."""
    number = len(particles.rotations)
    rot, tilt, psi = euler_angles(particles.rotations)
    origins = voxel_size * particles.origins
    columns: dict[str, Column] = {
        "rlnImageName": [f"{i:06d}@{stack_name}" for i in range(1, number + 1)],
        "rlnAngleRot": rot,
        "rlnAngleTilt": tilt,
        "rlnAnglePsi": psi,
        "rlnOriginXAngst": origins[:, 0],
        "rlnOriginYAngst": origins[:, 1],
        "rlnOpticsGroup": [1] * number,
        "rlnRandomSubset": [1 + i % 2 for i in range(number)],
    }
    if particles.defocus is not None:
        columns |= {
            "rlnDefocusU": particles.defocus,
            "rlnDefocusV": particles.defocus,
            "rlnDefocusAngle": np.zeros(number),
        }
    return columns
