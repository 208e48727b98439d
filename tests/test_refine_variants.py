"""The variants of benchmarks/refine.py: what reconstructs in each, before RELION comes into it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import refine

from cryored.prior.models import find_model


@pytest.fixture
def own(tmp_path):
    """A model in a folder with a space in its path."""
    folder = tmp_path / "my models" / "own"
    shutil.copytree(find_model("cwred").folder, folder)
    return folder


def test_a_model_is_a_variant_without_and_with_a_mask(own):
    known = refine.with_models([own])
    assert set(known) - set(refine.VARIANTS) == {"own", "own-mask"}
    assert [known[name].masked for name in ("own", "own-mask")] == [False, True]
    for name in ("own", "own-mask"):
        assert known[name].arguments(SimpleNamespace(folder=Path())) == ["--model", str(own)]


def test_a_model_does_not_take_the_place_of_a_variant(own):
    taken = own.rename(own.with_name("cwred"))
    with pytest.raises(click.BadParameter, match="rename"):
        refine.with_models([taken])


def test_a_folder_without_a_model_is_told_before_anything_runs(tmp_path):
    with pytest.raises(click.BadParameter, match="no model here"):
        refine.with_models([tmp_path])


def test_variants_of_other_models_and_weights():
    data = SimpleNamespace(folder=Path())
    assert refine.VARIANTS["cwred"].arguments(data) == []
    assert refine.VARIANTS["red-mask"].arguments(data) == ["--lambda", "1", "--model", "cwred-paper"]
