"""What ``cryored denoise`` makes of halves, masks, jobs, sharpened maps and maps that the model is not made for."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter

from cryored.cli import cli
from cryored.files.mrc import read_volume, write_volume
from cryored.maps.fourier import apply_shells, forward, low_pass, spatial_frequency
from cryored.maps.fsc import masked_correlation, nominal_resolution, shell_correlation
from cryored.maps.network_scale import solvent_level
from cryored.maps.volume import Volume, soft_sphere
from cryored.prior.denoise_files import DenoiseOptions, denoise_file
from cryored.prior.denoiser import Denoiser
from cryored.prior.falloff import sharpened, sharpening
from cryored.simulation.density import gaussian_map
from cryored.simulation.structure import read_atoms

DATA = Path(__file__).parent / "data"
PKA = DATA / "postprocess_pka"
HALVES = [PKA / f"run_half{half}_class001_unfil.mrc" for half in (1, 2)]


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """Make a model whose network finds no error, and note what it was given."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "cwred"
    folder.mkdir(parents=True)
    (folder / "model.keras").write_bytes(b"weights")
    card = {
        "name": "cwred",
        "input": "regularised",
        "pixel_size": 1.5,
        "width": 1,
        "depth": 2,
        "sha256": sha256(b"weights").hexdigest(),
        "resolution_range": [3.0, 20.0],
    }
    (folder / "card.json").write_text(json.dumps(card))
    monkeypatch.setenv("CRYORED_MODEL_PATH", str(tmp_path / "models"))
    monkeypatch.setattr(Denoiser, "load", lambda self: setattr(self, "_loaded_on", "CPU"))
    monkeypatch.setattr(Denoiser, "_predict", lambda self, data: np.zeros_like(data))
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)


@pytest.fixture
def truth():
    return gaussian_map(read_atoms(DATA / "structures" / "6M2B.cif.gz"), 64, 1.5, 3.0)


def denoise(*arguments):
    return CliRunner().invoke(cli, ["denoise", *map(str, arguments)])


def of(path):
    return read_volume(path).data


# Both halves


@pytest.mark.parametrize("masked", [False, True])
def test_both_halves_give_their_average_weighted_for_the_whole(masked):
    words = ["--mask", PKA / "mask.mrc"] if masked else []
    done = denoise("--half1", HALVES[0], "--half2", HALVES[1], "-o", "out.mrc", *words)
    assert done.exit_code == 0, done.output
    first, second, mask = of(HALVES[0]), of(HALVES[1]), of(PKA / "mask.mrc")
    fsc = shell_correlation(first, second)
    if masked:
        levelled = (data - np.float32(solvent_level(data)) for data in (first, second))
        fsc = masked_correlation(*levelled, mask, rng=np.random.default_rng(0)).corrected
    fsc = np.clip(fsc, 0, 1)
    expected = apply_shells((first + second) / 2, 2 * fsc / (1 + fsc))
    if masked:
        expected = (expected - np.float32(solvent_level(expected))) * mask
    np.testing.assert_allclose(of("out.mrc"), expected, atol=1e-6 * np.abs(expected).max())
    inside = " within the mask" if masked else ""
    told = rf"weighted by its FSC{inside} \(between the halves 0.143 at ([\d.]+) A\), changed by 0 %, active nowhere"
    found = float(re.search(told, done.stderr).group(1))
    assert found == pytest.approx(nominal_resolution(np.arange(33) / 96, fsc), abs=0.01)


def test_within_a_mask_the_level_of_the_solvent_has_no_say(caplog):
    found = {}
    for name, offset in (("as it is", 0), ("lifted", 30)):
        for half, path in zip("12", HALVES, strict=True):
            volume = read_volume(path)
            lifted = volume.data + np.float32(offset * volume.data.std())
            write_volume(f"half{half}.mrc", volume.with_data(lifted), label="test")
        words = ["half1.mrc", "--half2", "half2.mrc", "--mask", PKA / "mask.mrc", "-o", "out.mrc", "--overwrite"]
        done = denoise(*words)
        assert done.exit_code == 0, done.output
        found[name] = of("out.mrc"), re.sub(r"half\d.mrc", "", done.stderr.splitlines()[-1])
        done = CliRunner().invoke(cli, ["mask", "half1.mrc", "-o", "mask.mrc", "--overwrite"])
        assert done.exit_code == 0, done.output
        found[name] += (of("mask.mrc"),)
        fsc = CliRunner().invoke(cli, ["fsc", "half1.mrc", "half2.mrc", "--mask", str(PKA / "mask.mrc")])
        assert ("times the map's standard deviation, expected 0" in fsc.stderr) == (offset > 0)
    plain, lifted = found.values()
    assert np.linalg.norm(lifted[0] - plain[0]) < 1e-4 * np.linalg.norm(plain[0])
    assert lifted[1] == plain[1]
    assert np.mean(lifted[2] != plain[2]) < 1e-3


def test_a_molecule_that_crosses_the_faces_is_not_taken_for_solvent(truth):
    z = np.abs(np.arange(64) - 32)[:, None, None]
    slab = gaussian_filter(np.broadcast_to((z < 12).astype(np.float32), (64, 64, 64)), 2)
    write_volume("slab.mrc", truth.with_data(slab), label="test")
    assert solvent_level(slab) == pytest.approx(0, abs=0.02)
    ball = soft_sphere((64, 64, 64), 20, 4)
    for name, data in (("ball", ball), ("ones", np.ones_like(slab))):
        write_volume("m.mrc", truth.with_data(data), label="test")
        done = denoise("slab.mrc", "--mask", "m.mrc", "-o", f"{name}.mrc", "--overwrite")
        assert done.exit_code == 0, done.output
    np.testing.assert_allclose(of("ones.mrc"), slab, atol=1e-5)
    np.testing.assert_allclose(of("ball.mrc"), slab * ball, atol=0.02)
    done = CliRunner().invoke(cli, ["mask", "slab.mrc", "-o", "mask.mrc"])
    assert float(re.search(r"threshold (\S+),", done.stderr).group(1)) == pytest.approx(slab.max() / 5, abs=0.05)


def test_an_inverted_map_has_no_automatic_mask(truth):
    write_volume("dark.mrc", truth.with_data(100 - truth.data), label="test")
    done = CliRunner().invoke(cli, ["mask", "dark.mrc", "-o", "mask.mrc"])
    assert done.exit_code == 1
    assert "expected bright density; is it inverted?" in done.stderr


def test_the_mask_takes_part_in_the_fsc_of_a_half():
    found = {}
    for name, words in (("whole", []), ("inside", ["--mask", PKA / "mask.mrc"])):
        done = denoise(HALVES[0], "--half2", HALVES[1], "-o", "out.mrc", "--overwrite", *words)
        found[name] = float(re.search(r"0.143 at ([\d.]+) A", done.stderr).group(1))
    assert found["whole"] == 4.57
    assert found["inside"] < 3.7  # RELION's own postprocess of it: 3.56 A


@pytest.mark.parametrize("kind", ["tsv", "star"])
def test_a_table_gives_the_curve_of_the_mask_that_is_put_on(kind):
    """By an FSC within a mask the solvent of a whole map would get too much weight."""
    if kind == "tsv":
        told = CliRunner().invoke(cli, ["fsc", *map(str, HALVES), "--mask", str(PKA / "mask.mrc"), "-q"])
        Path("fsc.tsv").write_text(told.stdout)
        table = "fsc.tsv"
    else:
        table = str(PKA / "postprocess.star")
    whole = denoise(HALVES[0], "--fsc", table, "-o", "whole.mrc")
    assert whole.exit_code == 0, whole.stderr
    assert "weighted by its FSC (between the halves 0.143 at 4.57 A)" in whole.stderr
    assert denoise(HALVES[0], "--half2", HALVES[1], "-o", "direct.mrc").exit_code == 0
    np.testing.assert_allclose(of("whole.mrc"), of("direct.mrc"), atol=1e-4 * np.abs(of("direct.mrc")).max())
    inside = denoise(HALVES[0], "--fsc", table, "--mask", PKA / "mask.mrc", "-o", "inside.mrc")
    assert re.search(r"weighted by its FSC within the mask \(between the halves 0.143 at 3\.\d+ A\)", inside.stderr)


def test_a_table_of_a_mask_alone_is_warned_of(tmp_path):
    Path("fsc.tsv").write_text("frequency\tfsc\n0.01\t0.99\n0.1\t0.9\n0.33\t0.1\n")
    done = denoise(HALVES[0], "--fsc", "fsc.tsv", "--mask", PKA / "mask.mrc", "-o", "out.mrc")
    assert "weighted by its FSC (between" in done.stderr  # nobody says that it is within the mask
    star = "data_fsc\nloop_\n_rlnResolution #1\n_rlnFourierShellCorrelationCorrected #2\n0.01 0.99\n0.1 0.9\n0.33 0.1\n"
    for name, text in (
        ("fsc.star", star),
        ("corrected.tsv", "frequency\tfsc_corrected\n0.01\t0.99\n0.1\t0.9\n0.33\t0.1\n"),
    ):
        Path(name).write_text(text)
        done = denoise(HALVES[0], "--fsc", name, "-o", "whole.mrc", "--overwrite")
        assert f"{name}: an FSC within a mask alone, by which the solvent of" in done.stderr
        assert "weighted by its FSC within the mask (between" in done.stderr


def test_halves_that_are_alike_to_nyquist_are_not_corrected_for_the_mask(truth):
    noise = np.random.default_rng(0).standard_normal((2, *truth.shape)).astype(np.float32) * truth.data.std()
    noise = [gaussian_filter(one, 1.0) for one in noise]
    first, second = (gaussian_filter(noise[0] + 0.2 * one, 1.0) for one in noise)
    for name, data in (("a.mrc", first), ("b.mrc", second)):
        write_volume(name, truth.with_data(data), label="test")
    done = denoise("a.mrc", "--half2", "b.mrc", "--mask", PKA / "mask.mrc", "-o", "out.mrc")
    assert done.exit_code == 0, done.output
    assert "a.mrc and b.mrc are alike to Nyquist: their FSC within the mask is not corrected" in done.stderr


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("half2", np.zeros_like, "half2.mrc: all voxels are 0, expected a map with density"),
        ("mask", lambda data: 0 * data, "mask.mrc: 0 everywhere, expected a mask from 0 to 1"),
        ("mask", lambda data: 100 * data, "mask.mrc: values from 0 to 100, expected a mask from 0 to 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(name, change, message):
    files = {"half2": HALVES[1], "mask": PKA / "mask.mrc"}
    volume = read_volume(files[name])
    write_volume(f"{name}.mrc", volume.with_data(change(volume.data)), label="test")
    files[name] = f"{name}.mrc"
    done = denoise(HALVES[0], "--half2", files["half2"], "--mask", files["mask"], "-o", "out.mrc")
    assert done.exit_code == 1
    assert message in done.stderr
    assert not Path("out.mrc").exists()


def test_a_half_of_another_pixel_size_is_refused():
    write_volume("other.mrc", read_volume(HALVES[1]).with_voxel_size(1.2), label="test")
    done = denoise(HALVES[0], "--half2", "other.mrc", "-o", "out.mrc")
    assert done.exit_code == 1
    assert "other.mrc: pixel size 1.2 A, expected 1.5 A as in" in done.stderr
    assert denoise(HALVES[0], "--half2", "other.mrc", "-o", "out.mrc", "--angpix", 1.5).exit_code == 0


def test_the_fsc_of_the_means_says_nothing():
    """It is 1 or -1, by the sign of the means."""
    first, second = (read_volume(half) for half in HALVES)
    for sign, name in ((1, "same"), (-1, "opposite")):
        write_volume(f"{name}1.mrc", first.with_data(first.data - first.data.mean() + 0.01), label="test")
        write_volume(f"{name}2.mrc", second.with_data(second.data - second.data.mean() + sign * 0.01), label="test")
    numbers = []
    for name in ("same", "opposite"):
        halves = f"{name}1.mrc", f"{name}2.mrc"
        done = denoise("--half1", halves[0], "--half2", halves[1], "-o", f"{name}.mrc", "--bfactor", "auto")
        assert done.exit_code == 0, done.output
        numbers.append(re.search(r"by a B factor of (-?[\d.]+) A", done.stderr).group(1))
        Path(f"{name}.tsv").write_text(CliRunner().invoke(cli, ["fsc", *halves]).stdout)
        assert denoise(halves[0], "--fsc", f"{name}.tsv", "-o", f"{name}_half.mrc").exit_code == 0
    assert numbers[0] == numbers[1]
    np.testing.assert_allclose(of("same.mrc") - of("same.mrc").mean(), of("opposite.mrc"), atol=1e-4)
    np.testing.assert_allclose(of("same_half.mrc"), of("opposite_half.mrc"), atol=1e-4)


def test_an_fsc_that_resolves_nothing_is_refused():
    header, *lines = CliRunner().invoke(cli, ["fsc", *map(str, HALVES)]).stdout.splitlines()
    rows = ["\t".join([*line.split("\t")[:3], "-0.1"]) for line in lines]
    Path("none.tsv").write_text("\n".join([header, *rows]) + "\n")
    done = denoise(HALVES[0], "--fsc", "none.tsv", "-o", "out.mrc")
    assert done.exit_code == 1
    assert "an FSC of 0 or less in all shells, expected one that resolves something" in done.stderr


def test_a_job_gives_the_average_of_its_halves():
    folder = Path("Refine3D/job012")
    folder.mkdir(parents=True)
    for half in HALVES:
        shutil.copy(half, folder / half.name)
    assert denoise(folder, "-o", "job.mrc").exit_code == 0
    assert denoise("--half1", HALVES[0], "--half2", HALVES[1], "-o", "out.mrc").exit_code == 0
    np.testing.assert_array_equal(of("job.mrc"), of("out.mrc"))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--half1", "a.mrc"],
        ["--half2", "b.mrc"],
        ["a.mrc", "--half1", "a.mrc", "--half2", "b.mrc"],
        [".", "--half2", "b.mrc"],
    ],
)
def test_usage(words):
    assert denoise(*words, "-o", "out.mrc").exit_code == 2


# Sharpened maps


@pytest.mark.parametrize("bfactor", [-100, 0, 60, 120])
@pytest.mark.parametrize("resolution", [4.0, 5.0])
def test_sharpening_is_measured(truth, bfactor, resolution):
    data = low_pass(sharpened(truth.data, 1.5, bfactor), 1.5, resolution)
    assert sharpening(truth.with_data(data)) == pytest.approx(bfactor, abs=30)


def test_noise_and_unfiltered_maps_are_not_taken_for_sharpened(truth):
    noise = np.random.default_rng(0).standard_normal((64, 64, 64)).astype(np.float32)
    assert sharpening(truth.with_data(noise)) == 0
    assert sharpening(truth.with_data(truth.data * 0)) == 0
    assert sharpening(read_volume(HALVES[0])) == 0


def test_sharpening_is_undone_for_the_network_and_done_again(truth, monkeypatch, caplog):
    seen = []
    call = Denoiser.__call__
    monkeypatch.setattr(Denoiser, "__call__", lambda self, volume, fsc: seen.append(volume) or call(self, volume, fsc))
    plain = low_pass(truth.data, 1.5, 4.5).astype(np.float32)
    write_volume("map.mrc", truth.with_data(sharpened(plain, 1.5, 90)), label="test")
    denoise_file("map.mrc", "out.mrc")
    found = int(re.search(r"is sharpened, by a B factor of about -(\d+) A\^2", caplog.text).group(1))
    assert found == pytest.approx(90, abs=25)
    assert np.linalg.norm(seen[0].data - sharpened(plain, 1.5, 90 - found)) < 0.02 * np.linalg.norm(plain)
    np.testing.assert_allclose(of("out.mrc"), of("map.mrc"), atol=1e-5 * of("map.mrc").max())


def test_a_sharpened_map_has_no_sigma(truth, monkeypatch):
    monkeypatch.setattr("cryored.prior.denoise_files.check_uncertainty", lambda model: None)
    data = sharpened(low_pass(truth.data, 1.5, 4.5).astype(np.float32), 1.5, 90)
    write_volume("map.mrc", truth.with_data(data), label="test")
    done = denoise("map.mrc", "-o", "out.mrc", "--uncertainty", "sigma.mrc")
    assert done.exit_code == 1
    assert "expected an unsharpened map for --uncertainty" in done.stderr
    assert not Path("out.mrc").exists() and not Path("sigma.mrc").exists()
    assert denoise("map.mrc", "-o", "out.mrc", "--uncertainty", "sigma.mrc", "--bfactor", -50).exit_code == 2


def test_the_result_is_sharpened_on_demand(truth):
    write_volume("map.mrc", truth, label="test")
    assert denoise("map.mrc", "-o", "out.mrc", "--bfactor", -80).exit_code == 0
    np.testing.assert_allclose(of("out.mrc"), sharpened(truth.data, 1.5, 80), rtol=1e-4, atol=1e-4)


def test_sharpening_leaves_no_corners():
    noise = np.random.default_rng(0).standard_normal((24, 24, 24)).astype(np.float32)
    beyond = spatial_frequency(noise.shape, 1.5) > 0.3334
    changed = np.abs(forward(sharpened(noise, 1.5, 200)))
    assert changed[beyond].max() < 1e-6 * changed.max()
    assert changed[12, 0, 0] == pytest.approx(np.exp(200 / 4 / 9) * np.abs(forward(noise))[12, 0, 0], rel=1e-4)


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_image_handler") is None, reason="relion_image_handler is not on the PATH")
def test_sharpening_is_relions():
    shutil.copy(HALVES[0], "half.mrc")
    command = ["relion_image_handler", "--i", "half.mrc", "--o", "relion.mrc", "--angpix", "1.5", "--bfactor", "-80"]
    subprocess.run(command, capture_output=True, check=True)
    expected = of("relion.mrc")
    found = sharpened(of("half.mrc"), 1.5, 80)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="relion_postprocess is not on the PATH")
def test_the_automatic_b_factor_is_relions():
    Path("run").mkdir()
    for half in HALVES:
        shutil.copy(half, Path("run") / half.name)
    command = ["relion_postprocess", "--i", f"run/{HALVES[0].name}", "--angpix", "1.5", "--auto_bfac", "--o", "post"]
    # Its exit status tells of the plots that it draws last, which fail without Ghostscript or without a mask.
    told = subprocess.run(command, capture_output=True, text=True).stdout
    expected = float(re.search(r"apply b-factor of:\s+(-?[\d.]+)", told).group(1))
    done = denoise("--half1", HALVES[0], "--half2", HALVES[1], "-o", "out.mrc", "--bfactor", "auto")
    assert done.exit_code == 0, done.output
    found = float(re.search(r"by a B factor of (-?[\d.]+) A", done.stderr).group(1))
    assert found == pytest.approx(expected, rel=0.01, abs=0.1)
    done = denoise(HALVES[0], "--half2", HALVES[1], "-o", "half.mrc", "--bfactor", "auto")
    of_half = float(re.search(r"by a B factor of (-?[\d.]+) A", done.stderr).group(1))
    assert of_half == pytest.approx(expected, rel=0.02)  # its noise is another


def test_the_automatic_b_factor_needs_half_maps(truth):
    write_volume("map.mrc", truth, label="test")
    done = denoise("map.mrc", "-o", "out.mrc", "--bfactor", "auto")
    assert done.exit_code == 1
    assert "map.mrc: no FSC, expected that of half-maps for --bfactor auto; give a number" in done.stderr
    assert denoise("map.mrc", "-o", "out.mrc", "--bfactor", "much").exit_code == 2


# Maps that the model is not made for


def test_a_map_without_anything_that_the_model_knows(tmp_path):
    data = np.random.default_rng(0).standard_normal((64, 200, 180)).astype(np.float32)
    write_volume("tomogram.mrc", Volume(data, 10.0), label="test")
    begin = time.monotonic()
    done = denoise("tomogram.mrc", "-o", "out.mrc")
    assert done.exit_code == 1
    assert (
        "pixel size 10 A, so nothing finer than 20 A is in it; cwred is made for maps resolved to 3 to 20 A"
        in done.stderr
    )
    assert time.monotonic() - begin < 5
    assert not Path("out.mrc").exists()


def test_a_dear_map_is_refused_unless_insisted_on(monkeypatch):
    monkeypatch.setattr("cryored.prior.denoise_files._DEAR", 1e5)
    data = gaussian_filter(np.random.default_rng(0).standard_normal((48, 48, 48)), 2).astype(np.float32)
    write_volume("map.mrc", Volume(data, 2.0), label="test")
    done = denoise("map.mrc", "-o", "out.mrc")
    assert done.exit_code == 1
    assert "48 x 48 x 48 voxels of 2 A are 2.6e+05 at the model's 1.5 A: about 1 GiB of memory" in done.stderr
    assert denoise("map.mrc", "-o", "out.mrc", "--force").exit_code == 0


def test_a_coarse_map_is_warned_of():
    data = np.random.default_rng(0).standard_normal((32, 32, 32)).astype(np.float32)
    write_volume("map.mrc", Volume(data, 4.2), label="test")
    done = denoise("map.mrc", "-o", "out.mrc")
    assert done.exit_code == 0
    assert "map.mrc ends at 8.4 A; cwred is made for maps resolved to 3 to 20 A, at 1.5 A/pixel" in done.stderr


# What is written besides


@pytest.mark.slow
def test_difference_and_picture(truth, monkeypatch):
    monkeypatch.setattr(Denoiser, "_predict", lambda self, data: 0.25 * data)
    write_volume("map.mrc", truth.with_data(truth.data * soft_sphere(truth.shape, 20, 5)), label="test")
    words = ["--difference", "diff.mrc", "--plot", "look.png", "--mask", "mask.mrc"]
    write_volume("mask.mrc", truth.with_data(soft_sphere(truth.shape, 25, 5).astype(np.float32)), label="test")
    done = denoise("map.mrc", "-o", "out.mrc", *words)
    assert done.exit_code == 0, done.output
    given = of("map.mrc") * of("mask.mrc")
    np.testing.assert_allclose(of("diff.mrc"), of("out.mrc") - given, atol=1e-6)
    changed = float(re.search(r"changed by (\d+) %", done.stderr).group(1))
    assert changed == pytest.approx(100 * np.linalg.norm(of("diff.mrc")) / np.linalg.norm(given), abs=0.6)
    assert Path("look.png").read_bytes().startswith(b"\x89PNG")


def test_options_have_the_commands_defaults():
    from cryored.cli.denoise import denoise as command

    given = command.make_context("denoise", ["map.mrc", "-o", "out.mrc"]).params
    assert {name: given[name] for name in vars(DenoiseOptions())} == vars(DenoiseOptions())


def test_tiles_are_told(truth, caplog):
    write_volume("map.mrc", truth, label="test")
    told = []
    denoise_file("map.mrc", "out.mrc", DenoiseOptions(tile=56, rotations=2), progress=lambda *step: told.append(step))
    assert told[-1][0] == told[-1][1] == len(told) >= 4
    done = denoise("map.mrc", "-o", "out.mrc", "--overwrite", "--tile", 56)
    assert re.search(r"tiles: (\d+) of \1", done.stderr)
    assert "tiles" not in denoise("map.mrc", "-o", "out.mrc", "--overwrite").stderr
    done = denoise("map.mrc", "-o", "out.mrc", "--overwrite", "--rotations", 2)
    assert "passes: 2 of 2" in done.stderr  # of one tile
    assert "tiles" not in done.stderr


def test_what_the_prior_does_beyond_the_data_is_told(monkeypatch):
    monkeypatch.setattr(Denoiser, "_predict", lambda self, data: 0.25 * data)
    done = denoise(HALVES[0], "--half2", HALVES[1], "-o", "out.mrc")
    end = float(
        re.search(r", active to ([\d.]+) A, beyond 4.57 A on the prior's word alone$", done.stderr, re.M).group(1)
    )
    assert end < 4.57
    halves = CliRunner().invoke(cli, ["fsc", "out.mrc", "out.mrc"])
    assert "out.mrc and out.mrc both went through the network (labels: denoise cwred" in halves.stderr
    # Nothing is told of a map without an FSC, nor where the prior ends with the data.
    volume = read_volume("out.mrc")
    write_volume("coarse.mrc", volume.with_data(low_pass(volume.data, 1.5, 6.0)), label="test")
    assert "word alone" not in denoise("coarse.mrc", "-o", "out.mrc", "--overwrite").stderr
    table = CliRunner().invoke(cli, ["fsc", *map(str, HALVES)]).stdout
    Path("fsc.tsv").write_text(table)
    done = denoise("coarse.mrc", "--fsc", "fsc.tsv", "-o", "out.mrc", "--overwrite")
    assert re.search(r", active to [\d.]+ A$", done.stderr, re.M)


@pytest.mark.parametrize("beside", [True, False])
def test_a_raw_half_map_without_its_fsc_is_warned_of(beside):
    for half in HALVES[: 1 + beside]:
        shutil.copy(half, half.name)
    first, second = (half.name for half in HALVES)
    done = denoise(first, "-o", "out.mrc")
    assert done.exit_code == 0, done.output
    assert f"cryored: warning: {first} is taken as filtered already, but a raw half-map by its name" in done.stderr
    assert f"give {f'--half2 {second}' if beside else '--half2 or --fsc'}\n" in done.stderr
    if beside:
        assert f"give --half2 {first}\n" in denoise(second, "-o", "out.mrc", "--overwrite").stderr
