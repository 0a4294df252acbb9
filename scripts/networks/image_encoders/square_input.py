"""What every image encoder asks of its input."""

import torch

from scripts.errors import InputError


def require_square(image: torch.Tensor, side: int) -> None:
    """Check that images are `(B, 3, side, side)`.

    Raises:
        InputError: they have another shape.
    """
    if image.ndim != 4 or tuple(image.shape[1:]) != (3, side, side):
        raise InputError(
            f"this image encoder expects (B, 3, {side}, {side}), got {tuple(image.shape)}: resize the image"
        )
