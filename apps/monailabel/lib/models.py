"""The weights files of a bundle, each with the transforms, the inferer and the network that its card describes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from scripts.errors import CheckpointError
from scripts.networks.checkpoints import load_weights
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.model_card import ModelCard
from scripts.workflow import NETWORK_OVERLAYS

SHIPPED = "model.pt"
VOLUMES = {"CT", "MR"}  # modalities whose images are volumes, as viewers have to know


class Model:
    """One weights file, ready to be used.

    Args:
        bundle: folder with `configs/` and `models/`.
        weights: the file; its card lies beside it.

    Attributes:
        card: what the file says of itself.
        stamp: when the file was written.

    Raises:
        CheckpointError: no weights, no card, or weights that do not fit it.
    """

    def __init__(self, bundle: Path, weights: Path) -> None:
        self.weights = weights
        self.card = ModelCard.beside(weights)
        self.stamp = os.stat(weights).st_mtime
        self.parser = ConfigParser()
        self.parser.read_config(str(bundle / "configs" / "inference.json"))
        for overlay in NETWORK_OVERLAYS[self.card.architecture]:
            self.parser.update(ConfigParser.load_config_file(str(bundle / "configs" / overlay)))
        self.parser.update(
            {
                "bundle_root": str(bundle),
                "checkpoint": str(weights),
                **self.card.settings,
                **self.card.learned,
                "progress_bar": False,
            }
        )
        self._network: torch.nn.Module | None = None

    @property
    def prompted(self) -> bool:
        """Whether the weights have learned boxes and points."""
        return self.card.learned["boxes_trained"]

    @property
    def labels(self) -> dict[str, int]:
        """The id of each class that can be asked for, by its name, ascending."""
        entries = [self.part("vocabulary").resolve(name) for names in self.card.trained.values() for name in names]
        return {entry.name: entry.id for entry in sorted(set(entries), key=lambda entry: entry.id)}

    def part(self, name: str, **settings: Any) -> Any:
        """Give a part of configs/inference.json, the same one each time unless it is made with settings of its own."""
        if not settings:
            return self.parser.get_parsed_content(name)
        own = ConfigParser({**self.parser.get(), **settings})
        return own.get_parsed_content(name)

    def network(self, device: str) -> torch.nn.Module:
        """Give the network with its weights, on a device."""
        if self._network is None:
            network = self.part("network_def")
            load_weights(network, self.weights)
            if isinstance(network, HSPSAM):
                network.merge_lora()
            self._network = network.eval()
        return self._network.to(device)


class Models:
    """All weights files in a bundle's `models/`.

    Args:
        bundle: folder with `configs/` and `models/`.
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self._read: dict[str, Model] = {}

    @property
    def names(self) -> list[str]:
        """The files with a card, the bundle's own first."""
        found = sorted(
            path.name for path in (self.bundle / "models").glob("*.pt") if path.with_suffix(".json").exists()
        )
        return sorted(found, key=lambda name: name != SHIPPED)

    def chosen(self, request: Mapping[str, Any]) -> Model:
        """Give the model that a request names as `model_filename`, the bundle's own if none.

        Raises:
            CheckpointError: there is no such file, or it cannot be used.
        """
        name = request.get("model_filename")
        name = name if isinstance(name, str) and name else SHIPPED  # a list is what the viewer may choose from
        if name not in self.names:
            raise CheckpointError(f"there is no model {name!r} with a card in models/: choose {', '.join(self.names)}")
        path = self.bundle / "models" / name
        known = self._read.get(name)
        if known is None or known.stamp != os.stat(path).st_mtime:
            known = self._read[name] = Model(self.bundle, path)
        return known
