"""End to end: RELION refines with its own update, with lambda 0, and with the prior, watched and by the hook alone."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import refine

from cryored.files.mrc import read_volume
from cryored.prior.lambda_schedule import model_schedule
from cryored.prior.models import find_model

pytestmark = [
    pytest.mark.relion,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="RELION is not on the PATH"),
]

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"


COLD = 2  # iterations of the run whose every request starts Python and TensorFlow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refinement")
    data = refine.make_data(str(STRUCTURE), folder, box=32, angpix=3.0, number=40, snr=0.3)
    refine.run(data, "relion", refine.VARIANTS["relion"], watch=False)
    refine.run(data, "map", refine.VARIANTS["map"], watch=False)
    refine.run(data, "cwred", refine.VARIANTS["cwred"], watch=True)
    how = refine.VARIANTS["cwred"].reconstruction(data)
    refine.refine_by(data, "cold", how, search=[*refine.LOCAL_SEARCH, "--auto_iter_max", str(COLD)])
    return data


def records(data, name):
    """The log of each of a run's requests, by request."""
    found = {}
    for star in sorted((data.folder / name).glob("run_it*_external_reconstruct.star")):
        log = star.with_name(star.name.replace("_external_reconstruct.star", "_cryored.log"))
        found[star.name] = [json.loads(line) for line in log.read_text().splitlines()]
    return found


def test_lambda_0_is_relions_own_refinement(data):
    assert refine.iterations(data, "map") == refine.iterations(data, "relion")
    for ours, theirs in zip(refine.half_maps(data, "map"), refine.half_maps(data, "relion"), strict=True):
        # Each iteration's map differs by float32 rounding (2e-7). Alignment follows the map smoothly, so that the
        # final maps differ by little more: 3e-7 measured.
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", ["map", "cwred", "cold"])
def test_every_request_is_logged_once(data, name):
    logs = records(data, name)
    # Two halves an iteration, and the joined last one, which a run that is cut short does not come to.
    assert len(logs) == (2 * COLD if name == "cold" else 2 * (refine.iterations(data, name) - 1) + 1)
    for request, lines in logs.items():
        assert len(lines) == 1, request
        (record,) = lines
        assert record["request"].endswith(request)
        assert record["model_sha256"]
        assert record["seconds"]["total"] > 0
        assert 0.5 < record["power_ratio"] < 1.5
        assert record["by"] == ("watch" if name == "cwred" else "red-update")
        assert (record["lambda"] == 0) == (record["device"] == "CPU, no network")
        if name == "map":
            assert record["lambda"] == 0


def test_a_watched_refinement_is_the_same(data):
    for half in (1, 2):
        watched, cold = (
            read_volume(data.folder / name / f"run_it{COLD:03d}_half{half}_class001.mrc").data
            for name in ("cwred", "cold")
        )
        # Two maps at once in the network, and its threads, add in another order: float32 rounding, which the
        # alignment follows smoothly.
        assert np.linalg.norm(watched - cold) <= 1e-4 * np.linalg.norm(cold)
    assert max(line["lambda"] for lines in records(data, "cold").values() for line in lines) > 0.1
    report = (data.folder / "cwred" / "report.html").read_text()
    assert all(f"run_it{number:03d}_half2_class001" in report for number in range(1, refine.iterations(data, "cwred")))


def test_the_prior_was_at_work(data):
    schedule = model_schedule(find_model("cwred"))
    for lines in records(data, "cwred").values():
        resolution = lines[0]["nominal_resolution"]
        assert lines[0]["lambda"] == pytest.approx(schedule(resolution), abs=1e-3)  # printed with three decimals
    assert max(line["lambda"] for lines in records(data, "cwred").values() for line in lines) > 0.1


def test_the_last_map_is_plain_and_the_one_with_the_prior_lies_beside(data):
    """RELION's program gets the same request, and the same map comes out."""
    (log,) = [lines for name, lines in records(data, "cwred").items() if "half" not in name]
    assert log[0]["with_prior"].endswith("_class001_denoised.mrc")
    beside = refine.final_map(data, "cwred")
    assert str(beside).endswith(log[0]["with_prior"])
    request = next(
        path for path in (data.folder / "cwred").glob("run_it*_external_reconstruct.star") if "half" not in path.name
    )
    given = read_volume(request.with_suffix(".mrc")).data
    command = ["relion_external_reconstruct", str(request.relative_to(data.folder)), "--skip_gridding"]
    subprocess.run(command, cwd=data.folder, check=True, capture_output=True)
    own = read_volume(request.with_suffix(".mrc")).data
    assert np.linalg.norm(given - own) <= 1e-6 * np.linalg.norm(own)
    assert np.linalg.norm(read_volume(beside).data - own) > 0.05 * np.linalg.norm(own)


def test_cwred_is_at_least_as_near_to_the_truth_as_map(data):
    plain, prior = refine.judge(data, ["map", "cwred"])
    assert prior["mean_truth_fsc"] >= plain["mean_truth_fsc"]
