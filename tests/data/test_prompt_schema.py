"""The schema of prompts: every way of writing them, and a sentence for every way of not writing them."""

import json

import pytest

from scripts.data.prompts import BoxPrompt, PointPrompt, Prompts
from scripts.errors import PromptError

WHOLE = {
    "classes": ["liver", 4],
    "boxes": [{"box": [30, 40, 90, 110], "name": "spleen"}],
    "points": [{"points": [[52, 61], [70, 20]], "labels": [1, 0]}],
}


@pytest.mark.parametrize("value", [WHOLE, json.dumps(WHOLE)])
def test_the_whole_form_is_read_from_a_mapping_and_from_json(value):
    prompts = Prompts.read(value)
    assert prompts.classes == ("liver", 4)
    assert prompts.boxes == (BoxPrompt(box=(30.0, 40.0, 90.0, 110.0), name="spleen"),)
    assert prompts.points == (PointPrompt(points=((52.0, 61.0), (70.0, 20.0)), labels=(1, 0)),)
    assert prompts


def test_parts_on_their_own_are_the_whole():
    assert Prompts.read(**WHOLE) == Prompts.read(WHOLE)
    assert Prompts.read(**{name: json.dumps(part) for name, part in WHOLE.items()}) == Prompts.read(WHOLE)


def test_yaml_needs_fewer_quotes():
    prompts = Prompts.read(boxes="[{box: [1, 2, 3, 4], name: skin lesion}]")
    assert prompts == Prompts.read(boxes=[{"box": [1, 2, 3, 4], "name": "skin lesion"}])


@pytest.mark.parametrize("value", [None, {}, "{}", {"classes": None}, {"boxes": [], "points": []}, {"boxes": None}])
def test_nothing_asked_for_is_false(value):
    prompts = Prompts.read(value)
    assert not prompts
    assert prompts.classes is None
    assert prompts.objects == ()


@pytest.mark.parametrize(
    ("classes", "expected"), [("liver, spleen", ("liver", "spleen")), (3, (3,)), (["liver", 2], ("liver", 2))]
)
def test_classes_are_written_as_for_the_command_line(classes, expected):
    assert Prompts.read(classes=classes).classes == expected


@pytest.mark.parametrize(
    "boxes", [[1, 2, 3, 4], [[1, 2, 3, 4]], {"box": [1, 2, 3, 4]}, [{"box": [1, 2, 3, 4]}], "[1,2,3,4]"]
)
def test_one_box_is_written_in_many_ways(boxes):
    assert Prompts.read(boxes=boxes).boxes == (BoxPrompt(box=(1.0, 2.0, 3.0, 4.0)),)


def test_boxes_have_two_or_three_axes():
    two, three = Prompts.read(boxes=[[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]).boxes
    assert (two.axes, three.axes) == (2, 3)


def test_a_box_of_one_pixel_is_a_box():
    assert Prompts.read(boxes=[5, 6, 5, 6]).boxes[0].box == (5.0, 6.0, 5.0, 6.0)


@pytest.mark.parametrize("points", [[[1, 2], [3, 4]], {"points": [[1, 2], [3, 4]]}, [{"points": [[1, 2], [3, 4]]}]])
def test_points_without_labels_are_all_in_one_object(points):
    (found,) = Prompts.read(points=points).points
    assert found.labels_of_points == (1, 1)
    assert found.axes == 2


def test_many_objects_keep_their_order_and_places():
    prompts = Prompts.read(boxes=[[1, 2, 3, 4], [2, 2, 3, 4]], points=[{"points": [[1, 2]]}, {"points": [[5, 6]]}])
    assert [place for place, _ in prompts.placed_objects()] == ["boxes[0]", "boxes[1]", "points[0]", "points[1]"]
    assert [prompt for _, prompt in prompts.placed_objects()] == list(prompts.objects)


def test_it_is_read_again_from_what_it_writes():
    prompts = Prompts.read(WHOLE)
    assert Prompts.read(prompts.model_dump_json()) == prompts
    assert Prompts.read(**prompts.model_dump()) == prompts


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"value": "liver"}, "Prompts are an object with classes, boxes and points, not 'liver'."),
        ({"value": [1]}, r"Prompts are an object with classes, boxes and points, not \[1\]."),
        ({"value": '{"classes": '}, "Expected prompts as JSON or YAML, but expected the node content"),
        ({"boxes": "[[1, 2, 3"}, "Expected prompts as JSON or YAML"),
        ({"value": {"klasses": 1}}, "Prompts have no klasses: the parts here are classes, boxes and points."),
        ({"classes": [1.5]}, r"classes: classes are names or ids, such as \['liver', 4\], not \[1.5\]."),
        ({"classes": True}, "classes: classes are names or ids"),
        ({"boxes": 5}, r"boxes: boxes are a list, such as \[\[30, 40, 90, 110\]\], not 5."),
        ({"boxes": "liver"}, "boxes: boxes are a list"),
        ({"boxes": [[1, 2, 3]]}, r"boxes\[0\].box: a box is \[x_min, y_min, x_max, y_max\] in a picture, or .* volume"),
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3, 4, 5]]}, r"boxes\[1\].box: a box is .* not \[1, 2, 3, 4, 5\]."),
        ({"boxes": [[1, 2, 3, "4"]]}, r"boxes\[0\].box: a box is"),
        ({"boxes": [[1, 2, 3, float("nan")]]}, r"boxes\[0\].box: a box is"),
        ({"boxes": [[1, 2, 3, True]]}, r"boxes\[0\].box: a box is"),
        ({"boxes": [[60, 2, 10, 4]]}, "the box ends before it begins, along x from 60 to 10"),
        ({"boxes": [[1, 9, 10, 4]]}, "along y from 9 to 4"),
        ({"boxes": [[1, 2, 8, 4, 5, 7]]}, "along z from 8 to 7"),
        ({"boxes": [{"name": "liver"}]}, r"boxes\[0\].box is missing: an object has a box, or points"),
        ({"boxes": [{"box": [1, 2, 3, 4], "class": 1}]}, r"Prompts have no boxes\[0\].class: .* box and name."),
        (
            {"boxes": [{"box": [1, 2, 3, 4], "name": [1]}]},
            r"boxes\[0\].name: an object's name is a class by name or id",
        ),
        ({"boxes": [{"box": [1, 2, 3, 4], "name": True}]}, "an object's name is a class"),
        ({"points": 7}, "points: points are a list, such as"),
        ({"points": [[1, 2], [1, 2, 3]]}, r"points\[0\].points: points are \[\[x, y\], ...\] in a picture"),
        ({"points": [1, 2]}, r"points\[0\].points: points are"),
        ({"points": [{"points": []}]}, r"points\[0\].points: points are"),
        ({"points": [{"points": [[1, 2]], "labels": [1, 0]}]}, "one label; 1 points and 2 labels were given"),
        ({"points": [{"points": [[1, 2]], "labels": [2]}]}, "labels of points are 1 in the object and 0 beside it"),
        ({"points": [{"points": [[1, 2]], "labels": "1"}]}, "labels of points are 1 in the object"),
        ({"points": [{"points": [[1, 2]], "labels": [0]}]}, "at least one point must lie in the object"),
        ({"points": [{"points": [[1, 2]], "label": [1]}]}, r"Prompts have no points\[0\].label: .* points, labels and"),
        ({"points": [{"labels": [1]}]}, r"points\[0\].points is missing"),
    ],
)
def test_what_is_written_otherwise_gets_a_sentence(given, sentence):
    with pytest.raises(PromptError, match=sentence) as caught:
        Prompts.read(**given)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_the_schema_can_be_shown():
    assert set(Prompts.model_json_schema()["properties"]) == {"classes", "boxes", "points"}
