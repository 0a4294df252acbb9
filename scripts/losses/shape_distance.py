"""The Shape Distance loss (AutoMedSAM, Eq. 16) and the distance map D that it compares with.

The paper does not say what D is. This reading follows the public loss of the same group's U-MedSAM line, the only one
whose values are of the order of the other losses: a soft step of the distance to the boundary, see `distance_map`.
"""

from typing import Literal, get_args

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import nn

from scripts.errors import ConfigError

DistanceMap = Literal["soft", "max_normalised", "raw"]
STEP_WIDTH = 0.2  # k of the soft step
SMALLEST_MASS = 1.0  # pixels: a prediction of less than one pixel is measured as if it had one


def distance_map(mask: np.ndarray, *, form: DistanceMap = "soft") -> np.ndarray:
    """Measure how deep each pixel lies inside a mask.

    With d the Euclidean distance in pixels to the nearest background pixel and d' = d / max d, the forms are `soft`:
    logistic((1 - d') / 0.2) inside and 0 outside, largest at the boundary (0.99) and 0.5 at the deepest point;
    `max_normalised`: d'; `raw`: d. Background beyond the edge of the picture does not count.

    Args:
        mask: `(H, W)`, foreground where not 0.
        form: which of the three.

    Returns:
        `(H, W)` float32, zero outside the mask and all zero for an empty one.

    Raises:
        ConfigError: an unknown form.
    """
    if form not in get_args(DistanceMap):
        raise ConfigError(f"the distance map is one of {', '.join(get_args(DistanceMap))}, not '{form}'")
    inside = mask > 0
    if not inside.any():
        return np.zeros(mask.shape, dtype=np.float32)
    # A mask that fills the picture has no background to be far from: every pixel is equally deep.
    depth = np.ones(mask.shape) if inside.all() else distance_transform_edt(inside)
    if form == "raw":
        return (depth * inside).astype(np.float32)
    relative = depth / depth.max()
    if form == "max_normalised":
        return (relative * inside).astype(np.float32)
    return (inside / (1.0 + np.exp((relative - 1.0) / STEP_WIDTH))).astype(np.float32)


class ShapeDistanceLoss(nn.Module):
    """Difference between prediction and distance map, relative to the prediction's mass (Eq. 16a)."""

    def forward(self, logits: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Measure each mask: the sum of |D - p| over the sum of p.

        Args:
            logits: `(N, H, W)`.
            distance: D `(N, H, W)`, see `distance_map`.

        Returns:
            `(N,)`, one value a mask; 1 for an empty target, and less where next to nothing was predicted.
        """
        probability = torch.sigmoid(logits)
        difference = (distance - probability).abs().sum(dim=(1, 2))
        return difference / probability.sum(dim=(1, 2)).clamp(min=SMALLEST_MASS)
