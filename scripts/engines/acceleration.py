"""Options that make PyTorch itself faster: compiled parts, and mixed precision where the device is made for it."""

from typing import Any, Literal

import torch
from monai.inferers import Inferer
from torch.nn.attention import SDPBackend, sdpa_kernel

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


class Bfloat16Inferer(Inferer):
    """Run a network in training with matrix products and convolutions in bfloat16; weights and loss stay float32.

    MONAI's `amp` is made for CUDA. This works on a CPU too, for those with AMX or avx512_bf16. bfloat16 has the
    range of float32, so that nothing needs to be scaled.

    Args:
        inferer: runs the network.
        device: where the network is.

    Raises:
        ConfigError: a device without instructions for bfloat16.
    """

    def __init__(self, inferer: Inferer, *, device: torch.device) -> None:
        super().__init__()
        require_bfloat16(device)
        self.inferer = inferer
        self.device = device

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Run `inferer` with the same arguments."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            if self.device.type != "cpu":
                return self.inferer(inputs, network, *args, **kwargs)
            with sdpa_kernel(SDPBackend.MATH):  # of bfloat16 the fused attention's backward pass is the slower one
                return self.inferer(inputs, network, *args, **kwargs)


def in_precision(inferer: Inferer, *, precision: Literal["float32", "bfloat16"], device: torch.device) -> Inferer:
    """Let an inferer run its network in a precision.

    Args:
        inferer: of the training.
        precision: see `Bfloat16Inferer`.
        device: where the network is.

    Raises:
        ConfigError: an unknown precision, or bfloat16 on a device without instructions for it.
    """
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision is 'float32' or 'bfloat16', not '{precision}'")
    return inferer if precision == "float32" else Bfloat16Inferer(inferer, device=device)
