"""Training on the labels of the datastore."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list, name_to_device

from lib.models import Models
from scripts.errors import ConfigError, InputError
from scripts.losses.joint import LOSS_NAMES, OPTIONAL_LOSSES
from scripts.workflow import NETWORK_OVERLAYS, run_configs

FINE_TUNED = "finetuned.pt"  # beside the model that it began from, which stays as it is
DEFAULTS: dict[str, Any] = {"max_epochs": 20, "val_split": 0.2, "learning_rate": 0.0001}

logger = logging.getLogger(__name__)
Pair = dict[str, str]


class FineTuneTask(TrainTask):
    """Train a model of the bundle on with the labels in the datastore, for the classes that it knows.

    Args:
        models: the weights to begin from.
        studies: the datastore's folder, which the new model's card names.
    """

    def __init__(self, models: Models, *, studies: str) -> None:
        super().__init__("fine-tuning on the labels of the datastore")
        self.models = models
        self.studies = studies

    def config(self) -> dict[str, Any]:
        """Give what viewers offer to set."""
        return {"device": device_list(), "model_filename": self.models.names, **DEFAULTS}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and put the best network of the run into `models/finetuned.pt`.

        Returns:
            `model_filename`, the new file, and `val_mean_dsc`, its score on the labels held out, or on those learned
            from where there was one alone.

        Raises:
            InputError: no label yet, or one that does not fit its image.
            ConfigError: a setting that cannot be.
            TrainingError: a run that cannot go on.
        """
        settings = {**DEFAULTS, **{name: request[name] for name in DEFAULTS if name in request}}
        model = self.models.chosen(request)
        pairs = [{"image": case["image"], "label": case["label"]} for case in datastore.datalist()]
        learned, held_out = split(pairs, settings["val_split"])
        output = self.models.bundle / "runs" / "monailabel"
        own = {name: value for name, value in model.card.settings.items() if name != "train_image_encoder"}
        if model.card.learned["quality_head"]:  # what it expects of its masks has to keep up with them
            own["losses"] = [*LOSS_NAMES, *OPTIONAL_LOSSES]
        workflow = run_configs(
            ["train.json", *NETWORK_OVERLAYS[model.card.architecture]],
            {
                **own,
                "bundle_root": str(self.models.bundle),
                "pretrained": str(model.weights),
                "modality": _modality(model.card.trained, request),
                "datalist": str(Path(self.studies) / "datalist.json"),
                "output_dir": str(output),
                "device": name_to_device(request.get("device")),
                "max_epochs": settings["max_epochs"],
                "learning_rate": settings["learning_rate"],
                "tensorboard": False,
                "progress_bar": False,
                "train#dataset#data": learned,
                "validate#dataset#data": held_out,
            },
        )
        for suffix in (".json", ".pt"):  # the card first, for weights without one are not offered
            shutil.copyfile(output / f"model{suffix}", (self.models.bundle / "models" / FINE_TUNED).with_suffix(suffix))
        best = workflow.parser.get_parsed_content("best").best
        return {"model_filename": FINE_TUNED, "val_mean_dsc": best}


def split(pairs: list[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Hold out a share of the labels, at least one, to choose the best network by.

    Args:
        pairs: images with labels.
        share: 0 to below 1; 0 holds none out.

    Returns:
        Those to learn from and those to validate with: the same ones where none is held out.

    Raises:
        InputError: there is no label.
        ConfigError: no share.
    """
    if not pairs:
        raise InputError("there is no label to learn from: save one for an image first, with the tag 'final'")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ConfigError(f"val_split is a share from 0 to below 1, not {share!r}")
    count = min(max(1, round(share * len(pairs))), len(pairs) - 1) if share else 0
    if count == 0:
        logger.warning("no label is held out: the network is chosen by the labels that it learns from")
        return pairs, pairs
    return pairs[:-count], pairs[-count:]


def _modality(trained: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Find the modality of the datastore's images."""
    asked = request.get("modality")
    if isinstance(asked, str) and asked:
        return asked
    if len(trained) != 1:
        raise ConfigError(f"the modality of the images is unknown: give modality, one of {', '.join(trained)}")
    return next(iter(trained))
