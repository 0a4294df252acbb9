"""Overlap and boundary scores against DeepMind's surface-distance, numpy and hand-derived values."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from scripts.errors import ConfigError, InputError
from scripts.metrics.challenge import nsd_challenge, nsd_challenge_by_class
from scripts.metrics.masks import Overlap, count_overlap, dice_score
from scripts.metrics.pairs import compare_masks
from scripts.metrics.scores import ClassScore, normalized_surface_dice, score_case, without_names

Mask = npt.NDArray[np.bool_]
ROOT_2 = math.sqrt(2)


def box(shape: tuple[int, ...], *ranges: tuple[int, int]) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(start, stop) for start, stop in ranges)] = True
    return mask


def disc(size: int, column: int, radius: int) -> Mask:
    rows, columns = np.ogrid[:size, :size]
    return (rows - size // 2) ** 2 + (columns - column) ** 2 <= radius**2


def one_class(prediction: Mask, truth: Mask, *, planar: bool = True, tolerance: float = 2.0) -> ClassScore:
    """Score masks (H, W, D) as the only class of a case with voxels of 1 mm."""
    (score,) = score_case(
        prediction[None],
        truth[None],
        case="case",
        class_ids=[1],
        class_names=["liver"],
        spacing=(1, 1, 1),
        planar=planar,
        tolerance=tolerance,
    )
    return score


@pytest.mark.parametrize("index", range(48))
def test_agrees_with_deepmind_surface_distance(shared: Path, index: int) -> None:
    with np.load(shared / "golden" / "surface_dice.npz") as golden:
        shape = tuple(golden[f"shape_{index}"])
        truth, prediction = (
            np.unpackbits(golden[f"{name}_{index}"], count=math.prod(shape)).reshape(shape).astype(bool)
            for name in ("gt", "seg")
        )
        spacing = golden[f"spacing_{index}"]
        tolerance, dsc, nsd, _ = golden["tolerance_dsc_nsd_hd95"][index]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # MONAI warns of empty masks, which must not get as far
        found = normalized_surface_dice(prediction, truth, spacing=spacing, tolerance=tolerance)
    assert found == pytest.approx(nsd, abs=1e-6, nan_ok=True)
    assert dice_score(prediction, truth) == pytest.approx(dsc, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("shape", [(7,), (5, 9), (1, 1), (4, 6, 3), (2, 3, 4, 5)])
def test_dice_agrees_with_counting_voxel_by_voxel(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(3)
    for share in (0.3, 0.9, 1.0):
        prediction, truth = generator.random(shape) < share, generator.random(shape) < share
        true_positive = sum(p and t for p, t in zip(prediction.flat, truth.flat, strict=True))
        errors = sum(p != t for p, t in zip(prediction.flat, truth.flat, strict=True))
        expected = 2 * true_positive / (2 * true_positive + errors) if true_positive + errors else math.nan
        assert dice_score(prediction, truth) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3)])
@pytest.mark.parametrize(
    ("prediction_full", "truth_full", "expected"),
    [(False, False, math.nan), (True, False, 0.0), (False, True, 0.0), (True, True, 1.0)],
)
def test_empty_masks(shape: tuple[int, ...], prediction_full: bool, truth_full: bool, expected: float) -> None:
    prediction, truth = np.full(shape, prediction_full), np.full(shape, truth_full)
    spacing = (1.5,) * len(shape)
    assert dice_score(prediction, truth) == pytest.approx(expected, nan_ok=True)
    assert normalized_surface_dice(prediction, truth, spacing=spacing) == pytest.approx(expected, nan_ok=True)


# A square of n x n pixels has 4 (n - 1) boundary points of length 1 and 4 corner points of length sqrt(2) / 2.


def test_surface_dice_of_shifted_squares() -> None:
    # 10 x 10, shifted by 4 along the columns, tolerance 2. Of each square count: 8 of 9 points of two sides (16), on
    # the side inside the other square the 2 points next to each corner (4) and both corners there (sqrt(2)).
    truth = box((30, 40), (5, 15), (6, 16))
    prediction = box((30, 40), (5, 15), (10, 20))
    found = normalized_surface_dice(prediction, truth, spacing=(1, 1))
    assert found == pytest.approx((20 + ROOT_2) / (36 + 2 * ROOT_2), abs=1e-6)


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [(2.0, 0.0), (2.99, 0.0), (3.0, (112 + 2 * ROOT_2) / (128 + 4 * ROOT_2))],
)
def test_tolerance_includes_its_own_distance(tolerance: float, expected: float) -> None:
    # 14 x 14 centred in 20 x 20, three pixels apart: at 3 the whole inner square counts (52 + 2 sqrt(2)) and of each
    # outer side the 15 points that face the inner one.
    found = normalized_surface_dice(
        box((24, 26), (5, 19), (6, 20)), box((24, 26), (2, 22), (3, 23)), spacing=(1, 1), tolerance=tolerance
    )
    assert found == pytest.approx(expected, abs=1e-6)


def test_spacing_is_in_the_order_of_the_axes() -> None:
    # 10 x 10 shifted by one row. Rows 5 mm apart: sides of 9 points of 5 mm count (90), of the end inside the other
    # square 4 points of 1 mm and both corners of sqrt(26) / 2; nothing of the other end.
    truth, prediction = box((20, 20), (5, 15), (5, 15)), box((20, 20), (6, 16), (5, 15))
    corners = math.sqrt(26)
    found = normalized_surface_dice(prediction, truth, spacing=(5, 1))
    assert found == pytest.approx((94 + corners) / (108 + 2 * corners), abs=1e-6)
    assert normalized_surface_dice(prediction, truth, spacing=(1, 5)) == 1.0


@pytest.mark.parametrize("axis", range(3))
def test_spacing_order_in_volumes(axis: int) -> None:
    truth = box((12, 14, 16), (3, 9), (3, 9), (3, 9))
    prediction = np.roll(truth, 1, axis=axis)
    spacing = [1.0, 1.0, 1.0]
    assert normalized_surface_dice(prediction, truth, spacing=spacing) == 1.0
    spacing[axis] = 5.0
    assert normalized_surface_dice(prediction, truth, spacing=spacing) < 0.9


def test_outside_of_the_image_is_background() -> None:
    # Both squares keep their four sides at the border; cut masks inside a larger image score the same.
    truth, prediction = box((10, 14), (0, 10), (0, 10)), box((10, 14), (0, 10), (4, 14))
    found = normalized_surface_dice(prediction, truth, spacing=(1, 1))
    assert found == pytest.approx((20 + ROOT_2) / (36 + 2 * ROOT_2), abs=1e-6)


# Discs of the fact table: the contour score wanted here, and the two others in use that must not come out.
DISCS = [
    pytest.param(disc(200, 100, 60), disc(200, 103, 60), 0.5923, 0.9961, 0.4405, id="shift 3"),
    pytest.param(disc(200, 100, 60), disc(200, 105, 60), 0.3321, 0.9773, 0.3214, id="shift 5"),
    pytest.param(disc(200, 100, 60), disc(200, 110, 60), 0.1645, 0.9263, 0.1726, id="shift 10"),
    pytest.param(disc(200, 100, 60), disc(200, 100, 57), 0.0727, 0.9864, 0.0, id="radius 57"),
]


@pytest.mark.parametrize(("truth", "prediction", "contour", "singleton_axis", "edge_pixels"), DISCS)
def test_planar_discs(truth: Mask, prediction: Mask, contour: float, singleton_axis: float, edge_pixels: float) -> None:
    planar = one_class(prediction[..., None], truth[..., None], planar=True)
    assert planar.nsd == pytest.approx(contour, abs=5e-5)
    assert abs(planar.nsd - edge_pixels) > 5e-3
    volume = one_class(prediction[..., None], truth[..., None], planar=False)
    assert volume.nsd == pytest.approx(singleton_axis, abs=5e-5)
    assert (planar.unit, volume.unit) == ("px", "mm")
    assert planar.dsc == volume.dsc


def test_planar_score_is_the_mean_over_slices_with_the_class() -> None:
    near, far, nothing = disc(200, 103, 60), disc(200, 105, 60), np.zeros((200, 200), dtype=bool)
    truth = np.stack([disc(200, 100, 60)] * 2 + [nothing] * 2 + [near], axis=-1)
    prediction = np.stack([near, far, nothing, near, nothing], axis=-1)
    # The third slice has nothing to compare, the last two are predicted or true alone and score 0.
    score = one_class(prediction, truth)
    assert score.nsd == pytest.approx((0.5923 + 0.3321) / 4, abs=5e-5)
    overlap = np.count_nonzero(prediction & truth)
    assert score.dsc == pytest.approx(2 * overlap / (np.count_nonzero(prediction) + np.count_nonzero(truth)))
    assert score.iou == overlap / np.count_nonzero(prediction | truth)
    assert (score.slices, score.absent_slices, score.false_positive_slices) == (5, 2, 1)


def test_planar_score_ignores_the_spacing() -> None:
    masks = disc(200, 103, 60)[None, ..., None], disc(200, 100, 60)[None, ..., None]
    found = [
        score_case(*masks, case="a", class_ids=[6], class_names=["polyp"], spacing=spacing, planar=True)[0].nsd
        for spacing in (None, (0.1, 7.0, 1.0))
    ]
    assert found == [pytest.approx(0.5923, abs=5e-5)] * 2


def test_volume_is_scored_in_3d_with_its_spacing() -> None:
    truth = box((20, 18, 9), (4, 14), (4, 14), (2, 6))
    prediction = np.roll(truth, 1, axis=2)
    thick, thin = (
        score_case(
            prediction[None],
            truth[None],
            case="a",
            class_ids=[2],
            class_names=["spleen"],
            spacing=spacing,
            planar=False,
        )[0]
        for spacing in ((0.8, 0.8, 5), (5, 0.8, 0.8))
    )
    assert thick.nsd == normalized_surface_dice(prediction, truth, spacing=(0.8, 0.8, 5)) < 0.9
    assert thin.nsd == 1.0
    assert thick.dsc == thin.dsc == 2 * 300 / 800


def test_every_class_is_scored_by_itself() -> None:
    truth = np.zeros((3, 12, 20, 2), dtype=bool)
    truth[0, 2:8, 2:8, :] = True
    truth[1, 2:8, 10:16, 0] = True
    prediction = truth.copy()
    prediction[1] = False
    prediction[2, 0, 0, 0] = True
    first, second, third = score_case(
        prediction,
        truth,
        case="a",
        class_ids=[1, 4, 9],
        class_names=["liver", "left kidney", "left lung"],
        spacing=(1, 1, 1),
        planar=False,
        tolerance=1,
    )
    assert (first.class_id, first.class_name, first.dsc, first.nsd) == (1, "liver", 1.0, 1.0)
    assert (second.class_id, second.class_name, second.dsc, second.nsd) == (4, "left kidney", 0.0, 0.0)
    assert (third.class_id, third.class_name) == (9, "left lung")
    assert math.isnan(third.dsc)
    assert [score.truth_voxels for score in (first, second, third)] == [72, 36, 0]
    assert [score.predicted_voxels for score in (first, second, third)] == [72, 0, 1]
    assert [score.absent_slices for score in (first, second, third)] == [0, 1, 2]
    assert {score.tolerance for score in (first, second, third)} == {1.0}


@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("predicted", [True, False])
def test_class_missing_in_the_truth_is_not_a_number(planar: bool, predicted: bool) -> None:
    truth = np.zeros((10, 10, 4), dtype=bool)
    prediction = truth.copy()
    prediction[2:5, 2:5, 1:3] = predicted
    score = one_class(prediction, truth, planar=planar)
    missing = (score.dsc, score.iou, score.nsd, score.nsd_challenge, score.hd95, score.assd, score.slice_dsc)
    assert all(math.isnan(value) for value in missing)
    assert score.volume_error_ml == pytest.approx(math.nan if planar else 18e-3 * predicted, nan_ok=True)
    assert not score.present
    assert (score.absent_slices, score.false_positive_slices) == (4, 2 if predicted else 0)
    assert score.overlap == Overlap(predicted=18 * predicted, true=0, common=0)


@pytest.mark.parametrize("planar", [True, False])
def test_class_missed_altogether_scores_zero(planar: bool) -> None:
    truth = box((10, 12, 4), (2, 5), (2, 5), (1, 3))
    score = one_class(np.zeros_like(truth), truth, planar=planar)
    assert (score.dsc, score.nsd, score.nsd_challenge, score.slice_dsc, score.present) == (0.0, 0.0, 0.0, 0.0, True)
    assert (score.iou, score.overlap) == (0.0, Overlap(predicted=0, true=18, common=0))
    assert (score.hd95, score.assd) == (math.inf, math.inf)
    assert score.volume_error_ml == pytest.approx(math.nan if planar else -0.018, nan_ok=True)


def two_blocks(shape: tuple[int, int, int] = (14, 16, 7)) -> tuple[Mask, Mask]:
    """Prediction and truth (2, H, W, D) of two classes, neither alike in any axis."""
    truth = np.stack([box(shape, (2, 8), (2, 7), (1, 5)), box(shape, (8, 12), (9, 14), (0, 3))])
    prediction = np.stack([np.roll(truth[0], 2, axis=2), np.roll(truth[1], 1, axis=0)])
    return prediction, truth


def score_two(prediction: Mask, truth: Mask, **changes: object) -> list[ClassScore]:
    arguments = {"case": "a", "class_ids": [4, 5], "class_names": ["left kidney", "right kidney"], "planar": False}
    return score_case(prediction, truth, **({"spacing": (0.7, 1.1, 3.0)} | arguments | changes))  # type: ignore[arg-type]


def test_all_scores_of_a_volume_are_those_of_the_pair_of_masks() -> None:
    prediction, truth = two_blocks()
    for score, predicted, true in zip(score_two(prediction, truth), prediction, truth, strict=True):
        pair = compare_masks(predicted, true, spacing=(0.7, 1.1, 3.0))
        found = (score.dsc, score.iou, score.nsd, score.hd95, score.assd, score.volume_error_ml)
        assert found == (pair.dsc, pair.iou, pair.nsd, pair.hd95, pair.assd, pair.volume_error_ml)
        assert score.overlap == count_overlap(predicted, true)


def test_common_voxels_follow_exactly_from_the_dice() -> None:
    """Up to volumes that no memory holds."""
    generator = np.random.default_rng(11)
    (score, _) = score_two(*two_blocks())
    for largest in (10, 10**4, 10**9, 2**48):
        for _ in range(500):
            true, predicted = (int(value) for value in generator.integers(1, largest, 2, endpoint=True))
            common = int(generator.integers(0, min(true, predicted) + 1))
            overlap = Overlap(predicted=predicted, true=true, common=common)
            changed = replace(score, dsc=overlap.dsc, truth_voxels=true, predicted_voxels=predicted)
            assert changed.overlap == overlap


def test_the_challenge_gets_a_volume_as_its_files_hold_it() -> None:
    """Axes (slice, row, column), spacing (along the row, along the column, between slices)."""
    prediction, truth = two_blocks()
    labels = [np.where(masks[1], 2, masks[0].astype(int)).transpose(2, 0, 1) for masks in (prediction, truth)]
    scores = score_two(prediction, truth)
    assert np.mean([score.nsd_challenge for score in scores]) == nsd_challenge(*labels, spacing=(1.1, 0.7, 3.0))
    assert scores[0].nsd_challenge != scores[0].nsd
    # The same file as NIfTI has it, (x, y, z) with its own spacing.
    stored = [masks.transpose(0, 2, 1, 3) for masks in (prediction, truth)]
    as_said = nsd_challenge_by_class(
        *([mask.transpose(2, 1, 0) for mask in masks] for masks in stored), spacing=(1.1, 0.7, 3.0)
    )
    assert [score.nsd_challenge for score in scores] == as_said


def test_the_challenge_sees_the_classes_of_the_truth_alone() -> None:
    prediction, truth = two_blocks()
    alone = score_two(prediction[:1], truth[:1], class_ids=[4], class_names=["left kidney"])
    truth[1] = False
    first, second = score_two(prediction, truth)
    assert first.nsd_challenge == alone[0].nsd_challenge > 0
    assert math.isnan(second.nsd_challenge)


def test_the_challenge_takes_each_planar_slice_as_an_image() -> None:
    prediction, truth = two_blocks()
    expected: dict[int, list[float]] = {0: [], 1: []}
    for index in range(truth.shape[-1]):
        present = [k for k in (0, 1) if truth[k, ..., index].any()]
        image = nsd_challenge_by_class(*([masks[k, ..., index] for k in present] for masks in (prediction, truth)))
        for k, value in zip(present, image, strict=True):
            expected[k].append(value)
    scores = score_two(prediction, truth, planar=True)
    assert [score.nsd_challenge for score in scores] == pytest.approx([np.mean(values) for values in expected.values()])
    assert scores[0].nsd_challenge != score_two(prediction, truth)[0].nsd_challenge


def test_mean_over_slices_is_of_each_slices_own_dice() -> None:
    truth = box((10, 10, 4), (0, 4), (0, 5), (0, 3))
    prediction = np.zeros_like(truth)
    prediction[:4, :5, 0] = True  # 1
    prediction[:4, 2:5, 1] = True  # 2 * 12 / (12 + 20)
    prediction[:, :, 3] = True  # counts for no slice with the class
    score = one_class(prediction, truth)
    assert score.slice_dsc == pytest.approx((1 + 0.75 + 0) / 3)
    assert score.false_negative_slices == 1


def test_swapped_voxels_lie_in_the_truth_of_the_other_side() -> None:
    truth = np.stack([box((10, 20, 3), (2, 8), (2, 8), (0, 3)), box((10, 20, 3), (2, 8), (12, 18), (0, 3))])
    prediction = truth.copy()
    prediction[0, 2:8, 12:14] = True  # 36 voxels of the right one taken for the left one
    prediction[0, 0, 0] = True  # 3 that are neither
    left, right = score_two(prediction, truth, partners=[5, 4])
    assert (left.swapped_voxels, right.swapped_voxels) == (36, 0)
    assert left.swapped_share == pytest.approx(36 / (108 + 36 + 3))
    assert right.swapped_share == 0.0
    changed = score_two(truth[::-1], truth, partners=[5, 4])
    assert [score.swapped_share for score in changed] == [1.0, 1.0]


def test_there_is_no_swap_without_a_partner_in_the_case() -> None:
    prediction, truth = two_blocks()
    for partners in (None, [None, None], [7, None]):
        scores = score_two(prediction, truth, partners=partners)
        assert [score.swapped_voxels for score in scores] == [None, None]
        assert all(math.isnan(score.swapped_share) for score in scores)
    nothing = score_two(np.zeros_like(truth), truth, partners=[5, 4])
    assert [score.swapped_voxels for score in nothing] == [0, 0]
    assert all(math.isnan(score.swapped_share) for score in nothing)


def test_a_case_is_its_own_patient_unless_told() -> None:
    prediction, truth = two_blocks()
    assert {score.patient for score in score_two(prediction, truth)} == {"a"}
    assert {score.patient for score in score_two(prediction, truth, patient="p")} == {"p"}


@pytest.mark.parametrize(
    ("prediction", "truth", "spacing", "tolerance", "error", "message"),
    [
        (np.ones((2, 3), np.uint8), np.ones((2, 3), bool), (1, 1), 2, InputError, "boolean prediction, got uint8"),
        (np.ones((2, 3), bool), np.ones((2, 3)), (1, 1), 2, InputError, "boolean truth, got float64"),
        (np.ones((2, 3), bool), np.ones((3, 2), bool), (1, 1), 2, InputError, r"\(2, 3\) and \(3, 2\)"),
        (np.ones(3, bool), np.ones(3, bool), (1,), 2, InputError, "got 1 axes"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (1, 1, 1), 2, InputError, "2 positive distances"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (1, 0), 2, InputError, "2 positive distances"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (1, math.nan), 2, InputError, "2 positive distances"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (math.inf, 1), 2, InputError, "2 positive distances"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (1, 1), -1, ConfigError, "at least 0, got -1"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (1, 1), math.inf, ConfigError, "at least 0, got inf"),
    ],
)
def test_masks_that_cannot_be_compared(
    prediction: Mask,
    truth: Mask,
    spacing: tuple[float, ...],
    tolerance: float,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        normalized_surface_dice(prediction, truth, spacing=spacing, tolerance=tolerance)


def test_dice_of_masks_that_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="of one shape"):
        dice_score(np.ones((1, 3), bool), np.ones((3, 3), bool))
    with pytest.raises(InputError, match="got uint8"):
        dice_score(np.ones(3, bool), np.full(3, 255, np.uint8))


@pytest.mark.parametrize(
    ("shape", "changes", "error", "message"),
    [
        ((4, 4, 2), {}, InputError, r"\(K, H, W, D\)"),
        ((2, 4, 4, 2), {}, InputError, "1 ids, 1 names, 1 partners and 2 channels"),
        ((1, 4, 4, 2), {"class_names": ["liver", "spleen"]}, InputError, "1 ids, 2 names, 1 partners and 1 channels"),
        ((1, 4, 4, 2), {"partners": []}, InputError, "1 names, 0 partners"),
        ((1, 4, 4, 2), {"spacing": None}, InputError, "voxel size in mm of the volume 'a'"),
        ((1, 4, 4, 2), {"spacing": (1, 1)}, InputError, "3 positive distances"),
        ((1, 4, 4, 2), {"tolerance": -0.5}, ConfigError, "at least 0"),
    ],
)
def test_cases_that_cannot_be_scored(
    shape: tuple[int, ...], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    # The masks are empty: nothing may depend on whether there is a boundary to measure.
    masks = np.zeros(shape, bool), np.zeros(shape, bool)
    arguments = {"case": "a", "class_ids": [1], "class_names": ["liver"], "spacing": (1, 1, 1), "planar": False}
    with pytest.raises(error, match=message):
        score_case(*masks, **(arguments | changes))  # type: ignore[arg-type]


def test_patients_are_called_after_their_first_case():
    mask = np.ones((1, 2, 2, 1), dtype=bool)
    scores = [
        score
        for case, patient in (("b", "Jane"), ("a", "Jane"), ("c", None), ("d", "a"))
        for score in score_case(
            mask, mask, case=case, class_ids=[1], class_names=["liver"], spacing=None, planar=True, patient=patient
        )
    ]
    named = without_names(scores)
    assert [(score.case, score.patient) for score in named] == [("b", "a"), ("a", "a"), ("c", "c"), ("d", "d")]
    assert without_names(named) == named
