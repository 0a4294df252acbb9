"""What is too small goes, what is large enough stays, in space and in each slice."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch.nn.functional import max_pool3d

from scripts.data.components import RemoveSmallComponentsd, largest_component, remove_small_components
from scripts.errors import ConfigError


def speckled(shape=(2, 24, 17, 9), seed=0):
    """Masks of blots of many sizes."""
    noise = np.random.default_rng(seed).random(shape)
    return (noise > 0.86).astype(np.uint8)


def without_small(mask, *, smallest, reach):
    """Let each voxel's number spread over its object until nothing changes, and count the voxels of each number."""
    inside = torch.from_numpy(mask > 0)[None, None].double()
    numbers = torch.arange(1, mask.size + 1, dtype=torch.float64).reshape(inside.shape) * inside
    while True:
        spread = max_pool3d(numbers, reach, stride=1, padding=[side // 2 for side in reach]) * inside
        if torch.equal(spread, numbers):
            break
        numbers = spread
    values, counts = torch.unique(numbers, return_counts=True)
    large = values[(counts >= smallest) & (values > 0)]
    return torch.isin(numbers, large)[0, 0].numpy().astype(mask.dtype)


@pytest.mark.parametrize(("voxels", "pixels"), [(0, 0), (1, 1), (6, 0), (0, 3), (6, 3), (40, 1), (10**6, 0)])
def test_equal_to_an_independent_reference(voxels, pixels):
    masks = speckled()
    found = remove_small_components(masks, voxels=voxels, pixels=pixels)
    volumes = [without_small(mask, smallest=voxels, reach=(3, 3, 3)) for mask in masks]
    expected = np.stack([without_small(mask, smallest=pixels, reach=(3, 3, 1)) for mask in volumes])
    assert np.array_equal(found, expected)
    assert (found.sum() < masks.sum()) == (max(voxels, pixels) > 1)
    assert np.array_equal(masks, speckled())  # what came in stays as it is


def volume(*blocks, shape=(10, 10, 5)):
    """One mask (1, H, W, D) with a block for each three ranges."""
    mask = np.zeros((1, *shape), dtype=bool)
    for rows, columns, slices in blocks:
        mask[0, slice(*rows), slice(*columns), slice(*slices)] = True
    return mask


LARGE = ((0, 3), (0, 3), (0, 2))  # 18 voxels, 9 pixels a slice
SMALL = ((6, 8), (6, 8), (3, 5))  # 8 voxels, 4 pixels a slice


@pytest.mark.parametrize(
    ("voxels", "pixels", "left"),
    [
        (8, 4, 26),  # as large as asked for is large enough
        (9, 0, 18),
        (0, 5, 18),
        (18, 9, 18),
        (19, 0, 0),
        (0, 10, 0),
    ],
)
def test_sizes_by_hand(voxels, pixels, left):
    found = remove_small_components(volume(LARGE, SMALL), voxels=voxels, pixels=pixels)
    assert found.dtype == np.bool_
    assert found.sum() == left
    assert not (found & ~volume(LARGE, SMALL)).any()


def test_corners_join_in_space_and_in_the_slice():
    corner = volume(((0, 2), (0, 2), (0, 1)), ((2, 4), (2, 4), (1, 2)))  # two blocks of 4 that meet in a corner
    assert remove_small_components(corner, voxels=8, pixels=0).sum() == 8
    assert remove_small_components(corner, voxels=9, pixels=0).sum() == 0
    assert remove_small_components(corner, voxels=0, pixels=5).sum() == 0  # in their slices they are apart
    flat = volume(((0, 2), (0, 2), (0, 1)), ((2, 4), (2, 4), (0, 1)))
    assert remove_small_components(flat, voxels=0, pixels=8).sum() == 8


def test_a_slice_is_cleared_of_what_hangs_on_a_large_object():
    """A thin spike of a large object passes in space, and goes in the slices where it stands alone."""
    spiked = volume(((0, 6), (0, 6), (0, 2)), ((2, 3), (2, 3), (2, 5)))
    found = remove_small_components(spiked, voxels=20, pixels=4)
    assert found[..., :2].sum() == 72
    assert not found[..., 2:].any()


def test_classes_do_not_join():
    masks = np.concatenate([volume(SMALL), volume(((5, 8), (5, 8), (3, 5)))])  # 8 and 18 voxels in one place
    found = remove_small_components(masks, voxels=10, pixels=0)
    assert found.sum(axis=(1, 2, 3)).tolist() == [0, 18]


def test_a_single_slice_is_measured_in_pixels_alone():
    picture = volume(((0, 3), (0, 3), (0, 1)), ((6, 8), (6, 8), (0, 1)), shape=(10, 10, 1))
    assert remove_small_components(picture, voxels=1000, pixels=0).sum() == 13
    assert remove_small_components(picture, voxels=1000, pixels=5).sum() == 9


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (1, 1, 1, 1), (2, 3, 3, 3)])
def test_nothing_stays_nothing(shape):
    masks = np.zeros(shape, dtype=np.uint8)
    assert np.array_equal(remove_small_components(masks, voxels=5, pixels=5), masks)


def test_the_largest_object_by_hand():
    long = ((6, 8), (6, 8), (0, 5))  # 20 voxels
    assert np.array_equal(largest_component(volume(LARGE, long)[0]), volume(long)[0])
    assert np.array_equal(largest_component(volume(LARGE, SMALL)[0]), volume(LARGE)[0])


def test_objects_of_one_size_keep_the_first_and_nothing_stays_nothing():
    two = np.zeros((4, 4, 2), dtype=bool)
    two[0, 0, 0] = two[3, 3, 1] = True
    assert np.argwhere(largest_component(two)).tolist() == [[0, 0, 0]]
    assert not largest_component(np.zeros((3, 0, 2), dtype=bool)).size
    assert not largest_component(np.zeros((3, 2, 2), dtype=bool)).any()


def test_the_transform_keeps_type_and_geometry():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    label = MetaTensor(torch.from_numpy(volume(LARGE, SMALL)).to(torch.uint8), affine=affine)
    data = {"label": label, "case": "a"}
    result = RemoveSmallComponentsd(smallest=[9, 0])(data)
    assert type(result["label"]) is MetaTensor
    assert (result["label"].dtype, result["label"].sum().item()) == (torch.uint8, 18)
    assert torch.equal(result["label"].affine, affine)
    assert data["label"].sum() == 26
    plain = RemoveSmallComponentsd("pred", smallest=[9, 0])({"pred": torch.from_numpy(volume(LARGE, SMALL))})["pred"]
    assert (type(plain), plain.dtype, plain.sum().item()) == (torch.Tensor, torch.bool, 18)


def test_the_transform_is_off_by_default():
    label = torch.from_numpy(volume(LARGE, SMALL))
    assert RemoveSmallComponentsd()({"label": label})["label"] is label


def test_a_label_that_is_missing():
    assert RemoveSmallComponentsd(smallest=[9, 0], allow_missing_keys=True)({"case": "a"}) == {"case": "a"}
    with pytest.raises(KeyError):
        RemoveSmallComponentsd(smallest=[9, 0])({"case": "a"})


@pytest.mark.parametrize("smallest", [[1000], [1, 2, 3], [-1, 0], [0.5, 1], [True, 1], "ab", [None, 1], 5])
def test_sizes_that_are_none(smallest):
    with pytest.raises(ConfigError, match=r"two whole numbers of 0 or more, .* such as \[1000, 100\], not "):
        RemoveSmallComponentsd(smallest=smallest)
