"""scripts/report/pictures.py: overlay pictures."""

import numpy as np
import pytest
from PIL import Image

from scripts.data.vocabulary import ClassEntry
from scripts.errors import OutputError
from scripts.report import pictures
from scripts.report.pictures import CONTOUR_WIDTH, FILL_OPACITY, MARGIN, MOST_SLICES, choose_slices, overlay_picture

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
CLASSES = [ClassEntry(k + 1, f"class {k + 1}", (), ("CT",), "abdomen", None, COLOURS[k]) for k in range(5)]
GREY = 100
WHITE = (255, 255, 255)


def grey_image(height, width, depth=1, channels=1):
    return np.full((channels, height, width, depth), GREY, np.float32)


def empty_masks(count, height, width, depth=1):
    return np.zeros((count, height, width, depth), bool)


def draw(tmp_path, image, masks, **options):
    path = overlay_picture(image, masks, classes=CLASSES[: len(masks)], path=tmp_path / "overlay.png", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["overlay.png"]
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture).astype(int)


def panel_of(picture, height, width, *, row=0, column=0):
    """One panel of a picture without title."""
    top, left = MARGIN + row * (height + MARGIN), MARGIN + column * (width + MARGIN)
    return picture[top : top + height, left : left + width]


def filled(colour, under=(GREY, GREY, GREY)):
    return np.round(np.array(under) + FILL_OPACITY * (np.array(colour) - np.array(under)))


# --- which slices


def test_few_slices_are_all_shown():
    masks = empty_masks(2, 3, 3, 20)
    masks[0, 1, 1, [2, 7]] = True
    masks[1, 0, 0, [7, 19]] = True
    assert choose_slices(masks) == [2, 7, 19]


def test_many_slices_are_thinned_evenly_from_first_to_last():
    masks = empty_masks(1, 3, 3, 60)
    masks[0, 1, 1, 10:25] = True  # 15 slices: every second one makes eight
    assert choose_slices(masks) == [10, 12, 14, 16, 18, 20, 22, 24]


@pytest.mark.parametrize("occupied", range(1, 40))
def test_slices_are_distinct_occupied_and_at_most_eight(occupied):
    masks = empty_masks(1, 2, 2, 50)
    masks[0, 0, 0, 5 : 5 + occupied] = True
    chosen = choose_slices(masks)
    assert len(set(chosen)) == len(chosen) == min(occupied, MOST_SLICES)
    assert chosen[0] == 5
    assert set(chosen) <= set(range(5, 5 + occupied))


def test_slices_with_truth_alone_are_shown_too():
    masks, truth = empty_masks(1, 3, 3, 9), empty_masks(1, 3, 3, 9)
    masks[0, 0, 0, 4] = True
    truth[0, 0, 0, 8] = True
    assert choose_slices(masks, truth) == [4, 8]


@pytest.mark.parametrize(("depth", "middle"), [(1, 0), (2, 1), (9, 4)])
def test_empty_volume_shows_its_middle_slice(depth, middle):
    assert choose_slices(empty_masks(2, 3, 3, depth)) == [middle]


# --- colours at known places


def test_fill_contour_and_outside_have_their_colours(tmp_path):
    masks = empty_masks(1, 300, 260)
    masks[0, 50:100, 20:200] = True
    panel = panel_of(draw(tmp_path, grey_image(300, 260), masks), 300, 260)
    assert (panel[49, 30] == GREY).all()
    assert (panel[30, 75] == GREY).all()  # rows and columns taken for each other would fill this place
    for row, column in [(50, 30), (50 + CONTOUR_WIDTH - 1, 30), (99, 30), (75, 20), (75, 199)]:
        assert tuple(panel[row, column]) == COLOURS[0]
    inner = panel[50 + CONTOUR_WIDTH : 100 - CONTOUR_WIDTH, 20 + CONTOUR_WIDTH : 200 - CONTOUR_WIDTH]
    assert (inner == filled(COLOURS[0])).all()


def test_overlapping_classes_blend_and_keep_their_contours(tmp_path):
    masks = empty_masks(2, 300, 300)
    masks[0, 50:200, 50:200] = True
    masks[1, 100:250, 100:250] = True
    panel = panel_of(draw(tmp_path, grey_image(300, 300), masks), 300, 300)
    np.testing.assert_allclose(panel[150, 150], filled(COLOURS[1], filled(COLOURS[0])), atol=1)
    assert tuple(panel[199, 150]) == COLOURS[0]  # edge of the first class inside the second
    assert tuple(panel[100, 150]) == COLOURS[1]


def test_mask_at_the_border_is_closed_by_a_contour(tmp_path):
    masks = np.ones((1, 256, 256, 1), np.uint8)
    panel = panel_of(draw(tmp_path, grey_image(256, 256), masks), 256, 256)
    assert tuple(panel[0, 100]) == tuple(panel[255, 255]) == COLOURS[0]
    assert (panel[100, 100] == filled(COLOURS[0])).all()


def test_truth_is_an_outline_dashed_in_white_and_the_colour_of_the_class(tmp_path):
    truth = empty_masks(2, 300, 260)
    truth[1, 50:100, 20:200] = True
    panel = panel_of(draw(tmp_path, grey_image(300, 260), empty_masks(2, 300, 260), truth=truth), 300, 260)
    assert {tuple(pixel) for pixel in panel[50, 20:200]} == {COLOURS[1], WHITE}
    assert {tuple(pixel) for pixel in panel[50:100, 199]} == {COLOURS[1], WHITE}
    assert (panel[75, 100] == GREY).all()


def test_colour_image_keeps_its_channels_and_range(tmp_path):
    image = np.zeros((3, 256, 300, 1))
    image[0], image[1], image[2] = 300.0, 20.4, -5.0
    panel = panel_of(draw(tmp_path, image, empty_masks(1, 256, 300)), 256, 300)
    assert (panel == (255, 20, 0)).all()


# --- sizes


@pytest.mark.parametrize(
    ("shape", "panel"),
    [
        ((256, 256), (256, 256)),
        ((400, 300), (400, 300)),
        ((5, 7), (185, 259)),  # 37 whole pixels to each
        ((1024, 2048), (256, 512)),
        ((255, 1), (510, 2)),
        ((9000, 3), (512, 1)),
    ],
)
def test_longer_side_of_a_panel_has_256_to_512_pixels(tmp_path, shape, panel):
    picture = draw(tmp_path, grey_image(*shape), np.ones((1, *shape, 1), bool))
    inside = (picture != pictures._BACKGROUND).any(axis=2)[MARGIN : MARGIN + panel[0] + 1]
    assert inside[:-1, MARGIN : MARGIN + panel[1]].all()
    assert not inside[:, MARGIN + panel[1]].any()
    assert not inside[-1].any()


def test_single_pixel_of_a_small_image_stays_a_square_at_its_place(tmp_path):
    masks = empty_masks(1, 5, 7)
    masks[0, 1, 3, 0] = True
    panel = panel_of(draw(tmp_path, grey_image(5, 7), masks), 185, 259)
    rows, columns = np.nonzero((panel != GREY).any(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (37, 73, 111, 147)


def test_single_pixel_of_a_large_image_does_not_vanish(tmp_path):
    masks = empty_masks(1, 2048, 2048)
    masks[0, 1001, 402, 0] = True
    panel = panel_of(draw(tmp_path, grey_image(2048, 2048), masks), 512, 512)
    assert tuple(panel[250, 100]) == COLOURS[0]
    assert np.count_nonzero((panel != GREY).any(axis=2)) == 1


# --- layout


def test_volume_fills_rows_of_panels_in_the_order_of_the_slices(tmp_path):
    masks = empty_masks(1, 256, 300, 6)
    for index in range(5):
        masks[0, 100:120, 50 * index : 50 * index + 40, index] = True
    picture = draw(tmp_path, grey_image(256, 300, 6), masks, columns=3)
    assert picture.shape[1] == MARGIN + 3 * (300 + MARGIN)
    for index in range(5):
        panel = panel_of(picture, 256, 300, row=index // 3, column=index % 3)
        assert (panel[110, 50 * index + 20] == filled(COLOURS[0])).all()
        assert (panel[110, (50 * index + 70) % 300] == GREY).all()
    assert (panel_of(picture, 256, 300, row=1, column=2) == pictures._BACKGROUND).all()


def test_slice_numbers_count_from_one_and_an_image_has_none(tmp_path, monkeypatch):
    texts = []
    genuine = pictures.ImageDraw.ImageDraw.text

    def listen(self, place, text, **options):
        texts.append(text)
        return genuine(self, place, text, **options)

    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", listen)
    masks = empty_masks(1, 256, 256, 12)
    masks[0, 3, 3, [0, 11]] = True
    draw(tmp_path, grey_image(256, 256, 12), masks)
    assert texts == ["1 / 12", "12 / 12", "class 1"]
    texts.clear()
    draw(tmp_path, grey_image(256, 256), empty_masks(2, 256, 256), truth=empty_masks(2, 256, 256), title="a title")
    assert texts == ["a title", "class 1", "class 2", "dashed: reference"]


@pytest.mark.parametrize("count", [1, 5])
def test_legend_shows_the_colour_of_every_class(tmp_path, count):
    picture = draw(tmp_path, grey_image(256, 256), empty_masks(count, 256, 256))
    legend = picture[256 + 2 * MARGIN :].reshape(-1, 3)
    shown = {tuple(pixel) for pixel in legend}
    for colour in COLOURS:
        assert (colour in shown) == (colour in COLOURS[:count])


def test_legend_and_title_longer_than_the_panel_are_not_cut(tmp_path):
    plain = draw(tmp_path, grey_image(256, 256), empty_masks(1, 256, 256))
    titled = draw(tmp_path, grey_image(256, 256), empty_masks(1, 256, 256), title="a very long title " * 4)
    assert titled.shape[1] > plain.shape[1]
    assert titled.shape[0] > plain.shape[0]
    for picture in (plain, titled):
        edge = np.concatenate([picture[:, -MARGIN:].reshape(-1, 3), picture[-MARGIN:].reshape(-1, 3)])
        assert (edge == pictures._BACKGROUND).all()


# --- failures


@pytest.mark.parametrize(
    ("image", "masks", "truth"),
    [
        ((2, 8, 8, 1), (1, 8, 8, 1), None),
        ((1, 8, 8), (1, 8, 8, 1), None),
        ((1, 8, 8, 2), (1, 8, 8, 1), None),
        ((1, 8, 9, 1), (1, 9, 8, 1), None),
        ((1, 8, 8, 1), (2, 8, 8, 1), None),
        ((1, 8, 8, 1), (1, 8, 8, 1), (1, 8, 8, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_a_defect(tmp_path, image, masks, truth):
    with pytest.raises(ValueError, match="expected"):
        overlay_picture(
            np.zeros(image),
            np.zeros(masks, bool),
            classes=CLASSES[:1],
            path=tmp_path / "overlay.png",
            truth=None if truth is None else np.zeros(truth, bool),
        )
    assert list(tmp_path.iterdir()) == []


def test_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    def break_off(_, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OutputError, match=r"overlay\.png.*No space left"):
        overlay_picture(grey_image(8, 8), empty_masks(1, 8, 8), classes=CLASSES[:1], path=tmp_path / "overlay.png")
    assert list(tmp_path.iterdir()) == []


def test_slices_chosen_beforehand_give_the_same_picture(tmp_path):
    image = grey_image(8, 6, depth=30) + np.arange(30)
    masks = empty_masks(2, 8, 6, 30)
    masks[0, 2:5, 1:4, 3:25:2] = masks[1, 1:3, 2:6, 20:] = True
    places = choose_slices(masks)
    (tmp_path / "whole").mkdir()
    (tmp_path / "chosen").mkdir()
    whole = draw(tmp_path / "whole", image, masks)
    chosen = draw(tmp_path / "chosen", image[..., places], masks[..., places], chosen=(places, 30))
    assert np.array_equal(whole, chosen)


# --- real images


def test_real_volume_with_its_truth(tmp_path, shared):
    nibabel = pytest.importorskip("nibabel")
    folder = shared / "data" / "chaos_t2_mr"
    voxels = nibabel.load(folder / "images" / "case_02.nii.gz").get_fdata()
    labels = np.asarray(nibabel.load(folder / "masks" / "case_02.nii.gz").dataobj)
    image = (voxels / voxels.max() * 255)[None]
    masks = np.stack([labels == value for value in (1, 2, 3, 4)])
    picture = draw(tmp_path, image, masks, truth=masks, title="case_02")
    assert picture.shape[1] == MARGIN + 4 * (256 + MARGIN)
    assert all((picture == colour).all(axis=2).any() for colour in COLOURS[:4])
