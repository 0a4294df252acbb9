import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.guard import Guardd, check_image
from scripts.errors import InputError


def _image(shape=(1, 4, 5, 6), *, affine=None, **meta):
    voxels = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape) - 1000
    affine = np.diag([-0.8, -0.8, 5.0, 1.0]) if affine is None else np.asarray(affine, dtype=float)
    return MetaTensor(voxels, affine=torch.from_numpy(affine), meta=meta)


def _check(image, modality="MR"):
    check_image(image, case="case_7", modality=modality)


def _rotation(degrees):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


@pytest.mark.parametrize(
    "image",
    [
        _image(),
        _image((3, 4, 5, 1), affine=np.diag([-1, -1, 1, 1]), planar=True),
        _image((1, 1, 2, 1)),
        _image(affine=_rotation(20) @ np.diag([0.5, 0.5, 8, 1])),
        _image(affine=[[0, 0, 5, 3], [0.7, 0, 0, 1], [0, -0.7, 0, 2], [0, 0, 0, 1]]),  # sagittal volume
    ],
)
def test_good_images_pass(image):
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


@pytest.mark.parametrize(
    ("low", "high", "warned"), [(-1024, 3000, False), (0, 255, True), (-1, 1, True), (-1024, 30000, True)]
)
def test_ct_that_is_not_in_hu_is_only_warned_of(low, high, warned, caplog):
    image = _image()
    image[:] = low
    image[0, 0, 0, 0] = high
    with caplog.at_level(logging.WARNING):
        _check(image, modality="CT")
    assert ("case_7" in caplog.text and "Hounsfield" in caplog.text) is warned
    caplog.clear()
    _check(image, modality="MR")
    assert not caplog.records


def test_pictures_of_ct_do_not_fill_the_log(caplog):
    image = _image((1, 4, 5, 1), planar=True) + 1000
    with caplog.at_level(logging.WARNING):
        _check(image, modality="CT")
    assert not caplog.records


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
