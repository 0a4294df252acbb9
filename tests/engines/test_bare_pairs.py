"""Training on bare pairs of an image and a label map, as MONAI Label hands them over, is that of a datalist."""

import json

import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.workflow import NETWORK_OVERLAYS


@pytest.fixture
def pairs(tiny_phantoms):
    """What the datalist of the phantoms names, by section, and nothing besides."""
    folder, content = tiny_phantoms.parent, json.loads(tiny_phantoms.read_text())
    return {
        section: [{name: str(folder / case[name]) for name in ("image", "label")} for case in content[section]]
        for section in ("training", "validation")
    }


@pytest.fixture
def prepare(bundle_root, tiny_phantoms, tmp_path):
    """Set up training of a network, by the datalist unless pairs are given."""

    def prepare(network, **overrides):
        configs = [str(bundle_root / "configs" / name) for name in ("train.json", *NETWORK_OVERLAYS[network])]
        workflow = ConfigWorkflow(config_file=configs, logging_file=False, bundle_root=str(bundle_root))
        settings = {
            "datalist": str(tiny_phantoms),
            "dataset_dir": str(tiny_phantoms.parent),
            "output_dir": str(tmp_path),
            "image_encoder": "compact",
            "image_size": 32,
            "tensorboard": False,
            "progress_bar": False,
        }
        workflow.parser.update({**settings, **overrides})
        workflow.initialize()
        return workflow.parser.get_parsed_content

    return prepare


@pytest.mark.parametrize("network", NETWORK_OVERLAYS)
def test_pairs_are_learned_from_as_a_datalist_is(prepare, pairs, network):
    expected = prepare(network)("train#dataset")
    found = prepare(network, **{"train#dataset#data": pairs["training"]})("train#dataset")
    assert len(found) == len(expected) > 0
    for index in (0, 7, len(found) - 1):
        sample, other = found[index], expected[index]
        assert sample.keys() == other.keys()
        assert all(torch.equal(sample[name], other[name]) for name in sample)


def test_pairs_are_validated_as_a_datalist_is(prepare, pairs):
    (expected,) = prepare("automedsam")("validate#dataset")
    (found,) = prepare("automedsam", **{"validate#dataset#data": pairs["validation"]})("validate#dataset")
    assert {name: found[name] for name in ("case", "modality", "annotated")} == {
        name: expected[name] for name in ("case", "modality", "annotated")
    }
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(found["label"], expected["label"])


def test_the_card_names_the_folder_of_the_pairs(prepare, pairs, tiny_phantoms):
    card = prepare("automedsam", datalist="elsewhere/datalist.json", **{"train#dataset#data": pairs["training"]})(
        "card"
    )
    assert card.training["datalist"] == "images"
    assert card.trained == {"CT": ["liver", "spleen", "pancreas", "left kidney", "right kidney"]}
    assert prepare("automedsam")("card").training["datalist"] == tiny_phantoms.parent.name


def test_the_modality_of_pairs_is_a_setting(prepare, pairs):
    card = prepare("automedsam", modality="MR", **{"train#dataset#data": pairs["training"]})("card")
    assert list(card.trained) == ["MR"]
