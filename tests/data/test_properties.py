"""What must hold for every size, orientation and label map, not only for the examples that came to mind."""

import itertools
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from scripts.data.fitting import fit_masks_to_square, fit_to_square, fitted_shape, restore_from_square
from scripts.data.reading import LoadImageCased, LoadLabeld
from scripts.errors import InputError

SIDES = st.integers(1, 150)
SIZES = st.sampled_from([16, 33, 64, 96])
ORIENTATIONS = [
    "".join(codes) for axes in itertools.permutations(("LR", "PA", "IS")) for codes in itertools.product(*axes)
]  # all 48
properties = settings(max_examples=60, deadline=None, derandomize=True)


# -------------------------------------------------------------------------------------- resize, pad, and their inverse


@properties
@given(height=SIDES, width=SIDES, size=SIZES)
def test_the_longest_side_fills_the_square_and_the_rest_is_zero(height, width, size):
    rows, columns = fitted_shape(height, width, size)
    assert max(rows, columns) == size
    assert min(rows, columns) >= 1
    square = fit_to_square(torch.ones(1, 1, height, width), size)[0, 0]
    torch.testing.assert_close(square[:rows, :columns], torch.ones(rows, columns))
    assert square.sum() == pytest.approx(rows * columns, rel=1e-5)


@properties
@given(height=SIDES, width=SIDES, size=SIZES, slopes=st.tuples(st.floats(-1, 1), st.floats(-1, 1)))
def test_the_inverse_puts_every_point_back_to_its_place(height, width, size, slopes):
    """A plane is kept by linear interpolation, so a shift of half a pixel anywhere would show in its height."""
    rows, columns = fitted_shape(height, width, size)
    place_y = (torch.arange(size) + 0.5) / rows  # 0...1 over the content
    place_x = (torch.arange(size) + 0.5) / columns
    square = slopes[0] * place_y[:, None] + slopes[1] * place_x[None]
    restored = restore_from_square(square[None, None], size=size, original=(height, width))[0, 0]
    assert restored.shape == (height, width)
    wanted_y = ((torch.arange(height) + 0.5) / height).clamp(0.5 / rows, 1 - 0.5 / rows)  # beyond the outer centres it
    wanted_x = ((torch.arange(width) + 0.5) / width).clamp(0.5 / columns, 1 - 0.5 / columns)  # goes on level
    torch.testing.assert_close(restored, slopes[0] * wanted_y[:, None] + slopes[1] * wanted_x[None], atol=1e-5, rtol=0)


@properties
@given(height=SIDES, width=SIDES, factor=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_mask_comes_back_whole_from_a_square_that_is_a_multiple_of_it(height, width, factor, seed):
    mask = (torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(seed)) > 0.5).to(torch.uint8)
    size = factor * max(height, width)
    logits = fit_masks_to_square(mask, size).float() * 2 - 1
    restored = restore_from_square(logits, size=size, original=(height, width)) > 0
    assert torch.equal(restored, mask.bool())


@properties
@given(height=SIDES, width=SIDES, size=SIZES)
def test_slices_fitted_together_are_as_fitted_one_by_one(height, width, size):
    slices = torch.rand(3, 1, height, width, generator=torch.Generator().manual_seed(height * 151 + width))
    together = fit_to_square(slices, size)
    alone = torch.cat([fit_to_square(each[None], size) for each in slices])
    torch.testing.assert_close(together, alone)


# ------------------------------------------------------------------------------------------------------- orientation


def oriented_volume(codes: str, spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> MetaTensor:
    """A volume of numbered voxels whose axes point as the codes say, in mm."""
    upright = np.diag([*spacing, 1.0])
    upright[:3, 3] = (-31.0, 17.5, 4.25)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    turned = nibabel.orientations.apply_orientation(voxels, turn)
    affine = upright @ inv_ornt_aff(turn, shape)
    return MetaTensor(torch.as_tensor(np.ascontiguousarray(turned))[None], affine=torch.as_tensor(affine))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_goes_to_one_and_back(codes):
    shape, spacing = (4, 5, 6), (0.8, 1.1, 5.0)
    image = oriented_volume(codes, spacing, shape)
    assert "".join(nibabel.aff2axcodes(image.affine.numpy())) == codes
    forward = Compose([Orientationd("image", axcodes="PLS", labels=None)])
    data = forward({"image": image})
    upright = oriented_volume("PLS", spacing, shape)
    assert torch.equal(data["image"].as_tensor(), upright.as_tensor())  # same anatomy, whatever the file's axes were
    torch.testing.assert_close(data["image"].affine, upright.affine)
    data["pred"] = MetaTensor(data["image"].as_tensor().clone())
    back = Invertd("pred", forward, orig_keys="image")(data)["pred"]
    assert torch.equal(back.as_tensor(), image.as_tensor())
    torch.testing.assert_close(back.affine, image.affine)


# ----------------------------------------------------------------------------------------------------- label mapping


VALUES = st.lists(st.integers(1, 255), min_size=1, max_size=6, unique=True)


@properties
@given(values=VALUES, data=st.data())
def test_every_voxel_of_a_label_map_goes_to_its_class_and_to_no_other(values, data):
    meanings = data.draw(st.lists(st.sampled_from([1, 2, 4, 7, None]), min_size=len(values), max_size=len(values)))
    label_map = dict(zip(values, meanings, strict=True))
    stored = np.random.default_rng(sum(values)).choice([0, *values], size=(5, 4, 3)).astype(np.uint8)
    class_ids = data.draw(st.lists(st.sampled_from([1, 2, 4, 7]), min_size=1, unique=True))
    channels = read_label(stored, label_map, class_ids)
    for channel, class_id in zip(channels, sorted(class_ids), strict=True):
        wanted = np.isin(stored, [value for value, meaning in label_map.items() if meaning == class_id])
        assert np.array_equal(channel, wanted)
    mapped = np.isin(stored, [value for value, meaning in label_map.items() if meaning in class_ids])
    assert channels.sum() == mapped.sum()  # no voxel lost, none counted twice


@properties
@given(values=VALUES, foreign=st.integers(1, 255))
def test_a_value_that_nobody_explained_is_never_passed_over(values, foreign):
    stored = np.zeros((3, 3, 2), dtype=np.uint8)
    stored[1, 1, 1] = foreign
    label_map = dict.fromkeys(values, 1)
    if foreign in label_map:
        assert read_label(stored, label_map, [1]).sum() == 1
    else:
        with pytest.raises(InputError, match=str(foreign)):
            read_label(stored, label_map, [1])


def read_label(stored: np.ndarray, label_map: dict[int, int | None], class_ids: list[int]) -> np.ndarray:
    """Write a label map, and read it as training does; `(K, X, Y, Z)`."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("image", "label"):
            nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), Path(folder) / f"{name}.nii")
        case = {"case": "a", "label_map": label_map, "modality": "MR"}
        case |= {name: str(Path(folder) / f"{name}.nii") for name in ("image", "label")}
        return LoadLabeld(class_ids)(LoadImageCased()(case))["label"].numpy()
