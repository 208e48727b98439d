"""A data set split into parts by a table, so that no held-out structure slips into training."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryored.errors import InputError

_COLUMNS = ("id", "file", "split")
_NAMED = 5  # offenders that a message names


@dataclass(frozen=True)
class Split:
    """Which part each structure is of.

    Parameters
    ----------
    name : str
        Of the table, for messages.
    parts : dict of str to set of str
        Lower-case file name without folder, and lower-case id, to the parts that the table lists it under.
    """

    name: str
    parts: dict[str, set[str]]

    def parts_of(self, structure: str) -> set[str]:
        """Return the parts of a structure, given by its path or its name; more than one if the table is ambiguous."""
        file = os.path.basename(structure).lower()
        return self.parts.get(file, set()) | self.parts.get(_stem(file), set())


def read_split(path: str | os.PathLike[str]) -> Split:
    """Read a table of structures: CSV with a header and at least the columns id, file and split.

    Raises
    ------
    InputError
        The file cannot be read, has no such columns, or lists nothing.
    """
    name = os.fspath(path)
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise InputError(
                    f"{name}: begins with {found[:60]}, expected a CSV table with the columns id, file, split"
                )
            rows = list(reader)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{name}: no CSV table ({error}), expected one with the columns id, file, split") from error
    parts: dict[str, set[str]] = {}
    for row in rows:
        identity, file, part = ((row[column] or "").strip() for column in _COLUMNS)
        for key in {identity.lower(), os.path.basename(file).lower(), _stem(file.lower())} - {""}:
            parts.setdefault(key, set()).add(part)
    if not parts:
        raise InputError(f"{name}: lists no structures, expected a row for each")
    return Split(name, parts)


def check_split(structures: Sequence[str], manifest: str | os.PathLike[str], part: str) -> None:
    """Refuse structures that a table does not list as of one part.

    Parameters
    ----------
    structures : sequence of str
        Paths or bare names. A structure is found by its file name without folder and by its id, which is the
        file name up to its first dot; case does not matter.
    manifest : path
        See `read_split`.
    part : str
        A name that the table's column split holds.

    Raises
    ------
    InputError
        A structure is of another part, of several, or not listed; the message names the first few.
    """
    split = read_split(manifest)
    known = set[str]().union(*split.parts.values())
    if part not in known:
        raise InputError(f"{split.name}: no structure is of part '{part}'; its parts are {', '.join(sorted(known))}")
    offenders = []
    for structure in structures:
        found = split.parts_of(structure)
        if found != {part}:
            offenders.append(f"{os.path.basename(structure)} ({' and '.join(sorted(found)) or 'not listed'})")
    if offenders:
        first = ", ".join(offenders[:_NAMED]) + (", ..." if len(offenders) > _NAMED else "")
        raise InputError(
            f"{split.name}: {len(offenders)} of {len(structures)} structures are not of part '{part}': {first}; leave "
            "them out"
        )


def _stem(file: str) -> str:
    return os.path.basename(file).split(".")[0]
