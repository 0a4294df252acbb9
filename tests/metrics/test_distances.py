"""Surface distances against a distance transform of the whole grid, and hand-derived values."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial.distance import cdist

from scripts.errors import ConfigError, InputError
from scripts.metrics.distances import SurfaceDistances, measure_distances, nearest_distances
from scripts.metrics.surfaces import element_sizes, extract_surfaces

Mask = npt.NDArray[np.bool_]


def ball(shape: tuple[int, ...], centre: tuple[int, ...], radius: float) -> Mask:
    grid = np.indices(shape)
    return sum((axis - middle) ** 2 for axis, middle in zip(grid, centre, strict=True)) <= radius**2


def pairs() -> list[object]:
    """Smooth, rough, distant and thin masks in 2D and 3D."""
    generator = np.random.default_rng(7)
    smooth = [gaussian_filter(generator.normal(size=(24, 30, 20)), 2) > 0 for _ in range(2)]
    noise = [generator.random((20, 22, 18)) < share for share in (0.5, 0.02)]
    far = [ball((60, 20, 25), (10, 10, 10), 6), ball((60, 20, 25), (48, 9, 15), 8)]
    speck = [np.ones((30, 41), dtype=bool), ball((30, 41), (14, 17), 1)]
    plane = [np.zeros((15, 16, 17), dtype=bool) for _ in range(2)]
    plane[0][3], plane[1][:, 5] = True, True
    return [
        pytest.param(*smooth, id="smooth"),
        pytest.param(*noise, id="noise"),
        pytest.param(*far, id="far"),
        pytest.param(*speck, id="speck in 2D"),
        pytest.param(*plane, id="crossing planes"),
        pytest.param(far[0][..., 10], far[1][..., 10], id="discs"),
        pytest.param(far[0], far[0], id="equal"),
    ]


def by_transform(prediction: Mask, truth: Mask, spacing: tuple[float, ...]) -> list[tuple[npt.NDArray, npt.NDArray]]:
    """Distances and sizes of both directions, sorted in Python, from every corner of the uncropped grid."""
    sizes = element_sizes(spacing)
    codes = []
    for mask in (prediction, truth):
        padded = np.pad(mask, 1).astype(int)
        corners = np.ndindex((2,) * mask.ndim)
        windows = [
            padded[tuple(slice(start, start + length + 1) for start, length in zip(corner, mask.shape, strict=True))]
            for corner in corners
        ]
        codes.append(sum(window << (len(windows) - 1 - place) for place, window in enumerate(windows)))
    borders = [(code > 0) & (code < len(sizes) - 1) for code in codes]
    found = []
    for here, there in ((0, 1), (1, 0)):
        distances = distance_transform_edt(~borders[there], sampling=spacing)[borders[here]]
        elements = sorted(zip(distances.tolist(), sizes[codes[here]][borders[here]].tolist(), strict=True))
        found.append(tuple(np.array(elements).T))
    return found


@pytest.mark.parametrize(("prediction", "truth"), pairs())
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 5.0), (7.0, 0.9, 1.3), (0.1, 0.1, 0.1)])
def test_agrees_with_the_transform_of_the_whole_grid(prediction: Mask, truth: Mask, spacing: tuple[float, ...]) -> None:
    spacing = spacing[: prediction.ndim]
    found = measure_distances(prediction, truth, spacing=spacing)
    (to_truth, predicted_sizes), (to_prediction, true_sizes) = by_transform(prediction, truth, spacing)
    np.testing.assert_allclose(found.to_truth, to_truth, rtol=1e-14)
    np.testing.assert_allclose(found.to_prediction, to_prediction, rtol=1e-14)
    np.testing.assert_allclose(found.predicted_sizes.sum(), predicted_sizes.sum(), rtol=1e-12)
    assert found.surface_dice(2 * spacing[0]) == pytest.approx(
        (predicted_sizes[to_truth <= 2 * spacing[0]].sum() + true_sizes[to_prediction <= 2 * spacing[0]].sum())
        / (predicted_sizes.sum() + true_sizes.sum())
    )
    assert found.mean_to_truth() == pytest.approx(np.average(to_truth, weights=predicted_sizes))
    assert found.mean_to_prediction() == pytest.approx(np.average(to_prediction, weights=true_sizes))
    assert found.hausdorff(100) == pytest.approx(max(to_truth.max(), to_prediction.max()), rel=1e-14)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3])
def test_every_element_finds_its_nearest(share: float) -> None:
    # One by one against all elements of the other surface: the order of the result is that of the elements.
    generator = np.random.default_rng(1)
    masks = [generator.random((17, 23, 13)) < share for _ in range(2)]
    spacing = np.array([1.5, 0.6, 2.2])
    source, target = extract_surfaces(*masks, spacing=spacing.tolist())
    here, there = (np.argwhere(surface.border) * spacing for surface in (source, target))
    expected = [np.sqrt(((there - position) ** 2).sum(axis=1)).min() for position in here]
    np.testing.assert_allclose(nearest_distances(source, target, spacing), expected, rtol=1e-12)


@pytest.mark.parametrize("most_pairs", [1, 50, 2**18])
def test_surfaces_far_apart_are_measured_without_a_tree(monkeypatch: pytest.MonkeyPatch, most_pairs: int) -> None:
    monkeypatch.setattr("scripts.metrics.distances._MOST_PAIRS", most_pairs)
    monkeypatch.setattr("scipy.spatial.cKDTree", None)  # would fail
    spacing = np.array([0.8, 0.8, 2.5])
    masks = ball((56, 56, 56), (16, 17, 15), 11), ball((56, 56, 56), (40, 38, 41), 13)
    for source, target in itertools.permutations(extract_surfaces(*masks, spacing=spacing.tolist())):
        here, there = (np.argwhere(surface.border) * spacing for surface in (source, target))
        expected = cdist(here, there).min(axis=1)
        np.testing.assert_allclose(nearest_distances(source, target, spacing), expected, rtol=1e-14)


@pytest.mark.parametrize("radius", [5, 9])
def test_a_surface_around_another_is_measured_from_both(radius: int) -> None:
    spacing = np.array([1.0, 1.3, 0.7])
    masks = ball((48, 48, 48), (24, 24, 24), radius), ball((48, 48, 48), (23, 24, 25), 20)
    for source, target in itertools.permutations(extract_surfaces(*masks, spacing=spacing.tolist())):
        here, there = (np.argwhere(surface.border) * spacing for surface in (source, target))
        expected = cdist(here, there).min(axis=1)
        np.testing.assert_allclose(nearest_distances(source, target, spacing), expected, rtol=1e-14)


def distances(
    to_truth: list[float], predicted_sizes: list[float], to_prediction: list[float], true_sizes: list[float]
) -> SurfaceDistances:
    return SurfaceDistances(*map(np.array, (to_truth, predicted_sizes, to_prediction, true_sizes)))


def test_sizes_weigh_every_figure() -> None:
    found = distances([0.0, 1.0, 3.0], [6.0, 3.0, 1.0], [0.0, 2.0], [1.0, 4.0])
    assert found.surface_dice(1.0) == pytest.approx((6 + 3 + 1) / 15)
    assert found.surface_dice(2.0) == pytest.approx((6 + 3 + 5) / 15)
    assert found.mean_to_truth() == pytest.approx(6 / 10)
    assert found.mean_to_prediction() == pytest.approx(8 / 5)
    assert found.mean() == pytest.approx(14 / 15)  # by area over both, not the mean of the two means
    assert found.hausdorff(100) == 3.0


@pytest.mark.parametrize(("percent", "expected"), [(1, 0.0), (50, 0.0), (51, 1.0), (75, 1.0), (76, 5.0), (100, 5.0)])
def test_percentile_is_the_first_distance_that_covers_the_share(percent: float, expected: float) -> None:
    # Of four: 2 at 0, 1 at 1, 1 at 5. A median would lie in between; here every figure is a distance that occurs.
    assert distances([0.0, 1.0, 5.0], [2.0, 1.0, 1.0], [0.0], [9.0]).hausdorff(percent) == expected
    assert distances([0.0], [9.0], [0.0, 1.0, 5.0], [2.0, 1.0, 1.0]).hausdorff(percent) == expected


def test_elements_are_sorted_by_distance_and_size() -> None:
    generator = np.random.default_rng(5)
    masks = [generator.random((12, 13, 9)) < 0.1 for _ in range(2)]
    found = measure_distances(*masks, spacing=(1, 2, 1))
    for values, sizes in ((found.to_truth, found.predicted_sizes), (found.to_prediction, found.true_sizes)):
        elements = list(zip(values.tolist(), sizes.tolist(), strict=True))
        assert elements == sorted(elements)
        assert 0 < np.count_nonzero(values == 0) < len(values)


@pytest.mark.parametrize("step", [1, 3, 6, 7, 12, 23])
@pytest.mark.parametrize("spacing", [0.1, 0.3, 0.7, 1.1])
def test_a_distance_equal_to_the_tolerance_counts(step: int, spacing: float) -> None:
    # Two bars across the whole image: half of the elements are a step less away, the others exactly the step.
    prediction, truth = np.zeros((40, 5), dtype=bool), np.zeros((40, 5), dtype=bool)
    prediction[2], truth[2 + step] = True, True
    found = measure_distances(prediction, truth, spacing=(spacing, 50.0))
    assert found.surface_dice(step * spacing) == 1.0
    assert found.surface_dice(np.nextafter(step * spacing, 0)) == pytest.approx(0.5)


def test_an_empty_mask_is_infinitely_far() -> None:
    mask, nothing = ball((9, 9, 9), (4, 4, 4), 2), np.zeros((9, 9, 9), dtype=bool)
    for found in (
        measure_distances(mask, nothing, spacing=(1, 1, 1)),
        measure_distances(nothing, mask, spacing=(1, 1, 1)),
        measure_distances(nothing, nothing, spacing=(1, 1, 1)),
    ):
        assert {found.hausdorff(95), found.hausdorff(100), found.mean()} == {math.inf}
        assert {found.mean_to_truth(), found.mean_to_prediction()} == {math.inf}
    assert measure_distances(mask, nothing, spacing=(1, 1, 1)).surface_dice(2) == 0
    assert math.isnan(measure_distances(nothing, nothing, spacing=(1, 1, 1)).surface_dice(2))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0, 3), (0, 0)])
def test_an_image_without_pixels_is_empty(shape: tuple[int, ...]) -> None:
    nothing = np.zeros(shape, dtype=bool)
    assert measure_distances(nothing, nothing, spacing=(1,) * len(shape)).hausdorff(95) == math.inf


def test_masks_that_cannot_be_measured() -> None:
    mask = np.ones((3, 4), dtype=bool)
    with pytest.raises(InputError, match="of one shape"):
        measure_distances(mask, mask[:2], spacing=(1, 1))
    with pytest.raises(InputError, match="2 positive distances"):
        measure_distances(mask, mask, spacing=(1, 1, 1))
    with pytest.raises(ConfigError, match="at least 0"):
        measure_distances(mask, mask, spacing=(1, 1)).surface_dice(-1)


def test_views_of_an_array_are_measured_alike() -> None:
    # Slices of a volume are not contiguous, and neither is a transposed volume.
    generator = np.random.default_rng(2)
    stack = generator.random((2, 14, 11, 6)) < 0.4
    for index in range(6):
        view = measure_distances(stack[0, ..., index], stack[1, ..., index], spacing=(1, 2))
        copy = measure_distances(stack[0, ..., index].copy(), stack[1, ..., index].copy(), spacing=(1, 2))
        np.testing.assert_array_equal(view.to_truth, copy.to_truth)
        np.testing.assert_array_equal(view.true_sizes, copy.true_sizes)
    turned = measure_distances(stack[0].transpose(2, 0, 1), stack[1].transpose(2, 0, 1), spacing=(3, 1, 2))
    straight = measure_distances(stack[0], stack[1], spacing=(1, 2, 3))
    assert turned.hausdorff(95) == pytest.approx(straight.hausdorff(95))
    assert turned.surface_dice(1.5) == pytest.approx(straight.surface_dice(1.5))
