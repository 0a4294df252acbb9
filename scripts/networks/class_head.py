"""A linear reading of the image embedding, one mask a class, for an image encoder that learns from nothing.

It is not from the papers, which have a pretrained encoder. As a training device it asks of the embedding that every
class can be told apart in it; the model that comes of the training has no such part.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scripts.networks.mask_decoding import PROMPT_CHANNELS, UPSCALING


class ClassHead(nn.Module):
    """Give the logits of classes by one linear map of each cell of the embedding, at the mask decoder's resolution.

    Args:
        class_ids: the classes that it can be asked for.
        image_size: side S of the network's square input in pixels.
    """

    places: torch.Tensor

    def __init__(self, *, class_ids: Sequence[int], image_size: int) -> None:
        super().__init__()
        known = sorted(class_ids)
        self.image_size = image_size
        self.classes = len(known)
        self.project = nn.Conv2d(PROMPT_CHANNELS, self.classes * UPSCALING**2, 1)
        places = torch.full((known[-1] + 1,), self.classes)  # of an unknown class: beyond the last, an IndexError
        places[known] = torch.arange(self.classes)
        self.register_buffer("places", places, persistent=False)

    def forward(self, embedding: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """Read K classes from each of B embeddings.

        Args:
            embedding: `(B, 256, h, w)`.
            class_ids: `(B, K)`, each one of the classes known.

        Returns:
            Logits `(B, K, S, S)`.
        """
        every = F.pixel_shuffle(self.project(embedding), UPSCALING)  # (B, classes, 4 h, 4 w)
        asked = every[torch.arange(len(every), device=every.device)[:, None], self.places[class_ids]]
        size = (self.image_size, self.image_size)
        return F.interpolate(asked, size=size, mode="bilinear", align_corners=False)
