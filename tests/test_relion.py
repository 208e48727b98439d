"""RELION's requests: reading, pixel size, nominal resolution, refusals."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cryored.errors import InputError
from cryored.files.requests import NAME, is_request, parts_of, read_request
from cryored.files.star import parse_star, read_star

REQUESTS = Path(__file__).parent / "data" / "relion_requests"
STARS = sorted(REQUESTS.glob("*/run/*_external_reconstruct.star"))
ROOT = "run/run_it004_half1_class001"

GENERAL = {
    "rlnExtReconsDataReal": f"{ROOT}_external_reconstruct_data_real.mrc",
    "rlnExtReconsDataImag": f"{ROOT}_external_reconstruct_data_imag.mrc",
    "rlnExtReconsWeight": f"{ROOT}_external_reconstruct_weight.mrc",
    "rlnExtReconsResult": f"{ROOT}_external_reconstruct.mrc",
    "rlnExtReconsResultStarfile": f"{ROOT}_external_reconstruct_out.star",
    "rlnTau2FudgeFactor": "1.000000",
    "rlnPaddingFactor": "2.000000",
    "rlnReferenceDimensionality": "3",
    "rlnOriginalImageSize": "8",
    "rlnCurrentImageSize": "6",
}
ROWS = ["0 0.031084 1.000000", "1 0.101164 0.9", "2 5.449318e-04 0.5", "3 1e-5 0.2", "4 0.0 0.1"]


def request_text(rows=ROWS, version="30001", table=True, **items):
    """Return a request as RELION writes it; an item given as None is left out."""
    general = {label: value for label, value in (GENERAL | items).items() if value is not None}
    lines = ["", f"# version {version}", "", "data_external_reconstruct_general", ""]
    lines += [f"_{label:<36} {value:>12}" for label, value in general.items()]
    if table:
        lines += [" ", "", f"# version {version}", "", "data_external_reconstruct_tau2", "", "loop_ "]
        lines += ["_rlnSpectralIndex #1 ", "_rlnReferenceTau2 #2 ", "_rlnGoldStandardFsc #3 "]
        lines += [f"           {row} " for row in rows]
    return "\n".join([*lines, " ", ""])


def parse(angpix=1.5, **items):
    return read_request(parse_star(request_text(**items).encode(), "job.star"), angpix=angpix)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project folder, the current one, with a folder ``run``."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(name=f"{ROOT}_external_reconstruct.star", **items):
        Path(name).write_text(request_text(**items))
        return read_star(name)

    return write


def write_model(name, pixel_size, box=8):
    text = f"data_model_general\n\n_rlnOriginalImageSize {box}\n_rlnPixelSize {pixel_size}\n_rlnNrClasses 1\n"
    Path("run", name).write_text(text)


# Reading


def test_everything_in_a_request():
    request = parse()
    assert request.star == Path("job.star")
    assert request.data_real == Path("run/run_it004_half1_class001_external_reconstruct_data_real.mrc")
    assert request.data_imag == Path("run/run_it004_half1_class001_external_reconstruct_data_imag.mrc")
    assert request.weight == Path("run/run_it004_half1_class001_external_reconstruct_weight.mrc")
    assert request.result == Path("run/run_it004_half1_class001_external_reconstruct.mrc")
    assert request.result_star == Path("run/run_it004_half1_class001_external_reconstruct_out.star")
    assert (request.tau2_fudge, request.pad, request.ori, request.r_max) == (1.0, 2.0, 8, 3)
    assert request.array_shape == (16, 16, 9)
    np.testing.assert_array_equal(request.tau2, [0.031084, 0.101164, 5.449318e-04, 1e-5, 0])
    np.testing.assert_array_equal(request.fsc, [1, 0.9, 0.5, 0.2, 0.1])
    np.testing.assert_allclose(request.frequency, np.arange(5) / 12, rtol=1e-15)
    assert request.nominal_resolution() == pytest.approx(4.0, rel=1e-12)  # shell 3 of 12 A


def test_the_papers_example_names_no_result_star():
    assert parse(rlnExtReconsResultStarfile=None).result_star is None


@pytest.mark.parametrize("version", ["30001", "50001"])
def test_relion_4_and_5_write_two_more_items(version):
    request = parse(angpix=None, version=version, rlnPixelSize="1.244531", rlnParticleDiameter="180.000000")
    assert request.pixel_size == 1.244531


def test_line_ends_and_padding_of_other_systems():
    text = request_text(rlnPixelSize="1.5").replace("\n", "\r\n")
    request = read_request(parse_star(text.encode(), "job.star"))
    assert request.ori == 8
    assert request.weight.name.endswith("_weight.mrc")


@pytest.mark.parametrize(("pad", "shape"), [("1.5", (12, 12, 7)), ("1", (8, 8, 5)), ("1.200000", (10, 10, 6))])
def test_padding_is_a_real_number(pad, shape):
    assert parse(rlnPaddingFactor=pad).array_shape == shape


@pytest.mark.parametrize(
    ("name", "root"),
    [
        (f"{ROOT}_external_reconstruct.star", ROOT),
        ("run_it009_class001_external_reconstruct.star", "run_it009_class001"),
        ("a.b/run_it005_body002_external_reconstruct.star", "a.b/run_it005_body002"),
        ("job.star", "job"),
    ],
)
def test_the_log_lies_beside_the_request(name, root):
    request = read_request(parse_star(request_text().encode(), name), angpix=1)
    assert request.root == root
    assert request.log == Path(f"{root}_cryored.log")


def test_tells_a_request_from_other_files(project, tmp_path):
    assert is_request(project().name)
    write_model("run_it003_half1_model.star", 1.5)
    assert not is_request("run/run_it003_half1_model.star")
    assert not is_request("none.star")
    Path("map.mrc").write_bytes(bytes(2000))
    assert not is_request("map.mrc")


# The recorded ones


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        ("pka_box64_pad1/run/run_it001_half1_class001", 7.4),
        ("pka_box64_pad1/run/run_it003_half1_class001", 4.4),
        ("pka_box64_pad1/run/run_it003_half2_class001", 4.4),
        ("pka_box64_pad1/run/run_it012_class001", 3.8),
    ],
)
def test_nominal_resolution_as_the_recordings_readme_says(name, resolution):
    request = read_request(read_star(REQUESTS / f"{name}_external_reconstruct.star"))
    assert round(request.nominal_resolution(), 1) == resolution


@pytest.mark.parametrize("star", STARS, ids=lambda path: f"{path.parents[1].name}/{path.stem}")
def test_recorded_requests(star):
    request = read_request(read_star(star))
    case = star.parents[1].name
    assert request.pixel_size == {"pka_box64_pad1": 1.5, "relion5_box48": 2.0}.get(case, 3.0)
    assert request.array_shape[0] == round(request.ori * request.pad)
    assert len(request.tau2) == len(request.fsc) == request.ori // 2 + 1
    assert request.result == Path(f"{request.root}_external_reconstruct.mrc").relative_to(star.parents[1])
    if "class3d" in case:
        with pytest.raises(InputError, match=r"FSC and tau2 are zero in all shells.*; give a number with --lambda$"):
            request.nominal_resolution()
        return
    # The last shell before the curve first drops below 0.143.
    last = next(shell for shell in range(1, len(request.fsc)) if request.fsc[shell] < 0.143) - 1
    expected = request.ori * request.pixel_size / last
    assert request.nominal_resolution() == pytest.approx(expected, rel=1e-12)


def test_unresolved_is_infinite():
    assert parse(rows=["0 1 1", "1 1 0.1", "2 1 0.1", "3 1 0.05", "4 1 0"]).nominal_resolution() == math.inf


# Pixel size


def test_angpix_comes_first(project):
    write_model("run_it003_half1_model.star", 2.0)
    assert read_request(project(rlnPixelSize="1.5"), angpix=1.1).pixel_size == 1.1
    assert read_request(project(rlnPixelSize="0.0"), angpix=1.1).pixel_size == 1.1


def test_then_the_request(project):
    write_model("run_it003_half1_model.star", 2.0)
    assert read_request(project(rlnPixelSize="1.5")).pixel_size == 1.5


def test_then_the_runs_latest_model(project):
    for iteration, size in [(0, 2.0), (3, 2.3), (2, 2.2)]:
        write_model(f"run_it{iteration:03d}_half1_model.star", size)
    write_model("run_it012_half1_model.star", 2.12)  # twelve comes after three, whatever the text says
    write_model("other_it025_half1_model.star", 9.9)
    assert read_request(project()).pixel_size == 2.12


def test_iterations_are_numbers_not_texts(project):
    write_model("run_it999_half1_model.star", 2.0)
    write_model("run_it1000_half1_model.star", 2.1)
    assert read_request(project()).pixel_size == 2.1


def test_the_joined_call_takes_the_halves_model(project):
    write_model("run_it008_half1_model.star", 2.0)
    write_model("run_it008_half2_model.star", 2.0)
    assert read_request(project("run/run_it009_class001_external_reconstruct.star")).pixel_size == 2.0


@pytest.mark.parametrize(
    "name",
    [
        "run_ct5_it006_half1_class001",
        "run_ct5_it006_half2_body002",
        "run_ct5_it010_class001",
        "run_ct5_it006_class003",
    ],
)
def test_a_continued_run_has_its_own_models(project, name):
    write_model("run_it025_half1_model.star", 9.9)
    write_model("run_ct5_it005_half1_model.star", 2.5)
    write_model("run_ct5_ct7_it030_half1_model.star", 9.9)
    assert read_request(project(f"run/{name}_external_reconstruct.star")).pixel_size == 2.5


def test_the_first_iteration_of_a_continued_run_takes_the_earlier_runs(project):
    write_model("run_it004_half1_model.star", 2.4)
    write_model("run_it005_half1_model.star", 2.5)
    request = read_request(project("run/run_ct5_it006_half1_class001_external_reconstruct.star"))
    assert request.pixel_size == 2.5


def test_models_of_other_boxes_and_broken_ones_are_passed_over(project):
    write_model("run_it004_half1_model.star", 9.0, box=16)
    write_model("run_it003_half1_model.star", 0.0)
    Path("run/run_it002_half1_model.star").write_text("data_model_general\n_rlnOrig")  # cut short
    write_model("run_it001_half1_model.star", 2.1)
    assert read_request(project()).pixel_size == 2.1


def test_no_pixel_size_anywhere(project):
    Path("run/run_it003_half1_data.star").write_text("data_\n")
    message = (
        f"^{ROOT}_external_reconstruct.star: holds no pixel size .RELION 3.1 writes none., and there is no "
        "_model.star of this run with a box of 8 beside it; give it with --angpix$"
    )
    with pytest.raises(InputError, match=message):
        read_request(project())


def test_a_project_folder_that_is_not_the_current_one(project, tmp_path, monkeypatch):
    project()
    write_model("run_it003_half1_model.star", 2.3)
    monkeypatch.chdir(os.path.sep)
    star = tmp_path / f"{ROOT}_external_reconstruct.star"
    assert read_request(read_star(star)).pixel_size == 2.3


# Refusals


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"rlnReferenceDimensionality": "2"}, r"^job.star: a reconstruction in 2D \(Class2D\?\), expected 3D"),
        (
            {"rlnOriginalImageSize": "9"},
            "^job.star: box 9, expected an even number: RELION itself refines in even boxes only, .* re-extract",
        ),
        ({"rlnOriginalImageSize": "0"}, "^job.star: box 0, expected"),
        ({"rlnOriginalImageSize": "-8"}, "^job.star: box -8, expected"),
        ({"rlnOriginalImageSize": "nan"}, "^job.star: _rlnOriginalImageSize is 'nan', expected a whole number"),
        ({"rlnOriginalImageSize": "8.5"}, "^job.star: _rlnOriginalImageSize is '8.5', expected a whole number"),
        ({"rlnCurrentImageSize": "inf"}, "^job.star: _rlnCurrentImageSize is 'inf', expected a whole number"),
        ({"rlnOriginalImageSize": "eight"}, "^job.star: _rlnOriginalImageSize is 'eight', expected a"),
        (
            {"rlnOriginalImageSize": "10"},
            "^job.star: 5 shells of tau2 and FSC, expected each of 0 to 5 once for a box of 10; shell 5 is missing",
        ),
        ({"rlnCurrentImageSize": "10"}, "^job.star: current image size 10, expected 2 to the box of 8"),
        ({"rlnCurrentImageSize": "0"}, "^job.star: current image size 0"),
        ({"rlnPaddingFactor": "0.5"}, "^job.star: padding factor 0.5, expected 1 to 8"),
        ({"rlnPaddingFactor": "nan"}, "^job.star: padding factor nan, expected 1 to 8"),
        ({"rlnTau2FudgeFactor": "0"}, "^job.star: _rlnTau2FudgeFactor 0, expected a positive number"),
        ({"rlnTau2FudgeFactor": "-1"}, "^job.star: _rlnTau2FudgeFactor -1"),
        ({"rlnTau2FudgeFactor": "nan"}, "^job.star: _rlnTau2FudgeFactor nan"),
        ({"rlnTau2FudgeFactor": "inf"}, "^job.star: _rlnTau2FudgeFactor inf"),
        ({"rlnTau2FudgeFactor": None}, "^job.star: _rlnTau2FudgeFactor is missing from data_external_reconstruct"),
        ({"rlnExtReconsWeight": None}, "^job.star: _rlnExtReconsWeight is missing from data_external_reconstruct"),
        ({"rlnExtReconsResult": None}, "^job.star: _rlnExtReconsResult is missing"),
        (
            {"table": False},
            "^job.star: no table of tau2, so a MAP reconstruction is impossible and lambda has no FSC "
            r"\(relion_reconstruct writes such requests\)",
        ),
        ({"rows": []}, "^job.star: .*"),
        ({"rows": ROWS[:4]}, "^job.star: 4 shells of tau2 and FSC, expected each of 0 to 4 once for a box of 8"),
        ({"rows": [*ROWS[:4], ROWS[3]]}, "^job.star: 5 shells .*, expected each of 0 to 4 once .*; shell 4 is missing"),
        ({"rows": [*ROWS[:4], "4 nan 0.1"]}, "^job.star: _rlnReferenceTau2 is nan in shell 4, expected a number"),
        ({"rows": [*ROWS[:4], "4 inf 0.1"]}, "^job.star: _rlnReferenceTau2 is inf in shell 4"),
        ({"rows": [*ROWS[:4], "4 0.1 -nan"]}, "^job.star: _rlnGoldStandardFsc is nan in shell 4"),
        ({"rows": [*ROWS[:4], "4 -1e-3 0.1"]}, "^job.star: _rlnReferenceTau2 is -0.001 in shell 4, expected 0 or more"),
        ({"rows": [*ROWS[:4], "4 much 0.1"]}, "^job.star: _rlnReferenceTau2 in data_.*much"),
        ({"rows": [*ROWS[:4], "4 0.1"]}, "^job.star: no STAR file"),
        ({"angpix": None, "rlnPixelSize": "0.000000"}, "^job.star: _rlnPixelSize is 0.000000, expected .* --angpix"),
        ({"angpix": None, "rlnPixelSize": "-1.5"}, "^job.star: _rlnPixelSize is -1.5, expected angstroms"),
        ({"angpix": None, "rlnPixelSize": "nan"}, "^job.star: _rlnPixelSize is nan, expected angstroms"),
        ({"angpix": None, "rlnPixelSize": "inf"}, "^job.star: _rlnPixelSize is inf, expected angstroms"),
        ({"angpix": None, "rlnPixelSize": "x"}, "^job.star: _rlnPixelSize is 'x', expected a number"),
    ],
)
def test_refused_in_one_line(items, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(**items)
    assert "\n" not in str(caught.value)


def test_other_files_are_no_requests(tmp_path):
    star = REQUESTS / "box32_pad2" / "run" / "run_it002_half1_model.star"
    with pytest.raises(InputError, match=r"model.star: found data_.*, expected a block data_external_reconstruct_gen"):
        read_request(read_star(star))
    with pytest.raises(InputError, match=r"none.star: cannot be read: No such file or directory$"):
        read_star("none.star")
    shutil.copy(REQUESTS / "pka_box64_pad1" / "truth.mrc", tmp_path / "job.star")
    with pytest.raises(InputError, match="job.star: no STAR file"):
        read_star(tmp_path / "job.star")


@pytest.mark.parametrize(
    ("name", "run", "iteration", "half"),
    [
        ("run_it003_half1_class001", "run", 3, 1),
        ("run_ct5_it006_class002", "run", 6, None),
        ("run_it002_half2_body001", "run", 2, 2),
        ("_it001_half1_class001", "", 1, 1),  # RELION's --o Refine3D/job/
        ("a_it1/run_it010_class001", "a_it1/run", 10, None),
        ("run_class001", None, None, None),
    ],
)
def test_what_relions_names_tell(name, run, iteration, half):
    match = NAME.match(name)
    assert (match and match["run"]) == run
    assert parts_of(name) == (iteration, half)
