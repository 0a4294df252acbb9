"""`automedsam prepare`: find the cases, write what must be written anew, read every case, split, count, and say so."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scripts.data.converters.conversions import CONVERTED, Converter
from scripts.data.converters.decathlon import find_decathlon_cases
from scripts.data.converters.finding import Files, Found, FoundCase, find_cases
from scripts.data.converters.generic import USUAL_IMAGES, USUAL_LABELS, generic_layout
from scripts.data.converters.layouts import SHARED, Layout, names_of_sets, read_layouts
from scripts.data.converters.npz import NpzRule, find_npz_cases, read_npz_rules
from scripts.data.converters.patterns import FileTree
from scripts.data.converters.splits import Member, checked_fractions, describe_split, split_cases
from scripts.data.converters.survey import CaseSurvey, Surveyor, mark_copies
from scripts.data.datalist import read_datalist, write_datalist
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError
from scripts.files import atomic_path

DATALIST = "datalist.json"
RECORD = "preparation.json"
USUAL_FRACTIONS = (0.7, 0.1, 0.2)


@dataclass(frozen=True)
class Request:
    """What a person asks for.

    Attributes:
        name: of the layout, or one of `PROGRAMS`.
        source: the folder of the data set.
        output: the folder of the datalist.
        fractions: of the patients, for training, validation and test, where there is no official split.
        seed: of the split.
        strict: whether warnings are errors.
        leave_out_errors: whether cases with errors are left out; otherwise they stop the preparation.
        sequence: of MR data sets with several, such as flair.
        label_map: value -> class name, None for a value of no class; instead of the layout's.
        images: pattern, for `generic`.
        labels: pattern, for `generic`.
        classes: for `generic` with masks.
        modality: for `generic` and `medsam_npz`.
        split_table: for `generic`.
        workers: processes that read at the same time.
        progress: whether to show a bar.
    """

    name: str
    source: Path
    output: Path
    fractions: Sequence[float] = USUAL_FRACTIONS
    seed: int = 0
    strict: bool = False
    leave_out_errors: bool = False
    sequence: str | None = None
    label_map: Mapping[int, str | None] | None = None
    images: str = USUAL_IMAGES
    labels: str = USUAL_LABELS
    classes: Sequence[str] | None = None
    modality: str | None = None
    split_table: str | None = None
    workers: int = 1
    progress: bool = True


@dataclass(frozen=True)
class Tables:
    """The tables that preparation relies on: class names, layouts, and what npz files hold."""

    vocabulary: Vocabulary
    layouts: Mapping[str, Layout]
    npz_rules: Sequence[NpzRule]


def prepare(request: Request, tables: Tables) -> dict[str, Any]:
    """Prepare one data set.

    Writes `datalist.json`, `preparation.json` (the record of every case: counts, geometry, intensities, content,
    findings) and, where files must be made anew, `converted/`. The same request gives the same bytes.

    Args:
        request: what is asked for.
        tables: class names and layouts.

    Returns:
        The record, as in `preparation.json`.

    Raises:
        InputError: the source is not as its layout says, its split has a patient in two sections, or a case has an
            error and is not to be left out.
        ConfigError: options that cannot be.
        OutputError: a file cannot be written.
    """
    _check_options(request)
    if not request.source.is_dir():
        raise InputError(f"{request.source} is no folder; give the folder of the data set as --source")
    found = _find(request, tables)
    converter = Converter(found, request.output)
    surveyor = Surveyor(tables.vocabulary, label_map=converter.label_map, convert=converter)
    _require_possible(found.cases, surveyor, tables.vocabulary)
    _require_apart(found.cases)
    pairs = list(_surveyed(surveyor, found.cases, request))
    cases = [case for case, _ in pairs]
    surveys = mark_copies([survey for _, survey in pairs], sections={case.name: case.section for case in cases})
    if request.strict:
        surveys = [_stricter(survey) for survey in surveys]
    failed = {survey.case: survey.error for survey in surveys if survey.error is not None}
    record = _Record(found, cases, surveys, converter.label_map, request)
    if failed and not request.leave_out_errors:
        raise InputError(_describe_errors(failed, len(cases)))
    kept = [case for case in cases if case.name not in failed]
    if not kept:
        raise InputError(f"all {len(cases)} cases have errors; the first, {cases[0].name}: {failed[cases[0].name]}")
    return record.write(kept, tables.vocabulary)


def _check_options(request: Request) -> None:
    """Refuse numbers and switches that cannot be, before anything is read."""
    checked_fractions(request.fractions)
    for option, value, least in (("seed", request.seed, 0), ("workers", request.workers, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"--{option} is a whole number of {least} or more, not {value!r}")
    switches = {
        "strict": request.strict,
        "leave-out-errors": request.leave_out_errors,
        "progress-bar": request.progress,
    }
    for option, value in switches.items():
        if not isinstance(value, bool):  # the text "false" would be taken as true
            raise ConfigError(f"--{option} is True or False, not {value!r}")


def _require_possible(cases: Iterable[FoundCase], surveyor: Surveyor, vocabulary: Vocabulary) -> None:
    """Refuse classes that cannot occur in the images, before anything is read."""
    shown = {(case.modality, class_id) for case in cases for class_id in surveyor.annotated(case)}
    for modality, class_id in sorted(shown):
        entry = vocabulary.entry(class_id)
        if modality not in entry.modalities:
            raise InputError(
                f"the class {entry.name!r} cannot occur in {modality}, only in {', '.join(entry.modalities)}; correct "
                "the modality, or what the labels are said to show"
            )


def _require_apart(cases: Iterable[FoundCase]) -> None:
    """Refuse an official split that has one patient in two of its sections."""
    first: dict[str, FoundCase] = {}
    for case in cases:
        other = first.setdefault(case.patient, case)
        if other.section != case.section:
            raise InputError(
                f"the cases {other.name} of {other.section} and {case.name} of {case.section} are of the same patient; "
                "keep each patient in one section of the split"
            )


def _describe_errors(failed: Mapping[str, str], total: int) -> str:
    shown = "; ".join(f"{case}: {text}" for case, text in list(failed.items())[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    return (
        f"{len(failed)} of {total} cases have errors. {shown}{more}. Correct them, or leave these cases out with "
        "--leave-out-errors"
    )


def _stricter(survey: CaseSurvey) -> CaseSurvey:
    return replace(survey, findings=tuple(replace(finding, severity="error") for finding in survey.findings))


# ------------------------------------------------------------------------------------------------------------ finding


def _find(request: Request, tables: Tables) -> Found:
    """Find the cases by the program or the layout of the given name."""
    _refuse_unused(request)
    if request.name == "medsam_npz":
        return find_npz_cases(
            request.source,
            output=request.output,
            rules=[*_own_npz_rule(request, tables.vocabulary), *tables.npz_rules],
            vocabulary=tables.vocabulary,
            progress=lambda files: tqdm(files, desc="converting", disable=not request.progress),
        )
    if request.name == "msd":
        return find_decathlon_cases(
            request.source, vocabulary=tables.vocabulary, sequence=request.sequence, label_map=request.label_map
        )
    layout = _generic(request, tables) if request.name == "generic" else _layout(request, tables.layouts)
    chosen = {} if request.sequence is None else {"sequence": request.sequence}
    return find_cases(layout, FileTree(request.source, without=_own_folder(request)), chosen=chosen)


def _own_folder(request: Request) -> Path:
    """Give the folder whose files are results, and never input of the next run."""
    same = os.path.abspath(request.output) == os.path.abspath(request.source)
    return request.output / CONVERTED if same else request.output


def _refuse_unused(request: Request) -> None:
    """Refuse options that the data set does not read: what has no effect would mislead."""
    if request.name == "medsam_npz" and request.sequence is not None:
        raise ConfigError("--sequence is for MR data sets with several, not for medsam_npz")
    fresh = Request(name="", source=Path(), output=Path())
    readers = {
        "images": ("generic",), "labels": ("generic",), "classes": ("generic",), "split_table": ("generic",),
        "modality": ("generic", "medsam_npz"), "label_map": ("generic", "medsam_npz", "msd"),
    }  # fmt: skip
    for option, names in readers.items():
        if getattr(request, option) != getattr(fresh, option) and request.name not in names:
            raise ConfigError(f"--{option.replace('_', '-')} is for {', '.join(names)}, not for {request.name}")


def _generic(request: Request, tables: Tables) -> Layout:
    return generic_layout(
        vocabulary=tables.vocabulary,
        modality=request.modality,
        images=request.images,
        labels=request.labels,
        classes=request.classes,
        label_map=request.label_map,
        split_table=request.split_table,
        name=request.source.resolve().name,
    )


def _layout(request: Request, layouts: Mapping[str, Layout]) -> Layout:
    name = f"{SHARED}/{request.source.resolve().name}" if request.name == SHARED else request.name
    if name not in layouts:
        kind = f"{SHARED}/" if request.name == SHARED else ""
        known = [other.removeprefix(kind) for other in layouts if kind and other.startswith(kind)]
        known = known or names_of_sets(layouts)
        raise ConfigError(f"the data set {name.removeprefix(kind)!r} is unknown; known are {', '.join(known)}")
    return layouts[name]


def read_tables(configs: Path) -> Tables:
    """Read the tables of a folder of configs.

    Raises:
        ConfigError: a table that is missing or breaks its rules.
    """
    vocabulary = Vocabulary.read(configs / "classes.yaml")
    return Tables(
        vocabulary=vocabulary,
        layouts=read_layouts(configs / "layouts.yaml", vocabulary),
        npz_rules=read_npz_rules(configs / "npz_rules.yaml", vocabulary),
    )


def _own_npz_rule(request: Request, vocabulary: Vocabulary) -> list[NpzRule]:
    if request.label_map is None and request.modality is None:
        return []
    if request.label_map is None or request.modality is None:
        raise ConfigError("for npz files of your own give both --label-map and --modality")
    modality = vocabulary.modality(request.modality).name
    return [NpzRule(pattern="", modality=modality, classes=request.label_map, complete=True)]


# ------------------------------------------------------------------------------------------------------------ reading


def _surveyed(
    surveyor: Surveyor, cases: Sequence[FoundCase], request: Request
) -> Iterator[tuple[FoundCase, CaseSurvey]]:
    """Read all cases, in their order, in one process or several."""
    bar = tqdm(total=len(cases), desc="reading", unit="case", disable=not request.progress)
    with bar:
        for result in _in_order(surveyor, cases, request.workers):
            bar.update()
            yield result


def _in_order(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterable[Any]:
    if workers == 1:
        yield from map(function, items)
        return
    # One thread each, or the processes would take the cores from one another.
    settings: Any = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), **settings) as pool:
        yield from pool.map(function, items)


# ------------------------------------------------------------------------------------------------------------ writing


class _Record:
    """What was found, read and decided, on its way to the datalist and the record of the preparation."""

    def __init__(
        self,
        found: Found,
        cases: Sequence[FoundCase],
        surveys: Sequence[CaseSurvey],
        label_map: Mapping[int, str | None],
        request: Request,
    ) -> None:
        self.found = found
        self.cases = cases
        self.surveys = {survey.case: survey for survey in surveys}
        self.label_map = label_map
        self.request = request

    def write(self, kept: Sequence[FoundCase], vocabulary: Vocabulary) -> dict[str, Any]:
        """Split the cases, write both files, and prove that the datalist holds every case."""
        members = self._members(kept)
        sections = split_cases(members, fractions=self.request.fractions, seed=self.request.seed)
        split = describe_split(members, fractions=self.request.fractions, seed=self.request.seed)
        datalist = self._datalist(kept, sections, split)
        with atomic_path(self.request.output / DATALIST) as temporary:
            write_datalist(datalist, temporary)
            self._require_complete(temporary, kept, vocabulary)
        record = self._as_dict(sections, split)
        with atomic_path(self.request.output / RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return record

    def _members(self, kept: Sequence[FoundCase]) -> list[Member]:
        """Describe the cases for the split; patients who share an image are one, where they are drawn."""
        drawn = [case for case in kept if case.section in (None, "training")]
        joined = joined_patients([(case.patient, self.surveys[case.name].content) for case in drawn])
        return [
            Member(
                case=case.name,
                patient=joined[case.patient] if case.section in (None, "training") else case.patient,
                section=case.section,
            )
            for case in kept
        ]

    def _datalist(
        self, kept: Sequence[FoundCase], sections: Mapping[str, str], split: Mapping[str, Any]
    ) -> dict[str, Any]:
        datalist: dict[str, Any] = {"name": self.found.name, "source": {**self.found.source, "split": dict(split)}}
        if self.label_map:
            datalist["label_map"] = {str(value): name for value, name in self.label_map.items()}
        for section in _in_usual_order(sections.values()):
            datalist[section] = [self._entry(case) for case in kept if sections[case.name] == section]
        return datalist

    def _entry(self, case: FoundCase) -> dict[str, Any]:
        survey = self.surveys[case.name]
        label: Any = self._relative(case.label) if not isinstance(case.label, dict) else None
        if isinstance(case.label, dict):
            label = {name: self._relative(files) for name, files in case.label.items()}
        entry = {
            "case": case.name,
            "patient": case.patient,
            "image": self._relative(case.image),
            "label": label,
            "modality": case.modality,
            "counts": {"slices": survey.slices, "voxels": dict(survey.voxels)},
        }
        if case.annotated is not None:
            entry["classes"] = list(case.annotated)
        if self.found.regions is not None:
            entry["regions"] = list(self.found.regions)
        return entry

    def _relative(self, files: Files) -> str | list[str]:
        """Write paths from the datalist's folder, so that both can be moved together."""
        if isinstance(files, tuple):
            return [str(self._relative(file)) for file in files]
        return Path(os.path.relpath(files, os.path.abspath(self.request.output))).as_posix()

    def _require_complete(self, path: Path, kept: Sequence[FoundCase], vocabulary: Vocabulary) -> None:
        """Read the datalist back: every case that was kept must come out of it."""
        content = json.loads(path.read_text(encoding="utf-8"))
        sections = [name for name, entries in content.items() if isinstance(entries, list)]
        read = {case["case"] for case in read_datalist(path, section=sections, vocabulary=vocabulary)}
        lost = {case.name for case in kept} - read
        if lost:
            raise InputError(
                f"the datalist lost {len(lost)} cases, such as {min(lost)}; this is a defect, please report it"
            )

    def _as_dict(self, sections: Mapping[str, str], split: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "name": self.found.name,
            "source": dict(self.found.source),
            "split": dict(split),
            "cases": [self._case(case, sections.get(case.name)) for case in self.cases],
            "skipped": [{"path": path, "reason": reason} for path, reason in self.found.skipped],
        }

    def _case(self, case: FoundCase, section: str | None) -> dict[str, Any]:
        survey = self.surveys[case.name]
        return {
            "case": case.name,
            "section": section,
            "patient": case.patient,
            "slices": survey.slices,
            "voxels": dict(survey.voxels),
            "class_slices": dict(survey.class_slices),
            "spacing": list(survey.spacing),
            "planar": survey.planar,
            "intensity": list(survey.intensity),
            "content": survey.content,
            "findings": [vars(finding) for finding in survey.findings],
        }


def joined_patients(owners: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Join patients who share an image, directly or through others.

    Args:
        owners: (patient, content) of every case.

    Returns:
        Patient -> the patient of their group whose name comes first, whatever the order of the cases.
    """
    group: dict[str, str] = {}
    by_content: dict[str, str] = {}

    def root(patient: str) -> str:
        while group[patient] != patient:
            patient = group[patient]
        return patient

    for patient, content in owners:
        group.setdefault(patient, patient)
        first, second = sorted((root(patient), root(by_content.setdefault(content, patient))))
        group[second] = first
    return {patient: root(patient) for patient in group}


def _in_usual_order(sections: Iterable[str]) -> list[str]:
    usual = {"training": 0, "validation": 1}
    return sorted(set(sections), key=lambda name: (usual.get(name, 2), name))
