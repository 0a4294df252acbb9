"""Which cases a folder holds, by its layout, and what is left out and why. No image is opened here."""

import csv
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from scripts.data.converters.layouts import SHARED, Layout, Meaning, SplitTable
from scripts.data.converters.patterns import FileTree, Match, PathPattern, grouped, natural_order
from scripts.data.guard import Finding
from scripts.errors import ConfigError, InputError

_GAPS_NAMED = 3
# Fields of a match that say nothing about which case it is of.
_SUFFIX_FIELDS = {"nifti", "picture", "suffix"}
Files = str | tuple[str, ...]


@dataclass(frozen=True)
class FoundCase:
    """One case as it lies in the source.

    Attributes:
        name: of the case, unique in its set.
        patient: whose it is; the case's own name when nobody knows.
        section: of the official split; None where there is none.
        image: absolute path of a file or DICOM folder, or the files of a stack in order.
        label: label map(s) parallel to `image`, or class name -> masks. More masks than images are to be united.
        modality: canonical name.
        annotated: names of the annotated classes; None for all that the label can show.
        findings: what is to be said about it before it is read; with an error among them it is not read.
    """

    name: str
    patient: str
    section: str | None
    image: Files
    label: Files | dict[str, Files]
    modality: str
    annotated: tuple[str, ...] | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Attributes:
        name: of the data set.
        cases: in natural order of their files.
        skipped: (relative path, reason) of what is left out.
        label_map: value in label maps -> meaning.
        regions: of the body, in view of every image; None for those of the annotated classes.
        channel: which of the fourth axis' channels is the image; None for images without that axis.
        source: what the datalist says about where it came from.
    """

    name: str
    cases: tuple[FoundCase, ...]
    skipped: tuple[tuple[str, str], ...]
    label_map: Mapping[int, Meaning]
    regions: tuple[str, ...] | None = None
    channel: int | None = None
    source: Mapping[str, str] = field(default_factory=dict)


def find_cases(layout: Layout, tree: FileTree, *, chosen: Mapping[str, str] | None = None) -> Found:
    """Find the cases of a layout.

    Args:
        layout: where to look.
        tree: the source.
        chosen: option -> value, for the layout's choices.

    Returns:
        Cases and what was left out. Each image file that fits the layout is in one of the two, and so is each label.

    Raises:
        InputError: no image fits, the images lie in several places, a case or a label is there twice, a class has no
            mask at all, a stack has labels for some of its slices only, or the table of the split does not fit.
        ConfigError: an option or value that the layout does not have.
    """
    fields = {**layout.fields, **_chosen_fields(layout, chosen or {})}
    search = _Search(layout, tree, fields)
    images = search.images()
    cases = [case for group in search.by_case(images) if (case := search.case(group)) is not None]
    search.require_unique(cases)
    search.require_masks()
    # Where labels lie among the images under a name like theirs, they fit the images' pattern as well.
    skipped = [(path, reason) for path, reason in search.skipped if path not in search.used]
    return Found(
        name=layout.name.removeprefix(f"{SHARED}/"),
        cases=tuple(cases),
        skipped=(*skipped, *search.unused_labels()),
        label_map=layout.label_map,
        regions=layout.regions,
        source={"layout": layout.name, **(chosen or {})},
    )


def _chosen_fields(layout: Layout, chosen: Mapping[str, str]) -> dict[str, str]:
    unknown = set(chosen) - set(layout.choices)
    if unknown:
        raise ConfigError(f"{layout.name} has no option {', '.join(sorted(unknown))}; it has {list(layout.choices)}")
    fields = {}
    for option, values in layout.choices.items():
        value = chosen.get(option, next(iter(values)))
        if value not in values:
            raise ConfigError(f"--{option} of {layout.name} is one of {', '.join(values)}, not {value!r}")
        fields[option] = values[value]
    return fields


class _Search:
    """One pass over one source."""

    def __init__(self, layout: Layout, tree: FileTree, fields: Mapping[str, str]) -> None:
        self.layout = layout
        self.tree = tree
        self.fields = fields
        self.skipped: list[tuple[str, str]] = []
        self.used: set[str] = set()
        self.sections = {value.casefold(): section for value, section in layout.sections.items()}
        naming = PathPattern(layout.case).names - {"prefix"}
        self.telling = {"slice"} | {"split" if name == "section" else name for name in naming}
        self.table = None if layout.split_table is None else _TableOfSplit(layout.split_table, tree)
        self.labels = {"": self._lookups(layout.label)} if layout.label else {}
        self.labels |= {name: self._lookups(patterns) for name, patterns in layout.mask.items()}

    def _lookups(self, patterns: Iterable[str]) -> list["_Lookup"]:
        return [_Lookup(PathPattern(text, fields=self.fields), self.tree) for text in patterns]

    def images(self) -> list[Match]:
        """Find the images, all below one folder, without those that are to be left out."""
        patterns = [PathPattern(text, fields=self.fields) for text in self.layout.image]
        matches = {match.path: match for pattern in reversed(patterns) for match in self.tree.matches(pattern)}
        in_order = sorted(matches.values(), key=lambda match: natural_order(match.path))
        kept = [match for match in in_order if not self._excluded(match)]
        if not kept:
            raise InputError(
                f"{self.tree.root} holds no image of {self.layout.name}: expected "
                f"{' or '.join(self.layout.image)} there or in a folder below; see docs/data.md for its folder tree"
            )
        places = sorted({match.fields["prefix"] for match in kept})
        if len(places) > 1:
            raise InputError(
                f"{self.tree.root} holds images of {self.layout.name} in {len(places)} places, such as "
                f"{places[0] or '.'} and {places[1]}; give one of them as --source"
            )
        return kept

    def _excluded(self, match: Match) -> bool:
        for reason, expression in self.layout.exclude.items():
            if re.search(expression, match.path, re.IGNORECASE):
                self.skipped.append((match.path, reason))
                for lookup in (lookup for lookups in self.labels.values() for lookup in lookups):
                    self.used.update(lookup.find(match, self.telling))  # the image's line tells of its label too
                return True
        return False

    def by_case(self, images: Iterable[Match]) -> list[list[Match]]:
        """Put the slices of a stack together, in the order of their numbers."""
        images = list(images)
        names = {name for match in images for name in match.fields} - {"slice"} - _SUFFIX_FIELDS
        complete = [replace(match, fields={**dict.fromkeys(names, ""), **match.fields}) for match in images]
        groups = grouped(complete, names).values()
        return [sorted(group, key=lambda match: int(match.fields.get("slice", 0))) for group in groups]

    def case(self, images: list[Match]) -> FoundCase | None:
        """Make a case of its images; None, and a line of what is skipped, where something is missing."""
        self._require_one_image(images)
        fields = images[0].fields
        section, patient = self._section(images)
        if section == "":
            self.skipped += [(match.path, "the official split does not name it") for match in images]
            return None
        label = self._label(images)
        if not label:
            self.skipped += [(match.path, "no label") for match in images]
            return None
        named = {**fields, "section": section or ""}
        name = self._filled(self.layout.case, named).replace("/", "_")
        files = tuple(self.tree.absolute(match.path) for match in images)
        return FoundCase(
            name=name,
            patient=patient or self._patient(named, section) or name,
            section=section,
            image=files if "slice" in fields else files[0],
            label=label,
            modality=self.layout.modality,
            findings=_gap_findings(images) if "slice" in fields else (),
        )

    def _patient(self, fields: Mapping[str, str], section: str | None) -> str:
        """Tell whose a case is, from its path; empty where the path does not tell."""
        for group in self.layout.same_patient:
            if fields.get("case", "").startswith(group):
                return group[0]
        ends = self.layout.sequences.get(section or "")
        if ends and fields.get("case", "").isdecimal():
            return f"sequence {bisect_left(ends, int(fields['case'])) + 1}"
        return self._filled(self.layout.patient, fields)

    def _filled(self, template: str, fields: Mapping[str, str]) -> str:
        try:
            return template.format_map(fields)
        except KeyError as error:
            raise ConfigError(f"layout {self.layout.name!r}: {template!r} needs {error}, which no path has") from error

    def _require_one_image(self, images: list[Match]) -> None:
        """Refuse two files of one slice, such as a .png beside a .jpg; the images are in the order of their slices."""
        for one, other in pairwise(images):
            if int(one.fields.get("slice", 0)) == int(other.fields.get("slice", 0)):
                raise InputError(f"{one.path} and {other.path} are the same image of a case; remove one of them")

    def _section(self, images: list[Match]) -> tuple[str | None, str]:
        """Give section and patient; the section is empty for a case that the split does not name."""
        if self.table is not None:
            return self.table.look_up([match.path for match in images])
        if not self.layout.sections:
            return None, ""
        return self.sections.get(images[0].fields.get("split", "").casefold(), ""), ""

    def _label(self, images: list[Match]) -> Files | dict[str, Files] | None:
        found = {name: files for name, lookups in self.labels.items() if (files := self._files(lookups, images))}
        if "" in self.labels:
            return found.get("")
        return found or None

    def _files(self, lookups: Iterable["_Lookup"], images: list[Match]) -> Files | None:
        """Find the labels of one kind for all slices of a case: one each, or several that are to be united."""
        of_slices = [
            next((files for lookup in lookups if (files := lookup.find(image, self.telling))), []) for image in images
        ]
        if not any(of_slices):
            return None
        missing = [image.path for image, files in zip(images, of_slices, strict=True) if not files]
        if missing:
            raise InputError(f"{missing[0]} has no label, though other slices of its stack have; complete the stack")
        paths = [path for files in of_slices for path in files]
        self.used.update(paths)
        absolute = tuple(self.tree.absolute(path) for path in paths)
        return absolute[0] if len(absolute) == 1 and "slice" not in images[0].fields else absolute

    def unused_labels(self) -> list[tuple[str, str]]:
        """List labels to which no case belongs."""
        all_labels = {path for lookups in self.labels.values() for lookup in lookups for path in lookup.paths}
        unused = all_labels - self.used - {path for path, _ in self.skipped}
        return [(path, "label without a case") for path in self.tree.files if path in unused]

    def require_masks(self) -> None:
        """Refuse a class without a single mask: its folder has another name, or is not there."""
        for name, lookups in self.labels.items():
            if not any(lookup.paths for lookup in lookups):
                raise InputError(
                    f"{self.tree.root} holds no mask of the class {name!r}: expected "
                    f"{' or '.join(lookup.pattern.text for lookup in lookups)}; complete the folder, or leave the "
                    "class out"
                )

    def require_unique(self, cases: Iterable[FoundCase]) -> None:
        """Refuse two cases of one name, and a folder in which no case has a label."""
        names: set[str] = set()
        for case in cases:
            if case.name.casefold() in names:
                raise InputError(f"{self.tree.root} holds the case {case.name!r} twice; rename or remove one of them")
            names.add(case.name.casefold())
        if not names:
            path, reason = self.skipped[0]
            raise InputError(
                f"{self.tree.root}: all {len(self.skipped)} images of {self.layout.name} are left out, the first, "
                f"{path}, because of: {reason}"
            )
        if self.table is not None:
            self.table.require_used()


def _gap_findings(images: Sequence[Match]) -> tuple[Finding, ...]:
    """Warn where numbers are missing among those of a stack's slices; the least distance is taken as the usual one.

    What is missing at an end cannot be seen.
    """
    numbers = [int(match.fields["slice"]) for match in images]
    steps = [upper - lower for lower, upper in pairwise(numbers)]
    gaps = [
        f"{lower} and {upper}"
        for (lower, upper), step in zip(pairwise(numbers), steps, strict=True)
        if step > min(steps)
    ]
    if not gaps:
        return ()
    text = (
        f"expected the slices {numbers[0]} to {numbers[-1]} in steps of {min(steps)}, got none between "
        f"{', between '.join(gaps[:_GAPS_NAMED])}{', ...' if len(gaps) > _GAPS_NAMED else ''}; look whether files are "
        "missing"
    )
    return (Finding("warn", "gap", text),)


class _Lookup:
    """The label files of one pattern, found by the fields that they share with an image."""

    def __init__(self, pattern: PathPattern, tree: FileTree) -> None:
        self.pattern = pattern
        self.matches = tree.matches(pattern)
        self.paths = [match.path for match in self.matches]
        self.groups: dict[frozenset[str], dict[tuple[str, ...], list[Match]]] = {}

    def find(self, image: Match, telling: Collection[str]) -> list[str]:
        """Give the files that belong to an image.

        Args:
            image: the match of its file.
            telling: fields that tell cases apart; a pattern without one that the image has is of other cases.

        Raises:
            InputError: more than one, where the pattern means one.
        """
        if any(image.fields.get(name) and name not in self.pattern.names for name in telling):
            return []
        shared = frozenset(self.pattern.names & set(image.fields)) - _SUFFIX_FIELDS
        if shared not in self.groups:
            self.groups[shared] = grouped(self.matches, shared)
        key = tuple(image.fields[name].casefold() for name in sorted(shared))
        files = [match.path for match in self.groups[shared].get(key, [])]
        if len(files) > 1 and not self.pattern.several:
            raise InputError(f"{image.path} has two labels, {files[0]} and {files[1]}; remove one of them")
        return files


class _TableOfSplit:
    """The rows of an owner's split, and which of them a case has used."""

    def __init__(self, table: SplitTable, tree: FileTree) -> None:
        self.table = table
        matches = [match.path for match in tree.matches(PathPattern(table.file))]
        if len(matches) != 1:
            raise InputError(f"{tree.root}: expected one table of the split, {table.file}, got {len(matches)}")
        self.path = tree.absolute(matches[0])
        rows = self._read()
        self.rows = {row[table.case]: row for row in rows}
        if len(self.rows) < len(rows):
            twice = next(name for name, count in Counter(row[table.case] for row in rows).items() if count > 1)
            raise InputError(f"{self.path} names {twice} twice; each case has one row")
        self.used: set[str] = set()

    def _read(self) -> list[dict[str, str]]:
        patient = "" if self.table.patient_may_miss else self.table.patient
        wanted = {self.table.case, self.table.section, patient} - {""}
        try:
            with open(self.path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
                rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self.path}: expected a CSV file in UTF-8, got another thing ({error})") from error
        if not rows or any(row.get(column) is None for row in rows for column in wanted):
            raise InputError(f"{self.path}: expected rows with the columns {', '.join(sorted(wanted))}")
        return rows

    def look_up(self, paths: list[str]) -> tuple[str, str]:
        """Give section (empty where none of the files has a row) and patient of the files of a case."""
        stems = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
        stems = [stem if stem in self.rows else stem.rsplit(".", 1)[0].removesuffix(".nii") for stem in stems]
        missing = [stem for stem in stems if stem not in self.rows]
        if len(missing) == len(stems):
            return "", ""
        if missing:
            raise InputError(f"{self.path} has no row of {missing[0]}, though it has of other slices of its stack")
        self.used.update(stems)
        sections = {self.rows[stem][self.table.section] for stem in stems}
        if len(sections) > 1 or not sections <= set(self.table.sections):
            raise InputError(
                f"{self.path}: the sections of {stems[0]} are {sorted(sections)}; expected one of "
                f"{', '.join(self.table.sections)} for all slices of a case"
            )
        patient = self.rows[stems[0]].get(self.table.patient) if self.table.patient else None
        return self.table.sections[sections.pop()], patient or ""

    def require_used(self) -> None:
        """Refuse a table that names cases which are not there: something was lost on the way."""
        missing = [stem for stem in self.rows if stem not in self.used]
        if missing:
            raise InputError(
                f"{self.path} names {len(missing)} of {len(self.rows)} cases that are not there, such as "
                f"{missing[0]}; complete the folder, or take their rows out of the table"
            )
