"""Overlap and boundary scores against DeepMind's surface-distance, numpy and hand-derived values."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from scripts.errors import ConfigError, InputError
from scripts.metrics.scores import ClassScore, dice_score, normalized_surface_dice, score_case, summarise

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


def class_score(case: str, class_id: int, name: str, dsc: float, nsd: float, **changes: object) -> ClassScore:
    missing = math.isnan(dsc)
    score = ClassScore(
        case=case,
        class_id=class_id,
        class_name=name,
        dsc=dsc,
        nsd=nsd,
        tolerance=2.0,
        unit="mm",
        truth_voxels=0 if missing else 50,
        predicted_voxels=40,
        slices=10,
        absent_slices=10 if missing else 4,
        false_positive_slices=1,
    )
    return replace(score, **changes)  # type: ignore[arg-type]


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
    assert math.isnan(score.dsc)
    assert math.isnan(score.nsd)
    assert not score.present
    assert (score.absent_slices, score.false_positive_slices) == (4, 2 if predicted else 0)


@pytest.mark.parametrize("planar", [True, False])
def test_class_missed_altogether_scores_zero(planar: bool) -> None:
    truth = box((10, 12, 4), (2, 5), (2, 5), (1, 3))
    score = one_class(np.zeros_like(truth), truth, planar=planar)
    assert (score.dsc, score.nsd, score.present) == (0.0, 0.0, True)


@pytest.mark.parametrize(("predicted", "counted"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_false_positive_slice_starts_above_a_thousandth(predicted: int, counted: int) -> None:
    truth = np.zeros((40, 50, 2), dtype=bool)  # 2 of 2000 pixels are exactly 0.1 %
    truth[0, 0, 1] = True
    prediction = np.zeros_like(truth)
    prediction[5, :predicted, 0] = True
    prediction[5:9, :, 1] = True  # wrong as well, but on a slice that has the class
    score = one_class(prediction, truth)
    assert (score.absent_slices, score.false_positive_slices) == (1, counted)


@pytest.mark.parametrize("pixels", [1000, 3000, 7000, 9000, 29000])
def test_false_positive_threshold_is_exact_for_every_size(pixels: int) -> None:
    truth = np.zeros((pixels, 1, 1), dtype=bool)
    prediction = truth.copy()
    prediction[: pixels // 1000] = True
    assert one_class(prediction, truth).false_positive_slices == 0
    prediction[pixels // 1000] = True
    assert one_class(prediction, truth).false_positive_slices == 1


def test_summary_averages_cases_then_classes() -> None:
    scores = [
        class_score("b", 4, "left kidney", 0.2, 0.1),
        class_score("a", 1, "liver", 0.9, 0.8),
        class_score("b", 1, "liver", 0.7, 0.4, false_positive_slices=2),
        class_score("c", 1, "liver", math.nan, math.nan, false_positive_slices=6),
        class_score("c", 8, "right lung", math.nan, math.nan),
    ]
    summary = summarise(scores, protocol="all", unit="mm")
    liver, kidney, lung = summary.classes
    assert [entry.class_name for entry in summary.classes] == ["liver", "left kidney", "right lung"]
    assert [entry.class_id for entry in summary.classes] == [1, 4, 8]
    assert (liver.dsc, liver.nsd) == (pytest.approx(0.8), pytest.approx(0.6))
    assert (liver.cases, liver.cases_without, liver.absent_slices, liver.false_positive_slices) == (2, 1, 18, 9)
    assert liver.false_positive_rate == pytest.approx(0.5)
    assert (kidney.dsc, kidney.nsd, kidney.cases, kidney.cases_without) == (0.2, 0.1, 1, 0)
    assert math.isnan(lung.dsc)
    assert math.isnan(lung.nsd)
    assert (lung.cases, lung.cases_without) == (0, 1)
    # Unweighted over liver and left kidney: neither by cases (0.6) nor with the right lung, which does not occur.
    assert (summary.dsc, summary.nsd) == (pytest.approx(0.5), pytest.approx(0.35))
    assert (summary.protocol, summary.unit, summary.tolerance) == ("all", "mm", 2.0)


def test_summary_of_classes_that_never_occur() -> None:
    summary = summarise([class_score("a", 1, "liver", math.nan, math.nan)], protocol="oracle", unit="mm")
    assert math.isnan(summary.dsc)
    assert math.isnan(summary.nsd)


def test_false_positive_rate_needs_a_slice_without_the_class() -> None:
    score = class_score("a", 1, "liver", 0.5, 0.5, absent_slices=0, false_positive_slices=0)
    assert math.isnan(summarise([score], protocol="all", unit="mm").classes[0].false_positive_rate)


def test_a_score_that_is_wrongly_missing_is_not_hidden() -> None:
    scores = [class_score("a", 1, "liver", 0.5, math.nan), class_score("b", 1, "liver", 0.5, 0.5)]
    assert math.isnan(summarise(scores, protocol="all", unit="mm").nsd)


@pytest.mark.parametrize(
    ("second", "protocol", "unit", "error", "message"),
    [
        ({}, "prompted", "mm", ConfigError, "all, oracle"),
        ({}, "all", "px", ConfigError, "in px, got mm"),
        ({"unit": "px"}, "all", "mm", ConfigError, "mm and px"),
        ({"tolerance": 3.0}, "all", "mm", ConfigError, r"2\.0 and 3\.0 mm"),
        ({"case": "a"}, "all", "mm", InputError, "second one for 'liver' in 'a'"),
        ({"class_name": "spleen"}, "all", "mm", InputError, "one name per class id"),
        ({"class_id": 2}, "all", "mm", InputError, "one name per class id"),
    ],
)
def test_scores_that_cannot_be_averaged(
    second: dict[str, object], protocol: str, unit: str, error: type[Exception], message: str
) -> None:
    other = replace(class_score("b", 1, "liver", 0.5, 0.5), **second)  # type: ignore[arg-type]
    scores = [class_score("a", 1, "liver", 0.5, 0.5), other]
    with pytest.raises(error, match=message):
        summarise(scores, protocol=protocol, unit=unit)


def test_nothing_to_average() -> None:
    with pytest.raises(InputError, match="at least one case"):
        summarise([], protocol="all", unit="mm")


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
        ((2, 4, 4, 2), {}, InputError, "1 ids, 1 names and 2 channels"),
        ((1, 4, 4, 2), {"class_names": ["liver", "spleen"]}, InputError, "1 ids, 2 names and 1 channels"),
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
