"""Tables of curves, and the command ``cryored fsc``."""

from __future__ import annotations

import io
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from cryored.assessment.fsc_of_files import FscOptions, fsc_files, log_summary
from cryored.cli import cli
from cryored.errors import InputError
from cryored.files.fsc_tables import format_tsv, format_xml, parse_fsc_table, read_fsc_table, star_blocks
from cryored.files.mrc import read_volume, write_volume
from cryored.files.star import format_star, parse_star, read_star, write_star
from cryored.maps.fsc import FscResult, MaskedFsc, nominal_resolution
from cryored.maps.volume import Volume
from cryored.prior.denoiser import Denoiser

PKA = Path(__file__).parent / "data" / "postprocess_pka"
HALF1, HALF2, MASK = (
    str(PKA / name) for name in ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc", "mask.mrc")
)
FREQUENCY = np.arange(33) / 96.0


@pytest.fixture(scope="module")
def masked():
    return fsc_files(HALF1, HALF2, FscOptions(mask=MASK))


@pytest.fixture(scope="module")
def unmasked():
    return fsc_files(HALF1, HALF2)


@pytest.fixture
def run():
    def invoke(*arguments, stdin=None):
        return CliRunner().invoke(cli, ["fsc", *map(str, arguments)], input=stdin)

    return invoke


def columns(text):
    lines = [line.split("\t") for line in text.splitlines()]
    return dict(zip(lines[0], np.array(lines[1:], dtype=np.float64).T, strict=True))


# Tables


@pytest.mark.parametrize("name", ["masked", "unmasked"])
@pytest.mark.parametrize("layout", [format_tsv, lambda result: format_star(star_blocks(result)), format_xml])
def test_a_written_table_is_read_again(request, name, layout):
    result = request.getfixturevalue(name)
    curve = parse_fsc_table(layout(result).encode(), "table")
    assert curve.frequency[0] == 0
    np.testing.assert_allclose(curve.frequency, FREQUENCY, atol=1e-6)  # six digits
    np.testing.assert_allclose(curve.fsc, result.best, atol=1e-6)
    assert nominal_resolution(curve.frequency, curve.fsc) == pytest.approx(result.resolution(), rel=1e-5)


@pytest.mark.parametrize("name", ["postprocess.star", "postprocess_fsc.xml"])
def test_reads_what_relion_writes(name):
    curve = read_fsc_table(PKA / name)
    np.testing.assert_allclose(curve.frequency, FREQUENCY, atol=1e-6)
    corrected = read_star(PKA / "postprocess.star").numbers("fsc", "rlnFourierShellCorrelationCorrected")
    np.testing.assert_allclose(curve.fsc, corrected, atol=1e-6)
    assert nominal_resolution(curve.frequency, curve.fsc) == pytest.approx(3.555556, abs=1e-4)


def test_the_content_tells_the_format_not_the_name(tmp_path):
    path = tmp_path / "curve.xml"
    path.write_bytes(b"\xef\xbb\xbf" + (PKA / "postprocess.star").read_bytes())
    assert len(read_fsc_table(path).fsc) == 33


def model_star(fsc):
    rows = "\n".join(f"{i} {i / 96:.6f} {96 / i if i else 999:.6f} {value}" for i, value in enumerate(fsc))
    return f"""
data_model_general

_rlnPixelSize 1.5

data_model_class_1

loop_
_rlnSpectralIndex #1
_rlnResolution #2
_rlnAngstromResolution #3
_rlnGoldStandardFsc #4
{rows}
""".encode()


def test_reads_the_gold_standard_curve_of_a_model_file():
    curve = parse_fsc_table(model_star([1, 0.9, 0.5, 0.1]), "run_it005_half1_model.star")
    np.testing.assert_allclose(curve.frequency, FREQUENCY[:4], atol=1e-6)
    np.testing.assert_array_equal(curve.fsc, [1, 0.9, 0.5, 0.1])


def test_takes_the_unmasked_curve_where_there_is_no_other():
    content = b"data_fsc\nloop_\n_rlnResolution\n_rlnFourierShellCorrelationUnmaskedMaps\n"
    content += b"0.001001 -1\n0.1 0.8\n0.2 -nan\n"
    curve = parse_fsc_table(content, "postprocess.star")
    np.testing.assert_array_equal(curve.frequency, [0, 0.1, 0.2])
    np.testing.assert_array_equal(curve.fsc, [-1, 0.8, 0])  # RELION's nan: a shell without power


def point(x, y):
    return f"<coordinate><x>{x}</x><y>{y}</y></coordinate>"


def test_adds_the_shell_0_that_others_leave_out():
    content = f"<?xml version='1.0'?><fsc>{point(0.1, 0.9)}{point(0.2, 0.5)}</fsc>".encode()
    curve = parse_fsc_table(content, "emd_0001_fsc.xml")
    np.testing.assert_array_equal(curve.frequency, [0, 0.1, 0.2])
    np.testing.assert_array_equal(curve.fsc, [1, 0.9, 0.5])


REQUEST = b"data_external_reconstruct_tau2\nloop_\n_rlnSpectralIndex\n_rlnGoldStandardFsc\n0 1\n1 0.9\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b" \n",
            "^t: empty, expected a table of `cryored fsc`, a RELION STAR file .* did the command before",
        ),
        (bytes(range(128, 256)), "^t: binary data, expected .*; compare maps with `cryored fsc`"),
        (b"d_min d_max fsc\n1 2 3\n", "^t: begins with 'd_min d_max fsc', expected a table of"),
        (b"frequency\tfsc\n0\t1\n0.1\n0.2\t0.3\n", "^t: .*; expected 2 numbers a line; write it anew"),
        (b"frequency\tfsc\n0\t1\n0.1\tx\n0.2\t0.3\n", "^t: .*'x'; expected 2 numbers a line"),
        (b"frequency\tfsc\n0\t1\nnan\t1\nnan\t0.3\n", "^t: the frequencies are unknown; .* with --angpix"),
        (b"frequency\tfsc\n", "^t: 0 shells, expected a curve; was the file cut short"),
        (b"frequency\tfsc\n0\t1\n0.2\t1\n0.1\t0\n", "^t: frequencies that do not rise, expected 1/angstrom"),
        (b"frequency\tfsc\n0\t1\n0.1\t1\ninf\t0\n", "^t: frequencies that do not rise"),
        (
            b"frequency\tfsc\n0\t100\n0.1\t90\n0.2\t0\n",
            "^t: a correlation of 100, expected -1 to 1; .* percent",
        ),
        (b"data_optics\n_rlnVoltage 300\n", "^t: found the blocks data_optics, expected a table of"),
        (
            b"data_fsc\nloop_\n_rlnResolution\n0.1\n",
            "^t: the column _rlnFourierShell.* is missing from data_fsc",
        ),
        (b"data_fsc\nloop_\n", "^t: no STAR file"),
        (
            model_star([0, 0, 0, 0]),
            "^t: _rlnGoldStandardFsc is 0 in all shells, .* expected a later iteration",
        ),
        (REQUEST, "^t: a request for an external reconstruction, .* give the request itself"),
        (b"<fsc><coordinate>", r"^t: broken XML \(.*\), expected a table of .*; fetch or write"),
        (b"<emd/>", "^t: found <emd> with 0 <coordinate>, expected a table of"),
        (f"<fsc>{point(0, 1)}{point(1, '')}</fsc>".encode(), "^t: .*; expected numbers in <x> and <y>"),
    ],
)
def test_broken_tables_are_refused_in_one_line(content, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_fsc_table(content, "t")
    assert "\n" not in str(caught.value)


def test_tabs_that_have_become_blanks():
    lines = ["shell frequency resolution fsc", "0 0 inf 1", "1  0.1 10 0.9", " 2 0.2 5 0.5 "]
    curve = parse_fsc_table("\n".join(lines).encode(), "t")
    np.testing.assert_array_equal(curve.frequency, [0, 0.1, 0.2])
    np.testing.assert_array_equal(curve.fsc, [1, 0.9, 0.5])


def test_a_star_file_that_begins_with_a_byte_order_mark():
    content = (PKA / "postprocess.star").read_bytes()
    assert parse_star(b"\xef\xbb\xbf" + content, "t").blocks() == parse_star(content, "t").blocks()


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match="none.tsv: cannot be read: No such file"):
        read_fsc_table(tmp_path / "none.tsv")


def test_star_has_what_relions_has(masked):
    ours, theirs = (
        parse_star(format_star(star_blocks(masked)).encode(), "ours"),
        read_star(PKA / "postprocess.star"),
    )
    for label in ("rlnSpectralIndex", "rlnResolution", "rlnAngstromResolution"):
        np.testing.assert_allclose(ours.numbers("fsc", label), theirs.numbers("fsc", label), atol=1e-6)
    for label in (
        "rlnFourierShellCorrelationCorrected",
        "rlnFourierShellCorrelationUnmaskedMaps",
        "rlnFourierShellCorrelationMaskedMaps",
        "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    ):
        assert theirs.has_column("fsc", label)
        assert len(ours.numbers("fsc", label)) == 33
    assert ours.number("general", "rlnRandomiseFrom") == theirs.number("general", "rlnRandomiseFrom")
    assert ours.number("general", "rlnFinalResolution") == pytest.approx(masked.resolution(), abs=1e-6)
    assert ours.text("general", "rlnUnfilteredMapHalf1") == HALF1
    assert ours.text("general", "rlnMaskName") == MASK


def test_xml_is_laid_out_as_relions(masked):
    ours, theirs = (
        ElementTree.fromstring(format_xml(masked)),
        ElementTree.parse(PKA / "postprocess_fsc.xml").getroot(),
    )
    for key in ("xaxis", "yaxis"):
        assert ours.get(key) == theirs.get(key)
    assert [x.text for x in ours.iter("x")] == [x.text for x in theirs.iter("x")]
    assert [y.text for y in ours.iter("y")][:10] == [y.text for y in theirs.iter("y")][:10]  # before chance sets in


def test_a_curve_without_resolution_is_999_to_relion():
    curve = np.array([1, 0.1, 0.1, 0.0, 0.0])
    result = FscResult(("a.mrc", "b.mrc"), None, 8, 1.0, curve, None)
    assert result.resolution() == math.inf
    assert parse_star(format_star(star_blocks(result)).encode(), "s").number("general", "rlnFinalResolution") == 999


# Command


def test_prints_a_table(run, masked, unmasked):
    table = columns(run(HALF1, HALF2).stdout)
    assert list(table) == ["shell", "frequency", "resolution", "fsc"]
    np.testing.assert_array_equal(table["shell"], np.arange(33))
    np.testing.assert_allclose(table["resolution"][1:], 96 / np.arange(1, 33), atol=1e-4)
    assert table["resolution"][0] == math.inf
    np.testing.assert_allclose(table["fsc"], unmasked.best, atol=1e-6)
    table = columns(run(HALF1, HALF2, "--mask", MASK).stdout)
    assert list(table)[4:] == ["fsc_masked", "fsc_randomised", "fsc_corrected"]
    np.testing.assert_allclose(table["fsc_corrected"], masked.best, atol=1e-6)


def test_says_on_standard_error_what_it_found(run):
    done = run(HALF1, HALF2, "--mask", MASK)
    assert "resolution 3.43 A: the last shell before the corrected FSC drops below 0.143" in done.stderr
    assert "phases randomised from shell 8 on" in done.stderr
    assert run(HALF1, HALF2, "--mask", MASK, "-q").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "4.5714\n"),  # relion_postprocess without a mask
        (["--threshold", 0.5], "8.7273\n"),
        (["--threshold", 0.999], "inf\n"),
        (["--threshold", 0.143, "--angpix", 3], "9.1429\n"),
        (["--mask", MASK], "3.4286\n"),
        (["--mask", MASK, "--threshold", 0.5, "--seed", 1], "4.8000\n"),
    ],
)
def test_resolution_only_is_one_bare_number(run, arguments, expected):
    done = run(HALF1, HALF2, "--resolution-only", *arguments)
    assert done.exit_code == 0
    assert done.stdout == expected


def test_seed_and_randomise_from(run):
    first, again, other = (run(HALF1, HALF2, "--mask", MASK, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    later = columns(run(HALF1, HALF2, "--mask", MASK, "--randomise-from", 6.0).stdout)
    np.testing.assert_array_equal(later["fsc_corrected"][:18], later["fsc_masked"][:18])  # 96 / 6 + 2


@pytest.mark.slow
def test_writes_files_and_the_table(run, tmp_path, masked):
    paths = [tmp_path / name for name in ("a.star", "a.xml", "a.png")]
    done = run(HALF1, HALF2, "--mask", MASK, *sum(zip(("--star", "--xml", "--plot"), paths, strict=True), ()))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("shell\t")
    for path in paths[:2]:
        np.testing.assert_allclose(read_fsc_table(path).fsc, masked.best, atol=1e-6)
    assert paths[2].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    refused = run(HALF1, HALF2, "--xml", paths[1])
    assert refused.exit_code == 1
    assert "a.xml: exists already; add --overwrite to replace it" in refused.stderr
    assert run(HALF1, HALF2, "--xml", paths[1], "--overwrite").exit_code == 0


@pytest.mark.slow
def test_tells_what_a_model_invents(run, tmp_path, monkeypatch, unmasked):
    """A model that answers every map with one and the same agrees with itself."""
    detail = np.random.default_rng(0).standard_normal((64, 64, 64)).astype(np.float32)
    monkeypatch.setattr(Denoiser, "__call__", lambda self, volume, fsc: volume.with_data(detail))
    done = run(HALF1, HALF2, "--substitute-noise", 6, "--plot", tmp_path / "a.png")
    assert done.exit_code == 0, done.stderr
    table = columns(done.stdout)
    assert list(table)[3:] == ["fsc", "fsc_substituted", "fsc_denoised", "fsc_denoised_substituted"]
    np.testing.assert_allclose(table["fsc"], unmasked.best, atol=1e-6)
    np.testing.assert_allclose(table["fsc_substituted"][:16], unmasked.best[:16], atol=1e-5)
    assert np.abs(table["fsc_substituted"][20:31]).max() < 0.1  # beyond, the weights are next to nothing
    np.testing.assert_array_equal(table["fsc_denoised"], 1)
    np.testing.assert_array_equal(table["fsc_denoised_substituted"], 1)
    control = table["fsc_substituted"][16:-1].mean()  # Nyquist's shell is left out
    assert (
        "beyond 6.00 A: mean FSC 1.000 denoised; with noise for signal 1.000 denoised (invented; at most 1.000, at "
        f"6.00 A), {control:.3f} not denoised" in done.stderr
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    np.testing.assert_allclose(parse_fsc_table(done.stdout.encode(), "table").fsc, unmasked.best, atol=1e-6)


@pytest.mark.parametrize(("option", "start"), [("--star", "\n# version"), ("--xml", "<fsc title=")])
def test_a_table_to_standard_output_stands_alone(run, option, start):
    text = run(HALF1, HALF2, option, "-").stdout
    assert text.startswith(start)
    assert len(parse_fsc_table(text.encode(), "stdout").fsc) == 33


def test_a_map_from_standard_input(run):
    done = run("-", HALF2, "--resolution-only", stdin=Path(HALF1).read_bytes())
    assert done.stdout == "4.5714\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", "-"], "only one of MAP1, MAP2 and --mask can be '-'"),
        ([HALF1, HALF2, "--star", "-", "--resolution-only"], "choose one"),
        ([HALF1, HALF2, "--star", "-", "--xml", "-"], "choose one"),
        ([HALF1, HALF2, "--plot", "-"], "--plot needs the name of a file"),
        ([HALF1, HALF2, "--randomise-from", 10], "--randomise-from has no meaning without --mask"),
        ([HALF1, HALF2, "--threshold", 1.5], "--threshold"),
    ],
)
def test_usage_errors(run, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_input_errors_are_one_line(run, tmp_path, assert_one_line_error):
    for arguments, message in [
        ((HALF1, tmp_path / "none.mrc"), "none.mrc: cannot be read: No such file or directory"),
        ((HALF1, HALF1, "--mask", MASK), "never drops below 0.8"),
        ((HALF1, HALF2, "--xml", tmp_path / "no" / "a.xml"), "does not exist; create it first"),
        ((HALF1, HALF2, "--substitute-noise", 100), "noise from shell 0 on, expected 1 to 32; give another --subst"),
    ]:
        assert_one_line_error(run(*arguments), message)


def test_without_a_pixel_size(run, tmp_path):
    names = [tmp_path / f"{i}.mrc" for i in range(2)]
    for seed, name in enumerate(names):
        data = np.random.default_rng(seed).standard_normal((8, 8, 8)).astype(np.float32)
        write_volume(name, Volume(data, 0.0), label="test")
    done = run(*names)
    table = columns(done.stdout)
    assert np.isnan(table["frequency"]).all()
    assert np.isnan(table["resolution"]).all()
    assert "no pixel size in the header, so no frequencies; give --angpix" in done.stderr
    for option in (["--resolution-only"], ["--xml", "-"], ["--star", "-"], ["--plot", tmp_path / "a.png"]):
        refused = run(*names, *option)
        assert refused.exit_code == 1
        assert "0.mrc: no pixel size in the header, expected one; give --angpix" in refused.stderr
    assert not (tmp_path / "a.png").exists()


def masked_result(unmasked, randomised, corrected):
    curves = [np.array(curve, dtype=np.float64) for curve in (unmasked, randomised, corrected)]
    masked = MaskedFsc(curves[0], curves[2], curves[1], curves[2], 1)
    return FscResult(("a.mrc", "b.mrc"), "m.mrc", 8, 1.0, curves[0], masked)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            masked_result([1, 0.9, 0.8, 0.7, 0], [1, 0, 0, 0, 0], [1, 0.9, 0, 0, 0]),
            "does the mask cut density",
        ),
        (
            masked_result([1, 0.9, 0, 0, 0], [1, 0, 0.2, 0, 0], [1, 0.9, 0.8, 0, 0]),
            "use a wider or softer mask",
        ),
        (masked_result([1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]), "from the first shell on"),
        (
            masked_result([1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]),
            r"2.00 A \(Nyquist\) or better: .* never drops",
        ),
    ],
)
def test_doubts_are_told(caplog, monkeypatch, result, message):
    monkeypatch.setattr(logging.getLogger("cryored"), "propagate", True)  # the command line turns it off
    with caplog.at_level("INFO", logger="cryored"):
        log_summary(result)
    assert any(re.search(message, record.getMessage()) for record in caplog.records)


def test_plot_without_matplotlib_tells_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(HALF1, HALF2, "--plot", tmp_path / "a.png")
    assert done.exit_code == 1
    assert "--plot needs matplotlib: pip install 'cryored[plot]'" in done.stderr


@pytest.mark.slow
def test_the_example_of_the_help_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (HALF1, HALF2, MASK):
        (tmp_path / Path(name).name).symlink_to(name)
    text = run("--help").stdout.replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.strip().startswith("cryored fsc run_")]
    assert len(commands) == 3
    for words in commands:
        arguments = words[2 : words.index(">")] if ">" in words else words[2:]
        assert run(*arguments).exit_code == 0
    assert (tmp_path / "fsc.png").exists()
    assert (tmp_path / "invented.png").exists()
    assert (tmp_path / "fsc.xml").exists()


@pytest.mark.slow
def test_loads_no_more_than_it_needs():
    program = (
        "import sys\n"
        "from cryored.cli import cli\n"
        f"cli.main(['fsc', '-q', {HALF1!r}, {HALF2!r}, '--mask', {MASK!r}], standalone_mode=False)\n"
        "print(*{'tensorflow', 'keras', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("shell\t")
    assert done.stderr.split() == []


@pytest.mark.slow
def test_pipes_through_the_shell():
    command = [sys.executable, "-m", "cryored", "fsc", HALF1, "-", "-q"]
    with open(HALF2, "rb") as stream:
        done = subprocess.run(command, stdin=stream, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""
    curve = np.genfromtxt(io.StringIO(done.stdout), names=True, delimiter="\t")
    assert curve["fsc"][1] == pytest.approx(0.997721, abs=1e-5)


def test_a_job_without_a_mask_has_no_phases_to_randomise(tmp_path):
    for half in (HALF1, HALF2):
        shutil.copy(half, tmp_path)
    write_star(tmp_path / "run_model.star", {"model_general": {"rlnPixelSize": 1.5}})
    done = CliRunner().invoke(cli, ["fsc", str(tmp_path), "--randomise-from", "20"])
    assert done.exit_code == 1
    assert f"{tmp_path}: no mask in this job, and --randomise-from has no meaning without; give --mask" in done.stderr


def test_an_automatic_mask():
    done = CliRunner().invoke(cli, ["fsc", str(HALF1), str(HALF2), "--mask", "auto", "--resolution-only"])
    assert done.exit_code == 0, done.output
    assert float(done.stdout) == pytest.approx(3.56, abs=0.15)  # relion_postprocess with a mask made by hand


DENOISED, UPDATED = "denoise cwred f88a2c32 rotations 1", "red-update cwred f88a2c32 lambda 0.3333"


@pytest.mark.parametrize(
    ("labels", "warned"),
    [
        ((DENOISED, DENOISED), True),
        ((DENOISED, UPDATED), True),
        ((UPDATED, "red-update lambda 0 (MAP)"), False),
        (("red-update unregularised", UPDATED), False),
        ((DENOISED, "truth 6M2B"), False),
        (("mask", "denoising"), False),
    ],
)
def test_what_went_through_the_network_twice_is_warned_of(run, tmp_path, labels, warned):
    for name, half, label in zip("ab", (HALF1, HALF2), labels, strict=True):
        write_volume(str(tmp_path / f"{name}.mrc"), read_volume(half), label=label)
    done = run(tmp_path / "a.mrc", "-", "--resolution-only", stdin=(tmp_path / "b.mrc").read_bytes())
    assert done.stdout == "4.5714\n"
    told = f"a.mrc and standard input both went through the network (labels: {labels[0]}; {labels[1]})"
    assert (told in done.stderr) == warned
    assert ("network" in done.stderr) == warned
