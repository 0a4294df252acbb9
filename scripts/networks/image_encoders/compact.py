"""A small convolutional image encoder for the demo, the tests and training on a CPU.

It is not from the papers: it stands where they have SAM's ViT or LiteMedSAM's TinyViT, with the same output width, so
that everything behind it is theirs. No batch statistics: batched equals one by one, in training and afterwards.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scripts.errors import ConfigError
from scripts.networks.image_encoders.levels import Level, apply_block
from scripts.networks.image_encoders.square_input import require_square

EMBEDDING_CHANNELS = 256
STAGE_CHANNELS = (32, 64, 128, 192)  # at strides 2, 4, 8 and 16
STAGE_BLOCKS = (1, 1, 2, 2)
DEEPEST_STRIDE = 16
NORM_GROUPS = 8
DETAIL_CHANNELS = (32, 16)  # at twice and four times the embedding's resolution


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation around an identity.

    Args:
        channels: width of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(NORM_GROUPS, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(NORM_GROUPS, channels),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(B, channels, h, w)` to the same shape."""
        return F.relu(features + self.body(features))


def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    """Halve the resolution, then refine."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(NORM_GROUPS, channels),
        nn.ReLU(),
        *(ResidualBlock(channels) for _ in range(blocks)),
    )


class CompactEncoder(nn.Module):
    """Four convolutional stages with a top-down path: 2.7 M parameters, 1.1 GFLOP at 128 pixels and stride 8.

    Args:
        image_size: side S of the square input in pixels, a multiple of 16.
        stride: pixels of the image for one cell of the embedding, 4 or 8.

    Raises:
        ConfigError: a size or stride that the stages cannot give.
    """

    def __init__(self, *, image_size: int = 128, stride: int = 8) -> None:
        super().__init__()
        if image_size < DEEPEST_STRIDE or image_size % DEEPEST_STRIDE:
            raise ConfigError(f"the compact encoder takes image sizes that are multiples of 16, not {image_size}")
        if stride not in (4, 8):
            raise ConfigError(f"the compact encoder's embedding has stride 4 or 8, not {stride}")
        self.image_size = image_size
        self.grid_size = image_size // stride
        widths = (3, *STAGE_CHANNELS)
        self.stages = nn.ModuleList(_stage(widths[i], widths[i + 1], blocks) for i, blocks in enumerate(STAGE_BLOCKS))
        deepest = image_size // DEEPEST_STRIDE
        # Left and right look alike; only the place tells them apart.
        self.position = nn.Parameter(torch.zeros(1, STAGE_CHANNELS[-1], deepest, deepest))
        self.finest_stage = 1 if stride == 4 else 2
        self.lateral = nn.ModuleList(
            nn.Conv2d(STAGE_CHANNELS[i + 1], STAGE_CHANNELS[i], 1)
            for i in range(self.finest_stage, len(STAGE_CHANNELS) - 1)
        )
        finest = STAGE_CHANNELS[self.finest_stage]
        self.refine = ResidualBlock(finest)
        self.neck = nn.Sequential(
            nn.Conv2d(finest, EMBEDDING_CHANNELS, 1, bias=False), nn.GroupNorm(1, EMBEDDING_CHANNELS)
        )
        self.level_channels = (*STAGE_CHANNELS[: self.finest_stage + 1], finest)
        self.level_attends = (False,) * len(self.level_channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed `(B, 3, S, S)` images with values in [0, 1] as `(B, 256, S / stride, S / stride)`.

        Raises:
            InputError: an image of another shape.
        """
        require_square(image, self.image_size)
        features = self._stage_features(image)
        return self.neck(self.refine(self._merge(features[self.finest_stage :])))

    def levels(
        self,
        image: torch.Tensor,
        prompts: Sequence[torch.Tensor],  # noqa: ARG002 - no attention here for them to join
        *,
        ask: bool = False,  # noqa: ARG002 - and no answer
        checkpointing: bool = False,
    ) -> list[Level]:
        """Give the stages down to the embedding's resolution, and what the top-down path leaves behind.

        Args:
            image: `(B, 3, S, S)` with values in [0, 1].
            prompts: left aside, as convolutions have no place for them.
            ask: left aside, as there are no answers.
            checkpointing: whether to compute the stages anew in the backward pass.

        Returns:
            Levels of `level_channels` at strides 2, 4 and so on, the last at the embedding's, of which `neck` makes the
            embedding.

        Raises:
            InputError: an image of another shape.
        """
        require_square(image, self.image_size)
        features = self._stage_features(image, checkpointing=checkpointing)
        last = self.refine(self._merge(features[self.finest_stage :]))
        return [Level(stage) for stage in (*features[: self.finest_stage + 1], last)]

    def _stage_features(self, image: torch.Tensor, *, checkpointing: bool = False) -> list[torch.Tensor]:
        """Give the output of each stage, `(B, channels, S / 2, S / 2)` and smaller."""
        outputs = []
        features = image
        for stage in self.stages:
            features = apply_block(stage, features, checkpointing=checkpointing)
            outputs.append(features)
        return outputs

    def _merge(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """Carry the deep features down to the finest level kept."""
        merged = levels[-1] + self.position
        for level, lateral in zip(reversed(levels[:-1]), reversed(self.lateral), strict=True):
            merged = level + F.interpolate(lateral(merged), scale_factor=2.0, mode="bilinear", align_corners=False)
        return merged


class DetailedCompactEncoder(CompactEncoder):
    """The compact encoder, which also hands on what its first two stages see, for the mask decoder to draw edges by.

    SAM 2 (arXiv 2408.00714, appendix D.1) does the same with its encoder. The details are packed into further channels
    of the embedding, so that all who keep, store or pass an embedding keep one tensor.

    Args:
        image_size: side S of the square input in pixels, a multiple of 16.

    Attributes:
        detail_channels: of the details at twice and at four times the embedding's resolution.
    """

    detail_channels = DETAIL_CHANNELS

    def __init__(self, *, image_size: int = 128) -> None:
        super().__init__(image_size=image_size, stride=8)
        finest, second = STAGE_CHANNELS[:2]
        self.details = nn.ModuleList(
            nn.Conv2d(width, channels, 1) for width, channels in zip((second, finest), DETAIL_CHANNELS, strict=True)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed `(B, 3, S, S)` images with values in [0, 1] as `(B, 640, S / 8, S / 8)`.

        256 channels are the embedding; 32 of twice its resolution follow as 128, and 16 of four times as 256.

        Raises:
            InputError: an image of another shape.
        """
        require_square(image, self.image_size)
        features = self._stage_features(image)
        embedding = self.neck(self.refine(self._merge(features[self.finest_stage :])))
        coarse = F.pixel_unshuffle(self.details[0](features[1]), 2)  # (B, 32, 2 h, 2 w) -> (B, 128, h, w)
        fine = F.pixel_unshuffle(self.details[1](features[0]), 4)  # (B, 16, 4 h, 4 w) -> (B, 256, h, w)
        return torch.cat((embedding, coarse, fine), dim=1)
