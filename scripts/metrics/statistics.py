"""How sure a mean over cases is, and whether two runs differ: bootstrap intervals and paired comparisons.

Cases of one patient are not independent. So patients are drawn, with all their cases, and not cases (the cluster
bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8); where patients are not
known, each case counts as one. Intervals are percentiles of the resampled means (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13).

A NaN stands for a case without the class. It takes part in no mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scripts.errors import InputError

Values = npt.NDArray[np.float64]
RESAMPLES = 5000
LEVEL = 0.95
# Below it two runs cannot be told apart at 5 %: even where all n patients agree, chance does the same in 2 / 2^n.
FEWEST_PATIENTS = 6
_AT_ONCE = 500  # resamples whose counts are held at a time


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        mean: of the cases themselves; NaN where there is none.
        low: lower end; NaN where there are fewer than two patients.
        high: upper end.
        cases: number of cases with a value.
        patients: number of patients among these.
    """

    mean: float
    low: float
    high: float
    cases: int
    patients: int


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same cases.

    Attributes:
        difference: of the means, second less first, with its interval.
        p_value: of Wilcoxon's signed-rank test over patients' means, two-sided; 1 where no pair differs, NaN where
            there is none.
    """

    difference: Interval
    p_value: float

    @property
    def verdict(self) -> str:
        """Say of the second run `better` or `worse` where the interval excludes zero, else `not distinguishable`.

        Of fewer than `FEWEST_PATIENTS` it is `too few patients`, whatever the interval.
        """
        if self.difference.patients < FEWEST_PATIENTS:
            return "too few patients"
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "not distinguishable"


def class_intervals(
    values: Values,
    *,
    patients: Sequence[str],
    weights: Values | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[list[Interval], Interval]:
    """Give the mean of each class over its cases, and the mean of these means, with their intervals.

    Args:
        values: `(cases, K)`, NaN where a case lacks a class.
        patients: of each case.
        weights: `(cases, K)`, how much a case counts in the mean of a class, such as its slices in a mean over slices;
            all alike if None.
        seed: of the resampling.
        resamples: number of draws; 0 for means without intervals, whose ends are then NaN.
        level: share of the resampled means within an interval, above 0 and below 1.

    Returns:
        One interval for each class, and that of the unweighted mean over the classes that occur.

    Raises:
        InputError: values that are no such table, another number of patients than of cases, or weights of another
            shape.
    """
    groups = _groups(values, patients)
    if weights is not None and weights.shape != values.shape:
        raise InputError(f"expected a weight for each of {values.shape} values, got {weights.shape}; pass them alike")
    counts = (~np.isnan(values)).astype(np.float64) if weights is None else np.where(np.isnan(values), 0, weights)
    means = _resampled_means(values, counts, groups, seed=seed, resamples=resamples)  # (resamples, K)
    observed = _weighted_means(np.nan_to_num(values) * counts, counts)
    occurring = ~np.isnan(observed)
    with_value = ~np.isnan(values)
    classes = [
        _interval(observed[k], means[:, k], groups, with_value[:, k], level=level) for k in range(values.shape[1])
    ]
    overall = _mean_of_rows(means[:, occurring])
    mean = float(observed[occurring].mean()) if occurring.any() else float("nan")
    return classes, _interval(mean, overall, groups, np.any(with_value, axis=1), level=level)


def compare_runs(
    first: Values,
    second: Values,
    *,
    patients: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[list[Comparison], Comparison]:
    """Compare two runs case by case: each class, and the mean of the classes.

    Args:
        first: `(cases, K)`, NaN where a case lacks a class.
        second: the same cases and classes of the other run.
        patients: of each case.
        seed: of the resampling.
        resamples: number of draws.
        level: of the intervals.

    Raises:
        InputError: tables of other shapes, or a value that one run has and the other lacks.
    """
    if first.shape != second.shape or not np.array_equal(np.isnan(first), np.isnan(second)):
        raise InputError("expected two runs over the same cases and classes, got others; score both on the same data")
    difference = second - first
    classes, overall = class_intervals(difference, patients=patients, seed=seed, resamples=resamples, level=level)
    groups = _groups(difference, patients)
    tests = [_wilcoxon(difference[:, k], groups) for k in range(difference.shape[1])]
    each_case = _mean_of_rows(difference)
    return (
        [Comparison(interval, p_value) for interval, p_value in zip(classes, tests, strict=True)],
        Comparison(overall, _wilcoxon(each_case, groups)),
    )


def _groups(values: Values, patients: Sequence[str]) -> npt.NDArray[np.intp]:
    """Number the patients: `(cases,)` from 0."""
    if values.ndim != 2 or len(values) != len(patients):
        raise InputError(f"expected values (cases, classes) of {len(patients)} cases, got {values.shape}")
    return np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1]


def _weighted_means(sums: Values, weights: Values) -> Values:
    """Give each class's mean `(K,)` of weighted values and their weights `(cases, K)`; NaN where no weight is."""
    with np.errstate(invalid="ignore"):
        return sums.sum(axis=0) / weights.sum(axis=0)


def _resampled_means(
    values: Values, weights: Values, groups: npt.NDArray[np.intp], *, seed: int, resamples: int
) -> Values:
    """Draw patients with replacement, and give each class's mean in each draw, `(resamples, K)`; NaN where none is."""
    patients = int(groups.max(initial=-1)) + 1
    sums, counts = np.zeros((patients, values.shape[1])), np.zeros((patients, values.shape[1]))
    np.add.at(sums, groups, np.nan_to_num(values) * weights)
    np.add.at(counts, groups, weights)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _AT_ONCE) if patients else ():
        size = min(_AT_ONCE, resamples - start)
        drawn = generator.multinomial(patients, np.full(patients, 1 / patients), size=size)  # (size, patients)
        with np.errstate(invalid="ignore"):
            means.append((drawn @ sums) / (drawn @ counts))
    return np.concatenate(means) if means else np.full((resamples, values.shape[1]), np.nan)


def _interval(
    mean: float,
    resampled: Values,
    groups: npt.NDArray[np.intp],
    chosen: npt.NDArray[np.bool_] | np.bool_,
    *,
    level: float,
) -> Interval:
    """Give percentiles of resampled means, where at least two patients have a value."""
    patients = len(np.unique(groups[chosen]))
    known = resampled[~np.isnan(resampled)]
    low, high = float("nan"), float("nan")
    if patients > 1 and len(known):
        low, high = (float(end) for end in np.percentile(known, [50 * (1 - level), 50 * (1 + level)]))
    return Interval(mean=float(mean), low=low, high=high, cases=int(chosen.sum()), patients=patients)


def _wilcoxon(differences: Values, groups: npt.NDArray[np.intp]) -> float:
    """Test whether patients' mean differences lie around zero."""
    from scipy.stats import wilcoxon  # half a second that only a comparison should wait for

    known = ~np.isnan(differences)
    if not known.any():
        return float("nan")
    each = [differences[known & (groups == group)].mean() for group in np.unique(groups[known])]
    return float(wilcoxon(each).pvalue) if np.any(each) else 1.0


def _mean_of_rows(values: Values) -> Values:
    """Average each row over what it has; NaN where that is nothing."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=1) / known.sum(axis=1)
