"""The image encoders, by name.

Each is a module with `image_size` (S in pixels), `grid_size` (side of the embedding's grid) and a forward pass from
`(B, 3, S, S)` to `(B, 256, grid_size, grid_size)`; one with `detail_channels` has further channels behind these.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import nn

from scripts.errors import ConfigError
from scripts.networks.image_encoders.compact import CompactEncoder, DetailedCompactEncoder
from scripts.networks.image_encoders.sam_vit import sam_vit_encoder
from scripts.networks.image_encoders.tiny_vit import lite_medsam_encoder, mobile_sam_encoder

IMAGE_ENCODERS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "compact": CompactEncoder,
        "compact_detailed": DetailedCompactEncoder,
        "lite_medsam": lite_medsam_encoder,
        "mobile_sam": mobile_sam_encoder,
        "sam_vit_b": partial(sam_vit_encoder, "b"),
        "sam_vit_l": partial(sam_vit_encoder, "l"),
        "sam_vit_h": partial(sam_vit_encoder, "h"),
    }
)


def build_image_encoder(name: str, *, image_size: int | None = None) -> nn.Module:
    """Build an image encoder with random weights.

    Args:
        name: one of `IMAGE_ENCODERS`.
        image_size: side of the square input in pixels; None for the size it was published with (compact: 128).

    Raises:
        ConfigError: an unknown name, or an image size that this encoder cannot take.
    """
    if name not in IMAGE_ENCODERS:
        raise ConfigError(f"the image encoder is one of {', '.join(IMAGE_ENCODERS)}, not {name!r}")
    build = IMAGE_ENCODERS[name]
    return build() if image_size is None else build(image_size=image_size)
