"""Images handed over in memory become what the bundle's reader makes of files."""

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Identityd

from scripts.data.guard import Guardd
from scripts.data.handed import AdoptImaged, bundle_folder, with_handed_images
from scripts.data.vocabulary import Vocabulary
from scripts.errors import InputError, PromptError

AFFINE = np.array([[0, -2.0, 0, 5], [-1.0, 0, 0, 7], [0, 0, 3.0, -9], [0, 0, 0, 1]])
CT = {"CT": ["liver"]}


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


def image(shape=(4, 5, 6), **meta):
    values = torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape)
    return MetaTensor(values, affine=torch.from_numpy(AFFINE), meta={"original_affine": AFFINE, **meta})


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 5, 6), "no_channel"), ((1, 4, 5, 6), 0), ((4, 5, 6, 1), -1), ((4, 5, 6, 1), "3")]
)
def test_channels_come_first_and_the_place_stays(vocabulary, shape, axis):
    given = image(shape, original_channel_dim=axis)
    case = AdoptImaged("image", vocabulary=vocabulary, trained=CT)({"image": given})
    found = case["image"]
    assert found.shape == (1, 4, 5, 6)
    assert found.dtype == torch.float32
    assert torch.equal(found.as_tensor().flatten(), torch.arange(120.0))
    np.testing.assert_array_equal(found.affine, AFFINE)
    assert "original_channel_dim" not in found.meta  # it is no longer so
    assert given.meta["original_channel_dim"] == axis
    assert case["case"] == "image"


def test_channels_that_nothing_is_said_about_are_the_first_axis(vocabulary):
    adopt = AdoptImaged("image", vocabulary=vocabulary, trained=CT)
    once = adopt({"image": image((3, 4, 5, 6))})
    again = adopt(once)
    assert once["image"].shape == again["image"].shape == (3, 4, 5, 6)


@pytest.mark.parametrize(
    ("meta", "modality", "trained", "expected"),
    [
        ({"Modality": "MR"}, None, CT, "MR"),
        ({"modality": "xray"}, None, CT, "xray"),
        ({"Modality": "CT"}, "MR", CT, "MR"),
        ({"Modality": "OT"}, "MR", CT, "MR"),
        ({}, None, CT, "CT"),
        ({}, None, {**CT, "MR": ["liver"]}, None),
    ],
)
def test_the_modality_is_the_settings_the_images_or_the_only_one(vocabulary, meta, modality, trained, expected):
    adopt = AdoptImaged("image", vocabulary=vocabulary, trained=trained, modality=modality)
    assert adopt({"image": image(**meta)})["modality"] == expected


def test_what_a_case_brings_itself_stays(vocabulary):
    adopt = AdoptImaged("image", vocabulary=vocabulary, trained=CT)
    case = adopt({"image": image(Modality="MR"), "modality": "CT", "case": "p1"})
    assert (case["modality"], case["case"]) == ("CT", "p1")


def test_a_taken_modality_is_told(vocabulary, caplog):
    with caplog.at_level(logging.INFO):
        AdoptImaged("image", vocabulary=vocabulary, trained=CT)({"image": image()})
    assert "taken as CT" in caplog.text


def test_an_unknown_modality_is_refused(vocabulary):
    with pytest.raises(PromptError, match="'OT' is unknown"):
        AdoptImaged("image", vocabulary=vocabulary, trained=CT)({"image": image(Modality="OT")})


def test_the_guard_hears_of_a_contradiction(vocabulary):
    adopt = AdoptImaged("image", vocabulary=vocabulary, trained=CT, modality="CT")
    with pytest.raises(InputError, match="expected CT, got a file that says it is MR"):
        Guardd("image")(adopt({"image": image(Modality="MR", original_channel_dim="no_channel")}))


@pytest.mark.parametrize(
    "given", [torch.zeros(1, 4, 5, 6), MetaTensor(torch.zeros(1, 4, 5, 6)), np.zeros((1, 4, 5, 6))]
)
def test_an_image_without_its_place_is_refused(vocabulary, given):
    with pytest.raises(InputError, match="expected a tensor with original_affine"):
        AdoptImaged("image", vocabulary=vocabulary, trained=CT)({"image": given})


def test_adoption_comes_first_and_the_config_stays(vocabulary):
    preprocessing = Compose([Identityd("image")])
    found = with_handed_images(preprocessing, vocabulary=vocabulary, trained=CT, modality="MR")
    first, second = found.transforms
    assert isinstance(first, AdoptImaged)
    assert first.modality == "MR"
    assert second is preprocessing.transforms[0]
    assert len(preprocessing.transforms) == 1


def test_the_bundle_is_found_from_anywhere(bundle_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundle_folder() == str(bundle_root)
