"""From a whole case to the logits of every class asked for: each slice is encoded once for all its classes."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from scripts.data.embeddings import EmbeddingStore, slices_key
from scripts.data.fitting import fitted_shape, network_slices, restore_from_square
from scripts.data.orientations import POSITIONS, UPRIGHT, Orientation, Position, read_orientations
from scripts.data.placing import ImagePrompts, PromptedObject
from scripts.data.vocabulary import Vocabulary
from scripts.engines.acceleration import require_bfloat16
from scripts.engines.answers import ABSENT_LOGIT, CaseAnswers, JudgedLogits, SampledLogits, logit_of_mean
from scripts.engines.batches import diffusion_noise
from scripts.engines.runtimes import OnnxNetwork, choose_runtime
from scripts.errors import ConfigError, PromptError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.prompts import PromptEmbeddings

Question = int | PromptedObject  # a class by its id, or an object by box or points


@dataclass(frozen=True)
class CaseSlices:
    """Some slices of a case with what is asked of them.

    Attributes:
        case: its name.
        original: rows and columns (H, W) of its slices.
        questions: the K things that are asked for.
        places: where the n slices are in the case.
        pixels: as the network takes them, `(n, 3, S, S)`.
        asked: what is asked for in which slice, `(K, n)` bool, on the CPU.
        positions: in which the network is to be shown them.
    """

    case: str
    original: tuple[int, int]
    questions: Sequence[Question]
    places: list[int]
    pixels: torch.Tensor
    asked: torch.Tensor
    positions: tuple[Position, ...] = (UPRIGHT,)

    def some(self, rows: Sequence[int]) -> "CaseSlices":
        """Give some of them, by their numbers from 0 to n - 1."""
        chosen = list(rows)
        return replace(
            self,
            places=[self.places[row] for row in chosen],
            pixels=self.pixels[chosen],
            asked=self.asked[:, chosen],
        )


@dataclass(frozen=True)
class LaidSlices:
    """Slices as the network is shown them, in one of several positions.

    Attributes:
        slices: with the pixels laid so, and what is asked of them then: in a mirrored image for each class's partner.
        position: how they were laid.
        content: rows and columns (h, w) that the upright image fills of the square.
        embeddings: of the pixels, `(n, 256, h', w')`.
    """

    slices: CaseSlices
    position: Position
    content: tuple[int, int]
    embeddings: torch.Tensor

    def upright(self, squares: torch.Tensor) -> torch.Tensor:
        """Lay logits `(B, K, s, s)` of these slices upright: `(B, K, S, S)`."""
        size = self.slices.pixels.shape[-2:]
        # To the square's pixels first, as `restore_from_square` does: there the content has whole rows and columns.
        fine = interpolate(squares.float(), size, mode="bilinear", align_corners=False)
        return self.position.undo(fine, content=self.content)


class ClassPromptInferer(Inferer):
    """Ask for classes in every slice of a case.

    Slices that are alike to the network, such as empty ones, are asked for once.

    Args:
        class_ids: the classes to ask for where the call names none; None for all that the network knows.
        slices_at_once: slices that go through the image encoder together.
        prompts_at_once: prompts that go through the class prompt encoder and the mask decoder together, the bound on
            memory.
        noise_seed: None for no diffusion noise, so that the answer is one function of the image; else the noise is
            drawn for each slice and class from this seed, the case, the slice and the class.
        samples: draws of noise for each slice and class, all with the one embedding; of more than one the mean and
            the spread are given.
        precision: `float32`, or `bfloat16` for PyTorch's mixed precision where the device has it.
        runtime: `torch`, or `onnx` for ONNX Runtime on a CPU, see `scripts.engines.runtimes`.
        checkpoint: the network's weights file, beside which another runtime keeps its graphs.
        progress: whether to show a bar of the slices of a volume.
        quality: whether the answer tells what it says of its own quality.
        smallest_quality: of a class in a slice, the least intersection over union that the mask decoder must expect of
            its mask, 0 to 1; below, the class comes out absent there. For networks whose quality head was trained.
        averaged_orientations: modality -> "none", "mirror" or "all": the network is shown each slice of it in these
            positions, and what it says of a class in them, probabilities and quality, is averaged. With "all", the
            eight, the answer does not depend on how an image lies. Boxes and points are asked upright alone.
        vocabulary: the modalities, and which class is another one's partner; needed for `averaged_orientations`.
        largest_component: of each class asked for by name in a volume, only the largest connected body (26 neighbours)
            stays. For organs of which there is one; single slices and pictures, objects in boxes and at points stay as
            they are.

    Attributes:
        store: of the network's image encoder, to read embeddings from and to keep new ones in; None for none.

    Raises:
        ConfigError: several samples without a seed, an unknown precision, bfloat16 on another runtime, a quality
            outside 0 to 1, or orientations that are none or come without the vocabulary.
    """

    def __init__(
        self,
        *,
        class_ids: Sequence[int] | None = None,
        slices_at_once: int = 4,
        prompts_at_once: int = 16,
        noise_seed: int | None = None,
        samples: int = 1,
        precision: Literal["float32", "bfloat16"] = "float32",
        runtime: str = "torch",
        checkpoint: str = "",
        progress: bool = False,
        quality: bool = False,
        smallest_quality: float = 0.0,
        averaged_orientations: Mapping[str, Orientation] | None = None,
        vocabulary: Vocabulary | None = None,
        largest_component: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= smallest_quality <= 1:
            raise ConfigError(f"smallest_quality is an intersection over union from 0 to 1, not {smallest_quality}")
        if samples < 1 or (samples > 1 and noise_seed is None):
            raise ConfigError(f"expected 1 sample, or more and a noise_seed to draw them from, got {samples} samples")
        if precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision is 'float32' or 'bfloat16', not '{precision}'")
        if precision == "bfloat16" and runtime != "torch":
            raise ConfigError(f"bfloat16 is a precision of the runtime torch, not of {runtime}; leave one of them out")
        self.class_ids = class_ids
        self.slices_at_once = slices_at_once
        self.prompts_at_once = prompts_at_once
        self.noise_seed = noise_seed
        self.samples = samples
        self.precision = precision
        self.runtime = runtime
        self.checkpoint = checkpoint
        self.progress = progress
        self.quality = quality
        self.smallest_quality = smallest_quality
        self.vocabulary = vocabulary
        self.positions = _positions_of(averaged_orientations or {}, vocabulary)
        self.largest_component = largest_component
        self.store: EmbeddingStore | None = None
        self._chosen: tuple[AutoMedSAM, AutoMedSAM | OnnxNetwork] | None = None

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: torch.nn.Module,
        class_ids: Sequence[int] | torch.Tensor | None = None,
        presence: torch.Tensor | None = None,
        case: str = "",
        modality: str | None = None,
        **_: Any,
    ) -> torch.Tensor | SampledLogits | JudgedLogits:
        """Segment one case.

        Args:
            inputs: `(1, C, H, W, D)`, intensities in 0...255, C = 1 or 3.
            network: an `AutoMedSAM`, wrapped for several processes or not.
            class_ids: the K classes to ask for; where None, those that `PlacePromptsd` wrote into the metadata of
                `inputs`, or else this inferer's own.
            presence: `(1, K, D)` bool, which class to ask for in which slice; None for all everywhere. What is not
                asked for comes out absent.
            case: its name, which seeds the noise.
            modality: its canonical name, for `averaged_orientations`; where None, what `PlacePromptsd` wrote.

        Returns:
            Logits `(1, K, H, W, D)` in the case's own pixels, in half precision; of several samples `SampledLogits`,
            and with the quality `JudgedLogits`.

        Raises:
            ConfigError: a runtime or a precision that the device does not have.
            PromptError: boxes or points in the metadata, which this inferer does not ask for.
        """
        prompts = written_prompts(inputs)
        if class_ids is None and prompts is not None:
            if prompts.objects:
                raise PromptError(f"{type(self).__name__} asks for classes alone: leave boxes and points out.")
            class_ids = prompts.class_ids
        if modality is None and prompts is not None:
            modality = prompts.modality
        chosen = class_ids if class_ids is not None else self.class_ids or self._choose(network).class_ids
        questions = [int(class_id) for class_id in chosen]
        return self._answer(inputs, network, questions, presence=presence, case=case, modality=modality)

    def _answer(
        self,
        inputs: torch.Tensor,
        network: torch.nn.Module,
        questions: Sequence[Question],
        *,
        presence: torch.Tensor | None,
        case: str,
        modality: str | None,
    ) -> torch.Tensor | SampledLogits | JudgedLogits:
        """Answer K questions about a case, each in the slices of `presence` `(1, K, D)` or in all."""
        model = self._choose(network)
        image = convert_to_tensor(inputs, track_meta=False)[0]  # (C, H, W, D)
        _, height, width, depth = image.shape
        asked = torch.ones((len(questions), depth), dtype=torch.bool) if presence is None else presence[0].cpu()
        answers = CaseAnswers(
            (height, width, depth),
            classes=len(questions),
            samples=self.samples,
            device=image.device,
            judged=self.quality,
        )
        classes = [column for column, question in enumerate(questions) if isinstance(question, int)]
        positions = self.positions.get(modality or "", (UPRIGHT,)) if classes else (UPRIGHT,)
        with self._mixed(image.device):
            for slices, repeated in self._distinct(image, questions, asked, case, model.image_size):
                self._segment(model, replace(slices, positions=positions), answers)
                for place, source in repeated:
                    answers.repeat(place, source)
        if self.largest_component:
            answers.keep_largest(classes)
        return answers.result()

    def embed(self, inputs: torch.Tensor, network: torch.nn.Module) -> int:
        """Bring the embeddings of a case into the store, and segment nothing.

        Args:
            inputs: as for a call.
            network: as for a call.

        Returns:
            The number of slices.
        """
        model = self._choose(network)
        image = convert_to_tensor(inputs, track_meta=False)[0]  # (C, H, W, D)
        everything = torch.ones((1, image.shape[3]), dtype=torch.bool)
        for slices, _ in self._distinct(image, [0], everything, "", model.image_size):
            self._embed(model, slices.pixels)
        return image.shape[3]

    def _distinct(
        self, image: torch.Tensor, questions: Sequence[Question], asked: torch.Tensor, case: str, image_size: int
    ) -> Iterator[tuple[CaseSlices, list[tuple[int, int]]]]:
        """Prepare a case's slices chunk by chunk, each only where none before is like it.

        Args:
            image: `(C, H, W, D)`.
            questions: the K things that are asked for.
            asked: what is asked for in which slice, `(K, D)` bool.
            case: its name.
            image_size: side S of the network's input.

        Yields:
            The chunk's slices of which something new is asked, and the places of the others, each with the place of
            the slice that it repeats.
        """
        seen: dict[tuple[object, ...], int] = {}
        for places in self._chunks(image.shape[3]):
            pixels = network_slices(image[..., places[0] : places[-1] + 1], image_size)
            slices = CaseSlices(case, (image.shape[1], image.shape[2]), questions, places, pixels, asked[:, places])
            sources = [seen.setdefault(self._identity(slices, row), place) for row, place in enumerate(places)]
            new = [row for row, place in enumerate(places) if sources[row] == place and slices.asked[:, row].any()]
            repeated = [(place, source) for place, source in zip(places, sources, strict=True) if place != source]
            yield slices.some(new), repeated

    def _choose(self, network: torch.nn.Module) -> AutoMedSAM | OnnxNetwork:
        """Give the network as the runtime computes it."""
        model = cast(AutoMedSAM, getattr(network, "module", network))
        if self._chosen is None or self._chosen[0] is not model:
            self._chosen = model, choose_runtime(model, runtime=self.runtime, checkpoint=self.checkpoint)
        return self._chosen[1]

    def _mixed(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Give the context of the precision; that of float32 leaves what the caller has set."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        require_bfloat16(device)
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _chunks(self, depth: int) -> Iterator[list[int]]:
        """Divide the slices into those that are prepared together, with a bar where there are several."""
        step = self.slices_at_once if self.store is None else self.store.shape.slices_a_shard
        with tqdm(total=depth, desc="slices", leave=False, disable=not self.progress or depth <= step) as bar:
            for start in range(0, depth, step):
                places = list(range(start, min(start + step, depth)))
                yield places
                bar.update(len(places))

    def _segment(self, model: AutoMedSAM | OnnxNetwork, slices: CaseSlices, answers: CaseAnswers) -> None:
        """Ask what is asked of n slices."""
        laid = [self._lay(model, slices, position) for position in slices.positions if slices.places]
        for rows, columns in self._bundles(slices):
            of_classes = isinstance(slices.questions[columns[0]], int)
            draws, qualities = [], []
            for sample in range(self.samples):
                squares, quality = self._ask(model, laid if of_classes else laid[:1], (rows, columns), sample)
                qualities.append(quality)
                squares = self._without_doubtful(squares, quality, slices, columns)
                draws.append(restore_from_square(squares.float(), size=model.image_size, original=slices.original))
            answers.put([slices.places[row] for row in rows], columns, draws, qualities)

    def _lay(self, model: AutoMedSAM | OnnxNetwork, slices: CaseSlices, position: Position) -> LaidSlices:
        """Lay slices in a position, upright as they are, and embed them."""
        content = fitted_shape(*slices.original, model.image_size)
        if position != UPRIGHT:
            pixels = position.lay(slices.pixels, content=content)
            questions = [self._partner(model, asked) if position.mirrored else asked for asked in slices.questions]
            slices = replace(slices, pixels=pixels, questions=questions)
        return LaidSlices(slices, position, content, self._embed(model, slices.pixels))

    def _partner(self, model: AutoMedSAM | OnnxNetwork, question: Question) -> Question:
        """Give the class that a mirrored image shows where it showed this one: of most classes the same."""
        if not isinstance(question, int):
            return question
        partner = cast(Vocabulary, self.vocabulary).entry(question).partner
        if partner is not None and partner not in model.class_ids:
            raise ConfigError(
                f"a mirrored image shows class {partner} where class {question} was, and this network has learned "
                f"{list(model.class_ids)}: leave mirrored positions out of averaged_orientations"
            )
        return question if partner is None else partner

    def _ask(
        self,
        model: AutoMedSAM | OnnxNetwork,
        laid: Sequence[LaidSlices],
        asked: tuple[Sequence[int], Sequence[int]],
        sample: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask about B slices and K questions in each position: logits `(B, K, s, s)` and quality `(B, K)` together."""
        if len(laid) == 1:
            return self._decode(model, laid[0], asked, sample)
        probability, quality = torch.zeros(()), torch.zeros(())
        for one in laid:
            squares, expected = self._decode(model, one, asked, sample)
            probability = probability + torch.sigmoid(one.upright(squares)) / len(laid)
            quality = quality + expected.float() / len(laid)
        return logit_of_mean(probability), quality

    def _decode(
        self,
        model: AutoMedSAM | OnnxNetwork,
        laid: LaidSlices,
        asked: tuple[Sequence[int], Sequence[int]],
        sample: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask about slices as they lie: logits `(B, K, s, s)` as they lie too, and quality `(B, K)`."""
        embedding = laid.embeddings[list(asked[0])]
        return model.decode(embedding, self._prompts(model, embedding, laid.slices, asked, sample))

    def _without_doubtful(
        self, squares: torch.Tensor, quality: torch.Tensor, slices: CaseSlices, columns: Sequence[int]
    ) -> torch.Tensor:
        """Let classes be absent whose masks `(B, K, S, S)` are expected to be worse than `smallest_quality`.

        Objects stay: a box or a point says that something is there.
        """
        of_classes = [isinstance(slices.questions[column], int) for column in columns]
        if self.smallest_quality <= 0 or not any(of_classes):
            return squares
        doubtful = (quality < self.smallest_quality) & torch.tensor(of_classes, device=quality.device)
        return squares.masked_fill(doubtful[:, :, None, None], ABSENT_LOGIT)

    def _prompts(
        self,
        model: AutoMedSAM | OnnxNetwork,
        embedding: torch.Tensor,
        slices: CaseSlices,
        asked: tuple[Sequence[int], Sequence[int]],
        sample: int,
    ) -> PromptEmbeddings:
        """Make the prompts of B slices and K classes `asked`, as rows and columns of `slices.asked`: B x K rows."""
        rows, columns = asked
        ids = [cast(int, slices.questions[column]) for column in columns]
        places = [(slices.case, slices.places[row], class_id) for row in rows for class_id in ids]
        noise = self._noise(model, places, sample, (len(rows), len(ids)), embedding.device)
        asked_ids = torch.tensor(ids, device=embedding.device)
        return model.encode_classes(embedding, asked_ids.expand(len(rows), -1), noise=noise)

    def _embed(self, model: AutoMedSAM | OnnxNetwork, pixels: torch.Tensor) -> torch.Tensor:
        """Embed slices (n, 3, S, S), through the store where there is one: (n, 256, h, w)."""

        def encode(images: torch.Tensor) -> torch.Tensor:
            return torch.cat([model.encode_image(some) for some in images.split(self.slices_at_once)])

        if not len(pixels):
            return pixels
        if self.store is None:
            return encode(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # what is kept is good for every precision
            return self.store.recall(pixels, encode).to(pixels)

    def _bundles(self, slices: CaseSlices) -> Iterator[tuple[list[int], list[int]]]:
        """Bundle what is asked: slices with the same classes, so that each slice's classes share what they can.

        Yields:
            Rows and columns of `slices.asked`, of which each slice is asked for each class: at most `prompts_at_once`
            questions.
        """
        bundles: dict[tuple[int, ...], list[int]] = {}
        for row, wanted in enumerate(slices.asked.T.tolist()):
            columns = tuple(column for column, is_asked in enumerate(wanted) if is_asked)
            bundles.setdefault(columns, []).append(row)
        for columns, rows in bundles.items():
            for start in range(0, len(columns), self.prompts_at_once):
                some = list(columns[start : start + self.prompts_at_once])
                step = max(1, self.prompts_at_once // len(some))
                for place in range(0, len(rows), step):
                    yield rows[place : place + step], some

    def _identity(self, slices: CaseSlices, row: int) -> tuple[object, ...]:
        """Name a slice by its pixels and by what is asked of it."""
        return slices_key(slices.pixels[row].cpu()), *slices.asked[:, row].tolist()

    def _noise(
        self,
        model: AutoMedSAM | OnnxNetwork,
        places: Sequence[tuple[str, int, int]],
        sample: int,
        shape: tuple[int, int],
        device: torch.device,
    ) -> torch.Tensor | None:
        """Draw the noise (B, K, 256, h, w) of B x K (case, slice, class), each from a seed of its own."""
        if self.noise_seed is None:
            return None
        seeds = torch.tensor([_seed_of(self.noise_seed, *place, sample) for place in places])
        noise = diffusion_noise(seeds, prompts=1, grid_size=model.grid_size)  # (B K, 1, C, h, w)
        return noise.reshape(*shape, *noise.shape[2:]).to(device)


def _positions_of(
    orientations: Mapping[str, Orientation], vocabulary: Vocabulary | None
) -> dict[str, tuple[Position, ...]]:
    """Give the positions to average over, by the canonical names of the modalities."""
    if not orientations:
        return {}
    if vocabulary is None:
        raise ConfigError("averaged_orientations need the vocabulary; give the inferer vocabulary")
    kinds = read_orientations(orientations, vocabulary, setting="averaged_orientations")
    return {modality: POSITIONS[kind] for modality, kind in kinds.items()}


def written_prompts(inputs: torch.Tensor) -> ImagePrompts | None:
    """Find what `PlacePromptsd` wrote into an image's metadata; None where it did not."""
    return inputs.meta.get("prompts") if isinstance(inputs, MetaTensor) else None


def _seed_of(*parts: object) -> int:
    """Make one seed of several numbers or names, the same everywhere."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")
