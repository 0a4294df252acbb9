import csv
import gzip
import itertools
import json
import logging
import struct

import itk
import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd
from PIL import Image

from scripts.data.datalist import read_datalist
from scripts.data.guard import Finding, check_image, inspect_image
from scripts.data.reading import LoadImageCased, LoadLabeld, find_inputs, read_image, read_mask
from scripts.data.vocabulary import Vocabulary
from scripts.data.writing import write_label_map
from scripts.errors import InputError

PATIENT = "DOE^JANE"
PATIENT_ID = "ID-4711-SECRET"
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture
def random():
    return np.random.default_rng(7)


def _save_nifti(path, voxels, affine=None):
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-0.8, -0.8, 5.0, 1.0]) if affine is None else affine), path)
    return str(path)


def _save_picture(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def _save_itk(path, voxels, *, is_vector=False):
    """Save an array in ITK's order (..., Z, Y, X) with spacing 0.7 x 0.8 x 2.5 and origin 10, 20, 30 (LPS)."""
    image = itk.image_from_array(voxels, is_vector=is_vector)
    image.SetSpacing([0.7, 0.8, 2.5, 1.0][: image.GetImageDimension()])
    image.SetOrigin([10.0, 20.0, 30.0, 0.0][: image.GetImageDimension()])
    itk.imwrite(image, str(path))
    return str(path)


def _save_dicom_slice(path, pixels, *, z, series, modality, origin=None, direction=None):
    """Save one slice; ``origin`` (LPS, mm) and ``direction`` (columns: along a row, along a column, normal)."""
    image = itk.image_from_array(pixels[None].astype(np.int16))
    image.SetSpacing([0.7, 0.8, 2.5])
    image.SetOrigin([10.0, 20.0, z] if origin is None else [float(value) for value in origin])
    image.SetDirection(itk.matrix_from_array(np.eye(3) if direction is None else np.asarray(direction, float)))
    tags = {
        "0008|0018": f"1.2.3.{series}.{round(z * 10) + 100000}",
        "0008|0021": "20200101",
        "0008|0060": modality,
        "0010|0010": PATIENT,
        "0010|0020": PATIENT_ID,
        "0020|000d": "1.2.3.9",
        "0020|000e": f"1.2.3.{series}",
    }
    dictionary = image.GetMetaDataDictionary()
    for tag, value in tags.items():
        dictionary[tag] = value
    image.SetMetaDataDictionary(dictionary)
    codec = itk.GDCMImageIO.New()
    codec.KeepOriginalUIDOn()
    itk.ImageFileWriter[type(image)].New(Input=image, FileName=str(path), ImageIO=codec).Update()


def _save_dicom_series(folder, voxels, *, series=1, modality="CT", prefix="a", suffix=".dcm", step=2.5):
    """Save (Z, Y, X) so that the alphabetical order of the files is not the order of the slices."""
    folder.mkdir(exist_ok=True)
    indices = [*range(0, len(voxels), 2), *range(1, len(voxels), 2)]
    for number, index in enumerate(indices):
        path = folder / f"{prefix}{number}{suffix}"
        _save_dicom_slice(path, voxels[index], z=30 + step * index, series=series, modality=modality)
    return folder


def _strings(value):
    """Every text inside a nested structure."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    else:
        yield repr(value)


# ---------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "ppm", "pgm", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_file_axes(tmp_path, random, suffix, channels):
    pixels = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    pixels = pixels[..., 0] if channels == 1 else pixels
    image = read_image(_save_picture(tmp_path / f"a.{suffix}", pixels))
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    assert image.shape == (channels, 7, 5, 1)
    expected = pixels.reshape(5, 7, channels).transpose(2, 1, 0)
    assert np.array_equal(image[..., 0].numpy(), expected)
    assert np.array_equal(image.affine.numpy(), PICTURE_AFFINE)
    assert image.meta["planar"] is image.meta["picture"] is True
    assert image.meta["oriented"] is False
    assert image.meta["spacing"] == (1.0, 1.0, 1.0)
    assert image.meta["filename_or_obj"] == f"a.{suffix}"
    assert "modality" not in image.meta


def test_picture_agrees_with_itk(tmp_path, random):
    path = _save_picture(tmp_path / "a.png", random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    reference = itk.imread(path)
    direction = np.diag([-1, -1]) @ itk.array_from_matrix(reference.GetDirection()) @ np.diag(reference.GetSpacing())
    image = read_image(path)
    assert np.array_equal(image.affine.numpy()[:2, :2], direction)
    assert np.array_equal(image[..., 0].numpy(), itk.array_from_image(reference).T)


def test_resolution_of_a_picture_changes_no_geometry(tmp_path, random):
    path = _save_picture(tmp_path / "a.png", random.integers(0, 256, (5, 7), dtype=np.uint8), dpi=(300, 300))
    assert np.array_equal(read_image(path).affine.numpy(), PICTURE_AFFINE)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("grey", [True, False])
def test_alpha_is_dropped_without_blending(tmp_path, random, suffix, grey):
    pixels = random.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    stored = pixels[..., [0, 3]] if grey else pixels
    image = read_image(_save_picture(tmp_path / f"a.{suffix}", stored))
    expected = pixels[..., :1] if grey else pixels[..., :3]
    assert np.array_equal(image[..., 0].numpy(), expected.transpose(2, 1, 0))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_palette_gives_colours(tmp_path, suffix):
    picture = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8), mode="P")
    palette = [10, 20, 30, 250, 0, 0, 0, 128, 255]
    picture.putpalette(palette)
    picture.save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (3, 3, 2, 1)
    assert image[:, 0, 0, 0].tolist() == palette[:3]
    assert image[:, 0, 1, 0].tolist() == palette[6:]


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_one_bit_becomes_0_and_255(tmp_path, suffix):
    image = read_image(_save_picture(tmp_path / f"a.{suffix}", np.array([[True, False, False]])))
    assert image.shape == (1, 3, 1, 1)
    assert image.flatten().tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_keeps_its_values(tmp_path, suffix):
    pixels = np.array([[0, 256, 65535]], dtype=np.uint16)
    assert read_image(_save_picture(tmp_path / f"a.{suffix}", pixels)).flatten().tolist() == [0, 256, 65535]


def test_float_tiff(tmp_path):
    pixels = np.array([[0.25, -3.5]], dtype=np.float32)
    assert read_image(_save_picture(tmp_path / "a.tif", pixels)).flatten().tolist() == [0.25, -3.5]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (3, 8, 8, 1)
    assert image[0].min() > 200
    assert image[1:].max() < 50


@pytest.mark.parametrize("suffix", ["tif", "gif", "png"])
def test_several_pages_or_frames_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    pages = [Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (1, 200, 30)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=rf"a\.{suffix}: expected one page, got 3"):
        read_image(path)
    with pytest.raises(InputError, match=rf"a\.{suffix}: expected one page, got 3"):
        read_mask(path)


def test_grey_gif_keeps_its_values(tmp_path, random):
    pixels = random.integers(0, 256, (5, 7), dtype=np.uint8)
    image = read_image(_save_picture(tmp_path / "a.gif", pixels))
    assert np.array_equal(image[:, :, :, 0].numpy(), np.broadcast_to(pixels.T, image.shape[:3]))


def test_pictures_of_a_camera_hold_previews_of_the_same_picture(tmp_path):
    first, second = (Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (200, 10))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as picture:
        assert (picture.format, picture.n_frames) == ("MPO", 2)
    assert read_image(tmp_path / "a.jpg").unique().tolist() == [200]


@pytest.mark.parametrize(
    ("pattern", "channels"),
    [("kvasir_seg/images/*.jpg", 3), ("covid_chest_xray/images/*.png", 1), ("acdc_cine_mr/images/*.png", 1)],
)
def test_real_pictures(shared, pattern, channels):
    path = sorted((shared / "data").glob(pattern))[0]
    image = read_image(path)
    with Image.open(path) as picture:
        expected = np.asarray(picture).reshape(picture.height, picture.width, -1)
    assert image.shape == (channels, expected.shape[1], expected.shape[0], 1)
    assert np.array_equal(image[..., 0].numpy(), expected.transpose(2, 1, 0)[:channels])


# ----------------------------------------------------------------------------------------------------------- volumes


def test_real_nifti_keeps_voxels_and_affine(shared):
    path = sorted((shared / "data" / "chaos_t2_mr" / "images").glob("*.nii.gz"))[0]
    reference = nibabel.load(path)
    image = read_image(path)
    assert image.shape == (1, *reference.shape)
    assert np.array_equal(image[0].numpy(), reference.get_fdata(dtype=np.float32))
    assert np.array_equal(image.affine.numpy(), reference.affine)
    assert image.meta["planar"] is image.meta["picture"] is False
    assert image.meta["spacing"] == pytest.approx(reference.header.get_zooms(), abs=1e-5)
    assert nibabel.aff2axcodes(image.affine.numpy()) == ("L", "A", "S")


@pytest.mark.parametrize(
    "axes", ["".join(p) for q in itertools.permutations(["LR", "AP", "SI"]) for p in itertools.product(*q)][::5]
)
def test_orientation_to_rows_columns_slices_and_back(tmp_path, axes):
    """PLS: rows grow towards the back, columns towards the left, slices towards the head."""
    affine = nibabel.orientations.inv_ornt_aff(
        nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
        ),
        (4, 5, 6),
    )
    shape = nibabel.apply_orientation(np.zeros((4, 5, 6)), nibabel.io_orientation(np.linalg.inv(affine))).shape
    voxels = np.arange(120, dtype=np.float32).reshape(shape)
    path = _save_nifti(tmp_path / "a.nii", voxels, affine)
    assert "".join(nibabel.aff2axcodes(affine)) == axes
    load = Compose([LoadImageCased(), Orientationd("image", axcodes="PLS", labels=None)])
    case = load({"image": path})
    assert nibabel.aff2axcodes(case["image"].affine.numpy()) == ("P", "L", "S")
    corner = case["image"].affine.numpy() @ [0, 0, 0, 1]
    behind = case["image"].affine.numpy() @ [1, 0, 0, 1]
    assert behind[1] < corner[1]  # RAS: the second coordinate falls towards the back
    back = Invertd("image", load, orig_keys="image")(case)["image"]
    assert np.array_equal(back[0].numpy(), voxels)
    assert np.allclose(back.affine.numpy(), affine)


def test_orientation_of_a_picture_is_row_and_column(tmp_path, random):
    pixels = random.integers(0, 256, (5, 7), dtype=np.uint8)
    path = _save_picture(tmp_path / "a.png", pixels)
    load = Compose([LoadImageCased(), Orientationd("image", axcodes="PLS", labels=None)])
    case = load({"image": path})
    assert np.array_equal(case["image"][0, :, :, 0].numpy(), pixels)
    back = Invertd("image", load, orig_keys="image")(case)["image"]
    assert np.array_equal(back[0, :, :, 0].numpy(), pixels.T)


def test_nifti_of_two_axes_and_of_trailing_ones(tmp_path, random):
    pixels = random.normal(size=(6, 4)).astype(np.float32)
    flat = read_image(_save_nifti(tmp_path / "flat.nii.gz", pixels))
    assert flat.shape == (1, 6, 4, 1)
    assert flat.meta["planar"] is True
    assert flat.meta["picture"] is False
    assert flat.meta["spacing"] == (1.0, 1.0, 1.0)
    assert flat.affine.shape == (4, 4)
    volume = read_image(_save_nifti(tmp_path / "volume.nii.gz", pixels.reshape(3, 2, 4, 1, 1)))
    assert volume.shape == (1, 3, 2, 4)
    assert np.array_equal(volume[0].numpy(), pixels.reshape(3, 2, 4))


def test_nifti_scale_and_intercept_are_applied(tmp_path):
    image = nibabel.Nifti1Image(np.array([[[0, 100]]], dtype=np.int16), np.eye(4))
    image.header.set_slope_inter(2, -1000)
    nibabel.save(image, tmp_path / "a.nii")
    assert (
        read_image(tmp_path / "a.nii").flatten().tolist()
        == nibabel.load(tmp_path / "a.nii").get_fdata().flatten().tolist()
    )


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<i4", "<u4", "<f4", ">f8", "<i8", "|u1", "|i1"])
@pytest.mark.parametrize("scaled", [True, False])
def test_nifti_of_every_type_reads_as_nibabel_reads_it(tmp_path, random, dtype, scaled):
    voxels = random.integers(0, 120, (6, 5, 4, 1)).astype(dtype)
    image = nibabel.Nifti1Image(voxels, np.eye(4), nibabel.Nifti1Header(endianness=dtype[0].replace("|", "<")))
    image.set_data_dtype(dtype)
    if scaled:
        image.header.set_slope_inter(0.3, -1024)
    nibabel.save(image, tmp_path / "a.nii.gz")
    read = read_image(tmp_path / "a.nii.gz")
    assert read.is_contiguous()
    assert read.dtype == torch.float32
    assert np.array_equal(read[0].numpy(), nibabel.load(tmp_path / "a.nii.gz").get_fdata()[..., 0].astype(np.float32))


@pytest.mark.parametrize(("sform", "qform"), [(0, 0), (1, 0), (0, 1), (2, 4)])
def test_nifti_tells_whether_it_is_oriented(tmp_path, random, sform, qform):
    image = nibabel.Nifti1Image(random.normal(size=(4, 5, 6)), None)
    image.set_sform(np.diag([-0.8, -0.8, 5.0, 1.0]), sform)
    image.set_qform(np.diag([-0.8, -0.8, 5.0, 1.0]), qform)
    nibabel.save(image, tmp_path / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Pair(image.dataobj, None, image.header), tmp_path / "b.hdr")
    for name in ("a.nii.gz", "b.hdr"):
        read = read_image(tmp_path / name)
        assert read.meta["oriented"] is (sform > 0 or qform > 0), name
        checks = [finding.check for finding in inspect_image(read, modality="MR")]
        assert checks == ["orientation"] * (sform == qform == 0)


@pytest.mark.parametrize("suffix", ["nii", "mha", "png"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (5, 1, 1)])  # a line has the same order on disk and in memory
def test_image_does_not_change_with_its_file(tmp_path, random, suffix, shape):
    path, voxels = tmp_path / f"a.{suffix}", random.integers(0, 255, shape).astype(np.uint8)
    if suffix == "png":
        _save_picture(path, voxels[0])
    else:
        (_save_nifti if suffix == "nii" else _save_itk)(path, voxels.astype(np.float32))
    image = read_image(path)
    before = image.as_tensor().clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(image.as_tensor(), before)
    image += 1  # and can be written to


def test_nifti_channels_on_the_fifth_axis(tmp_path, random):
    voxels = random.integers(0, 256, (4, 5, 6, 1, 3)).astype(np.uint8)
    image = read_image(_save_nifti(tmp_path / "a.nii.gz", voxels))
    assert image.shape == (3, 4, 5, 6)
    assert np.array_equal(image.numpy(), voxels[:, :, :, 0].transpose(3, 0, 1, 2))


@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd", "nhdr"])
def test_itk_volumes_become_ras(tmp_path, random, suffix):
    voxels = random.integers(-1000, 1000, (4, 6, 9)).astype(np.int16)
    image = read_image(_save_itk(tmp_path / f"a.{suffix}", voxels))
    assert image.shape == (1, 9, 6, 4)
    assert np.array_equal(image[0].numpy(), voxels.T)
    expected = np.diag([-0.7, -0.8, 2.5, 1.0])
    expected[:3, 3] = [-10, -20, 30]  # ITK stores LPS
    assert np.allclose(image.affine.numpy(), expected)
    assert image.meta["spacing"] == pytest.approx((0.7, 0.8, 2.5))
    assert image.meta["planar"] is False


def test_colour_volume_and_its_alpha(tmp_path, random):
    voxels = random.integers(0, 256, (4, 6, 9, 4)).astype(np.uint8)
    expected = voxels[..., :3].transpose(3, 2, 1, 0)
    colour = read_image(_save_itk(tmp_path / "a.nrrd", voxels[..., :3].copy(), is_vector=True))
    assert np.array_equal(colour.numpy(), expected)
    itk.imwrite(itk.image_view_from_array(voxels, ttype=itk.Image[itk.RGBAPixel[itk.UC], 3]), str(tmp_path / "b.nrrd"))
    assert np.array_equal(read_image(tmp_path / "b.nrrd").numpy(), expected)


def test_modality_of_a_metaimage(tmp_path):
    np.zeros((3, 4, 5), np.int16).tofile(tmp_path / "a.raw")
    (tmp_path / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nModality = MET_MOD_MR\nDimSize = 5 4 3\nElementType = MET_SHORT\n"
        "ElementDataFile = a.raw\n"
    )
    assert read_image(tmp_path / "a.mhd").meta["modality"] == "MR"


# ------------------------------------------------------------------------------------------------------------- DICOM


@pytest.mark.parametrize("suffix", [".dcm", "", ".IMA"])
def test_dicom_series_is_one_volume(tmp_path, random, suffix):
    voxels = random.integers(-1000, 1000, (4, 6, 9))
    folder = _save_dicom_series(tmp_path / "scan", voxels, suffix=suffix)
    (found,) = find_inputs(folder)
    assert found.name == "scan"
    image = read_image(found.image)
    assert np.array_equal(image[0].numpy(), voxels.T)
    expected = np.diag([-0.7, -0.8, 2.5, 1.0])
    expected[:3, 3] = [-10, -20, 30]
    assert np.allclose(image.affine.numpy(), expected)
    assert image.meta["modality"] == "CT"
    assert torch.equal(read_image(folder).as_tensor(), image.as_tensor())
    check_image(image, case="scan", modality="CT")


@pytest.mark.parametrize(
    ("stored", "modality"),
    [
        ("MR", "MR"),
        ("CR", "xray"),
        ("DX", "xray"),
        ("ES", "endoscopy"),
        ("US", "ultrasound"),
        ("OP", "fundus"),
        ("SM", "microscopy"),
        ("GM", "microscopy"),
        ("MG", None),
    ],
)
def test_modality_comes_from_the_tag_only_where_nothing_else_is_said(tmp_path, random, stored, modality):
    folder = _save_dicom_series(tmp_path / "scan", random.integers(0, 9, (2, 4, 5)), modality=stored)
    path = str(folder / "a0.dcm")
    assert LoadImageCased()({"image": path}).get("modality") == modality
    assert LoadImageCased()({"image": path, "modality": None})["modality"] == modality
    case = LoadImageCased()({"image": path, "modality": "CT"})
    assert case["modality"] == "CT"
    contradicts = [finding.check for finding in inspect_image(case["image"], modality="CT")] == ["modality"]
    assert contradicts is (modality is not None)


def test_dicom_codes_are_those_of_the_vocabulary(tmp_path, bundle_root):
    vocabulary = Vocabulary.read(bundle_root / "configs" / "classes.yaml")
    codes = {code: modality.name for modality in vocabulary.modalities for code in modality.dicom_codes}
    for code in [*codes, "MG", "XC", "OT"]:
        folder = _save_dicom_series(tmp_path / code, np.ones((1, 3, 4)), modality=code)
        assert read_image(folder).meta.get("modality") == codes.get(code)


def test_two_series_in_one_folder(tmp_path, random):
    first, second = random.integers(0, 100, (4, 6, 9)), random.integers(0, 100, (2, 6, 9))
    folder = _save_dicom_series(tmp_path / "study", first, series=2, prefix="a")
    _save_dicom_series(folder, second, series=1, prefix="b", modality="MR", step=4)
    found = find_inputs(folder)
    assert [item.name for item in found] == ["study_series1", "study_series2"]
    assert np.array_equal(read_image(found[0].image)[0].numpy(), first.T)
    assert np.array_equal(read_image(found[1].image)[0].numpy(), second.T)
    assert [read_image(item.image).meta["modality"] for item in found] == ["CT", "MR"]
    with pytest.raises(InputError, match="study: expected a folder with one DICOM series, got 2"):
        read_image(folder)


def test_slices_of_another_size_in_a_series_are_a_volume_of_their_own(tmp_path, random):
    folder = _save_dicom_series(tmp_path / "scan", random.integers(0, 100, (3, 6, 9)), prefix="a")
    for index in range(2):
        _save_dicom_slice(folder / f"b{index}.dcm", np.ones((4, 5)), z=-50.0 - index, series=1, modality="CT")
    assert [read_image(item.image).shape for item in find_inputs(folder)] == [(1, 9, 6, 3), (1, 5, 4, 2)]


def test_no_patient_tag_gets_in(tmp_path, random, caplog, capfd):
    folder = _save_dicom_series(tmp_path / "scan", random.integers(0, 100, (3, 6, 9)))
    stored = b"".join(file.read_bytes() for file in folder.iterdir())
    assert PATIENT.encode() in stored
    assert PATIENT_ID.encode() in stored
    caplog.set_level(logging.DEBUG)
    found = find_inputs(folder)
    cases = [LoadImageCased()({"image": image}) for image in (found[0].image, str(folder), str(folder / "a0.dcm"))]
    (folder / "a0.dcm").write_bytes((folder / "a0.dcm").read_bytes()[:-60])
    with pytest.raises(InputError) as caught:
        read_image(folder / "a0.dcm")
    output = capfd.readouterr()
    seen = [
        *_strings([dict(case["image"].meta) for case in cases]),
        *_strings([case["image"].applied_operations for case in cases]),
    ]
    seen += [repr(found), repr(found.skipped), caplog.text, output.out, output.err, str(caught.value)]
    for secret in ("DOE", "JANE", "4711", "1.2.3.1"):
        assert not [text for text in seen if secret in text]
    allowed = {"affine", "original_affine", "spatial_shape", "space", "planar", "picture", "oriented", "spacing"}
    assert all(set(case["image"].meta) <= allowed | {"modality", "filename_or_obj"} for case in cases)


def test_nifti_header_texts_stay_out(tmp_path, random):
    image = nibabel.Nifti1Image(random.normal(size=(3, 4, 5)), np.eye(4))
    image.header["descrip"] = PATIENT
    image.header["db_name"] = PATIENT
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert not [text for text in _strings(dict(read_image(tmp_path / "a.nii.gz").meta)) if "DOE" in text]


# Along a row, along a column, and from slice to slice, in LPS. ITK saves rows and columns; where the slices lie is said
# by their positions alone, so the third need not be their vector product.
DIRECTIONS = {
    "supine": ([1, 0, 0], [0, 1, 0], [0, 0, 1]),
    "from head to foot": ([1, 0, 0], [0, 1, 0], [0, 0, -1]),
    "prone": ([-1, 0, 0], [0, -1, 0], [0, 0, 1]),
    "coronal": ([1, 0, 0], [0, 0, -1], [0, 1, 0]),
    "sagittal": ([0, 1, 0], [0, 0, -1], [1, 0, 0]),
    "oblique": ([0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]),
}


def _save_placed_series(folder, voxels, along_row, along_column, along_slices):
    """Save (Z, Y, X) from (-120.5, -80.25, 37.75) mm on, pixels 0.7 wide and 0.8 high, a slice every 3.25 mm."""
    folder.mkdir()
    normal = np.cross(along_row, along_column)
    paths, positions = [], []
    for index, pixels in enumerate(voxels):
        positions.append(np.array([-120.5, -80.25, 37.75]) + 3.25 * index * np.array(along_slices))
        paths.append(str(folder / f"{(7 * index) % 10}.dcm"))  # names in another order than slices
        _save_dicom_slice(
            paths[-1],
            pixels,
            z=index,
            series=1,
            modality="CT",
            origin=positions[-1],
            direction=np.stack([along_row, along_column, normal], axis=1),
        )
    return paths, positions


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("listed", ["folder", "in order", "in reverse"])
def test_series_is_placed_exactly_and_so_is_its_label_map(tmp_path, random, directions, listed):
    voxels = random.integers(-1000, 1000, (5, 6, 9))
    paths, positions = _save_placed_series(tmp_path / "scan", voxels, *directions)
    image = read_image({"folder": tmp_path / "scan", "in order": paths, "in reverse": paths[::-1]}[listed])
    assert image.shape == (1, 9, 6, 5)
    # By hand, for slices in their own order: columns are steps of a pixel, a row and a slice; LPS becomes RAS.
    expected = np.eye(4)
    expected[:3, :3] = np.stack(
        [0.7 * np.array(directions[0]), 0.8 * np.array(directions[1]), 3.25 * np.array(directions[2])], 1
    )
    expected[:3, 3] = [-120.5, -80.25, 37.75]
    expected = np.diag([-1, -1, 1, 1]) @ expected
    backwards = listed == "in reverse" or (listed == "folder" and np.dot(np.cross(*directions[:2]), directions[2]) < 0)
    if backwards:  # the fifth slice is the first
        expected[:3, 3] += 4 * expected[:3, 2]
        expected[:3, 2] *= -1
    assert np.allclose(image.affine.numpy(), expected, atol=1e-6)
    assert np.array_equal(image[0].numpy(), voxels.T[:, :, ::-1] if backwards else voxels.T)
    assert inspect_image(image, modality="CT") == []
    # Any voxel of any file, without the affine by hand: position of the slice + steps along its row and its column.
    for index in (0, 2, 4):
        place = np.array([3, 2, 4 - index if backwards else index, 1])
        position = positions[index] + 3 * 0.7 * np.array(directions[0]) + 2 * 0.8 * np.array(directions[1])
        assert np.allclose((image.affine.numpy() @ place)[:3], position * [-1, -1, 1], atol=1e-6)
        assert image[0][tuple(place[:3])] == voxels[index, 2, 3]
    labels = (image[0].numpy() > 0).astype(np.uint8)
    path = write_label_map(labels, folder=tmp_path, stem="scan", affine=image.affine.numpy(), planar=False)
    written = nibabel.load(path)
    assert np.array_equal(np.asarray(written.dataobj), labels)
    assert np.allclose(written.affine, expected, atol=1e-4)
    assert written.header.get_zooms() == pytest.approx((0.7, 0.8, 3.25), abs=1e-5)
    case = {"image": image, "label": str(path), "label_map": {1: 1}}
    assert np.array_equal(LoadLabeld([1])(case)["label"][0].numpy(), labels)


def test_tilted_gantry_of_a_series_is_seen(tmp_path, random):
    """Slices that are shifted against each other: their normal is not where the next slice lies."""
    tilt = np.deg2rad(15)
    along_slices = [0, np.sin(tilt), np.cos(tilt)]
    _save_placed_series(tmp_path / "scan", random.integers(-1000, 1000, (5, 6, 9)), [1, 0, 0], [0, 1, 0], along_slices)
    image = read_image(tmp_path / "scan")
    assert np.allclose(image.affine.numpy()[:3, 2], [0, -3.25 * np.sin(tilt), 3.25 * np.cos(tilt)], atol=1e-5)
    with pytest.raises(InputError, match=r"perpendicular axes.*cosine of 0.259"):
        check_image(image, case="scan", modality="CT")


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ([0, 1, 3, 4], r"distances that are off by up to [1-9]"),
        ([0, 1, 1, 2], r"distances that are off by up to [1-9]"),
        ([2, 2, 2], "all in one place"),
    ],
)
def test_missing_and_repeated_slices_of_a_series_are_refused(tmp_path, random, places, text):
    for number, place in enumerate(places):
        _save_dicom_slice(
            tmp_path / f"{number}.dcm",
            random.integers(0, 9, (4, 5)),
            z=number,
            origin=[1, 2, 5 * place],
            series=1,
            modality="CT",
        )
    with pytest.raises(
        InputError, match=rf"0\.dcm and the files with it: expected slices at even distances, got {text}"
    ):
        read_image([tmp_path / f"{number}.dcm" for number in range(len(places))])


def test_rounded_positions_of_a_series_pass(tmp_path, random):
    for number in range(6):
        place = [1, 2, round(1.25 * number, 1)]
        _save_dicom_slice(
            tmp_path / f"{number}.dcm", random.integers(0, 9, (4, 5)), z=number, origin=place, series=1, modality="CT"
        )
    assert read_image(tmp_path).meta["spacing"] == pytest.approx((0.7, 0.8, 1.24))


# ------------------------------------------------------------------------------------------------------------ stacks


def test_stack_of_pictures(tmp_path, random):
    pixels = random.integers(0, 256, (3, 5, 7), dtype=np.uint8)
    paths = [_save_picture(tmp_path / f"s{9 - index}.png", slice_) for index, slice_ in enumerate(pixels)]
    image = read_image(paths)
    assert image.shape == (1, 7, 5, 3)
    assert np.array_equal(image[0].numpy(), pixels.T)
    assert image.meta["planar"] is True
    assert image.meta["spacing"] == (1.0, 1.0, 1.0)
    assert image.meta["filename_or_obj"] == "s9.png"
    assert tuple(image.meta["spatial_shape"]) == (7, 5, 3)


def test_stack_of_flat_nifti_is_planar(tmp_path, random):
    paths = [_save_nifti(tmp_path / f"{i}.nii", random.normal(size=(6, 4, 1)).astype(np.float32)) for i in range(2)]
    image = read_image(paths)
    assert image.shape == (1, 6, 4, 2)
    assert image.meta["planar"] is True


def test_slices_that_do_not_fit_are_named(tmp_path):
    first = _save_picture(tmp_path / "a.png", np.zeros((5, 7), np.uint8))
    for other in (np.zeros((7, 5), np.uint8), np.zeros((5, 7, 3), np.uint8)):
        second = _save_picture(tmp_path / "b.png", other)
        with pytest.raises(InputError, match=r"b\.png: expected a 2D image of shape \(1, 7, 5, 1\).*a\.png, got \("):
            read_image([first, second])
    volume = _save_nifti(tmp_path / "v.nii", np.zeros((5, 7, 2), np.float32))
    with pytest.raises(InputError, match=r"v\.nii: expected a 2D image"):
        read_image([volume])
    with pytest.raises(InputError, match="empty list"):
        read_image([])


# --------------------------------------------------------------------------------------------------------- bad files


def _one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert "/" not in text
    return text


def test_missing_and_empty_files(tmp_path):
    for read in (read_image, find_inputs):
        with pytest.raises(InputError, match=r"^gone\.png: no such file") as caught:
            read(tmp_path / "gone.png")
        _one_line(caught)
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match=r"^a\.nii\.gz: .*empty file \(0 bytes\)"):
        read_image(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"^gone\.png"):
        read_image([tmp_path / "gone.png"])


@pytest.mark.parametrize(
    "suffix",
    ["png", "jpg", "tif", "bmp", "gif", "ppm", "pgm", "nii", "nii.gz", "mha", "nrrd", "dcm", "hdr", "xyz"],
)
def test_rubbish_is_refused_by_name(tmp_path, random, suffix):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(random.bytes(600))
    with pytest.raises(InputError, match=rf"^bad\.{suffix}: ") as caught:
        read_image(path)
    _one_line(caught)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "ppm", "nii", "nii.gz", "mha", "nrrd"])
def test_truncated_files_are_refused(tmp_path, random, suffix):
    path = tmp_path / f"cut.{suffix}"
    if suffix in ("png", "jpg", "tif", "bmp", "gif", "ppm"):
        _save_picture(path, random.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    elif suffix.startswith("nii"):
        _save_nifti(path, random.normal(size=(8, 9, 10)))
    else:
        _save_itk(path, random.normal(size=(8, 9, 10)).astype(np.float32))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(InputError, match=rf"^cut\.{suffix}: ") as caught:
        read_image(path)
    _one_line(caught)


def test_wrong_name_for_the_content(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"hello" * 100))
    with pytest.raises(InputError, match=r"a\.nii\.gz"):
        read_image(tmp_path / "a.nii.gz")


def test_four_dimensions_are_refused(tmp_path, random):
    voxels = random.normal(size=(4, 5, 6, 2)).astype(np.float32)
    for path in (
        _save_nifti(tmp_path / "a.nii.gz", voxels),
        _save_itk(tmp_path / "a.mha", np.ascontiguousarray(voxels.T)),
        _save_itk(tmp_path / "a.nrrd", np.ascontiguousarray(voxels.T)),
    ):
        with pytest.raises(InputError, match=r"2D image or a 3D volume, got 4 axes \(4, 5, 6, 2\)") as caught:
            read_image(path)
        _one_line(caught)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_numbers_of_channels_are_refused(tmp_path, random, channels):
    voxels = random.normal(size=(4, 5, 6, 1, channels)).astype(np.float32)
    with pytest.raises(InputError, match=rf"1 channel \(grey\) or 3 \(RGB\), got {channels}"):
        read_image(_save_nifti(tmp_path / "a.nii.gz", voxels))
    if channels != 4:  # four components of a MetaImage are RGBA
        vectors = np.ascontiguousarray(voxels[:, :, :, 0])
        with pytest.raises(InputError, match=rf"got {channels}"):
            read_image(_save_itk(tmp_path / "a.mha", vectors, is_vector=True))


def test_complex_and_colour_nifti_are_refused(tmp_path):
    _save_nifti(tmp_path / "a.nii", np.ones((3, 4, 5), np.complex64))
    with pytest.raises(InputError, match="plain numbers per voxel"):
        read_image(tmp_path / "a.nii")


def test_axis_without_length_is_refused(tmp_path):
    _save_nifti(tmp_path / "a.nii", np.ones((3, 4, 5), np.float32))
    stored = bytearray((tmp_path / "a.nii").read_bytes())
    stored[40:48] = struct.pack("<4h", 3, 3, 0, 5)  # dim[0..3] of the NIfTI-1 header
    (tmp_path / "a.nii").write_bytes(stored)
    with pytest.raises(InputError, match=r"^a\.nii: "):
        read_image(tmp_path / "a.nii")


def test_picture_that_is_not_readable_by_the_user(tmp_path, monkeypatch):
    path = _save_picture(tmp_path / "a.png", np.zeros((3, 3), np.uint8))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"^a\.png: .*\(Permission denied\)$"):
        read_image(path)


# ------------------------------------------------------------------------------------------------------ find_inputs


def test_folder_of_files(tmp_path, random):
    pixels = random.integers(0, 256, (4, 5), dtype=np.uint8)
    _save_picture(tmp_path / "b.PNG", pixels)
    _save_picture(tmp_path / "a.jpeg", pixels)
    _save_nifti(tmp_path / "scan.nii.gz", pixels[..., None].astype(np.float32))
    _save_itk(tmp_path / "v.mhd", random.normal(size=(3, 4, 5)).astype(np.float32))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").touch()
    (tmp_path / "loose.raw").touch()
    (tmp_path / "more").mkdir()
    found = find_inputs(tmp_path)
    assert [item.name for item in found] == ["a", "b", "scan", "v"]
    assert [read_image(item.image).shape[0] for item in found] == [1] * 4
    assert found.skipped == ("loose.raw (unknown kind of file)", "more (folder)", "notes.txt (unknown kind of file)")


def test_one_file(tmp_path, random):
    path = _save_nifti(tmp_path / "pat.01.nii.gz", random.normal(size=(3, 4, 5)))
    assert [(item.name, item.image) for item in find_inputs(path)] == [("pat.01", path)]
    folder = _save_dicom_series(tmp_path / "d", random.integers(0, 9, (1, 4, 5)), suffix="")
    assert [item.name for item in find_inputs(folder / "a0")] == ["a0"]
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes\.txt: unknown kind of file; expected a DICOM series or .*\.nii\.gz"):
        find_inputs(tmp_path / "notes.txt")


def test_relative_paths(tmp_path, random, monkeypatch):
    _save_dicom_series(tmp_path / "scan", random.integers(0, 9, (2, 4, 5)))
    monkeypatch.chdir(tmp_path / "scan")
    (found,) = find_inputs(".")
    assert found.name == "scan"
    monkeypatch.chdir(tmp_path)
    assert read_image(found.image).shape == (1, 5, 4, 2)


def test_names_are_unique(tmp_path):
    for name in ("a.png", "a.jpg", "A.bmp", "a_2.png", "Bb.png", "bB.png"):
        _save_picture(tmp_path / name, np.zeros((3, 3), np.uint8))
    names = [item.name for item in find_inputs(tmp_path)]
    assert len({name.casefold() for name in names}) == len(names) == 6


def test_folder_without_input(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path.name}: no image in this folder; expected"):
        find_inputs(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"1 other entries, e\.g\. notes\.txt"):
        find_inputs(tmp_path)


def test_damaged_dicom_is_not_lost(tmp_path, random):
    folder = _save_dicom_series(tmp_path / "scan", random.integers(0, 9, (4, 4, 5)))
    (folder / "broken.dcm").write_bytes(b"\0" * 300)
    _save_picture(folder / "snapshot.png", np.zeros((3, 3), np.uint8))
    found = find_inputs(folder)
    assert [item.name for item in found] == ["broken", "scan", "snapshot"]
    with pytest.raises(InputError, match=r"broken\.dcm"):
        read_image(found[0].image)
    assert read_image(found[1].image).shape == (1, 5, 4, 4)


# ------------------------------------------------------------------------------------------------------------ labels


def _label_case(tmp_path, image, label, affine=None, label_affine=None, **entries):
    case = {"image": _save_nifti(tmp_path / "image.nii.gz", image, affine)}
    case["label"] = _save_nifti(tmp_path / "label.nii.gz", label, affine if label_affine is None else label_affine)
    return LoadImageCased()(case | {"modality": "MR", "label_map": {1: 4, 2: 1, 3: 4}} | entries)


def test_label_map_becomes_one_channel_per_class(tmp_path, random):
    values = random.integers(0, 4, (4, 5, 6)).astype(np.uint8)
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values)
    label = LoadLabeld(class_ids=[4, 1, 2])(case)["label"]
    assert isinstance(label, MetaTensor)
    assert label.dtype == torch.uint8
    assert label.shape == (3, 4, 5, 6)
    assert np.array_equal(label.numpy(), np.stack([values == 2, values == 0 * values + 9, np.isin(values, [1, 3])]))
    assert torch.equal(label.affine, case["image"].affine)
    assert label.meta["planar"] is False


def test_label_map_keys_may_be_texts_and_values_floats(tmp_path, random):
    values = random.integers(0, 2, (4, 5, 6)).astype(np.float64)
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values, label_map={"1": 3})
    assert np.array_equal(LoadLabeld([3])(case)["label"][0].numpy(), values)


def test_label_values_nobody_explained_are_listed(tmp_path, random):
    values = np.zeros((4, 5, 6), np.int16)
    values[0, 0, :3] = [1, 7, -2]
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values)
    with pytest.raises(
        InputError, match=r"label\.nii\.gz: the label values \[-2, 7\] are not in label_map.*\[1, 2, 3\]"
    ):
        LoadLabeld([1, 4])(case)
    with pytest.raises(InputError, match="expected a label_map"):
        LoadLabeld([1, 4])(case | {"label_map": None})


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_label_values_must_be_whole_numbers(tmp_path, random, value):
    values = np.full((4, 5, 6), value, np.float32)
    with pytest.raises(InputError, match="whole numbers"):
        LoadLabeld([1])(_label_case(tmp_path, random.normal(size=(4, 5, 6)), values))


def test_values_may_be_known_and_ignored(tmp_path, random):
    values = random.integers(0, 4, (4, 5, 6)).astype(np.uint8)
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values, label_map={1: 4, 2: None, "3": None})
    label = LoadLabeld([1, 4])(case)["label"]
    assert np.array_equal(label.numpy(), np.stack([0 * values, values == 1]))
    with pytest.raises(InputError, match=r"the label values \[2\] are not in label_map, which knows \[1, 3\]"):
        LoadLabeld([1, 4])(case | {"label_map": {1: 4, 3: None}})


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">i2", "<i4", "<u4", "<i8", "<f4", ">f8"])
def test_label_maps_of_every_type(tmp_path, random, dtype):
    values = random.integers(0, 4, (4, 5, 6)).astype(dtype)
    image = nibabel.Nifti1Image(values, None, nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<"))
    image.set_data_dtype(dtype)
    image.set_sform(np.eye(4), 1)
    nibabel.save(image, tmp_path / "typed.nii.gz")
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values.astype(np.uint8), affine=np.eye(4))
    label = LoadLabeld([1, 4])(case | {"label": str(tmp_path / "typed.nii.gz")})["label"]
    assert label.dtype == torch.uint8
    assert np.array_equal(label.numpy(), np.stack([values == 2, np.isin(values, [1, 3])]))


def test_values_beyond_a_byte_are_kept(tmp_path, random):
    values = np.zeros((4, 5, 6), np.uint16)
    values[0], values[1], values[2] = 256, 1000, 65535  # 0, 232 and 255 in a byte
    label_map = {256: 1, 1000: 2, 65535: 3}
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values, label_map=label_map)
    assert LoadLabeld([1, 2, 3])(case)["label"].sum((2, 3)).tolist() == (30 * np.eye(3, 4, dtype=int)).tolist()


def test_label_must_lie_on_the_images_grid(tmp_path, random):
    image, values = random.normal(size=(4, 5, 6)), np.ones((4, 5, 6), np.uint8)
    with pytest.raises(InputError, match=r"image's shape \(4, 5, 6\) \(X, Y, Z\), got \(4, 6, 5\)"):
        LoadLabeld([1])(_label_case(tmp_path, image, values.transpose(0, 2, 1)))
    moved = np.diag([-0.8, -0.8, 5.0, 1.0])
    moved[0, 3] = 0.01
    with pytest.raises(InputError, match=r"affine within 0.001 mm, got one that differs by up to 0.01"):
        LoadLabeld([1])(_label_case(tmp_path, image, values, label_affine=moved))
    moved[0, 3] = 0.0009
    assert LoadLabeld([4])(_label_case(tmp_path, image, values, label_affine=moved))["label"].sum() == 120


def test_planar_labels_are_compared_by_shape_only(tmp_path, random):
    image = random.normal(size=(4, 5, 1))
    case = _label_case(tmp_path, image, np.ones((4, 5, 1), np.uint8), label_affine=np.eye(4))
    assert LoadLabeld([4])(case)["label"].sum() == 20


def test_pictures_may_label_a_volume(tmp_path, random):
    paths = [_save_picture(tmp_path / f"m{k}.png", np.full((5, 4), k, np.uint8)) for k in range(3)]
    image = _save_nifti(tmp_path / "image.nii.gz", random.normal(size=(4, 5, 3)))
    case = LoadImageCased()({"image": image, "label": paths, "label_map": {1: 1, 2: 2}})
    assert LoadLabeld([1, 2])(case)["label"].sum((1, 2)).tolist() == [[0, 20, 0], [0, 0, 20]]


def test_label_follows_its_image_through_orientation_and_back(tmp_path, random):
    values = random.integers(0, 3, (4, 5, 6)).astype(np.uint8)
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values, affine=np.diag([-1.0, 1.0, -5.0, 1.0]))
    keys = ["image", "label"]
    orient = Compose([LoadLabeld([1]), Orientationd(keys, axcodes="PLS", labels=None)])
    result = orient(case)
    assert np.array_equal(result["label"][0].numpy(), (values == 2)[:, ::-1, ::-1].transpose(1, 0, 2))
    back = Invertd("label", orient, orig_keys="label")(result)["label"]
    assert np.array_equal(back[0].numpy(), values == 2)


def _picture_case(tmp_path, shape=(3, 4)):
    return LoadImageCased()(
        {"image": _save_picture(tmp_path / "image.png", np.arange(np.prod(shape), dtype=np.uint8).reshape(shape))}
    )


def _mask_case(tmp_path, pixels, name="mask.png", **options):
    """A picture with a mask (rows, columns) of class 6."""
    pixels = np.asarray(pixels)
    if name.endswith((".nii", ".nii.gz")):
        path = _save_nifti(tmp_path / name, pixels.T[:, :, None])
    else:
        path = _save_picture(tmp_path / name, pixels if pixels.dtype == bool else pixels.astype(np.uint8), **options)
    return _picture_case(tmp_path, pixels.shape) | {"label": {6: path}, "case": "case_7"}


@pytest.mark.parametrize(
    ("stored", "foreground"),
    [
        ([0, 1, 0, 1], [0, 1, 0, 1]),
        ([0, 255, 0, 255], [0, 1, 0, 1]),
        ([0, 2, 2, 0], [0, 1, 1, 0]),  # one value besides 0 is the foreground, whatever it is
        ([0, 100, 0, 0], [0, 1, 0, 0]),
        ([1, 1, 1, 1], [1, 1, 1, 1]),
        ([7, 7, 7, 7], [1, 1, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([False, True, True, False], [0, 1, 1, 0]),
    ],
)
@pytest.mark.parametrize("name", ["mask.png", "mask.bmp", "mask.tif", "mask.gif", "mask.pgm"])
def test_rule_for_masks_of_two_values(tmp_path, stored, foreground, name):
    if stored[0] is False and name in ("mask.gif", "mask.pgm"):
        stored = [255 * value for value in stored]
    case = LoadLabeld([6, 7])(_mask_case(tmp_path, [stored] * 3, name))
    label = case["label"]
    assert label.shape == (2, 4, 3, 1)
    assert label.dtype == torch.uint8
    assert np.array_equal(label[0, :, :, 0].numpy(), np.array([foreground] * 3).T)
    assert label[1].sum() == 0
    assert case["findings"] == []
    assert torch.equal(read_mask(tmp_path / name), label[:1].as_tensor())


@pytest.mark.parametrize(
    ("stored", "foreground", "unclear"),
    [
        ([0, 127, 128, 255], [0, 0, 1, 1], "50.00%"),
        ([0, 1, 254, 255], [0, 0, 1, 1], "50.00%"),  # nothing is near enough to be passed over in silence
        ([0, 1, 0, 255], [0, 0, 0, 1], "25.00%"),
        ([0, 255, 130, 140], [0, 1, 1, 1], "50.00%"),
    ],
)
def test_greys_of_a_mask_without_losses_are_warned_of(tmp_path, stored, foreground, unclear, caplog):
    with caplog.at_level(logging.WARNING):
        result = LoadLabeld([6])(_mask_case(tmp_path, [stored] * 3))
    assert np.array_equal(result["label"][0, :, :, 0].numpy(), np.array([foreground] * 3).T)
    (finding,) = result["findings"]
    assert (finding.severity, finding.check) == ("warn", "lossy-mask")
    assert f"mask.png: expected a mask of two values, got others in {unclear} of the pixels" in finding.text
    assert [record.getMessage() for record in caplog.records] == [f"case_7: {finding.text}"]


def test_soft_mask_up_to_1(tmp_path):
    values = np.array([[0, 0.25, 0.5, 1.0]] * 3, np.float32)
    result = LoadLabeld([6], log=False)(_mask_case(tmp_path, values, "mask.nii.gz"))
    assert result["label"][0, :, 0, 0].tolist() == [0, 1, 1, 1]
    assert "in 50.00% of the pixels" in result["findings"][0].text


@pytest.mark.parametrize("stored", [[0, 3, 9, 2], [0, 1, 2, 2], [0, 100, 127, 0], [0.0, 0.25, 0.5, 0.5]])
def test_masks_of_many_values_all_below_the_threshold_are_refused(tmp_path, stored):
    """Everything would be background, and a label lost without a word."""
    name = "mask.nii.gz" if isinstance(stored[0], float) else "mask.png"
    with pytest.raises(InputError, match=r"expected a mask of two values, .* up to (2|9|127|0\.5); .*label_map"):
        LoadLabeld([6])(_mask_case(tmp_path, [stored] * 3, name))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_masks_below_0_or_not_finite_are_refused(tmp_path, value):
    with pytest.raises(InputError, match="expected a mask of 0 and more"):
        LoadLabeld([6])(_mask_case(tmp_path, np.array([[0, value, 0, 1]] * 3, np.float32), "mask.nii.gz"))


def _disc(size=64, *, low=0, high=255):
    rows, columns = np.indices((size, size))
    return np.where(np.hypot(rows - size / 2, columns - size / 2) < size / 3, high, low).astype(np.uint8)


@pytest.mark.parametrize("name", ["mask.jpg", "mask.jpeg", "jpeg_inside.png", "jpeg_inside.tif"])
def test_jpeg_masks_are_cut_at_the_threshold_and_their_greys_counted(tmp_path, name):
    options = {"jpg": {"quality": 60}, "jpeg": {"quality": 60}, "png": {"format": "JPEG", "quality": 60}}
    options = options.get(name.split(".")[1], {"compression": "jpeg", "quality": 60})
    case = _mask_case(tmp_path, _disc(), name, **options)
    with Image.open(tmp_path / name) as picture:
        stored = np.asarray(picture)
    result = LoadLabeld([6], log=False)(case)
    assert np.array_equal(result["label"][0, :, :, 0].numpy(), (stored >= 128).T)
    unclear = ((stored > 16) & (stored < 239)).mean()
    assert 0 < unclear < 0.2
    assert f"{name}: expected a mask of two values, got others in {unclear:.2%} of" in result["findings"][0].text
    with pytest.raises(InputError, match=r"case_7: .*got others in .* \(a warning, refused because of strict\)"):
        LoadLabeld([6], strict=True)(case)


def test_jpeg_mask_of_even_blocks_has_nothing_to_warn_of(tmp_path):
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8, :8] = 255  # one block of the compression, which is kept exactly
    for values in (pixels, pixels * 0):
        result = LoadLabeld([6])(_mask_case(tmp_path, values, "mask.jpg"))
        assert np.array_equal(result["label"][0, :, :, 0].numpy(), values.T > 0)
        assert result["findings"] == []


def test_dark_jpeg_masks(tmp_path):
    """What is 1 in a mask saved as JPEG cannot be told from noise, and 100 is no noise: neither is lost silently."""
    noise = LoadLabeld([6], log=False)(_mask_case(tmp_path, _disc(high=1), "mask.jpg", quality=100))
    assert noise["label"].sum() == 0
    assert [finding.check for finding in noise["findings"]] == ["lossy-mask"]
    with pytest.raises(InputError, match=r"mask\.jpg: expected a mask of two values, or of greys up to 255, got greys"):
        LoadLabeld([6])(_mask_case(tmp_path, _disc(high=100), "mask.jpg", quality=95))


def test_palette_of_a_mask_says_what_is_white(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 1, 1]] * 3, np.uint8), mode="P")
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png")[0, :, 0, 0].tolist() == [1, 0, 0, 0]
    picture.putpalette([0, 0, 0, 128, 0, 0])  # a colour for the class: the index counts
    picture.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png")[0, :, 0, 0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("name", ["label.jpg", "jpeg_inside.png"])
def test_label_maps_in_jpeg_are_refused(tmp_path, name):
    _save_picture(tmp_path / name, np.zeros((3, 4), np.uint8), format="JPEG")
    case = _picture_case(tmp_path) | {"label": str(tmp_path / name), "label_map": {255: 6}}
    with pytest.raises(InputError, match=rf"{name}: expected a label map in a format without losses, got JPEG"):
        LoadLabeld([6])(case)
    _save_picture(tmp_path / "slice.png", np.zeros((3, 4), np.uint8))
    case["label"] = [str(tmp_path / "slice.png"), str(tmp_path / name)]
    case["image"] = read_image([tmp_path / "image.png"] * 2)
    with pytest.raises(InputError, match=rf"{name}: expected a label map in a format without losses, got JPEG"):
        LoadLabeld([6])(case)


def test_counts_prove_that_nothing_was_lost(tmp_path, random):
    values = random.integers(0, 4, (4, 5, 6)).astype(np.uint8)
    case = _label_case(tmp_path, random.normal(size=(4, 5, 6)), values) | {"case": "case_7"}
    counted = {1: int((values == 2).sum()), 4: int(np.isin(values, [1, 3]).sum())}
    case["counts"] = {"slices": 6, "voxels": counted}
    expected = LoadLabeld([1, 4])(case | {"counts": None})["label"]
    assert torch.equal(LoadLabeld([1, 4])(case)["label"].as_tensor(), expected.as_tensor())
    LoadLabeld([1])(case | {"counts": {"slices": 6, "voxels": {"1": counted[1], 9: 5}}})
    for counts, text in (
        ({"slices": 7, "voxels": counted}, "expected 7 slices, got 6"),
        ({"slices": 6, "voxels": counted | {4: 1000}}, f"expected 1000 voxels of class 4, got {counted[4]}"),
        ({"slices": 6, "voxels": {1: 0}}, f"expected 0 voxels of class 1, got {counted[1]}"),
    ):
        with pytest.raises(InputError, match=rf"^case_7: {text}: the label has changed since it was prepared, or part"):
            LoadLabeld([1, 4])(case | {"counts": counts})


def test_lost_slice_is_noticed_even_where_image_and_label_fit_each_other(tmp_path):
    pixels = [np.full((5, 4), value, np.uint8) for value in range(3)]
    paths = [_save_picture(tmp_path / f"{index}.png", picture) for index, picture in enumerate(pixels)]
    case = {"label_map": {1: 1, 2: 2}, "case": "case_7", "counts": {"slices": 3, "voxels": {1: 20, 2: 20}}}

    def load(case):
        return LoadLabeld([1, 2])(LoadImageCased()(case))

    assert load(case | {"image": paths, "label": paths})["label"].sum() == 40
    with pytest.raises(InputError, match="case_7: expected 3 slices, got 2"):
        load(case | {"image": paths[1:], "label": paths[1:]})
    with pytest.raises(InputError, match="case_7: expected 20 voxels of class 1, got 0"):
        load(case | {"image": paths, "label": [paths[0], paths[0], paths[2]]})


def test_findings_of_several_steps_are_kept(tmp_path):
    earlier = Finding("warn", "colour", "grey")
    case = _mask_case(tmp_path, [[0, 127, 128, 255]] * 3) | {"findings": [earlier]}
    result = LoadLabeld([6], log=False)(case)
    assert [finding.check for finding in result["findings"]] == ["colour", "lossy-mask"]
    assert case["findings"] == [earlier]


def test_masks_of_overlapping_classes_and_of_classes_not_asked_for(tmp_path):
    mask = _save_picture(tmp_path / "mask.png", np.full((3, 4), 255, np.uint8))
    case = _picture_case(tmp_path) | {"label": {"8": mask, "9": mask, "99": str(tmp_path / "never_read.png")}}
    label = LoadLabeld([9, 8])(case)["label"]
    assert label.shape == (2, 4, 3, 1)
    assert label.min() == 1


def test_stack_of_masks_judges_each_file_by_its_own_maximum(tmp_path):
    images = [_save_picture(tmp_path / f"i{k}.png", np.arange(12, dtype=np.uint8).reshape(3, 4)) for k in range(3)]
    levels = [1, 255, 0]
    masks = [_save_picture(tmp_path / f"m{k}.png", np.full((3, 4), level, np.uint8)) for k, level in enumerate(levels)]
    case = LoadImageCased()({"image": images, "label": {6: masks}})
    label = LoadLabeld([6])(case)["label"]
    assert label.shape == (1, 4, 3, 3)
    assert label.sum((0, 1, 2)).tolist() == [12, 12, 0]
    case = LoadImageCased()({"image": images, "label": {6: masks[:2]}})
    with pytest.raises(InputError, match=r"m0\.png and the files with it: expected the image's shape \(4, 3, 3\)"):
        LoadLabeld([6])(case)


def test_label_map_as_palette_picture_keeps_its_indices(tmp_path):
    values = np.array([[0, 1, 2, 3]] * 3, dtype=np.uint8)
    picture = Image.fromarray(values, mode="P")
    picture.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.save(tmp_path / "label.png")
    case = _picture_case(tmp_path) | {"label": str(tmp_path / "label.png"), "label_map": {1: 11, 2: 12, 3: 13}}
    label = LoadLabeld([11, 12, 13])(case)["label"]
    assert np.array_equal(label[..., 0].numpy(), np.stack([value == values.T for value in (1, 2, 3)]))


def test_grey_label_saved_as_rgb_is_taken_and_colour_refused(tmp_path):
    grey = np.zeros((3, 4, 3), np.uint8)
    grey[:, :2] = 255
    case = _picture_case(tmp_path) | {"label": {6: _save_picture(tmp_path / "grey.png", grey)}}
    assert LoadLabeld([6])(case)["label"].sum() == 6
    grey[0, 0] = [255, 0, 0]
    case["label"] = {6: _save_picture(tmp_path / "colour.png", grey)}
    with pytest.raises(InputError, match=r"colour\.png: expected a label of one channel"):
        LoadLabeld([6])(case)


def test_case_without_label(tmp_path):
    case = _picture_case(tmp_path)
    assert LoadLabeld([6])(case | {"label": None})["label"] is None
    assert "label" not in LoadLabeld([6], allow_missing_keys=True)(case)
    with pytest.raises(InputError, match="case_7: expected a label in the datalist, got none"):
        LoadLabeld([6])(case | {"case": "case_7"})


def test_real_label_map(shared):
    folder = shared / "data" / "chaos_t2_mr"
    image = sorted((folder / "images").glob("*.nii.gz"))[0]
    mask = folder / "masks" / image.name
    case = LoadImageCased()({"image": str(image), "label": str(mask), "label_map": {1: 1, 2: 5, 3: 4, 4: 2}})
    label = LoadLabeld([1, 2, 4, 5])(case)["label"]
    stored = np.asarray(nibabel.load(mask).dataobj)
    assert np.array_equal(label.numpy(), np.stack([stored == value for value in (1, 4, 3, 2)]))


def test_cases_of_a_datalist(tmp_path, shared, bundle_root):
    """A datalist of real pictures, read end to end."""
    with (shared / "data" / "kvasir_seg" / "split.csv").open() as lines:
        rows = list(itertools.islice(csv.DictReader(lines), 2))
    assert rows
    images = sorted((shared / "data" / "kvasir_seg" / "images").iterdir())[:2]
    entries = [
        {
            "case": image.stem,
            "image": str(image),
            "label": {"polyp": str(shared / "data" / "kvasir_seg" / "masks" / f"{image.stem}.png")},
            "modality": "endoscopy",
        }
        for image in images
    ]
    (tmp_path / "list.json").write_text(json.dumps({"name": "x", "training": entries}))
    vocabulary = Vocabulary.read(bundle_root / "configs" / "classes.yaml")
    cases = read_datalist(tmp_path / "list.json", section="training", vocabulary=vocabulary)
    load = Compose([LoadImageCased(), LoadLabeld([6])])
    for case in cases:
        result = load(case)
        assert result["label"].shape == (1, *result["image"].shape[1:])
        with Image.open(case["label"][6]) as mask:
            assert int(result["label"].sum()) == int(np.asarray(mask.convert("1")).sum())
