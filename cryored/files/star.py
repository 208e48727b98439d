"""STAR tables, through gemmi's CIF reader: the only module that knows the format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gemmi import cif

from cryored.errors import InputError
from cryored.files.output import is_stream, stdin_bytes, write_text

_RESERVED = ("data_", "loop_", "save_", "stop_", "global_")

Column = Sequence[object] | npt.NDArray[np.generic]
Table = Mapping[str, Column]
Block = Mapping[str, object]


@dataclass(frozen=True)
class Star:
    """A STAR file in memory; labels are written without their underscore (``rlnPixelSize``)."""

    name: str
    document: cif.Document

    def blocks(self) -> list[str]:
        """Return the names of the data blocks."""
        return [block.name for block in self.document]

    def block(self, name: str) -> cif.Block:
        """Return a data block; raise `InputError` if the file has none of that name."""
        block = self.document.find_block(name)
        if block is None:
            found = ", ".join(f"data_{other}" for other in self.blocks()) or "no block at all"
            raise InputError(f"{self.name}: found {found}, expected a block data_{name}")
        return block

    def find_text(self, block: str, label: str) -> str | None:
        """Return the value of a list item, or None."""
        found = self.document.find_block(block)
        value = found.find_value(f"_{label}") if found is not None else None
        return None if value is None else cif.as_string(value)

    def text(self, block: str, label: str) -> str:
        """Return the value of a list item as text."""
        value = self.block(block).find_value(f"_{label}")
        if value is None:
            raise InputError(f"{self.name}: _{label} is missing from data_{block}")
        return cif.as_string(value)

    def number(self, block: str, label: str) -> float:
        """Return the value of a list item as a number."""
        text = self.text(block, label)
        try:
            return float(text)
        except ValueError:
            raise InputError(f"{self.name}: _{label} is '{text}', expected a number") from None

    def has_column(self, block: str, label: str) -> bool:
        """Tell whether a loop has a column."""
        found = self.document.find_block(block)
        return found is not None and bool(found.find_loop(f"_{label}"))

    def texts(self, block: str, label: str) -> list[str]:
        """Return a column of a loop (or the one value of a list) as texts."""
        column = self.block(block).find_values(f"_{label}")
        if not column:
            raise InputError(f"{self.name}: the column _{label} is missing from data_{block}")
        return [cif.as_string(value) for value in column]

    def numbers(self, block: str, label: str) -> npt.NDArray[np.float64]:
        """Return a column of a loop as float64 numbers."""
        texts = self.texts(block, label)
        try:
            return np.array(texts, dtype=np.float64)
        except ValueError as error:
            raise InputError(f"{self.name}: _{label} in data_{block}: {error}") from None


def read_star(path: str | os.PathLike[str]) -> Star:
    """Read a STAR file (RELION 3.0 to 5), or standard input for ``-``.

    Raises
    ------
    InputError
        The file is missing or no STAR file; the message has the line.
    """
    if is_stream(path):
        return parse_star(stdin_bytes().read(), "standard input")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    return parse_star(content, os.fspath(path))


def parse_star(content: bytes, name: str) -> Star:
    """Parse the content of a STAR file; `name` is for messages."""
    try:
        return Star(name, cif.read_string(content.decode("utf-8-sig")))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: no STAR file ({reason})") from error


def format_star(blocks: Mapping[str, Block | Table]) -> str:
    """Lay out blocks as RELION does.

    Parameters
    ----------
    blocks : mapping
        Block name to labels. A block whose values are all sequences becomes a loop, any other a list.
    """
    parts = ["", "# version 30001"]
    for name, items in blocks.items():
        parts += ["", f"data_{name}", ""]
        if all(isinstance(value, (list, tuple, np.ndarray)) for value in items.values()):
            parts += ["loop_"]
            parts += [f"_{label} #{number}" for number, label in enumerate(items, 1)]
            columns = [[_format(value) for value in column] for column in items.values()]  # type: ignore[attr-defined]
            parts += [" ".join(row) for row in zip(*columns, strict=True)]
        else:
            parts += [f"_{label:<40} {_format(value)}" for label, value in items.items()]
        parts += [""]
    return "\n".join(parts) + "\n"


def write_star(path: str | os.PathLike[str], blocks: Mapping[str, Block | Table]) -> None:
    """Write blocks (see `format_star`) whole, or to standard output for ``-``."""
    write_text(path, format_star(blocks))


def _format(value: object) -> str:
    if isinstance(value, (float, np.floating)):
        number = float(value)
        # RELION prints six decimals, or an exponent where these would lose the value.
        text = f"{number:12.6f}" if number == 0 or 1e-3 <= abs(number) < 1e6 else f"{number:12.6e}"
        return text
    if isinstance(value, (int, np.integer)):
        return f"{int(value):6d}"
    text = str(value)
    # gemmi would quote more than needs it, and RELION quotes nothing.
    # Bare "." and "?" mean no value.
    plain = text not in ("", ".", "?") and not any(c.isspace() for c in text) and text[0] not in "_#$'\"[];"
    if plain and not text.lower().startswith(_RESERVED):
        return text
    quoted = str(cif.quote(text))
    # A text with both kinds of quotes becomes a field between semicolons, which must begin lines.
    return f"\n{quoted}" if quoted.startswith(";") else quoted
