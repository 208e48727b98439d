"""The prior beside other denoisers, on the same held-out maps.

    python benchmarks/side_by_side.py PAIRS.star... -o RESULTS.tsv [--models NAME,...] [--tune PAIRS.star]...
        [--topaz PYTHON] [--maps N]

PAIRS.star list pairs of structures that the models were not trained on. Each method is given the half-map, raw
(unregularised) or weighted by its FSC (regularised), and judged as `cryored train --evaluate` judges:

- FSC weighting, the best linear filter, to whose error all others are compared;
- models, shown what they were trained on;
- with --tune, total variation and wavelets (scikit-image). Their strength, in units of the noise's standard deviation
  as FSC and map tell it, and the better of the two inputs are those of the least median error over a few of the pairs
  that --tune names, of other structures. Both have what helped them on such pairs: Chambolle's iteration does not stop
  before its 200th, and Haar wavelets with the universal threshold are averaged over the eight shifts by one voxel;
- with --topaz, `topaz denoise3d` with unet-3d-10a, its default model, made from tomograms of about 10 A a voxel, and
  its defaults (patches of 96 voxels, padding of 48), on either input. PYTHON is that of an environment of its own:
  pip install topaz-em 'setuptools<81'. A map of 96 voxels takes 9 GB.

Two threads for all that use threads (total variation and wavelets do not), no GPU. Seconds are those from the raw
half-map on, without the start of the program or network. RESULTS.tsv has a row for each method and map; what is there
already is not done again, so that a run that was stopped goes on. Prints the summary of all methods.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells
from cryored.maps.volume import Floats, Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, check_weights, find_model
from cryored.simulation.pair_table import PairRow, read_pairs
from cryored.training.batches import Input
from cryored.training.evaluation import Judgement, as_tsv, judge_map, load_pair, shown, summarise

THREADS = 2
AXES = (0, 1, 2)
STRENGTHS = 2.0 ** np.arange(-1, 2.5, 0.5)
TUNING_PAIRS = 8
TOPAZ_MODEL = "unet-3d-10a"
COLUMNS = (
    "resolution",
    "maps",
    "median_error_to_wiener",
    "worst_error_to_wiener",
    "median_crossing_gain_percent",
    "worst_crossing_gain_percent",
)
_TEXTS = ("structure", "name")  # of a judgement's fields; the others are numbers

Array = npt.NDArray[np.float32]
Smooth = Callable[[Array, float], Array]  # a map and how much noise to take out


@dataclass(frozen=True)
class Method:
    """A denoiser with its settings.

    Parameters
    ----------
    name : str
    input : {"regularised", "unregularised"}
        What it is shown.
    settings : str
        What else there is to say.
    denoise : callable
        Takes the map shown and the FSC of the half-maps; returns a map.
    start : float
        Seconds of each call that are the start of a program.
    """

    name: str
    input: Input
    settings: str
    denoise: Callable[[Volume, Floats], Array]
    start: float = 0.0


@dataclass(frozen=True)
class Result:
    """A method on a map."""

    method: str
    input: str
    settings: str
    seconds: float
    judgement: Judgement

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other results."""
        return (self.method, self.input, self.settings, self.judgement.structure, self.judgement.name)

    def row(self) -> dict[str, Any]:
        """Return the row for RESULTS.tsv, with all digits."""
        values = dataclasses.asdict(self)
        values |= values.pop("judgement")
        del values["misled"]
        return values

    @classmethod
    def of_row(cls, row: dict[str, str]) -> Result:
        """Return the result that a row of RESULTS.tsv tells of."""
        method, given, settings, seconds = (row.pop(name) for name in ("method", "input", "settings", "seconds"))
        fields: dict[str, Any] = {name: text if name in _TEXTS else float(text) for name, text in row.items()}
        return cls(method, given, settings, float(seconds), Judgement(**fields))


def apply(method: Method, row: PairRow) -> Result:
    """Denoise and judge one map."""
    pair, voxel_size = load_pair(row)
    begin = time.monotonic()
    denoised = method.denoise(Volume(shown(pair, method.input), voxel_size), pair.fsc)
    seconds = time.monotonic() - begin - method.start
    name = Path(row.noisy).name
    judgement = judge_map(pair, np.float32(denoised), voxel_size, structure=row.structure, name=name)
    return Result(method.name, method.input, method.settings, seconds, judgement)


def choose(rows: Sequence[PairRow], number: int) -> list[PairRow]:
    """Return at most `number` rows, spread evenly over bins of resolution, and in a bin over structures."""
    bins: dict[str, list[PairRow]] = {}
    for row in sorted(rows, key=lambda row: (row.structure, row.resolution, row.noisy)):
        unjudged = Judgement(row.structure, Path(row.noisy).name, row.resolution, *[np.nan] * 7)
        bins.setdefault(unjudged.row, []).append(row)
    shares = dict.fromkeys(bins, 0)
    while sum(shares.values()) < min(number, len(rows)):
        with_more = [label for label in bins if shares[label] < len(bins[label])]
        shares[min(with_more, key=lambda label: shares[label])] += 1
    return [
        bins[label][int((index + 0.5) * len(bins[label]) / share)]
        for label, share in shares.items()
        for index in range(share)
    ]


def weighting() -> Method:
    """Return the FSC weighting itself."""
    return Method("FSC weighting", "regularised", "-", lambda volume, fsc: volume.data)


def model_method(name: str) -> Method:
    """Return a model of cryored, loaded."""
    model = find_model(name)
    check_weights(model)
    denoiser = Denoiser(model, gpu=False, threads=THREADS)
    denoiser.load()
    settings = f"weights {model.card.sha256[:8]}"
    return Method(model.card.name, model.card.input, settings, lambda volume, fsc: denoiser(volume, fsc).data)


def smoothers() -> dict[str, Smooth]:
    """Return the denoisers that have a strength, by name."""
    try:
        import pywt  # noqa: F401  scikit-image's wavelets need it, and come without
        from skimage.restoration import denoise_tv_chambolle, denoise_wavelet
    except ImportError as error:
        raise click.ClickException(
            f"{error}, and --tune is for total variation and wavelets: pip install scikit-image PyWavelets, or leave "
            "--tune out"
        ) from None

    def wavelet(data: Array, amount: float) -> Array:
        total = np.zeros_like(data)
        for shift in itertools.product((0, 1), repeat=3):
            rolled = np.roll(data, shift, AXES)
            smoothed = denoise_wavelet(rolled, sigma=amount, wavelet="db1", method="VisuShrink")
            total += np.roll(smoothed, [-step for step in shift], AXES)
        return total / np.float32(8)

    return {
        "total variation": lambda data, amount: denoise_tv_chambolle(data, weight=amount, eps=0.0),
        "wavelet": wavelet,
    }


def smoothing(name: str, smooth: Smooth, input: Input, strength: float) -> Method:
    """Return a smoother whose strength is in units of the noise's standard deviation in the map shown."""

    def denoise(volume: Volume, fsc: Floats) -> Array:
        # Of the power in a shell the FSC is signal, the rest noise.
        noise = apply_shells(volume.data, np.sqrt(1 - np.clip(fsc, 0.0, 1.0))).std()
        return smooth(volume.data, strength * float(noise))

    return Method(name, input, f"strength {strength:.2g}", denoise)


def tune(name: str, smooth: Smooth, rows: Sequence[PairRow]) -> Method:
    """Return a smoother with the input and strength of the least median error over `rows`."""
    inputs: tuple[Input, ...] = ("unregularised", "regularised")
    candidates = [smoothing(name, smooth, input, strength) for input in inputs for strength in STRENGTHS]
    return min(
        candidates,
        key=lambda method: np.median([apply(method, row).judgement.error_to_wiener for row in rows]),
    )


def topaz_methods(python: str) -> list[Method]:
    """Return Topaz on either input; `python` is that of its environment."""
    version = _run([python, "-c", "from importlib.metadata import version; print(version('topaz-em'))"]).strip()
    command = [python, "-m", "topaz.main", "denoise3d", "--model", TOPAZ_MODEL]
    command += ["--device", "-1", "--num-threads", str(THREADS)]
    begin = time.monotonic()
    _run(command)  # loads the network, and has nothing to denoise
    start = time.monotonic() - begin

    def denoise(volume: Volume, fsc: Floats) -> Array:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "map.mrc"), Path(folder, "denoised")
            write_volume(source, volume, label="side by side")
            _run([*command, "--output", str(target), str(source)])
            return np.array(read_volume(target / source.name).data)

    settings = f"topaz-em {version}, {TOPAZ_MODEL}, its defaults"
    return [Method("Topaz", input, settings, denoise, start) for input in ("unregularised", "regularised")]


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise click.ClickException(
            f"{command[0]}: {said}; expected the Python of an environment with Topaz: pip install topaz-em "
            "'setuptools<81'"
        ) from None


def read_results(path: Path) -> dict[tuple[str, ...], Result]:
    """Return the results that are there already."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        try:
            found = [Result.of_row(row) for row in csv.DictReader(stream, delimiter="\t")]
        except (KeyError, TypeError, ValueError) as error:
            raise click.ClickException(
                f"{path}: no results of this program ({error}); name another file, or remove it"
            ) from None
    return {result.key: result for result in found}


def append(path: Path, result: Result) -> None:
    """Add a result to the file, with the header if it is the first."""
    header, line = as_tsv([result.row()]).splitlines(keepends=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line if os.fstat(stream.fileno()).st_size else header + line)


def compare(methods: Sequence[Method], rows: Sequence[PairRow], path: Path) -> list[Result]:
    """Return the results of all methods on all maps, and keep those that are new."""
    done = read_results(path)
    results = []
    for number, row in enumerate(rows, 1):
        click.echo(f"map {number} of {len(rows)}: {Path(row.noisy).name}", err=True)
        for method in methods:
            key = (method.name, method.input, method.settings, row.structure, Path(row.noisy).name)
            if key not in done:
                done[key] = apply(method, row)
                append(path, done[key])
            results.append(done[key])
    return results


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each method and bin of nominal resolution."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.input, result.settings), []).append(result)
    table = []
    for (method, given, settings), group in groups.items():
        for row in summarise([result.judgement for result in group]):
            seconds = [item.seconds for item in group if row["resolution"] in (item.judgement.row, "all")]
            table.append(
                {"method": method, "input": given, "settings": settings}
                | {name: row[name] for name in COLUMNS}
                | {"median_seconds": f"{np.median(seconds):.2g}"}
            )
    return table


def check_rows(rows: Sequence[PairRow], tuning: Sequence[PairRow]) -> None:
    """Refuse tables of nothing, maps of the same name, and tuning on a structure that is judged by."""
    if not rows:
        raise click.ClickException("the tables list no pairs, expected some to judge by")
    (structure, name), count = Counter((row.structure, Path(row.noisy).name) for row in rows).most_common(1)[0]
    if count > 1:
        raise click.ClickException(f"{name} of {structure} is listed {count} times, expected once; leave a table out")
    shared = {row.structure for row in rows} & {row.structure for row in tuning}
    if shared:
        raise click.ClickException(f"--tune: {min(shared)} is judged by too; tune on other structures")


@click.command()
@click.argument("tables", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="RESULTS.tsv.")
@click.option("--models", default=DEFAULT_MODEL, show_default=True, help="Names or folders, separated by commas.")
@click.option("--tune", "tuning", multiple=True, type=click.Path(exists=True), help="Pairs of training structures.")
@click.option("--topaz", type=click.Path(exists=True), help="Python of the environment that has Topaz.")
@click.option("--maps", type=click.IntRange(min=1), help="Judge by so many maps, spread over resolution  [all]")
def main(
    tables: tuple[str, ...], output: Path, models: str, tuning: tuple[str, ...], topaz: str | None, maps: int | None
) -> None:
    """Judge denoisers side by side on the pairs of TABLES."""
    rows, others = ([row for table in group for row in read_pairs(table)] for group in (tables, tuning))
    check_rows(rows, others)
    methods = [weighting(), *map(model_method, models.split(","))]
    if others:
        chosen = choose(others, TUNING_PAIRS)
        for name, smooth in smoothers().items():
            click.echo(f"tuning {name} on {len(chosen)} pairs", err=True)
            methods.append(tune(name, smooth, chosen))
    if topaz:
        methods += topaz_methods(topaz)
    results = compare(methods, choose(rows, maps or len(rows)), output)
    click.echo(as_tsv(summary(results)), nl=False)


if __name__ == "__main__":
    main()
