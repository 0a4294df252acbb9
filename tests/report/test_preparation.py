"""The table that `automedsam prepare` prints, compared with one written by hand."""

import copy

import pytest

from scripts.report.preparation import render_preparation


def case(name, section, patient, **changes):
    return {
        "case": name,
        "section": section,
        "patient": patient,
        "slices": 10,
        "voxels": {"liver": 500, "spleen": 0},
        "class_slices": {"liver": 4, "spleen": 0},
        "spacing": [0.5, 0.5, 2.0],
        "planar": False,
        "intensity": [-1000.0, 900.0],
        "content": "",
        "findings": [],
    } | changes


def finding(severity, check, text):
    return {"severity": severity, "check": check, "text": text}


RECORD = {
    "name": "mine",
    "source": {"layout": "mine"},
    "split": {"rule": "drawn by patient", "fractions": [0.7, 0.1, 0.2], "seed": 3},
    "cases": [
        case("a", "test", "p1", slices=12, intensity=[-1024.0, 1500.5]),
        case("b", "training", "p2", spacing=[0.75, 0.5, 5.0]),
        case("c", "training", "p2", voxels={"liver": 1000}, class_slices={"liver": 10}),
        case("d", "training", "p3", voxels={"spleen": 7}, class_slices={"spleen": 1}, findings=[]),
        case("e", "validation", "p4", planar=True, spacing=[1.0, 1.0, 1.0], intensity=[0.0, 255.0]),
    ],
    "skipped": [],
}


def test_the_table_by_hand():
    assert (
        render_preparation(RECORD)
        == """\
mine: 5 cases; split: drawn by patient (fractions 0.7/0.1/0.2, seed 3)

section     cases  patients  slices
training        3         2      30
validation      1         1      10
test            1         1      12

class    cases  slices  voxels
liver        4      22    2500
spleen  1 of 4       1       7

spacing of 4 cases: 0.5...0.75 x 0.5 x 2...5 mm
spacing of 1 cases: 1 x 1 x 1 pixel, for want of a spacing
intensities: smallest -1024...0, largest 255...1500.5"""
    )


def test_an_official_split_has_no_numbers():
    record = {**RECORD, "split": {"rule": "official"}}
    assert render_preparation(record).startswith("mine: 5 cases; split: official\n")


def test_sections_of_tests_follow_in_the_order_of_their_names():
    sections = ("test_etis", "training", "test_clinicdb", "validation")
    record = {**RECORD, "cases": [case(section, section, section) for section in sections]}
    rows = [line.split()[0] for line in render_preparation(record).splitlines()[2:7]]
    assert rows == ["section", "training", "validation", "test_clinicdb", "test_etis"]


def test_findings_are_grouped_errors_first_and_few_are_shown():
    record = copy.deepcopy(RECORD)
    for member in record["cases"]:
        member["findings"] = [finding("warn", "gap", f"a gap in {member['case']}")]
    record["cases"].append(case("f", None, "p5", findings=[finding("error", "copy", "the same image as a")], slices=99))
    text = render_preparation(record)
    assert (
        """
left out for an error, copy, 1 times:
  f: the same image as a
warning, gap, 5 times:
  a: a gap in a
  b: a gap in b
  c: a gap in c
  and 2 more, see preparation.json"""
        in text
    )
    # What is left out counts nowhere.
    assert text.startswith("mine: 5 cases")
    assert "99" not in text


@pytest.mark.parametrize(("count", "names"), [(3, "0.png, 1.png, 2.png"), (4, "0.png, 1.png, 2.png, ...")])
def test_what_was_skipped_is_counted_by_reason(count, names):
    skipped = [{"path": f"images/{number}.png", "reason": "no label"} for number in range(count)]
    skipped.append({"path": "masks/x.png", "reason": "label without a case"})
    lines = render_preparation({**RECORD, "skipped": skipped}).splitlines()
    assert lines[-2:] == [
        f"left out, no label: {count} files ({names})",
        "left out, label without a case: 1 files (x.png)",
    ]


def test_files_of_one_name_are_told_with_their_folders():
    skipped = [{"path": f"MR/{number}/DICOM_anon/", "reason": "no label"} for number in range(2)]
    text = render_preparation({**RECORD, "skipped": skipped})
    assert text.endswith("left out, no label: 2 files (MR/0/DICOM_anon/, MR/1/DICOM_anon/)")
