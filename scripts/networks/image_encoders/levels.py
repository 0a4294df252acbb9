"""What the prompt-free network takes out of an image encoder: its levels, with abstract prompts in their attention.

Abstract prompts are learned tokens without a place in the image (HSP-SAM, arXiv 2506.02854). They join a level's image
tokens in one attention and are dropped after it; what that attention gives for them can be kept as their answer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


class PromptAnswer(NamedTuple):
    """What a level's attention gives for its N abstract prompts.

    Attributes:
        tokens: `(B, N, E)`, the attention's output for the prompts, which depends on the image.
        attention: `(B, N, h, w)`, where each prompt looks: a softmax over the image tokens, averaged over the heads.
    """

    tokens: torch.Tensor
    attention: torch.Tensor


class Level(NamedTuple):
    """One level of an image encoder.

    Attributes:
        features: `(B, E, h, w)`.
        answer: that of the level's abstract prompts, where it was asked for and the level attends.
    """

    features: torch.Tensor
    answer: PromptAnswer | None = None


class LevelEncoder(Protocol):
    """An image encoder that shows its levels, the shallowest first.

    Attributes:
        image_size: side S of the square input in pixels.
        grid_size: side of the embedding's grid; no level is coarser.
        level_channels: E of each level.
        level_attends: of each level, whether prompts join an attention inside the encoder.
        neck: from the last level's features, which are on the embedding's grid, to the embedding.
    """

    image_size: int
    grid_size: int
    level_channels: tuple[int, ...]
    level_attends: tuple[bool, ...]
    neck: nn.Module

    def levels(
        self, image: torch.Tensor, prompts: Sequence[torch.Tensor], *, ask: bool = False, checkpointing: bool = False
    ) -> list[Level]:
        """Give the levels of images `(B, 3, S, S)`.

        Args:
            image: float, normalised as the weights expect it.
            prompts: the abstract prompts `(N, E)` of each level; those of levels that do not attend are left aside.
            ask: whether to give the prompts' answers too.
            checkpointing: whether to compute the blocks anew in the backward pass, in place of keeping their values.
        """
        ...


def ask_image(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from abstract prompts to the image and to one another, without a bias: they have no place.

    Args:
        query: of the prompts, `(B, heads, N, width of a head)`.
        key: of the image's tokens in row-major order, then of the prompts, `(B, heads, h w + N, width of a head)`.
        value: like `key`.
        grid: h and w.

    Returns:
        The mixed values `(B, N, heads * width of a head)`, and the share of each image token `(B, N, h, w)`.
    """
    mixed = F.scaled_dot_product_attention(query, key, value)
    scores = query @ key[:, :, : grid[0] * grid[1]].transpose(2, 3) * query.shape[-1] ** -0.5
    shares = scores.float().softmax(dim=-1).mean(dim=1)  # (B, N, h w)
    return mixed.transpose(1, 2).flatten(2), shares.unflatten(2, grid)


def apply_block(function: Callable[..., Result], *inputs: object, checkpointing: bool) -> Result:
    """Apply a block of an encoder; with `checkpointing` its inner values are computed anew in the backward pass."""
    if not checkpointing:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)
