"""What the figures show."""

import pandas as pd
import pytest

from dashboard import charts

COLOURS = {"base": "#112233", "other": "#445566"}


def test_strip_draws_interval_dots_and_margin():
    """A card's strip has the margin band around 0, the interval, its mean and a dot for each seed."""
    figure = charts.interval_strip([1.0, 3.0], effect=2.0, low=0.5, high=3.5, margin=2.0, colour="#009E73")
    interval, mean, dots = figure.data
    assert (tuple(interval.x), tuple(mean.x), tuple(dots.x)) == ((0.5, 3.5), (2.0,), (1.0, 3.0))
    assert {trace.marker.color for trace in (mean, dots)} == {"#009E73"}
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].x1) == (-2.0, 2.0)


@pytest.mark.parametrize(("low", "high"), [(-9.0, 1.0), (0.1, 0.2), (1.0, 30.0)])
def test_strip_is_centred_on_zero_and_shows_everything(low, high):
    """The eye compares cards: 0 stands in the middle, and neither interval nor margin is cut off."""
    axis = charts.interval_strip([low, high], effect=low, low=low, high=high, margin=2.0, colour="#009E73").layout.xaxis
    assert axis.range[0] == -axis.range[1]
    assert axis.range[1] > max(abs(low), abs(high), 2.0)


def test_strip_without_an_interval_draws_dots_alone():
    """One pair has a dot and nothing else."""
    figure = charts.interval_strip([1.0], effect=None, low=None, high=None, margin=2.0, colour="#009E73")
    assert [tuple(trace.x) for trace in figure.data] == [(1.0,)]


def test_forest_has_a_row_for_each_variant():
    """Rows stand in the order given, first on top, with n beside the name and the unit on the axis."""
    differences = pd.DataFrame(
        {"variant": ["other", "base"], "effect": [1.0, -2.0], "low": [0.0, -3.0], "high": [2.0, -1.0], "n": [5, 4]}
    )
    dots = pd.DataFrame({"variant": ["other", "other"], "seed": [0, 1], "difference": [0.5, 1.5]})
    figure = charts.forest(differences, dots, baseline="control", margin=2.0, colours=COLOURS, unit="AP points")
    assert figure.layout.yaxis.ticktext == ("other  (n=5)", "base  (n=4)")
    assert figure.layout.yaxis.tickvals[0] > figure.layout.yaxis.tickvals[1]
    assert figure.layout.xaxis.title.text == "variant minus control, AP points"
    assert [trace.marker.color for trace in figure.data if trace.marker.symbol == "diamond"] == ["#445566", "#112233"]
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].x1) == (-2.0, 2.0)


def test_forest_without_a_margin_has_no_band():
    """A band that nobody declared would be read as a margin; the line at 0 stays."""
    differences = pd.DataFrame({"variant": ["other"], "effect": [1.0], "low": [0.0], "high": [2.0], "n": [5]})
    dots = pd.DataFrame({"variant": [], "seed": [], "difference": []})
    figure = charts.forest(differences, dots, baseline="base", margin=None, colours=COLOURS, unit="AP50 points")
    assert [(shape.type, shape.x0) for shape in figure.layout.shapes] == [("line", 0)]


def curve_frames():
    """Return the bands and lines of two variants, the second with one seed."""
    nan = float("nan")
    bands = pd.DataFrame(
        {
            "variant": ["base", "base", "other"],
            "x": [1.0, 2.0, 1.0],
            "mean": [10.0, 20.0, 15.0],
            "low": [8.0, 18.0, nan],
            "high": [12.0, 22.0, nan],
            "n": [2, 2, 1],
        }
    )
    lines = pd.DataFrame(
        {"variant": ["base"] * 4, "seed": [0, 0, 1, 1], "x": [1.0, 2.0] * 2, "value": [9.0, 19.0, 11.0, 21.0]}
    )
    return bands, lines


@pytest.mark.parametrize(("show_seeds", "thin"), [(True, 1), (False, 0)])
def test_curves_draw_seeds_when_asked(show_seeds, thin):
    """Every seed is a thin line of its own in the colour of its variant, and only when asked for."""
    figure = charts.curves(
        *curve_frames(), x_title="epoch", y_title="AP, points", colours=COLOURS, show_seeds=show_seeds
    )
    lines = [trace for trace in figure.data if trace.line.width == 1]
    assert [trace.line.color for trace in lines] == ["#112233"] * thin
    for line in lines:
        assert list(zip(line.x, line.y, line.customdata, strict=True)) == [
            (1.0, 9.0, [0]),
            (2.0, 19.0, [0]),
            (None, None, [0]),
            (1.0, 11.0, [1]),
            (2.0, 21.0, [1]),
            (None, None, [1]),
        ]
    means = {trace.name: tuple(trace.y) for trace in figure.data if trace.line.width == 2.5}
    assert means == {"base": (10.0, 20.0), "other": (15.0,)}
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("epoch", "AP, points")


def test_band_closes_around_the_known_intervals():
    """A band goes along the upper bounds and back along the lower; one seed has no band."""
    figure = charts.curves(*curve_frames(), x_title="epoch", y_title="AP, points", colours=COLOURS, show_seeds=False)
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [tuple(band.y) for band in bands] == [(12.0, 22.0, 18.0, 8.0), ()]
    assert {band.mode for band in bands} == {"lines"}
    assert bands[0].fillcolor.startswith("rgba(17, 34, 51")


def test_curves_stay_on_the_scale_of_the_scores():
    """The interval of two seeds can be wider than all AP there is; the lines must stay legible."""
    bands, lines = curve_frames()
    bands.loc[0, ["low", "high"]] = [-80.0, 100.0]
    figure = charts.curves(bands, lines, x_title="epoch", y_title="AP, points", colours=COLOURS, show_seeds=False)
    assert tuple(figure.layout.yaxis.range) == pytest.approx((0, 1.15 * 21.0))


def test_classes_are_rows_and_variants_share_them():
    """Variants of one class stand side by side in its row, with their spread."""
    frame = pd.DataFrame(
        {
            "variant": ["base", "other", "base", "other"],
            "class": ["ring", "ring", "disc", "disc"],
            "mean": [10.0, 12.0, 30.0, 33.0],
            "sd": [1.0, 2.0, 1.0, 2.0],
            "n": [5, 5, 5, 5],
        }
    )
    figure = charts.per_class(frame, x_title="AP, points", colours=COLOURS)
    base, other = figure.data
    assert figure.layout.yaxis.ticktext == ("ring", "disc")
    assert base.y[0] > other.y[0] > base.y[1] > other.y[1]
    assert tuple(other.error_x.array) == (2.0, 2.0)
