"""Low-rank adaptation (Hu et al., LoRA, arXiv 2106.09685) of the query and value rows of fused qkv layers.

As in SAMed (arXiv 2304.13785), which HSP-SAM follows: W + B A for the query and the value, none for the key, no scaling
factor, in every attention of the image encoder. Built on `torch.nn.utils.parametrize`: a fused qkv layer is one weight,
of which two parts get updates of their own. peft adapts such a layer only as a whole, and brings transformers along.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from scripts.errors import ConfigError

ORIGINAL_SUFFIX = ".parametrizations.weight.original"
UPDATE_MARK = ".parametrizations.weight."


class LowRankUpdate(nn.Module):
    """Add learned matrices of low rank to the query and value rows of a qkv weight; at first they are zero.

    Args:
        channels: E, width of the tokens.
        rank: rank of both updates.
        groups: in how many groups of query, key and value the rows lie: 1 where all queries come first, the number of
            heads where each head has its three together.

    Raises:
        ConfigError: a rank outside 1 to E.
    """

    def __init__(self, channels: int, *, rank: int, groups: int) -> None:
        super().__init__()
        if not 1 <= rank <= channels:
            raise ConfigError(
                f"LoRA's rank is from 1 to the {channels} channels of the attention, or 0 for none; not {rank}"
            )
        self.groups = groups
        self.query_down, self.value_down = (nn.Parameter(torch.empty(rank, channels)) for _ in range(2))
        self.query_up, self.value_up = (nn.Parameter(torch.zeros(channels, rank)) for _ in range(2))
        for down in (self.query_down, self.value_down):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Give the updated weight `(3 E, E)`."""
        query, value = self.query_up @ self.query_down, self.value_up @ self.value_down  # (E, E)
        parts = (query, torch.zeros_like(query), value)
        update = torch.stack([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1)  # (groups, 3, ..., E)
        return weight + update.flatten(0, 2)


def fused_attentions(encoder: nn.Module) -> list[nn.Module]:
    """Find the attentions of an image encoder that have a fused qkv layer and say how its rows are grouped."""
    return [module for module in encoder.modules() if hasattr(module, "qkv_groups")]


def add_low_rank_updates(encoder: nn.Module, rank: int) -> int:
    """Add trainable updates to every fused qkv layer, of its device and type; its weights keep their `requires_grad`.

    Args:
        encoder: an image encoder.
        rank: of each update.

    Returns:
        The number of layers that got updates; 0 for an encoder without attention.

    Raises:
        ConfigError: a rank that is not positive or above the width of a layer.
    """
    attentions = fused_attentions(encoder)
    for attention in attentions:
        layer = cast(nn.Linear, attention.qkv)
        update = LowRankUpdate(layer.in_features, rank=rank, groups=cast(int, attention.qkv_groups)).to(layer.weight)
        parametrize.register_parametrization(layer, "weight", update)
    return len(attentions)


def merge_low_rank_updates(encoder: nn.Module) -> None:
    """Put the updates into the weights, for inference: the same output, under the published names."""
    for attention in fused_attentions(encoder):
        layer = cast(nn.Linear, attention.qkv)
        if parametrize.is_parametrized(layer, "weight"):
            attention.qkv = _merged(layer)


def _merged(layer: nn.Linear) -> nn.Linear:
    """Make a plain layer of one with updates.

    `parametrize.remove_parametrizations` would change the layer's class, which its deep copies share, and break them.
    """
    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    original = layer.parametrizations.weight.original  # type: ignore[union-attr]
    plain.weight = nn.Parameter(layer.weight.detach(), requires_grad=cast(torch.Tensor, original).requires_grad)
    plain.bias = layer.bias
    return plain


def has_low_rank_updates(names: Iterable[str]) -> bool:
    """Say whether a state dict of these names has updates apart from the weights."""
    return any(UPDATE_MARK in name and not name.endswith(ORIGINAL_SUFFIX) for name in names)


def published_state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Give the encoder's tensors under their published names and without the updates; memory is shared."""
    plain = {name.replace(ORIGINAL_SUFFIX, ".weight"): value for name, value in encoder.state_dict().items()}
    return {name: value for name, value in plain.items() if UPDATE_MARK not in name}
