"""Options that make PyTorch itself faster: compiled parts, and mixed precision where the device is made for it."""

import torch

from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM

_CPU_PROBES = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # of torch.cpu, private in every version so far


def on_device(network: AutoMedSAM, *, device: torch.device, compiled: bool = False) -> AutoMedSAM:
    """Bring the network to its device and, if asked to, compile its parts when they first run.

    Each part by itself, since the inferer calls them one by one; the names in the state dict stay. On a CPU compiling
    takes minutes for little: on CUDA alone.

    Args:
        network: to be moved, in place.
        device: where to.
        compiled: whether to use `torch.compile`.

    Raises:
        ConfigError: compiling for another device than CUDA.
    """
    if compiled and device.type != "cuda":
        raise ConfigError(f"compiled: expected a CUDA device, got {device}; leave the setting out")
    network.to(device)
    if compiled:
        compile_parts(network)
    return network


def compile_parts(network: AutoMedSAM, *, backend: str = "inductor") -> None:
    """Let `torch.compile` replace the forward pass of the image encoder, class prompt encoder and mask decoder.

    Args:
        network: in place.
        backend: of `torch.compile`.
    """
    for part in (network.image_encoder, network.class_prompt_encoder, network.mask_decoder):
        part.compile(backend=backend)


def cpu_has_bfloat16() -> bool:
    """Say whether this processor has instructions for bfloat16, AMX or avx512_bf16; without, it is the slower type.

    A PyTorch that cannot tell counts as no.
    """
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in _CPU_PROBES)


def require_bfloat16(device: torch.device) -> None:
    """Check that bfloat16 is at home on a device.

    Raises:
        ConfigError: a processor without instructions for it, where it would only be slower and less exact.
    """
    has = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
    if not has:
        raise ConfigError(f"precision bfloat16: {device} has no instructions for it; use float32")
