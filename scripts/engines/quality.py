"""What the masks' quality is without a truth, and how well that agrees with the truth where there is one."""

import csv
import io
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Transform
from monai.utils import convert_to_numpy, convert_to_tensor

from scripts.data.vocabulary import Vocabulary
from scripts.data.writing import prepare_output_folder
from scripts.engines.answers import SliceQuality
from scripts.engines.processes import gathered
from scripts.engines.scoring import CaseScores
from scripts.errors import ConfigError
from scripts.files import atomic_path
from scripts.metrics.calibration import (
    Agreement,
    Bins,
    compare_predicted,
    dice_between_samples,
    dice_by_head,
    dice_by_probability,
)

PREDICTORS = ("predicted_by_head", "predicted_by_samples", "predicted_by_probabilities")
LARGEST_SPREAD = 0.5  # standard deviation of probabilities of which half are 0 and half are 1


@dataclass(frozen=True)
class CaseQuality:
    """What is known of one case's quality.

    Attributes:
        case: its name.
        predicted: class id -> predicted DSC by each of `PREDICTORS`, NaN where there is none.
        voxels: probabilities with the truth, of all voxels and annotated classes.
        spread: uncertainties with the errors, likewise; None of a single sample.
    """

    case: str
    predicted: dict[int, dict[str, float]]
    voxels: Bins
    spread: Bins | None


@dataclass
class _Together:
    """The bins of all cases in one."""

    voxels: Bins = field(default_factory=Bins)
    spread: Bins | None = None


class KeepLogits(Transform):
    """Keep the logits under `logits`, before masks take their place under `pred`; nothing is copied."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with both."""
        return {**data, "logits": data["pred"]}


def predict_dsc(quality: SliceQuality, channel: int, *, head: bool) -> dict[str, float]:
    """Predict the DSC of one class of a case, by the decoder's head and by the agreement of samples.

    Args:
        quality: of the case.
        channel: of the class.
        head: whether the head has been trained; one that has not predicts nothing.

    Returns:
        `predicted_by_head` and `predicted_by_samples`, 0 to 1; NaN where there is no such prediction.
    """
    iou, area = (convert_to_numpy(part[:, channel]) for part in (quality.iou, quality.area))
    shared = convert_to_numpy(quality.overlaps[:, channel].sum(dim=0))  # (D, S, S) -> (S, S)
    return {
        "predicted_by_head": dice_by_head(iou, area) if head else math.nan,
        "predicted_by_samples": dice_between_samples(shared),
    }


class ReportQuality:
    """Predict the DSC of each case and class without the truth, and compare it with the true one.

    Writes `quality.csv` (a row a case and class), `calibration.json` (how well the predicted DSC and the voxels'
    probabilities agree with the truth) and, of several samples, `uncertainty.json` (the share of wrong voxels by
    uncertainty). Needs an inferer with `quality` and the transform `KeepLogits`.

    Args:
        scores: the metric that has the true scores.
        output_dir: where the files go.
        head: whether the decoder's quality head has been trained, see the loss `iou`.
    """

    def __init__(self, scores: CaseScores, *, output_dir: str | Path, head: bool = False) -> None:
        self.scores = scores
        self.output_dir = Path(output_dir)
        self.head = head
        self.cases: list[CaseQuality] = []

    def attach(self, engine: Engine) -> None:
        """Look at each case, and write at the end."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.look)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget all cases."""
        self.cases = []

    def look(self, engine: Engine) -> None:
        """Take down the cases of an iteration, unless they failed.

        Raises:
            ConfigError: the inferer was not asked for the quality.
        """
        state: Any = engine.state
        for case, output in zip(state.batch, state.output, strict=True) if state.output else ():
            if "quality" not in output or "logits" not in output:
                raise ConfigError("expected answers with their quality and logits; set quality of the inferer to true")
            self.cases.append(self._judge(case, output))

    def write(self, engine: Engine) -> None:
        """Write the files, of all processes' cases together."""
        parts = gathered(self.cases)
        # A case that a second process had too, to fill up its share, counts once.
        cases = {case.case: case for part in parts for case in part}
        if idist.get_rank() != 0:
            return
        folder = prepare_output_folder(self.output_dir)
        rows = self._rows(cases)
        _write_table(rows, folder / "quality.csv")
        together = _merged(list(cases.values()))
        _write_json(_calibration(rows, together.voxels), folder / "calibration.json")
        if together.spread is not None:
            _write_json({"bins": _error_rows(together.spread)}, folder / "uncertainty.json")

    def _judge(self, case: Mapping[str, Any], output: Mapping[str, Any]) -> CaseQuality:
        """Look at one case: logits, masks and truth `(K, H, W, D)`."""
        judged = CaseQuality(
            case["case"], {}, Bins(), Bins(high=LARGEST_SPREAD) if output.get("uncertainty") is not None else None
        )
        for channel, class_id in enumerate(self.scores.class_ids):
            if class_id in case["annotated"]:
                predicted = predict_dsc(output["quality"], channel, head=self.head)
                predicted["predicted_by_probabilities"] = _count_voxels(case, output, channel, judged)
                judged.predicted[class_id] = predicted
        return judged

    def _rows(self, cases: Mapping[str, CaseQuality]) -> list[dict[str, Any]]:
        """Set true and predicted DSC side by side, in the order of the scores."""
        return [
            {
                "case": score.case,
                "class": score.class_name,
                "dsc": score.dsc,
                **cases[score.case].predicted[score.class_id],
                "class_id": score.class_id,
                "predicted_voxels": score.predicted_voxels,
            }
            for score in self.scores.scores
        ]


class SaveQuality(Transform):
    """Write `<case>_quality.json`: each class's predicted DSC.

    Args:
        vocabulary: names of the classes.
        output_dir: where the file goes.
        samples: draws of the noise.
        head: whether the decoder's quality head has been trained, as the model card says.

    Raises:
        ConfigError: there is nothing to predict from: one sample, and a head that never learned.
    """

    def __init__(self, vocabulary: Vocabulary, *, output_dir: str | Path, samples: int = 1, head: bool = False) -> None:
        if samples < 2 and not head:
            raise ConfigError(
                "quality needs several samples, or weights whose quality head was trained (the loss 'iou'): "
                "set samples to 2 or more, or leave quality out"
            )
        self.vocabulary = vocabulary
        self.output_dir = output_dir
        self.head = head

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the file; `data` passes unchanged."""
        classes = {}
        for channel, class_id in enumerate(data["class_ids"]):
            predicted = predict_dsc(data["quality"], channel, head=self.head)
            voxels = int(data["quality"].area[:, channel].sum())
            named = {name: _null(value) for name, value in predicted.items()}
            classes[self.vocabulary.entry(class_id).name] = {**named, "predicted_voxels": voxels}
        folder = prepare_output_folder(self.output_dir)
        _write_json({"case": data["case"], "classes": classes}, folder / f"{data['case']}_quality.json")
        return dict(data)


def _count_voxels(case: Mapping[str, Any], output: Mapping[str, Any], channel: int, judged: CaseQuality) -> float:
    """Count a class's voxels into the bins, slice by slice, and give the DSC that its probabilities predict."""
    certain, area, mass = 0.0, 0, 0.0
    for place in range(output["logits"].shape[-1]):

        def slice_of(volumes: Any, place: int = place) -> torch.Tensor:
            return convert_to_tensor(volumes, track_meta=False)[channel, ..., place].cpu()  # (H, W)

        probability = torch.sigmoid(slice_of(output["logits"]).float()).numpy()
        predicted, true = slice_of(output["pred"]).bool().numpy(), slice_of(case["label"]).bool().numpy()
        judged.voxels.add(probability, true)
        if judged.spread is not None:
            judged.spread.add(slice_of(output["uncertainty"]).float().numpy(), predicted != true)
        certain += float(probability[predicted].sum(dtype=np.float64))
        area += int(predicted.sum())
        mass += float(probability.sum(dtype=np.float64))
    return dice_by_probability(certain, area, mass)


def _merged(cases: Sequence[CaseQuality]) -> _Together:
    """Add up the bins of all cases."""
    together = _Together()
    for case in cases:
        together.voxels.merge(case.voxels)
        if case.spread is not None:
            together.spread = together.spread or Bins(high=LARGEST_SPREAD)
            together.spread.merge(case.spread)
    return together


def _calibration(rows: Sequence[Mapping[str, Any]], voxels: Bins) -> dict[str, Any]:
    """Say how well each predictor and the probabilities agree with the truth."""
    true = np.array([row["dsc"] for row in rows], dtype=float)
    content: dict[str, Any] = {}
    for name in PREDICTORS:
        agreement = compare_predicted(np.array([row[name] for row in rows], dtype=float), true)
        content[name] = _agreement_json(agreement) if agreement.pairs else None
    return content | {"voxels": {"calibration_error": _null(voxels.calibration_error()), "bins": voxels.rows()}}


def _agreement_json(agreement: Agreement) -> dict[str, Any]:
    return {
        "pairs": agreement.pairs,
        "calibration_error": _null(agreement.calibration_error),
        "absolute_error": _null(agreement.absolute_error),
        "bias": _null(agreement.bias),
        "spearman": _null(agreement.spearman),
        "bins": agreement.bins.rows(),
    }


def _error_rows(spread: Bins) -> list[dict[str, Any]]:
    """Give each bin of uncertainty with its share of wrong voxels."""
    return [
        {"low": row["low"], "high": row["high"], "error_rate": row["outcome"], "voxels": row["count"]}
        for row in spread.rows()
    ]


def _null(value: float) -> float | None:
    """NaN, which JSON does not know, as None."""
    return None if math.isnan(value) else value


def _write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows in full precision, NaN as an empty cell."""
    head = ("case", "class", "dsc", *PREDICTORS, "class_id", "predicted_voxels")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=head, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value != value else value for name, value in row.items()})
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
