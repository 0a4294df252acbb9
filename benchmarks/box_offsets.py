"""What a model makes of boxes that are too large: `python benchmarks/box_offsets.py DATA [--output DIR]`.

DATA is the folder of the six data sets of the bundle's model. Each class is asked for by its true box in every slice
that has it, the sides of the box moved outwards by 0 to 50 pixels of a square of 256, or by the box of the whole image,
as in Table 8 of arXiv 2502.06817; and by its name on the same slices. True boxes tell where a class is, so that none of
these figures compares with those of the protocol `all`. A picture for each data set shows, as Fig. 6 does, what becomes
of one box. `--checkpoint FILE` takes another model, such as models/encoder_start.pt.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from real_sets import SECTION, evaluation_of, prepare_sets

from scripts import cli
from scripts.data.fitting import fitted_shape
from scripts.engines.box_inferer import WHOLE_IMAGE, canvas_boxes
from scripts.files import atomic_path
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_weights, save_state_dict
from scripts.networks.model_card import ModelCard
from scripts.report.error_pictures import picture_name
from scripts.workflow import BUNDLE_ROOT

Offset = float | Literal["whole"]  # `whole`: the image's own edges

OFFSETS: tuple[Offset, ...] = (0, 5, 15, 30, 50, WHOLE_IMAGE)
OFFSETS_OF = 256  # pixels of the square that the paper's offsets are of, most likely
BY_NAME = "by its name"
BOX_COLOUR, PREDICTION_COLOUR, TRUTH_COLOUR = (255, 255, 255), (255, 80, 80), (80, 255, 80)
PANEL = 256  # height of a panel of the picture in pixels


def settings_of(offset: float | str) -> dict[str, Any]:
    """Give the settings of an evaluation by boxes with an offset, or by names."""
    if offset == BY_NAME:
        return {}
    moved = offset if offset == WHOLE_IMAGE else f"${offset} * @network_def.image_size / {OFFSETS_OF}"
    return {
        "inferer_def#_target_": "scripts.engines.box_inferer.BoxPromptInferer",
        "validate#evaluator#prepare_batch#boxes": True,
        "inferer_def#offset": moved,
    }


def score(datalist: Path, output: Path, *, checkpoint: Path, section: str) -> dict[str, dict[str, float]]:
    """Score one data set by name and with each offset: class -> offset -> DSC."""
    found: dict[str, dict[str, float]] = {}
    for offset in (BY_NAME, *OFFSETS):
        place = output / str(offset).replace(" ", "_")
        settings = {**settings_of(offset), "presence": "oracle", "error_pictures": False, "progress_bar": False}
        cli.evaluate(str(datalist), checkpoint=str(checkpoint), section=section, output=str(place), **settings)
        (summary,) = json.loads((place / "summary.json").read_text(encoding="utf-8"))["units"].values()
        for label, scores in summary["classes"].items():
            found.setdefault(label, {})[str(offset)] = scores["dsc"]
    return found


def table_of(found: Mapping[str, Mapping[str, Mapping[str, float]]], *, named: bool) -> str:
    """Lay the DSC out, a row for each class of each data set."""
    columns = [*([BY_NAME] if named else []), *map(str, OFFSETS)]
    heads = [column if column == BY_NAME else f"box, {column}" for column in columns]
    lines = ["| " + " | ".join(["data set", "class", *heads]) + " |", "|" + "---|" * (len(columns) + 2)]
    for name, classes in found.items():
        for label, scores in classes.items():
            figures = [f"{scores[column]:.3f}" for column in columns]
            lines.append("| " + " | ".join([name, label, *figures]) + " |")
    return "\n".join(lines)


def picture(datalist: Path, path: Path, *, checkpoint: Path, section: str) -> None:
    """Show the largest true mask of the section's first case, with each box and what the network makes of it."""
    panels = []
    for offset in OFFSETS:
        parser, network = evaluation_of(
            datalist, str(checkpoint), validation_section=section, presence="oracle", **settings_of(offset)
        )
        case = parser.get_parsed_content("validate#dataset")[0]
        panels.append(_panel(case, parser, network, offset))
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(panels, axis=1)).save(temporary, format="PNG")


def _panel(case: Mapping[str, Any], parser: Any, network: AutoMedSAM, offset: Offset) -> np.ndarray:
    """Draw one box and its answer, on the slice with the largest true mask."""
    truth = torch.as_tensor(case["label"]).bool()  # (K, H, W, D)
    channel, place = divmod(int(truth.sum(dim=(1, 2)).argmax()), truth.shape[-1])
    inputs, _, _, settings = parser.get_parsed_content("validate#evaluator#prepare_batch")(case)
    with torch.inference_mode():
        logits = parser.get_parsed_content("inferer_def")(inputs, network, **settings)
    predicted = logits[0, channel, ..., place] > 0
    original = (truth.shape[1], truth.shape[2])
    moved = offset if isinstance(offset, str) else offset * network.image_size / OFFSETS_OF
    box = canvas_boxes(settings["boxes"][0, channel, place], original=original, size=network.image_size, offset=moved)
    scale = original[0] / fitted_shape(*original, network.image_size)[0]
    pixels = torch.as_tensor(case["image"])[:, ..., place].permute(1, 2, 0)  # (C, H, W) -> (H, W, C)
    canvas = Image.fromarray(pixels.expand(-1, -1, 3).clamp(0, 255).byte().numpy())
    for mask, colour in ((truth[channel, ..., place], TRUTH_COLOUR), (predicted, PREDICTION_COLOUR)):
        canvas.paste(colour, mask=Image.fromarray(_outline(mask.cpu().numpy())))
    ImageDraw.Draw(canvas).rectangle([float(edge) * scale for edge in box], outline=BOX_COLOUR)
    return np.asarray(canvas.resize((round(PANEL * original[1] / original[0]), PANEL)))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Give the pixels of a mask (H, W) that have a neighbour outside."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline: np.ndarray = mask & ~inner
    return outline


def as_whole(checkpoint: Path, folder: Path) -> tuple[Path, bool]:
    """Complete a file of SAM's parts, which knows boxes alone, by class prompts that have learned nothing.

    Returns:
        The file, and whether it has learned classes by name.
    """
    card = ModelCard.beside(checkpoint)
    if card.trained:
        return checkpoint, True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoMedSAM(**card.network)
    load_weights(network, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "model.pt"
    save_state_dict(network.state_dict(), whole)
    card.write(whole.with_suffix(".json"))
    return whole, False


def main() -> None:
    """Score, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLE_ROOT / "models" / "model.pt")
    parser.add_argument("--section", default=SECTION)
    parser.add_argument("--sets", help="some of the data sets, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("runs/box_offsets"))
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    checkpoint, named = as_whole(arguments.checkpoint.absolute(), output / "whole")
    found = {}
    for datalist in _chosen(prepare_sets(arguments.data.absolute(), output / "data"), arguments.sets):
        name = datalist.parent.name
        found[name] = score(datalist, output / "scores" / name, checkpoint=checkpoint, section=arguments.section)
        picture(datalist, output / picture_name(name, "boxes"), checkpoint=checkpoint, section=arguments.section)
    sys.stdout.write(table_of(found, named=named) + f"\n\npictures are in {output}\n")


def _chosen(datalists: Sequence[Path], names: str | None) -> list[Path]:
    return [path for path in datalists if names is None or path.parent.name in names.split(",")]


if __name__ == "__main__":
    main()
