"""Surface elements against MONAI's copy of DeepMind's table, a direct search of the grid, and hand-derived values."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics.utils import get_code_to_measure_table, get_mask_edges

from scripts.metrics.surfaces import MARGIN, Surface, element_sizes, extract_surfaces

Mask = npt.NDArray[np.bool_]
SPACINGS = [(1, 1), (0.3, 2.5), (4, 1), (1, 1, 1), (0.8, 0.8, 5), (5, 0.8, 0.7), (0.4, 3.1, 1.2)]


def positions(surface: Surface) -> set[tuple[int, ...]]:
    """Corners of voxels that carry an element, in voxels from the start of the crop."""
    indices = np.unravel_index(surface.points, surface.border.shape)
    return {tuple(int(value) - MARGIN for value in position) for position in zip(*indices, strict=True)}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_sizes_of_all_neighbourhoods_are_those_of_the_published_table(spacing: tuple[float, ...]) -> None:
    table, _ = get_code_to_measure_table(spacing)
    found = element_sizes(spacing)
    assert found.shape == (2**2 ** len(spacing),)
    np.testing.assert_allclose(found, table.numpy(), rtol=5e-7)  # MONAI's is float32


@pytest.mark.parametrize("spacing", SPACINGS)
def test_inside_and_outside_have_the_same_surface(spacing: tuple[float, ...]) -> None:
    sizes = element_sizes(spacing)
    np.testing.assert_array_equal(sizes, sizes[::-1])
    assert sizes[0] == sizes[-1] == 0
    assert (sizes[1:-1] > 0).all()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_sizes_do_not_depend_on_the_order_of_axes(dimensions: int) -> None:
    spacing = (0.7, 1.9, 4.2)[:dimensions]
    corners = list(itertools.product((0, 1), repeat=dimensions))
    for axes in itertools.permutations(range(dimensions)):
        turned = element_sizes([spacing[axis] for axis in axes])
        for code in range(2 ** len(corners)):
            inside = {corner for place, corner in enumerate(corners) if code >> (len(corners) - 1 - place) & 1}
            number = sum(
                1 << (len(corners) - 1 - place)
                for place, corner in enumerate(corners)
                if tuple(corner[axes.index(axis)] for axis in range(dimensions)) in inside
            )
            assert turned[number] == pytest.approx(element_sizes(spacing)[code], rel=1e-12)


def test_lengths_by_hand() -> None:
    # Rows 3 apart, columns 4: a corner cut off is half of 5 long, a side along the rows 3, one along the columns 4.
    sizes = element_sizes((3, 4))
    assert sizes[0b0001] == sizes[0b0100] == sizes[0b0111] == 2.5
    assert sizes[0b1001] == sizes[0b0110] == 5  # two corners cut off
    assert (sizes[0b0011], sizes[0b1010]) == (4, 3)


def test_areas_by_hand() -> None:
    sizes = element_sizes((2, 3, 5))
    half_faces = (3 * 5 / 8, 2 * 5 / 8, 2 * 3 / 8)
    assert sizes[0b00000001] == pytest.approx(math.hypot(*half_faces))  # a corner cut off by a triangle
    assert sizes[0b00001111] == pytest.approx(3 * 5)  # a plane across the first axis
    assert sizes[0b00110011] == pytest.approx(2 * 5)
    assert sizes[0b01010101] == pytest.approx(2 * 3)
    assert sizes[0b00000011] == pytest.approx(math.hypot(2 * 5 / 2, 3 * 5 / 2))  # an edge cut off, along the third axis
    assert sizes[0b10000001] == pytest.approx(2 * sizes[1])  # opposite corners stay apart


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (7, 3), (1, 6, 2), (4, 5, 6)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_elements_agree_with_monai(shape: tuple[int, ...], share: float) -> None:
    generator = np.random.default_rng(int(100 * share))
    prediction, truth = generator.random(shape) < share, generator.random(shape) < share
    prediction.flat[0] = truth.flat[-1] = True
    spacing = (0.8, 1.7, 3.0)[: len(shape)]
    padded = [torch.from_numpy(np.pad(mask, 1)) for mask in (prediction, truth)]
    edges = [tensor.numpy() for tensor in get_mask_edges(*padded, crop=False, spacing=spacing)]
    found = extract_surfaces(prediction, truth, spacing=spacing)
    for surface, border, areas in zip(found, edges[:2], edges[2:], strict=True):
        assert positions(surface) == {tuple(map(int, position)) for position in np.argwhere(border)}
        np.testing.assert_allclose(surface.sizes, areas[border], rtol=5e-7)
        np.testing.assert_array_equal(np.flatnonzero(surface.border), surface.points)


def test_a_pixel_has_four_corners() -> None:
    pixel, nothing = np.zeros((6, 9), dtype=bool), np.zeros((6, 9), dtype=bool)
    pixel[2, 5] = True
    surface, empty = extract_surfaces(pixel, nothing, spacing=(1, 1))
    assert positions(surface) == {(0, 0), (0, 1), (1, 0), (1, 1)}  # cut to the pixel
    assert surface.sizes == pytest.approx([math.sqrt(0.5)] * 4)
    assert (len(empty.points), len(empty.sizes)) == (0, 0)
    assert empty.border.shape == surface.border.shape


def test_a_mask_at_the_border_has_a_surface_there() -> None:
    inside = np.zeros((9, 8, 7), dtype=bool)
    inside[2:5, 2:6, 2:4] = True
    cut = inside[2:5, 2:6, 2:4]
    assert cut.all()
    first, _ = extract_surfaces(inside, inside, spacing=(1, 2, 3))
    second, _ = extract_surfaces(cut, cut, spacing=(1, 2, 3))
    np.testing.assert_array_equal(first.border, second.border)
    np.testing.assert_array_equal(first.sizes, second.sizes)


def test_both_masks_share_a_grid() -> None:
    prediction, truth = np.zeros((9, 8), dtype=bool), np.zeros((9, 8), dtype=bool)
    prediction[1, 2] = truth[4, 7] = True
    first, second = extract_surfaces(prediction, truth, spacing=(1, 1))
    assert positions(first) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert positions(second) == {(3, 5), (3, 6), (4, 5), (4, 6)}


def test_no_masks_have_no_surface() -> None:
    nothing = np.zeros((4, 5, 6), dtype=bool)
    for surface in extract_surfaces(nothing, nothing, spacing=(1, 1, 1)):
        assert len(surface.points) == len(surface.sizes) == np.count_nonzero(surface.border) == 0
