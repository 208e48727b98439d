"""What answering a request takes, told beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from cryored.errors import InputError
from cryored.files.requests import Request
from cryored.maps.fourier import padded_size
from cryored.maps.resample import plan_axis
from cryored.prior.budget import ENGINE, network_memory, network_seconds
from cryored.prior.denoiser import Denoiser, smallest_tile, tile_voxels
from cryored.refinement.updater import Updater
from cryored.threads import default_threads

_PYTHON = 150 << 20  # bytes of Python with numpy, scipy and the compiled loops
_MAP = 4.5e-8  # core seconds for each coefficient of the padded transform: the MAP map
_PRIOR = 1.2  # times as much again for the update with the prior


@dataclass(frozen=True)
class Bounds:
    """Memory and time of one or more requests that are answered together.

    Parameters
    ----------
    arrays : int
        Bytes of RELION's arrays, which are mapped from the disk: where memory is short, the machine takes it back.
    memory : int
        Bytes of everything else.
    least : int
        The same with the requests one after the other, in the smallest tiles.
    seconds : float
        Warm, on the device; a cold start takes five more with the network.
    """

    arrays: int
    memory: int
    least: int
    seconds: float

    def rounded(self) -> dict[str, float]:
        """Return them for a record, in GiB and seconds."""
        gib = {"memory_gib": self.memory, "arrays_gib": self.arrays}
        return {**{name: round(size / 2**30, 2) for name, size in gib.items()}, "seconds": round(self.seconds, 2)}

    def in_words(self) -> str:
        """Return them for a person."""
        return (
            f"about {self.memory / 2**30:.1f} GiB besides {self.arrays / 2**30:.1f} GiB of RELION's arrays, "
            f"{self.seconds:.1f} s"
        )


def array_bytes(box: int, pad: float) -> int:
    """Return the bytes of one request's three arrays."""
    n = padded_size(pad, box)
    return 3 * 4 * n * n * (n // 2 + 1)


def bounds(
    box: int,
    pad: float,
    denoiser: Denoiser | None,
    *,
    pixel_size: float,
    r_max: int,
    requests: int = 1,
    threads: int | None = None,
) -> Bounds:
    """Return what requests of a box take.

    Parameters
    ----------
    box : int
    pad : float
        Padding factor.
    denoiser : Denoiser or None
        Its device counts as a CPU until it is found; None where lambda is 0.
    pixel_size : float
        In angstrom.
    r_max : int
        Half the current image size.
    requests : int
        Answered together.
    threads : int, optional
    """
    n, threads = padded_size(pad, box), threads or default_threads()
    arrays = requests * array_bytes(box, pad)
    seconds = requests * _MAP * n**2 * (n // 2 + 1) / threads
    volume = 4 * box**3
    # Half-transformed, complex64: what `reconstruct` holds besides its result.
    half = int(8 * box * min(n, 2 * r_max * pad + 1) * (min(n // 2, r_max * pad) + 1))
    if denoiser is None:
        return Bounds(arrays, _PYTHON + half + requests * volume, _PYTHON + half + volume, seconds)
    card, on_gpu = denoiser.model.card, denoiser.on_gpu
    side = plan_axis(box, pixel_size, card.pixel_size).resampled
    voxels = requests * tile_voxels((side,) * 3, denoiser.edge, card)
    seconds = seconds * (1 + _PRIOR) + network_seconds(card, voxels, gpu=on_gpu, threads=threads)

    def peak(together: int, tile: int) -> int:
        network = 0 if on_gpu else network_memory(card, (side,) * 3, tile, together)
        return ENGINE + together * 2 * volume + max(network, half + volume)

    return Bounds(arrays, peak(requests, denoiser.edge), peak(1, smallest_tile(card)), seconds)


def expect(request: Request, updater: Updater) -> Bounds:
    """Return what a request takes; see `bounds`."""
    lam, _ = updater.weight(request)
    return _bounds_of(request, updater, lam > 0, 1)


def expect_at_most(request: Request, updater: Updater, requests: int) -> Bounds:
    """Return what requests like this one take together at any resolution; it needs no FSC."""
    return _bounds_of(request, updater, updater.settings.lam != 0, requests)


def _bounds_of(request: Request, updater: Updater, with_prior: bool, requests: int) -> Bounds:
    return bounds(
        request.ori,
        request.pad,
        updater.denoiser if with_prior else None,
        pixel_size=request.pixel_size,
        r_max=request.r_max,
        requests=requests,
        threads=updater.settings.threads,
    )


def check_memory(found: Bounds, max_memory: int | None, what: str) -> None:
    """Refuse what cannot be done with the memory that was granted.

    Raises
    ------
    InputError
        Not even in the smallest tiles.
    """
    if max_memory is not None and found.least > max_memory:
        raise InputError(
            f"{what}: at least {found.least / 2**30:.1f} GiB of memory are needed, expected at most "
            f"{max_memory / 2**30:.1f} by --max-memory; raise it, or use a smaller box or padding 1"
        )
