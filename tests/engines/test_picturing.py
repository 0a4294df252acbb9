"""An evaluation leaves a picture of each class that a case has, of the right masks; and of each case what the abstract
prompts of its network attend to."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from scripts.data.fitting import fit_masks_to_square, network_slices
from scripts.engines.batches import PrepareCase, only_case
from scripts.engines.evaluators import FAILURE, CaseEvaluator
from scripts.engines.picturing import SaveAttentionPictures, SaveErrorPictures
from scripts.errors import ConfigError
from scripts.networks.hsp_sam import HSPSAM
from scripts.report.attention_pictures import attention_picture
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


def names(folder, part="pictures"):
    return sorted(path.name for path in (folder / part).iterdir())


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


# -------------------------------------------------------------------------------------------------- of the attention

SIZE = 32


def build_hsp_sam(**settings):
    """A small prompt-free network of two classes; always the same weights."""
    small = {"image_encoder": "compact", "image_size": SIZE, "class_ids": (1, 2), "train_image_encoder": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HSPSAM(**{**small, **settings})


def attention_handler(vocabulary, folder, network):
    return SaveAttentionPictures(class_ids=[2, 1], vocabulary=vocabulary, network=network, output_dir=folder)


def explained(network, case, index):
    """The maps of one slice, as they are in a case that the network gets whole."""
    pixels = network_slices(case["image"].as_tensor(), network.image_size)
    with torch.no_grad():
        attention = copy.deepcopy(network).eval().explain(pixels).attention
    return {level: maps[index].numpy() for level, maps in attention.items()}


def stored(folder, case):
    with np.load(folder / "attention" / f"{case}.npz") as found:
        return {name: found[name] for name in found.files}


def test_every_case_has_its_maps_and_their_picture(make_case, vocabulary, tmp_path):
    network = build_hsp_sam(prompts=3)
    cases = [make_case("a"), make_case("b", shape=(16, 12, 1), planar=True, channels=3)]
    evaluate(cases, attention_handler(vocabulary, tmp_path, network))
    assert names(tmp_path, "attention") == ["a.npz", "a.png", "b.npz", "b.png"]
    for case, index, title in ((cases[0], 1, "a, slice 2 of 4"), (cases[1], 0, "b")):  # two classes in a's second
        maps, expected = stored(tmp_path, case["case"]), explained(network, case, index)
        assert maps.pop("slice") == index
        assert list(maps) == ["level_1", "level_2", "level_3", "level_4"]
        for level, (found, right) in enumerate(zip(maps.values(), expected.values(), strict=True)):
            assert found.shape == (3, 4, 4), level
            np.testing.assert_allclose(found, right, rtol=1e-4)
            np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, rtol=1e-5)
        predicted = torch.roll(case["label"].as_tensor(), 2, dims=1)[None, ..., index]
        picture = attention_picture(
            255 * network_slices(case["image"].as_tensor(), SIZE)[index].numpy(),
            {level: maps[f"level_{level + 1}"] for level in expected},
            fit_masks_to_square(predicted, SIZE)[0].numpy().astype(bool),
            classes=[vocabulary.entry(class_id) for class_id in (1, 2)],
            levels=4,
            title=title,
            path=tmp_path / "expected.png",
        )
        assert (tmp_path / "attention" / f"{case['case']}.png").read_bytes() == picture.read_bytes()


def test_a_case_without_a_prediction_shows_its_middle_slice(make_case, vocabulary, tmp_path):
    network, case = build_hsp_sam(), make_case("a", shape=(12, 16, 5))
    case["label"][:] = 0  # what is predicted is the truth moved
    evaluate([case], attention_handler(vocabulary, tmp_path, network))
    maps = stored(tmp_path, "a")
    assert maps["slice"] == 2
    np.testing.assert_allclose(maps["level_4"], explained(network, case, 2)[3], rtol=1e-4)


def test_levels_without_prompts_have_no_map(make_case, vocabulary, tmp_path):
    evaluate([make_case("a")], attention_handler(vocabulary, tmp_path, build_hsp_sam(fusion="none")))
    assert list(stored(tmp_path, "a")) == ["slice", "level_4"]


def test_the_network_explains_in_eval_mode_without_gradients_and_goes_on_as_it_was(make_case, vocabulary, tmp_path):
    network, case = build_hsp_sam(image_encoder="lite_medsam"), make_case("a")
    network.train()
    expected = explained(network, case, 1)
    modes = []
    network.decoder.register_forward_hook(lambda decoder, *_: modes.append((decoder.training, torch.is_grad_enabled())))
    before = copy.deepcopy(network.state_dict())
    evaluate([case], attention_handler(vocabulary, tmp_path, network))
    assert modes == [(False, False)]
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())  # batch statistics too
    for level, maps in expected.items():
        np.testing.assert_allclose(stored(tmp_path, "a")[f"level_{level + 1}"], maps, rtol=1e-3)


def test_a_wrapped_network_is_explained(make_case, vocabulary, tmp_path):
    network = build_hsp_sam()
    evaluate([make_case("a")], attention_handler(vocabulary, tmp_path, nn.DataParallel(network)))
    np.testing.assert_allclose(stored(tmp_path, "a")["level_1"], explained(network, make_case("a"), 1)[0], rtol=1e-4)


def test_cases_that_failed_have_no_attention(make_case, vocabulary, tmp_path):
    cases = [{"case": "broken", FAILURE: "no image"}, make_case("x/y")]
    evaluate(cases, attention_handler(vocabulary, tmp_path, build_hsp_sam()))
    assert names(tmp_path, "attention") == ["x%2Fy.npz", "x%2Fy.png"]


def test_attention_of_an_earlier_evaluation_goes_and_other_files_stay(make_case, vocabulary, tmp_path):
    (tmp_path / "attention").mkdir()
    for name in ("old.1.npz", "old.1.png", "old.png", "notes.txt"):
        (tmp_path / "attention" / name).touch()
    evaluate([make_case("a")], attention_handler(vocabulary, tmp_path, build_hsp_sam()))
    assert names(tmp_path, "attention") == ["a.npz", "a.png", "notes.txt", "old.png"]


def test_a_network_without_abstract_prompts_is_refused(build_network, vocabulary, tmp_path):
    with pytest.raises(ConfigError, match="AutoMedSAM has none"):
        attention_handler(vocabulary, tmp_path, build_network())
    with pytest.raises(ConfigError, match="prompts: 0"):
        attention_handler(vocabulary, tmp_path, build_hsp_sam(prompts=0))
    with pytest.raises(ConfigError, match="prompt_source: positional"):
        attention_handler(vocabulary, tmp_path, build_hsp_sam(prompt_source="positional"))
    assert list(tmp_path.iterdir()) == []
