"""HSP-SAM's mask decoder: SAM's two-way transformer once for each level of the image encoder, from deep to shallow.

The transformers, tokens and hyper-networks are SAM's (arXiv 2304.02643); how the levels follow one another is that of
the first author's development code for HSP-SAM (arXiv 2506.02854), https://github.com/M-MZhang/MA-SAM_copy.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.transformer import Attention
from torch import nn

from scripts.networks.mask_decoding import PROMPT_CHANNELS, FusedTokenAttention

Fusion = Literal["feature_skip", "mask_prompt", "none"]

HEADS = 8
MLP_CHANNELS = 2048
UPSCALING_CHANNELS = (64, 32, 16, 8)  # behind each doubling of the resolution
COARSE_UPSCALINGS = 2  # coarse masks have four pixels for each cell of the grid, each way, as SAM's own
STEM_CHANNELS = (8, 32)  # between a coarse mask and the dense prompt made of it


def level_neck(channels: int) -> nn.Sequential:
    """Build a level's way to the decoder, like SAM's own neck: `(B, channels, h, w)` to `(B, 256, h, w)`."""
    return nn.Sequential(
        nn.Conv2d(channels, PROMPT_CHANNELS, 1, bias=False),
        LayerNorm2d(PROMPT_CHANNELS),
        nn.Conv2d(PROMPT_CHANNELS, PROMPT_CHANNELS, 3, padding=1, bias=False),
        LayerNorm2d(PROMPT_CHANNELS),
    )


def two_way_transformer(depth: int) -> TwoWayTransformer:
    """Build SAM's two-way transformer with its published widths and fused attention."""
    transformer = TwoWayTransformer(depth=depth, embedding_dim=PROMPT_CHANNELS, mlp_dim=MLP_CHANNELS, num_heads=HEADS)
    for module in list(transformer.modules()):
        for name, part in module.named_children():
            if isinstance(part, Attention):
                setattr(module, name, FusedTokenAttention(part))
    return transformer


def on_grid(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Lay image tokens `(B, h w, 256)` out like a map `(B, 256, h, w)`, without a copy."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class MaskHead(nn.Module):
    """Upscale an embedding and take its product with a kernel for each mask, as SAM does.

    Args:
        masks: M.
        upscalings: how often the resolution doubles, 1 to 4.
    """

    def __init__(self, *, masks: int, upscalings: int) -> None:
        super().__init__()
        widths = (PROMPT_CHANNELS, *UPSCALING_CHANNELS[:upscalings])
        layers: list[nn.Module] = []
        for index in range(upscalings):
            layers.append(nn.ConvTranspose2d(widths[index], widths[index + 1], kernel_size=2, stride=2))
            if index + 1 < upscalings:
                layers.append(LayerNorm2d(widths[index + 1]))
            layers.append(nn.GELU())
        self.upscaling = nn.Sequential(*layers)
        self.kernels = nn.ModuleList(MLP(PROMPT_CHANNELS, PROMPT_CHANNELS, widths[-1], 3) for _ in range(masks))

    def forward(self, mask_tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Make masks.

        Args:
            mask_tokens: `(B, M, 256)`.
            embedding: `(B, 256, h, w)`.

        Returns:
            Logits `(B, M, f h, f w)` with f = 2^upscalings.
        """
        kernels = torch.stack([kernel(mask_tokens[:, index]) for index, kernel in enumerate(self.kernels)], dim=1)
        upscaled = self.upscaling(embedding)
        logits = kernels @ upscaled.flatten(2)  # (B, M, width) with (B, width, f h * f w)
        return logits.unflatten(2, upscaled.shape[2:])


class CoarseMaskPrompt(nn.Module):
    """Decode a level alone to coarse masks, and make a dense prompt of them.

    Args:
        masks: M, the background among them.
    """

    def __init__(self, *, masks: int) -> None:
        super().__init__()
        first, second = STEM_CHANNELS
        self.mask_tokens = nn.Embedding(masks, PROMPT_CHANNELS)
        self.transformer = two_way_transformer(depth=1)
        self.head = MaskHead(masks=masks, upscalings=COARSE_UPSCALINGS)
        self.stem = nn.Sequential(
            nn.Conv2d(masks, first, 2, stride=2),
            LayerNorm2d(first),
            nn.GELU(),
            nn.Conv2d(first, second, 2, stride=2),
            LayerNorm2d(second),
            nn.GELU(),
            nn.Conv2d(second, PROMPT_CHANNELS, 1),
        )

    def forward(self, embedding: torch.Tensor, prompts: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Make the dense prompt of a level.

        Args:
            embedding: the level's features, the no-mask embedding added, `(B, 256, h, w)`.
            prompts: tokens of the level's prompts, `(B, N, 256)`.
            positions: of the grid, `(B, 256, h, w)`.

        Returns:
            Dense prompt `(B, 256, h, w)`.
        """
        own = self.mask_tokens.weight.expand(embedding.shape[0], -1, -1)
        tokens, image = self.transformer(embedding, positions, torch.cat((own, prompts), dim=1))
        masks = self.head(tokens[:, : own.shape[1]], on_grid(image, embedding))
        return self.stem(masks.softmax(dim=1))


class ImageSelfAttention(nn.Module):
    """Self-attention of the decoder's image tokens, around an identity: LN(z + Attn(z, k, k)) with k = z + z0."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = FusedTokenAttention(Attention(PROMPT_CHANNELS, HEADS, downsample_rate=2))
        self.norm = nn.LayerNorm(PROMPT_CHANNELS)

    def forward(self, image: torch.Tensor, level_input: torch.Tensor) -> torch.Tensor:
        """Mix image tokens `(B, h w, 256)`; `level_input` z0 is what the transformer before was given, alike."""
        key = image + level_input
        return self.norm(image + self.attention(q=image, k=key, v=key))


class HierarchicalDecoder(nn.Module):
    """Decode the levels of an image one after another, the deepest first, each with its own prompts.

    The deepest level starts. Before each further one the prompts of the level before are dropped, those of the level
    are put in their place, and what the level tells is added to the image's map; the tokens of the masks are carried
    on. SAM's quality token is kept among them; its head is left out, as no loss asks for it and it would not learn.

    Args:
        levels: L, number of levels that are decoded.
        masks: M, the background among them.
        upscalings: how often the masks' resolution is the grid's doubled, 1 to 4.
        fusion: what a level tells: `feature_skip` its features, `mask_prompt` a dense prompt made of its coarse masks;
            `none` goes with a single level.
        deep_residual: whether the deepest level's map is added again at each further level.
        final_image_attention: whether the image tokens attend to one another after the last level.
    """

    def __init__(
        self,
        *,
        levels: int,
        masks: int,
        upscalings: int,
        fusion: Fusion = "feature_skip",
        deep_residual: bool = False,
        final_image_attention: bool = False,
    ) -> None:
        super().__init__()
        self.deep_residual = deep_residual
        self.quality_token = nn.Embedding(1, PROMPT_CHANNELS)
        self.mask_tokens = nn.Embedding(masks, PROMPT_CHANNELS)
        self.transformers = nn.ModuleList(two_way_transformer(depth=2) for _ in range(levels))
        coarse = levels - 1 if fusion == "mask_prompt" else 0
        self.coarse_masks = nn.ModuleList(CoarseMaskPrompt(masks=masks) for _ in range(coarse))
        self.image_attention = ImageSelfAttention() if final_image_attention else None
        self.head = MaskHead(masks=masks, upscalings=upscalings)

    def forward(
        self,
        features: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor],
        positions: torch.Tensor,
        no_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Decode L levels, the shallowest first in both lists.

        Args:
            features: of each level, `(B, 256, h, w)`.
            prompts: tokens of each level's prompts, `(B, N, 256)`; N may be 0.
            positions: of the grid, `(1, 256, h, w)`.
            no_mask: SAM's embedding for want of a mask prompt, `(1, 256, 1, 1)`.

        Returns:
            Logits `(B, M, f h, f w)` with f = 2^upscalings; their softmax over M is the probability.
        """
        image = features[-1] + no_mask
        positions = positions.expand(image.shape[0], -1, -1, -1)
        skips = self._skips(features[:-1], prompts, positions, no_mask)
        skips = [skip + image for skip in skips] if self.deep_residual else skips
        tokens = torch.cat((self.quality_token.weight, self.mask_tokens.weight)).expand(image.shape[0], -1, -1)
        own = tokens.shape[1]
        for level in reversed(range(len(features))):
            image = image if level == len(skips) else image + skips[level]
            tokens = torch.cat((tokens[:, :own], prompts[level]), dim=1)
            tokens, mixed = self.transformers[level](image, positions, tokens)
            if level == 0 and self.image_attention is not None:
                mixed = self.image_attention(mixed, image.flatten(2).transpose(1, 2))
            image = on_grid(mixed, image)
        return self.head(tokens[:, 1:own], image)

    def _skips(
        self,
        features: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor],
        positions: torch.Tensor,
        no_mask: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Give what each level but the deepest adds to the image's map, `(B, 256, h, w)`."""
        if not self.coarse_masks:
            return list(features)
        levels = zip(self.coarse_masks, features, prompts[: len(features)], strict=True)
        return [coarse(level + no_mask, own, positions) for coarse, level, own in levels]
