"""Cross-entropy and soft Dice of classes that exclude one another, as HSP-SAM was trained (arXiv 2506.02854).

The shares of 0.2 and 0.8 and the form of the Dice are those of the first author's development code,
https://github.com/M-MZhang/MA-SAM_copy. It is MONAI's `DiceCELoss` with `batch=True` and squared denominators, the
sums of the Dice taken over all processes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scripts.errors import ConfigError, InputError
from scripts.losses.joint import pooled_dice

CROSS_ENTROPY_SHARE = 0.2
DICE_SHARE = 0.8


class DiceCrossEntropyLoss(nn.Module):
    """Weigh the cross-entropy and the soft Dice of K classes and the background.

    The Dice is that of all pixels of the batch together, for each class and for the background, and the mean of these.

    Args:
        cross_entropy_share: factor of the cross-entropy.
        dice_share: factor of the Dice.

    Attributes:
        components: the latest value of each part, without its factor.

    Raises:
        ConfigError: a factor below 0, or both 0.
    """

    def __init__(self, *, cross_entropy_share: float = CROSS_ENTROPY_SHARE, dice_share: float = DICE_SHARE) -> None:
        super().__init__()
        if min(cross_entropy_share, dice_share) < 0 or cross_entropy_share + dice_share == 0:
            raise ConfigError(
                "the shares of cross-entropy and Dice are numbers from 0 up, and not both 0; got "
                f"{cross_entropy_share} and {dice_share}"
            )
        self.cross_entropy_share = cross_entropy_share
        self.dice_share = dice_share
        self.components: dict[str, torch.Tensor] = {}

    def forward(self, prediction: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Give the loss, a scalar, and leave its parts in `components`.

        Args:
            prediction: logits `(B, K, S, S)` relative to the background's.
            masks: `(B, K, S, S)`, 0 or 1.

        Raises:
            InputError: classes that overlap.
        """
        logits = F.pad(prediction.float(), (0, 0, 0, 0, 1, 0))  # (B, 1 + K, S, S), the background first, at 0
        truth = exclusive_masks(masks)
        entropy = F.cross_entropy(logits, truth.argmax(dim=1))
        channels = zip(logits.softmax(dim=1).unbind(1), truth.unbind(1), strict=True)
        dice = torch.stack([pooled_dice(probability, mask) for probability, mask in channels]).mean()
        self.components = {"cross_entropy": entropy.detach(), "dice": dice.detach()}
        return self.cross_entropy_share * entropy + self.dice_share * dice

    def named_weights(self) -> dict[str, float]:
        """Give the learned weights by name: there are none."""
        return {}


def exclusive_masks(masks: torch.Tensor) -> torch.Tensor:
    """Put the background before masks `(B, K, S, S)`: `(B, 1 + K, S, S)` float32, one of them 1 at each pixel.

    Raises:
        InputError: classes that overlap, which a softmax cannot tell apart.
    """
    taken = masks.float().sum(dim=1, keepdim=True)
    if bool((taken > 1).any()):
        raise InputError(
            "classes overlap in a training image, but this network gives each pixel to one class: leave one of them "
            "out of class_ids, or train AutoMedSAM, which asks for each class by itself"
        )
    return torch.cat((1 - taken, masks.float()), dim=1)
