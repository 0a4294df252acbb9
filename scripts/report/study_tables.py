"""A study's table in the form of the paper's, next to the paper's figures; as text, as CSV and as JSON.

All scores are in percent, as in the paper. A figure that does not exist is a dash in the text, an empty cell in the
CSV file and null in the JSON file. The text has the columns in which there is something to tell: the paper's where a
row has figures of a paper; in their place IoU and batch-pooled DSC in a table of this bundle's own.
"""

import csv
import io
import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scripts.files import atomic_path
from scripts.metrics.pooling import BATCH_POOLED, BatchPooled
from scripts.metrics.scores import ClassScore
from scripts.metrics.statistics import Comparison, Interval

_MISSING: Final = "-"
_WIDTH: Final = 120
_HEAD: Final = (
    "row",
    "seeds",
    "DSC",
    "NSD",
    "NSD challenge",
    "IoU",
    f"DSC {BATCH_POOLED}",
    "swapped",
    "DSC less reference",
    "p",
    "parameters",
    "minutes",
    "paper DSC",
    "paper NSD",
    "paper less reference",
    "comparable",
)
_OF_SIDES: Final = ("swapped",)  # only in tables with lateral partners
_OF_TRAININGS: Final = ("parameters", "minutes")  # only where something was trained
_OF_PAPERS: Final = ("paper DSC", "paper NSD", "paper less reference")
_OWN: Final = ("IoU", f"DSC {BATCH_POOLED}")  # only in tables that are no paper's
_OWN_COLUMNS: Final = _HEAD.index("paper DSC") - 1  # of what was measured here
_CSV_COLUMNS: Final = (
    "row",
    "seeds",
    "cases",
    "patients",
    "dsc",
    "dsc_low",
    "dsc_high",
    "dsc_seed_deviation",
    "dsc_noise_deviation",
    "nsd",
    "nsd_low",
    "nsd_high",
    "nsd_challenge",
    "iou",
    "dsc_batch_pooled",
    "iou_batch_pooled",
    "swapped_share",
    "parameters",
    "training_seconds",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "paper_dsc",
    "paper_nsd",
    "paper_basis",
    "comparable",
    "note",
)


@dataclass(frozen=True)
class PaperFigures:
    """What the paper reports of a row.

    Attributes:
        dsc: in percent.
        nsd: in percent.
        basis: `stated`, or `inferred` where the print does not tell which settings the figures belong to.
    """

    dsc: float
    nsd: float
    basis: str


@dataclass(frozen=True)
class Scores:
    """What a row's runs came to; means over seeds of means over the classes, 0 to 1.

    Attributes:
        seeds: number of trainings.
        dsc: with its interval over patients.
        nsd: with its interval over patients.
        nsd_challenge: the mean of the MedSAM challenge's NSD; NaN where it was not computed.
        iou: the mean of the cases' intersection over union, as that of the DSC.
        batch_pooled: DSC and IoU of whole batches of cases, for comparison with older tables.
        classes: mean DSC of each class.
        seed_deviation: standard deviation of the mean DSC over the trainings; NaN of a single one.
        training_seconds: of one training, mean over the seeds; NaN where there was none.
        noise_deviation: standard deviation of the mean DSC over draws of the network's noise; NaN where none were made.
        difference: of the DSC to the reference row, over the same cases; None for the reference itself and where the
            reference has no scores.
        parameters: that learnt in a training; None where there was none.
        swaps: of each class with a lateral partner the share of swapped voxels, see `mean_swaps`.
    """

    seeds: int
    dsc: Interval
    nsd: Interval
    nsd_challenge: float
    iou: float
    batch_pooled: BatchPooled
    classes: Mapping[str, float]
    seed_deviation: float
    noise_deviation: float
    training_seconds: float
    difference: Comparison | None = None
    parameters: int | None = None
    swaps: Mapping[str, float] = field(default_factory=dict)

    @property
    def swapped_share(self) -> float:
        """Mean of `swaps` over the classes that were predicted, 0 to 1; NaN where there is none."""
        known = [share for share in self.swaps.values() if not math.isnan(share)]
        return statistics.fmean(known) if known else math.nan


@dataclass(frozen=True)
class RowOutcome:
    """A row of the printed table.

    Attributes:
        name: of the row.
        scores: None where nothing was run.
        note: why nothing was run; empty where something was.
        paper: the paper's figures.
        comparable: whether the two can be compared, and why not.
        reference: name of the row with which it is compared; None for the reference itself.
    """

    name: str
    scores: Scores | None
    note: str
    paper: PaperFigures | None
    comparable: str
    reference: str | None


def mean_swaps(evaluations: Sequence[Sequence[ClassScore]]) -> dict[str, float]:
    """Give the share of the predicted voxels that lie in the truth of the other side.

    Args:
        evaluations: of one row, one for each seed.

    Returns:
        Class with a lateral partner -> mean over the cases with a prediction, then over the evaluations, 0 to 1; NaN
        where nothing was predicted.
    """
    shares: dict[str, list[float]] = {}
    for scores in evaluations:
        of_classes: dict[str, list[float]] = {}
        for score in scores:
            if score.swapped_voxels is not None:
                known = of_classes.setdefault(score.class_name, [])
                known += [] if math.isnan(score.swapped_share) else [score.swapped_share]
        for name, known in of_classes.items():
            shares.setdefault(name, []).extend([statistics.fmean(known)] if known else [])
    return {name: statistics.fmean(known) if known else math.nan for name, known in shares.items()}


def render_study(rows: Sequence[RowOutcome], *, title: str, caption: Sequence[str]) -> str:
    """Show a study as an aligned plain-text table.

    Args:
        rows: in the paper's order.
        title: of the table.
        caption: what the figures are of: data, protocol, tolerance, budget.

    Returns:
        Title and caption, the table in percent, the order of the rows here and in the paper, and the remarks to which
        the last column points.
    """
    remarks = _remarks(rows)
    lines = [list(_HEAD), *(_row_cells(row, rows, remarks) for row in rows)]
    left_out = _columns_left_out(rows)
    cells = [[cell for name, cell in zip(_HEAD, line, strict=True) if name not in left_out] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *body = [_aligned(line, widths) for line in cells]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    parts = [*_wrapped([title, *caption]), "", head, rule, *body, rule, *_wrapped(_orders(rows))]
    parts += _wrapped([f"[{number}] {text}" for text, number in remarks.items()])
    return "\n".join(parts) + "\n"


def write_study(rows: Sequence[RowOutcome], folder: Path, *, text: str, about: Mapping[str, Any]) -> None:
    """Write `table.txt`, `study.csv` and `study.json`.

    Args:
        rows: in the paper's order.
        folder: an existing one.
        text: of `render_study`.
        about: what the figures are of, for the JSON file.

    Raises:
        OutputError: a file cannot be written.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=_CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    entries = [_entry(row) for row in rows]
    writer.writerows({name: "" if entry[name] is None else entry[name] for name in _CSV_COLUMNS} for entry in entries)
    content = json.dumps({**about, "rows": entries}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for name, written in {"table.txt": text, "study.csv": table.getvalue(), "study.json": content}.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(written, encoding="utf-8", newline="")


def agreement(rows: Sequence[RowOutcome]) -> tuple[int, int, list[tuple[str, str]]]:
    """Compare the order of the rows by DSC with the paper's, pair by pair.

    Args:
        rows: of which those with both figures count.

    Returns:
        How many pairs are in the paper's order, how many pairs there are, and the pairs in the other order, the
        paper's better row first.
    """
    known = [(row.name, row.scores.dsc.mean, row.paper.dsc) for row in rows if row.scores and row.paper]
    pairs = list(itertools.combinations(known, 2))
    turned = []
    for first, second in pairs:
        better, worse = (first, second) if first[2] >= second[2] else (second, first)
        if better[1] < worse[1]:
            turned.append((better[0], worse[0]))
    return len(pairs) - len(turned), len(pairs), turned


def _columns_left_out(rows: Sequence[RowOutcome]) -> set[str]:
    """Name the columns that have nothing to tell."""
    of_a_paper = any(row.paper for row in rows)
    trained = any(row.scores and row.scores.parameters is not None for row in rows)
    needed = {_OF_PAPERS: of_a_paper, _OWN: not of_a_paper, _OF_TRAININGS: trained, _OF_SIDES: _have_sides(rows)}
    return {name for names, wanted in needed.items() if not wanted for name in names}


def _remarks(rows: Sequence[RowOutcome]) -> dict[str, int]:
    """Number what is said of the rows beyond a verdict, each text once."""
    texts = dict.fromkeys(
        text for row in rows for text in (row.comparable, row.note) if text and text != _verdict(row.comparable)
    )
    return {text: number for number, text in enumerate(texts, start=1)}


def _row_cells(row: RowOutcome, rows: Sequence[RowOutcome], remarks: Mapping[str, int]) -> list[str]:
    """The cells of one row."""
    marks = "".join(f" [{remarks[text]}]" for text in (row.comparable, row.note) if text in remarks)
    verdict = f"{_verdict(row.comparable) or _MISSING}{marks}"
    return [row.name, *_own_cells(row.scores), *_paper_cells(row, rows), verdict]


def _verdict(comparable: str) -> str:
    """What stands before the reasons: yes, no, or a remark without any."""
    return comparable.partition(":")[0]


def _own_cells(scores: Scores | None) -> list[str]:
    """What was measured here."""
    if scores is None:
        return [_MISSING] * _OWN_COLUMNS
    difference, p_value = _MISSING, _MISSING
    if scores.difference is not None:
        interval = scores.difference.difference
        difference = f"{_signed(interval.mean)}{_range(interval, signed=True)}"
        p_value = _MISSING if math.isnan(scores.difference.p_value) else f"{scores.difference.p_value:.3f}"
    spread = f" ± {_percent(scores.seed_deviation)}" if not math.isnan(scores.seed_deviation) else ""
    return [
        str(scores.seeds),
        f"{_percent(scores.dsc.mean)}{spread}{_range(scores.dsc)}",
        f"{_percent(scores.nsd.mean)}{_range(scores.nsd)}",
        _percent(scores.nsd_challenge),
        _percent(scores.iou),
        _percent(scores.batch_pooled.dsc),
        _percent(scores.swapped_share),
        difference,
        p_value,
        _MISSING if scores.parameters is None else f"{scores.parameters / 1e6:.2f}",
        _MISSING if math.isnan(scores.training_seconds) else f"{scores.training_seconds / 60:.1f}",
    ]


def _paper_cells(row: RowOutcome, rows: Sequence[RowOutcome]) -> list[str]:
    """What the paper has."""
    if row.paper is None:
        return [_MISSING] * 3
    mark = "*" if row.paper.basis == "inferred" else ""
    reference = next((other.paper for other in rows if other.name == row.reference), None)
    less = _MISSING if reference is None else f"{row.paper.dsc - reference.dsc:+.3f}"
    return [f"{row.paper.dsc:.3f}{mark}", f"{row.paper.nsd:.3f}{mark}", less]


def _orders(rows: Sequence[RowOutcome]) -> list[str]:
    """Say in words how the rows are ordered, and what the marks mean."""
    lines = []
    alike, pairs, turned = agreement(rows)
    if pairs:
        other = "; the other way round here: " + ", ".join(f"{a} above {b}" for a, b in turned) if turned else ""
        lines.append(f"Order by DSC: {alike} of {pairs} pairs of rows are ordered as in the paper{other}.")
    drawn = [(row.name, row.scores.noise_deviation) for row in rows if row.scores]
    spread = ", ".join(f"{name} {_percent(value)}" for name, value in drawn if not math.isnan(value))
    if spread:
        lines.append(f"Standard deviation of the DSC over draws of the network's noise: {spread}.")
    if _have_sides(rows):
        lines.append(
            "Swapped: share of the predicted voxels of a class that lie in the truth of the other side, mean over the "
            "cases with a prediction, then over the classes with two sides and over the seeds."
        )
    if any(row.paper and row.paper.basis == "inferred" for row in rows):
        lines.append("* the paper's print does not tell to which settings the figure belongs; it was inferred.")
    return lines


def _have_sides(rows: Sequence[RowOutcome]) -> bool:
    """Whether a class has a lateral partner, so that sides can be swapped."""
    return any(row.scores and row.scores.swaps for row in rows)


def _percent(value: float) -> str:
    """A share in percent, two decimals."""
    return _MISSING if math.isnan(value) else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return _MISSING if math.isnan(value) else f"{100 * value:+.2f}"


def _range(interval: Interval, *, signed: bool = False) -> str:
    """An interval's ends, where it has any."""
    if math.isnan(interval.low):
        return ""
    show = _signed if signed else _percent
    return f" [{show(interval.low)}, {show(interval.high)}]"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names and remarks to the left, figures to the right, two blanks between columns."""
    first, *middle = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    figures = [cell.strip().rjust(width) for cell, width in zip(middle[:-1], widths[1:-1], strict=True)]
    return "  ".join([first, *figures, middle[-1]]).rstrip()


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [textwrap.fill(line, width=_WIDTH, subsequent_indent="  ") for line in lines]


def _entry(row: RowOutcome) -> dict[str, Any]:
    """One row for other programs, in percent."""
    entry: dict[str, Any] = dict.fromkeys(_CSV_COLUMNS)
    entry |= {"row": row.name, "comparable": row.comparable, "note": row.note, "seeds": 0}
    if row.paper is not None:
        entry |= {"paper_dsc": row.paper.dsc, "paper_nsd": row.paper.nsd, "paper_basis": row.paper.basis}
    return entry if row.scores is None else {**entry, **_scores_entry(row.scores)}


def _scores_entry(scores: Scores) -> dict[str, Any]:
    """The measured part of an entry."""
    entry = {
        "seeds": scores.seeds,
        "cases": scores.dsc.cases,
        "patients": scores.dsc.patients,
        "dsc_seed_deviation": _number(scores.seed_deviation),
        "dsc_noise_deviation": _number(scores.noise_deviation),
        "nsd_challenge": _number(scores.nsd_challenge),
        "iou": _number(scores.iou),
        "dsc_batch_pooled": _number(scores.batch_pooled.dsc),
        "iou_batch_pooled": _number(scores.batch_pooled.iou),
        "swapped_share": _number(scores.swapped_share),
        "parameters": scores.parameters,
        "training_seconds": None if math.isnan(scores.training_seconds) else scores.training_seconds,
        "classes": {name: _number(value) for name, value in scores.classes.items()},
        "swaps": {name: _number(value) for name, value in scores.swaps.items()},
        **_ends("dsc", scores.dsc),
        **_ends("nsd", scores.nsd),
    }
    if scores.difference is None:
        return entry
    p_value = scores.difference.p_value
    return (
        entry
        | _ends("difference", scores.difference.difference)
        | {"p_value": None if math.isnan(p_value) else p_value}
    )


def _ends(name: str, interval: Interval) -> dict[str, float | None]:
    """An interval in percent."""
    return {
        name: _number(interval.mean),
        f"{name}_low": _number(interval.low),
        f"{name}_high": _number(interval.high),
    }


def _number(value: float) -> float | None:
    """A share in percent; None where there is none."""
    return 100 * value if math.isfinite(value) else None
