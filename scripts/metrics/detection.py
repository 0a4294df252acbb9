"""On which slices a class was found that is not there, and on which it was missed.

A slice without the class is a false positive where more than 0.1 % of its pixels are predicted. One that lies next to a
slice with the class is counted apart too: there the prediction may only be a slice too long. A slice with the class is
a false negative where nothing of it is predicted.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from scripts.errors import InputError
from scripts.metrics.masks import Mask, check_masks

# A slice without the class is a false positive above one predicted pixel in so many (0.1 %); an integer, so that
# the comparison at the threshold is exact.
_PIXELS_PER_FALSE_POSITIVE: Final = 1000


@dataclass(frozen=True)
class SliceCounts:
    """Slices of one class in one case.

    Attributes:
        slices: All slices.
        absent: Slices whose truth lacks the class.
        false_positive: Absent slices on which more than 0.1 % of the pixels are predicted.
        adjacent_absent: Absent slices directly before or behind one that has the class.
        adjacent_false_positive: False positives among these.
        false_negative: Slices with the class on which not a pixel of it is predicted.
    """

    slices: int
    absent: int
    false_positive: int
    adjacent_absent: int
    adjacent_false_positive: int
    false_negative: int


def count_slices(prediction: Mask, truth: Mask) -> SliceCounts:
    """Count the slices of one class by what is and what was predicted there.

    Args:
        prediction: Boolean array ``(H, W, D)``, slices along the last axis.
        truth: Boolean array of the same shape.

    Returns:
        The counts, each from 0 to D.

    Raises:
        InputError: The arrays are not boolean ``(H, W, D)`` of one shape.
    """
    check_masks(prediction, truth)
    if truth.ndim != 3:
        raise InputError(f"Expected masks (H, W, D), got the shape {truth.shape}; add the axis of the slices.")
    present = np.asarray(truth.any(axis=(0, 1)))  # (D,)
    predicted = np.count_nonzero(prediction, axis=(0, 1))  # (D,)
    false_positive = ~present & (predicted * _PIXELS_PER_FALSE_POSITIVE > truth.shape[0] * truth.shape[1])
    adjacent = ~present & _next_to(present)
    return SliceCounts(
        slices=truth.shape[-1],
        absent=int(np.count_nonzero(~present)),
        false_positive=int(np.count_nonzero(false_positive)),
        adjacent_absent=int(np.count_nonzero(adjacent)),
        adjacent_false_positive=int(np.count_nonzero(adjacent & false_positive)),
        false_negative=int(np.count_nonzero(present & (predicted == 0))),
    )


def _next_to(marked: Mask) -> Mask:
    """Which places (D,) have a marked neighbour."""
    beside = np.zeros_like(marked)
    beside[1:] |= marked[:-1]
    beside[:-1] |= marked[1:]
    return beside
