"""Segmentation on request: a chosen class, all of them, or what a viewer's boxes and points are put on."""

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.transforms import SaveImaged, Transform
from monailabel.tasks.infer.basic_infer import BasicInferTask
from monailabel.transform.post import Restored
from monailabel.transform.writer import Writer
from monailabel.utils.others.generic import name_to_device

from lib.models import VOLUMES, Models
from scripts.engines.answers import SampledLogits

LABEL_MAP_OF_PICTURE = ".png"  # a label map must not be compressed as its JPEG was


class Warned(Transform):
    """Tell the client what the guard found doubtful: `warnings` in the answer's parameters."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with `result`, which MONAI Label answers."""
        return {**data, "result": {"warnings": [finding.text for finding in data["findings"]]}}


class InferTask(BasicInferTask):
    """The bundle's inference as a task of MONAI Label.

    MONAI Label's own task for bundles reads labels and dimension from metadata.json, loads weights that need not fit,
    and imports the bundle's code anew for each request, after which its errors are no longer known by their type.

    Args:
        models: the weights to choose from.
        kind: what viewers take it for, such as `segmentation` or `vista3d`.
    """

    def __init__(self, models: Models, *, kind: str) -> None:
        self.models = models
        model = models.chosen({})
        trained = list(model.card.trained)
        super().__init__(
            path=str(model.weights),
            network=None,
            type=kind,
            labels=model.labels,
            dimension=3 if VOLUMES & set(trained) else 2,
            description=f"classes by name: {', '.join(model.labels)}",
            # Of several modalities none is taken for granted.
            config={"modality": trained[0] if len(trained) == 1 else ["", *trained]},
        )

    def config(self) -> dict[str, Any]:
        """Give what viewers offer to choose, with the models that there are by now."""
        return {**self._config, "model_filename": self.models.names}

    def pre_transforms(self, data: dict[str, Any] | None = None) -> Sequence[Callable]:
        """Read, check and prepare an image, and place its prompts."""
        request = data or {}
        if not isinstance(request.get("modality"), str) or not request["modality"]:
            request["modality"] = None
        return list(self.models.chosen(request).part("preprocessing").transforms)

    def inferer(self, data: dict[str, Any] | None = None) -> Inferer:
        """Give the bundle's inferer."""
        return self.models.chosen(data or {}).part("inferer")

    def post_transforms(self, data: dict[str, Any] | None = None) -> Sequence[Callable]:
        """Bring the answer back onto the grid of the file, as MONAI Label's writer expects it."""
        transforms = self.models.chosen(data or {}).part("postprocessing").transforms
        kept = [transform for transform in transforms if not isinstance(transform, SaveImaged)]
        return [*kept, Restored(keys="pred", ref_image="image"), Warned()]

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
        """Write the label map; that of a picture as a PNG of two axes, that of a NIfTI file with its exact affine."""
        data["result_dtype"] = dtype or np.uint8
        if data["image"].meta["picture"]:
            extension, data["pred"] = LABEL_MAP_OF_PICTURE, data["pred"][..., 0]
        if extension is not None:
            data["result_extension"] = extension
        # ITK, which MONAI Label writes with otherwise, knows no sheared axes, as a tilted gantry leaves them.
        return Writer(label=self.output_label_key, json=self.output_json_key, nibabel=True)(data)

    def logits(
        self, image: str, request: Mapping[str, Any], *, samples: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ask for all classes of an image, without a label map.

        Args:
            image: its file.
            request: parameters, as of an inference.
            samples: draws of noise; one is none.

        Returns:
            Logits `(1, K, H, W, D)`, and of several samples their uncertainty, else None for it.
        """
        data = {**copy.deepcopy(self._config), **request, "image": image}
        device = name_to_device(data["device"])
        model = self.models.chosen(data)
        for transform in self.pre_transforms(data):
            data = transform(data)
        inferer = model.part("inferer", samples=samples, noise_seed=0) if samples > 1 else model.part("inferer")
        with torch.no_grad():
            answer = inferer(data["image"][None].to(device), model.network(device))
        return (answer.logits, answer.uncertainty) if isinstance(answer, SampledLogits) else (answer, None)

    def _get_network(self, device: str, data: dict[str, Any]) -> torch.nn.Module:
        return self.models.chosen(data).network(device)
