"""AutoMedSAM (arXiv 2502.06817, Fig. 2): the one place where its parts are put together.

::

    image ──▶ image encoder (frozen) ──▶ embedding ──┬──────────────────────────────▶ mask decoder ──▶ logits
    class ──▶ class prompt encoder ◀─────────────────┘──▶ sparse, dense prompts ──────────▲
    box   ──▶ SAM's prompt encoder (frozen) ──▶ the teacher's sparse, dense prompts
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from scripts.errors import ConfigError
from scripts.networks.checkpoints import fresh_details
from scripts.networks.class_prompt_encoder import (
    DIFFUSION_STEPS,
    EMBEDDING_CHANNELS,
    RELEASE_CHANNELS,
    ClassCode,
    ClassPromptEncoder,
    Preset,
)
from scripts.networks.image_encoders import build_image_encoder
from scripts.networks.mask_decoding import build_mask_decoder, build_prompt_encoder, packed_channels
from scripts.networks.prompts import MaskPrediction, PromptEmbeddings

# Of segment_anything/modeling/sam.py, for pixels from 0 to 255.
SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)


class AutoMedSAM(nn.Module):
    """Segment the classes asked for, each by name alone.

    Args:
        image_encoder: `compact`, `compact_detailed`, `lite_medsam`, `mobile_sam`, `sam_vit_b`, `sam_vit_l` or
            `sam_vit_h`.
        image_size: side S of the square input in pixels; None means the encoder's published size.
        class_ids: the classes that `network(image)` asks for; channel k of its answer is class k.
        preset: `paper` or `release`, see `ClassPromptEncoder`.
        channels: widths of the class prompt encoder's U-Net.
        diffusion_steps: T.
        diffusion: False for the ablation of Table 6, see `ClassPromptEncoder`.
        class_code: how the class enters, `scalar` or `learned`, see `ClassPromptEncoder`.
        prompt_branches: which prompts the decoder gets, `both`, `dense` or `sparse` (Table 5). What is missing is as
            for SAM without such a prompt: no tokens, or the embedding that stands for no mask.
        pixel_normalisation: `unit` leaves pixels in [0, 1], as MedSAM and LiteMedSAM were trained; `sam` takes SAM's
            mean and standard deviation off them, as SAM and MobileSAM were.
        train_image_encoder: whether the image encoder learns too. The papers freeze it; without pretrained weights
            there is nothing to freeze.

    Attributes:
        embedding_channels: C of an embedding, 256 and the image encoder's details.
        settings: the arguments that decide the shape and meaning of the weights, for the model card.

    Raises:
        ConfigError: a setting that does not exist, or class ids that are not positive and distinct.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        *,
        image_encoder: str = "lite_medsam",
        image_size: int | None = None,
        class_ids: Sequence[int] = (1, 2, 3, 4, 5),
        preset: Preset = "paper",
        channels: Sequence[int] = RELEASE_CHANNELS,
        diffusion_steps: int = DIFFUSION_STEPS,
        diffusion: bool = True,
        class_code: ClassCode = "scalar",
        prompt_branches: Literal["both", "dense", "sparse"] = "both",
        pixel_normalisation: Literal["unit", "sam"] = "unit",
        train_image_encoder: bool = False,
    ) -> None:
        super().__init__()
        if not class_ids or min(class_ids) < 1 or len(set(class_ids)) < len(class_ids):
            raise ConfigError(f"class_ids must be distinct numbers from 1 up, not {list(class_ids)}")
        if pixel_normalisation not in ("unit", "sam"):
            raise ConfigError(f"pixel_normalisation is 'unit' or 'sam', not '{pixel_normalisation}'")
        if prompt_branches not in ("both", "dense", "sparse"):
            raise ConfigError(f"prompt_branches is 'both', 'dense' or 'sparse', not '{prompt_branches}'")
        if len(channels) != 3:
            raise ConfigError(f"channels are the three widths of the class prompt encoder, not {list(channels)}")
        first, second, middle = channels
        self.settings: dict[str, Any] = {
            "image_encoder": image_encoder,
            "image_size": image_size,
            "class_ids": list(class_ids),
            "preset": preset,
            "channels": list(channels),
            "diffusion_steps": diffusion_steps,
            "diffusion": diffusion,
            "class_code": class_code,
            "prompt_branches": prompt_branches,
            "pixel_normalisation": pixel_normalisation,
        }
        self.class_ids = tuple(sorted(class_ids))
        self.pixel_normalisation = pixel_normalisation
        self.train_image_encoder = train_image_encoder
        self.prompt_branches = prompt_branches
        self.image_encoder = build_image_encoder(image_encoder, image_size=image_size)
        self.image_size: int = self.image_encoder.image_size  # type: ignore[assignment]
        self.grid_size: int = self.image_encoder.grid_size  # type: ignore[assignment]
        self.class_prompt_encoder = ClassPromptEncoder(
            grid_size=self.grid_size,
            preset=preset,
            channels=(first, second, middle),
            diffusion_steps=diffusion_steps,
            diffusion=diffusion,
            class_code=class_code,
        )
        self.prompt_encoder = build_prompt_encoder(grid_size=self.grid_size, image_size=self.image_size)
        details: tuple[int, ...] = getattr(self.image_encoder, "detail_channels", ())  # of few encoders
        self.mask_decoder = build_mask_decoder(detail_channels=details)
        self.embedding_channels = EMBEDDING_CHANNELS + packed_channels(details)
        if details:
            self.register_load_state_dict_pre_hook(_complete_details)
        self.image_encoder.requires_grad_(train_image_encoder)
        self.prompt_encoder.requires_grad_(False)
        self.register_buffer("pixel_mean", torch.tensor(SAM_PIXEL_MEAN).reshape(1, 3, 1, 1) / 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(SAM_PIXEL_STD).reshape(1, 3, 1, 1) / 255, persistent=False)
        self.train(self.training)

    @property
    def diffusion_steps(self) -> int:
        """T, the last time step of the forward diffusion."""
        return self.class_prompt_encoder.diffusion_steps

    def sam_parts(self) -> nn.ModuleDict:
        """Give the parts that a published SAM file fills, under its names, sharing memory with this network."""
        names = ("image_encoder", "prompt_encoder", "mask_decoder")
        return nn.ModuleDict({name: self.get_submodule(name) for name in names})

    def train(self, mode: bool = True) -> "AutoMedSAM":
        """Switch to training; what is frozen stays in eval mode, so that batch statistics are never touched."""
        super().train(mode)
        self.image_encoder.train(mode and self.train_image_encoder)
        self.prompt_encoder.eval()
        return self

    def forward(
        self,
        image: torch.Tensor,
        class_ids: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        box: torch.Tensor | None = None,
        by_box: torch.Tensor | None = None,
        embedded: bool = False,
    ) -> torch.Tensor | MaskPrediction:
        """Segment images, all known classes or those asked for.

        Args:
            image: `(B, 3, S, S)` with values in [0, 1]; or its embedding `(B, C, h, w)`, if `embedded` says so.
            class_ids: `(B, K)` classes to ask for in each image; None asks for all that the network knows.
            noise: standard normal values `(B, K, 256, h, w)` of the forward diffusion; None means none.
            timestep: diffusion steps `(B, K)`, from 1 to T; None means T.
            box: true boxes `(B, K, 4)`, xyxy in pixels of the input, from which the teacher's prompts are made.
            by_box: `(B, K)` bool, where the mask decoder gets the teacher's prompts in place of the class's, so that it
                learns boxes too; None for nowhere.
            embedded: whether `image` has been through the image encoder before.

        Returns:
            Without `class_ids` the logits `(B, 1 + largest id, S, S)`: channel 0 is the background at logit 0, channel
            k is class k, and a class that the network does not know has the lowest logit there is. With `class_ids` a
            `MaskPrediction`.
        """
        embedding = image if embedded else self.encode_image(image)
        if class_ids is None:
            return self._all_classes(embedding)
        prompts = self.encode_classes(embedding, class_ids, noise=noise, timestep=timestep)
        teacher = None if box is None else self.encode_boxes(box)
        given = prompts if teacher is None or by_box is None else _mixed(prompts, teacher, by_box.flatten())
        logits, quality = self.decode(embedding, given)
        return MaskPrediction(logits, quality, prompts, teacher)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embed images `(B, 3, S, S)` with values in [0, 1] as `(B, C, h, w)`, once for all their prompts."""
        if self.pixel_normalisation == "sam":
            image = (image - self.pixel_mean) / self.pixel_std
        if self.train_image_encoder:
            return self.image_encoder(image)
        with torch.no_grad():
            return self.image_encoder(image)

    def encode_classes(
        self,
        embedding: torch.Tensor,
        class_ids: torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> PromptEmbeddings:
        """Make the prompts of classes `(B, K)` for embeddings `(B, C, h, w)`: B x K rows, image by image."""
        prompts = self.class_prompt_encoder(
            embedding[:, :EMBEDDING_CHANNELS],
            class_ids.flatten(),
            None if noise is None else noise.flatten(0, 1),
            None if timestep is None else timestep.flatten(),
        )
        return prompts if self.prompt_branches == "both" else self._one_branch(prompts)

    def _one_branch(self, prompts: PromptEmbeddings) -> PromptEmbeddings:
        """Put in place of a branch that is left out what SAM's prompt encoder gives without such a prompt."""
        if self.prompt_branches == "sparse":
            absent = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            return PromptEmbeddings(prompts.sparse, absent.expand_as(prompts.dense))
        return PromptEmbeddings(prompts.sparse[:, :0], prompts.dense)

    def encode_boxes(self, box: torch.Tensor) -> PromptEmbeddings:
        """Make SAM's own prompts of boxes `(B, K, 4)`, xyxy in pixels of the input: B x K rows, without gradient."""
        with torch.no_grad():
            sparse, dense = self.prompt_encoder(points=None, boxes=box.reshape(-1, 4), masks=None)
        return PromptEmbeddings(sparse, dense)

    def encode_points(self, points: torch.Tensor, labels: torch.Tensor) -> PromptEmbeddings:
        """Make SAM's own prompts of the points of N objects, without gradient.

        Args:
            points: `(N, P, 2)` of x, y in pixels of the input.
            labels: `(N, P)`, 1 for a point in the object, 0 for one beside it.
        """
        with torch.no_grad():
            sparse, dense = self.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        return PromptEmbeddings(sparse, dense)

    def decode(self, embedding: torch.Tensor, prompts: PromptEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode prompts over their images.

        Args:
            embedding: `(B, C, h, w)`.
            prompts: B x K rows, image by image.

        Returns:
            Logits `(B, K, S, S)` and quality `(B, K)`.
        """
        images = embedding.shape[0]
        per_image = prompts.dense.shape[0] // images
        logits, quality = self.mask_decoder(embedding, self.prompt_encoder.get_dense_pe(), prompts)
        logits = logits.reshape(images, per_image, *logits.shape[1:])  # (B K, 4 h, 4 w) -> (B, K, 4 h, 4 w)
        if logits.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits, quality.reshape(images, per_image)

    def _all_classes(self, embedding: torch.Tensor) -> torch.Tensor:
        """Ask for every class known and lay the answers out by class id."""
        images = embedding.shape[0]
        ids = torch.tensor(self.class_ids, device=embedding.device)
        logits, _ = self.decode(embedding, self.encode_classes(embedding, ids.expand(images, -1)))
        lowest = torch.finfo(logits.dtype).min
        channels = logits.new_full((images, 1 + self.class_ids[-1], *logits.shape[2:]), lowest)
        channels[:, 0] = 0.0
        return channels.index_copy(1, ids, logits)


def _complete_details(network: AutoMedSAM, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Let weights from before the details be loaded."""
    found = {name.removeprefix(prefix): value for name, value in state.items()}
    for name, value in fresh_details(found, network.state_dict()).items():
        state[prefix + name] = value


def _mixed(prompts: PromptEmbeddings, teacher: PromptEmbeddings, chosen: torch.Tensor) -> PromptEmbeddings:
    """Take the teacher's prompts in the rows `chosen` `(N,)`, the others' elsewhere."""
    if prompts.sparse.shape != teacher.sparse.shape:
        raise ConfigError("boxes are learned beside classes with both branches of prompts alone: leave box_share at 0")
    return PromptEmbeddings(
        torch.where(chosen[:, None, None], teacher.sparse, prompts.sparse),
        torch.where(chosen[:, None, None, None], teacher.dense, prompts.dense),
    )
