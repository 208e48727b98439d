"""Curves as SVG text and sections of maps as PNG bytes, to stand inside an HTML page without any other file."""

from __future__ import annotations

import html
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

COLOURS = ("#1f5fa8", "#c4571a", "#2e7d4f", "#7b4fa3", "#a3322e", "#5b6770", "#b08a00", "#1d8a99")
_LIGHT, _DARK = (176, 206, 235), (8, 38, 84)  # red, green, blue of the first and the last curve of a sequence
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 40  # margins of the plot in pixels
_HAIR = "#d5d9dd"


@dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Parameters
    ----------
    title : str
    low, high : float
        Its ends.
    ticks : sequence of (float, str)
        Where a mark goes, and its text.
    """

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def place(self, value: float, length: float) -> float:
        """Return where a value lies along the axis, which is so many pixels long."""
        return (value - self.low) / (self.high - self.low) * length


@dataclass(frozen=True)
class Line:
    """A curve with its label, which the browser shows under the mouse.

    Parameters
    ----------
    x, y : sequence of float
    colour, label : str
    width : float
        In pixels.
    points : bool
        Mark each value.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    label: str
    width: float = 1.6
    points: bool = False


def shades(number: int) -> list[str]:
    """Return colours of one hue from light to dark."""
    steps = np.linspace(_LIGHT, _DARK, number) if number > 1 else [_DARK]
    return ["#" + "".join(f"{round(channel):02x}" for channel in step) for step in steps]


def round_axis(title: str, values: Iterable[float], *, whole: bool = False) -> Axis:
    """Return an axis that holds all values that are finite, with a few ticks at round numbers.

    Parameters
    ----------
    whole : bool
        The values are counts: ticks at whole numbers only, and room beside the first and the last.
    """
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known), max(known)
    if whole:
        low, high = low - 0.5, high + 0.5
    elif math.isclose(low, high):
        high = low + 1
    rough = (high - low) / 6
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= rough)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        # 0.3 / 0.1 is a little less than 3.
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    ticks = [(mark * step, f"{mark * step:.6g}") for mark in range(first, last + 1)]
    return Axis(title, low, high, ticks)


def chart(lines: Sequence[Line], x: Axis, y: Axis, *, size: tuple[int, int], level: float | None = None) -> str:
    """Draw lines as an SVG element; points that are not finite are left out.

    Parameters
    ----------
    size : (int, int)
        Width and height in pixels.
    level : float, optional
        A dashed horizontal line with its number.
    """
    width, height = size[0] - _LEFT - _RIGHT, size[1] - _TOP - _BOTTOM
    frame = f'viewBox="{-_LEFT} {-_TOP} {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}"'
    parts = [f'<svg {frame} role="img" aria-label="{html.escape(y.title)}">']
    for value, text in x.ticks:
        at = x.place(value, width)
        parts.append(f'<path d="M{at:.1f} 0V{height}" stroke="{_HAIR}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height + 15}" text-anchor="middle">{html.escape(text)}</text>')
    for value, text in y.ticks:
        at = height - y.place(value, height)
        parts.append(f'<path d="M0 {at:.1f}H{width}" stroke="{_HAIR}"/>')
        parts.append(f'<text x="-6" y="{at + 4:.1f}" text-anchor="end">{html.escape(text)}</text>')
    if level is not None:
        at = height - y.place(level, height)
        parts.append(f'<path d="M0 {at:.1f}H{width}" stroke="#60666c" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{width - 4}" y="{at - 5:.1f}" text-anchor="end">{level:g}</text>')
    for line in lines:
        places = [
            f"{x.place(a, width):.1f},{height - y.place(b, height):.1f}"
            for a, b in zip(line.x, line.y, strict=True)
            if math.isfinite(a) and math.isfinite(b)
        ]
        label = f"<title>{html.escape(line.label)}</title>"
        look = f'stroke="{line.colour}" stroke-width="{line.width}" stroke-linejoin="round"'
        parts.append(f'<polyline points="{" ".join(places)}" fill="none" {look}>{label}</polyline>')
        if line.points:
            for place in places:
                across, down = place.split(",")
                parts.append(f'<circle cx="{across}" cy="{down}" r="2.8" fill="{line.colour}">{label}</circle>')
    parts.append(f'<text x="{width / 2}" y="{height + 33}" text-anchor="middle">{html.escape(x.title)}</text>')
    parts.append(
        f'<text transform="translate({11 - _LEFT} {height / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y.title)}</text></svg>"
    )
    return "\n".join(parts)


def grey_png(section: npt.NDArray[np.float32], edge: int) -> bytes:
    """Return a section (y, x) of a map as a PNG of 8-bit grey with y upwards.

    The scale runs from its 0.5th to its 99.8th percentile. Means over blocks of pixels bring it down to at most
    `edge` pixels a side. What is not finite is drawn as 0.
    """
    section = np.where(np.isfinite(section), section, np.float32(0))
    block = -(-max(section.shape) // edge)
    rows, columns = (n // block for n in section.shape)
    small = section[: rows * block, : columns * block].reshape(rows, block, columns, block).mean((1, 3))
    low, high = np.percentile(small, (0.5, 99.8))
    scale = 255 / (high - low) if high > low else 0.0
    grey = np.rint(((small - low) * scale).clip(0, 255)).astype(np.uint8)[::-1]
    lines = np.pad(grey, ((0, 0), (1, 0)))  # before each line the number of its filter: none
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
