"""Boxes as prompts: where they come from, where they lie on the network's square, and what is asked with them."""

import numpy as np
import pytest
import torch
from torch import nn

from scripts.data.fitting import fit_masks_to_square, fitted_shape, network_slices, restore_from_square
from scripts.data.slices import grown_box
from scripts.engines.batches import PrepareCase, tight_boxes
from scripts.engines.box_inferer import BoxPromptInferer, BoxPromptTraining, canvas_boxes
from scripts.engines.inferers import ClassPromptInferer
from scripts.errors import ConfigError
from scripts.losses.joint import JointLoss, PromptTargets

HALF = {"rtol": 1e-3, "atol": 1e-2}
ABSENT = -1000


@pytest.fixture
def network(build_network):
    return build_network(class_ids=(1, 2)).eval().requires_grad_(False)


def blobs(shape, seed=0):
    """Masks (K, H, W, D), some of them empty."""
    rng = np.random.default_rng(seed)
    masks = torch.zeros(shape, dtype=torch.uint8)
    for k in range(shape[0]):
        for d in range(shape[3]):
            if rng.random() < 0.7:
                top, left = rng.integers(shape[1] - 2), rng.integers(shape[2] - 2)
                masks[k, top : top + rng.integers(1, 9), left : left + rng.integers(1, 9), d] = 1
    return masks


# --- the true boxes


def test_boxes_are_those_of_training():
    masks = blobs((3, 20, 14, 6))
    boxes = tight_boxes(masks)
    assert boxes.shape == (3, 6, 4)
    rng = np.random.default_rng(0)
    for k, d in np.ndindex(3, 6):
        layer = masks[k, :, :, d].numpy()
        if layer.any():
            assert boxes[k, d].tolist() == grown_box(layer, growth=0, rng=rng).tolist()
        else:
            assert boxes[k, d].isnan().all()


def test_a_box_by_hand():
    masks = torch.zeros((1, 5, 7, 2))
    masks[0, 1:3, 4:7, 1] = 1  # rows 1 and 2, columns 4 to 6, at the right border
    boxes = tight_boxes(masks)
    assert boxes[0, 1].tolist() == [4, 1, 6, 2]
    assert boxes[0, 0].isnan().all()


@pytest.mark.parametrize("settings", [{"presence": "all", "class_ids": [1]}, {"presence": "oracle"}])
def test_boxes_are_handed_over_where_the_truth_may_tell(settings):
    with pytest.raises(ConfigError, match="boxes of the truth"):
        PrepareCase(boxes=True, **settings)


def test_a_case_comes_with_its_boxes(make_case):
    case = make_case()
    _, _, _, arguments = PrepareCase(class_ids=[1, 2], presence="oracle", boxes=True)(case)
    torch.testing.assert_close(arguments["boxes"][0], tight_boxes(case["label"].as_tensor()), equal_nan=True)
    assert "boxes" not in PrepareCase(class_ids=[1, 2], presence="oracle")(case)[3]


# --- on the network's square


@pytest.mark.parametrize("shape", [(40, 40), (64, 40), (30, 50), (20, 14)])
def test_a_box_on_the_square_covers_the_mask_there(shape):
    masks = blobs((2, *shape, 5), seed=3)
    boxes = canvas_boxes(tight_boxes(masks), original=shape, size=32, offset=0)
    fitted = fit_masks_to_square(masks.permute(3, 0, 1, 2), 32).permute(1, 2, 3, 0)
    there = tight_boxes(fitted)
    seen = ~there.isnan()
    difference = (boxes - there)[seen].reshape(-1, 4)
    assert len(difference) > 3
    assert (difference[:, :2] <= 0).all()
    assert (difference[:, 2:] >= 0).all()
    assert difference.abs().max() <= np.ceil(32 / max(shape))
    assert torch.equal(boxes.isnan(), tight_boxes(masks).isnan())


def test_offsets_by_hand():
    box = torch.tensor([[2.0, 4.0, 5.0, 7.0]])  # of 16 x 8 pixels on a square of 32: twice as large
    at = {"original": (16, 8), "size": 32}
    assert canvas_boxes(box, **at, offset=0).tolist() == [[4, 8, 11, 15]]
    assert canvas_boxes(box, **at, offset=3).tolist() == [[1, 5, 14, 18]]
    assert canvas_boxes(box, **at, offset=10).tolist() == [[0, 0, 21, 25]]
    assert canvas_boxes(box, **at, offset=50).tolist() == [[0, 0, 31, 31]]
    assert canvas_boxes(box, **at, offset="whole").tolist() == [[0, 0, 15, 31]]  # the image, without the padding
    assert canvas_boxes(box * torch.nan, **at, offset="whole").isnan().all()


# --- asking


def alone(network, volume, boxes, offset=0):
    """The logits (K, H, W, D) that SAM's prompt encoder and the decoder give slice by slice and box by box."""
    height, width, depth = volume.shape[2:]
    placed = canvas_boxes(boxes, original=(height, width), size=network.image_size, offset=offset)
    logits = torch.full((len(boxes), height, width, depth), float(ABSENT))
    for k, d in np.ndindex(len(boxes), depth):
        if not placed[k, d].isnan().any():
            embedding = network.encode_image(network_slices(volume[0, ..., d : d + 1], network.image_size))
            square, _ = network.decode(embedding, network.encode_boxes(placed[k, d].reshape(1, 1, 4)))
            restored = restore_from_square(square, size=network.image_size, original=(height, width))
            logits[k, :, :, d] = restored[0, 0]
    return logits


@pytest.mark.parametrize("offset", [0, 2.5, "whole"])
def test_all_at_once_is_one_by_one(network, offset):
    volume = torch.rand((1, 1, 24, 18, 7), generator=torch.Generator().manual_seed(1)) * 255
    volume[..., 3] = volume[..., 2]  # alike to the network, but asked with other boxes
    masks = blobs((2, 24, 18, 7), seed=2)
    boxes = tight_boxes(masks)
    inferer = BoxPromptInferer(offset=offset, slices_at_once=3, prompts_at_once=4)
    answer = inferer(volume, network, class_ids=[1, 2], boxes=boxes.unsqueeze(0))[0].float()
    expected = alone(network, volume, boxes, offset)
    there = (expected > ABSENT / 2).flatten(1, 2).any(dim=1)
    assert torch.equal(there, masks.bool().flatten(1, 2).any(dim=1))
    for k, d in np.ndindex(2, 7):
        if there[k, d]:
            torch.testing.assert_close(answer[k, ..., d], expected[k, ..., d], **HALF)
        else:
            assert (answer[k, ..., d] < -10).all()


def test_another_box_is_another_answer_and_no_class_is_told(network):
    volume = torch.rand((1, 1, 32, 32, 1), generator=torch.Generator().manual_seed(1)) * 255
    box = torch.tensor([4.0, 4, 12, 12]).reshape(1, 1, 1, 4)

    def answer(offset, class_id):
        return BoxPromptInferer(offset=offset)(volume, network, class_ids=[class_id], boxes=box).float()

    assert torch.equal(answer(0, 1), answer(0, 2))
    assert (answer(0, 1) - answer(6, 1)).abs().max() > 1e-3


def test_presence_leaves_out_what_has_a_box(network):
    volume = torch.rand((1, 1, 32, 32, 2)) * 255
    boxes = torch.tensor([4.0, 4, 12, 12]).expand(1, 1, 2, 4)
    presence = torch.tensor([[[True, False]]])
    answer = BoxPromptInferer()(volume, network, class_ids=[1], boxes=boxes, presence=presence)
    assert (answer[..., 0] > -100).any()
    assert (answer[..., 1] < -10).all()


def test_without_boxes_there_is_nothing_to_ask(network):
    with pytest.raises(ConfigError, match="needs the true boxes"):
        BoxPromptInferer()(torch.rand((1, 1, 8, 8, 1)), network, class_ids=[1])


@pytest.mark.parametrize("settings", [{"offset": -1}, {"offset": "half"}])
def test_an_offset_that_is_none(settings):
    with pytest.raises(ConfigError, match="the offset of boxes"):
        BoxPromptInferer(**settings)


@pytest.mark.parametrize("settings", [{"samples": 2, "noise_seed": 1}, {"runtime": "onnx"}])
def test_settings_that_boxes_do_not_have(settings):
    with pytest.raises(ConfigError, match="no noise to draw"):
        BoxPromptInferer(**settings)


# --- training


def test_training_on_boxes_teaches_the_decoder_alone(build_network):
    network = build_network(class_ids=(1, 2)).train()
    images, box = torch.rand((2, 3, 32, 32)), torch.tensor([4.0, 4, 20, 20]).expand(2, 1, 4)
    prediction = BoxPromptTraining()(images, network, box=box, class_ids=torch.ones((2, 1)), noise=None)
    mask = torch.zeros((2, 1, 32, 32))
    mask[..., 4:21, 4:21] = 1
    loss = JointLoss(losses=["dice", "cross_entropy"])
    loss(prediction, PromptTargets(mask, mask, torch.ones((2, 1), dtype=torch.bool))).backward()
    learning = {name.split(".")[0] for name, value in network.named_parameters() if value.grad is not None}
    assert learning == {"mask_decoder"}
    torch.testing.assert_close(prediction.logits, network.decode(network.encode_image(images), prediction.prompts)[0])


def test_stored_embeddings_are_taken_as_they_are(network):
    images, box = torch.rand((2, 3, 32, 32)), torch.tensor([4.0, 4, 20, 20]).expand(2, 1, 4)
    first = BoxPromptTraining()(images, network, box=box).logits
    second = BoxPromptTraining()(network.encode_image(images), network, box=box, embedded=True).logits
    torch.testing.assert_close(first, second)


def test_several_processes_are_refused(network):
    with pytest.raises(ConfigError, match="in one process alone"):
        BoxPromptTraining()(torch.rand((1, 3, 32, 32)), nn.Sequential(network), box=torch.zeros((1, 1, 4)))


def test_the_class_prompted_inferer_takes_no_boxes(network):
    volume = torch.rand((1, 1, 16, 16, 1)) * 255
    plain = ClassPromptInferer()(volume, network, class_ids=[1])
    assert torch.equal(plain, ClassPromptInferer()(volume, network, class_ids=[1], boxes=torch.zeros((1, 1, 1, 4))))
    assert fitted_shape(16, 16, 32) == (32, 32)
