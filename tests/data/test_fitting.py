import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from torch.nn.functional import interpolate

from scripts.data.fitting import (
    fit_masks_to_square,
    fit_to_square,
    fitted_shape,
    network_slices,
    restore_from_square,
)
from scripts.data.preprocessing import unit_range

SHAPES = [(37, 91), (512, 400), (1, 50), (300, 300)]


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((512, 400), 256, (256, 200)),
        ((400, 512), 256, (200, 256)),
        ((300, 300), 64, (64, 64)),
        ((1, 50), 32, (1, 32)),  # 0.64 rounded
        ((1, 500), 32, (1, 32)),  # 0.064 would vanish
        ((5, 128), 64, (3, 64)),  # 2.5 is rounded up, not to the even 2
        ((10, 20), 64, (32, 64)),  # small images grow
    ],
)
def test_longest_side_fills_the_square(shape, size, expected):
    assert fitted_shape(*shape, size) == expected


def test_512_by_400_becomes_256_by_200_with_zeros_on_the_right():
    square = fit_to_square(torch.ones(2, 3, 512, 400), 256)
    assert square.shape == (2, 3, 256, 256)
    assert torch.equal(square[:, :, :, :200], torch.ones(2, 3, 256, 200))
    assert square[:, :, :, 200:].abs().max() == 0


def test_wide_image_is_padded_at_the_bottom():
    square = fit_to_square(torch.ones(1, 1, 37, 91), 64)
    assert torch.allclose(square[0, 0, :26], torch.ones(26, 64))
    assert square[0, 0, 26:].abs().max() == 0


def test_shrinking_averages_like_pillow(generator):
    stored = torch.randint(0, 256, (48, 90), generator=generator, dtype=torch.uint8)
    expected = np.asarray(Image.fromarray(stored.numpy()).convert("F").resize((30, 16), Image.Resampling.BILINEAR))
    square = fit_to_square(stored[None, None], 30)
    assert np.allclose(square[0, 0, :16].numpy(), expected, atol=1e-3)


def test_mask_fitting_halves_exactly_and_keeps_values():
    masks = torch.zeros(1, 2, 8, 4, dtype=torch.uint8)
    masks[0, 0, 3:6] = 1  # the nearest rows are 1, 3, 5 and 7
    masks[0, 1, :, 2:] = 1
    square = fit_masks_to_square(masks, 4)
    assert square.dtype == torch.uint8
    assert torch.equal(square[0, 0], torch.tensor([[0] * 4, [1, 1, 0, 0], [1, 1, 0, 0], [0] * 4], dtype=torch.uint8))
    assert torch.equal(square[0, 1], torch.tensor([[0, 1, 0, 0]] * 4, dtype=torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_pixels_lie_where_their_image_pixels_lie(shape, generator):
    # A mask whose image is itself: wherever the fitted image is clearly inside or outside, the fitted mask agrees.
    coarse = torch.rand(1, 1, 3, 3, generator=generator)
    mask = (interpolate(coarse, shape, mode="bilinear") > 0.5).to(torch.uint8)
    image, fitted = fit_to_square(mask, 48), fit_masks_to_square(mask, 48)
    assert torch.equal(fitted[image > 0.99], torch.ones_like(fitted[image > 0.99]))
    assert fitted[image < 0.01].sum() == 0


def _plane(rows, columns, *, slopes):
    return slopes[0] * rows[:, None] + slopes[1] * columns[None, :]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resolution", [64, 16])
def test_restoring_puts_every_point_where_it_belongs(shape, resolution):
    """Bilinear interpolation reproduces a plane, so its values tell the position that each pixel was taken from."""
    slopes = (0.0 if shape[0] == 1 else 0.02, -0.03)
    fitted = fitted_shape(*shape, 64)
    # Pixel centres of the low-resolution square, in pixels of the image: what the fitting has to mean.
    centres = (torch.arange(resolution) + 0.5) * 64 / resolution
    logits = _plane(centres * shape[0] / fitted[0], centres * shape[1] / fitted[1], slopes=slopes)
    restored = restore_from_square(logits[None, None], size=64, original=shape)
    expected = _plane(torch.arange(shape[0]) + 0.5, torch.arange(shape[1]) + 0.5, slopes=slopes)
    assert restored.shape == (1, 1, *shape)
    # Within one coarse pixel of the border there is nothing to interpolate with.
    edges = [math.ceil(64 / resolution * side / length) for side, length in zip(shape, fitted, strict=True)]
    rows = slice(None) if shape[0] == 1 else slice(edges[0], -edges[0])
    difference = (restored[0, 0] - expected)[rows, edges[1] : -edges[1]]
    assert difference.numel() > 0
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_fitting_and_restoring_return_a_plane(shape):
    slopes = (0.0 if shape[0] == 1 else 0.02, -0.03)
    plane = _plane(torch.arange(shape[0]) + 0.5, torch.arange(shape[1]) + 0.5, slopes=slopes)
    restored = restore_from_square(fit_to_square(plane[None, None], 64), size=64, original=shape)[0, 0]
    edges = [math.ceil(2 * side / length) for side, length in zip(shape, fitted_shape(*shape, 64), strict=True)]
    rows = slice(None) if shape[0] == 1 else slice(edges[0], -edges[0])
    difference = (restored - plane)[rows, edges[1] : -edges[1]]
    assert difference.numel() > 0
    assert difference.abs().max() < 0.03 / 4  # a quarter of one of the image's own pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_of_a_box_moves_no_edge_by_more_than_a_pixel(shape):
    height, width = shape
    mask = torch.zeros(1, 1, height, width)
    top, bottom, left, right = height // 4, max(height // 2, height // 4 + 1), width // 5, width // 2
    mask[0, 0, top:bottom, left:right] = 1
    square = fit_to_square(mask, 256)
    restored = restore_from_square(square * 2 - 1, size=256, original=shape) > 0
    rows = restored[0, 0].any(1).nonzero()[:, 0]
    columns = restored[0, 0].any(0).nonzero()[:, 0]
    assert abs(int(rows.min()) - top) <= 1
    assert abs(int(rows.max()) - (bottom - 1)) <= 1
    assert abs(int(columns.min()) - left) <= 1
    assert abs(int(columns.max()) - (right - 1)) <= 1


def test_padding_never_reaches_the_restored_image():
    logits = torch.full((1, 2, 64, 64), 7.0)
    logits[:, :, :, 50:] = -100.0  # 512 x 400 fills 64 x 50
    restored = restore_from_square(logits, size=64, original=(512, 400))
    assert torch.equal(restored, torch.full((1, 2, 512, 400), 7.0))


def test_low_resolution_logits_are_brought_to_the_square_first(generator):
    logits = torch.randn(2, 3, 16, 16, generator=generator)
    square = interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(
        restore_from_square(logits, size=64, original=(30, 20)), restore_from_square(square, size=64, original=(30, 20))
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_network_slices_of_a_case(channels, generator):
    image = MetaTensor(torch.rand(channels, 20, 30, 4, generator=generator) * 255)
    slices = network_slices(image, 48)
    assert slices.shape == (4, 3, 48, 48)
    assert slices.dtype == torch.float32
    assert not isinstance(slices, MetaTensor)
    content, padding = slices[:, :, :32], slices[:, :, 32:]
    assert padding.abs().max() == 0
    assert torch.equal(content.amin((1, 2, 3)), torch.zeros(4))
    assert torch.equal(content.amax((1, 2, 3)), torch.ones(4))
    if channels == 1:
        assert torch.equal(slices[:, :1].expand(-1, 3, -1, -1), slices)


def test_network_slices_stretch_each_slice_before_and_after_resizing():
    # Stretched first: 0 and 1 alternate; halving averages them to 0.5 everywhere but in the last column (0 and 0).
    image = torch.tensor([10.0, 20.0, 10.0, 20.0, 10.0, 10.0]).repeat(6, 1)[None, :, :, None]  # (1, 6, 6, 1)
    resized = fit_to_square(unit_range(image[..., 0][None]), 3)
    assert network_slices(image, 3)[0, 0] == pytest.approx(unit_range(resized)[0, 0].numpy())
    assert resized.max() < 0.9  # so that the second stretch has something to do


def test_slices_do_not_influence_each_other(generator):
    image = torch.rand(1, 9, 14, 3, generator=generator)
    louder = image * torch.tensor([1.0, 50.0, 3.0])
    assert torch.allclose(network_slices(image, 16), network_slices(louder, 16), atol=1e-5)


def test_constant_slice_is_zero():
    image = torch.full((1, 5, 7, 2), 9.0)
    assert network_slices(image, 8).abs().max() == 0


def test_rows_stay_rows(generator):
    image = torch.zeros(1, 10, 20, 1)
    image[0, 9, 0] = 1.0  # bottom left
    fitted = network_slices(image, 20)[0, 0]
    assert fitted[9, 0] == 1
    assert fitted.sum() == 1
