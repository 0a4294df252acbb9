"""A study's table: what it prints, writes and counts."""

import csv
import json
import math

import numpy as np
import pytest

from scripts.metrics.pooling import BatchPooled
from scripts.metrics.scores import score_case
from scripts.metrics.statistics import Comparison, Interval
from scripts.report.study_tables import (
    PaperFigures,
    RowOutcome,
    Scores,
    agreement,
    mean_swaps,
    render_study,
    write_study,
)

NAN = math.nan


def interval(mean, low=NAN, high=NAN):
    return Interval(mean=mean, low=low, high=high, cases=4, patients=3)


def row(name, dsc=None, paper=None, *, comparable="no: other data", note="", difference=None, basis="stated", **scores):
    given = {
        "seed_deviation": NAN,
        "noise_deviation": NAN,
        "training_seconds": 75.0,
        "parameters": 1_234_567,
        "nsd_challenge": NAN,
        "iou": 0.4,
        "batch_pooled": BatchPooled(dsc=0.6, iou=0.45),
        **scores,
    }
    found = None
    if dsc is not None:
        found = Scores(
            seeds=2,
            dsc=interval(dsc, dsc - 0.01, dsc + 0.02),
            nsd=interval(0.5),
            classes={"liver": dsc, "pancreas": NAN},
            difference=difference,
            **given,
        )
    figures = None if paper is None else PaperFigures(dsc=paper, nsd=paper + 1, basis=basis)
    return RowOutcome(name, found, note, figures, comparable, None if name == "whole" else "whole")


@pytest.fixture
def rows():
    worse = Comparison(difference=interval(-0.0321, -0.05, -0.01), p_value=0.0625)
    return [
        row("whole", 0.9, 95.0, noise_deviation=0.0012),
        row("part", 0.8679, 90.5, difference=worse, seed_deviation=0.004, basis="inferred"),
        row("other", 0.91, 94.0, nsd_challenge=0.75),
        row("absent", None, 80.0, note="no weights: models/x.pt is not there"),
        row("new", 0.5, None, comparable="the paper has no such row"),
    ]


def cells(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_figures_stand_beside_the_papers(rows):
    text = render_study(rows, title="a title", caption=["what it is of"])
    assert text.startswith("a title\nwhat it is of\n")
    assert cells(text, "part") == [
        "part", "2", "86.79 ± 0.40 [85.79, 88.79]", "50.00", "-", "-3.21 [-5.00, -1.00]", "0.062", "1.23", "1.2",
        "90.500*", "91.500*", "-4.500", "no [1]",
    ]  # fmt: skip
    assert cells(text, "whole")[-7:] == ["-", "1.23", "1.2", "95.000", "96.000", "-", "no [1]"]
    assert cells(text, "other")[4] == "75.00"
    assert cells(text, "absent") == ["absent", *["-"] * 8, "80.000", "81.000", "-15.000", "no [1] [2]"]
    assert cells(text, "new")[-4:] == ["-", "-", "-", "the paper has no such row"]


def test_a_table_of_no_paper_has_other_scores_in_its_place(tmp_path):
    rows = [row("whole", 0.9, comparable=""), row("absent", comparable="", note="no data")]
    text = render_study(rows, title="t", caption=[])
    (head,) = [line for line in text.splitlines() if line.startswith("row ")]
    assert head.split("  ")[-1] == "comparable"
    assert "paper" not in text
    assert head.index("NSD challenge") < head.index("IoU") < head.index("DSC batch-pooled") < head.index("DSC less")
    assert cells(text, "whole")[4:] == ["-", "40.00", "60.00", "-", "-", "1.23", "1.2", "-"]
    assert cells(text, "absent") == ["absent", *["-"] * 10, "- [1]"]
    write_study(rows, tmp_path, text=text, about={})
    entry, other = csv.DictReader((tmp_path / "study.csv").open())
    assert (float(entry["iou"]), float(entry["dsc_batch_pooled"]), float(entry["iou_batch_pooled"])) == (40, 60, 45)
    assert (entry["parameters"], entry["training_seconds"]) == ("1234567", "75.0")
    assert (other["parameters"], other["iou"]) == ("", "")


def test_a_table_without_trainings_has_no_columns_for_them():
    rows = [row("whole", 0.9, 95.0, parameters=None, training_seconds=NAN)]
    text = render_study(rows, title="t", caption=[])
    assert "minutes" not in text
    assert "parameters" not in text
    rows.append(row("part", 0.8, 90.0))
    text = render_study(rows, title="t", caption=[])
    assert cells(text, "whole")[5:9] == ["-", "-", "-", "-"]
    assert cells(text, "part")[7:9] == ["1.23", "1.2"]


def test_remarks_and_orders_are_below(rows):
    text = " ".join(render_study(rows, title="t", caption=[]).split())
    assert "Order by DSC: 2 of 3 pairs of rows are ordered as in the paper" in text
    assert "the other way round here: whole above other." in text
    assert "[1] no: other data" in text
    assert "[2] no weights: models/x.pt is not there" in text
    assert "network's noise: whole 0.12." in text
    assert "* the paper's print does not tell" in text


def test_columns_stand_below_each_other(rows):
    lines = render_study(rows, title="t", caption=["c"]).splitlines()
    head = next(line for line in lines if line.startswith("row "))
    body = lines[lines.index(head) + 2 :][: len(rows)]
    assert (
        len({line.index(word) for line, word in zip(body, ["no", "no", "no", "no [1] [2]", "the paper"], strict=True)})
        == 1
    )
    assert head.index("comparable") == body[0].rindex("no [1]")


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([(0.9, 95), (0.8, 90), (0.7, 85)], (3, 3, [])),
        ([(0.7, 95), (0.8, 90), (0.9, 85)], (0, 3, [("0", "1"), ("0", "2"), ("1", "2")])),
        ([(0.9, 90), (0.8, 95)], (0, 1, [("1", "0")])),
        ([(0.9, 90)], (0, 0, [])),
        ([(0.8, 90), (0.8, 95)], (1, 1, [])),
    ],
)
def test_agreement_by_hand(figures, expected):
    assert agreement([row(str(k), dsc, paper) for k, (dsc, paper) in enumerate(figures)]) == expected


def test_without_any_figures_nothing_is_said_of_an_order():
    text = render_study([row("absent", None, None, comparable="")], title="t", caption=[])
    assert "Order" not in text
    assert cells(text, "absent") == ["absent", *["-"] * 9]


def test_files_hold_what_was_measured(rows, tmp_path):
    write_study(rows, tmp_path, text="as printed\n", about={"table": "mine"})
    assert (tmp_path / "table.txt").read_text() == "as printed\n"
    entries = list(csv.DictReader((tmp_path / "study.csv").open()))
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["table"] == "mine"
    assert [entry["row"] for entry in entries] == [entry["row"] for entry in content["rows"]] == [r.name for r in rows]
    part = entries[1]
    assert float(part["dsc"]) == 86.79
    assert float(part["difference_low"]) == -5
    assert (part["p_value"], part["paper_basis"], part["patients"]) == ("0.0625", "inferred", "3")
    assert float(part["dsc_seed_deviation"]) == pytest.approx(0.4)
    assert (part["nsd_low"], part["nsd_challenge"]) == ("", "")
    assert content["rows"][1]["classes"] == {"liver": 86.79, "pancreas": None}
    assert content["rows"][3]["dsc"] is None
    assert entries[3]["seeds"] == "0"


def sided(case, left, right):
    """A case in which so many of ten predicted voxels of each kidney lie in the other; of None none is predicted."""
    truth, predicted = np.zeros((2, 3, 1, 40, 1), dtype=bool)
    truth[0, 0, :10] = truth[1, 0, 20:30] = truth[2, 0, 30:] = True
    for side, other, swapped in ((0, 1, left), (1, 0, right)):
        if swapped is not None:
            start = 20 * other
            predicted[side, 0, start : start + swapped] = True
            start = 20 * side
            predicted[side, 0, start : start + 10 - swapped] = True
    names = ["left kidney", "right kidney", "liver"]
    return score_case(
        predicted,
        truth,
        case=case,
        class_ids=[4, 5, 1],
        class_names=names,
        spacing=None,
        planar=True,
        partners=[5, 4, None],
    )


def test_swaps_are_averaged_over_cases_then_over_seeds():
    first = [*sided("a", 4, 0), *sided("b", None, 0), *sided("c", 2, None)]
    second = [*sided("a", 0, 0), *sided("b", None, 1), *sided("c", 1, None)]
    found = mean_swaps([first, second])
    assert found == {"left kidney": pytest.approx((0.3 + 0.05) / 2), "right kidney": pytest.approx((0 + 0.05) / 2)}
    nothing = mean_swaps([sided("a", None, None)])
    assert list(nothing) == ["left kidney", "right kidney"]
    assert all(math.isnan(share) for share in nothing.values())
    assert mean_swaps([[score for score in first if score.class_name == "liver"]]) == {}


def test_side_swaps_stand_in_a_table_with_lateral_partners(rows, tmp_path):
    swaps = {"left kidney": 0.02, "right kidney": 0.03, "left lung": NAN}
    rows = [row("whole", 0.9, 95.0, swaps=swaps), *rows[1:]]
    text = render_study(rows, title="t", caption=[])
    assert "Swapped: share of the predicted voxels" in text
    head = next(line for line in text.splitlines() if line.startswith("row "))
    assert head.index("NSD challenge") < head.index("swapped") < head.index("DSC less reference")
    assert cells(text, "whole")[4:7] == ["-", "2.50", "-"]
    assert cells(text, "other")[4:6] == ["75.00", "-"]
    write_study(rows, tmp_path, text=text, about={})
    entries = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert [entry["swapped_share"] for entry in entries] == ["2.5", "", "", "", ""]
    content = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert content[0]["swaps"] == {"left kidney": 2.0, "right kidney": 3.0, "left lung": None}
    assert content[1]["swaps"] == {}


def test_a_table_without_lateral_partners_says_nothing_of_sides(rows):
    assert "swapped" not in render_study(rows, title="t", caption=[]).casefold()
