"""The figures of the model that comes with the bundle: what they are made of, and that they are what is stated."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.utils import set_determinism
from PIL import Image
from scipy.ndimage import gaussian_filter

from scripts import cli
from scripts.networks.model_card import ModelCard

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The modules of the benchmarks import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_figures_are_named_by_data_set_and_class():
    from shipped_model import figures_of

    liver = {"dsc": 0.91234, "nsd": 0.8, "absent_slices": 0, "false_positive_rate": None}
    ventricle = {"dsc": 0.7, "nsd": 0.65, "absent_slices": 8, "false_positive_rate": 0.125}
    found = figures_of({"ct": {"classes": {"liver": liver}}, "mr": {"classes": {"left ventricle": ventricle}}})
    assert found == {
        "ct_liver_dsc": 0.9123,
        "ct_liver_nsd": 0.8,
        "mr_left_ventricle_dsc": 0.7,
        "mr_left_ventricle_nsd": 0.65,
        "mr_left_ventricle_false_positive_slices": 0.125,
    }


def test_figures_are_the_same_to_the_third_decimal():
    from shipped_model import differences

    stated = {"a": 0.9, "b": 0.5, "c": 0.1}
    assert list(differences({"a": 0.9004, "b": 0.5, "c": 0.1}, stated)) == []
    (only,) = differences({"a": 0.901, "b": 0.5, "c": 0.1}, stated)
    assert only.startswith("a: 0.901 here, 0.9 in")
    assert len(list(differences({"a": 0.9, "d": 0.5}, stated))) == 3


@pytest.mark.parametrize(("mirrored", "turns"), [(False, 0), (False, 1), (True, 0), (True, 3)])
def test_pictures_and_masks_are_turned_alike(tmp_path, mirrored, turns):
    from shipped_model import _write_turned

    values = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    mask = np.array([[0, 0, 255], [255, 0, 0]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    case = {"case": "a", "image": "image.png", "label": {"liver": "mask.png"}, "modality": "CT"}
    datalist = tmp_path / "datalist.json"
    datalist.write_text(json.dumps({"name": "set", "test": [case]}))
    written = _write_turned(datalist, tmp_path / "turned", mirrored=mirrored, turns=turns)
    (turned,) = json.loads(written.read_text())["test"]
    assert {**turned, "image": "", "label": ""} == {**case, "image": "", "label": ""}
    for before, path in ((values, turned["image"]), (mask, turned["label"]["liver"])):
        expected = before[:, ::-1] if mirrored else before
        for _ in range(turns):  # a quarter turn anticlockwise: the last column becomes the first row
            expected = np.stack([expected[:, column] for column in range(expected.shape[1] - 1, -1, -1)])
        with Image.open(written.parent / path) as picture:
            assert np.array_equal(np.asarray(picture), expected)


def test_offsets_are_of_a_square_of_256_pixels():
    from box_offsets import BY_NAME, settings_of

    assert settings_of(15)["inferer_def#offset"] == "$15 * @network_def.image_size / 256"
    assert settings_of("whole")["inferer_def#offset"] == "whole"
    assert settings_of(BY_NAME) == {}


def test_a_table_of_offsets_has_a_row_for_each_class():
    from box_offsets import BY_NAME, OFFSETS, table_of

    scores = {str(offset): 0.9 - 0.1 * place for place, offset in enumerate((BY_NAME, *OFFSETS))}
    found = {"a": {"liver": scores, "spleen": scores}}
    head, _, liver, spleen = table_of(found, named=True).splitlines()
    assert head.startswith("| data set | class | by its name | box, 0 | box, 5 |")
    assert liver == "| a | liver | 0.900 | 0.800 | 0.700 | 0.600 | 0.500 | 0.400 | 0.300 |"
    assert spleen.startswith("| a | spleen |")
    assert "by its name" not in table_of(found, named=False)


def test_the_outline_of_a_mask_is_its_own_edge():
    from box_offsets import _outline

    mask = np.zeros((5, 6), dtype=bool)
    mask[0:3, 1:5] = True  # at the border of the picture, too
    edge = mask.copy()
    edge[1, 2:4] = False
    assert np.array_equal(_outline(mask), edge)


def test_a_file_of_sam_parts_is_completed_to_be_asked_by_boxes(bundle_root, tmp_path):
    from box_offsets import as_whole

    started = bundle_root / "models" / "encoder_start.pt"
    whole, named = as_whole(started, tmp_path / "whole")
    assert not named
    parts, state = (torch.load(path, weights_only=True) for path in (started, whole))
    assert set(parts) < set(state)
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in parts.items())
    assert as_whole(bundle_root / "models" / "model.pt", tmp_path) == (bundle_root / "models" / "model.pt", True)


def liver_in(picture, output, **settings):
    """The probability of a liver in a picture of CT, by the shipped model and its card, in steps of 1 / 255."""
    chosen = {"modality": "CT", "probability_maps": True, "smallest_quality": 0.0, **settings}
    cli.infer(str(picture), output=str(output), progress_bar=False, **chosen)
    with Image.open(output / f"{picture.stem}_prob_liver.png") as found:
        return np.asarray(found).astype(int)


def test_a_ct_may_lie_in_any_way(tmp_path):
    """What the model's card says of CT is what `infer` does, from file to file."""
    rng = np.random.default_rng(2)
    values = gaussian_filter(rng.normal(size=(90, 120)), 9)
    values = np.uint8(np.clip(128 + 80 * values / values.std(), 0, 255))
    Image.fromarray(values).save(tmp_path / "upright.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(values[:, ::-1]))).save(tmp_path / "turned.png")
    upright, turned = (liver_in(tmp_path / f"{name}.png", tmp_path / name) for name in ("upright", "turned"))
    assert upright.std() > 1
    assert np.abs(np.rot90(turned, -1)[:, ::-1] - upright).max() <= 1
    alone = [
        liver_in(tmp_path / f"{name}.png", tmp_path / "alone", averaged_orientations={})
        for name in ("upright", "turned")
    ]
    assert np.abs(np.rot90(alone[1], -1)[:, ::-1] - alone[0]).max() > 10


@pytest.mark.slow
def test_boxes_that_are_too_large_are_scored_and_shown(bundle_root, shared, tmp_path):
    words = ["--sets", "covid_chest_xray", "--section", "validation", "--output", str(tmp_path)]
    command = [sys.executable, "benchmarks/box_offsets.py", str(shared / "data"), *words]
    done = subprocess.run(command, cwd=bundle_root, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| covid_chest_xray")]
    assert [row[1] for row in rows] == ["right lung", "left lung", "cardiomediastinum"]
    true, whole = (np.mean([float(row[column].strip(" |")) for row in rows]) for column in (3, -1))
    assert true > whole + 0.05  # a true box tells more than that of the whole image
    with Image.open(tmp_path / "covid_chest_xray__boxes.png") as picture:
        assert picture.height == 256
        assert picture.width > 4 * 256


@pytest.mark.slow
def test_the_figures_of_the_metadata_are_reproduced(bundle_root, shared, tmp_path):
    """By the command of the documents, but for CT in its other positions, which `test_a_ct_may_lie_in_any_way` sees."""
    words = [str(shared / "data"), "--upright", "--output", str(tmp_path)]
    command = [sys.executable, "benchmarks/shipped_model.py", *words]
    done = subprocess.run(command, cwd=bundle_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_the_recipe_leads_from_nothing_to_a_model_of_classes_and_boxes(shared, tmp_path):
    """`make generalist` in small: the five stages on two of the data sets, each from what the one before has left."""
    lists = []
    for name in ("ph2_dermoscopy", "covid_chest_xray"):
        cli.prepare("shared", source=str(shared / "data" / name), output=str(tmp_path / name), progress_bar=False)
        lists.append(str(tmp_path / name / "datalist.json"))
    small = {"image_size": 32, "channels": [8, 16, 32], "batch_size": 16, "max_epochs": 1, "val_interval": 1}
    start = {}
    stages = {name: [name] for name in ("encoder_start", "class_prompts", "joint_tuning")}
    stages |= {"mask_tuning": ["joint_tuning", "mask_tuning"], "detail_tuning": ["detail_tuning"]}
    for stage, names in stages.items():
        overlays = [f"experiments/{name}.yaml" for name in ("from_scratch", "generalist", *names)]
        cli.train(lists, output=str(tmp_path / stage), config=overlays, **small, **start, progress_bar=False)
        start = {"pretrained": str(tmp_path / stage / "model.pt")}
    set_determinism(seed=None)
    first, last = (ModelCard.beside(tmp_path / stage / "model.pt") for stage in ("encoder_start", "detail_tuning"))
    assert (first.trained, first.learned["boxes_trained"]) == ({}, True)
    assert set(last.trained) == {"dermoscopy", "xray"}
    assert last.learned["boxes_trained"]
    assert last.learned["quality_head"]
    assert (last.network["class_code"], last.network["image_encoder"]) == ("learned", "compact_detailed")
    picture = next((shared / "data" / "ph2_dermoscopy" / "images").iterdir())
    words = {"checkpoint": start["pretrained"], "modality": "dermoscopy", "output": str(tmp_path / "out")}
    cli.infer(str(picture), **words, progress_bar=False)
    cli.infer(str(picture), **words, boxes=[[10, 10, 60, 60]], progress_bar=False)
    assert (tmp_path / "out" / f"{picture.stem}_seg.png").is_file()
