"""What is measured of a run, and what follows from it; the definitions are explained in docs/paper.md."""

from __future__ import annotations

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cryored.files.mrc import read_volume
from cryored.files.star import read_star
from cryored.maps.fsc import Curve, crossing_resolution, nominal_resolution, shell_correlation, whole_set_fsc
from cryored.maps.mask import soft_mask
from cryored.maps.volume import Floats
from cryored.reconstruction.orientations import angular_error_file
from cryored.refinement.relion_runs import Data, final_map, half_maps

Record = dict[str, Any]

MAP_THRESHOLD, TRUTH_THRESHOLD = 0.143, 0.5  # of half-maps, and of their average to the truth: the same by theory


def measure(data: Data, name: str) -> Record:
    """Return the curves of a run, from RELION's unfiltered half-maps, which come from B and K alone."""
    truth = read_volume(data.truth)
    mask = soft_mask(truth).data
    first, second = half_maps(data, name)
    curves = {
        "half_map_fsc": shell_correlation(first, second),
        "half_map_fsc_masked": shell_correlation(first * mask, second * mask),
        "truth_fsc": shell_correlation((first + second) / 2 * mask, truth.data * mask),
    }
    return {key: rounded(curve) for key, curve in curves.items()}


def measure_refinement(data: Data, name: str) -> Record:
    """Return what a refinement has besides: RELION's own curve, angular errors, the lambdas used, pictures."""
    run = data.folder / name
    # The reference lies as the truth does, so that a turn of the whole map is an error, too.
    errors = angular_error_file(run / "run_data.star", data.folder / "particles_truth.star")
    truth, final = (read_volume(path).data for path in (data.truth, final_map(data, name)))
    mask = soft_mask(read_volume(data.truth)).data
    lambdas = [
        json.loads(line)["lambda"]
        for log in run.glob("run_it*_cryored.log")
        for line in log.read_text(encoding="utf-8").splitlines()
    ]
    return {
        "gold_standard_fsc": read_star(run / "run_model.star").numbers("model_class_1", "rlnGoldStandardFsc").tolist(),
        "regularised_fsc": rounded(shell_correlation(final * mask, truth * mask)),
        "angular_errors": rounded(errors, 3),
        "lambda": [min(lambdas), max(lambdas)] if lambdas else None,
        "pictures": {"truth": picture(truth, truth), "map": picture(final, final)},
    }


def rounded(curve: Curve, digits: int = 6) -> list[float]:
    """Return a curve as JSON takes it."""
    return [round(float(value), digits) for value in curve]


def picture(values: Floats, scale: Floats) -> str:
    """Return a map's central slice as text: 256 greys, from the solvent's to the strongest of `scale`."""
    white = float(np.percentile(scale, 99.8)) or 1.0
    grey = np.clip(values[len(values) // 2] / white, 0, 1) * 255
    return base64.b64encode(zlib.compress(np.rint(grey).astype(np.uint8).tobytes(), 9)).decode()


def picture_of(text: str) -> npt.NDArray[np.uint8]:
    """Return the slice that `picture` made a text of."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return values.reshape(math.isqrt(len(values)), -1)


def median_angular_error(record: Record) -> float:
    """Return the median of the particles' angular errors in degrees, nan where no angles were refined."""
    return float(np.median(record["angular_errors"])) if "angular_errors" in record else math.nan


def frequency(record: Record) -> Curve:
    """Return the spatial frequency of each shell of a record's curves in 1/angstrom."""
    return np.arange(record["box"] // 2 + 1) / (record["box"] * record["angpix"])


def truth_resolution(record: Record) -> float:
    """Return where the masked FSC of the average half-map to the truth crosses 0.5, in angstrom."""
    return crossing_resolution(frequency(record), np.array(record["truth_fsc"]), TRUTH_THRESHOLD)


def regularised_resolution(record: Record) -> float:
    """Return where the masked FSC of the final map, with what regularised it, to the truth crosses 0.5, in angstrom."""
    if "regularised_fsc" not in record:
        return math.nan
    return crossing_resolution(frequency(record), np.array(record["regularised_fsc"]), TRUTH_THRESHOLD)


def half_map_resolution(record: Record) -> float:
    """Return where the masked FSC of the half-maps crosses 0.143, in angstrom."""
    return crossing_resolution(frequency(record), np.array(record["half_map_fsc_masked"]), MAP_THRESHOLD)


def relion_resolution(record: Record) -> float:
    """Return RELION's own: the last shell before the curve of ``run_model.star`` drops below 0.143, in angstrom."""
    if "gold_standard_fsc" not in record:
        return math.nan
    return nominal_resolution(frequency(record), np.array(record["gold_standard_fsc"]), MAP_THRESHOLD)


def inflation(record: Record) -> float:
    """Return how much further, in spatial frequency, the half-maps agree than the truth supports.

    nan where neither of the curves crosses its threshold, infinity where only the half-maps agree on something.
    """
    truth, halves = truth_resolution(record), half_map_resolution(record)
    return math.nan if math.isinf(halves) else truth / halves


def excess(record: Record) -> float:
    """Return by how much the half-maps promise more than the truth holds, as a mean over shells up to their 0.143.

    An FSC of f between half-maps promises one of sqrt(2 f / (1 + f)) of their average to the truth. Where a curve has
    a plateau at a threshold its crossing jumps, and `inflation` with it; this does not.
    """
    halves, truth = np.array(record["half_map_fsc_masked"]), np.array(record["truth_fsc"])
    shells = slice(1, last_shell(halves, MAP_THRESHOLD) + 1)
    return float(np.mean(np.sqrt(whole_set_fsc(halves[shells])) - truth[shells]))


def mean_truth_fsc(record: Record, reference: Record) -> float:
    """Return the mean FSC to the truth over shells 1 up to the last above 0.5 of a reference run: MAP."""
    last = last_shell(np.array(reference["truth_fsc"]), TRUTH_THRESHOLD)
    return float(np.mean(record["truth_fsc"][1 : last + 1]))


def oracle_share(record: Record, plain: Record, oracle: Record) -> float:
    """Return a run's gain over MAP in mean FSC to the truth as a share of the oracle's."""
    best = mean_truth_fsc(oracle, plain) - mean_truth_fsc(plain, plain)
    return (mean_truth_fsc(record, plain) - mean_truth_fsc(plain, plain)) / best if best > 0 else math.nan


def last_shell(curve: Curve, threshold: float) -> int:
    """Return the last shell before a curve first drops below a threshold, at least 1."""
    below = np.flatnonzero(curve[1:] < threshold)
    return max(int(below[0]) if below.size else len(curve) - 1, 1)


def invented_shells(record: Record, reference: Record) -> list[float]:
    """Return the resolutions, in angstrom, at which half-maps agree (0.143) where those of a reference do not."""
    halves, plain = (np.array(item["half_map_fsc"]) for item in (record, reference))
    shells = np.flatnonzero((halves > MAP_THRESHOLD) & (plain <= MAP_THRESHOLD))
    return [float(1 / value) for value in frequency(record)[shells[shells > 0]]]


def swapped_correlation(map_a: Path, prior_a: Path, map_b: Path, prior_b: Path) -> dict[str, Curve]:
    """Correlate maps of two proteins: what they share with the prior and not without is the network's."""
    a, b, with_a, with_b = (read_volume(path).data for path in (map_a, map_b, prior_a, prior_b))
    return {
        "MAP of A, MAP of B": shell_correlation(a, b),
        "MAP of A, CW-RED of B": shell_correlation(a, with_b),
        "CW-RED of A, CW-RED of B": shell_correlation(with_a, with_b),
    }
