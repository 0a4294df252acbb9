"""Distances between two surfaces, each measured once, and what is read off them.

Every element of one surface has a distance to the nearest element of the other. Most are short, since a prediction
mostly lies close to the truth; an element's surroundings are therefore looked at first, in the order of their distance,
for as long as that finds much. What is left goes to a tree over the other surface; in volumes, where the surfaces lie
so far apart that most of the other one can be nearest to nothing, to the few elements that can.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from scripts.metrics.masks import Mask, check_masks, check_spacing, check_tolerance
from scripts.metrics.surfaces import MARGIN, Surface, extract_surfaces

# A wider ring follows where the last one left fewer than this share of its elements without a neighbour.
_MOST_LEFT_BY_A_RING: Final = 0.9

# The tree is left out where a smaller share than this of the other surface can be nearest to anything. It is worth
# finding out for not too few elements, in multiples of the other surface's.
_FEW: Final = 1 / 8
_MANY: Final = 1 / 4
# Distances computed at a time, 8 bytes each.
_MOST_PAIRS: Final = 2**18


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances from each of two surfaces to the other, in the unit of the spacing.

    Attributes:
        to_truth: From every element of the prediction's surface to the truth's (N,), ascending; infinite where the
            truth is empty.
        predicted_sizes: Lengths or areas of these elements (N,), of equal distances the smaller first.
        to_prediction: From every element of the truth's surface to the prediction's (M,), ascending; infinite where the
            prediction is empty.
        true_sizes: Lengths or areas of these elements (M,), of equal distances the smaller first.
    """

    to_truth: npt.NDArray[np.float64]
    predicted_sizes: npt.NDArray[np.float64]
    to_prediction: npt.NDArray[np.float64]
    true_sizes: npt.NDArray[np.float64]

    def surface_dice(self, tolerance: float) -> float:
        """Share of both surfaces that lies within a tolerance of the other, the NSD.

        Args:
            tolerance: Largest distance at which an element counts as found, inclusive.

        Returns:
            0 to 1; 0 where exactly one mask is empty, NaN where both are.

        Raises:
            ConfigError: The tolerance is negative or not finite.
        """
        check_tolerance(tolerance)
        total = self.predicted_sizes.sum() + self.true_sizes.sum()
        within = self.predicted_sizes[: _count_within(self.to_truth, tolerance)].sum()
        within += self.true_sizes[: _count_within(self.to_prediction, tolerance)].sum()
        return float(within / total) if total else math.nan

    def hausdorff(self, percent: float) -> float:
        """Hausdorff distance, or the robust one that leaves the farthest part of each surface out.

        The larger of the two directions' distances within which ``percent`` of the surface lies, by length or area.

        Args:
            percent: Above 0 up to 100, 100 for the largest distance of all.

        Returns:
            At least 0; infinite where a mask is empty.
        """
        return max(
            _quantile(self.to_truth, self.predicted_sizes, percent),
            _quantile(self.to_prediction, self.true_sizes, percent),
        )

    def mean_to_truth(self) -> float:
        """Mean distance from the prediction's surface to the truth's by length or area; infinite if one is empty."""
        return _mean(self.to_truth, self.predicted_sizes)

    def mean_to_prediction(self) -> float:
        """Mean distance from the truth's surface to the prediction's by length or area; infinite if one is empty."""
        return _mean(self.to_prediction, self.true_sizes)

    def mean(self) -> float:
        """Average symmetric surface distance: mean over the elements of both surfaces by length or area.

        Returns:
            At least 0; infinite where a mask is empty.
        """
        if not (len(self.to_truth) and len(self.to_prediction)):
            return math.inf
        weighted = (self.to_truth * self.predicted_sizes).sum() + (self.to_prediction * self.true_sizes).sum()
        return float(weighted / (self.predicted_sizes.sum() + self.true_sizes.sum()))


def measure_distances(prediction: Mask, truth: Mask, *, spacing: Sequence[float]) -> SurfaceDistances:
    """Measure how far the surfaces of two masks lie from each other.

    Args:
        prediction: Boolean array `(H, W)` or `(H, W, D)`.
        truth: Boolean array of the same shape.
        spacing: Distance between neighbouring voxels along each array axis, in the order of the axes; mm, or all 1
            to measure in pixels.

    Returns:
        The distances in both directions, in the unit of ``spacing``.

    Raises:
        InputError: An array is not boolean or neither 2D nor 3D, the shapes differ, or the spacing does not fit them.
    """
    check_masks(prediction, truth)
    check_spacing(spacing, prediction.ndim)
    scale = np.asarray(spacing, dtype=np.float64)
    predicted, true = extract_surfaces(prediction, truth, spacing=spacing)
    return SurfaceDistances(
        *_sort_by_distance(nearest_distances(predicted, true, scale), predicted.sizes),
        *_sort_by_distance(nearest_distances(true, predicted, scale), true.sizes),
    )


def nearest_distances(source: Surface, target: Surface, spacing: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distance from every element of one surface to the nearest of another on the same grid.

    Args:
        source: Where to measure from.
        target: Where to measure to.
        spacing: Distance between neighbouring voxels along each axis of the grid (2,) or (3,).

    Returns:
        Distances (N,) in the order of ``source.points``; infinite where the target has no elements.
    """
    if len(target.points) == 0:
        return np.full(len(source.points), math.inf)
    distances, left = _search_surroundings(source, target, spacing)
    if len(left) == 0:
        return distances
    start, goal = (_coordinates(points, target.border) for points in (source.points[left], target.points))
    nearest = _find_nearest(start * spacing, goal * spacing)
    # What is found lies at rounded positions; a distance equal to the tolerance has to stay equal.
    distances[left] = _length(start - goal[nearest], spacing)
    return distances


def _search_surroundings(
    source: Surface, target: Surface, spacing: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Look for the target around each source element, ring by ring, until a ring finds little or the margin ends.

    Returns:
        Distances (N,), right wherever something was found, and the indices of the elements where nothing was.
    """
    grid = target.border.ravel()
    distances = np.zeros(len(source.points))
    left = np.flatnonzero(~grid[source.points])
    for ring in _surroundings(tuple(spacing.tolist()), target.border.strides):
        before = len(left)
        points = source.points[left]
        for step, distance in ring:
            found = grid[points + step]
            distances[left[found]] = distance
            left, points = left[~found], points[~found]
        if len(left) > _MOST_LEFT_BY_A_RING * before or len(left) == 0:
            break
    return distances, left


@functools.lru_cache(maxsize=64)
def _surroundings(spacing: tuple[float, ...], strides: tuple[int, ...]) -> list[list[tuple[int, float]]]:
    """Steps between flat indices and their distances, ascending, in rings as wide as the smallest spacing.

    They end where a position outside the margin could be nearer. The grid's strides are in elements.
    """
    reach = range(-MARGIN, MARGIN + 1)
    offsets = np.array(list(itertools.product(reach, repeat=len(spacing))))
    lengths = _length(offsets, np.array(spacing))
    steps = offsets @ np.array(strides)
    rings: list[list[tuple[int, float]]] = [[] for _ in range(MARGIN)]
    for index in np.argsort(lengths, kind="stable")[1:]:  # all but the position itself
        ring = int(lengths[index] / min(spacing)) - 1
        if ring < MARGIN:
            rings[ring].append((int(steps[index]), float(lengths[index])))
    return rings


def _coordinates(points: npt.NDArray[np.intp], grid: Mask) -> npt.NDArray[np.intp]:
    """Positions (N, 2) or (N, 3) of flat indices (N,) into a grid."""
    return np.stack(np.unravel_index(points, grid.shape), axis=1)


def _find_nearest(start: npt.NDArray[np.float64], goal: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Indices (N,) of the goals (M, 2) or (M, 3) nearest to the positions (N, 2) or (N, 3)."""
    from scipy.spatial import cKDTree

    if start.shape[1] == 3 and len(start) > _MANY * len(goal):
        possible = _possible_goals(start, goal)
        if len(possible) < _FEW * len(goal):
            return possible[_find_among_few(start, goal[possible])]
    # Built for one query: large leaves and no balance take least time in all.
    tree = cKDTree(goal, leafsize=48, compact_nodes=False, balanced_tree=False)
    return np.asarray(tree.query(start)[1], dtype=np.intp)


def _possible_goals(start: npt.NDArray[np.float64], goal: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Indices of the goals (M, 3) that may be nearest to one of the positions (N, 3), of which there may be fewer.

    The difference of the squared distances to two goals is linear in the position. So a goal that is no farther than
    another from all corners of the box around the positions is no farther from any of them, and the other can go.
    """
    from scipy.spatial.distance import cdist

    corners = np.array(list(itertools.product(*zip(start.min(axis=0), start.max(axis=0), strict=True))))
    squares = cdist(corners, goal, "sqeuclidean")  # (8, M)
    possible = np.arange(len(goal))
    for corner in range(len(corners)):
        best = squares[corner].argmin()
        kept = (squares < squares[:, [best]]).any(axis=0)
        kept[best] = True
        possible, squares = possible[kept], squares[:, kept]
    return possible


def _find_among_few(start: npt.NDArray[np.float64], goal: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Indices (N,) of the goals (M, 3) nearest to the positions (N, 3), which are halved until few goals are left."""
    from scipy.spatial.distance import cdist

    if len(start) * len(goal) <= _MOST_PAIRS:
        return cdist(start, goal, "sqeuclidean").argmin(axis=1)
    axis = int(np.ptp(start, axis=0).argmax())
    low = start[:, axis] < (start[:, axis].min() + start[:, axis].max()) / 2
    nearest = np.empty(len(start), dtype=np.intp)
    for half in (low, ~low):
        possible = _possible_goals(start[half], goal)
        nearest[half] = possible[_find_among_few(start[half], goal[possible])]
    return nearest


def _length(offsets: npt.NDArray[np.intp], spacing: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Length (N,) of offsets (N, 2) or (N, 3) in voxels, in the unit of the spacing."""
    # One axis after the other: NumPy adds rows of two or three numbers slowly.
    return np.sqrt(functools.reduce(np.add, ((offsets * spacing) ** 2).T))


def _sort_by_distance(
    distances: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sort elements by their distance, then by their size; those on the other surface need the latter alone."""
    apart = np.flatnonzero(distances)
    apart = apart[np.lexsort((sizes[apart], distances[apart]))]
    shared = np.sort(sizes[distances == 0])
    return np.concatenate([np.zeros(len(shared)), distances[apart]]), np.concatenate([shared, sizes[apart]])


def _count_within(distances: npt.NDArray[np.float64], tolerance: float) -> int:
    """How many of ascending distances (N,) are at most the tolerance."""
    return int(np.searchsorted(distances, tolerance, side="right"))


def _quantile(distances: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], percent: float) -> float:
    """Smallest of the ascending distances (N,) within which a percentage of the summed sizes lies."""
    if len(distances) == 0:
        return math.inf
    index = int(np.searchsorted(np.cumsum(sizes) / sizes.sum(), percent / 100))
    return float(distances[min(index, len(distances) - 1)])


def _mean(distances: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> float:
    """Mean of distances (N,), weighted by sizes (N,); infinite of none."""
    return float((distances * sizes).sum() / sizes.sum()) if len(distances) else math.inf
