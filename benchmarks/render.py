"""Write docs/performance.md from the results: `python benchmarks/render.py`."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, say

from scripts.files import atomic_path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
Result = Mapping[str, Any]
HEAD = """# Performance

Written by `benchmarks/render.py` from the files in `benchmarks/results/`; `make bench` measures them again. Variants
that are compared take turns in one run, so that what else the machine does falls on all alike. A ratio is the median of
the rounds' ratios, with the smallest and the largest in brackets; times are medians. Peak memory is that of a process
which builds and runs the variant alone, libraries included. Where two figures stand with an arrow between them, the
first is what was compared with.
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: of the part.
        text: what its rows have in common.
        prefixes: how the names of its results begin.
        rows: name of each result that belongs here -> what was measured, and against what; more may be found.
        missing: what stands in place of rows that were not measured.
        against: what the rows that are found besides are compared with.
        figure: what the comparison of a row says.
    """

    title: str
    text: str
    prefixes: tuple[str, ...]
    rows: Mapping[str, tuple[str, str]]
    missing: str = "not measured yet"
    against: str = "-"
    figure: str = "times as fast"


EAGER = "LiteMedSAM's eager form"
SECTIONS = (
    Section(
        "Image encoders",
        "One image at a time, in single precision, outputs equal to 1e-3. The plain form of ViT-B is the module of "
        "`segment_anything`; that of TinyViT leaves the batch normalisation unfolded and multiplies its attention out.",
        ("encoder_",),
        {
            "encoder_sam_vit_b_1024_torch": ("SAM's ViT-B, 1024 px, PyTorch", "`segment_anything`"),
            "encoder_sam_vit_b_1024_onnx": ("SAM's ViT-B, 1024 px, ONNX Runtime", "`segment_anything`"),
            "encoder_lite_medsam_256_torch": ("LiteMedSAM's TinyViT, 256 px, PyTorch", EAGER),
            "encoder_lite_medsam_256_onnx": ("LiteMedSAM's TinyViT, 256 px, ONNX Runtime", EAGER),
        },
    ),
    Section(
        "One slice, 13 classes",
        "TinyViT at 256 pixels with the release's class prompt encoder and T = 100, noise drawn, network only. The "
        "release's forward pass encodes the image for each class and takes its steps in a loop.",
        ("whole_slice_",),
        {
            "whole_slice_torch": ("13 classes, PyTorch", "the release, called 13 times"),
            "whole_slice_onnx": ("13 classes, ONNX Runtime", "the release, called 13 times"),
        },
    ),
    Section(
        "Exported files",
        "The files of `automedsam export` opened by themselves: one slice, five classes, TinyViT at 256 pixels.",
        ("exports_",),
        {
            "exports_onnx": ("ONNX Runtime", "the network in PyTorch"),
            "exports_pt2": ("`torch.export`", "the network in PyTorch"),
        },
    ),
    Section(
        "Inference from file to label map",
        "Whole processes from start to end, TinyViT at 256 pixels with random weights, four classes.",
        ("infer_",),
        {
            "infer_volume_torch": ("256 x 256 x 36, PyTorch", "slice by slice, class by class"),
            "infer_volume_onnx": ("256 x 256 x 36, ONNX Runtime", "slice by slice, class by class"),
            "infer_large_volume": ("512 x 512 x 300", "-"),
            "infer_first_slice": ("one slice, from the start of the process", "-"),
        },
    ),
    Section(
        "Training",
        "The forward diffusion of one image and class in closed form, and epochs from stored embeddings of the frozen "
        "image encoder.",
        ("forward_diffusion", "training_from_store_"),
        {
            "forward_diffusion": ("forward diffusion, T = 100", "the released loop"),
            "training_from_store_sam_vit_b_512": ("epoch from the store, ViT-B, 512 px", "encoding in every step"),
            "training_from_store_lite_medsam_256": ("epoch from the store, TinyViT, 256 px", "encoding in every step"),
        },
    ),
    Section(
        "HSP-SAM",
        "SAM's ViT-B at 512 pixels in single precision. The overhead is how much longer a pass or a step takes than "
        "what it is compared with, the median of the rounds' overheads.",
        ("hsp_sam_",),
        {
            "hsp_sam_forward_sam_vit_b_512": ("one image through the network, LoRA merged", "the bare image encoder"),
            "hsp_sam_training_memory_sam_vit_b_512": (
                "a step of training, batch size 4, gradient checkpointing",
                "no checkpointing",
            ),
        },
        figure="overhead",
    ),
    Section(
        "Preparing data sets",
        "`automedsam prepare`, whole processes.",
        ("prepare_",),
        {
            "prepare_chaos_t2_mr": ("CHAOS T2 MR, 16 volumes", "-"),
            "prepare_kvasir_seg": ("Kvasir-SEG, 949 pictures", "-"),
            "prepare_large_ct": ("made CT, 512 x 512 x 400", "-"),
        },
    ),
    Section(
        "Surface metrics",
        "DSC, NSD, HD95, HD100 and mean surface distances of one pair of masks.",
        ("surface_metrics_",),
        {},
        against="DeepMind's package",
    ),
    Section(
        "On a GPU",
        "SAM's ViT-B at 1024 pixels: images a second through the encoder, and samples a second in training.",
        ("gpu_",),
        {
            "gpu_sam_vit_b_bfloat16": ("encoder, bfloat16", "float32"),
            "gpu_sam_vit_b_bfloat16_compiled": ("encoder, bfloat16 and compiled", "float32"),
            "gpu_training_from_store_sam_vit_b": ("training from the store", "encoding in every step"),
        },
        "not measured: no GPU was at hand",
    ),
)


def main() -> None:
    """Write the page."""
    with atomic_path(PAGE) as temporary:
        temporary.write_text(render(read_results(RESULTS)), encoding="utf-8")
    say(f"wrote {PAGE}")


def read_results(folder: Path) -> dict[str, Result]:
    """Read all results of a folder, by name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {result["name"]: result for result in found}


def render(results: Mapping[str, Result]) -> str:
    """Make the page.

    Raises:
        KeyError: a result that no section has a place for.
    """
    left_over = [name for name in results if not any(name.startswith(section.prefixes) for section in SECTIONS)]
    if left_over:
        raise KeyError(f"no section of the page takes {', '.join(left_over)}: add one to SECTIONS")
    parts = [HEAD, *(_section(section, results) for section in SECTIONS), _origins(results)]
    return "\n".join(parts)


def _section(section: Section, results: Mapping[str, Result]) -> str:
    """Make a part: text, table, remarks."""
    found = [name for name in results if name.startswith(section.prefixes) and name not in section.rows]
    names = [*section.rows, *found]
    lines = [f"## {section.title}", "", *_wrapped(section.text), ""]
    if not any(name in results for name in names):
        return "\n".join([*lines, f"{section.missing[0].upper()}{section.missing[1:]}.", ""])
    described = {name: section.rows.get(name) or (_words(name, section), section.against) for name in names}
    table = [_row(*described[name], results.get(name), section.missing) for name in names]
    remarks = _grouped({described[name][0]: _remarks(results[name]) for name in names if name in results})
    columns = ("what", "against", section.figure, "asked for", "seconds", "peak MB")
    return "\n".join([*lines, *_table(columns, table), "", *remarks, *([""] if remarks else [])])


def _words(name: str, section: Section) -> str:
    """Make words of a result's name."""
    return name.removeprefix(section.prefixes[0]).replace("_", " ")


def _row(what: str, against: str, result: Result | None, missing: str) -> tuple[str, ...]:
    """Make the cells of a row."""
    if result is None:
        return what, against, missing, "-", "-", "-"
    if "overhead_percent" in result:
        overhead = f"**{result['overhead_percent']:g} %** ({result['low']:g} to {result['high']:g}; {_runs(result)})"
        seconds = f"{result['base_seconds']:.3g} → {result['seconds']:.3g}"
        return what, against, overhead, _limit(result), seconds, f"{result['base_peak_mb']} → {result['peak_mb']}"
    if "ratio" not in result:
        seconds = f"{result['seconds']:g} ({result['low']:g} to {result['high']:g}; {_runs(result)})"
        return what, against, "-", _limit(result), seconds, str(result["peak_mb"])
    ratio = f"**{result['ratio']:g}** ({result['low']:g} to {result['high']:g}; {_runs(result)})"
    seconds = f"{result['slow_seconds']:.3g} → {result['fast_seconds']:.3g}"
    peak = f"{result['slow_peak_mb']} → {result['peak_mb']}" if "slow_peak_mb" in result else str(result["peak_mb"])
    return what, against, ratio, _target(result), seconds, peak


def _runs(result: Result) -> str:
    return f"{result['runs']} run{'s' if result['runs'] > 1 else ''}"


def _target(result: Result) -> str:
    """Say what was asked for, and where it was not reached."""
    if not result.get("target"):
        return "-"
    return f"{result['target']:g}" + (", not reached" if result["ratio"] < result["target"] else "")


def _limit(result: Result) -> str:
    """Say what was allowed, and where it was exceeded."""
    if "limit" not in result:
        return "-"
    value, unit = result["limit"].split()
    found = result[{"s": "seconds", "MB": "peak_mb", "%": "overhead_percent"}[unit]]
    return f"below {result['limit']}" + (", exceeded" if found > float(value) else "")


def _grouped(remarks: Mapping[str, str]) -> list[str]:
    """List remarks, each once with all rows that it is about."""
    rows: dict[str, list[str]] = {}
    for what, remark in remarks.items():
        rows.setdefault(remark, []).append(what)
    return [line for remark, names in rows.items() if remark for line in _wrapped(f"- {'; '.join(names)}: {remark}")]


def _remarks(result: Result) -> str:
    """Say what must be known of a row beyond its cells."""
    remarks = []
    if result.get("note"):
        remarks.append(result["note"])
    if "beside" in result:
        beside = result["beside"]
        remarks.append(
            f"Against {beside['against'].replace('_', ' ')}: {beside['ratio']:g} times "
            f"({beside['low']:g} to {beside['high']:g}), {beside['slow_seconds']:.3g} s, {beside['slow_peak_mb']} MB."
        )
    if "floor" in result:
        floor = result["floor"]
        remarks.append(
            f"The floor: {floor['gflop']:g} GFLOP, at the {floor['gflop_a_second']:g} GFLOP/s that this processor "
            f"reaches in a product of large matrices, take {floor['seconds']:.3g} s; that would be "
            f"{floor['ratio']:g} times."
        )
    if "smallest_dice" in result:
        scores = ", ".join(f"{score:g} against the {form} form" for form, score in result["smallest_dice"].items())
        remarks.append(f"Smallest Dice coefficient of a class: {scores}.")
    if "stages" in result:
        stages = sorted(result["stages"].items(), key=lambda stage: -stage[1])
        remarks.append("Where the seconds go: " + ", ".join(f"{name} {seconds:g}" for name, seconds in stages) + ".")
    return " ".join(remarks)


def _origins(results: Mapping[str, Result]) -> str:
    """Say by which command, on which machine and with which versions each row was measured."""
    lines = ["## Where this was measured", ""]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, result in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        groups.setdefault((result["machine"], versions), []).append(name)
    for (machine, versions), names in groups.items():
        lines += [*_wrapped(f"On {machine}, with {versions}:"), ""]
        commands: dict[str, list[str]] = {}
        for name in names:
            commands.setdefault(results[name]["command"], []).append(f"`{name}`")
        lines += _table(("command", "results"), [(f"`{command}`", ", ".join(of)) for command, of in commands.items()])
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _wrapped(text: str, width: int = 120) -> list[str]:
    """Break a text into lines; those behind the first of a list's entry are indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
