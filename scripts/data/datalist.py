"""The datalist: a JSON file that says which images, labels, modalities and annotated classes make up a data set."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.data.vocabulary import Vocabulary
from scripts.errors import InputError, PromptError
from scripts.files import atomic_path

_ENTRY_KEYS = ("case", "image", "label", "modality", "classes", "patient")

FilePaths = str | list[str]
LabelPaths = FilePaths | dict[int, FilePaths]


@dataclass(frozen=True)
class _Source:
    """What every entry of one datalist shares."""

    path: Path
    dataset_dir: Path
    vocabulary: Vocabulary
    label_map: dict[int, int]


def read_datalist(
    path: str | Path,
    *,
    section: str | Sequence[str],
    vocabulary: Vocabulary,
    dataset_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Read and check the cases of one or more sections of a datalist.

    The file is `{"name": ..., "label_map": {"1": "liver", ...}, "training": [entry, ...], "validation": [...], ...}`
    with entries `{"case", "image", "label", "modality", "classes", "patient"}`. `image` is one file or the slices of a
    stack in order; `label` is a label-map file, a list parallel to `image`, or `{class name: mask file or list}`.
    `label` may be missing for a case that is only predicted. `classes` names what is annotated in the case (default:
    all of `label_map`, or of the mask files); `patient` defaults to the case.

    Args:
        path: the datalist.
        section: name or names of the sections to read; the cases come in this order.
        vocabulary: gives classes their ids and modalities their canonical names.
        dataset_dir: the folder that relative paths start from; default: the datalist's own.

    Returns:
        One dict a case: `case` (str), `image` (absolute path or list of them), `label` (absolute path, list, or
        `{class id: path or list}`; no such key without a label), `label_map` (`{file value: class id}`, several values
        may be one class; empty unless the label is a label-map file), `modality` (canonical name), `annotated`
        (ascending class ids, empty without a label) and `patient` (str).

    Raises:
        InputError: the file or an entry is not as described, a file is missing, a case name is used twice, or a
            patient is in two sections; the text names the file and the entry.
    """
    content = _load_json(Path(path))
    sections = {name: entries for name, entries in content.items() if isinstance(entries, list)}
    source = _Source(
        path=Path(path),
        dataset_dir=Path(path).parent if dataset_dir is None else Path(dataset_dir),
        vocabulary=vocabulary,
        label_map=_read_label_map(content, vocabulary, Path(path)),
    )
    wanted = [section] if isinstance(section, str) else list(dict.fromkeys(section))
    for name in wanted:
        _require_section(name, sections, source.path)
    entries = {name: _open_entries(name, rows, source) for name, rows in sections.items()}
    _require_apart(entries, source.path)
    return [entry.read() for name in wanted for entry in entries[name]]


def write_datalist(datalist: Mapping[str, Any], path: str | Path) -> None:
    """Write a datalist; equal content gives equal bytes, and the file is either complete or not there.

    Args:
        datalist: what `read_datalist` describes, made of JSON types only.
        path: the file to write, in a folder that exists; an older file is replaced.

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps(datalist, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def trained_classes(cases: Iterable[Mapping[str, Any]], vocabulary: Vocabulary) -> dict[str, list[str]]:
    """Collect which classes are annotated in which modality: what a model trained on these cases can be asked for.

    Args:
        cases: cases of `read_datalist`.
        vocabulary: the one that they were read with.

    Returns:
        Canonical modality name -> names of the classes annotated in any of its cases, in id order. Modalities are in
        the vocabulary's order; those without an annotated case are left out.
    """
    ids: dict[str, set[int]] = {name: set() for name in vocabulary.modality_names}
    for case in cases:
        ids[case["modality"]].update(case["annotated"])
    found = {modality: class_ids for modality, class_ids in ids.items() if class_ids}
    return {
        modality: [entry.name for entry in vocabulary.entries if entry.id in class_ids]
        for modality, class_ids in found.items()
    }


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise InputError(f"The datalist {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # not JSON, not UTF-8, or a key given twice
        raise InputError(f"The datalist {path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"The datalist {path} must be a JSON object with sections, but a {_kind(content)} came.")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key given twice: JSON readers keep the last one and lose the other without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return content


def _read_label_map(content: Mapping[str, Any], vocabulary: Vocabulary, path: Path) -> dict[int, int]:
    rows = content.get("label_map", {})
    if not isinstance(rows, dict):
        raise InputError(f"{path}: 'label_map' must map file values to class names, but a {_kind(rows)} came.")
    label_map: dict[int, int] = {}
    for value, name in rows.items():
        if not value.isdecimal() or int(value) == 0 or int(value) in label_map:
            raise InputError(
                f"{path}: 'label_map' has the file value {value!r}; expected different whole numbers of 1 or more "
                "(0 is the background)."
            )
        label_map[int(value)] = _class_id(name, vocabulary, f"{path}: 'label_map' value {value}")
    return label_map


def _require_section(name: str, sections: Mapping[str, Any], path: Path) -> None:
    if name not in sections:
        found = ", ".join(repr(other) for other in sections) or "none"
        raise InputError(f"{path} has no section {name!r} (a list of cases). Sections there are: {found}.")
    if not sections[name]:
        raise InputError(f"{path}: section {name!r} is empty; it needs at least one case.")


def _open_entries(section: str, rows: Sequence[Any], source: _Source) -> list["_Entry"]:
    return [_Entry(fields, f"{source.path}: {section}[{index}]", source) for index, fields in enumerate(rows)]


def _require_apart(entries: Mapping[str, Sequence["_Entry"]], path: Path) -> None:
    """Check that no case name is used twice and no patient is in two sections, read or not."""
    cases: dict[str, str] = {}
    patients: dict[str, tuple[str, str]] = {}
    for section, members in entries.items():
        for entry in members:
            if entry.case in cases:
                raise InputError(f"{path}: case {entry.case!r} is in {cases[entry.case]!r} and again in {section!r}.")
            cases[entry.case] = section
            other_section, other_case = patients.setdefault(entry.patient, (section, entry.case))
            if other_section != section:
                # The patient's identifier stays out of the text, which may end in a log.
                raise InputError(
                    f"{path}: cases {other_case!r} in {other_section!r} and {entry.case!r} in {section!r} are of the "
                    "same patient; keep each patient in one section."
                )


def _class_id(name: Any, vocabulary: Vocabulary, place: str) -> int:
    try:
        return vocabulary.resolve(name).id
    except PromptError as error:
        raise InputError(f"{place}: {error}") from error


def _kind(value: Any) -> str:
    return type(value).__name__


class _Entry:
    """One entry of a section; its place in the file stands before every error text."""

    def __init__(self, fields: Any, place: str, source: _Source) -> None:
        self.place = place
        self.source = source
        if not isinstance(fields, dict):
            raise self.error(f"an entry is a JSON object, but a {_kind(fields)} came")
        self.fields: dict[str, Any] = fields
        self.case = self._case()
        self.place = f"{place} (case {self.case!r})"
        # A misspelt "classes" would turn classes nobody drew into negatives, so nothing unknown is passed over.
        unknown = [key for key in fields if key not in _ENTRY_KEYS]
        if unknown:
            raise self.error(f"unknown keys {unknown}; an entry has {', '.join(_ENTRY_KEYS)}")
        self.patient = self._patient()

    def error(self, text: str) -> InputError:
        return InputError(f"{self.place}: {text}.")

    def read(self) -> dict[str, Any]:
        """Check everything and return the case as `read_datalist` describes it."""
        image = self._files(self.fields.get("image"), "image")
        case: dict[str, Any] = {"case": self.case, "image": image}
        if "label" in self.fields:
            case["label"] = self._label(image)
        by_value = isinstance(case.get("label"), str | list)
        case["label_map"] = dict(self.source.label_map) if by_value else {}
        case["modality"] = self._modality()
        case["annotated"] = self._annotated(case)
        case["patient"] = self.patient
        return case

    def _case(self) -> str:
        name = self.fields.get("case")
        # Predictions are called after the case, so it must not lead out of the output folder.
        if not isinstance(name, str) or name.strip() in {"", ".", ".."} or any(sign in name for sign in "/\\\0"):
            raise self.error(f"'case' must be a name without slashes, but {name!r} came")
        return name

    def _patient(self) -> str:
        patient = self.fields.get("patient", self.case)
        if isinstance(patient, bool) or not isinstance(patient, str | int) or patient == "":
            raise self.error(
                f"'patient' must be a text (not an empty one) or a whole number, but a {_kind(patient)} came"
            )
        return str(patient)

    def _modality(self) -> str:
        name = self.fields.get("modality")
        if not isinstance(name, str):
            choices = ", ".join(self.source.vocabulary.modality_names)
            raise self.error(f"'modality' must be one of {choices}, but {name!r} came")
        try:
            return self.source.vocabulary.modality(name).name
        except PromptError as error:
            raise InputError(f"{self.place}: {error}") from error

    def _files(self, names: Any, what: str) -> FilePaths:
        if isinstance(names, str):
            return self._file(names, what)
        if not isinstance(names, list) or not names:
            raise self.error(f"{what!r} must be a file or a list of files, but {names!r} came")
        return [self._file(name, what) for name in names]

    def _file(self, name: Any, what: str) -> str:
        if not isinstance(name, str) or not name:
            raise self.error(f"{what!r} must name files, but {name!r} came")
        path = os.path.abspath(self.source.dataset_dir / name)
        if not os.path.exists(path):
            raise self.error(
                f"{what!r} names {path}, which is missing; relative paths start from {self.source.dataset_dir}, "
                "set dataset_dir if the files lie elsewhere"
            )
        return path

    def _label(self, image: FilePaths) -> LabelPaths:
        label = self.fields["label"]
        if isinstance(label, dict):
            return self._masks(label, image)
        if not self.source.label_map:
            raise self.error("a label-map file needs 'label_map' (file value -> class name) at the top of the datalist")
        return self._parallel(label, "label", image)

    def _masks(self, label: Mapping[str, Any], image: FilePaths) -> dict[int, FilePaths]:
        if not label:
            raise self.error("'label' is empty; leave it out for a case without one")
        masks: dict[int, FilePaths] = {}
        for name, files in label.items():
            class_id = self._class_id(name)
            if class_id in masks:
                raise self.error(f"'label' names the class {name!r} twice")
            masks[class_id] = self._parallel(files, f"label of {name}", image)
        return dict(sorted(masks.items()))

    def _parallel(self, names: Any, what: str, image: FilePaths) -> FilePaths:
        """Resolve label files and check that there is one for each image file."""
        files = self._files(names, what)
        if self._count(files) != self._count(image):
            raise self.error(
                f"{what!r} must be parallel to 'image': expected {self._count(image)}, but {self._count(files)} came"
            )
        return files

    @staticmethod
    def _count(files: FilePaths) -> str:
        return "one file" if isinstance(files, str) else f"a list of {len(files)}"

    def _annotated(self, case: Mapping[str, Any]) -> list[int]:
        known = self._labelled_ids(case)
        if "classes" not in self.fields:
            return known
        names = self.fields["classes"]
        if not known:
            raise self.error("'classes' says what the label shows, but there is no 'label'; give both or neither")
        if not isinstance(names, list) or not names:
            raise self.error(f"'classes' must be a list of class names, but {names!r} came")
        ids = {self._class_id(name): name for name in names}
        outside = [str(name) for class_id, name in ids.items() if class_id not in known]
        if outside:
            shown = ", ".join(self.source.vocabulary.entry(class_id).name for class_id in known)
            raise self.error(f"'classes' names {', '.join(outside)}, but the label shows {shown}")
        return sorted(ids)

    @staticmethod
    def _labelled_ids(case: Mapping[str, Any]) -> list[int]:
        label = case.get("label", {})
        return sorted(label if isinstance(label, dict) else set(case["label_map"].values()))

    def _class_id(self, name: Any) -> int:
        return _class_id(name, self.source.vocabulary, self.place)
