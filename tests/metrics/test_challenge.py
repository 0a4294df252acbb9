"""The challenge's NSD against its published figures, an independent surface Dice, and hand-derived values."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics import compute_surface_dice

from scripts.errors import ConfigError, InputError
from scripts.metrics.challenge import nsd_challenge, nsd_challenge_by_class
from scripts.metrics.pairs import compare_masks

Mask = npt.NDArray[np.bool_]
pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")  # MONAI's own use of its argument


def disc(size: int, column: int, radius: int) -> Mask:
    rows, columns = np.ogrid[:size, :size]
    return (rows - size // 2) ** 2 + (columns - column) ** 2 <= radius**2


def monai_surface_dice(prediction: Mask, truth: Mask, spacing: tuple[float, ...], *, subvoxels: bool) -> float:
    first, second = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, truth))
    score = compute_surface_dice(
        first, second, class_thresholds=[2.0], include_background=True, spacing=spacing, use_subvoxels=subvoxels
    )
    return float(score)


def test_one_pair_of_discs_has_three_scores() -> None:
    # What tables call NSD: the challenge's, that of the contours, and MONAI's default of pixels at the edge.
    truth, prediction = disc(200, 100, 60), disc(200, 103, 60)
    assert nsd_challenge(prediction.astype(np.uint8), truth.astype(np.uint8)) == pytest.approx(0.9961, abs=5e-5)
    assert compare_masks(prediction, truth, spacing=(1, 1)).nsd == pytest.approx(0.5923, abs=5e-5)
    assert monai_surface_dice(prediction, truth, (1, 1), subvoxels=False) == pytest.approx(0.4405, abs=5e-5)


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        pytest.param(disc(200, 100, 60), disc(200, 105, 60), 0.9773, id="shift 5"),
        pytest.param(disc(200, 100, 60), disc(200, 110, 60), 0.9263, id="shift 10"),
        pytest.param(disc(200, 100, 60), disc(200, 100, 57), 0.9864, id="radius 57"),
    ],
)
def test_discs_of_a_2d_image(truth: Mask, prediction: Mask, expected: float) -> None:
    found = nsd_challenge(prediction.astype(np.int64), truth.astype(np.int64), spacing=(9, 9, 9))  # not used in 2D
    assert found == pytest.approx(expected, abs=5e-5)
    alone = monai_surface_dice(prediction[..., None], truth[..., None], (1, 1, 1), subvoxels=True)
    assert found == pytest.approx(alone, abs=1e-6)


def blocks() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Volumes (D, H, W) with two classes, moved along the slices and along the columns."""
    truth = np.zeros((12, 30, 34), dtype=np.uint8)
    truth[3:8, 5:15, 6:20] = 1
    truth[4:10, 17:27, 8:30] = 2
    return np.roll(np.roll(truth, 1, axis=0), 2, axis=2), truth


def test_spacing_is_taken_as_it_is_stored() -> None:
    # (x, y, z) = (0.8, 0.9, 5) meets (z, y, x): slices come out 0.8 apart and columns 5.
    prediction, truth = blocks()
    found = nsd_challenge_by_class(
        [prediction == 1, prediction == 2], [truth == 1, truth == 2], spacing=(0.8, 0.9, 5.0)
    )
    for number, score in zip((1, 2), found, strict=True):
        expected = monai_surface_dice(prediction == number, truth == number, (0.8, 0.9, 5.0), subvoxels=True)
        right = monai_surface_dice(prediction == number, truth == number, (5.0, 0.9, 0.8), subvoxels=True)
        assert score == pytest.approx(expected, abs=1e-6)
        assert abs(score - right) > 0.05
    assert nsd_challenge(prediction, truth, spacing=(0.8, 0.9, 5.0)) == pytest.approx(np.mean(found))


def test_tolerance_is_handed_on() -> None:
    prediction, truth = blocks()
    scores = [nsd_challenge(prediction, truth, spacing=(1, 1, 1), tolerance=value) for value in (0, 1, 2.5)]
    assert 0 < scores[0] < scores[1] < scores[2] == 1


@pytest.mark.parametrize(("overlap", "counted"), [(20, False), (21, True)])
def test_gate_opens_above_a_mean_dsc_of_a_fifth(overlap: int, counted: bool) -> None:
    # Rows of 100 pixels that share `overlap`: DSC is overlap / 100.
    truth, prediction = np.zeros((9, 250), dtype=np.uint8), np.zeros((9, 250), dtype=np.uint8)
    truth[4, :100], prediction[4, 100 - overlap : 200 - overlap] = 1, 1
    assert (nsd_challenge(prediction, truth) > 0) == counted


def test_gate_is_that_of_the_mean_over_classes() -> None:
    truth, prediction = np.zeros((40, 40), dtype=np.uint8), np.zeros((40, 40), dtype=np.uint8)
    truth[2:12, 2:12] = prediction[2:12, 2:12] = 1
    truth[20:30, 2:12], prediction[20:30, 22:32] = 2, 2  # DSC 0, and the mean is 0.5
    found = nsd_challenge_by_class([prediction == 1, prediction == 2], [truth == 1, truth == 2])
    assert found == [1.0, 0.0]
    assert nsd_challenge(prediction, truth) == 0.5
    assert nsd_challenge_by_class([prediction == 2], [truth == 2]) == [0.0]


def test_class_that_was_missed_scores_zero() -> None:
    truth = np.zeros((20, 20), dtype=np.uint8)
    truth[2:8, 2:8], truth[12:18, 2:8] = 1, 2
    assert nsd_challenge(np.where(truth == 1, truth, 0), truth) == 0.5


def test_numbers_left_out_close_the_gate() -> None:
    # Class 2 is in neither mask: its DSC is NaN, and so is the mean. The rest is perfect and scores 0 all the same.
    labels = np.zeros((20, 20), dtype=np.uint8)
    labels[2:8, 2:8], labels[12:18, 2:8] = 1, 3
    assert nsd_challenge(labels, labels) == 0
    assert nsd_challenge(np.where(labels == 3, 2, labels), np.where(labels == 3, 2, labels)) == 1
    assert nsd_challenge_by_class([labels == 1, labels == 2], [labels == 1, labels == 2]) == [0, 0]
    assert nsd_challenge_by_class([labels == 1, labels == 3], [labels == 1, labels == 3]) == [1, 1]


def test_class_that_only_the_prediction_has_is_not_looked_at() -> None:
    truth = np.zeros((20, 20), dtype=np.uint8)
    truth[2:8, 2:8] = 1
    prediction = truth.copy()
    prediction[12:18, 2:8] = 2
    assert nsd_challenge(prediction, truth) == 1


def test_largest_byte_is_a_number_like_any_other() -> None:
    labels = np.full((4, 4), 255, dtype=np.uint8)
    assert nsd_challenge(labels, labels) == 0  # 1 to 254 are in neither mask


@pytest.mark.parametrize("shape", [(5, 6), (0, 3), (3, 4, 5)])
def test_truth_without_a_class_scores_zero(shape: tuple[int, ...]) -> None:
    nothing = np.zeros(shape, dtype=np.uint8)
    assert nsd_challenge(nothing, nothing, spacing=(1, 1, 1)) == 0


@pytest.mark.parametrize(
    ("prediction", "truth", "changes", "error", "message"),
    [
        (np.ones((3, 4), bool), np.ones((3, 4), np.uint8), {}, InputError, "label numbers as prediction, got bool"),
        (np.ones((3, 4), np.uint8), np.ones((3, 4)), {}, InputError, "label numbers as truth, got float64"),
        (np.ones((3, 4), np.uint8), np.ones((4, 3), np.uint8), {}, InputError, "of one shape"),
        (np.ones((3, 4, 2), np.uint8), np.ones((3, 4, 2), np.uint8), {}, InputError, "order x, y, z"),
        (np.ones((3, 4, 2), np.uint8), np.ones((3, 4, 2), np.uint8), {"spacing": (1, 1)}, InputError, "3 positive"),
        (np.ones((3,), np.uint8), np.ones((3,), np.uint8), {"spacing": (1,)}, InputError, "got 1 axes"),
        (np.ones((3, 4), np.uint8), np.ones((3, 4), np.uint8), {"tolerance": math.nan}, ConfigError, "got nan"),
    ],
)
def test_labels_that_cannot_be_scored(
    prediction: npt.NDArray,
    truth: npt.NDArray,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        nsd_challenge(prediction, truth, **changes)  # type: ignore[arg-type]


def test_classes_come_in_pairs() -> None:
    mask = np.ones((3, 4), dtype=bool)
    with pytest.raises(InputError, match="each of 2 predictions, got 1"):
        nsd_challenge_by_class([mask, mask], [mask])
