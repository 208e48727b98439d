"""RELION's job folders as inputs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.files.jobs import job_end, read_job
from cryored.files.mrc import read_volume
from cryored.files.star import read_star

PKA = Path(__file__).parent / "data" / "postprocess_pka"
HALVES = [f"run_half{half}_class001_unfil.mrc" for half in (1, 2)]


def star(path, **items):
    name = "optimiser_general" if "optimiser" in path.name else "model_general"
    path.write_text(f"data_{name}\n" + "".join(f"_rln{label} {value}\n" for label, value in items.items()))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Make a project folder with a mask, the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("Refine3D/job012", "MaskCreate/job013", "PostProcess/job014", "Class3D/job015"):
        Path(name).mkdir(parents=True)
    shutil.copy(PKA / "mask.mrc", "MaskCreate/job013/mask.mrc")
    return tmp_path


@pytest.fixture
def refined(project):
    """A converged auto-refine with a mask."""
    folder = Path("Refine3D/job012")
    for name in HALVES:
        shutil.copy(PKA / name, folder / name)
    shutil.copy(PKA / HALVES[0], folder / "run_class001.mrc")
    mask = "MaskCreate/job013/mask.mrc"
    for number in (9, 10):
        star(folder / f"run_it{number:03d}_optimiser.star", SolventMaskName=mask, DoSplitRandomHalves=1)
    star(folder / "run_model.star", PixelSize=1.5)
    (folder / "run_data.star").touch()
    return folder


def fsc(*arguments):
    done = CliRunner().invoke(cli, ["fsc", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done


def test_a_converged_refinement(refined):
    job = read_job(refined)
    assert [half.name for half in job.halves] == HALVES
    assert (job.map.name, job.mask.name, job.pixel_size, job.iteration) == ("run_class001.mrc", "mask.mrc", 1.5, 10)
    assert job.fsc == refined / "run_model.star"
    assert job.end == refined / "run_data.star"


def test_fsc_of_a_job_is_that_of_its_files(refined, monkeypatch):
    expected = fsc(*(refined / name for name in HALVES), "--mask", "MaskCreate/job013/mask.mrc")
    found = fsc(refined)
    assert found.stdout == expected.stdout
    assert "mask MaskCreate/job013/mask.mrc" in found.stderr
    monkeypatch.chdir(refined)  # its mask is named from the project folder
    assert fsc(".").stdout == expected.stdout


def test_the_mask_of_a_job_that_lies_elsewhere(refined, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("scratch") / "job012"
    refined.rename(elsewhere)
    refined.symlink_to(elsewhere)
    monkeypatch.chdir("MaskCreate")
    assert read_job("../Refine3D/job012").mask.read_bytes() == Path("job013/mask.mrc").read_bytes()


@pytest.mark.parametrize("command", ["fsc", "denoise"])
def test_a_mask_that_is_gone_is_not_left_out(refined, command, assert_one_line_error):
    Path("MaskCreate/job013/mask.mrc").unlink()
    words = [command, str(refined), *(["-o", "d.mrc"] if command == "denoise" else [])]
    assert_one_line_error(
        CliRunner().invoke(cli, words), "its mask MaskCreate/job013/mask.mrc is missing, expected the"
    )
    assert read_job(refined).end.name == "run_data.star"  # to others the mask is nothing


def test_a_mask_that_is_gone_has_a_stand_in(refined):
    Path("MaskCreate/job013/mask.mrc").rename("mask.mrc")
    assert "mask mask.mrc" in fsc(refined, "--mask", "mask.mrc").stderr


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="relion_postprocess is not on the PATH")
def test_fsc_of_a_job_is_relion_postprocess_of_it(refined):
    command = ["relion_postprocess", "--i", str(refined / HALVES[0]), "--mask", "MaskCreate/job013/mask.mrc"]
    subprocess.run([*command, "--angpix", "1.5", "--o", "PostProcess/job014/postprocess"], check=True)
    shown = read_star("PostProcess/job014/postprocess.star")
    for folder in (refined, "PostProcess/job014"):
        rows = [line.split("\t") for line in fsc(folder).stdout.splitlines() if not line.startswith("#")]
        table = dict(zip(rows[0], np.array(rows[1:], dtype=float).T, strict=True))
        for column, label in (("fsc", "UnmaskedMaps"), ("fsc_masked", "MaskedMaps")):
            np.testing.assert_allclose(
                table[column][1:], shown.numbers("fsc", f"rlnFourierShellCorrelation{label}")[1:], atol=1e-5
            )


def test_one_under_way_says_so(refined):
    for name in (*HALVES, "run_class001.mrc", "run_data.star", "run_model.star"):
        (refined / name).unlink()
    star(refined / "run_it010_half1_model.star", PixelSize=1.5)
    job = read_job(refined)
    assert (job.end, job.halves, job.fsc.name) == (None, None, "run_it010_half1_model.star")
    done = CliRunner().invoke(cli, ["fsc", str(refined)])
    assert done.exit_code == 1
    assert "RELION writes them when the run has converged, and it is at iteration 10" in done.stderr


def test_the_pipelines_marks_end_a_job(refined):
    (refined / "RELION_JOB_EXIT_FAILURE").touch()
    assert read_job(refined).end.name == "RELION_JOB_EXIT_FAILURE"


@pytest.mark.parametrize("run", ["auto", "run_ct5"])
def test_a_run_of_another_name(refined, run):
    for path in refined.iterdir():
        path.rename(path.with_name(path.name.replace("run", run)))
    job = read_job(refined)
    assert [half.name for half in job.halves] == [name.replace("run", run) for name in HALVES]
    assert (job.map.name, job.pixel_size, job.iteration) == (f"{run}_class001.mrc", 1.5, 10)
    assert job.end == job_end(refined) == refined / f"{run}_data.star"


def test_the_pipelines_marks_end_any_folder(project):
    with pytest.raises(InputError, match="no job of RELION's"):
        job_end(project)
    (project / "RELION_JOB_EXIT_SUCCESS").touch()
    assert job_end(project).name == "RELION_JOB_EXIT_SUCCESS"


@pytest.mark.parametrize(("iteration", "ended"), [(25, True), (24, False)])
def test_class3d(project, iteration, ended):
    folder = Path("Class3D/job015")
    star(
        folder / f"run_it{iteration:03d}_optimiser.star",
        SolventMaskName="None",
        DoSplitRandomHalves=0,
        CurrentIteration=iteration,
        NumberOfIterations=25,
    )
    star(folder / f"run_it{iteration:03d}_model.star", PixelSize=2.0)
    job = read_job(folder)
    assert (job.mask, job.fsc, job.pixel_size, job.iteration) == (None, None, 2.0, iteration)
    assert (job.end is not None) is ended
    with pytest.raises(InputError, match="no half-map FSC"):
        job.need_fsc()


def test_postprocess_and_mask(project):
    shutil.copytree(PKA, "run", dirs_exist_ok=True)
    shutil.copy(PKA / "mask.mrc", "mask.mrc")
    shutil.copy(PKA / "postprocess.star", "PostProcess/job014/postprocess.star")
    Path("PostProcess/job014/job.star").write_text(
        "data_joboptions_values\nloop_\n_rlnJobOptionVariable\n_rlnJobOptionValue\nangpix 1.5\nfn_mask mask.mrc\n"
    )
    job = read_job("PostProcess/job014")
    assert [half.name for half in job.halves] == HALVES
    assert (job.mask.name, job.pixel_size) == ("mask.mrc", 1.5)
    done = CliRunner().invoke(cli, ["lambda-schedule", "PostProcess/job014"])
    assert done.exit_code == 0
    assert "at 3.56 A" in done.stderr
    assert read_job("MaskCreate/job013").mask.name == "mask.mrc"
    assert read_volume(read_job("MaskCreate/job013").mask).data.max() == 1


def test_a_job_handed_on_with_its_maps_needs_no_project(project, monkeypatch):
    monkeypatch.chdir("Class3D")
    job = read_job(PKA)
    assert job.halves == tuple(PKA / name for name in HALVES)
    assert job.mask == PKA / "mask.mrc"


def test_nothing_is_taken_from_another_project(refined, tmp_path_factory, monkeypatch):
    """The current folder may be one with jobs of the same names."""
    shutil.copy(PKA / "postprocess.star", "PostProcess/job014/postprocess.star")
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(PKA, other / "run")
    shutil.copytree(PKA, other / "MaskCreate" / "job013")
    Path("MaskCreate/job013/mask.mrc").unlink()
    folder = refined.absolute()
    monkeypatch.chdir(other)
    assert read_job(folder.parents[1] / "PostProcess/job014").halves is None
    with pytest.raises(InputError, match="MaskCreate/job013/mask.mrc is missing"):
        _ = read_job(folder).mask


def test_a_class3d_under_way_has_no_halves_to_wait_for(project):
    folder = Path("Class3D/job015")
    star(folder / "run_it012_optimiser.star", DoSplitRandomHalves=0, NumberOfIterations=25)
    done = CliRunner().invoke(cli, ["fsc", str(folder)])
    assert done.exit_code == 1
    assert "as in Class3D, which has no halves" in done.stderr


def test_another_folder(project):
    done = CliRunner().invoke(cli, ["fsc", "."])
    assert done.exit_code == 1
    assert "no job of RELION's, expected the folder of a Refine3D, Class3D or PostProcess job: one with" in done.stderr
    done = CliRunner().invoke(cli, ["fsc", "one.mrc"])
    assert done.exit_code == 2
    assert "the folder of a RELION job alone" in done.stderr


def test_check_takes_the_last_request_of_a_job(tmp_path, monkeypatch):
    shutil.copytree(PKA.parent / "relion_requests" / "box32_pad2", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    done = CliRunner().invoke(cli, ["red-update", "run", "--check", "--lambda", "0"])
    assert done.exit_code == 0, done.output
    assert '"request": "run/run_it010_class001_external_reconstruct.star"' in done.stdout
    assert CliRunner().invoke(cli, ["red-update", "run"]).exit_code == 2
    done = CliRunner().invoke(cli, ["red-update", ".", "--check"])
    assert done.exit_code == 1
    assert ".: no ..._external_reconstruct.star, expected the folder of a run" in done.stderr
