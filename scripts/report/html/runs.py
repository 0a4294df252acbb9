"""What a finished run has left in its folder."""

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.errors import InputError
from scripts.metrics.scores import ClassScore
from scripts.metrics.summaries import PROTOCOLS
from scripts.report.tables import read_scores_csv

Values = npt.NDArray[np.float64]

_TABLES = ("metrics.csv", "losses.csv", "epochs.csv", "quality.csv")
_RECORDS = ("summary.json", "run.json", "uncertainty.json", "calibration.json")


@dataclass(frozen=True)
class Run:
    """One run's folder.

    Attributes:
        name: short, no other run of the report has it.
        folder: where the files lie.
        scores: rows of metrics.csv; none of a training run.
        protocol: of the scores, as summary.json says; empty where there are none.
        losses: columns of losses.csv; empty where there is none.
        epochs: columns of epochs.csv, likewise.
        quality: rows of quality.csv, likewise.
        record: content of run.json, likewise.
        uncertainty: content of uncertainty.json, likewise.
        calibration: content of calibration.json, likewise.
    """

    name: str
    folder: Path
    scores: Sequence[ClassScore] = ()
    protocol: str = ""
    losses: Mapping[str, Values] = field(default_factory=dict)
    epochs: Mapping[str, Values] = field(default_factory=dict)
    quality: Sequence[Mapping[str, str]] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    uncertainty: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The tables and records that the run has."""
        return [self.folder / name for name in (*_TABLES, *_RECORDS) if (self.folder / name).is_file()]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the file."""
        return list(dict.fromkeys(score.class_name for score in self.scores))

    @property
    def units(self) -> list[str]:
        """Units of the distances, in the order of the file."""
        return list(dict.fromkeys(score.unit for score in self.scores))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of evaluations, of scored masks and of trainings.

    Args:
        folders: at least one.

    Returns:
        A run for each, named after its folder, and by its path where two folders are called the same.

    Raises:
        InputError: no folder is given or one twice; a folder has neither metrics.csv nor losses.csv nor epochs.csv; a
            file is damaged or has other columns.
    """
    if not folders:
        raise InputError("expected the folder of at least one run, got none; give the --output of evaluate or score")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise InputError("expected each run once, got a folder twice; give every folder once")
    short = [folder.name for folder in resolved]
    return [
        _read_run(folder, name=name if short.count(name) == 1 else str(given))
        for given, folder, name in zip(folders, resolved, short, strict=True)
    ]


def _read_run(folder: Path, *, name: str) -> Run:
    if not folder.is_dir():
        raise InputError(f"expected the folder of a run, got {folder}, which is none; give the --output of that run")
    if not any((folder / known).is_file() for known in ("metrics.csv", "losses.csv", "epochs.csv")):
        raise InputError(
            f"expected {folder / 'metrics.csv'} of an evaluation, or losses.csv or epochs.csv of a training, got none "
            "of them; give the folder that evaluate, score or train wrote, after it has finished"
        )
    scores, protocol = _read_scores(folder)
    return Run(
        name=name,
        folder=folder,
        scores=scores,
        protocol=protocol,
        losses=_read_columns(folder / "losses.csv", counter="iteration"),
        epochs=_read_columns(folder / "epochs.csv", counter="epoch"),
        quality=_read_quality(folder / "quality.csv"),
        record=_read_json(folder / "run.json"),
        uncertainty=_read_json(folder / "uncertainty.json"),
        calibration=_read_json(folder / "calibration.json"),
    )


def _read_scores(folder: Path) -> tuple[list[ClassScore], str]:
    """Read metrics.csv, and from summary.json the protocol; nothing where neither is there.

    Raises:
        InputError: no row, a class of a case that comes twice, other columns, or a summary without a known protocol.
    """
    path, summary = folder / "metrics.csv", folder / "summary.json"
    if not path.is_file():
        return [], ""
    scores = read_scores_csv(path)
    if not scores:
        raise InputError(f"expected a row for each case and class in {path}, got none; evaluate or score again")
    twice = [key for key, count in Counter((score.case, score.class_name) for score in scores).items() if count > 1]
    if twice:
        case, name = twice[0]
        raise InputError(f"expected one row for {name!r} of {case!r} in {path}, got several; evaluate or score again")
    protocol = _read_json(summary).get("protocol")
    if protocol not in PROTOCOLS:
        raise InputError(
            f"expected {summary} to name one of the protocols {', '.join(PROTOCOLS)}, got {protocol!r}; evaluate or "
            "score again with this version"
        )
    return scores, protocol


def _read_columns(path: Path, *, counter: str) -> dict[str, Values]:
    """Read a table of numbers by its columns; empty cells are NaN, and without a file there are no columns."""
    if not path.is_file():
        return {}
    columns, rows = _read_csv(path)
    if rows and counter not in columns:
        raise InputError(f"expected a column {counter} in {path}, got {', '.join(columns)}; train again")
    return {
        name: np.array([_number(row[name], f"{name} in row {i} of {path}") for i, row in enumerate(rows, start=2)])
        for name in columns
    }


def _read_quality(path: Path) -> list[dict[str, str]]:
    """Read quality.csv; none where there is no file."""
    if not path.is_file():
        return []
    columns, rows = _read_csv(path)
    if columns[:3] != ["case", "class", "dsc"]:
        raise InputError(
            f"expected {path} to begin with the columns case, class, dsc, got {', '.join(columns) or 'none'}; evaluate "
            "again with this version"
        )
    return rows


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read head and rows.

    Raises:
        InputError: the file cannot be read, or a row has more or fewer cells than the head.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"expected a CSV file at {path}, got: {error}; write it again") from error
    head = rows[0] if rows else []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(head):
            raise InputError(f"expected {len(head)} cells in row {number} of {path}, got {len(row)}; write it again")
    return head, [dict(zip(head, row, strict=True)) for row in rows[1:]]


def _read_json(path: Path) -> dict[str, Any]:
    """Read an object; an empty one where there is no file.

    Raises:
        InputError: the file holds none.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"expected a JSON file at {path}, got: {error}; write it again") from error
    if not isinstance(content, dict):
        raise InputError(f"expected a JSON object in {path}, got a {type(content).__name__}; write it again")
    return content


def _number(cell: str, where: str) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError as error:
        raise InputError(f"expected a number as {where}, got {cell!r}; write the file again") from error
