"""Weights in and out: published SAM-like files, the author's class prompt encoder, and this bundle's own files.

Files are only ever read as tensors: `torch.load(..., weights_only=True)` or safetensors, so that no file can run code.
A file is compared with the network as a whole before any weight is set, so that a refused file changes nothing.
"""

import io
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from scripts.errors import CheckpointError, ConfigError, OutputError
from scripts.files import atomic_path
from scripts.networks.positional_prompts import EDGES

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS_SUFFIX = ".safetensors"
PUBLISHED_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
WRAPPERS = ("model", "state_dict", "network")
PARALLEL_PREFIX = "module."  # torch.nn.parallel puts it before every name
# [sic] the release's own spelling; the second is that of the group's older wrapper; the third is ours.
CLASS_PROMPT_PREFIXES = ("class_prmpt_encoder.", "diffusion_model.", "class_prompt_encoder.")
WHOLE_PREFIXES = ("class_prompt_encoder.", "decoder.", "plain_unet.")  # what only this bundle's own networks have
POSITION_TABLE = "image_encoder.pos_embed"
RELATIVE_TABLES = (".rel_pos_h", ".rel_pos_w")
NAMES_SHOWN = 3  # of each kind of mismatch

DETAILS = ".details."  # within the names of what only an image encoder with details, and its mask decoder, have

# What torch.load raises on damaged files, found by truncating files and flipping bits in them.
DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

# Hugging Face's SamModel to SAM, applied in this order: the inner layers of the heads move up before `proj_in` takes
# their place, and the blocks' norms come after the necks and masks, whose norms are numbered otherwise.
# https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/models/sam/modeling_sam.py
HUGGING_FACE_MARK = "vision_encoder."
HUGGING_FACE_TIED = "prompt_encoder.shared_embedding.positional_embedding"
HUGGING_FACE_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"^shared_image_embedding\.positional_embedding$",
            r"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        ),
        (r"^vision_encoder\.", r"image_encoder."),
        (r"^image_encoder\.layers\.", r"image_encoder.blocks."),
        (r"\.patch_embed\.projection\.", r".patch_embed.proj."),
        (r"\.neck\.conv1\.", r".neck.0."),
        (r"\.neck\.layer_norm1\.", r".neck.1."),
        (r"\.neck\.conv2\.", r".neck.2."),
        (r"\.neck\.layer_norm2\.", r".neck.3."),
        (r"\.point_embed\.", r".point_embeddings."),
        (r"\.mask_embed\.conv1\.", r".mask_downscaling.0."),
        (r"\.mask_embed\.layer_norm1\.", r".mask_downscaling.1."),
        (r"\.mask_embed\.conv2\.", r".mask_downscaling.3."),
        (r"\.mask_embed\.layer_norm2\.", r".mask_downscaling.4."),
        (r"\.mask_embed\.conv3\.", r".mask_downscaling.6."),
        (r"\.upscale_conv1\.", r".output_upscaling.0."),
        (r"\.upscale_layer_norm\.", r".output_upscaling.1."),
        (r"\.upscale_conv2\.", r".output_upscaling.3."),
        (r"(_head|_mlps\.\d+)\.layers\.0\.", r"\1.layers.1."),
        (r"(_head|_mlps\.\d+)\.proj_in\.", r"\1.layers.0."),
        (r"(_head|_mlps\.\d+)\.proj_out\.", r"\1.layers.2."),
        (r"\.layer_norm(\d|_final_attn)\.", r".norm\1."),
    )
)


@runtime_checkable
class HoldsSamParts(Protocol):
    """A network whose parts from SAM do not lie in it as SAM's files have them, such as `HSPSAM`."""

    def sam_parts(self) -> nn.Module:
        """Give the parts by SAM's names, sharing memory with the network."""
        ...


@runtime_checkable
class TakesSeveralForms(Protocol):
    """A network that can load state dicts of more than one form, such as an `HSPSAM` whose LoRA was merged."""

    def state_for(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the tensors that would be filled from a file with these."""
        ...


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file, on the CPU, under SAM's names.

    A dictionary under "model", "state_dict" or "network" is unwrapped, "module." before all names is taken off, and
    the names of Hugging Face's SamModel are turned into SAM's.

    Args:
        path: a file of PyTorch (.pt, .pth, .bin, .ckpt) or safetensors (.safetensors).

    Returns:
        Tensors by name, in the file's order and types.

    Raises:
        CheckpointError: no such file, another kind of file, a damaged one, one with other objects than tensors and
            plain containers, or one without tensors.
    """
    path = Path(path)
    _require_file(path)
    content = _read_safetensors(path) if path.suffix.lower() == SAFETENSORS_SUFFIX else _read_torch(path)
    state = _without_parallel_prefix(_tensors(_unwrap(content)))
    if not state:
        raise CheckpointError(f"{path} holds no named tensors: give the file of a state dict, not {_kind(content)}")
    return sam_names(state) if any(name.startswith(HUGGING_FACE_MARK) for name in state) else state


def sam_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the names of Hugging Face's SamModel into SAM's; shapes are the same.

    Args:
        state: tensors by SamModel's names, 315 for a ViT-B. The position matrix appears twice, and safetensors files
            keep only one of the two.

    Returns:
        The tensors by SAM's names, 314 for a ViT-B.
    """
    renamed = dict(state)
    tied = renamed.pop(HUGGING_FACE_TIED, None)
    if tied is not None:
        renamed.setdefault("shared_image_embedding.positional_embedding", tied)
    return {_sam_name(name): tensor for name, tensor in renamed.items()}


def load_sam_weights(network: nn.Module, path: str | Path) -> None:
    """Load a published SAM, MedSAM, LiteMedSAM or MobileSAM file into the three parts that come from SAM.

    Where the file's ViT was made for larger images than the network's, its tables of positions are resized.

    Args:
        network: a module with `image_encoder`, `prompt_encoder` and `mask_decoder`; other parts stay as they are.
        path: as for `read_state_dict`.

    Raises:
        CheckpointError: the file cannot be read, or does not fit name by name and shape by shape.
        ConfigError: the network lacks one of the parts.
    """
    parts = {name: _part(network, name) for name in PUBLISHED_PARTS}
    expected = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    read = read_state_dict(path)
    found = _fit_positions(read, expected)
    found |= fresh_details(found, expected)
    _require_match(expected, found, path, described=describe_weights(read))
    for name, part in parts.items():
        part.load_state_dict(_below(found, f"{name}."))


def load_network_weights(network: nn.Module, path: str | Path) -> None:
    """Load a whole network's own weights, such as `models/model.pt`, strictly.

    Args:
        network: the module that the file was saved from, or one built alike.
        path: as for `read_state_dict`.

    Raises:
        CheckpointError: the file cannot be read, or does not fit name by name and shape by shape.
    """
    found = read_state_dict(path)
    expected = network.state_for(found) if isinstance(network, TakesSeveralForms) else network.state_dict()
    described = describe_weights(found)
    found |= fresh_details(found, expected)
    _require_match(expected, found, path, described=described)
    network.load_state_dict(found)


def fresh_details(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give what weights from before an image encoder had details lack of it.

    Args:
        found: the weights, by SAM's names.
        expected: what they are loaded into, likewise.

    Returns:
        The details' weights in the image encoder as they are, and zeros in the mask decoder, so that nothing of them
        enters the masks until something was learned. Empty where `found` has any of them, or `expected` none.
    """
    if any(DETAILS in name for name in found):
        return {}
    return {
        name: torch.zeros_like(value) if name.startswith("mask_decoder.") else value
        for name, value in expected.items()
        if DETAILS in name
    }


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a weights file of either kind: a published SAM-like one, or a whole model of this bundle.

    Args:
        network: an `AutoMedSAM` or `HSPSAM`.
        path: the file.

    Raises:
        CheckpointError: the file is missing, unreadable or of another architecture.
    """
    if any(name.startswith(WHOLE_PREFIXES) for name in read_state_dict(path)):
        load_network_weights(network, path)
    else:
        load_sam_weights(network.sam_parts() if isinstance(network, HoldsSamParts) else network, path)


def load_class_prompt_encoder(network: nn.Module, path: str | Path) -> None:
    """Load the class prompt encoder out of an author's file; whatever else the file holds is left aside.

    Args:
        network: a module with `class_prompt_encoder`, whose names are `unet.*` and `fc_label.*`.
        path: as for `read_state_dict`; names begin with one of `CLASS_PROMPT_PREFIXES`.

    Raises:
        CheckpointError: the file cannot be read, holds no class prompt encoder, or one that does not fit.
        ConfigError: the network lacks the part.
    """
    encoder = _part(network, "class_prompt_encoder")
    state = read_state_dict(path)
    held = (_below(state, prefix) for prefix in CLASS_PROMPT_PREFIXES)
    found = next((part for part in held if part), None)
    if found is None:
        raise CheckpointError(
            f"{path} holds no class prompt encoder: expected names that begin with "
            f"{' or '.join(CLASS_PROMPT_PREFIXES)}, found {_listed(state)} ({describe_weights(state)})"
        )
    _require_match(encoder.state_dict(), found, path, described=describe_weights(state))
    encoder.load_state_dict(found)


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors to a file, under a temporary name first, so that no reader meets half a file.

    Args:
        state_dict: tensors by name, on any device; written as plain tensors of the CPU, each with its own memory.
        path: a file to create or replace in a folder that exists, .pt or .pth for PyTorch, .safetensors for
            safetensors.

    Raises:
        OutputError: another suffix, or a place that cannot be written to.
    """
    path = Path(path)
    serialise = _serialiser(path)
    content = serialise({name: _plain(tensor) for name, tensor in state_dict.items()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Resize absolute positions to another grid: bicubic, with the smoothing that shrinking asks for.

    Args:
        table: `(1, h, h, channels)`.
        side: cells on each axis of the new grid.

    Returns:
        Table `(1, side, side, channels)`, float32.
    """
    grid = table.float().permute(0, 3, 1, 2)  # (1, channels, h, h)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


def resize_relative_positions(table: Tensor, side: int) -> Tensor:
    """Resize relative positions to another grid: linear, as SAM itself does for a grid that does not fit.

    Args:
        table: `(2 * h - 1, channels)`, from the most negative offset to the most positive.
        side: cells on each axis of the new grid.

    Returns:
        Table `(2 * side - 1, channels)`, float32.
    """
    offsets = table.float().transpose(0, 1)[None]  # (1, channels, 2 * h - 1)
    resized = F.interpolate(offsets, size=2 * side - 1, mode="linear", align_corners=False)
    return resized[0].transpose(0, 1).contiguous()


def describe_weights(state: Mapping[str, Tensor]) -> str:
    """Say in words which architecture a state dict looks like.

    Args:
        state: tensors by name.
    """
    encoder = _describe_image_encoder(state)
    if any(name.startswith(CLASS_PROMPT_PREFIXES) for name in state):
        return f"a class-prompted network with {encoder}"
    if any(name.startswith("plain_unet.") for name in state):
        return "a U-Net"
    if any(name.startswith("decoder.") for name in state):
        return f"a prompt-free network of {_describe_prompts(state)} with {encoder}"
    if any(name.startswith(("unet.", "fc_label.")) for name in state):
        return "a class prompt encoder alone"
    return encoder


def _describe_prompts(state: Mapping[str, Tensor]) -> str:
    """Say which prompts a prompt-free network makes for itself at each level."""
    for name, tensor in state.items():
        if name.startswith("abstract_prompts."):
            return f"{len(tensor)} abstract prompts a level"
        if name.startswith("position_heads.") and name.endswith(".slopes"):
            return f"a box and {len(tensor) - len(EDGES)} points a level"
    return "no prompts"


def _describe_image_encoder(state: Mapping[str, Tensor]) -> str:
    """Recognise the image encoder by the entries in which the known ones differ."""
    position = state.get(POSITION_TABLE)
    if position is not None and position.ndim == 4:
        width, pixels = position.shape[3], 16 * position.shape[1]
        variant = {768: "SAM's or MedSAM's ViT-B", 1024: "SAM's ViT-L", 1280: "SAM's ViT-H"}
        return f"{variant.get(width, f'a ViT of width {width}')} for {pixels} pixels"
    patch = state.get("image_encoder.patch_embed.seq.0.c.weight")
    if patch is not None:
        return "LiteMedSAM's TinyViT" if patch.shape[-1] == 1 else "MobileSAM's TinyViT"
    if any(name.startswith("image_encoder.stages.") for name in state):
        detailed = any(name.startswith("image_encoder.details.") for name in state)
        return "the compact encoder with details" if detailed else "the compact encoder"
    return "an unknown image encoder" if any("image_encoder." in name for name in state) else "no image encoder"


def _require_file(path: Path) -> None:
    """Refuse what is not a weights file by its path alone."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the weights file in it")
    if not path.is_file():
        raise CheckpointError(
            f"there is no weights file {path}: check the path; configs/weights.yaml says where published weights are"
        )
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} may not be read by this user: change its permissions")
    if path.suffix.lower() not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        known = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        raise CheckpointError(f"{path} should end in one of {known}: give a weights file of PyTorch or safetensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): fetch or write it again") from error


def _read_torch(path: Path) -> Any:
    """Read PyTorch's file, old or new layout, whatever device it was saved from."""
    try:
        _require_checksums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise CheckpointError(_reading_failure(path, error)) from error


def _require_checksums(path: Path) -> None:
    """Refuse an archive whose bytes changed, which `torch.load` does not notice.

    Files of before PyTorch 1.6 are no archives and carry no checksums; writing them can also be switched off.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        written = any(entry.CRC for entry in archive.infolist())
        damaged = archive.testzip() if written else None
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def _reading_failure(path: Path, error: Exception) -> str:
    """Put what went wrong into words; PyTorch's own text would advise to unpickle the file, which can run code."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        return (
            f"{path} holds a Python object ({foreign[1]}) that loading would have to run, and was not loaded: where it "
            "was made, save the state dict alone, torch.save(model.state_dict(), ...), or as safetensors"
        )
    if "TorchScript" in str(error):
        return f"{path} is a TorchScript program, not weights: give the state dict that it was made from"
    return (
        f"{path} is not a whole PyTorch weights file ({_reason(error)}): fetch it again and compare its SHA-256 with "
        "configs/weights.yaml"
    )


def _reason(error: Exception) -> str:
    """Shorten what the reader complained about to the first line."""
    if isinstance(error, pickle.UnpicklingError) or not str(error).strip():
        return f"no tensors can be read from it, {type(error).__name__}"
    return str(error).strip().splitlines()[0].split(". ")[0][:120]


def _unwrap(content: Any) -> Any:
    """Take the state dict out of a training checkpoint."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def _tensors(content: Any) -> dict[str, Tensor]:
    """Keep the named tensors; counters and settings of the training may lie among them."""
    if not isinstance(content, Mapping):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _kind(content: Any) -> str:
    """Name what a file holds in place of a state dict."""
    if isinstance(content, Mapping):
        return f"a dictionary with the entries {_listed(map(str, content))}" if content else "an empty dictionary"
    return f"a {type(content).__name__}"


def _without_parallel_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take "module." off, where every name has it."""
    return _below(state, PARALLEL_PREFIX) if all(name.startswith(PARALLEL_PREFIX) for name in state) else state


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keep the entries under a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _sam_name(name: str) -> str:
    """Turn one of SamModel's names into SAM's."""
    for pattern, replacement in HUGGING_FACE_RULES:
        name = pattern.sub(replacement, name)
    return name


def _part(network: nn.Module, name: str) -> nn.Module:
    """Get a part of the network by its attribute."""
    part = getattr(network, name, None)
    if not isinstance(part, nn.Module):
        raise ConfigError(f"the network has no {name} to load weights into: build it with one")
    return part


def _fit_positions(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resize a ViT's tables of positions to the network's smaller grid; all else stays as it is.

    Only the tables of global attention grow with the image; those of the windows keep their length.
    """
    source, target = found.get(POSITION_TABLE), expected.get(POSITION_TABLE)
    if source is None or target is None or not _is_larger_grid(source, target):
        return found
    side, wanted = source.shape[1], target.shape[1]
    fitted = {**found, POSITION_TABLE: resize_positions(source, wanted)}
    for name in found.keys() & expected.keys():
        if name.endswith(RELATIVE_TABLES) and _spans(found[name], side) and _spans(expected[name], wanted):
            fitted[name] = resize_relative_positions(found[name], wanted)
    return fitted


def _spans(table: Tensor, side: int) -> bool:
    """Say whether a table of relative positions `(2 * side - 1, channels)` spans a grid of that side."""
    return table.ndim == 2 and len(table) == 2 * side - 1


def _is_larger_grid(source: Tensor, target: Tensor) -> bool:
    """Say whether both are tables `(1, h, h, channels)` of one width, and the first is of a larger grid."""
    if source.ndim != 4 or source.shape[0] != 1 or source.shape[1] != source.shape[2]:
        return False
    return source.shape[3] == target.shape[3] and source.shape[1] > target.shape[1]


def _require_match(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str | Path, *, described: str
) -> None:
    """Compare names and shapes, and say all differences at once; `described` is what the whole file looks like."""
    missing = [f"{name} {_shape(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{name} {_shape(found[name])}" for name in found if name not in expected]
    unlike = [
        f"{name} {_shape(found[name])} in the file, {_shape(expected[name])} in the network"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    kinds = {"of another shape": unlike, "missing in the file": missing, "unknown to the network": unexpected}
    differences = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names)
    if differences:
        raise CheckpointError(
            f"{path} looks like {described} and does not fit what it is loaded into, which looks like "
            f"{describe_weights(expected)}: {differences}. Choose weights for this network, or build the network "
            "that these weights are for"
        )


def _shape(tensor: Tensor) -> str:
    """Write a shape as a tuple."""
    return str(tuple(tensor.shape))


def _listed(names: Iterable[str]) -> str:
    """List the first few names."""
    names = list(names)
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _plain(tensor: Tensor) -> Tensor:
    """Copy to a plain tensor of the CPU: no gradient, no subclass with metadata, no memory shared with another."""
    return tensor.detach().cpu().as_subclass(Tensor).clone(memory_format=torch.contiguous_format)


def _serialiser(path: Path) -> Callable[[dict[str, Tensor]], bytes]:
    """Choose the layout by the suffix, and refuse to replace what is not a plain file."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a plain file and is not replaced: give another name")
    if path.suffix == SAFETENSORS_SUFFIX:
        return partial(safetensors.torch.save, metadata={"format": "pt"})
    if path.suffix in (".pt", ".pth"):
        return _torch_bytes
    raise OutputError(f"weights are written as .pt, .pth or {SAFETENSORS_SUFFIX}, not as {path.name}")


def _torch_bytes(state: dict[str, Tensor]) -> bytes:
    """Write PyTorch's layout to memory, so that a full disk shows itself as such when the bytes are written."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()
