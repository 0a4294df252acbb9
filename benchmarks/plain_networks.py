"""The networks in their plain eager form, as released code runs them: what the benchmarks compare with.

The weights are those of this project's networks and the outputs agree, see tests/test_benchmarks.py; what is missing
are the shortcuts. Batch normalisation stands apart from its convolution, attention is a product, a softmax and another
product over all queries at once, nothing is done in pieces, the diffusion takes its T steps one by one, and every call
encodes its image anew and makes the grid's positional encoding anew.

Sources of the forms: https://github.com/facebookresearch/segment-anything (its own modules are used), the LiteMedSAM
branch of https://github.com/bowang-lab/MedSAM and https://github.com/HP-ML/AutoPromptMedSAM.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import nn

from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.class_prompt_encoder import ClassPromptEncoder
from scripts.networks.image_encoders.sam_vit import NORM_EPSILON, PATCH_SIZE, WINDOW_SIZE, SamVit
from scripts.networks.image_encoders.tiny_vit import (
    AttentionBlock,
    ConvNorm,
    InvertedBottleneck,
    Perceptron,
    SeparableConvolutions,
    Stage,
    TinyViT,
    WindowAttention,
)
from scripts.networks.prompts import PromptEmbeddings

Draw = Callable[[torch.Size], torch.Tensor]


def plain_image_encoder(encoder: nn.Module) -> nn.Module:
    """Give the plain form of a TinyViT or of SAM's ViT.

    Args:
        encoder: the project's, in eval mode; its parameters are shared or copied.

    Raises:
        ConfigError: another encoder, of which nobody has released a plain form.
    """
    if isinstance(encoder, TinyViT):
        return PlainTinyViT(encoder).eval()
    if isinstance(encoder, SamVit):
        return plain_sam_vit(encoder).eval()
    raise ConfigError(f"expected a TinyViT or SAM's ViT, got {type(encoder).__name__}; choose another image encoder")


def plain_sam_vit(encoder: SamVit) -> ImageEncoderViT:
    """Build segment_anything's own image encoder with the sizes and weights of ours."""
    first = encoder.blocks[0]
    plain = ImageEncoderViT(
        img_size=encoder.image_size,
        patch_size=PATCH_SIZE,
        embed_dim=encoder.level_channels[0],
        depth=len(encoder.blocks),
        num_heads=first.attn.num_heads,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPSILON),
        use_rel_pos=True,
        window_size=WINDOW_SIZE,
        global_attn_indexes=encoder.level_blocks,
    )
    plain.load_state_dict(encoder.state_dict())
    return plain


class PlainTinyViT(nn.Module):
    """TinyViT as LiteMedSAM runs it: tokens `(B, h w, channels)` between its blocks, contiguous maps within them.

    The table of attention biases is gathered once, as there at `eval()`.

    Args:
        encoder: whose modules are used.
    """

    def __init__(self, encoder: TinyViT) -> None:
        super().__init__()
        self.encoder = encoder
        self.biases = {id(part): _gathered(part) for part in encoder.modules() if isinstance(part, WindowAttention)}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map `(B, 3, S, S)` to `(B, 256, grid_size, grid_size)`."""
        first, activation, second = cast(tuple[ConvNorm, nn.GELU, ConvNorm], tuple(self.encoder.patch_embed.seq))
        features = _convolve(second, activation(_convolve(first, image)))
        for stage in cast(Iterable[Stage], self.encoder.layers):
            features = self._stage(stage, features)
        return self.encoder.neck(features)

    def _stage(self, stage: Stage, features: torch.Tensor) -> torch.Tensor:
        """Apply a stage to a map `(B, channels, h, w)`."""
        if isinstance(stage.blocks[0], InvertedBottleneck):
            for bottleneck in cast(Iterable[InvertedBottleneck], stage.blocks):
                features = F.gelu(features + _separable(bottleneck, features))
        else:
            tokens = features.flatten(2).transpose(1, 2)  # (B, h w, channels)
            for block in cast(Iterable[AttentionBlock], stage.blocks):
                tokens = self._attention_block(block, tokens, (features.shape[2], features.shape[3]))
            features = tokens.transpose(1, 2).reshape(features.shape)
        down = stage.downsample
        return _separable(down, features) if isinstance(down, SeparableConvolutions) else features

    def _attention_block(self, block: AttentionBlock, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Attend in windows, filter, and transform one by one the tokens `(B, h w, channels)` of a grid."""
        windows, padded = window_partition(tokens.unflatten(1, grid), block.window)
        mixed = self._attend(block.attn, windows.flatten(1, 2)).reshape(windows.shape)
        tokens = tokens + window_unpartition(mixed, block.window, padded, grid).flatten(1, 2)
        filtered = _convolve(block.local_conv, tokens.transpose(1, 2).unflatten(2, grid).contiguous())
        tokens = filtered.flatten(2).transpose(1, 2)
        return tokens + _perceptron(block.mlp, tokens)

    def _attend(self, attention: WindowAttention, tokens: torch.Tensor) -> torch.Tensor:
        """Attend among tokens `(N, L, channels)` by two products and a softmax."""
        projected = attention.qkv(attention.norm(tokens)).unflatten(2, (attention.heads, -1))  # (N, L, heads, 3 width)
        query, key, value = (part.transpose(1, 2) for part in projected.chunk(3, dim=3))
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + self.biases[id(attention)]
        mixed = scores.softmax(dim=3) @ value  # (N, heads, L, width)
        return attention.proj(mixed.transpose(1, 2).flatten(2))


def _gathered(attention: WindowAttention) -> torch.Tensor:
    """Give the bias of each pair of tokens of a window, `(heads, L, L)`."""
    return attention.attention_biases.detach()[:, attention.attention_bias_idxs]


def _convolve(module: ConvNorm, features: torch.Tensor) -> torch.Tensor:
    """Convolve, and normalise behind it."""
    return module.bn(module.c(features))


def _separable(module: SeparableConvolutions, features: torch.Tensor) -> torch.Tensor:
    """Apply the three convolutions, each over the whole map."""
    features = F.gelu(_convolve(module.conv1, features))
    return _convolve(module.conv3, F.gelu(_convolve(module.conv2, features)))


def _perceptron(module: Perceptron, tokens: torch.Tensor) -> torch.Tensor:
    """Normalise, widen and narrow all tokens `(B, L, channels)` at once."""
    return module.fc2(F.gelu(module.fc1(module.norm(tokens))))


class PlainClassPrompts(nn.Module):
    """The release's class prompt encoder: T steps of noise and class, one after the other, for one class.

    Args:
        encoder: of the preset `release`, whose modules are used.
        draw: gives the standard normal values of a step by their shape; None for none at all.

    Raises:
        ConfigError: an encoder of another preset.
    """

    def __init__(self, encoder: ClassPromptEncoder, draw: Draw | None) -> None:
        super().__init__()
        if encoder.preset != "release":
            raise ConfigError(f"the plain form is that of the preset release, not of {encoder.preset}")
        self.encoder = encoder
        self.draw = draw

    def forward(self, embedding: torch.Tensor, class_id: torch.Tensor) -> PromptEmbeddings:
        """Encode one class `(1,)` for the embedding `(1, 256, h, w)` of one image."""
        class_map = self.encoder.project(class_id)  # (1, 1, h, w)
        diffused = torch.cat((self._diffuse(embedding, class_map), class_map), dim=1)
        bottom = class_id.to(class_map.dtype).reshape(1, 1, 1, 1).expand_as(class_map)
        dense, sparse = self.encoder.unet(diffused, bottom)
        tokens = F.adaptive_avg_pool2d(sparse, (2, 1))  # (1, 256, 2, 1)
        return PromptEmbeddings(sparse=tokens.flatten(2).transpose(1, 2), dense=dense)

    def _diffuse(self, embedding: torch.Tensor, class_map: torch.Tensor) -> torch.Tensor:
        """Take the steps T to 1; without noise they are one sum."""
        steps = self.encoder.diffusion_steps
        if self.draw is None:
            return embedding + steps * class_map
        diffused = embedding
        for step in range(steps, 0, -1):
            diffused = diffused + self.draw(embedding.shape) / (step + 1) + class_map
        return diffused


class PlainAutoMedSAM(nn.Module):
    """The release's forward pass: one image, one class, everything anew in each call.

    Args:
        network: of the preset `release`, in eval mode, with an encoder that has a plain form.
        draw: see `PlainClassPrompts`.
    """

    def __init__(self, network: AutoMedSAM, *, draw: Draw | None = None) -> None:
        super().__init__()
        size = network.image_size
        self.image_size = size
        self.image_encoder = plain_image_encoder(network.image_encoder)
        self.class_prompts = PlainClassPrompts(network.class_prompt_encoder, draw)
        self.prompt_encoder = PromptEncoder(256, (network.grid_size,) * 2, (size, size), mask_in_chans=16)
        self.prompt_encoder.load_state_dict(network.prompt_encoder.state_dict())
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        self.mask_decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
        self.mask_decoder.load_state_dict(network.mask_decoder.state_dict())
        self.eval()

    def forward(self, image: torch.Tensor, class_id: int) -> torch.Tensor:
        """Map an image `(1, 3, S, S)` with values in [0, 1], and a class, to logits `(1, 1, S, S)`."""
        return self.decode(self.image_encoder(image), class_id)

    def decode(self, embedding: torch.Tensor, class_id: int) -> torch.Tensor:
        """Map an embedding `(1, 256, h, w)` and a class to logits `(1, 1, S, S)`."""
        prompts = self.class_prompts(embedding, torch.tensor([class_id], device=embedding.device))
        logits, _ = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=prompts.sparse,
            dense_prompt_embeddings=prompts.dense,
            multimask_output=False,
        )
        size = (self.image_size, self.image_size)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
