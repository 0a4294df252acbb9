"""The rows of a study, read from `configs/experiments/tables/`: a table as settings of this bundle.

A file holds `title`, `data` (the paper's data set), `presence` (the protocol; `all` where it says nothing), `reference`
(the row, by name, with which the others are compared) and `rows`. A row has

- `name`;
- `overlays`: configs over `configs/train.json`, by name within `configs/`, that say which network it is and how it is
  trained. They lie over those of the whole study (`--config`);
- `settings`: of `configs/train.json` and its overlays, in which it differs from the other rows;
- `evaluation`: settings for its evaluation alone. Rows with the same `overlays` and `settings` share one training;
- `paper`: `dsc` and `nsd` in percent and `basis`, `stated` or `inferred`: where the paper's print does not tell which
  settings a figure belongs to, it was inferred; in a table of several data sets one such entry for each set;
- `comparable`: whether this row's figures can be compared with the paper's, and why not;
- `missing`: why the bundle has no such network; then the row shows the paper's figures alone;
- `weights`: an entry of `configs/weights.yaml`, for a published network that is evaluated as it is, without training;
- `trained_on`, `tested_on`: names of data sets, in tables that tell them apart;
- `section`: the section of the datalist to evaluate on, where it is not that of the whole study.

`common` has settings that all rows share whatever their overlays say, such as the image encoder, the start and the
number of steps; `--config` and the command line change them for all rows alike.

A table of several data sets names the paper's in `sets`, for each of which it has all rows; or it has in `every_pair`
the row to run for each pair of the data sets given; or it has in `pairs` the sets to train on and to test on, for each
of which it has all rows, tested on the first set as well as on the second. Data sets that it does not know become
further pairs, two by two. A table of several sections of one data set has them in `sections`, by what to call them, and
all rows for each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from scripts.errors import ConfigError
from scripts.report.study_tables import PaperFigures

BASES = ("stated", "inferred")
_REPEATS = ("sets", "pairs", "sections")
_TABLE_KEYS = {"title", "data", "presence", "reference", "rows", "common", "every_pair", *_REPEATS}


@dataclass(frozen=True)
class StudyRow:
    """One row of a table; see the module.

    Attributes:
        name: of the row.
        overlays: names of configs over `configs/train.json`.
        settings: of the training.
        evaluation: settings of the evaluation alone.
        paper: the paper's figures, None where it has none.
        comparable: whether they can be compared with, and why not.
        missing: why there is nothing to run; None where there is.
        weights: entry of `configs/weights.yaml` to evaluate without training; None for a training.
        trained_on: name of the data set to train on; None for the study's only one.
        tested_on: name of the data set to evaluate on; None for the same.
        section: of the datalist to evaluate on; None for that of the study.
    """

    name: str
    overlays: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    paper: PaperFigures | None = None
    comparable: str = ""
    missing: str | None = None
    weights: str | None = None
    trained_on: str | None = None
    tested_on: str | None = None
    section: str | None = None


@dataclass(frozen=True)
class StudyTable:
    """A table.

    Attributes:
        name: of its file, such as `table_5`.
        title: what it shows.
        data: the paper's data set; empty where the table is not a paper's.
        presence: the protocol, `all` or `oracle`.
        reference: name of the row with which the others are compared; where a data set lacks it, its first row.
        rows: in the paper's order.
        common: settings that all rows share, whatever their overlays say.
        several_sets: whether its rows tell data sets apart.
    """

    name: str
    title: str
    data: str
    presence: str
    reference: str
    rows: tuple[StudyRow, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    several_sets: bool = False

    def row(self, name: str) -> StudyRow:
        """Find a row by its name, in whatever case.

        Raises:
            ConfigError: there is none of that name.
        """
        for row in self.rows:
            if row.name.casefold() == name.strip().casefold():
                return row
        raise ConfigError(f"{self.name} has no row '{name}'; its rows are {', '.join(row.name for row in self.rows)}")


def read_table(name: str, folder: Path, *, sets: Sequence[str] = ()) -> StudyTable:
    """Read a table by its name or number, or by the path of a file of the same form.

    Args:
        name: `table_5`, `5`, `hsp_prompts`, or a path ending in .yaml.
        folder: where the bundle's own tables are.
        sets: names of the data sets given; a table of several gets rows for those that it does not know.

    Raises:
        ConfigError: there is none, or its file does not say what it should.
    """
    path = _find_table(name, folder)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error
    return _parse_table(content, path, sets)


def _find_table(name: str, folder: Path) -> Path:
    """Find a table's file."""
    own = name.endswith((".yaml", ".yml"))
    places = [Path(name)] if own else [folder / f"{name}.yaml", folder / f"table_{name}.yaml"]
    for place in places:
        if place.is_file():
            return place
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ConfigError(f"there is no table '{name}': give one of {known}, or the path of a .yaml file")


def _parse_table(content: Any, path: Path, given: Sequence[str]) -> StudyTable:
    """Check what a table's file holds."""
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or not set(content) <= _TABLE_KEYS:
        raise ConfigError(f"{path}: expected a mapping of {', '.join(sorted(_TABLE_KEYS))}, with rows as a list")
    if sum(key in content for key in _REPEATS) > 1:
        raise ConfigError(f"{path}: a table has one of {', '.join(_REPEATS)} at most")
    rows = _parse_rows(content, path, given)
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
        raise ConfigError(f"{path}: expected rows with names of their own, got {', '.join(names) or 'none'}")
    pair = content.get("every_pair")
    if pair is not None:
        rows += _every_pair(_parse_row(pair, path, ())[0], rows, given)
    return StudyTable(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        data=str(content.get("data", "")),
        presence=str(content.get("presence", "all")),
        reference=str(content.get("reference", names[0])),
        rows=tuple(rows),
        common=_parse_common(content.get("common", {}), path),
        several_sets=pair is not None or any(row.trained_on is not None for row in rows),
    )


def _parse_rows(content: Mapping[str, Any], path: Path, given: Sequence[str]) -> list[StudyRow]:
    """Check the rows, and repeat them for the data sets, pairs or sections of the table."""
    sets = tuple(dict.fromkeys((*content["sets"], *given))) if content.get("sets") else ()
    rows = [row for entry in content["rows"] for row in _parse_row(entry, path, sets)]
    if "pairs" in content:
        return _of_pairs(rows, _further_pairs(content["pairs"], given, path))
    if "sections" in content:
        return _of_sections(rows, content["sections"], path)
    return rows


def _parse_row(entry: Any, path: Path, sets: Sequence[str]) -> list[StudyRow]:
    """Check a row; in a table of several data sets it becomes one row for each."""
    known = set(StudyRow.__dataclass_fields__)
    if not isinstance(entry, dict) or "name" not in entry or not set(entry) <= known:
        raise ConfigError(f"{path}: a row is a mapping with a name and some of {', '.join(sorted(known))}, got {entry}")
    overlays = _parse_overlays(entry, path)
    paper = entry.get("paper")
    row = StudyRow(**{**entry, "name": str(entry["name"]), "overlays": overlays, "paper": None})
    if not sets:
        return [replace(row, paper=None if paper is None else _parse_figures(paper, row.name, path))]
    return [
        replace(row, name=f"{row.name}, {name}", trained_on=name, tested_on=name, paper=_of_set(paper, name, row, path))
        for name in sets
    ]


def _parse_overlays(entry: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Check the names of a row's overlays."""
    overlays = entry.get("overlays", [])
    if not isinstance(overlays, list) or not all(isinstance(name, str) for name in overlays):
        raise ConfigError(
            f"{path}: overlays of '{entry['name']}' are a list of names within configs/, such as "
            f"[networks/hsp_sam.yaml], got {overlays}"
        )
    return tuple(overlays)


def _parse_common(common: Any, path: Path) -> dict[str, Any]:
    """Check the settings that all rows share."""
    if not isinstance(common, dict) or not all(isinstance(name, str) for name in common):
        raise ConfigError(f"{path}: common is a mapping of settings, such as batch_size: 16, got {common}")
    return common


def _every_pair(pattern: StudyRow, rows: Sequence[StudyRow], sets: Sequence[str]) -> list[StudyRow]:
    """Make the rows that train on one of the data sets and test on each, as far as the table lacks them."""
    known = {(row.trained_on, row.tested_on) for row in rows if row.missing is None}
    return [_of_pair(pattern, first, second) for first in sets for second in sets if (first, second) not in known]


def _of_pairs(rows: Sequence[StudyRow], pairs: Iterable[tuple[str, str]]) -> list[StudyRow]:
    """Repeat rows for pairs of data sets, tested on the set that was trained on and then on the other."""
    return [_of_pair(row, first, tested) for first, second in pairs for tested in (first, second) for row in rows]


def _of_pair(row: StudyRow, trained_on: str, tested_on: str) -> StudyRow:
    return replace(row, name=f"{row.name}, {trained_on} to {tested_on}", trained_on=trained_on, tested_on=tested_on)


def _further_pairs(pairs: Any, given: Sequence[str], path: Path) -> list[tuple[str, str]]:
    """Check the pairs, and add those of data sets that are in none, two by two."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"{path}: pairs are a list of [set to train on, set to test on], got {pairs}")
    known = {name for pair in pairs for name in pair}
    further = [name for name in given if name not in known]
    if len(further) % 2:
        raise ConfigError(
            f"{path.stem} takes data sets that it does not know two by two, the first to train on and the second to "
            f"test on; got {', '.join(further)}"
        )
    return [(first, second) for first, second in (*pairs, *zip(further[::2], further[1::2], strict=True))]


def _of_sections(rows: Sequence[StudyRow], sections: Any, path: Path) -> list[StudyRow]:
    """Repeat rows for sections of one data set."""
    if not isinstance(sections, dict) or not all(isinstance(name, str) for name in sections.values()):
        raise ConfigError(f"{path}: sections are a mapping of what to call them to their names, got {sections}")
    return [
        replace(row, name=f"{row.name}, {called}", section=section)
        for called, section in sections.items()
        for row in rows
    ]


def _of_set(paper: Any, name: str, row: StudyRow, path: Path) -> PaperFigures | None:
    """Find the figures of one data set."""
    found = (paper or {}).get(name)
    return None if found is None else _parse_figures(found, row.name, path)


def _parse_figures(entry: Any, name: str, path: Path) -> PaperFigures:
    """Check the paper's figures."""
    if not isinstance(entry, Mapping) or set(entry) != {"dsc", "nsd", "basis"} or entry["basis"] not in BASES:
        raise ConfigError(f"{path}: the paper's figures of '{name}' are dsc, nsd and basis ({' or '.join(BASES)})")
    return PaperFigures(dsc=float(entry["dsc"]), nsd=float(entry["nsd"]), basis=entry["basis"])
