"""Model files with random weights, which cost as much time as trained ones."""

from pathlib import Path
from typing import Any

import torch

from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_network_weights, save_state_dict
from scripts.networks.model_card import ModelCard

ABDOMINAL_WINDOW = (40.0, 400.0)  # level and width in HU


def write_model(path: Path, *, classes: tuple[str, ...] = (), **settings: Any) -> Path:
    """Write a network with random weights, the same each time, and its card, as training would.

    Args:
        path: of the weights file.
        classes: names that the card calls learned in CT.
        settings: of `AutoMedSAM`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoMedSAM(**settings)
    save_state_dict(network.state_dict(), path)
    card = ModelCard(network.settings, {"window": list(ABDOMINAL_WINDOW)}, {"CT": list(classes)})
    card.write(path.with_suffix(".json"))
    return path


def read_model(path: Path) -> AutoMedSAM:
    """Build the network of a card and load its weights, ready to be asked."""
    network = AutoMedSAM(**ModelCard.beside(path).network)
    load_network_weights(network, path)
    return network.eval()
