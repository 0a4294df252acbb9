"""Training from the store: the same numbers as through the encoder, which is then asked once and never again."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.engines.embedding import StoreEmbeddings, open_store
from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import save_state_dict

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NETWORK = {"image_encoder": "compact", "image_size": 32, "channels": [8, 8, 8], "class_ids": [1, 2, 3, 4, 5]}
NETWORK["class_code"] = "scalar"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small network's random weights, to start every run from."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_state_dict(AutoMedSAM(**NETWORK).state_dict(), path)
    return path


def train(datalist: Path, weights: Path, output: Path, **settings: object) -> list[dict[str, float]]:
    """Train for two epochs, and give the losses of every step."""
    settings = {
        "datalist": str(datalist),
        "dataset_dir": str(datalist.parent),
        "output_dir": str(output),
        "pretrained": str(weights),
        "max_epochs": 2,
        "batch_size": 4,
        "val_interval": 2,
        "tensorboard": False,
        "progress_bar": False,
        "augment": False,
        "device": torch.device("cpu"),
        **NETWORK,
        **settings,
    }
    flow = ConfigWorkflow(
        config_file=str(CONFIGS / "train.json"),
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(CONFIGS.parent),
        **settings,
    )
    flow.initialize()
    flow.run()
    flow.finalize()
    with (output / "losses.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_losses_from_the_store_are_those_through_the_encoder(tiny_phantoms, weights, tmp_path):
    through = train(tiny_phantoms, weights, tmp_path / "a")
    stored = train(tiny_phantoms, weights, tmp_path / "b", embeddings_dir=str(tmp_path / "store"))
    assert len(through) == len(stored) > 2
    for one, other in zip(through, stored, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=5e-3, abs=5e-4), name  # half precision: 11 bits


def test_the_encoder_is_asked_once_for_each_slice(tiny_phantoms, weights, tmp_path, monkeypatch, caplog):
    asked = []
    original = AutoMedSAM.encode_image

    def counted(network: AutoMedSAM, image: torch.Tensor) -> torch.Tensor:
        asked.append(len(image))
        return original(network, image)

    monkeypatch.setattr(AutoMedSAM, "encode_image", counted)
    settings = {"embeddings_dir": str(tmp_path / "store")}
    with caplog.at_level(logging.INFO, "scripts"):
        train(tiny_phantoms, weights, tmp_path / "a", **settings)
    assert sum(asked) == 24 + 12  # two training volumes of twelve slices, and the one of validation
    assert "embedded 24 slices" in caplog.text
    asked.clear()
    train(tiny_phantoms, weights, tmp_path / "b", **settings)
    assert asked == []


def test_augmented_versions_differ_and_stay(tiny_phantoms, weights, tmp_path):
    settings = {"embeddings_dir": str(tmp_path / "store"), "augmented_versions": 2, "augment": True}
    first = train(tiny_phantoms, weights, tmp_path / "a", **settings)
    again = train(tiny_phantoms, weights, tmp_path / "b", **settings)
    assert first == again
    assert first != train(tiny_phantoms, weights, tmp_path / "c", embeddings_dir=str(tmp_path / "store"))
    shards = sorted((tmp_path / "store").rglob("*.safetensors"))
    # 24 slices fit into one shard: as they are, and two versions; and the case of validation
    assert len(shards) == 4


def test_other_weights_have_a_store_of_their_own(tmp_path):
    torch.manual_seed(1)
    network = AutoMedSAM(**NETWORK)
    before = open_store(network, tmp_path).folder
    with torch.no_grad():
        next(network.image_encoder.parameters()).view(-1)[0] += 1
    assert open_store(network, tmp_path).folder != before


def test_an_encoder_that_learns_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train_image_encoder is true"):
        open_store(AutoMedSAM(**NETWORK, train_image_encoder=True), tmp_path)


def test_slices_that_change_each_time_are_refused(build_network, tmp_path):
    class Slices:
        versions = 0

    handler = StoreEmbeddings(Slices(), build_network(), folder=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="versions"):
        handler.fill(torch.device("cpu"))
