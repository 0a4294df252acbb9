"""The table of layouts: the shipped one is sound, and a broken row is refused by name."""

from pathlib import Path

import pytest
import yaml

from scripts.data.converters.layouts import PROGRAMS, make_layout, names_of, names_of_sets, read_layouts
from scripts.data.converters.patterns import PathPattern
from scripts.errors import ConfigError

MASKS = {"modality": "endoscopy", "image": "images/{case}.png", "mask": {"polyp": "masks/{case}.png"}}
MAP = {"modality": "CT", "image": "i/{case}.nii", "label": "l/{case}.nii", "label_map": {1: "liver"}}


def layout(vocabulary, **changes):
    return make_layout("mine", {**MAP, **changes}, vocabulary, source="table.yaml")


def test_every_shipped_row_can_be_used(tables, vocabulary):
    for name, row in tables.layouts.items():
        gaps = {**row.fields, **{option: "|".join(values.values()) for option, values in row.choices.items()}}
        images = [PathPattern(text, fields=gaps) for text in row.image]
        for text in [*row.label, *(pattern for patterns in row.mask.values() for pattern in patterns)]:
            PathPattern(text, fields=gaps)
        # What names a case or a patient must stand in every path of an image.
        for template in (row.case, row.patient):
            wanted = PathPattern(template).names - {"prefix", "section"}
            assert any(wanted <= pattern.names for pattern in images), (name, template)
        assert row.modality in vocabulary.modality_names
        assert all(row.modality in vocabulary.resolve(shown).modalities for shown in row.class_names), name
        assert (not row.sections) == all("split" not in pattern.names for pattern in images), name
        assert set(row.choices) <= set().union(*(pattern.names for pattern in images)), name


# Values as the owners publish them, https://zenodo.org/records/7155725, .../7860267 and https://chaos.grand-challenge.org
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("amos", {1: "spleen", 2: "right kidney", 3: "left kidney", 6: "liver", 10: "pancreas"}),
        ("flare22", {1: "liver", 2: "right kidney", 3: "spleen", 4: "pancreas", 13: "left kidney"}),
        ("chaos_mr", {63: "liver", 126: "right kidney", 189: "left kidney", 252: "spleen"}),
        ("acdc", {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}),
        ("brats", dict.fromkeys((1, 2, 3, 4), "brain tumour")),
    ],
)
def test_label_values_are_the_owners(tables, name, values):
    label_map = tables.layouts[name].label_map
    assert {value: meaning for value, meaning in label_map.items() if meaning is not None} == values
    assert list(label_map) == list(range(1, len(label_map) + 1)) or name.startswith("chaos")


def test_films_are_29_and_end_with_frame_612(tables):
    assert len(tables.layouts["clinicdb"].sequences[""]) == 29
    assert tables.layouts["clinicdb"].sequences[""][-1] == 612
    assert tables.layouts["polyp"].sequences["training"] == tables.layouts["clinicdb"].sequences[""]


def test_all_names_are_listed_but_shared_folders(tables):
    names = names_of_sets(tables.layouts)
    assert names[: len(PROGRAMS)] == list(PROGRAMS)
    assert "kvasir_seg" in names
    assert not any("/" in name for name in names)


def test_a_row_becomes_a_layout(vocabulary):
    row = layout(vocabulary, modality="mri", label_map={1: "hepar", 2: ["left kidney", "right kidney"], 3: None})
    assert row.modality == "MR"  # the guard compares canonical names
    assert row.class_names == ("hepar", "left kidney", "right kidney")
    assert (row.image, row.case, row.regions) == (("i/{case}.nii",), "{case}", None)
    assert [names_of(meaning) for meaning in row.label_map.values()] == [
        ("hepar",),
        ("left kidney", "right kidney"),
        (),
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": "x"}, r"unknown keys \['labels'\]"),
        ({"label_map": {}}, "either 'label' with 'label_map', or 'mask'"),
        ({"mask": {"liver": "m/{case}.nii"}}, "either 'label' with 'label_map', or 'mask'"),
        ({"modality": "telepathy"}, "'telepathy' is unknown"),
        ({"label_map": {1: "livver"}}, "'livver' is unknown"),
        ({"label_map": {0: "liver"}}, "value 0; expected whole numbers of 1 or more"),
        ({"label_map": {"one": "liver"}}, "value 'one'"),
        ({"label_map": {True: "liver"}}, "value True"),
        ({"label_map": {1: 4}}, "4; expected a class"),
        ({"label_map": ["liver"]}, "label_map must be tables"),
        ({"label_map": {1: ["left kidney", "liver"]}}, "no pair of partners"),
        ({"label_map": {1: ["left kidney"]}}, "no pair of partners"),
        ({"label_map": {1: []}}, "no pair of partners"),
        ({"label_map": {1: ["left kidney", "right kidney", "liver"]}}, "no pair of partners"),
        ({"sections": "training"}, "sections must be tables"),
        ({"exclude": {"bad": "("}}, "unterminated|missing"),
        ({"regions": ["moon"]}, "'moon' is unknown"),
        ({"split_table": {"file": "s.csv", "case": "case"}}, "'split_table' has the keys"),
    ],
)
def test_a_broken_row_is_refused_by_name(vocabulary, changes, text):
    with pytest.raises(ConfigError, match=f"table.yaml: layout 'mine'.*(?:{text})"):
        layout(vocabulary, **changes)


@pytest.mark.parametrize("missing", ["modality", "image"])
def test_a_row_needs_modality_and_image(vocabulary, missing):
    row = {key: value for key, value in MASKS.items() if key != missing}
    with pytest.raises(ConfigError, match=rf"lacks \['{missing}'\]"):
        make_layout("mine", row, vocabulary, source="table.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("", "must map"),
        ("- a", "must map"),
        ("a: 1", "a int came"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, vocabulary, text, expected):
    path = tmp_path / "layouts.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        read_layouts(path, vocabulary)


def test_the_order_of_the_table_is_kept(tmp_path, vocabulary):
    path = tmp_path / "layouts.yaml"
    path.write_text(yaml.safe_dump({"z": MASKS, "a": MAP}, sort_keys=False))
    assert list(read_layouts(path, vocabulary)) == ["z", "a"]
