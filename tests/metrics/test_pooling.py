"""Batch-pooled DSC and IoU against MONAI on masks joined end to end, and hand-derived values."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics import DiceHelper, compute_iou

from scripts.errors import ConfigError
from scripts.metrics.pooling import POOLED_BATCH, BatchPooled, pool_batches
from scripts.metrics.scores import ClassScore, score_case
from scripts.metrics.summaries import summarise

Mask = npt.NDArray[np.bool_]
NAMES = ["liver", "spleen"]


def scored(case: str, prediction: Mask, truth: Mask) -> list[ClassScore]:
    """Score masks (2, H, W, D) of two classes as a planar case."""
    return score_case(prediction, truth, case=case, class_ids=[1, 2], class_names=NAMES, spacing=None, planar=True)


def images(count: int = 7) -> list[tuple[Mask, Mask]]:
    """Predictions and truths (2, H, W, D) of several sizes and slices; the second class is in the truth of a few."""
    generator = np.random.default_rng(5)
    found = []
    for index in range(count):
        shape = (2, 5 + index, 9, 1 + index % 2)
        prediction, truth = (generator.random(shape) < 0.1 + 0.1 * index for _ in range(2))
        truth[:, 0, 0, 0] = True
        truth[1] &= index % 3 == 0
        found.append((prediction, truth))
    return found


def joined(pairs: Sequence[tuple[Mask, Mask]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All voxels of several cases end to end, prediction and truth (1, 2, N, 1)."""
    masks = (np.concatenate([pair[side].reshape(2, -1) for pair in pairs], axis=1) for side in range(2))
    prediction, truth = (torch.from_numpy(mask)[None, ..., None].float() for mask in masks)
    return prediction, truth


def by_monai(pairs: Sequence[tuple[Mask, Mask]], batch: int) -> tuple[list[float], list[float]]:
    """DSC and IoU of each class: MONAI's of every batch as one image, weighted by the cases of the batch."""
    dice = DiceHelper(include_background=True, apply_argmax=False, get_not_nans=False, reduction="none")
    batches = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    sizes = np.array([len(members) for members in batches])
    found = []
    for measure in (dice, lambda *masks: compute_iou(*masks, include_background=True)):
        values = np.array([measure(*joined(members)).numpy().reshape(2) for members in batches])  # (batches, 2)
        known = ~np.isnan(values)
        found.append([float(np.average(values[known[:, k], k], weights=sizes[known[:, k]])) for k in range(2)])
    return found[0], found[1]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 40])
def test_agrees_with_monai_on_batches_joined_to_one_image(batch: int) -> None:
    pairs = images()
    scores = [score for index, pair in enumerate(pairs) for score in scored(f"case {index}", *pair)]
    classes, mean = pool_batches(scores[::-1], batch=batch)
    dsc, iou = by_monai(pairs, batch)
    assert [entry.dsc for entry in classes] == pytest.approx(dsc, abs=1e-6)
    assert [entry.iou for entry in classes] == pytest.approx(iou, abs=1e-6)
    assert (mean.dsc, mean.iou) == pytest.approx((np.mean(dsc), np.mean(iou)), abs=1e-6)


def row(case: str, *, true: int, predicted: int, common: int) -> ClassScore:
    """Score a row of pixels: the common ones, then those of the truth alone, then those of the prediction alone."""
    masks = np.zeros((2, 1, 1, 300, 1), dtype=bool)
    masks[1, ..., :true, 0] = True
    masks[0, ..., true - common : true - common + predicted, 0] = True
    (score,) = score_case(*masks, case=case, class_ids=[6], class_names=["polyp"], spacing=None, planar=True)
    assert (score.truth_voxels, score.predicted_voxels, score.overlap.common) == (true, predicted, common)
    return score


def test_two_batches_by_hand() -> None:
    scores = [
        row("a", true=40, predicted=40, common=40),
        row("b", true=80, predicted=20, common=20),
        row("c", true=20, predicted=20, common=10),
    ]
    (polyp,), mean = pool_batches(scores, batch=2)
    # a and b together: 60 of 120 and 60 pixels; c alone, the smaller batch: 10 of 20 and 20.
    assert polyp.dsc == pytest.approx((2 * 120 / 180 + 20 / 40) / 3)
    assert polyp.iou == pytest.approx((2 * 60 / 120 + 10 / 30) / 3)
    assert mean == polyp
    # The same cases in another order are other batches.
    (other,), _ = pool_batches([replace(scores[0], case="d"), *scores[1:]], batch=2)
    assert other.dsc == pytest.approx((2 * 60 / 140 + 1) / 3)


def test_all_cases_in_one_batch_are_the_micro_average() -> None:
    scores = [
        row("a", true=100, predicted=90, common=60),
        row("b", true=0, predicted=50, common=0),
        row("c", true=10, predicted=5, common=5),
    ]
    (polyp,), _ = pool_batches(scores)
    assert len(scores) < POOLED_BATCH
    assert polyp == BatchPooled(dsc=2 * 65 / (110 + 145), iou=65 / (110 + 145 - 65))
    # Without the case that lacks the class it is the DSC of the whole data set.
    present = [scores[0], scores[2]]
    (polyp,), _ = pool_batches(present, batch=2)
    summary = summarise(present, protocol="all", unit="px")
    assert polyp.dsc == pytest.approx(summary.means["dsc_per_dataset"].mean) == 2 * 65 / (110 + 95)


def test_one_case_in_a_batch_is_the_mean_per_case() -> None:
    scores = [score for index, pair in enumerate(images(9)) for score in scored(f"case {index}", *pair)]
    summary = summarise(scores, protocol="all", unit="px", pooled_batch=1)
    assert [entry.cases_without for entry in summary.classes] == [0, 6]
    for entry in (*summary.classes, summary):
        assert entry.batch_pooled.dsc == pytest.approx(entry.means["dsc"].mean)
        assert entry.batch_pooled.iou == pytest.approx(entry.means["iou"].mean)


def test_empty_masks() -> None:
    absent, invented = row("a", true=0, predicted=0, common=0), row("b", true=0, predicted=9, common=0)
    missed, found = row("c", true=30, predicted=0, common=0), row("d", true=30, predicted=30, common=30)
    # Neither batch without the class counts, whatever is predicted there; the one without a prediction is 0.
    (polyp,), _ = pool_batches([absent, invented, missed, found], batch=1)
    assert polyp == BatchPooled(dsc=0.5, iou=0.5)
    (polyp,), mean = pool_batches([absent, invented], batch=2)
    assert math.isnan(polyp.dsc)
    assert math.isnan(polyp.iou)
    assert math.isnan(mean.dsc)
    assert math.isnan(mean.iou)
    # In a batch with the class they do: the size of its weight, and the false positives.
    (polyp,), _ = pool_batches([invented, missed, found], batch=3)
    assert polyp == BatchPooled(dsc=60 / 99, iou=30 / 69)


def test_a_class_that_never_occurs_is_in_no_mean() -> None:
    spleen = replace(row("a", true=0, predicted=9, common=0), class_id=2, class_name="spleen")
    classes, mean = pool_batches([spleen, row("a", true=10, predicted=10, common=5)])
    assert math.isnan(classes[0].dsc)
    assert mean == classes[1] == BatchPooled(dsc=0.5, iou=5 / 15)


def test_a_case_without_annotation_of_a_class_weighs_nothing() -> None:
    scores = [row("a", true=10, predicted=10, common=10), row("c", true=10, predicted=10, common=5)]
    other = replace(row("b", true=10, predicted=10, common=10), class_id=2, class_name="spleen")
    classes, _ = pool_batches([*scores, other], batch=2)
    # The batches are (a, b) and (c); b has no polyp to weigh.
    assert classes[1].dsc == pytest.approx((1 + 0.5) / 2)
    assert classes[0].dsc == 1.0


@pytest.mark.parametrize("batch", [0, -3, 1.5, 40.0, True, "40", None])
def test_a_batch_that_is_none(batch: object) -> None:
    with pytest.raises(ConfigError, match="pooled_batch to be a whole number of at least 1, got"):
        pool_batches([row("a", true=1, predicted=1, common=1)], batch=batch)  # type: ignore[arg-type]
