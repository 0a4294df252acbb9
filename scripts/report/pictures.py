"""Overlay pictures: what was predicted, and where given what was expected, drawn over the image."""

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from scripts.data.vocabulary import ClassEntry
from scripts.files import atomic_path

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MARGIN = 8
"""Pixels between panels, and around all of them."""
FILL_OPACITY = 0.35
CONTOUR_WIDTH = 2
MOST_SLICES = 8

_SMALLEST_PANEL, _LARGEST_PANEL = 256, 512
_DASH = 6
_TITLE_SIZE, _TEXT_SIZE, _LINE_HEIGHT, _SWATCH = 20, 16, 24, 16
_BACKGROUND: Colour = (32, 32, 32)
_INK: Colour = (240, 240, 240)


@dataclass(frozen=True)
class _LegendItem:
    text: str
    colour: Colour
    dashed: bool = False


def overlay_picture(
    image: np.ndarray,
    masks: np.ndarray,
    *,
    classes: Sequence[ClassEntry],
    path: str | os.PathLike[str],
    truth: np.ndarray | None = None,
    title: str | None = None,
    columns: int = 4,
    chosen: tuple[Sequence[int], int] | None = None,
) -> Path:
    """Draw predicted masks over an image, slice by slice, and write the picture as PNG.

    A prediction is a translucent fill with a solid contour in the colour of its class; the truth is an outline dashed
    in that colour and white. Of a volume at most eight slices are shown, spread evenly over those in which either
    has something, each with its number counted from 1; a volume without anything shows its middle slice. The longer
    side of a panel has 256 to 512 pixels; pixels are taken as square.

    Args:
        image: ``(C, H, W, D)`` with C 1 (grey) or 3 (RGB), values 0 to 255, rows from top to bottom.
        masks: predictions ``(K, H, W, D)``, true or non-zero inside; masks may overlap.
        classes: the K classes in the order of the masks.
        path: the file to write, in an existing folder.
        truth: masks to compare with, of the same shape, or None.
        title: a line above the panels.
        columns: panels in a row.
        chosen: where D is a choice of slices already, their indices in the volume and its number of slices.

    Returns:
        The file written.

    Raises:
        OutputError: the file cannot be written. Nothing is left behind.
        ValueError: image, masks, truth and classes do not fit each other.
    """
    _check_shapes(image, masks, truth, len(classes))
    colours = [entry.colour for entry in classes]
    panels = []
    numbers, count = (range(image.shape[-1]), image.shape[-1]) if chosen is None else chosen
    for index in choose_slices(masks, truth) if chosen is None else range(image.shape[-1]):
        expected = None if truth is None else truth[..., index]
        panel = _draw_panel(image[..., index], masks[..., index], expected, colours)
        panels.append(_number_panel(panel, numbers[index], count))
    picture = _compose(panels, _legend_items(classes, truth is not None), title, columns)
    target = Path(path)
    with atomic_path(target) as temporary:
        picture.save(temporary, format="PNG")
    return target


def choose_slices(masks: np.ndarray, truth: np.ndarray | None = None) -> list[int]:
    """Choose the slices that show most: at most eight, spread evenly over those with a mask.

    Args:
        masks: predictions ``(K, H, W, D)``, non-zero inside; a label map ``(1, H, W, D)`` will do.
        truth: masks to compare with, of the same shape, or None.

    Returns:
        Ascending indices along D; the middle slice when all masks are empty.
    """
    shown = [masks] if truth is None else [masks, truth]
    occupied = np.flatnonzero(np.any([array.any(axis=(0, 1, 2)) for array in shown], axis=0))
    if not len(occupied):
        return [masks.shape[-1] // 2]
    count = min(MOST_SLICES, len(occupied))
    positions = np.linspace(0, len(occupied) - 1, count).round().astype(int)
    return occupied[positions].tolist()


def _check_shapes(image: np.ndarray, masks: np.ndarray, truth: np.ndarray | None, class_count: int) -> None:
    if image.ndim != 4 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image (1 or 3, H, W, D), got {image.shape}")
    expected = (class_count, *image.shape[1:])
    for name, array in (("masks", masks), ("truth", truth)):
        if array is not None and array.shape != expected:
            raise ValueError(f"expected {name} of shape {expected}, got {array.shape}")


def _draw_panel(
    image: np.ndarray, masks: np.ndarray, truth: np.ndarray | None, colours: Sequence[Colour]
) -> Image.Image:
    """Draw one slice: image ``(C, H, W)``, masks and truth ``(K, H, W)``."""
    size = _panel_size(*image.shape[1:])
    canvas = _resize_image(image, size).astype(np.float64)  # (h, w, 3)
    predicted = [_resize_mask(mask, size) for mask in masks]
    for mask, colour in zip(predicted, colours, strict=True):
        canvas[mask] += FILL_OPACITY * (np.array(colour) - canvas[mask])
    # Outlines come after all fills: a class that overlaps another keeps its own edge.
    for mask, colour in zip(predicted, colours, strict=True):
        canvas[_contour(mask)] = colour
    for mask, colour in zip([] if truth is None else truth, colours, strict=False):
        _draw_dashed(canvas, _contour(_resize_mask(mask, size)), colour)
    return Image.fromarray(canvas.round().astype(np.uint8))


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Return the width and height of a panel; small images grow by a whole factor, so that pixels stay square."""
    longest = max(height, width)
    scale = min(1.0, _LARGEST_PANEL / longest)
    if longest < _SMALLEST_PANEL:
        scale = float(-(-_SMALLEST_PANEL // longest))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize ``(C, H, W)`` to an RGB picture ``(h, w, 3)`` of bytes."""
    pixels = image.clip(0, 255).round().astype(np.uint8)
    pixels = np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize ``(H, W)``; a reduced pixel is inside when any part of it was, so that no small mask vanishes."""
    picture = Image.fromarray(np.ascontiguousarray(mask != 0).astype(np.uint8) * 255)
    return np.asarray(picture.resize(size, Image.Resampling.BOX)) > 0


def _contour(mask: np.ndarray) -> np.ndarray:
    return mask & ~binary_erosion(mask, iterations=CONTOUR_WIDTH)


def _draw_dashed(canvas: np.ndarray, outline: np.ndarray, colour: Colour) -> None:
    rows, columns = np.nonzero(outline)
    white = (rows // _DASH + columns // _DASH) % 2 == 1
    canvas[rows, columns] = np.where(white[:, None], 255, np.array(colour))


def _number_panel(panel: Image.Image, index: int, count: int) -> Image.Image:
    if count > 1:
        draw = ImageDraw.Draw(panel)
        draw.text(
            (6, 4), f"{index + 1} / {count}", fill=_INK, font=_font(_TEXT_SIZE), stroke_width=2, stroke_fill=(0, 0, 0)
        )
    return panel


def _legend_items(classes: Sequence[ClassEntry], with_truth: bool) -> list[_LegendItem]:
    items = [_LegendItem(entry.name, entry.colour) for entry in classes]
    if with_truth:
        items.append(_LegendItem("dashed: reference", (128, 128, 128), dashed=True))
    return items


def _compose(
    panels: Sequence[Image.Image], legend: Sequence[_LegendItem], title: str | None, columns: int
) -> Image.Image:
    """Put title, panels and legend below each other; all panels have one size."""
    columns = max(1, min(columns, len(panels)))
    step_x, step_y = panels[0].width + MARGIN, panels[0].height + MARGIN
    width = _picture_width(columns * step_x, legend, title)
    rows = _wrap_legend(legend, width)
    top = MARGIN + (_LINE_HEIGHT + MARGIN if title else 0)
    bottom = top + -(-len(panels) // columns) * step_y
    picture = Image.new("RGB", (width, bottom + len(rows) * _LINE_HEIGHT + MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN), title, fill=_INK, font=_font(_TITLE_SIZE))
    for number, panel in enumerate(panels):
        picture.paste(panel, (MARGIN + number % columns * step_x, top + number // columns * step_y))
    for number, row in enumerate(rows):
        _draw_legend_row(draw, row, bottom + number * _LINE_HEIGHT)
    return picture


def _picture_width(panels_width: int, legend: Sequence[_LegendItem], title: str | None) -> int:
    title_width = _font(_TITLE_SIZE).getlength(title) if title else 0
    widest = max([panels_width, title_width + MARGIN, *(_item_width(item) for item in legend)])
    return int(np.ceil(widest)) + MARGIN


def _item_width(item: _LegendItem) -> float:
    return _SWATCH + _font(_TEXT_SIZE).getlength(item.text) + 4 * MARGIN


def _wrap_legend(legend: Sequence[_LegendItem], width: int) -> list[list[_LegendItem]]:
    rows: list[list[_LegendItem]] = []
    used = float(width)
    for item in legend:
        used += _item_width(item)
        if used > width:
            rows.append([])
            used = MARGIN + _item_width(item)
        rows[-1].append(item)
    return rows


def _draw_legend_row(draw: ImageDraw.ImageDraw, row: Sequence[_LegendItem], top: int) -> None:
    starts = itertools.accumulate((_item_width(item) for item in row), initial=float(MARGIN))
    for left, item in zip(starts, row, strict=False):
        _draw_swatch(draw, item, left, top)
        draw.text(
            (left + _SWATCH + MARGIN, top + _SWATCH / 2), item.text, fill=_INK, font=_font(_TEXT_SIZE), anchor="lm"
        )


def _draw_swatch(draw: ImageDraw.ImageDraw, item: _LegendItem, left: float, top: float) -> None:
    if not item.dashed:
        draw.rectangle((left, top, left + _SWATCH - 1, top + _SWATCH - 1), fill=item.colour)
        return
    for number in range(4):
        start, colour = left + number * _SWATCH / 4, (item.colour, (255, 255, 255))[number % 2]
        draw.rectangle((start, top + _SWATCH / 2 - 3, start + _SWATCH / 4 - 1, top + _SWATCH / 2 + 2), fill=colour)


@functools.cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)
