"""HSP-SAM learns a handful of real images by heart, in each of its forms; what cannot do that has a fault."""

import csv
import json

import pytest

from scripts import cli

IMAGES = 8
STEPS_AN_EPOCH = 25  # each step shows all images: the list names them so often
SETTINGS = {
    "image_size": 48,
    "batch_size": IMAGES,
    "max_epochs": 4,
    "val_interval": 4,
    "learning_rate": 0.001,
    "warmup_iterations": 10,
    "augment": False,
    "tensorboard": False,
    "progress_bar": False,
    "device": "$torch.device('cpu')",
}
FORMS = {
    "as published": {},
    "no prompts": {"prompts": 0},
    "one prompt": {"prompts": 1},
    "sixteen prompts": {"prompts": 16},
    "answers as tokens": {"prompt_source": "token_output"},
    "positions as tokens": {"prompt_source": "positional"},
    "coarse masks": {"fusion": "mask_prompt"},
    "last level alone": {"fusion": "none"},
    "deep residual": {"deep_residual": True},
    "image attention": {"final_image_attention": True},
}


@pytest.fixture(scope="module")
def polyps(shared, tmp_path_factory):
    """Eight colonoscopy images, to be learned and to be asked for."""
    folder = shared / "data" / "kvasir_seg"
    with open(folder / "split.csv", newline="") as file:
        names = [row["case"] for row in csv.DictReader(file) if row["split"] == "train"][:IMAGES]

    def entry(case):
        label = {"polyp": str(folder / "masks" / f"{case}.png")}
        return {"image": str(folder / "images" / f"{case}.jpg"), "label": label, "modality": "endoscopy"}

    path = tmp_path_factory.mktemp("polyps") / "datalist.json"
    times = [f"seen_{time}" for time in range(STEPS_AN_EPOCH)]
    training, validation = (
        [entry(name) | {"case": f"{time}_{name}"} for time in kind for name in names] for kind in (times, ["asked"])
    )
    path.write_text(json.dumps({"name": "polyps", "training": training, "validation": validation}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_eight_images_are_learned_by_heart(polyps, tmp_path, form):
    overlays = "networks/hsp_sam.yaml,networks/hsp_sam_compact.yaml"
    cli.train(str(polyps), output=str(tmp_path), config=overlays, **SETTINGS, **FORMS[form])
    with open(tmp_path / "epochs.csv", newline="") as file:
        scores = [float(row["val_mean_dsc"]) for row in csv.DictReader(file) if row["val_mean_dsc"]]
    assert max(scores) > 0.9, scores
