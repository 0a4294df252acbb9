"""`automedsam study`: train and evaluate the rows of a table, and set them beside one another and a paper's figures.

All rows start from the same weights, see `scripts.study.starts`. Where AutoMedSAM's image encoder is frozen, all its
rows share one store of its answers. What is complete is not run again, as long as its settings, its data and its
starting weights are the same.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.errors import ConfigError
from scripts.metrics.summaries import PROTOCOLS
from scripts.report.study_tables import render_study, write_study
from scripts.study.plan import OWN_SETTINGS, PlannedRows, StudyPlan, decisive, read_overlays
from scripts.study.runs import run_row
from scripts.study.scores import StudyScores
from scripts.workflow import find_overlays

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyOutcome:
    """How a study ended.

    Attributes:
        text: the table.
        failures: name of a row -> why it failed.
    """

    text: str
    failures: Mapping[str, str]


def run_study(plan: StudyPlan) -> StudyOutcome:
    """Run what is not complete, and make the table of all that is.

    Returns:
        The table, which also stands in `table.txt`, `study.csv` and `study.json` of the output folder, and the rows
        that failed.

    Raises:
        ConfigError: an unknown row in `only`, an overlay that is not there, or a setting that the study itself decides.
    """
    _require_sense(plan)
    chosen = [row.name for row in plan.table.rows]
    if plan.only is not None:
        chosen = [plan.table.row(name).name for name in plan.only]
    planned = PlannedRows(plan)
    failures: dict[str, str] = {}
    for number, row in enumerate(plan.table.rows, start=1):
        if row.name in chosen and planned.reason_not_to_run(row) is None:
            logger.info("row %d of %d: %s", number, len(plan.table.rows), row.name)
            reason = run_row(planned, row)
            if reason is not None:
                failures[row.name] = reason
                logger.error("the row '%s' failed: %s", row.name, reason)
    scores = StudyScores(planned)
    rows = [scores.outcome(row, failures.get(row.name)) for row in plan.table.rows]
    caption = _caption(planned, sorted(scores.tolerances))
    text = render_study(rows, title=f"{plan.table.name}: {plan.table.title}", caption=caption)
    write_study(rows, plan.output, text=text, about={"table": plan.table.name, "caption": caption})
    return StudyOutcome(text, failures)


def _require_sense(plan: StudyPlan) -> None:
    """Refuse what no row could be run with."""
    taken = [name for name in plan.settings if name in OWN_SETTINGS]
    if taken:
        raise ConfigError(f"a study decides {', '.join(taken)} itself; see its options")
    if plan.presence not in PROTOCOLS or not plan.seeds:
        raise ConfigError(f"a study needs seeds and the presence 'all' or 'oracle', not '{plan.presence}'")
    if len(plan.datalists) > 1 and not plan.table.several_sets:
        raise ConfigError(f"{plan.table.name} is of one data set; give its datalist without --sets")
    of_rows = [read_overlays(find_overlays(row.overlays)) for row in plan.table.rows if row.missing is None]
    if "architecture" in read_overlays(plan.overlays):
        _require_one_network(plan, of_rows)


def _require_one_network(plan: StudyPlan, of_rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to make one network of rows whose overlays say that they are of several."""
    of_their_own = ["architecture" in overlays for overlays in of_rows]
    if any(of_their_own) and not all(of_their_own):
        raise ConfigError(
            f"--config makes one network of all rows, but {plan.table.name} compares several: leave it out, or give an "
            "overlay that chooses nothing but the image encoder, such as networks/lite_medsam.yaml"
        )


def _caption(planned: PlannedRows, tolerances: list[str]) -> list[str]:
    """State what the figures are of."""
    plan = planned.plan
    protocol = {
        "all": 'Protocol "all": every class was asked for on every slice.',
        "oracle": 'Protocol "oracle": a class was asked for only on the slices whose truth contains it.',
    }[plan.presence]
    paper = f" The paper: {plan.table.data}." if plan.table.data else ""
    sections = ", ".join(dict.fromkeys(planned.section(row) for row in plan.table.rows))
    shared = {**read_overlays(plan.overlays), **planned.common(), **plan.settings}
    said = ", ".join(f"{name} {value}" for name, value in decisive(shared).items() if _is_plain(name, value))
    return [
        f"Percent. Data: {', '.join(plan.datalists)}, section {sections}.{paper} {protocol}",
        "DSC and NSD: mean over a class's cases, a case's slices pooled, then unweighted over the classes, and "
        "over the seeds (± their standard deviation, where there are several). In brackets 95 % bootstrap "
        "intervals, patients resampled. DSC less reference: over the cases and classes that both have; p: "
        f"Wilcoxon's signed-rank test over patients. Reference: {plan.table.reference}.",
        f"NSD at {' and '.join(tolerances) or 'no tolerance yet'}. NSD challenge: as the MedSAM challenge's script "
        f"computes it. Parameters: that learn, in millions; minutes: of one training. All rows: "
        f"{said or 'the settings of configs/train.json'}.",
    ]


def _is_plain(name: str, value: Any) -> bool:
    """Say whether a setting can be read in a caption: not a part of a config."""
    return "#" not in name and not isinstance(value, Mapping)
