"""Fine-tuning on saved labels, and the choice of what to label next."""

import json

import nibabel
import numpy as np
import pytest
import torch
from help import NAMES, dice, infer, label_map, put_label, sha256, values
from lib.activelearning import NOTHING_FOUND, uncertainty
from lib.train import split

from scripts.errors import ConfigError, InputError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_weights


@pytest.fixture
def client(serve, bundle):
    return serve(bundle)


def test_fine_tuning_learns_from_the_labels_and_leaves_the_model_alone(client, bundle, phantoms):
    before = sha256(bundle / "models" / "model.pt")
    for number in (0, 1):
        put_label(client, f"phantom_00{number}", phantoms / "labels" / f"phantom_00{number}.nii.gz")
    answer = client.post("/train/automedsam?run_sync=true", json={"device": "cpu", "max_epochs": 2, "val_split": 0.5})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_filename"] == "finetuned.pt"
    assert 0.5 < answer.json()["val_mean_dsc"] < 1
    assert sha256(bundle / "models" / "model.pt") == before
    card = json.loads((bundle / "models" / "finetuned.json").read_text())
    assert card["trained"] == {"CT": list(NAMES.values())}
    assert card["training"]["datalist"] == "studies", "the card names the folder, not a datalist that was not used"
    network, shipped = AutoMedSAM(**card["network"]), AutoMedSAM(**card["network"])
    load_weights(network, bundle / "models" / "finetuned.pt")
    load_weights(shipped, bundle / "models" / "model.pt")
    changed = [not torch.equal(new, old) for new, old in zip(network.parameters(), shipped.parameters(), strict=True)]
    assert any(changed)
    assert client.get("/info/").json()["models"]["automedsam"]["config"]["model_filename"] == [
        "model.pt",
        "finetuned.pt",
    ]
    tuned = values(label_map(infer(client, "phantom_002", model_filename="finetuned.pt")))
    plain = values(label_map(infer(client, "phantom_002")))
    assert (tuned != plain).any()
    truth = values(nibabel.load(phantoms / "labels" / "phantom_002.nii.gz"))
    assert np.mean([dice(tuned, truth, class_id) for class_id in NAMES]) > 0.7


def test_nothing_is_learned_without_a_label(client):
    answer = client.post("/train/automedsam?run_sync=true", json={"device": "cpu"})
    assert answer.status_code == 400
    assert "there is no label to learn from" in answer.json()["detail"]


def test_a_label_with_a_value_that_is_no_class_is_refused(client, phantoms, tmp_path):
    label = nibabel.load(phantoms / "labels" / "phantom_000.nii.gz")
    foreign = np.where(values(label) == 1, 77, values(label)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(foreign, label.affine), tmp_path / "foreign.nii.gz")
    put_label(client, "phantom_000", tmp_path / "foreign.nii.gz")
    answer = client.post("/train/automedsam?run_sync=true", json={"device": "cpu", "max_epochs": 1})
    assert answer.status_code == 400
    assert "the label values [77] are not in label_map" in answer.json()["detail"]


def test_an_unknown_model_cannot_be_trained(client):
    answer = client.post("/train/nothing?run_sync=true", json={})
    assert answer.status_code == 404
    assert "There is no model 'nothing' available" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("count", "share", "learned", "held_out"),
    [
        (1, 0.2, [0], [0]),
        (2, 0.2, [0], [1]),
        (5, 0.2, [0, 1, 2, 3], [4]),
        (4, 0.9, [0], [1, 2, 3]),
        (2, 0, [0, 1], [0, 1]),
    ],
)
def test_at_least_one_label_is_held_out_where_there_are_two(count, share, learned, held_out):
    pairs = [{"image": str(number), "label": ""} for number in range(count)]
    found = split(pairs, share)
    assert [[int(pair["image"]) for pair in part] for part in found] == [learned, held_out]


@pytest.mark.parametrize("share", [1, -0.1, "half", True])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="val_split"):
        split([{"image": "", "label": ""}], share)


def test_no_pair_is_refused():
    with pytest.raises(InputError, match="no label"):
        split([], 0.2)


def noisy(path, output):
    """Write an image with so much noise that organs are hard to tell."""
    image = nibabel.load(path)
    noise = np.random.default_rng(0).normal(0, 120, image.shape)
    nibabel.save(nibabel.Nifti1Image((values(image) + noise).astype(np.int16), image.affine), output)


def test_the_image_that_is_hardest_to_read_comes_first(serve, bundle, phantoms, studies):
    noisy(phantoms / "images" / "phantom_002.nii.gz", studies / "phantom_002.nii.gz")
    (studies / "damaged.nii.gz").write_text("no image")
    client = serve(bundle)
    answer = client.post("/activelearning/uncertainty", json={})
    assert answer.status_code == 400
    assert "no image has a score yet" in answer.json()["detail"]
    result = client.post("/scoring/uncertainty?run_sync=true", json={"device": "cpu"}).json()
    assert next(iter(result["scores"])) == "phantom_002"
    assert len(result["scores"]) == 4
    assert list(result["failures"]) == ["damaged"]
    assert all(0 < score < 1 for score in result["scores"].values())
    given = [client.post("/activelearning/uncertainty", json={}).json()["id"] for _ in range(4)]
    assert given == list(result["scores"])
    put_label(client, "phantom_002", phantoms / "labels" / "phantom_002.nii.gz")
    left = client.post("/scoring/uncertainty?run_sync=true", json={"device": "cpu"}).json()["scores"]
    assert set(left) == set(result["scores"]) - {"phantom_002"}
    assert client.post("/activelearning/uncertainty", json={}).json()["id"] != "phantom_002"


def test_scores_by_noise_are_another_measure(client):
    scores = {
        measure: client.post("/scoring/uncertainty?run_sync=true", json={"measure": measure, "samples": 2}).json()
        for measure in ("probability", "noise")
    }
    for name, by_probability in scores["probability"]["scores"].items():
        assert 0 < scores["noise"]["scores"][name] < by_probability, "the noise of a trained network is weak"


@pytest.mark.parametrize("params", [{"measure": "entropy"}, {"measure": "noise", "samples": 1}])
def test_a_measure_that_cannot_be_is_refused(client, params):
    answer = client.post("/scoring/uncertainty?run_sync=true", json=params)
    assert answer.status_code == 400
    assert "measure is probability or noise" in answer.text or "samples are draws" in answer.text


def test_uncertainty_is_that_of_the_voxels_found():
    probability = torch.tensor([0.75, 0.9, 0.2, 0.5])  # the last two are not found
    logits = torch.logit(probability).reshape(1, 2, 2, 1)
    assert uncertainty(logits) == pytest.approx((0.5 + 0.2) / 2)
    spread = torch.tensor([0.1, 0.3, 0.5, 0.5]).reshape(1, 2, 2, 1)
    assert uncertainty(logits, spread) == pytest.approx(0.4)


def test_an_image_in_which_nothing_is_found_comes_first():
    assert uncertainty(torch.full((2, 3, 3, 1), -5.0)) == NOTHING_FOUND
