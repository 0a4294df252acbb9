"""The charts of a report: boxes of cases, curves of training runs, error by uncertainty, quality against truth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scripts.report.html.axes import Axis, fitted_range, horizontal_axis, tick_text, vertical_axis
from scripts.report.html.drawing import (
    INK,
    PAPER,
    SERIES,
    Area,
    Curve,
    Dot,
    Drawing,
    Label,
    Shape,
    rectangle,
    text_width,
)

Values = npt.NDArray[np.float64]

MOST_DOTS = 100
"""Cases in one box up to which each is a ring; of more, only those beyond the whiskers are."""
MOST_POINTS = 300
"""Points of a curve; of more, neighbours are averaged and their range is a band."""

_WIDE, _NARROW, _SMALL_HEIGHT, _SQUARE = 760.0, 330.0, 190.0, 360.0
_ROW, _GAP, _BOX, _LEGEND_LINE = 20.0, 12.0, 12.0, 20.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 34.0, 44.0
_TITLE_SIZE = 13.0
_WHISKER = 1.5  # of the range between the quartiles: Tukey, Exploratory Data Analysis, 1977
_BAND = "#cfe3f1"


@dataclass(frozen=True)
class Box:
    """The cases of one run in one class.

    Attributes:
        label: of the group that the box lies in, the class.
        series: name of the run.
        values: finite, `(n,)`; an empty box says that there is none.
    """

    label: str
    series: str
    values: Values


def box_chart(
    boxes: Sequence[Box],
    *,
    name: str,
    title: str,
    axis_title: str,
    least: float | None = None,
    most: float | None = None,
) -> Drawing:
    """Draw level box plots, one group of boxes a class and one box in it a run.

    A box reaches from the first to the third quartile, its line is the median, its diamond the mean; whiskers end at
    the last case within 1.5 box lengths. Rings are cases.

    Args:
        boxes: those of one label next to each other.
        name: of the chart's file.
        title: its title.
        axis_title: what is measured, and in which unit.
        least: a value that the axis must show.
        most: another.
    """
    series = list(dict.fromkeys(box.series for box in boxes))
    left = 14 + max(text_width(box.label) for box in boxes)
    values = np.concatenate([box.values for box in boxes])
    axis = Axis(*fitted_range(values.tolist(), least=least, most=most), start=left, end=_WIDE - _RIGHT - 14)
    named = _legend_lines(series) if len(series) > 1 else []
    top = _TOP + _LEGEND_LINE * len(named)
    rows, bottom = _box_rows(boxes, top)
    shapes: list[Shape] = [Label((1, 18), title, size=_TITLE_SIZE)]
    shapes += _legend(named, y=40)
    shapes += horizontal_axis(axis, top=top, bottom=bottom, title=axis_title)
    for box, middle in zip(boxes, rows, strict=True):
        shapes += _box_shapes(box, axis, middle, SERIES[series.index(box.series) % len(SERIES)])
    for label in dict.fromkeys(box.label for box in boxes):
        own = [middle for box, middle in zip(boxes, rows, strict=True) if box.label == label]
        shapes.append(Label((left - 10, (own[0] + own[-1]) / 2 + 4), label, anchor="end"))
    return Drawing(name, title, _box_description(boxes), _WIDE, bottom + _BOTTOM, shapes)


def curve_chart(x: Values, y: Values, *, name: str, title: str, axis_title: str, colour: str = SERIES[0]) -> Drawing:
    """Draw one value over the course of a training run.

    Args:
        x: iterations or epochs `(n,)`, ascending.
        y: the value at each, `(n,)`; what is not finite is left out.
        name: of the chart's file.
        title: its title, the value's name.
        axis_title: what x counts.
        colour: of the line.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    right, bottom = _NARROW - _RIGHT, _SMALL_HEIGHT - _BOTTOM
    across = Axis(*(fitted_range(x.tolist())), start=_LEFT, end=right)
    upwards = Axis(*fitted_range(y.tolist()), start=bottom, end=_TOP)
    shapes: list[Shape] = [Label((1, 18), title, size=_TITLE_SIZE)]
    shapes += vertical_axis(upwards, left=_LEFT, right=right)
    shapes += horizontal_axis(across, top=bottom, bottom=bottom, title=axis_title)
    shapes += _curve_shapes(x, y, across, upwards, colour)
    text = f"{title} over {axis_title}: nothing finite."
    if len(y):
        text = (
            f"{title} over {axis_title}, from {y[0]:.4g} to {y[-1]:.4g}; smallest {y.min():.4g}, largest {y.max():.4g}."
        )
    return Drawing(name, title, text, _NARROW, _SMALL_HEIGHT, shapes)


def bin_chart(
    edges: Values, rates: Values, counts: Values, *, name: str, title: str, x_title: str, y_title: str
) -> Drawing:
    """Draw a bar for each bin: how high its rate is.

    Args:
        edges: of the bins, `(n + 1,)`, ascending.
        rates: of each bin, `(n,)`, 0 to 1; NaN in an empty one.
        counts: how many voxels or cases each bin holds, `(n,)`.
        name: of the chart's file.
        title: its title.
        x_title: what the bins divide.
        y_title: what the rate is of.
    """
    width, height = 1.6 * _SQUARE, _SQUARE * 0.8
    right, bottom, top = width - _RIGHT, height - _BOTTOM, _TOP + 22
    known = rates[np.isfinite(rates)].tolist()
    across = Axis(float(edges[0]), float(edges[-1]), start=_LEFT, end=right)
    upwards = Axis(*fitted_range(known, least=0.0), start=bottom, end=top)
    shapes: list[Shape] = [Label((1, 18), title, size=_TITLE_SIZE), Label((1, 42), y_title)]
    shapes += vertical_axis(upwards, left=_LEFT, right=right)
    for low, high, rate in zip(edges[:-1], edges[1:], rates, strict=True):
        if np.isfinite(rate):
            corners = rectangle(across.at(low) + 1, upwards.at(rate), across.at(high) - 1, bottom)
            shapes.append(Area(corners, fill=_BAND, edge=SERIES[0]))
    shapes += horizontal_axis(across, top=bottom, bottom=bottom, title=x_title)
    bins = zip(edges[:-1], edges[1:], rates, counts, strict=True)
    text = "; ".join(f"{low:.3g} to {high:.3g}: {rate:.4g} ({count:.0f})" for low, high, rate, count in bins)
    return Drawing(name, title, f"{y_title}, by {x_title}, with counts: {text}.", width, height, shapes)


def agreement_chart(predicted: Values, true: Values, *, name: str, title: str, x_title: str, y_title: str) -> Drawing:
    """Draw a ring for each case at its predicted and its true score, and the line on which they are equal.

    Args:
        predicted: `(n,)`, 0 to 1.
        true: `(n,)`, 0 to 1.
        name: of the chart's file.
        title: its title.
        x_title: what was predicted, and how.
        y_title: what is true.
    """
    right, bottom, top = _SQUARE - _RIGHT, _SQUARE - _BOTTOM, _TOP + 22
    across, upwards = Axis(0, 1, start=_LEFT, end=right), Axis(0, 1, start=bottom, end=top)
    shapes: list[Shape] = [Label((1, 18), title, size=_TITLE_SIZE), Label((1, 42), y_title)]
    shapes += vertical_axis(upwards, left=_LEFT, right=right)
    shapes += horizontal_axis(across, top=bottom, bottom=bottom, title=x_title)
    shapes.append(Curve([(_LEFT, bottom), (right, top)], colour=INK, dashed=True))
    pairs = zip(predicted, true, strict=True)
    shapes += [Dot((across.at(x), upwards.at(y)), 3, edge=SERIES[0]) for x, y in pairs]
    text = f"{len(true)} cases, {x_title} against {y_title}; the dashed line is where they are equal."
    return Drawing(name, title, text, _SQUARE, _SQUARE, shapes)


def thinned(x: Values, y: Values, most: int = MOST_POINTS) -> tuple[Values, Values, Values, Values]:
    """Average neighbours where a curve has more than `most` points.

    Args:
        x: `(n,)`.
        y: `(n,)`.
        most: number of points to keep to.

    Returns:
        Means of x and y, and smallest and largest y, each `(min(n, most),)`.
    """
    if len(x) <= most:
        return x, y, y, y
    parts = np.array_split(np.arange(len(x)), most)
    return (
        np.array([x[part].mean() for part in parts]),
        np.array([y[part].mean() for part in parts]),
        np.array([y[part].min() for part in parts]),
        np.array([y[part].max() for part in parts]),
    )


def _curve_shapes(x: Values, y: Values, across: Axis, upwards: Axis, colour: str) -> list[Shape]:
    if len(y) == 1:
        return [Dot((across.at(x[0]), upwards.at(y[0])), 3, edge=colour, fill=colour)]
    middle, mean, low, high = thinned(x, y)
    shapes: list[Shape] = []
    if len(middle) < len(x):
        there = [(across.at(a), upwards.at(b)) for a, b in zip(middle, high, strict=True)]
        back = [(across.at(a), upwards.at(b)) for a, b in zip(middle, low, strict=True)]
        shapes.append(Area([*there, *reversed(back)], fill=_BAND))
    points = [(across.at(a), upwards.at(b)) for a, b in zip(middle, mean, strict=True)]
    return [*shapes, Curve(points, colour=colour, width=1.5)] if points else shapes


def _box_rows(boxes: Sequence[Box], top: float) -> tuple[list[float], float]:
    """Give the middle of each box's row, and where the last row ends."""
    rows, y = [], top
    for index, box in enumerate(boxes):
        y += _GAP if index == 0 or box.label != boxes[index - 1].label else 0
        rows.append(y + _ROW / 2)
        y += _ROW
    return rows, y + _GAP


def _box_shapes(box: Box, axis: Axis, middle: float, colour: str) -> list[Shape]:
    if not len(box.values):
        return [Label((axis.start + 8, middle + 4), "no case")]
    first, median, third = np.percentile(box.values, [25, 50, 75])
    low, high = whisker_ends(box.values)
    upper, lower, mean = middle - _BOX / 2, middle + _BOX / 2, axis.at(box.values.mean())
    left, right, line = axis.at(first), axis.at(third), axis.at(median)
    beyond = (box.values < low) | (box.values > high)
    shown = box.values if len(box.values) <= MOST_DOTS else box.values[beyond]
    return [
        Curve([(axis.at(low), middle), (left, middle)], colour=colour),
        Curve([(right, middle), (axis.at(high), middle)], colour=colour),
        Area(rectangle(left, upper, right, lower), fill=PAPER, edge=colour),
        *(Dot((axis.at(value), middle), 2, edge=colour) for value in shown),
        Curve([(line, upper), (line, lower)], colour=colour, width=2.5),
        Area([(mean - 4, middle), (mean, middle - 4), (mean + 4, middle), (mean, middle + 4)], fill=colour),
    ]


def whisker_ends(values: Values) -> tuple[float, float]:
    """Give the smallest and the largest value within 1.5 times the quartiles' distance from the box."""
    first, third = np.percentile(values, [25, 75])
    reach = _WHISKER * (third - first)
    within = values[(values >= first - reach) & (values <= third + reach)]
    return float(within.min()), float(within.max())


def _legend_lines(series: Sequence[str]) -> list[list[str]]:
    """Divide the names of runs into lines as wide as the chart, at least one name in each."""
    lines: list[list[str]] = [[]]
    for name in series:
        if lines[-1] and sum(map(_legend_width, [*lines[-1], name])) > _WIDE:
            lines.append([])
        lines[-1].append(name)
    return lines


def _legend_width(name: str) -> float:
    """Give the room of a name with its square, and of the gap behind it."""
    return 35 + text_width(name)


def _legend(lines: Sequence[Sequence[str]], y: float) -> list[Shape]:
    """Name the colours of the runs, line by line, the first at y."""
    shapes: list[Shape] = []
    index = 0
    for number, names in enumerate(lines):
        x, base = 1.0, y + number * _LEGEND_LINE
        for name in names:
            shapes.append(Area(rectangle(x, base - 10, x + 10, base), fill=SERIES[index % len(SERIES)]))
            shapes.append(Label((x + 15, base), name))
            x += _legend_width(name)
            index += 1
    return shapes


def _box_description(boxes: Sequence[Box]) -> str:
    """Say each box's median, quartiles and number of cases."""
    several = len({box.series for box in boxes}) > 1
    parts = []
    for box in boxes:
        label = f"{box.label} ({box.series})" if several else box.label
        if not len(box.values):
            parts.append(f"{label}: no case")
            continue
        first, median, third = np.percentile(box.values, [25, 50, 75])
        parts.append(
            f"{label}: median {tick_text(round(median, 4))}, quartiles {tick_text(round(first, 4))} to "
            f"{tick_text(round(third, 4))}, {len(box.values)} cases"
        )
    return "; ".join(parts) + "."
