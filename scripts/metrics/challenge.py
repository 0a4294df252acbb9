"""The NSD of the CVPR 2024 challenge "Segment Anything in Medical Images on Laptop", with the script's peculiarities.

https://github.com/bowang-lab/MedSAM, `evaluation/compute_metrics.py`, is what tables of that challenge and of papers on
its data were made with. Its figures are not comparable with a normalised surface Dice elsewhere (`scripts.metrics`):

- a 2D image becomes a volume of one slice with voxels of 1 x 1 x 1, so that every foreground pixel lies on two flat
  faces of the surface: the score is close to a DSC that forgives errors within the tolerance;
- a volume's array is `(D, H, W)` and its spacing `(x, y, z)`; they are taken as they are stored, so that the distance
  between slices is used along the rows, and the other way round;
- the classes are 1 to the largest number in the truth; one of them that is in neither mask makes the mean DSC NaN;
- where the mean DSC is not above 0.2, the NSD is 0 without being computed. NaN is not above 0.2.

The script fails on empty masks with NumPy 2, where it ends at a name that was removed; what it gives with NumPy 1 is
given here. It rounds to four decimals in its table; here nothing is rounded.

A volume in the order of a NIfTI file's axes, `(x, y, z)`, is passed as `array.transpose(2, 1, 0)` with the spacing of
its file as it is.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Final

import numpy as np
import numpy.typing as npt

from scripts.errors import InputError
from scripts.metrics.distances import measure_distances
from scripts.metrics.masks import DEFAULT_TOLERANCE, Mask, check_masks, check_spacing, check_tolerance, dice_score

LOWEST_MEAN_DSC: Final = 0.2
"""The mean DSC that a case has to exceed for its NSD to be computed."""

_FLAT_SPACING: Final = (1.0, 1.0, 1.0)


def nsd_challenge(
    prediction: npt.NDArray[np.integer],
    truth: npt.NDArray[np.integer],
    *,
    spacing: Sequence[float] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> float:
    """NSD of one case as the challenge's script prints it, before rounding.

    Args:
        prediction: Label numbers `(H, W)`, or `(D, H, W)` as in the challenge's files; 0 is background.
        truth: Label numbers of the same shape.
        spacing: Of a volume: voxel size in mm `(x, y, z)` as in the challenge's files. Not used in 2D.
        tolerance: Tolerance in mm, or pixels in 2D.

    Returns:
        Mean over the classes 1 to the truth's largest number; 0 where their mean DSC is not above 0.2, which is also
        so where one of these numbers is in neither mask, and where the truth has no class at all.

    Raises:
        InputError: The arrays are not whole numbers in 2D or 3D of one shape, or a volume comes without a spacing.
        ConfigError: The tolerance is negative or not finite.
    """
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"Expected label numbers as {name}, got {labels.dtype}; pass whole numbers.")
    numbers = range(1, int(truth.max(initial=0)) + 1)
    scores = nsd_challenge_by_class(
        [prediction == number for number in numbers],
        [truth == number for number in numbers],
        spacing=spacing,
        tolerance=tolerance,
    )
    return fmean(scores) if scores else 0.0


def nsd_challenge_by_class(
    predictions: Sequence[Mask],
    truths: Sequence[Mask],
    *,
    spacing: Sequence[float] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> list[float]:
    """NSD of every class of one case as the challenge's script computes it before it takes the mean.

    Args:
        predictions: Boolean arrays `(H, W)` or `(D, H, W)`, one per class.
        truths: Boolean arrays of the same shape, in the same order. Leave out classes that are in neither mask: one of
            them makes the mean DSC NaN and every score 0, as in the script.
        spacing: Of volumes: voxel size in mm `(x, y, z)`. Not used in 2D.
        tolerance: Tolerance in mm, or pixels in 2D.

    Returns:
        One NSD per class, 0 to 1; all 0 where the mean DSC of the classes is not above 0.2.

    Raises:
        InputError: The arrays are not boolean in 2D or 3D of one shape, their numbers differ, or volumes come without a
            spacing.
        ConfigError: The tolerance is negative or not finite.
    """
    check_tolerance(tolerance)
    if len(predictions) != len(truths):
        raise InputError(f"Expected a truth for each of {len(predictions)} predictions, got {len(truths)}; pair them.")
    pairs = list(zip(predictions, truths, strict=True))
    spacings = [_script_spacing(*pair, spacing) for pair in pairs]
    if not (pairs and fmean(dice_score(*pair) for pair in pairs) > LOWEST_MEAN_DSC):
        return [0.0] * len(pairs)
    return [
        measure_distances(*_as_volumes(*pair), spacing=distances).surface_dice(tolerance)
        for pair, distances in zip(pairs, spacings, strict=True)
    ]


def _script_spacing(prediction: Mask, truth: Mask, spacing: Sequence[float] | None) -> Sequence[float]:
    """The spacing that the script takes for the three axes, once masks and spacing are known to be fit."""
    check_masks(prediction, truth)
    if prediction.ndim == 2:
        return _FLAT_SPACING
    if spacing is None:
        raise InputError("Expected the voxel size in mm of a volume, got none; pass spacing in the order x, y, z.")
    check_spacing(spacing, prediction.ndim)
    return spacing


def _as_volumes(prediction: Mask, truth: Mask) -> tuple[Mask, Mask]:
    """Give 2D masks (H, W) a third axis at the end, (H, W, 1)."""
    if prediction.ndim == 2:
        return prediction[..., np.newaxis], truth[..., np.newaxis]
    return prediction, truth
