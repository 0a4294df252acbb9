"""The Decathlon's dataset.json: what it lists, what its names mean, and what it leaves out."""

import json
from pathlib import Path

import pytest

from scripts.data.converters.decathlon import find_decathlon_cases
from scripts.errors import ConfigError, InputError

# Names of images, channels and labels of the ten tasks, as their dataset.json have them (http://medicaldecathlon.com).
BRAIN = {"1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
FOUR = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
TASKS = [
    ("BRATS", FOUR, BRAIN, "MR", {1: "brain tumour", 2: "brain tumour", 3: "brain tumour"}),
    ("Liver", {"0": "CT"}, {"1": "liver", "2": "cancer"}, "CT", {1: "liver", 2: "liver"}),
    ("Pancreas", {"0": "CT"}, {"1": "pancreas", "2": "cancer"}, "CT", {1: "pancreas", 2: "pancreas"}),
    ("Spleen", {"0": "CT"}, {"1": "spleen"}, "CT", {1: "spleen"}),
    ("Mine", {"0": "MRI"}, {"1": "Left_Kidney", "2": "cancer"}, "MR", {1: "left kidney", 2: None}),
]
UNKNOWN = [
    ("LeftAtrium", {"0": "MRI"}, {"1": "left atrium"}),
    ("Hippocampus", {"0": "MRI"}, {"1": "Anterior", "2": "Posterior"}),
    ("Prostate", {"0": "T2", "1": "ADC"}, {"1": "PZ", "2": "TZ"}),
    ("Lung", {"0": "CT"}, {"1": "cancer"}),
    ("HepaticVessel", {"0": "CT"}, {"1": "Vessel", "2": "Tumour"}),
    ("Colon", {"0": "CT"}, {"1": "colon cancer primaries"}),
]


def entry(name):
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


def task(root: Path, *names, files=None, **changes) -> Path:
    """A task's folder with empty files."""
    table = {"name": "Liver", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "cancer"}}
    table |= {"training": [entry(name) for name in names], "test": ["./imagesTs/liver_7.nii.gz"], **changes}
    for name in names if files is None else files:
        for path in entry(name).values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
    (root / "dataset.json").write_text(json.dumps(table))
    return root


@pytest.mark.parametrize(("name", "channels", "labels", "modality", "meanings"), TASKS)
def test_names_of_the_tasks_are_understood(tmp_path, vocabulary, name, channels, labels, modality, meanings):
    source = task(tmp_path, "a", name=name, modality=channels, labels={"0": "background", **labels})
    found = find_decathlon_cases(source, vocabulary=vocabulary)
    assert found.label_map == meanings
    assert found.cases[0].modality == modality
    assert found.channel == (0 if len(channels) > 1 else None)


@pytest.mark.parametrize(("name", "channels", "labels"), UNKNOWN)
def test_tasks_without_a_known_class_ask_for_one(tmp_path, vocabulary, name, channels, labels):
    source = task(tmp_path, "a", name=name, modality=channels, labels={"0": "background", **labels})
    with pytest.raises(InputError, match=r"none of its labels, background, .*--label-map 1=liver"):
        find_decathlon_cases(source, vocabulary=vocabulary)


def test_named_values_are_taken_and_the_others_are_none(tmp_path, vocabulary):
    source = task(tmp_path, "a", labels={"0": "background", "1": "Vessel", "2": "Tumour"})
    found = find_decathlon_cases(source, vocabulary=vocabulary, label_map={2: "liver"})
    assert found.label_map == {1: None, 2: "liver"}


@pytest.mark.parametrize(
    ("sequence", "channel"), [(None, 0), ("flair", 0), ("t1", 1), ("T1CE", 2), ("t1gd", 2), ("T2w", 3), ("t2", 3)]
)
def test_a_sequence_is_a_channel(tmp_path, vocabulary, sequence, channel):
    source = task(tmp_path, "a", name="BRATS", modality=FOUR, labels=BRAIN)
    found = find_decathlon_cases(source, vocabulary=vocabulary, sequence=sequence)
    assert found.channel == channel
    assert found.source == {"layout": "msd", **({"sequence": sequence} if sequence else {})}


def test_channels_are_in_the_order_of_their_numbers(tmp_path, vocabulary):
    source = task(tmp_path, "a", name="BRATS", modality=dict(reversed(FOUR.items())), labels=BRAIN)
    assert find_decathlon_cases(source, vocabulary=vocabulary, sequence="t1ce").channel == 2


def test_a_sequence_that_is_not_there_is_refused(tmp_path, vocabulary):
    source = task(tmp_path / "brain", "a", name="BRATS", modality=FOUR, labels=BRAIN)
    with pytest.raises(ConfigError, match="--sequence is one of FLAIR, T1w, t1gd, T2w, not 'adc'"):
        find_decathlon_cases(source, vocabulary=vocabulary, sequence="adc")
    with pytest.raises(ConfigError, match="these have one, CT"):
        find_decathlon_cases(task(tmp_path / "liver", "a"), vocabulary=vocabulary, sequence="flair")


def test_every_file_is_a_case_or_a_line(tmp_path, vocabulary):
    names = [f"liver_{number}" for number in (10, 2, 3)]
    source = task(tmp_path, *names, files=["liver_10", "liver_2", "liver_99"])
    (source / "labelsTr/liver_2.nii.gz").unlink()
    (source / "imagesTr/._liver_10.nii.gz").touch()
    found = find_decathlon_cases(source, vocabulary=vocabulary)
    assert [(case.name, case.patient, case.section) for case in found.cases] == [("liver_10", "liver_10", None)]
    assert Path(found.cases[0].image) == source / "imagesTr/liver_10.nii.gz"
    assert Path(found.cases[0].label) == source / "labelsTr/liver_10.nii.gz"
    not_listed = "dataset.json does not list it for training"
    assert dict(found.skipped) == {
        "imagesTr/liver_2.nii.gz": "dataset.json lists labelsTr/liver_2.nii.gz, which is missing",
        "imagesTr/liver_3.nii.gz": "dataset.json lists imagesTr/liver_3.nii.gz, which is missing",
        "imagesTs/liver_7.nii.gz": "no label is published",
        "imagesTr/liver_99.nii.gz": not_listed,
        "labelsTr/liver_99.nii.gz": not_listed,
    }


@pytest.mark.parametrize("test", [[{"image": "./imagesTs/liver_7.nii.gz"}], ["imagesTs/liver_7.nii.gz"]])
def test_test_images_are_listed_in_either_way(tmp_path, vocabulary, test):
    found = find_decathlon_cases(task(tmp_path, "a", test=test), vocabulary=vocabulary)
    assert found.skipped == (("imagesTs/liver_7.nii.gz", "no label is published"),)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"modality": None}, "keys modality, labels and training.*modality"),
        ({"modality": {}}, "keys modality, labels and training.*modality"),
        ({"modality": {"0": "PET"}}, r"names the modality \['PET'\].*unknown"),
        ({"labels": ["background", "liver"]}, "another thing under labels"),
        (
            {"labels": {"liver": 1}},
            "whole numbers as keys of 'labels', got liver",
        ),  # the order of nnU-Net's second format
        ({"training": {}}, "another thing under training"),
        ({"training": ["./imagesTr/a.nii.gz"]}, "entries of 'training' with the keys image and label"),
        ({"training": [{"image": "a"}]}, "entries of 'training' with the keys image and label"),
        ({"training": []}, "lists no case whose files are there"),
        ({"training": [entry("lost")]}, "lists no case whose files are there"),
        ({"training": [entry("a"), entry("a")]}, "lists imagesTr/a.nii.gz twice"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, vocabulary, changes, text):
    with pytest.raises(InputError, match=text):
        find_decathlon_cases(task(tmp_path, "a", **changes), vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("content", "text"), [(None, "expected the task's dataset.json"), (b"{", "valid JSON"), (b"[]", "modality, labels")]
)
def test_a_file_that_is_no_table_is_refused(tmp_path, vocabulary, content, text):
    if content is not None:
        (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(InputError, match=text):
        find_decathlon_cases(tmp_path, vocabulary=vocabulary)
