"""What the abstract prompts of a network look at, in the cases that the report shows as worst, median and best."""

from html import escape

from scripts.report.attention_pictures import ATTENTION_FOLDER, attention_name
from scripts.report.html.cases import telling_cases
from scripts.report.html.elements import figure, paragraph, picture
from scripts.report.html.runs import Run

ATTENTION_NOTE = (
    "Each map shows how the attention of one learned prompt, at one level of the image encoder, is spread over the "
    "image, averaged over the heads; the first level is the shallowest. The slice is the one on which most is "
    "predicted, as the network takes it: black at the right or the bottom may be padding. Colours reach from no "
    "attention to the largest of the map, and the number above says how many times an even share that is: near 1 the "
    "prompt attends to everything alike. Outlines in the first column are the prediction. A map says what a prompt "
    "takes in, not why a mask came out as it did."
)


def has_attention(run: Run) -> bool:
    """Say whether a run has left attention pictures."""
    return any((run.folder / ATTENTION_FOLDER).glob("*.png"))


def attention_section(run: Run) -> str:
    """Show the telling cases of all classes, each once."""
    figures = [_attention_figure(run, case, ranks) for case, ranks in _ranks(run).items()]
    if not figures:
        return paragraph(f"No case has a DSC to be chosen by; the pictures are in the run's folder {ATTENTION_FOLDER}.")
    return "".join(figures)


def _ranks(run: Run) -> dict[str, list[str]]:
    """List for each case of what it is the worst, the median or the best: case -> `worst of liver` and so on."""
    found: dict[str, list[str]] = {}
    for name in run.classes:
        chosen = telling_cases([score for score in run.scores if score.class_name == name])
        for rank, score in chosen.items():
            found.setdefault(score.case, []).append(f"{rank} of {name}")
    return found


def _attention_figure(run: Run, case: str, ranks: list[str]) -> str:
    text = f"{case}: {', '.join(ranks)}"
    path = run.folder / ATTENTION_FOLDER / f"{attention_name(case)}.png"
    if not path.is_file():
        return figure("", escape(f"{text}; there is no picture of it"))
    alternative = f"attention of the abstract prompts in {case}: a row for each level, a column for each prompt"
    return figure(picture(path.read_bytes(), alternative=alternative), escape(text))
