"""A layout made of what a user says about a data set of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.data.converters.layouts import Layout, make_layout
from scripts.data.converters.patterns import PathPattern
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, PromptError

USUAL_IMAGES = "images/{case}.{suffix}"
USUAL_LABELS = "labels/{case}.{suffix}"
# How people call the sections of a split.
USUAL_SECTIONS = {
    "train": "training", "training": "training", "tr": "training",
    "val": "validation", "valid": "validation", "validation": "validation", "va": "validation",
    "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip
_NOT_IN_NAMES = {"prefix", "split", "slice", "suffix", "nifti", "picture"}


def generic_layout(
    *,
    vocabulary: Vocabulary,
    modality: str | None,
    images: str = USUAL_IMAGES,
    labels: str = USUAL_LABELS,
    classes: Sequence[str] | None = None,
    label_map: Mapping[int, str | None] | None = None,
    split_table: str | None = None,
    name: str = "generic",
) -> Layout:
    """Make a layout for any images with label maps or binary masks.

    Args:
        vocabulary: holds the classes and modalities that may be named.
        modality: of all images.
        images: pattern of the images, see `PathPattern`; `{patient}` in it keeps a patient's cases together, `{slice}`
            makes stacks, `{split}` (train, val, test) is an official split.
        labels: pattern of the labels; with `{class}` in it, one mask a class.
        classes: without `{class}` in the pattern, the one class of the masks; with it, all that may stand there.
        label_map: value -> class name, None for a value of no class; for label maps.
        split_table: a CSV file below the source with the columns `case` (the image's file name without suffix),
            `split` and, if known, `patient`.
        name: of the data set.

    Raises:
        ConfigError: no modality, neither classes nor label map, or both.
    """
    if modality is None:
        raise ConfigError(f"say what the images are with --modality, one of {', '.join(vocabulary.modality_names)}")
    if bool(classes) == bool(label_map):
        raise ConfigError("say what the labels show: either --label-map 1=liver,2=spleen, or --classes for masks")
    gaps = PathPattern(images).names
    row: dict[str, Any] = {
        "modality": _canonical(modality, vocabulary),
        "image": images,
        "case": _case_template(images, gaps),
        **({"patient": "{patient}"} if "patient" in gaps else {}),
        **({"sections": USUAL_SECTIONS} if "split" in gaps else {}),
        **({"split_table": _table(split_table)} if split_table else {}),
        **({"label": labels, "label_map": dict(label_map)} if label_map else {"mask": _masks(labels, classes or ())}),
    }
    return make_layout(name, row, vocabulary, source="the command line")


def _canonical(modality: str, vocabulary: Vocabulary) -> str:
    try:
        return vocabulary.modality(modality).name
    except PromptError as error:
        raise ConfigError(str(error)) from error


def _case_template(images: str, gaps: frozenset[str]) -> str:
    """Name cases after `{case}`, or else after everything that tells them apart."""
    if "case" in gaps:
        return "{case}"
    telling = sorted(gaps - _NOT_IN_NAMES, key=lambda gap: images.index("{" + gap + "}"))
    if not telling:
        raise ConfigError(f"the pattern {images!r} needs a gap that tells cases apart, such as {{case}}")
    return "_".join("{" + gap + "}" for gap in telling)


def _masks(labels: str, classes: Sequence[str]) -> dict[str, str]:
    """Give the pattern of each class's masks."""
    if "{class}" in labels:
        return {name: labels.replace("{class}", name) for name in classes}
    if len(classes) != 1:
        raise ConfigError(
            f"{len(classes)} classes need a mask each: give --labels with {{class}} in it, or --label-map for maps"
        )
    return {classes[0]: labels}


def _table(path: str) -> dict[str, Any]:
    columns = {"case": "case", "section": "split", "patient": "patient", "patient_may_miss": True}
    return {"file": path, **columns, "sections": USUAL_SECTIONS}
