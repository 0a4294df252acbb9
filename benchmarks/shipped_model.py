"""Figures of the model that comes with the bundle: `python benchmarks/shipped_model.py DATA [--output DIR] [--write]`.

DATA is the folder of the six data sets that the model was trained on. Their test parts are scored with every class of
the image's modality asked for in every image or slice; the CT slices again in each of the eight positions that turning
and mirroring gives; and every image is asked for the classes that it cannot show. The figures are compared with
`eval_metrics` in configs/metadata.json to the third decimal, or written there. `--upright` leaves CT's other
positions out.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from real_sets import METADATA, SECTION, evaluation_of, prepare_sets

from scripts import cli
from scripts.data.fitting import fitted_shape, restore_from_square
from scripts.files import atomic_path
from scripts.networks.mask_decoding import UPSCALING

TURNED_SET = "lits_liver_ct"  # comes turned and mirrored
SPREAD = "liver_ct_dsc_spread_of_positions"
DECIMALS = 4
AGREEMENT = 5e-4  # what is the same to the third decimal


def score(
    datalists: Sequence[Path], output: Path, *, checkpoint: str | None, error_pictures: bool = True
) -> dict[str, Any]:
    """Score a model on the test parts; give the summary of each set by its name."""
    chosen: dict[str, Any] = {"checkpoint": checkpoint, "section": SECTION, "error_pictures": error_pictures}
    summaries = {}
    for path in datalists:
        place = output / path.parent.name
        cli.evaluate(str(path), output=str(place), progress_bar=False, **chosen)
        content = json.loads((place / "summary.json").read_text(encoding="utf-8"))
        (summaries[path.parent.name],) = content["units"].values()
    return summaries


def ceilings(datalist: Path, *, checkpoint: str | None) -> dict[str, tuple[float, float]]:
    """Give each class's DSC and NSD of the truth itself, averaged on the mask decoder's grid and brought back."""
    parser, network = evaluation_of(datalist, checkpoint)
    scores = parser.get_parsed_content("validate#scores")
    for case in parser.get_parsed_content("validate#dataset"):
        masks = torch.as_tensor(case["label"]).permute(3, 0, 1, 2).float()  # (K, H, W, D) -> (D, K, H, W)
        rows, columns = fitted_shape(masks.shape[2], masks.shape[3], network.image_size)
        fitted = F.interpolate(masks, (rows, columns), mode="area")
        square = F.pad(fitted, (0, network.image_size - columns, 0, network.image_size - rows))
        grid = F.avg_pool2d(square, network.image_size // (UPSCALING * network.grid_size))
        restored = restore_from_square(grid - 0.5, size=network.image_size, original=(masks.shape[2], masks.shape[3]))
        scores.update([{**case, "pred": (restored > 0).permute(1, 2, 3, 0)}])
    (summary,) = scores.summaries(resamples=0)
    return {entry.class_name: (entry.dsc, entry.nsd) for entry in summary.classes if entry.cases}


def table_of(summaries: Mapping[str, Any], best: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Lay the figures out as the documents have them."""
    lines = [
        "| data set | class | cases | DSC | NSD at 2 | ceiling DSC, NSD | found where absent |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, summary in summaries.items():
        for label, scores in summary["classes"].items():
            low, high = scores["intervals"]["dsc"]
            absent = scores["absent_slices"]
            found = f"{scores['false_positive_slices']} of {absent} slices" if absent else "-"
            limit = "{:.3f}, {:.3f}".format(*best[name][label])
            dsc = f"**{scores['dsc']:.3f}** ({low:.3f} to {high:.3f})"
            lines.append(f"| {name} | {label} | {scores['cases']} | {dsc} | {scores['nsd']:.3f} | {limit} | {found} |")
    return "\n".join(lines)


def figures_of(summaries: Mapping[str, Any]) -> dict[str, float]:
    """Give the DSC and NSD of each class in each data set, and how often an absent class was found."""
    figures = {}
    for name, summary in summaries.items():
        for label, scores in summary["classes"].items():
            key = f"{name}_{label.replace(' ', '_')}"
            figures[f"{key}_dsc"], figures[f"{key}_nsd"] = scores["dsc"], scores["nsd"]
            if scores["absent_slices"]:
                figures[f"{key}_false_positive_slices"] = scores["false_positive_rate"]
    return {key: round(value, DECIMALS) for key, value in figures.items()}


def positions(datalist: Path, output: Path, *, checkpoint: str | None) -> dict[str, float]:
    """Score pictures in the eight positions, as files that were turned and mirrored before anything read them."""
    found = {}
    for mirrored in (False, True):
        for turns in range(4):
            name = f"{'mirrored_' if mirrored else ''}{90 * turns}"
            turned = _write_turned(datalist, output / "positions" / name, mirrored=mirrored, turns=turns)
            place = output / "positions" / name / "scores"
            (summary,) = score([turned], place, checkpoint=checkpoint, error_pictures=False).values()
            found[name] = round(summary["classes"]["liver"]["dsc"], DECIMALS)
    return found


def _write_turned(datalist: Path, folder: Path, *, mirrored: bool, turns: int) -> Path:
    """Write the test part's pictures and masks anew, and their datalist."""
    content = json.loads(datalist.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for case in content[SECTION]:
        files = {"image": case["image"], **case["label"]}
        written = {part: f"{case['case']}_{part}.png" for part in files}
        for part, path in files.items():
            with Image.open(datalist.parent / path) as picture:
                values = np.asarray(picture.convert("L"))
            values = np.rot90(values[:, ::-1] if mirrored else values, turns)
            Image.fromarray(np.ascontiguousarray(values)).save(folder / written[part])
        image = written.pop("image")
        cases.append({**case, "image": image, "label": written})
    path = folder / "datalist.json"
    path.write_text(json.dumps({"name": content["name"], SECTION: cases}), encoding="utf-8")
    return path


def impossible(datalists: Sequence[Path], *, checkpoint: str | None) -> tuple[int, int]:
    """Ask every test image for the classes that it cannot show: how many answers are empty, and of how many."""
    empty = asked = 0
    for datalist in datalists:
        parser, network = evaluation_of(datalist, checkpoint)
        inferer, vocabulary = parser.get_parsed_content("inferer_def"), parser.get_parsed_content("vocabulary")
        as_masks = parser.get_parsed_content("validate#postprocessing")
        for case in parser.get_parsed_content("validate#dataset"):
            where = {"modality": case["modality"], "regions": case.get("regions")}
            ids = [class_id for class_id in network.class_ids if not vocabulary.can_occur(class_id, **where)]
            with torch.inference_mode():
                image = torch.as_tensor(case["image"])[None]
                question = {"class_ids": ids, "case": case["case"], "modality": case["modality"]}
                logits = inferer(image, network, **question)
            masks = as_masks({"pred": logits[0]})["pred"]
            found = masks.bool().flatten(1).any(dim=1)
            empty += int((~found).sum())
            asked += len(ids)
    return empty, asked


def differences(found: Mapping[str, float], stated: Mapping[str, float]) -> Iterator[str]:
    """Say where two sets of figures differ in the third decimal."""
    for name in sorted(found.keys() | stated.keys()):
        new, old = found.get(name), stated.get(name)
        if new is None or old is None or abs(new - old) > AGREEMENT:
            yield f"{name}: {new} here, {old} in {METADATA.name}"


def _write_metadata(figures: Mapping[str, float]) -> None:
    """State the figures in the bundle's metadata."""
    metadata = json.loads(METADATA.read_text(encoding="utf-8"))
    metadata["eval_metrics"] = dict(figures)
    with atomic_path(METADATA) as temporary:
        temporary.write_text(json.dumps(metadata, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(
    datalists: Sequence[Path], output: Path, *, checkpoint: str | None, upright: bool
) -> tuple[dict[str, float], list[str]]:
    """Score everything: the figures by their names, and what to print."""
    summaries = score(datalists, output / "scores", checkpoint=checkpoint)
    best = {path.parent.name: ceilings(path, checkpoint=checkpoint) for path in datalists}
    figures, lines = figures_of(summaries), [table_of(summaries, best)]
    if not upright:
        turned = positions(output / "data" / TURNED_SET / "datalist.json", output, checkpoint=checkpoint)
        figures[SPREAD] = round(max(turned.values()) - min(turned.values()), DECIMALS)
        lines.append("liver in CT by position: " + ", ".join(f"{name} {dsc:.4f}" for name, dsc in turned.items()))
    empty, asked = impossible(datalists, checkpoint=checkpoint)
    figures["impossible_classes_empty"] = round(empty / asked, DECIMALS)
    return figures, [*lines, f"classes that cannot be there: {empty} of {asked} answers empty"]


def main() -> None:
    """Score, print, and compare or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/shipped_model"))
    parser.add_argument("--checkpoint", help="another model, with its card beside it")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--write", action="store_true", help="write the figures into configs/metadata.json")
    extent.add_argument("--upright", action="store_true", help="leave out CT in its other positions")
    arguments = parser.parse_args()
    output, checkpoint = arguments.output.absolute(), arguments.checkpoint
    datalists = prepare_sets(arguments.data.absolute(), output / "data")
    figures, lines = measure(datalists, output, checkpoint=checkpoint, upright=arguments.upright)
    if arguments.write:
        _write_metadata(figures)
        lines.append(f"wrote the figures into {METADATA}")
    sys.stdout.write("\n\n".join(lines) + "\n")
    stated = {name: value for name, value in _stated().items() if name != SPREAD or not arguments.upright}
    unequal = [] if arguments.write or checkpoint else list(differences(figures, stated))
    if unequal:
        sys.exit("not the figures of configs/metadata.json:\n" + "\n".join(unequal))


def _stated() -> dict[str, float]:
    """Read the figures of the bundle's metadata."""
    stated: dict[str, float] = json.loads(METADATA.read_text(encoding="utf-8"))["eval_metrics"]
    return stated


if __name__ == "__main__":
    main()
