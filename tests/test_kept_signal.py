"""How much of the signal told a denoised map keeps: maps of known signal and noise, and the shipped model."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.assessment.noise_substitution import substitute_noise
from cryored.cli import cli
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells
from cryored.maps.fsc import shell_correlation, whole_set_fsc
from cryored.maps.volume import Volume
from cryored.prior.kept_signal import can_judge, kept_signal, raise_sigma, resolved_shells, shells_in_doubt
from cryored.prior.models import find_model

PKA = Path(__file__).parent / "data" / "postprocess_pka"
HALVES = [PKA / f"run_half{i}_class001_unfil.mrc" for i in (1, 2)]
ANGPIX = 1.5
BOX = 48
SHELLS = BOX // 2 + 1


def sphere(box=BOX):
    """A ball of 12 voxels with structure to Nyquist."""
    z, y, x = np.indices((box,) * 3) - box // 2
    inside = z**2 + y**2 + x**2 < 12**2
    return inside * (1 + np.random.default_rng(0).standard_normal(inside.shape))


def halves(noise=0.4, box=BOX):
    """Return the truth, two maps of it with white noise, and their FSC."""
    rng = np.random.default_rng(1)
    truth = sphere(box)
    maps = [truth + noise * rng.standard_normal(truth.shape) for _ in range(2)]
    return truth, maps, np.clip(shell_correlation(*maps), 0, 1)


def volume(data):
    return Volume(np.asarray(data, dtype=np.float32), ANGPIX)


def test_it_is_the_share_of_each_shell():
    given = volume(sphere())
    shares = np.linspace(0, 1.5, SHELLS)
    kept = kept_signal(given, volume(apply_shells(given.data, shares)), np.full(SHELLS, 0.5))
    assert np.isnan(kept[0])
    np.testing.assert_allclose(kept[1:], shares[1:], atol=1e-4)


def test_it_is_one_for_the_truth_and_zero_for_something_else():
    truth, (half, other), fsc = halves()
    weighted = volume(apply_shells(half, fsc))
    strange = volume(np.random.default_rng(5).standard_normal(truth.shape))
    assert np.nanmean(kept_signal(weighted, volume(truth), fsc)) == pytest.approx(1, abs=0.05)
    assert np.nanmean(kept_signal(weighted, volume(0.4 * truth), fsc)) == pytest.approx(0.4, abs=0.02)
    assert np.nanmean(kept_signal(weighted, strange, fsc)) == pytest.approx(0, abs=0.03)

    whole = whole_set_fsc(fsc)
    weighted = volume(apply_shells((half + other) / 2, whole))
    kept = kept_signal(weighted, volume(truth), whole)
    assert np.nanmean(kept) == pytest.approx(1, abs=0.05)


def test_where_nothing_is_told_nothing_is_known():
    given = volume(sphere())
    fsc = np.where(np.arange(SHELLS) < 10, 0.9, 0.01)
    kept = kept_signal(given, given, fsc)
    np.testing.assert_array_equal(np.isfinite(kept), (np.arange(SHELLS) > 0) & (np.arange(SHELLS) < 10))
    assert np.isnan(kept_signal(volume(0 * given.data), given, fsc)).all()


def test_a_map_that_keeps_half_is_not_in_doubt():
    truth, (half, _), fsc = halves()
    weighted, sigma = volume(apply_shells(half, fsc)), np.abs(truth).astype(np.float32)
    for share in (1.0, 0.7):
        assert raise_sigma(sigma, weighted, volume(share * truth), fsc) is sigma
    assert raise_sigma(sigma, weighted, volume(0.1 * truth), fsc).sum() > sigma.sum()
    nothing = np.zeros_like(sigma)
    assert raise_sigma(nothing, weighted, volume(0.1 * truth), fsc) is nothing  # no place for it


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("box", [48, 45])
def test_the_variance_is_that_of_the_signal_missed_and_of_what_stands_in_its_place(averaged, box):
    truth, (half, other), fsc = halves(box=box)
    data = half
    if averaged:
        data, fsc = (half + other) / 2, whole_set_fsc(fsc)
    invented = 0.8 * (truth != 0) * np.random.default_rng(7).standard_normal(truth.shape)
    sigma = np.where(truth != 0, 0.1, 0.01).astype(np.float32)
    raised = raise_sigma(sigma, volume(apply_shells(data, fsc)), volume(invented), fsc)
    assert raised.dtype == np.float32
    known = np.where(fsc > 0.05, 1.0, 0.0)
    known[0] = 0
    error = apply_shells(truth - invented, known)
    added = raised.astype(np.float64) ** 2 - sigma.astype(np.float64) ** 2
    # All of it but the little by which chance makes the two alike.
    assert added.sum() == pytest.approx((error**2).sum(), rel=0.15)
    assert added[truth != 0].mean() == pytest.approx(1000 * added[truth == 0].mean(), rel=1e-3)


def test_shells_in_doubt():
    fsc = np.array([1, 1, 0.9, 0.8, 0.5, 0.2, 0.1, 0.0])
    kept = np.array([np.nan, 0.4, 0.9, 0.3, 0.6, 0.49, 0.1, np.nan])
    np.testing.assert_array_equal(resolved_shells(fsc), [0, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(shells_in_doubt(kept, fsc), [1, 3, 5])
    kept[1] = 0.6  # two are chance
    assert len(shells_in_doubt(kept, fsc)) == 0


def test_models_that_can_be_judged():
    card = find_model("cwred").card
    assert can_judge(card)
    assert not can_judge(dataclasses.replace(card, target="weighted"))
    assert not can_judge(dataclasses.replace(card, input="unregularised"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_shipped_model_tells_noise_from_signal(tmp_path, monkeypatch):
    """Half-maps of real particles, and the same with noise of the same power from 8 A on and the FSC of before."""
    monkeypatch.chdir(tmp_path)
    half = read_volume(HALVES[0])
    noisy = substitute_noise(half.data, 12, rng=np.random.default_rng(0))
    write_volume("signal.mrc", half, label="test")
    write_volume("noise.mrc", half.with_data(noisy.astype(np.float32)), label="test")
    done = CliRunner().invoke(cli, ["fsc", *map(str, HALVES)])
    Path("fsc.tsv").write_text(done.stdout)
    outputs = ["-o", "out.mrc", "--overwrite", "--cpu"]
    said = run("denoise", "signal.mrc", "--fsc", "fsc.tsv", "--uncertainty", "sigma.mrc", *outputs)
    assert "keeps" not in said
    said = run("denoise", "noise.mrc", "--fsc", "fsc.tsv", "--uncertainty", "noisy_sigma.mrc", *outputs)
    shells, kept = re.search(r"in (\d+) shells from 8\.0 to \d\.\d A the result keeps (\d+) % of the", said).groups()
    assert int(shells) >= 3
    assert int(kept) < 45
    rise = np.sqrt(np.mean(read_volume("noisy_sigma.mrc").data ** 2) / np.mean(read_volume("sigma.mrc").data ** 2))
    assert rise > 1.05
    # Of both halves, whose weight is another.
    assert "keeps" not in run("denoise", "--half1", HALVES[0], "--half2", HALVES[1], *outputs)


def run(*words):
    done = CliRunner().invoke(cli, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.stderr
