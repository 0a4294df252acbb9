"""HSP-SAM (arXiv 2506.02854): segmentation without any prompt, by learned abstract prompts at each encoder level.

::

    image ──▶ image encoder (frozen, LoRA) ──▶ levels ──▶ necks ──▶ hierarchical decoder ──▶ logits
                     ▲ in the attention of each level                     ▲ of each level
    abstract prompts ┴──────────────────────────────────▶ mapping ────────┘

To compare with, positions predicted from each level can stand in the place of abstract prompts.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from scripts.errors import ConfigError, InputError
from scripts.networks.abstract_prompts import LevelAttention, PromptMapping
from scripts.networks.automedsam import SAM_PIXEL_MEAN, SAM_PIXEL_STD
from scripts.networks.hierarchical_decoder import Fusion, HierarchicalDecoder, level_neck
from scripts.networks.image_encoders import build_image_encoder
from scripts.networks.image_encoders.levels import Level, LevelEncoder, PromptAnswer
from scripts.networks.lora import (
    add_low_rank_updates,
    has_low_rank_updates,
    merge_low_rank_updates,
    published_state,
)
from scripts.networks.mask_decoding import build_mask_decoder, build_prompt_encoder
from scripts.networks.positional_prompts import PositionHead, Positions, embed_positions

logger = logging.getLogger(__name__)

PromptSource = Literal["static", "token_output", "positional"]
PixelNormalisation = Literal["unit", "sam"]

MOST_PROMPTS = 16  # the largest number of the authors' sweep
PROMPT_DEVIATION = 0.02  # of the prompts' first values
SAM_VIT_SIZE = 512  # pixels


class Explanation(NamedTuple):
    """Masks, and where the abstract prompts of each level look or its positional ones lie.

    Attributes:
        logits: `(B, K, S, S)`, the classes in the order of `class_ids`.
        attention: level, 0 for the shallowest -> `(B, N, h, w)`, the share of each image token in the attention of each
            abstract prompt, averaged over the heads; each map adds up to 1.
        positions: decoded level -> its box and points, of a network with positional prompts.
    """

    logits: torch.Tensor
    attention: dict[int, torch.Tensor]
    positions: dict[int, Positions]


class HSPSAM(nn.Module):
    """Segment all classes that the network knows, without a prompt.

    Args:
        image_encoder: `compact`, `lite_medsam`, `mobile_sam`, `sam_vit_b`, `sam_vit_l` or `sam_vit_h`. SAM's ViTs take
            abstract prompts into their blocks of global attention, TinyViTs into the last attention of each stage;
            levels of convolutions get an attention of their own behind them.
        image_size: side S of the square input in pixels; None means 512 for SAM's ViTs, else the published size.
        class_ids: the K classes; channel k of the answer is class k.
        prompts: N, abstract prompts of each level, from 0 to 16; of positional ones the points beside each box.
        lora_rank: of the updates to query and value in every attention of the image encoder; 0 for none. Updates are
            left out, and the log says so, where the encoder learns wholly or has no attention.
        train_image_encoder: whether the image encoder learns wholly. Without pretrained weights there is nothing to
            freeze.
        prompt_source: what the decoder's tokens are made of: `static` the learned prompts themselves, `token_output`
            what the encoder's attention gives for them, which depends on the image; `positional` a box and N points
            that the network predicts from each decoded level, through SAM's prompt encoder, see `PositionHead`. No
            prompts join the encoder's attention then.
        fusion: what a level behind the deepest tells the decoder: `feature_skip` its features, `mask_prompt` a dense
            prompt made of its own coarse masks; `none` decodes the deepest level alone.
        deep_residual: whether the deepest level's features are added again at each further level.
        final_image_attention: whether the decoder's image tokens attend to one another after the last level.
        pixel_normalisation: `unit` leaves pixels in [0, 1]; `sam` takes SAM's mean and standard deviation off them.
        gradient_checkpointing: whether training computes the encoder's blocks anew in the backward pass.

    Attributes:
        settings: the arguments that decide the shape and meaning of the weights, for the model card; `lora_rank` is 0
            where there are no updates.
        class_ids: sorted.
        merged_rank: of the updates that were put into the weights; 0 where none were.
        image_size: S.
        grid_size: side of the embedding's grid.

    Raises:
        ConfigError: a setting that does not exist or does not go with another.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        *,
        image_encoder: str = "sam_vit_b",
        image_size: int | None = None,
        class_ids: Sequence[int] = (1,),
        prompts: int = 2,
        lora_rank: int = 32,
        train_image_encoder: bool = False,
        prompt_source: PromptSource = "static",
        fusion: Fusion = "feature_skip",
        deep_residual: bool = False,
        final_image_attention: bool = False,
        pixel_normalisation: PixelNormalisation = "unit",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _require_classes(class_ids)
        _require_number_of_prompts(prompts)
        _require_choice("prompt_source", prompt_source, get_args(PromptSource))
        _require_choice("fusion", fusion, get_args(Fusion))
        _require_choice("pixel_normalisation", pixel_normalisation, get_args(PixelNormalisation))
        if deep_residual and fusion == "none":
            raise ConfigError("deep_residual adds to the levels behind the deepest; with fusion 'none' there are none")
        self.settings: dict[str, Any] = {
            "image_encoder": image_encoder,
            "image_size": image_size,
            "class_ids": list(class_ids),
            "prompts": prompts,
            "lora_rank": lora_rank,
            "prompt_source": prompt_source,
            "fusion": fusion,
            "deep_residual": deep_residual,
            "final_image_attention": final_image_attention,
            "pixel_normalisation": pixel_normalisation,
        }
        self.class_ids = tuple(sorted(class_ids))
        self.prompt_source = prompt_source
        self.pixel_normalisation = pixel_normalisation
        self.train_image_encoder = train_image_encoder
        self.gradient_checkpointing = gradient_checkpointing
        self.merged_rank = 0
        self._build_encoder(lora_rank)
        self._build_prompts(prompts, fusion)
        encoder = self._levels_of_encoder()
        self.prompt_encoder = build_prompt_encoder(grid_size=self.grid_size, image_size=self.image_size)
        self.prompt_encoder.requires_grad_(False)
        self.decoder = HierarchicalDecoder(
            levels=len(self.decoded_levels),
            masks=1 + len(self.class_ids),
            upscalings=(encoder.image_size // encoder.grid_size).bit_length() - 1,
            fusion=fusion,
            deep_residual=deep_residual,
            final_image_attention=final_image_attention,
        )
        self.register_buffer("pixel_mean", torch.tensor(SAM_PIXEL_MEAN).reshape(1, 3, 1, 1) / 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(SAM_PIXEL_STD).reshape(1, 3, 1, 1) / 255, persistent=False)
        self.register_load_state_dict_pre_hook(_separate_lora)
        self.train(self.training)

    def train(self, mode: bool = True) -> "HSPSAM":
        """Switch to training; what is frozen stays in eval mode, so that batch statistics are never touched."""
        super().train(mode)
        self.image_encoder.train(mode and self.train_image_encoder)
        self.prompt_encoder.eval()
        return self

    def forward(self, image: torch.Tensor, known_only: bool = False) -> torch.Tensor:
        """Segment images.

        Args:
            image: `(B, 3, S, S)` with values in [0, 1].
            known_only: whether to give the known classes alone, see `class_logits`.

        Returns:
            Logits `(B, 1 + largest id, S, S)`: channel 0 is the background at logit 0, channel k is class k, and a
            class that the network does not know has the lowest logit there is. Their softmax is the probability.

        Raises:
            InputError: an image of another shape or type.
        """
        logits = self.class_logits(image)
        return logits if known_only else self._by_class_id(logits)

    def class_logits(self, image: torch.Tensor) -> torch.Tensor:
        """Segment images `(B, 3, S, S)` with values in [0, 1].

        Returns:
            Logits `(B, K, S, S)` of the classes in the order of `class_ids`, relative to the background's.

        Raises:
            InputError: an image of another shape or type.
        """
        return self._decode(self.encode_levels(image))[0]

    def explain(self, image: torch.Tensor) -> Explanation:
        """Segment images `(B, 3, S, S)` with values in [0, 1], and show where the prompts look or lie.

        Raises:
            InputError: an image of another shape or type.
        """
        levels = self.encode_levels(image, ask=True)
        answers = {index: level.answer for index, level in enumerate(levels)}
        attention = {index: answer.attention for index, answer in answers.items() if answer is not None}
        logits, positions = self._decode(levels)
        return Explanation(logits, attention, positions)

    def encode_levels(self, image: torch.Tensor, *, ask: bool = False) -> list[Level]:
        """Give the encoder's levels of images `(B, 3, S, S)` with values in [0, 1], the shallowest first.

        Args:
            image: the images.
            ask: whether to give the prompts' answers although the decoder does not need them.

        Returns:
            Levels `(B, E, h, w)`, those of convolutions on the embedding's grid.

        Raises:
            InputError: an image of another shape or type.
        """
        self._require_image(image)
        if self.pixel_normalisation == "sam":
            image = (image - self.pixel_mean) / self.pixel_std
        ask = (ask or self.prompt_source == "token_output") and len(self.abstract_prompts) > 0
        encoder = self._levels_of_encoder()
        prompts = [self._prompts_of(index, image) for index in range(len(encoder.level_channels))]
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        levels = encoder.levels(image, prompts, ask=ask, checkpointing=checkpointing)
        for key, attention in self.level_attentions.items():
            features = _pooled(levels[int(key)].features, self.grid_size)
            levels[int(key)] = attention(features, prompts[int(key)], ask=ask)
        return levels

    def merge_lora(self) -> "HSPSAM":
        """Put LoRA's updates into the encoder's weights, for inference; the settings then ask for none.

        The merged weights have other names. A state dict with updates can be loaded all the same: the network then has
        them apart again, as before.
        """
        if self.settings["lora_rank"]:
            merge_low_rank_updates(self.image_encoder)
            self.merged_rank, self.settings["lora_rank"] = self.settings["lora_rank"], 0
        return self

    def separate_lora(self) -> "HSPSAM":
        """Undo `merge_lora`, but for the values: the weights stay merged, and the updates are zero as at first."""
        if self.merged_rank:
            with torch.random.fork_rng(devices=[]):  # values that are replaced are not drawn from the run's own
                add_low_rank_updates(self.image_encoder, self.merged_rank)
            self.settings["lora_rank"], self.merged_rank = self.merged_rank, 0
        return self

    def state_for(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give the state dict that a file is compared with: merged or not, as the file is if the network can be so.

        Args:
            found: the file's tensors by name.

        Returns:
            This network's tensors, or where it would take its updates apart for the file those of a network built
            alike, without memory.
        """
        if not (self.merged_rank and has_low_rank_updates(found)):
            return self.state_dict()
        with torch.device("meta"):
            return HSPSAM(**{**self.settings, "lora_rank": self.merged_rank}).state_dict()

    def sam_parts(self) -> nn.Module:
        """Give the parts that a published SAM file fills, under its names, for `checkpoints.load_sam_weights`.

        The image encoder and the prompt encoder share their memory with this network. The mask decoder is there for
        the file to be compared as a whole, and is of no further use: HSP-SAM learns its own.
        """
        with torch.device("meta"):
            encoder = build_image_encoder(self.settings["image_encoder"], image_size=self.image_size)
        encoder.load_state_dict(published_state(self.image_encoder), assign=True)
        return nn.ModuleDict(
            {"image_encoder": encoder, "prompt_encoder": self.prompt_encoder, "mask_decoder": build_mask_decoder()}
        )

    def _build_encoder(self, lora_rank: int) -> None:
        """Build the image encoder, and say what of it learns: all, or LoRA's updates and SAM's neck."""
        name, size = self.settings["image_encoder"], self.settings["image_size"]
        if size is None and name.startswith("sam_vit"):
            size = SAM_VIT_SIZE
        self.image_encoder = build_image_encoder(name, image_size=size)
        if getattr(self.image_encoder, "detail_channels", ()):
            raise ConfigError(f"the details of {name} are for AutoMedSAM's mask decoder: this network takes the levels")
        encoder = self._levels_of_encoder()
        self.image_size, self.grid_size = encoder.image_size, encoder.grid_size
        self.image_encoder.requires_grad_(self.train_image_encoder)
        encoder.neck.requires_grad_(True)
        if self.train_image_encoder and self.gradient_checkpointing and _has_batch_norm(self.image_encoder):
            raise ConfigError(
                f"gradient_checkpointing would count each batch twice in the batch statistics of {name}: freeze the "
                "encoder, or leave checkpointing out"
            )
        self.settings["lora_rank"] = self._add_lora(lora_rank)

    def _add_lora(self, rank: int) -> int:
        """Add LoRA's updates where they belong, and give their rank."""
        if rank == 0:
            return 0
        if self.train_image_encoder:
            logger.info("LoRA is off: the image encoder learns wholly")
            return 0
        if not add_low_rank_updates(self.image_encoder, rank):
            logger.info("LoRA is off: the image encoder has no attention")
            return 0
        return rank

    def _build_prompts(self, prompts: int, fusion: Fusion) -> None:
        """Build each level's prompts and its way to the decoder, as far as something takes them."""
        encoder = self._levels_of_encoder()
        channels = encoder.level_channels
        last = len(channels) - 1
        self.decoded_levels = (last,) if fusion == "none" else tuple(range(len(channels)))
        abstract = 0 if self.prompt_source == "positional" else prompts
        taken = {*self.decoded_levels, *(index for index, attends in enumerate(encoder.level_attends) if attends)}
        self.abstract_prompts = nn.ParameterDict(
            {str(index): torch.empty(abstract, channels[index]) for index in sorted(taken) if abstract}
        )
        for parameter in self.abstract_prompts.values():
            nn.init.normal_(parameter, std=PROMPT_DEVIATION)
        self.level_attentions = nn.ModuleDict(
            {
                str(index): LevelAttention(channels[index])
                for index in self.decoded_levels
                if not encoder.level_attends[index]
            }
        )
        self.mappings = nn.ModuleDict(
            {str(index): PromptMapping(channels[index], abstract) for index in self.decoded_levels if abstract}
        )
        positional = self.decoded_levels if self.prompt_source == "positional" else ()
        self.position_heads = nn.ModuleDict({str(index): PositionHead(prompts) for index in positional})
        # The last level has the encoder's own neck, which was trained with it.
        self.necks = nn.ModuleDict({str(index): level_neck(channels[index]) for index in self.decoded_levels[:-1]})

    def _levels_of_encoder(self) -> LevelEncoder:
        """Give the image encoder as one with levels, which all of them are."""
        return cast(LevelEncoder, self.image_encoder)

    def _prompts_of(self, level: int, like: torch.Tensor) -> torch.Tensor:
        """Give the abstract prompts of a level, `(N, E)`; none where nothing takes them."""
        key = str(level)
        if key in self.abstract_prompts:
            return self.abstract_prompts[key]
        return like.new_zeros((0, self._levels_of_encoder().level_channels[level]))

    def _decode(self, levels: Sequence[Level]) -> tuple[torch.Tensor, dict[int, Positions]]:
        """Decode levels to logits `(B, K, S, S)` relative to the background's; give positional prompts beside them."""
        features = {index: self._neck(index)(self._on_grid(levels[index])) for index in self.decoded_levels}
        positions = {int(key): head(features[int(key)]) for key, head in self.position_heads.items()}
        prompts = [self._tokens(index, levels[index], positions) for index in self.decoded_levels]
        no_mask = self.prompt_encoder.no_mask_embed.weight.unsqueeze(-1).unsqueeze(-1)  # (1, 256, 1, 1)
        masks = self.decoder(list(features.values()), prompts, self.prompt_encoder.get_dense_pe(), no_mask)
        return masks[:, 1:] - masks[:, :1], positions

    def _neck(self, level: int) -> nn.Module:
        """Give a level's way to the decoder."""
        return self.necks[str(level)] if str(level) in self.necks else self._levels_of_encoder().neck

    def _on_grid(self, level: Level) -> torch.Tensor:
        """Give a level's features on the embedding's grid, `(B, E, h, w)`, as the decoder's convolutions take them."""
        return _pooled(level.features, self.grid_size).contiguous(memory_format=torch.channels_last)

    def _tokens(self, level: int, answered: Level, positions: Mapping[int, Positions]) -> torch.Tensor:
        """Give the decoder's tokens for a level's prompts: `(B, N, 256)`, or `(B, N + 2, 256)` of a box and points."""
        if level in positions:
            return embed_positions(positions[level], self.prompt_encoder)
        count = answered.features.shape[0]
        if str(level) not in self.mappings:
            return answered.features.new_zeros((count, 0, self.prompt_encoder.embed_dim))
        mapping = self.mappings[str(level)]
        if self.prompt_source == "token_output":
            return mapping(cast(PromptAnswer, answered.answer).tokens)  # asked for in `encode_levels`
        return mapping(self.abstract_prompts[str(level)].unsqueeze(0)).expand(count, -1, -1)

    def _by_class_id(self, logits: torch.Tensor) -> torch.Tensor:
        """Lay `(B, K, S, S)` out by class id, behind the background at 0."""
        channels = logits.new_full(
            (logits.shape[0], 1 + self.class_ids[-1], *logits.shape[2:]), torch.finfo(logits.dtype).min
        )
        channels[:, 0] = 0.0
        return channels.index_copy(1, torch.tensor(self.class_ids, device=logits.device), logits)

    def _require_image(self, image: torch.Tensor) -> None:
        """Refuse images that are not `(B, 3, S, S)` or hold integers."""
        side = self.image_size
        if image.ndim != 4 or image.shape[1] != 3:
            raise InputError(
                f"expected colour images (B, 3, {side}, {side}), got {tuple(image.shape)}: repeat the channel of grey "
                "images, and leave out an alpha channel"
            )
        if tuple(image.shape[2:]) != (side, side):
            raise InputError(
                f"this network expects images of {side} x {side} pixels, got {tuple(image.shape)}: resize them, or "
                "build it with another image_size"
            )
        if not image.is_floating_point():
            raise InputError(f"expected floating-point pixels in [0, 1], got {image.dtype}: divide 8-bit pixels by 255")


def _separate_lora(network: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Make room for the updates of a state dict that is about to be loaded."""
    if has_low_rank_updates(name for name in state_dict if name.startswith(prefix)):
        cast(HSPSAM, network).separate_lora()


def _require_classes(class_ids: Sequence[int]) -> None:
    """Refuse class ids that cannot be channels."""
    if not class_ids or min(class_ids) < 1 or len(set(class_ids)) < len(class_ids):
        raise ConfigError(f"class_ids must be distinct numbers from 1 up, not {list(class_ids)}")


def _require_number_of_prompts(prompts: int) -> None:
    """Refuse more prompts than the authors tried, or less than none."""
    if not 0 <= prompts <= MOST_PROMPTS:
        raise ConfigError(f"prompts, those of each level, are from 0 to {MOST_PROMPTS}, not {prompts}")


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a setting that does not exist."""
    if value not in choices:
        raise ConfigError(f"{name} is one of {', '.join(choices)}, not {value!r}")


def _has_batch_norm(module: nn.Module) -> bool:
    """Say whether a module keeps batch statistics."""
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def _pooled(features: torch.Tensor, side: int) -> torch.Tensor:
    """Average features `(B, E, h, w)` down to a grid of that side, which divides theirs."""
    ratio = features.shape[2] // side
    return features if ratio == 1 else F.avg_pool2d(features, ratio)
