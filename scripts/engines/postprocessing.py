"""From logits to what a person opens: label map, names, colours, probability maps, an overlay picture."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_numpy, convert_to_tensor

from scripts.data.components import remove_small_components, smallest_sizes
from scripts.data.vocabulary import ClassEntry, Vocabulary
from scripts.data.writing import (
    prepare_output_folder,
    write_colour_table,
    write_label_map,
    write_labels_json,
    write_probability_maps,
)
from scripts.report.pictures import overlay_picture

logger = logging.getLogger(__name__)
THRESHOLD = 0.5  # of the probability


class LogitsToMasksd(MapTransform):
    """Turn logits (K, H, W, D) into one mask a class, overlaps kept: probability above 0.5."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with bool masks of the same shape."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = convert_to_tensor(result[key], track_meta=False) > 0  # the logit of 0.5
        return result


class LogitsToLabelMapd(MapTransform):
    """Merge logits (K, H, W, D) into one label map; where classes overlap, the more probable one wins.

    Args:
        keys: of the logits; the map (1, H, W, D) of class ids takes their place.
        classes_key: of the class ids of the channels.
        probability_key: where the probabilities (K, H, W, D) go.
        smallest: voxels in the volume and pixels in the slice of the smallest object of a class that stays in the map,
            see `remove_small_components`; [0, 0] leaves all. The probabilities stay as they are.

    Raises:
        ConfigError: `smallest` is not two whole numbers of 0 or more.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        classes_key: str = "class_ids",
        probability_key: str = "probability",
        smallest: Sequence[int] = (0, 0),
    ) -> None:
        super().__init__(keys)
        self.classes_key = classes_key
        self.probability_key = probability_key
        self.voxels, self.pixels = smallest_sizes(smallest)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with label map and probabilities."""
        result = dict(data)
        for key in self.key_iterator(result):
            probability = torch.sigmoid(convert_to_tensor(result[key], track_meta=False).float())
            # Small objects go before the classes compete, so that what lies under them comes to light.
            highest, winner = self._without_small(probability).max(dim=0, keepdim=True)  # (1, H, W, D)
            ids = torch.tensor(result[self.classes_key], dtype=torch.uint8, device=winner.device)
            labels = torch.where(highest > THRESHOLD, ids[winner], torch.zeros_like(ids[0]))
            # With room for metadata, because MONAI's Invertd passes plain tensors by.
            result[key] = convert_to_tensor(labels, track_meta=True)
            result[self.probability_key] = convert_to_tensor(probability, track_meta=True)
        return result

    def _without_small(self, probability: torch.Tensor) -> torch.Tensor:
        """Give probabilities (K, H, W, D) that are 0 in small objects."""
        if max(self.voxels, self.pixels) <= 1:
            return probability
        masks = convert_to_numpy(probability > THRESHOLD)
        small = masks & ~remove_small_components(masks, voxels=self.voxels, pixels=self.pixels)
        return probability.masked_fill(torch.from_numpy(small).to(probability.device), 0)


class DrawOverlayd(Transform):
    """Draw the label map over the image, while both are in display orientation.

    Args:
        vocabulary: names and colours.
        output_dir: where `<case>_overlay.png` goes.
    """

    def __init__(self, vocabulary: Vocabulary, *, output_dir: str | Path) -> None:
        self.vocabulary = vocabulary
        self.output_dir = output_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the picture; `data` passes unchanged."""
        folder = prepare_output_folder(self.output_dir)
        labels = convert_to_numpy(data["pred"])[0]
        overlay_picture(
            convert_to_numpy(data["image"]),
            np.stack([labels == class_id for class_id in data["class_ids"]]),
            classes=[self.vocabulary.entry(class_id) for class_id in data["class_ids"]],
            path=folder / f"{data['case']}_overlay.png",
            title=str(data["case"]),
        )
        return dict(data)


class SaveImageSegmentationd(Transform):
    """Write the label map in the file's own axes, with names and colours beside it.

    Its name contains SaveImage, by which MONAI Label and MONAI Deploy know the transforms that they replace.

    Args:
        vocabulary: names and colours.
        output_dir: where the files go.
        probability_maps: whether to write each class's probabilities too; overlapping classes stay apart there.
    """

    def __init__(self, vocabulary: Vocabulary, *, output_dir: str | Path, probability_maps: bool = False) -> None:
        self.vocabulary = vocabulary
        self.output_dir = output_dir
        self.probability_maps = probability_maps
        self.written: dict[int, ClassEntry] = {}  # the names beside the maps must hold for all cases of the folder

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files; `data` passes unchanged.

        Raises:
            OutputError: the folder cannot be written to.
        """
        folder = prepare_output_folder(self.output_dir)
        classes = [self.vocabulary.entry(class_id) for class_id in data["class_ids"]]
        meta = data["image"].meta
        place: dict[str, Any] = {
            "folder": folder,
            "stem": str(data["case"]),
            "affine": np.asarray(meta["original_affine"], dtype=float),
            "planar": bool(meta["picture"]),
        }
        path = write_label_map(convert_to_numpy(data["pred"])[0].astype(np.uint8), **place)
        if self.probability_maps:
            write_probability_maps(
                convert_to_numpy(data["probability"]), class_names=[entry.name for entry in classes], **place
            )
        self.written |= {entry.id: entry for entry in classes}
        write_labels_json(self.written.values(), folder)
        write_colour_table(self.written.values(), folder)
        logger.info("wrote %s", path.name)
        return dict(data)
