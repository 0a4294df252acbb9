"""The scores of one case: overlap, surface distances, volume, and what was predicted where nothing is.

The scores of one class in one case, on the voxels of the original image:

- DSC, the Dice similarity coefficient 2 |P and T| / (|P| + |T|) of the predicted voxels P and the true voxels T;
- IoU, the intersection over union |P and T| / |P or T| of the same voxels;
- NSD, the normalised surface Dice: the share of both boundaries that lies within a tolerance of the other boundary
  (Nikolov et al., https://arxiv.org/abs/1809.04430), boundary pieces weighted by their length or area as in
  https://github.com/google-deepmind/surface-distance;
- the NSD of the MedSAM challenge's script, which is another number (`scripts.metrics.challenge`);
- HD95 and ASSD, the robust Hausdorff distance and the average symmetric surface distance;
- the volume error in ml.

Empty masks, the one rule for all cases (that of two masks alone is in `scripts.metrics.pairs`):

- the truth lacks the class: NaN for every score but the volume error, whatever was predicted. The case is counted and
  not averaged, and what was predicted there shows up as false-positive slices;
- the truth has the class and the prediction is empty: DSC, IoU and NSD are 0, distances are infinite, which averages
  leave out and count, and the volume error is minus the true volume.

Slices lie along the last axis of an array ``(H, W, D)``. A *planar* case is a 2D image (D = 1) or a stack of 2D images
without a distance between them. Its boundaries are curves, so its surfaces are measured slice by slice in pixels of the
original image; a 3D boundary would count every foreground pixel of a slice and come out close to the DSC.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from scripts.errors import InputError
from scripts.metrics.challenge import nsd_challenge_by_class
from scripts.metrics.detection import count_slices
from scripts.metrics.distances import measure_distances
from scripts.metrics.masks import (
    DEFAULT_TOLERANCE,
    Mask,
    Overlap,
    check_masks,
    check_spacing,
    check_tolerance,
)
from scripts.metrics.pairs import PairMetrics, compare_masks, compare_slices


@dataclass(frozen=True)
class ClassScore:
    """How well one class was found in one case.

    Attributes:
        case: Name of the case.
        class_name: The class's name in the vocabulary.
        dsc: Dice over all voxels of the case, 0 to 1; NaN where the truth lacks the class.
        nsd: Normalised surface Dice, 0 to 1; NaN where the truth lacks the class.
        nsd_challenge: NSD as the MedSAM challenge's script has it, 0 to 1; NaN where the truth lacks the class.
        hd95: Robust Hausdorff distance in ``unit``; infinite where nothing was predicted, NaN where the truth lacks the
            class.
        assd: Average symmetric surface distance in ``unit``; likewise.
        volume_error_ml: Predicted minus true volume in ml; NaN of a planar case.
        patient: Whose case it is; in what is written, the name of the first of the patient's cases.
        class_id: The class's number in the vocabulary.
        tolerance: Tolerance of ``nsd`` and ``nsd_challenge`` in ``unit``.
        unit: "mm" where surfaces were measured over the volume in 3D, "px" where over planar slices.
        truth_voxels: Voxels of the class in the truth.
        predicted_voxels: Voxels of the class in the prediction.
        slices: Slices of the case.
        absent_slices: Slices whose truth lacks the class.
        false_positive_slices: Absent slices on which more than 0.1 % of the pixels are predicted.
        adjacent_absent_slices: Absent slices next to one that has the class.
        adjacent_false_positive_slices: False-positive slices among these.
        swapped_voxels: Predicted voxels inside the truth of the lateral partner, such as the other kidney; None of a
            class without a partner, or one that was not annotated in this case.
        false_negative_slices: Slices with the class on which nothing of it is predicted.
        slice_dsc: Mean over the slices with the class of each slice's own DSC; NaN where the truth lacks the class.
        iou: Intersection over union over all voxels of the case, 0 to 1; NaN where the truth lacks the class.
    """

    case: str
    class_name: str
    dsc: float
    nsd: float
    nsd_challenge: float
    hd95: float
    assd: float
    volume_error_ml: float
    patient: str
    class_id: int
    tolerance: float
    unit: str
    truth_voxels: int
    predicted_voxels: int
    slices: int
    absent_slices: int
    false_positive_slices: int
    adjacent_absent_slices: int
    adjacent_false_positive_slices: int
    swapped_voxels: int | None
    false_negative_slices: int
    slice_dsc: float
    iou: float

    @property
    def present(self) -> bool:
        """Whether the truth of the case contains the class."""
        return self.truth_voxels > 0

    @property
    def overlap(self) -> Overlap:
        """The voxels of prediction, truth and both; the last follow from the DSC, exactly below 2^50 voxels."""
        total = self.truth_voxels + self.predicted_voxels
        common = round(self.dsc * total / 2) if self.present else 0
        return Overlap(predicted=self.predicted_voxels, true=self.truth_voxels, common=common)

    @property
    def swapped_share(self) -> float:
        """Share of the predicted voxels inside the partner's truth, 0 to 1; NaN without a partner or a prediction."""
        if self.swapped_voxels is None or self.predicted_voxels == 0:
            return math.nan
        return self.swapped_voxels / self.predicted_voxels


def normalized_surface_dice(
    prediction: Mask, truth: Mask, *, spacing: Sequence[float], tolerance: float = DEFAULT_TOLERANCE
) -> float:
    """Share of the boundaries of two masks that lies within a tolerance of the other boundary.

    Args:
        prediction: Boolean array ``(H, W)`` or ``(H, W, D)``.
        truth: Boolean array of the same shape.
        spacing: Distance between neighbouring voxels along each array axis, in the order of the axes; mm, or all 1
            to measure in pixels.
        tolerance: Largest distance, in the unit of ``spacing``, at which a boundary counts as found.

    Returns:
        0 to 1; 0 where exactly one mask is empty, NaN where both are.

    Raises:
        InputError: An array is not boolean or neither 2D nor 3D, the shapes differ, or the spacing does not fit them.
        ConfigError: The tolerance is negative or not finite.
    """
    check_tolerance(tolerance)
    return measure_distances(prediction, truth, spacing=spacing).surface_dice(tolerance)


def without_names(scores: Sequence[ClassScore]) -> list[ClassScore]:
    """Call each patient after the first of the cases that are his or hers, so that no report names a person.

    Intervals ask only which cases belong together.

    Args:
        scores: Of all cases, in any order.

    Returns:
        The same scores in the same order.
    """
    first_case: dict[str, str] = {}
    for score in scores:
        first_case[score.patient] = min(score.case, first_case.get(score.patient, score.case))
    return [replace(score, patient=first_case[score.patient]) for score in scores]


def score_case(
    prediction: Mask,
    truth: Mask,
    *,
    case: str,
    class_ids: Sequence[int],
    class_names: Sequence[str],
    spacing: Sequence[float] | None,
    planar: bool,
    tolerance: float = DEFAULT_TOLERANCE,
    patient: str | None = None,
    partners: Sequence[int | None] | None = None,
) -> list[ClassScore]:
    """Score every class of one case.

    DSC and IoU pool all slices of the case, so voxels predicted on slices without the class lower them. The surfaces of
    a volume are measured in 3D in mm. Those of a planar case are measured per slice in 2D in pixels; its NSD is the
    mean over the slices where the truth or the prediction has the class, its distances over those where both have.

    The challenge's script gets a volume as its files hold it: the array as (slice, row, column) with the spacing as
    (x, y, z), x being along a row. For the axes (x, y, z) of an axial NIfTI file that is ``array.transpose(2, 1, 0)``
    with the file's own spacing. It sees the classes that the truth has. Of a planar case each slice is an image of its
    own, and a class's score the mean over the slices that have it.

    Args:
        prediction: Boolean array ``(K, H, W, D)`` on the voxels of the original image, one channel per class.
        truth: Boolean array of the same shape. Pass only classes that were annotated in this case: a class that was
            never drawn would be scored as absent.
        case: Name of the case.
        class_ids: The K class numbers, in channel order.
        class_names: The K class names, in channel order.
        spacing: Voxel size in mm along (H, W, D). Not used, and may be None, for a planar case.
        planar: Whether the slices are 2D images without a distance between them.
        tolerance: Tolerance of the NSD, in pixels for a planar case, in mm for a volume.
        patient: Whose case it is; its own name if None.
        partners: For each channel the class number of its lateral partner, None without one; None for no partners.

    Returns:
        One score per class, in channel order.

    Raises:
        InputError: The arrays are not boolean ``(K, H, W, D)`` of one shape, K differs from the number of ids, names or
            partners, or a volume comes without a spacing.
        ConfigError: The tolerance is negative or not finite.
    """
    sides = [None] * len(class_ids) if partners is None else list(partners)
    _check_case(prediction, truth, case, class_ids, class_names, sides)
    check_tolerance(tolerance)
    volume_spacing = None if planar else _require_spacing(spacing, case)
    challenge = _challenge_scores(prediction, truth, spacing=volume_spacing, tolerance=tolerance)
    return [
        _score_class(
            prediction[channel],
            truth[channel],
            case=case,
            patient=case if patient is None else patient,
            class_id=int(class_ids[channel]),
            class_name=class_names[channel],
            challenge=challenge[channel],
            swapped=_swapped_voxels(prediction[channel], truth, class_ids, sides[channel]),
            spacing=volume_spacing,
            tolerance=float(tolerance),
        )
        for channel in range(len(prediction))
    ]


def _score_class(
    prediction: Mask,
    truth: Mask,
    *,
    case: str,
    patient: str,
    class_id: int,
    class_name: str,
    challenge: float,
    swapped: int | None,
    spacing: Sequence[float] | None,
    tolerance: float,
) -> ClassScore:
    """Score one class, masks (H, W, D); without a spacing the case is planar."""
    pair = _compare(prediction, truth, spacing=spacing, tolerance=tolerance)
    counts = count_slices(prediction, truth)
    return ClassScore(
        case=case,
        class_name=class_name,
        dsc=pair.dsc,
        nsd=pair.nsd,
        nsd_challenge=challenge,
        hd95=pair.hd95,
        assd=pair.assd,
        volume_error_ml=pair.volume_error_ml,
        patient=patient,
        class_id=class_id,
        tolerance=tolerance,
        unit="px" if spacing is None else "mm",
        truth_voxels=int(np.count_nonzero(truth)),
        predicted_voxels=int(np.count_nonzero(prediction)),
        slices=counts.slices,
        absent_slices=counts.absent,
        false_positive_slices=counts.false_positive,
        adjacent_absent_slices=counts.adjacent_absent,
        adjacent_false_positive_slices=counts.adjacent_false_positive,
        swapped_voxels=swapped,
        false_negative_slices=counts.false_negative,
        slice_dsc=_mean_slice_dice(prediction, truth),
        iou=pair.iou,
    )


def _compare(prediction: Mask, truth: Mask, *, spacing: Sequence[float] | None, tolerance: float) -> PairMetrics:
    """Compare masks (H, W, D); of a class that the truth lacks there is only the volume error."""
    if spacing is None:
        pair = compare_slices(prediction, truth, tolerance=tolerance).mean
    else:
        pair = compare_masks(prediction, truth, spacing=spacing, tolerance=tolerance)
    missing = dict.fromkeys(("dsc", "iou", "nsd", "hd95", "assd"), math.nan)
    return pair if truth.any() else replace(pair, **missing)


def _challenge_scores(
    prediction: Mask, truth: Mask, *, spacing: Sequence[float] | None, tolerance: float
) -> list[float]:
    """The challenge's NSD of each channel of (K, H, W, D); NaN where the truth lacks the class."""
    if spacing is not None:
        rows, columns, slices = spacing
        stored = (columns, rows, slices)  # x, y, z
        return _challenge_of_image(
            prediction.transpose(0, 3, 1, 2), truth.transpose(0, 3, 1, 2), spacing=stored, tolerance=tolerance
        )
    images = [
        _challenge_of_image(prediction[..., index], truth[..., index], spacing=None, tolerance=tolerance)
        for index in range(truth.shape[-1])
    ]
    return [_mean(score for score in of_class if not math.isnan(score)) for of_class in zip(*images, strict=True)]


def _challenge_of_image(
    prediction: Mask, truth: Mask, *, spacing: Sequence[float] | None, tolerance: float
) -> list[float]:
    """The challenge's NSD of each channel of (K, D, H, W) or (K, H, W); NaN where the truth lacks the class."""
    present = [channel for channel, true in enumerate(truth) if true.any()]
    scores = nsd_challenge_by_class(
        [prediction[channel] for channel in present],
        [truth[channel] for channel in present],
        spacing=spacing,
        tolerance=tolerance,
    )
    found = dict(zip(present, scores, strict=True))
    return [found.get(channel, math.nan) for channel in range(len(truth))]


def _swapped_voxels(prediction: Mask, truth: Mask, class_ids: Sequence[int], partner: int | None) -> int | None:
    """Predicted voxels (H, W, D) of a class inside its partner's channel of the truth (K, H, W, D)."""
    if partner is None or partner not in class_ids:
        return None
    return int(np.count_nonzero(prediction & truth[list(class_ids).index(partner)]))


def _mean_slice_dice(prediction: Mask, truth: Mask) -> float:
    """Mean over the slices of (H, W, D) with the class of each slice's DSC; NaN where there is none."""
    true = np.count_nonzero(truth, axis=(0, 1))  # (D,)
    total = np.count_nonzero(prediction, axis=(0, 1)) + true
    common = np.count_nonzero(prediction & truth, axis=(0, 1))
    return _mean(float(2 * common[index] / total[index]) for index in np.flatnonzero(true))


def _mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    values = list(values)
    return fmean(values) if values else math.nan


def _check_case(
    prediction: Mask,
    truth: Mask,
    case: str,
    class_ids: Sequence[int],
    class_names: Sequence[str],
    partners: Sequence[int | None],
) -> None:
    """Refuse arrays that are not (K, H, W, D) with one id, one name and one partner per channel."""
    check_masks(prediction, truth)
    if prediction.ndim != 4:
        raise InputError(
            f"Expected arrays (K, H, W, D) for {case!r}, got the shape {prediction.shape}; "
            "add the missing axes, D = 1 for a 2D image."
        )
    if not len(class_ids) == len(class_names) == len(partners) == len(prediction):
        raise InputError(
            f"Expected one class id, one name and one partner per channel of {case!r}, got {len(class_ids)} ids, "
            f"{len(class_names)} names, {len(partners)} partners and {len(prediction)} channels; pass them in channel "
            "order."
        )


def _require_spacing(spacing: Sequence[float] | None, case: str) -> Sequence[float]:
    """The spacing of a volume, refused where it is missing or unfit."""
    if spacing is None:
        raise InputError(
            f"Expected the voxel size in mm of the volume {case!r}, got none; pass spacing, "
            "or planar=True where the slices are 2D images."
        )
    check_spacing(spacing, 3)
    return spacing
