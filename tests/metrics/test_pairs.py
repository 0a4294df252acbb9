"""All metrics of a pair against DeepMind's surface-distance, MONAI, and hand-derived values."""

import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from scripts.errors import ConfigError, InputError
from scripts.metrics.pairs import PairMetrics, compare_masks, compare_slices

Mask = npt.NDArray[np.bool_]
PAIRS = 48


class Golden:
    """One pair of masks with DeepMind's figures."""

    def __init__(self, shared: Path, index: int) -> None:
        with np.load(shared / "golden" / "surface_dice.npz") as file:
            shape = tuple(file[f"shape_{index}"])
            self.truth, self.prediction = (
                np.unpackbits(file[f"{name}_{index}"], count=math.prod(shape)).reshape(shape).astype(bool)
                for name in ("gt", "seg")
            )
            self.spacing = tuple(file[f"spacing_{index}"].tolist())
            self.tolerance, self.dsc, self.nsd, self.hd95 = file["tolerance_dsc_nsd_hd95"][index].tolist()

    def batches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction and truth (1, 1, H, W[, D])."""
        return torch.from_numpy(self.prediction)[None, None], torch.from_numpy(self.truth)[None, None]


@pytest.mark.parametrize("index", range(PAIRS))
def test_agrees_with_deepmind(shared: Path, index: int) -> None:
    golden = Golden(shared, index)
    found = compare_masks(golden.prediction, golden.truth, spacing=golden.spacing, tolerance=golden.tolerance)
    assert found.dsc == pytest.approx(golden.dsc, abs=1e-12, nan_ok=True)
    assert found.nsd == pytest.approx(golden.nsd, abs=1e-12, nan_ok=True)
    assert found.hd95 == pytest.approx(golden.hd95, abs=1e-12)


def test_the_pairs_cover_what_matters(shared: Path) -> None:
    pairs = [Golden(shared, index) for index in range(PAIRS)]
    assert {pair.truth.ndim for pair in pairs} == {2, 3}
    assert any(len(set(pair.spacing)) > 1 for pair in pairs)
    assert any(pair.truth.any() != pair.prediction.any() for pair in pairs)
    assert any(not pair.truth.any() and not pair.prediction.any() for pair in pairs)
    assert any(pair.truth[0].any() or pair.truth[-1].any() for pair in pairs)


@pytest.mark.filterwarnings("ignore:.*is all 0", "ignore:.*always_return_as_numpy")
def test_where_monai_agrees_and_where_not(shared: Path) -> None:
    # Right with subvoxels: the surface Dice of every pair. Wrong: its default surface Dice, and its HD95 at all times.
    differing = {"surface dice": 0, "default surface dice": 0, "hd95": 0}
    for index in range(PAIRS):
        golden = Golden(shared, index)
        masks = golden.batches()
        options = {"include_background": True, "spacing": list(golden.spacing)}
        thresholds = [golden.tolerance]
        hd95 = float(compute_hausdorff_distance(*masks, percentile=95, **options))
        default = float(compute_surface_dice(*masks, class_thresholds=thresholds, **options))
        subvoxels = float(compute_surface_dice(*masks, class_thresholds=thresholds, use_subvoxels=True, **options))
        differing["surface dice"] += subvoxels != pytest.approx(golden.nsd, abs=1e-6, nan_ok=True)
        differing["default surface dice"] += default != pytest.approx(golden.nsd, abs=1e-6, nan_ok=True)
        differing["hd95"] += hd95 != pytest.approx(golden.hd95, abs=1e-6)
    assert differing == {"surface dice": 0, "default surface dice": 34, "hd95": 30}


def box(shape: tuple[int, ...], *ranges: tuple[int, int]) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(start, stop) for start, stop in ranges)] = True
    return mask


ROOT_2 = math.sqrt(2)


def test_shifted_squares_by_hand() -> None:
    # Squares of 10 pixels, 4 columns apart: each has 36 points of length 1 and 4 corners of sqrt(2) / 2 around it. Half
    # of each square's long sides are on the other's, the rest is 1, 2 or 3 beyond its corner.
    prediction, truth = box((30, 40), (5, 15), (10, 20)), box((30, 40), (5, 15), (6, 16))
    found = compare_masks(prediction, truth, spacing=(1, 1), tolerance=2)
    outer = 9 * 4 + ROOT_2 * 4  # the column outside of the other square, and its corners
    sides = 2 * (1 + 2 + 3)
    inner = 2 * (1 + 2 + 3) + 3 * 4  # the column inside: nearest to the long sides, in its middle to the other column
    mean = (outer + sides + inner) / (36 + 2 * ROOT_2)
    assert found.mean_to_truth == pytest.approx(mean)
    assert found.mean_to_prediction == pytest.approx(mean)
    assert found.assd == pytest.approx(mean)
    assert found.nsd == pytest.approx((20 + ROOT_2) / (36 + 2 * ROOT_2))
    assert (found.hd95, found.hd100) == (4.0, 4.0)
    assert found.dsc == pytest.approx(2 * 60 / 200)
    assert found.iou == pytest.approx(60 / 140)


def test_a_far_speck_is_left_out_of_hd95_only() -> None:
    truth = box((80, 80), (10, 60), (10, 60))
    prediction = truth.copy()
    prediction[75, 30] = True
    found = compare_masks(prediction, truth, spacing=(1, 2))
    assert (found.hd95, found.hd100) == (0.0, 16.0)
    length = 49 * (2 + 4) + 4 * math.sqrt(5) / 2  # 49 points on each side, 1 or 2 long, and four corners
    pixel = 4 * math.sqrt(5) / 2  # two corners 15 rows away from the square, two 16
    assert found.mean_to_truth == pytest.approx(pixel * 15.5 / (length + pixel))
    assert found.mean_to_prediction == 0
    assert found.assd == pytest.approx(pixel * 15.5 / (2 * length + pixel))


@pytest.mark.parametrize("shape", [(12, 9), (12, 9, 7)])
def test_directions_change_places_with_the_masks(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(4)
    first, second = generator.random(shape) < 0.2, generator.random(shape) < 0.4
    spacing = (1.0, 2.5, 0.7)[: len(shape)]
    there, back = compare_masks(first, second, spacing=spacing), compare_masks(second, first, spacing=spacing)
    assert there.mean_to_truth == back.mean_to_prediction != there.mean_to_prediction
    assert (there.dsc, there.nsd, there.hd95, there.hd100) == (back.dsc, back.nsd, back.hd95, back.hd100)
    assert there.assd == pytest.approx(back.assd)
    assert min(there.mean_to_truth, there.mean_to_prediction) < there.assd
    assert there.assd < max(there.mean_to_truth, there.mean_to_prediction)


def test_equal_masks() -> None:
    mask = box((9, 8, 7), (2, 9), (0, 8), (3, 4))
    assert compare_masks(mask, mask, spacing=(1, 2, 3)) == PairMetrics(1, 1, 0, 0, 0, 0, 0, 0, 1)


def test_masks_of_the_whole_image() -> None:
    mask = np.ones((5, 4), dtype=bool)
    found = compare_masks(mask, mask, spacing=(1, 1))
    assert (found.dsc, found.nsd, found.hd95) == (1, 1, 0)


def test_distances_scale_with_the_spacing() -> None:
    generator = np.random.default_rng(6)
    first, second = generator.random((9, 12, 7)) < 0.05, generator.random((9, 12, 7)) < 0.05
    one = compare_masks(first, second, spacing=(1.5, 0.5, 2), tolerance=1.25)
    ten = compare_masks(first, second, spacing=(15, 5, 20), tolerance=12.5)
    assert ten.nsd == pytest.approx(one.nsd)
    assert astuple(ten)[2:7] == pytest.approx([10 * value for value in astuple(one)[2:7]])
    assert ten.volume_error_ml == pytest.approx(1000 * one.volume_error_ml)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3)])
def test_empty_masks_follow_the_table(shape: tuple[int, ...]) -> None:
    full, nothing = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
    spacing = (2.0,) * len(shape)
    volume = math.prod(shape) * 8 / 1000 if len(shape) == 3 else math.nan
    nan, inf = math.nan, math.inf
    expected = {
        "both": (nothing, nothing, (nan, nan, inf, inf, inf, inf, inf, 0 * volume, nan)),
        "prediction": (nothing, full, (0, 0, inf, inf, inf, inf, inf, -volume, 0)),
        "truth": (full, nothing, (0, 0, inf, inf, inf, inf, inf, volume, 0)),
    }
    for prediction, truth, values in expected.values():
        found = compare_masks(prediction, truth, spacing=spacing)
        assert astuple(found) == pytest.approx(values, nan_ok=True)


def test_volume_error_is_predicted_minus_true_in_ml() -> None:
    prediction, truth = box((30, 30, 30), (0, 10), (0, 10), (0, 10)), box((30, 30, 30), (5, 25), (5, 25), (5, 6))
    found = compare_masks(prediction, truth, spacing=(0.5, 2, 5))
    assert found.volume_error_ml == pytest.approx((1000 - 400) * 5 / 1000)
    assert math.isnan(compare_masks(prediction[0], truth[0], spacing=(1, 1)).volume_error_ml)


def test_slices_are_averaged_where_they_have_something() -> None:
    square = box((20, 20), (5, 15), (5, 15))
    shifted, nothing = np.roll(square, 2, axis=1), np.zeros_like(square)
    truth = np.stack([square, square, nothing, nothing, square], axis=-1)
    prediction = np.stack([square, shifted, nothing, square, nothing], axis=-1)
    found = compare_slices(prediction, truth, tolerance=1)
    alone = compare_masks(shifted, square, spacing=(1, 1), tolerance=1)
    assert (found.slices, found.slices_without_distance) == (4, 2)
    assert found.mean.nsd == pytest.approx((1 + alone.nsd + 0 + 0) / 4)
    assert found.mean.dsc == pytest.approx(2 * 180 / 600)  # over all pixels together
    assert found.mean.iou == pytest.approx(180 / 420)
    assert (found.mean.hd95, found.mean.hd100) == (alone.hd95 / 2, alone.hd100 / 2) == (1, 1)
    assert found.mean.assd == pytest.approx(alone.assd / 2)
    assert found.mean.mean_to_truth == pytest.approx(alone.mean_to_truth / 2)
    assert found.mean.mean_to_prediction == pytest.approx(alone.mean_to_prediction / 2)
    assert math.isnan(found.mean.volume_error_ml)


def test_one_slice_is_a_2d_image() -> None:
    generator = np.random.default_rng(8)
    first, second = generator.random((14, 9)) < 0.3, generator.random((14, 9)) < 0.3
    stack = compare_slices(first[..., None], second[..., None])
    assert astuple(stack.mean) == pytest.approx(astuple(compare_masks(first, second, spacing=(1, 1))), nan_ok=True)
    assert (stack.slices, stack.slices_without_distance) == (1, 0)


def test_slices_that_never_meet() -> None:
    square, nothing = box((9, 9), (2, 5), (2, 5)), np.zeros((9, 9), dtype=bool)
    apart = compare_slices(np.stack([square, nothing], axis=-1), np.stack([nothing, square], axis=-1))
    assert astuple(apart.mean)[:7] == (0, 0, *[math.inf] * 5)
    assert (apart.slices, apart.slices_without_distance) == (2, 2)
    empty = compare_slices(np.stack([nothing] * 3, axis=-1), np.stack([nothing] * 3, axis=-1))
    assert astuple(empty.mean)[:7] == pytest.approx((math.nan, math.nan, *[math.inf] * 5), nan_ok=True)
    assert (empty.slices, empty.slices_without_distance) == (0, 0)


def test_pairs_that_cannot_be_compared() -> None:
    mask = np.ones((3, 4), dtype=bool)
    with pytest.raises(InputError, match="got uint8"):
        compare_masks(mask.astype(np.uint8), mask, spacing=(1, 1))
    with pytest.raises(InputError, match="2 positive distances"):
        compare_masks(mask, mask, spacing=(1, -1))
    with pytest.raises(ConfigError, match="got inf"):
        compare_masks(mask & False, mask & False, spacing=(1, 1), tolerance=math.inf)
    with pytest.raises(InputError, match=r"\(H, W, D\), got the shape \(3, 4\)"):
        compare_slices(mask, mask)
    with pytest.raises(InputError, match="of one shape"):
        compare_slices(mask[..., None], mask)


@pytest.mark.parametrize("shape", [(16, 20), (9, 7, 8)])
def test_the_order_in_memory_does_not_matter(shape: tuple[int, ...]) -> None:
    """Masks from end to end of all axes, which stay whole, and thus in their order, when they are cut to their box."""
    truth, prediction = np.zeros((2, *shape), dtype=bool)
    truth[-5:-1, 2:6] = True
    prediction[-2:, 2:6] = True
    prediction[:2, 2:6] = True
    prediction[tuple([0] * len(shape))] = prediction[tuple([-1] * len(shape))] = True
    spacing = (1.0, 0.7, 2.5)[: len(shape)]
    expected = astuple(compare_masks(prediction, truth, spacing=spacing))
    for first, second in ((np.asfortranarray(prediction), np.asfortranarray(truth)), (prediction.T.copy().T, truth)):
        assert astuple(compare_masks(first, second, spacing=spacing)) == pytest.approx(expected, nan_ok=True)
