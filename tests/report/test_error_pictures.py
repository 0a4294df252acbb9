"""Pictures of errors: the right slice, the right frame, and colours where prediction and truth differ."""

import numpy as np
import pytest
from PIL import Image

from scripts.errors import OutputError
from scripts.report.error_pictures import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    PANEL,
    PREDICTED,
    TRUE,
    error_picture,
    picture_name,
    worst_slice,
)

GAP, LINE = 4, 16


def masks(*shape):
    return np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)


def panels(path):
    """The four panels of a written picture, each `(PANEL, PANEL, 3)`."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    lefts = [GAP + i * (PANEL + GAP) for i in range(4)]
    return [pixels[LINE : LINE + PANEL, left : left + PANEL] for left in lefts]


def near(panel, colour, *, tolerance=40):
    """Where a panel has about a colour."""
    return (np.abs(panel - np.array(colour)) < tolerance).all(axis=2)


@pytest.mark.parametrize(
    ("case", "class_name", "expected"),
    [
        ("case_1", "left kidney", "case_1__left kidney.png"),
        ("a/b\\c", "x:y", "a%2Fb%5Cc__x%3Ay.png"),
        ("50%2F", "ä", "50%252F__ä.png"),
        ("Fall ü", "leber", "Fall ü__leber.png"),
    ],
)
def test_names_are_files_in_the_folder_and_stay_apart(case, class_name, expected):
    assert picture_name(case, class_name) == expected


def test_the_slice_with_most_errors_is_chosen():
    predicted, true = masks(8, 8, 4)
    true[2:6, 2:6, 1] = predicted[2:6, 2:6, 1] = True
    true[2:4, 2:4, 2] = True
    predicted[0, 0:3, 3] = True
    assert worst_slice(predicted, true) == 2
    assert worst_slice(true, true) == 1
    assert worst_slice(*masks(8, 8, 4)) == 0


def test_what_is_wrong_has_its_colour_and_what_is_right_has_none(tmp_path):
    predicted, true = masks(64, 64, 1)
    true[20:40, 20:40, 0] = True
    predicted[20:40, 30:50, 0] = True  # the left half is missed, as much is too far right
    path = error_picture(np.full((1, 64, 64, 1), 100.0), predicted, true, path=tmp_path / "p.png")
    whole, prediction, truth, error = panels(path)
    blend = [0.6 * np.array(colour) + 0.4 * 100 for colour in (FALSE_POSITIVE, FALSE_NEGATIVE)]
    too_much, missed = (near(error, colour, tolerance=6) for colour in blend)
    assert too_much.sum() == pytest.approx(missed.sum(), rel=0.1)
    assert np.nonzero(missed)[1].max() < np.nonzero(too_much)[1].min()  # left of it, as columns run
    assert near(error, (100, 100, 100), tolerance=6).sum() > too_much.sum()
    # The frame of 48 pixels around columns 20 to 49 begins at column 11, and is enlarged to the panel.
    scale = PANEL / 48
    assert np.nonzero(missed)[1].min() == pytest.approx((20 - 11) * scale, abs=1)
    assert near(prediction, PREDICTED).any()
    assert not near(prediction, TRUE).any()
    assert near(truth, TRUE).any()
    assert np.nonzero(near(truth, TRUE))[1].min() < np.nonzero(near(prediction, PREDICTED))[1].min()
    assert near(whole, (255, 255, 255), tolerance=6).any()  # the frame in the whole slice


@pytest.mark.parametrize("channels", [1, 3])
def test_few_wrong_pixels_and_the_legend_keep_their_colours_in_a_busy_image(tmp_path, channels):
    predicted, true = masks(100, 100, 1)
    true[20:80, 20:80] = predicted[20:80, 20:80] = True
    predicted[15:19, 40:45] = true[85:89, 40:45] = True
    image = np.random.default_rng(0).random((channels, 100, 100, 1)) * 255
    image[:, 15:19] = image[:, 85:89] = 100
    path = error_picture(image, predicted, true, path=tmp_path / "p.png")
    *_, error = panels(path)
    for colour, rows in ((FALSE_POSITIVE, slice(0, PANEL // 2)), (FALSE_NEGATIVE, slice(PANEL // 2, None))):
        assert near(error[rows], 0.6 * np.array(colour) + 40, tolerance=25).sum() > 20
    legend = np.asarray(Image.open(path).convert("RGB"))[PANEL + LINE + 2 :]
    for colour in (FALSE_POSITIVE, FALSE_NEGATIVE):
        assert (legend == colour).all(axis=2).sum() == 12 * 12


def test_a_class_at_the_border_has_a_frame_within_the_slice(tmp_path):
    predicted, true = masks(100, 60, 2)
    true[90:, 50:, 1] = True
    *_, error = panels(error_picture(np.zeros((1, 100, 60, 2)), predicted, true, path=tmp_path / "p.png"))
    missed = near(error, 0.6 * np.array(FALSE_NEGATIVE), tolerance=8)
    rows, columns = np.nonzero(missed)
    # The frame is the last 24 rows and columns, of which the class has 10.
    assert rows.max() == columns.max() == PANEL - 1
    assert len(set(rows)) == len(set(columns)) == pytest.approx(10 / 24 * PANEL, abs=1)


@pytest.mark.parametrize("shape", [(3, 30, 90, 1), (1, 90, 30, 2), (1, 5, 7, 1), (3, 300, 400, 1)])
def test_every_shape_has_a_picture_of_one_size(tmp_path, shape):
    generator = np.random.default_rng(0)
    predicted, true = masks(*shape[1:])
    true[1:4, 1:5] = True
    path = error_picture(generator.random(shape) * 255, predicted, true, path=tmp_path / "p.png")
    assert Image.open(path).size == (4 * (PANEL + GAP) + GAP, PANEL + 2 * LINE + 2 * GAP)
    assert path.stat().st_size < 60_000


def test_colour_images_keep_their_colours_and_odd_values_are_drawn(tmp_path):
    predicted, true = masks(40, 40, 1)
    true[10:20, 10:20] = True
    image = np.zeros((3, 40, 40, 1))
    image[0] = 200
    image[:, 30:] = np.array([np.nan, 300, -5])[:, None, None, None]
    whole, *_ = panels(error_picture(image, predicted, true, path=tmp_path / "p.png"))
    assert np.abs(whole[20, 5] - (200, 0, 0)).max() < 8
    assert np.abs(whole[-5, 5] - (0, 255, 0)).max() < 8


def test_a_single_missed_pixel_of_a_large_slice_is_seen(tmp_path):
    predicted, true = masks(600, 600, 1)
    true[100:500, 100:500] = predicted[100:500, 100:500] = True
    true[520, 300] = True
    *_, error = panels(error_picture(np.zeros((1, 600, 600, 1)), predicted, true, path=tmp_path / "p.png"))
    assert near(error, 0.6 * np.array(FALSE_NEGATIVE), tolerance=8).any()


def test_shapes_that_do_not_fit_and_folders_that_are_missing_are_errors(tmp_path):
    predicted, true = masks(8, 8, 1)
    with pytest.raises(ValueError, match="an image"):
        error_picture(np.zeros((2, 8, 8, 1)), predicted, true, path=tmp_path / "p.png")
    with pytest.raises(ValueError, match="masks of shape"):
        error_picture(np.zeros((1, 8, 9, 1)), predicted, true, path=tmp_path / "p.png")
    with pytest.raises(OutputError):
        error_picture(np.zeros((1, 8, 8, 1)), predicted, true, path=tmp_path / "nowhere" / "p.png")
    assert list(tmp_path.iterdir()) == []
