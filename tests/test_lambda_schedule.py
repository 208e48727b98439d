"""The weight of the prior, and the command ``cryored lambda-schedule``."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.prior.lambda_schedule import Schedule, linear_schedule, model_schedule, read_schedule, source_resolution
from cryored.prior.models import Model, ModelCard, write_card

DATA = Path(__file__).parent / "data"
PKA = DATA / "postprocess_pka"
REQUESTS = DATA / "relion_requests"
REQUEST = REQUESTS / "pka_box64_pad1" / "run" / "run_it001_half1_class001_external_reconstruct.star"
NUMBER = re.compile(r"[0-9.e-]+\n\Z")


@pytest.fixture
def run():
    def invoke(*arguments, stdin=None):
        return CliRunner().invoke(cli, ["lambda-schedule", *map(str, arguments)], input=stdin)

    return invoke


# Numbers

# The paper's line in section 2.2: 0 at 10 A, 1 at 4.5 A.
LINE = [
    (math.inf, 0.0),
    (999.0, 0.0),
    (10.001, 0.0),
    (10.0, 0.0),
    (8.625, 0.25),
    (7.25, 0.5),
    (5.875, 0.75),
    (4.5, 1.0),
    (4.499, 1.0),
    (1e-3, 1.0),
]


@pytest.mark.parametrize(("resolution", "lam"), LINE)
def test_the_papers_line(resolution, lam):
    # These are exact in binary, so only the interpolation's own rounding is left.
    assert Schedule()(resolution) == pytest.approx(lam, abs=1e-15)
    assert linear_schedule()(resolution) == Schedule()(resolution)


def test_falls_with_resolution_and_stays_between_0_and_1():
    values = np.array([Schedule()(resolution) for resolution in np.linspace(2, 20, 500)])
    assert (np.diff(values) <= 0).all()
    assert values.min() == 0
    assert values.max() == 1


def test_other_ends():
    schedule = linear_schedule(low=8, high=3)
    assert [schedule(value) for value in (2, 3, 5.5, 8, 9)] == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-15)


def test_more_points():
    schedule = Schedule((4.0, 6.0, 10.0), (0.8, 0.8, 0.0))
    assert [schedule(value) for value in (3, 5, 8, 11)] == pytest.approx([0.8, 0.8, 0.4, 0.0], abs=1e-15)


@pytest.mark.parametrize("resolution", [0.0, -4.0, math.nan])
def test_no_resolution(resolution):
    with pytest.raises(InputError, match=f"^resolution {resolution:g} A, expected a positive number$"):
        Schedule()(resolution)


@pytest.mark.parametrize(
    ("resolutions", "lambdas", "message"),
    [
        ((4.5,), (1.0,), "as many resolutions as lambdas, two at least"),
        ((), (), "as many resolutions as lambdas, two at least"),
        ((4.5, 10.0), (1.0,), "as many resolutions as lambdas, two at least"),
        ((10.0, 4.5), (0.0, 1.0), "expected increasing angstroms"),
        ((4.5, 4.5), (1.0, 0.0), "expected increasing angstroms"),
        ((0.0, 4.5), (1.0, 0.0), "expected increasing angstroms"),
        ((4.5, math.inf), (1.0, 0.0), "expected increasing angstroms"),
        ((4.5, math.nan), (1.0, 0.0), "expected increasing angstroms"),
        ((4.5, 10.0), (1.1, 0.0), "expected values between 0 and 1"),
        ((4.5, 10.0), (1.0, -0.1), "expected values between 0 and 1"),
        ((4.5, 10.0), (1.0, math.nan), "expected values between 0 and 1"),
    ],
)
def test_bad_schedules(resolutions, lambdas, message):
    with pytest.raises(InputError, match=message):
        Schedule(resolutions, lambdas)


@pytest.mark.parametrize(("low", "high"), [(4.5, 10), (5, 5), (5, 0), (5, -1), (math.nan, 4), (math.inf, 4)])
def test_bad_ends(low, high):
    with pytest.raises(InputError):
        linear_schedule(low, high)


# Files


def test_reads_a_stored_schedule(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"resolution": [10, 4.5, 6], "lambda": [0, 1, 0.9], "remark": "any order"}')
    assert read_schedule(path) == Schedule((4.5, 6.0, 10.0), (1.0, 0.9, 0.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no schedule .*; expected JSON like"),
        ("[1, 2]", "no schedule"),
        ("3", "no schedule"),
        ('{"resolution": [4.5, 10]}', "no schedule .*lambda"),
        ('{"resolution": [4.5, 10], "lambda": [1]}', "no schedule"),
        ('{"resolution": [4.5, "x"], "lambda": [1, 0]}', "no schedule .*x"),
        ('{"resolution": 4.5, "lambda": 1}', "no schedule"),
        ('{"resolution": [4.5], "lambda": [1]}', "two at least"),
        ('{"resolution": [4.5, 10], "lambda": [2, 0]}', "expected values between 0 and 1"),
        ('{"resolution": [4.5, 10], "lambda": [NaN, 0]}', "expected values between 0 and 1"),
        ('{"resolution": [4.5, 4.5], "lambda": [1, 0]}', "expected increasing angstroms"),
        ("\u00e9".encode("latin-1"), "no schedule"),
    ],
)
def test_broken_schedule_files(tmp_path, content, message):
    path = tmp_path / "s.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"s.json: .*{message}") as caught:
        read_schedule(path)
    assert "\n" not in str(caught.value)


def test_a_missing_schedule_file(tmp_path):
    with pytest.raises(InputError, match="none.json: cannot be read: No such file or directory"):
        read_schedule(tmp_path / "none.json")


def model_with(folder, schedule):
    folder.mkdir()
    card = ModelCard("prior", "regularised", 1.5, 2, 2, "", (3.0, 18.0), schedule=schedule)
    write_card(folder, card)
    return Model(folder, card)


def test_the_schedule_of_a_model(tmp_path):
    fitted = {"resolution": [5, 9.6, 15], "lambda": [1.0, 0.7, 0.0], "pairs": 40}
    schedule = model_schedule(model_with(tmp_path / "fitted", fitted))
    assert schedule == Schedule((5.0, 9.6, 15.0), (1.0, 0.7, 0.0))
    assert schedule.source == str(tmp_path / "fitted" / "card.json")
    without = model_schedule(model_with(tmp_path / "without", {}))
    assert without == Schedule()
    assert without.source == "the paper's line"
    with pytest.raises(InputError, match="card.json: no schedule .*lambda"):
        model_schedule(model_with(tmp_path / "broken", {"resolution": [4, 5]}))


# The shells of the recordings: 96 A over the number of the last one above 0.143.
SOURCES = [
    (PKA / "postprocess.star", 96 / 27),
    (PKA / "postprocess_fsc.xml", 96 / 27),
    (REQUEST, 96 / 13),
    (REQUESTS / "pka_box64_pad1" / "run" / "run_it012_class001_external_reconstruct.star", 96 / 25),
]


@pytest.mark.parametrize(("path", "resolution"), SOURCES, ids=lambda value: getattr(value, "name", ""))
def test_resolution_of_tables_and_requests(path, resolution):
    assert source_resolution(str(path)) == pytest.approx(resolution, rel=1e-5)  # six digits in the tables


# Command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--resolution", 7.25], "0.5\n"),
        (["--resolution", 4.5], "1\n"),
        (["--resolution", 3], "1\n"),
        (["--resolution", 10], "0\n"),
        (["--resolution", 40], "0\n"),
        (["--resolution", "inf"], "0\n"),
        (["--resolution", 9], "0.181818\n"),
        (["--resolution", 5, "--low", 8, "--high", 4], "0.75\n"),
    ],
)
def test_prints_one_bare_number(run, arguments, expected):
    done = run(*arguments, *([] if "--low" in arguments else ["--low", 10]))
    assert done.exit_code == 0
    assert done.stdout == expected
    assert re.fullmatch(r"by 1 at \S+ A, 0 at \S+ A, at \S+ A\n", done.stderr)


def test_says_what_red_update_would_do(run):
    """Where the paper's line has nothing, the shipped model's schedule is still 1."""
    done = run("--resolution", 12)
    assert done.stdout == "1\n"
    assert "cwred/card.json, at 12.00 A" in done.stderr
    assert run("--resolution", 12, "--model", "cwred-paper").stdout == "0\n"
    assert run("--resolution", 12, "--high", 4.5).stdout == "0\n"


@pytest.mark.parametrize("path", [path for path, _ in SOURCES], ids=lambda path: path.name)
def test_a_table_as_argument(run, path):
    done = run(path, "--low", 10)
    assert done.exit_code == 0, done.stderr
    assert NUMBER.match(done.stdout)
    assert float(done.stdout) == pytest.approx(Schedule()(source_resolution(str(path))), abs=1e-6)


def test_a_request_without_pixel_size(run, tmp_path):
    path = tmp_path / REQUEST.name
    path.write_bytes(REQUEST.read_bytes())
    done = run(path)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "holds no pixel size" in done.stderr
    assert run(path, "--angpix", 1.5).stdout == run(REQUEST).stdout
    assert run(path, "--angpix", 3, "--low", 10).stdout == "0\n"


def test_a_request_without_fsc_has_the_one_by_tau2_and_k(run):
    star = REQUESTS / "class3d_box32_pad2" / "run" / "run_it002_class001_external_reconstruct.star"
    done = run(star)
    assert done.exit_code == 0
    assert done.stdout == run("--resolution", 24).stdout


def test_a_table_through_a_pipe(run):
    halves = [PKA / f"run_half{half}_class001_unfil.mrc" for half in (1, 2)]
    table = CliRunner().invoke(cli, ["fsc", *map(str, halves), "-q"]).stdout
    assert run("-", "--low", 10, stdin=table).stdout == f"{Schedule()(96 / 21):.6g}\n"
    text = (PKA / "postprocess.star").read_text()
    assert run("-", stdin=text).stdout == "1\n"


def test_a_table_through_a_named_pipe(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = (PKA / "postprocess.star").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,), daemon=True)
    writer.start()
    assert run(tmp_path / "pipe").stdout == "1\n"
    writer.join(10)


@pytest.mark.slow
def test_pipes_between_processes():
    first, second = (str(PKA / f"run_half{half}_class001_unfil.mrc") for half in (1, 2))
    command = [sys.executable, "-m", "cryored"]
    with subprocess.Popen([*command, "fsc", "-q", first, second], stdout=subprocess.PIPE) as producer:
        done = subprocess.run(
            [*command, "lambda-schedule", "-q", "--low", "10", "-"],
            stdin=producer.stdout,
            capture_output=True,
            text=True,
            check=True,
        )
    assert producer.returncode == 0
    assert done.stdout == f"{Schedule()(96 / 21):.6g}\n"
    assert done.stderr == ""


def test_a_stored_schedule(run, tmp_path):
    path = tmp_path / "s.json"
    path.write_text('{"resolution": [3, 7], "lambda": [0.6, 0.2]}')
    assert run("--resolution", 5, "--schedule", path).stdout == "0.4\n"
    path.write_text("no")
    refused = run("--resolution", 5, "--schedule", path)
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"cryored: error: {path}: no schedule")
    assert refused.stderr.count("\n") == 1


def test_a_models_schedule(run, tmp_path):
    model_with(tmp_path / "fitted", {"resolution": [5, 10], "lambda": [1, 0.5]})
    assert run("--resolution", 7, "--model", tmp_path / "fitted").stdout == "0.8\n"
    model_with(tmp_path / "without", {})
    assert run("--resolution", 7.25, "--model", tmp_path / "without").stdout == "0.5\n"


@pytest.mark.slow
def test_draws(run, tmp_path):
    for number, arguments in enumerate((["--resolution", 7.25], ["--resolution", "inf"], [PKA / "postprocess.star"])):
        path = tmp_path / f"{number}.png"
        done = run(*arguments, "--plot", path)
        assert done.exit_code == 0, done.stderr
        assert NUMBER.match(done.stdout)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(list(tmp_path.iterdir())) == 3
    refused = run("--resolution", 7.25, "--plot", path)
    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert "2.png: exists already; add --overwrite to replace it" in refused.stderr
    assert run("--resolution", 7.25, "--plot", path, "--overwrite").exit_code == 0


def test_a_table_has_resolutions_of_its_own(run, tmp_path, assert_one_line_error):
    table = tmp_path / "fsc.tsv"
    table.write_text("frequency\tfsc\n0.1\t0.9\n0.2\t0.1\n")
    assert run(table).exit_code == 0
    assert_one_line_error(run(table, "--angpix", 9), "a table with resolutions of its own, to which --angpix does not")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a table or --resolution"),
        ([REQUEST, "--resolution", 5], "give either a table or --resolution"),
        (["--resolution", 0], "--resolution"),
        (["--resolution", -3], "--resolution"),
        (["--resolution", "good"], "--resolution"),
        ([REQUEST, "--angpix", 0], "--angpix"),
        (["--resolution", 5, "--plot", "-"], "--plot needs the name of a file"),
        ([REQUEST, REQUEST], "give either a table or --resolution"),
        (["--resolution", 5, "--schedule", "s.json", "--low", 8], "--schedule and --model stand for --low and --high"),
        (["--resolution", 5, "--schedule", "s.json", "--model", "cwred"], "give one of the three"),
        (["--resolution", 5, "--model", "cwred", "--high", 4], "give one of the three"),
    ],
)
def test_usage_errors(run, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.tsv"], "none.tsv: cannot be read: No such file or directory"),
        (["--resolution", 5, "--model", "none"], "no model named 'none'"),
        (["--resolution", 5, "--low", 3], "--high 4.5 and --low 3 A: expected 0 < high < low"),
        (["--resolution", "nan"], "resolution nan A, expected a positive number"),
        (["--resolution", 5, "--plot", "no/such.png"], "no/such.png: the folder no does not exist; create it first"),
        ([REQUESTS / "pka_box64_pad1" / "truth.mrc"], "truth.mrc: "),
    ],
)
def test_input_errors_are_one_line(run, tmp_path, monkeypatch, arguments, message, assert_one_line_error):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run(*arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_from_the_environment(run, monkeypatch):
    monkeypatch.setenv("CRYORED_LAMBDA_SCHEDULE_LOW", "8")
    monkeypatch.setenv("CRYORED_LAMBDA_SCHEDULE_HIGH", "4")
    assert run("--resolution", 5).stdout == "0.75\n"


def test_the_helps_examples(run):
    assert run("--resolution", 7.25).exit_code == 0
    help_text = run("--help").stdout
    assert "cryored lambda-schedule --resolution 7.25" in help_text
    assert "cryored fsc half1.mrc half2.mrc | cryored lambda-schedule -" in help_text
