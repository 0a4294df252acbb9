"""The layout of the Medical Segmentation Decathlon: a folder with `dataset.json`, `imagesTr` and `labelsTr`.

http://medicaldecathlon.com
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.data.converters.finding import Found, FoundCase
from scripts.data.converters.patterns import FileTree, natural_order
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError, PromptError

# What the owner calls the parts of a structure, where only the whole is a class here: task name -> value's name ->
# class name. An organ is taken with its tumours, and a tumour with its parts.
_PARTS: Mapping[str, Mapping[str, str]] = {
    "brats": {
        "edema": "brain tumour",
        "non-enhancing tumor": "brain tumour",
        "enhancing tumour": "brain tumour",
        "enhancing tumor": "brain tumour",
    },
    "liver": {"cancer": "liver", "tumor": "liver", "tumour": "liver"},
    "pancreas": {"cancer": "pancreas", "tumor": "pancreas", "tumour": "pancreas"},
}
_CHANNELS = {"flair": "FLAIR", "t1": "T1w", "t1ce": "t1gd", "t2": "T2w"}
_LABELLED = ("imagesTr/", "labelsTr/")
_MR_NAMES = {"mri", "mr", "flair", "t1w", "t1gd", "t1ce", "t1", "t2w", "t2", "adc"}


def find_decathlon_cases(
    source: Path,
    *,
    vocabulary: Vocabulary,
    sequence: str | None = None,
    label_map: Mapping[int, str | None] | None = None,
) -> Found:
    """Find the cases that `dataset.json` lists for training; what has no label or is not in the list is left out.

    Args:
        source: the folder of one task.
        vocabulary: label names that it knows, by name or synonym, are taken; all others are no class.
        sequence: which channel of a multi-channel image: flair, t1, t1ce or t2, or the name in `dataset.json`.
        label_map: value -> class name, instead of the names in `dataset.json`; its other values are no class.

    Returns:
        Cases and what was left out. Each file of `imagesTr` and `labelsTr` is in one of the two.

    Raises:
        InputError: no `dataset.json`, or one that is not as described; no label that is a known class.
        ConfigError: a sequence that the images do not have.
    """
    table = _read_table(source / "dataset.json")
    meanings = _meanings(table, vocabulary)
    if label_map:
        meanings = {**dict.fromkeys(meanings), **label_map}
    if not any(meanings.values()):
        raise InputError(
            f"{source.name}: none of its labels, {', '.join(map(str, table['labels'].values()))}, is a class of the "
            "vocabulary; name them with --label-map 1=liver, or add them to configs/classes.yaml"
        )
    channels = [str(table["modality"][index]) for index in sorted(table["modality"], key=natural_order)]
    modality = _modality(channels, vocabulary)
    cases, skipped, listed = [], [], set()
    for entry in table["training"]:
        image, label = (_plain_path(entry[key]) for key in ("image", "label"))
        if image in listed:
            raise InputError(f"{source.name}: dataset.json lists {image} twice; take one of the entries out")
        listed |= {image, label}
        missing = [path for path in (image, label) if not (source / path).is_file()]
        if missing:
            skipped.append((image, f"dataset.json lists {missing[0]}, which is missing"))
            continue
        name = Path(image).name.removesuffix(".gz").removesuffix(".nii")
        cases.append(
            FoundCase(
                name=name,
                patient=name,
                section=None,
                image=os.path.abspath(source / image),
                label=os.path.abspath(source / label),
                modality=modality,
            )
        )
    tests = [_plain_path(path["image"] if isinstance(path, dict) else path) for path in table.get("test") or ()]
    skipped += [(path, "no label is published") for path in tests]
    others = [path for path in FileTree(source).files if path.startswith(_LABELLED) and path not in listed]
    skipped += [(path, "dataset.json does not list it for training") for path in others]
    if not cases:
        raise InputError(f"{source.name}: dataset.json lists no case whose files are there")
    return Found(
        name=str(table.get("name") or source.name),
        cases=tuple(cases),
        skipped=tuple(skipped),
        label_map=meanings,
        channel=_channel(channels, sequence),
        source={"layout": "msd", **({} if sequence is None else {"sequence": sequence})},
    )


def _plain_path(path: Any) -> str:
    """Take the `./` off that the owner writes before every path."""
    return Path(os.path.normpath(str(path))).as_posix()


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected the task's dataset.json, got {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected valid JSON, got {error}") from error
    wanted = {"modality": dict, "labels": dict, "training": list}
    wrong = [key for key, kind in wanted.items() if not isinstance(table, dict) or not isinstance(table.get(key), kind)]
    if wrong or not table["modality"]:
        raise InputError(
            f"{path}: expected the Decathlon's keys modality, labels and training, got none or another thing under "
            f"{', '.join(wrong or ['modality'])}"
        )
    if not all(value.isdecimal() for value in table["labels"]):
        raise InputError(f"{path}: expected whole numbers as keys of 'labels', got {', '.join(table['labels'])}")
    if not all(isinstance(entry, dict) and {"image", "label"} <= set(entry) for entry in table["training"]):
        raise InputError(f"{path}: expected entries of 'training' with the keys image and label")
    return table


def _meanings(table: Mapping[str, Any], vocabulary: Vocabulary) -> dict[int, str | None]:
    """Read the label names, value -> class name or None."""
    parts = _PARTS.get(str(table.get("name", "")).casefold(), {})
    meanings: dict[int, str | None] = {}
    for value, name in table["labels"].items():
        if int(value) > 0:
            meanings[int(value)] = parts.get(str(name).casefold()) or _known(str(name), vocabulary)
    return meanings


def _known(name: str, vocabulary: Vocabulary) -> str | None:
    try:
        return vocabulary.resolve(name).name
    except PromptError:
        return None


def _modality(channels: list[str], vocabulary: Vocabulary) -> str:
    if all(name.casefold() in _MR_NAMES for name in channels):
        return "MR"
    try:
        return vocabulary.modality(channels[0]).name
    except PromptError as error:
        raise InputError(f"dataset.json names the modality {channels}; {error}") from error


def _channel(channels: list[str], sequence: str | None) -> int | None:
    """Find which channel to take; None for images with a single one, which have no axis for it."""
    if len(channels) == 1:
        if sequence is not None:
            raise ConfigError(f"--sequence is for images with several channels; these have one, {channels[0]}")
        return None
    names = [name.casefold() for name in channels]
    wanted = names[0] if sequence is None else _CHANNELS.get(sequence.casefold(), sequence).casefold()
    if wanted not in names:
        raise ConfigError(f"--sequence is one of {', '.join(channels)}, not {sequence!r}")
    return names.index(wanted)
