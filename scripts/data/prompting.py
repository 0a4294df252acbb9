"""What to ask for in an image, as a transform: classes by name, and objects by boxes and points."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import Transform

from scripts.data.placing import require_inside
from scripts.data.prompts import BoxPrompt, PointPrompt, Prompts
from scripts.data.viewers import viewer_prompts
from scripts.data.vocabulary import Vocabulary, choose_classes
from scripts.errors import PromptError

logger = logging.getLogger(__name__)


class ChoosePromptsd(Transform):
    """Decide what is asked of an image, and write down its modality where the classes tell it.

    A case may bring prompts of its own, under `classes`, `boxes` and `points` or as MONAI Label's viewers send them
    (`scripts.data.viewers`). They take the place of all those given here.

    Args:
        vocabulary: names and ids.
        trained: modality -> class names that the model has learned.
        classes: names or ids, as a list or separated by commas; None for every class trained for the image's modality,
            or none where there are boxes or points.
        boxes: see `Prompts.read`; they are of one image, so that a second case is refused.
        points: likewise.
        boxes_trained: whether the model's mask decoder has learned boxes, as a published one has. One that has learned
            class prompts alone makes nothing of boxes and points.
        force: accept what was not trained: classes in the image's modality, boxes and points.

    Raises:
        PromptError: prompts that are not written as they should be.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        trained: Mapping[str, Sequence[str]],
        classes: str | int | Sequence[str | int] | None = None,
        boxes: Any = None,
        points: Any = None,
        boxes_trained: bool = False,
        force: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.trained = trained
        self.prompts = Prompts.read(classes=classes, boxes=boxes, points=points)
        self.boxes_trained = boxes_trained
        self.force = force
        self._prompted_case: Any = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with what is asked for.

        Args:
            data: with `modality`, if it is known, and with the `image` (C, X, Y, Z) of the file for boxes and points.

        Returns:
            With `named_ids`, the classes asked for by name; `prompted_objects`, pairs of an id and a box or points;
            `class_ids`, all these ids, ascending, each once: the channels of the answer; and the canonical `modality`.

        Raises:
            PromptError: an unknown class or modality, a class not trained in the modality, boxes and points where the
                model has not learned any, one outside of the image, or the boxes of one image for another.
        """
        case = dict(data)
        prompts = viewer_prompts(case) or self._own(case)
        objects = self._objects(prompts, case)
        modality = case.get("modality")
        named = [] if objects and not prompts.classes else self._classes(prompts, modality)
        case["named_ids"] = sorted(named)
        case["prompted_objects"] = objects
        case["class_ids"] = sorted({*named, *(object_id for object_id, _ in objects)})
        case["modality"] = self._only_modality(named) if modality is None else self.vocabulary.modality(modality).name
        return case

    def _own(self, case: Mapping[Hashable, Any]) -> Prompts:
        """Give the prompts that hold for all cases; boxes and points are of the first one alone."""
        if self.prompts.objects:
            name = case.get("case")
            self._prompted_case = name if self._prompted_case is None else self._prompted_case
            if name != self._prompted_case:
                raise PromptError(
                    f"boxes and points are of one image, and were used for {self._prompted_case}: segment the images "
                    "one by one, each with its own."
                )
        return self.prompts

    def _classes(self, prompts: Prompts, modality: str | None) -> list[int]:
        return choose_classes(
            self.vocabulary, prompts=prompts.classes, modality=modality, trained=self.trained, force=self.force
        )

    def _objects(self, prompts: Prompts, case: Mapping[Hashable, Any]) -> list[tuple[int, BoxPrompt | PointPrompt]]:
        """Give each object its id: the class's, or the next one for objects without a name."""
        if prompts.objects and not (self.boxes_trained or self.force):
            raise PromptError(
                "This model has learned classes, not boxes and points. Name classes, give a model that was trained on "
                "boxes, such as a published MedSAM, or add --force."
            )
        found: list[tuple[int, BoxPrompt | PointPrompt]] = []
        unnamed = 0
        for place, prompt in prompts.placed_objects():
            require_inside(prompt, case["image"].shape[1:], place=place)
            unnamed += prompt.name is None
            found.append((self._id(prompt.name, unnamed), prompt))
        return found

    def _id(self, name: str | int | None, unnamed: int) -> int:
        return self.vocabulary.object_id(unnamed) if name is None else self.vocabulary.resolve(name).id

    def _only_modality(self, chosen: Sequence[int]) -> str:
        """Find the one modality in which all the classes were trained."""
        known = {
            self.vocabulary.modality(modality).name: {self.vocabulary.resolve(name).id for name in names}
            for modality, names in self.trained.items()
        }
        fitting = [modality for modality, ids in known.items() if chosen and set(chosen) <= ids]
        if len(fitting) != 1:
            choices = ", ".join(fitting or self.vocabulary.modality_names)
            raise PromptError(f"The image's modality is unknown: give --modality, one of {choices}.")
        logger.info("modality not given; taken as %s, the only one in which these classes were trained", fitting[0])
        return fitting[0]
