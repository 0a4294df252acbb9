"""Evaluation results as a text table, as CSV (one row per case and class) and as JSON (the averages).

A score that does not exist, because the truth of a case lacks the class, is a dash in the table, an empty cell in CSV
and null in JSON. A table or JSON file holds one summary, thus one protocol.
"""

import csv
import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, Final

from scripts.errors import InputError, OutputError
from scripts.metrics.scores import ClassScore, ClassSummary, Summary

_PROTOCOL_TEXT: Final = {
    "all": "every class was asked for on every slice, so what is predicted on slices without it counts as an error",
    "oracle": "a class was asked for only on the slices whose truth contains it, so false positives on the other "
    "slices cannot occur",
}
_UNIT_TEXT: Final = {
    "mm": "NSD over each volume in 3D",
    "px": "NSD per slice in 2D, averaged over the slices whose truth or prediction contains the class",
}
_COLUMNS: Final = tuple(field.name for field in fields(ClassScore))
_MISSING: Final = "-"


def render_table(summary: Summary) -> str:
    """Show the averages as an aligned plain-text table.

    Args:
        summary: Averages of one evaluation.

    Returns:
        A caption that names the protocol and the averaging, then a head, one line per class and one with the mean of
        the classes. Scores are between 0 and 1, the last column is in percent.
    """
    head = ["class", "DSC", f"NSD @ {summary.tolerance:g} {summary.unit}", "cases", "cases without", "FP slices %"]
    mean = ["mean", _score_text(summary.dsc), _score_text(summary.nsd), "", "", ""]
    rows = [head, *(_class_row(entry) for entry in summary.classes), mean]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [_align(row, widths) for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([_caption(summary), "", lines[0], rule, *lines[1:-1], rule, lines[-1]]) + "\n"


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


def write_summary_json(summary: Summary, path: Path, *, seconds: float | None = None) -> None:
    """Write the averages for other programs.

    Args:
        summary: Averages of one evaluation.
        path: File to write; its folder is made where it is missing.
        seconds: How long the evaluation took, where it was measured.

    Raises:
        OutputError: The folder or the file cannot be written.
    """
    content = {
        "protocol": summary.protocol,
        "unit": summary.unit,
        "tolerance": summary.tolerance,
        "mean": {"dsc": _null(summary.dsc), "nsd": _null(summary.nsd)},
        "classes": {entry.class_name: _class_json(entry) for entry in summary.classes},
        "seconds": seconds,
    }
    _write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def _caption(summary: Summary) -> str:
    """State what the numbers below mean."""
    count = sum(1 for entry in summary.classes if entry.cases)
    lines = (
        f'Protocol "{summary.protocol}": {_PROTOCOL_TEXT[summary.protocol]}.',
        f"DSC over all slices of a case pooled; {_UNIT_TEXT[summary.unit]}.",
        "Classes: mean over the cases whose truth contains the class. "
        f"Mean: unweighted over the {count} of {len(summary.classes)} classes that occur.",
        "FP slices: share of the slices without the class on which more than 0.1 % of the pixels are predicted.",
    )
    return "\n".join(textwrap.fill(line, width=100, subsequent_indent="  ") for line in lines)


def _class_row(entry: ClassSummary) -> list[str]:
    """The cells of one class."""
    rate = entry.false_positive_rate
    return [
        entry.class_name,
        _score_text(entry.dsc),
        _score_text(entry.nsd),
        str(entry.cases),
        str(entry.cases_without),
        _MISSING if math.isnan(rate) else f"{100 * rate:.1f}",
    ]


def _score_text(value: float) -> str:
    """A score with four decimals."""
    return _MISSING if math.isnan(value) else f"{value:.4f}"


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right, two blanks between columns."""
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _class_json(entry: ClassSummary) -> dict[str, int | float | None]:
    """One class's entry in the JSON file."""
    return {
        "id": entry.class_id,
        "dsc": _null(entry.dsc),
        "nsd": _null(entry.nsd),
        "cases": entry.cases,
        "cases_without": entry.cases_without,
        "absent_slices": entry.absent_slices,
        "false_positive_slices": entry.false_positive_slices,
        "false_positive_rate": _null(entry.false_positive_rate),
    }


def _null(value: float) -> float | None:
    """NaN, which JSON does not know, as None."""
    return None if math.isnan(value) else value


def _cell(value: str | float) -> str | float:
    """NaN as an empty cell."""
    return "" if isinstance(value, float) and math.isnan(value) else value


def _parse_row(row: Sequence[str], where: str) -> ClassScore:
    """Turn the cells of one row into a score."""
    if len(row) != len(_COLUMNS):
        raise InputError(f"Expected {len(_COLUMNS)} cells in {where}, got {len(row)}; write the file again.")
    values: dict[str, Any] = {}
    for column, cell in zip(_COLUMNS, row, strict=True):
        try:
            values[column] = _PARSERS.get(column, int)(cell)
        except ValueError as error:
            raise InputError(
                f"Expected a number as {column} in {where}, got {cell!r}; write the file again."
            ) from error
    return ClassScore(**values)


def _parse_score(cell: str) -> float:
    """A number, or NaN of an empty cell."""
    return float(cell) if cell else math.nan


_PARSERS: Final[dict[str, Callable[[str], Any]]] = {
    "case": str,
    "class_name": str,
    "dsc": _parse_score,
    "nsd": _parse_score,
    "tolerance": float,
    "unit": str,
}
"""How a cell is read, by its column; columns not named hold counts."""


def _write_text(text: str, path: Path) -> None:
    """Write a file under a temporary name in its folder and move it into place, so that it is never half there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"Expected a place to write {path}, got: {error}; choose a folder you may write to."
        ) from error
