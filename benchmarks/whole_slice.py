"""What one slice with 13 classes gains: `python benchmarks/whole_slice.py [--runs N]`.

LiteMedSAM's TinyViT at 256 pixels with the release's class prompt encoder, T = 100 steps of noise that is drawn within
the time; the network alone, without files. The release's forward pass is called once for each class, encodes the image
each time and takes its steps in a loop. Beside it stands the same with the image encoded once.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from model_files import read_model, write_model
from plain_networks import Draw, PlainAutoMedSAM
from variants import Builder, Request, benchmark, compare, require_equal, without_gradient

from scripts.engines.runtimes import choose_runtime
from scripts.networks.automedsam import AutoMedSAM

ENCODER = "lite_medsam"
IMAGE_SIZE = 256  # pixels
SMALL_SIZE = 32
CLASSES = 13
STEPS = 100
TARGETS = {"torch": 7.0, "onnx": 12.0}
TOLERANCE = 1e-3
NOTE = (
    "Every variant draws its own noise; without noise their logits agree to 1e-3, which is checked before the timing."
)


def network_of(request: Request) -> AutoMedSAM:
    """Build the network with random weights, the same in every process."""
    path = model_path(request)
    if not path.is_file():
        size = SMALL_SIZE if request.small else IMAGE_SIZE
        ids = list(range(1, CLASSES + 1))
        write_model(
            path, image_encoder=ENCODER, image_size=size, class_ids=ids, preset="release", diffusion_steps=STEPS
        )
    return read_model(path)


def released(request: Request, *, noisy: bool = True) -> Callable[[], torch.Tensor]:
    """Prepare the release's way: everything anew for each class."""
    network, image = network_of(request), image_for(request)
    plain = PlainAutoMedSAM(network, draw=drawing() if noisy else None)
    return without_gradient(lambda: torch.cat([plain(image, class_id) for class_id in network.class_ids], dim=1))


def encoding_once(request: Request) -> Callable[[], torch.Tensor]:
    """Prepare the release's way with the image encoded once for all classes."""
    network, image = network_of(request), image_for(request)
    plain = PlainAutoMedSAM(network, draw=drawing())

    def segment() -> torch.Tensor:
        embedding = plain.image_encoder(image)
        return torch.cat([plain.decode(embedding, class_id) for class_id in network.class_ids], dim=1)

    return without_gradient(segment)


def ours(request: Request, *, runtime: str, noisy: bool = True) -> Callable[[], torch.Tensor]:
    """Prepare this project's way in a runtime: one embedding, all classes together, one draw for each."""
    network, image = network_of(request), image_for(request)
    model = choose_runtime(network, runtime=runtime, checkpoint=str(model_path(request)))
    ids = torch.tensor([network.class_ids])
    draw = drawing()

    def segment() -> torch.Tensor:
        embedding = model.encode_image(image)
        noise = draw(torch.Size((1, CLASSES, *embedding.shape[1:]))) if noisy else None
        logits, _ = model.decode(embedding, model.encode_classes(embedding, ids, noise=noise))
        return logits

    return without_gradient(segment)


def model_path(request: Request) -> Path:
    """Say where the model file is."""
    return request.scratch / "whole_slice.pt"


def image_for(request: Request) -> torch.Tensor:
    """Make an image `(1, 3, S, S)` with values in [0, 1]."""
    size = SMALL_SIZE if request.small else IMAGE_SIZE
    return torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0))


def drawing() -> Draw:
    """Give a source of standard normal values."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(1))


VARIANTS: dict[str, Builder] = {
    "released": released,
    "encoding_once": encoding_once,
    **{runtime: partial(ours, runtime=runtime) for runtime in TARGETS},
}


def measure(request: Request) -> None:
    """Check that all compute the same, and measure them."""
    reference = released(request, noisy=False)()
    require_equal(reference, [ours(request, runtime=name, noisy=False)() for name in TARGETS], tolerance=TOLERANCE)
    compare(
        request,
        VARIANTS,
        slow="released",
        rows={runtime: f"whole_slice_{runtime}" for runtime in TARGETS},
        targets=TARGETS,
        beside="encoding_once",
        floor="encoding_once",
        note=NOTE,
    )


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, variants=VARIANTS, runs=3)
