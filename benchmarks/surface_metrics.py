"""Surface metrics beside DeepMind's package: `python benchmarks/surface_metrics.py [--runs N]`.

DSC, NSD, HD95, HD100 and both mean surface distances of one pair of masks, by `scripts.metrics.pairs` and by
https://github.com/google-deepmind/surface-distance (`pip install surface-distance`), which has to give the same figures
to 1e-6. Masks of 128 x 128 x 128 voxels and 512 x 512 pixels: smooth ones, noise, and one far from the other, which is
the least favourable case: no distance is found in an element's surroundings. One core each.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter
from variants import Request, benchmark, compare

from scripts.metrics.pairs import compare_masks

Mask = npt.NDArray[np.bool_]
Masks = tuple[Mask, Mask]
Figures = dict[str, float]

TOLERANCE = 2.0
SHAPES = {"128x128x128": (128, 128, 128), "512x512": (512, 512)}
SMALL_DIVISOR = 8
SPACINGS = {2: (1.0, 1.0), 3: (0.8, 0.8, 2.5)}
TARGET = 5.0
ALLOWED_DIFFERENCE = 1e-6
NOTE = "The figures of both agree to 1e-6, which is checked before the timing."


def ours(prediction: Mask, truth: Mask) -> Figures:
    """Compute all figures by the bundle."""
    found = compare_masks(prediction, truth, spacing=SPACINGS[truth.ndim], tolerance=TOLERANCE)
    return {
        "dsc": found.dsc,
        "nsd": found.nsd,
        "hd95": found.hd95,
        "hd100": found.hd100,
        "mean_to_truth": found.mean_to_truth,
        "mean_to_prediction": found.mean_to_prediction,
    }


def deepmind(prediction: Mask, truth: Mask) -> Figures:
    """Compute the same figures by DeepMind's package."""
    from surface_distance import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the names that the package uses in SciPy
        distances = metrics.compute_surface_distances(truth, prediction, SPACINGS[truth.ndim])
    to_prediction, to_truth = metrics.compute_average_surface_distance(distances)
    return {
        "dsc": metrics.compute_dice_coefficient(truth, prediction),
        "nsd": metrics.compute_surface_dice_at_tolerance(distances, TOLERANCE),
        "hd95": metrics.compute_robust_hausdorff(distances, 95),
        "hd100": metrics.compute_robust_hausdorff(distances, 100),
        "mean_to_truth": to_truth,
        "mean_to_prediction": to_prediction,
    }


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> Mask:
    """Draw a ball, or a disc; centre and radius as shares of the first side."""
    squares = [
        (np.arange(length) / shape[0] - middle).reshape((-1,) + (1,) * (len(shape) - 1 - axis)) ** 2
        for axis, (length, middle) in enumerate(zip(shape, centre, strict=True))
    ]
    return np.asarray(sum(squares) <= radius**2)


def balls(shape: tuple[int, ...]) -> Masks:
    """Draw a ball, and the same a little smaller and about 2 % of the side away."""
    return ball(shape, (0.52, 0.515, 0.5)[: len(shape)], 0.37), ball(shape, (0.5,) * len(shape), 0.375)


def far_balls(shape: tuple[int, ...]) -> Masks:
    """Draw two balls that do not touch."""
    return ball(shape, (0.3,) * len(shape), 0.2), ball(shape, (0.7,) * len(shape), 0.25)


def rough_balls(shape: tuple[int, ...]) -> Masks:
    """Draw the near balls with a tenth of their voxels missing at random."""
    first, second = balls(shape)
    generator = np.random.default_rng(0)
    return first & (generator.random(shape) < 0.9), second & (generator.random(shape) < 0.9)


def blobs(shape: tuple[int, ...]) -> Masks:
    """Draw two unrelated masks of many blobs a few voxels wide."""
    generator = np.random.default_rng(1)
    return gaussian_filter(generator.normal(size=shape), 2) > 0, gaussian_filter(generator.normal(size=shape), 2) > 0


def noise(shape: tuple[int, ...], share: float) -> Masks:
    """Draw two unrelated masks, every voxel inside with the same probability."""
    generator = np.random.default_rng(2)
    return generator.random(shape) < share, generator.random(shape) < share


DRAWINGS: Mapping[str, Callable[[tuple[int, ...]], Masks]] = {
    "balls": balls,
    "rough_balls": rough_balls,
    "blobs": blobs,
    "noise": partial(noise, share=0.5),
    "sparse_noise": partial(noise, share=0.02),
    "far_balls": far_balls,
}


def prepare(
    request: Request, *, program: Callable[[Mask, Mask], Figures], drawing: str, size: str
) -> Callable[[], Figures]:
    """Draw a pair of masks for a program to compare."""
    shape = tuple(length // SMALL_DIVISOR if request.small else length for length in SHAPES[size])
    return partial(program, *DRAWINGS[drawing](shape))


VARIANTS = {
    f"{program.__name__}_{drawing}_{size}": partial(prepare, program=program, drawing=drawing, size=size)
    for program in (deepmind, ours)
    for drawing in DRAWINGS
    for size in SHAPES
}


def measure(request: Request) -> None:
    """Check that both compute the same of every pair, and measure them."""
    for size in SHAPES:
        for drawing in DRAWINGS:
            measure_pair(request, f"{drawing}_{size}")


def measure_pair(request: Request, pair: str) -> None:
    """Check and measure one pair of masks."""
    slow, fast = f"deepmind_{pair}", f"ours_{pair}"
    require_equal_figures(VARIANTS[slow](request)(), VARIANTS[fast](request)())
    compare(request, VARIANTS, slow=slow, rows={fast: f"surface_metrics_{pair}"}, targets={fast: TARGET}, note=NOTE)


def require_equal_figures(expected: Figures, found: Figures) -> None:
    """Refuse to compare the times of different functions.

    Raises:
        RuntimeError: a figure that differs.
    """
    for name, value in expected.items():
        if not abs(found[name] - value) <= ALLOWED_DIFFERENCE:
            raise RuntimeError(f"expected {name} {value} as in DeepMind's package, got {found[name]}: nothing measured")


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, variants=VARIANTS)
