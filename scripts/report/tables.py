"""Evaluation results as a text table, as CSV (one row per case and class) and as JSON (the averages).

A score that does not exist, because the truth of a case lacks the class, is a dash in the table, an empty cell in CSV
and null in JSON; an infinite distance is `inf` in CSV and takes part in no average. A table holds one summary, thus one
protocol and one unit; a JSON file holds one protocol.
"""

import csv
import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, Final

from scripts.errors import ConfigError, InputError, OutputError
from scripts.files import atomic_path
from scripts.metrics.pooling import BATCH_POOLED, BatchPooled
from scripts.metrics.scores import ClassScore
from scripts.metrics.statistics import FEWEST_PATIENTS, LEVEL, RESAMPLES, Interval
from scripts.metrics.summaries import AVERAGINGS, SWAPPED, ClassSummary, RunComparison, Summary

_PROTOCOL_TEXT: Final = {
    "all": "every class was asked for on every slice, so what is predicted on slices without it counts as an error",
    "oracle": "a class was asked for only on the slices whose truth contains it, so false positives on the other "
    "slices cannot occur",
}
_AVERAGING_TEXT: Final = {
    "case": "DSC over all slices of a case pooled, averaged over the cases whose truth contains the class",
    "slice": "DSC of each slice, averaged over all slices whose truth contains the class",
    "dataset": "DSC over the voxels of all cases together whose truth contains the class",
}
_DSC_MEANS: Final = {"case": "dsc", "slice": "dsc_per_slice", "dataset": "dsc_per_dataset"}
_UNIT_TEXT: Final = {
    "mm": "NSD, HD95 and ASSD over each volume in 3D, averaged over the cases with the class",
    "px": "NSD, HD95 and ASSD per slice in 2D, NSD averaged over the slices whose truth or prediction contains the "
    "class, distances over those where both do, then over the cases with the class",
}
_SCORE_NAMES: Final = {
    "dsc": "DSC",
    "nsd": "NSD",
    "nsd_challenge": "NSD of the challenge",
    SWAPPED: "Swapped sides, share of the predicted voxels",
}
_WITH_TOLERANCE: Final = ("nsd", "nsd_challenge")
_COLUMNS: Final = tuple("class" if field.name == "class_name" else field.name for field in fields(ClassScore))
_MISSING: Final = "-"
_PER_CENT: Final = 100


def render_table(summary: Summary, *, averaging: str = "case") -> str:
    """Show the averages as aligned plain-text tables: the scores, then the counts of cases and slices.

    Args:
        summary: Averages of one evaluation.
        averaging: How the DSC is averaged, "case", "slice" or "dataset", all else being per case; or "batch-pooled", as
            then the IoU is too.

    Returns:
        A caption that names the protocol and the averaging, then both tables, each with one line per class. Scores are
        between 0 and 1, distances in the summary's unit, shares in percent.

    Raises:
        ConfigError: There is no such averaging.
    """
    check_averaging(averaging)
    counts = [_count_head(summary), *(_count_row(entry, summary) for entry in summary.classes)]
    tables = [_caption(summary, averaging), _rendered(_score_rows(summary, averaging), footer=1), _rendered(counts)]
    return "\n\n".join(tables) + "\n"


def check_averaging(averaging: str) -> None:
    """Refuse a way to average that there is not.

    Raises:
        ConfigError: There is no such averaging.
    """
    if averaging not in AVERAGINGS:
        raise ConfigError(f"Expected averaging to be one of {', '.join(AVERAGINGS)}, got {averaging!r}; correct it.")


def render_tables(summaries: Sequence[Summary], *, averaging: str = "case") -> str:
    """Show one table after the other, volumes (mm) and planar cases (px) apart; see ``render_table``."""
    return "\n".join(render_table(summary, averaging=averaging) for summary in summaries)


def render_comparison(comparisons: Sequence[RunComparison], *, names: Sequence[str], protocol: str) -> str:
    """Show two runs side by side as plain-text tables, one per score and unit.

    Args:
        comparisons: Of one pair of runs.
        names: What to call the first and the second run.
        protocol: How the classes were asked for in both runs.

    Returns:
        A caption that names the protocol and the averaging, and for each class and the mean of the classes: both runs'
        means, the second less the first with its interval, the p-value and the verdict on the second.
    """
    lines = [
        f'Protocol "{protocol}": {_PROTOCOL_TEXT[protocol]}.',
        f"Averaging per case: {_AVERAGING_TEXT['case']}, NSD over the same cases. Mean: unweighted over the classes "
        "that occur.",
        f"Second run ({names[1]}) less first ({names[0]}), case by case; interval: {_interval_text()}; p: Wilcoxon's "
        "signed-rank test over patients, two-sided; verdict on the second run by whether the interval excludes zero, "
        f"from {FEWEST_PATIENTS} patients on.",
    ]
    if any(entry.score == SWAPPED for entry in comparisons):
        lines.append(
            "Swapped sides: share of the predicted voxels that lie in the truth of the other side, over the cases in "
            "which both runs have predicted the class; the lower the better."
        )
    caption = "\n".join(textwrap.fill(line, width=100, subsequent_indent="  ") for line in lines)
    return "\n\n".join([caption, *(_comparison_table(entry) for entry in comparisons)]) + "\n"


def write_scores_csv(scores: Sequence[ClassScore], path: Path) -> None:
    """Write one row per case and class.

    Numbers keep full precision, so that ``read_scores_csv`` gives back the very same scores.

    Args:
        scores: Scores in the order wanted.
        path: File to write; its folder is made where it is missing.

    Raises:
        OutputError: The folder or the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([_cell(value) for value in astuple(score)] for score in scores)
    _write_text(text.getvalue(), path)


def read_scores_csv(path: Path) -> list[ClassScore]:
    """Read what ``write_scores_csv`` wrote.

    Args:
        path: File to read.

    Returns:
        The scores in the order of the rows, with NaN for empty cells.

    Raises:
        InputError: The file cannot be read, has other columns, or a cell does not hold what its column should.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Expected a CSV file of scores at {path}, got: {error}; write it again.") from error
    if not rows or tuple(rows[0]) != _COLUMNS:
        raise InputError(
            f"Expected the columns {', '.join(_COLUMNS)} in {path}, got {', '.join(rows[0]) if rows else 'none'}; "
            "read a file written by this version."
        )
    return [_parse_row(row, f"row {number} of {path}") for number, row in enumerate(rows[1:], start=2)]


def write_summary_json(summaries: Sequence[Summary], path: Path) -> None:
    """Write the averages of one evaluation for other programs.

    Args:
        summaries: One per unit; all of one protocol.
        path: File to write; its folder is made where it is missing.

    Raises:
        OutputError: The folder or the file cannot be written.
    """
    content = {
        "protocol": summaries[0].protocol,
        "averaging": {
            **{name: _AVERAGING_TEXT[averaging] for averaging, name in _DSC_MEANS.items()},
            BATCH_POOLED: _pooled_text(summaries[0].pooled_batch),
            "others": "per case, as dsc",
            "mean": "unweighted over the classes that a truth contains",
        },
        "intervals": {"text": _interval_text(), "level": LEVEL, "resamples": RESAMPLES},
        "units": {summary.unit: _summary_json(summary) for summary in summaries},
    }
    write_json(content, path)


def comparison_json(comparisons: Sequence[RunComparison], *, runs: Sequence[Path], protocol: str) -> dict[str, Any]:
    """Two runs compared, for other programs; see ``write_json``.

    Args:
        comparisons: Of one pair of runs.
        runs: Folders of the first and the second run.
        protocol: How the classes were asked for in both runs.
    """
    return {
        "first": str(runs[0]),
        "second": str(runs[1]),
        "protocol": protocol,
        "averaging": _AVERAGING_TEXT["case"],
        "intervals": {"text": _interval_text(), "level": LEVEL, "resamples": RESAMPLES},
        "scores": [
            {
                "score": entry.score,
                "unit": entry.unit,
                "tolerance": entry.tolerance,
                "classes": dict(zip(entry.class_names, _comparisons_json(entry), strict=False)),
                "mean": _comparisons_json(entry)[-1],
            }
            for entry in comparisons
        ],
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file of two blanks' indentation whole or not at all.

    Args:
        content: Without NaN and infinity, which JSON does not know.
        path: File to write; its folder is made where it is missing.

    Raises:
        OutputError: The folder or the file cannot be written.
    """
    _write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


# ---------------------------------------------------------------------------------------------------------- the tables


def _caption(summary: Summary, averaging: str) -> str:
    """State what the numbers below mean."""
    count = sum(1 for entry in summary.classes if entry.cases)
    lines = [
        f'Protocol "{summary.protocol}": {_PROTOCOL_TEXT[summary.protocol]}.',
        f"Averaging {_averaging_text(summary, averaging)}; {_UNIT_TEXT[summary.unit]}.",
        f"Mean: unweighted over the {count} of {len(summary.classes)} classes that occur. Intervals: "
        f"{_interval_text()}; {summary.patients} patients, {summary.cases} cases.",
        "without: cases that lack the class, counted and not averaged. missed: cases with the class and no prediction. "
        "inf: cases with the class and infinite distances, which no mean has. FP cases: cases without the class that "
        "have a false-positive slice.",
        "FP %: share of the slices without the class on which more than 0.1 % of the pixels are predicted; near: of "
        "those next to a slice with the class; far: of the others. FN %: share of the slices with the class on which "
        "nothing is predicted.",
    ]
    if _has_sides(summary):
        lines.append("swapped %: share of the predicted voxels that lie in the truth of the other side, mean of cases.")
    return "\n".join(textwrap.fill(line, width=100, subsequent_indent="  ") for line in lines)


def _averaging_text(summary: Summary, averaging: str) -> str:
    """Say how DSC and IoU are averaged."""
    if averaging == BATCH_POOLED:
        return f"{BATCH_POOLED}: {_pooled_text(summary.pooled_batch)}"
    return (
        f"per {'data set' if averaging == 'dataset' else averaging}: {_AVERAGING_TEXT[averaging]}; IoU over all slices "
        "of a case pooled, averaged over the cases with the class"
    )


def _pooled_text(batch: int) -> str:
    """Say what is batch-pooled, and why it is no mean per case."""
    return (
        f"DSC and IoU over all voxels of a batch as one mask (batch of {batch}: so many cases in the order of their "
        "names, those without the class too), averaged over the batches weighted by their size; both depend on the "
        "batch and are no means per case"
    )


def _interval_text() -> str:
    return f"{LEVEL * _PER_CENT:g} % of {RESAMPLES} bootstrap samples that draw patients"


def _score_rows(summary: Summary, averaging: str) -> list[list[str]]:
    """Head, classes and mean of the table of scores."""
    unit = summary.unit
    head = ["class", "DSC", f"NSD @ {summary.tolerance:g} {unit}", "DSC 95 %", "NSD 95 %", "NSD challenge", "IoU"]
    head += [f"HD95 {unit}", f"ASSD {unit}"]
    named: list[tuple[str, ClassSummary | Summary]] = [(entry.class_name, entry) for entry in summary.classes]
    named.append(("mean", summary))
    return [head, *(_score_row(name, entry, averaging) for name, entry in named)]


def _score_row(name: str, entry: ClassSummary | Summary, averaging: str) -> list[str]:
    """The scores of one class or of their mean, in the order of the head."""
    means = entry.means
    if averaging == BATCH_POOLED:
        dsc, interval, iou = entry.batch_pooled.dsc, _MISSING, entry.batch_pooled.iou
    else:
        of_dsc = means[_DSC_MEANS[averaging]]
        dsc, interval, iou = of_dsc.mean, _range_text(of_dsc), means["iou"].mean
    return [
        name,
        _score_text(dsc),
        _score_text(means["nsd"].mean),
        interval,
        _range_text(means["nsd"]),
        _score_text(means["nsd_challenge"].mean),
        _score_text(iou),
        _number_text(means["hd95"].mean),
        _number_text(means["assd"].mean),
    ]


def _count_head(summary: Summary) -> list[str]:
    head = ["class", "cases", "without", "missed", "inf", "FP cases", "FP %", "near FP %", "far FP %", "FN %"]
    return head + ["volume ml"] * (summary.unit == "mm") + ["swapped %"] * _has_sides(summary)


def _count_row(entry: ClassSummary, summary: Summary) -> list[str]:
    """The counts of one class, in the order of the head."""
    counts = [entry.cases, entry.cases_without, entry.false_negative_cases, entry.infinite_distances]
    counts.append(entry.false_positive_cases)
    rates = [
        entry.false_positive_rate,
        entry.adjacent_false_positive_rate,
        entry.isolated_false_positive_rate,
        entry.false_negative_rate,
    ]
    row = [entry.class_name, *map(str, counts), *map(_per_cent_text, rates)]
    row += [_number_text(entry.means["volume_error_ml"].mean)] * (summary.unit == "mm")
    return row + [_per_cent_text(entry.swapped_share)] * _has_sides(summary)


def _has_sides(summary: Summary) -> bool:
    """Whether a class has a lateral partner, so that sides can be swapped."""
    return any(entry.has_partner for entry in summary.classes)


def _comparison_table(entry: RunComparison) -> str:
    """One score of two runs."""
    place = f" @ {entry.tolerance:g} {entry.unit}" if entry.score in _WITH_TOLERANCE else ""
    title = f"{_SCORE_NAMES[entry.score]}{place}, {'volumes' if entry.unit == 'mm' else 'planar cases'}"
    head = ["class", "first", "second", "difference", "95 %", "p", "cases", "verdict"]
    rows = [
        [
            name,
            _score_text(first),
            _score_text(second),
            _signed_text(found.difference.mean),
            _range_text(found.difference, signed=True),
            _MISSING if math.isnan(found.p_value) else f"{found.p_value:.4f}",
            str(found.difference.cases),
            verdict,
        ]
        for name, first, second, found, verdict in zip(
            (*entry.class_names, "mean"), entry.first, entry.second, entry.comparisons, entry.verdicts, strict=True
        )
    ]
    return f"{title}\n\n{_rendered([head, *rows], footer=1)}"


def _rendered(rows: Sequence[Sequence[str]], *, footer: int = 0) -> str:
    """Align a head and its rows, with a rule below the head and above the last rows."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_align(row, widths) for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    last = len(lines) - footer
    return "\n".join([lines[0], rule, *lines[1:last], *([rule, *lines[last:]] if footer else [])])


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right, two blanks between columns."""
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _score_text(value: float) -> str:
    """A score with four decimals."""
    return _MISSING if math.isnan(value) else f"{value:.4f}"


def _signed_text(value: float) -> str:
    return _MISSING if math.isnan(value) else f"{value:+.4f}"


def _number_text(value: float) -> str:
    """A distance or a volume with two decimals."""
    return _MISSING if math.isnan(value) else f"{value:.2f}"


def _per_cent_text(share: float) -> str:
    return _MISSING if math.isnan(share) else f"{_PER_CENT * share:.1f}"


def _range_text(interval: Interval, *, signed: bool = False) -> str:
    """The ends of an interval; a dash where there are too few patients for one."""
    if math.isnan(interval.low):
        return _MISSING
    if signed:
        return f"{interval.low:+.4f} to {interval.high:+.4f}"
    return f"{interval.low:.3f} to {interval.high:.3f}"


# ------------------------------------------------------------------------------------------------------------ the JSON


def _summary_json(summary: Summary) -> dict[str, Any]:
    """One unit's entry in the JSON file."""
    return {
        "tolerance": summary.tolerance,
        "cases": summary.cases,
        "patients": summary.patients,
        "pooled_batch": summary.pooled_batch,
        "mean": {**_means_json(summary.means), BATCH_POOLED: _pooled_json(summary.batch_pooled)},
        "classes": {entry.class_name: _class_json(entry) for entry in summary.classes},
    }


def _means_json(means: dict[str, Interval]) -> dict[str, Any]:
    """Each mean by its name, and all intervals."""
    return {
        **{name: _null(interval.mean) for name, interval in means.items()},
        "intervals": {name: [_null(interval.low), _null(interval.high)] for name, interval in means.items()},
    }


def _pooled_json(pooled: BatchPooled) -> dict[str, float | None]:
    """What is batch-pooled, which has no interval."""
    return {"dsc": _null(pooled.dsc), "iou": _null(pooled.iou)}


def _class_json(entry: ClassSummary) -> dict[str, Any]:
    """One class's entry in the JSON file."""
    return {
        "id": entry.class_id,
        **_means_json(entry.means),
        BATCH_POOLED: _pooled_json(entry.batch_pooled),
        "cases": entry.cases,
        "cases_without": entry.cases_without,
        "patients": entry.means["dsc"].patients,
        "false_negative_cases": entry.false_negative_cases,
        "infinite_distances": entry.infinite_distances,
        "false_positive_cases": entry.false_positive_cases,
        "slices": entry.slices,
        "absent_slices": entry.absent_slices,
        "false_positive_slices": entry.false_positive_slices,
        "false_positive_rate": _null(entry.false_positive_rate),
        "adjacent_absent_slices": entry.adjacent_absent_slices,
        "adjacent_false_positive_slices": entry.adjacent_false_positive_slices,
        "adjacent_false_positive_rate": _null(entry.adjacent_false_positive_rate),
        "isolated_false_positive_slices": entry.false_positive_slices - entry.adjacent_false_positive_slices,
        "isolated_false_positive_rate": _null(entry.isolated_false_positive_rate),
        "false_negative_slices": entry.false_negative_slices,
        "false_negative_rate": _null(entry.false_negative_rate),
        "swapped_share": _null(entry.swapped_share),
        "swap_cases": entry.swap_cases if entry.has_partner else None,
    }


def _comparisons_json(entry: RunComparison) -> list[dict[str, Any]]:
    """The classes' and then the mean's entry in the JSON file."""
    return [
        {
            "first": _null(first),
            "second": _null(second),
            "difference": _null(found.difference.mean),
            "interval": [_null(found.difference.low), _null(found.difference.high)],
            "p_value": _null(found.p_value),
            "cases": found.difference.cases,
            "patients": found.difference.patients,
            "verdict": verdict,
        }
        for first, second, found, verdict in zip(
            entry.first, entry.second, entry.comparisons, entry.verdicts, strict=True
        )
    ]


def _null(value: float) -> float | None:
    """NaN, which JSON does not know, as None."""
    return None if math.isnan(value) else value


# ------------------------------------------------------------------------------------------------------------- the CSV


def _cell(value: str | float | None) -> str | float:
    """NaN and None as an empty cell."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _parse_row(row: Sequence[str], where: str) -> ClassScore:
    """Turn the cells of one row into a score."""
    if len(row) != len(_COLUMNS):
        raise InputError(f"Expected {len(_COLUMNS)} cells in {where}, got {len(row)}; write the file again.")
    values: list[Any] = []
    for column, cell in zip(_COLUMNS, row, strict=True):
        try:
            values.append(_PARSERS.get(column, int)(cell))
        except ValueError as error:
            raise InputError(
                f"Expected a number as {column} in {where}, got {cell!r}; write the file again."
            ) from error
    return ClassScore(*values)


def _parse_score(cell: str) -> float:
    """A number, or NaN of an empty cell."""
    return float(cell) if cell else math.nan


_PARSERS: Final[dict[str, Callable[[str], Any]]] = {
    "case": str,
    "class": str,
    "patient": str,
    "unit": str,
    "tolerance": float,
    "swapped_voxels": lambda cell: int(cell) if cell else None,
    **dict.fromkeys(
        ("dsc", "nsd", "nsd_challenge", "hd95", "assd", "volume_error_ml", "slice_dsc", "iou"),
        _parse_score,
    ),
}
"""How a cell is read, by its column; columns not named hold counts."""


def _write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all, and its folder where it is missing."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Expected a place to write {path}, got: {error}; choose a folder you may write to."
        ) from error
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
