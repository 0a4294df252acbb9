"""Prompts of a file's pixels in the slices of the turned image: against masks that go the same way."""

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from scripts.data.placing import ImagePrompts, PlacePromptsd, PromptedObject, SlicePrompt, require_inside
from scripts.data.prompts import BoxPrompt, PointPrompt
from scripts.errors import PromptError

SHAPE = (7, 5, 4)  # all different, so that no axis can stand for another
SPACINGS = {"cubes": (1.0, 1.0, 1.0), "anisotropic": (0.7, 1.3, 5.0)}
CODES = ["RAS", "LPS", "PLS", "SRA", "AIL", "IPR", "LAS", "ASR"]


def affine_of(codes: str, spacing: tuple[float, ...]) -> np.ndarray:
    """The affine of a file whose axes point as `codes` say."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        world, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[code]
        affine[world, axis] = sign * spacing[axis]
    affine[:3, 3] = (11.0, -7.5, 3.0)
    return affine


def image_of(values: np.ndarray, affine: np.ndarray) -> MetaTensor:
    """An image as `read_image` gives it, turned as the bundle turns it."""
    image = MetaTensor(
        torch.from_numpy(values.astype(np.float32)).unsqueeze(0),
        affine=torch.from_numpy(affine),
        meta={"original_affine": torch.from_numpy(affine.copy()), "space": "RAS"},
    )
    return Orientation(axcodes="PLS", labels=None)(image)


def placed(prompts, image):
    case = PlacePromptsd()({"image": image, "named_ids": [3], "prompted_objects": prompts})
    return case["image"].meta["prompts"]


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
@pytest.mark.parametrize("codes", CODES)
def test_a_box_covers_what_it_covered_in_the_file(codes, spacing):
    box = (1, 2, 0, 4, 3, 2)
    mask = np.zeros(SHAPE)
    mask[1:5, 2:4, 0:3] = 1
    image = image_of(mask, affine_of(codes, spacing))
    (found,) = placed([(1, BoxPrompt(box=box))], image).objects
    covered = torch.zeros_like(image[0].as_tensor())
    for place, prompt in found.slices.items():
        left, top, right, bottom = (round(edge) for edge in prompt.box)
        covered[top : bottom + 1, left : right + 1, place] = 1
    assert torch.equal(covered, image[0].as_tensor())


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
@pytest.mark.parametrize("codes", CODES)
def test_a_point_lies_on_its_pixel(codes, spacing):
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    image = image_of(values, affine_of(codes, spacing))
    for position in itertools.islice(itertools.product(*map(range, SHAPE)), 0, None, 11):
        (found,) = placed([(1, PointPrompt(points=(position,)))], image).objects
        ((place, prompt),) = found.slices.items()
        ((x, y),) = prompt.points
        assert image[0, round(y), round(x), place] == values[position]


def test_the_points_of_an_oblique_volume_go_the_same_way():
    turn = np.radians(20)
    affine = affine_of("LAS", (0.7, 1.3, 5.0))
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine[:3, :3] = rotation @ affine[:3, :3]
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    image = image_of(values, affine)
    (found,) = placed([(1, PointPrompt(points=((6, 1, 3),)))], image).objects
    ((place, prompt),) = found.slices.items()
    ((x, y),) = prompt.points
    assert image[0, round(y), round(x), place] == values[6, 1, 3]


def test_a_picture_has_x_along_its_columns():
    picture = np.zeros((9, 4, 1))  # X, Y, Z as `read_image` gives a picture of 9 columns and 4 rows
    picture[7, 2, 0] = 1
    image = image_of(picture, np.diag([-1.0, -1.0, 1.0, 1.0]))
    (box, point) = placed([(1, BoxPrompt(box=(7, 2, 7, 2))), (2, PointPrompt(points=((7, 2),)))], image).objects
    assert box == PromptedObject(1, {0: SlicePrompt(box=(7.0, 2.0, 7.0, 2.0))})
    assert point == PromptedObject(2, {0: SlicePrompt(points=((7.0, 2.0),), labels=(1,))})
    assert image[0, 2, 7, 0] == 1


def test_points_count_in_their_own_slices_and_slices_without_one_in_the_object_do_not():
    image = image_of(np.zeros(SHAPE), affine_of("PLS", (1.0, 1.0, 1.0)))
    prompt = PointPrompt(points=((1, 1, 0), (2, 2, 0), (3, 3, 1), (4, 4, 2)), labels=(1, 0, 0, 1))
    (found,) = placed([(1, prompt)], image).objects
    assert set(found.slices) == {0, 2}
    assert found.slices[0] == SlicePrompt(points=((1.0, 1.0), (2.0, 2.0)), labels=(1, 0))


def test_classes_go_on_and_channels_are_each_id_once():
    image = image_of(np.zeros(SHAPE), affine_of("PLS", (1.0, 1.0, 1.0)))
    box = BoxPrompt(box=(1, 1, 1, 2, 2, 2))
    prompts = placed([(201, box), (3, box), (2, box), (201, box)], image)
    assert isinstance(prompts, ImagePrompts)
    assert prompts.class_ids == (3,)
    assert prompts.channels == [2, 3, 201]


def test_a_place_between_two_slices_is_in_the_upper_one():
    image = image_of(np.zeros(SHAPE), affine_of("PLS", (1.0, 1.0, 1.0)))
    (found,) = placed([(1, PointPrompt(points=((1, 1, 1.5), (1, 1, 1.4))))], image).objects
    assert set(found.slices) == {1, 2}


@pytest.mark.parametrize(
    "prompt",
    [
        BoxPrompt(box=(0, 0, 0, 6, 4, 3)),
        PointPrompt(points=((6, 4, 3), (0, 0, 0))),
    ],
)
def test_the_border_belongs_to_the_image(prompt):
    require_inside(prompt, SHAPE, place="here")


@pytest.mark.parametrize("prompt", [BoxPrompt(box=(0, 0, 6, 4)), PointPrompt(points=((6, 4),))])
def test_one_slice_needs_no_z(prompt):
    require_inside(prompt, (7, 5, 1), place="here")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (BoxPrompt(box=(0, 0, 6, 4)), r"boxes\[0\] has x and y alone, and the image has 4 slices: give z too, .* 3\."),
        (PointPrompt(points=((0, 0),)), "give z too"),
        (BoxPrompt(box=(0, 0, 0, 7, 4, 3)), r"boxes\[0\] lies outside of the image: x is 7, and goes from 0 to 6\."),
        (BoxPrompt(box=(0, -1, 0, 6, 4, 3)), "y is -1, and goes from 0 to 4"),
        (PointPrompt(points=((0, 0, 0), (0, 0, 3.5))), "z is 3.5, and goes from 0 to 3"),
    ],
)
def test_what_is_not_of_the_image_gets_a_sentence(prompt, sentence):
    with pytest.raises(PromptError, match=sentence):
        require_inside(prompt, SHAPE, place="boxes[0]")
