"""A hook for RELION that knows the truth: it stands in for the denoised map, by eq. 17 with lambda 1.

No network can give more in this loop, so it is what a prior's gain is measured by. The truth goes onto the grey scale
of the request's own map, since particles and maps are not on the truth's.

    RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE="python benchmarks/oracle.py TRUTH.mrc" relion_refine ...
"""

from __future__ import annotations

import sys

import numpy as np

from cryored.errors import CryoredError, InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.files.requests import is_joined, read_request_file
from cryored.maps.truth_scale import grey_scale
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import DEFAULT_MODEL, find_model
from cryored.reconstruction.sums import load_sums
from cryored.reconstruction.update import reconstruct
from cryored.refinement.updater import Settings, Updater


def answer(truth_path: str, job: str) -> None:
    """Answer one request; the joined halves get the plain MAP map, as cryored's do."""
    truth = read_volume(truth_path)
    request = read_request_file(job, angpix=truth.voxel_size)
    sums = load_sums(request)
    # The network is never loaded: the truth is given.
    updater = Updater(Settings(lam=0.0 if is_joined(request) else 1.0), Denoiser(find_model(DEFAULT_MODEL)))
    try:
        scale = np.float32(grey_scale(reconstruct(sums), truth.data, request.fsc))
    except InputError:  # no shell to compare in: nothing to say
        scale = np.float32(0)
    result = updater.answer(request, sums, denoised=truth.with_data(truth.data * scale)).result
    write_volume(str(request.result), result, label="truth as the prior")


if __name__ == "__main__":
    try:
        answer(*sys.argv[1:3])
    except (CryoredError, OSError) as error:
        sys.exit(f"oracle: error: {error}")
