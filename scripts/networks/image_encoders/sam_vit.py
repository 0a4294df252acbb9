"""SAM's own image encoders, ViT-B, -L and -H, from the segment_anything package.

Source of the constants: `build_sam.py` of https://github.com/facebookresearch/segment-anything; Kirillov et al.,
Segment Anything, arXiv 2304.02643. MedSAM's published weights are a ViT-B.

Only the attention is computed in another way, with the same result: see `FusedAttention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos
from torch import nn

from scripts.errors import ConfigError
from scripts.networks import pieces
from scripts.networks.image_encoders.levels import Level, PromptAnswer, apply_block, ask_image
from scripts.networks.image_encoders.square_input import require_square

PUBLISHED_SIZE = 1024  # pixels
PATCH_SIZE = 16  # pixels
EMBEDDING_CHANNELS = 256
WINDOW_SIZE = 14  # tokens, in the blocks without global attention
NORM_EPSILON = 1e-6
# Of the attention's biases held at a time. A CPU's kernel takes 64 queries at a time, against up to 4096 keys: so many
# are two such blocks for each thread, and stay in the cache. An accelerator is bound by its memory alone.
BIASES_PER_THREAD = 2**19
BIASES_ON_ACCELERATOR = 2**28
BIASES_IN_EXPORT = 2**24  # each share is written out in the graph: a head of a global block at 1024 pixels


@dataclass(frozen=True)
class VitSize:
    """What sets one ViT apart from the others.

    Args:
        channels: width of the tokens.
        blocks: number of blocks.
        heads: heads of each attention.
        global_blocks: indices of the blocks that attend over the whole image; the others attend in windows.
    """

    channels: int
    blocks: int
    heads: int
    global_blocks: tuple[int, ...]


VIT_SIZES = {
    "b": VitSize(768, 12, 12, (2, 5, 8, 11)),
    "l": VitSize(1024, 24, 16, (5, 11, 17, 23)),
    "h": VitSize(1280, 32, 16, (7, 15, 23, 31)),
}


class FusedAttention(nn.Module):
    """segment_anything's attention through PyTorch's scaled-dot-product attention.

    The bias of a query and a key is the query's product with a vector for their offset in rows, plus that with one for
    their offset in columns (Li et al., MViTv2, arXiv 2112.01526, Eq. 4). In full it is as large as the scores, 0.8 GB
    in a global block of ViT-B: it is made for a few heads and rows of queries at a time. Nothing is kept from one pass
    to the next.

    Args:
        published: the attention whose parameters it takes over, under their names.
    """

    qkv_groups = 1  # the rows of qkv: all queries, all keys, all values

    def __init__(self, published: Attention) -> None:
        super().__init__()
        self.num_heads: int = published.num_heads
        self.rel_pos_h: torch.Tensor = published.rel_pos_h
        self.rel_pos_w: torch.Tensor = published.rel_pos_w
        self.qkv = published.qkv
        self.proj = published.proj

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens `(B, h, w, channels)` to the same shape."""
        query, key, value = self._heads(self.qkv(tokens).flatten(1, 2))
        mixed = _attend_in_shares(query, key, value, *self._biases(query, (tokens.shape[1], tokens.shape[2])))
        return self._joined(mixed, tokens)

    def attend_with_prompts(
        self, tokens: torch.Tensor, prompts: torch.Tensor, *, ask: bool = False
    ) -> tuple[torch.Tensor, PromptAnswer | None]:
        """Attend to abstract prompts too; they have no place, so that no bias goes from or to them.

        Args:
            tokens: `(B, h, w, channels)`.
            prompts: `(N, channels)`, the same for all images.
            ask: whether to give the prompts' answer.

        Returns:
            Tokens of the same shape, and the answer where it was asked for.
        """
        if not len(prompts):
            return self(tokens), None
        grid = (tokens.shape[1], tokens.shape[2])
        weight = self.qkv.weight  # once: with LoRA each access makes it anew
        query, key, value = self._heads(F.linear(tokens.flatten(1, 2), weight, self.qkv.bias))
        own = F.linear(prompts.expand(tokens.shape[0], -1, -1), weight, self.qkv.bias)
        own_query, own_key, own_value = self._heads(own)
        key, value = torch.cat((key, own_key), dim=1), torch.cat((value, own_value), dim=1)  # (B heads, h w + N, ...)
        mixed = self._joined(_attend_in_shares(query, key, value, *self._biases(query, grid)), tokens)
        if not ask:
            return mixed, None
        asking, keys, values = (part.unflatten(0, (-1, self.num_heads)) for part in (own_query, key, value))
        answer, shares = ask_image(asking, keys, values, grid)
        return mixed, PromptAnswer(self.proj(answer), shares)

    def _heads(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Part `(B, L, 3 channels)` into query, key and value `(B heads, L, width of a head)`."""
        count, length, _ = projected.shape
        parts = projected.reshape(count, length, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        return query, key, value

    def _joined(self, mixed: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Join the heads of `(B heads, h w, width of a head)` and project them to the shape of the tokens."""
        count, height, width, channels = tokens.shape
        mixed = mixed.reshape(count, self.num_heads, height * width, -1).transpose(1, 2)  # (B, L, heads, ...)
        return self.proj(mixed.reshape(count, height, width, channels))

    def _biases(self, query: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each query's bias to each row `(N, h, w, h)` and to each column `(N, h, w, w)` of keys."""
        height, width = grid
        places = query.unflatten(1, grid)  # (N, h, w, width of a head)
        rows = torch.einsum("nhwc,hkc->nhwk", places, get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("nhwc,wkc->nhwk", places, get_rel_pos(width, width, self.rel_pos_w))
        return rows.contiguous(), columns.contiguous()  # or their sums would be strided, and slow


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Attend from some queries `(N, n w, width)` to all keys, with biases `(N, n, w, h)` and `(N, n, w, w)`.

    Keys behind those of the image, of prompts, have none.
    """
    bias = rows.unsqueeze(-1) + columns.unsqueeze(-2)  # (N, n, w, h, w)
    bias = bias.reshape(*query.shape[:2], -1)  # (N, n w, h w)
    if key.shape[1] > bias.shape[2]:
        bias = F.pad(bias, (0, key.shape[1] - bias.shape[2]))
    # With four axes, as on a CPU the fast kernel asks for.
    mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=bias[None])
    return mixed[0]


def _attend_in_shares(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Attend among tokens `(N, h w, width)` with biases `(N, h, w, h)` and `(N, h, w, w)`, never all at a time."""
    if pieces.traced() and not torch.compiler.is_exporting():
        return _attend(query, key, value, rows, columns)
    height, width = rows.shape[1:3]
    heads, lines = _share(query.device, height, width)
    groups = zip(*(values.split(heads) for values in (query, key, value, rows, columns)), strict=True)
    mixed = []
    for queries, keys, values, row_biases, column_biases in groups:
        bands = zip(
            queries.split(lines * width, dim=1),
            row_biases.split(lines, dim=1),
            column_biases.split(lines, dim=1),
            strict=True,
        )
        mixed.append(torch.cat([_attend(band, keys, values, *biases) for band, *biases in bands], dim=1))
    return torch.cat(mixed)


def _share(device: torch.device, height: int, width: int) -> tuple[int, int]:
    """Say how many heads, and how many of their rows of queries, to take at a time."""
    held = max(2, torch.get_num_threads()) * BIASES_PER_THREAD if device.type == "cpu" else BIASES_ON_ACCELERATOR
    if torch.compiler.is_exporting():
        held = BIASES_IN_EXPORT
    of_a_row = height * width**2
    lines = min(height, max(1, held // of_a_row))
    return max(1, held // (lines * of_a_row)), lines


class SamVit(ImageEncoderViT):
    """segment_anything's ViT under its published names, for 1024 pixels or fewer.

    Args:
        size: which ViT.
        image_size: side S of the square input in pixels, a multiple of 16 up to 1024.

    Raises:
        ConfigError: an image size outside these.
    """

    def __init__(self, size: VitSize, *, image_size: int = PUBLISHED_SIZE) -> None:
        if not PATCH_SIZE <= image_size <= PUBLISHED_SIZE or image_size % PATCH_SIZE:
            raise ConfigError(
                f"SAM's ViT takes image sizes that are multiples of {PATCH_SIZE} from {PATCH_SIZE} to "
                f"{PUBLISHED_SIZE}, not {image_size}"
            )
        super().__init__(
            img_size=image_size,
            patch_size=PATCH_SIZE,
            embed_dim=size.channels,
            depth=size.blocks,
            num_heads=size.heads,
            out_chans=EMBEDDING_CHANNELS,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPSILON),
            use_rel_pos=True,
            window_size=WINDOW_SIZE,
            global_attn_indexes=size.global_blocks,
        )
        for block in self.blocks:
            block.attn = FusedAttention(block.attn)
        self.image_size = image_size
        self.grid_size = image_size // PATCH_SIZE
        self.level_blocks = size.global_blocks
        self.level_channels = (size.channels,) * len(size.global_blocks)
        self.level_attends = (True,) * len(size.global_blocks)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            image: `(B, 3, S, S)`, float, normalised as the weights expect it.

        Returns:
            Embedding `(B, 256, S / 16, S / 16)`.

        Raises:
            InputError: an image of another shape.
        """
        require_square(image, self.image_size)
        return super().forward(image)

    def levels(
        self, image: torch.Tensor, prompts: Sequence[torch.Tensor], *, ask: bool = False, checkpointing: bool = False
    ) -> list[Level]:
        """Give what the blocks of global attention leave behind, with abstract prompts in their attention.

        Args:
            image: `(B, 3, S, S)`, float, normalised as the weights expect it.
            prompts: of each level, `(N, channels)`; N may be 0.
            ask: whether to give the prompts' answers too.
            checkpointing: whether to compute the blocks anew in the backward pass.

        Returns:
            Levels `(B, channels, S / 16, S / 16)`; `neck` makes the embedding of the last.

        Raises:
            InputError: an image of another shape.
        """
        require_square(image, self.image_size)
        tokens = self.patch_embed(image) + self.pos_embed  # (B, h, w, channels)
        own = dict(zip(self.level_blocks, prompts, strict=True))
        levels = []
        for index, block in enumerate(self.blocks):
            if index not in own:
                tokens = apply_block(block, tokens, checkpointing=checkpointing)
                continue
            tokens, answer = apply_block(_global_block, block, tokens, own[index], ask, checkpointing=checkpointing)
            levels.append(Level(tokens.permute(0, 3, 1, 2), answer))
        return levels


def _global_block(
    block: Block, tokens: torch.Tensor, prompts: torch.Tensor, ask: bool
) -> tuple[torch.Tensor, PromptAnswer | None]:
    """Apply a block of global attention to `(B, h, w, channels)`; prompts `(N, channels)` join behind its norm."""
    mixed, answer = block.attn.attend_with_prompts(block.norm1(tokens), prompts, ask=ask)
    tokens = tokens + mixed
    return tokens + block.mlp(block.norm2(tokens)), answer


def sam_vit_encoder(variant: str, *, image_size: int = PUBLISHED_SIZE) -> SamVit:
    """Build SAM's image encoder.

    Args:
        variant: "b", "l" or "h".
        image_size: side of the square input in pixels, a multiple of 16 up to 1024.

    Raises:
        ConfigError: an unknown variant or an image size outside these.
    """
    if variant not in VIT_SIZES:
        raise ConfigError(f"SAM's ViT comes as {', '.join(VIT_SIZES)}, not {variant!r}")
    return SamVit(VIT_SIZES[variant], image_size=image_size)
