"""What `automedsam prepare` found, as a text table."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

_EXAMPLES = 3


def render_preparation(record: Mapping[str, Any]) -> str:
    """Show the record of a preparation.

    Args:
        record: what `preparation.json` holds.

    Returns:
        Aligned plain text: the split, a row a section and class, spacing and intensities, warnings and errors with how
        many cases have them, and what was left out and why.
    """
    cases = record["cases"]
    kept = [case for case in cases if case["section"] is not None]
    parts = [
        _headline(record, kept),
        _aligned([["section", "cases", "patients", "slices"], *_section_rows(kept)]),
        _aligned([["class", "cases", "slices", "voxels"], *_class_rows(kept)]),
        "\n".join(_ranges(kept)),
        _findings(cases),
        _skipped(record["skipped"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(record: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> str:
    split = dict(record["split"])
    details = ", ".join(f"{name} {_plain(value)}" for name, value in split.items() if name != "rule")
    rule = f"{split['rule']} ({details})" if details else split["rule"]
    return f"{record['name']}: {len(kept)} cases; split: {rule}"


def _plain(value: Any) -> str:
    return "/".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value)


def _section_rows(kept: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    sections: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for case in kept:
        sections[case["section"]].append(case)
    usual = {"training": 0, "validation": 1}
    order = sorted(sections, key=lambda name: (usual.get(name, 2), name))
    return [
        [
            name,
            str(len(sections[name])),
            str(len({case["patient"] for case in sections[name]})),
            str(sum(case["slices"] for case in sections[name])),
        ]
        for name in order
    ]


def _class_rows(kept: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Count cases annotated and, of these, with the class; its slices and its voxels."""
    rows = []
    for name in dict.fromkeys(name for case in kept for name in case["voxels"]):
        annotated = [case for case in kept if name in case["voxels"]]
        shown = sum(case["voxels"][name] > 0 for case in annotated)
        count = str(shown) if shown == len(annotated) else f"{shown} of {len(annotated)}"
        slices = sum(case["class_slices"][name] for case in annotated)
        rows.append([name, count, str(slices), str(sum(case["voxels"][name] for case in annotated))])
    return rows


def _ranges(kept: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for planar, unit in ((False, "mm"), (True, "pixel, for want of a spacing")):
        spacings = [case["spacing"] for case in kept if case["planar"] is planar]
        if spacings:
            edges = " x ".join(_range(axis) for axis in zip(*spacings, strict=True))
            lines.append(f"spacing of {len(spacings)} cases: {edges} {unit}")
    lows, highs = zip(*(case["intensity"] for case in kept), strict=True)
    lines.append(f"intensities: smallest {_range(lows)}, largest {_range(highs)}")
    return lines


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}...{high:g}"


def _findings(cases: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case in cases:
        for finding in case["findings"]:
            groups[finding["severity"], finding["check"]].append(f"{case['case']}: {finding['text']}")
    lines = []
    for (severity, check), texts in sorted(groups.items()):
        word = "left out for an error" if severity == "error" else "warning"
        lines.append(f"{word}, {check}, {len(texts)} times:")
        lines += [f"  {text}" for text in texts[:_EXAMPLES]]
        lines += [f"  and {len(texts) - _EXAMPLES} more, see preparation.json"] * (len(texts) > _EXAMPLES)
    return "\n".join(lines)


def _skipped(skipped: Sequence[Mapping[str, str]]) -> str:
    reasons = Counter(row["reason"] for row in skipped)
    lines = []
    for reason, count in reasons.most_common():
        paths = [row["path"] for row in skipped if row["reason"] == reason]
        names = [PurePosixPath(path).name for path in paths]
        shown = names if len(set(names)) == len(names) else paths  # folders of DICOM have one name in all cases
        more = ", ..." if count > _EXAMPLES else ""
        lines.append(f"left out, {reason}: {count} files ({', '.join(shown[:_EXAMPLES])}{more})")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
