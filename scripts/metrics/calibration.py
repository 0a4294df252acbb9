"""Whether what a network says of its own certainty is true: binned means, calibration error, rank correlation.

A prediction is calibrated where, of all that it gave about the value v, the outcome is v on average. The expected
calibration error is the mean over bins of the distance between the two, each bin weighted by its count (Naeini et al.,
Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015, https://doi.org/10.1609/aaai.v29i1.9602).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.errors import InputError

Values = npt.NDArray[np.floating[Any]]
BINS = 10


@dataclass(frozen=True)
class Bins:
    """Bins of equal width, into which values and their outcomes are counted little by little.

    The lower end of a bin belongs to it, and of the last one the upper end too.

    Attributes:
        low: lower end of the first bin.
        high: upper end of the last bin.
        count: number of bins.
        sums: of each bin the number of values, their sum and the sum of their outcomes, `(count, 3)`.
    """

    low: float = 0.0
    high: float = 1.0
    count: int = BINS
    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))

    def __post_init__(self) -> None:
        if not len(self.sums):
            object.__setattr__(self, "sums", np.zeros((self.count, 3)))

    def add(self, values: Values, outcomes: npt.NDArray[Any]) -> None:
        """Count values with their outcomes.

        Args:
            values: of any shape, from `low` to `high`.
            outcomes: of the same shape: what came true, such as 0 or 1, or a measured score.

        Raises:
            InputError: other shapes, or a value that is not within the bins.
        """
        if values.shape != outcomes.shape:
            raise InputError(f"expected an outcome for each value, got the shapes {values.shape} and {outcomes.shape}")
        flat = values.astype(np.float64).ravel()
        if flat.size and not (flat.min() >= self.low and flat.max() <= self.high):  # NaN is not within them either
            raise InputError(
                f"expected values from {self.low:g} to {self.high:g}, got {flat.min():g} to {flat.max():g}; "
                "use bins over all of them"
            )
        scaled = (flat - self.low) * (self.count / (self.high - self.low))
        places = np.minimum(scaled.astype(np.intp), self.count - 1)
        for column, weights in enumerate((None, flat, outcomes.astype(np.float64).ravel())):
            self.sums[:, column] += np.bincount(places, weights=weights, minlength=self.count)

    def merge(self, other: "Bins") -> None:
        """Add what other bins have counted.

        Raises:
            InputError: they are other bins.
        """
        if (self.low, self.high, self.count) != (other.low, other.high, other.count):
            raise InputError("expected bins of the same ends and number, got others; count both alike")
        self.sums[:] += other.sums

    def calibration_error(self) -> float:
        """Give the expected calibration error, 0 to `high - low`; NaN where nothing was counted."""
        total = self.sums[:, 0].sum()
        return float(np.abs(self.sums[:, 1] - self.sums[:, 2]).sum() / total) if total else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """Give each bin's `low`, `high`, `count`, `mean` of the values and `outcome`; None for means of nothing."""
        edges = np.linspace(self.low, self.high, self.count + 1).tolist()
        rows = []
        for place, (number, values, outcomes) in enumerate(self.sums.tolist()):
            row: dict[str, Any] = {"low": edges[place], "high": edges[place + 1], "count": int(number)}
            row |= {"mean": values / number if number else None, "outcome": outcomes / number if number else None}
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Agreement:
    """How well predicted scores agree with the true ones.

    Attributes:
        pairs: number of predictions whose true score is known.
        calibration_error: expected calibration error, 0 to 1; NaN where there is no pair.
        absolute_error: mean distance between predicted and true score, 0 to 1; likewise.
        bias: mean of predicted less true score, -1 to 1; likewise.
        spearman: rank correlation, -1 to 1; NaN of fewer than two pairs or where one side is constant.
        bins: in which the calibration error was taken.
    """

    pairs: int
    calibration_error: float
    absolute_error: float
    bias: float
    spearman: float
    bins: Bins


def compare_predicted(predicted: Values, true: Values, *, bins: int = BINS) -> Agreement:
    """Compare predicted scores with true ones; a pair with a NaN takes no part.

    Args:
        predicted: `(N,)`, 0 to 1.
        true: `(N,)`, 0 to 1.
        bins: number of bins of equal width from 0 to 1, by the predicted score.

    Raises:
        InputError: other shapes, or a predicted score that is not within 0 and 1.
    """
    if predicted.shape != true.shape:
        raise InputError(f"expected a true score for each prediction, got the shapes {predicted.shape}, {true.shape}")
    known = ~(np.isnan(predicted) | np.isnan(true))
    first, second = predicted[known], true[known]
    counted = Bins(count=bins)
    counted.add(first, second)
    difference = first - second
    return Agreement(
        pairs=len(first),
        calibration_error=counted.calibration_error(),
        absolute_error=float(np.abs(difference).mean()) if len(first) else math.nan,
        bias=float(difference.mean()) if len(first) else math.nan,
        spearman=rank_correlation(first, second),
        bins=counted,
    )


def rank_correlation(first: Values, second: Values) -> float:
    """Give Spearman's rank correlation of `(N,)` and `(N,)`; NaN of fewer than two pairs or a constant side."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    from scipy.stats import spearmanr  # half a second that only a comparison should wait for

    return float(spearmanr(first, second).statistic)


def dice_of_iou(iou: Values) -> Values:
    """Give the Dice coefficient of masks of this intersection over union: 2 IoU / (1 + IoU)."""
    return 2 * iou / (1 + iou)


def dice_by_head(iou: Values, area: npt.NDArray[Any]) -> float:
    """Predict the DSC of a case from estimates of its slices.

    The slices' DSC, each weighted by the predicted pixels. What was missed in slices without a prediction is not seen.

    Args:
        iou: estimated intersection over union `(D,)`; beyond 0 and 1 it counts as these, and where the area is 0 it
            may be NaN.
        area: predicted pixels `(D,)`.

    Returns:
        0 to 1; NaN where nothing was predicted.
    """
    drawn = area > 0
    if not drawn.any():
        return math.nan
    return float(np.average(dice_of_iou(np.clip(iou[drawn], 0, 1)), weights=area[drawn]))


def dice_between_samples(overlaps: npt.NDArray[Any]) -> float:
    """Predict the DSC of a case from the agreement of several samples: the mean Dice of each two of them.

    Roy et al., Inherent Brain Segmentation Quality Control from Fully ConvNet Monte Carlo Sampling, MICCAI 2018,
    https://arxiv.org/abs/1804.07046, there over all classes together.

    Args:
        overlaps: voxels that each two of the S masks share `(S, S)`, on the diagonal those of each.

    Returns:
        0 to 1; two empty masks agree. NaN of fewer than two samples, and where all are empty.
    """
    sizes = np.diag(overlaps).astype(float)
    first, second = np.triu_indices(len(sizes), k=1)
    if not len(first) or not sizes.any():
        return math.nan
    total = sizes[first] + sizes[second]
    shared = overlaps[first, second]
    return float(np.where(total > 0, 2 * shared / np.maximum(total, 1), 1.0).mean())


def dice_by_probability(certain: float, area: float, mass: float) -> float:
    """Predict the DSC of a mask from the probabilities: as if each voxel were of the class with its probability.

    The expected overlap over the expected sum of sizes: 2 E|P and T| / (|P| + E|T|).

    Args:
        certain: sum of the probabilities within the mask.
        area: voxels of the mask.
        mass: sum of the probabilities of all voxels.

    Returns:
        0 to 1; NaN where the mask is empty.
    """
    return 2 * certain / (area + mass) if area else math.nan
