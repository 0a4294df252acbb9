"""Pieces of HTML: tables that screen readers can follow, definition lists, pictures within the page."""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape

from scripts.metrics.statistics import Interval

MISSING = "–"  # noqa: RUF001  # the sign of an empty cell


def paragraph(text: str) -> str:
    """Make a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table whose first column names the rows.

    Args:
        caption: what it shows, and how it was averaged.
        head: names of the columns.
        rows: plain text cells, as many as the head has.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(_row(row) for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Make a list of names and what they are."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs) + "</dl>"


def picture(png: bytes, *, alternative: str) -> str:
    """Put a PNG picture into the page.

    Args:
        png: the file's content.
        alternative: what to say in its place.
    """
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'


def figure(content: str, caption: str) -> str:
    """Put a caption, which is HTML, below some content."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def number(value: float, digits: int) -> str:
    """Write a number, or a dash where there is none."""
    return MISSING if math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """Write a difference with its sign."""
    return MISSING if math.isnan(value) else f"{value:+.{digits}f}"


def interval_text(interval: Interval, digits: int, *, with_sign: bool = False, between: str = " ") -> str:
    """Write a mean with its interval, `0.853 [0.812, 0.881]`; the mean alone where there is no interval.

    Args:
        interval: what to write.
        digits: decimals.
        with_sign: write a difference, with its sign.
        between: what divides mean and interval; a line break makes a narrow column.
    """
    write = signed if with_sign else number
    if math.isnan(interval.low):
        return write(interval.mean, digits)
    ends = f"[{write(interval.low, digits)}, {write(interval.high, digits)}]"
    return f"{write(interval.mean, digits)}{between}{ends}"


def share_text(share: float) -> str:
    """Write a share in percent, or a dash where it is of nothing."""
    return MISSING if math.isnan(share) else f"{100 * share:.2f}"


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    return (
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others) + "</tr>"
    )
