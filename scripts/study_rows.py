"""The rows of a study, read from `configs/experiments/tables/`: a table of the paper as settings of this bundle.

A file holds `title`, `data` (the paper's data set), `presence` (the protocol; `all` where it says nothing), `reference`
(the row, by name, with which the others are compared) and `rows`. A row has

- `name`;
- `settings`: of `configs/train.json`, in which it differs from the other rows;
- `evaluation`: settings for its evaluation alone. Rows with the same `settings` share one training;
- `paper`: `dsc` and `nsd` in percent and `basis`, `stated` or `inferred`: where the paper's print does not tell which
  settings a figure belongs to, it was inferred; in a table of several data sets one such entry for each set;
- `comparable`: whether this row's figures can be compared with the paper's, and why not;
- `missing`: why the bundle has no such network; then the row shows the paper's figures alone;
- `weights`: an entry of `configs/weights.yaml`, for a published network that is evaluated as it is, without training;
- `trained_on`, `tested_on`: names of data sets, in tables that tell them apart.

A table of several data sets names the paper's in `sets`, for each of which it has all rows; or it has in `every_pair`
the row to run for each pair of the data sets given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from scripts.errors import ConfigError
from scripts.report.study_tables import PaperFigures

BASES = ("stated", "inferred")
_TABLE_KEYS = {"title", "data", "presence", "reference", "rows", "sets", "every_pair"}


@dataclass(frozen=True)
class StudyRow:
    """One row of a table; see the module.

    Attributes:
        name: of the row.
        settings: of the training.
        evaluation: settings of the evaluation alone.
        paper: the paper's figures, None where it has none.
        comparable: whether they can be compared with, and why not.
        missing: why there is nothing to run; None where there is.
        weights: entry of `configs/weights.yaml` to evaluate without training; None for a training.
        trained_on: name of the data set to train on; None for the study's only one.
        tested_on: name of the data set to evaluate on; None for the same.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    paper: PaperFigures | None = None
    comparable: str = ""
    missing: str | None = None
    weights: str | None = None
    trained_on: str | None = None
    tested_on: str | None = None


@dataclass(frozen=True)
class StudyTable:
    """A table of the paper.

    Attributes:
        name: of its file, such as `table_5`.
        title: what it shows.
        data: the paper's data set.
        presence: the protocol, `all` or `oracle`.
        reference: name of the row with which the others are compared; where a data set lacks it, its first row.
        rows: in the paper's order.
        several_sets: whether its rows tell data sets apart.
    """

    name: str
    title: str
    data: str
    presence: str
    reference: str
    rows: tuple[StudyRow, ...]
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
        name: `table_5`, `5`, or a path ending in .yaml.
        folder: where the bundle's own tables are.
        sets: names of further data sets; a table of several gets rows for these too.

    Raises:
        ConfigError: there is none, or its file does not say what it should.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"table_{name.removeprefix('table_')}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError(f"there is no table '{name}': give one of {known}, or the path of a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error
    return _parse_table(content, path, sets)


def _parse_table(content: Any, path: Path, further: Sequence[str]) -> StudyTable:
    """Check what a table's file holds."""
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or not set(content) <= _TABLE_KEYS:
        raise ConfigError(f"{path}: expected a mapping of {', '.join(sorted(_TABLE_KEYS))}, with rows as a list")
    sets = tuple(content.get("sets", ()))
    if sets:
        sets = tuple(dict.fromkeys((*sets, *further)))
    rows = [row for entry in content["rows"] for row in _parse_row(entry, path, sets)]
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
        raise ConfigError(f"{path}: expected rows with names of their own, got {', '.join(names) or 'none'}")
    pair = content.get("every_pair")
    if pair is not None:
        rows += _pairs(_parse_row(pair, path, ())[0], rows, further)
    return StudyTable(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        data=str(content.get("data", "")),
        presence=str(content.get("presence", "all")),
        reference=str(content.get("reference", names[0])),
        rows=tuple(rows),
        several_sets=bool(sets) or pair is not None,
    )


def _parse_row(entry: Any, path: Path, sets: Sequence[str]) -> list[StudyRow]:
    """Check a row; in a table of several data sets it becomes one row for each."""
    known = set(StudyRow.__dataclass_fields__)
    if not isinstance(entry, dict) or "name" not in entry or not set(entry) <= known:
        raise ConfigError(f"{path}: a row is a mapping with a name and some of {', '.join(sorted(known))}, got {entry}")
    paper = entry.get("paper")
    row = StudyRow(**{**entry, "name": str(entry["name"]), "paper": None})
    if not sets:
        return [replace(row, paper=None if paper is None else _parse_figures(paper, row.name, path))]
    return [
        replace(row, name=f"{row.name}, {name}", trained_on=name, tested_on=name, paper=_of_set(paper, name, row, path))
        for name in sets
    ]


def _pairs(pattern: StudyRow, rows: Sequence[StudyRow], sets: Sequence[str]) -> list[StudyRow]:
    """Make the rows that train on one of the data sets and test on each, as far as the table lacks them."""
    known = {(row.trained_on, row.tested_on) for row in rows if row.missing is None}
    return [
        replace(pattern, name=f"{pattern.name}, {first} to {second}", trained_on=first, tested_on=second)
        for first in sets
        for second in sets
        if (first, second) not in known
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
