"""How the viewers in front of MONAI Label write their prompts, turned into the form of `scripts.data.prompts`.

A viewer's request comes as keys of the case itself. Positions are pixels of the file in all of them.

====================  ============================================================  ==================================
viewer                keys                                                          becomes
====================  ============================================================  ==================================
any                   `classes`, `boxes`, `points`                                  what they are
OHIF, classes         `label_prompt`: ids or names                                  classes
OHIF, points          `points`, `point_labels`, `label_prompt` with one class       one object, of that class
3D Slicer, Deepgrow   `foreground`, `background`: points; `label`: its name         one object, of that class
3D Slicer, region     `roi`: x_min, x_max, y_min, y_max, z_min, z_max; `label`      one object in a box, of that class
====================  ============================================================  ==================================
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from scripts.data.prompts import BACKGROUND, FOREGROUND, Prompts
from scripts.errors import PromptError

ROI_NUMBERS = 6


def viewer_prompts(request: Mapping[Hashable, Any]) -> Prompts:
    """Read the prompts of a request.

    Args:
        request: a case with a viewer's keys, any of them absent or empty.

    Returns:
        The prompts; false where the request has none.

    Raises:
        PromptError: what is wrong with them.
    """
    clicked = _as_list(request.get("point_labels"))
    named = request.get("label_prompt")
    if named in ([], ""):
        named = None
    points = request.get("points")
    objects: list[Any] = []
    if clicked:
        objects, named = [_clicks(points, clicked, named)], None if _is_one(named) else named
    elif points:
        objects = list(Prompts.read(points=points).points)
    objects += _deepgrow(request)
    classes = request.get("classes")
    return Prompts.read(
        classes=named if classes is None else classes,
        boxes=[*Prompts.read(boxes=request.get("boxes")).boxes, *_region(request)],
        points=objects,
    )


def _clicks(points: Any, labels: Sequence[Any], named: Any) -> dict[str, Any]:
    """Make one object of OHIF's clicks, of the class if one is chosen."""
    return {"points": points, "labels": labels, "name": named[0] if _is_one(named) else None}


def _deepgrow(request: Mapping[Hashable, Any]) -> list[dict[str, Any]]:
    """Make one object of 3D Slicer's clicks in and beside it."""
    inside, beside = _as_list(request.get("foreground")), _as_list(request.get("background"))
    if not inside and not beside:
        return []
    labels = [FOREGROUND] * len(inside) + [BACKGROUND] * len(beside)
    return [{"points": [*inside, *beside], "labels": labels, "name": request.get("label")}]


def _region(request: Mapping[Hashable, Any]) -> list[dict[str, Any]]:
    """Make a box of 3D Slicer's region, which has both ends of an axis side by side."""
    roi = _as_list(request.get("roi"))
    if not roi:
        return []
    if len(roi) != ROI_NUMBERS:
        raise PromptError(f"roi is [x_min, x_max, y_min, y_max, z_min, z_max], not {roi!r}.")
    return [{"box": [*roi[0::2], *roi[1::2]], "name": request.get("label")}]


def _is_one(named: Any) -> bool:
    return isinstance(named, Sequence) and not isinstance(named, str) and len(named) == 1


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
