"""What exported files cost and give: `python benchmarks/exports.py [--runs N]`.

One slice with five classes through LiteMedSAM's TinyViT at 256 pixels, class prompt encoder and mask decoder, in single
precision: the files of `automedsam export`, opened as another program would, against PyTorch. TorchScript is left out,
since its files run code where they are loaded.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from model_files import read_model, write_model
from variants import Builder, Request, benchmark, compare, require_equal, without_gradient

from scripts.engines.exporting import export_model
from scripts.engines.runtimes import import_onnxruntime
from scripts.networks.class_prompt_encoder import EMBEDDING_CHANNELS

ENCODER = "lite_medsam"
IMAGE_SIZE, SMALL_SIZE = 256, 32  # pixels
CLASSES = 5
FORMS = ("onnx", "pt2")
PARTS = ("encoder", "decoder")
TOLERANCE = 1e-3
BYTES_PER_MEGABYTE = 1e6

Part = Callable[..., torch.Tensor]  # the first of its outputs


def exports(request: Request) -> Path:
    """Write the model and its exports where they are not there yet, and give their folder."""
    folder = request.scratch / "exports"
    if not folder.is_dir():
        size = SMALL_SIZE if request.small else IMAGE_SIZE
        folder.mkdir()
        ids = list(range(1, CLASSES + 1))
        model = write_model(request.scratch / "model.pt", image_encoder=ENCODER, image_size=size, class_ids=ids)
        export_model(model, folder, formats=list(FORMS))
    return folder


def plain(request: Request) -> Callable[[], torch.Tensor]:
    """Prepare PyTorch."""
    exports(request)
    network = read_model(request.scratch / "model.pt")
    image, ids = inputs(network.image_size)
    return without_gradient(lambda: network(image, class_ids=ids).logits)


def exported(request: Request, *, form: str) -> Callable[[], torch.Tensor]:
    """Prepare the files of a format; the noise, which they always take, is zero."""
    folder = exports(request)
    encode, decode = (open_part(folder / f"{part}.{form}") for part in PARTS)
    image, ids = inputs(SMALL_SIZE if request.small else IMAGE_SIZE)
    with torch.no_grad():
        side = encode(image).shape[-1]
    noise = torch.zeros(1, CLASSES, EMBEDDING_CHANNELS, side, side)
    return without_gradient(lambda: decode(encode(image), ids, noise))


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give an image and the classes to ask for in it."""
    image = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    return image, torch.arange(1, CLASSES + 1).unsqueeze(0)


def open_part(path: Path) -> Part:
    """Open one file."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda *values: first(module(*values))
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]

    def run(*values: torch.Tensor) -> torch.Tensor:
        given = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def first(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Give the embedding or the logits."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def note_of(request: Request, form: str) -> str:
    """Say how large the files of a format are, and how long they take to be opened."""
    paths = [exports(request) / f"{part}.{form}" for part in PARTS]
    seconds = []
    for _ in range(request.runs):
        start = time.perf_counter()
        for path in paths:
            open_part(path)
        seconds.append(time.perf_counter() - start)
    size = sum(path.stat().st_size for path in paths) / BYTES_PER_MEGABYTE
    return f"Both files together have {size:.1f} MB and are opened in {statistics.median(seconds):.2f} s."


VARIANTS: dict[str, Builder] = {"torch": plain, **{form: partial(exported, form=form) for form in FORMS}}


def measure(request: Request) -> None:
    """Measure the formats."""
    require_equal(plain(request)(), [exported(request, form=form)() for form in FORMS], tolerance=TOLERANCE)
    for form in FORMS:
        note = note_of(request, form)
        compare(request, VARIANTS, slow="torch", rows={form: f"exports_{form}"}, targets={}, note=note)


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, variants=VARIANTS)
