"""DSC and NSD of whole cases as a metric of Ignite, and the files an evaluation leaves."""

import logging
import time
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
from scripts.metrics.pooling import POOLED_BATCH, check_pooled_batch
from scripts.metrics.scores import DEFAULT_TOLERANCE, ClassScore, score_case, without_names
from scripts.metrics.statistics import RESAMPLES
from scripts.metrics.summaries import Summary, summarise_units
from scripts.report.attention_pictures import ATTENTION_FOLDER, attention_files
from scripts.report.error_pictures import PICTURES_FOLDER
from scripts.report.run_record import write_run_record
from scripts.report.tables import check_averaging, render_tables, write_scores_csv, write_summary_json

logger = logging.getLogger(__name__)

QUALITY_FILES = ("quality.csv", "calibration.json", "uncertainty.json")
"""What an evaluation leaves that judges its masks without the truth, see `scripts.engines.quality`."""


class CaseScores(Metric):
    """Score each case's masks against the truth, in the case's own pixels and spacing.

    Its value is the mean DSC. The mean NSD and each class's scores stand beside it in `engine.state.metrics`.

    Args:
        class_ids: of the channels of `pred` and `label`, ascending.
        vocabulary: their names.
        protocol: which questions were asked, `all` or `oracle`.
        tolerance: of NSD, in mm for volumes and in pixels for planar cases.
        pooled_batch: cases in a batch of the batch-pooled DSC and IoU.

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
        pooled_batch: int = POOLED_BATCH,
    ) -> None:
        check_pooled_batch(pooled_batch)
        self.class_ids = sorted(class_ids)
        entries = [vocabulary.entry(class_id) for class_id in self.class_ids]
        self.class_names = [entry.name for entry in entries]
        self.partners = [entry.partner for entry in entries]
        self.protocol = protocol
        self.tolerance = tolerance
        self.pooled_batch = pooled_batch
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
        classes = [entry.dsc for summary in self.summaries(resamples=0) for entry in summary.classes if entry.cases]
        return float(np.mean(classes)) if classes else float("nan")

    def completed(self, engine: Engine, name: str) -> None:
        """Put the mean DSC under its own name, and the other scores beside it."""
        super().completed(engine, name)
        summaries = self.summaries(resamples=0)
        stem = name.removesuffix("mean_dsc")
        for summary in summaries:
            # With volumes and pictures in one data set, NSD in mm and in pixels stay apart.
            place = stem if len(summaries) == 1 else f"{stem}{summary.unit}_"
            engine.state.metrics[f"{place}mean_nsd"] = summary.nsd
            for entry in summary.classes:
                of_class = f"{place}{entry.class_name.replace(' ', '_')}"
                engine.state.metrics[f"{of_class}_dsc"] = entry.dsc
                engine.state.metrics[f"{of_class}_nsd"] = entry.nsd

    def summaries(self, *, resamples: int = RESAMPLES) -> list[Summary]:
        """Average over the cases seen, volumes and planar cases apart.

        Args:
            resamples: draws of the intervals, seconds for a thousand cases; 0 leaves them out.
        """
        return summarise_units(self.scores, protocol=self.protocol, resamples=resamples, pooled_batch=self.pooled_batch)

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
            patient=case.get("patient"),
            partners=[self.partners[i] for i in annotated],
        )


class ReportScores:
    """Print an evaluation's tables, and write `metrics.csv` and `summary.json`.

    Args:
        scores: the metric that has the cases.
        output_dir: where the files go.
        averaging: of the DSC in the tables, `case`, `slice`, `dataset` or `batch-pooled`; `summary.json` has all.
    """

    def __init__(self, scores: CaseScores, *, output_dir: str | Path, averaging: str = "case") -> None:
        check_averaging(averaging)
        self.scores = scores
        self.output_dir = Path(output_dir)
        self.averaging = averaging

    def attach(self, engine: Engine) -> None:
        """Run at the end of the evaluation."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the files, and the tables into the log."""
        if idist.get_rank() != 0:
            return
        prepare_output_folder(self.output_dir)
        write_scores_csv(self.scores.scores, self.output_dir / "metrics.csv")
        summaries = self.scores.summaries()
        write_summary_json(summaries, self.output_dir / "summary.json")
        logger.info("\n%s", render_tables(summaries, averaging=self.averaging))


class ForgetEarlierRun:
    """Take away what an earlier evaluation left in the folder and not every one writes: pictures, attention, quality.

    They would pass for this evaluation's. All else takes the place of what was there when the evaluation ends. List it
    before what writes them, and after what may fail at the start.

    Args:
        output_dir: folder of the evaluation.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.folder = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Run at the start."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Remove the files, before any process can have written one."""
        if idist.get_rank() == 0:
            pictures = (self.folder / PICTURES_FOLDER).glob("*__*.png")
            attention = attention_files(self.folder / ATTENTION_FOLDER)
            for old in (*map(self.folder.joinpath, QUALITY_FILES), *pictures, *attention):
                old.unlink(missing_ok=True)
        idist.barrier()


class RecordRun:
    """Write `run.json`: with what command, versions, files and settings an evaluation was made, and what it took.

    Args:
        output_dir: where the file goes.
        files: paths of the files that the scores depend on, one or several under each name; their hashes are noted.
        settings: what was chosen, by name.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        files: Mapping[str, str | Sequence[str] | None],
        settings: Mapping[str, Any],
    ) -> None:
        self.path = Path(output_dir) / "run.json"
        self.files = files
        self.settings = settings
        self._start = time.monotonic()

    def attach(self, engine: Engine) -> None:
        """Take the time of the whole evaluation."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.COMPLETED, self)

    def start(self) -> None:
        """Begin to take the time."""
        self._start = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        """Write the file."""
        if idist.get_rank() != 0:
            return
        prepare_output_folder(self.path.parent)
        seconds = time.monotonic() - self._start
        failed = getattr(engine, "failures", {})
        write_run_record(self.path, files=self.files, settings=self.settings, seconds=seconds, failed=failed)


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
    return without_names(sorted(merged, key=lambda score: (score.case, score.class_id)))
