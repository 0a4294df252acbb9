"""scripts/data/writing.py: label maps, probability maps and the names of their values."""

import json

import nibabel
import numpy as np
import pytest
from monai.transforms import LoadImage
from PIL import Image

from scripts.data import writing
from scripts.data.vocabulary import ClassEntry
from scripts.errors import OutputError

PLANAR_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
LIVER = ClassEntry(1, "liver", (), ("CT",), "abdomen", None, (221, 130, 101))
LEFT_KIDNEY = ClassEntry(4, "left kidney", (), ("CT",), "abdomen", 5, (0, 190, 80))


def oblique_affine():
    """1.2 x 0.8 x 3 mm voxels, turned about z and then about x, away from the origin, with the first axis mirrored."""
    z, x = np.deg2rad(25), np.deg2rad(-40)
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([-1.2, 0.8, 3.0])
    affine[:3, 3] = (101.5, -77.25, 930.0)
    return affine


def some_labels(shape, dtype=np.uint8):
    return np.random.default_rng(3).integers(0, 6, shape).astype(dtype)


def write_labels(labels, folder, *, affine=PLANAR_AFFINE, planar=False):
    return writing.write_label_map(labels, folder=folder, stem="case", affine=affine, planar=planar)


def write_probabilities(probabilities, names, folder, *, affine=PLANAR_AFFINE, planar=False):
    return writing.write_class_maps(
        probabilities, kind="prob", class_names=names, folder=folder, stem="case", affine=affine, planar=planar
    )


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the folder


def test_output_folder_is_created_with_its_parents_and_left_empty(tmp_path):
    folder = writing.prepare_output_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    assert file_names(folder) == []


def test_output_folder_may_exist_already(tmp_path):
    (tmp_path / "earlier.txt").touch()
    assert writing.prepare_output_folder(tmp_path) == tmp_path
    assert file_names(tmp_path) == ["earlier.txt"]


@pytest.mark.parametrize("inside", ["", "below", "below/twice"])
def test_file_in_place_of_the_output_folder_is_refused(tmp_path, inside):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="to be a folder, but a file stands there"):
        writing.prepare_output_folder(tmp_path / "file" / inside)


def test_output_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    """The permission itself cannot be taken away here: root, under which CI runs, may write everywhere."""

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"can be written to.*Permission denied"):
        writing.prepare_output_folder(tmp_path)


# --- label maps of volumes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(5, 7, 3), (4, 6, 1)])
def test_volume_comes_back_through_nibabel_with_its_geometry(tmp_path, shape, dtype):
    labels, affine = some_labels(shape, dtype), oblique_affine()
    path = write_labels(labels, tmp_path, affine=affine)
    volume = nibabel.load(path)
    assert file_names(tmp_path) == ["case_seg.nii.gz"]
    assert volume.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(volume.dataobj), labels)
    for form in (volume.get_sform(), volume.get_qform()):
        np.testing.assert_allclose(form, affine, atol=1e-4)
    assert int(volume.header["sform_code"]) > 0
    assert int(volume.header["qform_code"]) > 0
    np.testing.assert_allclose(volume.header.get_zooms(), (1.2, 0.8, 3.0), rtol=1e-6)
    assert volume.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("reader", ["ITKReader", "NibabelReader"])
def test_volume_comes_back_through_both_readers_with_its_geometry(tmp_path, reader):
    labels, affine = some_labels((5, 7, 3)), oblique_affine()
    loaded = LoadImage(reader=reader, dtype=np.uint8)(write_labels(labels, tmp_path, affine=affine))
    np.testing.assert_array_equal(loaded.numpy(), labels)
    np.testing.assert_allclose(loaded.affine.numpy(), affine, atol=1e-4)


def test_sheared_affine_is_kept_by_the_sform_alone(tmp_path):
    affine = np.array([[1.0, 0, 0, 5], [0, 1, 0.4, 6], [0, 0, 2, 7], [0, 0, 0, 1]])  # a gantry tilted by 11 degrees
    volume = nibabel.load(write_labels(some_labels((3, 4, 2)), tmp_path, affine=affine))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert int(volume.header["qform_code"]) == 0


def test_stack_of_planar_images_becomes_a_volume(tmp_path):
    labels = some_labels((5, 7, 3))
    path = write_labels(labels, tmp_path, planar=True)
    assert path.name == "case_seg.nii.gz"
    np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), labels)


# --- label maps of images


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_planar_image_becomes_a_picture_in_rows_and_columns(tmp_path, dtype):
    labels = np.zeros((7, 5, 1), dtype)
    labels[3, 1, 0] = 6
    path = write_labels(labels, tmp_path, planar=True)
    assert file_names(tmp_path) == ["case_seg.png"]
    with Image.open(path) as picture:
        assert picture.mode == "L"
        assert picture.size == (7, 5)
        assert picture.getpixel((3, 1)) == 6
        assert np.count_nonzero(picture) == 1


def test_picture_comes_back_through_the_reader_of_the_input(tmp_path):
    labels = some_labels((7, 5, 1))
    loaded = LoadImage(reader="ITKReader", dtype=np.uint8)(write_labels(labels, tmp_path, planar=True))
    np.testing.assert_array_equal(loaded.numpy(), labels[:, :, 0])


def test_id_beyond_a_byte_is_refused_in_a_picture_and_kept_in_a_volume(tmp_path):
    labels = np.full((3, 4, 1), 256, np.uint16)
    with pytest.raises(OutputError, match=r"up to 255 .* got 256"):
        write_labels(labels, tmp_path, planar=True)
    assert file_names(tmp_path) == []
    assert np.asarray(nibabel.load(write_labels(labels, tmp_path)).dataobj).max() == 256


@pytest.mark.parametrize(
    "labels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 1), np.int64), np.zeros((4, 4, 1), bool)]
)
def test_labels_of_another_kind_are_a_defect(tmp_path, labels):
    with pytest.raises(ValueError, match="expected labels"):
        write_labels(labels, tmp_path)


# --- failures


def fill_the_disk(monkeypatch, target, name, *, after=0):
    """Makes the writer's `after` + 1st call break off with half a file on the disk."""
    genuine, calls = getattr(target, name), []

    def break_off(volume, path, *arguments, **options):
        calls.append(path)
        if len(calls) <= after:
            return genuine(volume, path, *arguments, **options)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, name, break_off)
    return calls


@pytest.mark.parametrize("planar", [True, False])
def test_failure_midway_leaves_no_label_map(tmp_path, monkeypatch, planar):
    calls = fill_the_disk(monkeypatch, *((Image.Image, "save") if planar else (nibabel, "save")))
    with pytest.raises(OutputError, match=r"case_seg.*No space left"):
        write_labels(some_labels((5, 4, 1)), tmp_path, planar=planar)
    assert len(calls) == 1
    assert file_names(tmp_path) == []


@pytest.mark.parametrize("planar", [True, False])
def test_failure_at_the_second_class_leaves_no_probability_map(tmp_path, monkeypatch, planar):
    calls = fill_the_disk(monkeypatch, *((Image.Image, "save") if planar else (nibabel, "save")), after=1)
    with pytest.raises(OutputError, match=r"prob_spleen.*No space left"):
        write_probabilities(np.zeros((3, 5, 4, 1)), ["liver", "spleen", "pancreas"], tmp_path, planar=planar)
    assert len(calls) == 2
    assert file_names(tmp_path) == []


def test_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="choose a folder that exists"):
        write_labels(some_labels((5, 4, 2)), tmp_path / "absent")


# --- probability maps


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("count", [1, 5])
def test_probabilities_of_a_volume_are_one_float_file_a_class(tmp_path, count, dtype):
    probabilities = np.random.default_rng(4).random((count, 5, 7, 3)).astype(dtype)
    names = ["liver", "left kidney", "spleen", "lung/upper lobe", "pancreas"][:count]
    paths = write_probabilities(probabilities, names, tmp_path, affine=oblique_affine())
    expected = ["liver", "left_kidney", "spleen", "lung_upper_lobe", "pancreas"][:count]
    assert [path.name for path in paths] == [f"case_prob_{name}.nii.gz" for name in expected]
    assert file_names(tmp_path) == sorted(path.name for path in paths)
    for path, probability in zip(paths, probabilities, strict=True):
        volume = nibabel.load(path)
        assert volume.get_data_dtype() == np.float32
        np.testing.assert_array_equal(np.asarray(volume.dataobj), probability.astype(np.float32))
        np.testing.assert_allclose(volume.affine, oblique_affine(), atol=1e-4)


def test_probabilities_of_a_stack_are_volumes(tmp_path):
    (path,) = write_probabilities(np.zeros((1, 4, 3, 2)), ["myocardium"], tmp_path, planar=True)
    assert path.name == "case_prob_myocardium.nii.gz"


def test_probabilities_of_an_image_are_bytes_in_rows_and_columns(tmp_path):
    probabilities = np.zeros((1, 7, 5, 1), np.float32)
    probabilities[0, :6, 1, 0] = [1.0, 0.5, np.nextafter(np.float32(0.5), np.float32(0)), 0.2, 1.01, -0.01]
    (path,) = write_probabilities(probabilities, ["skin lesion"], tmp_path, planar=True)
    assert file_names(tmp_path) == ["case_prob_skin_lesion.png"]
    with Image.open(path) as picture:
        assert picture.mode == "L"
        assert picture.size == (7, 5)
        assert [picture.getpixel((x, 1)) for x in range(7)] == [255, 128, 127, 51, 255, 0, 0]
        assert np.count_nonzero(picture) == 5


@pytest.mark.parametrize(
    ("shape", "reason"), [((2, 4, 4, 1), "longer"), ((0, 4, 4, 1), "shorter"), ((1, 4, 4), "expected a map")]
)
def test_probabilities_that_do_not_fit_the_names_are_a_defect(tmp_path, shape, reason):
    with pytest.raises(ValueError, match=reason):
        write_probabilities(np.zeros(shape), ["liver"], tmp_path)
    assert file_names(tmp_path) == []


def test_uncertainties_have_names_of_their_own_and_are_taken_one_by_one(tmp_path):
    maps = (np.full((4, 3, 2), 0.25, np.float32) for _ in range(2))
    place = {"folder": tmp_path, "stem": "case", "affine": PLANAR_AFFINE, "planar": False}
    writing.write_class_maps(maps, kind="uncertainty", class_names=["liver", "left kidney"], **place)
    assert file_names(tmp_path) == ["case_uncertainty_left_kidney.nii.gz", "case_uncertainty_liver.nii.gz"]
    assert np.unique(nibabel.load(tmp_path / "case_uncertainty_liver.nii.gz").dataobj) == [0.25]


# --- names and colours


def test_labels_json_names_every_value(tmp_path):
    path = writing.write_labels_json([LEFT_KIDNEY, LIVER], tmp_path)
    assert file_names(tmp_path) == ["labels.json"]
    assert list(json.loads(path.read_text(encoding="utf-8")).items()) == [
        ("0", "background"),
        ("1", "liver"),
        ("4", "left kidney"),
    ]


def test_colour_table_parses_as_the_viewer_does(tmp_path):
    """3D Slicer skips lines that start with #, and splits the others at white space into id, name and four numbers."""
    path = writing.write_colour_table([LEFT_KIDNEY, LIVER], tmp_path)
    assert file_names(tmp_path) == ["labels.ctbl"]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Color table file")
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert rows == [
        ["0", "background", "0", "0", "0", "0"],
        ["1", "liver", "221", "130", "101", "255"],
        ["4", "left_kidney", "0", "190", "80", "255"],
    ]


@pytest.mark.parametrize("write", [writing.write_labels_json, writing.write_colour_table])
def test_no_classes_still_name_the_background(tmp_path, write):
    assert "background" in write([], tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("write", [writing.write_labels_json, writing.write_colour_table])
def test_names_in_an_unwritable_place_are_an_output_error(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="labels"):
        write([LIVER], tmp_path / "file")
