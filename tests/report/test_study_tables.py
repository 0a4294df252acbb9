"""A study's table: what it prints, writes and counts."""

import csv
import json
import math

import pytest

from scripts.metrics.statistics import Comparison, Interval
from scripts.report.study_tables import PaperFigures, RowOutcome, Scores, agreement, render_study, write_study

NAN = math.nan


def interval(mean, low=NAN, high=NAN):
    return Interval(mean=mean, low=low, high=high, cases=4, patients=3)


def row(name, dsc=None, paper=None, *, comparable="no: other data", note="", difference=None, basis="stated", **scores):
    given = {"seed_deviation": NAN, "noise_deviation": NAN, "training_seconds": 12.5, "nsd_challenge": NAN, **scores}
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
        "part", "2", "86.79 ± 0.40 [85.79, 88.79]", "50.00", "-", "-3.21 [-5.00, -1.00]", "0.062", "90.500*", "91.500*",
        "-4.500", "no [1]",
    ]  # fmt: skip
    assert cells(text, "whole")[-5:] == ["-", "95.000", "96.000", "-", "no [1]"]
    assert cells(text, "other")[4] == "75.00"
    assert cells(text, "absent") == ["absent", *["-"] * 6, "80.000", "81.000", "-15.000", "no [1] [2]"]
    assert cells(text, "new")[-4:] == ["-", "-", "-", "the paper has no such row"]


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
    assert cells(text, "absent") == ["absent", *["-"] * 10]


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
