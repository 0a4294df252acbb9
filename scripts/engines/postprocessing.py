"""From logits to what a person opens: label map, names, colours, probability maps, an overlay picture."""

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, SaveImaged
from monai.utils import convert_to_numpy, convert_to_tensor

from scripts.data.components import remove_small_components, smallest_sizes
from scripts.data.dicom_seg import DICOM_SEG, OUTPUT_FORMATS, Algorithm, write_dicom_seg
from scripts.data.vocabulary import ClassEntry, Vocabulary
from scripts.data.writing import (
    prepare_output_folder,
    write_class_maps,
    write_colour_table,
    write_label_map,
    write_labels_json,
)
from scripts.errors import ConfigError
from scripts.report.pictures import choose_slices, overlay_picture

logger = logging.getLogger(__name__)
LOGIT_OF_HALF = 0.0  # a voxel belongs to a class whose probability is above one half


class LogitsToMasksd(MapTransform):
    """Turn logits (K, H, W, D) into one mask a class.

    Args:
        keys: of the logits.
        exclusive: False for classes by themselves, each where its probability is above 0.5, overlaps kept. True for
            classes that exclude one another, with logits relative to the background's: each where it is more probable
            than the background and all others.
    """

    def __init__(self, keys: KeysCollection = "pred", *, exclusive: bool = False) -> None:
        super().__init__(keys)
        self.exclusive = exclusive

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with bool masks of the same shape."""
        result = dict(data)
        for key in self.key_iterator(result):
            logits = convert_to_tensor(result[key], track_meta=False)
            masks = logits > LOGIT_OF_HALF
            if self.exclusive:
                winner = logits.argmax(dim=0, keepdim=True)  # the first of equals, as in the label map
                masks = masks & (winner == torch.arange(len(logits), device=logits.device).reshape(-1, 1, 1, 1))
            result[key] = masks
        return result


class LogitsToLabelMapd(MapTransform):
    """Merge logits (K, H, W, D) into one label map; where classes overlap, the more probable one wins.

    Slice by slice, since the probabilities of a whole volume would take several times the memory of its logits.

    Args:
        keys: of the logits; the map (1, H, W, D) of class ids takes their place.
        classes_key: of the class ids of the channels.
        smallest: voxels in the volume and pixels in the slice of the smallest object of a class that stays in the map,
            see `remove_small_components`; [0, 0] leaves all. The logits stay as they are.
        keep_logits: whether the logits go on under `logits_key`.
        logits_key: where they go.

    Raises:
        ConfigError: `smallest` is not two whole numbers of 0 or more.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        classes_key: str = "class_ids",
        smallest: Sequence[int] = (0, 0),
        keep_logits: bool = False,
        logits_key: str = "logits",
    ) -> None:
        super().__init__(keys)
        self.classes_key = classes_key
        self.voxels, self.pixels = smallest_sizes(smallest)
        self.keep_logits = keep_logits
        self.logits_key = logits_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the label map."""
        result = dict(data)
        for key in self.key_iterator(result):
            logits = convert_to_tensor(result[key], track_meta=False)
            ids = torch.tensor(result[self.classes_key], dtype=torch.uint8, device=logits.device)
            # With room for metadata, because MONAI's Invertd passes plain tensors by.
            result[key] = convert_to_tensor(self._merge(logits, ids), track_meta=True)
            if self.keep_logits:
                result[self.logits_key] = convert_to_tensor(logits, track_meta=True)
        return result

    def _merge(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Let the classes (K,) compete for each voxel: ids (1, H, W, D), 0 for none."""
        small = self._small(logits)
        labels = torch.zeros((1, *logits.shape[1:]), dtype=torch.uint8, device=logits.device)
        for place in range(logits.shape[3]):
            # Small objects go before the classes compete, so that what lies under them comes to light.
            competing = logits[..., place] if small is None else logits[..., place].masked_fill(small[..., place], -1)
            highest, winner = competing.max(dim=0)  # (H, W)
            labels[0, ..., place] = torch.where(highest > LOGIT_OF_HALF, ids[winner], 0)
        return labels

    def _small(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Find the objects that are too small, (K, H, W, D) bool; None where none can be."""
        if max(self.voxels, self.pixels) <= 1:
            return None
        masks = convert_to_numpy(logits > LOGIT_OF_HALF)
        small = masks & ~remove_small_components(masks, voxels=self.voxels, pixels=self.pixels)
        return torch.from_numpy(small).to(logits.device)


class _WritesFiles(SaveImaged):
    """What writes a case's files, for programs that write them by themselves and leave such transforms out.

    MONAI Label leaves out what is a `SaveImaged` by type, MONAI Deploy what has SaveImage in its name. Of MONAI's own
    transform nothing else is used.
    """

    def __init__(self) -> None:
        MapTransform.__init__(self, "pred")  # SaveImaged would set up a writer of its own


class SaveImageOverlayd(_WritesFiles):
    """Draw the label map over the image, while both are in display orientation.

    Args:
        vocabulary: names and colours.
        output_dir: where `<case>_overlay.png` goes.
    """

    def __init__(self, vocabulary: Vocabulary, *, output_dir: str | Path) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.output_dir = output_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the picture; `data` passes unchanged."""
        folder = prepare_output_folder(self.output_dir)
        labels = convert_to_numpy(data["pred"])  # (1, H, W, D)
        places = choose_slices(labels)  # first, since the masks of a whole volume would take K times its memory
        overlay_picture(
            convert_to_numpy(data["image"])[..., places],
            np.concatenate([labels[..., places] == class_id for class_id in data["class_ids"]]),
            classes=[self.vocabulary.entry(class_id) for class_id in data["class_ids"]],
            path=folder / f"{data['case']}_overlay.png",
            title=str(data["case"]),
            chosen=(places, labels.shape[-1]),
        )
        return dict(data)


class SaveImageSegmentationd(_WritesFiles):
    """Write the label map in the file's own axes, with names and colours beside it.

    Args:
        vocabulary: names and colours.
        output_dir: where the files go.
        probability_maps: whether to write each class's probabilities too, of the logits under `logits`; overlapping
            classes stay apart there. Their uncertainty is written wherever there is one, under `uncertainty`.
        exclusive: whether the classes exclude one another, see `LogitsToMasksd`.
        output_format: nifti, or dicom-seg for a DICOM Segmentation in place of the label map and its names and colours;
            it needs the headers that `LoadSeriesd` leaves under `series`.
        metadata: the bundle's metadata.json, which a DICOM Segmentation takes name and version of; not needed else.

    Raises:
        ConfigError: another format, or metadata that cannot be used.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        output_dir: str | Path,
        probability_maps: bool = False,
        exclusive: bool = False,
        output_format: str = OUTPUT_FORMATS[0],
        metadata: str | Path = "configs/metadata.json",
    ) -> None:
        super().__init__()
        if output_format not in OUTPUT_FORMATS:
            raise ConfigError(f"the output format is one of {', '.join(OUTPUT_FORMATS)}, not {output_format!r}")
        self.algorithm = Algorithm.read(metadata) if output_format == DICOM_SEG else None
        self.vocabulary = vocabulary
        self.output_dir = output_dir
        self.probability_maps = probability_maps
        self.exclusive = exclusive
        self.written: dict[int, ClassEntry] = {}  # the names beside the maps must hold for all cases of the folder

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files; `data` passes unchanged.

        Raises:
            OutputError: the folder cannot be written to.
            InputError: a DICOM Segmentation cannot refer to the series.
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
        path = self._write_labels(convert_to_numpy(data["pred"])[0].astype(np.uint8), data, classes, place)
        names = [entry.name for entry in classes]
        if self.probability_maps:
            shares = probabilities(data["logits"], exclusive=self.exclusive)
            write_class_maps(shares, kind="prob", class_names=names, **place)
        if "uncertainty" in data:
            spreads = (convert_to_numpy(spread.float()) for spread in data["uncertainty"])
            write_class_maps(spreads, kind="uncertainty", class_names=names, **place)
        logger.info("wrote %s", path.name)
        return dict(data)

    def _write_labels(
        self, labels: np.ndarray, data: Mapping[Hashable, Any], classes: Sequence[ClassEntry], place: Mapping[str, Any]
    ) -> Path:
        """Write the ids (H, W, D), and what they mean beside or within them."""
        folder = place["folder"]
        if self.algorithm is not None:
            path = folder / f"{place['stem']}_seg.dcm"
            return write_dicom_seg(
                labels, data["series"], classes, path, affine=place["affine"], algorithm=self.algorithm
            )
        path = write_label_map(labels, **place)
        self.written |= {entry.id: entry for entry in classes}
        write_labels_json(self.written.values(), folder)
        write_colour_table(self.written.values(), folder)
        return path


def probabilities(logits: torch.Tensor, *, exclusive: bool = False) -> Iterator[np.ndarray]:
    """Give each class's probabilities (H, W, D) of logits (K, H, W, D), one class at a time, in single precision.

    Args:
        logits: of the classes, by themselves or relative to the background's.
        exclusive: whether the classes exclude one another, so that with the background they add up to 1.
    """
    plain = convert_to_tensor(logits, track_meta=False)
    total = _log_of_total(plain) if exclusive else None
    for of_class in plain:
        values = of_class.float()
        yield convert_to_numpy(torch.sigmoid(values) if total is None else (values - total).exp())


def _log_of_total(logits: torch.Tensor) -> torch.Tensor:
    """Add up what logits (K, H, W, D) and the background's 0 stand for, class by class: its logarithm (H, W, D)."""
    total = torch.zeros_like(logits[0], dtype=torch.float32)
    for of_class in logits:
        total = torch.logaddexp(total, of_class.float())
    return total
