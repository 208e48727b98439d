"""``cryored watch``: what it answers, for whom, and what becomes of a refinement when it fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.cli.red_update import red_update
from cryored.cli.watch import _hook_options, watch
from cryored.files.mrc import read_volume
from cryored.prior import device
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import ModelCard, find_model, save_model
from cryored.prior.network import build_unet
from cryored.refinement.red_update import AS_ASKED, Files
from cryored.refinement.updater import Settings, Updater
from cryored.refinement.watcher import Poll, Server

REPOSITORY = Path(__file__).parents[1]
REQUESTS = Path(__file__).parent / "data" / "relion_requests"
HALVES = [f"run/run_it004_half{half}_class001" for half in (1, 2)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of a recorded case, the current folder; its halves of iteration 4 are HALVES."""
    folder = tmp_path / "project"
    shutil.copytree(REQUESTS / "box32_pad2", folder)
    monkeypatch.chdir(folder)
    return folder


def star(root):
    return f"{root}_external_reconstruct.star"


def result(root):
    return Path(f"{root}_external_reconstruct.mrc")


def records(root):
    path = Path(f"{root}_cryored.log")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cold(root, *options):
    """Return the map that red-update gives by itself, and remove it."""
    done = CliRunner().invoke(cli, ["red-update", star(root), "-o", "cold.mrc", "--overwrite", *options])
    assert done.exit_code == 0, done.stderr
    Path(f"{root}_cryored.log").unlink()
    data = read_volume("cold.mrc").data
    Path("cold.mrc").unlink()
    return data


# The server, without processes


@dataclass
class Order:
    star: str
    folder: Path = field(default_factory=Path.cwd)
    wanted: bool = True
    said: list = field(default_factory=list)

    def accept(self):
        self.said.append("accepted")

    def still_wanted(self):
        return self.wanted

    def done(self):
        self.said.append("done")

    def failed(self, message):
        self.said.append(f"failed {message}")

    def declined(self, message):
        self.said.append(f"declined {message}")


def server(lam=0.0, model="cwred", files=AS_ASKED, **options):
    updater = Updater(Settings(lam=lam), Denoiser(find_model(model), gpu=False))
    return Server(Path("run"), updater, files, **options)


@pytest.mark.parametrize("lam", [0.0, 0.7])
@pytest.mark.slow
def test_an_order_gets_what_red_update_gives(project, lam):
    expected = cold(HALVES[0], "--lambda", str(lam), "--cpu")
    order = Order(star(HALVES[0]))
    shown = []
    server(lam, show=lambda *entry: shown.append(entry[0])).serve([order])
    assert order.said == ["accepted", "done"]
    np.testing.assert_array_equal(read_volume(result(HALVES[0])).data, expected)
    (record,) = records(HALVES[0])
    assert record["lambda"] == lam
    assert record["change"] > 0 or lam == 0
    (entry,) = shown
    assert (entry.name, entry.iteration, entry.half, entry.error) == ("run_it004_half1_class001", 4, 1, "")
    assert {"waited", "read", "map", "write"} <= entry.seconds.keys()


@pytest.mark.slow
def test_the_network_is_called_once_for_the_halves(project, monkeypatch):
    expected = [cold(root, "--lambda", "1", "--cpu") for root in HALVES]
    calls = []
    whole = Denoiser._predict
    monkeypatch.setattr(
        Denoiser, "_predict", lambda self, data, told: calls.append(len(data)) or whole(self, data, told)
    )
    first, second = (Order(star(root)) for root in HALVES)
    server(1.0).serve([first], lambda: [second])  # the second comes while the first is read
    assert calls == [2]
    assert first.said == second.said == ["accepted", "done"]
    for root, wanted in zip(HALVES, expected, strict=True):
        # The back-end may add in another order for two maps: float32 sums over a few hundred terms.
        np.testing.assert_allclose(read_volume(result(root)).data, wanted, atol=1e-5 * np.abs(wanted).max())


def test_one_half_fails_and_the_other_stays(project):
    weight = Path(f"{HALVES[1]}_external_reconstruct_weight.mrc")
    weight.write_bytes(weight.read_bytes()[:2000])
    first, second = (Order(star(root)) for root in HALVES)
    shown = []
    server(show=lambda *entry: shown.append(entry[0].error)).serve([first, second])
    assert first.said == ["accepted", "done"]
    assert second.said[0] == "accepted"
    assert second.said[1].startswith(f"failed {weight.resolve()}: truncated")
    assert result(HALVES[0]).exists()
    assert not result(HALVES[1]).exists()
    assert sorted(bool(error) for error in shown) == [False, True]


@pytest.mark.slow
def test_a_network_that_fails_is_no_end(project, monkeypatch):
    service = server(1.0)
    order = Order(star(HALVES[0]))
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "_predict", lambda self, data, told: 1 / 0)
        service.serve([order])
    assert order.said == ["accepted", "failed ZeroDivisionError: division by zero"]
    again = Order(star(HALVES[0]))
    service.serve([again])
    assert again.said == ["accepted", "done"]


@pytest.mark.slow
def test_a_gpu_short_of_memory_shows(project, monkeypatch):
    """The network runs on the CPU then, and table and log say so."""
    whole, load = Denoiser._predict, Denoiser.load

    def load_on_gpu(self):
        load(self)
        self._loaded_on = "GPU H1"

    def predict(self, data, told):
        if self._network is not self._on_cpu:
            raise MemoryError
        return whole(self, data, told)

    monkeypatch.setattr(Denoiser, "load", load_on_gpu)
    monkeypatch.setattr(Denoiser, "_predict", predict)
    order = Order(star(HALVES[0]))
    shown = []
    server(1.0, show=lambda *entry: shown.append(entry[0])).serve([order])
    assert order.said == ["accepted", "done"]
    assert shown[0].device == records(HALVES[0])[0]["device"] == "CPU (memory of GPU H1 too small)"


@pytest.mark.parametrize("free", [8 << 30, 100 << 20])
def test_the_halves_go_together_where_memory_allows(project, monkeypatch, free):
    lines = []
    monkeypatch.setattr(logging.getLogger("cryored.refinement.watcher"), "info", lambda *line: lines.append(line))
    monkeypatch.setattr("cryored.refinement.watcher.free_memory", lambda: free)
    monkeypatch.setattr("cryored.refinement.watcher.memory_in_use", lambda: 0)
    together = []
    whole = Updater.denoise
    monkeypatch.setattr(Updater, "denoise", lambda self, maps: together.append(len(maps)) or whole(self, maps))
    first, second = (Order(star(root)) for root in HALVES)
    service = server()
    service.serve([first, second])
    service.serve([Order(star(HALVES[0]))])
    assert first.said == second.said == ["accepted", "done"]
    assert together == ([2, 1] if free > 1 << 30 else [1, 1, 1])
    # Once for all requests of a box.
    ((text, *words),) = lines
    told = text % tuple(words)
    assert told.startswith("box 32, padding 2: about 0.1 GiB besides 0.0 GiB of RELION's arrays, ")
    assert told.endswith(" for both halves together") == (free > 1 << 30)


def test_of_many_requests_two_are_answered_together(project, monkeypatch):
    """As where the ranks of a classification reconstruct a class each: memory is reckoned for two."""
    together = []
    whole = Updater.denoise
    monkeypatch.setattr(Updater, "denoise", lambda self, maps: together.append(len(maps)) or whole(self, maps))
    orders = [Order(star(HALVES[number % 2])) for number in range(6)]
    came = iter([orders[3:]])
    server().serve(orders[:3], lambda: next(came))
    assert together == [2, 2, 2]
    assert all(order.said == ["accepted", "done"] for order in orders)


def test_a_request_for_which_the_granted_memory_does_not_suffice(project):
    updater = Updater(Settings(lam=1.0), Denoiser(find_model("cwred"), gpu=False, max_memory=500 << 20))
    order = Order(star(HALVES[0]))
    Server(Path("run"), updater).serve([order])
    (accepted, failed) = order.said
    assert "at least 0.8 GiB of memory are needed, expected at most 0.5 by --max-memory" in failed


def test_an_order_does_not_die_of_what_is_shown(project, caplog):
    """Neither one that is answered nor one that fails."""
    Path(f"{HALVES[1]}_external_reconstruct_weight.mrc").unlink()
    first, second = (Order(star(root)) for root in HALVES)
    server(show=lambda *shown: 1 / 0).serve([first, second])
    assert first.said == ["accepted", "done"]
    assert second.said[-1].startswith("failed ")
    assert caplog.messages.count("not shown: ZeroDivisionError: division by zero") == 2


def test_nothing_is_written_for_a_hook_that_has_gone(project):
    order = Order(star(HALVES[0]), wanted=False)
    server().serve([order])
    assert order.said == ["accepted"]
    assert not result(HALVES[0]).exists()
    assert not records(HALVES[0])


@pytest.mark.parametrize("kind", ["path", "link", "log", "clean"])
def test_nothing_outside_the_folder_is_touched(project, tmp_path, kind):
    request = Path(star(HALVES[0]))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    victim = elsewhere / "victim.mrc"
    victim.write_text("precious")
    weight = Path(f"{HALVES[0]}_external_reconstruct_weight.mrc")
    if kind == "path":
        request.write_text(request.read_text().replace(str(result(HALVES[0])), str(victim)))
    elif kind == "link":
        result(HALVES[0]).symlink_to(victim)
    elif kind == "log":
        Path(f"{HALVES[0]}_cryored.log").symlink_to(victim)
    else:
        shutil.copy(weight, victim)
        request.write_text(request.read_text().replace(str(weight), str(victim)))
    before = victim.read_bytes()
    order = Order(star(HALVES[0]))
    server(files=Files(clean=kind == "clean")).serve([order])
    assert order.said[-1].startswith("declined ")
    assert f"lies outside {project / 'run'}" in order.said[-1]
    assert victim.read_bytes() == before
    assert os.listdir(elsewhere) == ["victim.mrc"]


def test_a_link_to_the_folder_is_the_folder(project):
    Path("alias").symlink_to("run")
    order = Order(star(HALVES[0]).replace("run/", "alias/", 1))
    server().serve([order])
    assert order.said == ["accepted", "done"]


@pytest.mark.slow
# Keras asks TensorFlow's variables for numpy arrays in the way of numpy 1.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_500_requests_leave_nothing_behind(project):
    device.set_up(gpu=False)
    card = ModelCard("tiny", "regularised", 4.0, 2, 2, "", (3.0, 18.0))
    save_model(Path("tiny"), build_unet(card.width, card.depth), card)
    service = server(1.0, "./tiny")

    def serve(iterations):
        for _ in range(iterations):
            service.serve([Order(star(root)) for root in HALVES])
        status = Path("/proc/self/status").read_text().splitlines()
        memory = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        return memory, len(os.listdir("/proc/self/fd")), threading.active_count()

    first = serve(10)
    last = serve(240)
    assert last[0] < 1.05 * first[0]
    assert last[1:] == first[1:]


# Requests that nobody hands over


def look(poll):
    poll._looked = 0.0  # as if it were long ago
    return sorted(order.star for order in poll.orders())


def test_polling_finds_what_has_no_result_and_is_no_longer_written(project):
    result(HALVES[0]).write_text("there already")
    stars = {str(path) for path in Path("run").glob("*_external_reconstruct.star")}
    poll = Poll(Path("run"))
    assert poll.orders() == []  # seen for the first time: RELION may still be writing
    assert look(poll) == sorted(stars - {star(HALVES[0])})
    assert look(poll) == []


def test_polling_leaves_what_is_handed_over(project):
    poll = Poll(Path("run"))
    look(poll)
    poll.leave(Path(star(HALVES[0])))
    assert star(HALVES[0]) not in look(poll)
    result(HALVES[0]).write_text("answered")
    assert look(poll) == []


def test_polling_leaves_what_a_hook_answered_by_itself(project):
    poll = Poll(Path("run"))
    look(poll)
    result(HALVES[0]).write_text("answered")
    assert star(HALVES[0]) not in look(poll)
    assert star(HALVES[0]) not in look(poll)


def test_polling_finds_what_is_written_anew(project):
    poll = Poll(Path("run"))
    look(poll)
    look(poll)
    result(HALVES[0]).write_text("answered")
    request = Path(star(HALVES[0]))
    request.write_text(request.read_text() + "\n")  # by --continue
    assert look(poll) == []
    assert look(poll) == [star(HALVES[0])]


def test_polling_says_what_is_no_request(project):
    Path("run/other_external_reconstruct.star").write_text("data_\n\n_rlnBox 3\n")
    poll = Poll(Path("run"))
    look(poll)
    assert "run/other_external_reconstruct.star" not in look(poll)


def test_a_request_that_was_polled_is_answered(project):
    poll = Poll(Path("run"))
    poll.orders()
    poll._looked = 0.0
    server().serve(poll.orders())
    for path in Path("run").glob("*_external_reconstruct.star"):
        assert path.with_suffix(".mrc").exists()


# What the hook goes on with


def blank_model(folder):
    folder.mkdir(exist_ok=True)
    card = ModelCard("blank", "regularised", 1.5, 2, 2, "", (3.0, 18.0))
    (folder / "card.json").write_text(json.dumps(dataclasses.asdict(card)))


def test_the_hook_gets_all_that_decides_the_answer(tmp_path, monkeypatch):
    """The words of the presence file make red-update answer as the watcher does, from whatever folder it is called."""
    monkeypatch.chdir(tmp_path)
    blank_model(tmp_path / "prior")
    given = ["--model", "./prior", "--lambda", "auto", "--schedule", "mine.json", "--angpix", "1.2", "--extrapolate"]
    given += ["--prior-limit", "6", "--clean", "--unregularised", "{root}_raw.mrc", "--cpu", "--threads", "3"]
    shared = {option.name for option in red_update.params} & {option.name for option in watch.params} - {"overwrite"}
    for words in ([], given):
        ours = watch.make_context("watch", ["run", *words])
        theirs = red_update.make_context("red-update", [*_hook_options(ours), "x.star"])
        expected = {name: ours.params[name] for name in shared if name in ours.params}
        if words:
            expected |= {"model": str(tmp_path / "prior"), "schedule": str(tmp_path / "mine.json")}
        assert {name: theirs.params[name] for name in expected} == expected


def test_the_hook_finds_the_model_without_the_watchers_environment(tmp_path, monkeypatch):
    """As in a batch job; a model of the same name elsewhere is another."""
    monkeypatch.setenv("CRYORED_MODEL_PATH", str(tmp_path / "priors"))
    (tmp_path / "priors").mkdir()
    for name in ("mine", "cwred"):
        blank_model(tmp_path / "priors" / name)
        words = _hook_options(watch.make_context("watch", ["run", "--model", name]))
        assert words[words.index("--model") + 1] == str((tmp_path / "priors" / name).resolve())


@pytest.mark.parametrize(("model", "wanted"), [("prior", "prior"), ("./prior", "prior"), (".", "."), ("cwred", None)])
def test_the_hook_finds_the_model_from_another_folder(tmp_path, monkeypatch, model, wanted):
    monkeypatch.chdir(tmp_path)
    blank_model(tmp_path / (wanted or "cwred"))
    words = _hook_options(watch.make_context("watch", ["run", "--model", model]))
    found = words[words.index("--model") + 1]
    assert found == ("cwred" if wanted is None else str((tmp_path / wanted).resolve()))
