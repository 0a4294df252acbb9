"""The uncertainty-aware joint loss (AutoMedSAM, section 3.3, Eqs. 13 to 17)."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn

from scripts.errors import ConfigError
from scripts.losses.shape_distance import ShapeDistanceLoss
from scripts.networks.prompts import MaskPrediction

LOSS_NAMES = ("mse_sparse", "mse_dense", "dice", "cross_entropy", "shape_distance")  # J = 5
OPTIONAL_LOSSES = ("iou",)  # not in the paper
SMALLEST_WEIGHT = 1e-3  # keeps lambda = 0 from dividing by nothing; its square is lost beside lambda = 1
DICE_SMOOTHING = 1e-5


class PromptTargets(NamedTuple):
    """What the K prompts of B images should have given.

    Attributes:
        mask: `(B, K, S, S)`, 0 or 1.
        distance: the distance maps of the masks `(B, K, S, S)`.
        present: `(B, K)` bool, whether the class is in the image at all.
    """

    mask: torch.Tensor
    distance: torch.Tensor
    present: torch.Tensor


def mean_over(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Average the chosen values; zero, not NaN, where there are none.

    With several processes the count is theirs together: each gives its share of the mean over all of them, scaled so
    that the average which DistributedDataParallel takes of the gradients is the gradient of that mean.

    Args:
        values: `(N,)`.
        chosen: `(N,)` bool.

    Returns:
        A scalar.
    """
    count = chosen.sum().to(values.dtype)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    # Values that do not count may be infinite: they are replaced, since 0 x inf is NaN.
    return torch.where(chosen, values, torch.zeros_like(values)).sum() / count.clamp(min=torch.finfo(values.dtype).tiny)


def pooled_dice(probability: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Take the Dice loss of all prompts as if they were one mask (Eq. 14, literally).

    What is predicted of an absent class enlarges the denominator, so that it has a price. With several processes the
    sums are those of all; their gradient is scaled for the average that DistributedDataParallel takes.

    Args:
        probability: `(N, H, W)`.
        mask: `(N, H, W)`, 0 or 1.

    Returns:
        A scalar in 0...1.
    """
    shared = (probability * mask).sum()
    total = probability.square().sum() + mask.square().sum()
    sums = torch.stack((shared, total))
    if dist.is_available() and dist.is_initialized():
        own = sums * dist.get_world_size()
        everyones = sums.detach().clone()
        dist.all_reduce(everyones)
        sums = own + (everyones - own).detach()  # their value, our gradient
    return 1.0 - (2.0 * sums[0] + DICE_SMOOTHING) / (sums[1] + DICE_SMOOTHING)


def intersection_over_union(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Measure what the decoder's quality estimates: the IoU of the predicted mask, probability above one half.

    Args:
        logits: `(N, H, W)`.
        mask: `(N, H, W)`, 0 or 1.

    Returns:
        `(N,)`, 0 to 1, without gradient; 1 where nothing is predicted and nothing is there.
    """
    predicted, true = logits.detach() > 0, mask > 0.5
    shared = (predicted & true).sum(dim=(1, 2))
    union = (predicted | true).sum(dim=(1, 2))
    return torch.where(union > 0, shared / union.clamp(min=1), 1.0)


class JointLoss(nn.Module):
    """Join the five losses by learned weights: the sum of L_j / (2 lambda_j^2) + log(1 + lambda_j^2) (Eq. 17).

    A class that is absent from the image has no box and no shape: the two embedding losses and Shape Distance average
    over the present prompts, cross-entropy over all. Dice is either pooled over all prompts of the batch, as Eq. 14
    says, or averaged over the present ones.

    The paper leaves the decoder's quality head untrained. The further loss `iou` trains it as MedSAM's and SAM's own
    training do: the squared difference between the quality and the mask's actual IoU, over all prompts.

    Args:
        losses: which of `LOSS_NAMES` and `OPTIONAL_LOSSES` take part, in the order of their weights.
        weighting: `uncertainty` for Eq. 17, `fixed` for the plain sum (the ablation of Table 7).
        dice: `pooled` over all prompts, or `each` present prompt by itself, which weighs small organs like large ones
            (as the group's other public training code does).

    Attributes:
        weights: lambda, `(J,)`, all 1 at the start.
        components: the latest value of each loss, and of cross-entropy for present and absent prompts apart.

    Raises:
        ConfigError: an unknown or repeated loss, no loss, or an unknown weighting.
    """

    def __init__(
        self,
        *,
        losses: tuple[str, ...] | list[str] = LOSS_NAMES,
        weighting: Literal["uncertainty", "fixed"] = "uncertainty",
        dice: Literal["pooled", "each"] = "pooled",
    ) -> None:
        super().__init__()
        known = (*LOSS_NAMES, *OPTIONAL_LOSSES)
        if set(losses) - set(known) or not losses or len(set(losses)) < len(losses):
            raise ConfigError(f"losses must be some of {', '.join(known)}, each once, not {list(losses)}")
        if weighting not in ("uncertainty", "fixed"):
            raise ConfigError(f"weighting is 'uncertainty' or 'fixed', not '{weighting}'")
        if dice not in ("pooled", "each"):
            raise ConfigError(f"dice is 'pooled' or 'each', not '{dice}'")
        self.losses = tuple(losses)
        self.weighting = weighting
        self.weights = nn.Parameter(torch.ones(len(self.losses)), requires_grad=weighting == "uncertainty")
        self.pools_dice = dice == "pooled"
        self.dice = DiceLoss(
            sigmoid=True, squared_pred=True, smooth_nr=DICE_SMOOTHING, smooth_dr=DICE_SMOOTHING, reduction="none"
        )
        self.shape_distance = ShapeDistanceLoss()
        self.components: dict[str, torch.Tensor] = {}

    def forward(self, prediction: MaskPrediction, targets: PromptTargets) -> torch.Tensor:
        """Give the joint loss, a scalar, and leave each part in `components`."""
        parts = self._parts(prediction, targets)
        self.components = {name: value.detach() for name, value in parts.items()}
        return self.join({name: parts[name] for name in self.losses})

    def join(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weigh and sum the losses (Eq. 17)."""
        values = torch.stack([parts[name] for name in self.losses])
        if self.weighting == "fixed":
            return values.sum()
        # Added, not clamped: a clamped weight would have no gradient, and never leave the place where it counts most.
        squared = self.weights.square() + SMALLEST_WEIGHT**2
        return (values / (2 * squared) + torch.log1p(squared)).sum()

    def named_weights(self) -> dict[str, float]:
        """Give each loss's lambda by name."""
        return dict(zip(self.losses, self.weights.detach().tolist(), strict=True))

    def _parts(self, prediction: MaskPrediction, targets: PromptTargets) -> dict[str, torch.Tensor]:
        """Compute the losses that take part, each a mean over prompts."""
        present = targets.present.flatten()
        logits = prediction.logits.flatten(0, 1).float()  # (B, K, S, S) -> (B K, S, S)
        mask = targets.mask.flatten(0, 1).float()
        entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none").mean(dim=(1, 2))  # Eq. 15
        parts = {
            "cross_entropy": mean_over(entropy, torch.ones_like(present)),
            "cross_entropy_present": mean_over(entropy, present),
            "cross_entropy_absent": mean_over(entropy, ~present),
        }
        if "dice" in self.losses:
            parts["dice"] = self._dice(logits, mask, present)
        if "shape_distance" in self.losses:
            shape = self.shape_distance(logits, targets.distance.flatten(0, 1))  # Eq. 16
            parts["shape_distance"] = mean_over(shape, present)
        if "iou" in self.losses:
            difference = prediction.quality.flatten().float() - intersection_over_union(logits, mask)
            parts["iou"] = mean_over(difference.square(), torch.ones_like(present))
        return parts | self._embedding_parts(prediction, present)

    def _dice(self, logits: torch.Tensor, mask: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Compute the Dice loss of N prompts (N, S, S) in the form chosen."""
        if self.pools_dice:
            return pooled_dice(torch.sigmoid(logits), mask)
        each = self.dice(logits.unsqueeze(1), mask.unsqueeze(1)).flatten()  # (N, 1, 1, 1) -> (N,)
        return mean_over(each, present)

    def _embedding_parts(self, prediction: MaskPrediction, present: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare the generated prompts with the teacher's for the true box (Eqs. 13a and 13b)."""
        parts = {}
        for name, kind in (("mse_sparse", "sparse"), ("mse_dense", "dense")):
            if name not in self.losses:
                continue
            if prediction.teacher is None:
                raise ConfigError(f"the loss '{name}' needs the teacher's prompts: give the network the true boxes")
            prompts, teacher = getattr(prediction.prompts, kind), getattr(prediction.teacher, kind)
            if prompts.shape != teacher.shape:
                raise ConfigError(f"the loss '{name}' has nothing to compare: the network gives no {kind} prompts")
            difference = prompts - teacher
            parts[name] = mean_over(difference.float().square().flatten(1).mean(dim=1), present)
        return parts
