"""A trained network as files for other programs: ONNX, torch.export, safetensors and TorchScript.

Nothing takes its place before its outputs were compared with PyTorch's on inputs that it was not made with.
"""

import contextlib
import importlib.metadata
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.engines.graphs import CLASSES, IMAGES, Graph, as_list, parts, whole
from scripts.engines.runtimes import OPSET, as_it_predicts, import_onnxruntime, quietly, require_exporter, to_onnx
from scripts.errors import CheckpointError, ConfigError, OutputError
from scripts.files import TEMPORARY_PREFIX
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_network_weights, read_state_dict, save_state_dict
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.model_card import ModelCard
from scripts.report.run_record import sha256_of, versions
from scripts.report.tables import write_json

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]  # computes a graph's outputs of its inputs

FORMATS = ("onnx", "pt2", "safetensors", "torchscript")
TOLERANCE = 1e-4  # of the largest value of PyTorch's output, or of 1 where that is larger
MANIFEST = "manifest.json"
WEIGHTS, SAFE_WEIGHTS, CARD = "model.pt", "model.safetensors", "model.json"
_COMPARED = ((1, 1), (2, 5), (3, 2))  # images and classes
_BYTES_PER_MEGABYTE = 1e6
_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".ts"}


@dataclass(frozen=True)
class Exported:
    """One file that was written and compared.

    Attributes:
        format: one of `FORMATS`.
        file: its name.
        graph: what it computes.
        difference: largest difference from PyTorch's outputs, see `TOLERANCE`.
    """

    format: str
    file: str
    graph: Graph
    difference: float


@dataclass(frozen=True)
class Outcome:
    """What became of an export.

    Attributes:
        text: a table of the files.
        failures: file -> why it is not there.
    """

    text: str
    failures: dict[str, str]


def export_model(checkpoint: str | Path, folder: str | Path, *, formats: Sequence[str] = FORMATS) -> Outcome:
    """Write a model in other formats, with its card and a manifest.

    Args:
        checkpoint: its weights file, with its card beside it.
        folder: of the files, which exists. Files of the same names are replaced, one by one.
        formats: some of `FORMATS`.

    Returns:
        The table of the files, and what could not be made or was too far off.

    Raises:
        ConfigError: an unknown format, or one whose packages are not installed.
        CheckpointError: no weights file or card, or weights that are not of the network on the card.
        OutputError: the folder cannot be written.
    """
    chosen = _chosen_formats(formats)
    checkpoint, folder = Path(checkpoint), Path(folder)
    if not checkpoint.is_file():
        raise CheckpointError(f"there is no weights file {checkpoint}: check the path; training writes model.pt")
    card = ModelCard.beside(checkpoint)
    network = _read_network(card, checkpoint)
    found, failures = [], {}
    with _folder_beside(folder) as temporary:
        for kind, name, graph, write in _jobs(network, card, checkpoint, chosen):
            difference, failure = _attempt(graph, write, temporary / name)
            if failure:
                failures[name] = failure
            else:
                found.append(Exported(kind, name, graph, difference))
        _copy_card(checkpoint, temporary / CARD)
        write_json(_manifest(card, checkpoint, found, temporary), temporary / MANIFEST)
        text = _table(found, temporary)
        _move(temporary, folder)
    return Outcome(text, failures)


# ----------------------------------------------------------------------------------------------------------- formats


def _write_onnx(graph: Graph, path: Path) -> Run:
    """Write a graph for ONNX Runtime and other runtimes; of more than 2 GB the weights become a second file."""
    names = [port.name for port in graph.inputs]
    with as_it_predicts(graph.function):
        program = to_onnx(
            graph.program, inputs=names, outputs=[port.name for port in graph.outputs], shapes=graph.shapes
        )
    program.save(path)
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given = {name: values.numpy() for name, values in zip(names, inputs, strict=True)}
        return [torch.from_numpy(values) for values in session.run(None, given)]

    return run


def _write_pt2(graph: Graph, path: Path) -> Run:
    """Write a graph for `torch.export.load`."""
    torch.export.save(graph.program, path)
    module = torch.export.load(path).module()
    return lambda inputs: as_list(module(*inputs))


def _write_torchscript(graph: Graph, path: Path) -> Run:
    """Write a trace for `torch.jit.load`.

    Scripting would need another network: TorchScript knows neither slices as values nor named tuples among which a
    function chooses. What is compared is the trace itself, since loading TorchScript runs what is in the file.
    """
    with as_it_predicts(graph.function), quietly():
        traced = torch.jit.trace(graph.function, tuple(graph.draw({IMAGES: 2})), check_trace=False)
        torch.jit.save(traced, path)
    return lambda inputs: as_list(traced(*inputs))


def _write_weights(card: ModelCard, checkpoint: Path) -> Callable[[Graph, Path], Run]:
    """Give what writes the file's tensors, in their own types, and reads them back into a network of its own."""

    def write(_: Graph, path: Path) -> Run:
        save_state_dict(read_state_dict(checkpoint), path)
        return whole(_read_network(card, path)).compute

    return write


def _jobs(
    network: AutoMedSAM | HSPSAM, card: ModelCard, checkpoint: Path, formats: Sequence[str]
) -> Iterator[tuple[str, str, Graph, Callable[[Graph, Path], Run]]]:
    """Say which files are to be made: format, name, what it computes, and what writes it."""
    writers = {"onnx": _write_onnx, "pt2": _write_pt2, "torchscript": _write_torchscript}
    all_parts, together = parts(network), whole(network)
    for kind in formats:
        if kind == "safetensors":
            for name in (SAFE_WEIGHTS, WEIGHTS):
                yield kind, name, together, _write_weights(card, checkpoint)
            continue
        for graph in [together] if kind == "torchscript" else all_parts:
            yield kind, f"{graph.name}{_SUFFIXES[kind]}", graph, writers[kind]


def _attempt(graph: Graph, write: Callable[[Graph, Path], Run], path: Path) -> tuple[float, str]:
    """Write a file and compare it: the difference and, where it is not kept, the reason."""
    try:
        difference = _difference(graph, write(graph, path))
    except OSError as error:
        raise OutputError(f"{path.name} cannot be written: {error}; make room, or choose another folder") from error
    except RuntimeError as error:  # of the exporters, whose own errors are of this kind
        reason = " ".join(str(error).split())[:300]
        failure = f"{type(error).__name__}: {reason}"
    else:
        if difference <= TOLERANCE:
            return difference, ""
        failure = f"its outputs differ from PyTorch's by {difference:.1g}, more than {TOLERANCE:g}"
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    return float("nan"), failure


def _difference(graph: Graph, run: Run) -> float:
    """Compare with PyTorch on fresh inputs, the first without noise; NaN where an output is no number."""
    worst = []
    for seed, (images, classes) in enumerate(_COMPARED, start=1):
        inputs = graph.draw({IMAGES: images, CLASSES: classes}, seed=seed)
        if seed == 1:
            noiseless = [port.name == "noise" for port in graph.inputs]
            inputs = [values * 0 if none else values for values, none in zip(inputs, noiseless, strict=True)]
        expected = graph.compute(inputs)
        with torch.no_grad():
            found = run(inputs)
        worst += [_relative(*pair) for pair in zip(found, expected, strict=True)]
    return float(torch.tensor(worst, dtype=torch.float64).max())  # hands NaN on


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Give the largest difference of two outputs of one shape, relative to the largest value above 1."""
    if found.shape != expected.shape:
        return float("inf")
    known = expected[expected > torch.finfo(expected.dtype).min]  # without classes that the network does not know
    scale = max(1.0, float(known.abs().max()))
    return float((found - expected).abs().max()) / scale


# ------------------------------------------------------------------------------------------------------------- around


def _chosen_formats(formats: Sequence[str]) -> list[str]:
    """Check what was asked for, in the order of `FORMATS`."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(f"the formats are {', '.join(FORMATS)}; got {', '.join(unknown) or 'none'}")
    if "onnx" in formats:
        require_exporter(otherwise="choose other --formats", besides=["onnxruntime"])
    return [name for name in FORMATS if name in formats]


def _read_network(card: ModelCard, path: Path) -> AutoMedSAM | HSPSAM:
    """Build the network of a card with the weights of a file, ready to predict; LoRA's updates are merged."""
    if card.architecture == "unet":
        raise ConfigError(f"{path} is a U-Net for comparison, which is not exported: give an AutoMedSAM or HSP-SAM")
    if card.architecture == "automedsam":
        network: AutoMedSAM | HSPSAM = AutoMedSAM(**card.network)
    else:
        network = HSPSAM(**card.network)
    load_network_weights(network, path)
    if isinstance(network, HSPSAM):
        network.merge_lora()
    return network.eval().requires_grad_(False)


def _manifest(card: ModelCard, checkpoint: Path, found: Sequence[Exported], folder: Path) -> dict[str, Any]:
    """Describe the files."""
    packages = versions() | {"safetensors": importlib.metadata.version("safetensors")}
    if any(entry.format == "onnx" for entry in found):
        packages |= {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
        packages["onnx_opset"] = str(OPSET)
    return {
        "weights_sha256": sha256_of(checkpoint),
        "tolerance": TOLERANCE,
        "versions": packages,
        "files": [_described(entry, folder) for entry in found],
        "card": asdict(card),
    }


def _described(entry: Exported, folder: Path) -> dict[str, Any]:
    """Describe one file, and the second one that large weights need."""
    further = sorted(path for path in folder.glob(f"{entry.file}.*"))
    computes = {"inputs": entry.graph.inputs, "outputs": entry.graph.outputs}
    return {
        "format": entry.format,
        **_identified(folder / entry.file),
        "further_files": [_identified(path) for path in further],
        "largest_difference": entry.difference,
        **{side: [_port(asdict(port)) for port in ports] for side, ports in computes.items()},
    }


def _identified(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _port(port: dict[str, Any]) -> dict[str, Any]:
    """Describe a tensor, its range as two values of which None has no end."""
    low, high = port.pop("low"), port.pop("high")
    return {**port, "range": [low, high]}


def _table(found: Sequence[Exported], folder: Path) -> str:
    """Show what was written."""
    rows = [("format", "file", "MB", "largest difference")]
    for entry in found:
        size = sum(path.stat().st_size for path in folder.glob(f"{entry.file}*")) / _BYTES_PER_MEGABYTE
        rows.append((entry.format, entry.file, f"{size:.1f}", f"{entry.difference:.1e}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{kind:<{widths[0]}}  {file:<{widths[1]}}  {size:>{widths[2]}}  {difference:>{widths[3]}}"
        for kind, file, size, difference in rows
    )


def _copy_card(checkpoint: Path, path: Path) -> None:
    """Copy the card as it is."""
    with _in_words(path):
        shutil.copyfile(checkpoint.with_suffix(".json"), path)


def _move(temporary: Path, folder: Path) -> None:
    """Let each file take its place; the manifest comes last, so that none speaks of files that are not there."""
    files = sorted(temporary.iterdir(), key=lambda path: (path.name == MANIFEST, path.name))
    for path in files:
        with _in_words(folder / path.name):
            os.replace(path, folder / path.name)


@contextlib.contextmanager
def _folder_beside(folder: Path) -> Iterator[Path]:
    """Lend a temporary folder in the folder of the files, which is gone behind the block."""
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    with _in_words(temporary):
        temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Say in words what the system answers to writing a file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another folder") from error
