"""A small picture of a case and class: where the prediction and the truth differ, on the slice on which they do most.

From left to right: the whole slice with a frame around the class, then within that frame the image with the prediction,
with the truth, and with the error. Pixels are taken as square.
"""

import os
import re
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from scripts.files import atomic_path

PICTURES_FOLDER = "pictures"
FALSE_POSITIVE, FALSE_NEGATIVE, PREDICTED, TRUE = (230, 120, 0), (60, 150, 235), (255, 215, 0), (0, 200, 150)
"""Colours: predicted but not true, true but not predicted, the prediction's outline, the truth's outline. They differ
in lightness as well as in hue, for readers who do not tell red from green."""
PANEL = 176
"""Pixels of a panel's side."""

_GAP, _LINE = 4, 16
_TEXT_SIZE = 12
_FILL = 0.6
_MARGIN = 0.3  # of the frame's side, around the class
_SMALLEST_FRAME = 24
_IMAGE_COLOURS = 64  # with a palette a file is a third as large as in true colour
_TEXT_GREYS = range(32, 255, 32)  # of the edges of letters
_INK, _PAPER = (26, 26, 26), (255, 255, 255)
_HOSTILE = re.compile(r'[\x00-\x1f%/\\:*?"<>|]')

Frame = tuple[int, int, int, int]


def picture_name(case: str, class_name: str) -> str:
    """Name the file of a case and class, without what a file system refuses: `case__class.png`."""
    stem = f"{case}__{class_name}"
    return _HOSTILE.sub(lambda match: f"%{ord(match.group()):02X}", stem) + ".png"


def worst_slice(prediction: np.ndarray, truth: np.ndarray) -> int:
    """Choose the slice with the most wrong pixels; of a faultless case the one with most of the class.

    Args:
        prediction: boolean `(H, W, D)`.
        truth: of the same shape.

    Returns:
        An index along D, the first of equals.
    """
    wrong = np.count_nonzero(prediction ^ truth, axis=(0, 1))
    return int(np.argmax(wrong if wrong.any() else np.count_nonzero(truth, axis=(0, 1))))


def error_picture(
    image: np.ndarray, prediction: np.ndarray, truth: np.ndarray, *, path: str | os.PathLike[str]
) -> Path:
    """Draw one class of one case and write it as PNG.

    Args:
        image: `(C, H, W, D)`, C 1 (grey) or 3 (RGB), values 0 to 255, rows from top to bottom.
        prediction: boolean `(H, W, D)`.
        truth: of the same shape.
        path: the file, in an existing folder.

    Returns:
        The file written.

    Raises:
        OutputError: the file cannot be written. Nothing is left behind.
        ValueError: the shapes do not fit each other.
    """
    _check_shapes(image, prediction, truth)
    index = worst_slice(prediction, truth)
    pixels = _as_colours(image[..., index])
    predicted, true = prediction[..., index], truth[..., index]
    frame = _frame_around(predicted | true)
    panels = {
        f"slice {index + 1} of {image.shape[-1]}": _whole_panel(pixels, frame),
        "prediction": _outline_panel(pixels, predicted, frame, PREDICTED),
        "truth": _outline_panel(pixels, true, frame, TRUE),
        "error": _error_panel(pixels, predicted, true, frame),
    }
    picture = _side_by_side(panels).quantize(palette=_palette(pixels), dither=Image.Dither.NONE)
    target = Path(path)
    with atomic_path(target) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
    return target


def _check_shapes(image: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> None:
    if image.ndim != 4 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image (1 or 3, H, W, D), got {image.shape}")
    if not prediction.shape == truth.shape == image.shape[1:]:
        raise ValueError(f"expected masks of shape {image.shape[1:]}, got {prediction.shape} and {truth.shape}")


def _as_colours(image: np.ndarray) -> np.ndarray:
    """Turn a slice `(C, H, W)` into bytes `(H, W, 3)`."""
    pixels = np.nan_to_num(image).clip(0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def _palette(pixels: np.ndarray) -> Image.Image:
    """Choose the colours: those that a slice `(H, W, 3)` needs, plain and tinted, and all that have a meaning.

    A palette fitted to the whole picture would merge what covers few pixels, such as the two colours of errors.
    """
    fitted = Image.fromarray(pixels).quantize(_IMAGE_COLOURS, dither=Image.Dither.NONE).getpalette() or []
    plain = np.array(fitted[: 3 * _IMAGE_COLOURS], dtype=np.float64).reshape(-1, 3)
    tinted = [plain + _FILL * (np.array(colour) - plain) for colour in (FALSE_POSITIVE, FALSE_NEGATIVE)]
    meant = [FALSE_POSITIVE, FALSE_NEGATIVE, PREDICTED, TRUE, _INK, _PAPER, *((grey,) * 3 for grey in _TEXT_GREYS)]
    colours = np.concatenate([plain, *tinted, np.array(meant)]).round().astype(np.uint8)
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.tobytes())
    return palette


def _frame_around(mask: np.ndarray) -> Frame:
    """Give the square around a mask `(H, W)` with some margin, within the slice: top, left, bottom, right."""
    if not mask.any():
        return 0, 0, *mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = max(_SMALLEST_FRAME, round(extent * (1 + 2 * _MARGIN)))
    top, bottom = _stretch(int(rows[0] + rows[-1] + 1) // 2, side, mask.shape[0])
    left, right = _stretch(int(columns[0] + columns[-1] + 1) // 2, side, mask.shape[1])
    return top, left, bottom, right


def _stretch(middle: int, side: int, length: int) -> tuple[int, int]:
    """Place `side` pixels around a middle, moved inwards where they would leave the slice."""
    start = max(0, min(middle - side // 2, length - side))
    return start, min(length, start + side)


def _whole_panel(pixels: np.ndarray, frame: Frame) -> Image.Image:
    """Draw the whole slice and the frame in it."""
    panel = Image.fromarray(pixels)
    scale = _fitting_scale(*pixels.shape[:2])
    panel = _resized(panel, scale, Image.Resampling.BICUBIC)
    top, left, bottom, right = (round(edge * scale) for edge in frame)
    ImageDraw.Draw(panel).rectangle((left, top, right - 1, bottom - 1), outline=_PAPER)
    return panel


def _outline_panel(pixels: np.ndarray, mask: np.ndarray, frame: Frame, colour: tuple[int, int, int]) -> Image.Image:
    """Draw the frame's image with a mask's outline."""
    canvas, enlarged = _framed(pixels, frame), _framed_mask(mask, frame)
    canvas[enlarged & ~binary_erosion(enlarged, iterations=2)] = colour
    return Image.fromarray(canvas)


def _error_panel(pixels: np.ndarray, predicted: np.ndarray, true: np.ndarray, frame: Frame) -> Image.Image:
    """Draw the frame's image with what is wrong in it."""
    canvas = _framed(pixels, frame).astype(np.float64)
    for wrong, colour in ((predicted & ~true, FALSE_POSITIVE), (true & ~predicted, FALSE_NEGATIVE)):
        inside = _framed_mask(wrong, frame)
        canvas[inside] += _FILL * (np.array(colour) - canvas[inside])
    return Image.fromarray(canvas.round().astype(np.uint8))


def _framed(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    """Enlarge the frame's part of `(H, W, 3)` to a panel."""
    top, left, bottom, right = frame
    part = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    scale = _fitting_scale(bottom - top, right - left)
    return np.array(_resized(part, scale, Image.Resampling.BICUBIC))


def _framed_mask(mask: np.ndarray, frame: Frame) -> np.ndarray:
    """Enlarge the frame's part of `(H, W)` to a panel."""
    top, left, bottom, right = frame
    part = Image.fromarray(np.ascontiguousarray(mask[top:bottom, left:right]).astype(np.uint8) * 255)
    # Shrinking by means, so that no small mask vanishes; enlarging without blur.
    return np.asarray(_resized(part, _fitting_scale(bottom - top, right - left), Image.Resampling.BOX)) > 0


def _fitting_scale(height: int, width: int) -> float:
    return PANEL / max(height, width)


def _resized(picture: Image.Image, scale: float, method: Image.Resampling) -> Image.Image:
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), method)


def _side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Put panels beside each other, each under its title, and the meaning of the colours below."""
    width = len(panels) * (PANEL + _GAP) + _GAP
    picture = Image.new("RGB", (width, _LINE + PANEL + _LINE + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (title, panel) in enumerate(panels.items()):
        left = _GAP + number * (PANEL + _GAP)
        draw.text((left, _LINE - 4), title, fill=_INK, font=_font(), anchor="ls")
        picture.paste(panel, (left, _LINE))
    right = width - _GAP
    for text, colour in (("missed", FALSE_NEGATIVE), ("predicted, not true", FALSE_POSITIVE)):
        right -= round(_font().getlength(text))
        draw.text((right, picture.height - 7), text, fill=_INK, font=_font(), anchor="ls")
        draw.rectangle((right - 16, picture.height - 17, right - 5, picture.height - 6), fill=colour)
        right -= 28
    return picture


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_TEXT_SIZE)
