"""SAM's mask decoder and prompt encoder, built as published, for prompts of many images at once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import nn

from scripts.networks import pieces
from scripts.networks.prompts import PromptEmbeddings, images_of

PROMPT_CHANNELS = 256
ATTENTION_CHANNELS = 128  # of the attention between tokens and image
UPSCALING = 4  # the decoder's masks have four pixels for each cell of the grid, each way


class FusedTokenAttention(nn.Module):
    """The two-way transformer's attention through PyTorch's scaled-dot-product attention.

    Args:
        published: the attention whose parameters it takes over, under their names.
    """

    def __init__(self, published: Attention) -> None:
        super().__init__()
        self.num_heads: int = published.num_heads
        self.q_proj, self.k_proj = published.q_proj, published.k_proj
        self.v_proj, self.out_proj = published.v_proj, published.out_proj

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from `(N, L, channels)` to `(N, M, channels)`; the published names of the arguments are kept."""
        query, key, value = (
            projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, L or M, width of a head)
            for projected in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class PromptMaskDecoder(MaskDecoder):
    """SAM's mask decoder for the prompts of several images, giving the single mask of each.

    The parent repeats one image's embedding for all its prompts, which is wrong for a batch of images; and it computes
    the three further masks that SAM uses against ambiguous clicks, which a class does not need. Names and weights are
    the parent's.
    """

    def forward(
        self, image_embedding: torch.Tensor, positional_encoding: torch.Tensor, prompts: PromptEmbeddings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode K prompts for each of B images, N = B K, image by image.

        Args:
            image_embedding: `(B, 256, h, w)`, with further channels where there are details.
            positional_encoding: of the grid, `(1, 256, h, w)`.
            prompts: N sparse and dense embeddings.

        Returns:
            Logits `(N, 4 h, 4 w)` and the estimated intersection over union `(N,)`.
        """
        count, (images_count, _, height, width) = prompts.dense.shape[0], image_embedding.shape
        plain, details = self._taken_apart(image_embedding)
        embedding, positions, dense = (
            values.contiguous(memory_format=torch.channels_last)  # as the transformer takes them
            for values in (plain, positional_encoding, prompts.dense)
        )
        parts = []
        for rows in pieces.slices(count, width=ATTENTION_CHANNELS * height * width, like=embedding):
            images = images_of(embedding, rows, count // images_count)
            seen = [images_of(level, rows, count // images_count) for level in details]
            parts.append(self._decode(images + dense[rows], positions, prompts.sparse[rows], seen))
        logits, quality = (pieces.join(part) for part in zip(*parts, strict=True))
        return logits, quality

    def _decode(
        self, prompted: torch.Tensor, positions: torch.Tensor, sparse: torch.Tensor, details: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode images with their dense prompts added `(n, 256, h, w)`, and sparse prompts `(n, T, 256)`."""
        count, channels, height, width = prompted.shape
        own_tokens = torch.cat((self.iou_token.weight, self.mask_tokens.weight), dim=0)
        tokens = torch.cat((own_tokens.unsqueeze(0).expand(count, -1, -1), sparse), dim=1)
        tokens, image = self.transformer(prompted, positions.expand(count, -1, -1, -1), tokens)
        image = image.transpose(1, 2).reshape(count, channels, height, width)  # (N, h w, C) -> (N, C, h, w)
        kernels = self.output_hypernetworks_mlps[0](tokens[:, 1])  # token 0 is the quality's, token 1 the single mask's
        logits = torch.einsum("nc,nchw->nhw", kernels, self._upscaled(image, details))
        return logits, self.iou_prediction_head(tokens[:, 0])[:, 0]

    def _taken_apart(self, image_embedding: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Give the embedding proper, and the details that come with it: none."""
        return image_embedding, []

    def _upscaled(self, image: torch.Tensor, details: list[torch.Tensor]) -> torch.Tensor:  # noqa: ARG002 - none here
        """Bring `(n, 256, h, w)` to `(n, 32, 4 h, 4 w)`."""
        return self.output_upscaling(image)


class DetailedMaskDecoder(PromptMaskDecoder):
    """The mask decoder, to which the image encoder's details are added on the way up, as in SAM 2 (arXiv 2408.00714).

    Before anything is learned it is SAM's decoder: the details come in through weights of zero.

    Args:
        detail_channels: of the details at twice and at four times the embedding's resolution.
        settings: of the parent.
    """

    def __init__(self, *, detail_channels: Sequence[int], **settings: Any) -> None:
        super().__init__(**settings)
        coarse, both = packed_channels(detail_channels[:1]), packed_channels(detail_channels)
        self.packed = (PROMPT_CHANNELS, coarse, both - coarse)
        widths = (PROMPT_CHANNELS // 4, PROMPT_CHANNELS // 8)  # of the two steps up
        self.details = nn.ModuleList(
            nn.Conv2d(channels, width, 1) for channels, width in zip(detail_channels, widths, strict=True)
        )
        for module in self.details.parameters():
            nn.init.zeros_(module)

    def _taken_apart(self, image_embedding: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Give the embedding `(B, 256, h, w)`, and details `(B, 64, 2 h, 2 w)` and `(B, 32, 4 h, 4 w)`."""
        embedding, coarse, fine = image_embedding.split(self.packed, dim=1)
        return embedding, [
            self.details[0](F.pixel_shuffle(coarse, 2)),  # (B, 4 C, h, w) -> (B, C, 2 h, 2 w)
            self.details[1](F.pixel_shuffle(fine, 4)),  # (B, 16 C, h, w) -> (B, C, 4 h, 4 w)
        ]

    def _upscaled(self, image: torch.Tensor, details: list[torch.Tensor]) -> torch.Tensor:
        """Bring `(n, 256, h, w)` to `(n, 32, 4 h, 4 w)`, each step with its details."""
        grow, normalise, activate, grow_again, activate_again = self.output_upscaling
        half = activate(normalise(grow(image) + details[0]))
        return activate_again(grow_again(half) + details[1])


class GridPromptEncoder(PromptEncoder):
    """SAM's prompt encoder that keeps its grid's positional encoding, which depends on nothing but a small matrix.

    On a CPU, where the matrix is compared with the one that the encoding was made of: loading weights or moving them
    in whatever order cannot leave a stale one behind. An accelerator would have to wait for the comparison, and makes
    the encoding anew.
    """

    _kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def get_dense_pe(self) -> torch.Tensor:
        """Give the positional encoding of the grid's cells, `(1, 256, h, w)`; not to be written to."""
        matrix = self.pe_layer.get_buffer("positional_encoding_gaussian_matrix")
        if matrix.device.type != "cpu" or pieces.traced():
            return super().get_dense_pe()
        if self._kept is None or not _is_same(self._kept[0], matrix):
            # Fit for whatever comes later: for training, and in full precision.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                encoding = super().get_dense_pe().contiguous(memory_format=torch.channels_last)
                self._kept = (matrix.clone(), encoding)
        return self._kept[1]


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Say whether two tensors of the CPU have the same type and values."""
    return first.dtype == second.dtype and torch.equal(first, second)


def build_mask_decoder(*, detail_channels: Sequence[int] = ()) -> PromptMaskDecoder:
    """Build SAM's mask decoder with its published sizes (segment_anything/build_sam.py).

    Args:
        detail_channels: of what comes with the embeddings, see `DetailedMaskDecoder`; none for SAM's own.
    """
    transformer = TwoWayTransformer(depth=2, embedding_dim=PROMPT_CHANNELS, mlp_dim=2048, num_heads=8)
    for module in list(transformer.modules()):
        for name, part in module.named_children():
            if isinstance(part, Attention):
                setattr(module, name, FusedTokenAttention(part))
    settings: dict[str, Any] = {
        "transformer": transformer,
        "transformer_dim": PROMPT_CHANNELS,
        "num_multimask_outputs": 3,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": 256,
    }
    if detail_channels:
        return DetailedMaskDecoder(detail_channels=detail_channels, **settings)
    return PromptMaskDecoder(**settings)


def packed_channels(detail_channels: Sequence[int]) -> int:
    """Count the channels of an embedding that hold details at twice and at four times its resolution."""
    return sum(channels * 4 ** (level + 1) for level, channels in enumerate(detail_channels))


def build_prompt_encoder(*, grid_size: int, image_size: int) -> GridPromptEncoder:
    """Build SAM's prompt encoder with its published sizes (segment_anything/build_sam.py).

    Args:
        grid_size: side of the image embedding.
        image_size: side of the square image in pixels, the frame of the boxes.
    """
    return GridPromptEncoder(
        embed_dim=PROMPT_CHANNELS,
        image_embedding_size=(grid_size, grid_size),
        input_image_size=(image_size, image_size),
        mask_in_chans=16,
    )
