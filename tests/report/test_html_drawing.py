"""Charts: axes with round values, boxes and curves at the right places, one description drawn as SVG and as PNG."""

import re
from xml.etree import ElementTree  # the project's own output

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scripts.report.html.axes import Axis, fitted_range, tick_text
from scripts.report.html.charts import (
    MOST_DOTS,
    Box,
    agreement_chart,
    bin_chart,
    box_chart,
    curve_chart,
    thinned,
    whisker_ends,
)
from scripts.report.html.drawing import (
    SERIES,
    Area,
    Curve,
    Dot,
    Drawing,
    Label,
    rectangle,
    svg_text,
    text_width,
    write_png,
)

SVG = "{http://www.w3.org/2000/svg}"


def parsed(text):
    return ElementTree.fromstring(text)  # noqa: S314  # the project's own output


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.12, 0.93], (0.0, 1.0)),
        ([3, 47], (0.0, 50.0)),
        ([-3, 2], (-3.0, 2.0)),
        ([5, 5], (4.5, 5.5)),
        ([], (0.0, 1.0)),
    ],
)
def test_ranges_have_round_ends(values, expected):
    assert fitted_range(values) == pytest.approx(expected)


def test_a_range_holds_what_it_must():
    assert fitted_range([0.4, 0.5], least=0, most=1) == (0, 1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_a_range_holds_all_values_and_ticks_lie_on_it(values):
    low, high = fitted_range(values)
    slack = 1e-9 * (high - low)
    assert low - slack <= min(values) <= max(values) <= high + slack
    ticks = Axis(low, high, start=0, end=100).ticks()
    assert ticks == sorted(ticks)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= 7


def test_an_axis_upwards_turns_values_round():
    axis = Axis(2, 4, start=100, end=20)
    assert [axis.at(2), axis.at(3), axis.at(4)] == [100, 60, 20]
    assert [tick_text(tick) for tick in Axis(0, 1, start=0, end=1).ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_whiskers_end_within_one_and_a_half_boxes():
    # Quartiles 2 and 4, so that whiskers reach to -1 and 7 at most.
    assert whisker_ends(np.array([0, 2, 3, 4, 20.0])) == (0, 4)
    assert whisker_ends(np.array([5.0])) == (5, 5)


def boxes(*values, series="run"):
    return [Box(f"class {i}", series, np.array(each, dtype=float)) for i, each in enumerate(values)]


def test_a_box_stands_where_its_quartiles_are():
    chart = box_chart(boxes([0, 2, 3, 4, 11]), name="b", title="t", axis_title="mm", least=0, most=20)
    labels = {shape.text: shape.at[0] for shape in chart.shapes if isinstance(shape, Label)}
    scale = Axis(0, 20, start=labels["0"], end=labels["20"])
    box, mean = (shape for shape in chart.shapes if isinstance(shape, Area))
    assert [box.points[0][0], box.points[1][0]] == pytest.approx([scale.at(2), scale.at(4)])
    assert np.mean([x for x, _ in mean.points]) == pytest.approx(scale.at(4))  # (0 + 2 + 3 + 4 + 11) / 5
    median = next(shape for shape in chart.shapes if isinstance(shape, Curve) and shape.width > 2)
    assert median.points[0][0] == pytest.approx(scale.at(3))
    dots = [shape.centre[0] for shape in chart.shapes if isinstance(shape, Dot)]
    assert dots == pytest.approx([scale.at(value) for value in (0, 2, 3, 4, 11)])
    assert "class 0: median 3, quartiles 2 to 4, 5 cases" in chart.description


def test_of_many_cases_only_those_beyond_the_whiskers_are_rings():
    values = [*np.linspace(0, 1, MOST_DOTS), 9.0]
    chart = box_chart(boxes(values), name="b", title="t", axis_title="mm")
    assert sum(isinstance(shape, Dot) for shape in chart.shapes) == 1


def test_an_empty_box_says_so():
    chart = box_chart(boxes([], [1, 2]), name="b", title="t", axis_title="mm")
    assert "no case" in [shape.text for shape in chart.shapes if isinstance(shape, Label)]
    assert chart.description.startswith("class 0: no case; class 1: median 1.5")


def test_runs_have_their_own_colours_and_a_legend():
    chart = box_chart(
        [*boxes([1, 2], series="first"), *boxes([2, 3], series="second")], name="b", title="t", axis_title="mm"
    )
    texts = [shape.text for shape in chart.shapes if isinstance(shape, Label)]
    assert {"first", "second"} <= set(texts)
    assert texts.count("class 0") == 1
    assert {shape.edge for shape in chart.shapes if isinstance(shape, Area)} == {None, *SERIES[:2]}


@pytest.mark.parametrize("runs", [2, 6])
def test_long_names_of_many_runs_all_find_room(runs):
    names = [f"a rather long folder of run number {number}/evaluation" for number in range(runs)]
    drawn = [Box("liver", name, np.array([0.2, 0.4])) for name in names]
    chart = box_chart(drawn, name="b", title="t", axis_title="DSC")
    labels = {shape.text: shape.at for shape in chart.shapes if isinstance(shape, Label)}
    for name in names:
        x, y = labels[name]
        assert x + text_width(name) <= chart.width
        assert y < min(dot.centre[1] for dot in chart.shapes if isinstance(dot, Dot))
    lines = sorted({labels[name][1] for name in names})
    assert len(lines) == -(-runs // 2)
    assert np.diff(lines).tolist() == [20.0] * (len(lines) - 1)


def test_every_series_is_legible_on_white():
    """Contrast of at least 4.5 to 1, as WCAG 2.1 asks of text (https://www.w3.org/TR/WCAG21/#contrast-minimum)."""
    for colour in SERIES:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = np.dot([0.2126, 0.7152, 0.0722], linear)
        assert 1.05 / (luminance + 0.05) >= 4.5, colour


def test_a_long_curve_keeps_its_mean_and_its_extremes():
    x, y = np.arange(1000.0), np.sin(np.arange(1000.0))
    middle, mean, low, high = thinned(x, y, most=10)
    assert middle.tolist() == [49.5 + 100 * i for i in range(10)]
    assert mean == pytest.approx(y.reshape(10, 100).mean(axis=1))
    assert low == pytest.approx(y.reshape(10, 100).min(axis=1))
    assert high == pytest.approx(y.reshape(10, 100).max(axis=1))
    assert thinned(x[:10], y[:10], most=10)[1].tolist() == y[:10].tolist()


def test_a_curve_goes_through_its_points_and_leaves_gaps_out():
    chart = curve_chart(
        np.array([0, 1, 2, 3.0]), np.array([0, np.nan, np.inf, 5.0]), name="c", title="loss", axis_title="epoch"
    )
    line = next(shape for shape in chart.shapes if isinstance(shape, Curve) and shape.width == 1.5)
    labels = {shape.text: shape.at for shape in chart.shapes if isinstance(shape, Label)}
    assert len(line.points) == 2
    assert line.points[1][0] == pytest.approx(labels["3"][0])
    assert line.points[1][1] < line.points[0][1]  # upwards
    assert chart.description == "loss over epoch, from 0 to 5; smallest 0, largest 5."


@pytest.mark.parametrize("values", [[], [np.nan], [0.5]])
def test_curves_of_nothing_and_of_one_point_are_drawn(values):
    chart = curve_chart(np.arange(float(len(values))), np.array(values), name="c", title="loss", axis_title="epoch")
    assert sum(isinstance(shape, Dot) for shape in chart.shapes) == sum(np.isfinite(values))
    parsed(svg_text(chart))


def test_a_bar_is_as_high_as_its_rate_and_an_empty_bin_has_none():
    chart = bin_chart(
        np.array([0, 0.1, 0.2, 0.3]),
        np.array([0.1, np.nan, 0.4]),
        np.array([30, 0, 10]),
        name="u",
        title="t",
        x_title="x",
        y_title="y",
    )
    first, last = (shape for shape in chart.shapes if isinstance(shape, Area))
    heights = [bar.points[2][1] - bar.points[0][1] for bar in (first, last)]
    assert heights[1] == pytest.approx(4 * heights[0])
    assert "0 to 0.1: 0.1 (30)" in chart.description


def test_where_prediction_and_truth_agree_rings_lie_on_the_line():
    chart = agreement_chart(
        np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.5, 0.6]), name="q", title="t", x_title="x", y_title="y"
    )
    line = next(shape for shape in chart.shapes if isinstance(shape, Curve) and shape.dashed)
    (left, bottom), (right, top) = line.points
    dots = [shape.centre for shape in chart.shapes if isinstance(shape, Dot)]
    assert dots[0] == pytest.approx((left, bottom))
    assert dots[1] == pytest.approx(((left + right) / 2, (bottom + top) / 2))
    assert dots[2] == pytest.approx((right, bottom + 0.6 * (top - bottom)))


ALL_SHAPES = Drawing(
    "shapes",
    "a < b & c",
    'all "shapes"',
    96,
    48,
    [
        Area(rectangle(10, 10, 30, 30), fill="#00ff00", edge="#ff0000"),
        Curve([(40, 20), (90, 20)], colour="#0000ff", width=3),
        Curve([(40, 40), (90, 40)], colour="#ff00ff", width=3, dashed=True),
        Dot((60, 8), 4, edge="#000000", fill="#ffff00"),
        Label((0, 47), "x < y"),
    ],
)


def test_svg_is_well_formed_named_and_escaped():
    root = parsed(svg_text(ALL_SHAPES))
    assert root.attrib["role"] == "img"
    named = {element.attrib["id"]: element.text for element in root if "id" in element.attrib}
    assert [named[part] for part in root.attrib["aria-labelledby"].split()] == ["a < b & c", 'all "shapes"']
    assert root.find(f"{SVG}text").text == "x < y"
    assert len(root.findall(f"{SVG}polyline")) == 2
    assert not re.search(r"href|url\(|<script", svg_text(ALL_SHAPES))


def test_png_shows_the_shapes_where_svg_has_them(tmp_path):
    write_png(ALL_SHAPES, tmp_path / "shapes.png")
    picture = Image.open(tmp_path / "shapes.png").convert("RGB")
    assert picture.size == (300, 150)  # an inch by half an inch
    assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)

    def at(x, y):
        return picture.getpixel((round(x * 300 / 96), round(y * 300 / 96)))

    assert at(20, 20) == (0, 255, 0)
    assert at(60, 20) == (0, 0, 255)
    assert at(60, 8) == (255, 255, 0)
    assert at(35, 5) == (255, 255, 255)
    dashes = {at(x, 40) for x in range(42, 88)}
    assert dashes == {(255, 0, 255), (255, 255, 255)}


def test_a_ring_is_hollow_in_both(tmp_path):
    ring = Drawing("ring", "t", "d", 96, 96, [Dot((48, 48), 20, edge="#ff0000")])
    write_png(ring, tmp_path / "ring.png")
    assert Image.open(tmp_path / "ring.png").convert("RGB").getpixel((150, 150)) == (255, 255, 255)
    assert parsed(svg_text(ring)).find(f"{SVG}circle").attrib["fill"] == "none"
