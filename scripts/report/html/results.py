"""Tables of a run's averages with their intervals, and of the difference between two runs."""

import math
from dataclasses import dataclass

from scripts.errors import AutoMedSAMError
from scripts.metrics.scores import ClassScore
from scripts.metrics.statistics import FEWEST_PATIENTS, LEVEL, RESAMPLES, Interval
from scripts.metrics.summaries import SWAPPED, ClassSummary, RunComparison, Summary, compare_scores, summarise_units
from scripts.report.html.elements import MISSING, interval_text, number, paragraph, share_text, table
from scripts.report.html.runs import Run


@dataclass(frozen=True)
class Measure:
    """How a score is shown.

    Attributes:
        name: of the attribute of `ClassScore`, and of the mean.
        title: for people.
        digits: decimals.
        unit: of its values; an empty one is a share, `distance` is mm or px.
    """

    name: str
    title: str
    digits: int
    unit: str = ""


MEASURES = (
    Measure("dsc", "DSC", 4),
    Measure("nsd", "NSD", 4),
    Measure("nsd_challenge", "NSD, challenge", 4),
    Measure("hd95", "HD95", 2, "distance"),
    Measure("assd", "ASSD", 2, "distance"),
    Measure("volume_error_ml", "volume error", 2, "ml"),
    Measure("iou", "IoU", 4),
)
_TITLES = {measure.name: measure.title for measure in MEASURES} | {SWAPPED: "Swapped sides"}
_COMPARED = {
    SWAPPED: "share of the predicted voxels that lie in the truth of the other side, mean of the cases in which both "
    "runs have predicted the class, the lower the better"
}
_INTERVALS = f"{100 * LEVEL:g} % interval of {RESAMPLES} bootstrap samples that draw patients"
_PROTOCOLS = {
    "all": "every class was asked for on every slice",
    "oracle": "a class was asked for only on the slices whose truth has it, so that false positives on the others "
    "cannot occur; not comparable with the protocol all",
}


def measure_title(measure: Measure, unit: str) -> str:
    """Name a score with its unit."""
    named = unit if measure.unit == "distance" else measure.unit
    return f"{measure.title} ({named})" if named else measure.title


def score_tables(run: Run) -> str:
    """Show a run's means, and what was found where it is not, volumes (mm) and planar cases (px) apart.

    Args:
        run: one with scores.
    """
    summaries = summarise_units(run.scores, protocol=run.protocol)
    return "".join(_mean_table(summary) + _count_table(summary) for summary in summaries)


def comparison_tables(first: Run, second: Run) -> str:
    """Show the difference of two runs over the cases and classes that both have, second less first.

    Runs that cannot be compared, because they share nothing or differ in truth or tolerance, say so.
    """
    title = f"{second.name} less {first.name}"
    keys = [{(score.case, score.class_name) for score in run.scores} for run in (first, second)]
    common = keys[0] & keys[1]
    if not common:
        return paragraph(f"{title}: the runs share no case and class.")
    if first.protocol != second.protocol:
        return paragraph(f"{title}: not comparable, the protocols are {second.protocol} and {first.protocol}.")
    try:
        found = compare_scores(*([score for score in run.scores if _key(score) in common] for run in (first, second)))
    except AutoMedSAMError as error:
        return paragraph(f"{title}: not comparable. {error}")
    left = len(keys[0] | keys[1]) - len(common)
    note = f"; {left} pairs of case and class that only one run has are left out" if left else ""
    return "".join(_comparison_table(entry, title, note, protocol=first.protocol) for entry in found)


def _key(score: ClassScore) -> tuple[str, str]:
    return score.case, score.class_name


def _mean_table(summary: Summary) -> str:
    """Show each score's mean by class."""
    measures = [measure for measure in MEASURES if not math.isnan(summary.means[measure.name].mean)]
    named = [*((entry.class_name, entry.means) for entry in summary.classes), ("mean", summary.means)]
    rows = [[name, *(_cell(means[measure.name], measure) for measure in measures)] for name, means in named]
    head = ["class", *(measure_title(measure, summary.unit) for measure in measures)]
    infinite = sum(entry.infinite_distances for entry in summary.classes)
    space = "over volumes in 3D" if summary.unit == "mm" else "slice by slice in 2D"
    caption = (
        f"Protocol {summary.protocol}: {_PROTOCOLS[summary.protocol]}. Averaging per case: DSC over all slices of a "
        "case pooled, then the mean over the cases whose truth has the class; the last row is the unweighted mean of "
        f"the classes that occur. {summary.cases} cases of {summary.patients} patients. NSD at {summary.tolerance:g} "
        f"{summary.unit}, {space}. In brackets: {_INTERVALS}. Infinite distances, in no mean: {infinite}."
    )
    return table(caption, head, rows)


def _cell(interval: Interval, measure: Measure) -> str:
    return interval_text(interval, measure.digits, between="\n")


def _count_table(summary: Summary) -> str:
    """Show how often a class was found where it is not, missed where it is, and taken for the other side's."""
    sides = any(entry.has_partner for entry in summary.classes)
    head = ["class", "cases", "without", "missed", "FP cases", "FP %", "adjacent %", "isolated %", "FN %"]
    caption = (
        "Cases with the class, without it, with it but without any prediction (missed), and without it but with a "
        "false-positive slice (FP cases). FP %: share of the slices without the class on which more than 0.1 % of the "
        "pixels are predicted; adjacent: of those next to a slice with the class; isolated: of the others. FN %: share "
        "of the slices with the class on which nothing is predicted."
    )
    if sides:
        head.append("swapped %")
        caption += " Swapped %: share of the predicted voxels that lie in the truth of the other side, mean of cases."
    return table(caption, head, [_count_row(entry, sides=sides) for entry in summary.classes])


def _count_row(entry: ClassSummary, *, sides: bool) -> list[str]:
    rates = [
        entry.false_positive_rate,
        entry.adjacent_false_positive_rate,
        entry.isolated_false_positive_rate,
        entry.false_negative_rate,
    ]
    counts = [entry.cases, entry.cases_without, entry.false_negative_cases, entry.false_positive_cases]
    swapped = [share_text(entry.swapped_share)] if sides else []
    return [entry.class_name, *map(str, counts), *map(share_text, rates), *swapped]


def _comparison_table(entry: RunComparison, title: str, note: str, *, protocol: str) -> str:
    """Show one score of two runs."""
    head = ["class", "cases", "first", "second", "difference", "p", "verdict"]
    rows = [
        [
            name,
            str(found.difference.cases),
            number(first, 4),
            number(second, 4),
            interval_text(found.difference, 4, with_sign=True),
            _p_text(found.p_value),
            MISSING if math.isnan(found.difference.low) else verdict,
        ]
        for name, first, second, found, verdict in zip(
            (*entry.class_names, "mean"), entry.first, entry.second, entry.comparisons, entry.verdicts, strict=True
        )
    ]
    at = f" at {entry.tolerance:g} {entry.unit}" if entry.score in ("nsd", "nsd_challenge") else ""
    averaged = _COMPARED.get(entry.score, "averaged per case over the cases whose truth has the class")
    caption = (
        f"{_TITLES[entry.score]}{at}, {title}, paired by case{note}; protocol {protocol}; {averaged}, then unweighted "
        f"over the classes. In brackets: {_INTERVALS}; p: Wilcoxon's signed-rank test over patients, two-sided, not "
        "corrected for the number of tests; verdict on the second run by whether the interval leaves zero out, "
        f"from {FEWEST_PATIENTS} patients on."
    )
    return table(caption, head, rows)


def _p_text(value: float) -> str:
    if math.isnan(value):
        return MISSING
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"
