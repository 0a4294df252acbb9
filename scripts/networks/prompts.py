"""What passes between the parts of the network: named tuples, one row a prompt."""

from typing import NamedTuple

import torch


class PromptEmbeddings(NamedTuple):
    """What a prompt encoder tells the mask decoder, one row a prompt.

    Attributes:
        sparse: tokens `(N, T, 256)`, P_s of the paper; T = 2, as for the two corners of a box.
        dense: a map `(N, 256, h, w)` on the image embedding's grid, P_d of the paper.
    """

    sparse: torch.Tensor
    dense: torch.Tensor


class MaskPrediction(NamedTuple):
    """The masks of K class prompts for each of B images.

    Attributes:
        logits: `(B, K, S, S)`; the sigmoid is the probability of the class.
        quality: `(B, K)`, the decoder's own estimate of each mask's intersection over union.
        prompts: the B x K generated embeddings, image by image.
        teacher: the embeddings that SAM's prompt encoder gives for the true boxes, where boxes were given.
    """

    logits: torch.Tensor
    quality: torch.Tensor
    prompts: PromptEmbeddings
    teacher: PromptEmbeddings | None = None


def images_of(images: torch.Tensor, prompts: slice, per_image: int) -> torch.Tensor:
    """Give the image of each prompt, without a copy where they all have the same or each has its own.

    Args:
        images: `(B, ...)`.
        prompts: which of the B x K prompts, image by image.
        per_image: K.

    Returns:
        `(n, ...)` for n prompts; not to be written to.
    """
    if images.shape[0] == 1:
        return images.expand(prompts.stop - prompts.start, *images.shape[1:])
    if per_image == 1:
        return images[prompts]
    return images[torch.arange(prompts.start, prompts.stop, device=images.device) // per_image]
