"""DSC and NSD of whole cases as a metric of Ignite, and the files an evaluation leaves."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.data.utils import affine_to_spacing
from monai.utils import convert_to_numpy

from scripts.data.vocabulary import Vocabulary
from scripts.data.writing import prepare_output_folder
from scripts.engines.processes import gathered
from scripts.metrics.scores import DEFAULT_TOLERANCE, ClassScore, Summary, score_case, summarise
from scripts.report.tables import render_table, write_scores_csv, write_summary_json

logger = logging.getLogger(__name__)


class CaseScores(Metric):
    """Score each case's masks against the truth, in the case's own pixels and spacing.

    Its value is the mean DSC. The mean NSD and each class's scores stand beside it in `engine.state.metrics`.

    Args:
        class_ids: of the channels of `pred` and `label`, ascending.
        vocabulary: their names.
        protocol: which questions were asked, `all` or `oracle`.
        tolerance: of NSD, in mm for volumes and in pixels for planar cases.

    Attributes:
        scores: one for each case and annotated class.
    """

    def __init__(
        self,
        *,
        class_ids: Sequence[int],
        vocabulary: Vocabulary,
        protocol: str = "all",
        tolerance: float = DEFAULT_TOLERANCE,
    ) -> None:
        self.class_ids = sorted(class_ids)
        self.class_names = [vocabulary.entry(class_id).name for class_id in self.class_ids]
        self.protocol = protocol
        self.tolerance = tolerance
        self.scores: list[ClassScore] = []
        super().__init__(skip_unrolling=True)

    def reset(self) -> None:
        """Forget all cases."""
        self.scores = []

    def iteration_completed(self, engine: Engine) -> None:
        """Score the cases of an iteration, unless they failed."""
        state: Any = engine.state
        if state.output:
            self.update(
                [{**case, "pred": output["pred"]} for case, output in zip(state.batch, state.output, strict=True)]
            )

    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Score cases: `pred` and `label` (K, H, W, D), 0 or 1, with the `image`'s geometry and the `annotated` ids."""
        for case in output:
            self.scores += self._score(case)

    def compute(self) -> float:
        """Give the mean DSC over the classes, of all processes' cases together."""
        self.scores = _merged(gathered(self.scores))
        classes = [entry.dsc for summary in self.summaries() for entry in summary.classes if entry.cases]
        return float(np.mean(classes)) if classes else float("nan")

    def completed(self, engine: Engine, name: str) -> None:
        """Put the mean DSC under its own name, and the other scores beside it."""
        super().completed(engine, name)
        summaries = self.summaries()
        stem = name.removesuffix("mean_dsc")
        for summary in summaries:
            # With volumes and pictures in one data set, NSD in mm and in pixels stay apart.
            place = stem if len(summaries) == 1 else f"{stem}{summary.unit}_"
            engine.state.metrics[f"{place}mean_nsd"] = summary.nsd
            for entry in summary.classes:
                engine.state.metrics[f"{place}{entry.class_name.replace(' ', '_')}_dsc"] = entry.dsc

    def summaries(self) -> list[Summary]:
        """Average over the cases seen, volumes and planar cases apart."""
        units = sorted({score.unit for score in self.scores}) or ["mm"]
        return [
            summarise([score for score in self.scores if score.unit == unit], protocol=self.protocol, unit=unit)
            for unit in units
        ]

    def summary(self) -> Summary:
        """Average over the cases seen, which must be all volumes or all planar."""
        return summarise(self.scores, protocol=self.protocol, unit=self.scores[0].unit if self.scores else "mm")

    def _score(self, case: Mapping[str, Any]) -> list[ClassScore]:
        """Score one case, in the classes that its annotation tells about."""
        annotated = [i for i, class_id in enumerate(self.class_ids) if class_id in case["annotated"]]
        image = case["image"]
        return score_case(
            _as_masks(case["pred"][annotated]),
            _as_masks(case["label"][annotated]),
            case=case["case"],
            class_ids=[self.class_ids[i] for i in annotated],
            class_names=[self.class_names[i] for i in annotated],
            spacing=affine_to_spacing(np.asarray(image.affine, dtype=float)).tolist(),
            planar=bool(image.meta["planar"]),
            tolerance=self.tolerance,
        )


class ReportScores:
    """Print an evaluation's table, and write `metrics.csv` and `metrics.json`.

    Args:
        scores: the metric that has the cases.
        output_dir: where the files go.
    """

    def __init__(self, scores: CaseScores, *, output_dir: str | Path) -> None:
        self.scores = scores
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Run at the end of the evaluation."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the files, and the table into the log."""
        if idist.get_rank() != 0:
            return
        prepare_output_folder(self.output_dir)
        write_scores_csv(self.scores.scores, self.output_dir / "metrics.csv")
        summary = self.scores.summary()
        write_summary_json(summary, self.output_dir / "metrics.json")
        logger.info("\n%s", render_table(summary))


def _as_masks(channels: torch.Tensor) -> np.ndarray:
    return convert_to_numpy(channels).astype(bool)


def _merged(parts: Sequence[Sequence[ClassScore]]) -> list[ClassScore]:
    """Order the scores of all processes by case and class, so that the number of processes does not show.

    A case that a second process had too, to fill up its share, counts once.
    """
    merged: list[ClassScore] = []
    for part in parts:
        known = {score.case for score in merged}
        merged += [score for score in part if score.case not in known]
    return sorted(merged, key=lambda score: (score.case, score.class_id))
