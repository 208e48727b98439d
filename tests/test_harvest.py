"""Pairs from what a refinement has left: their numbers, what is left out, and what is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from cryored.errors import InputError
from cryored.files.mrc import read_volume, write_volume
from cryored.files.requests import read_request_file
from cryored.files.star import read_star
from cryored.maps.fourier import apply_shells, forward, shell_index
from cryored.maps.fsc import shell_correlation
from cryored.maps.truth_scale import grey_scale
from cryored.maps.volume import Volume
from cryored.reconstruction.sums import load_sums
from cryored.simulation.harvest import HarvestOptions, find_requests, harvest_files, harvest_request, overlap
from cryored.simulation.pair_table import read_pairs

REQUESTS = Path(__file__).parent / "data" / "relion_requests"
CASE = REQUESTS / "pka_box64_pad1"
FIRST, HALF1, HALF2, LAST = (f"run_it{name}_class001" for name in ("001_half1", "003_half1", "003_half2", "012"))
ARRAYS = ("data_real", "data_imag", "weight")


@pytest.fixture(scope="module")
def truth():
    return read_volume(CASE / "truth.mrc").data


@pytest.fixture
def run(tmp_path):
    """A copy of the recorded run, and the truth beside it; the current folder is another one."""
    shutil.copytree(CASE / "run", tmp_path / "job" / "run")
    shutil.copy(CASE / "truth.mrc", tmp_path / "pka.mrc")
    return tmp_path / "job" / "run"


@pytest.fixture
def warned(caplog, monkeypatch):
    """Return a function that gives the warnings so far."""
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)  # the command line turns it off
    caplog.set_level("INFO", logger="cryored")
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def harvest(run, **options):
    options = {"truth": str(run.parents[1] / "pka.mrc"), "folder": str(run.parents[1] / "pairs"), **options}
    places = [str(options.pop("root", run)), *(options.pop(name) for name in ("truth", "folder"))]
    progress = {"progress": options.pop("progress")} if "progress" in options else {}
    return harvest_files(*places, HarvestOptions(**options), **progress)


def array(run, root, kind):
    return run / f"{root}_external_reconstruct_{kind}.mrc"


def remove_arrays(run, root):
    for kind in ARRAYS:
        array(run, root, kind).unlink()


def expected(root):
    """RELION's own unregularised map."""
    return read_volume(array(CASE / "run", root, "expected_unregularised")).data


def load(root, monkeypatch):
    monkeypatch.chdir(CASE)
    request = read_request_file(f"run/{root}_external_reconstruct.star")
    return request, load_sums(request)


# Numbers


def test_the_grey_scale_is_that_of_the_reliable_shells():
    """What the map holds in other shells, the mean among them, has no say."""
    rng = np.random.default_rng(0)
    known = rng.standard_normal((16, 16, 16)).astype(np.float32)
    other = rng.standard_normal((16, 16, 16)).astype(np.float32) + 5
    fsc = np.array([1, 0.9, 0.8, 0.7, 0.4, 0.9, 0, 0, 0])  # the rise after the drop does not count
    inside = (np.arange(9) > 0) & (np.arange(9) < 4)
    volume = 2.5 * apply_shells(known, inside.astype(float)) + apply_shells(other, (~inside).astype(float))
    assert grey_scale(volume, known, fsc) == pytest.approx(2.5, rel=1e-5)
    assert grey_scale(volume, -2 * known, fsc) == pytest.approx(-1.25, rel=1e-5)


def test_noise_does_not_change_the_grey_scale():
    """On average: the noise is in the map, and the map is regressed on the truth, not the other way round."""
    rng = np.random.default_rng(1)
    known = rng.standard_normal((24, 24, 24)).astype(np.float32)
    noise = rng.standard_normal((24, 24, 24)).astype(np.float32)
    fsc = (np.arange(13) < 9).astype(float)
    # 1500 coefficients a half-transform: the standard deviation is 0.02.
    assert grey_scale(known + noise, known, fsc) == pytest.approx(1, abs=0.06)


def test_no_shell_no_grey_scale():
    volume = np.ones((8, 8, 8), dtype=np.float32)
    with pytest.raises(InputError, match=r"no shell but 0 with an FSC above 0\.5"):
        grey_scale(volume, volume, np.array([1, 0.4, 0.9, 0, 0]))


def test_overlap_of_a_map_with_itself_and_with_another():
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((2, 24, 24, 24)).astype(np.float32)
    fsc = (np.arange(13) < 9).astype(float)
    assert overlap(first, 3 * first, fsc) == pytest.approx(1)
    assert overlap(first, -first, fsc) == pytest.approx(-1)
    assert abs(overlap(first, second, fsc)) < 0.1  # four standard deviations
    assert overlap(first, first, np.zeros(13)) == 0


def test_overlap_tells_the_hand_and_the_origin(truth):
    """A plain correlation does not: the envelope of a molecule is much that of its mirror image."""
    volume = expected(HALF1)
    fsc = read_star(CASE / "run" / f"{HALF1}_external_reconstruct.star").numbers(
        "external_reconstruct_tau2", "rlnGoldStandardFsc"
    )
    assert overlap(volume, truth, fsc) > 0.6
    for wrong in wrong_truths(truth):
        assert overlap(volume, wrong, fsc) < 0.2
    mirrored = np.roll(truth[:, :, ::-1], 1, axis=2)
    reliable = (np.cumprod(fsc > 0.5) > 0).astype(float)
    low = [apply_shells(data, reliable) - data.mean() for data in (volume, mirrored)]
    assert np.vdot(*low) / np.linalg.norm(low[0]) / np.linalg.norm(low[1]) > 0.4


def wrong_truths(truth):
    """The centre of a map is at n // 2, so that a mirror image has to be rolled by one."""
    mirrored = [np.roll(np.flip(truth, axis), 1, axis) for axis in range(3)]
    return [*mirrored, np.roll(truth, 4, axis=0), np.roll(truth, (3, 3, -3), axis=(0, 1, 2))]


def test_a_pair_is_relions_map_and_the_truth_times_the_fsc(truth, monkeypatch):
    request, sums = load(HALF1, monkeypatch)
    pair = harvest_request(request, sums, truth)
    raw = expected(HALF1)
    scale = grey_scale(raw, truth, request.fsc)
    np.testing.assert_allclose(pair.noisy, raw / scale, atol=1e-5 * np.abs(pair.noisy).max())  # float32
    assert grey_scale(pair.noisy, truth, request.fsc) == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(pair.fsc, request.fsc)
    assert pair.resolution == request.nominal_resolution()
    assert pair.truth is truth
    found, known, index = forward(pair.target), forward(truth), shell_index(truth.shape)
    top = np.abs(known).max()
    for shell in range(32):
        here = index == shell
        np.testing.assert_allclose(found[here], request.fsc[shell] * known[here], atol=1e-6 * top)
    assert pair.noisy.dtype == pair.target.dtype == np.float32


def test_the_grey_scale_of_the_pair_is_the_truths(truth, monkeypatch):
    request, sums = load(HALF1, monkeypatch)
    one, three = (harvest_request(request, sums, np.float32(scale) * truth) for scale in (1, 3))
    for found, wanted in ((three.noisy, one.noisy), (three.target, one.target)):
        np.testing.assert_allclose(found, 3 * wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_map_stands_in_for_the_sums(truth, monkeypatch):
    request, sums = load(HALF1, monkeypatch)
    from_sums, from_map = harvest_request(request, sums, truth), harvest_request(request, expected(HALF1), truth)
    np.testing.assert_allclose(from_map.noisy, from_sums.noisy, atol=1e-5 * np.abs(from_sums.noisy).max())
    np.testing.assert_array_equal(from_map.target, from_sums.target)
    with pytest.raises(InputError, match=r"half1.*\.star: a map of shape \(64, 64, 64\).* truth has \(32, 32, 32\)"):
        harvest_request(request, sums, truth[:32, :32, :32])


# Files


def test_each_half_of_each_iteration_gives_a_pair(run, truth, warned):
    """The last call, of the joined halves, does not, and that is no cause for a warning."""
    seen = []
    table = harvest(run, progress=lambda done, total: seen.append((done, total)))
    assert table == run.parents[1] / "pairs" / "pairs.star"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert warned() == []
    rows = read_pairs(table)
    assert [Path(row.noisy).name for row in rows] == [f"pka_{root}_noisy.mrc" for root in (FIRST, HALF1, HALF2)]
    assert [row.half for row in rows] == [1, 1, 2]
    assert [row.resolution for row in rows] == pytest.approx([96 / 13, 96 / 22, 96 / 22], abs=1e-5)
    assert {(row.structure, row.method, row.seed) for row in rows} == {("pka", "relion", 0)}
    for row, root in zip(rows, (FIRST, HALF1, HALF2), strict=True):
        noisy, target = read_volume(row.noisy), read_volume(row.target)
        assert noisy.voxel_size == target.voxel_size == 1.5
        fsc = read_star(run / f"{root}_external_reconstruct.star").numbers(
            "external_reconstruct_tau2", "rlnGoldStandardFsc"
        )
        np.testing.assert_allclose(row.fsc, fsc, atol=1e-5)  # five decimals
        np.testing.assert_allclose(target.data, apply_shells(truth, np.clip(fsc, 0, 1)), atol=1e-6)
        np.testing.assert_allclose(shell_correlation(noisy.data, expected(root))[1:26], 1, atol=1e-5)
        np.testing.assert_array_equal(read_volume(row.truth).data, truth)
    assert rows[1].target == rows[2].target != rows[0].target
    assert read_star(table).text("made", "by") == "simulate pairs relion pka"
    assert not read_star(table).find_text("made", "split")


def test_the_run_by_the_name_that_relion_got(run):
    assert len(read_pairs(harvest(run, root=run / "run", name="1atp"))) == 3
    assert (run.parents[1] / "pairs" / "1atp_truth.mrc").exists()


def test_of_several_runs_in_a_folder_one_is_named(run):
    shutil.copy(
        run / f"{HALF1}_external_reconstruct.star", run / "other_it003_half1_class001_external_reconstruct.star"
    )
    with pytest.raises(InputError, match=r"holds 2 runs \(other, run\), expected one; name one .*: \S+/run/other$"):
        harvest(run)
    assert len(read_pairs(harvest(run, root=run / "run"))) == 3
    (star,) = find_requests(str(run / "other"))
    assert star.name.startswith("other_it003")


def test_a_continued_run_is_one_run(run):
    name = HALF1.replace("run_", "run_ct2_")
    for path in run.glob(f"{HALF1}*"):
        path.rename(path.with_name(path.name.replace(HALF1, name)))
    star = run / f"{name}_external_reconstruct.star"
    star.write_text(star.read_text().replace(HALF1, name))
    for root in (run, run / "run"):
        rows = read_pairs(harvest(run, root=root, overwrite=True))
        assert [Path(row.noisy).name for row in rows] == [f"pka_{root}_noisy.mrc" for root in (name, FIRST, HALF2)]
    (star,) = find_requests(str(run / "run_ct2"))
    assert star.name.startswith(name)


@pytest.mark.parametrize("missing", ["run", "nowhere/run", "."])
def test_no_run(tmp_path, missing):
    shutil.copy(CASE / "truth.mrc", tmp_path)
    with pytest.raises(InputError, match=r"neither a folder with requests .* nor the beginning of their names"):
        harvest_files(str(tmp_path / missing), str(tmp_path / "truth.mrc"), str(tmp_path / "pairs"))


def test_arrays_beside_the_request_come_before_those_of_another_project(run, tmp_path, monkeypatch, warned):
    """Paths in a request are relative to RELION's project folder; the current one may be that of another run."""
    other = tmp_path / "other"
    shutil.copytree(run, other / "run")
    for path in (other / "run").glob("*_weight.mrc"):
        path.write_bytes(b"of another run")
    monkeypatch.chdir(other)
    assert len(read_pairs(harvest(run))) == 3
    assert warned() == []


def test_arrays_are_where_the_request_says(run, tmp_path, monkeypatch):
    """Requests that were moved, and the current folder is RELION's project folder."""
    stars = tmp_path / "requests"
    stars.mkdir()
    for path in run.glob("*.star"):
        path.rename(stars / path.name)
    monkeypatch.chdir(run.parent)
    assert len(read_pairs(harvest(run, root=stars))) == 3


def test_the_maps_that_red_update_has_kept(run, warned):
    whole = {row.noisy: read_volume(row.noisy).data for row in read_pairs(harvest(run))}
    for root in (FIRST, HALF1, HALF2):
        remove_arrays(run, root)
        shutil.copy(array(CASE / "run", root, "expected_unregularised"), run / f"{root}_unregularised.mrc")
    for row in read_pairs(harvest(run, overwrite=True)):
        # RELION's map in float32 against cryored's.
        np.testing.assert_allclose(read_volume(row.noisy).data, whole[row.noisy], atol=1e-5)
    assert warned() == []


def test_a_kept_map_of_another_box(run, warned):
    remove_arrays(run, FIRST)
    write_volume(run / f"{FIRST}_unregularised.mrc", Volume(np.ones((8, 8, 8), np.float32), 1.5), label="test")
    assert len(read_pairs(harvest(run))) == 2
    assert any("shape (8, 8, 8) (z, y, x), expected the run's box of 64 cubed" in text for text in warned())


def test_float16(run, truth):
    full = read_pairs(harvest(run))
    half = read_pairs(harvest(run, float16=True, folder=str(run / "half")))
    for first, second in zip(full, half, strict=True):
        for name in ("noisy", "target", "truth"):
            data = read_volume(getattr(first, name)).data
            assert Path(getattr(second, name)).stat().st_size == 1024 + 2 * 64**3
            # 11 bits; below 6e-5 the spacing is 6e-8.
            np.testing.assert_allclose(read_volume(getattr(second, name)).data, data, rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("name", ["../esc", "a/b", "a/", "."])
def test_a_name_that_leads_elsewhere(run, tmp_path, name):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"^{name}: expected a structure's name without '/', as it begins its files'"):
        harvest(run, name=name)
    assert set(tmp_path.rglob("*")) == before


def test_an_existing_table_is_kept(run):
    table = harvest(run)
    before = table.read_text()
    with pytest.raises(InputError, match=r"pairs\.star: exists already; add --overwrite to replace it"):
        harvest(run)
    assert table.read_text() == before
    assert harvest(run, overwrite=True).read_text() == before


def test_what_a_killed_harvest_has_left_does_no_harm(run):
    table = harvest(run)
    before = {path.name: path.read_bytes() for path in table.parent.iterdir()}
    table.unlink()
    (table.parent / f"pka_{HALF1}_noisy.mrc").write_bytes(b"half written")
    harvest(run)
    assert {path.name: path.read_bytes() for path in table.parent.iterdir()} == before


def test_the_table_comes_last(run):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    harvest(run)
    with pytest.raises(KeyboardInterrupt):
        harvest(run, overwrite=True, progress=interrupt)
    assert not (run.parents[1] / "pairs" / "pairs.star").exists()  # its maps may be old or new
    assert len(read_pairs(harvest(run))) == 3


def test_the_part_of_a_split_is_checked_and_recorded(run, tmp_path):
    (tmp_path / "split.csv").write_text("id,file,split\npka,pka.pdb,test\n1abc,1abc.pdb,train\n")
    options = {"manifest": str(tmp_path / "split.csv")}
    with pytest.raises(InputError, match=r"split\.csv: 1 of 1 structures are not of part 'train': pka \(test\)"):
        harvest(run, **options)
    with pytest.raises(InputError, match=r"other \(not listed\)"):
        harvest(run, name="other", part="test", **options)
    table = harvest(run, part="test", **options)
    assert read_star(table).text("made", "split") == "test"


# What is left out


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def spoil(path):
    data = bytearray(path.read_bytes())
    data[2000:2004] = np.float32(np.nan).tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: array(run, HALF1, "weight").unlink(), "weight.mrc: missing"),
        (lambda run: array(run, HALF1, "data_imag").unlink(), "data_imag.mrc: missing"),
        (lambda run: truncate(array(run, HALF1, "data_real")), "data_real.mrc: truncated"),
        (lambda run: spoil(array(run, HALF1, "data_imag")), "data_imag.mrc: 1 values are NaN or infinite"),
        (lambda run: edit(run, "data_external_reconstruct_tau2", "data_x"), "no table of tau2"),
        (lambda run: edit(run, "1.000000", "nan"), "padding factor nan"),
        (lambda run: edit(run, "_rlnOriginalImageSize   ", "_rlnOther "), "_rlnOriginalImageSize is missing"),
        (
            lambda run: (run / f"{HALF1}_external_reconstruct.star").write_bytes(b"\x00\xff"),
            "external_reconstruct.star",
        ),
        (lambda run: no_fsc(run / f"{HALF1}_external_reconstruct.star"), "the FSC is zero in all shells (Class3D?)"),
    ],
)
def test_what_is_damaged_is_left_out_and_listed(run, warned, damage, message):
    damage(run)
    rows = read_pairs(harvest(run))
    assert [Path(row.noisy).name for row in rows] == [f"pka_{root}_noisy.mrc" for root in (FIRST, HALF2)]
    count, reason = warned()
    assert count == f"{run}: 1 of 3 requests left out:"
    assert message in reason
    assert HALF1 in reason
    assert "\n" not in reason


def edit(run, old, new):
    star = run / f"{HALF1}_external_reconstruct.star"
    text = star.read_text()
    assert old in text
    star.write_text(text.replace(old, new))


def no_fsc(star):
    """Set the third column of the table to 0."""
    lines = [line.split() for line in star.read_text().splitlines()]
    star.write_text("\n".join(" ".join([*words[:2], "0"] if len(words) == 3 else words) for words in lines) + "\n")


def test_of_one_body(run, warned):
    for path in run.glob(f"{FIRST}*"):
        path.rename(path.with_name(path.name.replace("class001", "body001")))
    assert len(read_pairs(harvest(run))) == 2
    assert "body001_external_reconstruct.star: of one body, expected the whole map" in warned()[1]


def test_class3d_has_no_halves(tmp_path):
    write_volume(tmp_path / "truth.mrc", Volume(np.ones((32, 32, 32), np.float32), 3.0), label="test")
    with pytest.raises(InputError, match=r"run: none of its requests can be used: .*the FSC is zero in all shells"):
        harvest_files(
            str(REQUESTS / "class3d_box32_pad2" / "run"), str(tmp_path / "truth.mrc"), str(tmp_path / "pairs")
        )
    assert not (tmp_path / "pairs").exists()


def test_only_the_joined_call(run):
    for path in run.glob("*_half?_class001_*.star"):
        path.unlink()
    with pytest.raises(InputError, match="none of its requests can be used: there is only the last one, of the joined"):
        harvest(run)


def test_nothing_to_compare_with_the_truth(run, warned):
    """Without a shell of FSC above 0.5, the grey scale cannot be told."""
    star = run / f"{HALF1}_external_reconstruct.star"
    lines = [line.split() for line in star.read_text().splitlines()]
    star.write_text("\n".join(" ".join([*words[:2], "0.3"] if len(words) == 3 else words) for words in lines) + "\n")
    assert len(read_pairs(harvest(run))) == 2
    assert "no shell with an FSC above 0.5" in warned()[1]


# Truths that are refused


@pytest.mark.parametrize("number", range(5))
def test_a_truth_of_the_wrong_hand_or_origin(run, truth, tmp_path, number):
    write_volume(tmp_path / "wrong.mrc", Volume(wrong_truths(truth)[number], 1.5), label="test")
    message = rf"wrong\.mrc: correlates with the map of \S+{HALF1}\S+ by -?0\.\d\d, expected 0\.3 or more: another hand"
    with pytest.raises(InputError, match=message):
        harvest(run, truth=str(tmp_path / "wrong.mrc"))
    assert not (tmp_path / "pairs").exists()


def test_a_refusal_leaves_an_older_table(run, truth, tmp_path):
    before = harvest(run).read_text()
    write_volume(tmp_path / "wrong.mrc", Volume(wrong_truths(truth)[0], 1.5), label="test")
    with pytest.raises(InputError, match="another hand"):
        harvest(run, truth=str(tmp_path / "wrong.mrc"), overwrite=True)
    assert (tmp_path / "pairs" / "pairs.star").read_text() == before


def test_a_flat_truth(run, tmp_path):
    write_volume(tmp_path / "flat.mrc", Volume(np.ones((64, 64, 64), np.float32), 1.5), label="test")
    with pytest.raises(InputError, match=r"flat\.mrc: correlates .* by 0\.00, expected 0\.3 or more"):
        harvest(run, truth=str(tmp_path / "flat.mrc"))


@pytest.mark.parametrize(("box", "angpix", "found"), [(48, 1.5, "48 x 48 x 48 voxels of 1.5 A"), (64, 1.6, "of 1.6 A")])
def test_a_truth_on_another_grid(run, truth, tmp_path, box, angpix, found):
    write_volume(tmp_path / "grid.mrc", Volume(truth[:box, :box, :box], angpix), label="test")
    message = (
        f"grid.mrc: .*{found}, expected the run's 64 of 1.5 A; make it with cryored simulate map --box 64 --angpix 1.5"
    )
    with pytest.raises(InputError, match=message):
        harvest(run, truth=str(tmp_path / "grid.mrc"))


def test_pixel_sizes_that_files_lack(run, truth, tmp_path):
    for path in run.glob("*_model.star"):
        path.unlink()
    write_volume(tmp_path / "bare.mrc", Volume(truth, 0.0), label="test")
    with pytest.raises(InputError, match=r"none of its requests can be used: .*give it with --angpix"):
        harvest(run, truth=str(tmp_path / "bare.mrc"))
    rows = read_pairs(harvest(run, truth=str(tmp_path / "bare.mrc"), angpix=3.0))
    assert {read_volume(row.noisy).voxel_size for row in rows} == {3.0}
    assert rows[1].resolution == pytest.approx(2 * 96 / 22, abs=1e-5)
