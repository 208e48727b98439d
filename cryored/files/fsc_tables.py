"""FSC curves in files: TSV, RELION's STAR, EMDB's XML, and a picture."""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cryored.errors import InputError
from cryored.files.output import is_stream, stdin_bytes
from cryored.files.star import Block, Table, parse_star
from cryored.maps.fsc import Curve, FscCurve, FscResult

_EXPECTED = (
    "expected a table of `cryored fsc`, a RELION STAR file with data_fsc or data_model_class_1, "
    "or an EMDB FSC file (XML)"
)
_RELION_SHELL_0 = 999.0  # angstrom; RELION's word for infinity
_CORRECTED = "rlnFourierShellCorrelationCorrected"
_UNMASKED = "rlnFourierShellCorrelationUnmaskedMaps"
_MASKED = "rlnFourierShellCorrelationMaskedMaps"
_RANDOMISED = "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"
_GOLD_STANDARD = "rlnGoldStandardFsc"


def read_fsc_table(path: str | os.PathLike[str], *, masked: bool = True) -> FscCurve:
    """Read an FSC curve from a file or, for ``-``, from standard input.

    The content tells the format: a TSV of ``cryored fsc``; postprocess.star; run_itNNN_half1_model.star (the
    gold-standard curve of class 1); an EMDB FSC XML file.

    Parameters
    ----------
    path : path
    masked : bool
        Of a table that has both, take the curve within the mask, corrected, rather than the unmasked one.

    Returns
    -------
    FscCurve
        Beginning with shell 0 at frequency 0, correlation 1 where the file leaves it out.

    Raises
    ------
    InputError
        The file cannot be read or holds no curve over spatial frequency.
    """
    if is_stream(path):
        return parse_fsc_table(stdin_bytes().read(), "standard input", masked=masked)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    return parse_fsc_table(content, os.fspath(path), masked=masked)


def parse_fsc_table(content: bytes, name: str, *, masked: bool = True) -> FscCurve:
    """Parse the content of an FSC file (see `read_fsc_table`); `name` is for messages."""
    if content.startswith(b"\x1f\x8b"):
        raise InputError(f"{name}: compressed, {_EXPECTED}; gunzip it first")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name}: binary data, {_EXPECTED}; compare maps with `cryored fsc`") from None
    if not text.strip():
        raise InputError(f"{name}: empty, {_EXPECTED}; did the command before it fail?")
    if text.lstrip().startswith("<"):
        found = _parse_xml(text, name)
    elif re.search(r"^\s*data_", text, re.MULTILINE):
        found = _parse_relion(text, name, masked)
    else:
        found = _parse_tsv(text, name, masked)
    return _checked(found, name)


def _cells(line: str) -> list[str]:
    """Split a line at its tabs, or at blanks where these have taken their place."""
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()


def _parse_tsv(text: str, name: str, masked: bool) -> FscCurve:
    header, *rows = [_cells(line) for line in text.splitlines() if line.strip()]
    corrected = "fsc_corrected" in header and (masked or "fsc" not in header)
    label = "fsc_corrected" if corrected else "fsc"
    if "frequency" not in header or label not in header:
        raise InputError(f"{name}: begins with '{' '.join(header)[:60]}', {_EXPECTED}")
    try:
        table = np.array(rows, dtype=np.float64).reshape(-1, len(header))
    except ValueError as error:
        raise InputError(f"{name}: {error}; expected {len(header)} numbers a line; write it anew") from None
    frequency, fsc = (table[:, header.index(column)] for column in ("frequency", label))
    if np.isnan(frequency).any():
        raise InputError(f"{name}: the frequencies are unknown; run `cryored fsc` again with --angpix")
    return FscCurve(frequency, fsc, corrected)


def _parse_relion(text: str, name: str, masked: bool) -> FscCurve:
    star = parse_star(text.encode(), name)
    if star.has_column("fsc", "rlnResolution"):
        corrected = star.has_column("fsc", _CORRECTED) and (masked or not star.has_column("fsc", _UNMASKED))
        label = _CORRECTED if corrected else _UNMASKED
        return FscCurve(star.numbers("fsc", "rlnResolution"), star.numbers("fsc", label), corrected)
    if star.has_column("model_class_1", _GOLD_STANDARD):
        fsc = star.numbers("model_class_1", _GOLD_STANDARD)
        if not fsc.any():
            raise InputError(
                f"{name}: _{_GOLD_STANDARD} is 0 in all shells, as in iteration 0 and without half-maps; "
                "expected a later iteration of a refinement of half-maps"
            )
        return FscCurve(star.numbers("model_class_1", "rlnResolution"), fsc)
    if "external_reconstruct_tau2" in star.blocks():
        raise InputError(
            f"{name}: a request for an external reconstruction, whose shells have no spatial frequency; "
            f"{_EXPECTED}; give the request itself to a command that takes requests"
        )
    found = ", ".join(f"data_{block}" for block in star.blocks())
    raise InputError(f"{name}: found the blocks {found}, {_EXPECTED}")


def _parse_xml(text: str, name: str) -> FscCurve:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"{name}: broken XML ({error}), {_EXPECTED}; fetch or write the file anew") from None
    points = [(point.findtext("x", ""), point.findtext("y", "")) for point in root.iter("coordinate")]
    if root.tag != "fsc" or not points:
        raise InputError(f"{name}: found <{root.tag}> with {len(points)} <coordinate>, {_EXPECTED}")
    try:
        table = np.array(points, dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{name}: {error}; expected numbers in <x> and <y> of each <coordinate>") from None
    return FscCurve(table[:, 0], table[:, 1])


def _checked(found: FscCurve, name: str) -> FscCurve:
    """Bring shell 0 to frequency 0 and refuse what is no curve."""
    frequency, fsc = found.frequency, found.fsc
    if len(frequency) != len(fsc):
        raise InputError(f"{name}: {len(frequency)} frequencies, {len(fsc)} correlations; expected one for one")
    if len(frequency) and abs(frequency[0] - 1 / _RELION_SHELL_0) < 1e-6:
        frequency = np.concatenate(([0.0], frequency[1:]))
    elif len(frequency) and frequency[0] > 0:
        frequency, fsc = np.concatenate(([0.0], frequency)), np.concatenate(([1.0], fsc))
    if len(frequency) < 3:
        raise InputError(f"{name}: {len(frequency)} shells, expected a curve; was the file cut short?")
    if not (np.isfinite(frequency).all() and frequency[0] == 0 and (np.diff(frequency) > 0).all()):
        raise InputError(f"{name}: frequencies that do not rise, expected 1/angstrom from low to high; sort them")
    fsc = np.where(np.isnan(fsc), 0.0, fsc)  # RELION prints nan for a shell without power
    if np.abs(fsc).max() > 1.001:
        worst = fsc[np.argmax(np.abs(fsc))]
        raise InputError(f"{name}: a correlation of {worst:g}, expected -1 to 1; is it another column, or percent?")
    return FscCurve(frequency, fsc, found.masked)


def format_tsv(result: FscResult) -> str:
    """Lay out all curves as a table: one line a shell, tab separated, with a header.

    Columns: shell, frequency (1/angstrom), resolution (angstrom), fsc (unmasked), and with a mask fsc_masked,
    fsc_randomised and fsc_corrected, with a test of a model fsc_substituted, fsc_denoised and
    fsc_denoised_substituted. Without a pixel size frequency and resolution are nan.
    """
    columns = {"fsc": result.unmasked}
    if result.masked is not None:
        columns["fsc_masked"] = result.masked.masked
        columns["fsc_randomised"] = result.masked.randomised
        columns["fsc_corrected"] = result.masked.corrected
    if result.substituted is not None:
        columns["fsc_substituted"] = result.substituted.substituted
        columns["fsc_denoised"] = result.substituted.denoised
        columns["fsc_denoised_substituted"] = result.substituted.denoised_substituted
    lines = ["\t".join(["shell", "frequency", "resolution", *columns])]
    for shell, frequency in enumerate(result.frequency):
        resolution = np.inf if frequency == 0 else 1 / frequency
        values = [f"{column[shell]:.6f}" for column in columns.values()]
        lines.append("\t".join([str(shell), f"{frequency:.8f}", f"{resolution:.4f}", *values]))
    return "\n".join(lines) + "\n"


def star_blocks(result: FscResult, threshold: float = 0.143) -> dict[str, Block | Table]:
    """Return the blocks general and fsc under the labels of relion_postprocess, for `star.write_star`."""
    final = result.resolution(threshold)
    general: dict[str, object] = {
        "rlnFinalResolution": min(final, _RELION_SHELL_0),
        "rlnUnfilteredMapHalf1": result.maps[0],
        "rlnUnfilteredMapHalf2": result.maps[1],
    }
    frequency = _relion_frequency(result)
    table: dict[str, object] = {
        "rlnSpectralIndex": np.arange(len(frequency)),
        "rlnResolution": frequency,
        "rlnAngstromResolution": 1 / frequency,
    }
    if result.mask is not None and result.masked is not None:
        general["rlnMaskName"] = result.mask
        general["rlnRandomiseFrom"] = 1 / result.frequency[result.masked.randomise_from]
        table[_CORRECTED] = result.masked.corrected
    table[_UNMASKED] = result.unmasked
    if result.masked is not None:
        table[_MASKED] = result.masked.masked
        table[_RANDOMISED] = result.masked.randomised
    return {"general": general, "fsc": table}


def format_xml(result: FscResult) -> str:
    """Lay out the curve to judge by as EMDB takes it and RELION writes it (Postprocessing::writeFscXml)."""
    fsc = result.curve().fsc
    kind = "Unmasked FSC" if result.masked is None else "Masked-corrected FSC"
    root = ElementTree.Element("fsc", title=kind, xaxis="Resolution (A-1)", yaxis="Correlation Coefficient")
    for x, y in zip(_relion_frequency(result), fsc, strict=True):
        point = ElementTree.SubElement(root, "coordinate")
        ElementTree.SubElement(point, "x").text = f"{x:.6g}"
        ElementTree.SubElement(point, "y").text = f"{y:.6g}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _relion_frequency(result: FscResult) -> Curve:
    """Return the frequencies in 1/angstrom, shell 0 at RELION's 1/999."""
    return np.concatenate(([1 / _RELION_SHELL_0], result.curve().frequency[1:]))


def draw_fsc(path: str | os.PathLike[str], result: FscResult, threshold: float = 0.143) -> None:
    """Draw all curves over spatial frequency as a PNG file.

    Raises
    ------
    CryoredError
        matplotlib is not installed.
    InputError
        The pixel size is unknown.
    """
    from cryored.files.plots import new_figure, save_figure

    frequency = result.curve().frequency
    styles = [(result.unmasked, "unmasked", "tab:green", 1.2)]
    if result.masked is not None:
        styles += [
            (result.masked.masked, "masked", "tab:blue", 1.2),
            (result.masked.randomised, "masked, phases random", "tab:red", 1.2),
            (result.masked.corrected, "corrected", "black", 2.0),
        ]
    test = result.substituted
    if test is not None:
        styles += [
            (test.substituted, "noise for signal", "0.5", 1.2),
            (test.denoised, "denoised", "tab:purple", 1.2),
            (test.denoised_substituted, "noise for signal, denoised", "tab:orange", 2.0),
        ]
    figure = new_figure(7, 4.6)
    axes = figure.add_subplot(xlim=(0, frequency[-1]))
    if test is not None:
        axes.axvspan(frequency[test.start], frequency[-1], color="0.95", zorder=0)
    axes.set_ylim(min(-0.05, *(float(curve.min()) - 0.03 for curve, *_ in styles)), 1.03)
    axes.set_xlabel("Spatial frequency (1/Å) and resolution (Å)")
    axes.set_ylabel("Fourier shell correlation")
    axes.axhline(0, color="0.6", linewidth=0.8)
    for level in (0.143, 0.5):
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
        axes.text(1.01, level, f"{level}", va="center", color="0.4", transform=axes.get_yaxis_transform())
    for curve, label, color, width in styles:
        axes.plot(frequency, curve, color=color, linewidth=width, label=label)
    final = result.resolution(threshold)
    if np.isfinite(final):
        axes.axvline(1 / final, color="0.3", linewidth=0.8, linestyle=":")
        axes.set_title(f"{final:.2f} Å at FSC = {threshold:g}")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}\n{1 / x:.1f} Å" if x > 0 else "0")
    figure.legend(frameon=False, loc="outside lower center", ncols=4 if len(styles) <= 4 else 3)
    save_figure(figure, path)
