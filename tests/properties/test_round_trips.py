"""What is written is read again, and what is resampled comes back, whatever the shape and the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cryored.files.mrc import read_volume, write_volume
from cryored.files.star import format_star, parse_star
from cryored.maps.fourier import frequencies, half_frequencies
from cryored.maps.resample import fourier_resize, from_grid, plan_axis, to_grid
from cryored.maps.volume import Volume, window

# No deadlines: the clock decides no test. The same examples each time, and no database in the current folder.
quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)

edges = st.integers(2, 9)
lengths = st.integers(1, 9)
float32 = st.floats(-(2.0**50), 2.0**50, width=32)  # mrcfile sums squares in float32 for the header's rms
labels = st.from_regex(r"\A[a-z][a-z0-9]{0,20}\Z")  # STAR does not tell capitals apart
# What names of files and comments hold; line breaks have no place in RELION's tables.
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@pytest.mark.slow
@quick
@given(
    data=hnp.arrays(np.float32, st.tuples(edges, edges, edges), elements=float32),
    voxel_size=st.floats(0.1, 50.0),
    origin=st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 3),
    nstart=st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 3),
)
def test_mrc(tmp_path_factory, data, voxel_size, origin, nstart):
    path = tmp_path_factory.getbasetemp() / "round_trip.mrc"
    write_volume(path, Volume(data, voxel_size, origin, nstart), label="test")
    again = read_volume(path)
    np.testing.assert_array_equal(again.data, data)
    assert again.origin == origin
    assert again.nstart == nstart
    assert abs(again.voxel_size / voxel_size - 1) < 1e-5  # it is read to six digits, which undo the float32 cell


@pytest.mark.slow
@quick
@example({"dot": ".", "unknown": "?", "empty": "", "comment": "#1", "word": "loop_", "list": "[1]", "text": ";"})
@example({"path": '/maps of \'23/a "b".mrc', "hole": "a ' b \" c"})
@given(st.dictionaries(labels, texts | st.integers(-(10**9), 10**9), min_size=1, max_size=5))
def test_star_lists(items):
    star = parse_star(format_star({"general": items}).encode(), "s")
    assert {label: star.text("general", label) for label in items} == {
        label: value if isinstance(value, str) else str(value) for label, value in items.items()
    }


@pytest.mark.slow
@quick
@given(
    st.lists(labels, min_size=3, max_size=3, unique=True),
    st.lists(
        st.tuples(texts, st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False)),
        min_size=1,
        max_size=5,
    ),
)
def test_star_loops(names, rows):
    columns = dict(zip(names, (list(column) for column in zip(*rows, strict=True)), strict=True))
    star = parse_star(format_star({"first": {"made": 1}, "table": columns}).encode(), "s")
    assert star.blocks() == ["first", "table"]
    assert star.texts("table", names[0]) == columns[names[0]]
    assert [int(text) for text in star.texts("table", names[1])] == columns[names[1]]
    # Six decimals, or six of the mantissa: half a unit of the last.
    np.testing.assert_allclose(star.numbers("table", names[2]), columns[names[2]], rtol=5.1e-7, atol=5.1e-7)


def band_limited(shape, edge, seed):
    """White noise without the frequencies from `edge` (in units of each axis) on."""
    transform = np.fft.rfftn(np.random.default_rng(seed).standard_normal(shape))
    for axis, (n, limit) in enumerate(zip(shape, edge, strict=True)):
        k = half_frequencies(n) if axis == 2 else frequencies(n)
        transform *= (np.abs(k) < limit).reshape([-1 if a == axis else 1 for a in range(3)])
    return np.fft.fftshift(np.fft.irfftn(transform, s=shape, axes=(0, 1, 2)))


@quick
@given(st.tuples(lengths, lengths, lengths), st.tuples(lengths, lengths, lengths), st.integers(0, 99))
def test_resampling_there_and_back(shape, other, seed):
    """Below both Nyquist frequencies nothing is lost, finer or coarser, odd or even."""
    limits = [(min(a, b) + 1) // 2 for a, b in zip(shape, other, strict=True)]
    data = band_limited(shape, limits, seed)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):  # a few units of rounding of values near 4
        there = fourier_resize(data.astype(dtype), other, 1)
        assert there.shape == other
        assert there.dtype == dtype
        np.testing.assert_allclose(fourier_resize(there, shape, 1), data, atol=tolerance)


@quick
@given(st.integers(3, 12), st.integers(1, 12), st.floats(0.4, 6.0), st.integers(0, 99), st.floats(-2.0, 2.0))
def test_grids_there_and_back(n, more, voxel_size, seed, fill):
    """A finer grid loses nothing but the lone coefficients at Nyquist, which a band limit spares."""
    shape = (n, n, n)
    grids = tuple(plan_axis(size, voxel_size, voxel_size * n / (n + more)) for size in shape)
    assert {(grid.padded, grid.resampled) for grid in grids} == {(n, n + more)}
    data = band_limited(shape, [(n + 1) // 2] * 3, seed)
    again = from_grid(to_grid(data, grids, fill), grids)
    np.testing.assert_allclose(again, data, atol=1e-12)  # a few units of rounding of values near 4


@quick
@given(st.tuples(lengths, lengths, lengths), st.tuples(lengths, lengths, lengths), st.floats(-2.0, 2.0))
def test_window_pads_and_crops(shape, margin, fill):
    data = np.random.default_rng(1).standard_normal(shape)
    larger = tuple(a + b for a, b in zip(shape, margin, strict=True))
    padded = window(data, larger, fill)
    np.testing.assert_array_equal(window(padded, shape), data)
    # The centre is where it was, and all that was added has the value asked for.
    centre, outer = tuple(n // 2 for n in shape), tuple(n // 2 for n in larger)
    assert padded[outer] == data[centre]
    assert np.count_nonzero(padded == fill) >= padded.size - data.size
    np.testing.assert_allclose(padded.sum() - fill * (padded.size - data.size), data.sum(), atol=1e-9)  # of 6000 terms
