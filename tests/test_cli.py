"""What all commands have in common: help, errors, exit codes, pipes and signals."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cryored import __version__
from cryored.cli import COMMANDS, cli, options
from cryored.cli.progress import terminal as terminal_to_show_on

DATA = Path(__file__).parent / "data"
STRUCTURE = str(DATA / "structures" / "6M2B.cif.gz")
HALF1, HALF2 = (str(DATA / "postprocess_pka" / f"run_half{i}_class001_unfil.mrc") for i in (1, 2))
MAP = ["simulate", "map", STRUCTURE, "-q", "--box", "32", "--angpix", "4", "--resolution", "8"]


def cryored(*arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run([sys.executable, "-m", "cryored", *map(str, arguments)], **options)


def invoke(*arguments, **options):
    return CliRunner().invoke(cli, [*map(str, arguments)], **options)


def leaves(command, path):
    """Yield (words, command) of a command and of all those below it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name in command.list_commands(click.Context(command)):
        yield from leaves(command.get_command(click.Context(command), name), (*path, name))


LEAVES = list(leaves(cli, ()))
options_of_leaves = [
    pytest.param(command, option, id=f"{'-'.join(path)}{max(option.opts, key=len)}")
    for path, command in LEAVES
    for option in command.params
    if isinstance(option, click.Option)
]


# Help


def imported_after(commands, modules):
    program = (
        "import sys\n"
        "from cryored.cli import cli\n"
        f"for arguments in {commands!r}:\n"
        "    cli.main(arguments, standalone_mode=False)\n"
        f"print(*set({modules!r}) & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout != ""
    return done.stderr.split()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["simulate", "--help"]], ids=" ".join)
def test_help_is_fast_because_it_imports_nothing_heavy(arguments):
    heavy = ["numpy", "scipy", "gemmi", "mrcfile", "rich", "matplotlib", "tensorflow", "keras", "torch"]
    assert imported_after([arguments], heavy) == []


def test_help_of_a_command_loads_no_network():
    commands = [[*path, "--help"] for path, _ in LEAVES]
    assert imported_after(commands, ["tensorflow", "keras", "torch", "matplotlib", "gemmi"]) == []


@pytest.mark.slow
def test_tensorflow_does_not_load_what_it_only_tries_for():
    """JAX and Matplotlib, a third of its start; what is drawn later is drawn all the same."""
    script = (
        "import sys; from cryored.prior import device; device.set_up(gpu=False); "
        "assert not {'jax', 'matplotlib'} & set(sys.modules); import matplotlib.pyplot"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_version():
    done = invoke("--version")
    assert done.exit_code == 0
    assert done.stdout == f"cryored {__version__}\n"


def test_help_lists_every_command():
    done = invoke("--help")
    assert done.exit_code == 0
    for name, line in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert line.split()[0] in done.stdout
    assert done.stdout == invoke("-h").stdout


@pytest.mark.parametrize("path", [path for path, _ in LEAVES], ids="-".join)
def test_help_of_a_command_ends_with_an_example(path):
    done = invoke(*path, "--help")
    assert done.exit_code == 0
    if path == ("watch",):
        return  # not there yet: nothing to show
    assert "Example" in done.stdout
    assert f"  cryored {' '.join(path)} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_pages_show_the_help_that_is_printed(name):
    page = (DATA.parents[1] / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert "-h, --help" in page
    assert "  --help" not in page


@pytest.mark.parametrize(("command", "option"), options_of_leaves)
def test_options_have_help_and_tell_their_default(command, option):
    record = option.get_help_record(click.Context(command))
    assert option.help
    isolated = option.is_flag or option.count or option.required or isinstance(option.type, click.Path)
    has_default = isinstance(option.default, (int, float, str)) and option.default != ""
    if has_default and not isolated:
        assert "[default: " in record[1], record
    if option.is_flag and option.secondary_opts:  # --gpu/--cpu: which of the two?
        assert "default: " in record[1], record


@pytest.mark.parametrize("command", [pytest.param(command, id="-".join(path)) for path, command in LEAVES])
def test_no_option_is_dropped_on_the_way(command):
    """What a command does not name it hands on to a dataclass, by the names of its fields."""
    function = inspect.unwrap(command.callback)
    source = inspect.getsource(sys.modules[function.__module__]) + inspect.getsource(options.settings)
    # A name in quotes counts where it is used, not where an option is declared ("--name").
    named = {*inspect.signature(function).parameters, *re.findall(r'"(\w+)"', source)}
    fields = set()
    for module, names in re.findall(r"from (cryored\S+) import ([^\n]+)", source):
        for name in names.split(", "):
            found = getattr(importlib.import_module(module), name, None)
            if dataclasses.is_dataclass(found):
                fields |= {field.name for field in dataclasses.fields(found)}
    left = {option.name for option in command.params if option.expose_value} - named - fields
    assert left == set()


@pytest.mark.parametrize("name", ["--angpix", "--mask", "--model", "--seed", "--gpu", "--threads", "--overwrite"])
def test_the_same_option_is_the_same_everywhere(name):
    found = [option for _, command in LEAVES for option in command.params if name in option.opts]
    assert found
    kinds = {(type(option.type), option.is_flag, option.multiple) for option in found}
    assert len(kinds) == 1 or (name == "--angpix" and len(kinds) <= 2)  # simulate map makes the pixel size


def _is_float(kind):
    return isinstance(kind, (click.FloatRange, click.types.FloatParamType))


@pytest.mark.parametrize(("command", "option"), [each for each in options_of_leaves if _is_float(each.values[1].type)])
def test_numbers_are_finite(command, option):
    if (command.name, option.name) in {("lambda-schedule", "resolution"), ("particles", "snr")}:
        return  # inf has a meaning, and the tools refuse nan
    for word in ("nan", "inf", "-inf"):
        with pytest.raises(click.BadParameter):
            option.type.convert(word, option, None)


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999])
def test_seeds_that_no_generator_takes(seed):
    found = [option for _, command in LEAVES for option in command.params if "--seed" in option.opts]
    for option in found:
        with pytest.raises(click.BadParameter, match="is not in the range 0<=x<=4294967295"):
            option.type.convert(seed, option, None)


DRAWN = {
    "denoise": ["denoise", HALF1, "-o", "a.mrc"],
    "fsc": ["fsc", HALF1, HALF2, "--star", "a.star"],
    "lambda-schedule": ["lambda-schedule", "--resolution", "5"],
    "lambda-schedule --fit": ["lambda-schedule", "--fit", "none.star", "--model", "none", "-o", "a.json"],
    "mask": ["mask", HALF1, "-o", "a.mrc"],
    "simulate pairs": ["simulate", "pairs", "none.pdb", "-o", "pairs"],
    "train": ["train", "none.star", "-o", "model"],
    "train --evaluate": ["train", "none.star", "--evaluate", "none", "-o", "a.tsv"],
}


@pytest.mark.parametrize("words", DRAWN.values(), ids=list(DRAWN))
def test_a_picture_that_cannot_be_drawn_is_told_of_before_the_work(words, tmp_path, monkeypatch, assert_one_line_error):
    monkeypatch.chdir(tmp_path)
    done = invoke(*words, "--plot", "-")
    assert done.exit_code == 2
    assert "--plot needs the name of a file" in done.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = "--plot needs matplotlib: pip install 'cryored[plot]'"
    assert_one_line_error(invoke(*words, "--plot", "a.png"), message)
    assert os.listdir() == []


# Exit codes and messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["refine"], "No such command 'refine'"),
        (["fsc", HALF1], "Missing argument"),
        (["fsc", HALF1, HALF2, "--treshold", "0.5"], "--threshold"),
        (["denoise", HALF1], "Missing option '-o'"),
        (["denoise", HALF1, "-o", "a.mrc", "--half2", HALF2, "--fsc", "a.tsv"], "give one"),
        (["denoise", HALF1, "-o", "a.mrc", "--rotations", "25"], "25 is not in the range"),
        (["denoise", "-", "-o", "a.mrc", "--half2", "-"], "only one of MAP, --half1, --half2,"),
        (["denoise", "-", "-o", "a.mrc", "--mask", "-"], "only one of MAP, --half1, --half2,"),
        (["simulate", "pairs", "-o", "pairs"], "Missing argument"),
        (["simulate", "pairs", "a.pdb", "-o", "p", "--method", "refine"], "'refine' is not"),
        (["train", "a.star", "-o", "m", "--input", "raw"], "'raw' is not"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_usage_errors_exit_2(arguments, message):
    done = cryored(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr


ERRORS = [
    (["fsc", "none.mrc", HALF2], "none.mrc: cannot be read: No such file or directory"),
    (["fsc", HALF1, str(DATA / "odd_mrc" / "plain_float32.mrc")], "12 x 12 x 12 voxels (x, y, z), expected"),
    (["denoise", HALF1, "-o", "a.mrc", "--model", "none"], "no model named 'none'; there is: "),
    (["denoise", HALF1, "-o", "a.mrc", "--model", "./none"], "none: no model here, expected a folder with"),
    (["simulate", "map", "none.pdb", "-o", "a.mrc"], "none.pdb: "),
    (["simulate", "pairs", "none.pdb", "-o", "pairs"], "none.pdb: "),
    (["train", "none.star", "-o", "model"], "none.star: cannot be read: No such file or directory"),
    ([*MAP, "-o", "no/a.mrc"], "no/a.mrc: the folder no does not exist; create it first"),
    ([*MAP, "-o", "."], ".: is a folder, expected the name of a file to write"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(words[:2]) for words, _ in ERRORS])
def test_input_errors_exit_1_with_one_line(arguments, message, tmp_path, monkeypatch, assert_one_line_error):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(invoke(*arguments), message)
    assert not (tmp_path / "a.mrc").exists()


@pytest.mark.slow
def test_vv_shows_the_traceback():
    done = cryored("fsc", "none.mrc", HALF2, "-vv")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback (most recent call last)" in done.stderr
    assert "cryored.errors.InputError: none.mrc: cannot be read" in done.stderr
    assert cryored("fsc", "none.mrc", HALF2, "-v").stderr.startswith("cryored: error: none.mrc: cannot be read")


@pytest.mark.slow
def test_quiet_leaves_errors_alone():
    done = cryored("fsc", HALF1, HALF2, "-q")
    assert done.returncode == 0
    assert done.stdout.startswith("shell\t")
    assert done.stderr == ""
    assert "resolution" in cryored("fsc", HALF1, HALF2).stderr
    assert cryored("fsc", "none.mrc", HALF2, "-q").stderr.startswith("cryored: error: none.mrc")


def test_nothing_is_overwritten_unasked(tmp_path):
    target = tmp_path / "a.mrc"
    target.write_bytes(b"mine")
    done = invoke(*MAP, "-o", target)
    assert done.exit_code == 1
    assert f"{target}: exists already; add --overwrite to replace it" in done.stderr
    assert target.read_bytes() == b"mine"
    assert invoke(*MAP, "-o", target, "--overwrite").exit_code == 0
    assert target.stat().st_size == 1024 + 4 * 32**3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    done = invoke(*MAP, "-o", tmp_path / "a.mrc")
    assert done.exit_code == 1
    assert "is not writable" in done.stderr


def test_usage_errors_name_the_environment(monkeypatch):
    monkeypatch.setenv("CRYORED_RED_UPDATE_TRUST", "0.5")
    done = CliRunner().invoke(cli, ["red-update", "x.star", "--lambda", "0"])
    assert done.exit_code == 2
    assert "eq. 17 knows none. (Set in the environment: CRYORED_RED_UPDATE_TRUST.)" in done.stderr
    assert done.stderr.startswith("Usage: cryored red-update")
    monkeypatch.setenv("CRYORED_RED_UPDATE_TRUST", "abc")
    done = CliRunner().invoke(cli, ["red-update", "x.star"])
    assert done.exit_code == 2
    assert "Invalid value for '--trust': 'abc'" in done.stderr
    assert done.stderr.count("(Set in the environment: CRYORED_RED_UPDATE_TRUST.)") == 1


def test_options_come_from_the_environment_too(tmp_path):
    done = invoke(*MAP[:3], "-o", tmp_path / "a.mrc", env={"CRYORED_SIMULATE_MAP_BOX": "70"})
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "a.mrc").stat().st_size == 1024 + 4 * 70**3


# Pipes


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["fsc", HALF1, HALF2, "-q"],
        ["fsc", HALF1, HALF2, "-q", "--star", "-"],
        ["fsc", HALF1, HALF2, "-q", "--resolution-only"],
        [*MAP, "-o", "-"],
        ["lambda-schedule", "--resolution", "5", "-q"],
    ],
    ids=lambda words: "-".join(Path(word).stem for word in words),
)
def test_a_closed_pipe_ends_it_quietly(arguments):
    """The reader has gone before the first byte: what `| head -1` does to long outputs at chance."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = cryored(*arguments, stdout=writing, stderr=subprocess.PIPE, capture_output=False)
    finally:
        os.close(writing)
    assert done.stderr == ""


@pytest.mark.slow
def test_head():
    command = f"'{sys.executable}' -m cryored fsc -q '{HALF1}' '{HALF2}' | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "shell\tfrequency\tresolution\tfsc\n"
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["fsc", HALF1, HALF2, "-q"],
        ["fsc", HALF1, HALF2, "-q", "--xml", "-"],
        [*MAP, "-o", "-"],
        ["lambda-schedule", "--resolution", "5", "-q"],
    ],
    ids=lambda words: "-".join(Path(word).stem for word in words),
)
def test_a_full_disk_behind_standard_output(arguments):
    with open("/dev/full", "w") as full:
        done = cryored(*arguments, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1
    assert done.stderr.startswith("cryored: error: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("messages", ["2>&-", "2>/dev/full"])
def test_messages_that_cannot_be_printed_cost_nothing(messages, tmp_path):
    if "full" in messages and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    program = f"'{sys.executable}' -m cryored"
    done = subprocess.run(["sh", "-c", f"{program} mask '{HALF1}' -o mask.mrc {messages}"], cwd=tmp_path, timeout=60)
    assert done.returncode == 0
    assert os.listdir(tmp_path) == ["mask.mrc"]
    if messages == "2>&-":  # TensorFlow's own are hushed
        words = f"denoise '{HALF1}' --half2 '{HALF2}' -o denoised.mrc --cpu {messages}"
        assert subprocess.run(["sh", "-c", f"{program} {words}"], cwd=tmp_path, timeout=120).returncode == 0
        assert (tmp_path / "denoised.mrc").exists()
    for words, status in (("mask", 2), (f"mask none.mrc -o {tmp_path}/a.mrc", 1)):
        done = subprocess.run(["sh", "-c", f"{program} {words} {messages}"], timeout=60)
        assert done.returncode == status


@pytest.mark.slow
def test_a_closed_standard_output():
    command = f"'{sys.executable}' -m cryored fsc -q '{HALF1}' '{HALF2}' >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "cryored: error: standard output is closed: open it, or name a file to write\n"


def test_a_log_without_a_standard_error(monkeypatch):
    record = logging.makeLogRecord({"msg": "message"})
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        options._Console().emit(record)
    monkeypatch.setattr(sys, "stderr", None)
    assert terminal_to_show_on() is None


@contextlib.contextmanager
def terminal():
    ours, theirs = os.openpty()
    try:
        yield theirs
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.slow
def test_maps_are_neither_read_from_nor_printed_on_a_terminal():
    with terminal() as screen:
        done = cryored(*MAP, "-o", "-", stdout=screen, stderr=subprocess.PIPE, capture_output=False)
        assert done.returncode == 1
        assert "standard output is a terminal: pipe it on or name a file instead of '-'" in done.stderr
        done = cryored("fsc", "-", HALF2, stdin=screen)
        assert done.returncode == 1
        assert "standard input is a terminal: pipe a file into it or name one instead of '-'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [("fsc", HALF1, HALF2, "--resolution-only"), ("mask", HALF1, "-o", "mask.mrc")])
def test_a_terminal_sees_that_something_goes_on_and_a_pipe_does_not(tmp_path, words):
    program = "import os, pty, sys\nsys.exit(pty.spawn(sys.argv[1:], lambda d: os.read(d, 1 << 16)))"
    command = [sys.executable, "-m", "cryored", *map(str, words)]
    environment = os.environ | {"TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    doing = {"fsc": "comparing", "mask": "masking"}[words[0]].encode()
    assert doing in done.stdout
    (tmp_path / "mask.mrc").unlink(missing_ok=True)
    piped = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert doing not in piped.stdout + piped.stderr


# Signals


@pytest.mark.slow
def test_control_c(tmp_path):
    """As a terminal sends it: to the command and to the processes that it has started."""
    words = ["simulate", "pairs", STRUCTURE, "-o", "pairs", "--number", "5000", "--box", "32", "--angpix", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cryored", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell without job control starts what runs in its background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        try:
            for _ in range(600):  # until it is well at work, a minute at most
                if len(list(tmp_path.glob("pairs/*_target.mrc"))) > 2:
                    break
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            output, messages = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert output == ""
    assert messages.split() == ["cryored:", "interrupted"]
    assert not (tmp_path / "pairs" / "pairs.star").exists()
