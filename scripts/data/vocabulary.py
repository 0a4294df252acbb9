"""The class vocabulary: the only place where a class name becomes a number, and a modality a canonical name.

It also knows what cannot be: which class never shows in which modality, or in an image of which part of the body.

`configs/classes.yaml` is its table; prompts, label maps, metadata and reports all go through it.
"""

import colorsys
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from scripts.errors import ConfigError, PromptError

_SEPARATORS = re.compile(r"[\s_.\-]+")
_MODALITY_KEYS = {"description", "synonyms", "dicom_codes"}
_REGION_KEYS = {"neighbours"}
_CLASS_KEYS = {"id", "name", "synonyms", "modalities", "region", "partner", "colour", "codes"}
_CODE_KEYS = {"category", "type", "modifier", "anatomy"}
_CODE_LENGTHS = (16, 16, 64)  # of scheme, value and meaning: DICOM's SH, SH and LO
_SHORTEST_PART = 4  # letters from which a part of a name ("kidney") says which classes may be meant
_LARGEST_CLASS_ID = 200  # what comes above stands for objects that have no name
_OBJECTS = 54  # 201 to 254, of the 255 values of a label map in bytes
_HUE_STEP = 0.618  # of the circle, the golden ratio: neighbours in number are far apart in colour
_SURELY_MEANT = 0.85  # share of matching letters between synonyms; at 0.8 "heart" would mean "hepar", the liver


@dataclass(frozen=True)
class Modality:
    """One way of making images.

    Attributes:
        name: the canonical name, as in datalists, e.g. "MR".
        description: one line for people.
        synonyms: other names, e.g. "MRI".
        dicom_codes: values of the DICOM attribute Modality (0008,0060) that mean it.
    """

    name: str
    description: str
    synonyms: tuple[str, ...]
    dicom_codes: tuple[str, ...]


@dataclass(frozen=True)
class Region:
    """One part of the body.

    Attributes:
        name: e.g. "abdomen".
        neighbours: names of the regions that an image of this one may show as well.
    """

    name: str
    neighbours: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """One coded concept of DICOM.

    Attributes:
        scheme: designator of the coding scheme, "SCT" for SNOMED CT; a private one begins with 99.
        value: e.g. "10200004".
        meaning: e.g. "Liver".
    """

    scheme: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Codes:
    """What a class is in the codes of a DICOM Segmentation.

    Attributes:
        category: kind of property, of DICOM's context group 7150.
        type: the property itself, of context group 7151 where it has one.
        modifier: the side, of context group 244; None without one.
        anatomy: where it lies, for what may lie elsewhere too, such as a lesion; None without one.
    """

    category: Code
    type: Code
    modifier: Code | None = None
    anatomy: Code | None = None


@dataclass(frozen=True)
class ClassEntry:
    """One class that can be prompted.

    Attributes:
        id: its number, 1 or more; the value in predicted label maps and the index of its logit channel.
        name: its name as shown to people.
        synonyms: other names for exactly this class.
        modalities: canonical names of the modalities in which it can be seen.
        region: name of the part of the body it belongs to.
        partner: id of the class that takes its place when an image is mirrored left to right, None without one.
        colour: red, green, blue in 0..255.
        codes: for DICOM Segmentations; None where the table gives none.
    """

    id: int
    name: str
    synonyms: tuple[str, ...]
    modalities: tuple[str, ...]
    region: str
    partner: int | None
    colour: tuple[int, int, int]
    codes: Codes | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The classes, modalities and regions of one table; made by `Vocabulary.read`.

    Attributes:
        entries: the classes in ascending id order.
        modalities: the modalities in the order of the table.
        regions: the regions in the order of the table.
        source: the file they came from, for error texts.
    """

    entries: tuple[ClassEntry, ...]
    modalities: tuple[Modality, ...]
    regions: tuple[Region, ...]
    source: str

    @classmethod
    def read(cls, path: str | Path) -> "Vocabulary":
        """Read and check a vocabulary table.

        Args:
            path: a YAML file with `modalities`, `regions` and `classes`, see `configs/classes.yaml`.

        Raises:
            ConfigError: the file is missing or not YAML, or a row breaks a rule; the text names the row.
        """
        table = _load_yaml(Path(path))
        modalities = tuple(_read_modalities(table["modalities"], str(path)))
        regions = tuple(_read_regions(table["regions"], str(path)))
        entries = _read_classes(table["classes"], modalities, regions, str(path))
        return cls(entries=entries, modalities=modalities, regions=regions, source=str(path))

    @property
    def ids(self) -> tuple[int, ...]:
        """All class ids, ascending."""
        return tuple(entry.id for entry in self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """All class names, in ascending id order."""
        return tuple(entry.name for entry in self.entries)

    @property
    def modality_names(self) -> tuple[str, ...]:
        """All canonical modality names, in the order of the table."""
        return tuple(modality.name for modality in self.modalities)

    def object_id(self, number: int) -> int:
        """Give the id of an object that was pointed at and has no name, 201 for number 1.

        Raises:
            PromptError: there are more than a label map has values for.
        """
        if not 1 <= number <= _OBJECTS:
            raise PromptError(f"At most {_OBJECTS} objects without a name fit into one label map: name some of them.")
        return _LARGEST_CLASS_ID + number

    def entry(self, class_id: int) -> ClassEntry:
        """Look up a class by its id, or an object without a name, see `object_id`.

        Raises:
            PromptError: no class has this id; the text lists the known ones.
        """
        if _LARGEST_CLASS_ID < class_id <= _LARGEST_CLASS_ID + _OBJECTS:
            return _object_entry(class_id)
        return self._class_entry(class_id)

    def _class_entry(self, class_id: int) -> ClassEntry:
        if class_id not in self._by_id:
            raise PromptError(f"Class id {class_id} is unknown. {self._class_choices()}")
        return self._by_id[class_id]

    def resolve(self, prompt: str | int) -> ClassEntry:
        """Look up a class by name, synonym or id, without regard to case, spaces, underscores, hyphens and dots.

        Args:
            prompt: "Left_Kidney", "L. kidney", 4 or "4".

        Raises:
            PromptError: no class is called so; the text lists the known classes and the nearest match.
        """
        if isinstance(prompt, bool) or not isinstance(prompt, str | int):
            raise PromptError(f"A class is asked for by name or id, but {prompt!r} came. {self._class_choices()}")
        # Looked at before separators go, or "1.5" would be class 15 and "-1" class 1.
        if isinstance(prompt, int) or prompt.strip().isdecimal():
            return self._class_entry(int(prompt))
        key = _normalise(prompt)
        if key not in self._by_name:
            raise PromptError(f"Class {prompt!r} is unknown.{self._suggestion(key)} {self._class_choices()}")
        return self._by_name[key]

    def modality(self, name_or_code: str) -> Modality:
        """Look up a modality by canonical name, synonym or DICOM code, as forgiving as `resolve`.

        Raises:
            PromptError: there is no such modality; the text lists the choices.
        """
        key = _normalise(str(name_or_code))
        if key not in self._by_modality:
            choices = ", ".join(self.modality_names)
            raise PromptError(f"Modality {name_or_code!r} is unknown. Choose one of {choices}.")
        return self._by_modality[key]

    def region(self, name: str) -> Region:
        """Look up a region by its name, as forgiving as `resolve`.

        Raises:
            PromptError: there is no such region; the text lists the choices.
        """
        key = _normalise(str(name))
        if key not in self._by_region:
            choices = ", ".join(region.name for region in self.regions)
            raise PromptError(f"Region {name!r} is unknown. Choose among {choices}.")
        return self._by_region[key]

    def can_occur(self, class_id: int, *, modality: str, regions: Collection[str] | None) -> bool:
        """Tell whether an image can show a class at all.

        A polyp cannot be in an MR image of the heart: neither does MR show polyps, nor is the heart near the gut.

        Args:
            class_id: of the class.
            modality: of the image, as a name, synonym or DICOM code.
            regions: parts of the body of which the image is; None or none at all when unknown.

        Returns:
            False where the class is never seen in this modality, or where the regions are known and the class's own
            is neither among them nor a neighbour of one of them.

        Raises:
            PromptError: an unknown class, modality or region.
        """
        entry = self.entry(class_id)
        if self.modality(modality).name not in entry.modalities:
            return False
        shown = [self.region(name) for name in regions or ()]
        return not shown or any(entry.region in (region.name, *region.neighbours) for region in shown)

    @cached_property
    def _by_id(self) -> dict[int, ClassEntry]:
        return {entry.id: entry for entry in self.entries}

    @cached_property
    def _by_name(self) -> dict[str, ClassEntry]:
        return {_normalise(name): entry for entry in self.entries for name in (entry.name, *entry.synonyms)}

    @cached_property
    def _by_modality(self) -> dict[str, Modality]:
        return {_normalise(name): modality for modality in self.modalities for name in _modality_names(modality)}

    @cached_property
    def _by_region(self) -> dict[str, Region]:
        return {_normalise(region.name): region for region in self.regions}

    def _class_choices(self) -> str:
        return f"Known classes: {', '.join(f'{entry.id} {entry.name}' for entry in self.entries)}."

    def _suggestion(self, key: str) -> str:
        """Name the classes of which an unknown name is a part, or else the nearest one."""
        names = [_normalise(name) for name in self.names]
        near = (
            [name for name in names if len(key) >= _SHORTEST_PART and key in name]
            or difflib.get_close_matches(key, names, n=1)
            or difflib.get_close_matches(key, self._by_name, n=1, cutoff=_SURELY_MEANT)
        )
        return f" Did you mean {' or '.join(repr(self._by_name[name].name) for name in near)}?" if near else ""


def parse_prompts(value: str | int | Sequence[str | int] | None) -> list[str | int] | None:
    """Bring the ways of writing a list of classes into one.

    Args:
        value: "liver,spleen", ["liver", 2], ("liver", "spleen"), 3 or None.

    Returns:
        The prompts in the given order, names stripped and not yet looked up; None when no class is named.
    """
    if value is None:
        return None
    # What is neither a text nor a sequence is passed on as it is: `Vocabulary.resolve` takes ids and refuses the rest.
    values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    prompts = [prompt for item in values for prompt in _split(item)]
    return prompts or None


def choose_classes(
    vocabulary: Vocabulary,
    *,
    prompts: Sequence[str | int] | None,
    modality: str | None,
    trained: Mapping[str, Sequence[str]],
    force: bool = False,
) -> list[int]:
    """Decide which classes to segment in an image.

    Without prompts these are the classes trained for the image's modality. Prompted classes are taken in the given
    order, each once, if they were trained in that modality, or, where it is unknown, in any.

    Args:
        vocabulary: names, ids and modalities.
        prompts: what was asked for, names or ids; None or empty for every class of the modality.
        modality: the image's modality as a name, synonym or DICOM code; None when unknown.
        trained: what the model was trained for: modality -> class names, see `trained_classes`.
        force: accept prompted classes that were not trained for the image.

    Returns:
        Class ids: prompted ones in the given order, otherwise ascending.

    Raises:
        PromptError: an unknown class or modality, a class that was not trained for the image (unless forced), or
            neither classes nor modality given.
        ConfigError: `trained` names what the vocabulary does not have.
    """
    known = _trained_ids(vocabulary, trained)
    name = None if modality is None else vocabulary.modality(modality).name
    if not prompts:
        return _classes_of_modality(name, known)
    chosen = list(dict.fromkeys(vocabulary.resolve(prompt).id for prompt in prompts))
    if not force:
        _require_trained(vocabulary, chosen, modality=name, known=known)
    return chosen


def _classes_of_modality(modality: str | None, known: Mapping[str, list[int]]) -> list[int]:
    if not known:
        raise PromptError(
            "This model knows no class by its name. Ask by boxes or points (--boxes, --points), if it has learned "
            "them, or name classes with --classes and add --force."
        )
    choices = ", ".join(known)
    if modality is None:
        raise PromptError(
            f"The image's modality is unknown and no class was asked for: give --modality, one of {choices}."
        )
    if not known.get(modality):
        raise PromptError(
            f"This model was not trained on {modality}; it knows {choices}. "
            "Correct --modality, or name classes with --classes and add --force."
        )
    return known[modality]


def _require_trained(
    vocabulary: Vocabulary, chosen: Iterable[int], *, modality: str | None, known: Mapping[str, list[int]]
) -> None:
    allowed = {class_id for name, ids in known.items() if modality in (None, name) for class_id in ids}
    refused = [repr(vocabulary.entry(class_id).name) for class_id in chosen if class_id not in allowed]
    if refused:
        place = "in any modality" if modality is None else f"in {modality}"
        raise PromptError(
            f"This model was not trained for {', '.join(refused)} {place}. "
            f"It knows {_describe(vocabulary, known)}. Choose among these, or add --force."
        )


def _describe(vocabulary: Vocabulary, known: Mapping[str, list[int]]) -> str:
    parts = [f"{name}: {', '.join(vocabulary.entry(class_id).name for class_id in ids)}" for name, ids in known.items()]
    return "; ".join(parts) or "no class"


def _trained_ids(vocabulary: Vocabulary, trained: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Look up a model's record; an error there is the model's or the vocabulary's, never the prompt's."""
    try:
        return {
            vocabulary.modality(modality).name: sorted({vocabulary.resolve(name).id for name in names})
            for modality, names in trained.items()
            if names
        }
    except PromptError as error:
        raise ConfigError(
            f"The model's record of trained classes does not fit {vocabulary.source}: {error} "
            "Use the vocabulary that the model was trained with."
        ) from error


def _split(item: str | int) -> list[str | int]:
    if not isinstance(item, str):
        return [item]
    return [part.strip() for part in item.split(",") if part.strip()]


def _normalise(name: str) -> str:
    return _SEPARATORS.sub("", name).casefold()


def _modality_names(modality: Modality) -> tuple[str, ...]:
    return (modality.name, *modality.synonyms, *modality.dicom_codes)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The class vocabulary {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The class vocabulary {path} is not valid YAML: {error}") from error
    if not isinstance(table, dict) or set(table) != {"modalities", "regions", "classes"}:
        raise ConfigError(f"{path} must hold the three keys 'modalities', 'regions' and 'classes', and no other.")
    return table


def _read_modalities(rows: Any, source: str) -> Iterator[Modality]:
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{source}: 'modalities' must map each canonical name to its row.")
    taken: dict[str, str] = {}
    for name, fields in rows.items():
        row = _Row(fields, f"{source}: modality {name!r}", allowed=_MODALITY_KEYS)
        modality = Modality(
            name=row.checked(name, _is_text, "a name that is a text"),
            description=row.text("description"),
            synonyms=row.texts("synonyms", default=()),
            dicom_codes=row.texts("dicom_codes"),
        )
        # A canonical name may be its own DICOM code, as CT is; two modalities may not share one.
        row.claim(dict.fromkeys(_modality_names(modality)), owner=modality.name, taken=taken)
        yield modality


def _read_regions(rows: Any, source: str) -> Iterator[Region]:
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{source}: 'regions' must map each region to its row.")
    taken: dict[str, str] = {}
    for name, fields in rows.items():
        row = _Row(fields, f"{source}: region {name!r}", allowed=_REGION_KEYS)
        region = Region(row.checked(name, _is_text, "a name that is a text"), row.texts("neighbours"))
        row.claim([name], owner=name, taken=taken)
        one_sided = [other for other in region.neighbours if other == name or not _names(rows.get(other), name)]
        if one_sided:
            raise row.error(f"{', '.join(one_sided)}: neighbours must be other regions that name this one in turn")
        yield region


def _names(fields: Any, region: str) -> bool:
    """Tell whether a region's row names another one as its neighbour."""
    return isinstance(fields, dict) and _is_texts(fields.get("neighbours")) and region in fields["neighbours"]


def _read_classes(
    rows: Any, modalities: Sequence[Modality], regions: Sequence[Region], source: str
) -> tuple[ClassEntry, ...]:
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{source}: 'classes' must be a list of rows.")
    table = [_Row(fields, f"{source}: class row {index}", allowed=_CLASS_KEYS) for index, fields in enumerate(rows, 1)]
    ids = _class_ids(table)
    known = [modality.name for modality in modalities]
    parts = [region.name for region in regions]
    entries = [_read_class(row, ids, known, parts) for row in table]
    _check_unique_names(table, entries)
    _check_partners(table, entries)
    _check_unique_colours(table, entries)
    return tuple(sorted(entries, key=lambda entry: entry.id))


def _object_entry(object_id: int) -> ClassEntry:
    """Make the entry of an object without a name, the same for the same id."""
    number = object_id - _LARGEST_CLASS_ID
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number * _HUE_STEP % 1, 0.75, 0.95))
    return ClassEntry(object_id, f"object {number}", (), (), "", None, (red, green, blue))


def _class_ids(table: Sequence["_Row"]) -> dict[str, int]:
    """Give each name its id, and each row a place in error texts that names the class."""
    ids: dict[str, int] = {}
    for row in table:
        name = row.text("name")
        row.place = f"{row.place} ({name!r})"
        class_id = row.value("id", _is_id, f"a whole number from 1 to {_LARGEST_CLASS_ID}")
        if class_id in ids.values():
            raise row.error(f"id {class_id} is taken by another row; give the next free one")
        ids[name] = class_id
    return ids


def _read_class(row: "_Row", ids: Mapping[str, int], known: Sequence[str], regions: Sequence[str]) -> ClassEntry:
    partner = row.text("partner") if "partner" in row.fields else None
    if partner is not None and partner not in ids:
        raise row.error(f"its partner {partner!r} is no class of this table")
    return ClassEntry(
        id=row.fields["id"],
        name=row.fields["name"],
        synonyms=row.texts("synonyms", default=()),
        modalities=_known_modalities(row, known),
        region=row.checked(row.text("region"), regions.__contains__, f"'region' as one of {', '.join(regions)}"),
        partner=None if partner is None else ids[partner],
        colour=tuple(row.value("colour", _is_colour, "three whole numbers in 0..255")),
        codes=_read_codes(row),
    )


def _read_codes(row: "_Row") -> Codes | None:
    if "codes" not in row.fields:
        return None
    codes = _Row(row.fields["codes"], f"{row.place}: codes", allowed=_CODE_KEYS)
    expected = "[scheme, value, meaning], three texts of at most 16, 16 and 64 letters"

    def code(key: str) -> Code:
        return Code(*codes.value(key, _is_code, expected))

    given = {key: code(key) for key in ("modifier", "anatomy") if key in codes.fields}
    return Codes(category=code("category"), type=code("type"), **given)


def _known_modalities(row: "_Row", known: Sequence[str]) -> tuple[str, ...]:
    names = row.texts("modalities")
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise row.error(f"modalities {unknown} are not in the table; choose from {', '.join(known)}")
    return names


def _check_unique_names(table: Sequence["_Row"], entries: Sequence[ClassEntry]) -> None:
    taken: dict[str, str] = {}
    for row, entry in zip(table, entries, strict=True):
        row.claim((entry.name, *entry.synonyms), owner=entry.name, taken=taken)


def _check_partners(table: Sequence["_Row"], entries: Sequence[ClassEntry]) -> None:
    partners = {entry.id: entry.partner for entry in entries}
    for row, entry in zip(table, entries, strict=True):
        if entry.partner is None:
            continue
        if entry.partner == entry.id or partners[entry.partner] != entry.id:
            raise row.error("partners must name each other: left names right and right names left")


def _check_unique_colours(table: Sequence["_Row"], entries: Sequence[ClassEntry]) -> None:
    taken: dict[tuple[int, int, int], str] = {}
    for row, entry in zip(table, entries, strict=True):
        if entry.colour in taken:
            raise row.error(f"colour {list(entry.colour)} is taken by {taken[entry.colour]!r}")
        taken[entry.colour] = entry.name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(item) for item in value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_CLASS_ID


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(item) is int and 0 <= item <= 255 for item in value)


def _is_code(value: Any) -> bool:
    if not _is_texts(value) or len(value) != len(_CODE_LENGTHS):
        return False
    return all(len(part) <= longest for part, longest in zip(value, _CODE_LENGTHS, strict=True))


class _Row:
    """One row of the table, with a place that every error text begins with."""

    def __init__(self, fields: Any, place: str, *, allowed: set[str]) -> None:
        self.place = place
        if not isinstance(fields, dict) or not set(fields) <= allowed:
            raise self.error(f"a row has the keys {', '.join(sorted(allowed))}, but {fields!r} came")
        self.fields: dict[str, Any] = fields

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.place}: {text}.")

    def checked(self, value: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
        if not is_valid(value):
            raise self.error(f"expected {expected}, but {value!r} came")
        return value

    def value(self, key: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        return self.checked(self.fields.get(key), is_valid, f"{key!r} as {expected}")

    def text(self, key: str) -> str:
        return str(self.value(key, _is_text, "a text"))

    def texts(self, key: str, *, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        if default is not None and key not in self.fields:
            return default
        return tuple(self.value(key, _is_texts, "a list of texts"))

    def claim(self, names: Iterable[str], *, owner: str, taken: dict[str, str]) -> None:
        """Enter names into the table of taken ones; none may be taken, empty or look like an id."""
        for name in names:
            key = _normalise(name)
            if not key or key.isdecimal():
                raise self.error(f"{name!r} cannot be a name: it would be read as an id or as nothing")
            if key in taken:
                raise self.error(f"the name {name!r} is taken already, by {taken[key]!r}")
            taken[key] = owner
