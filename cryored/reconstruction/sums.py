"""RELION's B and K from the files of a request, and the FSC that follows from them where RELION has none."""

from __future__ import annotations

from dataclasses import replace

from cryored.errors import InputError
from cryored.files.mrc import read_array
from cryored.files.requests import Request
from cryored.reconstruction.update import Accumulators, check_accumulators, estimated_fsc


def load_sums(request: Request, threads: int | None = None) -> Accumulators:
    """Map B and K of a request into memory and check every value."""
    sums = _mapped(request)
    names = (str(request.data_real), str(request.data_imag), str(request.weight))
    check_accumulators(sums, names, threads)
    return sums


def with_fsc(request: Request, threads: int | None = None) -> Request:
    """Return a request whose FSC is known: where RELION has none, without half-maps, the one by tau2 and K."""
    if request.fsc.any():
        return request
    fsc = estimated_fsc(_mapped(request), request.tau2, threads=threads)
    return replace(request, fsc=fsc, estimated=bool(fsc.any()))


def _mapped(request: Request) -> Accumulators:
    files = (request.data_real, request.data_imag, request.weight)
    for path in files:
        if not path.exists():
            raise InputError(
                f"{path}: missing, expected beside {request.star}; paths in the request are relative to RELION's "
                "project folder: run the command there"
            )
    real, imag, weight = (read_array(path, request.array_shape) for path in files)
    return Accumulators(real, imag, weight, request.ori, request.pad, request.r_max)
