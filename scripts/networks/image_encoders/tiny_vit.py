"""TinyViT-5M as an image encoder: LiteMedSAM's variant at 256 pixels and MobileSAM's at 1024.

Both lead to an embedding of 256 channels on a 64x64 grid and share all names; they differ in the patch embedding (1x1
without stride against 3x3 with stride 2) and in the unused classifier that MobileSAM's published file carries along.

Sources: Wu et al., TinyViT, arXiv 2207.10666, table 1 (5M); Zhang et al., MobileSAM, arXiv 2306.14289; the LiteMedSAM
branch of https://github.com/bowang-lab/MedSAM. Names and shapes are those of the published weights.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import nn

from scripts.errors import ConfigError
from scripts.networks import pieces
from scripts.networks.image_encoders.levels import Level, PromptAnswer, apply_block, ask_image
from scripts.networks.image_encoders.square_input import require_square

EMBEDDING_CHANNELS = 256
STAGE_CHANNELS = (64, 128, 160, 320)
STAGE_BLOCKS = (2, 2, 6, 2)
STAGE_HEADS = (2, 4, 5, 10)  # the first stage is convolutional and has none
STAGE_WINDOWS = (7, 7, 14, 7)  # tokens
EXPANSION = 4  # of the inverted bottlenecks and of the perceptrons
DOWNSAMPLING_STRIDES = (2, 2, 1)  # SAM's variants keep the last stage at the grid of the third
IMAGENET_CLASSES = 1000


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch normalisation, under the published names `c` and `bn`.

    Outside training the normalisation is linear and is folded into the convolution, anew in each pass: that costs as
    much as the few weights, and nothing can go stale. `torch.nn.utils.fusion` gives the same values, but cuts them off
    from the gradient.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        kernel: side of the odd kernel; the padding keeps the resolution at stride 1.
        stride: step in both axes.
        groups: groups of the convolution.
    """

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(
            in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.add_module("c", convolution)
        self.add_module("bn", nn.BatchNorm2d(out_channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(B, in_channels, h, w)` to `(B, out_channels, h / stride, w / stride)`."""
        if self.bn.training:
            return super().forward(features)
        weight, bias = self.folded()
        stride, padding = self.c.stride[0], self.c.kernel_size[0] // 2
        return F.conv2d(features, weight, bias, stride, padding, groups=self.c.groups)

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the kernel and the bias of the one convolution that both are outside training."""
        mean, variance = self.bn.get_buffer("running_mean"), self.bn.get_buffer("running_var")
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        return self.c.weight * scale.reshape(-1, 1, 1, 1), self.bn.bias - mean * scale


class PatchEmbedding(nn.Module):
    """Two convolutions from the image to the width of the first stage.

    Args:
        kernel: side of both kernels.
        stride: step of both convolutions; together they shrink the image by its square.
    """

    def __init__(self, *, kernel: int, stride: int) -> None:
        super().__init__()
        width = STAGE_CHANNELS[0]
        self.seq = nn.Sequential(
            ConvNorm(3, width // 2, kernel, stride=stride),
            nn.GELU(),
            ConvNorm(width // 2, width, kernel, stride=stride),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map `(B, 3, S, S)` to `(B, 64, S / stride^2, S / stride^2)`."""
        return self.seq(image)


class SeparableConvolutions(nn.Module):
    """Change the width pixel by pixel, filter each channel in 3x3, change the width again.

    Args:
        in_channels: width of the input.
        hidden: width in the middle.
        out_channels: width of the output.
        stride: step of the filter in both axes, 1 or 2.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv3 = ConvNorm(hidden, out_channels)
        self.stride = stride

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(B, in_channels, h, w)` to `(B, out_channels, h / stride, w / stride)`."""
        if self.training or not pieces.pays(features):
            return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(features)))))
        bands = [self._bands(image) for image in features.split(1)]
        return torch.cat(bands)

    def _bands(self, image: torch.Tensor) -> torch.Tensor:
        """Take a few rows of `(1, in_channels, h, w)` at a time, with those beside them that the filter sees."""
        height, width = image.shape[2:]
        (widen, wide_bias), (kernel, kernel_bias), (narrow, narrow_bias) = (
            convolution.folded() for convolution in (self.conv1, self.conv2, self.conv3)
        )
        rows = max(1, pieces.rows_at_once(widen.shape[0] * width) // self.stride)  # of the output
        bands = []
        for first in range(0, (height - 1) // self.stride + 1, rows):
            top = max(self.stride * (first - 1), 0)
            seen = image[:, :, top : self.stride * (first + rows - 1) + 2]
            hidden = F.gelu(F.conv2d(seen, widen, wide_bias))
            hidden = F.conv2d(hidden, kernel, kernel_bias, self.stride, 1, groups=kernel.shape[0])
            above = first - top // self.stride  # rows of the band before
            hidden = F.gelu(hidden[:, :, above : above + rows])
            bands.append(F.conv2d(hidden, narrow, narrow_bias))
        return torch.cat(bands, dim=2)


class InvertedBottleneck(SeparableConvolutions):
    """Widen, filter each channel in 3x3, narrow again, around an identity (MBConv).

    Args:
        channels: width of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels * EXPANSION, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(B, channels, h, w)` to the same shape."""
        return F.gelu(features + super().forward(features))


class Downsampling(SeparableConvolutions):
    """Change the width and, at stride 2, halve the resolution between two stages.

    Args:
        in_channels: width of the stage before.
        out_channels: width of the stage behind.
        stride: 2, or 1 where only the width changes.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__(in_channels, out_channels, out_channels, stride=stride)


def offset_indices(window: int) -> torch.Tensor:
    """Say which attention bias belongs to which pair of tokens in a window.

    A bias stands for the absolute offset (rows, columns) of the two tokens; the published tables hold it at
    rows * window + columns.

    Args:
        window: side of the window in tokens.

    Returns:
        Indices `(window^2, window^2)`, int64, tokens in row-major order on both axes.
    """
    place = torch.arange(window)
    distance = (place[:, None] - place[None, :]).abs()  # (window, window)
    # (row, column, row, column): the offset of rows and that of columns are independent
    table = distance[:, None, :, None] * window + distance[None, :, None, :]
    return table.reshape(window * window, window * window)


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of a window, with a learned bias for each offset.

    The biases are gathered anew in each pass. A table kept at `eval()`, as in the original, would go stale when
    weights are loaded afterwards.

    Args:
        channels: width of the tokens.
        heads: number of heads.
        window: side of the window in tokens.
    """

    attention_bias_idxs: torch.Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_groups = heads  # the rows of qkv: each head has its query, key and value together
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.register_buffer("attention_bias_idxs", offset_indices(window), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens `(N, window^2, channels)` to the same shape."""
        query, key, value = self._heads(self.qkv(self.norm(tokens)))
        return self._attend(query, key, value, self._biases(query))

    def attend_with_prompts(self, tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Attend within windows `(N, window^2, channels)` and to abstract prompts `(P, channels)`, without a bias."""
        if not len(prompts):
            return self(tokens)
        weight = self.qkv.weight  # once: with LoRA each access makes it anew
        query, key, value = self._heads(F.linear(self.norm(tokens), weight, self.qkv.bias))
        _, own_key, own_value = self._heads(F.linear(prompts.unsqueeze(0), weight, self.qkv.bias))
        own_key, own_value = (own.expand(tokens.shape[0], -1, -1, -1) for own in (own_key, own_value))
        key, value = torch.cat((key, own_key), dim=2), torch.cat((value, own_value), dim=2)  # (N, heads, L + P, ...)
        return self._attend(query, key, value, F.pad(self._biases(query), (0, len(prompts))))

    def answer(self, tokens: torch.Tensor, prompts: torch.Tensor) -> PromptAnswer:
        """Attend from prompts `(P, channels)` to whole images `(B, h, w, channels)`, whatever window a token is in."""
        image = self.norm(tokens).flatten(1, 2)  # (B, h w, channels)
        together = torch.cat((image, prompts.expand(image.shape[0], -1, -1)), dim=1)
        query, key, value = self._heads(self.qkv(together))
        asking = query[:, :, image.shape[1] :]
        mixed, shares = ask_image(asking, key, value, (tokens.shape[1], tokens.shape[2]))
        return PromptAnswer(self.proj(mixed), shares)

    def _heads(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Part `(N, L, 3 * channels)` into query, key and value `(N, heads, L, width of a head)`."""
        count, length, _ = projected.shape
        # each head has its query, key and value in a row
        parts = projected.reshape(count, length, self.heads, -1).transpose(1, 2)
        query, key, value = parts.chunk(3, dim=-1)
        return query, key, value

    def _biases(self, query: torch.Tensor) -> torch.Tensor:
        """Give the bias of each pair of tokens in a window, `(heads, L, L)`."""
        return self.attention_biases[:, self.attention_bias_idxs].to(query.dtype)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Mix values `(N, heads, M, width of a head)` with biases `(heads, L, M)` to `(N, L, channels)`."""
        # With four axes, as on a CPU the fast kernel asks for.
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Normalise, widen and narrow the tokens one by one.

    Args:
        channels: width of the tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels * EXPANSION)
        self.fc2 = nn.Linear(channels * EXPANSION, channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map `(..., channels)` to the same shape."""
        return pieces.row_by_row(self._transform, tokens, width=self.fc1.out_features)

    def _transform(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map `(..., channels)` to the same shape."""
        return self.fc2(F.gelu(self.fc1(self.norm(tokens))))


class AttentionBlock(nn.Module):
    """Attention in windows, a 3x3 filter across their borders, and a perceptron.

    A grid that the window does not divide is filled with zeros at the bottom and right for the attention; the filled
    places take part in it, as in the published network.

    Args:
        channels: width of the features.
        heads: number of heads.
        window: side of the windows in tokens.
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(channels, heads, window)
        self.mlp = Perceptron(channels)
        self.local_conv = ConvNorm(channels, channels, 3, groups=channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(B, channels, h, w)` to the same shape."""
        tokens = features.permute(0, 2, 3, 1)  # (B, h, w, channels)
        return self._transform(tokens + self._attend(tokens))

    def with_prompts(self, features: torch.Tensor, prompts: torch.Tensor, *, ask: bool = False) -> Level:
        """Let abstract prompts join the attention of every window.

        Args:
            features: `(B, channels, h, w)`.
            prompts: `(N, channels)`, the same for all images and windows; N may be 0.
            ask: whether to give the prompts' answer, for which they attend to the whole image.

        Returns:
            Features of the same shape, and the answer where it was asked for.
        """
        tokens = features.permute(0, 2, 3, 1)  # (B, h, w, channels)
        answer = self.attn.answer(tokens, prompts) if ask and len(prompts) else None
        return Level(self._transform(tokens + self._attend(tokens, prompts)), answer)

    def _attend(self, tokens: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within each window of `(B, h, w, channels)`, and to prompts `(N, channels)` where there are some."""
        windows, padded = window_partition(tokens, self.window)  # (B * windows, window, window, channels)
        flat = windows.flatten(1, 2)
        mixed = self.attn(flat) if prompts is None else self.attn.attend_with_prompts(flat, prompts)
        return window_unpartition(mixed.reshape(windows.shape), self.window, padded, (tokens.shape[1], tokens.shape[2]))

    def _transform(self, tokens: torch.Tensor) -> torch.Tensor:
        """Do what follows the attention: `(B, h, w, channels)` to `(B, channels, h, w)`."""
        features = self.local_conv(tokens.permute(0, 3, 1, 2))
        update = self.mlp(features.permute(0, 2, 3, 1))  # (B, h, w, channels)
        return features + update.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one resolution, and the step to the next.

    Args:
        blocks: what is done at this resolution.
        downsample: the step to the next stage; None in the last one.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample if downsample is not None else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(B, channels, h, w)` to what the next stage takes."""
        return self.downsample(self.blocks(features))

    def level(self, features: torch.Tensor, prompts: torch.Tensor, *, ask: bool, checkpointing: bool) -> Level:
        """Give what the blocks leave behind, with prompts `(N, channels)` in the attention of the last, if it has one.

        Args:
            features: `(B, channels, h, w)`.
            prompts: left aside by blocks without attention.
            ask: whether to give the prompts' answer too.
            checkpointing: whether to compute the blocks anew in the backward pass.
        """
        *before, last = self.blocks
        for block in before:
            features = apply_block(block, features, checkpointing=checkpointing)
        if not isinstance(last, AttentionBlock):
            return Level(apply_block(last, features, checkpointing=checkpointing))
        return apply_block(partial(last.with_prompts, ask=ask), features, prompts, checkpointing=checkpointing)


def _blocks(index: int) -> list[nn.Module]:
    """Build the blocks of a stage: convolutions in the first, attention in the others."""
    channels = STAGE_CHANNELS[index]
    if index == 0:
        return [InvertedBottleneck(channels) for _ in range(STAGE_BLOCKS[0])]
    return [AttentionBlock(channels, STAGE_HEADS[index], STAGE_WINDOWS[index]) for _ in range(STAGE_BLOCKS[index])]


def _downsampling(index: int) -> nn.Module | None:
    """Build the step behind a stage; there is none behind the last."""
    if index == len(DOWNSAMPLING_STRIDES):
        return None
    return Downsampling(STAGE_CHANNELS[index], STAGE_CHANNELS[index + 1], stride=DOWNSAMPLING_STRIDES[index])


def _neck() -> nn.Sequential:
    """Build SAM's way from the last stage to the embedding."""
    return nn.Sequential(
        nn.Conv2d(STAGE_CHANNELS[-1], EMBEDDING_CHANNELS, 1, bias=False),
        LayerNorm2d(EMBEDDING_CHANNELS),
        nn.Conv2d(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS, 3, padding=1, bias=False),
        LayerNorm2d(EMBEDDING_CHANNELS),
    )


class TinyViT(nn.Module):
    """TinyViT-5M with SAM's neck.

    Args:
        image_size: side S of the square input in pixels.
        patch_kernel: side of the patch embedding's kernels.
        patch_stride: step of each of the patch embedding's two convolutions.
        classes: outputs of the classifier that lies unused in the published file; 0 for none. Its modules are kept
            so that the file loads strictly, but they take no part in the embedding and ask for no gradient.

    Raises:
        ConfigError: an image size that the strides do not divide.
    """

    def __init__(self, *, image_size: int, patch_kernel: int, patch_stride: int, classes: int = 0) -> None:
        super().__init__()
        stride = 4 * patch_stride**2  # two halvings between the stages
        if image_size < stride or image_size % stride:
            raise ConfigError(
                f"this TinyViT takes image sizes that are positive multiples of {stride}, not {image_size}"
            )
        self.image_size = image_size
        self.grid_size = image_size // stride
        self.level_channels = STAGE_CHANNELS
        self.level_attends = (False, True, True, True)
        self.patch_embed = PatchEmbedding(kernel=patch_kernel, stride=patch_stride)
        self.layers = nn.Sequential(*(Stage(_blocks(i), _downsampling(i)) for i in range(len(STAGE_CHANNELS))))
        if classes:
            self.norm_head = nn.LayerNorm(STAGE_CHANNELS[-1]).requires_grad_(False)
            self.head = nn.Linear(STAGE_CHANNELS[-1], classes).requires_grad_(False)
        self.neck = _neck()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            image: `(B, 3, S, S)`, float, normalised as the weights expect it.

        Returns:
            Embedding `(B, 256, grid_size, grid_size)`.

        Raises:
            InputError: an image of another shape.
        """
        return self.neck(self.layers(self._embed(image)))

    def levels(
        self, image: torch.Tensor, prompts: Sequence[torch.Tensor], *, ask: bool = False, checkpointing: bool = False
    ) -> list[Level]:
        """Give what the four stages leave behind, with abstract prompts in the last attention of the latter three.

        Args:
            image: `(B, 3, S, S)`, float, normalised as the weights expect it.
            prompts: of each level, `(N, channels of the level)`; the first level's are left aside.
            ask: whether to give the prompts' answers too.
            checkpointing: whether to compute the blocks anew in the backward pass.

        Returns:
            Levels with 4, 2, 1 and 1 times the embedding's cells each way; `neck` makes the embedding of the last.

        Raises:
            InputError: an image of another shape.
        """
        features = self._embed(image)
        levels = []
        for layer, own in zip(self.layers, prompts, strict=True):
            stage = cast(Stage, layer)
            level = stage.level(features, own, ask=ask, checkpointing=checkpointing)
            levels.append(level)
            features = stage.downsample(level.features)
        return levels

    def _embed(self, image: torch.Tensor) -> torch.Tensor:
        """Give the first features `(B, 64, h, w)` of images `(B, 3, S, S)`."""
        require_square(image, self.image_size)
        # The attention takes the channels last; so all that lies between needs no copy either.
        return self.patch_embed(image.contiguous(memory_format=torch.channels_last))


def lite_medsam_encoder(*, image_size: int = 256) -> TinyViT:
    """Build LiteMedSAM's encoder: 256 pixels give a 64x64 grid, 5,726,740 parameters.

    Args:
        image_size: side of the square input in pixels, a multiple of 4; the grid is a quarter of it.

    Raises:
        ConfigError: an image size that is not a positive multiple of 4.
    """
    return TinyViT(image_size=image_size, patch_kernel=1, patch_stride=1)


def mobile_sam_encoder(*, image_size: int = 1024) -> TinyViT:
    """Build MobileSAM's encoder: 1024 pixels give a 64x64 grid.

    Args:
        image_size: side of the square input in pixels, a multiple of 16; the grid is a sixteenth of it.

    Raises:
        ConfigError: an image size that is not a positive multiple of 16.
    """
    return TinyViT(image_size=image_size, patch_kernel=3, patch_stride=2, classes=IMAGENET_CLASSES)
