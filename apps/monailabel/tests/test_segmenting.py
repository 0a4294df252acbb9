"""Segmentation through the app, in this process."""

import json

import nibabel
import numpy as np
import pytest
from help import NAMES, assert_on_grid, dice, infer, label_map, upload, values
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from PIL import Image


@pytest.fixture
def client(serve, phantom_bundle):
    """The app on the phantoms' bundle."""
    return serve(phantom_bundle)


def reoriented(image, codes):
    """Give an image with its axes in another order and direction; its voxels stay where they are."""
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(codes)))


def test_the_app_says_what_it_can(client):
    info = client.get("/info/").json()
    assert info["labels"] == list(NAMES.values())
    for name, kind in {"automedsam": "vista3d", "segmentation": "segmentation"}.items():
        model = info["models"][name]
        assert (model["type"], model["dimension"]) == (kind, 3)
        assert model["labels"] == {class_name: class_id for class_id, class_name in NAMES.items()}
        assert model["config"]["modality"] == "CT"
        assert model["config"]["model_filename"][0] == "model.pt"
    assert "deepgrow" not in info["models"], "the phantom model has not learned points"
    assert list(info["trainers"]) == ["automedsam"]
    assert "uncertainty" in info["strategies"]
    assert "uncertainty" in info["scoring"]


def test_all_classes_are_found_where_they_are(client, phantoms, studies):
    found = label_map(infer(client, "phantom_001"))
    assert_on_grid(found, studies / "phantom_001.nii.gz")
    truth = values(nibabel.load(phantoms / "labels" / "phantom_001.nii.gz"))
    assert set(np.unique(values(found))) == {0, *NAMES}
    assert np.mean([dice(values(found), truth, class_id) for class_id in NAMES]) > 0.75


def test_both_entries_give_one_answer(client):
    answers = [values(label_map(infer(client, "phantom_001", model=name))) for name in ("automedsam", "segmentation")]
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize(
    "prompt", [{"classes": "spleen"}, {"classes": ["spleen"]}, {"classes": 2}, {"label_prompt": [2]}], ids=str
)
def test_a_chosen_class_comes_alone(client, phantoms, prompt):
    found = label_map(infer(client, "phantom_001", **prompt))
    assert set(np.unique(values(found))) == {0, 2}
    truth = values(nibabel.load(phantoms / "labels" / "phantom_001.nii.gz"))
    assert dice(values(found), truth, 2) > 0.75


def test_several_chosen_classes_keep_their_ids(client):
    found = values(label_map(infer(client, "phantom_001", label_prompt=[5, 1])))
    assert set(np.unique(found)) == {0, 1, 5}


@pytest.mark.parametrize("codes", ["LPS", "SAR", "IPL"])
def test_however_the_patient_lies_the_label_map_is_the_same(client, studies, tmp_path, codes):
    plain = nibabel.load(studies / "phantom_001.nii.gz")
    tilt = np.eye(4)
    tilt[:3, :3] = [[0.9, -0.1, 0], [0.1, 0.9, 0.05], [0, -0.05, 1.0]]
    plain = nibabel.Nifti1Image(values(plain), tilt @ plain.affine)
    turned = reoriented(plain, codes)
    nibabel.save(plain, tmp_path / "plain.nii.gz")
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    expected = label_map(upload(client, tmp_path / "plain.nii.gz"))
    found = label_map(upload(client, tmp_path / "turned.nii.gz"))
    assert_on_grid(expected, tmp_path / "plain.nii.gz")
    assert_on_grid(found, tmp_path / "turned.nii.gz")
    back = ornt_transform(axcodes2ornt(codes), io_orientation(plain.affine))
    np.testing.assert_array_equal(apply_orientation(values(found), back), values(expected))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_label_map_of_a_picture_is_a_picture_without_losses(client, studies, tmp_path, suffix):
    hounsfield = values(nibabel.load(studies / "phantom_001.nii.gz"))[:, :50, 7]
    grey = ((np.clip(hounsfield, -160, 240) + 160) / 400 * 255).astype(np.uint8).T  # rows and columns
    Image.fromarray(grey).save(tmp_path / f"slice{suffix}")
    answer = upload(client, tmp_path / f"slice{suffix}")
    assert answer.status_code == 200, answer.text
    (tmp_path / "answer.png").write_bytes(answer.content)
    with Image.open(tmp_path / "answer.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 50))
        assert {0, 1} < set(np.unique(np.asarray(picture))) <= {0, *NAMES}


def test_the_answer_in_json_names_classes_and_warns(client, studies, tmp_path):
    image = nibabel.load(studies / "phantom_001.nii.gz")
    windowed = (np.clip(values(image), -160, 240) + 160) / 400 * 255
    nibabel.save(nibabel.Nifti1Image(windowed.astype(np.uint8), image.affine), tmp_path / "windowed.nii.gz")
    answer = upload(client, tmp_path / "windowed.nii.gz", output="json").json()
    assert answer["label_names"] == {name: class_id for class_id, name in NAMES.items()}
    assert len(answer["warnings"]) == 1
    assert "taken as windowed already" in answer["warnings"][0]


@pytest.mark.parametrize(
    ("path", "params", "status", "sentence"),
    [
        ("automedsam?image=phantom_001", {"classes": "gallbladder"}, 400, "Class 'gallbladder' is unknown"),
        ("automedsam?image=phantom_001", {"classes": "polyp"}, 400, "was not trained for 'polyp' in CT"),
        ("automedsam?image=phantom_001", {"label_prompt": [99]}, 400, "99"),
        ("automedsam?image=phantom_001", {"modality": "MR"}, 400, "was not trained on MR; it knows CT"),
        ("automedsam?image=phantom_001", {"modality": "PET"}, 400, "PET"),
        ("automedsam?image=phantom_001", {"boxes": [[1, 2, 3, 9, 9, 9]]}, 400, "has learned classes, not boxes"),
        ("automedsam?image=phantom_001", {"model_filename": "../model.pt"}, 400, "there is no model '../model.pt'"),
        ("automedsam?image=nothing", {}, 404, "there is no image 'nothing' in the datastore"),
        ("nothing?image=phantom_001", {}, 404, "There is no model 'nothing' available"),
        ("automedsam", {}, 400, "Neither Image nor File"),
    ],
)
def test_a_request_that_cannot_be_met_is_answered_in_a_sentence(client, path, params, status, sentence):
    answer = client.post(f"/infer/{path}", data={"params": json.dumps({"device": "cpu", **params})})
    assert answer.status_code == status
    assert sentence in answer.json()["detail"]


def test_parameters_must_be_json(client):
    answer = client.post("/infer/automedsam?image=phantom_001", data={"params": "{classes"})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("expected JSON, but")


@pytest.mark.parametrize(("name", "sentence"), [("no_image.nii.gz", "cannot be read"), ("no_image.txt", "expected a")])
def test_a_file_that_is_no_image_is_refused(client, tmp_path, name, sentence):
    (tmp_path / name).write_text("no image")
    answer = upload(client, tmp_path / name)
    assert answer.status_code == 400
    assert sentence in answer.json()["detail"]


def test_a_batch_goes_on_after_an_image_that_cannot_be_read(serve, phantom_bundle, studies):
    (studies / "damaged.nii.gz").write_text("no image")
    client = serve(phantom_bundle)
    answer = client.post("/batch/infer/automedsam?images=all&run_sync=true", json={"max_workers": 1})
    assert answer.status_code == 200, answer.text
    results = answer.json()
    assert "cannot be read" in results.pop("damaged")["error"]
    assert sorted(results) == [f"phantom_{number:03d}" for number in range(4)]
    for name in results:
        saved = studies / "labels" / "original" / f"{name}.nii.gz"
        assert_on_grid(nibabel.load(saved), studies / f"{name}.nii.gz")
        assert set(np.unique(values(nibabel.load(saved)))) > {0, 1}
