"""Quality without a truth: the answers' own estimates, and the files that set them beside the truth."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from torch.utils.data import DataLoader

from scripts.data.fitting import network_slices
from scripts.engines.answers import CaseAnswers, JudgedLogits, SliceQuality
from scripts.engines.batches import PrepareCase, only_case
from scripts.engines.evaluators import CaseEvaluator
from scripts.engines.inferers import ClassPromptInferer
from scripts.engines.postprocessing import LogitsToMasksd
from scripts.engines.quality import KeepLogits, ReportQuality, SaveQuality, predict_dsc
from scripts.engines.scoring import CaseScores
from scripts.errors import ConfigError
from scripts.metrics.calibration import dice_by_head
from scripts.networks.checkpoints import save_state_dict
from scripts.networks.model_card import ModelCard

SHAPE = (12, 20, 5)


@pytest.fixture(scope="module")
def network(build_network):
    return build_network(class_ids=(1, 2, 4)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def image():
    return torch.rand((1, 1, *SHAPE), generator=torch.Generator().manual_seed(3)) * 255


# The answers.


def answers_of(draws, qualities, *, places=(0,), columns=(0,), shape=(2, 2, 1), classes=1):
    answers = CaseAnswers(shape, classes=classes, samples=len(draws), device=torch.device("cpu"), judged=True)
    answers.put(places, columns, draws, qualities)
    return answers


def test_the_quality_by_hand():
    first = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]]]])  # two pixels above, and below the left two of each
    second = torch.tensor([[[[3.0, -1.0], [3.0, -1.0]]]])
    quality = answers_of([first, second], [torch.tensor([[0.5]]), torch.tensor([[0.7]])]).result().quality
    torch.testing.assert_close(quality.iou, torch.tensor([[0.6]]))
    assert quality.overlaps.tolist() == [[[[2, 1], [1, 2]]]]
    assert quality.area.tolist() == [[2]]  # the mean probabilities are 0.84, 0.5, 0.61 and 0.27


def test_what_was_not_asked_has_no_quality_and_what_is_repeated_has_the_same():
    draw = torch.ones((1, 1, 2, 2))
    answers = answers_of([draw], [torch.tensor([[0.25]])], places=[1], columns=[1], shape=(2, 2, 3), classes=2)
    answers.repeat(2, 1)
    quality = answers.result().quality
    assert quality.iou.isnan().tolist() == [[True, True], [True, False], [True, False]]
    assert quality.area.tolist() == [[0, 0], [0, 4], [0, 4]]
    assert quality.overlaps.flatten(1).tolist() == [[0, 0], [0, 4], [0, 4]]


@pytest.mark.parametrize("samples", [1, 3])
def test_the_masks_are_the_same_with_and_without_quality(network, image, samples):
    settings = {"samples": samples, "noise_seed": 4}
    plain = ClassPromptInferer(**settings)(image, network)
    judged = ClassPromptInferer(**settings, quality=True)(image, network)
    assert isinstance(judged, JudgedLogits)
    assert torch.equal(judged.logits, plain if samples == 1 else plain.logits)
    assert (judged.uncertainty is None) is (samples == 1)
    assert judged.quality.area.tolist() == (judged.logits[0] > 0).sum(dim=(1, 2)).T.tolist()


def test_the_quality_is_that_of_the_network_however_it_is_bundled(network, image):
    settings = {"samples": 3, "noise_seed": 4, "quality": True}
    together = ClassPromptInferer(**settings)(image, network, case="a").quality
    one_by_one = ClassPromptInferer(**settings, slices_at_once=1, prompts_at_once=1)(image, network, case="a").quality
    torch.testing.assert_close(together.iou, one_by_one.iou, rtol=1e-4, atol=1e-5)
    assert together.overlaps.shape == (5, 3, 3, 3)
    # A pixel whose logit is nearly 0 may change sides with the order of the sums.
    torch.testing.assert_close(together.overlaps, one_by_one.overlaps, atol=2, rtol=0)
    assert torch.equal(together.overlaps, together.overlaps.transpose(2, 3))


def test_a_judged_sample_is_the_decoders_own_estimate(network, image):
    quality = ClassPromptInferer(quality=True)(image, network, class_ids=[2]).quality
    pixels = network_slices(image[0], network.image_size)
    expected = network(pixels, class_ids=torch.full((5, 1), 2)).quality
    torch.testing.assert_close(quality.iou, expected, rtol=1e-4, atol=1e-5)


# What they predict.


def quality_of(iou, area, overlaps):
    return SliceQuality(torch.tensor(iou), torch.tensor(area), torch.tensor(overlaps))


def test_a_class_is_predicted_from_its_own_channel():
    quality = quality_of([[0.5, 1.0], [0.2, 0.0]], [[4, 1], [0, 1]], [[[[4]], [[1]]], [[[0]], [[1]]]])
    assert predict_dsc(quality, 0, head=True)["predicted_by_head"] == pytest.approx(2 / 3)
    assert predict_dsc(quality, 1, head=True)["predicted_by_head"] == pytest.approx(0.5)
    assert math.isnan(predict_dsc(quality, 1, head=False)["predicted_by_head"])
    assert math.isnan(predict_dsc(quality, 1, head=True)["predicted_by_samples"])


def test_samples_agree_over_the_whole_case():
    # Of slice 0 the two samples share all of 4 pixels, of slice 1 nothing of 3 and 1.
    quality = quality_of([[1.0], [1.0]], [[4], [2]], [[[[4, 4], [4, 4]]], [[[3, 0], [0, 1]]]])
    assert predict_dsc(quality, 0, head=False)["predicted_by_samples"] == pytest.approx(2 * 4 / (7 + 5))


# The files of an evaluation.


@pytest.fixture
def evaluate(network, make_case, vocabulary, tmp_path):
    """Evaluate two cases, one of which lacks a class, and give scores and rows."""

    def evaluate(*, samples=1, head=False, quality=True):
        cases = [make_case("a"), make_case("b", annotated=(2,))]
        scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
        evaluator = CaseEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(cases, batch_size=1, collate_fn=only_case),
            network=network,
            prepare_batch=PrepareCase(class_ids=[1, 2]),
            inferer=ClassPromptInferer(samples=samples, noise_seed=1, quality=quality),
            postprocessing=lambda data: LogitsToMasksd("pred")(KeepLogits()(data)),
            key_val_metric={"val_mean_dsc": scores},
            val_handlers=[ReportQuality(scores, output_dir=tmp_path, head=head)],
        )
        evaluator.logger.disabled = True
        evaluator.run()
        with open(tmp_path / "quality.csv", newline="") as file:
            return scores, list(csv.DictReader(file))

    return evaluate


def test_there_is_a_row_for_each_score_with_the_true_dsc(evaluate, tmp_path):
    scores, rows = evaluate(samples=2, head=True)
    assert [(row["case"], row["class"]) for row in rows] == [("a", "liver"), ("a", "spleen"), ("b", "spleen")]
    assert [float(row["dsc"]) for row in rows] == [score.dsc for score in scores.scores]
    assert [int(row["predicted_voxels"]) for row in rows] == [score.predicted_voxels for score in scores.scores]
    for row in rows:
        assert all(0 <= float(row[name]) <= 1 for name in row if name.startswith("predicted_by") and row[name])
    assert list(rows[0])[:5] == ["case", "class", "dsc", "predicted_by_head", "predicted_by_samples"]


def test_predictions_and_voxels_are_those_of_the_answer(evaluate, network, make_case, tmp_path):
    _, rows = evaluate(head=True)
    answer = ClassPromptInferer(noise_seed=1, quality=True)(
        make_case("b")["image"].as_tensor()[None], network, class_ids=[1, 2], case="b"
    )
    probability = torch.sigmoid(answer.logits[0, 1].double()).numpy()
    mask = probability > 0.5
    assert mask.any()
    expected = 2 * probability[mask].sum() / (mask.sum() + probability.sum())
    row = rows[2]
    assert float(row["predicted_by_probabilities"]) == pytest.approx(expected, rel=1e-4)
    by_head = dice_by_head(answer.quality.iou[:, 1].numpy(), answer.quality.area[:, 1].numpy())
    assert float(row["predicted_by_head"]) == pytest.approx(by_head, rel=1e-4)
    assert row["predicted_by_samples"] == ""
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert content["predicted_by_samples"] is None
    assert content["predicted_by_probabilities"]["pairs"] == 3
    assert sum(entry["count"] for entry in content["voxels"]["bins"]) == 3 * 12 * 16 * 4


def test_without_a_trained_head_it_predicts_nothing(evaluate, tmp_path):
    _, rows = evaluate()
    assert {row["predicted_by_head"] for row in rows} == {""}


def wrong_voxels(scores):
    """Voxels of one mask alone: |P| + |T| less twice those of both, which the DSC tells."""
    return sum(
        (score.predicted_voxels + score.truth_voxels) * (1 - (score.dsc if score.present else 0))
        for score in scores.scores
    )


def test_uncertainty_stands_beside_the_errors(evaluate, tmp_path):
    scores, _ = evaluate(samples=3)
    bins = json.loads((tmp_path / "uncertainty.json").read_text())["bins"]
    assert [set(entry) for entry in bins] == [{"low", "high", "error_rate", "voxels"}] * len(bins)
    assert (bins[0]["low"], bins[-1]["high"]) == (0.0, 0.5)
    assert sum(entry["voxels"] for entry in bins) == 3 * 12 * 16 * 4
    wrong = sum(entry["error_rate"] * entry["voxels"] for entry in bins if entry["voxels"])
    assert wrong == pytest.approx(wrong_voxels(scores), abs=1e-6)


def test_a_single_sample_has_no_uncertainty(evaluate, tmp_path):
    evaluate()
    assert not (tmp_path / "uncertainty.json").exists()


def test_an_inferer_without_quality_is_an_error(evaluate):
    with pytest.raises(ConfigError, match="set quality of the inferer to true"):
        evaluate(quality=False)


def test_a_failed_case_is_passed_by(vocabulary, tmp_path):
    engine = Engine(lambda *_: [])
    ReportQuality(CaseScores(class_ids=[1], vocabulary=vocabulary), output_dir=tmp_path).attach(engine)
    engine.run([[]])
    assert (tmp_path / "quality.csv").read_text().splitlines() == [
        "case,class,dsc,predicted_by_head,predicted_by_samples,predicted_by_probabilities,class_id,predicted_voxels"
    ]
    assert json.loads((tmp_path / "calibration.json").read_text())["voxels"]["calibration_error"] is None


# The file of a segmentation.


def test_each_class_of_a_segmentation_has_its_predicted_dice(vocabulary, tmp_path):
    quality = quality_of([[0.5, 0.4]], [[4, 0]], [[[[4, 2], [2, 4]], [[0, 0], [0, 0]]]])
    data = {"case": "c", "class_ids": [1, 2], "quality": quality}
    assert SaveQuality(vocabulary, output_dir=tmp_path, samples=2, head=True)(data) == data
    content = json.loads((tmp_path / "c_quality.json").read_text())
    assert content["case"] == "c"
    assert content["classes"]["liver"] == {
        "predicted_by_head": pytest.approx(2 / 3),
        "predicted_by_samples": 0.5,
        "predicted_voxels": 4,
    }
    nothing = {"predicted_by_head": None, "predicted_by_samples": None, "predicted_voxels": 0}
    assert content["classes"]["spleen"] == nothing


@pytest.mark.parametrize(("samples", "head", "fine"), [(1, False, False), (2, False, True), (1, True, True)])
def test_there_must_be_something_to_predict_from(vocabulary, tmp_path, samples, head, fine):
    if fine:
        SaveQuality(vocabulary, output_dir=tmp_path, samples=samples, head=head)
    else:
        with pytest.raises(ConfigError, match="several samples, or weights whose quality head was trained"):
            SaveQuality(vocabulary, output_dir=tmp_path, samples=samples, head=head)


# The shipped configs.


@pytest.fixture(scope="module")
def weights(build_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_state_dict(build_network(seed=5).state_dict(), path)
    return path


def test_the_configs_hand_the_quality_through(bundle_root, tiny_phantoms, weights, tmp_path):
    def run(*names, **settings):
        workflow = ConfigWorkflow(
            config_file=[str(bundle_root / "configs" / name) for name in names],
            logging_file=False,
            bundle_root=str(bundle_root),
            checkpoint=str(weights),
            output_dir=str(tmp_path),
            image_size=32,
            class_code="scalar",
            channels=[8, 16, 32],
            diffusion_steps=1,
            noise_seed=0,
            progress_bar=False,
            device="$torch.device('cpu')",
            **settings,
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()

    data = {"datalist": str(tiny_phantoms), "dataset_dir": str(tiny_phantoms.parent), "tensorboard": False}
    run("train.json", "evaluate.json", samples=2, **data)
    with open(tmp_path / "quality.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 5
    assert (tmp_path / "uncertainty.json").is_file()
    run("train.json", "evaluate.json", samples=1, quality=False, error_pictures=False, **data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "pictures", "run.json", "summary.json"]
    assert list((tmp_path / "pictures").iterdir()) == []
    organs = ["liver", "spleen", "pancreas", "left kidney", "right kidney"]
    asked = {"modality": "CT", "trained": {"CT": organs}, "smallest_quality": 0.0}  # a head that nobody trained
    run("inference.json", dataset_dir=str(tiny_phantoms.parent / "images"), quality=True, samples=2, **asked)
    (first, *_) = sorted(tmp_path.glob("*_quality.json"))
    found = json.loads(first.read_text())["classes"]
    assert list(found) == organs
    assert any(entry["predicted_by_samples"] is not None for entry in found.values())


def test_the_card_says_whether_the_head_was_trained(bundle_root):
    for losses, trained in ((["dice", "iou"], True), (["dice"], False)):
        workflow = ConfigWorkflow(
            config_file=str(bundle_root / "configs" / "train.json"),
            logging_file=False,
            bundle_root=str(bundle_root),
            losses=losses,
            **{"card#trained": {}, "training_cases": [], "datalist": "d.json"},
        )
        card = workflow.parser.get_parsed_content("card")
        assert isinstance(card, ModelCard)
        assert card.training["quality_head_trained"] is trained


def test_probabilities_of_one_half_are_no_mask():
    draws = [torch.zeros((1, 1, 2, 2))]
    assert np.asarray(answers_of(draws, [torch.zeros((1, 1))]).result().quality.overlaps).sum() == 0
