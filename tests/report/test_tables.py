"""The text table, CSV and JSON of an evaluation."""

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from scripts.errors import ConfigError, InputError, OutputError
from scripts.metrics.pooling import BatchPooled
from scripts.metrics.scores import ClassScore
from scripts.metrics.statistics import Comparison, Interval
from scripts.metrics.summaries import SCORES, SWAPPED, ClassSummary, RunComparison, Summary
from scripts.report.tables import (
    comparison_json,
    read_scores_csv,
    render_comparison,
    render_table,
    render_tables,
    write_scores_csv,
    write_summary_json,
)


def means(dsc: float, nsd: float, **others: float) -> dict[str, Interval]:
    """Every mean, each with an interval of 0.1 around it."""
    values = dict.fromkeys((*SCORES, "dsc_per_slice", "dsc_per_dataset"), math.nan) | {"dsc": dsc, "nsd": nsd} | others
    return {name: Interval(value, value - 0.1, value + 0.1, 5, 4) for name, value in values.items()}


def counted(class_id: int, name: str, entry: dict[str, Interval], *counts: int, partner: bool = False) -> ClassSummary:
    swaps = (0.025, 8, True) if partner else (math.nan, 0, False)
    pooled = BatchPooled(dsc=entry["dsc"].mean / 2, iou=entry["dsc"].mean / 4)
    return ClassSummary(class_id, name, entry, *counts, *swaps, pooled)


SUMMARY = Summary(
    protocol="all",
    unit="mm",
    tolerance=2.0,
    means=means(0.70125, 0.5, hd95=4.0, dsc_per_slice=0.6, dsc_per_dataset=0.8, iou=0.45),
    classes=(
        counted(1, "liver", means(0.91234, 0.6, hd95=3.456, volume_error_ml=-12.0), 12, 3, 1, 2, 1, 99, 40, 3, 4, 1, 6),
        counted(4, "left kidney", means(0.49016, 0.4), 8, 7, 0, 0, 0, 80, 0, 0, 0, 0, 0, partner=True),
        counted(6, "polyp", means(math.nan, math.nan), 0, 15, 0, 0, 15, 15, 15, 15, 0, 0, 0),
    ),
    cases=15,
    patients=14,
    batch_pooled=BatchPooled(dsc=0.35, iou=0.175),
    pooled_batch=40,
)
_WHOLE = (123_456_789, 5, 10, 4, 1, 2, 1)
_MISSED = (*_WHOLE, 7, 3, 0.0, 1 / 7)
SCORES_OF_CASES = [
    ClassScore("a", "liver", 1 / 3, 0.1 + 0.2, 0.7, 2.5, 0.1, -3.25, "p", 1, 2.0, "mm", *_WHOLE, None, 0, 0.3, 0.2),
    ClassScore(
        'odd, "quoted"\r\nname ü',
        "left kidney",
        *[math.nan] * 6,
        "ü",
        4,
        2.5,
        "px",
        0,
        0,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
        *[math.nan] * 2,
    ),
    ClassScore("a", "left kidney", 0.0, 5e-324, 0.0, *[math.inf] * 2, 1e-9, "p", 4, 1e-9, "mm", *_MISSED),
]


def comparable(score: ClassScore) -> tuple[object, ...]:
    """The fields, with None for NaN, which equals nothing."""
    return tuple(None if isinstance(value, float) and math.isnan(value) else value for value in astuple(score))


def test_table_rows() -> None:
    _, scores, counts = render_table(SUMMARY).rstrip("\n").split("\n\n")
    assert scores.splitlines() == [
        "class           DSC  NSD @ 2 mm        DSC 95 %        NSD 95 %  NSD challenge     IoU  HD95 mm  ASSD mm",
        "-" * 104,
        "liver        0.9123      0.6000  0.812 to 1.012  0.500 to 0.700              -       -     3.46        -",
        "left kidney  0.4902      0.4000  0.390 to 0.590  0.300 to 0.500              -       -        -        -",
        "polyp             -           -               -               -              -       -        -        -",
        "-" * 104,
        "mean         0.7013      0.5000  0.601 to 0.801  0.400 to 0.600              -  0.4500     4.00        -",
    ]
    assert counts.splitlines() == [
        "class        cases  without  missed  inf  FP cases   FP %  near FP %  far FP %  FN %  volume ml  swapped %",
        "-" * 106,
        "liver           12        3       1    2         1    7.5       25.0       5.6  10.2     -12.00          -",
        "left kidney      8        7       0    0         0      -          -         -   0.0          -        2.5",
        "polyp            0       15       0    0        15  100.0          -     100.0     -          -          -",
    ]


@pytest.mark.parametrize(
    ("averaging", "mean", "caption"),
    [
        ("case", "0.7013", "Averaging per case: DSC over all slices of a case pooled"),
        ("slice", "0.6000", "Averaging per slice: DSC of each slice, averaged over all slices whose truth contains"),
        ("dataset", "0.8000", "Averaging per data set: DSC over the voxels of all cases together"),
    ],
)
def test_averaging_is_chosen_and_stated(averaging: str, mean: str, caption: str) -> None:
    table = render_table(SUMMARY, averaging=averaging)
    assert caption in " ".join(table.split())
    assert next(line for line in table.splitlines() if line.startswith("mean")).split()[1] == mean


def test_batch_pooled_scores_come_with_what_they_are() -> None:
    caption, table, _ = render_table(replace(SUMMARY, pooled_batch=7), averaging="batch-pooled").split("\n\n")
    caption = " ".join(caption.split())
    assert "Averaging batch-pooled: DSC and IoU over all voxels of a batch as one mask (batch of 7:" in caption
    assert "both depend on the batch and are no means per case; NSD, HD95 and ASSD over each volume in 3D" in caption
    assert "Averaging per" not in caption
    assert [" ".join(line.split()) for line in table.splitlines() if line[0] != "-"][1:] == [
        "liver 0.4562 0.6000 - 0.500 to 0.700 - 0.2281 3.46 -",
        "left kidney 0.2451 0.4000 - 0.300 to 0.500 - 0.1225 - -",
        "polyp - - - - - - - -",
        "mean 0.3500 0.5000 - 0.400 to 0.600 - 0.1750 4.00 -",
    ]


def test_iou_is_per_case_however_the_dice_is_averaged() -> None:
    for averaging in ("case", "slice", "dataset"):
        table = render_table(SUMMARY, averaging=averaging)
        assert "IoU over all slices of a case pooled, averaged over the cases with the class" in " ".join(table.split())
        assert next(line for line in table.splitlines() if line.startswith("mean")).split()[-3] == "0.4500"
        assert "batch" not in table


def test_an_unknown_averaging_is_refused() -> None:
    with pytest.raises(ConfigError, match="case, slice, dataset, batch-pooled, got 'patient'"):
        render_table(SUMMARY, averaging="patient")


def test_sides_are_in_the_table_only_where_there_are_some() -> None:
    assert "swapped" in render_table(SUMMARY)
    assert "swapped" not in render_table(replace(SUMMARY, classes=SUMMARY.classes[:1]))


def test_planar_cases_have_no_volume() -> None:
    assert "volume ml" not in render_table(replace(SUMMARY, unit="px"))


def test_units_have_a_table_each() -> None:
    tables = render_tables([SUMMARY, replace(SUMMARY, unit="px")])
    assert [tables.count(text) for text in ("NSD @ 2 mm", "NSD @ 2 px", "Protocol")] == [1, 1, 2]


@pytest.mark.parametrize(("unit", "tolerance", "head"), [("px", 2.0, "NSD @ 2 px"), ("mm", 1.5, "NSD @ 1.5 mm")])
def test_table_head_names_tolerance_and_unit(unit: str, tolerance: float, head: str) -> None:
    table = render_table(replace(SUMMARY, unit=unit, tolerance=tolerance))
    assert head in table
    assert ("per slice in 2D" in table) == (unit == "px")
    assert ("in 3D" in table) == (unit == "mm")


def test_caption_states_protocol_and_averaging() -> None:
    caption = " ".join(render_table(SUMMARY).split("\n\n")[0].split())
    assert caption.startswith('Protocol "all": every class was asked for on every slice')
    assert "averaged over the cases whose truth contains the class" in caption
    assert "95 % of 5000 bootstrap samples that draw patients; 14 patients, 15 cases" in caption
    assert "unweighted over the 2 of 3 classes that occur" in caption
    other = " ".join(render_table(replace(SUMMARY, protocol="oracle")).split())
    assert other.startswith('Protocol "oracle": a class was asked for only on the slices whose truth contains it')


def test_table_of_nothing_but_missing_scores() -> None:
    empty = replace(SUMMARY, means=means(math.nan, math.nan), classes=SUMMARY.classes[2:])
    assert "mean" + 8 * " -" in {" ".join(line.split()) for line in render_table(empty).splitlines()}


def test_table_has_no_overlong_or_padded_lines() -> None:
    table = render_table(SUMMARY)
    assert table.endswith("\n")
    assert all(len(line) <= 110 and line == line.rstrip() for line in table.splitlines())


def test_scores_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_scores_csv(SCORES_OF_CASES, path)
    assert [comparable(score) for score in read_scores_csv(path)] == [comparable(score) for score in SCORES_OF_CASES]
    assert all(isinstance(score.truth_voxels, int) for score in read_scores_csv(path))
    assert os.listdir(tmp_path) == ["scores.csv"]


def test_csv_has_a_row_per_case_and_class_and_empty_cells_for_missing_scores(tmp_path: Path) -> None:
    write_scores_csv(SCORES_OF_CASES, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [
        (score.case, score.class_name) for score in SCORES_OF_CASES
    ]
    assert [row["dsc"] for row in rows] == ["0.3333333333333333", "", "0.0"]
    assert [row["nsd"] for row in rows] == ["0.30000000000000004", "", "5e-324"]
    assert [row["hd95"] for row in rows] == ["2.5", "", "inf"]
    assert [row["swapped_voxels"] for row in rows] == ["", "0", "7"]
    head = (tmp_path / "scores.csv").read_bytes().splitlines(keepends=True)[0]
    assert head.startswith(
        b"case,class,dsc,nsd,nsd_challenge,hd95,assd,volume_error_ml,patient,class_id,tolerance,unit,"
    )
    assert head.endswith(b",swapped_voxels,false_negative_slices,slice_dsc,iou\n")
    assert [row["iou"] for row in rows] == ["0.2", "", "0.14285714285714285"]


def test_csv_without_scores(tmp_path: Path) -> None:
    write_scores_csv([], tmp_path / "scores.csv")
    assert read_scores_csv(tmp_path / "scores.csv") == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: b"", "got none"),
        (lambda text: text.replace(b"case,class,", b"case,name,"), "Expected the columns case, class, dsc"),
        (lambda text: text.replace(b"a,liver,", b"a,liver,high"), "number as dsc in row 2 of"),
        (lambda text: text.replace(b",p,1,", b",p,1.5,"), "number as class_id in row 2 of"),
        (lambda text: text.replace(b",2.0,mm", b",,mm"), "number as tolerance in row 2 of"),
        (lambda text: text + b"a,1\n", "23 cells in row 5 of"),
        (lambda text: text + b"\xff\n", "Expected a CSV file of scores"),
        (lambda text: text + b'"a', "Expected a CSV file of scores"),
    ],
)
def test_spoilt_csv(tmp_path: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "scores.csv"
    write_scores_csv(SCORES_OF_CASES, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_scores_csv(path)


def test_csv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.csv"):
        read_scores_csv(tmp_path / "absent.csv")


def test_summary_json(tmp_path: Path) -> None:
    write_summary_json([SUMMARY, replace(SUMMARY, unit="px", cases=7)], tmp_path / "deep" / "summary.json")
    text = (tmp_path / "deep" / "summary.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    content = json.loads(text)
    assert (content["protocol"], content["intervals"]["level"]) == ("all", 0.95)
    stated = {"dsc", "dsc_per_slice", "dsc_per_dataset", "batch-pooled", "others", "mean"}
    assert set(content["averaging"]) == stated
    assert "batch of 40" in content["averaging"]["batch-pooled"]
    assert "depend on the batch" in content["averaging"]["batch-pooled"]
    assert {unit: entry["cases"] for unit, entry in content["units"].items()} == {"mm": 15, "px": 7}
    volumes = content["units"]["mm"]
    assert (volumes["tolerance"], volumes["patients"]) == (2.0, 14)
    assert (volumes["mean"]["dsc"], volumes["mean"]["nsd"], volumes["mean"]["assd"]) == (0.70125, 0.5, None)
    assert (volumes["mean"]["iou"], volumes["mean"]["intervals"]["iou"]) == (0.45, [0.45 - 0.1, 0.45 + 0.1])
    assert (volumes["pooled_batch"], volumes["mean"]["batch-pooled"]) == (40, {"dsc": 0.35, "iou": 0.175})
    assert volumes["classes"]["polyp"]["batch-pooled"] == {"dsc": None, "iou": None}
    assert volumes["mean"]["intervals"]["nsd"] == [0.4, 0.6]
    assert volumes["mean"]["intervals"]["assd"] == [None, None]
    assert list(volumes["classes"]) == ["liver", "left kidney", "polyp"]
    liver = {name: value for name, value in volumes["classes"]["liver"].items() if name not in (*SCORES, "intervals")}
    assert liver == {
        "id": 1,
        "dsc_per_slice": None,
        "dsc_per_dataset": None,
        "batch-pooled": {"dsc": 0.91234 / 2, "iou": 0.91234 / 4},
        "cases": 12,
        "cases_without": 3,
        "patients": 4,
        "false_negative_cases": 1,
        "infinite_distances": 2,
        "false_positive_cases": 1,
        "slices": 99,
        "absent_slices": 40,
        "false_positive_slices": 3,
        "false_positive_rate": 0.075,
        "adjacent_absent_slices": 4,
        "adjacent_false_positive_slices": 1,
        "adjacent_false_positive_rate": 0.25,
        "isolated_false_positive_slices": 2,
        "isolated_false_positive_rate": 2 / 36,
        "false_negative_slices": 6,
        "false_negative_rate": 6 / 59,
        "swapped_share": None,
        "swap_cases": None,
    }
    kidney = volumes["classes"]["left kidney"]
    assert (kidney["swapped_share"], kidney["swap_cases"], kidney["false_positive_rate"]) == (0.025, 8, None)


def compared() -> RunComparison:
    first = Comparison(Interval(0.125, 0.0625, 0.25, 8, 7), 0.0123)
    unknown = Comparison(Interval(math.nan, math.nan, math.nan, 0, 0), math.nan)
    values = (0.5, math.nan, 0.5), (0.625, math.nan, 0.625)
    return RunComparison("nsd", "mm", 2.0, ("liver", "polyp"), *values, (first, unknown, first))


def test_comparison_table() -> None:
    text = render_comparison([compared()], names=("a", "b"), protocol="oracle").rstrip("\n")
    caption, title, table = text.split("\n\n")
    caption = " ".join(caption.split())
    assert caption.startswith('Protocol "oracle": a class was asked for only on the slices whose truth contains it')
    assert "Averaging per case: DSC over all slices of a case pooled, averaged over the cases whose truth" in caption
    assert "Second run (b) less first (a), case by case; interval: 95 % of 5000 bootstrap samples" in caption
    assert "Swapped" not in caption
    assert title == "NSD @ 2 mm, volumes"
    assert [line.split("  ") and " ".join(line.split()) for line in table.splitlines() if line[0] != "-"] == [
        "class first second difference 95 % p cases verdict",
        "liver 0.5000 0.6250 +0.1250 +0.0625 to +0.2500 0.0123 8 better",
        "polyp - - - - - 0 too few patients",
        "mean 0.5000 0.6250 +0.1250 +0.0625 to +0.2500 0.0123 8 better",
    ]


def test_of_swapped_sides_less_is_better() -> None:
    entry = replace(compared(), score=SWAPPED, class_names=("left kidney", "right kidney"))
    text = render_comparison([compared(), entry], names=("a", "b"), protocol="all").rstrip("\n")
    *_, title, table = text.split("\n\n")
    assert "in which both runs have predicted the class; the lower the better" in " ".join(text.split())
    assert title == "Swapped sides, share of the predicted voxels, volumes"
    rows = [line.split() for line in table.splitlines()]
    assert [row[-1] for row in rows if row[0] in ("left", "mean")] == ["worse", "worse"]
    content = comparison_json([entry], runs=(Path("a"), Path("b")), protocol="all")
    verdicts = {name: found["verdict"] for name, found in content["scores"][0]["classes"].items()}
    assert verdicts == {"left kidney": "worse", "right kidney": "too few patients"}


def test_comparison_json() -> None:
    written = comparison_json([compared()], runs=(Path("a"), Path("b")), protocol="all")
    content = json.loads(json.dumps(written, allow_nan=False))
    assert content["protocol"] == "all"
    assert content["averaging"].startswith("DSC over all slices of a case pooled")
    (entry,) = content["scores"]
    assert (content["first"], content["second"], entry["score"], entry["unit"]) == ("a", "b", "nsd", "mm")
    assert list(entry["classes"]) == ["liver", "polyp"]
    assert entry["mean"] == entry["classes"]["liver"]
    assert entry["mean"]["interval"] == [0.0625, 0.25]
    assert entry["classes"]["polyp"]["p_value"] is None


WRITERS = [
    pytest.param(lambda path: write_scores_csv(SCORES_OF_CASES, path), id="csv"),
    pytest.param(lambda path: write_summary_json([SUMMARY], path), id="json"),
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
        with pytest.raises(OutputError, match="choose a folder that exists, is writable"):
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

    monkeypatch.setattr("scripts.files.os.replace", full)
    with pytest.raises(OutputError, match="no space left"):
        write(tmp_path / "result")
    assert (tmp_path / "result").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["result"]
