"""The page: everything about some finished runs in one file, which needs neither network nor JavaScript nor data.

Beside the page lies a folder of its charts as PNG files for papers. The raw values stay in the runs' own CSV and JSON
files, to which the page links.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from scripts.errors import OutputError
from scripts.files import atomic_path
from scripts.report.html.attention import ATTENTION_NOTE, attention_section, has_attention
from scripts.report.html.cases import case_section
from scripts.report.html.charts import MOST_DOTS, Box, box_chart
from scripts.report.html.courses import course_charts
from scripts.report.html.drawing import Drawing, svg_text, write_png
from scripts.report.html.elements import definitions, figure, paragraph
from scripts.report.html.quality import quality_parts
from scripts.report.html.results import MEASURES, Measure, comparison_tables, measure_title, score_tables
from scripts.report.html.runs import Run

TITLE = "Evaluation report"
_PLOTTED = ("dsc", "nsd", "hd95")
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; color: #1a1a1a;
  background: #fff; max-width: 1080px; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.8rem; } h2 { font-size: 1.4rem; border-bottom: 1px solid #1a1a1a; margin-top: 2.5rem; }
h3 { font-size: 1.15rem; margin-top: 1.8rem; } h4 { font-size: 1rem; margin: 1.2rem 0 0.2rem; }
a { color: #00528a; } svg { max-width: 100%; height: auto; font-family: inherit; }
nav ul { padding-left: 1.2rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.875rem; }
caption { text-align: left; caption-side: top; padding-bottom: 0.4rem; max-width: 60rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; vertical-align: top; white-space: pre; }
th:first-child { text-align: left; padding-left: 0; } thead th { border-bottom: 1px solid #1a1a1a; }
tbody tr { border-bottom: 1px solid #d4d4d4; } tbody th { font-weight: 600; }
figure { margin: 1rem 0; } figcaption { font-size: 0.875rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } .charts { display: flex; flex-wrap: wrap; gap: 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; font-size: 0.875rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #f3f3f3; padding: 0.7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.875rem; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  figure, tr, dl div { break-inside: avoid; } h2, h3, h4 { break-after: avoid; } .wide { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: 0.15rem 0.35rem; } }
"""


class Page:
    """A page that grows section by section, and the charts that lie beside it as files.

    Args:
        path: of the page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.charts: dict[str, Drawing] = {}

    @property
    def chart_folder(self) -> Path:
        """Where the charts lie as files: beside the page, with its name."""
        return self.path.with_name(f"{self.path.stem}_files")

    def chart(self, drawing: Drawing) -> str:
        """Put a chart into the page, with a link to its file."""
        if drawing.name in self.charts:
            raise ValueError(f"expected one chart of a name, got {drawing.name} twice")
        self.charts[drawing.name] = drawing
        link = self.link(self.chart_folder / f"{drawing.name}.png", "PNG")
        return figure(svg_text(drawing), f"{link}, 300 dots per inch")

    def link(self, target: Path, text: str) -> str:
        """Link to a file by its way from the page."""
        way = Path(os.path.relpath(target, self.path.parent)).as_posix()
        return f'<a href="{escape(quote(way))}">{escape(text)}</a>'


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Write the page of some runs, and its charts as PNG files into `<page>_files` beside it.

    Args:
        runs: what `read_runs` read.
        path: the page, in an existing folder.

    Returns:
        The page.

    Raises:
        OutputError: a file cannot be written.
    """
    page = Page(path.absolute())
    content = page_text(page, runs)
    try:
        page.chart_folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"expected a folder for charts at {page.chart_folder}, got: {error}; choose another --output"
        ) from error
    for drawing in page.charts.values():
        write_png(drawing, page.chart_folder / f"{drawing.name}.png")
    with atomic_path(page.path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return page.path


def page_text(page: Page, runs: Sequence[Run]) -> str:
    """Write the whole page, and leave its charts in `page`."""
    scored = [run for run in runs if run.scores]
    sections: list[tuple[str, str]] = [("Runs", _overview(page, runs))]
    if scored:
        sections += [("Scores", _scores(scored)), ("Cases in boxes", _boxes(page, scored))]
    if len(scored) > 1:
        tables = "".join(comparison_tables(scored[0], run) for run in scored[1:])
        sections.append((f"Compared with {scored[0].name}", tables))
    if scored:
        sections.append(("Worst, median and best cases", _each(scored, case_section, _PICTURE_NOTE)))
    explained = [run for run in scored if has_attention(run)]
    if explained:
        sections.append(("Where the abstract prompts look", _each(explained, attention_section, ATTENTION_NOTE)))
    sections += _optional_sections(page, runs)
    sections.append(("How the figures came about", "".join(_origin(run) for run in runs)))
    return _document(sections)


_PICTURE_NOTE = (
    "By DSC, on the slice with the most wrong pixels. Orange was predicted but is not true, blue was missed; outlines "
    "are yellow for the prediction and green for the truth."
)


def _document(sections: Sequence[tuple[str, str]]) -> str:
    contents = "".join(f'<li><a href="#s{i}">{escape(title)}</a></li>' for i, (title, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(title)}</h2>{text}</section>' for i, (title, text) in enumerate(sections)
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body><header><h1>{TITLE}</h1></header>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav><main>{body}</main></body></html>\n'
    )


def _overview(page: Page, runs: Sequence[Run]) -> str:
    """Say what each run is, and link to its files."""
    parts = []
    for run in runs:
        cases = len({score.case for score in run.scores})
        kind = f"{cases} cases, {len(run.classes)} classes" if run.scores else "training, without scores"
        links = ", ".join(page.link(file, file.name) for file in run.files)
        parts.append(f"<li><strong>{escape(run.name)}</strong>: {escape(kind)}. Raw values: {links}</li>")
    return f"<ul>{''.join(parts)}</ul>"


def _scores(runs: Sequence[Run]) -> str:
    return "".join(f"<h3>{escape(run.name)}</h3>{score_tables(run)}" for run in runs)


def _boxes(page: Page, runs: Sequence[Run]) -> str:
    """Draw each metric by class; units of distance, which must not share an axis, apart."""
    units = list(dict.fromkeys(unit for run in runs for unit in run.units))
    note = (
        "Each ring is a case. A box reaches from the first to the third quartile, with a line at the median and a "
        f"diamond at the mean; whiskers end at the last case within 1.5 box lengths. Of more than {MOST_DOTS} cases "
        "only those beyond the whiskers are drawn; infinite distances are not."
    )
    measures = [measure for measure in MEASURES if measure.name in _PLOTTED]
    drawings = [_box_drawing(runs, measure, unit, several=len(units) > 1) for unit in units for measure in measures]
    return paragraph(note) + "".join(page.chart(drawing) for drawing in drawings)


def _box_drawing(runs: Sequence[Run], measure: Measure, unit: str, *, several: bool) -> Drawing:
    classes = list(dict.fromkeys(score.class_name for run in runs for score in run.scores if score.unit == unit))
    boxes = []
    for name in classes:
        for run in runs:
            scores = [score for score in run.scores if score.unit == unit and score.class_name == name]
            values = np.array([getattr(score, measure.name) for score in scores], dtype=float)
            boxes.append(Box(name, run.name, values[np.isfinite(values)]))
    title = f"{measure.title} by class" + (f", cases in {unit}" if several else "")
    return box_chart(
        boxes,
        name=f"boxes_{measure.name}" + (f"_{unit}" if several else ""),
        title=title,
        axis_title=measure_title(measure, unit),
        least=0.0,
        most=None if measure.unit else 1.0,
    )


def _each(runs: Sequence[Run], section: Any, note: str) -> str:
    return paragraph(note) + "".join(f"<h3>{escape(run.name)}</h3>{section(run)}" for run in runs)


def _optional_sections(page: Page, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Draw what only some runs have: the course of training, uncertainty, quality without truth."""
    sections = []
    for index, run in enumerate(runs, start=1):
        courses = course_charts(run, prefix=f"run{index}")
        if courses:
            charts = "".join(page.chart(drawing) for drawing in courses)
            sections.append((f"Training of {run.name}", f'<div class="charts">{charts}</div>'))
        parts = quality_parts(run, prefix=f"run{index}")
        if parts:
            text = "".join(part if isinstance(part, str) else page.chart(part) for part in parts)
            sections.append((f"Uncertainty and quality without truth, {run.name}", text))
    return sections


def _origin(run: Run) -> str:
    """Show run.json: the command in full, and everything else as it stands there."""
    head = f"<h3>{escape(run.name)}</h3>"
    if not run.record:
        return head + paragraph("There is no run.json: command, versions and hashes of this run are not known here.")
    command = run.record.get("command")
    words = " ".join(command) if isinstance(command, list) else command
    shown = f"<pre>{escape(str(words))}</pre>" if command else ""
    others = {name: value for name, value in run.record.items() if name != "command"}
    return head + shown + definitions(flattened(others))


def flattened(record: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    """Turn objects and lists within an object into pairs of a path of names and a value."""
    pairs = []
    for name, value in record.items():
        words = f"{parent} {_words(name)}".strip()
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value, start=1)}
        if isinstance(value, Mapping) and value:
            pairs += flattened(value, words)
        else:
            pairs.append((words, _value_text(value)))
    return pairs


def _value_text(value: Any) -> str:
    if value is None or value in ({}, []):
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _words(name: str) -> str:
    """Write a key as words."""
    return re.sub(r"_+", " ", name)
