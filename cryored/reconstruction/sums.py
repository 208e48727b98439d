"""RELION's B and K from the files of a request."""

from __future__ import annotations

from cryored.errors import InputError
from cryored.files.mrc import read_array
from cryored.files.requests import Request
from cryored.reconstruction.update import Accumulators, check_accumulators


def load_sums(request: Request, threads: int | None = None) -> Accumulators:
    """Map B and K of a request into memory and check every value."""
    files = (request.data_real, request.data_imag, request.weight)
    for path in files:
        if not path.exists():
            raise InputError(
                f"{path}: missing, expected beside {request.star}; paths in the request are relative to RELION's "
                "project folder: run the command there"
            )
    real, imag, weight = (read_array(path, request.array_shape) for path in files)
    sums = Accumulators(real, imag, weight, request.ori, request.pad, request.r_max)
    names = (str(files[0]), str(files[1]), str(files[2]))
    check_accumulators(sums, names, threads)
    return sums
