"""What can be asked of an image, in one form for Python, the command line, configs and MONAI Label.

::

    {"classes": ["liver", 4],
     "boxes": [{"box": [30, 40, 90, 110], "name": "spleen"}],
     "points": [{"points": [[52, 61], [70, 20]], "labels": [1, 0]}]}

Every part may be left out. Coordinates are pixels of the file as it is stored, counted from 0, whole numbers at their
centres: x, y of a picture (column, row), x, y, z of a volume (first, second and third axis of its voxels). How the
patient lies in it does not matter; `scripts.data.placing` looks that up in the affine.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from scripts.data.vocabulary import parse_prompts
from scripts.errors import PromptError

AXES = "xyz"
BACKGROUND, FOREGROUND = 0, 1  # labels of points, as SAM has them
PARTS = "classes, boxes and points"
OBJECT_PARTS = {"boxes": "box and name", "points": "points, labels and name"}


class BoxPrompt(BaseModel):
    """One object, in a box.

    Attributes:
        box: x_min, y_min, x_max, y_max of a picture, or x_min, y_min, z_min, x_max, y_max, z_max of a volume, where
            each slice from z_min to z_max has the same box. Corners belong to the box.
        name: the class that the object is of, by name or id; None for an object without a name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    box: tuple[float, ...]
    name: str | int | None = None

    @field_validator("box", mode="before")
    @classmethod
    def _check_box(cls, value: Any) -> tuple[float, ...]:
        box = _as_numbers(value)
        if box is None or len(box) not in (4, 6):
            raise ValueError(
                "a box is [x_min, y_min, x_max, y_max] in a picture, or [x_min, y_min, z_min, x_max, y_max, z_max] in "
                f"a volume, not {value!r}"
            )
        half = len(box) // 2
        for axis, least, largest in zip(AXES, box[:half], box[half:], strict=False):
            if least > largest:
                raise ValueError(
                    f"the box ends before it begins, along {axis} from {least:g} to {largest:g}; the smaller number "
                    "of each axis comes first"
                )
        return box

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, value: Any) -> Any:
        return _as_name(value)

    @property
    def axes(self) -> int:
        """How many axes it has: 2 in a picture, 3 in a volume."""
        return len(self.box) // 2


class PointPrompt(BaseModel):
    """One object, by points in it and beside it.

    Attributes:
        points: x, y of a picture or x, y, z of a volume. Points of a volume count in their own slices.
        labels: 1 for each point in the object, 0 for each beside it; all 1 where left out.
        name: as of `BoxPrompt`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    points: tuple[tuple[float, ...], ...]
    labels: tuple[int, ...] = ()
    name: str | int | None = None

    @field_validator("points", mode="before")
    @classmethod
    def _check_points(cls, value: Any) -> tuple[tuple[float, ...], ...]:
        points = [_as_numbers(point) for point in value] if _is_list(value) else []
        found = [point for point in points if point is not None and len(point) in (2, 3)]
        if not found or len(found) < len(points) or len({len(point) for point in found}) > 1:
            raise ValueError(f"points are [[x, y], ...] in a picture, or [[x, y, z], ...] in a volume, not {value!r}")
        return tuple(found)

    @field_validator("labels", mode="before")
    @classmethod
    def _check_labels(cls, value: Any) -> tuple[int, ...]:
        if value is None:
            return ()
        if not _is_list(value) or not all(label in (BACKGROUND, FOREGROUND) for label in value):
            raise ValueError(f"labels of points are 1 in the object and 0 beside it, such as [1, 1, 0], not {value!r}")
        return tuple(int(label) for label in value)

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, value: Any) -> Any:
        return _as_name(value)

    @model_validator(mode="after")
    def _check_pairs(self) -> "PointPrompt":
        if self.labels and len(self.labels) != len(self.points):
            raise ValueError(
                f"each point has one label; {len(self.points)} points and {len(self.labels)} labels were given"
            )
        if self.labels and FOREGROUND not in self.labels:
            raise ValueError("at least one point must lie in the object and have the label 1; all have 0")
        return self

    @property
    def axes(self) -> int:
        """How many axes the points have: 2 in a picture, 3 in a volume."""
        return len(self.points[0])

    @property
    def labels_of_points(self) -> tuple[int, ...]:
        """One label a point."""
        return self.labels or (FOREGROUND,) * len(self.points)


class Prompts(BaseModel):
    """Everything that is asked of one image at once.

    Attributes:
        classes: names or ids; None where no class is named. Without boxes and points these are all classes that the
            model has learned for the image's modality, with them none.
        boxes: one object each.
        points: one object each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    classes: tuple[str | int, ...] | None = None
    boxes: tuple[BoxPrompt, ...] = ()
    points: tuple[PointPrompt, ...] = ()

    @classmethod
    def read(cls, value: Any = None, **parts: Any) -> "Prompts":
        """Read prompts in any of the ways in which they are written.

        Args:
            value: a mapping of the form above, or it as JSON or YAML; None for none.
            parts: `classes`, `boxes` and `points` on their own, where they are not None. Each may be JSON or YAML.
                Classes may be separated by commas. A box may be a bare list of numbers, and one box need not be in a
                list. A list of points alone is one object.

        Raises:
            PromptError: what is wrong, and how it is written.
        """
        content = _from_text(value)
        if content is not None and not isinstance(content, Mapping):
            raise PromptError(f"Prompts are an object with {PARTS}, not {value!r}.")
        given = {name: _from_text(part) for name, part in parts.items() if part is not None}
        try:
            return cls(**{**(content or {}), **given})
        except ValidationError as error:
            raise PromptError(_sentence(error)) from error

    @field_validator("classes", mode="before")
    @classmethod
    def _read_classes(cls, value: Any) -> Any:
        names = parse_prompts(value)
        if names is not None and not all(isinstance(name, str | int) and not isinstance(name, bool) for name in names):
            raise ValueError(f"classes are names or ids, such as ['liver', 4], not {value!r}")
        return names

    @field_validator("boxes", mode="before")
    @classmethod
    def _read_boxes(cls, value: Any) -> Any:
        boxes = [] if value is None else [value] if isinstance(value, Mapping) or _as_numbers(value) else value
        if not _is_list(boxes):
            raise ValueError(f"boxes are a list, such as [[30, 40, 90, 110]], not {value!r}")
        return [box if isinstance(box, Mapping | BoxPrompt) else {"box": box} for box in boxes]

    @field_validator("points", mode="before")
    @classmethod
    def _read_points(cls, value: Any) -> Any:
        objects = [] if value is None else [value] if isinstance(value, Mapping) else value
        if not _is_list(objects):
            raise ValueError(f"points are a list, such as [[52, 61], [70, 20]], not {value!r}")
        if objects and not any(isinstance(item, Mapping | PointPrompt) for item in objects):
            return [{"points": objects}]
        return objects

    @property
    def objects(self) -> tuple[BoxPrompt | PointPrompt, ...]:
        """All boxes, then all points."""
        return *self.boxes, *self.points

    def placed_objects(self) -> Iterator[tuple[str, BoxPrompt | PointPrompt]]:
        """Give each object with its place in the prompts, such as `boxes[0]`."""
        yield from ((f"boxes[{index}]", box) for index, box in enumerate(self.boxes))
        yield from ((f"points[{index}]", points) for index, points in enumerate(self.points))

    def __bool__(self) -> bool:
        """Say whether anything is asked for by name, box or point."""
        return bool(self.classes or self.objects)


def _from_text(value: Any) -> Any:
    """Read JSON where a text begins like it, or YAML, which needs fewer quotes; any other value stays as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith(("{", "["))):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise PromptError(f"Expected prompts as JSON or YAML, but {reason}: {value!r}.") from error


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_name(value: Any) -> Any:
    """Pass a class's name or id on, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise ValueError(f"an object's name is a class by name or id, not {value!r}")
    return value


def _as_numbers(value: Any) -> tuple[float, ...] | None:
    """Give a list of finite numbers as one of floats; None for anything else."""
    if not _is_list(value) or not value:
        return None
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return None
    return tuple(float(number) for number in value) if all(map(math.isfinite, value)) else None


def _sentence(error: ValidationError) -> str:
    """Say the first thing that is wrong, and where."""
    first = error.errors(include_url=False)[0]
    place = _place(first["loc"])
    match first["type"]:
        case "extra_forbidden":
            parts = PARTS if len(first["loc"]) == 1 else OBJECT_PARTS[str(first["loc"][0])]
            return f"Prompts have no {place}: the parts here are {parts}."
        case "missing":
            return f"{place} is missing: an object has a box, or points with their labels."
        case _:  # this module's own; what comes before the validators leaves nothing to pydantic's
            return f"{place}: {first.get('ctx', {}).get('error', first['msg'])}."


def _place(location: Sequence[str | int]) -> str:
    """Write `boxes[0].box`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")
