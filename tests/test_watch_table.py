"""What ``cryored watch`` shows of each request: `cryored.refinement.watch_table`."""

from __future__ import annotations

import gc
import io
import logging
import math
import re
import sys
import threading
import weakref

import pytest
from rich.console import Console

from cryored.refinement.watch_table import STEPS, Entry, Table, _line, add_steps

SECONDS = {
    "waited": 0.01,
    "read": 0.2,
    "map": 0.1,
    "unregularised": 0.3,
    "load": 2.0,
    "network": 0.5,
    "update": 0.4,
    "write": 0.03,
}


def entry(iteration=3, half=1, *, name=None, resolution=7.25, error="", device="GPU:0 (NVIDIA H100 80GB HBM3)", **more):
    halves = "" if half is None else f"_half{half}"
    name = name or f"run_it{iteration:03d}{halves}_class001"
    values = {"lam": 0.5, "seconds": SECONDS, "change": 0.0321} | more
    return Entry(name, iteration, half, resolution, device=device, error=error, **values)


@pytest.mark.parametrize(
    ("item", "label"),
    [
        (entry(half=2), "half 2"),
        (entry(half=None), "joined"),
        (entry(half=None, resolution=math.inf), "joined"),
        (entry(half=None, resolution=None, name="run_it005_class012"), "class 12"),
        (entry(name="run_it005_half1_body002"), "half 1 body 2"),
        (entry(half=None, name="run_it005_class001_body002"), "joined body 2"),
        (entry(iteration=None, half=None, resolution=None, name="mine"), ""),
    ],
)
def test_maps_are_named_as_users_know_them(item, label):
    assert item.label == label


def test_each_step_is_counted_once():
    assert sorted(step for steps in STEPS.values() for step in steps) == sorted(SECONDS)
    columns = add_steps(SECONDS)
    assert list(columns) == ["waited", "read", "FFT", "network", "write"]
    assert columns["FFT"] == pytest.approx(0.8)
    assert columns["network"] == pytest.approx(2.5)
    assert add_steps({"map": 0.5}) == {"FFT": 0.5}  # not taken is not the same as no time


class Terminal:
    """A table on a terminal in memory."""

    def __init__(self, *titles, width=80, height=30):
        self.stream = io.StringIO()
        self.size = width, height
        self.table = Table(
            *titles,
            console=Console(
                file=self.stream, force_terminal=True, width=width, height=height, legacy_windows=False, _environ={}
            ),
        )

    def frame(self):
        """Return the lines that were drawn last, without colours."""
        last = re.split(r"\x1b\[2K", self.stream.getvalue())[-1]
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).strip("\r\n").splitlines()
        assert len(lines) <= self.size[1]
        assert max(map(len, lines)) <= self.size[0]
        return [line for line in lines if line.strip()]


def test_the_terminal_shows_a_row_a_request():
    terminal = Terminal("Refine3D/job[012]", "model cwred")
    with terminal.table as table:
        table.state("busy run_it003_half1_class001")
        lines = terminal.frame()
        assert lines[:3] == ["Refine3D/job[012]", "model cwred", "0 served; busy run_it003_half1_class001"]
        table.add(entry())
        table.add(entry(1, None, resolution=math.inf, seconds={"read": 0.2}, change=0.0, device="CPU"))
        table.state("waiting")
        lines = terminal.frame()
    assert lines[2] == "2 served; waiting"
    rows = [line.split() for line in lines[-2:]]
    assert rows[0][:10] == ["3", "half", "1", "7.25", "0.500", "0.01", "0.20", "0.80", "2.50", "0.03"]
    assert rows[0][10:12] == ["3.21", "GPU:0"]
    assert rows[1] == ["1", "joined", "none", "0.500", "0.20", "0.00", "CPU"]


def test_the_plain_map_of_the_last_iteration_is_told():
    terminal = Terminal("job012", width=120)
    last = entry(10, None, beside="run_it010_class001_denoised.mrc")
    with terminal.table as table:
        table.add(last)
        lines = terminal.frame()
    assert "joined*" in lines[-2]
    assert lines[-1] == "* plain MAP (last iteration), with the prior: run_it010_class001_denoised.mrc"
    assert _line(last).startswith(f"run_it010_class001: {lines[-1][2:]}, resolution 7.25 A, lambda 0.500")


def test_a_failure_is_red_and_says_why():
    terminal = Terminal("job012", width=120)
    with terminal.table as table:
        table.add(entry())
        table.add(entry(half=2, error="weight.mrc: nan in [3, 4, 5], expected finite numbers"))
        lines = terminal.frame()
    assert "1 served, 1 failed; starting" in lines
    assert lines[-1] == "run_it003_half2_class001: weight.mrc: nan in [3, 4, 5], expected finite numbers"
    assert "\x1b[31mrun_it003_half2_class001: weight.mrc" in terminal.stream.getvalue()
    assert "\x1b[31mfailed" in terminal.stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("height", "rows"), [(60, 20), (24, 24 - 1 - 6), (6, 1)])
def test_only_the_latest_rows_that_fit_are_kept(height, rows):
    terminal = Terminal("job012", height=height)
    kept = []
    with terminal.table as table:
        for iteration in range(50):
            item = entry(iteration)
            kept.append(weakref.ref(item))
            table.add(item)
        if height > 6:  # nothing fits into six lines
            shown = [int(line.split()[0]) for line in terminal.frame() if "half 1" in line]
            assert shown == list(range(50 - rows, 50))
            assert "50 served; starting" in terminal.frame()
        del item
        gc.collect()
        assert sum(reference() is not None for reference in kept) == 20


def test_log_lines_stay_above_the_table_and_results_out_of_it(capsys):
    terminal = Terminal("job012")
    threads, output = threading.active_count(), sys.stdout
    with terminal.table as table:
        assert (threading.active_count(), sys.stdout) == (threads, output)
        sys.stderr.write("out of memory\n")
        table.add(entry())
        assert terminal.frame()[0] == "job012"
    text = terminal.stream.getvalue()
    assert text.index("out of memory") < text.rindex("job012")
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_line_a_request(monkeypatch, capsys):
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logger = logging.getLogger("cryored.refinement.watch_table")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    with Table("job012", "model cwred") as table:
        table.state("busy run_it003_half1_class001")
        table.add(entry(device="CPU"))
        table.add(entry(1, resolution=math.inf, lam=0.0, seconds={"read": 0.2}, change=0.0, device="CPU"))
        table.add(entry(half=2, error="weight.mrc: 100 % nan"))
    assert [(record.levelname, record.getMessage()) for record in logged] == [
        ("INFO", "job012"),
        ("INFO", "model cwred"),
        (
            "INFO",
            "run_it003_half1_class001: resolution 7.25 A, lambda 0.500, change 3.21 %; "
            "waited 0.01, read 0.20, FFT 0.80, network 2.50, write 0.03 s; CPU",
        ),
        ("INFO", "run_it001_half1_class001: nothing resolved, lambda 0.000, change 0.00 %; read 0.20 s; CPU"),
        ("WARNING", "run_it003_half2_class001: failed: weight.mrc: 100 % nan"),
    ]
    assert capsys.readouterr().out == ""
