"""The command that tells of models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from click.shell_completion import ShellComplete
from click.testing import CliRunner

from cryored.cli import cli
from cryored.prior.models import find_model


def models(*arguments):
    return CliRunner().invoke(cli, ["models", *arguments])


def test_all_shipped_models_are_listed():
    done = models()
    assert done.exit_code == 0
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert names == ["cwred", "cwred-gaussian", "cwred-paper"]
    assert "regularised maps of 1.5 A/pixel, 3 to 20 A, told the FSC" in done.stdout


def test_one_model_tells_what_it_is_for():
    done = models("cwred")
    assert done.exit_code == 0, done.output
    text = done.stdout
    for words in ("trained on:   simulated maps: structures ", "for:          maps resolved to 3 to 20 A", "trust 4"):
        assert words in text
    assert "4.5-6 A: error 0.296 of the filtered map's, inside the molecule 0.721" in text
    assert json.loads(models("cwred", "--json").stdout)["sha256"] == find_model("cwred").card.sha256
    assert "none: the update is eq. 17" in models("cwred-paper").stdout


def test_damaged_models_are_told(tmp_path, monkeypatch):
    shutil.copytree(find_model("cwred-paper").folder, tmp_path / "mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "card.json").write_text("{}")
    monkeypatch.setenv("CRYORED_MODEL_PATH", str(tmp_path))
    assert "bad\tcannot be used: " in models().stdout
    Path(tmp_path / "mine" / "model.keras").write_bytes(b"other")
    done = models("mine")
    assert done.exit_code == 1
    assert "the file is damaged or was replaced" in done.stderr
    assert models("none").exit_code == 1


def test_numbers_have_three_digits(tmp_path, monkeypatch):
    shutil.copytree(find_model("cwred-paper").folder, tmp_path / "mine")
    card = json.loads((tmp_path / "mine" / "card.json").read_text())
    card |= {"name": "mine", "resolution_range": [3.34884, 20.5714]}
    (tmp_path / "mine" / "card.json").write_text(json.dumps(card))
    monkeypatch.setenv("CRYORED_MODEL_PATH", str(tmp_path))
    assert "3.35 to 20.6 A" in models().stdout
    assert "maps resolved to 3.35 to 20.6 A\n" in models("mine").stdout


def test_names_are_completed():
    completion = ShellComplete(cli, {}, "cryored", "_CRYORED_COMPLETE")
    for words in (["denoise", "--model"], ["models"]):
        found = completion.get_completions(words, "cwred-")
        assert [item.value for item in found] == ["cwred-gaussian", "cwred-paper"]


def test_a_folder_of_that_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(find_model("cwred-paper").folder, "my_prior")
    assert find_model("my_prior").folder == Path("my_prior")
    shutil.copytree("my_prior", "cwred")
    assert find_model("cwred").folder != Path("cwred")  # a known name comes first
