"""What the complete runs of a study's rows have come to, over seeds, cases and classes."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scripts.errors import InputError
from scripts.metrics.pooling import BatchPooled, pool_batches
from scripts.metrics.scores import ClassScore
from scripts.metrics.statistics import Values, class_intervals, compare_runs
from scripts.networks.model_card import ModelCard
from scripts.report.study_tables import RowOutcome, Scores, mean_swaps
from scripts.report.tables import read_scores_csv
from scripts.study.completion import MARKER, is_complete, read_marker
from scripts.study.plan import PlannedRows
from scripts.study.rows import StudyRow
from scripts.study.runs import trainable_parameters


class StudyScores:
    """The figures of a study's rows.

    Args:
        rows: of the study.

    Attributes:
        tolerances: of the NSD, of all rows that were scored.
    """

    def __init__(self, rows: PlannedRows) -> None:
        self.rows = rows
        self.plan = rows.plan
        self.tolerances: set[str] = set()

    def outcome(self, row: StudyRow, failure: str | None) -> RowOutcome:
        """Collect what a row has come to, in this run or before."""
        reason = self.rows.reason_not_to_run(row)
        scores = None if reason is not None else self._scores(row)
        note = "" if scores is not None else reason or "not run"
        reference = self.rows.reference(row)
        return RowOutcome(
            name=row.name,
            scores=scores,
            note=f"failed: {failure}" if failure is not None else note,
            paper=row.paper,
            comparable=row.comparable,
            reference=None if reference is None else reference.name,
        )

    def _scores(self, row: StudyRow) -> Scores | None:
        """Score a row over the seeds that are complete; None where none is."""
        tables = self._tables(row)
        if not tables:
            return None
        dsc, nsd = (_mean_table(tables, measure) for measure in ("dsc", "nsd"))
        order = _patients(tables[0], dsc.cases)
        self.tolerances |= {f"{score.tolerance:g} {score.unit}" for score in tables[0]}
        each, mean = class_intervals(dsc.values, patients=order)
        _, surface = class_intervals(nsd.values, patients=order)
        scores = Scores(
            seeds=len(tables),
            dsc=mean,
            nsd=surface,
            nsd_challenge=_mean_of_classes(_mean_table(tables, "nsd_challenge").values),
            iou=_mean_of_classes(_mean_table(tables, "iou").values),
            batch_pooled=_mean_pooled(tables),
            classes={name: entry.mean for name, entry in zip(dsc.classes, each, strict=True)},
            seed_deviation=_deviation([_mean_of_classes(_table(scores, "dsc").values) for scores in tables]),
            noise_deviation=self._noise_deviation(row),
            training_seconds=self._training_seconds(row),
            parameters=self._parameters(row),
            swaps=mean_swaps(tables),
        )
        reference = self.rows.reference(row)
        return scores if reference is None else self._compared(scores, dsc, reference, order)

    def _compared(self, scores: Scores, dsc: "_ScoreTable", reference: StudyRow, patients: Sequence[str]) -> Scores:
        """Add the difference to the reference, over the cases and classes that both have."""
        tables = self._tables(reference)
        if not tables:
            return scores
        other = _mean_table(tables, "dsc")
        shared = [name for name in dsc.classes if name in other.classes]
        if other.cases != dsc.cases or not shared:
            return scores
        _, difference = compare_runs(other.of(shared), dsc.of(shared), patients=patients)
        return replace(scores, difference=difference)

    def _tables(self, row: StudyRow) -> list[list[ClassScore]]:
        """Read the complete evaluations of a row without noise, one for each seed."""
        found = [self._read(row, seed, None) for seed in self.plan.seeds]
        return [scores for scores in found if scores is not None]

    def _read(self, row: StudyRow, seed: int, noise_seed: int | None) -> list[ClassScore] | None:
        """Read an evaluation, if it is complete and of these settings."""
        folder = self.rows.evaluation_folder(row, seed, noise_seed)
        if self.rows.reason_not_to_run(row) is not None or not (folder / MARKER).is_file():
            return None
        if not is_complete(folder, self.rows.evaluation_fingerprint(row, seed, noise_seed)):
            return None
        return read_scores_csv(folder / "metrics.csv")

    def _training_seconds(self, row: StudyRow) -> float:
        """Give how long a training took, on average over the seeds that are complete; NaN where none was needed."""
        if row.weights is not None:
            return math.nan
        read = [read_marker(self.rows.training_folder(row, seed)).get("seconds") for seed in self.plan.seeds]
        known = [float(seconds) for seconds in read if seconds is not None]
        return statistics.fmean(known) if known else math.nan

    def _parameters(self, row: StudyRow) -> int | None:
        """Give how many parameters a training taught, the same with every seed; None where there was no training."""
        if row.weights is not None:
            return None
        for folder in (self.rows.training_folder(row, seed) for seed in self.plan.seeds):
            marker = read_marker(folder)
            if marker:  # runs of before this figure was written down have it in their card all the same
                return int(marker.get("parameters") or trainable_parameters(ModelCard.beside(folder / "model.pt")))
        return None

    def _noise_deviation(self, row: StudyRow) -> float:
        """Give the deviation over draws of noise with the same weights, root mean square over the trainings."""
        deviations = []
        for seed in self.plan.seeds:
            drawn = [self._read(row, seed, noise_seed) for noise_seed in self.plan.noise_seeds]
            means = [_mean_of_classes(_table(scores, "dsc").values) for scores in drawn if scores is not None]
            deviations.append(_deviation(means))
        known = [value**2 for value in deviations if not math.isnan(value)]
        return math.sqrt(statistics.fmean(known)) if known else math.nan


@dataclass(frozen=True)
class _ScoreTable:
    """One measure of one evaluation, or its mean over several.

    Attributes:
        cases: names, sorted.
        classes: names, in the order of their ids.
        values: `(cases, K)`, NaN where a case lacks a class.
    """

    cases: list[str]
    classes: list[str]
    values: Values

    def of(self, classes: Sequence[str]) -> Values:
        """Give some classes' columns."""
        return self.values[:, [self.classes.index(name) for name in classes]]


def _table(scores: Sequence[ClassScore], measure: str) -> _ScoreTable:
    """Lay an evaluation's scores out by case and class."""
    cases = sorted({score.case for score in scores})
    names = {score.class_id: score.class_name for score in sorted(scores, key=lambda score: score.class_id)}
    classes = list(names.values())
    values = np.full((len(cases), len(classes)), np.nan)
    for score in scores:
        values[cases.index(score.case), classes.index(score.class_name)] = getattr(score, measure, math.nan)
    return _ScoreTable(cases, classes, values)


def _patients(scores: Sequence[ClassScore], cases: Sequence[str]) -> list[str]:
    """Give the patient of each case."""
    known = {score.case: score.patient for score in scores}
    return [known[case] for case in cases]


def _mean_table(evaluations: Sequence[Sequence[ClassScore]], measure: str) -> _ScoreTable:
    """Average over evaluations of the same cases and classes."""
    tables = [_table(scores, measure) for scores in evaluations]
    if any((table.cases, table.classes) != (tables[0].cases, tables[0].classes) for table in tables):
        raise InputError("the seeds of a row were evaluated on different cases; remove its folder and run it again")
    return replace(tables[0], values=np.mean([table.values for table in tables], axis=0))


def _mean_of_classes(values: Values) -> float:
    """Average over cases, then over the classes that occur; NaN where none does."""
    known = [column[~np.isnan(column)] for column in values.T]
    means = [column.mean() for column in known if column.size]
    return float(np.mean(means)) if means else math.nan


def _mean_pooled(evaluations: Sequence[Sequence[ClassScore]]) -> BatchPooled:
    """Average the batch-pooled scores over evaluations."""
    pooled = [pool_batches(scores)[1] for scores in evaluations]
    return BatchPooled(
        dsc=statistics.fmean(entry.dsc for entry in pooled), iou=statistics.fmean(entry.iou for entry in pooled)
    )


def _deviation(values: Sequence[float]) -> float:
    """Give the standard deviation; NaN of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan
