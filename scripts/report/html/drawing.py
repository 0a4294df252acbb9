"""A chart as a list of shapes, drawn as SVG for a page and as PNG for a paper from the one description.

Coordinates are CSS pixels (96 to the inch), x to the right and y downwards, from the upper left corner.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from scripts.files import atomic_path

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

INK, FAINT, PAPER = "#1a1a1a", "#d4d4d4", "#ffffff"
SERIES = ("#0072b2", "#b34700", "#00735c", "#8a3a78", "#5c5c00", "#444444")
"""Colours of runs. Hues by Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart,
darkened where a thin line would be too faint on white."""
TEXT_SIZE = 12.0
DOTS_PER_INCH = 300
_CSS_DOTS_PER_INCH = 96
_DASH = 4.0
_WIDEST_FONT = 1.25  # DejaVu Sans and Verdana, against Pillow's own font
_PIL_ANCHORS: dict[Anchor, str] = {"start": "ls", "middle": "ms", "end": "rs"}


@dataclass(frozen=True)
class Curve:
    """A line through points; dashed where asked for."""

    points: Sequence[Point]
    colour: str = INK
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Area:
    """A filled polygon, with an edge where `edge` names its colour."""

    points: Sequence[Point]
    fill: str
    edge: str | None = None


@dataclass(frozen=True)
class Dot:
    """A ring, or a disc where `fill` is given."""

    centre: Point
    radius: float
    edge: str
    fill: str | None = None


@dataclass(frozen=True)
class Label:
    """A line of text; `at` is its baseline's start, middle or end."""

    at: Point
    text: str
    anchor: Anchor = "start"
    size: float = TEXT_SIZE
    colour: str = INK


Shape = Curve | Area | Dot | Label


@dataclass(frozen=True)
class Drawing:
    """A chart.

    Attributes:
        name: stem of its PNG file.
        title: one line above it, also the name that screen readers say.
        description: what a reader who does not see it should know.
        width: in CSS pixels.
        height: in CSS pixels.
        shapes: from the lowest to the topmost.
    """

    name: str
    title: str
    description: str
    width: float
    height: float
    shapes: Sequence[Shape]


def rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    """Give the corners of an upright rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def text_width(text: str, size: float = TEXT_SIZE) -> float:
    """Estimate how wide a line of text is at most, in CSS pixels, whichever of the common fonts a reader has."""
    return _WIDEST_FONT * _font(round(size)).getlength(text)


def svg_text(drawing: Drawing) -> str:
    """Draw as an SVG element to be put into a page.

    Args:
        drawing: the chart; its name must be the only one of its kind in the page.

    Returns:
        One `<svg>` element, well-formed XML, without any reference to other files.
    """
    name = escape(drawing.name)
    shapes = "".join(_svg_shape(shape) for shape in drawing.shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{name}-title {name}-text" '
        f'width="{drawing.width:g}" height="{drawing.height:g}" viewBox="0 0 {drawing.width:g} {drawing.height:g}">'
        f'<title id="{name}-title">{escape(drawing.title)}</title>'
        f'<desc id="{name}-text">{escape(drawing.description)}</desc>{shapes}</svg>'
    )


def write_png(drawing: Drawing, path: Path) -> None:
    """Draw as a PNG file of 300 dots per inch, on white.

    Raises:
        OutputError: the file cannot be written.
    """
    scale = DOTS_PER_INCH / _CSS_DOTS_PER_INCH
    size = (round(drawing.width * scale), round(drawing.height * scale))
    picture = Image.new("RGB", size, PAPER)
    canvas = ImageDraw.Draw(picture)
    for shape in drawing.shapes:
        _draw_shape(canvas, shape, scale)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", dpi=(DOTS_PER_INCH, DOTS_PER_INCH))


def _svg_shape(shape: Shape) -> str:
    match shape:
        case Curve(points, colour, width, dashed):
            dash = f' stroke-dasharray="{_DASH:g}"' if dashed else ""
            return (
                f'<polyline points="{_svg_points(points)}" fill="none" stroke="{colour}" stroke-width="{width:g}"'
                f"{dash}/>"
            )
        case Area(points, fill, edge):
            return f'<polygon points="{_svg_points(points)}" fill="{fill}" stroke="{edge or "none"}"/>'
        case Dot((x, y), radius, edge, fill):
            return f'<circle cx="{x:.5g}" cy="{y:.5g}" r="{radius:g}" fill="{fill or "none"}" stroke="{edge}"/>'
        case Label((x, y), text, anchor, size, colour):
            return (
                f'<text x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}" font-size="{size:g}" fill="{colour}">'
                f"{escape(text)}</text>"
            )


def _svg_points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.5g},{y:.5g}" for x, y in points)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, scale: float) -> None:
    match shape:
        case Curve(points, colour, width, dashed):
            pixels = [_scaled(point, scale) for point in points]
            for part in _dashes(pixels, _DASH * scale) if dashed else [pixels]:
                canvas.line(part, fill=colour, width=max(1, round(width * scale)), joint="curve")
        case Area(points, fill, edge):
            pixels = [_scaled(point, scale) for point in points]
            canvas.polygon(pixels, fill=fill, outline=edge, width=round(scale))
        case Dot((x, y), radius, edge, fill):
            corners = [_scaled((x - radius, y - radius), scale), _scaled((x + radius, y + radius), scale)]
            canvas.ellipse(corners, fill=fill, outline=edge, width=max(1, round(scale)))
        case Label(at, text, anchor, size, colour):
            font = _font(round(size * scale))
            canvas.text(_scaled(at, scale), text, fill=colour, font=font, anchor=_PIL_ANCHORS[anchor])


def _scaled(point: Point, scale: float) -> Point:
    return point[0] * scale, point[1] * scale


def _dashes(points: Sequence[Point], length: float) -> list[list[Point]]:
    """Cut each stretch of a line into dashes, every second of which is left out."""
    parts = []
    for (left, top), (right, bottom) in itertools.pairwise(points):
        distance = ((right - left) ** 2 + (bottom - top) ** 2) ** 0.5
        count = max(1, int(distance / length))
        ends = [(left + (right - left) * i / count, top + (bottom - top) * i / count) for i in range(count + 1)]
        parts += [[ends[i], ends[i + 1]] for i in range(0, count, 2)]
    return parts


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
