"""The Shape Distance loss: values computed by hand for a disc, and the map it compares with."""

import numpy as np
import pytest
import torch

from scripts.errors import ConfigError
from scripts.losses.shape_distance import ShapeDistanceLoss, distance_map

FORMS = ["soft", "max_normalised", "raw"]
CERTAIN = 200.0  # a logit whose sigmoid is 1, or 0 with the other sign


def disc(radius: float, *, size: int = 128) -> np.ndarray:
    """A disc centred on a pixel."""
    rows, columns = np.mgrid[:size, :size] - size // 2
    return (rows**2 + columns**2 <= radius**2).astype(np.uint8)


def certain(mask: np.ndarray) -> torch.Tensor:
    """The logits of a hard mask, `(1, H, W)`."""
    return torch.from_numpy(np.where(mask > 0, CERTAIN, -CERTAIN).astype(np.float32)).unsqueeze(0)


def loss_of(logits: torch.Tensor, target: np.ndarray, form: str = "soft") -> torch.Tensor:
    return ShapeDistanceLoss()(logits, torch.from_numpy(distance_map(target, form=form)).unsqueeze(0))


def depth_by_brute_force(mask: np.ndarray) -> np.ndarray:
    """The distance of each foreground pixel to the nearest background pixel, compared with every one of them."""
    background = np.argwhere(mask == 0)
    depth = np.zeros(mask.shape)
    for place in np.argwhere(mask > 0):
        depth[tuple(place)] = np.sqrt(((background - place) ** 2).sum(axis=1)).min()
    return depth


def random_mask(shape: tuple[int, int], *, share: float) -> np.ndarray:
    return (np.random.default_rng(3).random(shape) < share).astype(np.uint8)


# Values of the fact sheet.


@pytest.mark.parametrize(("radius", "expected"), [(40, 0.064), (35, 0.381), (45, 0.260)])
def test_hard_discs_against_a_disc_of_radius_40(radius, expected):
    assert loss_of(certain(disc(radius)), disc(40)).item() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("form", "expected", "tolerance"), [("max_normalised", 0.661, 5e-4), ("raw", 12.58, 5e-3)])
def test_the_other_forms_for_the_perfect_disc(form, expected, tolerance):
    assert loss_of(certain(disc(40)), disc(40), form).item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("prediction", [disc(40), disc(3), np.ones((128, 128))], ids=["disc", "dot", "all"])
def test_an_empty_target_costs_one(prediction):
    assert loss_of(certain(prediction), np.zeros((128, 128))).item() == pytest.approx(1.0)


def test_an_uncertain_prediction_of_an_empty_target_costs_one_too(generator):
    logits = torch.randn((1, 32, 32), generator=generator)
    assert loss_of(logits, np.zeros((32, 32))).item() == pytest.approx(1.0)


def test_predicting_the_map_itself_costs_nothing():
    distance = torch.from_numpy(distance_map(disc(10, size=32))).unsqueeze(0)
    logits = torch.logit(distance.double()).clamp(-CERTAIN, CERTAIN).float()
    assert ShapeDistanceLoss()(logits, distance).item() == pytest.approx(0.0, abs=1e-5)


def test_the_loss_by_hand():
    distance = torch.tensor([[[0.9, 0.2, 0.0, 0.0]]])
    logits = torch.logit(torch.tensor([[[0.5, 0.25, 0.5, 0.0]]])).clamp(-CERTAIN, CERTAIN)
    assert ShapeDistanceLoss()(logits, distance).item() == pytest.approx((0.4 + 0.05 + 0.5) / 1.25)


def test_less_than_one_pixel_is_measured_as_one_pixel():
    distance = torch.tensor([[[0.9, 0.2, 0.0, 0.0]]])
    logits = torch.logit(torch.tensor([[[0.5, 0.25, 0.0, 0.0]]])).clamp(-CERTAIN, CERTAIN)
    assert ShapeDistanceLoss()(logits, distance).item() == pytest.approx(0.4 + 0.05)


def test_one_value_for_each_mask():
    targets = [disc(40), np.zeros((128, 128)), disc(20)]
    distance = torch.from_numpy(np.stack([distance_map(target) for target in targets]))
    logits = torch.cat([certain(disc(40)), certain(disc(5)), certain(disc(40))])
    together = ShapeDistanceLoss()(logits, distance)
    assert together.shape == (3,)
    for i, target in enumerate(targets):
        assert together[i].item() == pytest.approx(loss_of(logits[i : i + 1], target).item())


# The map.


@pytest.mark.parametrize(("shape", "share"), [((12, 12), 0.8), ((7, 19), 0.6), ((1, 9), 0.7), ((16, 5), 0.95)])
def test_the_forms_against_brute_force(shape, share):
    mask = random_mask(shape, share=share)
    assert 0 < mask.sum() < mask.size
    depth = depth_by_brute_force(mask)
    relative = depth / depth.max()
    soft = np.where(mask > 0, 1 / (1 + np.exp(-(1 - relative) / 0.2)), 0)
    for form, expected in (("raw", depth), ("max_normalised", relative), ("soft", soft)):
        found = distance_map(mask, form=form)
        assert found.dtype == np.float32
        assert found.shape == shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_soft_is_the_default():
    np.testing.assert_array_equal(distance_map(disc(9, size=32)), distance_map(disc(9, size=32), form="soft"))


def test_soft_is_one_half_at_the_deepest_point_and_nearly_one_at_the_boundary():
    mask = disc(40)
    soft = distance_map(mask)
    inside = soft[mask > 0]
    assert inside.min() == soft[64, 64] == pytest.approx(0.5)
    assert inside.max() == pytest.approx(0.993, abs=1e-3)
    assert (soft[mask == 0] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_mask_has_an_empty_map(form):
    found = distance_map(np.zeros((5, 7)), form=form)
    assert found.shape == (5, 7)
    assert found.dtype == np.float32
    assert not found.any()


@pytest.mark.parametrize(("form", "value"), [("soft", 0.5), ("max_normalised", 1.0), ("raw", 1.0)])
def test_a_mask_that_fills_the_picture_is_equally_deep_everywhere(form, value):
    found = distance_map(np.ones((5, 7)), form=form)
    np.testing.assert_allclose(found, np.full((5, 7), value))


@pytest.mark.parametrize(("form", "value"), [("soft", 0.5), ("max_normalised", 1.0), ("raw", 1.0)])
@pytest.mark.parametrize("place", [(2, 3), (0, 0)])
def test_one_pixel(form, value, place):
    mask = np.zeros((5, 7))
    mask[place] = 1
    expected = np.zeros((5, 7))
    expected[place] = value
    np.testing.assert_allclose(distance_map(mask, form=form), expected)


def test_the_edge_of_the_picture_is_no_background():
    mask = np.zeros((6, 6))
    mask[:4] = 1
    np.testing.assert_allclose(distance_map(mask, form="raw")[:, 2], [4, 3, 2, 1, 0, 0])


@pytest.mark.parametrize("kind", [np.uint8, bool, np.float32])
def test_any_kind_of_mask(kind):
    mask = disc(5, size=16)
    scaled = (mask * (1 if kind is bool else 3)).astype(kind)
    np.testing.assert_array_equal(distance_map(scaled), distance_map(mask))


def test_an_unknown_form_is_refused():
    with pytest.raises(ConfigError, match="soft, max_normalised, raw, not 'signed'"):
        distance_map(np.ones((2, 2)), form="signed")


# Gradients.


@pytest.mark.parametrize("target", ["disc", "empty", "full", "pixel"])
@pytest.mark.parametrize("logit", [-1e4, -100.0, -5.0, 0.0, 5.0, 1e4])
def test_loss_and_gradient_are_finite_in_single_precision(target, logit):
    masks = {
        "disc": disc(6, size=24),
        "empty": np.zeros((24, 24)),
        "full": np.ones((24, 24)),
        "pixel": disc(0, size=24),
    }
    logits = torch.full((1, 24, 24), logit, requires_grad=True)
    loss = loss_of(logits, masks[target])
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


def test_the_gradient_agrees_with_differences():
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (2, 6, 5))).requires_grad_(True)
    distance = torch.from_numpy(np.stack([distance_map(random_mask((6, 5), share=share)) for share in (0.5, 0.9)]))
    assert torch.autograd.gradcheck(ShapeDistanceLoss(), (logits, distance.double()))


def test_a_prediction_that_is_too_small_is_drawn_outwards():
    logits = torch.full((1, 24, 24), -3.0, requires_grad=True)
    loss_of(logits, disc(6, size=24)).sum().backward()
    assert (logits.grad[0][torch.from_numpy(disc(6, size=24)) > 0] < 0).all()
