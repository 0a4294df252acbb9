"""Batch-pooled DSC and IoU, the averages of code that scores a whole batch of cases as one mask.

They are here for comparison with older tables alone. The cases are taken in the order of their names, some at a time;
the voxels of all cases of such a batch count as one mask of each class, those of cases that lack the class included;
and the batches are averaged weighted by their number of cases. Large objects weigh more than small ones, what is
predicted in a case without the class lowers the score of its batch, and another batch size gives another figure, so
that two tables can be compared only at one batch size. With one case in a batch it is the mean per case, with all cases
in one the micro average.

A batch whose truth lacks the class altogether is left out together with its weight, as such a case is left out of the
mean per case. A batch in which nothing of the class was predicted counts 0.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from scripts.errors import ConfigError
from scripts.metrics.masks import Overlap
from scripts.metrics.scores import ClassScore

BATCH_POOLED: Final = "batch-pooled"
"""What these averages are called, wherever they are stated."""

POOLED_BATCH: Final = 40
"""Cases in a batch: the batch of HSP-SAM's polyp recipe."""


@dataclass(frozen=True)
class BatchPooled:
    """DSC and IoU of whole batches, averaged over the batches.

    Attributes:
        dsc: 0 to 1; NaN of a class that no truth contains.
        iou: Likewise.
    """

    dsc: float
    iou: float


def check_pooled_batch(batch: int) -> None:
    """Refuse a batch without a case.

    Raises:
        ConfigError: It is no whole number of at least 1.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"Expected pooled_batch to be a whole number of at least 1, got {batch!r}; correct it.")


def pool_batches(scores: Sequence[ClassScore], *, batch: int = POOLED_BATCH) -> tuple[list[BatchPooled], BatchPooled]:
    """Score whole batches of cases as one mask of each class.

    Args:
        scores: Scores of all cases and classes, in any order; one per case and class.
        batch: Cases in a batch. The last one has what is left; a case in which a class was not annotated counts in no
            batch of that class.

    Returns:
        One entry per class in ascending id order, and their unweighted mean over the classes that occur in a truth.

    Raises:
        ConfigError: There is no such batch.
    """
    check_pooled_batch(batch)
    batches = {case: index // batch for index, case in enumerate(sorted({score.case for score in scores}))}
    classes = [
        _pool_class([score for score in scores if score.class_id == class_id], batches)
        for class_id in sorted({score.class_id for score in scores})
    ]
    occurring = [entry for entry in classes if not math.isnan(entry.dsc)]
    if not occurring:
        return classes, BatchPooled(dsc=math.nan, iou=math.nan)
    return classes, BatchPooled(
        dsc=fmean(entry.dsc for entry in occurring), iou=fmean(entry.iou for entry in occurring)
    )


def _pool_class(scores: Sequence[ClassScore], batches: Mapping[str, int]) -> BatchPooled:
    """Average one class over its batches, given the batch of each case."""
    members: dict[int, list[Overlap]] = defaultdict(list)
    for score in scores:
        members[batches[score.case]].append(score.overlap)
    pooled = [(_pool(overlaps), len(overlaps)) for overlaps in members.values()]
    known = [(overlap, size) for overlap, size in pooled if overlap.true]
    if not known:
        return BatchPooled(dsc=math.nan, iou=math.nan)
    sizes = [size for _, size in known]
    return BatchPooled(
        dsc=fmean([overlap.dsc for overlap, _ in known], weights=sizes),
        iou=fmean([overlap.iou for overlap, _ in known], weights=sizes),
    )


def _pool(overlaps: Sequence[Overlap]) -> Overlap:
    """The voxels of all of them together."""
    return Overlap(
        predicted=sum(overlap.predicted for overlap in overlaps),
        true=sum(overlap.true for overlap in overlaps),
        common=sum(overlap.common for overlap in overlaps),
    )
