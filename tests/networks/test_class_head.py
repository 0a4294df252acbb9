"""A linear reading of the embedding: which weight reads which class at which place."""

import numpy as np
import pytest
import torch

from scripts.networks.class_head import ClassHead

CLASSES = (9, 2, 5)  # in their order: 2, 5, 9


@pytest.fixture
def head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClassHead(class_ids=CLASSES, image_size=12).requires_grad_(False)


def test_each_cell_gives_four_by_four_values_of_each_class(head, generator):
    """By a loop over classes and places; without resizing, since 3 cells give 12 pixels."""
    embedding = torch.randn((2, 256, 3, 3), generator=generator)
    logits = head(embedding, torch.tensor([[9, 2], [5, 5]]))
    weight, bias = head.project.weight.flatten(1).numpy(), head.project.bias.numpy()
    for image, asked in enumerate([[9, 2], [5, 5]]):
        for k, class_id in enumerate(asked):
            first = 16 * sorted(CLASSES).index(class_id)
            for y, x in np.ndindex(12, 12):
                row = first + 4 * (y % 4) + x % 4
                expected = weight[row] @ embedding[image, :, y // 4, x // 4].numpy() + bias[row]
                assert logits[image, k, y, x].item() == pytest.approx(expected, abs=1e-4)


def test_masks_are_enlarged_to_the_image(head, generator):
    larger = ClassHead(class_ids=CLASSES, image_size=24).requires_grad_(False)
    larger.load_state_dict(head.state_dict())
    embedding, asked = torch.randn((1, 256, 3, 3), generator=generator), torch.tensor([[5]])
    expected = torch.nn.functional.interpolate(head(embedding, asked), size=(24, 24), mode="bilinear")
    assert torch.equal(larger(embedding, asked), expected)


def test_batched_equals_one_by_one(head, generator):
    embedding, asked = torch.randn((3, 256, 3, 3), generator=generator), torch.tensor([[2, 9], [9, 5], [5, 2]])
    together = head(embedding, asked)
    for place in range(3):
        alone = head(embedding[place : place + 1], asked[place : place + 1])
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_id", [3, 10])
def test_an_unknown_class_is_an_error(head, generator, class_id):
    with pytest.raises(IndexError):
        head(torch.randn((1, 256, 3, 3), generator=generator), torch.tensor([[class_id]]))
