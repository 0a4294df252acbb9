"""The worst, the median and the best case of each class, as pictures."""

import math
from collections.abc import Sequence
from html import escape

from scripts.metrics.scores import ClassScore
from scripts.report.error_pictures import PICTURES_FOLDER, picture_name
from scripts.report.html.elements import figure, number, paragraph, picture
from scripts.report.html.runs import Run

RANKS = ("worst", "median", "best")


def telling_cases(scores: Sequence[ClassScore]) -> dict[str, ClassScore]:
    """Choose the worst, the median and the best case by DSC; of fewer than three cases the worst, then the best.

    Args:
        scores: of one class; those without a DSC do not count.

    Returns:
        Rank -> score, no case twice. Equal ones are ordered by name; of an even number, the median is the lower.
    """
    known = [score for score in scores if not math.isnan(score.dsc)]
    ordered = sorted(known, key=lambda score: (score.dsc, score.case))
    if not ordered:
        return {}
    places = {"worst": 0, "median": (len(ordered) - 1) // 2, "best": len(ordered) - 1}
    if len(ordered) < len(RANKS):
        del places["median"]
    if len(ordered) == 1:
        del places["best"]
    return {rank: ordered[places[rank]] for rank in RANKS if rank in places}


def case_section(run: Run) -> str:
    """Show the telling cases of each class; a run without pictures, such as one of `score`, says so."""
    if not (run.folder / PICTURES_FOLDER).is_dir():
        return paragraph(
            "This run has no pictures: only evaluate with error_pictures writes them, since it has the images at hand."
        )
    parts = []
    for name in run.classes:
        chosen = telling_cases([score for score in run.scores if score.class_name == name])
        figures = [_case_figure(run, score, rank) for rank, score in chosen.items()]
        missing = [] if chosen else [paragraph("No case shows this class.")]
        parts.append(f'<section class="class"><h4>{escape(name)}</h4>{"".join(figures or missing)}</section>')
    return "".join(parts)


def _case_figure(run: Run, score: ClassScore, rank: str) -> str:
    numbers = f"DSC {number(score.dsc, 4)}, NSD {number(score.nsd, 4)}, HD95 {number(score.hd95, 2)} {score.unit}"
    text = f"{rank}: {score.case}, {numbers}"
    path = run.folder / PICTURES_FOLDER / picture_name(score.case, score.class_name)
    if not path.is_file():
        return figure("", escape(f"{text}; there is no picture of it"))
    alternative = f"{score.class_name} in {score.case}, the {rank} case: slice, prediction, truth and error"
    return figure(picture(path.read_bytes(), alternative=alternative), escape(text))
