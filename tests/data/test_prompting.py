"""Which classes an image is asked for."""

import logging

import pytest

from scripts.data.prompting import ChooseClassesd
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
        transform = ChooseClassesd(vocabulary, trained=trained, classes=classes, force=force)
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
    ChooseClassesd(vocabulary, trained=TRAINED)(data)
    assert data == {"case": "a", "modality": "MRI"}


@pytest.mark.parametrize(("classes", "modality"), [("liver", "CT"), ("spleen, left kidney", "MR"), ("lung", "xray")])
@pytest.mark.parametrize("given", [{"modality": None}, {}])
def test_classes_of_one_modality_tell_which_it_is(vocabulary, classes, modality, given, caplog):
    with caplog.at_level(logging.INFO, "scripts"):
        case = ChooseClassesd(vocabulary, trained=TRAINED, classes=classes)(given)
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
