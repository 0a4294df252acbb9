"""The card beside a weights file: how the network is built, and which classes it has learned in which modality."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.errors import CheckpointError
from scripts.files import atomic_path

ARCHITECTURES = ("automedsam", "hsp_sam", "unet")
SETTINGS = ("network", "preprocessing", "postprocessing", "trained")  # which become settings of a config
OLDER = {"automedsam": {"class_code": "scalar"}}  # what a card means that was written before there was a setting
# What a card without postprocessing means, or without one of them, whatever a config's default is.
NOTHING_CHOSEN: dict[str, Any] = {"smallest_quality": 0.0, "averaged_orientations": {}, "largest_component": False}
CONFIG_SIGNS = ("$", "@", "%")  # by which a config knows what is to be evaluated or fetched


@dataclass(frozen=True)
class ModelCard:
    """What must be known to use a weights file.

    Attributes:
        network: arguments of `AutoMedSAM`, `HSPSAM` or `ClassUNet`, so that the weights fit.
        preprocessing: settings of the images' preparation, so that they look as in training: `window`, in HU.
        trained: modality -> names of the classes learned in it.
        postprocessing: settings of what is made of the answers, chosen for these weights: `smallest_quality`,
            `averaged_orientations` and `largest_component`.
        training: how the weights came about: data set, epochs, seed, validation score.
        architecture: which network, one of `ARCHITECTURES`; a card that does not say so is AutoMedSAM's.
    """

    network: dict[str, Any]
    preprocessing: dict[str, Any]
    trained: dict[str, list[str]]
    training: dict[str, Any] = field(default_factory=dict)
    architecture: str = "automedsam"
    postprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a config with which the network is built and its images prepared."""
        older = OLDER.get(self.architecture, {})
        own = {**older, **self.network, **self.preprocessing, **NOTHING_CHOSEN, **self.postprocessing}
        return {"architecture": self.architecture, **own}

    @property
    def learned(self) -> dict[str, Any]:
        """The settings of configs/inference.json that say what the weights have learned."""
        return {
            "trained": self.trained,
            "boxes_trained": bool(self.training.get("boxes_trained")),
            "quality_head": bool(self.training.get("quality_head_trained")),
        }

    @classmethod
    def beside(cls, weights: str | Path) -> "ModelCard":
        """Read the card of a weights file: the same name with the suffix .json.

        Raises:
            CheckpointError: there is no card, or it is not one, or it holds what a config would run.
        """
        path = Path(weights).with_suffix(".json")
        parts = ("network", "preprocessing", "trained", "training")
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path.name} is missing beside {Path(weights).name}: it says how the network is built; "
                "training writes both"
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path.name} cannot be read as a model card: {error}; copy it again") from error
        if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in parts):
            raise CheckpointError(f"{path.name} is no model card: it must hold the objects {', '.join(parts)}")
        postprocessing = content.get("postprocessing", {})
        if not isinstance(postprocessing, dict):
            raise CheckpointError(f"{path.name} is no model card: its postprocessing must be an object")
        if any(_can_run(content.get(name)) for name in SETTINGS):
            raise CheckpointError(
                f"{path.name} holds an expression, which could run code, where a card has names and numbers: do not "
                "use this model, or copy it again from where it was trained"
            )
        architecture = content.get("architecture", cls.architecture)
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path.name} is of the network {architecture!r}, and this version knows "
                f"{' and '.join(ARCHITECTURES)}: use the version of the bundle that wrote it"
            )
        own = {name: content[name] for name in parts}
        return cls(**own, architecture=architecture, postprocessing=postprocessing)

    def write(self, path: Path, scores: Mapping[str, float] | None = None) -> None:
        """Write the card, with the scores that chose the weights."""
        content = asdict(self)
        content["training"] = {**self.training, **(scores or {})}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _can_run(value: Any) -> bool:
    """Say whether MONAI would evaluate or build something of a value in a config, or of one within it.

    Keys too are read: those with # reach into other parts of the config, and `_target_` says what is built.
    """
    if isinstance(value, str):
        return value.startswith(CONFIG_SIGNS)
    if isinstance(value, dict):
        return any(key.startswith("_") or "#" in key or "::" in key or _can_run(below) for key, below in value.items())
    return isinstance(value, list) and any(map(_can_run, value))
