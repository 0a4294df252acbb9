"""What the image encoders gain: `python benchmarks/encoders.py [--runs N]`.

SAM's ViT-B at 1024 pixels and LiteMedSAM's TinyViT at 256 pixels, one image at a time: this project's in PyTorch and in
ONNX Runtime, against the plain form, which for ViT-B is segment_anything's own module.
"""

from collections.abc import Callable
from functools import partial

import torch
from model_files import read_model, write_model
from plain_networks import plain_image_encoder
from variants import Request, benchmark, compare, require_equal, without_gradient

from scripts.engines.runtimes import choose_runtime

SIZES = {"sam_vit_b": 1024, "lite_medsam": 256}  # pixels
SMALL_SIZES = {"sam_vit_b": 64, "lite_medsam": 32}
TARGETS = {"sam_vit_b": {"torch": 1.2, "onnx": 1.8}, "lite_medsam": {"torch": 1.2, "onnx": 2.2}}
FORMS = ("plain", "torch", "onnx")
TOLERANCE = 1e-3


def encoder(request: Request, *, name: str, form: str) -> Callable[[], torch.Tensor]:
    """Prepare an encoder in one of its forms, with an image to encode."""
    size = image_size(request, name)
    path = request.scratch / f"{name}.pt"
    if not path.is_file():
        write_model(path, image_encoder=name, image_size=size, class_ids=[1])
    network = read_model(path)
    image = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    if form == "plain":
        encode: Callable[[torch.Tensor], torch.Tensor] = plain_image_encoder(network.image_encoder)
    else:
        encode = choose_runtime(network, runtime=form, checkpoint=str(path)).encode_image
    return without_gradient(partial(encode, image))


def image_size(request: Request, name: str) -> int:
    """Give the side of the images in pixels."""
    return (SMALL_SIZES if request.small else SIZES)[name]


VARIANTS = {f"{name}_{form}": partial(encoder, name=name, form=form) for name in SIZES for form in FORMS}


def measure(request: Request) -> None:
    """Measure both encoders."""
    for name, targets in TARGETS.items():
        plain, *others = (encoder(request, name=name, form=form)() for form in FORMS)
        require_equal(plain, others, tolerance=TOLERANCE)
        row = f"encoder_{name}_{image_size(request, name)}"
        compare(
            request,
            VARIANTS,
            slow=f"{name}_plain",
            rows={f"{name}_{form}": f"{row}_{form}" for form in targets},
            targets={f"{name}_{form}": target for form, target in targets.items()},
            floor=f"{name}_plain",
        )


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, variants=VARIANTS)
