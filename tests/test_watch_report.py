"""The page of ``cryored watch --report``, as text and as a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

import cryored
from cryored.errors import OutputError
from cryored.refinement.report import Report, _most_crowded, _resolution_axis
from cryored.refinement.report_figures import Axis, Line, chart, grey_png, round_axis, shades
from cryored.refinement.watch_table import Entry

BOX = 96
ANGPIX = 1.5
FREQUENCY = np.arange(BOX // 2 + 1) / (BOX * ANGPIX)
WINDOW = (1100, 4000)


def curve(iteration):
    """Return an FSC that falls to 0.5 at a frequency that grows from iteration to iteration."""
    return 1 / (1 + np.exp((FREQUENCY - 0.05 - 0.02 * iteration) / 0.006))


def section(kind, iteration):
    """Return a picture that tells what it is of: a few blobs whose places depend on kind and iteration."""
    rng = np.random.default_rng([iteration, *kind.encode()])
    y, x = np.mgrid[:BOX, :BOX]
    blobs = [np.exp(-((y - b) ** 2 + (x - a) ** 2) / 60) for a, b in rng.uniform(15, BOX - 15, (4, 2))]
    return sum(blobs).astype(np.float32)


def sections(iteration, kinds=("unregularised", "denoised", "result")):
    return {kind: section(kind, iteration) for kind in kinds}


def entry(iteration, half=1, *, part=1, resolution=8.0, lam=0.5, change=0.1, error=""):
    halves = "" if half is None else f"_half{half}"
    name = f"run_it{iteration:03d}{halves}_class{part:03d}"
    return Entry(name, iteration, half, resolution, lam, {"read": 0.125, "map": 0.25}, change, "CPU", error)


def refinement(path, iterations=10):
    """Return the report of an auto-refinement with one request that failed."""
    report = Report(path, "Refine3D/job012 & <more>", {"Model": "cwred, sha256 0123456789ab"})
    for iteration in range(1, iterations + 1):
        for half in (2, 1) if iteration % 2 else (1, 2):  # whichever is ready first
            values = {"resolution": math.inf if iteration == 1 else 20 / iteration, "lam": iteration / 20}
            item = entry(iteration, half, change=0.01 * iteration * half, **values)
            report.add(item, FREQUENCY, curve(iteration), sections(iteration + 100 * (half == 2)))
    report.add(entry(iterations, 2, error="weight.mrc: <nan>, expected numbers & no more"))
    report.add(entry(iterations + 1, None, resolution=1.9), FREQUENCY, curve(iterations), sections(iterations + 1))
    return report


def page(report, path):
    report.write()
    return path.read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.html"


def pictures(text):
    """Return kind, iteration, map -> pixels of all pictures of a page, the large before the small."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="(\w+), iteration (\d+), ([^"]*)"', text)
    return [
        ((kind, int(iteration), label), imread(io.BytesIO(base64.b64decode(data))))
        for data, kind, iteration, label in found
    ]


# --- the page as text


def test_the_page_needs_nothing_else(path):
    text = page(refinement(path), path)
    assert "http" not in text
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text)
    assert "url(" not in text


def test_head_failures_and_requests(path):
    text = page(refinement(path), path)
    assert "<h1>Refine3D/job012 &amp; &lt;more&gt;</h1>" in text
    assert "<dt>Model</dt><dd>cwred, sha256 0123456789ab</dd>" in text
    assert f"<dt>cryored</dt><dd>{cryored.__version__}</dd>" in text
    assert "<li>run_it010_half2_class001: weight.mrc: &lt;nan&gt;, expected numbers &amp; no more</li>" in text
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(<td>run_.*?)</tr>", text)]
    assert len(rows) == 22
    assert rows[1] == [
        "run_it001_half1_class001",
        "none",
        "0.050",
        "",
        "0.12",
        "0.25",
        *[""] * 5,
        "1.00",
        "1.000",
        "CPU",
    ]
    assert rows[20] == ["run_it010_half2_class001", "8.00", "", "", "0.12", "0.25", *[""] * 5, "failed", "", "CPU"]
    assert "must not be quoted" in text


def test_each_iteration_has_one_curve_and_each_name_one_course(path):
    text = page(refinement(path), path)
    charts = re.findall(r'<svg.*?aria-label="(.*?)">(.*?)</svg>', text, re.S)
    drawn = {title: re.findall(r"<polyline .*?<title>(.*?)</title>", content, re.S) for title, content in charts}
    assert drawn == {
        "half-map FSC": [f"iteration {iteration}" for iteration in range(1, 12)],
        "nominal resolution (Å)": ["nominal resolution (Å)"],
        "weight of the prior, λ": ["weight of the prior, λ"],
        "change against MAP (%)": ["half 1", "half 2", "joined"],
    }


def test_the_latest_maps_are_large_and_the_strip_is_spread_out(path):
    items = pictures(page(refinement(path, 40), path))
    large, small = items[:3], items[3:]
    for (kind, iteration, label), pixels in large:
        assert (iteration, label, pixels.shape) == (41, "joined", (BOX, BOX))
        expected = section(kind, iteration)[::-1]
        assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.999
    kinds = [kind for (kind, _, _), _ in small]
    assert kinds == ["unregularised"] * 12 + ["denoised"] * 12 + ["result"] * 12
    iterations = [iteration for (_, iteration, _), _ in small][:12]
    assert (iterations[0], iterations[-1]) == (1, 41)
    assert max(np.diff(iterations)) <= 8  # 40 iterations, 11 gaps, and whoever comes first does not know how many
    labels = {label for (_, _, label), _ in small}
    assert labels == {"half 1", "joined"}


def test_a_map_of_lambda_0_has_no_denoised_one(path):
    report = Report(path, "job", {})
    report.add(entry(1, lam=0.0, change=0.0), FREQUENCY, curve(1), sections(1, ("unregularised", "result")))
    found = [key for key, _ in pictures(page(report, path))]
    assert found == [("unregularised", 1, "half 1"), ("result", 1, "half 1")]


def test_class3d_is_told_apart_by_class(path):
    report = Report(path, "Class3D/job007", {})
    for iteration in (1, 2):
        for part in range(1, 11):
            item = entry(iteration, None, part=part, resolution=None)
            report.add(item, FREQUENCY, np.zeros_like(FREQUENCY), sections(iteration))
    text = page(report, path)
    assert "Half-map FSC" not in text
    assert "nominal resolution (Å)" not in text
    assert re.findall(r"<h3>(.*?)</h3>", text) == [f"iteration 2, class {part}" for part in range(1, 11)]
    assert len(pictures(text)) == 10 * (3 + 2 * 3)


def test_a_page_without_requests_and_one_of_an_unknown_name(path):
    report = Report(path, "job", {})
    assert "<h1>job</h1>" in page(report, path)
    report.add(Entry("mine", None, None, None, 0.0, {}, 0.0, "CPU"), FREQUENCY, curve(1), sections(1))
    assert "<td>mine</td>" in page(report, path)


def test_the_previous_page_stays_where_there_is_no_space(path, monkeypatch):
    report = Report(path, "job", {})
    before = page(report, path)

    def full(self, *arguments, **more):
        raise OSError(28, "No space left on device")

    report.add(entry(1))
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OutputError, match=r"report\.html: cannot be written: No space left on device"):
        report.write()
    assert path.read_text() == before
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]


# --- its figures


@pytest.mark.parametrize(
    ("values", "whole", "ends", "labels"),
    [
        ([3.0, 9.6], False, (2, 10), ["2", "4", "6", "8", "10"]),
        ([0.0, 0.0], False, (0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([0.3, 0.7], False, (0.3, 0.7), ["0.3", "0.4", "0.5", "0.6", "0.7"]),
        ([4.5], False, (4.4, 5.6), ["4.4", "4.6", "4.8", "5", "5.2", "5.4", "5.6"]),
        ([1, 2, 3], True, (0.5, 3.5), ["1", "2", "3"]),
        ([4], True, (3.5, 4.5), ["4"]),
        ([1, 25], True, (0.5, 25.5), ["5", "10", "15", "20", "25"]),
    ],
)
def test_axes_are_round(values, whole, ends, labels):
    axis = round_axis("title", values, whole=whole)
    assert (axis.low, axis.high) == pytest.approx(ends)
    assert [text for _, text in axis.ticks] == labels
    assert [place for place, _ in axis.ticks] == pytest.approx([float(text) for text in labels])


@pytest.mark.parametrize("angpix", [0.5, 0.83, 1.5, 3.0, 6.0])
def test_resolutions_lie_at_their_frequencies(angpix):
    end = 1 / (2 * angpix)
    ticks = sorted(_resolution_axis(end).ticks)
    assert len(ticks) >= 4
    assert all(place == pytest.approx(1 / float(text)) for place, text in ticks)
    assert min(np.diff([place for place, _ in ticks])) >= 0.05 * end
    assert ticks[-1][0] <= end


def test_a_chart_puts_values_where_its_ticks_are():
    x = Axis("x", 0, 4, [(1, "one"), (4, "four")])
    y = Axis("y", -1, 1, [(0, "zero")])
    drawn = chart([Line([1, 4], [0, 1], "#123456", "<it>", points=True)], x, y, size=(400, 200), level=0.0)
    places = re.search(r'points="(.*?)"', drawn)[1].split()
    (left, middle), (right, top) = (map(float, place.split(",")) for place in places)
    assert re.findall(r'd="M([\d.]+) 0V', drawn) == [f"{left:.1f}", f"{right:.1f}"]
    assert set(re.findall(r'd="M0 ([\d.]+)H', drawn)) == {f"{middle:.1f}"}  # the tick and the level
    assert top == 0
    assert re.findall(r'<circle cx="(.*?)" cy="(.*?)"', drawn) == [tuple(place.split(",")) for place in places]
    assert "&lt;it&gt;" in drawn


def test_shades_go_from_light_to_dark():
    brightness = [sum(bytes.fromhex(shade[1:])) for shade in shades(30)]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == 30
    assert shades(1) == shades(7)[-1:]


def test_of_a_row_of_iterations_the_most_crowded_goes():
    assert _most_crowded([1, 5, 6, 8, 12]) == 6
    kept = []
    for iteration in range(1, 100):
        kept.append(iteration)
        if len(kept) > 12:
            kept.remove(_most_crowded(kept))
    assert (kept[0], kept[-1]) == (1, 99)
    assert max(np.diff(kept)) <= 2.5 * 98 / 11


@pytest.mark.parametrize(("shape", "edge", "expected"), [((96, 96), 480, (96, 96)), ((100, 67), 30, (25, 16))])
def test_a_png_holds_the_section_with_y_upwards(shape, edge, expected):
    y, x = np.mgrid[: shape[0], : shape[1]]
    pixels = imread(io.BytesIO(grey_png((3 * y + x).astype(np.float32), edge)))
    assert pixels.shape == expected
    block = shape[0] // expected[0]
    y, x = np.mgrid[: expected[0], : expected[1]]
    inside = (pixels > 0) & (pixels < 1)  # beyond its percentiles a section is black or white
    assert 0.98 < inside.mean() < 1
    grey = (3 * y + x)[::-1] * block
    assert np.corrcoef(pixels[inside], grey[inside])[0, 1] > 0.9999


def test_a_section_that_is_not_finite_is_a_picture(path):
    section = np.full((8, 8), np.nan, dtype=np.float32)
    section[2] = np.inf
    assert imread(io.BytesIO(grey_png(section, 8))).max() == 0
    section[3] = 1
    assert imread(io.BytesIO(grey_png(section, 8)))[4].min() == 1  # y goes upwards


def test_a_constant_section_is_black():
    assert not imread(io.BytesIO(grey_png(np.full((8, 8), 3.0, np.float32), 8))).any()


# --- the page in a browser

SEEN = """<script>
window.onload = () => {
  const box = (element) => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const seen = {
    width: document.documentElement.scrollWidth,
    height: document.body.getBoundingClientRect().bottom,
    text: document.body.innerText,
    images: [...document.images].map((image) => ({
      label: image.alt, pixels: [image.naturalWidth, image.naturalHeight], box: box(image) })),
    lines: [...document.querySelectorAll("polyline")].map((line) => ({
      chart: line.closest("svg").getAttribute("aria-label"), label: line.textContent,
      colour: line.getAttribute("stroke"), box: box(line) })),
    words: [...document.querySelectorAll("svg text")].map((word) => ({ text: word.textContent, box: box(word) })),
  };
  const store = document.createElement("script");
  store.type = "application/json";
  store.id = "seen";
  store.textContent = JSON.stringify(seen).replace(/</g, "\\\\u003c");
  document.body.append(store);
};
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs chromium, to look at the report as a browser shows it")
    return found


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """Return what a browser tells of a page, and its picture of it (row, column, RGB from 0 to 1)."""
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    text = page(refinement(path), path)
    # What is looked at is a copy, with a script that writes down where things are.
    path.write_text(text.replace("</body>", SEEN + "</body>"), encoding="utf-8")

    def look(option):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={WINDOW[0]},{WINDOW[1]}", option]
        return subprocess.run([*command, path.as_uri()], capture_output=True, check=True, timeout=120, cwd=folder)

    tree = look("--dump-dom").stdout.decode()
    look(f"--screenshot={folder / 'shot.png'}")
    shot = imread(folder / "shot.png")[..., :3]
    seen = json.loads(re.search(r'id="seen">(.*?)</script>', tree, re.S)[1])
    assert shot.shape[:2] == WINDOW[::-1]
    assert seen["height"] < 0.9 * WINDOW[1]  # so the picture holds the whole page
    return seen, shot


def share_of(pixel, colour):
    """Return how much of a colour there is in a pixel beside white, 0 where anything else is."""
    missing = 1 - np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    share = (1 - pixel) @ missing / (missing @ missing)
    return np.where(np.linalg.norm(1 - pixel - share[..., None] * missing, axis=-1) < 0.06, share, 0)


@pytest.mark.slow
def test_the_browser_shows_all_pictures(shown):
    seen, shot = shown
    assert len(seen["images"]) == 3 + 3 * 11
    for image in seen["images"]:
        assert image["pixels"] == [BOX, BOX]
        left, top, right, bottom = image["box"]
        kind, iteration = re.match(r"(\w+), iteration (\d+)", image["label"]).groups()
        # The screen's pixel under the centre of each of the section's; at the edges it may belong to the page.
        inner = slice(3, BOX - 3)
        expected = section(kind, int(iteration))[::-1][inner, inner]
        centres = (np.arange(BOX)[inner] + 0.5) / BOX
        rows = (top + centres * (bottom - top)).astype(int)
        columns = (left + centres * (right - left)).astype(int)
        there = shot[np.ix_(rows, columns)].mean(-1)
        assert np.corrcoef(there.ravel(), expected.ravel())[0, 1] > 0.97, image["label"]


def test_the_browser_shows_all_fsc_curves(shown):
    seen, shot = shown
    lines = [line for line in seen["lines"] if line["chart"] == "half-map FSC"]
    assert [line["label"] for line in lines] == [f"iteration {iteration}" for iteration in range(1, 12)]
    for line in lines[:-1]:  # the joined one has the last one's curve, and lies over it
        iteration = int(line["label"].split()[1])
        fsc = curve(iteration) if iteration < 10 else curve(10)
        colour = line["colour"] if iteration < 10 else lines[-1]["colour"]
        left, top, right, bottom = line["box"]
        slope = np.flatnonzero((fsc > 0.15) & (fsc < 0.9))
        assert len(slope) >= 3
        for shell in slope:
            column = round(left + FREQUENCY[shell] / FREQUENCY[-1] * (right - left))
            row = round(bottom - (fsc[shell] - fsc.min()) / (fsc.max() - fsc.min()) * (bottom - top))
            around = shot[row - 2 : row + 3, column - 2 : column + 3]
            assert share_of(around, colour).max() > 0.5, (iteration, shell)


def test_the_browser_shows_the_courses(shown):
    seen, shot = shown
    lines = [line for line in seen["lines"] if line["chart"] != "half-map FSC"]
    assert len(lines) == 5
    for line in lines:
        left, top, right, bottom = (round(value) for value in line["box"])
        area = shot[top - 3 : bottom + 4, left - 3 : right + 4]
        if right - left < 2:  # the one joined map: a mark
            assert (share_of(area, line["colour"]) > 0.5).sum() >= 9
        else:
            assert (share_of(area, line["colour"]) > 0.5).any(0).mean() > 0.9


def test_the_page_is_laid_out_within_the_window(shown):
    seen, shot = shown
    assert seen["width"] <= WINDOW[0]
    assert "weight.mrc: <nan>, expected numbers & no more" in seen["text"]
    boxes = [word["box"] for word in seen["words"] if word["text"]]
    assert len(boxes) > 40
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert right - left > 3
        for other in boxes[:index]:
            apart = other[0] >= right or other[2] <= left or other[1] >= bottom or other[3] <= top
            assert apart, "two texts of a chart overlap"
