"""MONAI's U-Net under the interface of AutoMedSAM: what the same images teach a network without prompts.

It is not from the papers. It has a channel for each class and learns those that an image is asked about, so that data
sets which annotate different classes train one network. Everything else, data, losses, inference and scores, is that of
AutoMedSAM, for the two to be compared.
"""

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import BasicUNet
from torch import nn

from scripts.errors import ConfigError
from scripts.networks.prompts import MaskPrediction, PromptEmbeddings

FEATURES = (32, 32, 64, 128, 256, 32)  # of MONAI's BasicUNet, five levels and the last
DEEPEST_STRIDE = 16


class ClassUNet(nn.Module):
    """Segment all classes at once; those asked for are picked from the answer.

    Args:
        image_size: side S of the square input in pixels, a multiple of 16.
        class_ids: the classes, a channel each.
        features: widths of the five levels and of the last, see `monai.networks.nets.BasicUNet`.

    Attributes:
        settings: the arguments, for the model card.

    Raises:
        ConfigError: a size that the levels cannot halve, or class ids that are not positive and distinct.
    """

    grid_size = 1  # there is no embedding that noise would be added to
    diffusion_steps = 1
    train_image_encoder = True

    def __init__(
        self,
        *,
        image_size: int = 128,
        class_ids: Sequence[int] = (1, 2, 3, 4, 5),
        features: Sequence[int] = FEATURES,
        train_image_encoder: bool = True,
    ) -> None:
        super().__init__()
        if not class_ids or min(class_ids) < 1 or len(set(class_ids)) < len(class_ids):
            raise ConfigError(f"class_ids must be distinct numbers from 1 up, not {list(class_ids)}")
        if image_size < 2 * DEEPEST_STRIDE or image_size % DEEPEST_STRIDE:
            raise ConfigError(f"the U-Net takes image sizes from 32 that are multiples of 16, not {image_size}")
        if not train_image_encoder:
            raise ConfigError("the U-Net has no image encoder to freeze: set train_image_encoder to true")
        self.settings = {"image_size": image_size, "class_ids": list(class_ids), "features": list(features)}
        self.image_size = image_size
        self.class_ids = tuple(sorted(class_ids))
        self.plain_unet = BasicUNet(
            spatial_dims=2, in_channels=3, out_channels=len(self.class_ids), features=tuple(features)
        )

    def forward(
        self, image: torch.Tensor, class_ids: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor | MaskPrediction:
        """Segment images `(B, 3, S, S)` with values in [0, 1].

        Args:
            image: the images.
            class_ids: `(B, K)` classes to ask for in each image; None asks for all.

        Returns:
            As `AutoMedSAM`: without `class_ids` the logits `(B, 1 + largest id, S, S)`, with them a `MaskPrediction`,
            whose prompts are empty and whose quality is zero.
        """
        every = self.encode_image(image)
        if class_ids is None:
            return self._by_class_id(every)
        prompts = self.encode_classes(every, class_ids)
        logits, quality = self.decode(every, prompts)
        return MaskPrediction(logits, quality, prompts)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Give the logits of all classes `(B, classes, S, S)`, which all questions about an image share."""
        logits: torch.Tensor = self.plain_unet(image)
        return logits

    def encode_classes(self, embedding: torch.Tensor, class_ids: torch.Tensor, **_: Any) -> PromptEmbeddings:
        """Find the channels of classes `(B, K)`: the sparse part `(B K, 1, 1)` holds their numbers.

        Raises:
            ConfigError: a class without a channel.
        """
        known = torch.tensor(self.class_ids, device=class_ids.device)
        matches = class_ids.reshape(-1, 1) == known
        if not bool(matches.any(dim=1).all()):
            raise ConfigError(f"this network segments the classes {list(self.class_ids)}, not {class_ids.tolist()}")
        channels = matches.float().argmax(dim=1)
        return PromptEmbeddings(channels.reshape(-1, 1, 1), embedding.new_zeros((len(channels), 0, 1, 1)))

    def decode(self, embedding: torch.Tensor, prompts: PromptEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """Pick the channels asked for: logits `(B, K, S, S)`, and a quality `(B, K)` of zero."""
        channels = prompts.sparse.reshape(embedding.shape[0], -1)  # (B K, 1, 1) -> (B, K)
        images = torch.arange(len(channels), device=embedding.device)[:, None]
        return embedding[images, channels], embedding.new_zeros(channels.shape)

    def _by_class_id(self, logits: torch.Tensor) -> torch.Tensor:
        """Lay the classes' logits out by id, the background at logit 0 in front."""
        lowest = torch.finfo(logits.dtype).min
        channels = logits.new_full((logits.shape[0], 1 + self.class_ids[-1], *logits.shape[2:]), lowest)
        channels[:, 0] = 0.0
        return channels.index_copy(1, torch.tensor(self.class_ids, device=logits.device), logits)
