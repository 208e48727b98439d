"""What pictures show is within their frames, and nothing in it is covered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cryored.assessment.fsc_of_files import FscOptions, fsc_files
from cryored.files.fsc_tables import draw_fsc
from cryored.maps.fsc import SubstitutedFsc
from cryored.prior.lambda_schedule import Schedule, draw_schedule
from cryored.training.calibration import Moments, draw_weights
from cryored.training.evaluation import Judgement, draw_judgements

PKA = Path(__file__).parent / "data" / "postprocess_pka"


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of files, laid out as they would be written."""
    figures = []

    def keep(figure, path):
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr("cryored.files.plots.save_figure", keep)
    return figures


@pytest.mark.parametrize("resolution", [2.0, 3.43, 9.0, 15.9])
def test_the_mark_of_a_schedule_stays_in_the_frame(drawn, resolution):
    draw_schedule("a.png", Schedule(), resolution)
    (axes,) = drawn[0].axes
    frame, (mark,) = axes.get_window_extent(), axes.texts
    assert frame.x0 < mark.get_window_extent().x0
    assert mark.get_window_extent().x1 < frame.x1


def test_dots_are_whole(drawn):
    items = [Judgement("s", "run_it005_half1", 8.0, 1, 1, error, 1, 1, 9.0, 9.0, {}) for error in (0.9999, 1.0)]
    draw_judgements("a.png", items)
    bottom, top = drawn[0].axes[0].get_ylim()
    assert (bottom, top) == (0, pytest.approx(1.05))


def test_legend_and_levels_cover_no_curve(drawn):
    result = fsc_files(*(PKA / f"run_half{half}_class001_unfil.mrc" for half in (1, 2)), FscOptions(PKA / "mask.mrc"))
    flat = np.full(len(result.unmasked), 0.143)
    for test in (None, SubstitutedFsc(16, flat, flat, flat)):
        draw_fsc("a.png", replace(result, substituted=test))
    for figure in drawn:
        (axes,), (legend,) = figure.axes, figure.legends
        frame, box = axes.get_window_extent(), legend.get_window_extent()
        assert box.y1 < frame.y0
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert all(text.get_window_extent().x0 > frame.x1 for text in axes.texts)


def test_the_error_of_a_useless_prior_is_not_cut_off(drawn):
    ones = np.ones(9)
    useless = Moments(
        "a", 8.0, np.linspace(0.1, 0.9, 9), 1 / np.linspace(0.1, 0.9, 9), 9 * ones, ones, 0 * ones, 0 * ones
    )
    draw_weights("a.png", {}, [useless])
    right = drawn[0].axes[2]
    highest = max(float(np.nanmax(line.get_ydata())) for line in right.lines)
    assert 2 < highest < right.get_ylim()[1]
