"""Make a MONAI Bundle of its own around a trained model: what MONAI Label, MONAI Deploy and `monai.bundle` open."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

from scripts.data.vocabulary import Vocabulary
from scripts.errors import CheckpointError, ConfigError
from scripts.files import atomic_folder, copy_files
from scripts.model_page import PackagedModel, data_terms_of, metadata_of, page_of
from scripts.networks.checkpoints import load_network_weights, read_state_dict, save_state_dict
from scripts.networks.model_card import ModelCard
from scripts.workflow import BUNDLE_ROOT, CONFIGS, NETWORK_OVERLAYS

# What belongs to a bundle of a model; the tables of data preparation and of studies stay with the software.
CONFIG_PATTERNS = (
    *("evaluate.json", "multi_gpu_*.json", "logging.conf", "classes.yaml", "embed.yaml", "weights.yaml", "deploy.yaml"),
    *("networks/*.yaml", "datasets/*.yaml", "experiments/*.yaml"),
)
NO_LARGE_FILES = "# Nothing has to be fetched: the weights are in models/.\nlarge_files: []\n"


def package_model(model: str | Path, folder: str | Path, *, name: str | None = None) -> PackagedModel:
    """Write a whole bundle around a model; it appears at its place when it is complete.

    Args:
        model: its weights file, with its card beside it.
        folder: of the bundle, which must not hold anything yet.
        name: of the bundle in its metadata; the folder's if None.

    Returns:
        What the bundle says of the model.

    Raises:
        CheckpointError: no weights file or card, or weights that are not of the network on the card.
        ConfigError: a card with settings that the configs do not have, or of a class without a name.
        OutputError: the folder holds something, or cannot be written.
    """
    model, folder = Path(model).absolute(), Path(folder).resolve()
    if not model.is_file():
        raise CheckpointError(f"there is no weights file {model}: check the path; training writes model.pt")
    card = ModelCard.beside(model)
    inference, training = configs_of(card)
    network = _network_of(inference, model)
    vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
    classes = {class_id: vocabulary.entry(class_id).name for class_id in network.class_ids}
    described = PackagedModel(name or folder.name, card, network.image_size, classes, inference["window"])
    metadata = metadata_of(described, _read_json(CONFIGS / "metadata.json"))
    with atomic_folder(folder) as temporary:
        copy_files(CONFIGS, CONFIG_PATTERNS, temporary / "configs")
        copy_files(BUNDLE_ROOT / "scripts", ["**/*.py"], temporary / "scripts")
        copy_files(BUNDLE_ROOT, ["LICENSE"], temporary)
        for file, content in {"inference": inference, "train": training, "metadata": metadata}.items():
            text = json.dumps(content, indent=4, ensure_ascii=False)
            (temporary / "configs" / f"{file}.json").write_text(f"{text}\n", encoding="utf-8")
        (temporary / "docs").mkdir()
        (temporary / "docs" / "README.md").write_text(page_of(described, metadata), encoding="utf-8")
        (temporary / "docs" / "data_license.txt").write_text(data_terms_of(described), encoding="utf-8")
        (temporary / "large_files.yml").write_text(NO_LARGE_FILES, encoding="utf-8")
        _save_weights(model, card, temporary / "models")
    return described


def configs_of(card: ModelCard) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give inference.json and train.json with a model's settings as their defaults.

    Args:
        card: of the model.

    Returns:
        The two configs; each builds the network by itself, without an overlay.

    Raises:
        ConfigError: a setting that the configs do not have.
    """
    overlays = [CONFIGS / overlay for overlay in NETWORK_OVERLAYS[card.architecture]]
    base = _read_json(CONFIGS / "inference.json")
    merged = _merged([CONFIGS / "inference.json", *overlays])
    # What an overlay brings for training alone has no place in inference.
    needed = {value[1:] for value in merged["network_def"].values() if isinstance(value, str) and value[:1] == "@"}
    inference = {key: value for key, value in merged.items() if key in base or key in needed}
    inference = _with_settings(inference, {**card.settings, **card.learned})
    training = _with_settings(_merged([CONFIGS / "train.json", *overlays]), card.settings)
    training["pretrained"] = _read_json(CONFIGS / "train.json")["pretrained"]  # this model, wherever it started from
    training["modality"] = next(iter(card.trained), training["modality"])
    return inference, training


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    """Lay configs over one another as MONAI does."""
    content = ConfigParser.load_config_files([str(file) for file in files])
    return {key: value for key, value in content.items() if value or key != ConfigParser.meta_key}


def _with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give a config other defaults, each where the old one stands."""
    unknown = [name for name in settings if name not in config]
    if unknown:
        raise ConfigError(
            f"the model's card has the settings {', '.join(unknown)}, which these configs do not know: package it with "
            "the version of the bundle that trained it"
        )
    return {**config, **settings}


def _network_of(inference: Mapping[str, Any], model: Path) -> Any:
    """Build the network as the new bundle will, and see that the weights fit."""
    parser = ConfigParser({**inference, "bundle_root": str(BUNDLE_ROOT)})
    network: nn.Module = parser.get_parsed_content("network_def")
    load_network_weights(network, model)
    return network


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _save_weights(model: Path, card: ModelCard, folder: Path) -> None:
    """Write weights and card in both forms, as plain tensors whatever the file wrapped them in."""
    folder.mkdir()
    state = read_state_dict(model)
    for suffix in (".pt", ".safetensors"):
        save_state_dict(state, folder / f"model{suffix}")
    card.write(folder / "model.json")
