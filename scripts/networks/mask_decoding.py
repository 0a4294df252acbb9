"""SAM's mask decoder and prompt encoder, built as published, for prompts of many images at once."""

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from scripts.networks.prompts import PromptEmbeddings

PROMPT_CHANNELS = 256
UPSCALING = 4  # the decoder's masks have four pixels for each cell of the grid, each way


class PromptMaskDecoder(MaskDecoder):
    """SAM's mask decoder with one image embedding for each prompt, giving the single mask of each.

    The parent repeats one image's embedding for all its prompts, which is wrong for a batch of images; and it computes
    the three further masks that SAM uses against ambiguous clicks, which a class does not need. Names and weights are
    the parent's.
    """

    def forward(
        self, image_embedding: torch.Tensor, positional_encoding: torch.Tensor, prompts: PromptEmbeddings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode N prompts.

        Args:
            image_embedding: `(N, 256, h, w)`, row i belonging to prompt i.
            positional_encoding: of the grid, `(1, 256, h, w)`.
            prompts: N sparse and dense embeddings.

        Returns:
            Logits `(N, 4 h, 4 w)` and the estimated intersection over union `(N,)`.
        """
        count, channels, height, width = image_embedding.shape
        own_tokens = torch.cat((self.iou_token.weight, self.mask_tokens.weight), dim=0)
        tokens = torch.cat((own_tokens.unsqueeze(0).expand(count, -1, -1), prompts.sparse), dim=1)
        positions = positional_encoding.expand(count, -1, -1, -1)
        tokens, image = self.transformer(image_embedding + prompts.dense, positions, tokens)
        image = image.transpose(1, 2).reshape(count, channels, height, width)  # (N, h w, C) -> (N, C, h, w)
        kernels = self.output_hypernetworks_mlps[0](tokens[:, 1])  # token 0 is the quality's, token 1 the single mask's
        logits = torch.einsum("nc,nchw->nhw", kernels, self.output_upscaling(image))
        return logits, self.iou_prediction_head(tokens[:, 0])[:, 0]


def build_mask_decoder() -> PromptMaskDecoder:
    """Build SAM's mask decoder with its published sizes (segment_anything/build_sam.py)."""
    transformer = TwoWayTransformer(depth=2, embedding_dim=PROMPT_CHANNELS, mlp_dim=2048, num_heads=8)
    return PromptMaskDecoder(
        transformer=transformer,
        transformer_dim=PROMPT_CHANNELS,
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )


def build_prompt_encoder(*, grid_size: int, image_size: int) -> PromptEncoder:
    """Build SAM's prompt encoder with its published sizes (segment_anything/build_sam.py).

    Args:
        grid_size: side of the image embedding.
        image_size: side of the square image in pixels, the frame of the boxes.
    """
    return PromptEncoder(
        embed_dim=PROMPT_CHANNELS,
        image_embedding_size=(grid_size, grid_size),
        input_image_size=(image_size, image_size),
        mask_in_chans=16,
    )
