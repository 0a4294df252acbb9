"""What HSP-SAM costs beyond its image encoder: `python benchmarks/hsp_sam.py [--runs N]`.

SAM's ViT-B at 512 pixels, in single precision on the CPU:

- one forward pass of an image through the whole network with LoRA merged, against the bare encoder with the same
  weights and its own neck; and where the time goes;
- a step of training at batch size 4 with gradient checkpointing, against one without: time and peak memory.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

import torch
from measure import Action, overhead, race, say, write_result
from monai.losses import DiceCELoss
from stages import timed
from torch import nn
from variants import Builder, Request, benchmark, peak_alone, without_gradient

from scripts.networks.checkpoints import save_state_dict
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.image_encoders import build_image_encoder

ENCODER = "sam_vit_b"
IMAGE_SIZE = 512  # pixels
SMALL_SIZE = 64
BATCH_SIZE = 4
LARGEST_OVERHEAD = 35.0  # %, of the forward pass
CROSS_ENTROPY, DICE = 0.2, 0.8  # weights in the loss
LEARNING_RATE, WEIGHT_DECAY = 8e-4, 0.01
BLOCKS = "encoder blocks with prompts"


def network_of(request: Request, *, checkpointing: bool = False) -> HSPSAM:
    """Build the network with random weights, the same in every process and variant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HSPSAM(image_encoder=ENCODER, image_size=image_size(request), gradient_checkpointing=checkpointing)


def bare_encoder(request: Request) -> Callable[[], torch.Tensor]:
    """Prepare the image encoder alone, with an image to encode."""
    path = request.scratch / "encoder.pt"
    if not path.is_file():
        save_state_dict(network_of(request).merge_lora().image_encoder.state_dict(), path)
    with torch.device("meta"):
        encoder = build_image_encoder(ENCODER, image_size=image_size(request)).eval()
    encoder.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return without_gradient(partial(encoder, images(request, count=1)))


def whole_network(request: Request) -> Callable[[], torch.Tensor]:
    """Prepare the network with LoRA merged, with an image to segment."""
    return without_gradient(partial(network_of(request).merge_lora().eval(), images(request, count=1)))


def training_step(request: Request, *, checkpointing: bool) -> Action:
    """Prepare a step of training on a batch: forward pass, loss, backward pass and update."""
    network = network_of(request, checkpointing=checkpointing).train()
    batch, labels = images(request, count=BATCH_SIZE), labels_for(request)
    loss = DiceCELoss(
        to_onehot_y=True, softmax=True, squared_pred=True, batch=True, lambda_ce=CROSS_ENTROPY, lambda_dice=DICE
    )
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    fill_moments(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss(network(batch), labels).backward()
        optimizer.step()

    return step


def fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer allocate its moments before the first step, so that each step weighs the same."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def images(request: Request, *, count: int) -> torch.Tensor:
    """Make images `(count, 3, S, S)` with values in [0, 1]."""
    size = image_size(request)
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(0))


def labels_for(request: Request) -> torch.Tensor:
    """Make the label maps of a batch, `(B, 1, S, S)`: a square of foreground."""
    size = image_size(request)
    labels = torch.zeros((BATCH_SIZE, 1, size, size))
    labels[..., size // 4 : size // 2, size // 4 : size // 2] = 1
    return labels


def image_size(request: Request) -> int:
    """Give the side of the images in pixels."""
    return SMALL_SIZE if request.small else IMAGE_SIZE


def stages_of(request: Request) -> tuple[dict[str, float], str]:
    """Run both forward passes with a clock at each part.

    Returns:
        Median seconds of each part of the whole network, of what is left and of all together; and what the bare
        encoder spends on the parts that it has too, in words.
    """
    network = network_of(request).merge_lora().eval()
    encoder, decoder = network.image_encoder, network.decoder
    image = images(request, count=1)
    blocks = {BLOCKS: [(encoder, "levels")]}
    necks = [*network.necks.children(), encoder.get_submodule("neck")]
    parts: dict[str, Iterable[nn.Module]] = {"necks": necks, "prompt mapping": network.mappings.values()}
    parts |= {"decoder transformers": decoder.transformers, "upscaling head": [decoder.head]}
    methods = blocks | {stage: [(module, "forward") for module in modules] for stage, modules in parts.items()}
    seconds: dict[str, float] = defaultdict(float)
    for stage, places in methods.items():
        for module, method in places:
            setattr(module, method, timed(getattr(module, method), stage, seconds))
    bare = median_stages(partial(encoder, image), seconds, runs=request.runs)
    whole = median_stages(partial(network, image), seconds, runs=request.runs)
    words = (
        f"The stages are those of further passes. The bare encoder's blocks take {bare['all else']:g} s and its neck "
        f"{bare['necks']:g} s."
    )
    return whole, words


def median_stages(action: Action, seconds: dict[str, float], *, runs: int) -> dict[str, float]:
    """Run an action, and give the median of what its clocks add to `seconds`, of what is left and of all together."""
    clocked = timed(without_gradient(action), "total", seconds)
    clocked()
    rounds = []
    for _ in range(runs):
        seconds.clear()
        clocked()
        total = seconds.pop("total")
        rounds.append({**seconds, "all else": total - sum(seconds.values()), "total": total})
    return {stage: round(statistics.median(found[stage] for found in rounds), 4) for stage in rounds[0]}


VARIANTS: dict[str, Builder] = {
    "bare_encoder": bare_encoder,
    "whole_network": whole_network,
    "training": partial(training_step, checkpointing=False),
    "checkpointed_training": partial(training_step, checkpointing=True),
}


def measure(request: Request) -> None:
    """Measure the forward pass and training."""
    stages, words = stages_of(request)
    forward = {"limit": f"{LARGEST_OVERHEAD:g} %", "stages": stages, "note": words}
    report(request, f"hsp_sam_forward_{ENCODER}_{image_size(request)}", "bare_encoder", "whole_network", **forward)
    row = f"hsp_sam_training_memory_{ENCODER}_{image_size(request)}"
    note = f"Batch size {BATCH_SIZE}, single precision, LoRA of rank 32; forward pass, loss, backward pass and update."
    report(request, row, "training", "checkpointed_training", note=note)


def report(request: Request, row: str, base: str, variant: str, **values: object) -> None:
    """Measure what a variant takes beyond another, and write the row."""
    times = race({name: VARIANTS[name](request) for name in (base, variant)}, runs=request.runs)
    found = overhead(times[base], times[variant])
    peaks = {"peak_mb": peak_alone(request, variant), "base_peak_mb": peak_alone(request, base)}
    write_result(row, {**asdict(found), **peaks, **values}, command=request.command, folder=request.results)
    limit = f", below {values['limit']} asked for" if "limit" in values else ""
    say(
        f"{row}: {found.overhead_percent} % longer ({found.low} to {found.high}) in {found.runs} runs{limit}; "
        f"{found.base_seconds} s and {peaks['base_peak_mb']} MB against {found.seconds} s and {peaks['peak_mb']} MB"
    )
    if "stages" in values:
        say(f"  {values['stages']}; {values['note']}")


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, variants=VARIANTS, runs=3)
