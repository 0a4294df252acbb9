"""From a whole case to the logits of everything asked for in it: classes by name, objects by boxes and by points.

A class goes through the class prompt encoder, in every slice. A box or points go through SAM's own prompt encoder,
which is part of the network, in the slices that they are in; so a published MedSAM, which knows no class, can be asked
too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch

from scripts.data.fitting import fitted_shape
from scripts.data.placing import ImagePrompts, PromptedObject, SlicePrompt
from scripts.engines.answers import JudgedLogits, SampledLogits, merge_channels
from scripts.engines.box_inferer import canvas_boxes
from scripts.engines.inferers import CaseSlices, ClassPromptInferer, Question, written_prompts
from scripts.engines.runtimes import OnnxNetwork
from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.prompts import PromptEmbeddings


class PromptedInferer(ClassPromptInferer):
    """Ask for classes, and for objects in boxes and at points, all of one image together.

    Args:
        settings: of `ClassPromptInferer`.
    """

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: torch.nn.Module,
        class_ids: Sequence[int] | torch.Tensor | None = None,
        presence: torch.Tensor | None = None,
        case: str = "",
        modality: str | None = None,
        prompts: ImagePrompts | None = None,
        **_: Any,
    ) -> torch.Tensor | SampledLogits | JudgedLogits:
        """Segment one case.

        Args:
            inputs: as for `ClassPromptInferer`.
            network: as for `ClassPromptInferer`.
            class_ids: classes alone, as for `ClassPromptInferer`; leave them out where there are prompts.
            presence: as for `ClassPromptInferer`, of `class_ids`.
            case: its name.
            modality: as for `ClassPromptInferer`.
            prompts: what is asked for; None for what is in the metadata of `inputs`.

        Returns:
            As of `ClassPromptInferer`, with one channel for each id of `ImagePrompts.channels`: objects of one class
            share its channel, and each pixel has the largest of their logits.

        Raises:
            ConfigError: boxes or points on another runtime than torch.
        """
        asked = prompts or written_prompts(inputs)
        if class_ids is not None or asked is None or not asked.objects:
            named = class_ids if class_ids is not None or asked is None else asked.class_ids
            return super().__call__(inputs, network, class_ids=named, presence=presence, case=case, modality=modality)
        if self.runtime != "torch":
            raise ConfigError(f"boxes and points have the runtime torch alone, not {self.runtime}: leave runtime out")
        questions: list[Question] = [*asked.class_ids, *asked.objects]
        slices = torch.arange(inputs.shape[4])
        wanted = [_slices_of(question, slices) for question in questions]
        presence = torch.stack(wanted).unsqueeze(0)  # (1, K, D)
        modality = modality or asked.modality
        answer = self._answer(inputs, network, questions, presence=presence, case=case, modality=modality)
        return merge_channels(answer, _channels_of(asked))

    def _bundles(self, slices: CaseSlices) -> Iterator[tuple[list[int], list[int]]]:
        """Bundle classes with classes; objects each by itself, slices with as many points together."""
        objects = [column for column, question in enumerate(slices.questions) if isinstance(question, PromptedObject)]
        of_classes = slices.asked.clone()
        of_classes[objects] = False
        yield from super()._bundles(replace(slices, asked=of_classes))
        for column in objects:
            rows = sorted(
                slices.asked[column].nonzero().flatten().tolist(), key=lambda row: _points(slices, row, column)
            )
            for _, alike in groupby(rows, key=lambda row: _points(slices, row, column)):
                some = list(alike)
                for start in range(0, len(some), self.prompts_at_once):
                    yield some[start : start + self.prompts_at_once], [column]

    def _prompts(
        self,
        model: AutoMedSAM | OnnxNetwork,
        embedding: torch.Tensor,
        slices: CaseSlices,
        asked: tuple[Sequence[int], Sequence[int]],
        sample: int,
    ) -> PromptEmbeddings:
        """Make the prompts of B slices and K classes, or of B slices and one object."""
        rows, columns = asked
        if not isinstance(slices.questions[columns[0]], PromptedObject):
            return super()._prompts(model, embedding, slices, asked, sample)
        network = cast(AutoMedSAM, model)
        found = [_slice_prompt(slices, row, columns[0]) for row in rows]
        if found[0].box is not None:
            boxes = torch.tensor([prompt.box for prompt in found])
            squares = canvas_boxes(boxes, original=slices.original, size=network.image_size, offset=0)
            return network.encode_boxes(squares.to(embedding.device))
        points = canvas_points(
            torch.tensor([prompt.points for prompt in found]), original=slices.original, size=network.image_size
        )
        labels = torch.tensor([prompt.labels for prompt in found])
        return network.encode_points(points.to(embedding.device), labels.to(embedding.device))

    def _identity(self, slices: CaseSlices, row: int) -> tuple[object, ...]:
        """Name a slice by its boxes and points too: alike pixels with other ones have another answer."""
        of_objects = (
            question.slices.get(slices.places[row])
            for question in slices.questions
            if isinstance(question, PromptedObject)
        )
        return *super()._identity(slices, row), *of_objects


def canvas_points(points: torch.Tensor, *, original: tuple[int, int], size: int) -> torch.Tensor:
    """Bring points onto the network's square, laid out as by `scripts.data.fitting.fit_to_square`.

    Args:
        points: `(..., 2)` of x, y in the image's pixels, whole numbers at their centres.
        original: rows and columns (H, W) of the image.
        size: side of the square in pixels.

    Returns:
        `(..., 2)` in pixels of the square, their centres at whole numbers too.
    """
    rows, columns = fitted_shape(*original, size)
    scale = torch.tensor([columns / original[1], rows / original[0]], dtype=points.dtype)
    return (points + 0.5) * scale - 0.5


def _slices_of(question: Question, places: torch.Tensor) -> torch.Tensor:
    """Say in which of the slices (D,) something is asked for: a class in all."""
    if not isinstance(question, PromptedObject):
        return torch.ones_like(places, dtype=torch.bool)
    return torch.isin(places, torch.tensor(sorted(question.slices)))


def _channels_of(prompts: ImagePrompts) -> list[list[int]]:
    """Say which questions make up each channel of the answer."""
    ids = [*prompts.class_ids, *(item.class_id for item in prompts.objects)]
    return [[place for place, class_id in enumerate(ids) if class_id == channel] for channel in prompts.channels]


def _slice_prompt(slices: CaseSlices, row: int, column: int) -> SlicePrompt:
    return cast(PromptedObject, slices.questions[column]).slices[slices.places[row]]


def _points(slices: CaseSlices, row: int, column: int) -> int:
    return len(_slice_prompt(slices, row, column).points)
