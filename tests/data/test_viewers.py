"""What the viewers of MONAI Label send, as prompts."""

import pytest

from scripts.data.prompts import Prompts
from scripts.data.viewers import viewer_prompts
from scripts.errors import PromptError


@pytest.mark.parametrize(
    ("request_keys", "expected"),
    [
        ({}, {}),
        ({"image": "a.nii.gz", "device": "cpu", "label_prompt": [], "points": [], "point_labels": []}, {}),
        ({"classes": "liver"}, {"classes": ["liver"]}),
        ({"label_prompt": [1, 4]}, {"classes": [1, 4]}),
        ({"label_prompt": ["liver"]}, {"classes": ["liver"]}),
        (
            {"points": [[1, 2, 3], [4, 5, 6]], "point_labels": [1, 0], "label_prompt": [2]},
            {"points": [{"points": [[1, 2, 3], [4, 5, 6]], "labels": [1, 0], "name": 2}]},
        ),
        (
            {"points": [[1, 2, 3]], "point_labels": [1], "label_prompt": [2, 3]},
            {"classes": [2, 3], "points": [{"points": [[1, 2, 3]], "labels": [1]}]},
        ),
        (
            {"foreground": [[1, 2, 3]], "background": [[4, 5, 6]], "label": "liver"},
            {"points": [{"points": [[1, 2, 3], [4, 5, 6]], "labels": [1, 0], "name": "liver"}]},
        ),
        ({"foreground": [[1, 2, 3]], "background": []}, {"points": [{"points": [[1, 2, 3]], "labels": [1]}]}),
        ({"roi": [1, 4, 2, 5, 3, 6]}, {"boxes": [[1, 2, 3, 4, 5, 6]]}),
        ({"roi": [1, 4, 2, 5, 3, 6], "label": "liver"}, {"boxes": [{"box": [1, 2, 3, 4, 5, 6], "name": "liver"}]}),
        (
            {"boxes": [[1, 2, 3, 4]], "points": [{"points": [[1, 2]]}], "classes": [1]},
            {"classes": [1], "boxes": [[1, 2, 3, 4]], "points": [{"points": [[1, 2]]}]},
        ),
    ],
)
def test_each_form_becomes_the_one_schema(request_keys, expected):
    assert viewer_prompts(request_keys) == Prompts.read(expected)


@pytest.mark.parametrize(
    ("request_keys", "sentence"),
    [
        ({"roi": [1, 2, 3, 4]}, r"roi is \[x_min, x_max, y_min, y_max, z_min, z_max\], not \[1, 2, 3, 4\]"),
        ({"roi": [9, 4, 2, 5, 3, 6]}, "the box ends before it begins, along x from 9 to 4"),
        ({"points": [[1, 2, 3]], "point_labels": [1, 1]}, "1 points and 2 labels"),
        ({"background": [[1, 2, 3]]}, "at least one point must lie in the object"),
        ({"foreground": [1, 2, 3]}, "points are"),
    ],
)
def test_what_cannot_be_read_gets_a_sentence(request_keys, sentence):
    with pytest.raises(PromptError, match=sentence):
        viewer_prompts(request_keys)
