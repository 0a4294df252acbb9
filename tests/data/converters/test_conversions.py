"""What is written anew: sides, channels, united masks, and pictures laid onto a DICOM series."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import trees
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image

from scripts.data.converters.conversions import (
    Converter,
    body_midline,
    right_half,
    save_nifti,
    save_picture,
)
from scripts.data.converters.finding import Found, FoundCase
from scripts.data.reading import read_image
from scripts.errors import InputError

RAS = np.array([[0.7, 0, 0, -21], [0, 0.9, 0, -12], [0, 0, 5.0, 100], [0, 0, 0, 1]])  # R = 0.7 x - 21: 0 at x = 30
SHAPE = (60, 30, 12)
AXES = ["RAS", "LPS", "LAS", "RPI", "ASR", "PIL", "SLA", "IRP"]


def turned(volume, axes, affine=RAS):
    """A RAS volume with other axes, and its affine."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    image = nibabel.Nifti1Image(volume.astype(np.uint8), affine).as_reoriented(change)
    return np.asarray(image.dataobj), affine @ inv_ornt_aff(change, volume.shape)


def blocks(*boxes):
    """Boxes of (x, y, z) ranges in a RAS volume."""
    mask = np.zeros(SHAPE, dtype=bool)
    for box in boxes:
        mask[tuple(slice(*side) for side in box)] = True
    return mask


RIGHT = ((40, 52), (5, 15), (2, 9))
LEFT = ((8, 22), (6, 16), (3, 10))
SHIFTED = 30.0 * 0.7  # a midline far to the right, at x = 60, beyond the volume
CASES = {
    "two kidneys": (blocks(LEFT, RIGHT), blocks(RIGHT), 0.0),
    "only the right one": (blocks(RIGHT), blocks(RIGHT), 0.0),
    "only the left one": (blocks(LEFT), blocks(), 0.0),
    "none": (blocks(), blocks(), 0.0),
    "all left of the midline": (blocks(LEFT, RIGHT), blocks(), SHIFTED),
    # A twentieth of it lies across, so the part is not cut.
    "a lobe across the midline": (
        blocks(((11, 31), (5, 25), (4, 6)), RIGHT),
        blocks(RIGHT),
        -0.35,
    ),
    # An isthmus between them: each side keeps half of it. The midline runs between x = 30 and 31.
    "horseshoe": (
        blocks(LEFT, RIGHT, ((22, 40), (6, 10), (3, 5))),
        blocks(RIGHT, ((31, 40), (6, 10), (3, 5))),
        0.35,
    ),
    "fragments": (
        blocks(LEFT, RIGHT, ((25, 26), (1, 2), (0, 1)), ((33, 34), (20, 21), (11, 12)), ((59, 60), (29, 30), (0, 1))),
        blocks(RIGHT, ((33, 34), (20, 21), (11, 12)), ((59, 60), (29, 30), (0, 1))),
        0.0,
    ),
    # Corner to corner they are one part, of which 1 of 25 voxels lies to the right.
    "touching at a corner": (
        blocks(((26, 30), (5, 7), (2, 5)), ((30, 31), (7, 8), (5, 6))),
        blocks(),
        -0.35,
    ),
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", CASES)
def test_sides_are_the_patients_whatever_the_axes(name, axes):
    mask, right, midline = CASES[name]
    (volume, affine), (expected, _) = turned(mask, axes), turned(right, axes)
    assert "".join(nibabel.aff2axcodes(affine)) == axes
    assert np.array_equal(right_half(volume > 0, affine, midline=midline), expected > 0)


@pytest.mark.parametrize("degrees", [-30, 12, 30])
def test_sides_in_a_tilted_volume(degrees):
    """Two balls 36 mm to the right and left of a line that is the patient's, not the volume's."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-2.0, 2.0, 3.0])
    affine[:3, 3] = turn @ np.array([60.0, -60.0, 0.0])
    world = (
        np.stack(np.meshgrid(*map(np.arange, (60, 60, 10)), indexing="ij"), axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    )
    balls = [np.linalg.norm(world - [side * 36, 5, 14], axis=-1) < 12 for side in (1, -1)]
    assert all(ball.sum() > 100 for ball in balls)
    assert np.array_equal(right_half(balls[0] | balls[1], affine, midline=0.0), balls[0])
    body = np.where(np.hypot(world[..., 0] - 7, world[..., 1]) < 40, 30.0, -1000.0)
    assert body_midline(body, affine) == pytest.approx(7, abs=0.2)


def test_a_horseshoe_is_cut_from_a_tenth_on():
    def share_right(columns):
        mask = blocks(((31 - (20 - columns), 31 + columns), (4, 8), (2, 6)))
        return right_half(mask, RAS, midline=0.35).sum() / mask.sum()

    assert [share_right(columns) for columns in (0, 1, 2, 10, 18, 19, 20)] == [0, 0, 0.1, 0.5, 0.9, 1, 1]


def test_midline_by_hand():
    image = np.full((40, 30, 4), -1000.0)
    image[10:30, 5:25] = 50  # its centre is x = 19.5
    image[10:30, 5:25, 1] = -200  # fat is body
    image[30:, 5:25] = -500  # lung is not
    affine = np.array([[-1.5, 0, 0, 18], [0, -1.5, 0, 15], [0, 0, 4, 0], [0, 0, 0, 1.0]])
    assert body_midline(image, affine) == pytest.approx(18 - 1.5 * 19.5)
    swapped = affine[:, [2, 1, 0, 3]]
    assert body_midline(image.transpose(2, 1, 0), swapped) == pytest.approx(18 - 1.5 * 19.5)
    assert body_midline(np.full((4, 4, 4), -1000.0), affine) == 18  # of nothing: the first voxel's


# ------------------------------------------------------------------------------------------------------- the converter


def convert(tmp_path, image, label, *, label_map=None, channel=None):
    """Convert one case; gives the case and the converter."""
    case = FoundCase("case_1", "case_1", None, image, label, "CT")
    converter = Converter(Found("mine", (case,), (), label_map or {1: "liver"}, channel=channel), tmp_path / "out")
    return converter(case), converter


def volume(path: Path, voxels, affine=trees.AFFINE) -> str:
    trees.save_volume(voxels, path, affine)
    return str(path)


PAIR = {1: "liver", 2: ("left kidney", "right kidney"), 3: None}


def test_what_can_be_read_as_it_is_stays_where_it_is(tmp_path):
    image, label = volume(tmp_path / "i.nii", trees.ct_volume(1)), volume(tmp_path / "l.nii", trees.label_volume(1))
    case, converter = convert(tmp_path, image, label)
    assert (case.image, case.label) == (image, label)
    assert converter.label_map == {1: "liver"}
    assert not (tmp_path / "out").exists()


def test_the_right_structure_gets_a_free_value(tmp_path):
    image = volume(tmp_path / "i.nii.gz", trees.ct_volume(1))
    label = volume(tmp_path / "l.nii.gz", trees.label_volume(2, 1, 3, 2))
    case, converter = convert(tmp_path, image, label, label_map=PAIR)
    assert converter.label_map == {1: "liver", 2: "left kidney", 4: "right kidney", 3: None}
    # In LPS axes a low X is to the right; the first block of the four is there.
    assert np.array_equal(nibabel.load(case.label).get_fdata(), trees.label_volume(4, 1, 3, 2))
    assert np.array_equal(nibabel.load(case.label).affine, trees.AFFINE)


@pytest.mark.parametrize("meaning", [("left kidney", "right kidney"), ("Right Kidney", "Left Kidney")])
def test_the_order_of_a_pair_does_not_matter(meaning):
    converter = Converter(Found("mine", (), (), {7: meaning}), Path("nowhere"))
    assert {value: name.casefold() for value, name in converter.label_map.items()} == {
        7: "left kidney",
        8: "right kidney",
    }


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (trees.label_volume(2, 4), r"label values \[4\] are not in its label map"),  # or 4 would be a right kidney
        (trees.label_volume(2).astype(np.int16) * 150, "whole numbers in 0...255"),  # 300 is 44 as a byte
        (-trees.label_volume(2).astype(np.int16), "whole numbers in 0...255"),
        (trees.label_volume(2) * np.float32(0.9), "whole numbers in 0...255"),
        (np.where(trees.label_volume(2) == 2, np.float32("nan"), 1), "whole numbers in 0...255"),
    ],
)
def test_labels_that_do_not_fit_into_bytes_are_refused(tmp_path, labels, text):
    image, label = volume(tmp_path / "i.nii", trees.ct_volume(1)), volume(tmp_path / "l.nii", labels)
    with pytest.raises(InputError, match=text):
        convert(tmp_path, image, label, label_map=PAIR)


def test_a_channel_becomes_a_volume(tmp_path):
    channels = np.stack([trees.mr_volume(number) for number in range(3)], axis=3)
    image = volume(tmp_path / "i.nii.gz", channels)
    case, _ = convert(tmp_path, image, "label", channel=1)
    written = nibabel.load(case.image)
    assert np.array_equal(np.asarray(written.dataobj), channels[..., 1])
    assert np.array_equal(written.affine, trees.AFFINE)
    assert written.get_data_dtype() == np.int16
    for shape in (channels, channels[..., 0]):
        image = volume(tmp_path / "j.nii.gz", shape)
        with pytest.raises(InputError, match=r"j.nii.gz: expected an image \(X, Y, Z, C\) with more than 3 channels"):
            convert(tmp_path, image, "label", channel=3)


def test_a_channel_of_scaled_values_keeps_them(tmp_path):
    stored = nibabel.Nifti1Image(np.arange(48, dtype=np.int16).reshape(2, 3, 4, 2), trees.AFFINE)
    stored.header.set_slope_inter(0.5, -3)
    nibabel.save(stored, tmp_path / "i.nii.gz")
    case, _ = convert(tmp_path, str(tmp_path / "i.nii.gz"), "label", channel=1)
    written = nibabel.load(case.image)
    assert written.get_data_dtype() == np.float32
    assert np.allclose(written.get_fdata(), nibabel.load(tmp_path / "i.nii.gz").get_fdata()[..., 1], atol=1e-4)


def test_a_channel_is_no_better_oriented_than_its_file(tmp_path):
    stored = nibabel.Nifti1Image(np.stack([trees.mr_volume(1)] * 2, axis=3), None)
    stored.header.set_zooms((1.5, 2, 4, 1))
    nibabel.save(stored, tmp_path / "i.nii.gz")
    case, _ = convert(tmp_path, str(tmp_path / "i.nii.gz"), "label", channel=0)
    image = read_image(case.image)
    assert image.meta["oriented"] is False
    assert np.allclose(image.affine, nibabel.load(tmp_path / "i.nii.gz").affine)


@pytest.mark.parametrize("share", [0.5, 0.01])
@pytest.mark.parametrize("what", ["channel", "label"])
def test_a_truncated_volume_is_refused(tmp_path, what, share):
    """Also where the archive's beginning is whole."""
    path = tmp_path / "broken.nii.gz"
    volume(path, np.stack([trees.mr_volume(1)] * 2, axis=3) if what == "channel" else trees.noise(1).astype(np.float32))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"broken.nii.gz: expected a complete"):
        convert(tmp_path, str(path), str(path), **({"channel": 1} if what == "channel" else {"label_map": PAIR}))


def picture(path: Path, pixels) -> str:
    trees.save_picture(pixels, path)
    return str(path)


def test_several_masks_are_united(tmp_path):
    files = tuple(picture(tmp_path / f"{top}.png", trees.mask(top)) for top in (1, 5, 12))
    case, _ = convert(tmp_path, "image.png", {"polyp": files, "cell nucleus": files[:1], "lung": files[2]})
    expected = np.logical_or.reduce([trees.mask(top) for top in (1, 5, 12)])
    with Image.open(case.label["polyp"]) as united:
        assert np.array_equal(np.asarray(united), expected * 255)
    with Image.open(case.label["cell nucleus"]) as alone:
        assert np.array_equal(np.asarray(alone), trees.mask(1))
    assert case.label["lung"] == files[2]


def test_masks_that_cannot_be_united_are_refused(tmp_path):
    small, large = picture(tmp_path / "s.png", trees.mask()), picture(tmp_path / "l.png", trees.mask(size=(21, 24)))
    with pytest.raises(InputError, match=r"pictures of one size .* got \[\(24, 20, 1\), \(24, 21, 1\)\]"):
        convert(tmp_path, "image.png", {"polyp": (small, large)})
    volumes = tuple(volume(tmp_path / f"{number}.nii", trees.label_volume(1)) for number in range(2))
    with pytest.raises(InputError, match=r"got \[\(24, 20, 6\)\]; unite them yourself"):
        convert(tmp_path, "image.nii", {"liver": volumes})


# --------------------------------------------------------------------------------------------- pictures and DICOM


def series(tmp_path, *, backwards=False, labels=None):
    """A series that is bright where its pictures have a label; their names can run against the slices' positions."""
    labels = trees.label_volume(126, 63, 252, 189) if labels is None else labels
    labels[12, 17, 5] = 63  # only in the last slice
    bright = (100 * trees.noise(1)).astype(np.int16) + 1000 * (labels > 0)
    folder = tmp_path / "DICOM_anon"
    names = [Path(name) for name in trees.dicom_series(bright, folder, "IMG-0004", "1.2.3")]
    if backwards:
        for name in names:
            name.rename(name.with_suffix(".tmp"))
        for name, other in zip(names, names[::-1], strict=True):
            name.with_suffix(".tmp").rename(other)
        names.reverse()  # the file of slice k
    return folder, [
        picture(tmp_path / f"Ground/{name.stem}.png", labels[:, :, index].T) for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("backwards", [False, True])
def test_labels_follow_the_slices_not_the_names(tmp_path, backwards):
    folder, pictures = series(tmp_path, backwards=backwards)
    case, _ = convert(tmp_path, str(folder), tuple(sorted(pictures)), label_map={63: "liver"})
    image, label = read_image(case.image), read_image(case.label)
    assert np.array_equal(image[0] >= 1000, label[0] > 0)
    assert np.allclose(image.affine, label.affine)
    # Slices lie 4 mm apart, foot to head; x and y of DICOM point left and back.
    assert np.allclose(label.affine, [[-1.5, 0, 0, 18], [0, -1.5, 0, 15], [0, 0, 4, 0], [0, 0, 0, 1]])
    assert label[0, 12, 17].tolist() == [0, 0, 0, 0, 0, 63]


def test_pictures_must_be_those_of_the_series(tmp_path):
    folder, pictures = series(tmp_path)
    with pytest.raises(InputError, match="a label picture for each of the 6 DICOM files, got 5"):
        convert(tmp_path, str(folder), tuple(pictures[1:]))
    other = picture(tmp_path / "Ground/IMG-0005-00001.png", trees.mask(size=(20, 24)))
    with pytest.raises(InputError, match=r"named like each DICOM file, got none for IMG-0004-00001.dcm"):
        convert(tmp_path, str(folder), (*pictures[1:], other))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected one DICOM series in its folder, got 0"):
        convert(tmp_path, str(tmp_path / "empty"), tuple(pictures))


@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        (trees.colour(1, (20, 24)), r"8-bit grey, got \(20, 24, 3\)"),
        (np.zeros((20, 24), np.uint16), "8-bit grey, got .* uint16"),
        (np.zeros((24, 20), np.uint8), r"label pictures of \(24, 20\), got \[\(20, 24\), \(24, 20\)\]"),
        (None, "expected a complete picture"),
    ],
)
def test_a_picture_that_is_no_label_is_refused(tmp_path, pixels, text):
    folder, pictures = series(tmp_path)
    if pixels is None:
        Path(pictures[2]).write_bytes(Path(pictures[2]).read_bytes()[:60])
    else:
        picture(Path(pictures[2]), pixels)
    with pytest.raises(InputError, match=text):
        convert(tmp_path, str(folder), tuple(pictures))


# ------------------------------------------------------------------------------------------------------------- writing


def test_equal_content_gives_equal_files(tmp_path):
    for folder in ("a", "b"):
        save_nifti(trees.ct_volume(1), RAS, tmp_path / folder / "x.nii.gz")
        save_picture(trees.colour(1), tmp_path / folder / "x.png")
    for name in ("x.nii.gz", "x.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    header = nibabel.load(tmp_path / "a/x.nii.gz").header
    assert np.allclose(header.get_sform(coded=True)[0], RAS)
    assert np.allclose(header.get_qform(coded=True)[0], RAS)
    assert header.get_xyzt_units()[0] == "mm"
