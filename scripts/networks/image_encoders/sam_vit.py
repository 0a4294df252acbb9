"""SAM's own image encoders, ViT-B, -L and -H, from the segment_anything package.

Source of the constants: `build_sam.py` of https://github.com/facebookresearch/segment-anything; Kirillov et al.,
Segment Anything, arXiv 2304.02643. MedSAM's published weights are a ViT-B.
"""

from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from scripts.errors import ConfigError
from scripts.networks.image_encoders.square_input import require_square

PUBLISHED_SIZE = 1024  # pixels
PATCH_SIZE = 16  # pixels
EMBEDDING_CHANNELS = 256
WINDOW_SIZE = 14  # tokens, in the blocks without global attention
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class VitSize:
    """What sets one ViT apart from the others.

    Args:
        channels: width of the tokens.
        blocks: number of blocks.
        heads: heads of each attention.
        global_blocks: indices of the blocks that attend over the whole image; the others attend in windows.
    """

    channels: int
    blocks: int
    heads: int
    global_blocks: tuple[int, ...]


VIT_SIZES = {
    "b": VitSize(768, 12, 12, (2, 5, 8, 11)),
    "l": VitSize(1024, 24, 16, (5, 11, 17, 23)),
    "h": VitSize(1280, 32, 16, (7, 15, 23, 31)),
}


class SamVit(ImageEncoderViT):
    """segment_anything's ViT under its published names, for 1024 pixels or fewer.

    Args:
        size: which ViT.
        image_size: side S of the square input in pixels, a multiple of 16 up to 1024.

    Raises:
        ConfigError: an image size outside these.
    """

    def __init__(self, size: VitSize, *, image_size: int = PUBLISHED_SIZE) -> None:
        if not PATCH_SIZE <= image_size <= PUBLISHED_SIZE or image_size % PATCH_SIZE:
            raise ConfigError(
                f"SAM's ViT takes image sizes that are multiples of {PATCH_SIZE} from {PATCH_SIZE} to "
                f"{PUBLISHED_SIZE}, not {image_size}"
            )
        super().__init__(
            img_size=image_size,
            patch_size=PATCH_SIZE,
            embed_dim=size.channels,
            depth=size.blocks,
            num_heads=size.heads,
            out_chans=EMBEDDING_CHANNELS,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPSILON),
            use_rel_pos=True,
            window_size=WINDOW_SIZE,
            global_attn_indexes=size.global_blocks,
        )
        self.image_size = image_size
        self.grid_size = image_size // PATCH_SIZE

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            image: `(B, 3, S, S)`, float, normalised as the weights expect it.

        Returns:
            Embedding `(B, 256, S / 16, S / 16)`.

        Raises:
            InputError: an image of another shape.
        """
        require_square(image, self.image_size)
        return super().forward(image)


def sam_vit_encoder(variant: str, *, image_size: int = PUBLISHED_SIZE) -> SamVit:
    """Build SAM's image encoder.

    Args:
        variant: "b", "l" or "h".
        image_size: side of the square input in pixels, a multiple of 16 up to 1024.

    Raises:
        ConfigError: an unknown variant or an image size outside these.
    """
    if variant not in VIT_SIZES:
        raise ConfigError(f"SAM's ViT comes as {', '.join(VIT_SIZES)}, not {variant!r}")
    return SamVit(VIT_SIZES[variant], image_size=image_size)
