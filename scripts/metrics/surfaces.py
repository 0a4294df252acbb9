"""The surface of a mask as elements with a length or an area.

The convention is that of https://github.com/google-deepmind/surface-distance (Nikolov et al.,
https://arxiv.org/abs/1809.04430): an element sits wherever the 2 x 2 (x 2) neighbouring pixels (voxels) around a corner
of the grid are neither all inside nor all outside the mask. Its size is that of the piece of surface which marching
squares (cubes) draw between them, through the midpoints between unequal neighbours.

A neighbourhood is numbered by its corners, the first along every axis being the most significant bit. The pieces are
worked out here from four rules, which determine every entry of DeepMind's table:

- on a face of the neighbourhood, a segment cuts off every run of inside corners, so that two inside corners across the
  diagonal are cut off one by one;
- where more than half of the corners are inside, inside and outside change roles;
- the segments of the six faces join into closed loops, and each loop is filled with triangles;
- of all ways to divide a loop into triangles, the one with the largest area for cubic voxels is taken.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from scripts.metrics.masks import Mask, bounding_box, crop_to_union

MARGIN: Final = 6
"""Rows of empty neighbourhoods around the surfaces, so that a search may look this far beyond them."""

# Positions in a neighbourhood are in half voxels: corners at 0 and 2, midpoints of edges at 1.
_Point: TypeAlias = tuple[int, ...]
_Loop: TypeAlias = list[_Point]
_Triangle: TypeAlias = tuple[_Point, _Point, _Point]

_FACE: Final = ((0, 0), (0, 2), (2, 2), (2, 0))  # in the order of a walk around it
_MOST_SEGMENTS: Final = 2
_MOST_TRIANGLES: Final = 4


@dataclass(frozen=True)
class Surface:
    """The elements of one surface.

    Attributes:
        border: Where there are elements, boolean on the grid of the voxels' corners, with ``MARGIN`` around it.
        points: Flat indices (N,) of the elements into ``border``, ascending.
        sizes: Length (2D) or area (3D) of each element (N,) in the unit of the spacing or its square, float64.
    """

    border: Mask
    points: npt.NDArray[np.intp]
    sizes: npt.NDArray[np.float64]


def extract_surfaces(prediction: Mask, truth: Mask, *, spacing: Sequence[float]) -> tuple[Surface, Surface]:
    """Find the surface elements of two masks on one grid, cut to the box around both.

    Outside of the array is background: a mask that touches the border has a surface there.

    Args:
        prediction: Boolean array `(H, W)` or `(H, W, D)`.
        truth: Boolean array of the same shape.
        spacing: Distance between neighbouring voxels along each array axis, in the order of the axes.

    Returns:
        The surfaces of the prediction and of the truth; without elements where a mask is empty.
    """
    sizes = element_sizes(spacing)
    first, second = (_extract_surface(mask, sizes) for mask in crop_to_union(prediction, truth))
    return first, second


def element_sizes(spacing: Sequence[float]) -> npt.NDArray[np.float64]:
    """Size of the surface element of every neighbourhood.

    Args:
        spacing: Two or three distances between neighbouring voxels, in the order of the array's axes.

    Returns:
        Lengths (16,) or areas (256,) by the neighbourhood's number, in the unit of the spacing or its square.
    """
    scale = np.asarray(spacing, dtype=np.float64)
    if len(scale) == 2:
        pieces = _segment_vectors()
    else:
        pieces = _area_vectors()
        scale = scale[[1, 0, 0]] * scale[[2, 2, 1]]  # an area along an axis grows with the spacing of the two others
    return np.linalg.norm(pieces * scale, axis=-1).sum(axis=-1)


def _extract_surface(mask: Mask, sizes: npt.NDArray[np.float64]) -> Surface:
    """Number the neighbourhoods in and around a mask and keep those that are neither empty nor full."""
    box = bounding_box(mask)
    # In C order whatever the mask's own is, which NumPy's padding would keep: distances count on it.
    codes = _number_neighbourhoods(np.pad(np.ascontiguousarray(mask[box]), 1))
    # In uint8, 0 - 1 is 255: one comparison leaves out both the empty (0) and the full (the last) neighbourhood.
    elements = codes - np.uint8(1) < len(sizes) - 2
    border = np.zeros([length + 1 + 2 * MARGIN for length in mask.shape], dtype=bool)
    border[tuple(slice(side.start + MARGIN, side.stop + 1 + MARGIN) for side in box)] = elements
    return Surface(border=border, points=np.flatnonzero(border), sizes=sizes[codes[elements]])


def _number_neighbourhoods(mask: Mask) -> npt.NDArray[np.uint8]:
    """Number every 2 x 2 (x 2) neighbourhood, (H, W[, D]) -> (H - 1, W - 1[, D - 1]), one axis after the other."""
    codes = mask.view(np.uint8)
    for step, axis in enumerate(reversed(range(mask.ndim))):
        ahead = (slice(None),) * axis
        codes = (codes[(*ahead, slice(None, -1))] << 2**step) | codes[(*ahead, slice(1, None))]
    return codes


@functools.cache
def _segment_vectors() -> npt.NDArray[np.float64]:
    """Segments (16, 2, 2) of every 2 x 2 neighbourhood as vectors in pixels, filled up with zeros."""
    vectors = np.zeros((16, _MOST_SEGMENTS, 2))
    for code in range(16):
        for index, (start, end) in enumerate(_cut_off(code, _FACE)):
            vectors[code, index] = np.subtract(end, start) / 2
    return vectors


@functools.cache
def _area_vectors() -> npt.NDArray[np.float64]:
    """Triangles (256, 4, 3) of every 2 x 2 x 2 neighbourhood as vectors of their area, filled up with zeros.

    A triangle's vector stands upright on it and is as long as its area in faces of a voxel.
    """
    vectors = np.zeros((256, _MOST_TRIANGLES, 3))
    for code in range(128):
        fewer_inside = 255 - code if code.bit_count() > 4 else code
        triangles = [triangle for loop in _trace_loops(fewer_inside) for triangle in _triangulate(loop)]
        for index, triangle in enumerate(triangles):
            vectors[code, index] = vectors[255 - code, index] = np.divide(_area_vector(triangle), 8)
    return vectors


def _is_inside(code: int, corner: _Point) -> bool:
    """Whether a corner of a neighbourhood is inside; the first corner along all axes is the most significant bit."""
    place = 0
    for position in corner:
        place = 2 * place + position // 2
    return bool(code >> (2 ** len(corner) - 1 - place) & 1)


def _cut_off(code: int, face: Sequence[_Point]) -> Iterator[tuple[_Point, _Point]]:
    """Cut off every run of inside corners around a face by a segment between two midpoints of its sides."""
    inside = [_is_inside(code, corner) for corner in face]
    for start in range(4):
        if inside[start] and not inside[start - 1]:
            end = next(corner for corner in range(start, start + 4) if not inside[(corner + 1) % 4])
            yield _middle(face[start - 1], face[start]), _middle(face[end % 4], face[(end + 1) % 4])


def _middle(first: _Point, second: _Point) -> _Point:
    return tuple((a + b) // 2 for a, b in zip(first, second, strict=True))


def _trace_loops(code: int) -> Iterator[_Loop]:
    """Join the segments on the faces of a 2 x 2 x 2 neighbourhood into closed loops of midpoints."""
    joined: dict[_Point, list[_Point]] = {}
    for axis, side in itertools.product(range(3), (0, 2)):
        face = [(*corner[:axis], side, *corner[axis:]) for corner in _FACE]
        for start, end in _cut_off(code, face):
            joined.setdefault(start, []).append(end)
            joined.setdefault(end, []).append(start)
    while joined:  # every midpoint lies on two faces, so it ends two segments
        point: _Point | None = next(iter(joined))
        loop = []
        while point is not None:
            loop.append(point)
            neighbours = joined.pop(point)
            point = next((neighbour for neighbour in neighbours if neighbour in joined), None)
        yield loop


def _triangulate(loop: _Loop) -> list[_Triangle]:
    """Divide a loop into triangles of the largest area in all for cubic voxels."""
    return max(
        _triangulations(loop), key=lambda triangles: sum(math.hypot(*_area_vector(triangle)) for triangle in triangles)
    )


def _triangulations(loop: _Loop) -> list[list[_Triangle]]:
    """All ways to divide a loop into triangles: choose the one on the side from last to first, then divide the rest."""
    if len(loop) < 3:
        return [[]]
    return [
        [*before, (loop[0], loop[tip], loop[-1]), *after]
        for tip in range(1, len(loop) - 1)
        for before in _triangulations(loop[: tip + 1])
        for after in _triangulations(loop[tip:])
    ]


def _area_vector(triangle: _Triangle) -> _Point:
    """Cross product of two sides in half voxels: a vector upright on a triangle, 8 long where a voxel's face is."""
    (x, y, z), (u, v, w) = ([end - start for start, end in zip(triangle[0], tip, strict=True)] for tip in triangle[1:])
    return y * w - z * v, z * u - x * w, x * v - y * u
