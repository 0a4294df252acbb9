"""The network on another runtime than PyTorch: OpenVINO on a CPU, exact in single precision.

Each part of the network becomes a graph of fixed shapes, exported when it is first needed and kept beside the weights
in `.runtime`. Images go through one at a time and prompts a few at a time, image by image: on a CPU more of them
together are no faster and take more memory.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
RUNTIMES = ("torch", "openvino")
PROMPTS_TOGETHER = 4  # of one image; what is left over goes one by one
_FORMAT = 1  # of the files below; to be raised when the way they are made changes
_GRAPH, _WEIGHTS, _CHECKSUM = "graph.xml", "graph.bin", "sha256"
_BF16_PROBES = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # of torch.cpu, private in every version so far
_SETTINGS = {
    # Left to itself, OpenVINO calculates in bfloat16 wherever the processor can: errors of 0.05 in an embedding.
    "INFERENCE_PRECISION_HINT": "f32",
    "NUM_STREAMS": 1,
    # Two processes that pin their threads to the same cores wait for each other.
    "ENABLE_CPU_PINNING": False,
    # Its fusion of group normalisation crashes the process in 2026.4; without it all parts are as fast.
    "SNIPPETS_MODE": "DISABLE",
}


def cpu_bf16_pays() -> bool:
    """Say whether this processor has instructions for bfloat16, AMX or avx512_bf16; without, it is the slower type.

    A PyTorch that cannot tell counts as no.
    """
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in _BF16_PROBES)


def choose_runtime(
    network: AutoMedSAM, *, runtime: str, checkpoint: str | os.PathLike[str]
) -> "AutoMedSAM | OpenVinoNetwork":
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
    return network if runtime == "torch" else OpenVinoNetwork(network, checkpoint=checkpoint)


class OpenVinoNetwork:
    """What `ClassPromptInferer` asks of an `AutoMedSAM`, computed by OpenVINO.

    The network's weights may be loaded later, or anew: a graph is never used with others than it was made of.

    Args:
        network: on the CPU.
        checkpoint: its weights file; graphs are kept in the folder `.runtime` beside it or, where that cannot be
            written, in the user's cache.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    def __init__(self, network: AutoMedSAM, *, checkpoint: str | os.PathLike[str]) -> None:
        self.network = network
        self.folders = (Path(checkpoint).absolute().parent / ".runtime", _user_cache() / "automedsam" / "runtime")
        self.openvino = _import_openvino()
        self._state: tuple[tuple[int, int], ...] | None = None
        self._key = ""
        self._requests: dict[str, tuple[Any, list[str]]] = {}

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

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embed images `(B, 3, S, S)` with values in [0, 1] as `(B, 256, h, w)`."""
        embeddings = [self._infer("encode_image", 1, {"image": one})[0] for one in image.split(1)]
        return torch.cat(embeddings)

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
        inputs = {"class_ids": class_ids}
        if noise is not None:
            last = torch.full_like(class_ids, self.network.diffusion_steps)
            inputs |= {"noise": noise, "timestep": last if timestep is None else timestep}
        part = "encode_classes" if noise is None else "encode_noisy_classes"
        rows = []
        for image, prompts in _groups(*class_ids.shape):
            some = {name: values[image : image + 1, prompts] for name, values in inputs.items()}
            count = prompts.stop - prompts.start
            rows.append(self._infer(part, count, {"embedding": embedding[image : image + 1], **some}))
        sparse, dense = (torch.cat(values) for values in zip(*rows, strict=True))
        return PromptEmbeddings(sparse, dense)

    def decode(self, embedding: torch.Tensor, prompts: PromptEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode B x K prompts over B embeddings: logits `(B, K, S, S)` and quality `(B, K)`."""
        images = len(embedding)
        per_image = len(prompts.dense) // images
        side = self.image_size
        logits, quality = torch.empty((images, per_image, side, side)), torch.empty((images, per_image))
        for image, some in _groups(images, per_image):
            rows = slice(image * per_image + some.start, image * per_image + some.stop)
            inputs = {
                "embedding": embedding[image : image + 1],
                "sparse": prompts.sparse[rows],
                "dense": prompts.dense[rows],
            }
            answer = self._infer("decode", some.stop - some.start, inputs)
            logits[image, some], quality[image, some] = answer[0][0], answer[1][0]
        return logits, quality

    def _infer(self, part: str, count: int, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run a part on one image with so many prompts.

        The runtime may use what it is given as its own, and gives out memory that its next answer overwrites: both
        ways it gets copies.
        """
        request, names = self._request(part, count)
        request.infer([inputs[name].detach().numpy().copy() for name in names])
        return [torch.from_numpy(np.array(out.data)) for out in request.output_tensors]

    def _request(self, part: str, count: int) -> tuple[Any, list[str]]:
        """Give the graph of a part, ready to run, and the names of its inputs; made when it is first asked for."""
        self._follow_weights()
        name = f"{part}_{count}"
        if name not in self._requests:
            core = self.openvino.Core()
            graph = core.read_model(str(self._find(name) or self._export(part, count)))
            names = [put.get_any_name() for put in graph.inputs]
            settings = {**_SETTINGS, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self._requests[name] = core.compile_model(graph, "CPU", settings).create_infer_request(), names
        return self._requests[name]

    def _follow_weights(self) -> None:
        """Let go of graphs that were made of other weights.

        Raises:
            ConfigError: the network is not on the CPU.
        """
        tensors = [*self.network.parameters(), *self.network.buffers()]
        state = tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
        if state == self._state:
            return
        device = tensors[0].device
        if device.type != "cpu":
            raise ConfigError(f"the runtime openvino computes on the CPU, and the network is on {device}: --device cpu")
        self._state, self._requests = state, {}
        self._key = _key_of(self.network, version=self.openvino.__version__)

    def _find(self, name: str) -> Path | None:
        """Look for a graph that is there already, and whole."""
        for folder in self.folders:
            place = folder / self._key / name
            if not place.is_dir():
                continue
            if _is_whole(place):
                return place / _GRAPH
            logger.warning("%s is damaged and is made anew", place)
            shutil.rmtree(place, ignore_errors=True)
        return None

    def _export(self, part: str, count: int) -> Path:
        """Make the graph of a part and keep it for the next time.

        Raises:
            OutputError: it can be kept nowhere.
        """
        start = time.perf_counter()
        graph = self._convert(part, count)
        reasons = []
        for folder in self.folders:
            place = folder / self._key / f"{part}_{count}"
            try:
                with _whole_folder(place) as temporary:
                    self.openvino.save_model(graph, str(temporary / _GRAPH), compress_to_fp16=False)
                    (temporary / _CHECKSUM).write_text(_checksum(temporary))
            except (OSError, RuntimeError) as error:  # OpenVINO's own for a file that it cannot write
                reasons.append(str(error).splitlines()[0])
                continue
            logger.info("openvino: %s exported to %s in %.1f s", part, place, time.perf_counter() - start)
            return place / _GRAPH
        raise OutputError(
            f"expected a folder for the graphs of the runtime openvino at {self.folders[0]} or {self.folders[1]}, got "
            f"{'; '.join(reasons)}; make room in one of them, or use --runtime torch"
        )

    def _convert(self, part: str, count: int) -> Any:
        """Make OpenVINO's graph of a part, with fixed shapes."""
        inputs = _example_inputs(self.network, part, count)
        with _as_it_predicts(self.network), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: what depends on shapes is fixed, as it is meant to be
            # Of a module instead of a function, or of a program of torch.export, the same takes five times as long.
            trace = torch.jit.trace(_function(self.network, part), tuple(inputs.values()), check_trace=False)
            graph = self.openvino.convert_model(trace, example_input=tuple(inputs.values()))
        for name, put in zip(inputs, graph.inputs, strict=True):
            put.get_tensor().set_names({name})
        graph.reshape({name: list(values.shape) for name, values in inputs.items()})
        return graph


def _function(network: AutoMedSAM, part: str) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    """Give a part as a function of tensors alone, in the order of `_example_inputs`."""
    if part == "encode_image":
        return lambda image: network.encode_image(image)
    if part == "decode":
        return lambda embedding, sparse, dense: network.decode(embedding, PromptEmbeddings(sparse, dense))
    if part == "encode_classes":
        return lambda embedding, class_ids: tuple(network.encode_classes(embedding, class_ids))
    return lambda embedding, class_ids, noise, timestep: tuple(
        network.encode_classes(embedding, class_ids, noise=noise, timestep=timestep)
    )


@contextlib.contextmanager
def _as_it_predicts(network: AutoMedSAM) -> Iterator[None]:
    """Keep a caller's training, mixed precision and inference mode out of what is traced."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    exact = torch.autocast("cpu", enabled=False)
    with torch.inference_mode(False), torch.no_grad(), exact, eval_mode(network):
        try:
            for parameter in learning:  # a trace takes only constants that do not learn
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


def _groups(images: int, prompts: int) -> Iterator[tuple[int, slice]]:
    """Divide each image's prompts into groups of `PROMPTS_TOGETHER`, and the rest one by one."""
    whole = prompts - prompts % PROMPTS_TOGETHER
    starts: Sequence[int] = (*range(0, whole, PROMPTS_TOGETHER), *range(whole, prompts))
    for image in range(images):
        for start in starts:
            yield image, slice(start, start + (PROMPTS_TOGETHER if start < whole else 1))


def _example_inputs(network: AutoMedSAM, part: str, count: int) -> dict[str, torch.Tensor]:
    """Give inputs of the right shapes and types for a part, one image with so many prompts."""
    grid = (EMBEDDING_CHANNELS, network.grid_size, network.grid_size)
    if part == "encode_image":
        return {"image": torch.zeros(1, 3, network.image_size, network.image_size)}
    embedding = {"embedding": torch.zeros(1, *grid)}
    if part == "decode":
        sparse, dense = torch.zeros(count, SPARSE_TOKENS, EMBEDDING_CHANNELS), torch.zeros(count, *grid)
        return {**embedding, "sparse": sparse, "dense": dense}
    embedding["class_ids"] = torch.ones(1, count, dtype=torch.int64)
    if part == "encode_noisy_classes":
        embedding |= {"noise": torch.zeros(1, count, *grid), "timestep": torch.ones(1, count, dtype=torch.int64)}
    return embedding


def _import_openvino() -> Any:
    """Import OpenVINO, which would report its use over the network at once; here it may not.

    Raises:
        ConfigError: it is not installed.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            "the runtime openvino is not installed: pip install openvino, or use --runtime torch"
        ) from error
    return openvino


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
    for name in (_GRAPH, _WEIGHTS):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
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
