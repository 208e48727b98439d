"""The program that refines and harvests: with a stand-in for RELION that knows the truth, and with RELION."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gemmi
import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli.harvest_relion import harvest_relion as command
from cryored.errors import InputError
from cryored.files.mrc import read_volume
from cryored.files.star import read_star
from cryored.maps.fsc import shell_correlation
from cryored.refinement import harvest_relion
from cryored.refinement import relion_runs as refinement
from cryored.refinement.harvest_relion import plan
from cryored.simulation.harvest import overlap
from cryored.simulation.pair_table import read_pairs

REPOSITORY = Path(__file__).parents[1]
STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
SMALL = ["--box", "24", "--angpix", "4", "--number", "20"]

# Stands in for mpirun: two iterations, in each the request of a map that is the truth, and a joined one.
STAND_IN = """#!{python}
import os, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
mode = Path({mode!r}).read_text()
if mode == "fail":
    print("in: src/ml_optimiser.cpp, line 7")
    print("ERROR: ")
    print("out of   patience")
    print("prterun noticed that a process exited")
    sys.exit(3)
if mode == "hang":
    Path({mode!r}).with_name("pid").write_text(str(os.getpid()))
    time.sleep(600)
import mrcfile, numpy as np
from cryored.files.mrc import read_volume
from cryored.files.star import write_star
arguments = sys.argv
root = arguments[arguments.index("--o") + 1]
assert Path("particles.mrcs").stat().st_size and Path("particles_reference.mrc").exists()
truth = read_volume("truth.mrc")
box = len(truth.data)
sums = 7 * np.fft.rfftn(np.fft.ifftshift(truth.data)) * box / box**3
shells = np.arange(box // 2 + 1)
for name in [*(f"{{root}}_it{{i:03d}}_half{{h}}" for i in (1, 2) for h in (1, 2)), root + "_it003"]:
    stem = f"{{name}}_class001_external_reconstruct"
    for part, data in (("data_real", sums.real), ("data_imag", sums.imag), ("weight", np.ones(sums.shape))):
        with mrcfile.new(f"{{stem}}_{{part}}.mrc", data.astype(np.float32)):
            pass
    general = {{
        "rlnExtReconsDataReal": f"{{stem}}_data_real.mrc", "rlnExtReconsDataImag": f"{{stem}}_data_imag.mrc",
        "rlnExtReconsWeight": f"{{stem}}_weight.mrc", "rlnExtReconsResult": f"{{stem}}.mrc",
        "rlnTau2FudgeFactor": 1.0, "rlnPaddingFactor": 1.0, "rlnReferenceDimensionality": 3,
        "rlnOriginalImageSize": box, "rlnCurrentImageSize": box, "rlnPixelSize": truth.voxel_size,
    }}
    table = {{"rlnSpectralIndex": shells, "rlnReferenceTau2": shells + 1.0, "rlnGoldStandardFsc": 0.99**shells}}
    write_star(stem + ".star", {{"external_reconstruct_general": general, "external_reconstruct_tau2": table}})
    if "half1" in name:
        Path(f"{{name}}_model.star").write_text("")
Path("calls").open("a").write(root)
"""


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    """Two structures: 6M2B and its first half."""
    folder = tmp_path_factory.mktemp("structures")
    structure = gemmi.read_structure(str(STRUCTURE))
    chain = structure[0]["A"]
    for number in reversed(range(150, len(chain))):
        del chain[number]
    (folder / "half.pdb").write_text(structure.make_pdb_string())
    return [str(STRUCTURE), str(folder / "half.pdb")]


@pytest.fixture
def relion(tmp_path, monkeypatch):
    """Put the stand-in on the PATH; return a function that sets what it does."""
    programs, mode = tmp_path / "programs", tmp_path / "mode"
    programs.mkdir()
    text = STAND_IN.format(python=sys.executable, repository=str(REPOSITORY), mode=str(mode))
    for name in ("mpirun", "relion_refine_mpi", "relion_external_reconstruct"):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    mode.write_text("refine")
    return mode.write_text


def program(*arguments):
    return CliRunner().invoke(command, [*map(str, arguments)])


def run(*arguments):
    """Run it as a process of its own."""
    command = [sys.executable, "-m", "cryored.cli.harvest_relion", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def calls(folder):
    """Return how often a refinement was run."""
    return len(Path(folder, "calls").read_text()) // len("run/run")


@pytest.mark.slow
def test_a_cluster_does_what_one_machine_does(structures, relion, tmp_path):
    """Workers in another folder; a structure that fails does not stop the others, and a finished one is left alone."""
    distributed = pytest.importorskip("distributed")
    Path("bad.pdb").write_text("END\n")
    assert program(*structures, "-o", "here", *SMALL).exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", local_directory=str(tmp_path / "elsewhere")
    ) as cluster:
        words = (*structures, "bad.pdb", "-o", "there", *SMALL, "--scheduler", cluster.scheduler_address)
        done = program(*words)
        assert done.exit_code == 0, done.output
        assert "bad_snr0.02 failed: " in done.stderr
        again = program(*words)
        assert again.stdout == done.stdout
    tables = [Path(line) for line in done.stdout.splitlines()]
    assert [table.parts[:2] for table in tables] == [("there", "6M2B_snr0.15"), ("there", "half_snr0.06")]
    for table in tables:
        assert calls(table.parents[1]) == 1
        here = Path("here", *table.parts[1:])
        for mine, theirs in zip(read_pairs(table), read_pairs(here), strict=True):
            np.testing.assert_array_equal(read_volume(mine.noisy).data, read_volume(theirs.noisy).data)


def test_jobs_and_a_scheduler_exclude_each_other():
    done = program("a.pdb", "-o", "out", "--jobs", 2, "--scheduler", "tcp://a:1")
    assert done.exit_code == 2
    assert "--jobs and --scheduler exclude each other" in done.stderr


# The plan


def settings(**changes):
    given = {"snr": (0.2, 0.1), "number": 20, "box": 24, "angpix": 4.0, "perturb_angles": 5.0, "seed": 0}
    return given | changes


def test_ratios_go_round_and_shards_share_the_work():
    names = [f"dir/{letter}.pdb.gz" for letter in "abcde"]
    whole = plan(names, Path("out"), **settings())
    assert [task.label for task in whole] == ["a_snr0.2", "b_snr0.1", "c_snr0.2", "d_snr0.1", "e_snr0.2"]
    assert whole[1].table == Path("out/b_snr0.1/pairs/pairs.star")
    shards = [plan(names, Path("out"), **settings(), shard=(i, 3)) for i in (1, 2, 3)]
    assert [len(shard) for shard in shards] == [2, 2, 1]
    assert sorted((task for shard in shards for task in shard), key=lambda task: task.name) == whole


def test_a_seed_is_the_structures_own():
    first = {task.name: task.settings.seed for task in plan(["a.pdb", "b.pdb"], Path(), **settings())}
    other = {task.name: task.settings.seed for task in plan(["b.pdb", "c.pdb", "a.pdb"], Path(), **settings())}
    assert first["a"] == other["a"]
    assert len(set(other.values())) == 3
    (task,) = plan(["a.pdb"], Path(), **settings(seed=1))
    assert task.settings.seed == first["a"] + 1


def test_two_structures_of_one_name():
    with pytest.raises(InputError, match="a: two structures of this name"):
        plan(["x/a.pdb", "y/a.cif.gz"], Path(), **settings())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--snr", "0.1,x"], "'0.1,x', expected numbers above 0 as in 0.15,0.06"),
        (["--snr", "0"], "'0', expected numbers above 0"),
        (["--snr", "inf"], "'inf', expected numbers above 0"),
        (["--shard", "3/2"], "'3/2', expected i/n with i from 1 to n, as in 2/8"),
        (["--shard", "2"], "'2', expected i/n with"),
        (["--jobs", "0"], "0 is not in the range"),
    ],
)
def test_usage(arguments, message):
    done = program("a.pdb", "-o", "out", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


# The data set


@pytest.mark.slow
def test_data_are_made_once_and_named_from_the_project_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"box": 24, "angpix": 4.0, "number": 5}
    data = refinement.make_data(str(STRUCTURE), Path("set"), **options)
    assert 54 < data.diameter <= 0.95 * 24 * 4  # 6M2B is 54 A long
    for name in ("particles.star", "particles_truth.star"):
        images = read_star(f"set/{name}").texts("particles", "rlnImageName")
        assert images == [f"{number:06d}@particles.mrcs" for number in range(1, 6)]
    before = {path: path.stat().st_mtime_ns for path in Path("set").iterdir()}
    assert refinement.make_data(str(STRUCTURE), Path("set"), **options) == data
    assert {path: path.stat().st_mtime_ns for path in Path("set").iterdir()} == before
    content = data.stack.read_bytes()
    data.stack.unlink()
    refinement.make_data(str(STRUCTURE), Path("set"), **options)
    assert data.stack.read_bytes() == content


# Refinements by the stand-in


def test_a_map_is_the_truth_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_model = refinement.make_data(str(STRUCTURE), Path("model"), box=24, angpix=4.0, number=5)
    of_map = refinement.make_data(str(of_model.truth), Path("map"), box=24, angpix=4.0, number=5)
    np.testing.assert_array_equal(read_volume(of_map.truth).data, read_volume(of_model.truth).data)
    assert of_map.stack.read_bytes()[1024:] == of_model.stack.read_bytes()[1024:]
    assert 0 <= of_map.diameter - of_model.diameter < 20  # the mask is a little wider than the atoms
    with pytest.raises(InputError, match="of 4 A, expected 32 cubed of 4 A"):
        refinement.make_data(str(of_model.truth), Path("other"), box=32, angpix=4.0, number=5)


@pytest.mark.slow
def test_harvest(relion, structures):
    """One structure that cannot be read does not stop the others."""
    Path("broken.pdb").write_text("no atoms\n")
    done = program(*structures, "broken.pdb", "-o", "out", "--jobs", "2", "--snr", "0.5,0.25", *SMALL)
    assert done.exit_code == 0, done.output
    tables = ["out/6M2B_snr0.5/pairs/pairs.star", "out/half_snr0.25/pairs/pairs.star"]
    assert done.stdout.splitlines() == tables
    assert "6M2B_snr0.5: begun" in done.stderr
    assert "6M2B_snr0.5: harvested in" in done.stderr
    assert "3 of 3 refinements, 0 s left" in done.stderr
    assert "cryored: warning: broken_snr0.5 failed: broken.pdb: " in done.stderr
    for table, name in zip(tables, ("6M2B", "half"), strict=True):
        rows = read_pairs(table)
        assert [(row.structure, row.half) for row in rows] == [(name, half) for half in (1, 2, 1, 2)]
        folder = Path(table).parents[1]
        truth = read_volume(folder / "truth.mrc").data
        for row in rows:
            # The stand-in's map is the truth; at padding 1, correction for gridding and mask change it a little.
            assert overlap(read_volume(row.noisy).data, truth, row.fsc) > 0.8
        assert not list(folder.glob("**/*_data_real.mrc")) + list(folder.glob("**/*.mrcs"))
        assert len(list(folder.glob("run/*_external_reconstruct.star"))) == 5
        assert json.loads((folder / "settings.json").read_text())["number"] == 20


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(relion, structures):
    arguments = [*structures, "-o", "out", "--snr", "0.5", *SMALL]
    assert program(structures[0], *arguments[2:], "--keep").exit_code == 0
    assert (Path("out/6M2B_snr0.5") / "particles.mrcs").exists()
    assert len(list(Path("out/6M2B_snr0.5/run").glob("*_weight.mrc"))) == 5
    done = program(*arguments)
    assert done.exit_code == 0
    assert "1 of 2 refinements were finished before" in done.stderr
    assert "6M2B_snr0.5: begun" not in done.stderr
    assert "1 of 1 refinements" in done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert calls("out/6M2B_snr0.5") == calls("out/half_snr0.5") == 1
    assert not list(Path("out").glob("**/*_weight.mrc"))  # this time without --keep


@pytest.mark.slow
def test_a_half_done_refinement_is_begun_anew(relion, structures):
    relion("fail")
    arguments = [structures[0], "-o", "out", "--snr", "0.5", *SMALL]
    done = program(*arguments)
    assert done.exit_code == 1
    stale = Path("out/6M2B_snr0.5/run/run_it009_half1_class001_external_reconstruct.star")
    stale.write_text("of an earlier run")
    relion("refine")
    done = program(*arguments)
    assert done.exit_code == 0, done.output
    assert not stale.exists()
    assert "left out" not in done.stderr


@pytest.mark.slow
def test_a_finished_refinement_is_only_harvested(relion, structures):
    arguments = [structures[0], "-o", "out", "--snr", "0.5", "--keep", *SMALL]
    assert program(*arguments).exit_code == 0
    shutil.rmtree("out/6M2B_snr0.5/pairs")
    assert program(*arguments).exit_code == 0
    assert calls("out/6M2B_snr0.5") == 1
    assert len(read_pairs("out/6M2B_snr0.5/pairs/pairs.star")) == 4


@pytest.mark.slow
def test_other_settings_are_refused(relion, structures):
    arguments = [structures[0], "-o", "out", "--snr", "0.5", *SMALL]
    assert program(*arguments).exit_code == 0
    done = run(*arguments, "--number", "30")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "harvest-relion: error: none of 1 refinements gave pairs: out/6M2B_snr0.5/settings.json: number is 20, asked "
        "for is 30; use another --output or remove it"
    )
    Path("out/6M2B_snr0.5/settings.json").write_text("{")
    assert "settings.json: no readable JSON" in program(*arguments).stderr


@pytest.mark.slow
def test_relion_fails(relion, structures):
    relion("fail")
    done = run(*structures, "-o", "out", "--snr", "0.5", *SMALL)
    assert done.returncode == 1
    assert done.stdout == ""
    reason = "out/6M2B_snr0.5/run/run.log: relion_refine_mpi failed with status 3: out of patience; the log has more"
    assert f"cryored: warning: 6M2B_snr0.5 failed: {reason}" in done.stderr
    assert done.stderr.splitlines()[-1] == f"harvest-relion: error: none of 2 refinements gave pairs: {reason}"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_refinement_that_takes_too_long(relion, structures):
    relion("hang")
    done = program(structures[0], "-o", "out", "--snr", "0.5", "--timeout", "0.05", *SMALL)
    assert done.exit_code == 1
    assert "run.log: relion_refine_mpi still ran after 3 s and was ended" in done.stderr
    assert_ended(int(Path("pid").read_text()))


@pytest.mark.slow
def test_relion_is_not_there(tmp_path, monkeypatch, structures):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(structures[0], "-o", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("harvest-relion: error: mpirun: not found on the PATH, expected RELION 3.1 or later")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_structure_of_another_part_stops_before_anything(relion, structures):
    Path("split.csv").write_text("id,file,split\n6M2B,a.pdb,test\nhalf,half.pdb,train\n")
    done = run(*structures, "-o", "out", "--split", "split.csv", *SMALL)
    assert done.returncode == 1
    assert (
        "harvest-relion: error: split.csv: 1 of 2 structures are not of part 'train': 6M2B.cif.gz (test)" in done.stderr
    )
    assert not Path("out").exists()
    done = program(structures[1], "-o", "out", "--split", "split.csv", "--snr", "0.5", *SMALL)
    assert done.exit_code == 0, done.output
    assert read_star("out/half_snr0.5/pairs/pairs.star").text("made", "split") == "train"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children(relion, structures, number):
    relion("hang")
    command = [sys.executable, "-m", "cryored.cli.harvest_relion", *structures, "-o", "out", *SMALL]
    begin = {"PYTHONPATH": str(REPOSITORY)} | os.environ
    process = subprocess.Popen(
        command,
        env=begin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets background jobs ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: Path("pid").exists() and Path("pid").read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "harvest-relion: interrupted; run it again to go on"
    assert "half_snr" not in err  # which waited for its turn
    assert_ended(int(Path("pid").read_text()))


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("the stand-in did not begin")


def assert_ended(pid):
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_stop_from_another_thread(relion, structures):
    relion("hang")
    data = refinement.make_data(structures[0], Path("set"), box=24, angpix=4.0, number=5)
    stop = threading.Event()
    stop.set()
    with pytest.raises(refinement.RefinementError, match=r"set/run/run\.log: relion_refine_mpi was stopped"):
        refinement.refine(data, "run", "true", stop=stop)


# What is seen


def test_the_display_on_a_terminal(monkeypatch, capsys, caplog):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with caplog.at_level("INFO", logger="cryored"), harvest_relion.Display(2, 1) as display:
        display.begin("6M2B_snr0.15")
        display.iteration("6M2B_snr0.15", 7)
        display._rich.refresh()
        assert "iteration 7" in capsys.readouterr().err
        display.end("6M2B_snr0.15", "harvested")
        display._rich.refresh()
        assert "1 of 2 refinements" in capsys.readouterr().err


def test_durations():
    assert [harvest_relion._duration(value) for value in (99.4, 100, 5999, 6000)] == [
        "99 s",
        "2 min",
        "100 min",
        "1.7 h",
    ]


def test_the_script(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [str(REPOSITORY / "bin" / "harvest-relion"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: harvest-relion [OPTIONS] STRUCTURES...")
    alone = shutil.copy(command[0], tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("readlink", "dirname", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    done = subprocess.run([alone], env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("harvest-relion: error: no Python with cryored found beside")


# RELION itself


@pytest.mark.relion
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("relion_refine_mpi") is None, reason="RELION is not on the PATH")
def test_relion_refines_and_its_intermediates_are_harvested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = program(STRUCTURE, "-o", "out", "--snr", "0.15", "--box", "32", "--angpix", "3", "--number", "150")
    assert done.exit_code == 0, done.output
    (table,) = done.stdout.split()
    rows = read_pairs(table)
    folder = Path(table).parents[1]
    assert len(rows) == 2 * len(list((folder / "run").glob("run_it*_half1_class001_external_reconstruct.star")))
    assert len(rows) >= 8
    assert f"iteration {len(rows) // 2}," in done.stderr
    truth = read_volume(folder / "truth.mrc").data
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert (first.half, second.half) == (1, 2)
        assert 6 < first.resolution == second.resolution < 20
        halves = [read_volume(row.noisy).data for row in (first, second)]
        known = np.flatnonzero(first.fsc > 0.3)[3:]  # below 40 A the halves are joined
        # RELION's FSC is of B / K; the correction for gridding raises the noise far from the centre: 0.12 lower.
        np.testing.assert_allclose(shell_correlation(*halves)[known], first.fsc[known], atol=0.2)
        for half in halves:
            assert overlap(half, truth, first.fsc) > 0.4
    assert not list(folder.glob("run/*_weight.mrc"))
