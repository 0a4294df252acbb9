"""Calibration: binned means against a loop, predicted Dice against counted masks, and every degenerate input."""

import math

import numpy as np
import pytest

from scripts.errors import InputError
from scripts.metrics.calibration import (
    Bins,
    compare_predicted,
    dice_between_samples,
    dice_by_head,
    dice_by_probability,
    dice_of_iou,
    rank_correlation,
)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def by_loop(values, outcomes, *, count, low=0.0, high=1.0):
    """The expected calibration error, one bin after the other."""
    edges = np.linspace(low, high, count + 1)
    total = 0.0
    for place in range(count):
        last = place == count - 1
        inside = (values >= edges[place]) & ((values <= edges[place + 1]) if last else (values < edges[place + 1]))
        if inside.any():
            total += inside.sum() * abs(values[inside].mean() - outcomes[inside].mean())
    return total / len(values)


@pytest.mark.parametrize(("low", "high", "count"), [(0.0, 1.0, 10), (0.0, 0.5, 4), (-1.0, 3.0, 7)])
def test_the_calibration_error_is_that_of_a_loop_over_the_bins(rng, low, high, count):
    values = rng.uniform(low, high, 300)
    outcomes = (rng.random(300) < 0.4).astype(float)
    bins = Bins(low=low, high=high, count=count)
    bins.add(values[:100].reshape(10, 10), outcomes[:100].reshape(10, 10))
    bins.add(values[100:], outcomes[100:])
    assert bins.calibration_error() == pytest.approx(by_loop(values, outcomes, count=count, low=low, high=high))
    assert bins.sums[:, 0].sum() == 300


def test_bins_by_hand():
    bins = Bins(count=2)
    bins.add(np.array([0.0, 0.25, 0.5, 1.0]), np.array([False, True, True, True]))
    first, second = bins.rows()
    assert first == {"low": 0.0, "high": 0.5, "count": 2, "mean": 0.125, "outcome": 0.5}
    assert second == {"low": 0.5, "high": 1.0, "count": 2, "mean": 0.75, "outcome": 1.0}
    assert bins.calibration_error() == pytest.approx(0.5 * 0.375 + 0.5 * 0.25)


def test_probabilities_that_come_true_as_often_as_they_say_are_calibrated():
    bins = Bins(count=4)
    bins.add(np.full(8, 0.25), np.array([1, 1, 0, 0, 0, 0, 0, 0]))
    assert bins.calibration_error() == 0


def test_empty_bins_have_no_means_and_no_error():
    bins = Bins(count=3)
    assert math.isnan(bins.calibration_error())
    bins.add(np.zeros(0), np.zeros(0))
    assert [(row["count"], row["mean"], row["outcome"]) for row in bins.rows()] == [(0, None, None)] * 3


def test_each_bins_count_for_themselves():
    first, second = Bins(), Bins()
    first.add(np.array([0.5]), np.array([1]))
    assert second.sums.sum() == 0


def test_merged_bins_are_those_of_all_values(rng):
    values, outcomes = rng.random(50), rng.random(50)
    together, first, second = Bins(), Bins(), Bins()
    together.add(values, outcomes)
    first.add(values[:20], outcomes[:20])
    second.add(values[20:], outcomes[20:])
    first.merge(second)
    np.testing.assert_allclose(first.sums, together.sums)


@pytest.mark.parametrize("other", [{"low": -1.0}, {"high": 2.0}, {"count": 3}])
def test_other_bins_are_not_merged(other):
    with pytest.raises(InputError, match="same ends and number"):
        Bins().merge(Bins(**other))


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_a_value_beyond_the_bins_is_refused(value):
    with pytest.raises(InputError, match="from 0 to 1"):
        Bins().add(np.array([0.5, value]), np.zeros(2))


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"\(2,\) and \(3,\)"):
        Bins().add(np.zeros(2), np.zeros(3))
    with pytest.raises(InputError, match=r"\(2,\), \(3,\)"):
        compare_predicted(np.zeros(2), np.zeros(3))


# Predicted against true scores.


def ranks(values):
    """Ranks from 1, ties sharing their mean."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def test_the_rank_correlation_is_pearsons_of_the_ranks(rng):
    first = rng.integers(0, 8, 30).astype(float)
    second = first + rng.normal(0, 3, 30)
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(ranks(first), ranks(second))[0, 1])


def test_agreement_by_hand():
    predicted = np.array([0.85, 0.25, 0.95, np.nan, 0.5])
    true = np.array([0.75, 0.35, 0.85, 0.2, np.nan])
    agreement = compare_predicted(predicted, true)
    assert agreement.pairs == 3
    assert agreement.absolute_error == pytest.approx(0.1)
    assert agreement.bias == pytest.approx(0.1 / 3)
    assert agreement.calibration_error == pytest.approx(0.1)
    assert agreement.spearman == pytest.approx(1.0)
    assert sum(row["count"] for row in agreement.bins.rows()) == 3


def test_errors_of_one_bin_cancel_and_those_of_several_do_not():
    predicted, true = np.array([0.4, 0.6]), np.array([0.5, 0.5])
    assert compare_predicted(predicted, true, bins=1).calibration_error == pytest.approx(0)
    assert compare_predicted(predicted, true, bins=2).calibration_error == pytest.approx(0.1)


@pytest.mark.parametrize("pairs", [[], [(0.5, np.nan)]])
def test_without_a_pair_nothing_is_known(pairs):
    values = np.array(pairs, dtype=float).reshape(-1, 2)
    agreement = compare_predicted(values[:, 0], values[:, 1])
    assert agreement.pairs == 0
    assert all(
        math.isnan(value)
        for value in (agreement.calibration_error, agreement.absolute_error, agreement.bias, agreement.spearman)
    )


@pytest.mark.parametrize("true", [[0.5], [0.5, 0.5]])
def test_there_is_no_rank_correlation_of_one_pair_or_a_constant(true):
    assert math.isnan(rank_correlation(np.linspace(0.1, 0.9, len(true)), np.array(true)))
    assert math.isnan(rank_correlation(np.array(true), np.linspace(0.1, 0.9, len(true))))


# Predicted Dice.


def test_dice_of_the_iou_of_counted_masks(rng):
    first, second = rng.random((2, 9, 7)) > 0.4
    iou = (first & second).sum() / (first | second).sum()
    assert dice_of_iou(iou) == pytest.approx(2 * (first & second).sum() / (first.sum() + second.sum()))


def test_slices_count_by_their_predicted_area():
    iou, area = np.array([1.0, 1 / 3, np.nan, 0.9]), np.array([10, 30, 0, 0])
    assert dice_by_head(iou, area) == pytest.approx((10 * 1.0 + 30 * 0.5) / 40)


def test_an_estimate_beyond_0_and_1_counts_as_these():
    assert dice_by_head(np.array([1.7]), np.array([3])) == 1.0
    assert dice_by_head(np.array([-0.2]), np.array([3])) == 0.0


def test_a_case_without_a_prediction_has_no_predicted_dice():
    assert math.isnan(dice_by_head(np.array([0.9, 0.8]), np.array([0, 0])))
    assert math.isnan(dice_between_samples(np.zeros((3, 3))))
    assert math.isnan(dice_by_probability(0.0, 0, 4.0))


def test_samples_are_compared_two_by_two(rng):
    masks = rng.random((4, 200)) > 0.5
    overlaps = np.array([[(a & b).sum() for b in masks] for a in masks])
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = np.mean([2 * (masks[i] & masks[j]).sum() / (masks[i].sum() + masks[j].sum()) for i, j in pairs])
    assert dice_between_samples(overlaps) == pytest.approx(expected)


def test_two_empty_samples_agree():
    overlaps = np.zeros((3, 3), dtype=int)
    overlaps[2, 2] = 8
    assert dice_between_samples(overlaps) == pytest.approx(1 / 3)  # (0 and 1: 1; with 2: 0, 0)


def test_a_single_sample_agrees_with_nobody():
    assert math.isnan(dice_between_samples(np.array([[5]])))


def test_probabilities_predict_the_dice_of_their_expected_overlap():
    probability = np.array([0.9, 0.8, 0.4, 0.1])
    mask = probability > 0.5
    found = dice_by_probability(probability[mask].sum(), mask.sum(), probability.sum())
    assert found == pytest.approx(2 * 1.7 / (2 + 2.2))
    assert dice_by_probability(2.0, 2, 2.0) == 1.0
