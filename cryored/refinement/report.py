"""The page of ``cryored watch --report`` and ``cryored report``: one HTML file that needs no other, and no network."""

from __future__ import annotations

import base64
import datetime
import math
import os
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cryored import __version__
from cryored.errors import InputError
from cryored.files.jobs import job_end, read_job
from cryored.files.output import check_target, write_text
from cryored.prior.weights import ShellWeights
from cryored.refinement.report_figures import COLOURS, Axis, Line, chart, grey_png, round_axis, shades
from cryored.refinement.run_logs import Logged, read_logs
from cryored.refinement.watch_table import STEPS, Entry, resolution_text

KINDS = ("unregularised", "denoised", "result")

_MARK = '<meta name="generator" content="cryored">'
_REFRESH = 20  # seconds after which the browser looks again
_LARGE, _SMALL = 480, 96  # edges of the pictures in pixels, at most
_STRIP = 12  # iterations in the strip of small pictures
# Resolutions in angstrom that the frequency axis may name, those that come first before those that lie close to them.
_NAMED = (10, 5, 20, 3, 4, 2, 1, 6, 7, 8, 30, 50, 15, 12, 2.5, 1.5, 4.5, 3.5, 9, 1.2, 3.2, 3.7, 5.5, 2.2, 2.8, 1.8, 1.6)
_NAMED_APART = 0.05  # of the axis

Floats = npt.NDArray[np.float64]
Section = npt.NDArray[np.float32]
Pictures = dict[str, bytes]  # kind -> PNG
T = TypeVar("T")


class Report:
    """What a refinement's requests gave, as a page.

    Of each request there are numbers, a curve and a few small pictures: memory does not grow with the box, and
    little with the number of requests.

    Parameters
    ----------
    path : path
    title : str
    facts : mapping of str to str
        For the head of the page; what the answers tell of their options takes the place of these.
    live : bool
        The browser loads the page anew from time to time, until `close`.
    """

    def __init__(
        self, path: str | os.PathLike[str], title: str, facts: Mapping[str, str], *, live: bool = False
    ) -> None:
        self._path = path
        self._title = title
        self._facts = {**facts, "cryored": __version__} | ({"Begun": _now()} if live else {})
        self._live = live
        self._entries: list[Entry] = []
        # By part and iteration; both halves bring the same curve.
        self._curves: dict[tuple[str, int], tuple[Floats, Floats]] = {}
        # Of the latest iteration by part: iteration, frequency, precision and gain.
        self._weights: dict[str, tuple[int, Floats, ShellWeights]] = {}
        self._large: dict[str, tuple[Entry, Pictures]] = {}
        self._strips: dict[str, dict[int, tuple[Entry, Pictures]]] = {}

    def add(
        self,
        entry: Entry,
        frequency: Floats | None = None,
        fsc: Floats | None = None,
        slices: Mapping[str, Section] | None = None,
        weights: ShellWeights | None = None,
    ) -> None:
        """Take in a request.

        Parameters
        ----------
        entry : Entry
        frequency, fsc : (n,) float64, optional
            The request's half-map FSC over spatial frequency in 1/angstrom.
        slices : mapping, optional
            Central sections (y, x) of the maps in `KINDS`, as far as there are such maps. A second half's are not
            shown.
        weights : ShellWeights, optional
            By which the update believed the denoised map, in the first shells of `frequency`.
        """
        self._entries.append(entry)
        if entry.error or entry.iteration is None:
            return
        if frequency is not None and fsc is not None and fsc.any():  # all zero in Class3D
            self._curves[entry.part, entry.iteration] = frequency, fsc
        if weights is not None and frequency is not None and entry.lam > 0:
            self._weights[entry.part] = entry.iteration, frequency[: len(weights.gain)], weights
        if slices and entry.half != 2:
            self._large[entry.part] = entry, {kind: grey_png(slices[kind], _LARGE) for kind in slices}
            strip = self._strips.setdefault(entry.part, {})
            strip[entry.iteration] = entry, {kind: grey_png(slices[kind], _SMALL) for kind in slices}
            if len(strip) > _STRIP:
                del strip[_most_crowded(sorted(strip))]

    def write(self) -> None:
        """Write the page whole, in place of the one before.

        Raises
        ------
        OutputError
            The file system refuses; the previous page stays.
        """
        title = escape(self._title)
        facts = (self._facts | self._options() | {"Updated": _now()}).items()
        again = f'<meta http-equiv="refresh" content="{_REFRESH}">\n' if self._live else ""
        head = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
        parts = (
            self._failures(),
            self._fsc(),
            self._shell_weights(),
            self._courses(),
            self._pictures(),
            self._requests(),
        )
        write_text(
            self._path,
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_MARK}\n{again}'
            f"<title>{title}</title>\n"
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<dl>{head}</dl>\n"
            + "\n".join(part for part in parts if part)
            + "\n</body>\n</html>\n",
        )

    def close(self, state: str) -> None:
        """Write the page for the last time, with what became of the run."""
        self._live = False
        self._facts["State"] = state
        self.write()

    def _options(self) -> dict[str, str]:
        """Return the options in words, with the iteration from which on they are others, as after --continue."""
        courses: dict[str, list[str]] = {}
        latest: dict[str, str] = {}
        for entry in self._entries:
            for name, text in entry.options.items():
                if latest.get(name) != text:
                    since = f"from {entry.name if entry.iteration is None else f'iteration {entry.iteration}'} on: "
                    courses.setdefault(name, []).append(since + text if name in latest else text)
                    latest[name] = text
        return {name: "; ".join(course) for name, course in courses.items()}

    def _failures(self) -> str:
        failed = [f"<li>{escape(entry.name)}: {escape(entry.error)}</li>" for entry in self._entries if entry.error]
        return f'<h2>Failed</h2>\n<ul class="failed">{"".join(failed)}</ul>' if failed else ""

    def _fsc(self) -> str:
        if not self._curves:
            return ""
        iterations = sorted({iteration for _, iteration in self._curves})
        colours = dict(zip(iterations, shades(len(iterations)), strict=True))
        lines = [
            Line(
                frequency.tolist(),
                fsc.tolist(),
                colours[iteration],
                f"iteration {iteration} {part}".strip(),
                width=2.4 if iteration == iterations[-1] else 1.3,
            )
            for (part, iteration), (frequency, fsc) in sorted(self._curves.items(), key=lambda item: item[0][1])
        ]
        bottom = min(-0.1, *(min(line.y) - 0.02 for line in lines))
        y = Axis("half-map FSC", bottom, 1.02, [(tick, f"{tick:g}") for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)])
        x = _resolution_axis(max(line.x[-1] for line in lines))
        swatches = "".join(f'<i style="background:{colour}"></i>' for colour in colours.values())
        return (
            "<h2>Half-map FSC</h2>\n"
            f"<figure>{chart(lines, x, y, size=(940, 380), level=0.143)}\n"
            f"<figcaption>iteration {iterations[0]} {swatches} {iterations[-1]}</figcaption></figure>\n"
            '<p class="caution"><b>What may be quoted.</b> These curves are RELION\'s own: they come from the data of '
            "the halves (B and K) before any prior. The FSC between the maps that RELION got back must not be quoted: "
            "the prior may have put the same detail into both.</p>"
        )

    def _shell_weights(self) -> str:
        if not self._weights:
            return ""
        rows = []
        for part, (iteration, frequency, weights) in _in_order(self._weights):
            x = _resolution_axis(float(frequency[-1]))
            powers = [math.log10(value) if value > 0 else math.nan for value in weights.precision.tolist()]
            top = min(20, max([1, *(math.ceil(power) for power in powers if math.isfinite(power))]))
            decades = [(float(power), f"{10**power:g}") for power in range(top + 1)]
            precision = Line(frequency.tolist(), powers, COLOURS[0], "precision")
            gain = Line(frequency.tolist(), weights.gain.tolist(), COLOURS[1], "gain")
            charts = (
                chart([precision], x, Axis("precision, τ²/v", 0.0, float(top), decades), size=(460, 230)),
                chart([gain], x, round_axis("gain, g", (0, 1, *gain.y)), size=(460, 230)),
            )
            title = f"<h3>iteration {iteration} {part}".strip() + "</h3>\n"
            rows.append(title + f'<div class="row">{"".join(f"<figure>{one}</figure>" for one in charts)}</div>')
        return (
            "<h2>Weights of the denoised map</h2>\n<p>By shell, in the latest iteration: precision 1 gives it "
            "the weight of RELION's own prior, 10 ten times that; gain is the factor that it is taken with.</p>\n"
            + "\n".join(rows)
        )

    def _courses(self) -> str:
        charts = [
            self._course("nominal resolution (Å)", lambda entry: (entry.part, entry.resolution)),
            self._course("weight of the prior, λ", lambda entry: (entry.part, entry.lam), (0, 1)),
            self._course("change against MAP (%)", lambda entry: (entry.label, 100 * entry.change), (0,)),
        ]
        return f'<h2>Iterations</h2>\n<div class="row">{"".join(charts)}</div>' if any(charts) else ""

    def _course(
        self, title: str, what: Callable[[Entry], tuple[str, float | None]], shown: Iterable[float] = ()
    ) -> str:
        """Draw a number over the iterations, a line for each name that `what` gives beside it."""
        courses: dict[str, dict[int, float]] = {}
        for entry in self._entries:
            name, value = what(entry)
            if not entry.error and entry.iteration is not None and value is not None and math.isfinite(value):
                courses.setdefault(name, {})[entry.iteration] = value
        if not courses:
            return ""
        lines = []
        for index, (name, course) in enumerate(_in_order(courses)):
            x, y = zip(*sorted(course.items()), strict=True)
            lines.append(Line(x, y, COLOURS[index % len(COLOURS)], name or title, points=True))
        names = "".join(f'<span><i style="background:{line.colour}"></i> {escape(line.label)}</span>' for line in lines)
        iterations = round_axis("iteration", (value for line in lines for value in line.x), whole=True)
        values = round_axis(title, (*shown, *(value for line in lines for value in line.y)))
        caption = f"<figcaption>{names}</figcaption>" if len(lines) > 1 else ""
        return f"<figure>{chart(lines, iterations, values, size=(310, 230))}{caption}</figure>\n"

    def _pictures(self) -> str:
        if not self._large:
            return ""
        rows = [
            f'<h3>{_called(entry)}</h3>\n<div class="row">'
            + "".join(
                f"<figure>{_image(pictures[kind], f'{kind}, {_called(entry)}')}<figcaption>{kind}</figcaption></figure>"
                for kind in KINDS
                if kind in pictures
            )
            + f"</div>\n{_strip(self._strips[part].values())}"
            for part, (entry, pictures) in _in_order(self._large)
        ]
        note = "<p>Central sections normal to z, each with a grey scale of its own; of two halves, the first.</p>\n"
        return "<h2>Maps</h2>\n" + note + "\n".join(rows)

    def _requests(self) -> str:
        steps = [step for names in STEPS.values() for step in names]
        heads = ("", "resolution (Å)", "λ", *steps, "change (%)", "power ratio", "device")
        rows = []
        for entry in self._entries:
            cells = (
                f"{entry.name}{'*' if entry.plain else ''}",
                resolution_text(entry.resolution),
                "" if entry.error else f"{entry.lam:.3f}",
                *(f"{entry.seconds[step]:.2f}" if step in entry.seconds else "" for step in steps),
                "failed" if entry.error else f"{100 * entry.change:.2f}",
                "" if entry.error else f"{entry.power_ratio:.3f}",
                entry.device,
            )
            look = ' class="failed"' if entry.error else ""
            rows.append(f"<tr{look}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        head = "".join(f"<th>{name}</th>" for name in heads)
        plain = [entry for entry in self._entries if entry.plain]
        return (
            "<h2>Requests</h2>\n<p>In the order of their answers; times in seconds. Change and power ratio (of the "
            "variances) are against the MAP map.</p>\n"
            f'<div class="wide"><table class="requests"><thead><tr>{head}</tr></thead>\n<tbody>'
            + "\n".join(rows)
            + "</tbody></table></div>"
            + "".join(
                f"\n<p>* {escape(entry.name)}: {escape(entry.plain)}, which the numbers are of.</p>" for entry in plain
            )
        )


def check_report(path: str, overwrite: bool = False) -> None:
    """Refuse a report's file as `check_target` does, unless what is there is a report, which the new one continues."""
    known = Path(path)
    ours = known.is_file() and _MARK in known.read_text(encoding="utf-8", errors="replace")[:1000]
    check_target(path, overwrite or ours)


def add_logged(report: Report, answers: Iterable[Logged]) -> None:
    """Take in what was answered before, as far as its files are still there."""
    for one in answers:
        weights = one.record["weights"]
        shells = ShellWeights(*(np.array(weights[name], dtype=np.float64) for name in ("precision", "gain")))
        fsc = one.fsc()
        frequency = one.frequency(len(shells.gain) if fsc is None else len(fsc))
        report.add(one.entry, frequency, fsc, one.sections(), shells)


def report_folder(folder: str, output: str, *, overwrite: bool = False) -> int:
    """Make the report of a run from its logs; return the number of answers in it.

    Parameters
    ----------
    folder : str
        Of a refinement, finished or under way.
    output : str
        HTML file.

    Raises
    ------
    InputError
        No answer of cryored's is logged there.
    OutputError
        The file cannot be written, or is there and no report.
    """
    check_report(output, overwrite)
    answers = read_logs(Path(folder))
    if not answers:
        raise InputError(f"{folder}: no ..._cryored.log, expected the folder of a run in which cryored answered RELION")
    facts = {
        "Folder": folder,
        "Answered": f"{answers[0].record['time']} to {answers[-1].record['time']}",
    }
    report = Report(output, f"cryored in {folder}", facts)
    add_logged(report, answers)
    report.close(run_state(folder))
    return len(answers)


def run_state(folder: str | os.PathLike[str]) -> str:
    """Say in words how far a run is."""
    try:
        end = job_end(Path(folder))
        return f"iteration {read_job(Path(folder)).iteration}" if end is None else f"ended ({end.name})"
    except InputError:
        return "begun"


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _in_order(named: Mapping[str, T]) -> list[tuple[str, T]]:
    """Return the items by name, class 10 after class 9."""
    return sorted(named.items(), key=lambda item: (len(item[0]), item[0]))


def _most_crowded(iterations: list[int]) -> int:
    """Return which of some rising numbers to drop so that the others stay spread out; never an outermost."""
    gaps = [after - before for before, after in zip(iterations[:-2], iterations[2:], strict=True)]
    return iterations[1 + gaps.index(min(gaps))]


def _resolution_axis(end: float) -> Axis:
    """Return an axis of spatial frequency from 0 to `end` in 1/angstrom, with resolutions as ticks."""
    ticks: list[tuple[float, str]] = []
    for resolution in _NAMED:
        at = 1 / resolution
        if at <= end and all(abs(at - other) >= _NAMED_APART * end for other, _ in ticks):
            ticks.append((at, f"{resolution:g}"))
    return Axis("resolution (Å)", 0.0, end, ticks)


def _called(entry: Entry) -> str:
    return f"iteration {entry.iteration}, {entry.label}"


def _image(png: bytes, label: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{label}" title="{label}">'


def _strip(items: Iterable[tuple[Entry, Pictures]]) -> str:
    """Return the small pictures, a row for each kind, a column for each iteration."""
    columns = sorted(items, key=lambda item: item[0].iteration or 0)
    if len(columns) < 2:
        return ""
    rows = [
        f"<tr><th>{kind}</th>"
        + "".join(
            f"<td>{_image(pictures[kind], f'{kind}, {_called(entry)}') if kind in pictures else ''}</td>"
            for entry, pictures in columns
        )
        + "</tr>"
        for kind in KINDS
        if any(kind in pictures for _, pictures in columns)
    ]
    heads = "".join(f"<th>{entry.iteration}</th>" for entry, _ in columns)
    return f'<table class="strip"><tr><th>iteration</th>{heads}</tr>{"".join(rows)}</table>'


_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", Arial, sans-serif; color: #1d2125; background: #fff;
  max-width: 960px; margin: 32px auto; padding: 0 20px; }
h1 { font-size: 24px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 16px 0 6px; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-top: 10px; border-top: 1px solid #d5d9dd; }
dl { display: grid; grid-template-columns: max-content auto; gap: 1px 18px; margin: 0; }
dt { color: #60666c; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { color: #60666c; font-size: 13px; text-align: center; }
figcaption span { margin: 0 6px; white-space: nowrap; }
i { display: inline-block; width: 12px; height: 10px; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, "DejaVu Sans", Arial, sans-serif; fill: #3c4248; }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.row img { width: 308px; }
.caution { border-left: 4px solid #c4571a; background: #fdf4ee; padding: 8px 14px; }
.failed { color: #a3322e; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
.strip td { padding: 1px; }
.strip { margin-top: 10px; }
.strip img { display: block; width: 66px; }
.strip th { padding-right: 6px; font-weight: normal; font-size: 12px; color: #60666c; }
.requests { font-size: 12px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.requests th, .requests td { padding: 3px 12px 3px 0; border-bottom: 1px solid #e6e9ec; text-align: right; }
.requests :first-child, .requests :last-child { text-align: left; }
"""
