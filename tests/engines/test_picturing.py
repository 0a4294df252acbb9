"""An evaluation leaves a picture of each class that a case has, of the right masks, and none of an earlier run."""

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from scripts.engines.batches import PrepareCase, only_case
from scripts.engines.evaluators import FAILURE, CaseEvaluator
from scripts.engines.picturing import SaveErrorPictures
from scripts.report.error_pictures import error_picture


def evaluate(cases, handler):
    """Evaluate cases whose prediction is the truth moved along the rows."""

    class Known(nn.Module):
        def forward(self, case):
            label = next(known for known in cases if known["case"] == case)["label"].as_tensor()
            return torch.roll(label, 2, dims=1).bool().unsqueeze(0)

    evaluator = CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(cases, batch_size=1, collate_fn=only_case),
        network=Known(),
        prepare_batch=PrepareCase(class_ids=[1, 2]),
        inferer=lambda image, network, case, **_: network(case),
        val_handlers=[handler],
    )
    evaluator.run()


def names(folder):
    return sorted(path.name for path in (folder / "pictures").iterdir())


def handler_of(vocabulary, folder):
    return SaveErrorPictures(class_ids=[2, 1], vocabulary=vocabulary, output_dir=folder)


def test_every_class_of_every_case_has_its_picture(make_case, vocabulary, tmp_path):
    cases = [make_case("a"), make_case("b", shape=(16, 12, 1), planar=True, channels=3)]
    evaluate(cases, handler_of(vocabulary, tmp_path))
    assert names(tmp_path) == ["a__liver.png", "a__spleen.png", "b__liver.png"]  # b has no second slice, so no spleen
    label = cases[0]["label"].numpy().astype(bool)
    predicted = torch.roll(cases[0]["label"].as_tensor(), 2, dims=1).numpy().astype(bool)
    expected = error_picture(cases[0]["image"].numpy(), predicted[1], label[1], path=tmp_path / "expected.png")
    assert (tmp_path / "pictures" / "a__spleen.png").read_bytes() == expected.read_bytes()
    assert Image.open(tmp_path / "pictures" / "b__liver.png").format == "PNG"


def test_classes_that_are_absent_or_not_annotated_have_none(make_case, vocabulary, tmp_path):
    absent, unknown = make_case("absent"), make_case("unknown", annotated=(2,))
    absent["label"][0] = 0
    evaluate([absent, unknown], handler_of(vocabulary, tmp_path))
    assert names(tmp_path) == ["absent__spleen.png", "unknown__spleen.png"]


def test_cases_that_failed_have_none(make_case, vocabulary, tmp_path):
    evaluate([{"case": "broken", FAILURE: "no image"}, make_case("a")], handler_of(vocabulary, tmp_path))
    assert names(tmp_path) == ["a__liver.png", "a__spleen.png"]


def test_pictures_of_an_earlier_evaluation_go_and_other_files_stay(make_case, vocabulary, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "old__liver.png").touch()
    (tmp_path / "pictures" / "mine.png").touch()
    evaluate([make_case("a")], handler_of(vocabulary, tmp_path))
    assert names(tmp_path) == ["a__liver.png", "a__spleen.png", "mine.png"]
