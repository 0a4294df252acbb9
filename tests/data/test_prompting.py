"""Which classes an image is asked for."""

import logging

import pytest
import torch

from scripts.data.prompting import ChoosePromptsd
from scripts.data.vocabulary import Vocabulary
from scripts.errors import PromptError

TRAINED = {"CT": ["liver", "spleen", "pancreas"], "MR": ["spleen", "left kidney"], "xray": ["lung"]}


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture
def ask(vocabulary):
    """Ask for classes in an image of a modality."""

    def ask(classes, modality, *, trained=TRAINED, force=False):
        transform = ChoosePromptsd(vocabulary, trained=trained, classes=classes, force=force)
        return transform({"case": "a", "modality": modality})

    return ask


@pytest.mark.parametrize("classes", [None, "", []])
@pytest.mark.parametrize(("modality", "expected"), [("CT", [1, 2, 3]), ("MR", [2, 4]), ("xray", [15])])
def test_without_a_prompt_every_class_of_the_modality_is_asked_for(ask, classes, modality, expected):
    assert ask(classes, modality)["class_ids"] == expected


@pytest.mark.parametrize("classes", ["pancreas,liver", ["pancreas", "hepar"], [3, 1], "3, 1", ("Pancreas", 1, "1")])
def test_prompts_become_ascending_ids_each_once(ask, classes):
    assert ask(classes, "CT")["class_ids"] == [1, 3]


def test_one_id_is_a_prompt(ask):
    assert ask(2, "MR")["class_ids"] == [2]


@pytest.mark.parametrize(("given", "canonical"), [("MRI", "MR"), ("ct", "CT"), ("DX", "xray")])
def test_the_modality_gets_its_canonical_name(ask, given, canonical):
    assert ask(None, given)["modality"] == canonical


def test_the_case_that_came_in_stays_as_it_is(vocabulary):
    data = {"case": "a", "modality": "MRI"}
    ChoosePromptsd(vocabulary, trained=TRAINED)(data)
    assert data == {"case": "a", "modality": "MRI"}


@pytest.mark.parametrize(("classes", "modality"), [("liver", "CT"), ("spleen, left kidney", "MR"), ("lung", "xray")])
@pytest.mark.parametrize("given", [{"modality": None}, {}])
def test_classes_of_one_modality_tell_which_it_is(vocabulary, classes, modality, given, caplog):
    with caplog.at_level(logging.INFO, "scripts"):
        case = ChoosePromptsd(vocabulary, trained=TRAINED, classes=classes)(given)
    assert case["modality"] == modality
    assert f"modality not given; taken as {modality}" in caplog.text


def test_the_record_of_trained_classes_may_use_synonyms(ask):
    case = ask("liver", None, trained={"magnetic resonance": ["hepar"], "CT": ["spleen"]})
    assert (case["modality"], case["class_ids"]) == ("MR", [1])


def test_classes_of_two_modalities_do_not_tell_which_it_is(ask):
    with pytest.raises(PromptError, match="modality is unknown: give --modality, one of CT, MR"):
        ask("spleen", None)


def test_classes_that_share_no_modality_leave_every_choice(ask):
    with pytest.raises(PromptError, match="one of CT, MR, endoscopy, dermoscopy, xray"):
        ask("liver, lung", None)


def test_neither_class_nor_modality_is_too_little(ask):
    with pytest.raises(PromptError, match="no class was asked for: give --modality"):
        ask(None, None)


@pytest.mark.parametrize(
    ("classes", "modality", "reason"),
    [
        ("livr", "CT", "Did you mean 'liver'"),
        ("lung", "CT", "not trained for 'lung' in CT"),
        ("liver", "sonar", "Modality 'sonar' is unknown"),
        (None, "endoscopy", "not trained on endoscopy"),
    ],
)
def test_what_is_not_known_is_refused(ask, classes, modality, reason):
    with pytest.raises(PromptError, match=reason):
        ask(classes, modality)


def test_force_asks_for_what_was_not_trained_in_the_modality(ask):
    assert ask("lung", "CT", force=True)["class_ids"] == [15]


def test_force_does_not_make_up_a_modality(ask):
    with pytest.raises(PromptError, match="give --modality"):
        ask("polyp", None, force=True)


IMAGE = torch.zeros(1, 20, 10, 3)  # (C, X, Y, Z)
BOX = [1, 2, 0, 5, 6, 2]


@pytest.fixture
def point_at(vocabulary):
    """Ask by boxes and points in a CT of 20 x 10 x 3 voxels."""

    def point_at(*, request=None, boxes_trained=True, **given):
        transform = ChoosePromptsd(vocabulary, trained=TRAINED, boxes_trained=boxes_trained, **given)
        return transform({"case": "a", "modality": "CT", "image": IMAGE, **(request or {})})

    return point_at


def test_a_box_alone_asks_for_no_class(point_at):
    case = point_at(boxes=[BOX])
    assert case["named_ids"] == []
    assert case["class_ids"] == [201]
    assert [object_id for object_id, _ in case["prompted_objects"]] == [201]


def test_objects_get_the_id_of_their_name_or_the_next_free_one(point_at):
    boxes = [{"box": BOX, "name": "spleen"}, {"box": BOX}]
    points = [{"points": [[1, 1, 1]]}, {"points": [[2, 2, 2]], "name": 1}]
    case = point_at(boxes=boxes, points=points, classes="pancreas")
    assert [object_id for object_id, _ in case["prompted_objects"]] == [2, 201, 202, 1]
    assert case["named_ids"] == [3]
    assert case["class_ids"] == [1, 2, 3, 201, 202]


def test_a_class_that_was_not_trained_may_be_pointed_at(point_at):
    """Its name is a label alone: SAM's prompt encoder knows no classes."""
    assert point_at(boxes=[{"box": BOX, "name": "polyp"}])["class_ids"] == [6]


def test_what_a_case_asks_for_goes_before_what_all_are_asked_for(point_at):
    case = point_at(classes="pancreas", request={"label_prompt": [1]})
    assert case["class_ids"] == [1]
    assert point_at(classes="pancreas", request={"label_prompt": []})["class_ids"] == [3]


def test_boxes_are_of_one_image(vocabulary):
    transform = ChoosePromptsd(vocabulary, trained=TRAINED, boxes=[BOX], boxes_trained=True)
    case = {"case": "a", "modality": "CT", "image": IMAGE}
    assert transform(case)["class_ids"] == transform(case)["class_ids"] == [201]
    with pytest.raises(PromptError, match="boxes and points are of one image, and were used for a"):
        transform({**case, "case": "b"})


def test_a_model_that_has_learned_no_boxes_says_so(point_at):
    with pytest.raises(PromptError, match="This model has learned classes, not boxes and points"):
        point_at(boxes=[BOX], boxes_trained=False)
    assert point_at(boxes=[BOX], boxes_trained=False, force=True)["class_ids"] == [201]
    assert point_at(classes="liver", boxes_trained=False)["class_ids"] == [1]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"boxes": [[1, 2, 0, 25, 6, 2]]}, r"boxes\[0\] lies outside of the image: x is 25, and goes from 0 to 19"),
        ({"points": [{"points": [[1, 1]]}]}, r"points\[0\] has x and y alone, and the image has 3 slices"),
        ({"boxes": [{"box": BOX, "name": "livr"}]}, "Class 'livr' is unknown. Did you mean 'liver'"),
        ({"boxes": [{"box": BOX, "name": 201}]}, "Class id 201 is unknown"),
        ({"boxes": [BOX] * 55}, "At most 54 objects without a name"),
        ({"boxes": [BOX], "request": {"modality": "CTA"}}, "Modality 'CTA' is unknown"),
        ({"boxes": [BOX], "request": {"modality": None}}, "The image's modality is unknown: give --modality"),
    ],
)
def test_what_cannot_be_pointed_at_gets_a_sentence(point_at, given, sentence):
    with pytest.raises(PromptError, match=sentence):
        point_at(**given)
