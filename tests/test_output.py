"""Files that are written: whole, where they were asked for, and never in place of something else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError, OutputError
from cryored.files.output import check_folder, check_outputs, check_target, stdin_bytes, stdout_bytes, write_text

DATA = Path(__file__).parent / "data"
HALVES = [DATA / "postprocess_pka" / f"run_half{half}_class001_unfil.mrc" for half in (1, 2)]
STRUCTURE = str(DATA / "structures" / "6M2B.cif.gz")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, half in zip(("h1.mrc", "h2.mrc"), HALVES, strict=True):
        Path(name).symlink_to(half)


def run(*arguments):
    return CliRunner().invoke(cli, list(arguments))


# One name, two files


def test_two_outputs_of_one_name():
    Path("folder").mkdir()
    Path("link").symlink_to("folder")
    check_outputs(("a", "b", None, None, "-"), ("c", None, "-"))
    for other in ("a.mrc", "folder/../a.mrc", os.path.abspath("a.mrc")):
        with pytest.raises(OutputError, match=f"^{other}: named for two outputs, expected a name of its own for each$"):
            check_outputs(("a.mrc", other))
    with pytest.raises(OutputError, match="link/a: named for two outputs"):
        check_outputs(("folder/a", "link/a"))
    with pytest.raises(OutputError, match="standard output: named for two outputs"):
        check_outputs(("-", "-"))


def test_an_output_that_is_an_input():
    Path("link.mrc").symlink_to("a.mrc")
    with pytest.raises(OutputError, match="^link.mrc: is an input, which would be lost; give the output another name$"):
        check_outputs(("link.mrc",), ("a.mrc",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["denoise", "h1.mrc", "-o", "a", "--difference", "a"], "a: named for two outputs"),
        (["denoise", "h1.mrc", "-o", "a", "--uncertainty", "./a"], "./a: named for two outputs"),
        (["denoise", "h1.mrc", "-o", "-", "--difference", "-"], "standard output: named for two outputs"),
        (["denoise", "h1.mrc", "--half2", "h2.mrc", "-o", "a", "--plot", "h2.mrc"], "h2.mrc: is an input"),
        (["denoise", "--half1", "h1.mrc", "--half2", "h2.mrc", "-o", "h1.mrc"], "h1.mrc: is an input"),
        (["mask", "h1.mrc", "-o", "a", "--plot", "a"], "a: named for two outputs"),
        (["mask", "h1.mrc", "-o", "h1.mrc"], "h1.mrc: is an input"),
        (["fsc", "h1.mrc", "h2.mrc", "--star", "a", "--xml", "a"], "a: named for two outputs"),
        (["fsc", "h1.mrc", "h2.mrc", "--plot", "h1.mrc"], "h1.mrc: is an input"),
        (["train", "p.star", "--evaluate", "m", "-o", "a", "--maps", "a"], "a: named for two outputs"),
        (["train", "p.star", "-o", "m", "--plot", "p.star"], "p.star: is an input"),
        (["lambda-schedule", "p.star", "--fit", "--model", "m", "-o", "a", "--plot", "a"], "a: named for two outputs"),
        (["simulate", "map", "a.pdb", "-o", "h1.mrc", "--like", "h1.mrc"], "h1.mrc: is an input"),
        (["simulate", "pairs", "a.pdb", "-o", "p", "--plot", "a.pdb"], "a.pdb: is an input"),
        (["simulate", "particles", "a_reference.mrc", "-o", "a"], "a_reference.mrc: is an input"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_command_loses_a_file_to_another(words, message, assert_one_line_error):
    assert_one_line_error(run(*words, "--overwrite"), message)
    assert sorted(os.listdir()) == ["h1.mrc", "h2.mrc"]
    assert all(Path(name).is_symlink() for name in os.listdir())


# Links, pipes and devices


def test_a_link_stays_and_its_file_is_replaced():
    Path("target").write_text("old")
    Path("link").symlink_to("target")
    with pytest.raises(OutputError, match="link: exists already"):
        check_target("link", overwrite=False)
    write_text("link", "new")
    assert os.readlink("link") == "target"
    assert Path("target").read_text() == "new"


def test_a_link_to_nothing_yet():
    Path("link").symlink_to("target")
    check_target("link", overwrite=False)
    write_text("link", "new")
    assert os.readlink("link") == "target"
    assert Path("target").read_text() == "new"
    Path("astray").symlink_to("none/target")
    with pytest.raises(OutputError, match="astray: the folder .*none does not exist"):
        check_target("astray", overwrite=True)


def test_a_pipe_stays_one():
    os.mkfifo("pipe")
    check_target("pipe", overwrite=False)
    found = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    write_text("pipe", "new")
    reader.join(10)
    assert found == ["new"]
    assert Path("pipe").is_fifo()


def test_a_device_stays_one():
    check_target("/dev/null", overwrite=False)
    write_text("/dev/null", "new")
    assert Path("/dev/null").is_char_device()


# A folder for results, closed streams


@pytest.mark.parametrize("words", [["train", "p.star"], ["simulate", "pairs", STRUCTURE]], ids=lambda words: words[0])
def test_a_file_where_a_folder_is_to_be(words, assert_one_line_error):
    check_folder("new")
    check_folder(".")
    message = "h1.mrc: is a file, expected a folder; give the results another name"
    assert_one_line_error(run(*words, "-o", "h1.mrc"), message)


def test_closed_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match="^standard input is closed: pipe a file into it or name one instead of '-'$"):
        stdin_bytes()
    for write in (stdout_bytes, lambda: write_text("-", "text"), lambda: check_target("-", overwrite=False)):
        with pytest.raises(OutputError, match="^standard output is closed: open it, or name a file to write$"):
            write()


def test_standard_output_by_its_other_name(tmp_path):
    script = "from cryored.files.output import *; import sys; print('before'); sys.stdout.flush(); "
    script += "check_target('/dev/stdout', False); write_text('/dev/stdout', 'middle\\n'); print('after')"
    for mode, before in (("w", ""), ("a", "older\n")):
        Path("out.txt").write_text("older\n")
        with Path("out.txt").open(mode) as stream:
            done = subprocess.run([sys.executable, "-c", script], stdout=stream, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        assert Path("out.txt").read_text() == f"{before}before\nmiddle\nafter\n"


def test_devices_may_be_named_twice():
    check_outputs(("/dev/null", "/dev/null"))


def test_text_may_go_to_a_terminal_and_maps_may_not(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    check_target("-", False, text=True)
    with pytest.raises(OutputError, match="standard output is a terminal"):
        check_target("-", False)
