"""The course of a training run: each loss, each learned weight, the learning rate and the validation scores."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from scripts.report.html.charts import curve_chart
from scripts.report.html.drawing import SERIES, Drawing
from scripts.report.html.runs import Run

Values = npt.NDArray[np.float64]

_COUNTERS = ("epoch", "iteration")
_WEIGHT = "lambda_"
_WORDS = {"val": "validation", "train": "training", "dsc": "DSC", "nsd": "NSD", "mse": "MSE"}
_LOSS_COLOUR, _WEIGHT_COLOUR, _EPOCH_COLOUR = SERIES[:3]


def course_charts(run: Run, *, prefix: str) -> list[Drawing]:
    """Draw a chart for each column of losses.csv, and for those of epochs.csv that losses.csv does not have.

    Args:
        run: a run; one without these files has no charts.
        prefix: of the charts' names.

    Returns:
        Losses by iteration, then weights by iteration, then the others by epoch.
    """
    by_iteration = _ordered(run.losses)
    means = {f"train_{name}" for name in by_iteration}
    by_epoch = [name for name in _ordered(run.epochs) if name not in means]
    charts = [_chart(run.losses, name, "iteration", prefix=prefix) for name in by_iteration]
    return charts + [_chart(run.epochs, name, "epoch", prefix=prefix) for name in by_epoch]


def _ordered(columns: Mapping[str, Values]) -> list[str]:
    """Put the weights behind the losses; columns without any value are left out."""
    known = [name for name in columns if name not in _COUNTERS and np.isfinite(columns[name]).any()]
    return sorted(known, key=lambda name: name.startswith(_WEIGHT))


def _chart(columns: Mapping[str, Values], name: str, counter: str, *, prefix: str) -> Drawing:
    weight = name.startswith(_WEIGHT)
    colour = _EPOCH_COLOUR if counter == "epoch" else _WEIGHT_COLOUR if weight else _LOSS_COLOUR
    words = _title(name.removeprefix(_WEIGHT))
    return curve_chart(
        columns[counter],
        columns[name],
        name=f"{prefix}_{name}",
        title=f"weight (lambda) of {words}" if weight else words,
        axis_title=counter,
        colour=colour,
    )


def _title(name: str) -> str:
    """Write a column's name as words."""
    return " ".join(_WORDS.get(word, word) for word in name.split("_"))
