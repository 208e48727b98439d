"""What can go wrong, in the user's words.

Each message names the file, what was found, what was expected and what to do. The command line prints it as
one line (``cryored: error: ...``) and exits with status 1.
"""


class CryoredError(Exception):
    """Root of all errors whose cause is the input, the machine or the user's choice."""


class InputError(CryoredError, ValueError):
    """An input file or value is not what the command needs."""


class OutputError(CryoredError, OSError):
    """A result cannot be written."""


class ModelError(CryoredError):
    """A model is missing, damaged or does not fit the task."""
