"""What the abstract prompts of a network attend to: a row for each level, a column for each prompt, over the image.

The first column is the image with the outlines of what was predicted. Pixels are taken as square.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from scripts.data.vocabulary import ClassEntry
from scripts.files import atomic_path
from scripts.report.error_pictures import picture_name

ATTENTION_FOLDER = "attention"
PANEL = 176
"""Pixels of a panel's longer side, where there are few columns."""
MOST_COLUMNS = 8
"""Prompts beside each other; further ones follow in another row of the same level."""

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_WIDEST = 1040  # pixels of a picture with all its columns, so that a page need not shrink it
_GAP, _LINE, _TITLE, _SWATCH = 4, 16, 20, 11
_TEXT_SIZE = 12
_BAR, _BAR_GREY = 80, 128.0  # the scale's length in pixels, and what it is laid over
_SCALE_TEXT = "attention, from none to the largest of the map, which is n x an even share"
_NOTHING_TEXT = "nothing predicted in this slice"
_OUTLINE = 2
_GREYS, _STEPS = 14, 13  # of the image and of the attention in it: with few colours a file is light
_OPACITY = (0.1, 0.75)  # of the colours over the image, for no attention and for the largest
_SCALE = np.array([(60, 20, 120), (170, 35, 110), (235, 100, 40), (255, 220, 40)], dtype=np.float64)
"""From no attention to the largest; lightness rises with it, for readers who do not tell colours apart."""
_INK, _PAPER = (26, 26, 26), (255, 255, 255)
_TEXT_GREYS = range(32, 255, 32)  # of the edges of letters
_MOST_COLOURS = 256  # of a palette; those of 64 classes in one slice still fit


def attention_name(case: str) -> str:
    """Name a case's files, without an ending, by the rule of its error pictures."""
    return picture_name(case, "").removesuffix("__.png")


def attention_files(folder: Path) -> list[Path]:
    """Find the pictures and maps that an evaluation has left; a picture without maps is none of them.

    Args:
        folder: of the attention, which need not exist.
    """
    maps = sorted(folder.glob("*.npz"))
    return maps + [path for path in (file.with_suffix(".png") for file in maps) if path.is_file()]


def fullest_slice(masks: np.ndarray) -> int:
    """Choose the slice on which most is predicted; the middle one where nothing is.

    Args:
        masks: boolean `(K, H, W, D)`.

    Returns:
        An index along D, the first of equals.
    """
    areas = np.count_nonzero(masks.any(axis=0), axis=(0, 1))  # (D,)
    return int(np.argmax(areas)) if areas.any() else masks.shape[-1] // 2


def write_attention_maps(attention: Mapping[int, np.ndarray], *, index: int, path: str | os.PathLike[str]) -> Path:
    """Write the maps of a slice as a NumPy archive: `level_1` and so on, each `(N, h, w)`, and `slice`.

    Args:
        attention: level, 0 for the shallowest -> its maps.
        index: of the slice in its case, from 0.
        path: the file, ending in `.npz`, in an existing folder.

    Returns:
        The file written.

    Raises:
        OutputError: the file cannot be written. Nothing is left behind.
    """
    maps = {f"level_{level + 1}": attention[level] for level in sorted(attention)}
    target = Path(path)
    with atomic_path(target) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, slice=np.array(index), **maps)
    return target


def attention_picture(
    image: np.ndarray,
    attention: Mapping[int, np.ndarray],
    masks: np.ndarray,
    *,
    classes: Sequence[ClassEntry],
    levels: int,
    title: str,
    path: str | os.PathLike[str],
) -> Path:
    """Draw the attention over one slice and write it as PNG.

    The colours of a map reach from none to its own largest share. Above it stands how large that is, in even shares:
    1 where a prompt attends to everything alike.

    Args:
        image: `(C, H, W)`, C 1 (grey) or 3 (RGB), values 0 to 255, rows from top to bottom.
        attention: level, 0 for the shallowest -> `(N, h, w)`, shares of the image's tokens, which cover it wholly.
        masks: predictions, boolean `(K, H, W)`.
        classes: the K classes in the order of the masks.
        levels: how many the encoder has.
        title: a line above the panels.
        path: the file, in an existing folder.

    Returns:
        The file written.

    Raises:
        OutputError: the file cannot be written. Nothing is left behind.
        ValueError: the shapes do not fit each other, or there is no map.
    """
    _check_shapes(image, attention, masks, len(classes))
    prompts = max(len(maps) for maps in attention.values())
    size = _panel_size(image.shape[1], image.shape[2], columns=min(prompts, MOST_COLUMNS) + 1)
    grey = _grey_image(image, size)
    outlined = _outlined(grey, masks, classes)
    rows = [
        {f"level {level + 1} of {levels}": outlined} | panels
        for level in sorted(attention)
        for panels in _map_rows(grey, attention[level])
    ]
    shown = [entry for entry, mask in zip(classes, masks, strict=True) if mask.any()]
    picture = _compose(rows, shown, title).quantize(palette=_palette(shown), dither=Image.Dither.NONE)
    target = Path(path)
    with atomic_path(target) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
    return target


def _check_shapes(image: np.ndarray, attention: Mapping[int, np.ndarray], masks: np.ndarray, classes: int) -> None:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image (1 or 3, H, W), got {image.shape}")
    if masks.shape != (classes, *image.shape[1:]):
        raise ValueError(f"expected masks of shape {(classes, *image.shape[1:])}, got {masks.shape}")
    shapes = [maps.shape for maps in attention.values()]
    if not shapes or any(len(shape) != 3 or 0 in shape for shape in shapes):
        raise ValueError(f"expected maps (N, h, w) of at least one level and prompt, got {shapes}")


def _panel_size(height: int, width: int, *, columns: int) -> tuple[int, int]:
    """Return the width and height of a panel, so that all columns find room."""
    side = min(PANEL, (_WIDEST - _GAP) // columns - _GAP)
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _peak(shares: np.ndarray) -> str:
    """Write the largest share of a map `(h, w)` in even shares."""
    return f"{shares.max() / shares.mean():.1f} x"


def _grey_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Turn a slice `(C, H, W)` into few greys `(h, w)`, values 0 to 255."""
    pixels = np.nan_to_num(image).clip(0, 255).round().astype(np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))
    grey = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BICUBIC)
    return _stepped(np.asarray(grey) / 255, _GREYS) * 255


def _stepped(values: np.ndarray, steps: int) -> np.ndarray:
    """Round values from 0 to 1 to so many steps."""
    return np.round(values * (steps - 1)) / (steps - 1)


def _outlined(grey: np.ndarray, masks: np.ndarray, classes: Sequence[ClassEntry]) -> Image.Image:
    """Draw the image `(h, w)` with the outlines of masks `(K, H, W)`."""
    canvas = np.repeat(grey[..., None], 3, axis=2)
    for mask, entry in zip(masks, classes, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(mask).astype(np.uint8) * 255)
        # Shrinking by means, so that no small mask vanishes; enlarging without blur.
        inside = np.asarray(picture.resize(grey.shape[::-1], Image.Resampling.BOX)) > 0
        canvas[inside & ~binary_erosion(inside, iterations=_OUTLINE)] = entry.colour
    return Image.fromarray(canvas.round().astype(np.uint8))


def _map_rows(grey: np.ndarray, maps: np.ndarray) -> Iterator[dict[str, Image.Image]]:
    """Draw a level's maps `(N, h, w)`, each under its heading, as many as find room beside each other."""
    for start in range(0, len(maps), MOST_COLUMNS):
        some = enumerate(maps[start : start + MOST_COLUMNS], start=start + 1)
        yield {f"prompt {number}, {_peak(shares)}": _tinted(grey, shares) for number, shares in some}


def _tinted(grey: np.ndarray, shares: np.ndarray) -> Image.Image:
    """Draw a map `(h, w)` over the image."""
    tokens = Image.fromarray((shares / shares.max()).astype(np.float32))
    smooth = np.asarray(tokens.resize(grey.shape[::-1], Image.Resampling.BILINEAR))
    # Divided again, as a token between two pixels of the panel would not get the full colour.
    return Image.fromarray(_blend(grey, _stepped(smooth / smooth.max(), _STEPS)))


def _blend(grey: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Lay attention of 0 to 1 over greys of 0 to 255, both of one shape; three channels follow it."""
    places = np.linspace(0, 1, len(_SCALE))
    colours = np.stack([np.interp(attention, places, channel) for channel in _SCALE.T], axis=-1)
    opacity = np.interp(attention, (0, 1), _OPACITY)[..., None]
    return ((1 - opacity) * grey[..., None] + opacity * colours).round().astype(np.uint8)


def _palette(classes: Sequence[ClassEntry]) -> Image.Image:
    """List all colours that a picture has."""
    greys = np.linspace(0, 255, _GREYS)
    tinted = _blend(*np.meshgrid(greys, np.linspace(0, 1, _STEPS), indexing="ij")).reshape(-1, 3)
    meant = [_INK, _PAPER, *((grey,) * 3 for grey in _TEXT_GREYS), *(entry.colour for entry in classes)]
    plain = np.repeat(greys.round()[:, None], 3, axis=1)
    colours = np.concatenate([plain, np.array(meant), tinted]).astype(np.uint8)
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours[:_MOST_COLOURS].tobytes())
    return palette


def _compose(rows: Sequence[dict[str, Image.Image]], classes: Sequence[ClassEntry], title: str) -> Image.Image:
    """Put the title, rows of panels of one size, each under its heading, and the meaning of the colours together."""
    panel = next(iter(rows[0].values()))
    step_x, step_y = panel.width + _GAP, _LINE + panel.height + _GAP
    width = max(max(map(len, rows)) * step_x, _length(title) + _GAP, _BAR + _length(_SCALE_TEXT) + 2 * _GAP)
    legend = _legend(classes, width)
    picture = Image.new("RGB", (_GAP + width, _TITLE + len(rows) * step_y + legend.height), _PAPER)
    draw = ImageDraw.Draw(picture)
    _write(draw, (_GAP, 0), title)
    for row, panels in enumerate(rows):
        top = _TITLE + row * step_y
        for column, (heading, drawn) in enumerate(panels.items()):
            left = _GAP + column * step_x
            _write(draw, (left, top), heading)
            picture.paste(drawn, (left, top + _LINE))
    picture.paste(legend, (_GAP, picture.height - legend.height))
    return picture


def _legend(classes: Sequence[ClassEntry], width: int) -> Image.Image:
    """Draw the scale of the attention, and below it the names of what is outlined, wrapped to a width."""
    lines = _wrapped(classes, width)
    legend = Image.new("RGB", (width, _GAP + (1 + len(lines)) * _LINE), _PAPER)
    draw = ImageDraw.Draw(legend)
    scale = _stepped(np.tile(np.linspace(0, 1, _BAR), (_SWATCH, 1)), _STEPS)
    legend.paste(Image.fromarray(_blend(np.full_like(scale, _BAR_GREY), scale)), (0, _GAP))
    _write(draw, (_BAR + _GAP, 0), _SCALE_TEXT)
    for number, line in enumerate(lines, start=1):
        left, top = 0, number * _LINE + _GAP
        for entry in line:
            draw.rectangle((left, top, left + _SWATCH - 1, top + _SWATCH - 1), fill=entry.colour)
            _write(draw, (left + _SWATCH + _GAP, top - _GAP), entry.name)
            left += _entry_length(entry)
    if not classes:
        _write(draw, (0, _LINE), _NOTHING_TEXT)
    return legend


def _wrapped(classes: Sequence[ClassEntry], width: int) -> list[list[ClassEntry]]:
    """Divide classes into lines of a width, at least one of them."""
    lines: list[list[ClassEntry]] = [[]]
    for entry in classes:
        if lines[-1] and sum(map(_entry_length, [*lines[-1], entry])) > width:
            lines.append([])
        lines[-1].append(entry)
    return lines


def _entry_length(entry: ClassEntry) -> int:
    return _SWATCH + _length(entry.name) + 4 * _GAP


def _length(text: str) -> int:
    return round(_font().getlength(text))


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """Write a line of text, given its upper left corner."""
    draw.text((corner[0], corner[1] + _LINE - 4), text, fill=_INK, font=_font(), anchor="ls")


@cache
def _font() -> Font:
    return ImageFont.load_default(size=_TEXT_SIZE)
