"""What a packaged bundle says of its model: metadata.json, docs/README.md and the terms of its data."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.data.preprocessing import window_of
from scripts.networks.model_card import ModelCard

TASKS = {
    "automedsam": "prompted by class names",
    "hsp_sam": "without any prompt",
    "unet": "by a channel for each class",
}
METHODS = {
    "automedsam": "AutoMedSAM (arXiv 2502.06817): an image encoder, a diffusion-based class prompt encoder in place of "
    "manual prompts, and SAM's mask decoder. A class is asked for by its name or id.",
    "hsp_sam": "HSP-SAM (arXiv 2506.02854): an image encoder with learned prompts at each of its levels, and a "
    "hierarchical decoder. All classes are segmented at once, without a prompt.",
    "unet": "A U-Net, MONAI's BasicUNet: a channel for each class.",
}
PROBABILITIES = {
    "automedsam": "the sigmoid of a channel is the probability of its class",
    "unet": "the sigmoid of a channel is the probability of its class",
    "hsp_sam": "the softmax of the channels is the probability of each class and of the background",
}
HSP_SAM_PAPER = (
    "Zhang M, Dai X, Sun Y, Wang J, Yao Y, Gong X, Cong F, Wang F, Lv Y. Hierarchical Self-Prompting SAM: A "
    "Prompt-Free Medical Image Segmentation Framework. arXiv 2506.02854 (2025). https://arxiv.org/abs/2506.02854"
)
AUTOMEDSAM_PAPER = "arxiv.org/abs/2502.06817"  # by which it is found among the references
INTENDED_USE = (
    "Research only: developing, comparing and teaching segmentation. Not a medical device, not cleared by any "
    "authority, not for diagnosis, treatment planning or any other clinical use. The model needs an evaluation of its "
    "own on data of the place where it is to be used."
)
LINE = 120  # characters of a line of the page
PAGE = """# {name}

### **Authors**

Those who trained the model and packaged it. The software is the AutoMedSAM bundle, by its contributors.

### **Tags**

Segmentation, {tags}

## **Model Description**

{description}

## **Data**

{data_source}. Its terms: [data_license.txt](data_license.txt).

#### **Preprocessing**

{image_classes}.

#### **Input**

`network(image)`: `(B, 3, {size}, {size})`, float32, values in [0, 1].

#### **Output**

`(B, {channels}, {size}, {size})`, {pred_classes}.

## **Performance**

{performance}

## **MONAI Bundle Commands**

In the folder of the bundle, or from anywhere with the full path of the config and `--bundle_root FOLDER`:

```
python -m monai.bundle run --config_file configs/inference.json --dataset_dir FILE_OR_FOLDER --output_dir out
python -m monai.bundle run evaluating --config_file "['configs/train.json','configs/evaluate.json']" --dataset_dir DATA
python -m monai.bundle run training --config_file configs/train.json --dataset_dir DATA --output_dir runs/mine
```

Training goes on from `models/model.pt`.

## **Limitations**

{intended_use}

## **References**

{references}

## **License**

Apache License, Version 2.0, of the software; the text is in `LICENSE`. Terms of the data: `docs/data_license.txt`.
"""
DATA_TERMS = """Data

{data_source}.

No data set is part of this bundle. Those who pass the model on have to look up and to keep the terms of the data that
it was trained on, and to state them here: some owners allow research and education only, some ask for registration or
for citation, some forbid commercial use. Weights trained on such data may fall under the same terms. Published weights
that a training started from have licences of their own too.
"""


@dataclass(frozen=True)
class PackagedModel:
    """A model as its bundle describes it.

    Attributes:
        name: of the bundle.
        card: what is known of the model.
        image_size: side of the network's square input in pixels.
        classes: id -> name, of what the network knows.
        window: of CT, by its name or as level and width in HU.
    """

    name: str
    card: ModelCard
    image_size: int
    classes: Mapping[int, str]
    window: str | Sequence[float]

    @property
    def modalities(self) -> str:
        """Those in which anything was trained, in words."""
        return ", ".join(self.card.trained) or "an unstated modality"

    @property
    def data_source(self) -> str:
        """What the model was trained on, as far as its card knows."""
        datalist = self.card.training.get("datalist")
        names = [datalist] if isinstance(datalist, str) else list(datalist or ())
        sets = f"the data sets {', '.join(map(str, names))}" if len(names) > 1 else f"the data set {', '.join(names)}"
        return f"The model was trained on {sets}" if names else "The model's card does not name what it was trained on"

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the validation that chose the weights."""
        training = self.card.training.items()
        return {key: value for key, value in training if key.startswith("val_") and isinstance(value, int | float)}


def metadata_of(model: PackagedModel, template: Mapping[str, Any]) -> dict[str, Any]:
    """Write a model's metadata.

    Args:
        model: which.
        template: the metadata of the bundle that the software comes from, whose versions, packages and authors stay.

    Returns:
        The content of metadata.json.
    """
    kind = model.card.architecture
    version = template["version"]
    named = ", ".join(f"{class_id} {name}" for class_id, name in model.classes.items())
    known = ", ".join(model.classes.values())
    general = {key: value for key, value in template.items() if key != "weights_license"}  # that of other weights
    return {
        **general,
        "changelog": {version: f"{model.name}, packaged with the AutoMedSAM bundle {version}"},
        "name": model.name,
        "task": f"Segmentation of {known} in {model.modalities}, {TASKS[kind]}",
        "description": f"{METHODS[kind]} Volumes are segmented slice by slice. This model knows {known}.",
        "modality": model.modalities,
        "data_source": model.data_source,
        "image_classes": _image_classes(model),
        "label_classes": f"single channel label map: 0 background, {named}",
        "pred_classes": _pred_classes(model, named),
        "eval_metrics": model.scores,
        "intended_use": INTENDED_USE,
        "references": _references(kind, template["references"]),
        "network_data_format": _data_format(model, template["network_data_format"]),
    }


def page_of(model: PackagedModel, metadata: Mapping[str, Any]) -> str:
    """Write a model's own page, docs/README.md."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in model.scores.items())
    chosen = f"In the validation that chose these weights: {scores}. " if scores else ""
    page = PAGE.format(
        **{key: metadata[key] for key in ("name", "description", "data_source", "image_classes", "pred_classes")},
        tags=f"{model.modalities}, {', '.join(model.classes.values())}",
        size=model.image_size,
        channels=1 + max(model.classes),
        performance=f"{chosen}No score on cases that had no part in the training is known to this page.",
        intended_use=metadata["intended_use"],
        references="\n\n".join(metadata["references"]),
    )
    return "".join(f"{_wrapped(line)}\n" for line in page.splitlines())


def data_terms_of(model: PackagedModel) -> str:
    """Write what is known of the terms of a model's data, docs/data_license.txt."""
    text = DATA_TERMS.format(data_source=model.data_source)
    return "".join(f"{_wrapped(line)}\n" for line in text.splitlines())


def _wrapped(line: str) -> str:
    """Break a line of prose; commands stay on theirs."""
    return line if line.startswith("python ") else textwrap.fill(line, LINE, break_on_hyphens=False)


def _image_classes(model: PackagedModel) -> str:
    """Say what the network is shown."""
    level, width = window_of(model.window)
    clipped = (
        f"CT clipped to the window of level {level:g} and width {width:g} HU, " if "CT" in model.card.trained else ""
    )
    return (
        f"slices and pictures of {model.modalities}: {clipped}each slice stretched to [0, 1], grey ones repeated to "
        "three channels"
    )


def _pred_classes(model: PackagedModel, named: str) -> str:
    """Say what the channels are."""
    unknown = set(range(1, max(model.classes))) - set(model.classes)
    rest = ", the other channels are of classes that the model does not know and never win" if unknown else ""
    return (
        f"logits: channel 0 is the background at logit 0, the channel of each class is its id ({named}){rest}; "
        f"{PROBABILITIES[model.card.architecture]}, the index of the largest channel is the label"
    )


def _references(architecture: str, references: list[str]) -> list[str]:
    """Put the paper of the network first."""
    if architecture != "hsp_sam":
        return list(references)
    return [HSP_SAM_PAPER, *(entry for entry in references if AUTOMEDSAM_PAPER not in entry)]


def _data_format(model: PackagedModel, template: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the tensors; only what the model knows is named, since MONAI Label offers every name as a label."""
    size = [model.image_size] * 2
    names = {"0": "background", **{str(class_id): name for class_id, name in model.classes.items()}}
    image = {**template["inputs"]["image"], "modality": model.modalities, "spatial_shape": size}
    pred = {
        **template["outputs"]["pred"],
        "num_channels": 1 + max(model.classes),
        "spatial_shape": size,
        "channel_def": names,
    }
    return {**template, "inputs": {"image": image}, "outputs": {"pred": pred}}
