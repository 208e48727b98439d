"""The calibrated weights: from the measurement to the map."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.cli import cli
from cryored.errors import InputError
from cryored.files.mrc import read_array, read_volume, write_volume
from cryored.files.requests import read_request, read_request_file
from cryored.files.star import read_star, write_star
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser
from cryored.prior.models import find_model
from cryored.prior.weights import Calibration, model_calibration, parse_calibration
from cryored.reconstruction.sums import load_sums
from cryored.reconstruction.update import Accumulators, Denoised, estimated_fsc, inverse_prior, reconstruct
from cryored.refinement.updater import Settings, Updater, joined_prior
from cryored.training.calibration import (
    Moments,
    by_kind,
    draw_weights,
    fit_weights,
    measure_weights,
    moments,
    refinement_moments,
)

REQUESTS = Path(__file__).parent / "data" / "relion_requests"
FLOAT32 = 1e-6  # the specification's bound on float32 arithmetic against RELION in double precision
MASKED = {"fsc": [0.2, 0.5, 0.9], "precision": [1.5, 3.0, 9.0], "gain": [0.8, 0.9, 1.0]}
POINTS = {"fsc": [0.2, 0.5, 0.9], "precision": [2.0, 5.0, 20.0], "gain": [3.0, 1.5, 1.1]}


def difference(found, wanted):
    return np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64))


def calibration():
    return parse_calibration(POINTS, "card.json")


def load(case, name):
    folder = REQUESTS / case
    request = read_request(read_star(folder / "run" / f"{name}_external_reconstruct.star"), folder=folder, angpix=1.5)
    request_files = (folder / "run" / f"{name}_external_reconstruct_{part}.mrc" for part in ("data_real", "data_imag"))
    arrays = [read_array(path, request.array_shape) for path in request_files]
    arrays.append(read_array(folder / "run" / f"{name}_external_reconstruct_weight.mrc", request.array_shape))
    return request, Accumulators(*arrays, request.ori, request.pad, request.r_max)


# What a calibration says


def test_at_its_points_and_beyond():
    weights = calibration()(np.array([0.2, 0.5, 0.9, 0.999, 0.1, 0.0, -0.3]), np.ones(7))
    np.testing.assert_allclose(weights.precision[:4], [2, 5, 20, 20])
    np.testing.assert_allclose(weights.gain[:4], [3, 1.5, 1.1, 1.1])
    # Half-way down to nothing known, half-way to eq. 17 with lambda 1, which is what is left there.
    np.testing.assert_allclose(weights.precision[4:], [1.5, 1, 1])
    np.testing.assert_allclose(weights.gain[4:], [2, 1, 1])


def test_without_strength_it_is_map():
    weights = calibration()(np.linspace(0, 1, 5), np.zeros(5))
    np.testing.assert_array_equal(weights.precision, 1)
    np.testing.assert_array_equal(weights.gain, 0)


def test_half_the_strength_is_the_mean_of_both_updates_numerator_and_denominator():
    fsc = np.array([0.5])
    full, half = (calibration()(fsc, np.array([strength])) for strength in (1.0, 0.5))
    assert half.precision == pytest.approx((1 + full.precision) / 2)
    assert half.gain * half.precision == pytest.approx(full.gain * full.precision / 2)


def test_trust_multiplies_the_precision_down_to_the_priors_own():
    fsc = np.array([0.2, 0.9])
    np.testing.assert_allclose(calibration()(fsc, np.ones(2), 4.0).precision, [8, 80])
    # It fades with the precision that it multiplies.
    np.testing.assert_allclose(calibration()(np.array([0.1, 0.0]), np.ones(2), 4.0).precision, [4.5, 1])
    np.testing.assert_allclose(calibration()(fsc, np.ones(2), 0.1).precision, [1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gain": [3.0, 1.5]}, "as many fsc as precision and gain expected"),
        ({"fsc": [0.2, 0.5, 1.0]}, "expected increasing values between 0 and 1"),
        ({"fsc": [0.5, 0.2, 0.9]}, "expected increasing values between 0 and 1"),
        ({"precision": [2.0, 0.5, 3.0]}, "precision .* expected numbers from 1 on"),
        ({"gain": [3.0, float("nan"), 1.0]}, "gain .* expected numbers from 0.001 on"),
        ({"gain": "x"}, "no calibration"),
    ],
)
def test_what_is_no_calibration_is_refused(changes, message):
    with pytest.raises(InputError, match=f"^card.json: .*{message}"):
        parse_calibration(POINTS | changes, "card.json")
    with pytest.raises(InputError, match=r"^card.json: no calibration"):
        parse_calibration({}, "card.json")


# What the update makes of it


@pytest.mark.parametrize(
    "case", [("box32_pad1.5_fudge2", "run_it003_half1_class001"), ("pka_box64_pad1", "run_it003_half1_class001")]
)
def test_precision_is_a_smaller_tau2(case):
    """N(g f, v) is eq. 17 for a signal of power v: the MAP term of a smaller tau2."""
    request, sums = load(*case)
    rng = np.random.default_rng(0)
    f = rng.standard_normal((request.ori,) * 3).astype(np.float32)
    shells = len(request.tau2)
    precision, gain = rng.uniform(1, 30, shells), rng.uniform(0, 3, shells)
    prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
    found = reconstruct(sums, prior=prior, denoised=Denoised(f, gain, precision=precision))
    smaller = inverse_prior(request.tau2 / precision, request.tau2_fudge, request.pad)
    assert difference(found, reconstruct(sums, prior=smaller, denoised=Denoised(f, gain))) <= FLOAT32
    plain = reconstruct(sums, prior=prior)
    none = Denoised(f, np.zeros(shells), precision=np.ones(shells))
    np.testing.assert_array_equal(reconstruct(sums, prior=prior, denoised=none), plain)
    # A prior without doubt is its own answer, but for RELION's soft sphere, which fills the corners anew.
    sure = reconstruct(sums, prior=prior, denoised=Denoised(plain, np.ones(shells), precision=np.full(shells, 1e6)))
    assert difference(sure, plain) < 0.05


# In a request


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a function that runs red-update in a copy of a case, with a model whose network is not needed."""
    folder = tmp_path / "project"
    shutil.copytree(REQUESTS / "pka_box64_pad1", folder)
    shutil.copytree(Path(__file__).parents[1] / "share" / "models" / "cwred", tmp_path / "model")
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    monkeypatch.chdir(folder)

    def run(root, *arguments, weights=POINTS, masked=MASKED):
        own = {"weights": weights, "weights_masked": masked}
        (tmp_path / "model" / "card.json").write_text(json.dumps(card | own))
        job = f"{root}_external_reconstruct.star"
        return CliRunner().invoke(cli, ["red-update", job, "--model", "../model", *map(str, arguments)])

    plain = read_volume("run/run_it012_class001_external_reconstruct_expected_map.mrc")
    write_volume("denoised.mrc", plain.with_data(plain.data[::-1].copy()), label="t")
    return run


JOINED, HALF = "run/run_it012_class001", "run/run_it003_half1_class001"


def record_of(root):
    return json.loads(Path(f"{root}_cryored.log").read_text().splitlines()[-1])


def test_auto_takes_the_cards_weights_and_a_number_does_not(project):
    maps = {}
    for name, arguments, weights in (
        ("auto", [], POINTS),
        ("none", [], {}),
        ("number", ["--lambda", 1], POINTS),
        ("weak", ["--trust", 0.1], POINTS),
    ):
        done = project(HALF, "--denoised", "denoised.mrc", "-o", f"{name}.mrc", *arguments, weights=weights)
        assert done.exit_code == 0, done.stderr
        maps[name] = read_volume(f"{name}.mrc").data
        record = record_of(HALF)
        assert len(record["weights"]["precision"]) == len(record["weights"]["gain"]) == record["current_size"] // 2 + 1
        assert (
            record["weights"]["rule"]
            == {
                "auto": "calibrated in ../model/card.json",
                "weak": "calibrated in ../model/card.json",
                "none": "eq. 17, lambda by ../model/card.json",
                "number": "eq. 17",
            }[name]
        )
        assert (max(record["weights"]["precision"]) > 1) == (name in ("auto", "weak"))
    np.testing.assert_array_equal(maps["none"], maps["number"])  # the card's schedule is 1 at 4.4 A
    given = read_volume("denoised.mrc").data
    likeness = {name: np.corrcoef(data.ravel(), given.ravel())[0, 1] for name, data in maps.items()}
    assert likeness["auto"] > likeness["weak"] > likeness["number"]


def optimise(name, corrected=1, mask="masks/mask.mrc"):
    """Write what RELION does of its options at the end of an iteration."""
    items = {"rlnDoSolventFscCorrection": corrected, "rlnSolventMaskName": mask}
    write_star(f"run/{name}_optimiser.star", {"optimiser_general": items})


def test_within_a_mask_the_card_has_other_weights(project):
    optimise("run_it002")
    assert project(HALF, "--denoised", "denoised.mrc", "-o", "masked.mrc").exit_code == 0
    record = record_of(HALF)
    assert record["mask"] == "masks/mask.mrc"
    assert record["weights"]["rule"] == "calibrated in ../model/card.json, weights_masked"
    request = read_request_file(f"{HALF}_external_reconstruct.star")
    shells = request.r_max + 1
    expected = parse_calibration(MASKED, "x")(request.fsc[:shells], np.ones(shells))
    np.testing.assert_allclose(record["weights"]["gain"], expected.gain, atol=1e-3)
    np.testing.assert_allclose(record["weights"]["precision"], expected.precision, atol=1e-3)
    # A card that has none takes those without a mask.
    assert project(HALF, "--denoised", "denoised.mrc", "-o", "other.mrc", masked={}).exit_code == 0
    record = record_of(HALF)
    assert (record["mask"], record["weights"]["rule"]) == ("masks/mask.mrc", "calibrated in ../model/card.json")
    assert difference(read_volume("masked.mrc").data, read_volume("other.mrc").data) > 0.01
    assert project(HALF, "--denoised", "denoised.mrc", "--lambda", 1, "-o", "number.mrc").exit_code == 0
    assert record_of(HALF)["weights"]["rule"] == "eq. 17"
    done = project(HALF, "--check", masked={"fsc": [0.1]})
    assert done.exit_code == 1
    assert "../model/card.json, weights_masked: no calibration" in done.stderr


def test_the_mask_is_that_of_the_runs_latest_iteration(project):
    def mask():
        return read_request_file(f"{HALF}_external_reconstruct.star").mask

    assert mask() is None
    optimise("run_it000")
    assert mask() == Path("masks/mask.mrc")
    optimise("run_it001", corrected=0)  # a mask on the map alone: the FSC is of the whole box
    assert mask() is None
    optimise("run_it002", mask="None")
    assert mask() is None
    optimise("run_it003")
    optimise("other_it009", corrected=0)
    assert mask() == Path("masks/mask.mrc")
    Path("run/run_it004_optimiser.star").write_text("data_optim")  # RELION is writing it
    assert mask() == Path("masks/mask.mrc")


def test_weights_that_are_none_are_refused(project):
    done = project(HALF, "--check", weights={"fsc": [0.1]})
    assert done.exit_code == 1
    assert "../model/card.json: no calibration" in done.stderr


def test_trust_needs_weights(project):
    done = project(HALF, "--lambda", 1, "--trust", 2)
    assert done.exit_code == 2
    assert "--trust is for the calibrated weights" in done.stderr


def test_the_last_iteration_is_plain_and_the_prior_lies_beside(project):
    expected = read_volume(f"{JOINED}_external_reconstruct_expected_map.mrc").data
    beside, result = Path(f"{JOINED}_denoised.mrc"), Path(f"{JOINED}_external_reconstruct.mrc")
    assert project(JOINED, "--denoised", "denoised.mrc").exit_code == 0
    assert difference(read_volume(result).data, expected) <= FLOAT32
    with_prior = read_volume(beside).data
    assert difference(with_prior, expected) > 0.1
    record = record_of(JOINED)
    assert (record["final"], record["result"], record["with_prior"]) == ("map", str(result), str(beside))
    beside.unlink()
    assert project(JOINED, "--denoised", "denoised.mrc", "--final", "prior").exit_code == 0
    np.testing.assert_array_equal(read_volume(result).data, with_prior)
    assert not beside.exists()
    # By hand, one asks for the map with the prior.
    assert project(JOINED, "--denoised", "denoised.mrc", "-o", "mine.mrc").exit_code == 0
    np.testing.assert_array_equal(read_volume("mine.mrc").data, with_prior)
    assert not beside.exists()


def test_the_fsc_of_two_updated_maps_is_warned_of(project):
    assert project(HALF, "--denoised", "denoised.mrc", "-o", "prior.mrc").exit_code == 0
    assert project(HALF, "--lambda", 0, "-o", "map.mrc").exit_code == 0
    for second, warned in (("prior.mrc", True), ("map.mrc", False)):
        done = CliRunner().invoke(cli, ["fsc", "prior.mrc", second])
        assert ("both went through the network (labels: red-update cwred" in done.stderr) == warned


def test_the_joined_halves_count_as_what_they_are_together(project):
    """Their sum is better than the FSC between them says, but not as good as RELION takes it for."""
    assert project(JOINED, "--denoised", "denoised.mrc").exit_code == 0
    request = read_request_file(f"{JOINED}_external_reconstruct.star")
    shells = request.r_max + 1
    fsc, least = (np.clip(request.fsc[:shells], low, 1) for low in (0, 0.001))  # RELION's tau2 is never 0
    whole, least = (2 * f / (1 + f) for f in (fsc, least))
    seen = estimated_fsc(load_sums(request), request.tau2 / joined_prior(request.fsc))
    np.testing.assert_allclose(seen[1 : request.r_max], least[1 : request.r_max], atol=2e-3)
    expected = calibration()(whole, np.ones(shells), prior=1 + 1 / np.sqrt(least))
    np.testing.assert_allclose(record_of(JOINED)["weights"]["gain"], expected.gain, atol=1e-3)
    np.testing.assert_allclose(record_of(JOINED)["weights"]["precision"], expected.precision, atol=1e-3)


def test_of_the_joined_halves_the_network_sees_a_map_that_it_knows(project, monkeypatch):
    class Noting(Denoiser):
        def denoise_all(self, volumes, fscs=None):
            self.seen = list(zip(volumes, fscs, strict=True))
            return list(volumes)

    monkeypatch.setattr(Noting, "load", lambda self: None)
    denoiser = Noting(find_model("cwred"))
    for root in (JOINED, HALF):
        request = read_request_file(f"{root}_external_reconstruct.star")
        sums = load_sums(request)
        answer = Updater(Settings(), denoiser).answer(request, sums)
        fsc, factor = request.fsc, 1
        if root == JOINED:
            positive = np.maximum(fsc, 0)
            fsc, factor = 2 * positive / (1 + positive), joined_prior(fsc)
        prior = inverse_prior(request.tau2, request.tau2_fudge, request.pad)
        ((seen, told),) = denoiser.seen
        np.testing.assert_allclose(told, fsc)
        assert difference(seen.data, reconstruct(sums, prior=prior * factor)) <= FLOAT32
        # Where f is the MAP estimate of the same prior, the update leaves it; the gains of the weights do not.
        assert difference(answer.result.data, seen.data) < 0.2


@pytest.mark.slow
def test_the_chain_by_hand_gives_what_one_call_does(project):
    job = f"{HALF}_external_reconstruct.star"
    assert project(HALF, "-o", "direct.mrc").exit_code == 0
    assert project(HALF, "--lambda", 0, "-o", "map.mrc").exit_code == 0
    chain = ["denoise", "map.mrc", "--model", "../model", "--request"]
    done = CliRunner().invoke(cli, [*chain, job, "-o", "f.mrc"])
    assert done.exit_code == 0, done.stderr
    assert f"weighted by RELION, by the FSC of {job}" in done.stderr
    assert project(HALF, "--denoised", "f.mrc", "-o", "chain.mrc").exit_code == 0
    direct, by_hand = (read_volume(name).data for name in ("direct.mrc", "chain.mrc"))
    assert difference(by_hand, direct) <= FLOAT32

    done = CliRunner().invoke(cli, [*chain, f"{JOINED}_external_reconstruct.star", "-o", "g.mrc"])
    assert done.exit_code == 1
    assert "of the joined halves, whose map RELION weights otherwise" in done.stderr
    done = CliRunner().invoke(cli, [*chain, job, "-o", "g.mrc", "--half2", "map.mrc"])
    assert done.exit_code == 2


def test_halves_get_the_prior_until_then(project):
    assert project(HALF, "--denoised", "denoised.mrc").exit_code == 0
    expected = read_volume(f"{HALF}_external_reconstruct_expected_map.mrc").data
    assert difference(read_volume(f"{HALF}_external_reconstruct.mrc").data, expected) > 0.1
    assert not Path(f"{HALF}_denoised.mrc").exists()


# Measuring them


def synthetic(structure, seed, *, gain=2.0, error=0.1):
    """Return the sums of a map whose denoised map is (truth + error) / gain."""
    rng = np.random.default_rng(seed)
    t, e, n = (rng.standard_normal((32, 32, 32), dtype=np.float32) for _ in range(3))
    fsc = np.linspace(1.0, 0.05, 17)
    return moments(structure, 8.0, t, t + 2 * n, (t + np.float32(np.sqrt(error)) * e) / np.float32(gain), fsc)


def test_gain_and_precision_are_those_of_the_error():
    """For f = (t + e) / 2 least squares has g = 2 / (1 + |e|**2), and leaves |e|**2 / (1 + |e|**2) of the power."""
    stored = measure_weights([synthetic("a", seed) for seed in range(6)])
    assert len(stored["fsc"]) >= 5
    np.testing.assert_allclose(stored["gain"], 2 / 1.1, rtol=0.05)
    np.testing.assert_allclose(stored["precision"], 1.1 / 0.1, rtol=0.2)
    assert stored["precision"] == sorted(stored["precision"])


def test_each_structure_counts_the_same():
    many = [synthetic("a", seed, gain=1.0) for seed in range(9)] + [synthetic("b", 9, gain=3.0)]
    few = [synthetic("a", 0, gain=1.0), synthetic("b", 9, gain=3.0)]
    many, few = (measure_weights(maps * 4) for maps in (many, few))
    np.testing.assert_allclose(many["gain"], few["gain"], rtol=0.1)


def test_the_error_is_that_of_the_update():
    """By the six sums, and by the maps themselves."""
    rng = np.random.default_rng(3)
    t, r, f = (rng.standard_normal((16, 16, 16), dtype=np.float32) for _ in range(3))
    found = moments("a", 8.0, t, r, f, np.ones(9))
    a, b = rng.uniform(0, 1, 8), rng.uniform(0, 1, 8)
    error = found.error(a, b)
    for shell in (1, 4, 7):
        x = a[shell - 1] * r + b[shell - 1] * f
        left = moments("a", 8.0, t, t - x, f, np.ones(9)).rr[shell - 1]
        assert error[shell - 1] == pytest.approx(left, rel=1e-4)


def test_the_evidence_compares_rules_and_leaves_structures_out():
    stored = fit_weights([synthetic(name, seed) for name in "abc" for seed in range(3)])
    assert stored["structures"] == ["a", "b", "c"]
    assert stored["maps"] == 9
    errors = stored["error"]
    assert errors["weights"] < errors["eq_17"] < 1
    assert errors["weights_held_out"] == pytest.approx(errors["weights"], rel=0.15)
    assert isinstance(parse_calibration(stored, "x"), Calibration)


def test_a_structure_that_is_most_of_the_data_is_not_held_out(caplog):
    """What is left without it does not make weights, but all together do."""
    large = [synthetic("a", seed) for seed in range(6)]
    small = moments("b", 8.0, *np.random.default_rng(0).standard_normal((3, 8, 8, 8), dtype=np.float32), np.ones(3))
    stored = fit_weights([*large, small])
    assert stored["precision"] == measure_weights([*large, small])["precision"]
    assert stored["error"]["weights_held_out"] > 0
    assert "a is judged by no weights of the others: 1 maps have shells in 0 bins" in caplog.text


def test_maps_without_shells_are_refused():
    empty = np.zeros(3)
    with pytest.raises(InputError, match="1 maps have shells in 0 bins of FSC"):
        measure_weights([Moments("a", 20.0, empty, empty, empty, empty, empty, empty)])


def test_recorded_requests_are_measured(tmp_path):
    """RELION's B and K: of a denoised map that is the truth there is nothing left but its grey scale."""
    folder = str(REQUESTS / "pka_box64_pad1")
    truth = read_volume(f"{folder}/truth.mrc")
    found = list(refinement_moments(folder, lambda volume, fsc: volume.with_data(truth.data), "regularised"))
    assert len(found) == 3  # the joined map is of no half
    for item in found:
        used = item.fsc > 0.3
        np.testing.assert_allclose(item.tf[used] ** 2, item.ff[used], rtol=1e-3)
        assert (item.tr**2 < item.rr).all()  # a noisy map
    write_volume(tmp_path / "truth.mrc", truth, label="t")
    with pytest.raises(InputError, match=r"no request of a half-map"):
        list(refinement_moments(str(tmp_path), lambda volume, fsc: volume, "regularised"))


def test_a_truth_or_a_mask_of_another_box_is_refused(tmp_path):
    folder = tmp_path / "pka"
    shutil.copytree(REQUESTS / "pka_box64_pad1", folder)
    truth = read_volume(folder / "truth.mrc")
    larger = Volume(np.pad(truth.data, 2), truth.voxel_size)
    items = {"rlnDoSolventFscCorrection": 1, "rlnSolventMaskName": "mask.mrc"}
    write_star(folder / "run" / "run_it000_optimiser.star", {"optimiser_general": items})
    for mask, found in (
        (larger.with_data(np.ones_like(larger.data)), "68 x 68 x 68 voxels"),
        (truth.with_data(2 + truth.data * 0), "values from 2 to 2, expected a mask from 0 to 1"),
    ):
        write_volume(folder / "mask.mrc", mask, label="t")
        with pytest.raises(InputError, match=found):
            list(refinement_moments(str(folder), lambda volume, fsc: truth, "regularised"))
    write_volume(folder / "truth.mrc", larger, label="t")
    with pytest.raises(InputError, match=r"truth.mrc: 68 x 68 x 68 voxels of .* expected the run's 64 of"):
        list(refinement_moments(str(folder), lambda volume, fsc: truth, "regularised"))


def test_within_a_mask_only_what_is_there_counts(tmp_path):
    """Denoised maps that are wrong outside the mask alone are as good as the truth."""
    folder = tmp_path / "pka"
    shutil.copytree(REQUESTS / "pka_box64_pad1", folder)
    truth = read_volume(folder / "truth.mrc")
    mask = np.zeros(truth.shape, dtype=np.float32)
    mask[:, :, : truth.shape[2] // 2] = 1
    write_volume(folder / "mask.mrc", truth.with_data(mask), label="t")
    wrong = truth.with_data(truth.data + (1 - mask) * np.float32(10 * truth.data.std()))

    def measured():
        return list(refinement_moments(str(folder), lambda volume, fsc: wrong, "regularised"))

    def is_right(item):
        used = item.fsc > 0.3
        return np.allclose(item.tf[used] ** 2, item.ff[used], rtol=1e-3)

    assert not any(item.masked or is_right(item) for item in measured())
    items = {"rlnDoSolventFscCorrection": 1, "rlnSolventMaskName": "mask.mrc"}
    write_star(folder / "run" / "run_it000_optimiser.star", {"optimiser_general": items})
    assert all(item.masked and is_right(item) for item in measured())


def test_maps_within_a_mask_get_weights_of_their_own(tmp_path):
    masked = [replace(synthetic(name, seed, gain=0.8), masked=True) for name in "ab" for seed in range(5)]
    maps = [synthetic(name, seed) for name in "ab" for seed in range(5)]
    kinds = by_kind([*maps, *masked])
    assert kinds == {"weights": maps, "weights_masked": masked}
    assert by_kind(maps) == {"weights": maps}
    fitted = {kind: fit_weights(some) for kind, some in kinds.items()}
    np.testing.assert_allclose(fitted["weights_masked"]["gain"], 0.8 / 1.1, rtol=0.05)
    draw_weights(str(tmp_path / "both.png"), fitted, [*maps, *masked])
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_weights_that_cannot_be_fitted_leave_the_cards(tmp_path, monkeypatch, caplog):
    from cryored.training import lambda_fit

    shutil.copytree(find_model("cwred").folder, tmp_path / "model")
    (tmp_path / "run").mkdir()
    sums = {name: np.ones(3) for name in ("fsc", "rr", "ff", "tr", "tf", "rf")}
    few = [replace(synthetic("a", 0), masked=True, **sums)]
    measured = [*(synthetic(name, seed) for name in "ab" for seed in range(5)), *few]
    monkeypatch.setattr(lambda_fit, "recorded", lambda folder: measured)
    monkeypatch.setattr(lambda_fit, "refinement_moments", lambda *_: iter(measured))
    before = find_model(str(tmp_path / "model")).card
    stored = lambda_fit.fit_files(
        [str(tmp_path / "run")], str(tmp_path / "model"), output=str(tmp_path / "s.json"), write_to_card=True
    )
    after = find_model(str(tmp_path / "model")).card
    assert after.weights == stored["weights"] != before.weights
    assert after.weights_masked == before.weights_masked != {}
    assert "weights_masked" not in stored
    assert "the update stays as the card has it" in caplog.text


@pytest.mark.parametrize(
    ("structures", "gain", "told", "warned"),
    [
        ("ab", 2.0, r"weights: they leave 0\.1\d\d of MAP's error \(held out 0\.1\d\d\), eq\. 17 .* leaves 0\.7", None),
        ("a", 2.0, r"of MAP's error, eq\. 17", "judged on a alone, to which they were fitted; expected maps of two"),
        (
            "ab",
            None,
            r"of MAP's error \(held out [1-9]\.",
            "by these maps the prior is no help: with it the update leaves ",
        ),
    ],
)
def test_a_fit_says_what_the_weights_are_worth(tmp_path, monkeypatch, caplog, structures, gain, told, warned):
    from cryored.training import lambda_fit

    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)
    shutil.copytree(find_model("cwred").folder, tmp_path / "model")
    (tmp_path / "run").mkdir()
    measured = [synthetic(name, seed, gain=gain or 1.0) for name in structures for seed in range(5)]
    if gain is None:  # what holds of one structure is wrong for the other, whose denoised map is not the truth's
        measured = [item if item.structure == "a" else replace(item, tf=0.05 * item.tf) for item in measured]
    monkeypatch.setattr(lambda_fit, "recorded", lambda folder: measured)
    monkeypatch.setattr(lambda_fit, "refinement_moments", lambda *_: iter(measured))
    with caplog.at_level("INFO", logger="cryored"):
        lambda_fit.fit_files([str(tmp_path / "run")], str(tmp_path / "model"), output=str(tmp_path / "s.json"))
    assert re.search(told, caplog.text)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (warned is not None)
    assert all(warned in text for text in warnings)


def test_the_shipped_prior_is_calibrated():
    found = model_calibration(find_model("cwred"))
    assert found is not None
    assert model_calibration(find_model("cwred-paper")) is None
