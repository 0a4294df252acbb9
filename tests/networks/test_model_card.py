"""The card beside a weights file."""

import dataclasses
import json
from pathlib import Path

import pytest

from scripts.errors import CheckpointError, OutputError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.model_card import ModelCard

NETWORK = {"image_encoder": "compact", "image_size": 32, "class_ids": [1, 2], "channels": [8, 16, 32]}


def card() -> ModelCard:
    return ModelCard(
        network=dict(NETWORK),
        preprocessing={"window": [40.0, 400.0]},
        trained={"CT": ["liver", "spleen"], "MR": ["liver"]},
        training={"datalist": "phantoms", "max_epochs": 3, "seed": 0},
    )


def test_a_card_comes_back_as_it_was_written(tmp_path):
    card().write(tmp_path / "model.json")
    assert ModelCard.beside(tmp_path / "model.pt") == card()


@pytest.mark.parametrize("weights", ["model.pt", "model.safetensors", "model.best.pt"])
def test_the_card_has_the_name_of_the_weights(tmp_path, weights):
    path = tmp_path / weights
    card().write(path.with_suffix(".json"))
    assert ModelCard.beside(path) == card()
    assert ModelCard.beside(str(path)) == card()


def test_the_scores_join_the_training(tmp_path):
    original = card()
    original.write(tmp_path / "model.json", {"val_mean_dsc": 0.5, "seed": 1})
    assert ModelCard.beside(tmp_path / "model.pt").training == {
        "datalist": "phantoms",
        "max_epochs": 3,
        "seed": 1,
        "val_mean_dsc": 0.5,
    }
    assert original == card()


def test_the_file_is_for_people_too(tmp_path):
    card().write(tmp_path / "model.json")
    text = (tmp_path / "model.json").read_text()
    assert json.loads(text) == dataclasses.asdict(card())
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 10


def test_a_card_builds_the_network_that_its_settings_came_from(tmp_path):
    network = AutoMedSAM(**NETWORK, preset="release", diffusion_steps=7)
    ModelCard(network=network.settings, preprocessing={}, trained={}).write(tmp_path / "model.json")
    again = AutoMedSAM(**ModelCard.beside(tmp_path / "model.pt").network)
    assert again.settings == network.settings
    again.load_state_dict(network.state_dict())


def test_writing_again_replaces_the_card(tmp_path):
    card().write(tmp_path / "model.json")
    dataclasses.replace(card(), training={"seed": 5}).write(tmp_path / "model.json")
    assert ModelCard.beside(tmp_path / "model.pt").training == {"seed": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


def test_a_card_that_cannot_be_written_leaves_the_old_one(tmp_path):
    card().write(tmp_path / "model.json")
    with pytest.raises(TypeError):
        dataclasses.replace(card(), training={"where": Path("x")}).write(tmp_path / "model.json")
    assert ModelCard.beside(tmp_path / "model.pt") == card()
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="choose a folder that exists"):
        card().write(tmp_path / "absent" / "model.json")


def test_a_missing_card_is_an_error_that_names_both_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.json is missing beside model\.pt"):
        ModelCard.beside(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"network": {}'])
def test_what_is_not_json_is_refused(tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read as a model card"):
        ModelCard.beside(tmp_path / "model.pt")


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "model.json").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read as a model card"):
        ModelCard.beside(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        "network preprocessing trained training",
        {},
        {"network": {}, "preprocessing": {}, "trained": {}},
        {"network": {}, "trained": {}, "training": {}},
        {"network": [], "preprocessing": {}, "trained": {}, "training": {}},
        {"network": {}, "preprocessing": {}, "trained": ["liver"], "training": {}},
        {"network": {}, "preprocessing": {}, "trained": {}, "training": None},
    ],
    ids=str,
)
def test_what_is_no_card_is_refused(tmp_path, content):
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"model\.json is no model card: .* network, preprocessing, trained, training"
    ):
        ModelCard.beside(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("network", {"image_encoder": "$__import__('os').remove('x')"}),
        ("network", {"class_ids": [1, ["$open('x', 'w')"]]}),
        ("network", {"channels": {"_target_": "os.remove", "path": "x"}}),
        ("network", {"vocabulary#_target_": "os.remove", "vocabulary#path": "x"}),
        ("network", {"vocabulary::_target_": "os.remove"}),
        ("preprocessing", {"window": "%/tmp/other.json::window"}),
        ("preprocessing", {"window": "@network"}),
        ("trained", {"CT": ["$open('x', 'w')"]}),
        ("trained", {"_target_": "os.remove"}),
    ],
)
def test_what_a_config_would_run_is_refused(tmp_path, part, content):
    """Cards come with weights from elsewhere, and become settings of a config."""
    (tmp_path / "model.json").write_text(json.dumps({**dataclasses.asdict(card()), part: content}))
    with pytest.raises(CheckpointError, match=r"model\.json holds an expression"):
        ModelCard.beside(tmp_path / "model.pt")


def test_what_a_later_version_adds_is_no_obstacle(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({**dataclasses.asdict(card()), "more": 1}))
    assert ModelCard.beside(tmp_path / "model.pt") == card()


def test_an_older_card_means_what_was_then_the_only_way(phantom_model):
    """It says nothing of the class code, and its weights have no vectors of classes."""
    card = ModelCard.beside(phantom_model)
    assert "class_code" not in card.network
    assert card.settings["class_code"] == "scalar"
    chosen = {name: card.settings[name] for name in ("smallest_quality", "averaged_orientations", "largest_component")}
    assert chosen == {"smallest_quality": 0.0, "averaged_orientations": {}, "largest_component": False}


def test_what_was_chosen_for_the_answers_is_a_setting(tmp_path):
    chosen = {"smallest_quality": 0.25, "averaged_orientations": {"CT": "mirror"}, "largest_component": True}
    card = ModelCard(network={}, preprocessing={}, trained={}, postprocessing=chosen)
    card.write(tmp_path / "model.json")
    assert ModelCard.beside(tmp_path / "model.pt").settings.items() >= chosen.items()


@pytest.mark.parametrize("content", [3, {"smallest_quality": "$import os"}])
def test_what_is_no_postprocessing_is_refused(tmp_path, content):
    card = {"network": {}, "preprocessing": {}, "trained": {}, "training": {}, "postprocessing": content}
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"postprocessing must be an object|holds an expression"):
        ModelCard.beside(tmp_path / "model.pt")
