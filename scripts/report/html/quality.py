"""What a run says about its own certainty: predicted against true DSC, truth by probability, error by uncertainty."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.errors import InputError
from scripts.metrics.calibration import compare_predicted
from scripts.report.html.charts import agreement_chart, bin_chart
from scripts.report.html.drawing import Drawing
from scripts.report.html.elements import number, paragraph, share_text, signed, table
from scripts.report.html.runs import Run

Values = npt.NDArray[np.float64]

_PREDICTORS = {
    "predicted_by_head": "DSC predicted by the quality head",
    "predicted_by_samples": "DSC predicted by the agreement of samples",
    "predicted_by_probabilities": "DSC predicted by the probabilities",
}


@dataclass(frozen=True)
class _Binned:
    """Bins of voxels: their edges `(n + 1,)`, the rate in each, NaN in an empty one, and the counts `(n,)`."""

    edges: Values
    rates: Values
    counts: Values


def quality_parts(run: Run, *, prefix: str) -> list[str | Drawing]:
    """Give HTML and charts of quality.csv, calibration.json and uncertainty.json; nothing of a run that has none.

    Args:
        run: what was read of it.
        prefix: of the charts' names.

    Raises:
        InputError: one of the files lacks what it should hold.
    """
    parts: list[str | Drawing] = []
    for column, title in _PREDICTORS.items():
        parts += _predictor_parts(run, column, title, prefix)
    if run.calibration:
        bins = run.calibration.get("voxels", {}).get("bins")
        binned = _binned(bins, rate="outcome", count="count", path=run.folder / "calibration.json")
        parts += _voxel_parts(
            binned,
            name=f"{prefix}_calibration",
            title="Truth by probability",
            words=("predicted probability", "share of voxels in the class"),
            caption="Of voxels with a probability of about p, a share of about p should be in the class.",
        )
    if run.uncertainty:
        bins = run.uncertainty.get("bins")
        binned = _binned(bins, rate="error_rate", count="voxels", path=run.folder / "uncertainty.json")
        parts += _voxel_parts(
            binned,
            name=f"{prefix}_uncertainty",
            title="Error by uncertainty",
            words=("standard deviation of the samples' probabilities", "share of wrong voxels"),
            caption="Where the samples of the noise differ more, more voxels should be wrong.",
        )
    return parts


def _predictor_parts(run: Run, column: str, title: str, prefix: str) -> list[str | Drawing]:
    """Draw predicted against true DSC, and say how far they are apart; nothing where there is no pair."""
    predicted, true = _pairs(run, column)
    if not len(true):
        return []
    found = compare_predicted(predicted, true)
    name, x_title, y_title = f"{prefix}_{column}", "predicted DSC", "true DSC"
    text = (
        f"{title}: {found.pairs} cases and classes, expected calibration error {number(found.calibration_error, 4)}, "
        f"mean absolute error {number(found.absolute_error, 4)}, predicted less true {signed(found.bias, 4)} on "
        f"average, Spearman's rank correlation {number(found.spearman, 2)}."
    )
    return [
        agreement_chart(predicted, true, name=name, title=title, x_title=x_title, y_title=y_title),
        paragraph(text),
    ]


def _pairs(run: Run, column: str) -> tuple[Values, Values]:
    """Give predicted and true DSC, `(n,)` each, of the rows that have both."""
    cells = [(row.get(column, ""), row["dsc"]) for row in run.quality]
    try:
        values = np.array([[float(predicted or "nan"), float(true or "nan")] for predicted, true in cells])
    except ValueError as error:
        raise InputError(
            f"expected numbers as dsc and {column} in {run.folder / 'quality.csv'}, got: {error}; evaluate again"
        ) from error
    values = values.reshape(-1, 2)
    known = np.isfinite(values).all(axis=1)
    return values[known, 0], values[known, 1]


def _binned(bins: Any, *, rate: str, count: str, path: Path) -> _Binned:
    """Read bins that lie one after the other.

    Raises:
        InputError: there are none, or one lacks an entry.
    """
    keys = ("low", "high", rate, count)
    if not bins or not all(isinstance(entry, Mapping) and all(key in entry for key in keys) for entry in bins):
        raise InputError(
            f"expected bins with {', '.join(keys)} in {path}, got others; evaluate again with this version"
        )
    return _Binned(
        edges=np.array([bins[0]["low"], *(entry["high"] for entry in bins)], dtype=float),
        rates=np.array([math.nan if entry[rate] is None else float(entry[rate]) for entry in bins]),
        counts=np.array([entry[count] for entry in bins], dtype=float),
    )


def _voxel_parts(
    binned: _Binned, *, name: str, title: str, words: tuple[str, str], caption: str
) -> list[str | Drawing]:
    """Draw bins of voxels and list them; `words` say what the bins divide, and what the rate is of."""
    x_title, y_title = words
    ends = zip(binned.edges[:-1], binned.edges[1:], binned.rates, binned.counts, strict=True)
    rows = [[f"{low:.4g} to {high:.4g}", f"{count:.0f}", share_text(rate)] for low, high, rate, count in ends]
    return [
        bin_chart(binned.edges, binned.rates, binned.counts, name=name, title=title, x_title=x_title, y_title=y_title),
        table(caption, [x_title, "voxels", f"{y_title} %"], rows),
    ]
