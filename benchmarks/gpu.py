"""What a GPU does: `python benchmarks/gpu.py [--runs N]`. Without CUDA it says so and writes nothing.

- SAM's ViT-B at 1024 pixels, images a second: bfloat16, and bfloat16 with compiled parts, against float32;
- training of SAM's ViT-B at 1024 pixels, samples a second: from stored embeddings against encoding in every step.
"""

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from encoding_once import training, volumes_and_slices
from measure import Action, comparison, race, say, write_result
from model_files import read_model, write_model
from variants import Request, benchmark, say_row

from scripts.engines.acceleration import compile_parts

ENCODER = "sam_vit_b"
IMAGE_SIZE = 1024  # pixels
SMALL_SIZE = 64
IMAGES_TOGETHER = 8
FORMS = ("float32", "bfloat16", "bfloat16_compiled")
REPEATS = 5  # batches a turn


def encoding(request: Request, *, form: str) -> Action:
    """Prepare the encoder on the GPU, with a batch of images to encode."""
    path, size = request.scratch / "encoder.pt", image_size(request)
    if not path.is_file():
        write_model(path, image_encoder=ENCODER, image_size=size, class_ids=[1])
    network = read_model(path).cuda()
    if form == "bfloat16_compiled":
        compile_parts(network)
    images = torch.rand((IMAGES_TOGETHER, 3, size, size), device="cuda")

    def encode() -> None:
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=form != "float32"):
            network.encode_image(images)
        torch.cuda.synchronize()

    return encode


def image_size(request: Request) -> int:
    """Give the side of the images in pixels."""
    return SMALL_SIZE if request.small else IMAGE_SIZE


def measure(request: Request) -> None:
    """Measure both where there is a GPU."""
    if not torch.cuda.is_available():
        say("no GPU is at hand: nothing is measured, and nothing is written")
        return
    encoders = {form: partial(encoding, request, form=form) for form in FORMS}
    rows = {form: f"gpu_{ENCODER}_{form}" for form in FORMS[1:]}
    report(request, encoders, rows, of_a_call=IMAGES_TOGETHER, repeats=REPEATS)
    volumes, slices = volumes_and_slices(request)
    trainings = {
        "encoding": partial(training, request, encoder=ENCODER, size=image_size(request), stored=False, device="cuda"),
        "stored": partial(training, request, encoder=ENCODER, size=image_size(request), stored=True, device="cuda"),
    }
    report(request, trainings, {"stored": f"gpu_training_from_store_{ENCODER}"}, of_a_call=volumes * slices, repeats=1)


def report(
    request: Request,
    builders: Mapping[str, Callable[[], Action]],
    rows: Mapping[str, str],
    *,
    of_a_call: int,
    repeats: int,
) -> None:
    """Measure variants against the first, and write a row for each of the others.

    Args:
        request: from the command line.
        builders: what prepares each variant, by name.
        rows: variant -> name of its row.
        of_a_call: images or samples that one call takes.
        repeats: calls in a turn.
    """
    first = next(iter(builders))
    peaks = {name: peak_on_gpu(build) for name, build in builders.items()}
    actions = {name: build() for name, build in builders.items()}
    times = race(actions, runs=request.runs, repeats=dict.fromkeys(builders, repeats))
    rates = {name: round(of_a_call / statistics.median(seconds), 1) for name, seconds in times.items()}
    for variant, row in rows.items():
        found = comparison(times[first], times[variant])
        values = {**asdict(found), "peak_mb": peaks[variant], "slow_peak_mb": peaks[first], "target": None}
        note = (
            f"{rates[variant]} a second against {rates[first]}, on {torch.cuda.get_device_name()}; memory of the GPU."
        )
        values |= {"note": note}
        write_result(row, values, command=request.command, folder=request.results)
        say_row(row, found, values)


def peak_on_gpu(build: Callable[[], Action]) -> int:
    """Run a variant once and give the most memory of the GPU that its tensors took, in MiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    build()()
    return round(torch.cuda.max_memory_allocated() / 2**20)


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure)
