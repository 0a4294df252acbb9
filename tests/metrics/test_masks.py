"""Overlap of two masks against MONAI and hand-derived values."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics import compute_dice, compute_iou

from scripts.errors import InputError
from scripts.metrics.masks import Overlap, count_overlap, dice_score

Mask = npt.NDArray[np.bool_]


def monai(function: object, prediction: Mask, truth: Mask, **options: object) -> float:
    """What MONAI has for one image of one class."""
    batches = (torch.from_numpy(mask.copy())[None, None].float() for mask in (prediction, truth))
    return float(function(*batches, include_background=True, **options))  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (9, 5), (4, 6, 3)])
@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_agrees_with_monai_where_the_truth_has_something(shape: tuple[int, ...], share: float) -> None:
    generator = np.random.default_rng(2)
    prediction, truth = generator.random(shape) < share, generator.random(shape) < share
    truth.flat[0] = True
    found = count_overlap(prediction, truth)
    assert found.iou == pytest.approx(monai(compute_iou, prediction, truth), abs=1e-6)
    assert found.dsc == pytest.approx(monai(compute_dice, prediction, truth), abs=1e-6)
    assert found.dsc == dice_score(prediction, truth)


def test_counts_of_two_rows_by_hand() -> None:
    prediction = np.array([[True, True, True, False, False]])
    truth = np.array([[False, True, True, True, True]])
    found = count_overlap(prediction, truth)
    assert found == Overlap(predicted=3, true=4, common=2)
    assert (found.iou, found.dsc) == (2 / 5, 4 / 7)


def test_only_the_border_of_the_image_is_common() -> None:
    prediction, truth = np.zeros((2, 4, 7, 3), dtype=bool)
    prediction[0] = truth[:, 0] = True
    assert count_overlap(prediction, truth) == Overlap(predicted=21, true=12, common=3)
    assert count_overlap(prediction, truth).iou == 3 / 30


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3)])
@pytest.mark.parametrize(
    ("prediction_full", "truth_full", "expected"),
    [(False, False, math.nan), (True, False, 0.0), (False, True, 0.0), (True, True, 1.0)],
)
def test_empty_masks(shape: tuple[int, ...], prediction_full: bool, truth_full: bool, expected: float) -> None:
    found = count_overlap(np.full(shape, prediction_full), np.full(shape, truth_full))
    assert (found.iou, found.dsc) == pytest.approx((expected, expected), nan_ok=True)


def test_monai_has_other_rules_for_an_empty_truth() -> None:
    full, nothing = np.ones((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool)
    assert math.isnan(monai(compute_iou, full, nothing))
    assert count_overlap(full, nothing).iou == 0.0
    assert monai(compute_iou, nothing, nothing, ignore_empty=False) == 1.0
    assert math.isnan(count_overlap(nothing, nothing).iou)


def test_counts_beyond_32_bits_are_exact() -> None:
    found = Overlap(predicted=3 * 2**40, true=2**40 + 1, common=2**40)
    assert found.iou == 2**40 / (3 * 2**40 + 1)
    assert found.dsc == 2**41 / (2**42 + 1)


def test_masks_that_cannot_be_compared() -> None:
    mask = np.ones((3, 4), dtype=bool)
    with pytest.raises(InputError, match="boolean truth, got uint8"):
        count_overlap(mask, mask.astype(np.uint8))
    with pytest.raises(InputError, match=r"\(3, 4\) and \(4, 3\)"):
        count_overlap(mask, mask.T)
