"""Batches of patches: what they hold, what is refused, and that threads change nothing."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_pairs import ANGPIX, BOX, write_tables

from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells
from cryored.maps.volume import Volume
from cryored.simulation.pair_table import read_pairs
from cryored.training.batches import PairStore, check_pairs, draw_batch, prefetched


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_pairs(write_tables(tmp_path_factory.mktemp("pairs"), "train.star", ["a", "b", "c"]))


@pytest.fixture
def own_rows(tmp_path):
    return read_pairs(write_tables(tmp_path, "own.star", ["a", "b"]))


# Pairs


@pytest.mark.parametrize("kind", ["regularised", "unregularised"])
def test_inputs_minus_errors_are_the_target(rows, kind):
    row = rows[2]
    source, error, weight = PairStore([row], kind)[0]
    noisy, target = read_volume(row.noisy).data, read_volume(row.target).data
    wiener = apply_shells(noisy, np.clip(row.fsc, 0, 1))
    shown = wiener if kind == "regularised" else noisy
    # Both are standardised by one scale; level and deviation of the input. float16 keeps 11 bits.
    deviation = np.linalg.norm(shown - target) / np.linalg.norm(error.astype(np.float64))
    level = np.mean(shown - source.astype(np.float64) * deviation)
    found = source.astype(np.float64) * deviation + level
    np.testing.assert_allclose(found, shown, atol=1e-3 * np.abs(shown).max())
    np.testing.assert_allclose(error.astype(np.float64) * deviation, shown - target, atol=1e-3 * np.abs(shown).max())
    # A network that answers 0 for the Wiener map has loss 1, whatever the resolution.
    assert weight * np.mean(((wiener - target) / deviation) ** 2) == pytest.approx(1, rel=1e-2)


def test_a_pair_without_correlation_teaches_nothing(rows):
    """With FSC 0 the regularised map is 0, which has no scale."""
    source, error, weight = PairStore([replace(rows[0], fsc=np.zeros(9))], "regularised")[0]
    assert not source.any() and not error.any()
    assert weight == 0


def test_pairs_beyond_the_cache_are_read_again(own_rows):
    size = 2 * 2 * BOX**3  # bytes of a pair: two maps of float16
    store = PairStore(own_rows, "regularised", cache=2 * size + 1)
    before = [store[index] for index in range(4)]
    again = store[3]
    for a, b in zip(before[3], again, strict=True):
        np.testing.assert_array_equal(a, b)
    for row in own_rows:
        os.unlink(row.noisy)
    assert all(store[index] is before[index] for index in (0, 1))
    for index in (2, 3):
        with pytest.raises(InputError, match="noisy.mrc: cannot be read"):
            store[index]


def test_no_pairs():
    with pytest.raises(InputError, match="no pairs to train on"):
        PairStore([], "regularised")


# Batches


def draw(store, step, size=3, patch=8, seed=0):
    return draw_batch(store, step, size, patch=patch, seed=seed)


def test_a_batch_depends_on_the_step_alone(rows):
    store = PairStore(rows, "regularised")
    draw(store, 3)
    first, again = draw(store, 7), draw(PairStore(rows, "regularised", cache=0), 7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(first[0] != draw(store, 8)[0])
    assert np.any(first[0] != draw(store, 7, seed=1)[0])
    inputs, errors, weights = first
    assert inputs.shape == errors.shape == (3, 8, 8, 8, 1)
    assert weights.shape == (3,)
    assert {array.dtype for array in first} == {np.dtype(np.float32)}


def test_the_loss_counts_molecules_of_any_size_alike(rows):
    """The random grey scale is in inputs and errors, and the weight takes it out again."""
    store = PairStore(rows[:1], "regularised")
    inputs, errors, weights = draw(store, 0, size=64, patch=BOX)
    scales = np.sqrt(store[0][2] / weights)
    assert 0.5 <= scales.min() < 0.6
    assert 1.4 < scales.max() <= 1.5
    losses = weights * np.mean(errors[..., 0] ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(losses, 1, rtol=1e-2)  # float16
    assert len({array.tobytes() for array in (inputs / scales[:, None, None, None, None]).round(2)}) > 20  # turned


class Numbered:
    """Pairs whose maps are their own number."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return np.full((4, 4, 4), index, dtype=np.float16), np.full((4, 4, 4), 100, dtype=np.float16), 1.0


def test_a_pass_takes_each_pair_once_in_an_order_of_its_own():
    drawn = []
    for step in range(7):  # 21 patches, three passes
        inputs, errors, _ = draw(Numbered(), step, patch=2)
        drawn += np.rint(100 * inputs[:, 0, 0, 0, 0] / errors[:, 0, 0, 0, 0]).astype(int).tolist()
    passes = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(numbers) == list(range(7)) for numbers in passes)
    assert passes[0] != passes[1] != passes[2]


def test_batches_come_in_order_however_long_they_take():
    later = threading.Event()
    made = []

    def make(step):
        if step == 0:
            assert later.wait(30)  # until a thread beside this one has made the next
        elif step == 1:
            later.set()
        made.append(step)
        return step**2

    assert list(prefetched(make, range(12), threads=2)) == [(step, step**2) for step in range(12)]
    assert made != sorted(made)


def test_threads_run_ahead_by_two_batches_each_and_end():
    made = []
    batches = prefetched(lambda step: made.append(step), range(1000), threads=2)
    for _ in range(3):
        next(batches)
    batches.close()
    assert len(made) <= 3 + 4
    assert list(prefetched(lambda step: step, range(5, 5))) == []


def test_an_error_in_a_thread_arrives():
    def make(step):
        if step == 2:
            raise InputError("broken")
        return step

    batches = prefetched(make, range(9), threads=2)
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    with pytest.raises(InputError, match="broken"):
        next(batches)


# What does not fit


def spoil(row, how):
    """Break a pair in one way; return the row and the message that it deserves."""
    data = read_volume(row.noisy).data
    if how == "missing":
        os.unlink(row.noisy)
        return row, "noisy.mrc: cannot be read: No such file"
    if how == "nan":
        data[3, 3, 3] = np.nan
        header = Path(row.noisy).read_bytes()[: -data.nbytes]  # write_volume would refuse such a map
        Path(row.noisy).write_bytes(header + data.astype("<f4").tobytes())
        return row, "noisy.mrc: 1 values are not finite"
    if how == "shape":
        write_volume(row.target, Volume(data[:, :, 1:], ANGPIX), label="test")
        return row, r"target.mrc: \(16, 16, 15\) voxels of 3.0 A, expected those of .*noisy.mrc"
    if how == "pixel size of the target":
        write_volume(row.target, Volume(data, 2.0), label="test")
        return row, r"target.mrc: .* voxels of 2.0 A, expected those of .*noisy.mrc: .* voxels of 3.0 A"
    if how == "pixel size":
        for name in (row.noisy, row.target):
            write_volume(name, Volume(data, 2.0), label="test")
        return row, "noisy.mrc: pixel size 2 A, expected 3 A as in .*noisy.mrc; train on pairs of one pixel size"
    if how == "box":
        for name in (row.noisy, row.target):
            write_volume(name, Volume(data[:7, :7, :7], ANGPIX), label="test")
        return row, "noisy.mrc: a box of 7, below --patch 8"
    if how == "unknown pixel size":
        for name in (row.noisy, row.target):
            write_volume(name, Volume(data, 0.0), label="test")
        return row, r"noisy.mrc: pixel size 0 \(unknown\) in the header"
    if how == "constant":
        write_volume(row.noisy, Volume(np.full_like(data, 0.5), ANGPIX), label="test")
        return row, "noisy.mrc: a constant map"
    if how == "shells":
        return replace(row, fsc=row.fsc[:-1]), "noisy.mrc: an FSC of 8 shells in its table, expected 9 for its box"
    return replace(row, fsc=np.append(row.fsc[:-1], np.nan)), "noisy.mrc: the FSC curve of its table is not finite"


SPOILT = [
    "missing",
    "nan",
    "shape",
    "pixel size of the target",
    "pixel size",
    "box",
    "curve",
    "unknown pixel size",
    "constant",
    "shells",
]


@pytest.mark.parametrize("how", SPOILT)
def test_bad_pairs_are_counted_and_refused_or_left_out(own_rows, caplog, how):
    bad, message = spoil(own_rows[2], how)
    rows = [*own_rows[:2], bad, own_rows[3]]
    hint = r" \(1 of 4 pairs cannot be used: mend them, or leave them out with --skip-bad\)"
    with pytest.raises(InputError, match=f"({message}).*{hint}") as caught:
        check_pairs(rows, 8)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "cryored"):
        kept, voxel_size = check_pairs(rows, 8, skip_bad=True)
    assert kept == [*own_rows[:2], own_rows[3]]
    assert voxel_size == ANGPIX
    assert "1 of 4 pairs are left out, the first: " in caplog.text


def test_good_pairs_are_kept(rows):
    assert check_pairs(rows, 8) == (rows, ANGPIX)


def test_nothing_left_is_an_error_even_when_bad_pairs_may_be_left_out(own_rows):
    rows = [spoil(row, "missing")[0] for row in own_rows]
    with pytest.raises(InputError, match=r"cannot be read.* \(4 of 4 pairs cannot be used: mend them\)"):
        check_pairs(rows, 8, skip_bad=True)
