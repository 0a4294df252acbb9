"""The scores of many cases as averages with intervals, and two runs over the same cases compared.

Three ways to average the DSC of a class over the cases that contain it:

- per case: every case counts alike, with the DSC of all its voxels;
- per slice: every slice with the class counts alike, with its own DSC;
- per data set: the voxels of all cases are pooled, 2 sum |P and T| / sum (|P| + |T|).

All other scores are averaged per case. Beside these means stand the batch-pooled DSC and IoU of older tables
(`scripts.metrics.pooling`). The mean of the classes weighs every class that occurs alike. Intervals are
bootstrap intervals that resample patients (`scripts.metrics.statistics`). Infinite distances, those of cases with the
class and without a prediction, take part in no mean and are counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from scripts.errors import ConfigError, InputError
from scripts.metrics.pooling import BATCH_POOLED, POOLED_BATCH, BatchPooled, pool_batches
from scripts.metrics.scores import ClassScore
from scripts.metrics.statistics import RESAMPLES, Comparison, Interval, Values, class_intervals, compare_runs

PROTOCOLS: Final = ("all", "oracle")
"""Which slices a class is asked for on: "all" of the case, or ("oracle") only those whose truth contains it."""

AVERAGINGS: Final = ("case", "slice", "dataset", BATCH_POOLED)
"""What counts alike in the mean DSC of a class: cases, slices, or the voxels of the whole data set or of a batch."""

SCORES: Final = ("dsc", "nsd", "nsd_challenge", "hd95", "assd", "volume_error_ml", "iou")
"""The scores of a case that are averaged per case, by the names of `ClassScore`'s attributes."""

COMPARED: Final = ("dsc", "nsd", "nsd_challenge")
"""The scores in which two runs are compared in all classes; the higher is the better in all of them."""

SWAPPED: Final = "swapped_share"
"""The share of swapped voxels, in which two runs are compared in classes with a lateral partner; lower is better."""

_REVERSE: Final = {"better": "worse", "worse": "better"}


@dataclass(frozen=True)
class ClassSummary:
    """One class over all cases.

    Attributes:
        class_id: The class's number in the vocabulary.
        class_name: The class's name in the vocabulary.
        means: Mean over the cases that contain the class, with its interval, of each of ``SCORES`` and of
            "dsc_per_slice" and "dsc_per_dataset".
        cases: Number of cases whose truth contains the class.
        cases_without: Number of cases whose truth lacks it.
        false_negative_cases: Cases with the class in which nothing of it was predicted.
        infinite_distances: Cases with the class whose distances are infinite and in no mean: besides those, planar
            cases in which truth and prediction share no slice.
        false_positive_cases: Cases without the class that have a false-positive slice.
        slices: Slices of all cases.
        absent_slices: Slices whose truth lacks the class.
        false_positive_slices: Absent slices on which more than 0.1 % of the pixels are predicted.
        adjacent_absent_slices: Absent slices next to one that has the class.
        adjacent_false_positive_slices: False positives among these.
        false_negative_slices: Slices with the class on which nothing of it is predicted.
        swapped_share: Mean share of the predicted voxels that lie in the truth of the lateral partner, 0 to 1; NaN
            without a partner or a prediction.
        swap_cases: Number of cases in that mean.
        has_partner: Whether a case has a lateral partner of the class to be taken for.
        batch_pooled: DSC and IoU of whole batches of cases.
    """

    class_id: int
    class_name: str
    means: dict[str, Interval]
    cases: int
    cases_without: int
    false_negative_cases: int
    infinite_distances: int
    false_positive_cases: int
    slices: int
    absent_slices: int
    false_positive_slices: int
    adjacent_absent_slices: int
    adjacent_false_positive_slices: int
    false_negative_slices: int
    swapped_share: float
    swap_cases: int
    has_partner: bool
    batch_pooled: BatchPooled

    @property
    def dsc(self) -> float:
        """Mean DSC per case."""
        return self.means["dsc"].mean

    @property
    def nsd(self) -> float:
        """Mean NSD per case."""
        return self.means["nsd"].mean

    @property
    def false_positive_rate(self) -> float:
        """False-positive slices over absent slices, 0 to 1; NaN where every slice contains the class."""
        return _share(self.false_positive_slices, self.absent_slices)

    @property
    def adjacent_false_positive_rate(self) -> float:
        """The same of the absent slices next to one with the class."""
        return _share(self.adjacent_false_positive_slices, self.adjacent_absent_slices)

    @property
    def isolated_false_positive_rate(self) -> float:
        """The same of the absent slices that have no neighbour with the class."""
        return _share(
            self.false_positive_slices - self.adjacent_false_positive_slices,
            self.absent_slices - self.adjacent_absent_slices,
        )

    @property
    def false_negative_rate(self) -> float:
        """Slices with the class and no prediction over slices with the class, 0 to 1; NaN where there is none."""
        return _share(self.false_negative_slices, self.slices - self.absent_slices)


@dataclass(frozen=True)
class Summary:
    """All classes over all cases of one evaluation that are measured in one unit.

    Attributes:
        protocol: "all" or "oracle"; results of the two are not comparable.
        unit: Unit of tolerance and distances, "mm" of volumes or "px" of planar cases.
        tolerance: Tolerance of the NSD in ``unit``.
        means: Unweighted mean of the classes' means over the classes that occur in a truth, by the same names.
        classes: One entry per class in ascending id order.
        cases: Number of cases.
        patients: Number of patients among these.
        batch_pooled: Unweighted mean of the classes' batch-pooled DSC and IoU over the classes that occur.
        pooled_batch: Cases in a batch of these.
    """

    protocol: str
    unit: str
    tolerance: float
    means: dict[str, Interval]
    classes: tuple[ClassSummary, ...]
    cases: int
    patients: int
    batch_pooled: BatchPooled
    pooled_batch: int

    @property
    def dsc(self) -> float:
        """Mean of the classes' DSC per case."""
        return self.means["dsc"].mean

    @property
    def nsd(self) -> float:
        """Mean of the classes' NSD per case."""
        return self.means["nsd"].mean


@dataclass(frozen=True)
class RunComparison:
    """Two runs over the same cases, in one score.

    Attributes:
        score: One of ``COMPARED``, or ``SWAPPED``.
        unit: "mm" of volumes or "px" of planar cases.
        tolerance: Tolerance of the NSD in ``unit``.
        class_names: The K classes; of ``SWAPPED`` those with a lateral partner.
        first: The K means of the first run; then, last, their mean over the classes that occur.
        second: Those of the second run.
        comparisons: Second less first of the K classes, and then of their mean.
    """

    score: str
    unit: str
    tolerance: float
    class_names: tuple[str, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Of each comparison what it says of the second run, see `Comparison.verdict`; fewer swaps are better."""
        verdicts = (found.verdict for found in self.comparisons)
        if self.score == SWAPPED:
            return tuple(_REVERSE.get(verdict, verdict) for verdict in verdicts)
        return tuple(verdicts)


def check_protocol(protocol: str) -> None:
    """Refuse a protocol that there is not.

    Raises:
        ConfigError: It is none of ``PROTOCOLS``.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"Expected the protocol to be one of {', '.join(PROTOCOLS)}, got {protocol!r}; correct it.")


def summarise(
    scores: Sequence[ClassScore],
    *,
    protocol: str,
    unit: str,
    seed: int = 0,
    resamples: int = RESAMPLES,
    pooled_batch: int = POOLED_BATCH,
) -> Summary:
    """Average the scores of many cases, first over cases and then over classes.

    Args:
        scores: Scores of all cases and classes, in any order; all in the same unit and at the same tolerance.
        protocol: How the classes were asked for, one of ``PROTOCOLS``.
        unit: Unit the surfaces are meant to be measured in, "mm" or "px".
        seed: Of the resampling.
        resamples: Number of draws of the intervals; 0 leaves them out.
        pooled_batch: Cases in a batch of the batch-pooled DSC and IoU, at least 1.

    Returns:
        The averages, classes in ascending id order.

    Raises:
        ConfigError: The protocol is unknown, the scores are not all in ``unit`` at one tolerance, or a batch has no
            case.
        InputError: There are no scores, a class of a case comes twice, a class that the truth has lacks a score, a case
            has two patients, or ids and names do not match one to one.
    """
    check_protocol(protocol)
    tolerance = _common_tolerance(scores, unit)
    _check_classes(scores)
    patients = _patients(scores)
    ids = sorted({score.class_id for score in scores})
    means = {
        name: class_intervals(
            _table(scores, value),
            patients=list(patients.values()),
            weights=_table(scores, weight),
            seed=seed,
            resamples=resamples,
        )
        for name, (value, weight) in _MEANS.items()
    }
    pooled, overall_pooled = pool_batches(scores, batch=pooled_batch)
    return Summary(
        protocol=protocol,
        unit=unit,
        tolerance=tolerance,
        means={name: overall for name, (_, overall) in means.items()},
        classes=tuple(
            _summarise_class(
                [score for score in scores if score.class_id == class_id],
                {name: classes[index] for name, (classes, _) in means.items()},
                pooled[index],
            )
            for index, class_id in enumerate(ids)
        ),
        cases=len(patients),
        patients=len(set(patients.values())),
        batch_pooled=overall_pooled,
        pooled_batch=pooled_batch,
    )


def summarise_units(
    scores: Sequence[ClassScore],
    *,
    protocol: str,
    seed: int = 0,
    resamples: int = RESAMPLES,
    pooled_batch: int = POOLED_BATCH,
) -> list[Summary]:
    """Average volumes (mm) and planar cases (px) apart from each other, see ``summarise``.

    Returns:
        One summary per unit that occurs, mm first.

    Raises:
        ConfigError: The protocol is unknown, one unit has several tolerances, or a batch has no case.
        InputError: See ``summarise``.
    """
    units = sorted({score.unit for score in scores}) or ["mm"]
    return [
        summarise(
            [score for score in scores if score.unit == unit],
            protocol=protocol,
            unit=unit,
            seed=seed,
            resamples=resamples,
            pooled_batch=pooled_batch,
        )
        for unit in units
    ]


def compare_scores(
    first: Sequence[ClassScore], second: Sequence[ClassScore], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[RunComparison]:
    """Compare two runs case by case.

    Args:
        first: Scores of the first run.
        second: Scores of the second run: the same cases, classes, units and tolerances. Classes go by name, since two
            programs may number them differently.
        seed: Of the resampling.
        resamples: Number of draws.

    Returns:
        For each unit one comparison per score of ``COMPARED``, and one in ``SWAPPED`` where classes have partners; this
        one is over the cases in which both runs have predicted the class.

    Raises:
        InputError: There are no scores, the runs differ in cases or classes (the text names them), or a class is in the
            truth of a case in one run only.
        ConfigError: The runs differ in units or tolerances.
    """
    _check_same_cases(first, second)
    numbers = {score.class_name: score.class_id for score in first}
    second = [replace(score, class_id=numbers[score.class_name]) for score in second]
    found = []
    for unit in sorted({score.unit for score in first}):
        of_first, of_second = ([score for score in run if score.unit == unit] for run in (first, second))
        _common_tolerance([*of_first, *of_second], unit)
        _check_classes(of_first)
        for name in COMPARED:
            tables = _table(of_first, _MEANS[name][0]), _table(of_second, _MEANS[name][0])
            found.append(_compare_tables(name, of_first, tables, seed=seed, resamples=resamples))
        sided = {score.class_name for score in (*of_first, *of_second) if score.swapped_voxels is not None}
        if sided:
            of_first, of_second = (
                [score for score in run if score.class_name in sided] for run in (of_first, of_second)
            )
            tables = _swaps_of_both(of_first, of_second)
            found.append(_compare_tables(SWAPPED, of_first, tables, seed=seed, resamples=resamples))
    return found


def _compare_tables(
    name: str, scores: Sequence[ClassScore], tables: tuple[Values, Values], *, seed: int, resamples: int
) -> RunComparison:
    """Compare two runs' tables (cases, K) of one score; cases, classes and unit are those of the scores."""
    patients = list(_patients(scores).values())
    classes, overall = compare_runs(*tables, patients=patients, seed=seed, resamples=resamples)
    return RunComparison(
        score=name,
        unit=scores[0].unit,
        tolerance=scores[0].tolerance,
        class_names=tuple(dict(sorted((score.class_id, score.class_name) for score in scores)).values()),
        first=_means(tables[0], patients),
        second=_means(tables[1], patients),
        comparisons=(*classes, overall),
    )


def _swaps_of_both(first: Sequence[ClassScore], second: Sequence[ClassScore]) -> tuple[Values, Values]:
    """The share of swapped voxels (cases, K) in two runs; NaN in both where one of them has predicted nothing."""
    tables = [_table(run, lambda score: score.swapped_share, present_only=False) for run in (first, second)]
    unknown = np.isnan(tables[0]) | np.isnan(tables[1])
    one, other = (np.where(unknown, math.nan, table) for table in tables)
    return one, other


def _means(values: Values, patients: Sequence[str]) -> tuple[float, ...]:
    """The mean of each class of (cases, K), and then the mean over those that occur."""
    classes, overall = class_intervals(values, patients=patients, resamples=0)
    return tuple(interval.mean for interval in (*classes, overall))


def _table(scores: Sequence[ClassScore], value: Callable[[ClassScore], float], *, present_only: bool = True) -> Values:
    """What each case has of each class, (cases, K) in the order of names and ids; NaN where it has none.

    So it is, unless ``present_only`` is off, where the truth lacks the class.
    """
    cases = {case: row for row, case in enumerate(sorted({score.case for score in scores}))}
    ids = {class_id: column for column, class_id in enumerate(sorted({score.class_id for score in scores}))}
    table = np.full((len(cases), len(ids)), math.nan)
    for score in scores:
        found = value(score)
        counts = score.present or not present_only
        # An infinite distance has no mean; it is counted as a false-negative case.
        table[cases[score.case], ids[score.class_id]] = found if counts and math.isfinite(found) else math.nan
    return table


def _one(_: ClassScore) -> float:
    return 1.0


def _slices_with_class(score: ClassScore) -> float:
    return float(score.slices - score.absent_slices)


def _voxels_of_both(score: ClassScore) -> float:
    # The DSC of pooled voxels is the mean of the cases' DSC with these weights.
    return float(score.truth_voxels + score.predicted_voxels)


_MEANS: Final[dict[str, tuple[Callable[[ClassScore], float], Callable[[ClassScore], float]]]] = {
    "dsc": (lambda score: score.dsc, _one),
    "nsd": (lambda score: score.nsd, _one),
    "nsd_challenge": (lambda score: score.nsd_challenge, _one),
    "hd95": (lambda score: score.hd95, _one),
    "assd": (lambda score: score.assd, _one),
    "volume_error_ml": (lambda score: score.volume_error_ml, _one),
    "iou": (lambda score: score.iou, _one),
    "dsc_per_slice": (lambda score: score.slice_dsc, _slices_with_class),
    "dsc_per_dataset": (lambda score: score.dsc, _voxels_of_both),
}
"""What is averaged and what it weighs, by the name of the mean."""


def _summarise_class(
    scores: Sequence[ClassScore], means: dict[str, Interval], batch_pooled: BatchPooled
) -> ClassSummary:
    """Count what one class has in all cases."""
    present = [score for score in scores if score.present]
    shares = [score.swapped_share for score in scores if not math.isnan(score.swapped_share)]
    return ClassSummary(
        class_id=scores[0].class_id,
        class_name=scores[0].class_name,
        means=means,
        cases=len(present),
        cases_without=len(scores) - len(present),
        false_negative_cases=sum(score.predicted_voxels == 0 for score in present),
        infinite_distances=sum(math.isinf(score.hd95) for score in present),
        false_positive_cases=sum(not score.present and score.false_positive_slices > 0 for score in scores),
        slices=sum(score.slices for score in scores),
        absent_slices=sum(score.absent_slices for score in scores),
        false_positive_slices=sum(score.false_positive_slices for score in scores),
        adjacent_absent_slices=sum(score.adjacent_absent_slices for score in scores),
        adjacent_false_positive_slices=sum(score.adjacent_false_positive_slices for score in scores),
        false_negative_slices=sum(score.false_negative_slices for score in scores),
        swapped_share=float(np.mean(shares)) if shares else math.nan,
        swap_cases=len(shares),
        has_partner=any(score.swapped_voxels is not None for score in scores),
        batch_pooled=batch_pooled,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _patients(scores: Sequence[ClassScore]) -> dict[str, str]:
    """The patient of each case, by the cases' names in order."""
    patients: dict[str, str] = {}
    for score in sorted(scores, key=lambda score: score.case):
        if patients.setdefault(score.case, score.patient) != score.patient:
            raise InputError(f"Expected one patient of {score.case!r}, got two; correct the table of the patients.")
    return patients


def _common_tolerance(scores: Sequence[ClassScore], unit: str) -> float:
    """The tolerance that all scores share, once they are known to be in the wanted unit."""
    if not scores:
        raise InputError("Expected the scores of at least one case, got none; check that the data list has cases.")
    units = sorted({score.unit for score in scores})
    if units != [unit]:
        raise ConfigError(
            f"Expected every NSD in {unit}, got {' and '.join(units)}; summarise planar cases (px) and volumes (mm) "
            "apart from each other."
        )
    tolerances = sorted({score.tolerance for score in scores})
    if len(tolerances) > 1:
        raise ConfigError(
            f"Expected every NSD at one tolerance, got {' and '.join(map(str, tolerances))} {unit}; "
            "score all cases with the same one."
        )
    return tolerances[0]


def _check_classes(scores: Sequence[ClassScore]) -> None:
    """Refuse a class of a case that comes twice, and ids and names that do not match one to one."""
    seen: set[tuple[str, int]] = set()
    for score in scores:
        if (score.case, score.class_id) in seen:
            raise InputError(
                f"Expected one score per case and class, got a second one for {score.class_name!r} in {score.case!r}; "
                "give every case a name of its own."
            )
        seen.add((score.case, score.class_id))
        if score.present and any(math.isnan(value) for value in (score.dsc, score.iou, score.nsd)):
            raise InputError(
                f"Expected DSC, IoU and NSD of {score.class_name!r}, which the truth of {score.case!r} has, got none; "
                "score the case again."
            )
    pairs = sorted({(score.class_id, score.class_name) for score in scores})
    if not len(pairs) == len({number for number, _ in pairs}) == len({name for _, name in pairs}):
        raise InputError(
            f"Expected one name per class id, got {pairs}; summarise only scores made with the same vocabulary."
        )


def _check_same_cases(first: Sequence[ClassScore], second: Sequence[ClassScore]) -> None:
    """Refuse runs of which one has scores that the other lacks, or that lie on other masks of the truth."""
    keys = [{(score.case, score.class_name): score for score in run} for run in (first, second)]
    alone = sorted(set(keys[0]) ^ set(keys[1]))
    if alone or not keys[0]:
        named = ", ".join(f"{name} in {case}" for case, name in alone[:5]) or "no case at all"
        more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
        raise InputError(
            f"Expected two runs over the same cases and classes, got {named}{more} in one run only; "
            "score both on the same data, or compare the common cases."
        )
    for (case, name), score in keys[0].items():
        other = keys[1][case, name]
        if (score.truth_voxels, score.slices) != (other.truth_voxels, other.slices):
            raise InputError(
                f"Expected one truth in both runs, got {score.truth_voxels} and {other.truth_voxels} voxels of {name} "
                f"in {case}; score both against the same files."
            )
        if (score.unit, score.tolerance) != (other.unit, other.tolerance):
            raise ConfigError(
                f"Expected one unit and tolerance in both runs, got {score.tolerance:g} {score.unit} and "
                f"{other.tolerance:g} {other.unit}; score both alike."
            )
