"""The text table, CSV and JSON of an evaluation."""

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from scripts.errors import InputError, OutputError
from scripts.metrics.scores import ClassScore, ClassSummary, Summary
from scripts.report.tables import read_scores_csv, render_table, write_scores_csv, write_summary_json

SUMMARY = Summary(
    protocol="all",
    unit="mm",
    tolerance=2.0,
    dsc=0.70125,
    nsd=0.5,
    classes=(
        ClassSummary(1, "liver", 0.91234, 0.6, 12, 3, 40, 3),
        ClassSummary(4, "left kidney", 0.49016, 0.4, 8, 7, 0, 0),
        ClassSummary(6, "polyp", math.nan, math.nan, 0, 15, 15, 15),
    ),
)
SCORES = [
    ClassScore("a", 1, "liver", 1 / 3, 0.1 + 0.2, 2.0, "mm", 123_456_789, 5, 10, 4, 1),
    ClassScore('odd, "quoted"\r\nname ü', 4, "left kidney", math.nan, math.nan, 2.5, "px", 0, 0, 1, 1, 0),
    ClassScore("a", 4, "left kidney", 0.0, 5e-324, 1e-9, "mm", 1, 0, 10, 9, 0),
]


def comparable(score: ClassScore) -> tuple[object, ...]:
    """The fields, with None for NaN, which equals nothing."""
    return tuple(None if isinstance(value, float) and math.isnan(value) else value for value in astuple(score))


def test_table_rows() -> None:
    lines = render_table(SUMMARY).split("\n\n")[1].splitlines()
    assert lines == [
        "class           DSC  NSD @ 2 mm  cases  cases without  FP slices %",
        "------------------------------------------------------------------",
        "liver        0.9123      0.6000     12              3          7.5",
        "left kidney  0.4902      0.4000      8              7            -",
        "polyp             -           -      0             15        100.0",
        "------------------------------------------------------------------",
        "mean         0.7013      0.5000",
    ]


@pytest.mark.parametrize(("unit", "tolerance", "head"), [("px", 2.0, "NSD @ 2 px"), ("mm", 1.5, "NSD @ 1.5 mm")])
def test_table_head_names_tolerance_and_unit(unit: str, tolerance: float, head: str) -> None:
    table = render_table(replace(SUMMARY, unit=unit, tolerance=tolerance))
    assert head in table
    assert ("per slice in 2D" in table) == (unit == "px")
    assert ("in 3D" in table) == (unit == "mm")


def test_caption_states_protocol_and_averaging() -> None:
    caption = " ".join(render_table(SUMMARY).split("\n\n")[0].split())
    assert caption.startswith('Protocol "all": every class was asked for on every slice')
    assert "mean over the cases whose truth contains the class" in caption
    assert "unweighted over the 2 of 3 classes that occur" in caption
    other = " ".join(render_table(replace(SUMMARY, protocol="oracle")).split())
    assert other.startswith('Protocol "oracle": a class was asked for only on the slices whose truth contains it')


def test_table_of_nothing_but_missing_scores() -> None:
    empty = replace(SUMMARY, dsc=math.nan, nsd=math.nan, classes=SUMMARY.classes[2:])
    assert render_table(empty).splitlines()[-1].split() == ["mean", "-", "-"]


def test_table_has_no_overlong_or_padded_lines() -> None:
    table = render_table(SUMMARY)
    assert table.endswith("\n")
    assert all(len(line) <= 100 and line == line.rstrip() for line in table.splitlines())


def test_scores_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_scores_csv(SCORES, path)
    assert [comparable(score) for score in read_scores_csv(path)] == [comparable(score) for score in SCORES]
    assert all(isinstance(score.truth_voxels, int) for score in read_scores_csv(path))
    assert os.listdir(tmp_path) == ["scores.csv"]


def test_csv_has_a_row_per_case_and_class_and_empty_cells_for_missing_scores(tmp_path: Path) -> None:
    write_scores_csv(SCORES, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class_name"]) for row in rows] == [(score.case, score.class_name) for score in SCORES]
    assert [row["dsc"] for row in rows] == ["0.3333333333333333", "", "0.0"]
    assert [row["nsd"] for row in rows] == ["0.30000000000000004", "", "5e-324"]
    assert (tmp_path / "scores.csv").read_bytes().splitlines(keepends=True)[0].endswith(b"false_positive_slices\n")


def test_csv_without_scores(tmp_path: Path) -> None:
    write_scores_csv([], tmp_path / "scores.csv")
    assert read_scores_csv(tmp_path / "scores.csv") == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: b"", "got none"),
        (lambda text: text.replace(b"class_name", b"name"), "Expected the columns case, class_id"),
        (lambda text: text.replace(b"a,1,liver,", b"a,1,liver,high"), "number as dsc in row 2 of"),
        (lambda text: text.replace(b"a,1,", b"a,1.5,"), "number as class_id in row 2 of"),
        (lambda text: text.replace(b",2.0,", b",,"), "number as tolerance in row 2 of"),
        (lambda text: text + b"a,1\n", "12 cells in row 5 of"),
        (lambda text: text + b"\xff\n", "Expected a CSV file of scores"),
        (lambda text: text + b'"a', "Expected a CSV file of scores"),
    ],
)
def test_spoilt_csv(tmp_path: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "scores.csv"
    write_scores_csv(SCORES, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_scores_csv(path)


def test_csv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.csv"):
        read_scores_csv(tmp_path / "absent.csv")


def test_summary_json(tmp_path: Path) -> None:
    write_summary_json(SUMMARY, tmp_path / "deep" / "summary.json", seconds=12.5)
    text = (tmp_path / "deep" / "summary.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text) == {
        "protocol": "all",
        "unit": "mm",
        "tolerance": 2.0,
        "mean": {"dsc": 0.70125, "nsd": 0.5},
        "classes": {
            "liver": {
                "id": 1,
                "dsc": 0.91234,
                "nsd": 0.6,
                "cases": 12,
                "cases_without": 3,
                "absent_slices": 40,
                "false_positive_slices": 3,
                "false_positive_rate": 0.075,
            },
            "left kidney": {
                "id": 4,
                "dsc": 0.49016,
                "nsd": 0.4,
                "cases": 8,
                "cases_without": 7,
                "absent_slices": 0,
                "false_positive_slices": 0,
                "false_positive_rate": None,
            },
            "polyp": {
                "id": 6,
                "dsc": None,
                "nsd": None,
                "cases": 0,
                "cases_without": 15,
                "absent_slices": 15,
                "false_positive_slices": 15,
                "false_positive_rate": 1.0,
            },
        },
        "seconds": 12.5,
    }


def test_summary_json_without_means_or_time(tmp_path: Path) -> None:
    write_summary_json(replace(SUMMARY, dsc=math.nan, nsd=math.nan), tmp_path / "summary.json")
    content = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert content["mean"] == {"dsc": None, "nsd": None}
    assert content["seconds"] is None


WRITERS = [
    pytest.param(lambda path: write_scores_csv(SCORES, path), id="csv"),
    pytest.param(lambda path: write_summary_json(SUMMARY, path), id="json"),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_in_place_of_the_folder(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="choose a folder you may write to"):
        write(tmp_path / "file" / "result")


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_that_may_not_be_written(tmp_path: Path, write: Callable[[Path], None]) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere, as the superuser does")
        with pytest.raises(OutputError, match="choose a folder you may write to"):
            write(tmp_path / "result")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("write", WRITERS)
def test_a_failure_leaves_no_temporary_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "result").mkdir()  # a folder has the name of the file
    with pytest.raises(OutputError, match="result"):
        write(tmp_path / "result")
    assert os.listdir(tmp_path) == ["result"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_failure_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    (tmp_path / "result").write_text("old", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("scripts.report.tables.os.replace", full)
    with pytest.raises(OutputError, match="no space left"):
        write(tmp_path / "result")
    assert (tmp_path / "result").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["result"]
