"""Intervals and comparisons: against SciPy's bootstrap, by hand, and that cases of a patient stay together."""

import math

import numpy as np
import pytest
from scipy import stats

from scripts.errors import InputError
from scripts.metrics.statistics import class_intervals, compare_runs

NAN = math.nan


def names(count):
    return [f"p{number}" for number in range(count)]


def column(*values):
    return np.array(values, dtype=float)[:, None]


def test_the_interval_is_that_of_scipys_bootstrap():
    values = np.random.default_rng(0).beta(5, 2, size=40)
    (interval,), overall = class_intervals(values[:, None], patients=names(40), resamples=20_000)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=2e-3)
    assert overall == interval


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    values = np.random.default_rng(0).random((10, 2))
    first, again, other = (class_intervals(values, patients=names(10), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_cases_of_one_patient_stay_together():
    """Ten patients of whom all ten cases are alike say no more than ten cases do."""
    each = np.random.default_rng(0).random(10)
    many = np.repeat(each, 10)[:, None]
    patients = np.repeat(names(10), 10).tolist()
    (grouped,), _ = class_intervals(many, patients=patients, seed=3)
    (plain,), _ = class_intervals(each[:, None], patients=names(10), seed=3)
    (naive,), _ = class_intervals(many, patients=names(100), seed=3)
    assert (grouped.low, grouped.high) == pytest.approx((plain.low, plain.high))
    assert (grouped.cases, grouped.patients) == (100, 10)
    assert naive.high - naive.low < 0.5 * (grouped.high - grouped.low)


def test_order_of_cases_and_names_of_patients_do_not_matter():
    values = np.random.default_rng(0).random((6, 1))
    order = [3, 1, 5, 0, 2, 4]
    (first,), _ = class_intervals(values, patients=list("abcdef"))
    (second,), _ = class_intervals(values[order], patients=[list("abcdef")[i] for i in order])
    assert (first.low, first.high) == pytest.approx((second.low, second.high))


def test_a_case_without_the_class_takes_no_part():
    values = np.array([[0.2, NAN], [0.4, 0.9], [0.9, NAN], [0.5, 0.7]])
    (first, second), overall = class_intervals(values, patients=names(4))
    assert (first.mean, first.cases, first.patients) == (0.5, 4, 4)
    assert (second.mean, second.cases, second.patients) == (pytest.approx(0.8), 2, 2)
    assert second.low == pytest.approx(0.7)
    assert second.high == pytest.approx(0.9)
    assert overall.mean == pytest.approx(0.65)  # of the two means, not of the six values


def test_a_class_that_no_case_has_is_left_out_of_the_mean():
    values = np.array([[0.2, NAN], [0.4, NAN]])
    (_, absent), overall = class_intervals(values, patients=names(2))
    assert math.isnan(absent.mean)
    assert math.isnan(absent.low)
    assert absent.cases == 0
    assert overall.mean == pytest.approx(0.3)
    assert overall.low == pytest.approx(0.2)


@pytest.mark.parametrize("patients", [["a"], ["a", "a"]])
def test_one_patient_has_a_mean_and_no_interval(patients):
    values = column(*[0.25] * len(patients))
    (interval,), overall = class_intervals(values, patients=patients)
    assert interval.mean == overall.mean == 0.25
    assert math.isnan(interval.low)
    assert math.isnan(overall.high)


def test_no_case_at_all():
    (interval,), overall = class_intervals(np.empty((0, 1)), patients=[])
    assert math.isnan(interval.mean)
    assert math.isnan(overall.mean)
    assert overall.cases == 0


def test_equal_values_have_an_interval_of_no_width():
    (interval,), _ = class_intervals(column(0.5, 0.5, 0.5), patients=names(3))
    assert (interval.low, interval.mean, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_level_of_one_half_is_narrower():
    values = np.random.default_rng(0).random((20, 1))
    (wide,), _ = class_intervals(values, patients=names(20))
    (narrow,), _ = class_intervals(values, patients=names(20), level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(("shape", "patients"), [((3,), 3), ((3, 1), 2), ((3, 1, 1), 3)])
def test_a_table_that_is_none(shape, patients):
    with pytest.raises(InputError, match=r"expected values \(cases, classes\)"):
        class_intervals(np.zeros(shape), patients=names(patients))


# --- two runs


def test_a_clear_difference_is_better_and_its_reverse_worse():
    generator = np.random.default_rng(0)
    first = generator.random((30, 1)) * 0.5
    second = first + 0.1 + 0.02 * generator.standard_normal((30, 1))
    (comparison,), overall = compare_runs(first, second, patients=names(30))
    assert comparison.verdict == overall.verdict == "better"
    assert comparison.difference.mean == pytest.approx(float((second - first).mean()))
    assert comparison.p_value == pytest.approx(stats.wilcoxon(second[:, 0], first[:, 0]).pvalue)
    (reverse,), _ = compare_runs(second, first, patients=names(30))
    assert reverse.verdict == "worse"
    assert reverse.p_value == pytest.approx(comparison.p_value)


def test_pairing_finds_what_the_spread_of_the_cases_hides():
    """The runs' own intervals overlap widely; case by case one is always a little better."""
    first = np.linspace(0, 0.9, 20)[:, None]
    second = first + np.linspace(0.01, 0.03, 20)[:, None]
    (own,), _ = class_intervals(first, patients=names(20))
    (other,), _ = class_intervals(second, patients=names(20))
    assert own.high > other.low
    assert compare_runs(first, second, patients=names(20))[0][0].verdict == "better"


def test_chance_is_not_distinguishable():
    generator = np.random.default_rng(0)
    first, second = generator.random((25, 2)), generator.random((25, 2))
    classes, overall = compare_runs(first, second, patients=names(25))
    assert [entry.verdict for entry in (*classes, overall)] == ["not distinguishable"] * 3


def test_equal_runs_have_p_one():
    values = np.random.default_rng(0).random((6, 1))
    (comparison,), overall = compare_runs(values, values, patients=names(6))
    assert comparison.p_value == overall.p_value == 1
    assert comparison.verdict == "not distinguishable"


def test_a_single_patient_proves_nothing():
    (comparison,), _ = compare_runs(column(0.1, 0.2), column(0.9, 0.8), patients=["a", "a"])
    assert comparison.verdict == "too few patients"


@pytest.mark.parametrize(("patients", "verdict"), [(5, "too few patients"), (6, "better")])
def test_five_patients_that_agree_may_be_chance(patients, verdict):
    """Five of five above zero, two-sided: 2 / 2^5 = 0.0625; six of six: 0.03125."""
    first = np.zeros((2 * patients, 1))
    second = np.linspace(0.01, 0.02, 2 * patients)[:, None]
    (comparison,), overall = compare_runs(first, second, patients=names(patients) * 2)
    assert comparison.difference.low > 0
    assert comparison.verdict == overall.verdict == verdict
    assert (comparison.p_value < 0.05) == (verdict == "better")


def test_wilcoxon_takes_patients_not_cases():
    generator = np.random.default_rng(0)
    first = np.repeat(generator.random(8), 5)[:, None]
    second = first + np.repeat(0.05 + 0.1 * generator.standard_normal(8), 5)[:, None]
    patients = np.repeat(names(8), 5).tolist()
    (comparison,), _ = compare_runs(first, second, patients=patients)
    assert comparison.p_value == pytest.approx(stats.wilcoxon((second - first)[::5, 0]).pvalue)


def test_runs_over_other_cases_are_refused():
    with pytest.raises(InputError, match="the same cases and classes"):
        compare_runs(column(0.1, 0.2), column(0.1), patients=["a"])
    with pytest.raises(InputError, match="the same cases and classes"):
        compare_runs(column(0.1, NAN), column(0.1, 0.2), patients=["a", "b"])
