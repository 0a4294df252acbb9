"""A layout made of what a person says on the command line."""

import pytest

from scripts.data.converters.finding import find_cases
from scripts.data.converters.generic import generic_layout
from scripts.data.converters.patterns import FileTree
from scripts.errors import ConfigError


def layout(vocabulary, **options):
    return generic_layout(vocabulary=vocabulary, **{"modality": "CT", "label_map": {1: "liver"}, **options})


def test_label_maps_in_the_usual_folders(vocabulary):
    made = layout(vocabulary, label_map={1: "hepar", 7: "spleen"}, name="my scans")
    assert (made.name, made.modality, made.case, made.patient) == ("my scans", "CT", "{case}", "")
    assert (made.image, made.label) == (("images/{case}.{suffix}",), ("labels/{case}.{suffix}",))
    assert made.label_map == {1: "hepar", 7: "spleen"}
    assert (made.mask, made.sections, made.split_table) == ({}, {}, None)


def test_masks_of_one_class_and_of_several(vocabulary):
    made = layout(vocabulary, label_map=None, classes=["polyp"], modality="colonoscopy")
    assert (made.modality, made.mask) == ("endoscopy", {"polyp": ("labels/{case}.{suffix}",)})
    made = layout(vocabulary, label_map=None, classes=["left_lung", "right_lung"], labels="m/{class}/{case}.png")
    assert made.mask == {"left_lung": ("m/left_lung/{case}.png",), "right_lung": ("m/right_lung/{case}.png",)}


def test_gaps_tell_cases_patients_sections_and_slices(tmp_path, vocabulary):
    made = layout(vocabulary, images="{split}/{patient}/{day}_{slice}.png", labels="gt/{patient}/{day}_{slice}.png")
    assert (made.case, made.patient, made.split_table) == ("{patient}_{day}", "{patient}", None)
    paths = [
        f"{split}/p{number}/d_{index}.png" for number, split in enumerate(("Train", "val", "TS")) for index in (1, 2)
    ]
    for path in [*paths, *(f"gt/{path.partition('/')[2]}" for path in paths)]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    cases = find_cases(made, FileTree(tmp_path)).cases
    assert {case.name: (case.patient, case.section, len(case.image), len(case.label)) for case in cases} == {
        "p0_d": ("p0", "training", 2, 2),
        "p1_d": ("p1", "validation", 2, 2),
        "p2_d": ("p2", "test", 2, 2),
    }


def test_a_table_of_the_split(vocabulary):
    table = layout(vocabulary, split_table="lists/split.csv").split_table
    assert (table.file, table.case, table.section) == ("lists/split.csv", "case", "split")
    assert {table.sections[word] for word in ("train", "val", "valid", "test")} == {"training", "validation", "test"}


@pytest.mark.parametrize(("text", "patient"), [("case,split\na,train", "a"), ("case,split,patient\na,train,p9", "p9")])
def test_the_tables_patients_are_used_where_it_has_them(tmp_path, vocabulary, text, patient):
    for path in ("images/a.nii", "labels/a.nii"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "split.csv").write_text(text)
    case = find_cases(layout(vocabulary, split_table="split.csv"), FileTree(tmp_path)).cases[0]
    assert (case.section, case.patient) == ("training", patient)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"modality": None}, "--modality, one of CT, MR"),
        ({"modality": "telepathy"}, "'telepathy' is unknown"),
        ({"label_map": None}, "either --label-map .* or --classes"),
        ({"classes": ["liver"]}, "either --label-map .* or --classes"),
        ({"label_map": {1: "livver"}}, "the command line: .*'livver' is unknown"),
        ({"label_map": {0: "liver"}}, "value 0"),
        (
            {"label_map": None, "classes": ["liver", "spleen"]},
            r"2 classes need a mask each: give --labels with",
        ),
        ({"images": "images/scan.nii"}, r"needs a gap that tells cases apart, such as \{case\}"),
        ({"images": "{split}/{slice}.png"}, "needs a gap that tells cases apart"),
        ({"images": "images/{case.nii"}, "brace"),
    ],
)
def test_what_is_missing_is_asked_for(vocabulary, options, text):
    with pytest.raises(ConfigError, match=text):
        layout(vocabulary, **options)
