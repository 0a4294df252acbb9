"""The diffusion-based class prompt encoder (AutoMedSAM, section 3.2 and Fig. 3).

A class index and the image embedding go in; the sparse and dense prompt embeddings of SAM's mask decoder come out. Two
presets, because the paper and its released code are not the same network:

=====================  ==================================  ==========================================
part                   `paper`                             `release`
=====================  ==================================  ==========================================
forward diffusion      one step (Eq. 5)                    T accumulated steps
first convolution      F_t, 256 channels                   F_T and the projected class, 257 channels
class at the bottom    projected (Eqs. 2, 3), 129th map    the bare number, 129th map
dense attention        1x1 convolution, ReLU (Eq. 7)       1x1 convolution
=====================  ==================================  ==========================================

Neither changes the resolution. The state-dict names are those of the authors' file
(https://github.com/HP-ML/AutoPromptMedSAM), so that their weights would load.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from scripts.errors import ConfigError
from scripts.networks import pieces
from scripts.networks.forward_diffusion import diffuse_accumulated, diffuse_once
from scripts.networks.prompts import PromptEmbeddings, images_of

Preset = Literal["paper", "release"]
ClassCode = Literal["scalar", "learned"]
LARGEST_CLASS = 255  # of a label map in bytes
EMBEDDING_CHANNELS = 256  # of SAM's image encoders and prompts
SPARSE_TOKENS = 2  # as many as SAM's prompt encoder makes of a box
RELEASE_CHANNELS = (64, 128, 256)  # of the authors' file; the paper gives none
DIFFUSION_STEPS = 100  # T of the authors' file; the paper gives none


def _double_convolution(channels_in: int, middle: int, channels_out: int) -> nn.Sequential:
    """Apply two 3x3 convolutions with ReLU (Eqs. 6 and 9), the resolution unchanged."""
    return nn.Sequential(
        nn.Conv2d(channels_in, middle, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(middle, channels_out, 3, padding=1),
        nn.ReLU(),
    )


class TwoBranchUNet(nn.Module):
    """Reverse diffusion: one encoder, a dense and a sparse decoder (section 3.2.2, Eqs. 6 to 12).

    Args:
        channels_in: of the diffused embedding, the class map included where there is one.
        channels: widths of the first level, the second level and the middle.
        rectified_attention: whether the dense attention ends in ReLU, as in Eq. 7.
    """

    def __init__(self, *, channels_in: int, channels: tuple[int, int, int], rectified_attention: bool) -> None:
        super().__init__()
        first, second, middle = channels
        self.enc1 = _double_convolution(channels_in, first, first)
        self.enc2 = _double_convolution(first, second, second)
        self.middle = _double_convolution(second, middle, second)
        self.dense_attention = nn.Conv2d(second + 1, second, 1)
        self.sparse_attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(second + 1, second, 1), nn.Sigmoid())
        self.dense_dec1 = _double_convolution(2 * second, second, first)
        self.dense_dec2 = _double_convolution(2 * first, first, EMBEDDING_CHANNELS)
        self.sparse_dec1 = _double_convolution(2 * second, second, first)
        self.sparse_dec2 = _double_convolution(2 * first, first, EMBEDDING_CHANNELS)
        self.rectified_attention = rectified_attention

    def forward(self, diffused: torch.Tensor, class_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the diffused embedding into a map for each branch.

        Args:
            diffused: `(N, channels_in, h, w)`.
            class_map: what tells the class at the bottom, `(N, 1, h, w)`.

        Returns:
            Two maps `(N, 256, h, w)` with values >= 0: dense, sparse.
        """
        return self.decode(self.enc1(diffused), class_map)

    def share(self, image_embedding: torch.Tensor) -> torch.Tensor:
        """Take the part of the first convolution that an image's classes have in common.

        Args:
            image_embedding: `(B, 256, h, w)`, without noise.

        Returns:
            `(B, first width, h, w)`, bias included.
        """
        convolution = cast(nn.Conv2d, self.enc1[0])
        weight = convolution.weight[:, :EMBEDDING_CHANNELS]
        return F.conv2d(image_embedding, weight, convolution.bias, padding=1)

    def complete(self, shared: torch.Tensor, class_map: torch.Tensor, *, repeats: int) -> torch.Tensor:
        """Add a class to what `share` gives, and finish the first level.

        A class map of 256 channels goes through the kernel as the embedding did. One of a single channel, spread over
        all channels, meets the sum of the kernel over these. Convolution is linear, and zeros around the sum are zeros
        around both, so that nothing is left out at the border.

        Args:
            shared: `(N, first width, h, w)`.
            class_map: the projected class, `(N, 1, h, w)`, or the learned one, `(N, 256, h, w)`.
            repeats: how often the map was added to each channel of the embedding.

        Returns:
            The first level's features, as `enc1` gives for the diffused embedding.
        """
        weight = cast(nn.Conv2d, self.enc1[0]).weight
        if class_map.shape[1] == EMBEDDING_CHANNELS:
            return self.enc1[1:](shared + repeats * F.conv2d(class_map, weight, padding=1))
        spread, appended = weight[:, :EMBEDDING_CHANNELS], weight[:, EMBEDDING_CHANNELS:]  # 256; 0 or 1
        kernel = repeats * spread.sum(dim=1, keepdim=True) + appended.sum(dim=1, keepdim=True)
        return self.enc1[1:](shared + F.conv2d(class_map, kernel, padding=1))

    def decode(self, first: torch.Tensor, class_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Go on from the first level.

        Args:
            first: the first level's features, `(N, first width, h, w)`.
            class_map: as for `forward`.

        Returns:
            As `forward`.
        """
        second = self.enc2(first)
        encoded = self.middle(second)
        attended = torch.cat((encoded, class_map), dim=1)  # F_att: the class is one more channel
        dense = encoded * self._dense_weights(attended)  # Eq. 8
        sparse = encoded * self.sparse_attention(attended)  # Eqs. 10 to 12
        dense = self.dense_dec1(torch.cat((dense, second), dim=1))
        sparse = self.sparse_dec1(torch.cat((sparse, second), dim=1))
        return self.dense_dec2(torch.cat((dense, first), dim=1)), self.sparse_dec2(torch.cat((sparse, first), dim=1))

    def _dense_weights(self, attended: torch.Tensor) -> torch.Tensor:
        """One weight for each channel and place (Eq. 7)."""
        weights = self.dense_attention(attended)
        return torch.relu(weights) if self.rectified_attention else weights


class ClassPromptEncoder(nn.Module):
    """Turn a class index and an image embedding into prompt embeddings.

    Args:
        grid_size: side h = w of the image embedding.
        preset: `paper` for the equations, `release` for the authors' file.
        channels: widths of the U-Net; the default is the authors'.
        diffusion_steps: T, 1 or more.
        diffusion: whether the embedding is diffused towards the class before the U-Net. Without (the ablation of
            Table 6) the U-Net takes F_I as it is, and the class enters where it is one more channel alone.
        class_code: `scalar`, the class's index as in the paper, so that classes lie on a line (Eqs. 2 and 3); or
            `learned`, a vector of 256 for each class, which is this project's: it is added to the embedding at every
            place, and projected from it is the one more channel. The vectors are there for ids up to 255, so that
            weights fit whatever the classes are.

    Raises:
        ConfigError: an unknown preset or class code, no diffusion step, or a learned code for the release, which has
            none.
    """

    def __init__(
        self,
        *,
        grid_size: int = 64,
        preset: Preset = "paper",
        channels: tuple[int, int, int] = RELEASE_CHANNELS,
        diffusion_steps: int = DIFFUSION_STEPS,
        diffusion: bool = True,
        class_code: ClassCode = "scalar",
    ) -> None:
        super().__init__()
        if class_code not in ("scalar", "learned") or (class_code == "learned" and preset == "release"):
            raise ConfigError(
                f"class_code is 'scalar' or, with the preset 'paper', 'learned'; not '{class_code}' with '{preset}'"
            )
        if preset not in ("paper", "release"):
            raise ConfigError(f"the class prompt encoder's preset is 'paper' or 'release', not '{preset}'")
        if diffusion_steps < 1:
            raise ConfigError(f"diffusion_steps counts from 1, and {diffusion_steps} is no number of steps")
        self.grid_size = grid_size
        self.preset = preset
        self.diffusion_steps = diffusion_steps
        self.diffusion = diffusion
        self.class_vectors = nn.Embedding(1 + LARGEST_CLASS, EMBEDDING_CHANNELS) if class_code == "learned" else None
        width = EMBEDDING_CHANNELS if class_code == "learned" else 1
        self.fc_label = nn.Linear(width, grid_size * grid_size)
        self.unet = TwoBranchUNet(
            channels_in=EMBEDDING_CHANNELS + (1 if preset == "release" else 0),
            channels=channels,
            rectified_attention=preset == "paper",
        )
        self.token_pool = nn.AdaptiveAvgPool2d((SPARSE_TOKENS, 1))

    def project(self, class_ids: torch.Tensor) -> torch.Tensor:
        """Spread class indices `(N,)` over the grid, linearly in the index (Eqs. 2 and 3) or vector: `(N, 1, h, w)`."""
        if self.class_vectors is None:
            projected = self.fc_label(class_ids.to(self.fc_label.weight.dtype).reshape(-1, 1))
        else:
            projected = self.fc_label(self.class_vectors(class_ids))
        return projected.reshape(-1, 1, self.grid_size, self.grid_size)  # (N, h w) -> (N, 1, h, w)

    def forward(
        self,
        image_embedding: torch.Tensor,
        class_ids: torch.Tensor,
        noise: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> PromptEmbeddings:
        """Encode K class prompts for each of B embeddings, N = B K rows, image by image.

        Args:
            image_embedding: F_I `(B, 256, h, w)`.
            class_ids: the class of each row, `(N,)`, 1 and above.
            noise: standard normal values `(N, 256, h, w)`, or None for none.
            timestep: t of each row `(N,)`, from 1 to T; None means T. The accumulated form always takes all T steps.

        Returns:
            Sparse `(N, 2, 256)` and dense `(N, 256, h, w)` embeddings with values >= 0.
        """
        class_map, bottom = self._class_maps(class_ids)
        noise = noise if self.diffusion else None
        if timestep is None:
            timestep = torch.full_like(class_ids, self.diffusion_steps)
        count = class_ids.shape[0]  # not len(), which an exporter takes for a number that never changes
        per_image = count // image_embedding.shape[0]
        of_images = self.unet.share(image_embedding) if noise is None else image_embedding
        width = EMBEDDING_CHANNELS * self.grid_size**2
        parts = []
        for rows in pieces.slices(count, width=width, like=image_embedding):
            images = images_of(of_images, rows, per_image)
            if noise is None:
                first = self.unet.complete(images, class_map[rows], repeats=self._repeats)
            else:
                first = self.unet.enc1(self._diffused(images, class_map[rows], noise[rows], timestep[rows]))
            parts.append(self._prompts(first, bottom[rows]))
        sparse, dense = (pieces.join(part) for part in zip(*parts, strict=True))
        return PromptEmbeddings(sparse, dense)

    @property
    def _repeats(self) -> int:
        """How often the class is added to the image embedding on its way to F_t or F_T."""
        if not self.diffusion:
            return 0
        return 1 if self.preset == "paper" else self.diffusion_steps

    def _class_maps(self, class_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give what tells the class at the U-Net's top, `(N, 1 or 256, h, w)`, and at its bottom, `(N, 1, h, w)`."""
        projected = self.project(class_ids)
        if self.class_vectors is not None:
            vectors = self.class_vectors(class_ids)[:, :, None, None]
            return vectors.expand(-1, -1, self.grid_size, self.grid_size), projected
        if self.preset == "paper":
            return projected, projected
        return projected, class_ids.to(projected.dtype).reshape(-1, 1, 1, 1).expand_as(projected)

    def _diffused(
        self, images: torch.Tensor, class_map: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Give the U-Net's input with noise, `(N, 256 or 257, h, w)`."""
        if self.preset == "paper":
            return diffuse_once(images, class_map, noise, timestep.to(images.dtype))
        diffused = diffuse_accumulated(images, class_map, noise, self.diffusion_steps)
        return torch.cat((diffused, class_map), dim=1)

    def _prompts(self, first: torch.Tensor, bottom: torch.Tensor) -> PromptEmbeddings:
        """Make prompts of the first level's features and of the class at the bottom."""
        dense, sparse = self.unet.decode(first, bottom)
        tokens = self.token_pool(sparse)  # (N, 256, 2, 1): means of the upper and of the lower half
        return PromptEmbeddings(sparse=tokens.flatten(2).transpose(1, 2), dense=dense)
