"""Which classes to ask for in an image, as a transform."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import Transform

from scripts.data.vocabulary import Vocabulary, choose_classes, parse_prompts
from scripts.errors import PromptError

logger = logging.getLogger(__name__)


class ChooseClassesd(Transform):
    """Write down the class ids to ask for, and the modality where the classes tell it.

    Args:
        vocabulary: names and ids.
        trained: modality -> class names that the model has learned.
        classes: what was asked for: names or ids, as a list or separated by commas; None for every class trained for
            the image's modality.
        force: accept classes that were not trained in the image's modality.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        trained: Mapping[str, Sequence[str]],
        classes: str | int | Sequence[str | int] | None = None,
        force: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.trained = trained
        self.prompts = parse_prompts(classes)
        self.force = force

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with `class_ids`, ascending, and the canonical `modality`.

        Raises:
            PromptError: an unknown class or modality, or a class not trained in the modality.
        """
        case = dict(data)
        modality = case.get("modality")
        chosen = choose_classes(
            self.vocabulary, prompts=self.prompts, modality=modality, trained=self.trained, force=self.force
        )
        case["class_ids"] = sorted(chosen)
        case["modality"] = self._only_modality(chosen) if modality is None else self.vocabulary.modality(modality).name
        return case

    def _only_modality(self, chosen: Sequence[int]) -> str:
        """Find the one modality in which all the classes were trained."""
        known = {
            self.vocabulary.modality(modality).name: {self.vocabulary.resolve(name).id for name in names}
            for modality, names in self.trained.items()
        }
        fitting = [modality for modality, ids in known.items() if set(chosen) <= ids]
        if len(fitting) != 1:
            choices = ", ".join(fitting or self.vocabulary.modality_names)
            raise PromptError(f"The image's modality is unknown: give --modality, one of {choices}.")
        logger.info("modality not given; taken as %s, the only one in which these classes were trained", fitting[0])
        return fitting[0]
