"""The table of known data sets: where each owner puts images and labels, and what the labels' values mean.

`configs/layouts.yaml` is the table; its head explains every key.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, PromptError

SHARED = "shared"
# Data sets that are found by code, not by a row of the table of layouts alone.
PROGRAMS = {
    "shared": "a folder with images/, masks/ and split.csv, known by its name",
    "generic": "any images with label maps or masks, described by options",
    "medsam_npz": "MedSAM's challenge files, .npz with imgs and gts",
    "msd": "a task of the Medical Segmentation Decathlon, with its dataset.json",
}
_KEYS = {
    "title", "page", "licence", "modality", "image", "label", "label_map", "mask", "fields", "choices", "case",
    "patient", "same_patient", "sequences", "sections", "split_table", "exclude", "regions",
}  # fmt: skip
_MAPPINGS = {"label_map", "mask", "fields", "choices", "sequences", "sections", "split_table", "exclude"}
_TABLE_KEYS = {"file", "case", "section", "patient", "sections", "patient_may_miss"}

# What one value of a label map means: a class, left and right partner in one, or (None) no class of ours.
Meaning = str | tuple[str, ...] | None


@dataclass(frozen=True)
class SplitTable:
    """A table of an owner's split.

    Attributes:
        file: its path below the source, a CSV file with a head line.
        case: the column that holds the image's file name without suffix.
        section: the column of the section.
        patient: the column of the patient, empty without one.
        sections: value in the section's column -> section of the datalist.
        patient_may_miss: whether a table without the patients' column will do.
    """

    file: str
    case: str
    section: str
    patient: str
    sections: Mapping[str, str]
    patient_may_miss: bool = False


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk; paths are patterns of `PathPattern`.

    Attributes:
        name: as in `automedsam prepare NAME`.
        title: for people.
        page: the owner's page.
        licence: the terms as the owner states them.
        modality: canonical name.
        image: patterns of the images; with `{slice}` in them the files of one case are a stack; with a slash at the
            end they are folders of a DICOM series.
        label: patterns of label maps, the first that has a file counts; none when there are masks.
        label_map: value in the label maps -> meaning.
        mask: class name -> patterns of its binary masks.
        fields: gap -> regular expression of what it may hold.
        choices: option -> its values -> regular expression of the gap of the option's name; the first is the default.
        case: what a case is called, from the gaps' values (and `{section}`).
        patient: whom it is of, from the gaps' values; empty when nobody knows.
        same_patient: groups of cases, by the beginning of their names, that are of one patient each.
        sequences: section (empty without an official split) -> last frame of each film that the frames, numbered by
            `{case}`, come from; frames of a film are of one patient.
        sections: value of the gap `{split}` (empty: a pattern without it) -> section; empty for a drawn split.
        split_table: the owner's table of the split.
        exclude: reason -> regular expression of relative paths that are left out for it.
        regions: of the body, in view of every image; None for those of the annotated classes.
    """

    name: str
    title: str
    modality: str
    image: tuple[str, ...]
    page: str = ""
    licence: str = ""
    label: tuple[str, ...] = ()
    label_map: Mapping[int, Meaning] = field(default_factory=dict)
    mask: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    case: str = "{case}"
    patient: str = ""
    same_patient: tuple[tuple[str, ...], ...] = ()
    sequences: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    split_table: SplitTable | None = None
    exclude: Mapping[str, str] = field(default_factory=dict)
    regions: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that the labels show, as the layout writes them, each once."""
        meanings = [name for meaning in self.label_map.values() for name in names_of(meaning)]
        return tuple(dict.fromkeys([*meanings, *self.mask]))


def names_of(meaning: Meaning) -> tuple[str, ...]:
    """Give the classes that a label value stands for."""
    if meaning is None:
        return ()
    return (meaning,) if isinstance(meaning, str) else tuple(meaning)


def read_layouts(path: str | Path, vocabulary: Vocabulary) -> dict[str, Layout]:
    """Read and check the table of layouts.

    Args:
        path: `configs/layouts.yaml`.
        vocabulary: every class and modality of the table must be in it.

    Returns:
        Name -> layout, in the table's order.

    Raises:
        ConfigError: the file is missing, not YAML, or a row breaks a rule; the text names the row.
    """
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"The table of layouts {path} cannot be read: {error}") from error
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{path} must map the name of each data set to its row.")
    return {name: make_layout(str(name), row, vocabulary, source=str(path)) for name, row in rows.items()}


def names_of_sets(layouts: Mapping[str, Layout]) -> list[str]:
    """Give all names that `automedsam prepare` takes."""
    return [*PROGRAMS, *(name for name in layouts if not name.startswith(f"{SHARED}/"))]


def make_layout(name: str, row: Mapping[str, Any], vocabulary: Vocabulary, *, source: str) -> Layout:
    """Make a layout of a row of the table.

    Args:
        name: of the data set.
        row: the row as YAML gives it.
        vocabulary: holds every class and modality that may be named.
        source: where the row comes from, for messages.

    Raises:
        ConfigError: unknown or missing keys, an unknown class or modality, labels as both map and masks.
    """
    place = f"{source}: layout {name!r}"
    if not isinstance(row, Mapping):
        raise ConfigError(f"{place} must be a table of keys, but a {type(row).__name__} came.")
    _require_keys(row, place)
    layout = Layout(
        name=name,
        title=str(row.get("title", name)),
        page=str(row.get("page", "")),
        licence=str(row.get("licence", "")),
        case=str(row.get("case", "{case}")),
        patient=str(row.get("patient", "")),
        fields=dict(row.get("fields", {})),
        choices=dict(row.get("choices", {})),
        exclude=dict(row.get("exclude", {})),
        modality=_modality(row["modality"], vocabulary, place),
        image=_patterns(row["image"]),
        label=_patterns(row.get("label", ())),
        label_map=_label_map(row.get("label_map", {}), place),
        mask={str(class_name): _patterns(patterns) for class_name, patterns in row.get("mask", {}).items()},
        same_patient=tuple(tuple(group) for group in row.get("same_patient", ())),
        sequences={section: tuple(ends) for section, ends in row.get("sequences", {}).items()},
        sections={str(value): section for value, section in row.get("sections", {}).items()},
        split_table=_split_table(row["split_table"], place) if "split_table" in row else None,
        regions=tuple(row["regions"]) if "regions" in row else None,
    )
    if bool(layout.mask) == bool(layout.label) or bool(layout.label) != bool(layout.label_map):
        raise ConfigError(f"{place} needs either 'label' with 'label_map', or 'mask'.")
    _require_known(layout, vocabulary, place)
    return layout


def _require_keys(row: Mapping[str, Any], place: str) -> None:
    unknown = sorted(set(row) - _KEYS)
    missing = sorted({"modality", "image"} - set(row))
    if unknown or missing:
        raise ConfigError(f"{place} has unknown keys {unknown} and lacks {missing}; known are {sorted(_KEYS)}.")
    wrong = sorted(key for key in _MAPPINGS & set(row) if not isinstance(row[key], Mapping))
    if wrong:
        raise ConfigError(f"{place}: {', '.join(wrong)} must be tables of keys.")


def _modality(name: Any, vocabulary: Vocabulary, place: str) -> str:
    try:
        return vocabulary.modality(name).name
    except PromptError as error:
        raise ConfigError(f"{place}: {error}") from error


def _require_known(layout: Layout, vocabulary: Vocabulary, place: str) -> None:
    """Check that classes, pairs of partners and regions are those of the vocabulary, and expressions can be read."""
    try:
        ids = {name: vocabulary.resolve(name).id for name in layout.class_names}
        for region in layout.regions or ():
            vocabulary.region(region)
        for expression in layout.exclude.values():
            re.compile(expression)
    except (PromptError, re.error) as error:
        raise ConfigError(f"{place}: {error}") from error
    for meaning in layout.label_map.values():
        pair = [vocabulary.entry(ids[name]) for name in names_of(meaning)]
        partners = [entry.partner for entry in reversed(pair)]
        if isinstance(meaning, tuple) and (len(pair) != 2 or [entry.id for entry in pair] != partners):
            raise ConfigError(f"{place}: {list(meaning)} is no pair of partners of left and right.")


def _patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _label_map(rows: Mapping[Any, Any], place: str) -> dict[int, Meaning]:
    meanings: dict[int, Meaning] = {}
    for value, meaning in rows.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{place}: 'label_map' has the value {value!r}; expected whole numbers of 1 or more.")
        if not isinstance(meaning, str | list | None):
            raise ConfigError(f"{place}: 'label_map' has {meaning!r}; expected a class, [left, right] or null.")
        meanings[value] = tuple(meaning) if isinstance(meaning, list) else meaning
    return meanings


def _split_table(row: Mapping[str, Any], place: str) -> SplitTable:
    if not {"file", "case", "section", "sections"} <= set(row) <= _TABLE_KEYS:
        raise ConfigError(f"{place}: 'split_table' has the keys {sorted(row)}; known are {sorted(_TABLE_KEYS)}.")
    return SplitTable(**{"patient": "", **row})
