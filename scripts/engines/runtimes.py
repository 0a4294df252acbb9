"""The network on another runtime than PyTorch: ONNX Runtime on a CPU, exact in single precision.

The image encoder and the class prompt encoder become graphs for one image and any number of its prompts, exported when
they are first needed and kept beside the weights in `.runtime`. Images go through one at a time and prompts in groups,
image by image: on a CPU more of them together are no faster and take more memory. The mask decoder is faster in PyTorch
and stays there.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.utils import eval_mode

from scripts.data.embeddings import encoder_key
from scripts.errors import ConfigError, OutputError
from scripts.files import TEMPORARY_PREFIX
from scripts.networks import automedsam
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.class_prompt_encoder import EMBEDDING_CHANNELS, SPARSE_TOKENS
from scripts.networks.prompts import PromptEmbeddings

logger = logging.getLogger(__name__)
RUNTIMES = ("torch", "onnx")
OPSET = 20  # of ONNX: the first that has GELU as one operation
VALUES_TOGETHER = 2**22  # of a group's dense prompts: 4 prompts on a grid of 64 x 64, 64 on one of 16 x 16
_FORMAT = 1  # of the files below; to be raised when the way they are made changes
_GRAPH, _CHECKSUM = "graph.onnx", "sha256"
_EXAMPLE_PROMPTS = 3  # an exporter takes an example of 0 or 1 for a shape that never changes
_EXPORTER = ("onnx", "onnxscript")  # packages that are needed while a graph is made, and not afterwards


def choose_runtime(
    network: AutoMedSAM, *, runtime: str, checkpoint: str | os.PathLike[str]
) -> "AutoMedSAM | OnnxNetwork":
    """Give the network as the chosen runtime computes it.

    Args:
        network: with its weights, or before they are loaded.
        runtime: one of `RUNTIMES`.
        checkpoint: its weights file, beside which graphs are kept.

    Raises:
        ConfigError: an unknown runtime, or one that is not installed.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"the runtime is one of {', '.join(RUNTIMES)}, not {runtime!r}")
    if runtime != "torch" and not isinstance(network, AutoMedSAM):
        raise ConfigError(f"{type(network).__name__} has the runtime torch alone, not {runtime}: leave runtime out")
    return network if runtime == "torch" else OnnxNetwork(network, checkpoint=checkpoint)


class OnnxNetwork:
    """What `ClassPromptInferer` asks of an `AutoMedSAM`, computed by ONNX Runtime.

    The network's weights may be loaded later, or anew: a graph is never used with others than it was made of.

    Args:
        network: on the CPU.
        checkpoint: its weights file; graphs are kept in the folder `.runtime` beside it or, where that cannot be
            written, in the user's cache.

    Raises:
        ConfigError: ONNX Runtime is not installed.
    """

    def __init__(self, network: AutoMedSAM, *, checkpoint: str | os.PathLike[str]) -> None:
        self.network = network
        self.folders = (Path(checkpoint).absolute().parent / ".runtime", _user_cache() / "automedsam" / "runtime")
        self.onnxruntime = import_onnxruntime()
        self._state: tuple[Any, ...] | None = None
        self._key = ""
        self._sessions: dict[str, Any] = {}

    @property
    def image_size(self) -> int:
        """Side S of the square input in pixels."""
        return self.network.image_size

    @property
    def grid_size(self) -> int:
        """Side of the embedding's grid."""
        return self.network.grid_size

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The classes known."""
        return self.network.class_ids

    @property
    def diffusion_steps(self) -> int:
        """T, the last time step of the forward diffusion."""
        return self.network.diffusion_steps

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embed images `(B, 3, S, S)` with values in [0, 1] as `(B, C, h, w)`."""
        grid = (self.grid_size, self.grid_size)
        embeddings = torch.empty((len(image), self.network.embedding_channels, *grid))
        for place in range(len(image)):
            one = slice(place, place + 1)
            embeddings[one] = self._infer("encode_image", {"image": image[one]})[0]
        return embeddings

    def encode_classes(
        self,
        embedding: torch.Tensor,
        class_ids: torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> PromptEmbeddings:
        """Make the prompts of classes `(B, K)` for embeddings `(B, 256, h, w)`: B x K rows, image by image.

        Args:
            embedding: of the images.
            class_ids: the classes to ask for in each.
            noise: standard normal values `(B, K, 256, h, w)`, or None for none.
            timestep: steps `(B, K)`, from 1 to T; None means T. Without noise they make no difference.
        """
        part, inputs = "encode_classes", {"class_ids": class_ids}
        if noise is not None:
            last = torch.full_like(class_ids, self.diffusion_steps)
            part, inputs = "encode_noisy_classes", {**inputs, "noise": noise, "timestep": last}
            if timestep is not None:
                inputs["timestep"] = timestep
        images, per_image = class_ids.shape
        sparse = torch.empty((images, per_image, _sparse_tokens(self.network), EMBEDDING_CHANNELS))
        dense = torch.empty((images, per_image, *self._grid))
        for image, some in self._groups(images, per_image):
            asked = {name: values[image : image + 1, some] for name, values in inputs.items()}
            answer = self._infer(part, {"embedding": embedding[image : image + 1], **asked})
            sparse[image, some], dense[image, some] = answer
        return PromptEmbeddings(sparse.flatten(0, 1), dense.flatten(0, 1))

    def decode(self, embedding: torch.Tensor, prompts: PromptEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode B x K prompts over B embeddings: PyTorch's part, whose fused attention is the faster one.

        Args:
            embedding: `(B, 256, h, w)`.
            prompts: B x K rows, image by image.

        Returns:
            Logits `(B, K, S, S)` and quality `(B, K)`.
        """
        return self.network.decode(embedding, prompts)

    @property
    def _grid(self) -> tuple[int, int, int]:
        """Shape of one dense prompt."""
        return (EMBEDDING_CHANNELS, self.grid_size, self.grid_size)

    def _groups(self, images: int, prompts: int) -> Iterator[tuple[int, slice]]:
        """Divide each image's prompts into groups that go through together."""
        step = max(1, VALUES_TOGETHER // (EMBEDDING_CHANNELS * self.grid_size**2))
        for image in range(images):
            for start in range(0, prompts, step):
                yield image, slice(start, min(start + step, prompts))

    def _infer(self, part: str, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run a part on one image."""
        session = self._session(part)
        # A graph has no input for what makes no difference to it, as the time step where all steps are accumulated.
        given = {put.name: _as_array(inputs[put.name]) for put in session.get_inputs()}
        return [torch.from_numpy(values) for values in session.run(None, given)]

    def _session(self, part: str) -> Any:
        """Give the graph of a part, ready to run; made when it is first asked for."""
        self._follow_weights()
        if part not in self._sessions:
            graph = self._find(part) or self._export(part)
            options = self._options()
            self._sessions[part] = self.onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return self._sessions[part]

    def _options(self) -> Any:
        """Say how graphs are run."""
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = self.onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Threads that wait at work take the processor from PyTorch's, and from other processes'.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Memory planned ahead is held besides what the first run took: 7 GB in all for ViT-B, against 4 GB.
        options.enable_mem_pattern = False
        return options

    def _follow_weights(self) -> None:
        """Let go of graphs that were made of other weights or are run by another number of threads.

        Raises:
            ConfigError: the network is not on the CPU.
        """
        tensors = [*self.network.parameters(), *self.network.buffers()]
        versions = ((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
        state = (torch.get_num_threads(), *versions)
        if state == self._state:
            return
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
        if device is not None:
            raise ConfigError(f"the runtime onnx computes on the CPU, and the network is on {device}: --device cpu")
        self._key = _key_of(self.network, version=self.onnxruntime.__version__)
        self._state, self._sessions = state, {}

    def _find(self, part: str) -> Path | None:
        """Look for a graph that is there already, and whole."""
        for folder in self.folders:
            place = folder / self._key / part
            if not place.is_dir():
                continue
            if _is_whole(place):
                return place / _GRAPH
            logger.warning("%s is damaged and is made anew", place)
            shutil.rmtree(place, ignore_errors=True)
        return None

    def _export(self, part: str) -> Path:
        """Make the graph of a part and keep it for the next time.

        Raises:
            OutputError: it can be kept nowhere.
        """
        start = time.perf_counter()
        program = _convert(self.network, part)
        reasons = []
        for folder in self.folders:
            place = folder / self._key / part
            try:
                with _whole_folder(place) as temporary:
                    program.save(temporary / _GRAPH)  # with a second file for the weights if they exceed 2 GB
                    (temporary / _CHECKSUM).write_text(_checksum(temporary))
            except OSError as error:
                reasons.append(str(error))
                continue
            logger.info("onnx: %s exported to %s in %.1f s", part, place, time.perf_counter() - start)
            return place / _GRAPH
        raise OutputError(
            f"expected a folder for the graphs of the runtime onnx at {self.folders[0]} or {self.folders[1]}, got "
            f"{'; '.join(reasons)}; make room in one of them, or use --runtime torch"
        )


class _Part(torch.nn.Module):
    """A part of the network as a function of tensors alone, in the order of `_example_inputs`.

    Args:
        network: whose part it is.
        part: its name.
    """

    def __init__(self, network: AutoMedSAM, part: str) -> None:
        super().__init__()
        self.network = network
        self.part = part

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Give what the part gives."""
        if self.part == "encode_image":
            return self.network.encode_image(inputs[0])
        embedding, class_ids, *noisy = inputs
        noise, timestep = noisy or (None, None)
        return tuple(self.network.encode_classes(embedding, class_ids, noise=noise, timestep=timestep))


def _convert(network: AutoMedSAM, part: str) -> Any:
    """Make the ONNX program of a part, for one image and any number of prompts.

    Raises:
        ConfigError: what exports it is not installed.
    """
    require_exporter(otherwise="use --runtime torch")
    inputs = _example_inputs(network, part)
    shapes = (tuple(_variable_axes(name) for name in inputs),)  # of the one argument *inputs
    with as_it_predicts(network):
        return to_onnx(record(_Part(network, part), inputs, shapes), inputs=list(inputs))


def require_exporter(*, otherwise: str, besides: Sequence[str] = ()) -> None:
    """See that the packages which make ONNX graphs are there.

    Args:
        otherwise: what to do where they cannot be installed.
        besides: further packages that are needed.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in (*besides, *_EXPORTER) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"graphs of ONNX need packages that are not installed: pip install {' '.join(missing)}, or {otherwise}"
        )


def record(part: torch.nn.Module, inputs: Mapping[str, torch.Tensor], shapes: Any) -> torch.export.ExportedProgram:
    """Record what a module computes, as a graph in which the sizes that vary stay open.

    Args:
        part: to be recorded, within `as_it_predicts` of its network.
        inputs: examples by name, in the order of its arguments.
        shapes: which axes vary, as `torch.export.export` takes them.
    """
    with quietly():
        return torch.export.export(part.eval(), tuple(inputs.values()), dynamic_shapes=shapes)


def to_onnx(
    program: torch.export.ExportedProgram,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str] | None = None,
    shapes: Any = None,
) -> Any:
    """Make an ONNX program of a recorded graph.

    A graph is recorded by itself, since torch.onnx.export takes no offence at a size that the graph then fixes.

    Args:
        program: the graph.
        inputs: names of its inputs.
        outputs: names of its outputs; None for whatever the exporter calls them.
        shapes: as for `record`, for the names of the axes.
    """
    with quietly():
        return torch.onnx.export(
            program,
            (),
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )


def _variable_axes(name: str) -> dict[int, Any]:
    """Say which axis of an input counts the prompts."""
    return {1: torch.export.Dim("prompts")} if name in ("class_ids", "noise", "timestep") else {}


@contextlib.contextmanager
def as_it_predicts(network: torch.nn.Module) -> Iterator[None]:
    """Keep a caller's training, mixed precision and inference mode out of what is exported."""
    exact = torch.autocast("cpu", enabled=False)
    with torch.inference_mode(False), torch.no_grad(), exact, eval_mode(network):
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the exporter's words about its own steps from a user."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _example_inputs(network: AutoMedSAM, part: str) -> dict[str, torch.Tensor]:
    """Give inputs of the right shapes and types for a part: one image, a few prompts."""
    count, grid = _EXAMPLE_PROMPTS, (EMBEDDING_CHANNELS, network.grid_size, network.grid_size)
    if part == "encode_image":
        return {"image": torch.zeros(1, 3, network.image_size, network.image_size)}
    embedding = {"embedding": torch.zeros(1, network.embedding_channels, *grid[1:])}
    embedding["class_ids"] = torch.ones(1, count, dtype=torch.int64)
    if part == "encode_noisy_classes":
        embedding |= {"noise": torch.zeros(1, count, *grid), "timestep": torch.ones(1, count, dtype=torch.int64)}
    return embedding


def _sparse_tokens(network: AutoMedSAM) -> int:
    """Say how many tokens a class has: none where only the dense prompt is used."""
    return 0 if network.prompt_branches == "dense" else SPARSE_TOKENS


def _as_array(values: torch.Tensor) -> Any:
    """Give a tensor as the runtime takes it: whole numbers as they are, all others in single precision."""
    exact = values.detach().float() if values.is_floating_point() else values
    return exact.contiguous().numpy()


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, whose reports of use are off.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "the runtime onnx is not installed: pip install onnxruntime onnx onnxscript, or use --runtime torch"
        ) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _user_cache() -> Path:
    """Give the folder of the user's caches (XDG Base Directory Specification)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if Path(given).is_absolute() else Path.home() / ".cache"


def _key_of(network: AutoMedSAM, *, version: str) -> str:
    """Name all that a graph depends on: weights, settings, the networks' code and the versions of what makes it."""
    weights = encoder_key(
        network.state_dict(), image_size=network.image_size, pixel_normalisation=network.pixel_normalisation
    )
    code = hashlib.sha256()
    folder = Path(automedsam.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        code.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    parts = (_FORMAT, weights, sorted(network.settings.items()), code.hexdigest(), torch.__version__, version)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _checksum(folder: Path) -> str:
    """Sum up a graph and its weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != _CHECKSUM:
            with open(path, "rb") as file:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_whole(folder: Path) -> bool:
    """Say whether a kept graph is what was written."""
    try:
        return (folder / _CHECKSUM).read_text() == _checksum(folder)
    except (OSError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def _whole_folder(place: Path) -> Iterator[Path]:
    """Lend a temporary folder that takes its place when the block ends well.

    Where another process was faster, its folder, which holds the same, stays.
    """
    temporary = place.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
