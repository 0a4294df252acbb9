"""Training from nothing: which question goes to the class head and which to the mask decoder."""

import pytest
import torch
from torch import nn

from scripts.engines.box_inferer import BoxPromptTraining
from scripts.engines.encoder_start import EncoderStartTraining
from scripts.errors import ConfigError
from scripts.losses.joint import JointLoss, PromptTargets
from scripts.networks.class_head import ClassHead

IDS = torch.tensor([[1, 2, 1], [2, 2, 1]])
BOX = torch.tensor([[[0.0, 0, 9, 9], [4, 4, 20, 30], [1, 2, 3, 4]], [[5, 5, 6, 6], [0, 0, 31, 31], [8, 1, 20, 9]]])


@pytest.fixture
def network(build_network):
    return build_network(class_ids=(1, 2), train_image_encoder=True)


@pytest.fixture
def head(network):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ClassHead(class_ids=(1, 2), image_size=network.image_size)


@pytest.fixture
def images(network, generator):
    return torch.rand((2, 3, network.image_size, network.image_size), generator=generator)


def test_each_question_is_answered_by_whom_it_is_asked(network, head, images):
    by_box = torch.tensor([[False, True, False], [True, True, False]])
    answer = EncoderStartTraining(head=head)(images, network, class_ids=IDS, box=BOX, by_box=by_box)
    by_head = head(network.encode_image(images), IDS)
    decoded = BoxPromptTraining()(images, network, box=BOX)
    torch.testing.assert_close(answer.logits[~by_box], by_head[~by_box])
    torch.testing.assert_close(answer.logits[by_box], decoded.logits[by_box], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.quality[by_box], decoded.quality[by_box], rtol=1e-4, atol=1e-4)
    assert not answer.quality[~by_box].any()


@pytest.mark.parametrize("by_box", [None, torch.zeros((2, 3), dtype=torch.bool)])
def test_without_boxes_the_head_answers_all(network, head, images, by_box):
    answer = EncoderStartTraining(head=head)(images, network, class_ids=IDS, box=BOX, by_box=by_box)
    assert torch.equal(answer.logits, head(network.encode_image(images), IDS))


def test_encoder_decoder_and_head_learn_and_the_class_prompt_encoder_does_not(network, head, images):
    by_box = torch.tensor([[True, False, False], [False, False, True]])
    answer = EncoderStartTraining(head=head)(images, network, class_ids=IDS, box=BOX, by_box=by_box)
    mask = (torch.rand(answer.logits.shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    targets = PromptTargets(mask, torch.zeros_like(mask), torch.ones((2, 3), dtype=torch.bool))
    JointLoss(losses=["dice", "cross_entropy"], dice="each")(answer, targets).backward()
    for part in (network.image_encoder, network.mask_decoder.transformer, head):
        assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters())
    assert all(parameter.grad is None for parameter in network.class_prompt_encoder.parameters())


def test_several_processes_are_refused(network, head, images):
    with pytest.raises(ConfigError, match="one process alone"):
        EncoderStartTraining(head=head)(images, nn.Sequential(network), class_ids=IDS, box=BOX)
