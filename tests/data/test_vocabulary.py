"""Names become numbers in one place: the shipped table is sound, and a broken one is refused by row."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scripts.data.vocabulary import ClassEntry, Code, Codes, Modality, Region, Vocabulary, choose_classes, parse_prompts
from scripts.errors import ConfigError, PromptError

TABLE: dict[str, Any] = {
    "modalities": {
        "CT": {"description": "computed tomography", "synonyms": ["CAT scan"], "dicom_codes": ["CT"]},
        "MR": {"description": "magnetic resonance", "synonyms": ["MRI"], "dicom_codes": ["MR"]},
        "endoscopy": {"description": "endoscopes", "dicom_codes": ["ES"]},
    },
    "regions": {
        "abdomen": {"neighbours": ["colon", "thorax"]},
        "colon": {"neighbours": ["abdomen"]},
        "thorax": {"neighbours": ["abdomen"]},
        "head": {"neighbours": []},
    },
    "classes": [
        {
            "id": 5,
            "name": "right kidney",
            "synonyms": ["R kidney"],
            "modalities": ["CT", "MR"],
            "region": "abdomen",
            "partner": "left kidney",
            "colour": [0, 0, 255],
        },
        {
            "id": 1,
            "name": "liver",
            "synonyms": ["hepar"],
            "modalities": ["CT"],
            "region": "abdomen",
            "colour": [9, 0, 0],
        },
        {
            "id": 4,
            "name": "left kidney",
            "modalities": ["CT", "MR"],
            "region": "abdomen",
            "partner": "right kidney",
            "colour": [0, 255, 0],
        },
        {"id": 6, "name": "polyp", "modalities": ["endoscopy"], "region": "colon", "colour": [255, 255, 0]},
    ],
}
LIVER, LEFT = 1, 2  # places in the list above
LIVER_CODE = ["SCT", "10200004", "Liver"]
LIVER_CODES = {"category": ["SCT", "91723000", "Anatomical Structure"], "type": LIVER_CODE}
TRAINED = {"CT": ["left kidney", "liver"], "MR": ["right kidney"], "endoscopy": ["polyp"]}


def write_table(folder: Path, table: object) -> Path:
    path = folder / "classes.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def vocabulary(tmp_path):
    return Vocabulary.read(write_table(tmp_path, TABLE))


@pytest.fixture(scope="module")
def shipped(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


def lab(colour: tuple[int, int, int]) -> np.ndarray:
    """CIELAB (D65) of an sRGB colour, after CIE 15 and IEC 61966-2-1."""
    value = np.array(colour) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = np.cbrt(np.array(matrix) @ linear / [0.95047, 1.0, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# The shipped table


def test_shipped_ids_keep_their_meaning(shipped):
    assert dict(zip(shipped.ids, shipped.names, strict=True)) == {
        1: "liver",
        2: "spleen",
        3: "pancreas",
        4: "left kidney",
        5: "right kidney",
        6: "polyp",
        7: "skin lesion",
        8: "right lung",
        9: "left lung",
        10: "cardiomediastinum",
        11: "right ventricle",
        12: "myocardium",
        13: "left ventricle",
        14: "brain tumour",
        15: "lung",
        16: "retinal vessel",
        17: "breast lesion",
        18: "cell nucleus",
    }


def test_shipped_modalities(shipped):
    assert shipped.modality_names == (
        "CT",
        "MR",
        "endoscopy",
        "dermoscopy",
        "xray",
        "fundus",
        "ultrasound",
        "microscopy",
    )


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("CT", "CT"),
        ("MR", "MR"),
        ("ES", "endoscopy"),
        ("DMS", "dermoscopy"),
        ("CR", "xray"),
        ("DX", "xray"),
        ("OP", "fundus"),
        ("US", "ultrasound"),
        ("SM", "microscopy"),
        ("GM", "microscopy"),
    ],
)
def test_shipped_dicom_codes(shipped, code, name):
    assert shipped.modality(code).name == name


def test_shipped_partners_are_the_paired_organs(shipped):
    pairs = {(entry.id, entry.partner) for entry in shipped.entries if entry.partner is not None}
    assert pairs == {(4, 5), (5, 4), (8, 9), (9, 8)}


def test_shipped_sides_are_not_mixed_up(shipped):
    for entry in shipped.entries:
        sides = {"left": {"left", "l", "lv", "sinister"}, "right": {"right", "r", "rv", "dexter"}}
        for side, other in (("left", "right"), ("right", "left")):
            words = {word for name in entry.synonyms for word in name.lower().split()}
            assert side not in entry.name or not words & sides[other]


def test_shipped_colours_are_distinct_and_not_grey(shipped):
    colours = {entry.name: lab(entry.colour) for entry in shipped.entries}
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(colours[one] - colours[other]) >= 40, (one, other)
    for name, (_, green_red, blue_yellow) in colours.items():
        assert np.hypot(green_red, blue_yellow) >= 40, name


@pytest.mark.parametrize(
    ("prompt", "class_id"),
    [
        ("kidney_left", 4),
        ("L. kidney", 4),
        ("R kidney", 5),
        ("hepar", 1),
        ("lien", 2),
        ("brain tumor", 14),
        ("lungs", 15),
        ("retinal vessels", 16),
        ("breast tumor", 17),
        ("nuclei", 18),
    ],
)
def test_shipped_synonyms(shipped, prompt, class_id):
    assert shipped.resolve(prompt).id == class_id


@pytest.mark.parametrize(
    ("name", "modality", "regions", "possible"),
    [
        ("polyp", "MR", ["thorax"], False),  # of a heart
        ("polyp", "endoscopy", ["gastrointestinal tract"], True),
        ("liver", "endoscopy", None, False),
        ("liver", "MR", ["thorax"], True),  # below the heart
        ("left lung", "CT", ["abdomen"], True),  # its base
        ("left kidney", "MR", ["head"], False),
        ("brain tumour", "MR", ["abdomen"], False),
        ("brain tumour", "MR", ["abdomen", "head"], True),
        ("brain tumour", "MR", None, True),
        ("breast lesion", "MR", ["thorax"], True),
        ("breast lesion", "xray", ["breast"], False),
        ("retinal vessel", "fundus", ["eye"], True),
        ("skin lesion", "microscopy", ["tissue section"], False),
        ("cell nucleus", "microscopy", ["tissue section"], True),
    ],
)
def test_shipped_classes_occur_where_they_belong(shipped, name, modality, regions, possible):
    assert shipped.can_occur(shipped.resolve(name).id, modality=modality, regions=regions) is possible


def test_every_shipped_class_occurs_in_its_own_modalities_and_region(shipped):
    for entry in shipped.entries:
        for modality in shipped.modality_names:
            possible = shipped.can_occur(entry.id, modality=modality, regions=[entry.region])
            assert possible == (modality in entry.modalities), (entry.name, modality)


# Looking up


def test_rows_become_entries_in_id_order(vocabulary):
    assert vocabulary.ids == (1, 4, 5, 6)
    assert isinstance(vocabulary.entries, tuple)
    assert vocabulary.names == ("liver", "left kidney", "right kidney", "polyp")
    assert vocabulary.entry(5) == ClassEntry(
        id=5,
        name="right kidney",
        synonyms=("R kidney",),
        modalities=("CT", "MR"),
        region="abdomen",
        partner=4,
        colour=(0, 0, 255),
    )
    assert vocabulary.modalities[2] == Modality("endoscopy", "endoscopes", (), ("ES",))
    assert vocabulary.regions[0] == Region("abdomen", ("colon", "thorax"))


def test_codes_become_part_of_an_entry(tmp_path):
    codes = {**LIVER_CODES, "anatomy": ["SCT", "113345001", "Abdomen"]}
    path = tmp_path / "classes.yaml"
    path.write_text(yaml.safe_dump(broken(LIVER, codes=codes)), encoding="utf-8")
    read = Vocabulary.read(path)
    assert read.entry(1).codes == Codes(
        category=Code("SCT", "91723000", "Anatomical Structure"),
        type=Code("SCT", "10200004", "Liver"),
        modifier=None,
        anatomy=Code("SCT", "113345001", "Abdomen"),
    )
    assert read.entry(4).codes is None
    assert read.entry(201).codes is None


@pytest.mark.parametrize(
    "prompt", ["left kidney", "LEFT KIDNEY", "left_kidney", "Left-Kidney", " leftkidney ", "left.kidney", 4, "4", " 4 "]
)
def test_resolve_forgives_writing(vocabulary, prompt):
    assert vocabulary.resolve(prompt).id == 4


def test_resolve_finds_synonyms(vocabulary):
    assert vocabulary.resolve("Hepar").name == "liver"


@pytest.mark.parametrize("prompt", ["livr", "hepars"])
def test_unknown_class_lists_the_known_and_the_nearest(vocabulary, prompt):
    with pytest.raises(PromptError) as caught:
        vocabulary.resolve(prompt)
    assert str(caught.value) == (
        f"Class '{prompt}' is unknown. Did you mean 'liver'? "
        "Known classes: 1 liver, 4 left kidney, 5 right kidney, 6 polyp."
    )


@pytest.mark.parametrize(
    ("prompt", "suggestion"),
    [
        ("kidney", "'left kidney' or 'right kidney'"),
        ("right", "'right kidney' or 'right lung' or 'right ventricle'"),
        ("left kidny", "'left kidney'"),
        ("polip", "'polyp'"),
        ("hepr", "'liver'"),
    ],
)
def test_suggestions(shipped, prompt, suggestion):
    with pytest.raises(PromptError, match=rf"^Class '{prompt}' is unknown\. Did you mean {suggestion}\? Known"):
        shipped.resolve(prompt)


@pytest.mark.parametrize("prompt", ["", "zzz", "rig", "heart"])
def test_nothing_is_suggested_for_what_is_far(shipped, prompt):
    with pytest.raises(PromptError, match=f"^Class '{prompt}' is unknown. Known classes: 1 liver, "):
        shipped.resolve(prompt)


@pytest.mark.parametrize("prompt", [0, 7, "7", "0"])
def test_unknown_id(vocabulary, prompt):
    with pytest.raises(PromptError, match=rf"Class id {prompt} is unknown\. Known classes: 1 liver, 4 left"):
        vocabulary.resolve(prompt)


@pytest.mark.parametrize("prompt", ["-1", "1.", "4.0", "1_", "²"])
def test_numbers_that_are_no_ids_do_not_turn_into_one(vocabulary, prompt):
    with pytest.raises(PromptError, match="is unknown"):
        vocabulary.resolve(prompt)


@pytest.mark.parametrize("prompt", [True, 1.0, None, ["liver"]])
def test_resolve_refuses_other_types(vocabulary, prompt):
    with pytest.raises(PromptError, match=r"asked for by name or id, but .* came"):
        vocabulary.resolve(prompt)


@pytest.mark.parametrize(
    ("text", "name"), [("CT", "CT"), ("ct", "CT"), ("CAT-scan", "CT"), ("mri", "MR"), ("es", "endoscopy")]
)
def test_modality_by_name_synonym_and_code(vocabulary, text, name):
    assert vocabulary.modality(text).name == name


def test_unknown_modality_lists_the_choices(vocabulary):
    with pytest.raises(PromptError, match=r"Modality 'US' is unknown\. Choose one of CT, MR, endoscopy\."):
        vocabulary.modality("US")


LIVER_ID, POLYP_ID = 1, 6


@pytest.mark.parametrize(
    ("class_id", "modality", "regions", "possible"),
    [
        (LIVER_ID, "CT", ["abdomen"], True),
        (LIVER_ID, "MR", ["abdomen"], False),  # another modality
        (LIVER_ID, "CT", ["thorax"], True),  # a neighbour
        (LIVER_ID, "CT", ["head"], False),
        (LIVER_ID, "CT", ["head", "thorax"], True),
        (LIVER_ID, "CT", None, True),  # nothing known
        (LIVER_ID, "CT", [], True),
        (POLYP_ID, "endoscopy", ["thorax"], False),  # a neighbour's neighbour is none
        (LIVER_ID, "cat_scan", ["Thorax "], True),
    ],
)
def test_what_can_occur_where(vocabulary, class_id, modality, regions, possible):
    assert vocabulary.can_occur(class_id, modality=modality, regions=regions) is possible


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"class_id": 7, "modality": "CT", "regions": None}, "Class id 7 is unknown"),
        ({"class_id": 1, "modality": "PT", "regions": None}, "Modality 'PT' is unknown"),
        (
            {"class_id": 1, "modality": "CT", "regions": ["belly"]},
            r"Region 'belly' is unknown\. Choose among abdomen, colon, thorax, head\.",
        ),
    ],
)
def test_what_is_unknown_is_neither_possible_nor_impossible(vocabulary, question, message):
    with pytest.raises(PromptError, match=message):
        vocabulary.can_occur(question.pop("class_id"), **question)


# Reading


def broken(index: int, **fields: object) -> dict:
    table = copy.deepcopy(TABLE)
    table["classes"][index].update(fields)
    return table


@pytest.mark.parametrize(
    ("index", "fields", "message"),
    [
        (LIVER, {"id": 5}, r"class row 2 \('liver'\): id 5 is taken by another row"),
        (LIVER, {"id": 0}, r"class row 2 \('liver'\): expected 'id' as a whole number from 1 to 200, but 0 came"),
        (LIVER, {"id": True}, "expected 'id' as a whole number from 1 to 200, but True came"),
        (LIVER, {"id": "1"}, "expected 'id' as a whole number from 1 to 200, but '1' came"),
        (LIVER, {"name": ""}, "class row 2: expected 'name' as a text, but '' came"),
        (LIVER, {"name": "R-Kidney"}, r"class row 2 .*: the name 'R-Kidney' is taken already, by 'right kidney'"),
        (LIVER, {"synonyms": ["Polyp"]}, r"class row 4 \('polyp'\): the name 'polyp' is taken already, by 'liver'"),
        (LIVER, {"synonyms": ["LIVER"]}, r"class row 2 \('liver'\): the name 'LIVER' is taken already, by 'liver'"),
        (LIVER, {"synonyms": ["4"]}, "'4' cannot be a name"),
        (LIVER, {"synonyms": ["-"]}, "'-' cannot be a name"),
        (LIVER, {"synonyms": "hepar"}, "expected 'synonyms' as a list of texts, but 'hepar' came"),
        (LIVER, {"synonyms": [7]}, r"expected 'synonyms' as a list of texts, but \[7\] came"),
        (LIVER, {"modalities": ["US"]}, r"\['US'\] are not in the table; choose from CT, MR, endoscopy"),
        (LIVER, {"modalities": []}, r"modalities .* choose from CT, MR, endoscopy"),
        (LIVER, {"region": None}, "expected 'region' as a text, but None came"),
        (LIVER, {"region": "belly"}, "'region' as one of abdomen, colon, thorax, head, but 'belly' came"),
        (LIVER, {"colour": [1, 2]}, r"expected 'colour' as three whole numbers in 0..255, but \[1, 2\] came"),
        (LIVER, {"colour": "red"}, "three whole numbers in 0..255, but 'red' came"),
        (LIVER, {"colour": None}, "three whole numbers in 0..255, but None came"),
        (LIVER, {"colour": [1, 2, 3.0]}, "three whole numbers in 0..255"),
        (LIVER, {"colour": [1, 2, 256]}, "three whole numbers in 0..255"),
        (
            LIVER,
            {"codes": {"type": LIVER_CODE}},
            r"'liver'\): codes: expected 'category' as \[scheme, value, meaning\]",
        ),
        (LIVER, {"codes": {"category": LIVER_CODE}}, "codes: expected 'type' as"),
        (LIVER, {"codes": {**LIVER_CODES, "modifier": ["SCT", 7771000, "Left"]}}, "codes: expected 'modifier' as"),
        (LIVER, {"codes": {**LIVER_CODES, "anatomy": ["SCT", "1"]}}, "codes: expected 'anatomy' as"),
        (LIVER, {"codes": {**LIVER_CODES, "anatomy": ["SCT", "1" * 17, "Much"]}}, "texts of at most 16, 16 and 64"),
        (
            LIVER,
            {"codes": {**LIVER_CODES, "side": LIVER_CODE}},
            "codes: a row has the keys anatomy, category, modifier",
        ),
        (LIVER, {"codes": None}, "codes: a row has the keys anatomy, category, modifier, type, but None came"),
        (LIVER, {"colour": [0, 255, 0]}, r"class row 3 \('left kidney'\): colour \[0, 255, 0\] is taken by 'liver'"),
        (LIVER, {"color": [1, 2, 3]}, "class row 2: a row has the keys"),
        (LIVER, {"partner": "liver"}, "class row 2 .*: partners must name each other"),
        (LIVER, {"partner": "left kidney"}, "class row 2 .*: partners must name each other"),
        (LIVER, {"partner": "gall bladder"}, "its partner 'gall bladder' is no class of this table"),
    ],
)
def test_broken_class_rows_are_named(tmp_path, index, fields, message):
    path = write_table(tmp_path, broken(index, **fields))
    with pytest.raises(ConfigError, match=message) as caught:
        Vocabulary.read(path)
    assert str(caught.value).startswith(str(path))


def test_one_sided_partner_is_refused(tmp_path):
    table = copy.deepcopy(TABLE)
    del table["classes"][LEFT]["partner"]
    with pytest.raises(ConfigError, match=r"class row 1 \('right kidney'\): partners must name each other"):
        Vocabulary.read(write_table(tmp_path, table))


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        (
            {"CT": {"description": "a", "dicom_codes": ["CT"]}, "MR": {"description": "b", "dicom_codes": ["ct"]}},
            "'ct'",
        ),
        ({"CT": {"dicom_codes": ["CT"]}}, "modality 'CT': expected 'description' as a text, but None came"),
        ({"CT": {"description": "a"}}, "modality 'CT': expected 'dicom_codes' as a list of texts, but None came"),
        ({"CT": None}, "modality 'CT': a row has the keys"),
        ({False: {"description": "a", "dicom_codes": []}}, "expected a name that is a text, but False came"),
        ({}, "'modalities' must map each canonical name to its row"),
        (["CT"], "'modalities' must map each canonical name to its row"),
    ],
)
def test_broken_modalities_are_named(tmp_path, modalities, message):
    with pytest.raises(ConfigError, match=message):
        Vocabulary.read(write_table(tmp_path, {**TABLE, "modalities": modalities}))


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"abdomen": None}, "region 'abdomen': a row has the keys neighbours"),
        ({"abdomen": {}}, "region 'abdomen': expected 'neighbours' as a list of texts, but None came"),
        ({"abdomen": {"neighbours": "colon"}}, "expected 'neighbours' as a list of texts, but 'colon' came"),
        ({"abdomen": {"neighbours": ["belly"]}}, "region 'abdomen': belly: neighbours must be other regions"),
        ({"abdomen": {"neighbours": ["abdomen"]}}, "region 'abdomen': abdomen: neighbours must be other regions"),
        ({"a": {"neighbours": ["b"]}, "b": {"neighbours": []}}, "region 'a': b: neighbours must be other regions"),
        ({"a": {"neighbours": []}, "A ": {"neighbours": []}}, "the name 'A ' is taken already, by 'a'"),
        ({3: {"neighbours": []}}, "expected a name that is a text, but 3 came"),
        ({}, "'regions' must map each region to its row"),
        (["abdomen"], "'regions' must map each region to its row"),
    ],
)
def test_broken_regions_are_named(tmp_path, regions, message):
    with pytest.raises(ConfigError, match=message):
        Vocabulary.read(write_table(tmp_path, {**TABLE, "regions": regions}))


@pytest.mark.parametrize(
    "table", [[], ["modalities", "regions", "classes"], None, 3, {"classes": []}, {**TABLE, "more": 1}]
)
def test_table_without_its_three_keys(tmp_path, table):
    with pytest.raises(ConfigError, match="must hold the three keys 'modalities', 'regions' and 'classes'"):
        Vocabulary.read(write_table(tmp_path, table))


@pytest.mark.parametrize("classes", [[], {}, None, {"id": 1}])
def test_table_without_classes(tmp_path, classes):
    with pytest.raises(ConfigError, match="'classes' must be a list of rows"):
        Vocabulary.read(write_table(tmp_path, {**TABLE, "classes": classes}))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: No such file"):
        Vocabulary.read(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", [b"classes: [", b"\xff\xfe\x00"])
def test_not_yaml(tmp_path, content):
    path = tmp_path / "classes.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        Vocabulary.read(path)


# Prompts


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("liver,spleen", ["liver", "spleen"]),
        (" left kidney , 2,", ["left kidney", "2"]),
        (["liver", 2], ["liver", 2]),
        (("liver", "spleen"), ["liver", "spleen"]),
        (["liver,spleen", 2], ["liver", "spleen", 2]),
        (3, [3]),
        ("3", ["3"]),
        (None, None),
        ("", None),
        (" , ", None),
        ([], None),
    ],
)
def test_parse_prompts(value, prompts):
    assert parse_prompts(value) == prompts


@pytest.mark.parametrize("value", [2.5, True, {"liver": 1}, [None]])
def test_what_is_no_prompt_is_refused_when_looked_up(vocabulary, value):
    with pytest.raises(PromptError, match="asked for by name or id"):
        choose_classes(vocabulary, prompts=parse_prompts(value), modality="CT", trained=TRAINED)


@pytest.mark.parametrize("prompts", [None, []])
@pytest.mark.parametrize(("modality", "ids"), [("CT", [1, 4]), ("mri", [5]), ("ES", [6])])
def test_no_prompts_mean_the_classes_of_the_modality(vocabulary, prompts, modality, ids):
    assert choose_classes(vocabulary, prompts=prompts, modality=modality, trained=TRAINED) == ids


@pytest.mark.parametrize("force", [False, True])
def test_unknown_modality_without_prompts_asks_in_one_line(vocabulary, force):
    with pytest.raises(PromptError) as caught:
        choose_classes(vocabulary, prompts=None, modality=None, trained=TRAINED, force=force)
    assert str(caught.value) == (
        "The image's modality is unknown and no class was asked for: give --modality, one of CT, MR, endoscopy."
    )


def test_a_model_of_one_modality_still_asks(vocabulary):
    with pytest.raises(PromptError, match=r"give --modality, one of CT\."):
        choose_classes(vocabulary, prompts=None, modality=None, trained={"CT": ["liver"], "MR": []})


@pytest.mark.parametrize("trained", [{"CT": ["liver"]}, {"CT": ["liver"], "MR": []}])
def test_modality_that_the_model_does_not_know(vocabulary, trained):
    with pytest.raises(PromptError, match=r"was not trained on MR; it knows CT\. Correct --modality"):
        choose_classes(vocabulary, prompts=None, modality="MR", trained=trained)


def test_misspelt_modality_is_refused_even_with_force(vocabulary):
    with pytest.raises(PromptError, match="Modality 'CTT' is unknown"):
        choose_classes(vocabulary, prompts=["liver"], modality="CTT", trained=TRAINED, force=True)


def test_prompts_keep_their_order_and_come_once(vocabulary):
    prompts = ["Left_Kidney", 1, "hepar", "4"]
    assert choose_classes(vocabulary, prompts=prompts, modality="CT", trained=TRAINED) == [4, 1]


def test_class_of_another_modality_is_refused_with_what_is_known(vocabulary):
    with pytest.raises(PromptError) as caught:
        choose_classes(vocabulary, prompts=["liver", "polyp", 5], modality="CT", trained=TRAINED)
    assert str(caught.value) == (
        "This model was not trained for 'polyp', 'right kidney' in CT. "
        "It knows CT: liver, left kidney; MR: right kidney; endoscopy: polyp. Choose among these, or add --force."
    )


def test_force_accepts_class_of_another_modality(vocabulary):
    assert choose_classes(vocabulary, prompts=["polyp", 1], modality="CT", trained=TRAINED, force=True) == [6, 1]


def test_unknown_modality_accepts_classes_of_any(vocabulary):
    assert choose_classes(vocabulary, prompts=["polyp", "liver"], modality=None, trained=TRAINED) == [6, 1]


def test_class_trained_nowhere_is_refused(vocabulary):
    with pytest.raises(PromptError, match=r"was not trained for 'polyp' in any modality\. It knows CT: liver"):
        choose_classes(vocabulary, prompts=["polyp"], modality=None, trained={"CT": ["liver"]})


@pytest.mark.parametrize("modality", [None, "MR"])
@pytest.mark.parametrize("trained", [{}, {"MR": []}])
def test_model_of_boxes_alone_says_so(vocabulary, modality, trained):
    with pytest.raises(PromptError, match=r"knows no class by its name\. Ask by boxes or points"):
        choose_classes(vocabulary, prompts=None, modality=modality, trained=trained)


def test_model_that_knows_nothing(vocabulary):
    with pytest.raises(PromptError, match="It knows no class"):
        choose_classes(vocabulary, prompts=["polyp"], modality=None, trained={})


@pytest.mark.parametrize("trained", [{"CT": ["gall bladder"]}, {"US": ["liver"]}])
def test_record_that_does_not_fit_the_vocabulary_is_no_prompt_error(vocabulary, trained):
    with pytest.raises(ConfigError, match=r"record of trained classes does not fit .*classes\.yaml: .* is unknown"):
        choose_classes(vocabulary, prompts=["liver"], modality="CT", trained=trained)
