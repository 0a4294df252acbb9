"""Training an image encoder and mask decoder from nothing: boxes for the decoder, a class head for the encoder."""

from typing import Any

import torch

from scripts.engines.box_inferer import BoxPromptTraining
from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.class_head import ClassHead
from scripts.networks.mask_decoding import PROMPT_CHANNELS
from scripts.networks.prompts import MaskPrediction, PromptEmbeddings


class EncoderStartTraining(BoxPromptTraining):
    """Answer some questions by the mask decoder from true boxes, all others by a class head on the embedding.

    The class prompt encoder takes no part, so that a step costs a fraction of one with it: the encoder learns what all
    the classes of an image look like, and the decoder what a box means. Leave the two embedding losses out of `losses`.

    Args:
        head: learns along; see `configs/experiments/encoder_start.yaml`.
    """

    def __init__(self, *, head: ClassHead) -> None:
        super().__init__()
        self.head = head

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: torch.nn.Module,
        *,
        class_ids: torch.Tensor,
        box: torch.Tensor,
        by_box: torch.Tensor | None = None,
        **_: Any,
    ) -> MaskPrediction:
        """Segment the classes asked for.

        Args:
            inputs: images `(B, 3, S, S)` in [0, 1].
            network: an `AutoMedSAM` in one process.
            class_ids: `(B, K)`.
            box: true boxes `(B, K, 4)`, xyxy in pixels of the input.
            by_box: `(B, K)` bool, which questions the mask decoder answers; None for none.

        Raises:
            ConfigError: a network wrapped for several processes, whose gradients would not be averaged.
        """
        if not isinstance(network, AutoMedSAM):
            raise ConfigError("this training runs in one process alone; start it without torchrun")
        embedding = network.encode_image(inputs)
        logits = self.head(embedding[:, :PROMPT_CHANNELS], class_ids)
        quality = logits.new_zeros(class_ids.shape)
        prompts = PromptEmbeddings(logits.new_zeros(0), logits.new_zeros(0))
        if by_box is None or not by_box.any():
            return MaskPrediction(logits, quality, prompts)
        images = by_box.nonzero()[:, 0]  # the image of each question by box
        prompts = network.encode_boxes(box[by_box])
        decoded, estimated = network.decode(embedding[images], prompts)
        logits = logits.masked_scatter(by_box[:, :, None, None], decoded.to(logits.dtype))
        return MaskPrediction(logits, quality.masked_scatter(by_box, estimated.to(logits.dtype)), prompts)
