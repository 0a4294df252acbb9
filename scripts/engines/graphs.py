"""What of a network is exported: functions of tensors alone, with words for what goes in and comes out.

AutoMedSAM comes in two parts, so that a slice is encoded once for all that is asked of it, HSP-SAM as a whole. The
noise of the forward diffusion is an input, since no graph takes a seeded generator.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from scripts.engines.runtimes import as_it_predicts, record
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.class_prompt_encoder import EMBEDDING_CHANNELS
from scripts.networks.hsp_sam import HSPSAM

IMAGES, CLASSES = "images", "classes"  # the axes whose size a caller chooses
EXAMPLE = {IMAGES: 2, CLASSES: 3}  # an exporter takes an example of 0 or 1 for a size that never changes
WHOLE_NUMBERS = "int64"
_DIVIDED = "sam_vit"  # encoders that divide their attention by the number of images, which a graph then fixes


@dataclass(frozen=True)
class Port:
    """One tensor that goes into a graph or comes out of it.

    Attributes:
        name: in the graph.
        shape: an axis of a chosen size by its name.
        meaning: in words, with the range of the values.
        low: smallest value; None for none.
        high: largest value; None for none.
        dtype: as PyTorch and numpy call it.
    """

    name: str
    shape: tuple[int | str, ...]
    meaning: str
    low: float | None = None
    high: float | None = None
    dtype: str = "float32"

    def draw(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        """Draw values of the range, or standard normal ones where it has no end."""
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)
        if self.dtype == WHOLE_NUMBERS:
            return torch.randint(int(self.low or 0), int(self.high or 0) + 1, shape, generator=generator)
        return torch.randn(shape, generator=generator) if self.high is None else torch.rand(shape, generator=generator)


@dataclass(frozen=True)
class Graph:
    """A function that is exported.

    Attributes:
        name: of its files.
        function: a module in evaluation mode that takes tensors in the order of `inputs`.
        inputs: what it takes.
        outputs: what it gives.
    """

    name: str
    function: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def axes(self) -> set[str]:
        """The axes of a chosen size."""
        return {axis for port in self.inputs for axis in port.shape if isinstance(axis, str)}

    @cached_property
    def shapes(self) -> tuple[dict[int, Any], ...]:
        """The axes of each input whose size stays open, as `torch.export` takes them."""
        open_sizes = {axis: torch.export.Dim(axis) for axis in sorted(self.axes)}
        return tuple(
            {place: open_sizes[axis] for place, axis in enumerate(port.shape) if isinstance(axis, str)}
            for port in self.inputs
        )

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The function as a recorded graph."""
        inputs = {port.name: values for port, values in zip(self.inputs, self.draw(EXAMPLE), strict=True)}
        with as_it_predicts(self.function):
            return record(self.function, inputs, self.shapes)

    def draw(self, sizes: Mapping[str, int], *, seed: int = 0) -> list[torch.Tensor]:
        """Draw inputs of the sizes of their axes."""
        generator = torch.Generator().manual_seed(seed)
        return [port.draw(sizes, generator) for port in self.inputs]

    def compute(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Let PyTorch compute the outputs."""
        with as_it_predicts(self.function):
            return as_list(self.function(*inputs))


def as_list(outputs: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Give what a function gives as a list."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def whole(network: AutoMedSAM | HSPSAM) -> Graph:
    """Give the network from image to logits: AutoMedSAM asked for all its classes, without noise.

    Args:
        network: in evaluation mode, as for `parts`.
    """
    channels = 1 + max(network.class_ids)
    logits = (
        "channel 0 is the background at 0, channel k class k; a class that the network does not know has the lowest "
        "number there is"
    )
    return Graph(
        "network",
        _Whole(network).eval(),
        (_image(network),),
        (Port("logits", (_images(network), channels, network.image_size, network.image_size), logits),),
    )


def parts(network: AutoMedSAM | HSPSAM) -> list[Graph]:
    """Give what is exported of a network: two parts of AutoMedSAM, HSP-SAM as a whole.

    Args:
        network: in evaluation mode.
    """
    return [_encoder(network), _decoder(network)] if isinstance(network, AutoMedSAM) else [whole(network)]


def _encoder(network: AutoMedSAM) -> Graph:
    """Give the image encoder."""
    encoder = _Encoder(_only(network, "image_encoder")).eval()
    return Graph("encoder", encoder, (_image(network),), (_embedding(network, _images(network)),))


def _decoder(network: AutoMedSAM) -> Graph:
    """Give the class prompt encoder with the mask decoder."""
    side, size = network.grid_size, network.image_size
    inputs = [
        _embedding(network, IMAGES),
        Port("class_ids", (IMAGES, CLASSES), "the classes asked for", 1, network.class_ids[-1], WHOLE_NUMBERS),
    ]
    if network.class_prompt_encoder.diffusion:
        noise = f"of the diffusion's step {network.diffusion_steps}: zeros for none, else standard normal values"
        inputs.append(Port("noise", (IMAGES, CLASSES, EMBEDDING_CHANNELS, side, side), noise))
    logits = "above 0 where the class is; the sigmoid is its probability"
    quality = "the decoder's estimate of each mask's intersection over union, where it has learned one"
    outputs = (Port("logits", (IMAGES, CLASSES, size, size), logits), Port("quality", (IMAGES, CLASSES), quality))
    decoder = _Decoder(_only(network, "class_prompt_encoder", "prompt_encoder", "mask_decoder")).eval()
    return Graph("decoder", decoder, tuple(inputs), outputs)


def _only(network: AutoMedSAM, *names: str) -> AutoMedSAM:
    """Give the network with some of its parts alone, so that a file holds no other weights; memory is shared."""
    shared = {id(values): values for values in (*network.parameters(), *network.buffers())}
    reduced = copy.deepcopy(network, shared)
    for name, _ in list(reduced.named_children()):
        if name not in names:
            setattr(reduced, name, nn.Identity())
    return reduced


def _image(network: AutoMedSAM | HSPSAM) -> Port:
    meaning = "slices on the square, red, green and blue or grey three times"
    return Port("image", (_images(network), 3, network.image_size, network.image_size), meaning, 0, 1)


def _embedding(network: AutoMedSAM, images: int | str) -> Port:
    return Port(
        "embedding",
        (images, network.embedding_channels, network.grid_size, network.grid_size),
        "what the image encoder gives",
    )


def _images(network: AutoMedSAM | HSPSAM) -> int | str:
    """Say how many images the image encoder takes together."""
    return 1 if str(network.settings["image_encoder"]).startswith(_DIVIDED) else IMAGES


class _Whole(nn.Module):
    """The network as a function of the image alone.

    Args:
        network: to be called.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images `(B, 3, S, S)` to logits `(B, 1 + largest id, S, S)`."""
        return self.network(image)


class _Encoder(nn.Module):
    """The image encoder with its normalisation.

    Args:
        network: whose it is.
    """

    def __init__(self, network: AutoMedSAM) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images `(B, 3, S, S)` to embeddings `(B, 256, h, w)`."""
        return self.network.encode_image(image)


class _Decoder(nn.Module):
    """The class prompt encoder with the mask decoder.

    Args:
        network: whose they are.
    """

    def __init__(self, network: AutoMedSAM) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, embedding: torch.Tensor, class_ids: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map embeddings `(B, 256, h, w)`, ids `(B, K)` and noise `(B, K, 256, h, w)` to logits and quality."""
        # Said beforehand, or an exporter would find it out by dividing, and demand more than one image and class.
        torch._check(class_ids.shape[0] == embedding.shape[0])
        if noise is not None:
            torch._check(noise.shape[0] == embedding.shape[0])
            torch._check(noise.shape[1] == class_ids.shape[1])
        return self.network.decode(embedding, self.network.encode_classes(embedding, class_ids, noise=noise))
