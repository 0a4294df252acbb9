"""Overlap and boundary scores of one case, and their averages over cases and classes.

Two scores are reported, both between 0 and 1, higher being better:

- DSC, the Dice similarity coefficient 2 |P and T| / (|P| + |T|) of the predicted voxels P and the true voxels T;
- NSD, the normalised surface Dice: the share of both boundaries that lies within a tolerance of the other boundary
  (Nikolov et al., https://arxiv.org/abs/1809.04430). Boundary pieces are weighted by their length or area, as in
  https://github.com/google-deepmind/surface-distance.

Empty masks, the one rule for both scores:

- prediction and truth both empty: NaN, there is nothing to compare;
- exactly one of them empty: 0;
- a case whose truth lacks a class: NaN for that class, whatever was predicted. It is counted, never averaged, and what
  was predicted there shows up as false-positive slices.

Slices lie along the last axis of an array ``(H, W, D)``. A *planar* case is a 2D image (D = 1) or a stack of 2D images
without a distance between them. Its boundaries are curves, so its NSD is taken slice by slice in pixels of the original
image; a 3D boundary would count every foreground pixel of a slice as boundary and come out close to the DSC.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np

from scripts.errors import ConfigError, InputError
from scripts.metrics.distances import measure_distances
from scripts.metrics.masks import (
    DEFAULT_TOLERANCE,
    Mask,
    check_masks,
    check_spacing,
    check_tolerance,
    dice_score,
)

PROTOCOLS: Final = ("all", "oracle")
"""Which slices a class is asked for on: "all" of the case, or ("oracle") only those whose truth contains it."""

# A slice without the class is a false positive above one predicted pixel in so many (0.1 %); an integer, so that
# the comparison at the threshold is exact.
_PIXELS_PER_FALSE_POSITIVE: Final = 1000


@dataclass(frozen=True)
class ClassScore:
    """How well one class was found in one case.

    Attributes:
        case: Name of the case.
        class_id: The class's number in the vocabulary.
        class_name: The class's name in the vocabulary.
        dsc: Dice over all voxels of the case, 0 to 1; NaN where the truth lacks the class.
        nsd: Normalised surface Dice, 0 to 1; NaN where the truth lacks the class.
        tolerance: Tolerance of ``nsd`` in ``unit``.
        unit: "mm" where ``nsd`` was taken over the volume in 3D, "px" where it was averaged over planar slices.
        truth_voxels: Voxels of the class in the truth.
        predicted_voxels: Voxels of the class in the prediction.
        slices: Slices of the case.
        absent_slices: Slices whose truth lacks the class.
        false_positive_slices: Absent slices on which more than 0.1 % of the pixels are predicted.
    """

    case: str
    class_id: int
    class_name: str
    dsc: float
    nsd: float
    tolerance: float
    unit: str
    truth_voxels: int
    predicted_voxels: int
    slices: int
    absent_slices: int
    false_positive_slices: int

    @property
    def present(self) -> bool:
        """Whether the truth of the case contains the class."""
        return self.truth_voxels > 0


@dataclass(frozen=True)
class ClassSummary:
    """One class over all cases.

    Attributes:
        class_id: The class's number in the vocabulary.
        class_name: The class's name in the vocabulary.
        dsc: Mean DSC over the cases whose truth contains the class, 0 to 1; NaN where there is none.
        nsd: Mean NSD over the same cases.
        cases: Number of cases whose truth contains the class.
        cases_without: Number of cases whose truth lacks it.
        absent_slices: Slices of all cases whose truth lacks the class.
        false_positive_slices: Absent slices on which more than 0.1 % of the pixels are predicted.
    """

    class_id: int
    class_name: str
    dsc: float
    nsd: float
    cases: int
    cases_without: int
    absent_slices: int
    false_positive_slices: int

    @property
    def false_positive_rate(self) -> float:
        """False-positive slices over absent slices, 0 to 1; NaN where every slice contains the class."""
        return self.false_positive_slices / self.absent_slices if self.absent_slices else math.nan


@dataclass(frozen=True)
class Summary:
    """All classes over all cases of one evaluation.

    Attributes:
        protocol: "all" or "oracle"; results of the two are not comparable.
        unit: Unit of the tolerance, "mm" or "px".
        tolerance: Tolerance of the NSD in ``unit``.
        dsc: Unweighted mean of the classes' DSC over the classes that occur in a truth; NaN where none does.
        nsd: Unweighted mean of the classes' NSD over the same classes.
        classes: One entry per class in ascending id order.
    """

    protocol: str
    unit: str
    tolerance: float
    dsc: float
    nsd: float
    classes: tuple[ClassSummary, ...]


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
        0 to 1; for empty masks see the module's rules.

    Raises:
        InputError: An array is not boolean or neither 2D nor 3D, the shapes differ, or the spacing does not fit them.
        ConfigError: The tolerance is negative or not finite.
    """
    check_tolerance(tolerance)
    return measure_distances(prediction, truth, spacing=spacing).surface_dice(tolerance)


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
) -> list[ClassScore]:
    """Score every class of one case.

    The DSC pools all slices of the case, so voxels predicted on slices without the class lower it. The NSD of a volume
    is taken in 3D in mm. The NSD of a planar case is taken per slice in 2D in pixels and averaged over the slices
    where the truth or the prediction has the class.

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

    Returns:
        One score per class, in channel order.

    Raises:
        InputError: The arrays are not boolean ``(K, H, W, D)`` of one shape, K differs from the number of ids or names,
            or a volume comes without a spacing.
        ConfigError: The tolerance is negative or not finite.
    """
    _check_case(prediction, truth, case, class_ids, class_names)
    check_tolerance(tolerance)
    volume_spacing = None if planar else _require_spacing(spacing, case)
    return [
        _score_class(
            prediction[channel],
            truth[channel],
            case=case,
            class_id=class_ids[channel],
            class_name=class_names[channel],
            spacing=volume_spacing,
            tolerance=tolerance,
        )
        for channel in range(len(prediction))
    ]


def summarise(scores: Sequence[ClassScore], *, protocol: str, unit: str) -> Summary:
    """Average the scores of many cases, first over cases and then over classes.

    A class's mean is over the cases whose truth contains it; the overall mean weighs every class that occurs alike,
    whatever its number of cases.

    Args:
        scores: Scores of all cases and classes, in any order; all in the same unit and at the same tolerance.
        protocol: How the classes were asked for, one of ``PROTOCOLS``.
        unit: Unit the NSD is meant to be in, "mm" or "px".

    Returns:
        The averages, classes in ascending id order.

    Raises:
        ConfigError: The protocol is unknown, or the scores are not all in ``unit`` at one tolerance.
        InputError: There are no scores, a class of a case comes twice, or ids and names do not match one to one.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"Expected the protocol to be one of {', '.join(PROTOCOLS)}, got {protocol!r}; correct it.")
    tolerance = _common_tolerance(scores, unit)
    _check_classes(scores)
    classes = tuple(
        _summarise_class([score for score in scores if score.class_id == class_id])
        for class_id in sorted({score.class_id for score in scores})
    )
    return Summary(
        protocol=protocol,
        unit=unit,
        tolerance=tolerance,
        dsc=_mean(entry.dsc for entry in classes if entry.cases),
        nsd=_mean(entry.nsd for entry in classes if entry.cases),
        classes=classes,
    )


def _score_class(
    prediction: Mask,
    truth: Mask,
    *,
    case: str,
    class_id: int,
    class_name: str,
    spacing: Sequence[float] | None,
    tolerance: float,
) -> ClassScore:
    """Score one class, arrays (H, W, D); without a spacing the case is planar."""
    dsc, nsd = _overlap(prediction, truth, spacing, tolerance)
    absent_slices, false_positive_slices = _count_false_positives(prediction, truth)
    return ClassScore(
        case=case,
        class_id=int(class_id),
        class_name=class_name,
        dsc=dsc,
        nsd=nsd,
        tolerance=float(tolerance),
        unit="px" if spacing is None else "mm",
        truth_voxels=int(np.count_nonzero(truth)),
        predicted_voxels=int(np.count_nonzero(prediction)),
        slices=truth.shape[-1],
        absent_slices=absent_slices,
        false_positive_slices=false_positive_slices,
    )


def _overlap(prediction: Mask, truth: Mask, spacing: Sequence[float] | None, tolerance: float) -> tuple[float, float]:
    """DSC and NSD of one class, arrays (H, W, D); without a spacing the NSD is that of planar slices."""
    if not truth.any():
        return math.nan, math.nan
    if spacing is None:
        nsd = _planar_surface_dice(prediction, truth, tolerance)
    else:
        nsd = normalized_surface_dice(prediction, truth, spacing=spacing, tolerance=tolerance)
    return dice_score(prediction, truth), nsd


def _planar_surface_dice(prediction: Mask, truth: Mask, tolerance: float) -> float:
    """Mean 2D NSD in pixels over the slices of (H, W, D) where the prediction or the truth has something."""
    return _mean(
        normalized_surface_dice(prediction[..., index], truth[..., index], spacing=(1.0, 1.0), tolerance=tolerance)
        for index in np.flatnonzero((prediction | truth).any(axis=(0, 1)))
    )


def _count_false_positives(prediction: Mask, truth: Mask) -> tuple[int, int]:
    """Slices of (H, W, D) without the class, and those of them with more than 0.1 % of their pixels predicted."""
    absent = ~truth.any(axis=(0, 1))  # (D,)
    predicted = np.count_nonzero(prediction, axis=(0, 1))  # (D,)
    pixels = truth.shape[0] * truth.shape[1]
    false_positive = absent & (predicted * _PIXELS_PER_FALSE_POSITIVE > pixels)
    return int(np.count_nonzero(absent)), int(np.count_nonzero(false_positive))


def _summarise_class(scores: Sequence[ClassScore]) -> ClassSummary:
    """Average the scores of one class over the cases that contain it."""
    present = [score for score in scores if score.present]
    return ClassSummary(
        class_id=scores[0].class_id,
        class_name=scores[0].class_name,
        dsc=_mean(score.dsc for score in present),
        nsd=_mean(score.nsd for score in present),
        cases=len(present),
        cases_without=len(scores) - len(present),
        absent_slices=sum(score.absent_slices for score in scores),
        false_positive_slices=sum(score.false_positive_slices for score in scores),
    )


def _mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    values = list(values)
    return fmean(values) if values else math.nan


def _common_tolerance(scores: Sequence[ClassScore], unit: str) -> float:
    """The tolerance that all scores share, once they are known to be in the wanted unit."""
    if not scores:
        raise InputError("Expected the scores of at least one case, got none; check that the data list has cases.")
    units = sorted({score.unit for score in scores})
    if units != [unit]:
        raise ConfigError(
            f"Expected every NSD in {unit}, got {' and '.join(units)}; summarise planar cases (px) and volumes (mm) "
            "apart from each other."
        )
    tolerances = sorted({score.tolerance for score in scores})
    if len(tolerances) > 1:
        raise ConfigError(
            f"Expected every NSD at one tolerance, got {' and '.join(map(str, tolerances))} {unit}; "
            "score all cases with the same one."
        )
    return tolerances[0]


def _check_classes(scores: Sequence[ClassScore]) -> None:
    """Refuse a class of a case that comes twice, and ids and names that do not match one to one."""
    seen: set[tuple[str, int]] = set()
    for score in scores:
        if (score.case, score.class_id) in seen:
            raise InputError(
                f"Expected one score per case and class, got a second one for {score.class_name!r} in {score.case!r}; "
                "give every case a name of its own."
            )
        seen.add((score.case, score.class_id))
    pairs = sorted({(score.class_id, score.class_name) for score in scores})
    if not len(pairs) == len({number for number, _ in pairs}) == len({name for _, name in pairs}):
        raise InputError(
            f"Expected one name per class id, got {pairs}; summarise only scores made with the same vocabulary."
        )


def _check_case(prediction: Mask, truth: Mask, case: str, class_ids: Sequence[int], class_names: Sequence[str]) -> None:
    """Refuse arrays that are not (K, H, W, D) with one id and one name per channel."""
    check_masks(prediction, truth)
    if prediction.ndim != 4:
        raise InputError(
            f"Expected arrays (K, H, W, D) for {case!r}, got the shape {prediction.shape}; "
            "add the missing axes, D = 1 for a 2D image."
        )
    if not len(class_ids) == len(class_names) == len(prediction):
        raise InputError(
            f"Expected one class id and one name per channel of {case!r}, got {len(class_ids)} ids, "
            f"{len(class_names)} names and {len(prediction)} channels; pass them in channel order."
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
