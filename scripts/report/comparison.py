"""Two runs' folders compared: a table for people, `comparison.json` for programs."""

import json
from collections.abc import Sequence
from pathlib import Path

from scripts.errors import ConfigError, InputError
from scripts.metrics.scores import ClassScore
from scripts.metrics.summaries import check_protocol, compare_scores
from scripts.report.tables import comparison_json, read_scores_csv, render_comparison, write_json

_CASES_NAMED = 5


def compare_folders(first: Path, second: Path, output: Path, *, common: bool = False) -> str:
    """Compare two runs of `evaluate` or `score` and write `comparison.json`.

    Args:
        first: folder with metrics.csv and summary.json.
        second: the same of the other run.
        output: where the file goes.
        common: leave out the cases and classes that one of the runs lacks; the text says which.

    Returns:
        The tables.

    Raises:
        InputError: a folder lacks a file, the runs do not cover the same cases and classes, or nothing common is left.
        ConfigError: the runs differ in protocol, unit or tolerance.
        OutputError: the file cannot be written.
    """
    protocols = [_read_protocol(folder) for folder in (first, second)]
    if protocols[0] != protocols[1]:
        raise ConfigError(
            f"expected runs of one protocol, got {protocols[0]!r} in {first} and {protocols[1]!r} in {second}; "
            "evaluate both with the same presence"
        )
    runs = [read_scores_csv(folder / "metrics.csv") for folder in (first, second)]
    note = ""
    if common:
        runs, note = _common(*runs)
    comparisons = compare_scores(*runs)
    content = comparison_json(comparisons, runs=(first, second), protocol=protocols[0])
    write_json(content, output / "comparison.json")
    return note + render_comparison(comparisons, names=(str(first), str(second)), protocol=protocols[0])


def _read_protocol(folder: Path) -> str:
    """How the classes of a run were asked for."""
    path = folder / "summary.json"
    try:
        protocol = json.loads(path.read_text(encoding="utf-8"))["protocol"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"expected {path} of a finished evaluation, got: {error!r}; give a folder that evaluate or score wrote"
        ) from error
    check_protocol(protocol)
    return str(protocol)


def _common(first: Sequence[ClassScore], second: Sequence[ClassScore]) -> tuple[list[list[ClassScore]], str]:
    """Keep what both runs have scored, and say what was left out."""
    keys = [{(score.case, score.class_name) for score in run} for run in (first, second)]
    both = keys[0] & keys[1]
    kept = [[score for score in run if (score.case, score.class_name) in both] for run in (first, second)]
    cases = sorted({case for case, _ in keys[0] ^ keys[1]})
    if not cases:
        return kept, ""
    named = ", ".join(cases[:_CASES_NAMED]) + (", ..." if len(cases) > _CASES_NAMED else "")
    return kept, f"Left out, as one run lacks them in part or whole: {len(cases)} cases ({named}).\n\n"
