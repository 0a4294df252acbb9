"""What encoding once saves in training: `python benchmarks/encoding_once.py [--runs N]`.

- forward diffusion of T = 100 steps at once, against the loop of the authors' released code;
- an epoch of training from stored embeddings, against encoding every slice in every step: SAM's ViT-B at 512 pixels
  (at 1024 an epoch through the encoder takes minutes even of these few slices) and LiteMedSAM's TinyViT at 256.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from measure import Action, Seconds
from model_files import write_model
from monai.bundle import ConfigWorkflow
from variants import Builder, Request, benchmark, compare, without_gradient

from scripts.data.phantoms import write_phantoms
from scripts.networks.forward_diffusion import diffuse_accumulated

BUNDLE_ROOT = Path(__file__).resolve().parents[1]
STEPS = 100
GRID = 64  # SAM's
DIFFUSION_TARGET = 80.0
DIFFUSION_REPEATS = {"diffusion_at_once": 20}  # of some milliseconds each
SIZES = {"sam_vit_b": 512, "lite_medsam": 256}  # pixels
SMALL_SIZES = {"sam_vit_b": 32, "lite_medsam": 32}
TRAINING_TARGETS = {"sam_vit_b": 8.0, "lite_medsam": 1.8}
VOLUMES, SLICES = 2, 24
BATCH_SIZE = 4
SMALL_VOLUMES, SMALL_SLICES = 1, 12
PHANTOM_SIZE = 64  # pixels, before they are resized
LEARNED_CLASSES = [1, 2, 3, 4, 5]
MANY_EPOCHS = 10**6


def diffusion_loop(request: Request) -> Callable[[], torch.Tensor]:
    """Prepare the released loop for one image and class."""
    embedding, class_map, generator = diffusion_inputs(request)

    def loop() -> torch.Tensor:
        diffused = embedding
        for step in range(STEPS, 0, -1):
            diffused = diffused + torch.randn(embedding.shape, generator=generator) / (step + 1) + class_map
        return diffused

    return without_gradient(loop)


def diffusion_at_once(request: Request) -> Callable[[], torch.Tensor]:
    """Prepare the closed form for one image and class."""
    embedding, class_map, generator = diffusion_inputs(request)

    def at_once() -> torch.Tensor:
        noise = torch.randn(embedding.shape, generator=generator)
        return diffuse_accumulated(embedding, class_map, noise, STEPS)

    return without_gradient(at_once)


def diffusion_inputs(request: Request) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Make an embedding `(1, 256, h, w)`, a class map `(1, 1, h, w)` and a source of noise."""
    generator = torch.Generator().manual_seed(0)
    side = GRID // 8 if request.small else GRID
    embedding = torch.randn((1, 256, side, side), generator=generator)
    return embedding, torch.randn((1, 1, side, side), generator=generator), generator


def training(request: Request, *, encoder: str, stored: bool, size: int | None = None, device: str = "cpu") -> Action:
    """Prepare an epoch over phantom slices.

    Args:
        request: from the command line.
        encoder: name of the image encoder.
        stored: whether embeddings come from the store, which is filled when the first epoch starts.
        size: side of the images in pixels; None for that of this benchmark.
        device: where to train.
    """
    folder = request.scratch / encoder
    datalist, weights = folder / "phantoms" / "datalist.json", folder / "weights.pt"
    size = size or image_size(request, encoder)
    if not weights.is_file():
        volumes, slices = volumes_and_slices(request)
        write_phantoms(datalist.parent, training=volumes, validation=1, test=1, size=PHANTOM_SIZE, slices=slices)
        write_model(weights, image_encoder=encoder, image_size=size, class_ids=LEARNED_CLASSES)
    settings: dict[str, Any] = {"image_encoder": encoder, "image_size": size, "class_ids": LEARNED_CLASSES}
    settings |= {"class_code": "scalar"}  # as the weights have it, and the paper
    settings |= {"datalist": str(datalist), "dataset_dir": str(datalist.parent), "pretrained": str(weights)}
    settings |= {"augment": False, "device": f"$torch.device('{device}')"}
    if stored:
        settings |= {"embeddings_dir": str(folder / "store")}
    return epochs(settings, folder / ("stored" if stored else "encoding"))


def epochs(settings: dict[str, Any], output: Path) -> Action:
    """Prepare a training whose every call goes through the training slices once more, validation left out."""
    output.mkdir(exist_ok=True)
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE_ROOT / "configs" / "train.json"),
        meta_file=str(BUNDLE_ROOT / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(BUNDLE_ROOT),
        output_dir=str(output),
        max_epochs=1,
        batch_size=BATCH_SIZE,
        val_interval=MANY_EPOCHS,
        tensorboard=False,
        progress_bar=False,
        **settings,
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")

    def epoch() -> Seconds:
        trainer.state.max_epochs = trainer.state.epoch + 1
        trainer.run()
        return Seconds(trainer.state.times[Events.EPOCH_COMPLETED.name])

    return epoch


def image_size(request: Request, encoder: str) -> int:
    """Give the side of the images in pixels."""
    return (SMALL_SIZES if request.small else SIZES)[encoder]


def volumes_and_slices(request: Request) -> tuple[int, int]:
    """Give the number of volumes in an epoch, and of the slices in each."""
    return (SMALL_VOLUMES, SMALL_SLICES) if request.small else (VOLUMES, SLICES)


def training_note(request: Request, size: int) -> str:
    """Say what an epoch is."""
    volumes, slices = volumes_and_slices(request)
    return (
        f"An epoch of {volumes * slices} slices at {size} pixels, batch size {BATCH_SIZE}, one class a slice. It ends "
        "with the writing of its checkpoint; reading the weights and filling the store come before the first."
    )


VARIANTS: dict[str, Builder] = {
    "diffusion_loop": diffusion_loop,
    "diffusion_at_once": diffusion_at_once,
    **{f"{encoder}_encoding": partial(training, encoder=encoder, stored=False) for encoder in SIZES},
    **{f"{encoder}_stored": partial(training, encoder=encoder, stored=True) for encoder in SIZES},
}


def measure(request: Request) -> None:
    """Measure forward diffusion and both trainings."""
    compare(
        request,
        VARIANTS,
        slow="diffusion_loop",
        rows={"diffusion_at_once": "forward_diffusion"},
        targets={"diffusion_at_once": DIFFUSION_TARGET},
        repeats=DIFFUSION_REPEATS,
    )
    for encoder, target in TRAINING_TARGETS.items():
        size = image_size(request, encoder)
        compare(
            request,
            VARIANTS,
            slow=f"{encoder}_encoding",
            rows={f"{encoder}_stored": f"training_from_store_{encoder}_{size}"},
            targets={f"{encoder}_stored": target},
            note=training_note(request, size),
        )


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, variants=VARIANTS)
