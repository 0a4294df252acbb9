"""What every metric asks of two masks, the box around them, and their overlap in voxels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from scripts.errors import ConfigError, InputError

Mask: TypeAlias = npt.NDArray[np.bool_]

DEFAULT_TOLERANCE: Final = 2.0
"""Distance in mm or pixels up to which a boundary counts as found."""


@dataclass(frozen=True)
class Overlap:
    """How many voxels a predicted and a true mask have, alone and together.

    Attributes:
        predicted: Voxels of the prediction.
        true: Voxels of the truth.
        common: Voxels of both at once.
    """

    predicted: int
    true: int
    common: int

    @property
    def dsc(self) -> float:
        """Dice similarity coefficient 2 |P and T| / (|P| + |T|), 0 to 1; NaN where both masks are empty."""
        total = self.predicted + self.true
        return float(2 * self.common / total) if total else math.nan

    @property
    def iou(self) -> float:
        """Intersection over union |P and T| / |P or T|, 0 to 1; NaN where both masks are empty."""
        union = self.predicted + self.true - self.common
        return float(self.common / union) if union else math.nan


def count_overlap(prediction: Mask, truth: Mask) -> Overlap:
    """Count the voxels of two masks.

    Counted in integers: MONAI's ``compute_dice`` and ``compute_iou`` add float32 voxels, which a large volume needs
    much memory for, and have other rules for empty masks.

    Args:
        prediction: Boolean array of any shape.
        truth: Boolean array of the same shape.

    Raises:
        InputError: An array is not boolean, or the shapes differ.
    """
    check_masks(prediction, truth)
    return Overlap(
        predicted=int(np.count_nonzero(prediction)),
        true=int(np.count_nonzero(truth)),
        common=int(np.count_nonzero(prediction & truth)),
    )


def dice_score(prediction: Mask, truth: Mask) -> float:
    """Dice similarity coefficient 2 |P and T| / (|P| + |T|) of two masks.

    Args:
        prediction: Boolean array of any shape.
        truth: Boolean array of the same shape.

    Returns:
        0 to 1; 0 where exactly one mask is empty, NaN where both are.

    Raises:
        InputError: An array is not boolean, or the shapes differ.
    """
    return count_overlap(prediction, truth).dsc


def crop_to_union(prediction: Mask, truth: Mask) -> tuple[Mask, Mask]:
    """Cut both masks to the smallest box around either.

    Args:
        prediction: Boolean array `(H, W)` or `(H, W, D)`.
        truth: Boolean array of the same shape.

    Returns:
        Views of both, of no extent where both masks are empty.
    """
    box = bounding_box(prediction | truth)
    return prediction[box], truth[box]


def bounding_box(mask: Mask) -> tuple[slice, ...]:
    """Find the smallest box around a mask.

    Args:
        mask: Boolean array of any shape.

    Returns:
        A slice for each axis, of no extent where the mask is empty.
    """
    box: list[slice] = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else slice(0, 0))
        mask = mask[(slice(None),) * axis + (box[-1],)]
    return tuple(box)


def check_masks(prediction: Mask, truth: Mask) -> None:
    """Refuse arrays that are not boolean or not of one shape.

    Raises:
        InputError: They are not.
    """
    for label, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != np.bool_:
            raise InputError(f"Expected a boolean {label}, got {mask.dtype}; compare it with 0 or a threshold first.")
    if prediction.shape != truth.shape:
        raise InputError(
            f"Expected prediction and truth of one shape, got {prediction.shape} and {truth.shape}; "
            "bring the prediction back to the voxels of the original image."
        )


def check_spacing(spacing: Sequence[float], dimensions: int) -> None:
    """Refuse a spacing that does not give one positive distance per axis of a 2D or 3D array.

    Raises:
        InputError: It does not, or the array has other than 2 or 3 axes.
    """
    if dimensions not in (2, 3):
        raise InputError(f"Expected 2D or 3D masks, got {dimensions} axes; pass one class of one case at a time.")
    if len(spacing) != dimensions or not all(math.isfinite(value) and value > 0 for value in spacing):
        raise InputError(
            f"Expected {dimensions} positive distances in the order of the array's axes as spacing, "
            f"got {tuple(spacing)}; correct the image's header or the call."
        )


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that is no distance.

    Raises:
        ConfigError: It is negative or not finite.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"Expected a finite tolerance of at least 0, got {tolerance}; correct the setting.")
