"""The command ``cryored red-update`` and the script that RELION calls."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import scipy.ndimage
from click.testing import CliRunner

import cryored
from cryored.cli import cli
from cryored.files.mrc import read_array, read_volume, write_volume
from cryored.files.requests import read_request
from cryored.files.star import read_star
from cryored.maps.volume import Volume
from cryored.prior.lambda_schedule import Schedule
from cryored.reconstruction.update import Accumulators, Denoised, inverse_prior, reconstruct
from cryored.refinement.updater import Settings, Updater

REPOSITORY = Path(__file__).parents[1]
REQUESTS = Path(__file__).parent / "data" / "relion_requests"
STARS = sorted(REQUESTS.glob("*/run/*_external_reconstruct.star"))

# The specification's bound on float32 arithmetic against RELION in double precision, whose files are float32.
FLOAT32 = 1e-6


class Project:
    """A copy of a recorded case, the current folder, with one of its requests."""

    def __init__(self, folder, name):
        self.folder = folder
        self.root = f"run/{name}"
        self.job = f"{self.root}_external_reconstruct.star"
        self.result = Path(f"{self.root}_external_reconstruct.mrc")
        self.stale = Path(f"{self.root}_external_reconstruct_out.star")
        self.log = Path(f"{self.root}_cryored.log")
        self.arrays = [Path(f"{self.root}_external_reconstruct_{part}.mrc") for part in ("data_real", "data_imag")]
        self.weight = Path(f"{self.root}_external_reconstruct_weight.mrc")
        self.arrays.append(self.weight)

    def run(self, *arguments, stdin=None):
        command = ["red-update", self.job, "--model", "../model", *map(str, arguments)]
        return CliRunner().invoke(cli, command, input=stdin)

    def expected(self, kind):
        return read_volume(f"{self.root}_external_reconstruct_expected_{kind}.mrc").data

    def records(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def files(self):
        """Return every file of the project and what is in it."""
        return {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}

    def change(self, old, new):
        text = Path(self.job).read_text()
        assert old in text
        Path(self.job).write_text(text.replace(old, new))

    def load(self):
        request = read_request(read_star(self.job))
        arrays = [read_array(path, request.array_shape) for path in self.arrays]
        return request, Accumulators(*arrays, request.ori, request.pad, request.r_max)


def write_card(folder, **items):
    """Write a model whose weights no network can be made of: enough where none is run."""
    folder.mkdir(exist_ok=True)
    weights = b"no network"
    (folder / "model.keras").write_bytes(weights)
    card = {
        "name": "blank",
        "input": "regularised",
        "pixel_size": 1.5,
        "width": 2,
        "depth": 2,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "resolution_range": [3.0, 18.0],
    }
    (folder / "card.json").write_text(json.dumps(card | items))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a function that sets up a case; the default one is small and has a lambda of its own."""

    def set_up(case="pka_box64_pad1", name="run_it001_half1_class001"):
        folder = tmp_path / "project"
        shutil.copytree(REQUESTS / case, folder)
        write_card(tmp_path / "model")
        monkeypatch.chdir(folder)
        return Project(folder, name)

    return set_up


SMALL = ("box36_pad1_c2", "run_it006_half1_class001")
CLASS3D = ("class3d_box32_pad2", "run_it002_class001")


def difference(found, wanted):
    """Return the relative L2 difference over all voxels."""
    return np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64))


def assert_refused(done, message):
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("cryored: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# Results


@pytest.mark.parametrize("star", STARS, ids=lambda path: f"{path.parents[1].name}/{path.stem}")
def test_lambda_0_is_relions_map(project, star):
    job = project(star.parents[1].name, star.name.removesuffix("_external_reconstruct.star"))
    done = job.run("--lambda", 0, "--unregularised", "raw.mrc")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert difference(read_volume(job.result).data, job.expected("map")) <= FLOAT32
    assert difference(read_volume("raw.mrc").data, job.expected("unregularised")) <= FLOAT32


def test_the_file_that_relion_gets(project):
    job = project(*SMALL)
    assert job.run("--lambda", 0).exit_code == 0
    assert mrcfile.validate(job.result)
    with mrcfile.open(job.result) as mrc:
        assert mrc.data.shape == (36, 36, 36)
        assert int(mrc.header.mode) == 2
        # Float32 of the cell, 108 A.
        assert float(mrc.voxel_size.x) == pytest.approx(3.0, rel=1e-6)
        assert mrc.get_labels() == [f"cryored {cryored.__version__} red-update lambda 0 (MAP)"]


@pytest.mark.parametrize(("version", "items"), [("30001", ""), ("30001", "_rlnPixelSize 3.0\n"), ("50001", "4 and 5")])
def test_requests_of_relion_4_and_5_give_the_same(project, version, items):
    job = project(*SMALL)
    wanted = job.expected("map")
    if items:
        for model in Path("run").glob("*_model.star"):
            model.unlink()
        items = "_rlnPixelSize 3.000000\n_rlnParticleDiameter 90.000000\n"
    text = Path(job.job).read_text().replace("# version 30001", f"# version {version}")
    Path(job.job).write_text(text.replace("_rlnReferenceDimensionality", items + "_rlnReferenceDimensionality"))
    done = job.run("--lambda", 0)
    assert done.exit_code == 0, done.stderr
    assert difference(read_volume(job.result).data, wanted) <= FLOAT32
    assert read_volume(job.result).voxel_size == 3.0


def test_a_denoised_map_meets_equation_17(project):
    """What stands in for the network is a Gaussian filter; the number is eq. 17 of the update, tested there."""
    job = project()
    assert job.run("--lambda", 0, "-o", "map.mrc").exit_code == 0
    regularised = read_volume("map.mrc")
    smooth = scipy.ndimage.gaussian_filter(regularised.data, 1.5)
    write_volume("smooth.mrc", regularised.with_data(smooth), label="test")
    request, sums = job.load()
    prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    for number, (arguments, lam, extrapolate) in enumerate(
        [
            (["--lambda", 0.25], 0.25, False),
            (["--lambda", 1, "--extrapolate"], 1.0, True),
            ([], Schedule()(96 / 13), False),  # 7.4 A
        ]
    ):
        done = job.run("--denoised", "smooth.mrc", "-o", f"{number}.mrc", *arguments)
        assert done.exit_code == 0, done.stderr
        wanted = reconstruct(sums, prior=prior, denoised=Denoised(smooth, lam * np.ones(33), extrapolate))
        found = read_volume(f"{number}.mrc").data
        assert difference(found, regularised.data) > 0.001  # the filter takes little off a map of 7.4 A
        np.testing.assert_array_equal(found, wanted)
    assert not job.result.exists()


def test_lambda_0_with_a_denoised_map_is_the_map(project):
    job = project(*SMALL)
    shape = job.expected("map").shape
    write_volume("noise.mrc", Volume(np.ones(shape, np.float32), 3.0), label="test")
    assert job.run("--denoised", "noise.mrc").exit_code == 0  # auto gives 0 at 10.8 A
    assert difference(read_volume(job.result).data, job.expected("map")) <= FLOAT32


def write_wave(job):
    """Write the MAP map, map.mrc, and with a packet of waves of 4 A along x, wave.mrc."""
    assert job.run("--lambda", 0, "-o", "map.mrc").exit_code == 0
    regularised = read_volume("map.mrc")
    z, y, x = np.indices((64,) * 3) - 32
    wave = np.cos(2 * np.pi * 1.5 * x / 4) * np.exp(-(z**2 + y**2 + x**2) / (2 * 7**2)) * regularised.data.max()
    write_volume("wave.mrc", regularised.with_data((regularised.data + wave).astype(np.float32)), label="test")


def test_the_prior_fades_at_the_models_nyquist_frequency(project, tmp_path):
    """Where the map is finer than the model, what the denoised map holds beyond has no say."""
    job = project(name="run_it012_class001")  # data up to 3 A
    write_wave(job)
    change = {}
    for pixel_size in (1.5, 3.0):  # voxels of 3 A hold nothing beyond 6 A
        write_card(tmp_path / "model", pixel_size=pixel_size)
        maps = []
        for name in ("wave", "map"):
            done = job.run("--denoised", f"{name}.mrc", "--lambda", 1, "-o", "out.mrc", "--overwrite")
            assert done.exit_code == 0, done.stderr
            maps.append(read_volume("out.mrc").data)
        change[pixel_size] = difference(*maps)
    assert change[1.5] > 0.1
    assert change[3.0] < 1e-5  # the packet ends at 3e-5 of its height at the faces of the box, in all frequencies


def test_beyond_its_limit_the_prior_has_no_say(project):
    """A packet of waves of 4 A in the denoised map is in the result for a limit of 3.2 A, and is not for one of 6 A."""
    job = project(name="run_it012_class001")  # data up to 3 A
    write_wave(job)
    change = {}
    for limit in ("3.2", "6"):
        maps = []
        for name in ("wave", "map"):
            done = job.run(
                "--denoised", f"{name}.mrc", "--lambda", 1, "--prior-limit", limit, "-o", f"{name}{limit}.mrc"
            )
            assert done.exit_code == 0, done.stderr
            maps.append(read_volume(f"{name}{limit}.mrc").data)
        change[limit] = difference(*maps)
    assert change["3.2"] > 0.1
    assert change["6"] < 1e-5
    assert job.records()[-1]["prior_limit"] == 6


def test_an_updater_takes_requests_together(project):
    """The halves of an iteration share one call of the network; each gets what it gets alone."""
    job = project()
    request, sums = job.load()
    other = dataclasses.replace(request, tau2=request.tau2 / 2)

    class Halving:
        model = types.SimpleNamespace(card=types.SimpleNamespace(input="regularised", pixel_size=1.5))
        calls: typing.ClassVar = []

        def load(self):
            pass

        def denoise_all(self, volumes, fscs):
            self.calls.append(len(volumes))
            for fsc in fscs:
                np.testing.assert_array_equal(fsc, request.fsc)
            return [volume.with_data(volume.data / 2) for volume in volumes]

    updater = Updater(Settings(lam=1.0), Halving())
    begun = [updater.begin(one, sums) for one in (request, other)]
    denoised = updater.denoise(begun)
    assert Halving.calls == [2]
    assert all(one.denoised is None for one in begun)
    together = [updater.finish(one) for one in denoised]
    for one, answer in zip((request, other), together, strict=True):
        np.testing.assert_array_equal(answer.result.data, updater.answer(one, sums).result.data)
        assert 0 < answer.change < 0.5
        assert 1 < answer.power_ratio < 1.1  # MAP pulls towards 0, the prior towards half of the map


def test_class3d_by_the_estimated_fsc(project):
    """Without a number for lambda: tau2 and K stand for the halves' FSC."""
    job = project(*CLASS3D)
    shape = job.expected("map").shape
    write_volume("flat.mrc", Volume(np.zeros(shape, np.float32), 3.0), label="test")
    assert job.run("--denoised", "flat.mrc").exit_code == 0
    assert job.run("--lambda", 0.4, "--denoised", "flat.mrc").exit_code == 0
    by_itself, record = job.records()
    assert by_itself["fsc"] == "estimated from tau2 and K"
    assert by_itself["nominal_resolution"] == 24.0  # 0.89 in shell 4, 0.11 in shell 5, of 32 voxels of 3 A
    assert by_itself["lambda"] == 0.0  # by the paper's line
    assert by_itself["with_prior"] is None
    assert record["lambda"] == 0.4
    # A denoised map of nothing adds nothing.
    assert difference(read_volume(job.result).data, job.expected("map")) <= FLOAT32


def test_a_class_of_few_particles_is_map(project):
    """B and K of a thousandth of the particles determine no shell, and the prior stays out of it."""
    job = project(*CLASS3D)
    for path in job.arrays:
        with mrcfile.mmap(path, "r+", permissive=True) as mrc:
            mrc.data[:] /= 1000
    assert job.run("--lambda", 0).exit_code == 0
    plain = read_volume(job.result).data
    write_volume("ones.mrc", Volume(np.ones(plain.shape, np.float32), 3.0), label="test")
    assert job.run("--denoised", "ones.mrc").exit_code == 0
    np.testing.assert_array_equal(read_volume(job.result).data, plain)
    *_, record = job.records()
    assert record["fsc"] == "estimated from tau2 and K"
    assert record["lambda"] == 0
    assert record["nominal_resolution"] is None or record["nominal_resolution"] > 18


def test_what_it_takes_is_told_beforehand(project):
    job = project()
    plain, prior = (json.loads(job.run("--check", "--lambda", lam).stdout)["expected"] for lam in (0, 1))
    arrays = 3 * 4 * 64 * 64 * 33 / 2**30
    assert plain["arrays_gib"] == prior["arrays_gib"] == pytest.approx(arrays, abs=0.01)
    assert 0.05 < plain["memory_gib"] < 0.3
    assert 0.7 < prior["memory_gib"] < 1.2
    assert 0 <= plain["seconds"] < prior["seconds"] < 60
    assert_refused(job.run("--lambda", 1, "--max-memory", 0.25), "0.2 by --max-memory; raise it")
    assert job.run("--lambda", 0, "--max-memory", 0.25).exit_code == 0
    done = job.run("--max-memory", 0)
    assert done.exit_code == 2
    assert "'0' is not a number of GiB above 0" in done.stderr


def test_angpix_decides_lambda(project):
    job = project()
    lams = []
    for angpix in (1.0, 1.5, 3.0):
        done = job.run("--check", "--angpix", angpix)
        assert done.exit_code == 0, done.stderr
        lams.append(json.loads(done.stdout)["lambda"])
    assert lams == [round(Schedule()(64 * angpix / 13), 4) for angpix in (1.0, 1.5, 3.0)]


def test_a_stored_schedule(project):
    job = project()
    Path("s.json").write_text('{"resolution": [6, 9], "lambda": [0.8, 0.2]}')
    record = json.loads(job.run("--check", "--schedule", "s.json").stdout)
    assert record["lambda"] == round(0.8 - 0.6 * (96 / 13 - 6) / 3, 4)
    assert_refused(job.run("--schedule", "none.json"), "none.json: cannot be read")


def test_the_schedule_of_the_models_card(project, tmp_path):
    """Lambda auto follows it; paper, a file and a number do not."""
    job = project()  # 7.4 A
    write_card(tmp_path / "model", schedule={"resolution": [6, 12], "lambda": [0.9, 0.3], "pairs": 50})
    Path("s.json").write_text('{"resolution": [6, 9], "lambda": [0.8, 0.2]}')
    for arguments, lam, source in [
        ([], 0.9 - 0.6 * (96 / 13 - 6) / 6, "../model/card.json"),
        (["--lambda", "auto"], 0.9 - 0.6 * (96 / 13 - 6) / 6, "../model/card.json"),
        (["--lambda", "paper"], Schedule()(96 / 13), "the paper's line"),
        (["--schedule", "s.json"], 0.8 - 0.6 * (96 / 13 - 6) / 3, "s.json"),
        (["--lambda", 0.25], 0.25, None),
    ]:
        record = json.loads(job.run("--check", *arguments).stdout)
        assert record["lambda"] == round(lam, 4)
        assert record["schedule"] == source
    write_card(tmp_path / "model", schedule={"resolution": [6, 12], "lambda": [0.9]})
    assert_refused(job.run("--check"), "../model/card.json: no schedule")
    assert job.run("--check", "--lambda", "paper").exit_code == 0


def test_the_log_names_the_schedule(project, tmp_path):
    job = project(*SMALL)  # 10.8 A
    nothing = {"resolution": [5, 20], "lambda": [0, 0]}
    for schedule, source in [({}, "the paper's line"), (nothing, "../model/card.json")]:
        write_card(tmp_path / "model", schedule=schedule)
        done = job.run()
        assert "lambda 0.000 at 10.80 A, CPU, no network" in done.stderr
        record = job.records()[-1]
        assert record["schedule"] == source
        assert record["weights"]["rule"] == f"eq. 17, lambda by {source}"
    assert job.run("--lambda", 0).exit_code == 0
    assert job.records()[-1]["schedule"] is None


def test_threads_do_not_change_the_result(project):
    job = project(*SMALL)
    for threads in (1, 4):
        assert job.run("--lambda", 0, "--threads", threads, "-o", f"{threads}.mrc").exit_code == 0
    np.testing.assert_array_equal(read_volume("1.mrc").data, read_volume("4.mrc").data)


# What is written, and what is not


def test_log(project):
    job = project()
    job.run("--lambda", 0)
    write_volume("flat.mrc", Volume(np.zeros((64,) * 3, np.float32), 1.5), label="test")
    job.run("--denoised", "flat.mrc")
    first, second = job.records()
    card = json.loads(Path("../model/card.json").read_text())
    for record in (first, second):
        assert record["cryored"] == cryored.__version__
        assert record["request"] == job.job
        assert record["result"] == str(job.result)
        assert (record["model"], record["model_sha256"]) == ("blank", card["sha256"])
        assert (record["box"], record["pixel_size"], record["padding"], record["current_size"]) == (64, 1.5, 1.0, 26)
        assert record["nominal_resolution"] == round(96 / 13, 3)
        assert record["device"] == "CPU, no network"
        assert {"read", "map", "write", "total"} <= set(record["seconds"])
        assert record["time"][:2] == "20"
    assert first["lambda"] == 0
    assert first["power_ratio"] == 1
    assert second["lambda"] == round(Schedule()(96 / 13), 4)
    assert second["power_ratio"] == 1  # a denoised map of nothing
    assert "update" in second["seconds"]


def test_power_ratio(project):
    job = project()
    job.run("--lambda", 0, "-o", "map.mrc")
    regularised = read_volume("map.mrc")
    write_volume("twice.mrc", regularised.with_data(2 * regularised.data), label="test")
    assert job.run("--denoised", "twice.mrc", "-o", "more.mrc").exit_code == 0
    ratio = job.records()[-1]["power_ratio"]
    wanted = np.var(read_volume("more.mrc").data, dtype=np.float64) / np.var(regularised.data, dtype=np.float64)
    assert ratio == pytest.approx(wanted, abs=1e-5)  # five decimals are logged
    assert ratio > 1


def test_a_stale_table_is_removed(project):
    job = project(*SMALL)
    job.stale.write_text("data_external_reconstruct_tau2\n")
    assert job.run("--lambda", 0, "-o", "map.mrc").exit_code == 0
    assert job.stale.exists()  # another output leaves RELION's files alone
    assert job.run("--lambda", 0).exit_code == 0
    assert not job.stale.exists()


def test_only_result_and_log_are_written(project):
    job = project(*SMALL)
    before = job.files()
    assert job.run("--lambda", 0).exit_code == 0
    after = job.files()
    assert set(after) - set(before) == {job.result, job.log}
    assert {path: after[path] for path in before} == before


def test_the_results_file_is_replaced_without_asking_others_are_not(project):
    job = project(*SMALL)
    job.result.write_text("of an earlier run")
    assert job.run("--lambda", 0).exit_code == 0
    assert read_volume(job.result).shape == (36, 36, 36)
    for option in ("-o", "--unregularised"):
        Path("mine.mrc").write_text("mine")
        refused = job.run("--lambda", 0, option, "mine.mrc")
        assert_refused(refused, "mine.mrc: exists already; add --overwrite to replace it")
        assert Path("mine.mrc").read_text() == "mine"
        assert job.run("--lambda", 0, option, "mine.mrc", "--overwrite").exit_code == 0
        assert read_volume("mine.mrc").shape == (36, 36, 36)


def test_the_unregularised_map_goes_beside_the_request(project):
    """RELION's hook has the same options in every call; with --clean, what a harvest needs stays."""
    job = project(*SMALL)
    before = set(job.files())
    kept = Path(f"{job.root}_unregularised.mrc")
    kept.write_text("of an earlier run")
    done = job.run("--lambda", 0, "--unregularised", "{root}_unregularised.mrc", "--clean")
    assert done.exit_code == 0, done.stderr
    assert difference(read_volume(kept).data, job.expected("unregularised")) <= FLOAT32
    assert set(job.files()) ^ before == {job.result, job.log, kept, *job.arrays}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "s.mrc", "--unregularised", "s.mrc"], "s.mrc: named for two outputs"),
        (["--unregularised", "{root}_external_reconstruct.mrc"], "_external_reconstruct.mrc: named for two outputs"),
        (["--unregularised", "{root}_external_reconstruct_weight.mrc"], "_weight.mrc: is an input"),
        (["--unregularised", "{root}_cryored.log"], "_cryored.log: is an input"),
        (["--denoised", "d.mrc", "-o", "d.mrc"], "d.mrc: is an input"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_file_is_lost_to_another(project, words, message):
    job = project(*SMALL)
    before = job.files()
    assert_refused(job.run("--lambda", 0, "--overwrite", *words), message)
    assert job.files() == before


def test_check_writes_nothing(project):
    job = project()
    job.stale.write_text("stale")
    before = job.files()
    done = job.run("--check", "--clean")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["lambda"] == round(Schedule()(96 / 13), 4)
    assert record["result"] == str(job.result)
    assert job.files() == before


def test_check_finds_what_the_update_would(project):
    job = project()
    set_array(job.weight, lambda data: np.negative(data, out=data))
    assert_refused(job.run("--check"), "weights down to")
    Path("../model/model.keras").write_bytes(b"other")
    assert_refused(job.run("--check", "--lambda", 0), "sha256")


def test_clean(project):
    job = project(*SMALL)
    before = set(job.files())
    assert job.run("--lambda", 0, "--clean").exit_code == 0
    assert before - set(job.files()) == set(job.arrays)
    assert job.result.exists()


def test_clean_leaves_what_is_still_to_be_answered(project):
    """A map for somebody else is no answer: the arrays are for RELION's own, or for the next step by hand."""
    job = project(*SMALL)
    assert job.run("--lambda", 0, "--clean", "-o", "map.mrc").exit_code == 0
    assert all(path.exists() for path in job.arrays)
    assert job.run("--lambda", 0, "--clean").exit_code == 0
    assert not any(path.exists() for path in job.arrays)


def test_arrays_that_cannot_be_removed_are_told_of(project, monkeypatch):
    job = project(*SMALL)

    def refuse(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: refuse(path) if path in job.arrays else None)
        done = job.run("--lambda", 0, "--clean")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("cannot be removed: Permission denied") == 3
    assert job.result.exists() and len(job.records()) == 1


def test_clean_waits_for_success(project):
    job = project(*SMALL)
    job.result.mkdir()
    assert_refused(job.run("--lambda", 0, "--clean"), "is a folder, expected the name of a file to write")
    assert all(path.exists() for path in job.arrays)


def test_quiet(project):
    job = project(*SMALL)
    assert "lambda 0.000 at 10.80 A" in job.run("--lambda", 0).stderr
    assert job.run("--lambda", 0, "-q").stderr == ""


# Streams and the environment


def test_pipes(project):
    job = project()
    done = job.run("--lambda", 0, "-o", "-", "-q")
    assert done.exit_code == 0
    assert job.run("--lambda", 0, "-o", "map.mrc").exit_code == 0
    assert len(done.stdout_bytes) == 1024 + 4 * 64**3
    np.testing.assert_array_equal(np.frombuffer(done.stdout_bytes[1024:], "<f4"), read_volume("map.mrc").data.ravel())
    assert not job.result.exists()
    piped = job.run("--denoised", "-", "-o", "piped.mrc", stdin=done.stdout_bytes)
    assert piped.exit_code == 0, piped.stderr
    assert job.run("--denoised", "map.mrc", "-o", "named.mrc").exit_code == 0
    np.testing.assert_array_equal(read_volume("piped.mrc").data, read_volume("named.mrc").data)


def test_a_request_through_a_pipe(project):
    """It is taken as lying where its result goes."""
    job = project(*SMALL)
    before = set(job.files())
    command = ["red-update", "-", "--model", "../model", "--lambda", "0"]
    done = CliRunner().invoke(cli, command, input=Path(job.job).read_bytes())
    assert done.exit_code == 0, done.stderr
    assert set(job.files()) - before == {job.result, job.log}
    assert job.records()[0]["pixel_size"] == 3.0


def tool(*arguments, code=None, **environment):
    """Run ``python -m cryored`` as a process of its own."""
    start = ["-m", "cryored"] if code is None else ["-c", code]
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


def test_the_environment_stands_for_options(project, monkeypatch):
    job = project()
    for name, value, key, wanted in [
        ("LAMBDA", "0.125", "lambda", 0.125),
        ("ANGPIX", "1.25", "pixel_size", 1.25),
        ("EXTRAPOLATE", "1", "extrapolate", True),
        ("OUTPUT", "other.mrc", "result", "other.mrc"),
    ]:
        monkeypatch.setenv(f"CRYORED_RED_UPDATE_{name}", value)
        done = job.run("--check")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)[key] == wanted
    assert json.loads(job.run("--check", "--lambda", "auto").stdout)["lambda"] == round(Schedule()(80 / 13), 4)
    monkeypatch.setenv("CRYORED_RED_UPDATE_LAMBDA", "2")
    refused = job.run("--check")
    assert refused.exit_code == 2
    assert "'2' is not auto, paper or a number between 0 and 1" in refused.stderr


def test_a_model_by_name(project, monkeypatch):
    job = project(*SMALL)
    monkeypatch.setenv("CRYORED_MODEL_PATH", f"/nowhere{os.pathsep}..")
    command = ["red-update", job.job, "--check", "--model", "model"]
    assert json.loads(CliRunner().invoke(cli, command).stdout)["model"] == "blank"
    assert_refused(CliRunner().invoke(cli, [*command[:-1], "none"]), "no model named 'none'; there is: ")


@pytest.mark.slow
def test_lambda_0_imports_no_network(project):
    job = project(*SMALL)
    code = (
        "import sys; from cryored.cli import cli\n"
        "cli.main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sorted({'tensorflow', 'keras', 'torch', 'jax'} & set(sys.modules)))"
    )
    done = tool("red-update", job.job, "--model", "../model", "--lambda", 0, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\n"
    assert job.result.exists()


# Bad input


def set_array(path, change):
    with mrcfile.open(path, mode="r+", permissive=True) as mrc:
        change(mrc.data)


def put(value):
    def change(data):
        data[3, 2, 1] = value

    return change


def resize(path, shape, dtype=np.float32):
    path.unlink()
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.ones(shape, dtype))


def cut(path, size):
    with path.open("r+b") as stream:
        stream.truncate(size)


def remove_table(job):
    text = Path(job.job).read_text()
    Path(job.job).write_text(text[: text.index("data_external_reconstruct_tau2")])


def nothing_known(job):
    lines = Path(job.job).read_text().splitlines()
    rows = [line.split() for line in lines]
    for number, row in enumerate(rows):
        if len(row) == 3 and row[0].isdigit():
            lines[number] = f"{row[0]} 0.0 0.0"
    Path(job.job).write_text("\n".join(lines) + "\n")


def pixel_size_0(job):
    job.change("_rlnReferenceDimensionality", "_rlnPixelSize 0.000000\n_rlnReferenceDimensionality")


def without_models(job):
    for path in Path("run").glob("*_model.star"):
        path.unlink()


BROKEN = {
    "no request": (lambda job: Path(job.job).unlink(), "external_reconstruct.star: cannot be read: No such file"),
    "empty request": (lambda job: Path(job.job).write_text(""), "expected a block data_external_reconstruct_general"),
    "no B": (
        lambda job: job.arrays[1].unlink(),
        "_data_imag.mrc: missing, expected beside run/run_it001_half1_class001_external_reconstruct.star; paths in the "
        "request are relative to RELION's project folder: run the command there",
    ),
    "no K": (lambda job: job.weight.unlink(), "_weight.mrc: missing, expected beside"),
    "empty K": (lambda job: cut(job.weight, 0), "_weight.mrc: no readable MRC file"),
    "header cut": (lambda job: cut(job.weight, 1000), "_weight.mrc: no readable MRC file"),
    "no values": (lambda job: cut(job.weight, 1024), "_weight.mrc: truncated, expected a map of 64 x 64 x 33 values"),
    "B cut": (lambda job: cut(job.arrays[0], 300000), "_data_real.mrc: truncated, expected a map of 64 x 64 x 33"),
    "K one byte short": (lambda job: cut(job.weight, 1024 + 4 * 64 * 64 * 33 - 1), "_weight.mrc: truncated, expected"),
    "K of another padding": (
        lambda job: resize(job.weight, (128, 128, 65)),
        "_weight.mrc: shape 128 x 128 x 65 (z, y, x), expected 64 x 64 x 33 from the request's box and padding",
    ),
    "B a whole map": (lambda job: resize(job.arrays[0], (64, 64, 64)), "_data_real.mrc: shape 64 x 64 x 64 (z, y, x)"),
    "STAR of another padding": (
        lambda job: job.change("_rlnPaddingFactor                          1.000000", "_rlnPaddingFactor 2.0"),
        "_data_real.mrc: shape 64 x 64 x 33 (z, y, x), expected 128 x 128 x 65 from the request's box and padding",
    ),
    "K of another mode": (
        lambda job: resize(job.weight, (64, 64, 33), np.int16),
        "_weight.mrc: MRC mode 1, expected 2 (float32) as RELION writes it",
    ),
    "NaN in B": (
        lambda job: set_array(job.arrays[0], put(np.nan)),
        "_data_real.mrc: 1 values are NaN or infinite, expected numbers",
    ),
    "infinity in B": (lambda job: set_array(job.arrays[1], put(-np.inf)), "_data_imag.mrc: 1 values are NaN or inf"),
    "NaN in K": (lambda job: set_array(job.weight, put(np.nan)), "_weight.mrc: 1 values are NaN or infinite"),
    "infinity in K": (lambda job: set_array(job.weight, put(np.inf)), "_weight.mrc: 1 values are NaN or infinite"),
    "negative K": (lambda job: set_array(job.weight, put(-2)), "_weight.mrc: weights down to -2, expected 0 or more"),
    "K of zeros": (
        lambda job: set_array(job.weight, lambda data: data.fill(0)),
        "_weight.mrc: all weights are 0: no particle contributed to this reconstruction",
    ),
    "no tau2": (
        remove_table,
        "no table of tau2, so a MAP reconstruction is impossible and lambda has no FSC (relion_reconstruct writes",
    ),
    "no FSC and no tau2": (nothing_known, "FSC and tau2 are zero in all shells, so lambda cannot be derived from them"),
    "pixel size 0": (pixel_size_0, "_rlnPixelSize is 0.000000, expected angstroms; give it with --angpix"),
    "no pixel size": (without_models, "holds no pixel size (RELION 3.1 writes none), and there is no _model.star"),
    "odd box": (
        lambda job: job.change("_rlnOriginalImageSize                            64", "_rlnOriginalImageSize 63"),
        "box 63, expected an even number: RELION itself refines in even boxes only, and an odd one has its centre "
        "elsewhere; re-extract the particles in an even box",
    ),
    "2D": (
        lambda job: job.change("_rlnReferenceDimensionality                       3", "_rlnReferenceDimensionality 2"),
        "a reconstruction in 2D (Class2D?), expected 3D",
    ),
    "wrong checksum": (
        lambda job: Path("../model/model.keras").write_bytes(b"others"),
        f"model.keras: sha256 {hashlib.sha256(b'others').hexdigest()[:12]}..., but its card says",
    ),
    "no weights": (lambda job: Path("../model/model.keras").unlink(), "model.keras: cannot be read: No such file"),
    "no model": (lambda job: shutil.rmtree("../model"), "../model: no model here, expected a folder with model.keras"),
    "broken card": (lambda job: Path("../model/card.json").write_text("{}"), "card.json: no usable model card"),
    "result in no folder": (
        lambda job: job.change("run/run_it001_half1_class001_external_reconstruct.mrc", "gone/map.mrc"),
        "gone/map.mrc: the folder gone does not exist; create it first",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_loses_nothing(project, name):
    """One line with the cause, status 1; the previous result and all else stay as they were."""
    breaking, message = BROKEN[name]
    job = project()
    job.result.write_text("of an earlier run")
    job.stale.write_text("stale")
    breaking(job)
    before = job.files()
    assert_refused(job.run("--clean"), message)
    assert job.files() == before


@pytest.mark.parametrize(
    ("shape", "voxel_size", "message"),
    [
        ((36, 36, 36), 1.5, "d.mrc: shape (36, 36, 36) (z, y, x), expected the request's box of 64 cubed"),
        ((64, 64, 64), 3.0, "d.mrc: pixel size 3 A, expected the request's 1.5 A"),
    ],
)
def test_a_denoised_map_of_another_grid(project, shape, voxel_size, message):
    job = project()
    write_volume("d.mrc", Volume(np.zeros(shape, np.float32), voxel_size), label="test")
    before = job.files()
    assert_refused(job.run("--denoised", "d.mrc"), message)
    assert job.files() == before


def test_a_denoised_map_that_is_none(project):
    job = project()
    assert_refused(job.run("--denoised", "none.mrc"), "none.mrc: cannot be read: No such file")
    data = np.ones((64,) * 3, np.float32)
    write_volume("nan.mrc", Volume(data, 1.5), label="test")
    set_array(Path("nan.mrc"), put(np.nan))
    assert_refused(job.run("--denoised", "nan.mrc"), "nan.mrc: 1 values are not finite")


def test_what_lambda_0_does_not_need_is_not_asked_for(project):
    """Neither weights nor a pixel size nor an FSC."""
    job = project()
    Path("../model/model.keras").unlink()
    assert job.run("--lambda", 0).exit_code == 0
    write_volume("d.mrc", Volume(np.ones((64,) * 3, np.float32), 1.5), label="test")
    without_models(job)
    assert job.run("--lambda", 0, "--denoised", "d.mrc").exit_code == 0
    nothing_known(job)
    assert job.run("--lambda", 0).exit_code == 0


def test_the_wrong_folder(project, monkeypatch):
    job = project(*SMALL)
    monkeypatch.chdir("run")
    done = CliRunner().invoke(cli, ["red-update", Path(job.job).name, "--model", "../../model", "--lambda", "0"])
    assert_refused(done, "the folder run does not exist")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda", "1.5"], "'1.5' is not auto, paper or a number between 0 and 1"),
        (["--lambda", "nan"], "'nan' is not auto, paper or a number between 0 and 1"),
        (["--lambda", "some"], "'some' is not auto, paper or a number between 0 and 1"),
        (["--angpix", "0"], "--angpix"),
        (["--threads", "0"], "--threads"),
        (["-o", "-", "--unregularised", "-"], "only one of --output and --unregularised can be '-'"),
        (["--lambda", "0.5", "--schedule", "s.json"], "--schedule is for --lambda auto"),
        (["--lambda", "paper", "--schedule", "s.json"], "--schedule is for --lambda auto"),
    ],
)
def test_usage_errors(project, arguments, message):
    job = project(*SMALL)
    done = job.run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


# A machine that fails


@pytest.mark.slow
@pytest.mark.parametrize(
    "output", [[], ["-o", "map.mrc", "--overwrite"], ["--unregularised", "map.mrc", "--overwrite"]]
)
def test_a_file_that_cannot_grow(project, output):
    """The limit on file sizes ends the write as a full disk does, in the kernel."""
    job = project(*SMALL)
    for path in (job.result, Path("map.mrc")):
        path.write_text("of an earlier run")
    job.stale.write_text("stale")
    before = job.files()
    code = (
        "import resource, sys; from cryored.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "main()"
    )
    done = tool("red-update", job.job, "--model", "../model", "--lambda", 0, "--clean", *output, code=code)
    assert done.returncode == 1
    name = output[1] if output else str(job.result)
    assert done.stderr.decode() == f"cryored: error: {name}: cannot be written: {os.strerror(errno.EFBIG)}\n"
    assert job.files() == before


def test_a_full_disk(project, monkeypatch):
    job = project(*SMALL)
    job.result.write_text("of an earlier run")
    before = job.files()

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mrcfile.mrcfile.MrcFile, "set_data", full)
    assert_refused(job.run("--lambda", 0), f"{job.result}: cannot be written: No space left on device")
    assert job.files() == before


def test_a_result_that_cannot_be_moved_into_place(project, monkeypatch):
    job = project(*SMALL)
    job.result.write_text("of an earlier run")
    before = job.files()

    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", denied)
        assert_refused(job.run("--lambda", 0), f"{job.result}: cannot be written: Permission denied")
    assert job.files() == before


def test_a_folder_that_may_not_be_written(project, monkeypatch):
    job = project(*SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # root may write everywhere
        assert_refused(job.run("--lambda", 0), f"{job.result}: the folder run is not writable")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_pipe(project):
    job = project(*SMALL)
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "cryored", "red-update", job.job, "--model", "../model", "--lambda", "0"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([*command, "-o", "-"], env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"cryored: error: ")
    assert b"No space left on device" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(project):
    job = project()  # a megabyte, more than a pipe holds
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "cryored", "red-update", job.job, "--model", "../model", "--lambda", "0", "-q"]
    with subprocess.Popen(
        [*command, "-o", "-"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as producer:
        producer.stdout.read(10)
        producer.stdout.close()
        assert producer.stderr.read() == b""


def test_a_log_that_cannot_be_written_does_not_stop_the_refinement(project):
    job = project(*SMALL)
    job.log.mkdir()
    done = job.run("--lambda", 0)
    assert done.exit_code == 0
    assert f"cryored: warning: {job.log}: the log cannot be written: Is a directory" in done.stderr
    assert job.result.exists()


# The script that RELION calls


@pytest.fixture
def hook(tmp_path):
    """Install the script beside a ``cryored`` of this repository, and return what calls it as RELION does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "cryored-external-reconstruct"
    shutil.copy(REPOSITORY / "bin" / "cryored-external-reconstruct", script)
    launcher = folder / "cryored"
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m cryored "$@"\n')
    launcher.chmod(0o755)

    def call(value, request, **environment):
        # RELION hands "$VARIABLE REQUEST" to system(), that is to a shell.
        command = f"{value.format(script=script)} {request}"
        environment = os.environ | environment
        return subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)

    return call


@pytest.mark.slow
def test_the_script_with_options(project, hook):
    job = project(*SMALL)
    done = hook("{script} --lambda 0 --model ../model", job.job)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert difference(read_volume(job.result).data, job.expected("map")) <= FLOAT32


@pytest.mark.slow
def test_the_script_without_options(project, hook, tmp_path):
    job = project(*SMALL)
    (tmp_path / "link").symlink_to(tmp_path / "bin" / "cryored-external-reconstruct")
    done = hook(
        "../link", job.job, CRYORED_RED_UPDATE_MODEL="../model", CRYORED_RED_UPDATE_LAMBDA="0", PATH="/usr/bin:/bin"
    )
    assert done.returncode == 0, done.stderr
    assert difference(read_volume(job.result).data, job.expected("map")) <= FLOAT32


@pytest.mark.slow
def test_the_script_exits_as_the_tool(project, hook):
    job = project(*SMALL)
    job.weight.unlink()
    done = hook("{script} --lambda 0 --model ../model", job.job)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cryored: error: {job.weight}: missing")
    assert done.stderr.count("\n") == 1
    assert hook("{script} --lambda 7", job.job).returncode == 2
    done = hook("{script}", "")
    assert done.returncode == 2
    assert "no request given" in done.stderr


@pytest.mark.slow
def test_the_script_takes_the_cryored_on_the_path(project, hook, tmp_path):
    job = project(*SMALL)
    (tmp_path / "path").mkdir()
    (tmp_path / "bin" / "cryored").rename(tmp_path / "path" / "cryored")
    done = hook("{script} --lambda 0 --model ../model", job.job, PATH=f"{tmp_path / 'path'}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    done = hook("{script} --lambda 0 --model ../model", job.job, PATH="/usr/bin:/bin")
    assert done.returncode == 1
    assert "no cryored found beside" in done.stderr


# With a network


STEPS = """
import shutil, sys
import numpy as np
from pathlib import Path
from click.testing import CliRunner
from cryored.prior import device
from cryored.cli import cli

job, *inputs = sys.argv[1:]
device.set_up(False, 2)

import keras
from cryored.prior.models import ModelCard, save_model
from cryored.prior.network import build_unet

def run(*arguments):
    done = CliRunner().invoke(cli, list(arguments))
    if done.exit_code:
        sys.exit(done.stderr)

for kind in inputs:
    network = build_unet(width=2, depth=2)
    # Untrained it would give nothing: its last layer begins at 0.
    rng = np.random.default_rng(0)
    for layer in network.layers:
        layer.set_weights([0.3 * rng.standard_normal(w.shape) if w.ndim > 1 else w for w in layer.get_weights()])
    card = ModelCard("tiny_" + kind, kind, 1.5, 2, 2, "", (3.0, 18.0))
    save_model(Path(kind), network, card)
    model = ["--model", "./" + kind, "--threads", "2", "--cpu"]
    run("red-update", job, *model)
    shutil.copy(job.replace(".star", ".mrc"), kind + "_one.mrc")
    run("red-update", job, *model, "--lambda", "0", "-o", kind + "_map.mrc", "--unregularised", kind + "_raw.mrc")
    source = kind + ("_map.mrc" if kind == "regularised" else "_raw.mrc")
    run("denoise", source, "-o", kind + "_denoised.mrc", *model)
    run("red-update", job, *model, "--denoised", kind + "_denoised.mrc", "-o", kind + "_three.mrc")
"""


@pytest.mark.slow
def test_one_call_is_three_steps(project):
    """With a tiny network of random weights, for both kinds of input; in a process of its own for TensorFlow."""
    job = project()
    done = tool(job.job, "regularised", "unregularised", code=STEPS)
    assert done.returncode == 0, done.stderr.decode()
    for kind in ("regularised", "unregularised"):
        one, three, regularised = (read_volume(f"{kind}_{name}.mrc").data for name in ("one", "three", "map"))
        np.testing.assert_array_equal(one, three)
        assert np.isfinite(one).all()
        assert difference(one, regularised) > 0.01
    np.testing.assert_array_equal(read_volume(job.result).data, one)
    with mrcfile.open(job.result) as mrc:
        assert mrc.get_labels()[0].startswith(f"cryored {cryored.__version__} red-update tiny_unregularised ")
    record = job.records()[0]
    card = json.loads(Path("regularised/card.json").read_text())
    assert record["model_sha256"] == card["sha256"]
    assert record["device"] == "CPU"
    assert record["power_ratio"] != 1
    assert {"read", "map", "load", "network", "update", "write", "total"} <= set(record["seconds"])
    # The real model, with one bit of its weights changed.
    weights = bytearray(Path("regularised/model.keras").read_bytes())
    weights[len(weights) // 2] ^= 1
    Path("regularised/model.keras").write_bytes(weights)
    before = job.files()
    done = CliRunner().invoke(cli, ["red-update", job.job, "--model", "./regularised"])
    assert_refused(done, "model.keras: sha256 ")
    assert job.files() == before
