"""Slices counted by what is there and what was predicted: by hand, and slice by slice in plain Python."""

import numpy as np
import pytest

from scripts.errors import InputError
from scripts.metrics.detection import SliceCounts, count_slices


def test_each_kind_of_slice_by_hand() -> None:
    truth, prediction = np.zeros((2, 20, 20, 8), dtype=bool)
    truth[0, 0, [2, 3]] = True
    prediction[:, :, [1, 3, 6]] = True  # next to the class, right, far from it
    counts = count_slices(prediction, truth)
    # Slices 1 and 4 are next to the class; slice 2 is missed.
    assert counts == SliceCounts(8, 6, 2, adjacent_absent=2, adjacent_false_positive=1, false_negative=1)


def test_random_stacks_agree_with_counting_one_by_one() -> None:
    generator = np.random.default_rng(2)
    for _ in range(20):
        here = generator.random((2, 12)) < 0.4
        truth, prediction = (generator.random((15, 100, 12)) < 0.001 for _ in range(2))
        truth &= here[0]
        prediction &= here[1]
        present = [bool(truth[..., d].any()) for d in range(12)]
        wrong = [not present[d] and prediction[..., d].sum() / 1500 > 0.001 for d in range(12)]
        near = [not present[d] and any(present[e] for e in (d - 1, d + 1) if 0 <= e < 12) for d in range(12)]
        missed = [present[d] and not prediction[..., d].any() for d in range(12)]
        both = [a and b for a, b in zip(wrong, near, strict=True)]
        expected = (12, 12 - sum(present), sum(wrong), sum(near), sum(both), sum(missed))
        assert count_slices(prediction, truth) == SliceCounts(*map(int, expected))


@pytest.mark.parametrize(("predicted", "counted"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_false_positive_slice_starts_above_a_thousandth(predicted: int, counted: int) -> None:
    truth = np.zeros((40, 50, 2), dtype=bool)  # 2 of 2000 pixels are exactly 0.1 %
    truth[0, 0, 1] = True
    prediction = np.zeros_like(truth)
    prediction[5, :predicted, 0] = True
    prediction[5:9, :, 1] = True  # wrong as well, but on a slice that has the class
    counts = count_slices(prediction, truth)
    assert (counts.absent, counts.false_positive) == (1, counted)


@pytest.mark.parametrize("pixels", [1000, 3000, 7000, 9000, 29000])
def test_false_positive_threshold_is_exact_for_every_size(pixels: int) -> None:
    truth = np.zeros((pixels, 1, 1), dtype=bool)
    prediction = truth.copy()
    prediction[: pixels // 1000] = True
    assert count_slices(prediction, truth).false_positive == 0
    prediction[pixels // 1000] = True
    assert count_slices(prediction, truth).false_positive == 1


@pytest.mark.parametrize("filled", [True, False])
def test_stack_that_has_the_class_everywhere_or_nowhere(filled: bool) -> None:
    truth = np.full((4, 4, 3), filled)
    expected = SliceCounts(3, 0, 0, 0, 0, 0) if filled else SliceCounts(3, 3, 3, 0, 0, 0)
    assert count_slices(np.ones_like(truth), truth) == expected


def test_other_arrays_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(H, W, D\)"):
        count_slices(np.zeros((4, 4), bool), np.zeros((4, 4), bool))
