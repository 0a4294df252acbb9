import dataclasses
import logging

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.guard import Finding, Guardd, check_image, enforce, inspect_image
from scripts.data.reading import read_image
from scripts.errors import InputError


def _image(shape=(1, 4, 5, 6), *, affine=None, **meta):
    voxels = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    affine = np.diag([-0.8, -0.8, 5.0, 1.0]) if affine is None else np.asarray(affine, dtype=float)
    return MetaTensor(voxels, affine=torch.from_numpy(affine), meta=meta)


def _check(image, modality="MR"):
    check_image(image, case="case_7", modality=modality)


def _found(image, modality="MR"):
    """What is found, as (severity, check)."""
    return [(finding.severity, finding.check) for finding in inspect_image(image, modality=modality)]


def _text(image, modality="MR"):
    (finding,) = inspect_image(image, modality=modality)
    return finding.text


def _rotation(degrees):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


@pytest.mark.parametrize(
    "image",
    [
        _image(),
        _image((3, 4, 5, 1), affine=np.diag([-1, -1, 1, 1]), planar=True)[:1].expand(3, -1, -1, -1),
        _image((1, 1, 2, 1)),
        _image(affine=_rotation(20) @ np.diag([0.5, 0.5, 8, 1])),
        _image(affine=[[0, 0, 5, 3], [0.7, 0, 0, 1], [0, -0.7, 0, 2], [0, 0, 0, 1]]),  # sagittal volume
    ],
)
def test_good_images_pass(image):
    assert inspect_image(image, modality="MR") == []
    _check(image)


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4, 5, 6), (4, 4, 5, 6), (1, 1, 4, 5, 6)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"case_7: expected an image \(channels, X, Y, Z\).*got the shape"):
        _check(torch.zeros(shape))


def test_image_without_voxels_is_refused():
    with pytest.raises(InputError, match=r"at least one voxel .*\(1, 4, 0, 6\)"):
        _check(_image((1, 4, 0, 6)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted(value):
    image = _image()
    image[0, 1, 2, 3] = image[0, 3, 4, 5] = value
    with pytest.raises(InputError, match="finite values, got NaN or infinity in 2 of 120 voxels"):
        _check(image)


def test_constant_image_is_refused():
    with pytest.raises(InputError, match="contrast, got the value 7 everywhere"):
        _check(_image() * 0 + 7)


def test_missing_affine_is_refused():
    with pytest.raises(InputError, match="expected an image with an affine"):
        _check(_image().as_tensor())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_affine_that_is_not_finite_is_refused(value):
    affine = np.diag([1.0, 1, 1, 1])
    affine[1, 3] = value
    with pytest.raises(InputError, match="finite 4x4 affine"):
        _check(_image(affine=affine))


@pytest.mark.parametrize("edges", [(0, 1, 1), (1, 1, 0), (0.5, 0.5, 4000), (1e-5, 1, 1)])
def test_absurd_spacing_is_refused(edges):
    with pytest.raises(InputError, match=r"voxel edges between 0.01 and 100 mm, got"):
        _check(_image(affine=np.diag([*edges, 1])))


def test_tilted_gantry_is_refused():
    shear = np.diag([0.7, 0.7, 5.0, 1.0])
    shear[1, 2] = 5 * np.tan(np.deg2rad(15))
    with pytest.raises(InputError, match=r"perpendicular axes.*cosine of 0.259"):
        _check(_image(affine=shear))


def test_singular_affine_is_refused():
    with pytest.raises(InputError, match="perpendicular axes"):
        _check(_image(affine=[[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))


def test_rounded_directions_pass():
    axes = np.round(_rotation(33), 3)
    _check(_image(affine=axes @ np.diag([0.7, 0.7, 3, 1])))


@pytest.mark.parametrize("planar", [True, False])
def test_planar_image_must_be_axial(planar):
    sagittal = [[0, 0, 5, 0], [0.7, 0, 0, 0], [0, -0.7, 0, 0], [0, 0, 0, 1]]
    image = _image((1, 4, 5, 1), affine=sagittal, planar=planar)
    if planar:
        with pytest.raises(InputError, match="expected an axial slice"):
            _check(image)
    else:
        _check(image)


# ------------------------------------------------------------------------------------------------------ what is doubted


def test_nifti_without_orientation_is_warned_of():
    image = _image(oriented=False)
    assert _found(image) == [("warn", "orientation")]
    assert "sform and qform codes of 0" in _text(image)
    assert _found(_image(oriented=True)) == []
    picture = _image((1, 4, 5, 1), affine=np.diag([-1, -1, 1, 1]), planar=True, picture=True, oriented=False)
    assert _found(picture) == []


def test_constant_slices_are_counted_and_the_first_named():
    image = _image((1, 4, 5, 9))
    image[..., 2] = image[..., 4] = 7
    assert _found(image) == [("warn", "constant-slices")]
    assert "in 2 of 9 slices (along Z, from 0: 2, 4);" in _text(image)
    image[..., 2:] = 0
    assert "in 7 of 9 slices (along Z, from 0: 2, 3, 4, 5, 6, ...);" in _text(image)


def test_slices_are_those_from_foot_to_head_and_not_those_of_the_file():
    image = _image((1, 4, 5, 6), affine=[[0, 0, 5, 3], [0.7, 0, 0, 1], [0, -0.7, 0, 2], [0, 0, 0, 1]])
    image[0, :, 3] = 7
    assert "in 1 of 5 slices (along Y, from 0: 3);" in _text(image)
    image = _image((1, 4, 5, 6), affine=[[0, 0, 5, 3], [0.7, 0, 0, 1], [0, -0.7, 0, 2], [0, 0, 0, 1]])
    image[0, :, :, 3] = 7
    assert _found(image) == []


def _colours(generator):
    return _image((3, 40, 50, 1), affine=np.diag([-1, -1, 1, 1]), planar=True, picture=True) * 0 + torch.randint(
        0, 256, (3, 40, 50, 1), generator=generator
    )


@pytest.mark.parametrize(
    ("modality", "in_colour", "in_grey"),
    [
        ("CT", True, False),
        ("MR", True, False),
        ("xray", True, False),
        ("ultrasound", True, False),
        ("endoscopy", False, True),
        ("dermoscopy", False, True),
        ("fundus", False, True),
        ("microscopy", False, False),
        (None, False, False),
    ],
)
def test_colours_must_fit_the_modality(modality, in_colour, in_grey, generator):
    colour = _colours(generator)
    assert (("warn", "colour") in _found(colour, modality)) is in_colour
    grey = colour[:1]
    assert (("warn", "colour") in _found(grey, modality)) is in_grey
    saved_as_rgb = grey.expand(3, -1, -1, -1)
    assert (("warn", "colour") in _found(saved_as_rgb, modality)) is in_grey


def test_traces_of_colour_are_no_colour(generator):
    """What compression leaves: small differences everywhere, large ones in few pixels."""
    grey = _colours(generator)[:1].expand(3, -1, -1, -1).clone()
    grey[0] += 5
    grey[1, 0, :10] = 0
    assert _found(grey, "xray") == []
    grey[1, :2] = 0
    assert _found(grey, "xray") == [("warn", "colour")]


@pytest.mark.parametrize(("declared", "stored"), [("CT", "MR"), ("MR", "CT"), ("xray", "CT")])
def test_modality_that_the_file_contradicts_is_an_error(declared, stored):
    image = _image(modality=stored)
    assert _found(image, declared) == [("error", "modality")]
    with pytest.raises(InputError, match=f"case_7: expected {declared}, got a file that says it is {stored}; correct"):
        _check(image, declared)
    assert ("error", "modality") not in _found(image, stored)
    assert _found(image, None) == []


@pytest.mark.parametrize(("low", "warned"), [(-1024, True), (-501, True), (-500, False), (0, False)])
def test_mr_that_looks_like_hu_is_warned_of(low, warned):
    image = _image()
    image[0, 0, 0, 0] = low
    assert _found(image, "MR") == ([("warn", "modality")] if warned else [])
    assert _found(image, "xray") == []


# --------------------------------------------------------------------------------------------------------- CT values


def _ct(random, *, air=0.5, lung=0.0, fat=0.15, soft=0.25, bone=0.1, shape=(40, 50, 30)):
    """CT in HU made of noisy tissues in given shares; bone spreads from 200 HU upwards."""
    count = int(np.prod(shape))
    tissues = [
        (air, random.normal(-1000, 15, count)),
        (lung, random.normal(-800, 80, count)),
        (fat, random.normal(-100, 20, count)),
        (soft, random.normal(50, 25, count)),
        (bone, 200 + random.exponential(350, count)),
    ]
    shares = np.array([share for share, _ in tissues])
    chosen = random.choice(len(tissues), count, p=shares / shares.sum())
    values = np.choose(chosen, [values for _, values in tissues])
    return values.clip(-1024, 3071).round().reshape(1, *shape)


def _volume(values, **meta):
    affine = torch.from_numpy(np.diag([-0.8, -0.8, 5.0, 1.0]))
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)), affine=affine, meta=meta)


def _padded(values, padding):
    """Outside the round field of view scanners write a value of their own."""
    values = values.copy()
    rows, columns = np.indices(values.shape[1:3])
    centre = (np.array(values.shape[1:3]) - 1) / 2
    outside = np.hypot((rows - centre[0]) / centre[0], (columns - centre[1]) / centre[1]) > 1
    values[:, outside] = padding
    return values


TISSUES = {
    "whole field of view": {},
    "thin patient in a large field of view": {"air": 0.85, "soft": 0.09, "fat": 0.04, "bone": 0.02},
    "chest": {"air": 0.4, "lung": 0.3, "soft": 0.15, "fat": 0.1, "bone": 0.05},
    "head, much bone": {"air": 0.4, "soft": 0.35, "fat": 0.05, "bone": 0.2},
    "leg": {"air": 0.9, "soft": 0.05, "fat": 0.02, "bone": 0.03},
}
CROPS = {
    "abdomen without air": {"air": 0, "fat": 0.2, "soft": 0.8, "bone": 0},
    "organ without air and fat": {"air": 0, "fat": 0, "soft": 1, "bone": 0},
    "vertebra": {"air": 0, "fat": 0, "soft": 0.3, "bone": 0.7},
    "nothing but bone": {"air": 0, "fat": 0, "soft": 0, "bone": 1},
}


@pytest.mark.parametrize("tissues", TISSUES.values(), ids=TISSUES)
def test_ct_in_hu_passes(tissues):
    values = _ct(np.random.default_rng(1), **tissues)
    assert _found(_volume(values), "CT") == []
    assert _found(_volume(_padded(values, -2000)), "CT") == []
    assert _found(_volume(_padded(values, -3024)), "CT") == []


@pytest.mark.parametrize("tissues", CROPS.values(), ids=CROPS)
def test_crop_of_ct_in_hu_is_not_taken_for_shifted(tissues):
    values = _ct(np.random.default_rng(2), **tissues)
    assert not [found for found in _found(_volume(values), "CT") if found[0] == "error"]


def test_dense_bone_is_not_taken_for_shifted_soft_tissue_where_there_is_air():
    assert _found(_volume(np.resize([-1000] * 5 + [50] * 4 + [1000], (1, 10, 11, 12))), "CT") == []
    assert _found(_volume(np.resize([24] * 5 + [1074] * 4 + [2024], (1, 10, 11, 12))), "CT") == [
        ("error", "hounsfield")
    ]


@pytest.mark.parametrize("tissues", [*TISSUES.values(), *list(CROPS.values())[:2]], ids=[*TISSUES, *list(CROPS)[:2]])
@pytest.mark.parametrize("shift", [1024, 1000])
@pytest.mark.parametrize("padding", [None, 0, -2000])
def test_shifted_ct_is_an_error(tissues, shift, padding):
    values = (_ct(np.random.default_rng(3), **tissues) + shift).clip(0, 4095)
    image = _volume(values if padding is None else _padded(values, padding))
    assert _found(image, "CT") == [("error", "hounsfield")]
    with pytest.raises(InputError, match=r"soft tissue around 1024: subtract 1024, or apply the file's rescale interc"):
        _check(image, "CT")
    assert ("error", "hounsfield") not in _found(image, "MR")


def test_shift_is_seen_in_a_volume_too_large_to_look_at_every_voxel():
    values = _ct(np.random.default_rng(3), shape=(150, 160, 100))
    assert _found(_volume(values), "CT") == []
    assert _found(_volume(values + 1024), "CT") == [("error", "hounsfield")]


def test_ct_in_0_to_255_is_taken_as_windowed():
    values = ((_ct(np.random.default_rng(4)).clip(-160, 240) + 160) / 400 * 255).round()
    image = _volume(values)
    assert (values.min(), values.max()) == (0, 255)
    assert _found(image, "CT") == [("warn", "windowed")]
    assert "got values from 0 to 255: taken as windowed already" in _text(image, "CT")
    assert _found(_volume(values, picture=True, planar=True), "CT") == []
    assert _found(image, "MR") == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([-300, 50, 60, 3000], "values from -300 to 3000"),
        ([-1, 50, 60, 1], "values from -1 to 60"),
        ([-1024, 50, 60, 30000], "values from -1024 to 30000"),
        ([0, 50, 60, 256], "values from 0 to 256"),
        ([-1024, -990, 700, 2000], "soft tissue between -200 and 300, got 0.0% of the voxels there"),
    ],
)
@pytest.mark.parametrize("picture", [True, False])
def test_ct_that_is_hardly_in_hu_is_warned_of(values, text, picture):
    image = _volume(np.resize(values, (1, 4, 4, 5)), picture=picture)
    assert ("warn", "hounsfield") in _found(image, "CT")
    assert any(text in finding.text for finding in inspect_image(image, modality="CT"))
    assert ("warn", "hounsfield") not in _found(image, "xray")


def test_real_ct_pictures_hold_nothing_to_warn_of(shared):
    for path in sorted((shared / "data" / "lits_liver_ct" / "images").iterdir())[:5]:
        assert inspect_image(read_image(path), modality="CT") == []


@pytest.mark.parametrize(
    ("pattern", "modality"),
    [
        ("acdc_cine_mr/images/*.png", "MR"),
        ("kvasir_seg/images/*.jpg", "endoscopy"),
        ("ph2_dermoscopy/images/*.jpg", "dermoscopy"),
        ("covid_chest_xray/images/*.png", "xray"),
    ],
)
def test_real_images_hold_nothing_to_warn_of(shared, pattern, modality):
    for path in sorted((shared / "data").glob(pattern))[:3]:
        assert inspect_image(read_image(path), modality=modality) == []


def test_real_volumes_with_an_empty_slice(shared):
    """Most of these volumes end with a slice of one value, which numpy finds as well."""
    counted = 0
    for path in sorted((shared / "data" / "chaos_t2_mr" / "images").iterdir())[:4]:
        empty = int((np.ptp(np.asarray(nibabel.load(path).dataobj), axis=(0, 1)) == 0).sum())
        findings = inspect_image(read_image(path), modality="MR")
        assert [finding.check for finding in findings] == ["constant-slices"] * (empty > 0)
        assert all(f"in {empty} of" in finding.text for finding in findings)
        counted += empty
    assert counted > 0


# ------------------------------------------------------------------------------------------------- what is made of it


def test_image_with_an_error_is_not_looked_at_further():
    image = _image(oriented=False, modality="CT")
    image[0, 0, 0, 0] = float("nan")
    assert _found(image, "MR") == [("error", "values"), ("error", "modality")]


def test_image_is_neither_changed_nor_copied():
    values = torch.from_numpy(_ct(np.random.default_rng(1)).astype(np.float32))
    image = MetaTensor(values.clone(), affine=torch.diag(torch.tensor([-0.8, -0.8, 5.0, 1.0]).double()))
    place = image.data_ptr()
    inspect_image(image, modality="CT")
    assert torch.equal(image.as_tensor(), values)
    assert image.data_ptr() == place


FINDINGS = [Finding("warn", "colour", "grey."), Finding("error", "values", "NaN.")]


def test_errors_come_before_warnings_and_strict_raises_both(caplog):
    with pytest.raises(InputError, match=r"^case_7: NaN\.$"):
        enforce(FINDINGS, case="case_7")
    with pytest.raises(InputError, match=r"^case_7: NaN\.$"):
        enforce(FINDINGS, case="case_7", strict=True)
    assert not caplog.records
    with pytest.raises(InputError, match=r"^case_7: grey\. \(a warning, refused because of strict\)$"):
        enforce(FINDINGS[:1], case="case_7", strict=True)
    enforce([], case="case_7", strict=True)


@pytest.mark.parametrize("log", [True, False])
def test_warnings_are_logged_with_the_case(log, caplog):
    with caplog.at_level(logging.WARNING):
        enforce(FINDINGS[:1], case="case_7", log=log)
    assert [record.getMessage() for record in caplog.records] == ["case_7: grey."] * log


def test_findings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FINDINGS[0].text = "other"


def test_check_image_warns_and_strict_refuses(caplog):
    image = _image(oriented=False)
    with caplog.at_level(logging.WARNING):
        _check(image)
    assert "case_7: expected a NIfTI file with an orientation" in caplog.text
    with pytest.raises(InputError, match=r"orientation.*\(a warning, refused because of strict\)"):
        check_image(image, case="case_7", modality="MR", strict=True)


def test_transform_names_the_case_or_the_file():
    good = {"image": _image(), "case": "case_7", "modality": "MR"}
    assert Guardd()(good)["image"] is good["image"]
    constant = _image(filename_or_obj="scan.nii.gz") * 0
    with pytest.raises(InputError, match="case_7: "):
        Guardd()({"image": constant, "case": "case_7"})
    with pytest.raises(InputError, match=r"scan\.nii\.gz: "):
        Guardd()({"image": constant})
    with pytest.raises(InputError, match=r"image: .*affine"):
        Guardd()({"image": _image().as_tensor()})


def test_transform_collects_findings(caplog):
    earlier = Finding("warn", "lossy-mask", "of another file")
    data = {"image": _image(oriented=False), "case": "case_7", "modality": "MR", "findings": [earlier]}
    result = Guardd(log=False)(data)
    assert [finding.check for finding in result["findings"]] == ["lossy-mask", "orientation"]
    assert data["findings"] == [earlier]
    assert not caplog.records
    Guardd()(data)
    assert len(caplog.records) == 1
    assert Guardd()({"image": _image(), "modality": "MR"})["findings"] == []
    with pytest.raises(InputError, match=r"case_7: .*strict"):
        Guardd(strict=True)(data)
