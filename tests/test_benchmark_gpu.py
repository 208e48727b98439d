"""The benchmark of a GPU: each stage leaves numbers or a reason, also where there is no GPU and when time is short."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import gpu
import pytest
from click.testing import CliRunner


def run(tmp_path, *options, engine=None, **environment):
    """Return the outcome of the whole script, and the file that it leaves."""
    engine = engine or os.environ.get("KERAS_BACKEND", "tensorflow")
    output = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "-o", str(output), "--small", "--engines", engine, *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


@pytest.mark.slow
def test_each_stage_leaves_numbers_or_a_reason(tmp_path):
    stages = ("setup", "training", "inference", "ceilings")
    table, found = run(tmp_path, "--seconds", "150", "--stages", ",".join(stages), CUDA_VISIBLE_DEVICES="-1")
    rows = found["rows"]
    assert {row["stage"] for row in rows if row["case"] == "all"} == set(stages)
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert numbers or row.get("error") or row.get("skipped"), row
        assert row.get("within", True), row
        assert row.get("as_expected", True), row
        assert f"{row['engine']}\t{row['stage']}\t{row['case']}\t" in table
    measured = {row["stage"] for row in rows if row["case"] != "all" and not {"error", "skipped"} & row.keys()}
    assert {"setup", "training", "inference"} <= measured


@pytest.mark.slow
def test_a_stage_without_time_says_so(tmp_path):
    table, found = run(tmp_path, "--seconds", "0.2", "--stages", "training,watch")
    assert [(row["stage"], row["error"]) for row in found["rows"]] == [
        ("training", "stopped after 0 s"),
        ("watch", "stopped after 0 s"),
    ]
    assert "stopped after 0 s" in table


def test_an_engine_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "gpu.json"
    done = CliRunner().invoke(gpu.main, ["-o", str(output), "--engines", "jax"])
    assert done.exit_code == 0
    assert json.loads(output.read_text())["rows"] == [
        {"engine": "jax", "stage": "all", "case": "all", "skipped": "not installed"}
    ]


@pytest.mark.parametrize("option", ["--engines", "--stages"])
def test_an_unknown_word(option):
    done = CliRunner().invoke(gpu.main, [option, "theano"])
    assert done.exit_code == 2
    assert "theano is none of" in done.stderr


@pytest.mark.slow
def test_a_failure_is_a_row_and_the_rest_goes_on(tmp_path):
    book = gpu.Book(tmp_path / "records", "torch", gpu.SMALL, "tiles", end=float("inf"))
    book.measure("bad", lambda: 1 / 0)
    book.measure("good", lambda: {"first_s": 1.0})
    book.end = 0.0
    book.measure("late", lambda: {"first_s": 1.0})
    bad, good, late = map(json.loads, book.path.read_text().splitlines())
    assert bad["error"] == "ZeroDivisionError: division by zero"
    assert good["first_s"] == 1.0
    assert late["skipped"] == "no time was left"


def test_processes():
    card = 80 * 2**30
    stages = list(gpu.STAGES)
    assert [names for names, _ in gpu.plan("torch", stages, card, gpu.Sizes())] == [
        ["setup", "training", "inference", "short", "tiles"],
        ["watch"],
        ["large", "ceilings"],
    ]
    planned = gpu.plan("jax", stages, card, gpu.Sizes())
    assert planned[0][0] == ["setup", "training"]
    limits = [float(extra["XLA_PYTHON_CLIENT_MEM_FRACTION"]) * card for names, extra in planned if names == ["short"]]
    wanted = [limit for _, limit in gpu.short_cases(gpu.Sizes()).values()]
    assert limits == pytest.approx(wanted, rel=0.02)
    assert all(names != [] for names, _ in planned)
