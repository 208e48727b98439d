"""What can go wrong, in the user's words.

Each message names the file, what was found, what was expected and what to do. The command line prints it as
one line (``cryored: error: ...``) and exits with status 1.
"""

from __future__ import annotations


class CryoredError(Exception):
    """Root of all errors whose cause is the input, the machine or the user's choice."""


class InputError(CryoredError, ValueError):
    """An input file or value is not what the command needs."""


class OutputError(CryoredError, OSError):
    """A result cannot be written."""


class ModelError(CryoredError):
    """A model is missing, damaged or does not fit the task."""


def in_words(error: BaseException) -> str:
    """Return one line about an error, with its kind where nobody has foreseen it."""
    if isinstance(error, MemoryError):
        return f"not enough memory ({error or 'allocation failed'}); use smaller tiles or fewer threads"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, CryoredError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
