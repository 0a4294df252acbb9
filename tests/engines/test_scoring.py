"""What an evaluation reports: the scores of `score_case` on the right masks, with the right spacing and names."""

import hashlib
import json
import logging
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.utils.data import DataLoader

from scripts.engines.batches import PrepareCase, only_case
from scripts.engines.evaluators import FAILURE, CaseEvaluator
from scripts.engines.scoring import QUALITY_FILES, CaseScores, ForgetEarlierRun, RecordRun, ReportScores
from scripts.errors import ConfigError, InputError
from scripts.metrics.scores import score_case
from scripts.metrics.summaries import summarise
from scripts.report.tables import read_scores_csv, render_tables

SPACING = (2.0, 0.5, 5.0)


def predicted(case, *, shift=2):
    """The truth, moved along the rows."""
    return torch.roll(case["label"].as_tensor(), shift, dims=1).bool()


def by_hand(case, prediction, ids, names, *, spacing=SPACING, planar=False, tolerance=2.0):
    """The scores of the channels of these ids, straight from the function."""
    channels = [class_id - 1 for class_id in ids]
    return score_case(
        prediction.numpy()[channels],
        case["label"].numpy().astype(bool)[channels],
        case=case["case"],
        class_ids=ids,
        class_names=names,
        spacing=spacing,
        planar=planar,
        tolerance=tolerance,
    )


def test_scores_are_those_of_the_case_in_its_own_spacing(make_case, vocabulary):
    case = make_case(spacing=SPACING)
    scores = CaseScores(class_ids=[2, 1], vocabulary=vocabulary)
    scores.update([{**case, "pred": predicted(case)}])
    expected = by_hand(case, predicted(case), [1, 2], ["liver", "spleen"])
    assert scores.scores == expected
    assert 0 < expected[0].nsd < 1
    assert expected[0].nsd != by_hand(case, predicted(case), [1], ["liver"], spacing=SPACING[::-1])[0].nsd
    assert scores.compute() == pytest.approx(np.mean([score.dsc for score in expected]))


def test_the_spacing_is_that_of_a_turned_volume_too(make_case, vocabulary):
    case = make_case(spacing=SPACING)
    # Rows run towards the feet, columns towards the left and slices towards the back: lengths as before.
    turned = torch.tensor([[0, -0.5, 0, 9], [0, 0, -5, -3], [-2, 0, 0, 4], [0, 0, 0, 1]], dtype=torch.float64)
    case["image"] = MetaTensor(case["image"].as_tensor(), affine=turned, meta={"planar": False})
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    scores.update([{**case, "pred": predicted(case)}])
    assert scores.scores == by_hand(case, predicted(case), [1, 2], ["liver", "spleen"])


def test_the_tolerance_is_a_setting(make_case, vocabulary):
    case = make_case(spacing=SPACING)
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary, tolerance=0.25)
    scores.update([{**case, "pred": predicted(case)}])
    expected = by_hand(case, predicted(case), [1, 2], ["liver", "spleen"], tolerance=0.25)
    assert scores.scores == expected
    assert expected[0].nsd < by_hand(case, predicted(case), [1], ["liver"])[0].nsd


def test_pictures_are_measured_in_pixels(make_case, vocabulary):
    case = make_case(shape=(12, 16, 1), planar=True, spacing=SPACING)
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    scores.update([{**case, "pred": predicted(case, shift=3)}])
    assert scores.scores == by_hand(case, predicted(case, shift=3), [1, 2], ["liver", "spleen"], planar=True)
    assert [summary.unit for summary in scores.summaries()] == ["px"]


def test_only_annotated_classes_are_scored(make_case, vocabulary):
    case = make_case(classes=3, annotated=(1, 3, 9))
    scores = CaseScores(class_ids=[1, 2, 3], vocabulary=vocabulary)
    scores.update([{**case, "pred": predicted(case)}])
    expected = by_hand(case, predicted(case), [1, 3], ["liver", "pancreas"], spacing=(1, 1, 1))
    assert scores.scores == expected


def test_a_class_that_is_not_there_has_no_score_but_false_positives(make_case, vocabulary):
    case = make_case()
    case["label"][1] = 0
    prediction = torch.ones_like(case["label"].as_tensor()).bool()
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    scores.update([{**case, "pred": prediction}])
    spleen = scores.summaries()[0].classes[1]
    assert math.isnan(spleen.dsc)
    assert (spleen.cases, spleen.cases_without, spleen.false_positive_slices) == (0, 1, 4)
    assert scores.compute() == pytest.approx(scores.scores[0].dsc)


def evaluator_of(cases, scores, *handlers, name="val_mean_dsc"):
    """Evaluate cases whose prediction is known beforehand, under `truth`; a case without one failed."""

    class Known(nn.Module):
        def forward(self, case):
            return predicted(next(known for known in cases if known["case"] == case)).unsqueeze(0)

    return CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(cases, batch_size=1, collate_fn=only_case),
        network=Known(),
        prepare_batch=PrepareCase(class_ids=[1, 2]),
        inferer=lambda image, network, case, **_: network(case),
        key_val_metric={name: scores},
        val_handlers=handlers,
    )


def test_the_scores_of_a_run_get_names_of_their_own(make_case, vocabulary):
    cases = [make_case("b", spacing=SPACING), make_case("a", spacing=SPACING)]
    scores = CaseScores(class_ids=[1, 4], vocabulary=vocabulary)
    for case in cases:
        case["annotated"] = [1, 4]
    evaluator = evaluator_of(cases, scores)
    evaluator.run()
    summary = summarise(scores.scores, protocol="all", unit="mm")
    assert evaluator.state.metrics == {
        "val_mean_dsc": summary.dsc,
        "val_mean_nsd": summary.nsd,
        "val_liver_dsc": summary.classes[0].dsc,
        "val_liver_nsd": summary.classes[0].nsd,
        "val_left_kidney_dsc": summary.classes[1].dsc,
        "val_left_kidney_nsd": summary.classes[1].nsd,
    }
    assert [(score.case, score.class_id) for score in scores.scores] == [("a", 1), ("a", 4), ("b", 1), ("b", 4)]
    assert evaluator.state.best_metric == summary.dsc


def test_a_second_run_begins_anew(make_case, vocabulary):
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    cases = [make_case("a")]
    evaluator = evaluator_of(cases, scores)
    evaluator.run(1)
    first = list(scores.scores)
    evaluator.run(2)
    assert scores.scores == first
    assert len(first) == 2
    cases[:] = [make_case("b")]
    evaluator.run(3)
    assert {score.case for score in scores.scores} == {"b"}


def test_a_case_that_failed_is_left_out(make_case, vocabulary):
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    cases = [{"case": "bad", FAILURE: "unreadable"}, make_case("a"), {"case": "worse", FAILURE: "unreadable"}]
    evaluator_of(cases, scores).run()
    assert {score.case for score in scores.scores} == {"a"}


def test_the_report_is_printed_and_written(make_case, vocabulary, tmp_path, caplog):
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary, protocol="oracle")
    report = ReportScores(scores, output_dir=tmp_path / "new" / "folder")
    with caplog.at_level(logging.INFO, "scripts.engines.scoring"):
        evaluator_of([make_case("a"), make_case("b")], scores, report).run()
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "summary.json"]
    assert read_scores_csv(folder / "metrics.csv") == scores.scores
    content = json.loads((folder / "summary.json").read_text())
    assert content["protocol"] == "oracle"
    assert content["units"]["mm"]["mean"]["dsc"] == scores.summaries()[0].dsc
    assert list(content["units"]["mm"]["classes"]) == ["liver", "spleen"]
    assert render_tables(scores.summaries()) in caplog.text


def test_volumes_and_pictures_have_a_table_each(make_case, vocabulary, tmp_path, caplog):
    cases = [make_case("a"), make_case("b", shape=(12, 16, 1), planar=True)]
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    with caplog.at_level(logging.INFO, "scripts.engines.scoring"):
        evaluator_of(cases, scores, ReportScores(scores, output_dir=tmp_path, averaging="slice")).run()
    content = json.loads((tmp_path / "summary.json").read_text())
    assert {unit: entry["cases"] for unit, entry in content["units"].items()} == {"mm": 1, "px": 1}
    assert "NSD @ 2 mm" in caplog.text
    assert "NSD @ 2 px" in caplog.text
    assert caplog.text.count("Averaging per slice") == 2
    assert {score.unit for score in read_scores_csv(tmp_path / "metrics.csv")} == {"mm", "px"}


def test_an_unknown_averaging_is_refused_before_the_work(vocabulary, tmp_path):
    with pytest.raises(ConfigError, match="averaging"):
        ReportScores(CaseScores(class_ids=[1], vocabulary=vocabulary), output_dir=tmp_path, averaging="none")


def test_batches_are_pooled_as_many_cases_as_is_set(make_case, vocabulary, tmp_path, caplog):
    cases = [make_case(name) for name in "abc"]
    cases[1]["label"][0, :, 8:] = 1
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary, pooled_batch=2)
    with caplog.at_level(logging.INFO, "scripts.engines.scoring"):
        evaluator_of(cases, scores, ReportScores(scores, output_dir=tmp_path, averaging="batch-pooled")).run()
    content = json.loads((tmp_path / "summary.json").read_text())["units"]["mm"]
    masks = [(predicted(case)[0].numpy(), case["label"][0].numpy() > 0) for case in cases]
    first, second = (np.concatenate([mask[side].ravel() for mask in masks[:2]]) for side in range(2))
    alone = scores.scores[-2]
    assert (alone.case, alone.class_name) == ("c", "liver")
    iou = np.count_nonzero(first & second) / np.count_nonzero(first | second)
    assert content["pooled_batch"] == 2
    assert content["classes"]["liver"]["batch-pooled"]["iou"] == pytest.approx((2 * iou + alone.iou) / 3)
    assert content["classes"]["liver"]["batch-pooled"]["iou"] != pytest.approx(content["classes"]["liver"]["iou"])
    assert "Averaging batch-pooled: DSC and IoU over all voxels of a batch as one mask (batch of 2:" in " ".join(
        caplog.text.split()
    )


def test_a_batch_of_no_case_is_refused_before_the_work(vocabulary):
    with pytest.raises(ConfigError, match="pooled_batch"):
        CaseScores(class_ids=[1], vocabulary=vocabulary, pooled_batch=0)


def test_patient_and_sides_come_from_datalist_and_vocabulary(make_case, vocabulary):
    case = make_case(classes=5, annotated=(1, 4, 5))
    case["patient"] = "p7"
    case["label"][3, 2:9, 2:6] = 1
    case["label"][4, 7:11, 2:8] = 1
    prediction = case["label"].as_tensor().bool().clone()
    prediction[3] |= prediction[4]  # the right kidney taken for the left one as well
    scores = CaseScores(class_ids=[1, 2, 3, 4, 5], vocabulary=vocabulary)
    scores.update([{**case, "pred": prediction}])
    liver, left, right = scores.scores
    assert {score.patient for score in scores.scores} == {"p7"}
    assert liver.swapped_voxels is None
    assert left.swapped_voxels == int(case["label"][4].sum()) > 0
    # The blocks of the two classes overlap in the truth.
    assert right.swapped_voxels == int((case["label"][3] * case["label"][4]).sum())


def test_the_run_is_recorded(make_case, vocabulary, tmp_path):
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    (tmp_path / "model.pt").write_bytes(b"weights")
    record = RecordRun(
        output_dir=tmp_path / "new", files={"checkpoint": str(tmp_path / "model.pt")}, settings={"presence": "all"}
    )
    evaluator_of([make_case("a"), {"case": "bad", FAILURE: "unreadable"}], scores, record).run()
    content = json.loads((tmp_path / "new" / "run.json").read_text())
    assert content["settings"] == {"presence": "all"}
    assert content["failed"] == {"bad": "unreadable"}
    assert content["files"]["checkpoint"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert 0 < content["seconds"] < 60


def test_pictures_and_quality_of_an_earlier_evaluation_go_and_other_files_stay(make_case, vocabulary, tmp_path):
    mine = ["notes.txt", "quality.json", "metrics.csv", "pictures/mine.png", "attention/mine.png"]
    for folder in ("pictures", "attention"):
        (tmp_path / folder).mkdir()
    for name in (*mine, *QUALITY_FILES, "pictures/old__liver.png", "attention/old.png", "attention/old.npz"):
        (tmp_path / name).touch()
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    evaluator_of([make_case("a")], scores, ForgetEarlierRun(tmp_path)).run()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(mine)


def test_a_folder_that_is_not_there_has_nothing_to_forget(make_case, vocabulary, tmp_path):
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    evaluator_of([make_case("a")], scores, ForgetEarlierRun(tmp_path / "new")).run()
    assert list(tmp_path.iterdir()) == []


def test_another_process_leaves_the_files_to_the_first(make_case, vocabulary, tmp_path, monkeypatch):
    (tmp_path / "quality.csv").touch()
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    evaluator_of([make_case("a")], scores, ForgetEarlierRun(tmp_path)).run()
    assert (tmp_path / "quality.csv").is_file()


def test_nothing_to_score_is_said(vocabulary, tmp_path):
    scores = CaseScores(class_ids=[1, 2], vocabulary=vocabulary)
    with pytest.raises(InputError, match="at least one case"):
        scores.compute()
