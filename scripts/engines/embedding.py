"""Encode once: what the frozen image encoder says of slices is stored, and read from then on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.utils import convert_to_tensor
from tqdm import tqdm

from scripts.data.embeddings import EmbeddingShape, EmbeddingStore, FillReport, SliceEmbeddings, encoder_key
from scripts.data.slices import PromptedSlices
from scripts.engines.evaluators import FAILURE
from scripts.engines.inferers import ClassPromptInferer
from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM

logger = logging.getLogger(__name__)


def open_store(network: AutoMedSAM, folder: str | Path) -> EmbeddingStore:
    """Open the store of a network's image encoder with the weights that it has now.

    Args:
        network: with its weights loaded.
        folder: of all stores.

    Raises:
        ConfigError: an encoder that learns, whose embeddings change with every step, or a network that has no
            embedding of the image alone.
        OutputError: the folder cannot be made.
    """
    if not isinstance(network, AutoMedSAM):
        raise ConfigError(
            "embeddings can be stored for AutoMedSAM alone: HSP-SAM's abstract prompts take part in the image encoder; "
            "leave embeddings_dir out"
        )
    if network.train_image_encoder:
        raise ConfigError("embeddings can be stored of a frozen image encoder alone: train_image_encoder is true")
    key = encoder_key(
        network.image_encoder.state_dict(),
        image_size=network.image_size,
        pixel_normalisation=network.pixel_normalisation,
    )
    shape = EmbeddingShape(channels=network.embedding_channels, rows=network.grid_size, columns=network.grid_size)
    return EmbeddingStore(folder, encoder=key, shape=shape)


def encoder_of(network: AutoMedSAM, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Give the function from pixels `(n, 3, S, S)` on any device to embeddings, without gradient."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network.encode_image(pixels.to(device))

    return encode


class StoreEmbeddings:
    """Fill the store when the trainer starts, after the weights are in, and let the training slices read from it.

    Args:
        slices: the training slices; their `versions` are at least 1.
        network: whose image encoder is frozen.
        folder: of all stores.
        batch_size: slices that go through the encoder together.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        slices: PromptedSlices,
        network: AutoMedSAM,
        *,
        folder: str | Path,
        batch_size: int = 8,
        progress: bool = True,
    ) -> None:
        self.slices = slices
        self.network = network
        self.folder = folder
        self.batch_size = batch_size
        self.progress = progress

    def attach(self, engine: Engine) -> None:
        """Run at the start of the training."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Fill the store and switch the slices over."""
        self.fill(torch.device(engine.state.device))  # type: ignore[attr-defined]

    def fill(self, device: torch.device) -> FillReport:
        """Encode what is missing; several processes share the work.

        Raises:
            ConfigError: an encoder that learns, or slices that are augmented anew each time.
            OutputError: too little room on the disk.
        """
        store = open_store(self.network, self.folder)
        if self.slices.versions < 1:
            raise ConfigError(
                "stored embeddings need slices with fixed versions; give PromptedSlices versions 1 or more"
            )
        stored = SliceEmbeddings(
            store,
            self.slices,
            encode=encoder_of(self.network, device),
            batch_size=self.batch_size,
        )
        report = stored.fill(part=idist.get_rank(), parts=idist.get_world_size(), progress=self.progress)
        idist.barrier()  # no process may read what another has not written yet
        self.slices.embeddings = stored
        if report.encoded:
            logger.info(
                "embedded %d slices in %.1f s, %.1f a second",
                report.encoded, report.seconds, report.encoded / report.seconds,
            )  # fmt: skip
        return report


class StoreCases:
    """Let the inferer read whole cases from the store, and keep there what is new.

    Args:
        inferer: of the evaluator.
        network: whose image encoder is frozen.
        folder: of all stores.
    """

    def __init__(self, inferer: ClassPromptInferer, network: AutoMedSAM, *, folder: str | Path) -> None:
        self.inferer = inferer
        self.network = network
        self.folder = folder

    def attach(self, engine: Engine) -> None:
        """Run at the start of each evaluation, behind what loads the weights."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Open the store of the weights that the encoder has now.

        Raises:
            ConfigError: an encoder that learns.
            OutputError: the folder cannot be made.
        """
        self.inferer.store = open_store(self.network, self.folder)

    def fill(self, cases: Sequence[Mapping[str, Any]], device: torch.device, *, progress: bool = True) -> int:
        """Encode what is missing of cases, and segment nothing.

        Args:
            cases: prepared as for the evaluator; those that cannot be used are left to it.
            device: of the encoder.
            progress: whether to show a bar.

        Returns:
            The number of slices.

        Raises:
            ConfigError: an encoder that learns.
            OutputError: the folder cannot be made, or the disk is full.
        """
        self.inferer.store = open_store(self.network, self.folder)
        slices = 0
        with torch.no_grad():
            for number in tqdm(range(len(cases)), desc="embedding cases", disable=not progress):
                case = cases[number]
                if FAILURE not in case:
                    image = convert_to_tensor(case["image"], track_meta=False)
                    slices += self.inferer.embed(image.unsqueeze(0).to(device), self.network)
        logger.info("embeddings of the %d slices of %d whole cases are in %s", slices, len(cases), self.folder)
        return slices
