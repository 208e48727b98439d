"""Tables and verdicts of what has been run."""

from __future__ import annotations

import csv
import io
import itertools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cryored.errors import InputError
from cryored.training.evaluation import Judgement, summarise
from paper.measure import (
    Record,
    excess,
    frequency,
    half_map_resolution,
    inflation,
    invented_shells,
    last_shell,
    mean_truth_fsc,
    median_angular_error,
    oracle_share,
    regularised_resolution,
    relion_resolution,
    truth_resolution,
)
from paper.plan import CELLS, NOISE_RUNS, NOISES, RUNS, SIGNAL, SWAPPED, Cell
from paper.work import Experiment, do_run

Records = Mapping[tuple[Cell, str], Record]
Row = dict[str, str]

REFERENCE_ENDS = 20.0  # angstrom: finer than this the reference of the noise, at 30 A, holds nothing
INFLATION_LIMIT = 1.05  # over MAP's: what the experiment allows
SMEARED = 3  # shells that a mask fills from those before

# Columns that a recomputed run has to agree in: exactly, or within a relative difference. MAP repeats to 1e-5; the
# rounding of a network differs from processor to processor, and a few particles go another way.
SAME = ("structure", "snr", "particles", "box", "angpix", "seed")
TOLERANCE = {
    "half_map_0.143_A": 0.02,
    "truth_0.5_A": 0.02,
    "mean_truth_fsc": 0.02,
    "angular_error_deg": 0.03,
    "inflation": 0.03,
}


def table_rows(records: Records) -> list[Row]:
    """Return a row for each refinement and each reconstruction with the true angles, in the order of `CELLS`."""
    rows = []
    for cell in CELLS:
        plain, oracle = (records.get((cell, name)) for name in ("map", "oracle"))
        for name in RUNS:
            record = records.get((cell, name))
            if record is None or record["kind"] not in ("refine", "true-angles"):
                continue
            rows.append(
                {
                    "cell": str(cell),
                    "run": name,
                    "structure": record["structure"],
                    "snr": f"{record['snr']:g}",
                    "particles": str(record["number"]),
                    "box": str(record["box"]),
                    "angpix": f"{record['angpix']:g}",
                    "seed": str(record["seed"]),
                    "relion_0.143_A": _number(relion_resolution(record), 2),
                    "half_map_0.143_A": _number(half_map_resolution(record), 3),
                    "truth_0.5_A": _number(truth_resolution(record), 3),
                    "regularised_0.5_A": _number(regularised_resolution(record), 3),
                    "mean_truth_fsc": _number(mean_truth_fsc(record, plain) if plain else math.nan, 4),
                    "oracle_share": _number(oracle_share(record, plain, oracle) if plain and oracle else math.nan, 2),
                    "angular_error_deg": _number(median_angular_error(record), 3),
                    "inflation": _number(inflation(record), 3),
                    "inflation_to_map": _number(inflation(record) / inflation(plain) if plain else math.nan, 3),
                    "excess": _number(excess(record), 3),
                    "lambda": _range(record) if record.get("lambda") else "-",
                    "iterations": str(record.get("iterations", "-")),
                    "seconds": str(record["seconds"]),
                    "hook": record["hook"] or "-",
                    "prior": record["prior"] or "-",
                    "version": record["version"],
                    "date": record["date"],
                }
            )
    return rows


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def format_table(rows: Sequence[Row], command: str) -> str:
    """Return rows as TSV below a line with the command that made it."""
    stream = io.StringIO()
    stream.write(f"# {command}\n")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def read_table(path: Path) -> dict[tuple[str, str], Row]:
    """Return the rows of a table by cell and run."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; give the table to compare with as --table"
        ) from error
    rows = list(csv.DictReader(lines, delimiter="\t"))
    missing = {"cell", "run", *SAME, *TOLERANCE} - set(rows[0] if rows else ())
    if missing:
        raise InputError(f"{path}: no column {sorted(missing)[0]}, expected a table that --table wrote")
    return {(row["cell"], row["run"]): row for row in rows}


def differences(found: Row, stored: Row) -> list[str]:
    """Return in words how a recomputed row differs from the stored one; nothing if it agrees."""
    result = [f"{key} {found[key]}, stored {stored[key]}" for key in SAME if found[key] != stored[key]]
    for key, tolerance in TOLERANCE.items():
        new, old = found[key], stored[key]
        near = "-" not in (new, old) and math.isclose(float(new), float(old), rel_tol=tolerance)
        if new != old and not near:
            result.append(f"{key} {new}, stored {old}, expected within {100 * tolerance:g} %")
    return result


def check(
    experiment: Experiment,
    cell: Cell,
    table: Path,
    names: Sequence[str],
    show: Callable[[str], None] = lambda line: None,
) -> bool:
    """Do a cell's runs that are in a stored table again, from its particles on; tell whether the numbers agree.

    Raises
    ------
    InputError
        The table has none of the runs.
    """
    stored = read_table(table)
    names = [name for name in names if (str(cell), name) in stored]
    if not names:
        raise InputError(f"{table}: has none of the runs asked for of {cell}; choose another cell")
    folder = experiment.folder / "check"
    again = replace(experiment, folder=folder, results=folder / "results")
    shutil.rmtree(again.place(cell), ignore_errors=True)
    records: dict[tuple[Cell, str], Record] = {}
    # MAP first: it says over which shells a mean is taken.
    for name in dict.fromkeys(["map", *names]):
        show(f"{cell} {name} ...")
        records[cell, name] = do_run(again, cell, name)
    agree = True
    for row in table_rows(records):
        if row["run"] in names:
            wrong = differences(row, stored[row["cell"], row["run"]])
            agree = agree and not wrong
            show(f"{cell} {row['run']}: {'; '.join(wrong) or 'agrees'}")
    return agree


def report(records: Records, command: str) -> str:
    """Return the results so far as Markdown."""
    parts = [
        f"`{command}`",
        *_tables(records),
        *_priors(records),
        *_passes(records),
        *_verdicts(records),
        *_noise(records),
        *_swapped(records),
        *_substituted(records),
    ]
    return "\n\n".join(parts) + "\n"


def _tables(records: Records) -> list[str]:
    """Return one table for each quantity, with a row for each cell and a column for each run."""
    rows = table_rows(records)
    if not rows:
        return ["Nothing is finished yet."]
    seconds = [int(row["seconds"]) for row in rows if row["hook"] != "-"]
    rows = [row for row in rows if float(row["snr"])]  # of noise these numbers say nothing
    if not rows:
        return []
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    names = [name for name in RUNS if any(row["run"] == name for row in rows)]
    found = {(row["cell"], row["run"]): row for row in rows}
    parts = []
    for title, keys in (
        (
            "Resolution in Å: half-maps 0.143 / truth 0.5 / regularised map to the truth 0.5",
            ("half_map_0.143_A", "truth_0.5_A", "regularised_0.5_A"),
        ),
        ("Mean FSC to the truth / median angular error in degrees", ("mean_truth_fsc", "angular_error_deg")),
        ("Inflation / over that of MAP / excess", ("inflation", "inflation_to_map", "excess")),
    ):
        lines = [["cell", *names]]
        for cell in cells:
            texts = (
                " / ".join(found[cell, name][key] for key in keys) if (cell, name) in found else "" for name in names
            )
            lines.append([cell, *texts])
        parts.append(f"**{title}**\n\n{_markdown(lines)}")
    facts = {key: ", ".join(sorted({row[key] for row in rows})) for key in ("seed", "version", "date")}
    facts["refinements"] = f"{len(seconds)}, {sum(seconds) / 3600:.1f} hours"
    return [*parts, "; ".join(f"{key} {value}" for key, value in facts.items()) + "."]


def _priors(records: Records) -> list[str]:
    """Tell by the checksum of its model and weights which state of a prior made which runs."""
    found: dict[str, dict[str, set[str]]] = {}
    for (_, name), record in records.items():
        if record.get("prior"):
            found.setdefault(str(record["model"]), {}).setdefault(str(record["prior"]), set()).add(name)
    lines = [
        f"- **{model}**: "
        + "; ".join(f"`{state}` in {', '.join(sorted(runs))}" for state, runs in states.items())
        + "."
        for model, states in found.items()
    ]
    return ["**States of the priors, by their checksums**\n\n" + "\n".join(lines)] if lines else []


def _passes(records: Records) -> list[str]:
    """Return the table of single passes: each model by nominal resolution, over all cells."""
    lines = []
    for name, run in RUNS.items():
        judgements = [
            Judgement(**item)
            for (_, other), record in records.items()
            if other == name and run.kind == "single-pass"
            for item in record["judgements"]
        ]
        for row in summarise(judgements) if judgements else []:
            values = [
                row[key] for key in ("median_error_to_unregularised", "median_error_to_wiener", "worst_error_to_wiener")
            ]
            gain = f"{row['median_crossing_gain_percent']:+.0f} %"
            lines.append([str(run.model), row["resolution"], str(row["maps"]), *(f"{v:.2f}" for v in values), gain])
    if not lines:
        return []
    head = ["model", "nominal resolution", "maps", "error to unregularised", "to FSC-weighted", "worst of these"]
    head += ["gain of the 0.5 crossing"]
    return ["**Single passes, medians**\n\n" + _markdown([head, *lines])]


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verdicts(records: Records) -> list[str]:
    """Compare runs over the cells that have both."""
    lines = []
    for name, other in (
        ("cwred", "map"),
        ("cwred", "cwred-eq17"),
        ("cwred", "map-mask"),
        ("cwred-mask", "map-mask"),
        ("red-mask", "map-mask"),
        ("oracle", "map"),
        ("oracle-mask", "map-mask"),
        ("cwred-eq17", "map"),
        ("cwred", "cwred-paper"),
        ("cwred", "red"),
        ("cwred-paper", "map"),
        ("red", "map"),
        ("cwred-gaussian", "map"),
        ("cwred-limit", "map"),
        ("cwred-strong", "cwred"),
        ("cwred-weak", "cwred"),
    ):
        cells = [cell for cell in SIGNAL if all((cell, run) in records for run in (name, other, "map"))]
        if not cells:
            continue
        runs = [(records[cell, name], records[cell, other], records[cell, "map"]) for cell in cells]
        gains = [mean_truth_fsc(run, plain) - mean_truth_fsc(before, plain) for run, before, plain in runs]
        sharper = [truth_resolution(run) <= truth_resolution(before) for run, before, _ in runs]
        angles = [median_angular_error(run) <= median_angular_error(before) for run, before, _ in runs]
        ratios = [inflation(run) / inflation(before) for run, before, _ in runs]
        more = [excess(run) - excess(before) for run, before, _ in runs]
        smaller = [1 - median_angular_error(run) / median_angular_error(before) for run, before, _ in runs]
        too_much = {str(cell): ratio for cell, ratio in zip(cells, ratios, strict=True) if ratio > INFLATION_LIMIT}
        lines.append(
            f"- **{name} against {other}**, {len(cells)} cells: mean FSC to the truth at or above in "
            f"{sum(gain >= 0 for gain in gains)}, above in {sum(gain > 0 for gain in gains)} (median "
            f"{np.median(gains):+.4f}, worst {min(gains):+.4f}); 0.5 crossing as good or better in {sum(sharper)}; "
            f"median angular error not worse in {sum(angles)} (smaller by {np.median(smaller):.1%} in the median); "
            f"inflation over {INFLATION_LIMIT:g} times that of {other} in "
            f"{len(too_much)}"
            + (f" ({', '.join(f'{cell} {ratio:.2f}' for cell, ratio in too_much.items())})" if too_much else "")
            + f"; excess over that of {other} {np.median(more):+.3f} (median), at most {max(more):+.3f}."
        )
    return ["\n".join(lines)] if lines else []


def _noise(records: Records) -> list[str]:
    lines = []
    for cell, name in itertools.product(NOISES, NOISE_RUNS):
        if (cell, "map") in records and (cell, name) in records:
            plain, prior = records[cell, "map"], records[cell, name]
            invented = invented_shells(prior, plain)
            where = ", ".join(f"{value:.1f} Å" for value in invented) or "nowhere"
            lines.append(
                f"- **{cell}**: half-map FSC of {name} (lambda {_range(prior)}) above 0.143 where MAP's is not: "
                f"{where}; RELION's resolution {relion_resolution(prior):.1f} Å (MAP "
                f"{relion_resolution(plain):.1f} Å); mean FSC to the protein of the reference beyond "
                f"{REFERENCE_ENDS:g} Å {_mean_invented(prior):+.3f} (MAP {_mean_invented(plain):+.3f})."
            )
    return ["\n".join(lines)] if lines else []


def _mean_invented(record: Record) -> float:
    """Return the mean FSC to the protein over the shells of which the reference of the noise holds nothing."""
    return float(np.mean(np.array(record["truth_fsc"])[frequency(record) > 1 / REFERENCE_ENDS]))


def _range(record: Record) -> str:
    """Return the lowest and the highest lambda of a run."""
    return "{:.2f}-{:.2f}".format(*record["lambda"])


def _substituted(records: Records) -> list[str]:
    lines = []
    names = [name for name, run in RUNS.items() if run.kind == "substituted"]
    for name, cell in itertools.product(names, SIGNAL):
        record = records.get((cell, name))
        if record is None:
            continue
        begin = record["start"]
        # Next to the resolution a mask smears what lies before it.
        start, where = (begin, "") if RUNS[name].limit is None else (begin + SMEARED, f", but for {SMEARED} shells")
        if start >= len(record["curves"]["denoised"]):
            continue  # resolved to Nyquist: nothing is beyond
        values = ", ".join(
            f"{kind} {np.mean(curve[start:]):+.3f} (at most {max(curve[start:]):.3f})"
            for kind, curve in record["curves"].items()
        )
        limit = f"{1 / frequency(record)[begin]:.1f} Å on{where}"
        lines.append(f"- **Noise substitution**, {cell}: mean FSC of the half-maps from {limit}: {values}.")
    return ["\n".join(lines)] if lines else []


def _swapped(records: Records) -> list[str]:
    a, b = SWAPPED
    if not all(key in records for key in ((b, "swapped"), (a, "map"), (b, "map"))):
        return []
    # From 10 A, where two molecules have no shape in common, up to where both MAP maps show something of the truth.
    plains = [records[cell, "map"] for cell in SWAPPED]
    first = int(np.searchsorted(frequency(plains[0]), 0.1))
    last = max(first, min(last_shell(np.array(item["truth_fsc"]), 0.5) for item in plains))
    parts = {name: np.array(curve[first : last + 1]) for name, curve in records[b, "swapped"]["curves"].items()}
    values = ", ".join(f"{name} {part.mean():+.3f} (at most {np.abs(part).max():.3f})" for name, part in parts.items())
    low, high = 1 / frequency(plains[0])[[first, last]]
    return [
        f"- **Swapped prior**, A = {a.structure}, B = {b.structure}: mean FSC from {low:.1f} to {high:.1f} Å: {values}."
    ]
