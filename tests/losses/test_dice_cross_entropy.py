"""HSP-SAM's loss: MONAI's own as the reference, values by hand, and every degenerate batch."""

import math

import pytest
import torch
from monai.losses import DiceCELoss

from scripts.errors import ConfigError, InputError
from scripts.losses.dice_cross_entropy import DiceCrossEntropyLoss, exclusive_masks


def masks_of(generator, images, classes, size=12):
    """Random masks of which no two overlap; some pixels are background."""
    winners = torch.randint(0, classes + 1, (images, size, size), generator=generator)
    return torch.stack([(winners == k + 1).float() for k in range(classes)], dim=1)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("classes", [1, 4])
def test_it_is_monais_loss(images, classes, generator):
    masks = masks_of(generator, images, classes)
    logits = torch.randn(masks.shape, generator=generator)
    reference = DiceCELoss(
        softmax=True, squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5, lambda_dice=0.8, lambda_ce=0.2
    )
    with_background = torch.cat((torch.zeros(images, 1, *masks.shape[2:]), logits), dim=1)
    truth = torch.cat((1 - masks.sum(1, keepdim=True), masks), dim=1)
    torch.testing.assert_close(DiceCrossEntropyLoss()(logits, masks), reference(with_background, truth))


def test_by_hand():
    """Two pixels, one class: the first is the class's, with probability 3/4; the second not, with 1/2."""
    logits = torch.tensor([math.log(3.0), 0.0]).reshape(1, 1, 1, 2)
    loss = DiceCrossEntropyLoss()
    value = loss(logits, torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2))
    entropy = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    of_class = 1 - 2 * (3 / 4) / (9 / 16 + 1 / 4 + 1)
    of_background = 1 - 2 * (1 / 2) / (1 / 16 + 1 / 4 + 1)
    dice = (of_class + of_background) / 2
    assert loss.components["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert loss.components["dice"].item() == pytest.approx(dice, rel=1e-4)  # the smoothing is 1e-5
    assert value.item() == pytest.approx(0.2 * entropy + 0.8 * dice, rel=1e-4)


def test_the_dice_pools_the_batch():
    """An empty image beside a full one: pooled, what is wrong in the empty one weighs by its pixels alone."""
    masks = torch.zeros(2, 1, 4, 4)
    masks[0] = 1
    logits = torch.full((2, 1, 4, 4), 20.0)
    logits[1, 0, 0] = 20.0
    logits[1, 0, 1:] = -20.0  # 4 of 16 pixels wrong
    loss = DiceCrossEntropyLoss(cross_entropy_share=0.0, dice_share=1.0)
    of_class, of_background = 1 - 2 * 16 / (20 + 16), 1 - 2 * 12 / (12 + 16)
    assert loss(logits, masks).item() == pytest.approx((of_class + of_background) / 2, abs=1e-5)


def test_shares_are_factors(generator):
    masks = masks_of(generator, 2, 2)
    logits = torch.randn(masks.shape, generator=generator)
    loss = DiceCrossEntropyLoss(cross_entropy_share=3.0, dice_share=0.5)
    value = loss(logits, masks)
    torch.testing.assert_close(value, 3 * loss.components["cross_entropy"] + 0.5 * loss.components["dice"])


def test_perfect_masks_cost_nothing_and_wrong_ones_nearly_all(generator):
    masks = masks_of(generator, 2, 3)
    certain = 40 * masks - 20 * (1 - masks)
    assert DiceCrossEntropyLoss()(certain, masks).item() < 1e-4
    wrong = certain.roll(1, dims=1)
    assert DiceCrossEntropyLoss(cross_entropy_share=0)(wrong, masks).item() > 0.5


@pytest.mark.parametrize("shown", [0.0, 1.0])
def test_nothing_and_everything_have_a_finite_gradient(shown):
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    loss = DiceCrossEntropyLoss()(logits, torch.full((2, 1, 4, 4), shown))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_half_precision_is_raised_to_single():
    masks = torch.ones(1, 1, 512, 512)
    value = DiceCrossEntropyLoss()(torch.full((1, 1, 512, 512), 8.0, dtype=torch.float16), masks)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.2 * math.log1p(math.exp(-8)) + 0.8 * 0.5, abs=1e-3)


def test_the_background_is_what_is_left(generator):
    masks = masks_of(generator, 2, 3)
    with_background = exclusive_masks(masks)
    assert with_background.shape == (2, 4, 12, 12)
    assert (with_background.sum(dim=1) == 1).all()
    torch.testing.assert_close(with_background[:, 1:], masks)


def test_classes_that_overlap_are_refused():
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, :, 1, 1] = 1
    with pytest.raises(InputError, match="classes overlap"):
        DiceCrossEntropyLoss()(torch.zeros(1, 2, 4, 4), masks)


@pytest.mark.parametrize(("entropy", "dice"), [(-0.1, 0.8), (0.2, -1.0), (0.0, 0.0)])
def test_shares_that_are_none(entropy, dice):
    with pytest.raises(ConfigError, match="shares of cross-entropy and Dice"):
        DiceCrossEntropyLoss(cross_entropy_share=entropy, dice_share=dice)


def test_it_has_no_weights_to_learn():
    loss = DiceCrossEntropyLoss()
    assert list(loss.parameters()) == []
    assert loss.named_weights() == {}
