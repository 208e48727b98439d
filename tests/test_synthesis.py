"""Pairs made on the device: each back-end makes them in a process of its own, numpy checks what came out."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryored.errors import InputError
from cryored.maps.fourier import apply_shells, forward, inverse, shell_index, shell_power, spatial_frequency
from cryored.maps.fsc import nominal_resolution, shell_correlation
from cryored.maps.network_scale import standard_of
from cryored.prior.denoiser import cube_rotations, rotate, rotate_back
from cryored.simulation import gaussian
from cryored.simulation.density import gaussian_map
from cryored.simulation.gaussian import Draw, draw_map
from cryored.simulation.structure import read_atoms
from cryored.training import device_pairs as synthesis
from cryored.training.device_pairs import Synthesis

pytestmark = pytest.mark.slow  # each engine's pairs are made in a process of their own

STRUCTURE = Path(__file__).parent / "data" / "structures" / "6M2B.cif.gz"
ANGPIX, RESOLUTION = 4.0, 8.0
BOXES = (24, 21)  # an even and an odd one
PATCH, SEED, STEP, SIZE = 8, 3, 5, 8
MANY = 12  # steps of SIZE pairs, for averages
SMEAR = np.deg2rad(15.0)
DRAW = Draw(shell=6.3, level=0.3, cut=10, smear=0.0, blur=0.0, slope=1.4, solvent=0.4, bfactor=0.0)
BLOB = (6, -7, 4)  # voxels from the centre of the first box
ENGINES = ("tensorflow", "torch", "jax")


# What runs in the processes of the back-ends


def make(folder):
    """Make with the back-end of KERAS_BACKEND what the tests look at."""
    from cryored.prior import device

    device.set_up(gpu=False)
    found = {}

    def keep(name, *tensors):
        from keras import ops

        for number, tensor in enumerate(tensors):
            found[f"{name}_{number}"] = ops.convert_to_numpy(tensor)

    def keep_pairs(name, pairs):
        for field in ("noisy", "target", "truth", "fsc", "resolution"):
            found[f"{name}_{field}"] = np.stack([getattr(pair, field) for pair in pairs])

    for box in BOXES:
        truths = np.load(folder / f"truths{box}.npy")
        truths /= rms(truths)
        transform = synthesis.forward(as_tensor(truths))
        keep(f"transform{box}", *transform)
        keep(f"back{box}", synthesis.inverse(transform, box))
        for kind in ("regularised", "unregularised"):
            whole = Synthesis(truths, ANGPIX, patch=box, input=kind, seed=SEED)
            keep(f"whole{box}_{kind}", *whole.batch(STEP, SIZE))
        keep_pairs(f"pairs{box}", whole.pairs(STEP, SIZE))
        keep(f"patches{box}", *Synthesis(truths, ANGPIX, patch=PATCH, input=kind, seed=SEED).batch(STEP, SIZE))
        keep(f"envelope{box}", whole._envelope(transform, whole._levels[:, None, None, None], DRAW.solvent))
        shell = np.arange(box // 2 + 2)
        at_shell = as_tensor(np.maximum(1 - np.abs(shell - DRAW.shell), 0)[None])
        growth = as_tensor((1 / DRAW.level - 1) * (shell[None] / DRAW.shell) ** DRAW.slope)
        keep(f"power{box}", whole._noise_power(transform, at_shell, growth))
        smear = as_tensor(np.full((len(truths), 1, 1, 1), SMEAR))
        keep(f"smeared{box}", *whole._smeared(as_tensor(truths), transform, smear, np.ones((2, len(truths)))))
    blob = as_tensor(np.load(folder / "blob.npy"))
    smear = as_tensor(np.full((1, 1, 1, 1), SMEAR))
    made = Synthesis(np.load(folder / "blob.npy"), ANGPIX, patch=PATCH, input="regularised", seed=SEED)
    keep("blob", *made._smeared(blob, synthesis.forward(blob), smear, np.array([[1.0], [0.9]])))
    truths = np.load(folder / f"truths{BOXES[0]}.npy")
    made = Synthesis(truths, ANGPIX, patch=PATCH, input="regularised", seed=SEED)
    keep("other_step", *made.batch(STEP + 1, SIZE))
    keep("first_time", *made.batch(STEP, SIZE))
    keep("again", *Synthesis(truths, ANGPIX, patch=PATCH, input="regularised", seed=SEED).batch(STEP, SIZE))
    keep("other_seed", *Synthesis(truths, ANGPIX, patch=PATCH, input="regularised", seed=SEED + 1).batch(STEP, SIZE))
    keep_pairs("many", [pair for step in range(MANY) for pair in made.pairs(step, SIZE)])
    synthesis._FULL_PRECISION = 0
    half = Synthesis(truths, ANGPIX, patch=PATCH, input="regularised", seed=SEED)
    found["stored_bits"] = np.array("16" in str(half._truths.dtype))
    keep_pairs("half", half.pairs(STEP, SIZE))
    np.savez(folder / "found.npz", **found)


def rms(maps):
    """Root of the mean square of each map."""
    return np.sqrt(np.mean(maps**2, axis=(1, 2, 3), keepdims=True))


def as_tensor(array):
    from keras import ops

    return ops.convert_to_tensor(np.asarray(array, dtype=np.float32))


# What the tests share


@pytest.fixture(scope="module")
def atoms():
    """Two different molecules: 6M2B and the half of it on one side, both turned."""
    whole = read_atoms(STRUCTURE)
    turn = Rotation.from_euler("zyz", (20, 50, 70), degrees=True).as_matrix()
    one_side = whole.positions[:, 0] > 0
    half = gaussian.Atoms(whole.positions[one_side], whole.weights[one_side])
    return [whole.moved(np.eye(3), np.zeros(3)), half.moved(turn, np.zeros(3))]


@pytest.fixture(scope="module")
def truths(atoms):
    return {box: np.stack([gaussian_map(item, box, ANGPIX, RESOLUTION).data for item in atoms]) for box in BOXES}


@pytest.fixture(scope="module", params=ENGINES)
def found(request, truths, tmp_path_factory):
    """Everything that one back-end made."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    for box, maps in truths.items():
        np.save(folder / f"truths{box}.npy", maps)
    np.save(folder / "blob.npy", blob()[None])
    environment = {**os.environ, "KERAS_BACKEND": request.param}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as file:
        return dict(file)


def blob():
    """A Gaussian of one voxel (standard deviation) away from the centre."""
    along = np.arange(BOXES[0]) - BOXES[0] // 2
    z, y, x = (np.exp(-((along - centre) ** 2) / 2) for centre in BLOB)
    return (z[:, None, None] * y[:, None] * x).astype(np.float32)


def second_moment(data):
    """Mean square distance from the blob's centre, in squared voxels."""
    distance = sum((np.indices(data.shape)[axis] - BOXES[0] // 2 - BLOB[axis]) ** 2 for axis in range(3))
    return np.sum(data * distance, dtype=np.float64) / np.sum(data, dtype=np.float64)


def draws_of(box, step, size=SIZE):
    rng = np.random.default_rng([SEED, step])  # what a batch draws first
    return [draw_map(box, ANGPIX, rng=rng) for _ in range(size)]


def wiener_maps(found, box):
    """The halves' maps times their FSC."""
    pairs = zip(found[f"pairs{box}_noisy"], found[f"pairs{box}_fsc"], strict=True)
    return [apply_shells(noisy, np.clip(fsc, 0, 1)) for noisy, fsc in pairs]


def standardised(data):
    standard = standard_of(data, ANGPIX)
    return standard.apply(data), standard.deviation


# Transforms


@pytest.mark.parametrize("box", BOXES)
def test_transforms_are_numpys(found, truths, box):
    maps = truths[box] / rms(truths[box])
    expected = np.fft.rfftn(maps, axes=(1, 2, 3)).transpose(0, 3, 1, 2)
    transform = found[f"transform{box}_0"] + 1j * found[f"transform{box}_1"]
    np.testing.assert_allclose(transform, expected, atol=1e-5 * np.abs(expected).max())  # float32
    np.testing.assert_allclose(found[f"back{box}_0"], maps, atol=1e-5 * maps.max())


# What a pair is


@pytest.mark.parametrize("box", BOXES)
def test_the_truth_is_a_stored_one_with_its_bfactor(found, truths, box):
    chosen = set()
    for truth, draw in zip(found[f"pairs{box}_truth"], draws_of(box, STEP), strict=True):
        decay = np.exp(-draw.bfactor / 4 * spatial_frequency((box,) * 3, ANGPIX) ** 2)
        stored = [inverse(forward(item / np.sqrt(np.mean(item**2))) * decay, (box,) * 3) for item in truths[box]]
        differences = [np.linalg.norm(truth - item) / np.linalg.norm(item) for item in stored]
        chosen.add(int(np.argmin(differences)))
        assert min(differences) < 1e-5
    assert chosen == {0, 1}


@pytest.mark.parametrize("box", BOXES)
def test_the_target_is_the_truth_times_the_fsc(found, box):
    frequency = np.arange(box // 2 + 1) / (box * ANGPIX)
    names = ("noisy", "target", "truth", "fsc", "resolution")
    rows = zip(*(found[f"pairs{box}_{name}"] for name in names), draws_of(box, STEP), strict=True)
    for noisy, target, truth, fsc, resolution, draw in rows:
        assert fsc.shape == frequency.shape
        np.testing.assert_array_equal(fsc[draw.cut :], 0)
        assert np.abs(fsc).max() <= 1 + 1e-5
        assert fsc[1] > 0.9
        assert resolution == nominal_resolution(frequency, fsc)
        expected = apply_shells(truth, np.clip(fsc, 0, 1))
        np.testing.assert_allclose(target, expected, atol=1e-5 * truth.max())  # float32
        beyond = shell_index((box,) * 3) >= draw.cut
        np.testing.assert_allclose(forward(noisy)[beyond], 0, atol=1e-5 * np.abs(forward(noisy)).max())


def test_the_fsc_has_the_level_that_was_drawn(found):
    """The mean over later iterations; single curves scatter, as shells of such a small box hold few coefficients."""
    draws = [draw for step in range(MANY) for draw in draws_of(BOXES[0], step)]
    shells = np.arange(BOXES[0] // 2 + 1)
    later = [
        np.interp(draw.shell, shells, fsc)
        for draw, fsc in zip(draws, found["many_fsc"], strict=True)
        if draw.level == 0.143 and draw.shell + 1 < draw.cut
    ]
    assert len(later) > MANY * SIZE / 2
    assert np.mean(later) == pytest.approx(0.143, abs=3 * np.std(later) / np.sqrt(len(later)) + 0.02)
    assert np.std(later) < 0.2
    first = [
        (draw.level, fsc[int(draw.shell)])  # the last shell below the cut
        for draw, fsc in zip(draws, found["many_fsc"], strict=True)
        if draw.level != 0.143 and draw.shell > 3
    ]
    assert len(first) > 5
    assert np.mean([value - level for level, value in first]) == pytest.approx(0.05, abs=0.1)  # a little below it


def test_halves_agree_with_each_other_as_with_the_truth(found):
    """A half correlates with the truth as the root of the half-maps' FSC says (Rosenthal and Henderson 2003)."""
    excess = []
    for noisy, truth, fsc in zip(*(found[f"many_{name}"] for name in ("noisy", "truth", "fsc")), strict=True):
        inner = slice(2, 9)
        well = fsc[inner] > 0.2
        excess += list((shell_correlation(noisy, truth)[inner] - np.sqrt(np.clip(fsc[inner], 0, 1)))[well])
    assert len(excess) > 100
    assert -0.05 < np.mean(excess) < 0.02  # smearing takes a little of it


@pytest.mark.parametrize("box", BOXES)
def test_noise_is_that_of_the_pairs_made_from_atoms(found, truths, box):
    maps = truths[box] / rms(truths[box])
    for truth, envelope, power in zip(maps, found[f"envelope{box}_0"], found[f"power{box}_0"], strict=True):
        np.testing.assert_allclose(envelope, gaussian._envelope(truth, ANGPIX, DRAW.solvent), atol=1e-4)
        expected = gaussian._noise_power(shell_power(forward(truth), truth.shape), DRAW)
        np.testing.assert_allclose(power[:-1], expected, rtol=1e-4)


@pytest.mark.parametrize("box", BOXES)
def test_smearing_comes_near_to_that_of_turned_atoms(found, truths, atoms, box):
    """At 8 A it leaves some half of what the rotation changes, and nothing changes at the centre of the box."""
    np.testing.assert_array_equal(found[f"smeared{box}_0"], found[f"smeared{box}_1"])
    maps = truths[box] / rms(truths[box])
    for truth, smeared, item, scale in zip(maps, found[f"smeared{box}_0"], atoms, rms(truths[box]), strict=True):
        rng = np.random.default_rng(0)
        turned = [gaussian_map(gaussian._smeared(item, SMEAR, rng), box, ANGPIX, RESOLUTION).data for _ in range(8)]
        expected = np.mean(turned, axis=0) / scale
        change = np.linalg.norm(expected - truth)
        assert change > 0.15 * np.linalg.norm(truth)
        assert np.linalg.norm(smeared - expected) < 0.6 * change
        centre = (box // 2,) * 3
        assert smeared[centre] == pytest.approx(truth[centre], rel=1e-5)


def test_smearing_moves_density_as_far_as_rotations_do(found):
    """A rotation of rms angle a moves what is at radius r by sqrt(2/3) a r (rms); a half with 0.9 a, by 0.9 of it."""
    before = second_moment(blob())
    moved = [second_moment(found[f"blob_{number}"][0]) - before for number in range(2)]
    expected = 2 / 3 * SMEAR**2 * np.dot(BLOB, BLOB)
    assert 1 < moved[0] / expected < 1.2  # some more, as the blob has an extent and its outer side is blurred more
    assert 0.8 < moved[1] / moved[0] < 0.9  # 0.81, but at the edge of the box no blur grows any more


def test_many_truths_are_stored_as_float16(found):
    assert found["stored_bits"]
    scale = np.abs(found["pairs24_noisy"]).max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(found["half_noisy"] / scale, found["pairs24_noisy"] / scale, atol=1e-3)  # 11 bits
    assert np.any(found["half_noisy"] != found["pairs24_noisy"])


# What a batch is


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("kind", ["regularised", "unregularised"])
def test_a_batch_of_whole_boxes(found, box, kind):
    """Standardised input, its error and the weight, in one of the 24 rotations and on a random grey scale."""
    inputs, errors, weights = (found[f"whole{box}_{kind}_{number}"] for number in range(3))
    assert inputs.shape == errors.shape == (SIZE, box, box, box, 1)
    assert weights.shape == (SIZE,)
    assert {inputs.dtype, errors.dtype, weights.dtype} == {np.dtype(np.float32)}
    scales, turns = [], set()
    wieners, noisy = wiener_maps(found, box), found[f"pairs{box}_noisy"]
    shown = wieners if kind == "regularised" else noisy
    for number, target in enumerate(found[f"pairs{box}_target"]):
        standard, deviation = standardised(shown[number])
        scale = np.linalg.norm(inputs[number]) / np.linalg.norm(standard)
        scales.append(scale)
        found_input = inputs[number, ..., 0] / scale
        differences = [np.abs(rotate(standard, turn) - found_input).max() for turn in cube_rotations()]
        turns.add(int(np.argmin(differences)))
        assert min(differences) < 1e-4 * standard.max()
        turn = cube_rotations()[int(np.argmin(differences))]
        # Input minus error is the target, on the input's scale and turned with it.
        level = shown[number] - standard * deviation
        result = rotate_back(inputs[number, ..., 0] - errors[number, ..., 0], turn) / scale * deviation + level
        np.testing.assert_allclose(result, target, atol=1e-4 * np.abs(shown[number]).max())
        # A network that answers 0 for the Wiener map has loss 1.
        wiener_error = np.mean(((wieners[number] - target) / deviation * scale) ** 2)
        assert weights[number] * wiener_error == pytest.approx(1, rel=1e-3)
        if kind == "regularised":
            assert weights[number] * np.mean(errors[number] ** 2) == pytest.approx(1, rel=1e-3)
    assert 0.5 <= min(scales) < max(scales) <= 1.5
    assert len(turns) > SIZE / 2


@pytest.mark.parametrize("box", BOXES)
def test_patches_are_cut_from_the_boxes(found, box):
    """Each patch is found in its map, once turned back, and its error at the same place."""
    inputs, errors, weights = (found[f"patches{box}_{number}"] for number in range(3))
    assert inputs.shape == (SIZE, PATCH, PATCH, PATCH, 1)
    corners = []
    for number in range(SIZE):
        noisy, target = found[f"pairs{box}_noisy"][number], found[f"pairs{box}_target"][number]
        standard, deviation = standardised(noisy)
        wiener_error = np.mean((wiener_maps(found, box)[number] - target) ** 2) / deviation**2
        scale = 1 / np.sqrt(weights[number] * wiener_error)
        for turn in cube_rotations():
            seen = rotate_back(inputs[number, ..., 0], turn) / scale
            first = np.unravel_index(np.argmin(np.abs(standard - seen[0, 0, 0])), standard.shape)
            place = tuple(slice(start, start + PATCH) for start in first)
            if standard[place].shape == seen.shape and np.allclose(standard[place], seen, atol=2e-3):
                break
        else:
            raise AssertionError(f"patch {number} is nowhere in its map")
        corners.append(first)
        error = rotate_back(errors[number, ..., 0], turn) / scale
        np.testing.assert_allclose(error, ((noisy - target) / deviation)[place], atol=2e-3)
    assert len(set(corners)) == SIZE


def test_step_and_seed_alone_decide_the_batch(found):
    for number in range(3):
        expected = found[f"again_{number}"]
        # Threads and GPUs may add up shells in another order.
        np.testing.assert_allclose(found[f"first_time_{number}"], expected, rtol=1e-4, atol=1e-4)
        for other in ("other_step", "other_seed"):
            assert np.abs(found[f"{other}_{number}"] - expected).max() > 0.1


def test_cutting_and_turning_is_one_gather():
    box, patch = 7, 4
    data = np.arange(box**3, dtype=np.float32).reshape((box,) * 3)
    along = np.arange(patch)
    for corner in ((0, 0, 0), (3, 3, 3), (1, 3, 2)):
        place = tuple(slice(start, start + patch) for start in corner)
        for turn in cube_rotations():
            first, z, y, x = synthesis._first_and_steps(np.array(corner), turn, box, patch)
            index = first + z * along[:, None, None] + y * along[:, None] + x * along
            np.testing.assert_array_equal(data.ravel()[index], rotate(data[place], turn))


# What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda maps: maps[0],
            r"truths of shape \(24, 24, 24\), expected \(n, z, y, x\): one or more cubes of one box",
        ),
        (lambda maps: maps[:0], r"truths of shape \(0, 24, 24, 24\), expected"),
        (lambda maps: maps[:, 2:], r"truths of shape \(2, 22, 24, 24\), expected"),
        (lambda maps: maps * [[[[1]]], [[[0]]]], "truth 2 of 2: no molecule in it, or NaN; leave it out"),
        (lambda maps: np.where(maps == maps.max(), np.nan, maps), "truth 1 of 2: no molecule in it, or NaN"),
        (lambda maps: maps[:, :4, :4, :4], "patch 8, expected at most the truths' box of 4; change --patch"),
    ],
)
def test_truths_that_cannot_be_used(truths, change, message):
    maps = change(truths[24]).astype(np.float32)
    with pytest.raises(InputError, match=message):
        Synthesis(maps, ANGPIX, patch=PATCH, input="regularised", seed=0)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
