"""Real images pass through the same configs as phantoms; whether a network learns from them is another question."""

import csv
import json
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

from scripts import cli

SETTINGS = ["--image_size", "32", "--channels", "[8,16,32]", "--max_epochs", "1", "--batch_size", "8"]
QUIET = ["--progress_bar", "false", "--tensorboard", "false"]


def cases_of(folder, count):
    """The first cases of each split, under the datalist's names of the sections."""
    with open(folder / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sections = {"training": "train", "validation": "validation", "test": "test"}
    return {name: [row["case"] for row in rows if row["split"] == split][:count] for name, split in sections.items()}


def write_datalist(path, cases, entry, **content):
    content |= {section: [{"case": name, **entry(name)} for name in names] for section, names in cases.items()}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def polyps(shared, tmp_path_factory):
    """Three colonoscopy images a section, read where they lie."""
    folder = shared / "data" / "kvasir_seg"

    def entry(case):
        label = {"polyp": str(folder / "masks" / f"{case}.png")}
        return {"image": str(folder / "images" / f"{case}.jpg"), "label": label, "modality": "endoscopy"}

    path = tmp_path_factory.mktemp("polyps") / "datalist.json"
    return write_datalist(path, cases_of(folder, 3), entry, name="kvasir_seg")


@pytest.fixture(scope="module")
def organs(shared, tmp_path_factory):
    """One MR volume a section, read where it lies."""
    folder = shared / "data" / "chaos_t2_mr"

    def entry(case):
        image, label = (str(folder / kind / f"{case}.nii.gz") for kind in ("images", "masks"))
        return {"image": image, "label": label, "modality": "MR"}

    names = {"1": "liver", "2": "right kidney", "3": "left kidney", "4": "spleen"}
    path = tmp_path_factory.mktemp("organs") / "datalist.json"
    return write_datalist(path, cases_of(folder, 1), entry, name="chaos_t2_mr", label_map=names)


def run(*words):
    cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def polyp_model(polyps, tmp_path_factory):
    output = tmp_path_factory.mktemp("polyp_model")
    run("train", polyps, "--config=experiments/from_scratch,datasets/kvasir_seg", *SETTINGS, *QUIET, "--output", output)
    return output / "model.pt"


@pytest.fixture(scope="module")
def organ_model(organs, tmp_path_factory):
    output = tmp_path_factory.mktemp("organ_model")
    run(
        "train", organs, "--config=experiments/from_scratch,datasets/chaos_t2_mr", *SETTINGS, *QUIET, "--output", output
    )
    return output / "model.pt"


def entries(datalist):
    return json.loads(datalist.read_text())["test"]


def test_polyps_are_evaluated_in_pixels(polyps, polyp_model, tmp_path, capsys):
    run("evaluate", polyps, "--checkpoint", polyp_model, "--output", tmp_path)
    assert re.search(r"NSD @ 2 (px|pixels)", capsys.readouterr().out)
    summary = json.loads((tmp_path / "summary.json").read_text())["units"]["px"]
    assert list(summary["classes"]) == ["polyp"]
    assert summary["classes"]["polyp"]["cases"] == 3
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [entry["case"] for entry in entries(polyps)]


def test_polyps_get_a_mask_of_the_picture_s_size(polyps, polyp_model, tmp_path):
    for entry in entries(polyps):
        run("infer", entry["image"], "--modality", "endoscopy", "--checkpoint", polyp_model, "--output", tmp_path)
        with Image.open(entry["image"]) as image, Image.open(tmp_path / f"{entry['case']}_seg.png") as labels:
            assert labels.size == image.size
            assert set(np.unique(labels)) <= {0, 6}
    assert json.loads((tmp_path / "labels.json").read_text()) == {"0": "background", "6": "polyp"}


@pytest.mark.slow
def test_the_masks_of_infer_score_as_in_evaluate(polyps, polyp_model, tmp_path):
    (tmp_path / "truth").mkdir()
    words = ("--modality", "endoscopy", "--checkpoint", polyp_model, "--output", tmp_path / "masks")
    for entry in entries(polyps):
        run("infer", entry["image"], *words)
        with Image.open(entry["label"]["polyp"]) as mask:
            mask.convert("L").point(lambda value: 6 * (value > 127)).save(tmp_path / "truth" / f"{entry['case']}.png")
    run("evaluate", polyps, "--checkpoint", polyp_model, "--output", tmp_path / "evaluated", *QUIET)
    folders = ("--predictions", tmp_path / "masks", "--truth", tmp_path / "truth")
    run("score", *folders, "--output", tmp_path / "scored", "--progress_bar", "false")
    both = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("evaluated", "scored")]
    evaluated, scored = (content["units"]["px"]["classes"]["polyp"] for content in both)
    assert evaluated == scored | {"id": evaluated["id"]}
    assert 0 < evaluated["batch-pooled"]["iou"] < evaluated["batch-pooled"]["dsc"] < 1
    assert evaluated["batch-pooled"]["iou"] != evaluated["iou"]


def test_organs_are_evaluated_in_millimetres(organs, organ_model, tmp_path, capsys):
    run("evaluate", organs, "--checkpoint", organ_model, "--output", tmp_path)
    assert "NSD @ 2 mm" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())["units"]["mm"]
    assert list(summary["classes"]) == ["liver", "spleen", "left kidney", "right kidney"]
    truth = np.asarray(nibabel.load(entries(organs)[0]["label"]).dataobj)
    for name, value in (("liver", 1), ("right kidney", 2), ("left kidney", 3), ("spleen", 4)):
        absent = int((~(truth == value).any(axis=(0, 1))).sum())
        assert summary["classes"][name]["absent_slices"] == absent


def test_organs_get_a_label_map_on_the_grid_of_the_volume(organs, organ_model, tmp_path):
    (entry,) = entries(organs)
    words = ["--modality", "MR", "--probability_maps", "--checkpoint", organ_model, "--output", tmp_path]
    run("infer", entry["image"], *words)
    image = nibabel.load(entry["image"])
    written = sorted(tmp_path.glob("*.nii.gz"))
    assert len(written) == 5
    for path in written:
        result = nibabel.load(path)
        assert result.shape == image.shape
        assert np.allclose(result.affine, image.affine, atol=1e-4)
        assert np.allclose(result.header.get_zooms(), image.header.get_zooms(), atol=1e-4)
    with Image.open(tmp_path / f"{entry['case']}_overlay.png") as picture:
        assert min(picture.size) >= 256


def test_right_kidney_is_on_the_right(organs):
    """Names and axes of the set agree: what it calls the right kidney lies further to the patient's right."""
    for section in json.loads(organs.read_text()).values():
        for entry in section if isinstance(section, list) else []:
            label = nibabel.load(entry["label"])
            values = np.asarray(label.dataobj)
            right, left = (nibabel.affines.apply_affine(label.affine, np.argwhere(values == v)) for v in (2, 3))
            assert right[:, 0].mean() > left[:, 0].mean()  # RAS+: the first axis runs to the right
