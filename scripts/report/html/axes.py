"""Axes: where a value lies in a chart, and which values are written beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.report.html.drawing import FAINT, INK, Curve, Label, Shape

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_LETTER_RISE = 4.0  # from the middle of a line of text to its baseline


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low: value at `start`.
        high: value at `end`, above `low`.
        start: coordinate in CSS pixels.
        end: coordinate in CSS pixels; for an axis upwards it is smaller than `start`.
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Give the coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Give about `count` round values that lie on the axis."""
        step = _round_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def fitted_range(
    values: Sequence[float], *, least: float | None = None, most: float | None = None
) -> tuple[float, float]:
    """Give round ends that hold all values, and hold `least` and `most` where given.

    Args:
        values: finite numbers; none at all gives 0 to 1.
        least: a value that must be on the axis.
        most: another.
    """
    held = [*values, *(value for value in (least, most) if value is not None)] or [0.0, 1.0]
    low, high = min(held), max(held)
    if low == high:
        slack = abs(low) / 10 or 1.0
        return low - slack, high + slack
    step = _round_step((high - low) / 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def horizontal_axis(axis: Axis, *, top: float, bottom: float, title: str) -> list[Shape]:
    """Draw upright grid lines with their values and a title below."""
    shapes: list[Shape] = []
    for value in axis.ticks():
        x = axis.at(value)
        shapes.append(Curve([(x, top), (x, bottom)], colour=FAINT))
        shapes.append(Label((x, bottom + 16), tick_text(value), anchor="middle"))
    shapes.append(Curve([(axis.start, bottom), (axis.end, bottom)], colour=INK))
    shapes.append(Label(((axis.start + axis.end) / 2, bottom + 34), title, anchor="middle"))
    return shapes


def vertical_axis(axis: Axis, *, left: float, right: float) -> list[Shape]:
    """Draw level grid lines with their values to the left."""
    shapes: list[Shape] = []
    for value in axis.ticks(4):
        y = axis.at(value)
        shapes.append(Curve([(left, y), (right, y)], colour=FAINT))
        shapes.append(Label((left - 6, y + _LETTER_RISE), tick_text(value), anchor="end"))
    shapes.append(Curve([(left, axis.start), (left, axis.end)], colour=INK))
    return shapes


def tick_text(value: float) -> str:
    """Write a tick's value without the noise of floating point."""
    return f"{0.0 if abs(value) < 1e-12 else value:.6g}"


def _round_step(rough: float) -> float:
    """Give 1, 2, 2.5 or 5 times a power of ten: the smallest that is no smaller than `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step for step in _STEPS if step * power >= rough * (1 - 1e-9)) * power
