"""Boxes instead of classes as prompts, as for MedSAM: the box-offset study of Table 8, and training such a network.

SAM's own prompt encoder, which is part of every network here, turns the boxes into prompts; the class prompt encoder
takes no part. The boxes come from the truth, so that their figures compare with those of the protocol `oracle` alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from monai.inferers import Inferer

from scripts.data.fitting import fitted_shape
from scripts.engines.answers import JudgedLogits, SampledLogits
from scripts.engines.inferers import CaseSlices, ClassPromptInferer
from scripts.engines.runtimes import OnnxNetwork
from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.prompts import MaskPrediction, PromptEmbeddings

WHOLE_IMAGE: Literal["whole"] = "whole"


def canvas_boxes(
    boxes: torch.Tensor, *, original: tuple[int, int], size: int, offset: float | Literal["whole"]
) -> torch.Tensor:
    """Bring boxes onto the network's square and move their sides outwards.

    The square is laid out as by `scripts.data.fitting.fit_to_square`: the longest side of the image fills it. A box
    keeps every pixel that it covers; sides stop at the edge of the square, as in MedSAM's training and inference.

    Args:
        boxes: `(..., 4)` of x_min, y_min, x_max, y_max in the image's pixels, corners inclusive.
        original: rows and columns (H, W) of the image.
        size: side of the square in pixels.
        offset: how far each side moves outwards, in pixels of the square; `whole` for the image's own edges.

    Returns:
        `(..., 4)` in pixels of the square, NaN where `boxes` are.
    """
    rows, columns = fitted_shape(*original, size)
    scale = torch.tensor([columns / original[1], rows / original[0]] * 2, dtype=boxes.dtype)
    if isinstance(offset, str):
        edges = torch.tensor([0, 0, columns - 1, rows - 1], dtype=boxes.dtype)
        return torch.where(boxes.isnan(), boxes, edges)
    least = (boxes[..., :2] * scale[:2]).floor() - offset
    largest = ((boxes[..., 2:] + 1) * scale[2:]).ceil() - 1 + offset
    return torch.cat((least, largest), dim=-1).clamp(0, size - 1)


class BoxPromptInferer(ClassPromptInferer):
    """Ask for what is in a class's true box, in every slice that has the class.

    Args:
        offset: how far each side of a box is moved outwards, in pixels of the network's square input; `whole` takes
            the whole image for the box.
        settings: of `ClassPromptInferer`. The prompts have no noise, so that `noise_seed` changes nothing, and a box
            says that something is there, so that `smallest_quality`, `averaged_orientations` and `largest_component`
            do not count.

    Raises:
        ConfigError: an offset below 0, several samples, which would all be the same, or a runtime other than torch.
    """

    def __init__(self, *, offset: float | Literal["whole"] = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        if offset != WHOLE_IMAGE and not (isinstance(offset, int | float) and offset >= 0):
            raise ConfigError(f"the offset of boxes is a number of pixels from 0 up, or '{WHOLE_IMAGE}', not {offset}")
        if self.samples > 1 or self.runtime != "torch":
            raise ConfigError(
                "prompts of boxes have no noise to draw, and the runtime torch alone: leave samples and runtime out"
            )
        self.offset = offset
        self.smallest_quality = 0.0
        self.positions = {}
        self.largest_component = False
        self._boxes = torch.empty(0)

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: torch.nn.Module,
        class_ids: Sequence[int] | torch.Tensor | None = None,
        presence: torch.Tensor | None = None,
        case: str = "",
        boxes: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | SampledLogits | JudgedLogits:
        """Segment one case.

        Args:
            inputs: as for `ClassPromptInferer`.
            network: as for `ClassPromptInferer`.
            class_ids: the K classes that the boxes are of.
            presence: as for `ClassPromptInferer`.
            case: its name.
            boxes: `(1, K, D, 4)` in the case's own pixels, as `PrepareCase(boxes=True)` hands them over; a class
                without a box in a slice (NaN) comes out absent there.

        Returns:
            Logits `(1, K, H, W, D)` as of `ClassPromptInferer`.

        Raises:
            ConfigError: no boxes.
        """
        if boxes is None:
            raise ConfigError("a box-prompted network needs the true boxes: set validate#evaluator#prepare_batch#boxes")
        model = cast(AutoMedSAM, getattr(network, "module", network))
        original = (inputs.shape[2], inputs.shape[3])
        self._boxes = canvas_boxes(boxes[0].cpu(), original=original, size=model.image_size, offset=self.offset)
        known = ~self._boxes.isnan().any(dim=-1)  # (K, D)
        asked = known if presence is None else known & presence[0].cpu()
        return super().__call__(inputs, network, class_ids=class_ids, presence=asked.unsqueeze(0), case=case)

    def _prompts(
        self,
        model: AutoMedSAM | OnnxNetwork,
        embedding: torch.Tensor,
        slices: CaseSlices,
        asked: tuple[Sequence[int], Sequence[int]],
        sample: int,
    ) -> PromptEmbeddings:
        """Make SAM's prompts of the boxes of B slices and K classes: B x K rows, slice by slice."""
        rows, columns = asked
        places = [slices.places[row] for row in rows]
        boxes = self._boxes[list(columns)][:, places].transpose(0, 1)  # (K, B, 4) -> (B, K, 4)
        return cast(AutoMedSAM, model).encode_boxes(boxes.to(embedding.device))

    def _identity(self, slices: CaseSlices, row: int) -> tuple[object, ...]:
        """Name a slice by its boxes too: alike pixels with other boxes have another answer."""
        boxes = self._boxes[:, slices.places[row]].nan_to_num(-1).flatten().tolist()
        return *super()._identity(slices, row), *boxes


class BoxPromptTraining(Inferer):
    """Run a network on the true boxes in training, instead of `monai.inferers.SimpleInferer`.

    The prompts have nothing to learn: only the mask decoder does, and an image encoder that is not frozen. The two
    embedding losses would be zero; leave them out of `losses`.
    """

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: torch.nn.Module,
        *,
        box: torch.Tensor,
        embedded: bool = False,
        **_: Any,
    ) -> MaskPrediction:
        """Segment what is in the boxes.

        Args:
            inputs: images `(B, 3, S, S)` in [0, 1], or their embeddings `(B, 256, h, w)`, if `embedded` says so.
            network: an `AutoMedSAM` in one process.
            box: `(B, K, 4)`, xyxy in pixels of the input.
            embedded: whether `inputs` has been through the image encoder before.

        Raises:
            ConfigError: a network wrapped for several processes, whose gradients would not be averaged.
        """
        if not isinstance(network, AutoMedSAM):
            raise ConfigError("training on boxes runs in one process alone; start it without torchrun")
        embedding = inputs if embedded else network.encode_image(inputs)
        prompts = network.encode_boxes(box)
        logits, quality = network.decode(embedding, prompts)
        return MaskPrediction(logits, quality, prompts, prompts)


def trains_on_boxes(inferer: Inferer, *, share: float) -> bool:
    """Say for a model's card whether a training teaches the mask decoder boxes.

    Args:
        inferer: of the training.
        share: of the classes that are asked for by their box.
    """
    return share > 0 or isinstance(inferer, BoxPromptTraining)


def trains_on_classes(inferer: Inferer) -> bool:
    """Say for a model's card whether a training teaches the class prompt encoder anything."""
    return not isinstance(inferer, BoxPromptTraining)
