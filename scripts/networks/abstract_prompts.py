"""Abstract prompts on their way from the image encoder to the mask decoder (HSP-SAM, arXiv 2506.02854).

The paper's public text gives their purpose; the layers of the mapping are those of the first author's development
code, https://github.com/M-MZhang/MA-SAM_copy. The attention of convolutional levels is this bundle's own.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.mask_decoder import MLP
from torch import nn

from scripts.networks.image_encoders.levels import Level, PromptAnswer, ask_image
from scripts.networks.mask_decoding import PROMPT_CHANNELS

REDUCTION = 4  # of the encoder's width, inside the mapping
OWN_CHANNELS = 64  # inside the perceptron that each prompt has for itself
HEAD_CHANNELS = 32  # width of a head, where a level gets an attention of its own


class PromptMapping(nn.Module):
    """Turn a level's abstract prompts into tokens of the mask decoder: E, E / 4, E / 4, 256, then 256, 64, 64, 256.

    The first three layers are shared by the prompts; behind them each prompt has a perceptron of its own.

    Args:
        channels: E, width of the encoder's level.
        prompts: N.
    """

    def __init__(self, channels: int, prompts: int) -> None:
        super().__init__()
        hidden = channels // REDUCTION
        self.shared = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, PROMPT_CHANNELS),
        )
        self.own = nn.ModuleList(MLP(PROMPT_CHANNELS, OWN_CHANNELS, PROMPT_CHANNELS, 3) for _ in range(prompts))

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """Map `(B, N, E)` to `(B, N, 256)`."""
        shared = self.shared(prompts)
        return torch.stack([own(shared[:, index]) for index, own in enumerate(self.own)], dim=1)


class LevelAttention(nn.Module):
    """Let abstract prompts join the features of a convolutional level, where the encoder has no attention for them.

    Multi-head self-attention over the image tokens and the prompts, after a normalisation of the image tokens, around
    an identity, as in the global attention blocks of SAM's ViT; the prompts are dropped after it.

    Args:
        channels: E, a multiple of 32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // HEAD_CHANNELS
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, features: torch.Tensor, prompts: torch.Tensor, *, ask: bool = False) -> Level:
        """Attend over a level.

        Args:
            features: `(B, E, h, w)`.
            prompts: `(N, E)`.
            ask: whether to give the prompts' answer too.

        Returns:
            The level, of the same shape.
        """
        count, _, height, width = features.shape
        tokens = self.norm(features.permute(0, 2, 3, 1).flatten(1, 2))  # (B, h w, E)
        tokens = torch.cat((tokens, prompts.expand(count, -1, -1)), dim=1)
        projected = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # (B, h w + N, 3, heads, width of a head)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        image, asking = query.split((height * width, len(prompts)), dim=2)
        mixed = self.proj(F.scaled_dot_product_attention(image, key, value).transpose(1, 2).flatten(2))
        features = features + mixed.transpose(1, 2).unflatten(2, (height, width))
        if not ask:
            return Level(features)
        answer, shares = ask_image(asking, key, value, (height, width))
        return Level(features, PromptAnswer(self.proj(answer), shares))
