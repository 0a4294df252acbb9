"""A datalist says what it says: paths, classes and modalities are looked up, and every fault is named by entry."""

import csv
import json
import os
from pathlib import Path

import pytest

from scripts.data.datalist import (
    CompleteCased,
    complete_cases,
    folder_names,
    read_datalist,
    source_names,
    trained_classes,
    write_datalist,
)
from scripts.data.vocabulary import Vocabulary
from scripts.errors import InputError, OutputError

LIVER, SPLEEN, LEFT_KIDNEY, POLYP, RIGHT_LUNG, LEFT_LUNG, TUMOUR = 1, 2, 4, 6, 8, 9, 14


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture
def folder(tmp_path):
    """A data set's folder in which every file that the tests name exists."""
    for name in ("a.nii.gz", "b.nii.gz", "s0.png", "s1.png", "m.nii.gz", "m0.png", "m1.png", "n0.png", "n1.png"):
        (tmp_path / name).touch()
    return tmp_path


def entry(**fields: object) -> dict:
    return {"case": "a", "image": "a.nii.gz", "label": "m.nii.gz", "modality": "CT", **fields}


def without(fields: dict, *keys: str) -> dict:
    return {key: value for key, value in fields.items() if key not in keys}


def datalist(*training: object, **more: object) -> dict:
    return {"name": "made up", "label_map": {"1": "liver", "7": "lien"}, "training": list(training), **more}


def save(folder: Path, content: object) -> Path:
    path = folder / "datalist.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read_one(folder, vocabulary, **fields):
    (case,) = read_datalist(save(folder, datalist(entry(**fields))), section="training", vocabulary=vocabulary)
    return case


def fails(folder, vocabulary, content, message, section="training"):
    """Check that reading fails with this text after the path of the datalist."""
    path = save(folder, content)
    with pytest.raises(InputError) as caught:
        read_datalist(path, section=section, vocabulary=vocabulary)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


# What a case becomes


def test_label_map_file(folder, vocabulary):
    assert read_one(folder, vocabulary) == {
        "case": "a",
        "image": str(folder / "a.nii.gz"),
        "label": str(folder / "m.nii.gz"),
        "label_map": {1: LIVER, 7: SPLEEN},
        "modality": "CT",
        "annotated": [LIVER, SPLEEN],
        "patient": "a",
        "set": "made up",
        "regions": ["abdomen"],
    }


def test_values_without_a_class_are_known_and_teach_nothing(folder, vocabulary):
    content = datalist(entry()) | {"label_map": {"1": "liver", "2": None, "7": "lien", "9": None}}
    (case,) = read_datalist(save(folder, content), section="training", vocabulary=vocabulary)
    assert case["label_map"] == {1: LIVER, 2: None, 7: SPLEEN, 9: None}
    assert case["annotated"] == [LIVER, SPLEEN]


def test_several_file_values_may_be_one_class(folder, vocabulary):
    content = datalist(entry(modality="MRI")) | {"label_map": {"1": "whole tumor", "2": "WT", "4": "brain tumour"}}
    (case,) = read_datalist(save(folder, content), section="training", vocabulary=vocabulary)
    assert case["label_map"] == {1: TUMOUR, 2: TUMOUR, 4: TUMOUR}
    assert case["annotated"] == [TUMOUR]
    assert case["modality"] == "MR"


def test_classes_limit_what_is_annotated_but_not_the_label_map(folder, vocabulary):
    case = read_one(folder, vocabulary, classes=["Lien"])
    assert case["annotated"] == [SPLEEN]
    assert case["label_map"] == {1: LIVER, 7: SPLEEN}


def test_annotated_is_ascending(folder, vocabulary):
    assert read_one(folder, vocabulary, classes=["spleen", "liver"])["annotated"] == [LIVER, SPLEEN]


def test_stack_with_parallel_labels(folder, vocabulary):
    case = read_one(folder, vocabulary, image=["s1.png", "s0.png"], label=["m1.png", "m0.png"])
    assert case["image"] == [str(folder / "s1.png"), str(folder / "s0.png")]
    assert case["label"] == [str(folder / "m1.png"), str(folder / "m0.png")]
    assert case["label_map"] == {1: LIVER, 7: SPLEEN}


def test_stack_of_one(folder, vocabulary):
    case = read_one(folder, vocabulary, image=["s0.png"], label=["m0.png"])
    assert case["image"] == [str(folder / "s0.png")]
    assert case["label"] == [str(folder / "m0.png")]


def test_one_mask_file_per_class(folder, vocabulary):
    masks = {"left lung": "m0.png", "Right_Lung": "m1.png"}
    case = read_one(folder, vocabulary, image="s0.png", label=masks, modality="DX")
    assert case["label"] == {RIGHT_LUNG: str(folder / "m1.png"), LEFT_LUNG: str(folder / "m0.png")}
    assert list(case["label"]) == case["annotated"] == [RIGHT_LUNG, LEFT_LUNG]
    assert case["label_map"] == {}
    assert case["modality"] == "xray"


def test_masks_need_no_label_map(folder, vocabulary):
    content = without(datalist(entry(label={"polyp": "m0.png"}, modality="endoscopy")), "label_map")
    (case,) = read_datalist(save(folder, content), section="training", vocabulary=vocabulary)
    assert case["label"] == {POLYP: str(folder / "m0.png")}


def test_masks_of_a_stack(folder, vocabulary):
    masks = {"spleen": ["m0.png", "m1.png"], "liver": ["n0.png", "n1.png"]}
    case = read_one(folder, vocabulary, image=["s0.png", "s1.png"], label=masks, classes=["liver"])
    assert case["label"] == {
        LIVER: [str(folder / "n0.png"), str(folder / "n1.png")],
        SPLEEN: [str(folder / "m0.png"), str(folder / "m1.png")],
    }
    assert case["annotated"] == [LIVER]


def test_case_that_is_only_predicted(folder, vocabulary):
    content = datalist(without(entry(), "label"))
    (case,) = read_datalist(save(folder, content), section="training", vocabulary=vocabulary)
    assert "label" not in case
    assert case["label_map"] == {}
    assert case["annotated"] == []


def test_folder_of_slices_is_an_image(folder, vocabulary):
    (folder / "series").mkdir()
    assert read_one(folder, vocabulary, image="series")["image"] == str(folder / "series")


@pytest.mark.parametrize(("patient", "expected"), [("p 1", "p 1"), (12, "12"), (0, "0")])
def test_patient(folder, vocabulary, patient, expected):
    assert read_one(folder, vocabulary, patient=patient)["patient"] == expected


def test_cases_do_not_share_their_label_map(folder, vocabulary):
    path = save(folder, datalist(entry(), entry(case="b")))
    first, second = read_datalist(path, section="training", vocabulary=vocabulary)
    first["label_map"].clear()
    assert second["label_map"] == {1: LIVER, 7: SPLEEN}


# What else a case says of itself


def test_regions_are_those_of_the_annotated_classes_or_as_given(folder, vocabulary):
    masks = {"left ventricle": "m0.png", "liver": "m1.png"}
    assert read_one(folder, vocabulary, image="s0.png", label=masks)["regions"] == ["abdomen", "thorax"]
    given = read_one(folder, vocabulary, regions=["Thorax", "pelvis", "thorax"], classes=["liver"])
    assert given["regions"] == ["thorax", "pelvis"]  # the liver lies next to the thorax
    content = datalist(without(entry(), "label"))
    assert read_datalist(save(folder, content), section="training", vocabulary=vocabulary)[0]["regions"] == []


def test_counts_are_by_class_id(folder, vocabulary):
    counts = {"slices": 12, "voxels": {"lien": 0, "liver": 345}}
    assert read_one(folder, vocabulary, counts=counts)["counts"] == {"slices": 12, "voxels": {LIVER: 345, SPLEEN: 0}}


def test_counts_may_hold_classes_that_count_as_not_annotated(folder, vocabulary):
    counts = {"slices": 12, "voxels": {"liver": 345, "spleen": 6}}
    assert read_one(folder, vocabulary, counts=counts, classes=["liver"])["counts"]["voxels"] == {LIVER: 345, SPLEEN: 6}


def test_counts_of_a_case_without_a_label(folder, vocabulary):
    content = datalist(without(entry(counts={"slices": 2, "voxels": {}}), "label"))
    (case,) = read_datalist(save(folder, content), section="training", vocabulary=vocabulary)
    assert case["counts"] == {"slices": 2, "voxels": {}}


def test_a_set_without_a_name_is_called_after_its_folder(folder, vocabulary, monkeypatch):
    save(folder, without(datalist(entry()), "name"))
    monkeypatch.chdir(folder)
    (case,) = read_datalist("datalist.json", section="training", vocabulary=vocabulary)
    assert case["set"] == folder.name


@pytest.mark.parametrize("name", [3, "", " ", None, ["x"]])
def test_a_name_that_is_none(folder, vocabulary, name):
    fails(folder, vocabulary, datalist(entry(), name=name), f"'name' must be a text (not an empty one), but {name!r} ")


def test_a_class_of_the_label_map_that_is_not_annotated_may_be_impossible(folder, vocabulary):
    content = datalist(entry(classes=["liver"])) | {"label_map": {"1": "liver", "2": "polyp"}}
    (case,) = read_datalist(save(folder, content), section="training", vocabulary=vocabulary)
    assert case["annotated"] == [LIVER]


def test_texts_and_objects_at_the_top_are_no_sections(folder, vocabulary):
    content = datalist(entry(), source={"layout": "generic", "files": {"n": 1}}, note="by hand")
    assert len(read_datalist(save(folder, content), section="training", vocabulary=vocabulary)) == 1
    fails(
        folder, vocabulary, content, "no section 'source' (a list of cases). Sections there are: 'training'", "source"
    )


# Several datalists as one


@pytest.fixture
def frames(tmp_path_factory):
    """A datalist of endoscopic frames in a folder of its own."""
    folder = tmp_path_factory.mktemp("frames")
    for name in ("f.png", "polyp.png"):
        (folder / name).touch()
    content = {
        "name": "frames",
        "training": [{"case": "f", "image": "f.png", "label": {"polyp": "polyp.png"}, "modality": "endoscopy"}],
        "validation": [{"case": "v", "image": "f.png", "label": {"polyp": "polyp.png"}, "modality": "endoscopy"}],
    }
    return save(folder, content)


def test_several_datalists_are_read_as_one(folder, vocabulary, frames):
    volumes = save(folder, datalist(entry(), validation=[entry(case="b")]))
    cases = read_datalist([volumes, str(frames)], section=["validation", "training"], vocabulary=vocabulary)
    assert [(case["case"], case["set"]) for case in cases] == [
        ("b", "made up"),
        ("a", "made up"),
        ("v", "frames"),
        ("f", "frames"),
    ]
    assert [case["image"] for case in cases][1:3] == [str(folder / "a.nii.gz"), str(frames.parent / "f.png")]
    assert [case["annotated"] for case in cases][1:3] == [[LIVER, SPLEEN], [POLYP]]
    assert trained_classes(cases, vocabulary) == {"CT": ["liver", "spleen"], "endoscopy": ["polyp"]}


def test_in_a_list_paths_start_from_each_datalist(folder, vocabulary, frames):
    volumes = save(folder, datalist(entry()))
    together = read_datalist([volumes, frames], section="training", vocabulary=vocabulary, dataset_dir=folder)
    assert together[1]["image"] == str(frames.parent / "f.png")
    (alone,) = read_datalist([frames], section="training", vocabulary=vocabulary, dataset_dir=folder)
    assert alone["image"] == str(frames.parent / "f.png")


def test_a_case_name_is_used_once_over_all_lists(folder, vocabulary, frames):
    volumes = save(folder, datalist(entry(), test=[entry(case="f")]))
    with pytest.raises(InputError) as caught:
        read_datalist([volumes, frames], section="training", vocabulary=vocabulary)
    assert f"{frames}: case 'f' is in {volumes} too; give each case a name of its own" in str(caught.value)
    with pytest.raises(InputError, match=r"case 'f' is in .* too"):
        read_datalist([frames, frames], section="training", vocabulary=vocabulary)


def test_a_patient_of_one_set_is_none_of_another(folder, vocabulary, frames):
    """Owners number their patients from 1, each anew."""
    volumes = save(folder, datalist(entry(), validation=[entry(case="b", patient="f")]))
    cases = read_datalist([volumes, frames], section=["training", "validation"], vocabulary=vocabulary)
    assert [case["case"] for case in cases if case["patient"] == "f"] == ["b", "f"]


def test_each_list_needs_the_section(folder, vocabulary, frames):
    volumes = save(folder, datalist(entry()))
    with pytest.raises(InputError) as caught:
        read_datalist([frames, volumes], section="validation", vocabulary=vocabulary)
    assert f"{volumes} has no section 'validation'" in str(caught.value)


def test_an_empty_list_of_datalists(vocabulary):
    with pytest.raises(InputError, match="The list of datalists is empty; name at least one"):
        read_datalist([], section="training", vocabulary=vocabulary)


def test_datalists_are_named_by_their_folders(folder, frames, monkeypatch):
    monkeypatch.chdir(folder)
    assert folder_names("datalist.json") == folder.name
    assert folder_names(["datalist.json", frames]) == f"{folder.name}, {frames.parent.name}"


# Pairs without a datalist


@pytest.fixture
def pair(folder):
    (folder / "a.nii.gz").write_bytes(b"not read")
    return {"image": str(folder / "a.nii.gz"), "label": str(folder / "m.nii.gz")}


def test_a_bare_pair_is_completed(folder, pair):
    assert CompleteCased(class_ids=[4, 1], modality="MR")(pair) == {
        **pair,
        "case": "a",
        "label_map": {1: 1, 4: 4},
        "modality": "MR",
        "annotated": [1, 4],
        "patient": "a",
        "set": folder.name,
        "folder": folder.name,
    }


def test_a_case_of_a_datalist_passes_as_it_is(folder, vocabulary):
    case = read_one(folder, vocabulary)
    assert complete_cases([case], class_ids=[9], modality="xray") == [case]


def test_the_source_of_pairs_is_their_folder(folder, vocabulary, pair):
    bare = complete_cases([pair, pair], class_ids=[1], modality="CT")
    assert source_names(bare, "elsewhere/datalist.json") == folder.name
    assert source_names([read_one(folder, vocabulary)], "elsewhere/datalist.json") == "elsewhere"


def test_a_pair_whose_image_is_missing_is_refused(folder):
    with pytest.raises(InputError, match="no such file"):
        CompleteCased(class_ids=[1], modality="CT")({"image": str(folder / "gone.nii.gz"), "label": ""})


# Paths


def test_relative_paths_start_from_the_datalist_whatever_the_working_directory(folder, vocabulary, monkeypatch):
    save(folder, datalist(entry()))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    (case,) = read_datalist("../datalist.json", section="training", vocabulary=vocabulary)
    assert case["image"] == str(folder / "a.nii.gz")


def test_dataset_dir_replaces_the_folder_of_the_datalist(folder, vocabulary, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("lists"), datalist(entry()))
    (case,) = read_datalist(path, section="training", vocabulary=vocabulary, dataset_dir=folder)
    assert case["image"] == str(folder / "a.nii.gz")
    assert case["label"] == str(folder / "m.nii.gz")


def test_absolute_paths_stay(folder, vocabulary, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    fields = entry(image=str(folder / "a.nii.gz"), label=str(folder / "m.nii.gz"))
    path = save(elsewhere, datalist(fields))
    (case,) = read_datalist(path, section="training", vocabulary=vocabulary, dataset_dir=elsewhere)
    assert case["image"] == str(folder / "a.nii.gz")
    assert case["label"] == str(folder / "m.nii.gz")


# Sections


@pytest.mark.parametrize(
    ("section", "cases"),
    [
        ("training", ["a", "b"]),
        (["validation"], ["c"]),
        (["validation", "training"], ["c", "a", "b"]),
        (["validation", "validation"], ["c"]),
    ],
)
def test_sections_in_the_order_asked_for(folder, vocabulary, section, cases):
    path = save(folder, datalist(entry(), entry(case="b"), validation=[entry(case="c")], test=[]))
    assert [case["case"] for case in read_datalist(path, section=section, vocabulary=vocabulary)] == cases


def test_files_of_other_sections_may_be_absent(folder, vocabulary):
    path = save(folder, datalist(entry(), test=[entry(case="t", image="absent.png")]))
    assert len(read_datalist(path, section="training", vocabulary=vocabulary)) == 1


def test_missing_section_lists_those_there_are(folder, vocabulary):
    content = datalist(entry(), validation=[])
    message = "has no section 'testing' (a list of cases). Sections there are: 'training', 'validation'."
    fails(folder, vocabulary, content, message, section="testing")


def test_what_is_no_list_is_no_section(folder, vocabulary):
    fails(folder, vocabulary, {"name": "x"}, "no section 'name' (a list of cases). Sections there are: none.", "name")


def test_empty_section(folder, vocabulary):
    content = datalist(entry(), validation=[])
    fails(folder, vocabulary, content, "section 'validation' is empty", section=["training", "validation"])


def test_case_twice_in_one_section(folder, vocabulary):
    fails(folder, vocabulary, datalist(entry(), entry()), "case 'a' is in 'training' and again in 'training'")


def test_case_twice_across_sections_even_when_one_is_not_read(folder, vocabulary):
    content = datalist(entry(), test=[entry()])
    fails(folder, vocabulary, content, "case 'a' is in 'training' and again in 'test'")


def test_patient_in_two_sections_is_refused_without_naming_the_patient(folder, vocabulary):
    content = datalist(entry(patient="MUSTERMANN"), test=[entry(case="b", patient="MUSTERMANN")])
    path = save(folder, content)
    with pytest.raises(InputError) as caught:
        read_datalist(path, section="training", vocabulary=vocabulary)
    assert "cases 'a' in 'training' and 'b' in 'test' are of the same patient" in str(caught.value)
    assert "MUSTERMANN" not in str(caught.value)


def test_patient_given_as_number_and_as_text_is_one(folder, vocabulary):
    content = datalist(entry(patient=3), test=[entry(case="b", patient="3")])
    fails(folder, vocabulary, content, "are of the same patient")


def test_patient_may_have_several_cases_in_one_section(folder, vocabulary):
    path = save(folder, datalist(entry(patient="p"), entry(case="b", patient="p")))
    assert len(read_datalist(path, section="training", vocabulary=vocabulary)) == 2


# The file


def test_missing_file(folder, vocabulary):
    with pytest.raises(InputError, match=r"The datalist .*absent\.json cannot be read: No such file"):
        read_datalist(folder / "absent.json", section="training", vocabulary=vocabulary)


@pytest.mark.parametrize("content", [b"{'training': []}", b"", b"\xff\xfe", b'{"training": [],}'])
def test_not_json(folder, vocabulary, content):
    path = folder / "datalist.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"The datalist .*datalist\.json is not valid JSON: "):
        read_datalist(path, section="training", vocabulary=vocabulary)


def test_key_given_twice(folder, vocabulary):
    path = folder / "datalist.json"
    path.write_text('{"label_map": {"1": "liver", "1": "spleen"}, "training": []}')
    with pytest.raises(InputError, match="is not valid JSON: the key '1' is given twice"):
        read_datalist(path, section="training", vocabulary=vocabulary)


def test_list_at_the_top(folder, vocabulary):
    fails(folder, vocabulary, [entry()], "must be a JSON object with sections, but a list came")


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (["liver"], "'label_map' must map file values to class names, but a list came"),
        ({"0": "liver"}, "'label_map' has the file value '0'"),
        ({"-1": "liver"}, "'label_map' has the file value '-1'"),
        ({"1.0": "liver"}, "'label_map' has the file value '1.0'"),
        ({"liver": 1}, "'label_map' has the file value 'liver'"),
        ({"1": "liver", "01": "spleen"}, "'label_map' has the file value '01'"),
        ({"1": "livr"}, "'label_map' value 1: Class 'livr' is unknown. Did you mean 'liver'?"),
        ({"1": ["liver"]}, "'label_map' value 1: A class is asked for by name or id, but ['liver'] came"),
    ],
)
def test_broken_label_map(folder, vocabulary, label_map, message):
    fails(folder, vocabulary, datalist(entry()) | {"label_map": label_map}, message)


# Entries


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image": "absent.nii.gz"},
            "'image' names {folder}/absent.nii.gz, which is missing; relative paths start from",
        ),
        ({"label": "absent.nii.gz"}, "'label' names {folder}/absent.nii.gz, which is missing"),
        (
            {"image": ["s0.png", "absent.png"], "label": ["m0.png", "m1.png"]},
            "'image' names {folder}/absent.png, which is missing",
        ),
        ({"label": {"liver": "absent.png"}}, "'label of liver' names {folder}/absent.png, which is missing"),
        ({"image": ""}, "'image' must name files, but '' came"),
        ({"image": [1]}, "'image' must name files, but 1 came"),
        ({"image": []}, "'image' must be a file or a list of files, but [] came"),
        ({"image": {"a.nii.gz": 1}}, "'image' must be a file or a list of files, but {{'a.nii.gz': 1}} came"),
        ({"image": None}, "'image' must be a file or a list of files, but None came"),
        ({"label": None}, "'label' must be a file or a list of files, but None came"),
        ({"label": {}}, "'label' is empty"),
        ({"label": ["m0.png"]}, "'label' must be parallel to 'image': expected one file, but a list of 1 came"),
        (
            {"image": ["s0.png", "s1.png"]},
            "'label' must be parallel to 'image': expected a list of 2, but one file came",
        ),
        (
            {"image": ["s0.png", "s1.png"], "label": ["m0.png"]},
            "'label' must be parallel to 'image': expected a list of 2, but a list of 1 came",
        ),
        (
            {"image": ["s0.png", "s1.png"], "label": {"liver": ["m0.png"]}},
            "'label of liver' must be parallel to 'image': expected a list of 2, but a list of 1 came",
        ),
        ({"label": {"gall bladder": "m0.png"}}, "Class 'gall bladder' is unknown. Known classes: 1 liver"),
        ({"label": {"liver": "m0.png", "Hepar": "m1.png"}}, "'label' names the class 'Hepar' twice"),
        ({"modality": "PT"}, "Modality 'PT' is unknown. Choose one of CT, MR, endoscopy, dermoscopy, xray, fundus"),
        (
            {"modality": None},
            "'modality' must be one of CT, MR, endoscopy, dermoscopy, xray, fundus, ultrasound, micro",
        ),
        ({"classes": ["livr"]}, "Class 'livr' is unknown. Did you mean 'liver'?"),
        ({"classes": ["liver", "polyp"]}, "'classes' names polyp, but the label shows liver, spleen"),
        ({"classes": ["liver", "polyp"], "label": {"liver": "m0.png"}}, "'classes' names polyp, but the label shows"),
        ({"classes": []}, "'classes' must be a list of class names, but [] came"),
        ({"classes": "liver"}, "'classes' must be a list of class names, but 'liver' came"),
        ({"clases": ["liver"]}, "unknown keys ['clases']; an entry has case, image, label, modality, classes, patient"),
        (
            {"label": {"polyp": "m0.png"}},
            "the class 'polyp' cannot occur in CT, only in endoscopy; correct 'modality', or name in 'classes'",
        ),
        (
            {"regions": ["head"]},
            "the class 'liver' belongs to the region 'abdomen', which is neither among 'regions' (head) nor next to",
        ),
        ({"regions": ["belly"]}, "Region 'belly' is unknown. Choose among head, eye, neck, thorax"),
        ({"regions": []}, "'regions' must be a list of regions, but [] came"),
        ({"regions": "abdomen"}, "'regions' must be a list of regions, but 'abdomen' came"),
        ({"counts": None}, "'counts' must be {{'slices': number, 'voxels': {{class: number}}}}, but None came"),
        ({"counts": {"slices": 3}}, "'counts' must be {{'slices': number, 'voxels': {{class: number}}}}, but"),
        ({"counts": {"slices": 3, "voxels": []}}, "'counts' must be {{'slices': number, 'voxels': {{class: number}}}}"),
        ({"counts": {"slices": 3, "voxels": {"livr": 1}}}, "Class 'livr' is unknown. Did you mean 'liver'?"),
        (
            {"counts": {"slices": 3, "voxels": {"liver": 1}}},
            "'counts' must give the voxels of each annotated class once, and of no class that the label does not show "
            "(liver, spleen), but has liver",
        ),
        (
            {"counts": {"slices": 3, "voxels": {"liver": 1, "spleen": 2, "polyp": 3}}},
            "'counts' must give the voxels of each annotated class once",
        ),
        (
            {"counts": {"slices": 3, "voxels": {"liver": 1, "hepar": 1, "spleen": 2}}},
            "'counts' must give the voxels of each annotated class once",
        ),
        ({"counts": {"slices": 0, "voxels": {"liver": 1, "spleen": 2}}}, "'counts' must be whole numbers, of slices"),
        ({"counts": {"slices": 3, "voxels": {"liver": -1, "spleen": 2}}}, "'counts' must be whole numbers, of slices"),
        ({"counts": {"slices": 3, "voxels": {"liver": 1.5, "spleen": 2}}}, "'counts' must be whole numbers, of slices"),
        ({"counts": {"slices": True, "voxels": {"liver": 1, "spleen": 2}}}, "'counts' must be whole numbers, of slice"),
        ({"patient": ""}, "'patient' must be a text (not an empty one) or a whole number, but a str came"),
        ({"patient": True}, "'patient' must be a text (not an empty one) or a whole number, but a bool came"),
        ({"patient": None}, "'patient' must be a text (not an empty one) or a whole number, but a NoneType came"),
    ],
)
def test_broken_entry_is_named(folder, vocabulary, fields, message):
    content = datalist(entry(case="fine"), entry(**fields))
    expected = f"training[1] (case 'a'): {message.format(folder=folder)}"
    fails(folder, vocabulary, content, expected)


@pytest.mark.parametrize("key", ["image", "modality"])
def test_missing_key(folder, vocabulary, key):
    fails(folder, vocabulary, datalist(without(entry(), key)), f"training[0] (case 'a'): '{key}' must be")


@pytest.mark.parametrize("case", [None, "", " ", ".", "..", "../a", "a/b", "a\\b", "a\0", 3])
def test_case_names_that_cannot_name_a_file(folder, vocabulary, case):
    message = f"training[0]: 'case' must be a name without slashes, but {case!r} came"
    fails(folder, vocabulary, datalist(entry(case=case)), message)


def test_entry_that_is_no_object(folder, vocabulary):
    fails(folder, vocabulary, datalist("a.nii.gz"), "training[0]: an entry is a JSON object, but a str came")


@pytest.mark.parametrize("label_map", [{}, {"label_map": {}}, {"label_map": {"1": None}}])
def test_label_file_without_a_label_map(folder, vocabulary, label_map):
    content = without(datalist(entry()), "label_map") | label_map
    fails(folder, vocabulary, content, "a label-map file needs 'label_map' (file value -> class name)")


def test_classes_without_a_label(folder, vocabulary):
    content = datalist(without(entry(classes=["liver"]), "label"))
    fails(folder, vocabulary, content, "'classes' says what the label shows, but there is no 'label'")


# Writing


def test_what_is_written_is_read(folder, vocabulary):
    write_datalist(datalist(entry()), folder / "written.json")
    assert json.loads((folder / "written.json").read_text(encoding="utf-8")) == datalist(entry())
    assert len(read_datalist(folder / "written.json", section="training", vocabulary=vocabulary)) == 1


def test_bytes_are_stable(folder):
    content = {"name": "Ü", "training": [{"image": "b", "case": "a"}]}
    write_datalist(content, folder / "one.json")
    write_datalist({"training": [{"case": "a", "image": "b"}], "name": "Ü"}, folder / "two.json")
    expected = (
        '{\n  "name": "Ü",\n  "training": [\n    {\n      "case": "a",\n      "image": "b"\n    }\n  ]\n}\n'.encode()
    )
    assert (folder / "one.json").read_bytes() == (folder / "two.json").read_bytes() == expected


def test_nothing_half_written_is_left(tmp_path):
    path = tmp_path / "datalist.json"
    write_datalist({"training": []}, path)
    with pytest.raises(TypeError):
        write_datalist({"training": [{1, 2}]}, path)
    assert os.listdir(tmp_path) == ["datalist.json"]
    assert json.loads(path.read_text()) == {"training": []}


def test_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"datalist\.json"):
        write_datalist({}, tmp_path / "absent" / "datalist.json")


# What a model is trained for


def test_trained_classes_by_modality_in_id_order(vocabulary):
    cases = [
        {"modality": "endoscopy", "annotated": [POLYP]},
        {"modality": "CT", "annotated": [LEFT_KIDNEY]},
        {"modality": "CT", "annotated": [LIVER, LEFT_KIDNEY]},
        {"modality": "MR", "annotated": []},
    ]
    trained = trained_classes(cases, vocabulary)
    assert trained == {"CT": ["liver", "left kidney"], "endoscopy": ["polyp"]}
    assert list(trained) == ["CT", "endoscopy"]


def test_trained_classes_of_nothing(vocabulary):
    assert trained_classes([], vocabulary) == {}


# Real files


@pytest.mark.parametrize(("split", "count"), [("train", 19), ("validation", 6), ("test", 9)])
def test_real_chest_radiographs_with_missing_masks(shared, tmp_path, vocabulary, split, count):
    """Every mask file of the split is found again, and a class without a file is not annotated."""
    source = shared / "data" / "covid_chest_xray"
    with (source / "split.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    folders = sorted(path for path in (source / "masks").iterdir() if path.is_dir())
    entries = [
        {
            "case": row["case"],
            "image": f"images/{row['case']}.png",
            "label": {
                path.name: f"masks/{path.name}/{row['case']}.png"
                for path in folders
                if (path / f"{row['case']}.png").exists()
            },
            "modality": "xray",
            "patient": row["patient"],
        }
        for row in rows
    ]
    write_datalist({split: entries}, tmp_path / "datalist.json")
    cases = read_datalist(tmp_path / "datalist.json", section=split, vocabulary=vocabulary, dataset_dir=source)
    assert len(cases) == count
    found = sum(len(case["annotated"]) for case in cases)
    assert found == sum((path / f"{row['case']}.png").exists() for path in folders for row in rows) > 0
    assert set(trained_classes(cases, vocabulary)["xray"]) <= {"right lung", "left lung", "cardiomediastinum"}
