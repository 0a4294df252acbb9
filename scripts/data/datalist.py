"""The datalist: a JSON file that says which images, labels, modalities and annotated classes make up a data set.

Several of them can be read as one: classes are known by name, so that the same name has the same id in all.
"""

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.transforms import Transform

from scripts.data.reading import find_inputs
from scripts.data.vocabulary import Vocabulary
from scripts.errors import InputError, PromptError
from scripts.files import atomic_path

_ENTRY_KEYS = ("case", "image", "label", "modality", "classes", "patient", "regions", "counts")
_COUNT_KEYS = {"slices", "voxels"}

Place = str | os.PathLike[str]
FilePaths = str | list[str]
LabelPaths = FilePaths | dict[int, FilePaths]


@dataclass(frozen=True)
class _Source:
    """What every entry of one datalist shares."""

    path: Path
    dataset_dir: Path
    vocabulary: Vocabulary
    name: str
    label_map: dict[int, int | None]


def read_datalist(
    path: Place | Sequence[Place],
    *,
    section: str | Sequence[str],
    vocabulary: Vocabulary,
    dataset_dir: Place | None = None,
) -> list[dict[str, Any]]:
    """Read and check the cases of one or more sections of a datalist, or of several datalists as one.

    The file is `{"name": ..., "label_map": {"1": "liver", ...}, "training": [entry, ...], "validation": [...], ...}`
    with entries of the keys case, image, label, modality, classes, patient, regions and counts. `image` is one file or
    the slices of a stack in order; `label` is a label-map file, a list parallel to `image`, or
    `{class name: mask file or list}`. `label` may be missing for a case that is only predicted. In `label_map` a class
    of null is a file value that is read and ignored. `classes` names what is annotated in the case (default: all of
    `label_map`, or of the mask files); `patient` defaults to the case, `regions` to those of the annotated classes;
    `counts` is `{"slices": n, "voxels": {class name: n}}` as they were when the datalist was made.

    Args:
        path: the datalist, or a list of them.
        section: name or names of the sections to read, which each datalist must have.
        vocabulary: gives classes their ids and modalities their canonical names, and says what can occur where.
        dataset_dir: the folder that relative paths start from; default: the datalist's own. In a list of datalists
            relative paths start from each one's own folder, whatever is given here.

    Returns:
        One dict a case, by datalist and in it by section in the order asked for: `case` (str), `image` (absolute path
        or list of them), `label` (absolute path, list, or `{class id: path or list}`; no such key without a label),
        `label_map` (`{file value: class id or None}`, several values may be one class; empty unless the label is a
        label-map file), `modality` (canonical name), `annotated` (ascending class ids, empty without a label),
        `patient` (str), `set` (the datalist's `name`, or that of its folder), `regions` (names in the vocabulary's
        writing) and, where given, `counts` (`{"slices": int, "voxels": {class id: int}}`).

    Raises:
        InputError: the file or an entry is not as described, a file is missing, a case name is used twice, a patient
            is in two sections of a datalist, or an annotated class cannot occur in the case's modality or regions; the
            text names the file and the entry.
    """
    paths = _paths(path)
    one = isinstance(path, str | os.PathLike)
    wanted = [section] if isinstance(section, str) else list(dict.fromkeys(section))
    places: dict[str, Path] = {}
    cases: list[dict[str, Any]] = []
    for file in paths:
        entries = _open(file, vocabulary, Path(dataset_dir) if one and dataset_dir is not None else file.parent, wanted)
        _require_new([entry.case for members in entries.values() for entry in members], file, places)
        cases += [entry.read() for name in wanted for entry in entries[name]]
    return cases


def folder_names(path: Place | Sequence[Place]) -> str:
    """Name a datalist, or several, by the folders they lie in, without the rest of their paths: "ct, endoscopy"."""
    return ", ".join(file.absolute().parent.name for file in _paths(path))


def source_names(cases: Iterable[Mapping[str, Any]], path: Place | Sequence[Place]) -> str:
    """Name where cases come from: the folders of their images where there is no datalist, else `folder_names`.

    Args:
        cases: of `read_datalist` or of `complete_cases`.
        path: the datalist, or a list of them; not read.
    """
    folders = {case["folder"] for case in cases if "folder" in case}
    return ", ".join(sorted(folders)) or folder_names(path)


class CompleteCased(Transform):
    """Say of a bare pair of an image and a label map what a datalist would say.

    MONAI Label trains on such pairs. A case of `read_datalist` passes as it is.

    Args:
        class_ids: the classes that the label map annotates; its values are these ids.
        modality: canonical name.
    """

    def __init__(self, *, class_ids: Sequence[int], modality: str) -> None:
        self.class_ids = sorted(int(class_id) for class_id in class_ids)
        self.modality = modality

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the keys of `read_datalist`, and `folder`, the name of the image's folder.

        Raises:
            InputError: the image is missing or of an unknown kind.
        """
        if "annotated" in data:
            return dict(data)
        name = find_inputs(data["image"])[0].name
        folder = Path(data["image"]).absolute().parent.name
        return {
            "case": name,
            **data,
            "label_map": {class_id: class_id for class_id in self.class_ids},
            "modality": self.modality,
            "annotated": list(self.class_ids),
            "patient": name,
            "set": folder,
            "folder": folder,
        }


def complete_cases(
    cases: Iterable[Mapping[Hashable, Any]], *, class_ids: Sequence[int], modality: str
) -> list[dict[Hashable, Any]]:
    """Give cases with all that `CompleteCased` adds to those that came without a datalist."""
    complete = CompleteCased(class_ids=class_ids, modality=modality)
    return [complete(case) for case in cases]


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


def trained_classes(
    cases: Iterable[Mapping[str, Any]], vocabulary: Vocabulary, *, learned: bool = True
) -> dict[str, list[str]]:
    """Collect which classes are annotated in which modality: what a model trained on these cases can be asked for.

    Args:
        cases: cases of `read_datalist`.
        vocabulary: the one that they were read with.
        learned: False for a training in which no class is learned by its name, only boxes.

    Returns:
        Canonical modality name -> names of the classes annotated in any of its cases, in id order. Modalities are in
        the vocabulary's order; those without an annotated case are left out. Empty if no class is learned.
    """
    if not learned:
        return {}
    ids: dict[str, set[int]] = {name: set() for name in vocabulary.modality_names}
    for case in cases:
        ids[case["modality"]].update(case["annotated"])
    found = {modality: class_ids for modality, class_ids in ids.items() if class_ids}
    return {
        modality: [entry.name for entry in vocabulary.entries if entry.id in class_ids]
        for modality, class_ids in found.items()
    }


def _paths(path: Place | Sequence[Place]) -> list[Path]:
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not paths:
        raise InputError("The list of datalists is empty; name at least one.")
    return [Path(file) for file in paths]


def _open(path: Path, vocabulary: Vocabulary, dataset_dir: Path, wanted: Sequence[str]) -> dict[str, list["_Entry"]]:
    """Read one datalist: the entries of all its sections, not yet checked one by one."""
    content = _load_json(path)
    sections = {name: entries for name, entries in content.items() if isinstance(entries, list)}
    source = _Source(
        path=path,
        dataset_dir=dataset_dir,
        vocabulary=vocabulary,
        name=_read_name(content, path),
        label_map=_read_label_map(content, vocabulary, path),
    )
    for name in wanted:
        _require_section(name, sections, path)
    entries = {name: _open_entries(name, rows, source) for name, rows in sections.items()}
    _require_apart(entries, path)
    return entries


def _require_new(cases: Iterable[str], path: Path, places: dict[str, Path]) -> None:
    """Check that no other datalist has a case of the same name, and remember where each is."""
    for case in cases:
        if case in places:
            raise InputError(f"{path}: case {case!r} is in {places[case]} too; give each case a name of its own.")
        places[case] = path


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


def _read_name(content: Mapping[str, Any], path: Path) -> str:
    name = content.get("name", path.absolute().parent.name)
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{path}: 'name' must be a text (not an empty one), but {name!r} came.")
    return name


def _read_label_map(content: Mapping[str, Any], vocabulary: Vocabulary, path: Path) -> dict[int, int | None]:
    rows = content.get("label_map", {})
    if not isinstance(rows, dict):
        raise InputError(f"{path}: 'label_map' must map file values to class names, but a {_kind(rows)} came.")
    label_map: dict[int, int | None] = {}
    for value, name in rows.items():
        if not value.isdecimal() or int(value) == 0 or int(value) in label_map:
            raise InputError(
                f"{path}: 'label_map' has the file value {value!r}; expected different whole numbers of 1 or more "
                "(0 is the background)."
            )
        place = f"{path}: 'label_map' value {value}"
        label_map[int(value)] = None if name is None else _class_id(name, vocabulary, place)
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


def _is_count(value: Any, *, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
        case["set"] = self.source.name
        case["regions"] = self._regions(case["annotated"])
        self._require_possible(case)
        if "counts" in self.fields:
            case["counts"] = self._counts(case)
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
        if all(class_id is None for class_id in self.source.label_map.values()):
            raise self.error(
                "a label-map file needs 'label_map' (file value -> class name) at the top of the datalist, "
                "with at least one class"
            )
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
        return sorted(label if isinstance(label, dict) else set(case["label_map"].values()) - {None})

    def _regions(self, annotated: Sequence[int]) -> list[str]:
        vocabulary = self.source.vocabulary
        if "regions" not in self.fields:
            return list(dict.fromkeys(vocabulary.entry(class_id).region for class_id in annotated))
        names = self.fields["regions"]
        if not isinstance(names, list) or not names:
            raise self.error(f"'regions' must be a list of regions, but {names!r} came")
        try:
            return list(dict.fromkeys(vocabulary.region(name).name for name in names))
        except PromptError as error:
            raise InputError(f"{self.place}: {error}") from error

    def _require_possible(self, case: Mapping[str, Any]) -> None:
        """Check that modality and regions can show what is annotated; else one of them is wrong."""
        for class_id in case["annotated"]:
            entry = self.source.vocabulary.entry(class_id)
            if case["modality"] not in entry.modalities:
                raise self.error(
                    f"the class {entry.name!r} cannot occur in {case['modality']}, only in "
                    f"{', '.join(entry.modalities)}; correct 'modality', or name in 'classes' what is annotated"
                )
            if not self.source.vocabulary.can_occur(class_id, modality=case["modality"], regions=case["regions"]):
                raise self.error(
                    f"the class {entry.name!r} belongs to the region {entry.region!r}, which is neither among "
                    f"'regions' ({', '.join(case['regions'])}) nor next to one of them; add it there"
                )

    def _counts(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Read what was counted when the datalist was made; every annotated class must have been."""
        counts = self.fields["counts"]
        if not isinstance(counts, dict) or set(counts) != _COUNT_KEYS or not isinstance(counts["voxels"], dict):
            raise self.error(f"'counts' must be {{'slices': number, 'voxels': {{class: number}}}}, but {counts!r} came")
        voxels = {self._class_id(name): number for name, number in counts["voxels"].items()}
        known = self._labelled_ids(case)
        if not set(case["annotated"]) <= set(voxels) <= set(known) or len(voxels) < len(counts["voxels"]):
            shown = ", ".join(self.source.vocabulary.entry(class_id).name for class_id in known) or "nothing"
            raise self.error(
                f"'counts' must give the voxels of each annotated class once, and of no class that the label does not "
                f"show ({shown}), but has {', '.join(counts['voxels']) or 'none'}"
            )
        if not _is_count(counts["slices"], least=1) or not all(_is_count(number) for number in voxels.values()):
            raise self.error(f"'counts' must be whole numbers, of slices at least 1, but {counts!r} came")
        return {"slices": counts["slices"], "voxels": dict(sorted(voxels.items()))}

    def _class_id(self, name: Any) -> int:
        return _class_id(name, self.source.vocabulary, self.place)
