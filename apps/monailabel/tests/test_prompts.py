"""Boxes and points as the viewers send them, on a model whose card says that it knows them.

The phantom model does not, so nothing is said about how good its masks are: only that they are where they were asked
for, and that each viewer's form asks the same.
"""

import nibabel
import numpy as np
import pytest
from help import assert_on_grid, infer, label_map, upload, values

BOX = [12, 20, 6, 30, 40, 8]  # x, y, z twice
POINTS, LABELS = [[20, 30, 7], [5, 5, 7]], [1, 0]


@pytest.fixture
def client(serve, prompted_bundle):
    return serve(prompted_bundle)


def slices_with_something(found):
    """Say in which slices of the third axis a label map has any voxel."""
    return set(np.flatnonzero(found.any(axis=(0, 1))).tolist())


def test_viewers_with_points_are_offered_the_model(client):
    model = client.get("/info/").json()["models"]["deepgrow"]
    assert (model["type"], model["dimension"]) == ("deepgrow", 3)


def test_each_viewer_asks_the_same_of_points(client, studies):
    forms = [
        {"points": [{"points": POINTS, "labels": LABELS, "name": "spleen"}]},
        {"points": POINTS, "point_labels": LABELS, "label_prompt": [2]},
        {"foreground": POINTS[:1], "background": POINTS[1:], "label": "spleen"},
    ]
    answers = [label_map(infer(client, "phantom_001", **form)) for form in forms]
    assert_on_grid(answers[0], studies / "phantom_001.nii.gz")
    found = values(answers[0])
    assert set(np.unique(found)) == {0, 2}
    assert slices_with_something(found) == {7}
    for other in answers[1:]:
        np.testing.assert_array_equal(values(other), found)


def test_a_region_of_slicer_is_a_box(client):
    x_min, y_min, z_min, x_max, y_max, z_max = BOX
    roi = [x_min, x_max, y_min, y_max, z_min, z_max]
    box = values(label_map(infer(client, "phantom_001", boxes=[{"box": BOX, "name": "liver"}])))
    region = values(label_map(infer(client, "phantom_001", model="deepgrow", roi=roi, label="liver")))
    assert set(np.unique(box)) == {0, 1}
    assert slices_with_something(box) <= {6, 7, 8}
    np.testing.assert_array_equal(region, box)


def test_classes_and_boxes_go_together(client):
    alone = values(label_map(infer(client, "phantom_001", classes=[4])))
    both = values(label_map(infer(client, "phantom_001", classes=[4], boxes=[{"box": BOX, "name": "liver"}])))
    assert set(np.unique(both)) == {0, 1, 4}
    np.testing.assert_array_equal((both == 4)[both != 1], (alone == 4)[both != 1])


def test_a_box_stays_where_it_is_in_a_mirrored_file(client, studies, tmp_path):
    image = nibabel.load(studies / "phantom_001.nii.gz")
    width = image.shape[0]
    mirrored = image.slicer[::-1]
    nibabel.save(mirrored, tmp_path / "mirrored.nii.gz")
    box = [width - 1 - BOX[3], *BOX[1:3], width - 1 - BOX[0], *BOX[4:]]
    plain = values(label_map(infer(client, "phantom_001", boxes=[{"box": BOX, "name": "liver"}])))
    found = values(label_map(upload(client, tmp_path / "mirrored.nii.gz", boxes=[{"box": box, "name": "liver"}])))
    assert plain.any()
    np.testing.assert_array_equal(found[::-1], plain)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"points": [[20, 30, 100]], "point_labels": [1]}, "lies outside of the image: z is 100"),
        ({"boxes": [[30, 20, 6, 12, 40, 8]]}, "ends before it begins, along x"),
        ({"boxes": [[12, 20, 30, 40]]}, "give z too"),
        ({"roi": [1, 2, 3]}, "roi is [x_min, x_max"),
        ({"foreground": [], "background": [[1, 1, 1]], "label": "liver"}, "at least one point must lie in the object"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_are_answered_in_a_sentence(client, params, sentence):
    answer = infer(client, "phantom_001", **params)
    assert answer.status_code == 400
    assert sentence in answer.json()["detail"]
