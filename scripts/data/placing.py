"""From prompts in the pixels of a file to prompts in the slices that the network sees.

The way leads through the affine: a pixel of the file is a place in the patient, and that is a pixel of the image as
preprocessing has turned it. So flipped, rotated and anisotropic volumes need nothing of their own.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from scripts.data.prompts import AXES, BoxPrompt, PointPrompt
from scripts.errors import PromptError

Pixel = tuple[float, float]


@dataclass(frozen=True)
class SlicePrompt:
    """What is prompted in one slice.

    Attributes:
        box: x_min, y_min, x_max, y_max in the slice's own pixels, corners inclusive; None without one.
        points: x, y of each point.
        labels: 1 for a point in the object, 0 for one beside it.
    """

    box: tuple[float, float, float, float] | None = None
    points: tuple[Pixel, ...] = ()
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptedObject:
    """One object with a box or with points, slice by slice.

    Attributes:
        class_id: the number that its voxels get.
        slices: slice -> what is prompted there.
    """

    class_id: int
    slices: dict[int, SlicePrompt] = field(hash=False)


@dataclass(frozen=True)
class ImagePrompts:
    """What is asked of one image, as an inferer takes it.

    Attributes:
        class_ids: the classes asked for by name, ascending.
        objects: what has a box or points.
        modality: canonical name of the image's, None where unknown.
    """

    class_ids: tuple[int, ...]
    objects: tuple[PromptedObject, ...] = ()
    modality: str | None = None

    @property
    def channels(self) -> list[int]:
        """The ids of the answer's channels: each that is asked for, once, ascending."""
        return sorted({*self.class_ids, *(item.class_id for item in self.objects)})


def require_inside(prompt: BoxPrompt | PointPrompt, shape: Sequence[int], *, place: str) -> None:
    """Refuse a prompt that is not of this image.

    Args:
        prompt: in pixels of the file.
        shape: X, Y, Z of the file; Z is 1 for a picture and a single slice.
        place: the prompt's name in the error, such as `boxes[0]`.

    Raises:
        PromptError: two numbers a corner or point where the image has many slices, or a place outside of the image.
    """
    if prompt.axes == 2 and shape[2] > 1:
        raise PromptError(
            f"{place} has x and y alone, and the image has {shape[2]} slices: give z too, from 0 to {shape[2] - 1}."
        )
    for position in _positions(prompt):
        for axis, value, size in zip(AXES, position, shape, strict=False):
            if not 0 <= value <= size - 1:
                raise PromptError(
                    f"{place} lies outside of the image: {axis} is {value:g}, and goes from 0 to {size - 1}."
                )


def _positions(prompt: BoxPrompt | PointPrompt) -> tuple[tuple[float, ...], ...]:
    """Give a box's two corners, or the points."""
    if isinstance(prompt, BoxPrompt):
        return prompt.box[: prompt.axes], prompt.box[prompt.axes :]
    return prompt.points


class PlacePromptsd(Transform):
    """Bring the prompts of a case into the pixels of the image as it is now, and write them into its metadata.

    Comes after whatever turns the image. Inferers find the result in `inputs.meta["prompts"]`, which programs that call
    an inferer by themselves, such as MONAI Label, hand on with the image.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` in which `image.meta["prompts"]` is an `ImagePrompts`.

        Args:
            data: with `image` (C, H, W, D) and what `scripts.data.prompting.ChoosePromptsd` left.
        """
        case = dict(data)
        image: MetaTensor = case["image"]
        matrix = _to_current_pixels(image)
        objects = [PromptedObject(class_id, _placed(prompt, matrix)) for class_id, prompt in case["prompted_objects"]]
        image.meta["prompts"] = ImagePrompts(tuple(case["named_ids"]), tuple(objects), case.get("modality"))
        return case


def _to_current_pixels(image: MetaTensor) -> torch.Tensor:
    """Give the map (4, 4) from pixels of the file to pixels of the image as it is now, float64."""
    original = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
    return torch.linalg.solve(image.affine.to(dtype=torch.float64, device="cpu"), original.cpu())


def _placed(prompt: BoxPrompt | PointPrompt, matrix: torch.Tensor) -> dict[int, SlicePrompt]:
    """Map one prompt into slices of axes (H, W, D): x goes along W, y along H."""
    moved = [_moved(position, matrix) for position in _positions(prompt)]
    if isinstance(prompt, BoxPrompt):
        (rows, columns, places) = (sorted(pair) for pair in zip(*moved, strict=True))
        box = (columns[0], rows[0], columns[1], rows[1])
        return {place: SlicePrompt(box=box) for place in range(_nearest(places[0]), _nearest(places[1]) + 1)}
    slices: dict[int, SlicePrompt] = {}
    for (row, column, place), label in zip(moved, prompt.labels_of_points, strict=True):
        known = slices.get(_nearest(place), SlicePrompt())
        slices[_nearest(place)] = SlicePrompt(points=(*known.points, (column, row)), labels=(*known.labels, label))
    # Where all points lie beside the object, nothing says that it is in the slice at all.
    return {place: prompted for place, prompted in slices.items() if any(prompted.labels)}


def _moved(position: Sequence[float], matrix: torch.Tensor) -> tuple[float, float, float]:
    """Map one position, of which z may be left out where there is a single slice."""
    x, y, z = (*position, 0.0)[:3]
    row, column, place, _ = (matrix @ torch.tensor([x, y, z, 1.0], dtype=torch.float64)).tolist()
    return row, column, place


def _nearest(place: float) -> int:
    """Give the slice that a position lies in, halves upwards."""
    return math.floor(place + 0.5)
