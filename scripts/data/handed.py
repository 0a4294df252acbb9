"""Images that a program hands over in memory, as MONAI Deploy does, in place of paths.

A reader of this bundle writes down the number of channels, the place in the patient, a case's name and its modality;
such a program has left them in the image's metadata or nowhere.
"""

import contextlib
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform

from scripts.data.vocabulary import Vocabulary
from scripts.errors import InputError, PromptError

logger = logging.getLogger(__name__)
_MODALITY_KEYS = ("modality", "Modality")  # of this bundle's reader; of DICOM, as MONAI Deploy hands its values on
_CHANNEL_KEY, _NO_CHANNEL = "original_channel_dim", "no_channel"  # of MONAI


def bundle_folder() -> str:
    """Give the folder of the bundle that this code is part of, for configs that are read from any other."""
    return str(Path(__file__).resolve().parents[2])


def with_handed_images(
    preprocessing: Compose, *, vocabulary: Vocabulary, trained: Mapping[str, Sequence[str]], modality: str | None = None
) -> Compose:
    """Put `AdoptImaged` before the transforms of a config.

    Args:
        preprocessing: the transforms, in which what loads an image has its place still: such a program leaves it out.
        vocabulary: as for `AdoptImaged`.
        trained: likewise.
        modality: likewise.
    """
    adopt = AdoptImaged("image", vocabulary=vocabulary, trained=trained, modality=modality)
    return Compose([adopt, *preprocessing.transforms])


class AdoptImaged(MapTransform):
    """Make of an image in memory what this bundle's reader makes of a file.

    Args:
        keys: of the images, tensors with metadata: `original_affine` (voxel -> mm, RAS+) and, where the channels are
            not the first axis, `original_channel_dim`.
        vocabulary: names of modalities.
        trained: modality -> class names that the model has learned.
        modality: of all images; None for that of each one's metadata or, where that does not tell, the only one in
            which the model was trained.
        case_key: under which the name goes.
        modality_key: under which the modality goes.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        vocabulary: Vocabulary,
        trained: Mapping[str, Sequence[str]],
        modality: str | None = None,
        case_key: str = "case",
        modality_key: str = "modality",
    ) -> None:
        super().__init__(keys)
        self.vocabulary = vocabulary
        self.trained = trained
        self.modality = modality
        self.case_key = case_key
        self.modality_key = modality_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with `(C, X, Y, Z)` images in single precision, the case's name and its modality.

        Raises:
            InputError: an image that nothing tells the place of.
            PromptError: a modality that is not known.
        """
        case = dict(data)
        for key in self.key_iterator(case):
            image, modality = _adopted(case[key], str(key)), case.get(self.modality_key)
            case[self.modality_key] = self._modality(image) if modality is None else modality
            case[key] = image
        case.setdefault(self.case_key, "image")
        return case

    def _modality(self, image: MetaTensor) -> str | None:
        """Find the canonical name of an image's modality; None where only a person can tell."""
        told = next((str(image.meta[key]) for key in _MODALITY_KEYS if image.meta.get(key)), None)
        if self.modality is not None:
            with contextlib.suppress(PromptError):  # scanners have codes for what is no modality
                image.meta["modality"] = None if told is None else self.vocabulary.modality(told).name
            return self.vocabulary.modality(self.modality).name  # the guard compares them
        if told is None and len(self.trained) == 1:
            (told,) = self.trained
            logger.info("the image does not tell its modality; taken as %s, in which alone the model was trained", told)
        return None if told is None else self.vocabulary.modality(told).name


def _adopted(image: Any, name: str) -> MetaTensor:
    """Give `(C, X, Y, Z)`, whatever axis holds the channels, in single precision."""
    if not isinstance(image, MetaTensor) or image.meta.get("original_affine") is None:
        raise InputError(
            f"{name}: expected a tensor with original_affine (voxel -> mm) in its metadata, got a "
            f"{type(image).__name__} without: hand the image over with its affine"
        )
    meta = {key: value for key, value in image.meta.items() if key not in (_CHANNEL_KEY, "affine")}
    axis = image.meta.get(_CHANNEL_KEY, 0)
    values = image.as_tensor()
    channels_first = values.unsqueeze(0) if axis == _NO_CHANNEL else values.movedim(int(axis), 0)
    return MetaTensor(channels_first.float(), affine=image.affine, meta=meta)
