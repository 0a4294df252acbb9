"""A predicted and a true mask compared: overlap, surface Dice, surface distances and volume, all in one go.

Both surfaces are extracted once and each distance is measured once (`scripts.metrics.distances`); NSD, HD95, HD100 and
ASSD are read off the same result. They are DeepMind's (https://github.com/google-deepmind/surface-distance), where
every element of a surface counts by its length or area. MONAI's `compute_surface_dice` with `use_subvoxels=True` gives
the same NSD; its `compute_hausdorff_distance` counts the voxels at the edge alike and gives another HD95.

Empty masks, one rule for each metric:

| metric | both empty | exactly one empty |
|---|---|---|
| `dsc`, `iou`, `nsd` | NaN: there is nothing to find | 0: nothing was found |
| `hd95`, `hd100`, `assd`, `mean_to_truth`, `mean_to_prediction` | infinite | infinite |
| `volume_error_ml` | 0 | minus the true volume, or the predicted one |

A distance needs two surfaces and is infinite without them, as in DeepMind's robust Hausdorff distance; DeepMind's mean
distances are NaN or infinite instead. Average the finite ones and count the others: no finite stand-in is fair to all
sizes of image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from scripts.errors import InputError
from scripts.metrics.distances import measure_distances
from scripts.metrics.masks import DEFAULT_TOLERANCE, Mask, check_masks, count_overlap

CUBIC_MILLIMETRES_PER_MILLILITRE = 1000.0


@dataclass(frozen=True)
class PairMetrics:
    """One predicted mask against the true one.

    Attributes:
        dsc: Dice similarity coefficient, 0 to 1.
        nsd: Normalised surface Dice: share of both surfaces within the tolerance of the other, 0 to 1.
        hd95: Robust Hausdorff distance: the larger of the two directions' 95th percentiles by length or area.
        hd100: Hausdorff distance: the largest distance of both directions.
        assd: Average symmetric surface distance: mean over both surfaces by length or area.
        mean_to_truth: Mean distance from the prediction's surface to the truth's.
        mean_to_prediction: Mean distance from the truth's surface to the prediction's.
        volume_error_ml: Predicted minus true volume in ml; NaN of 2D masks, which have none. It is one only where the
            spacing was in mm.
        iou: Intersection over union, 0 to 1.
    """

    dsc: float
    nsd: float
    hd95: float
    hd100: float
    assd: float
    mean_to_truth: float
    mean_to_prediction: float
    volume_error_ml: float
    iou: float


@dataclass(frozen=True)
class SliceMetrics:
    """A stack of predicted 2D masks against the true ones, surfaces slice by slice in pixels.

    Attributes:
        mean: DSC and IoU over the pixels of all slices together; NSD, the mean over the slices where either mask has
            something; distances, the means over the slices where both have, in pixels; no volume error (NaN).
        slices: Slices where either mask has something.
        slices_without_distance: Those of them where only one has: they count 0 in the NSD and are left out of the means
            of the distances.
    """

    mean: PairMetrics
    slices: int
    slices_without_distance: int


def compare_masks(
    prediction: Mask, truth: Mask, *, spacing: Sequence[float], tolerance: float = DEFAULT_TOLERANCE
) -> PairMetrics:
    """Compare two masks.

    Args:
        prediction: Boolean array `(H, W)` or `(H, W, D)`.
        truth: Boolean array of the same shape.
        spacing: Distance between neighbouring voxels along each array axis, in the order of the axes; mm, or all 1
            to measure in pixels.
        tolerance: Tolerance of the NSD in the unit of ``spacing``, inclusive.

    Returns:
        All metrics; for empty masks see the module's rules.

    Raises:
        InputError: An array is not boolean or neither 2D nor 3D, the shapes differ, or the spacing does not fit them.
        ConfigError: The tolerance is negative or not finite.
    """
    distances = measure_distances(prediction, truth, spacing=spacing)
    overlap = count_overlap(prediction, truth)
    return PairMetrics(
        dsc=overlap.dsc,
        nsd=distances.surface_dice(tolerance),
        hd95=distances.hausdorff(95),
        hd100=distances.hausdorff(100),
        assd=distances.mean(),
        mean_to_truth=distances.mean_to_truth(),
        mean_to_prediction=distances.mean_to_prediction(),
        volume_error_ml=_volume_error_ml(prediction, truth, spacing),
        iou=overlap.iou,
    )


def compare_slices(prediction: Mask, truth: Mask, *, tolerance: float = DEFAULT_TOLERANCE) -> SliceMetrics:
    """Compare two stacks of 2D masks without a distance between them, slice by slice in pixels.

    In 3D every foreground pixel of a lone slice would be surface, and the NSD would come out close to the DSC.

    Args:
        prediction: Boolean array `(H, W, D)`, slices along the last axis.
        truth: Boolean array of the same shape.
        tolerance: Tolerance of the NSD in pixels, inclusive.

    Returns:
        The averages over slices. Where no slice has something in both masks the distances are infinite, and where none
        has something in either the NSD is NaN, as for single masks.

    Raises:
        InputError: The arrays are not boolean `(H, W, D)` of one shape.
        ConfigError: The tolerance is negative or not finite.
    """
    check_masks(prediction, truth)
    if prediction.ndim != 3:
        raise InputError(f"Expected stacks of slices (H, W, D), got the shape {prediction.shape}; add the last axis.")
    slices = [
        compare_masks(prediction[..., index], truth[..., index], spacing=(1.0, 1.0), tolerance=tolerance)
        for index in np.flatnonzero((prediction | truth).any(axis=(0, 1)))
    ]
    both = [metrics for metrics in slices if math.isfinite(metrics.hd100)]
    overlap = count_overlap(prediction, truth)
    mean = PairMetrics(
        dsc=overlap.dsc,
        nsd=_mean((metrics.nsd for metrics in slices), otherwise=math.nan),
        hd95=_mean((metrics.hd95 for metrics in both), otherwise=math.inf),
        hd100=_mean((metrics.hd100 for metrics in both), otherwise=math.inf),
        assd=_mean((metrics.assd for metrics in both), otherwise=math.inf),
        mean_to_truth=_mean((metrics.mean_to_truth for metrics in both), otherwise=math.inf),
        mean_to_prediction=_mean((metrics.mean_to_prediction for metrics in both), otherwise=math.inf),
        volume_error_ml=math.nan,
        iou=overlap.iou,
    )
    return SliceMetrics(mean=mean, slices=len(slices), slices_without_distance=len(slices) - len(both))


def _volume_error_ml(prediction: Mask, truth: Mask, spacing: Sequence[float]) -> float:
    """Predicted minus true volume in ml of masks with a spacing in mm; NaN in 2D."""
    if prediction.ndim != 3:
        return math.nan
    voxels = np.count_nonzero(prediction) - np.count_nonzero(truth)
    return float(voxels * math.prod(spacing) / CUBIC_MILLIMETRES_PER_MILLILITRE)


def _mean(values: Iterable[float], *, otherwise: float) -> float:
    """Arithmetic mean, or what to say of nothing."""
    values = list(values)
    return fmean(values) if values else otherwise
