"""Geometry between an image's own pixels and the network's square, there and back.

LiteMedSAM's way: the longest side becomes the square's side, the rest is zero at the bottom and on the right
(https://github.com/bowang-lab/MedSAM, branch LiteMedSAM).
"""

import math

import torch
from monai.data import MetaTensor
from torch.nn.functional import interpolate, pad

from scripts.data.preprocessing import unit_range


def fitted_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the rows and columns that an image fills of a square of ``size`` pixels.

    Args:
        height: rows of the image, in pixels.
        width: columns of the image, in pixels.
        size: side of the square, in pixels.

    Returns:
        The longest side as ``size``, the other in proportion, rounded half up and at least 1.
    """
    scale = size / max(height, width)
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))


def fit_to_square(slices: torch.Tensor, size: int) -> torch.Tensor:
    """Resize slices so that their longest side fills the square, zeros at the bottom and on the right.

    Args:
        slices: ``(N, C, H, W)``; bilinear interpolation, averaging where it shrinks.
        size: side of the square, in pixels.

    Returns:
        ``(N, C, size, size)`` float32.
    """
    return _pad_to_square(_resize(slices, size), size)


def fit_masks_to_square(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Resize masks as ``fit_to_square`` resizes their images, taking the nearest pixel.

    Args:
        masks: ``(N, K, H, W)`` uint8.
        size: side of the square, in pixels.

    Returns:
        ``(N, K, size, size)`` uint8, holding only values of ``masks`` and 0.
    """
    shape = fitted_shape(masks.shape[2], masks.shape[3], size)
    return _pad_to_square(interpolate(_plain(masks), shape, mode="nearest-exact"), size)


def restore_from_square(logits: torch.Tensor, *, size: int, original: tuple[int, int]) -> torch.Tensor:
    """Undo ``fit_to_square``: bring logits back to the image's own pixels.

    Args:
        logits: ``(N, K, s, s)`` on the square, at any resolution s.
        size: side of the square that the image was fitted to, in pixels.
        original: rows and columns (H, W) of the image.

    Returns:
        ``(N, K, H, W)``, bilinear.
    """
    if logits.shape[-2:] != (size, size):
        logits = interpolate(logits, (size, size), mode="bilinear", align_corners=False)
    rows, columns = fitted_shape(*original, size)
    return interpolate(logits[:, :, :rows, :columns], original, mode="bilinear", align_corners=False)


def network_slices(image: torch.Tensor, size: int) -> torch.Tensor:
    """Turn one case into the slices that the network takes.

    The published order: every slice to [0, 1], resize, to [0, 1] again, pad; the padding stays 0.

    Args:
        image: ``(C, H, W, D)`` of 0..255 with C 1 (grey, repeated) or 3.
        size: side of the network's input, in pixels.

    Returns:
        ``(D, 3, size, size)`` float32 in [0, 1], without metadata.
    """
    slices = unit_range(_plain(image).permute(3, 0, 1, 2))  # (C, H, W, D) -> (D, C, H, W)
    slices = _pad_to_square(unit_range(_resize(slices, size)), size)
    return slices.expand(-1, 3, -1, -1).contiguous()  # (D, 1 or 3, size, size) -> (D, 3, size, size)


def _resize(slices: torch.Tensor, size: int) -> torch.Tensor:
    """Bring the longest side of ``(N, C, H, W)`` to ``size``."""
    shape = fitted_shape(slices.shape[2], slices.shape[3], size)
    values = _plain(slices).to(torch.float32)
    return interpolate(values, shape, mode="bilinear", align_corners=False, antialias=True)


def _pad_to_square(slices: torch.Tensor, size: int) -> torch.Tensor:
    """Add zero rows at the bottom and zero columns on the right."""
    return pad(slices, (0, size - slices.shape[3], 0, size - slices.shape[2]))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values without metadata, which would slow every operation down."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
