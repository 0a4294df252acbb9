"""Figures of the model that comes with the bundle: `python benchmarks/shipped_model.py DATA [--output DIR] [--write]`.

DATA is the folder of the six data sets that the model was trained on. Their test parts are scored with every class of
the image's modality asked for in every image or slice; the CT slices again in each of the eight positions that turning
and mirroring gives; and every image is asked for the classes that it cannot show. The figures are compared with
`eval_metrics` in configs/metadata.json to the third decimal, or written there.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from scripts import cli
from scripts.files import atomic_path
from scripts.networks.checkpoints import load_weights
from scripts.networks.model_card import ModelCard
from scripts.workflow import BUNDLE_ROOT, CONFIGS

SETS = ("kvasir_seg", "ph2_dermoscopy", "covid_chest_xray", "acdc_cine_mr", "lits_liver_ct", "chaos_t2_mr")
TURNED_SET = "lits_liver_ct"  # comes turned and mirrored
SECTION = "test"
DECIMALS = 4
AGREEMENT = 5e-4  # what is the same to the third decimal
METADATA = CONFIGS / "metadata.json"


def prepare_sets(data: Path, folder: Path) -> list[Path]:
    """Write the datalist of each data set."""
    for name in SETS:
        cli.prepare("shared", source=str(data / name), output=str(folder / name), progress_bar=False)
    return [folder / name / "datalist.json" for name in SETS]


def score(datalists: Sequence[Path], output: Path, *, checkpoint: str | None) -> tuple[str, dict[str, Any]]:
    """Score a model on the test parts; give the tables, and the summary of each set by its name."""
    tables, summaries = [], {}
    for path in datalists:
        name = path.parent.name
        place = output / name
        tables.append(f"{name}\n{cli.evaluate(str(path), checkpoint=checkpoint, section=SECTION, output=str(place))}")
        (summaries[name],) = json.loads((place / "summary.json").read_text(encoding="utf-8"))["units"].values()
    return "\n\n".join(tables), summaries


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
            _, summaries = score([turned], output / "positions" / name / "scores", checkpoint=checkpoint)
            (summary,) = summaries.values()
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
    path = Path(checkpoint) if checkpoint else BUNDLE_ROOT / "models" / "model.pt"
    card = ModelCard.beside(path)
    empty = asked = 0
    for datalist in datalists:
        parser = _evaluation_of(datalist, path, card)
        network, inferer = parser.get_parsed_content("network_def").eval(), parser.get_parsed_content("inferer_def")
        load_weights(network, path)
        vocabulary = parser.get_parsed_content("vocabulary")
        for case in parser.get_parsed_content("validate#dataset"):
            where = {"modality": case["modality"], "regions": case.get("regions")}
            ids = [class_id for class_id in network.class_ids if not vocabulary.can_occur(class_id, **where)]
            with torch.inference_mode():
                logits = inferer(torch.as_tensor(case["image"])[None], network, class_ids=ids, case=case["case"])
            smallest = parser.get_parsed_content("validate#postprocessing")
            masks = smallest({"pred": logits[0]})["pred"]
            found = masks.bool().flatten(1).any(dim=1)
            empty += int((~found).sum())
            asked += len(ids)
    return empty, asked


def _evaluation_of(datalist: Path, weights: Path, card: ModelCard) -> Any:
    """Build the evaluation of a model on one datalist, without running it."""
    files = [str(CONFIGS / name) for name in ("train.json", "evaluate.json")]
    settings = {"datalist": str(datalist), "dataset_dir": str(datalist.parent), "validation_section": SECTION}
    workflow = ConfigWorkflow(
        config_file=files,
        meta_file=str(METADATA),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(BUNDLE_ROOT),
        checkpoint=str(weights),
        progress_bar=False,
        **settings,
        **card.settings,
    )
    workflow.initialize()
    return workflow.parser


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


def main() -> None:
    """Score, print, and compare or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/shipped_model"))
    parser.add_argument("--checkpoint", help="another model, with its card beside it")
    parser.add_argument("--write", action="store_true", help="write the figures into configs/metadata.json")
    arguments = parser.parse_args()
    output, checkpoint = arguments.output.absolute(), arguments.checkpoint
    datalists = prepare_sets(arguments.data.absolute(), output / "data")
    tables, summaries = score(datalists, output / "scores", checkpoint=checkpoint)
    figures = figures_of(summaries)
    turned = positions(output / "data" / TURNED_SET / "datalist.json", output, checkpoint=checkpoint)
    empty, asked = impossible(datalists, checkpoint=checkpoint)
    figures["liver_ct_dsc_spread_of_positions"] = round(max(turned.values()) - min(turned.values()), DECIMALS)
    figures["impossible_classes_empty"] = round(empty / asked, DECIMALS)
    lines = [tables, "liver in CT by position: " + ", ".join(f"{name} {dsc:.4f}" for name, dsc in turned.items())]
    lines.append(f"classes that cannot be there: {empty} of {asked} answers empty")
    if arguments.write:
        _write_metadata(figures)
        lines.append(f"wrote the figures into {METADATA}")
    sys.stdout.write("\n\n".join(lines) + "\n")
    unequal = [] if arguments.write or checkpoint else list(differences(figures, _stated()))
    if unequal:
        sys.exit("not the figures of configs/metadata.json:\n" + "\n".join(unequal))


def _stated() -> dict[str, float]:
    """Read the figures of the bundle's metadata."""
    stated: dict[str, float] = json.loads(METADATA.read_text(encoding="utf-8"))["eval_metrics"]
    return stated


if __name__ == "__main__":
    main()
