"""Pictures of attention: each map in its place, over the image, with the prediction beside it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from scripts.data.vocabulary import Vocabulary
from scripts.errors import OutputError
from scripts.report.attention_pictures import (
    MOST_COLUMNS,
    PANEL,
    attention_files,
    attention_name,
    attention_picture,
    fullest_slice,
    write_attention_maps,
)
from scripts.report.error_pictures import picture_name

GAP, LINE, TITLE = 4, 16, 20
LEAST, MOST = np.array((60, 20, 120)), np.array((255, 220, 40))  # the scale's ends
WIDEST = 1080  # pixels of the report's page
SIDE = 64


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture
def draw(vocabulary, tmp_path):
    """Draw maps over a grey image with a block of the liver, and give the pixels and the file."""

    def drawn(attention, *, image=None, masks=None, class_ids=(1,), levels=4):
        if image is None:
            image = np.full((1, SIDE, SIDE), 100.0)
        if masks is None:
            masks = np.zeros((len(class_ids), *image.shape[1:]), dtype=bool)
            masks[:, 8:24, 16:40] = True
        classes = [vocabulary.entry(class_id) for class_id in class_ids]
        path = tmp_path / "p.png"
        attention_picture(image, attention, masks, classes=classes, levels=levels, title="case", path=path)
        return np.asarray(Image.open(path).convert("RGB")).astype(int), path

    return drawn


def even(prompts, grid=(4, 4)):
    return np.full((prompts, *grid), 1 / (grid[0] * grid[1]))


def pointing(*places, grid=(8, 8)):
    """Maps of prompts that look at one token each."""
    maps = np.zeros((len(places), *grid))
    for prompt, (row, column) in enumerate(places):
        maps[prompt, row, column] = 1
    return maps


def panel(pixels, row, column, *, side=PANEL):
    top, left = TITLE + LINE + row * (LINE + side + GAP), GAP + column * (side + GAP)
    return pixels[top : top + side, left : left + side]


def above(row):
    top = TITLE + row * (LINE + PANEL + GAP)
    return slice(top, top + LINE)


def along(column):
    left = GAP + column * (PANEL + GAP)
    return slice(left, left + PANEL)


def attended(part, *, grid=8):
    """The tokens in which a panel over plain grey is most yellow: rows and columns of the grid."""
    yellow = part[..., 0] - part[..., 2]
    places = np.nonzero(yellow == yellow.max()) if np.ptp(yellow) else ((), ())
    return tuple(set((np.array(axis) * grid // len(part)).tolist()) for axis in places)


@pytest.mark.parametrize("case", ["case_1", "a/b\\c", "50%2F", "Fall ü", "ends__", "1.2.840"])
def test_files_are_called_as_the_error_pictures_are(case):
    assert f"{attention_name(case)}__liver.png" == picture_name(case, "liver")


def test_files_of_an_evaluation_are_maps_and_their_pictures(tmp_path):
    for name in ("a.npz", "b.1.npz", "b.1.png", "b.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in attention_files(tmp_path)] == ["a.npz", "b.1.npz", "b.1.png"]
    assert attention_files(tmp_path / "nowhere") == []


def test_the_slice_with_most_of_all_classes_is_chosen():
    masks = np.zeros((2, 8, 8, 5), dtype=bool)
    masks[0, :4, :4, 1] = masks[1, :4, :4, 1] = True  # 16 pixels, both classes in the same place
    masks[0, :3, :3, 3] = masks[1, 5:, 4:, 3] = True  # 9 and 12
    assert fullest_slice(masks) == 3
    masks[..., 4] = masks[..., 3]
    assert fullest_slice(masks) == 3
    assert fullest_slice(np.zeros((2, 8, 8, 5), dtype=bool)) == 2
    assert fullest_slice(np.zeros((1, 8, 8, 1), dtype=bool)) == 0


def test_maps_come_back_by_their_levels(tmp_path):
    generator = np.random.default_rng(0)
    maps = {level: generator.random((2, 8 // (level + 1), 4)).astype(np.float32) for level in (3, 0)}
    path = write_attention_maps(maps, index=6, path=tmp_path / "a.b.npz")
    with np.load(path) as found:
        assert found.files == ["slice", "level_1", "level_4"]
        assert found["slice"] == 6
        assert found["level_1"].dtype == np.float32
        np.testing.assert_array_equal(found["level_1"], maps[0])
        np.testing.assert_array_equal(found["level_4"], maps[3])
    assert [file.name for file in tmp_path.iterdir()] == ["a.b.npz"]


def test_levels_are_rows_and_prompts_are_columns(draw):
    places = {0: [(1, 1), (1, 6)], 1: [(6, 1), (6, 6)], 3: [(3, 4), (4, 3)]}
    pixels, _ = draw({level: pointing(*places[level]) for level in (3, 0, 1)})
    for row, level in enumerate((0, 1, 3)):  # the shallowest first
        for column, (token_row, token_column) in enumerate(places[level], start=1):
            part = panel(pixels, row, column)
            assert attended(part) == ({token_row}, {token_column})
            most = part.reshape(-1, 3)[(part[..., 0] - part[..., 2]).argmax()]
            assert np.abs(most - (0.25 * 100 + 0.75 * MOST)).max() < 12


def test_the_image_is_seen_where_nothing_is_attended_to(draw):
    image = np.zeros((1, SIDE, SIDE))
    image[:, :, SIDE // 2 :] = 200
    pixels, _ = draw({0: pointing((0, 0))}, image=image)
    dark, light = panel(pixels, 0, 1)[100, 20], panel(pixels, 0, 1)[100, 150]
    assert np.abs(dark - 0.1 * LEAST).max() < 12
    assert np.abs(light - (0.9 * 200 + 0.1 * LEAST)).max() < 12


def test_colours_are_turned_into_greys(draw):
    image = np.zeros((3, SIDE, SIDE))
    image[1] = 255
    pixels, _ = draw({0: pointing((0, 0))}, image=image)
    grey = panel(pixels, 0, 0)[-1, -1]
    assert np.ptp(grey) == 0
    assert grey[0] == pytest.approx(0.587 * 255, abs=12)  # ITU-R BT.601


def test_the_prediction_is_outlined_in_the_first_column_alone(draw, vocabulary):
    pixels, _ = draw({0: even(2), 2: even(2)})
    colour = vocabulary.entry(1).colour
    scale = PANEL / SIDE
    for row in (0, 1):
        rows, columns = np.nonzero((panel(pixels, row, 0) == colour).all(axis=2))
        assert (rows.min(), rows.max()) == (8 * scale, 24 * scale - 1)
        assert (columns.min(), columns.max()) == (16 * scale, 40 * scale - 1)
        middle = panel(pixels, row, 0)[round(16 * scale), round(28 * scale)]
        assert np.abs(middle - 100).max() < 12  # a line, not an area
        for column in (1, 2):
            assert not (panel(pixels, row, column) == colour).all(axis=2).any()


def says(pixels, row, column, text):
    """Whether a panel's heading is this text and no other; letters have fewer greys in the file."""
    written = Image.new("RGB", (PANEL, LINE), (255, 255, 255))
    ImageDraw.Draw(written).text(
        (0, LINE - 4), text, fill=(26, 26, 26), font=ImageFont.load_default(size=12), anchor="ls"
    )
    return np.abs(pixels[above(row), along(column)] - np.asarray(written).astype(int)).max() <= 16


def test_headings_give_the_largest_share_in_even_shares(draw):
    pixels, _ = draw({0: even(2, (2, 2)), 1: even(2, (3, 5))})
    assert all(says(pixels, row, column, f"prompt {column}, 1.0 x") for row in (0, 1) for column in (1, 2))
    two = np.array([[[0.5, 0.2], [0.2, 0.1]], [[0.25, 0.3], [0.25, 0.2]]])  # even shares are a quarter
    pixels, _ = draw({0: two, 1: pointing((0, 0), grid=(4, 4))})
    assert says(pixels, 0, 1, "prompt 1, 2.0 x")
    assert says(pixels, 0, 2, "prompt 2, 1.2 x")
    assert says(pixels, 1, 1, "prompt 1, 16.0 x")
    assert not says(pixels, 0, 1, "prompt 1, 2.1 x")


def test_headings_number_the_levels_that_there_are(draw):
    pixels, _ = draw({0: even(1), 3: even(1)}, levels=4)
    assert says(pixels, 0, 0, "level 1 of 4")
    assert says(pixels, 1, 0, "level 4 of 4")
    pixels, _ = draw({4: even(1)}, levels=5)
    assert says(pixels, 0, 0, "level 5 of 5")


@pytest.mark.parametrize(("prompts", "rows"), [(1, 1), (MOST_COLUMNS, 1), (MOST_COLUMNS + 1, 2), (16, 2)])
def test_many_prompts_find_room_in_further_rows(draw, prompts, rows):
    pixels, _ = draw({0: pointing(*((i // 8, i % 8) for i in range(prompts)))})
    assert pixels.shape[1] <= WIDEST
    columns = min(prompts, MOST_COLUMNS)
    side = min(PANEL, (1040 - GAP) // (columns + 1) - GAP)
    for prompt in range(prompts):
        row, column = divmod(prompt, MOST_COLUMNS)
        assert attended(panel(pixels, row, column + 1, side=side)) == ({prompt // 8}, {prompt % 8})
    assert pixels.shape[0] == TITLE + rows * (LINE + side + GAP) + GAP + 2 * LINE


@pytest.mark.parametrize("shape", [(3, 30, 90), (1, 90, 30), (1, 5, 7), (3, 600, 400), (1, 1, 1)])
def test_every_shape_has_panels_of_its_proportions(draw, shape):
    image = np.random.default_rng(0).random(shape) * 255
    pixels, path = draw({0: even(2, (3, 2)), 1: even(2)}, image=image, masks=np.ones((1, *shape[1:]), dtype=bool))
    height = max(1, round(PANEL * shape[1] / max(shape)))
    assert pixels.shape[0] == TITLE + 2 * (LINE + height + GAP) + GAP + 2 * LINE
    assert pixels.shape[1] <= WIDEST
    assert path.stat().st_size < 60_000


def test_a_busy_picture_keeps_the_colours_of_all_classes_and_stays_light(draw, vocabulary):
    generator = np.random.default_rng(0)
    class_ids = [entry.id for entry in vocabulary.entries]
    masks = np.zeros((len(class_ids), 256, 256), dtype=bool)
    for k in range(len(class_ids)):
        masks[k, 12 * k : 12 * k + 8] = True
    smooth = [generator.random((2, 32, 32)) for _ in range(4)]
    pixels, path = draw(
        {level: maps / maps.sum(axis=(1, 2), keepdims=True) for level, maps in enumerate(smooth)},
        image=generator.random((3, 256, 256)) * 255,
        masks=masks,
        class_ids=class_ids,
    )
    assert path.stat().st_size < 250_000
    legend = pixels[TITLE + 4 * (LINE + PANEL + GAP) :]
    for entry in vocabulary.entries:
        assert (panel(pixels, 3, 0) == entry.colour).all(axis=2).any(), entry.name
        assert (legend == entry.colour).all(axis=2).sum() == 11 * 11, entry.name


def test_an_empty_prediction_has_no_outline_and_no_swatch(draw, vocabulary):
    pixels, _ = draw({0: even(1)}, masks=np.zeros((1, SIDE, SIDE), dtype=bool))
    assert not (pixels == vocabulary.entry(1).colour).all(axis=2).any()


def test_a_single_predicted_pixel_of_a_large_slice_is_seen(draw, vocabulary):
    masks = np.zeros((1, 1024, 1024), dtype=bool)
    masks[0, 500, 300] = True
    pixels, _ = draw({0: even(1)}, image=np.zeros((1, 1024, 1024)), masks=masks)
    assert (panel(pixels, 0, 0) == vocabulary.entry(1).colour).all(axis=2).any()


def test_a_second_drawing_gives_the_same_bytes(draw):
    first = draw({0: pointing((1, 2))})[1].read_bytes()
    assert draw({0: pointing((1, 2))})[1].read_bytes() == first


def test_what_does_not_fit_is_an_error(draw, tmp_path, vocabulary):
    with pytest.raises(ValueError, match="an image"):
        draw({0: even(1)}, image=np.zeros((2, SIDE, SIDE)))
    with pytest.raises(ValueError, match="masks of shape"):
        draw({0: even(1)}, masks=np.zeros((2, SIDE, SIDE), dtype=bool))
    for attention in ({}, {0: even(0)}, {0: even(1)[0]}):
        with pytest.raises(ValueError, match="maps"):
            draw(attention)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_missing_are_errors(tmp_path, vocabulary):
    masks = np.zeros((1, 8, 8), dtype=bool)
    settings = {"classes": [vocabulary.entry(1)], "levels": 1, "title": "t"}
    with pytest.raises(OutputError):
        attention_picture(np.zeros((1, 8, 8)), {0: even(1)}, masks, **settings, path=tmp_path / "nowhere" / "p.png")
    with pytest.raises(OutputError):
        write_attention_maps({0: even(1)}, index=0, path=tmp_path / "nowhere" / "p.npz")
    assert list(tmp_path.iterdir()) == []
