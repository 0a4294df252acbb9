import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.preprocessing import ScaleIntensityByModalityd, scale_intensity, unit_range, window_of
from scripts.data.reading import read_image
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError


def _case(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1, 1)  # (C, H, W, D)


def test_window_edges_become_0_and_255():
    scaled = scale_intensity(_case(-1000, -160, 40, 240, 3000), modality="CT")
    assert scaled.flatten().tolist() == pytest.approx([0, 0, 127.5, 255, 255])


@pytest.mark.parametrize(
    ("window", "edges"),
    [
        ((-600.0, 1500.0), (-1350, 150)),
        ((40.0, 80.0), (0, 80)),
        ([300, 1000], (-200, 800)),
        ("abdomen", (-160, 240)),
        ("lung", (-1350, 150)),
        ("brain", (0, 80)),
    ],
)
def test_other_windows(window, edges):
    scaled = scale_intensity(_case(-3000, *edges, sum(edges) / 2, 3000), modality="CT", window=window)
    assert scaled.flatten().tolist() == pytest.approx([0, 0, 255, 127.5, 255])


def test_names_of_windows():
    assert window_of("abdomen") == (40.0, 400.0)
    assert window_of("lung") == (-600.0, 1500.0)
    assert window_of("brain") == (40.0, 80.0)
    assert window_of([50, 350]) == (50.0, 350.0)


@pytest.mark.parametrize("window", ["liver", "Abdomen", "", "40,400"])
def test_unknown_window_lists_the_choices(window):
    with pytest.raises(
        ConfigError, match=rf"CT window out of abdomen, lung, brain, or \[level, width\], got '{window}'"
    ):
        window_of(window)


@pytest.mark.parametrize(
    "window",
    [(40.0, 0.0), (40.0, -1.0), (40.0,), (40.0, 400.0, 1.0), (float("nan"), 400.0), (40.0, float("inf")), 40.0],
)
def test_window_without_width_is_refused(window):
    with pytest.raises(ConfigError, match=r"CT window \[level, width\] in HU with a width above 0, got"):
        scale_intensity(_case(-1, 1), modality="CT", window=window)
    with pytest.raises(ConfigError, match="width above 0"):  # before any image is read
        ScaleIntensityByModalityd(window=window)


def test_scan_inside_the_window_is_stretched_by_its_own_extremes():
    scaled = scale_intensity(_case(-50, 0, 50), modality="CT")
    assert scaled.flatten().tolist() == pytest.approx([0, 127.5, 255])


def test_scan_outside_the_window_becomes_0():
    assert scale_intensity(_case(-1000, -900), modality="CT").abs().max() == 0


@pytest.mark.parametrize("values", [(0, 50, 255), (0, 50, 100), (3, 200, 250)])
@pytest.mark.parametrize("window", ["abdomen", "lung"])
def test_ct_that_was_windowed_before_stays(values, window):
    assert scale_intensity(_case(*values), modality="CT", window=window).flatten().tolist() == list(values)


@pytest.mark.parametrize("values", [(-1, 50, 255), (0, 50, 256)])
def test_ct_beyond_0_to_255_is_windowed(values):
    expected = (np.clip(values, -160, 240) - values[0]) / (240 - values[0]) * 255
    assert scale_intensity(_case(*values), modality="CT").flatten().tolist() == pytest.approx(expected, abs=1e-3)


def test_real_ct_pictures_stay(shared):
    path = sorted((shared / "data" / "lits_liver_ct" / "images").iterdir())[0]
    image = read_image(path)
    assert image.max() > 240  # the abdominal window would cut it
    assert torch.equal(scale_intensity(image, modality="CT").as_tensor(), image.as_tensor())


def test_extremes_are_those_of_the_volume_not_of_a_slice():
    volume = torch.tensor([[-100.0, -50.0], [0.0, 100.0]]).reshape(1, 1, 2, 2)
    assert scale_intensity(volume, modality="CT").flatten().tolist() == pytest.approx([0, 63.75, 127.5, 255])


def _scale_mr_in_numpy(volume):
    """The published rule written down a second time."""
    low, high = np.percentile(volume[volume > 0], 0.5), np.percentile(volume[volume > 0], 99.5)
    clipped = np.clip(volume, low, high)
    scaled = (clipped - clipped.min()) / (clipped.max() - clipped.min()) * 255.0
    scaled[volume == 0] = 0
    return scaled


def test_mr_follows_the_published_rule():
    random = np.random.default_rng(3)
    volume = random.gamma(2.0, 100.0, (1, 20, 30, 4))
    volume[:, :5] = 0.0
    scaled = scale_intensity(torch.from_numpy(volume), modality="MR").numpy()
    assert np.allclose(scaled, _scale_mr_in_numpy(volume), atol=1e-2)
    assert np.all(scaled[:, :5] == 0)
    assert scaled.max() == 255
    # The darkest voxels above 0 are cut off, so a background of 0 must not count among them.
    assert 0 < (scaled[:, 5:] == 0).mean() < 0.01


def test_real_mr_volume_follows_the_published_rule(shared):
    path = sorted((shared / "data" / "chaos_t2_mr" / "images").glob("*.nii.gz"))[0]
    image = read_image(path)
    scaled = scale_intensity(image, modality="MR")
    assert np.allclose(scaled.numpy(), _scale_mr_in_numpy(image.numpy().astype(np.float64)), atol=1e-2)
    assert torch.equal(scaled.as_tensor()[image.as_tensor() == 0].unique(), torch.zeros(1))


def test_ultrasound_is_treated_as_mr(generator):
    picture = torch.randint(0, 256, (3, 40, 50, 1), generator=generator).float()
    assert torch.equal(scale_intensity(picture, modality="ultrasound"), scale_intensity(picture, modality="MR"))
    assert not torch.equal(scale_intensity(picture, modality="ultrasound"), picture)


def test_mr_of_a_large_volume_follows_the_published_rule(generator):
    """Above a million voxels torch and numpy take other ways to a percentile."""
    volume = torch.rand(1, 120, 110, 100, generator=generator) * 900
    volume[:, :30] = 0
    scaled = scale_intensity(volume, modality="MR")
    assert np.allclose(scaled.numpy(), _scale_mr_in_numpy(volume.double().numpy()), atol=1e-2)


def test_mr_zeros_stay_0_below_negative_voxels():
    scaled = scale_intensity(_case(-5, 0, 10, 20), modality="MR").flatten()
    assert scaled[1] == 0
    assert scaled[3] == 255


def test_mr_without_positive_voxels_is_refused():
    with pytest.raises(InputError, match="voxels above 0, got a maximum of -1"):
        scale_intensity(_case(-5, -1), modality="MR")


@pytest.mark.parametrize("modality", ["endoscopy", "dermoscopy", "xray", "fundus", "microscopy"])
def test_8_bit_pictures_stay_and_others_are_stretched(modality, generator):
    picture = torch.randint(10, 200, (3, 4, 5, 1), generator=generator).float()
    assert torch.equal(scale_intensity(picture, modality=modality), picture)
    assert scale_intensity(_case(100, 300, 500), modality=modality).flatten().tolist() == pytest.approx([0, 127.5, 255])
    assert scale_intensity(_case(-1, 0, 1), modality=modality).flatten().tolist() == pytest.approx([0, 127.5, 255])


def test_channels_are_stretched_together():
    picture = torch.tensor([0.0, 300.0, 600.0]).reshape(3, 1, 1, 1)
    assert scale_intensity(picture, modality="endoscopy").flatten().tolist() == pytest.approx([0, 127.5, 255])


def test_every_modality_of_the_vocabulary_has_a_rule(bundle_root):
    for modality in Vocabulary.read(bundle_root / "configs" / "classes.yaml").modality_names:
        assert scale_intensity(_case(0, 100, 300), modality=modality).max() == 255


@pytest.mark.parametrize("modality", ["PET", None, "ct"])
def test_unknown_modality_lists_the_choices(modality):
    with pytest.raises(InputError, match=r"CT, MR, ultrasound, endoscopy, dermoscopy, xray, fundus, microscopy, got"):
        scale_intensity(_case(0, 1), modality=modality)


@pytest.mark.parametrize("modality", ["CT", "MR", "xray"])
def test_image_whose_axes_were_turned(modality, generator):
    values = torch.rand(1, 3, 4, 5, generator=generator) * 500
    scaled = scale_intensity(values.permute(0, 3, 1, 2), modality=modality)
    assert scaled.is_contiguous()
    assert torch.equal(scaled, scale_intensity(values, modality=modality).permute(0, 3, 1, 2))


@pytest.mark.parametrize("modality", ["CT", "MR", "xray"])
def test_metadata_and_input_are_kept(modality, generator):
    values = torch.rand(1, 3, 4, 5, generator=generator) * 500
    image = MetaTensor(values.clone(), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])), meta={"planar": False})
    scaled = scale_intensity(image, modality=modality)
    assert isinstance(scaled, MetaTensor)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled.affine, image.affine)
    assert scaled.meta["planar"] is False
    assert torch.equal(image.as_tensor(), values)
    assert not isinstance(scale_intensity(values, modality=modality), MetaTensor)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float64, torch.uint8])
@pytest.mark.parametrize("track_meta", [True, False])
def test_any_number_type_becomes_float32(dtype, track_meta):
    values = _case(50, 100, 150).to(dtype)
    scaled = scale_intensity(MetaTensor(values) if track_meta else values, modality="MR")
    assert scaled.dtype == torch.float32
    assert scaled.flatten().tolist() == pytest.approx([0, 127.5, 255], abs=1e-3)


def test_transform_takes_the_modality_of_the_case():
    transform = ScaleIntensityByModalityd(window=(0.0, 200.0))
    data = {"image": _case(-100, 0, 50, 100), "modality": "CT", "case": "a"}
    result = transform(data)
    assert result["image"].flatten().tolist() == pytest.approx([0, 127.5, 191.25, 255])
    assert ScaleIntensityByModalityd(window="lung")(data)["image"].flatten()[1] == pytest.approx(127.5)
    assert data["image"].min() == -100
    assert result["case"] == "a"
    with pytest.raises(InputError, match="got None"):
        transform({"image": _case(0, 1)})


def test_unit_range_is_per_slice_and_joint_over_channels():
    slices = torch.tensor([[[0.0, 2.0]], [[4.0, 8.0]], [[-1.0, 1.0]], [[0.0, 0.5]]]).reshape(2, 2, 1, 2)
    expected = torch.tensor([[[0.0, 0.25]], [[0.5, 1.0]], [[0.0, 1.0]], [[0.5, 0.75]]]).reshape(2, 2, 1, 2)
    assert torch.allclose(unit_range(slices), expected)


def test_unit_range_of_constant_slices_is_0():
    assert unit_range(torch.full((2, 3, 4, 5), 7.0)).abs().max() == 0


def test_unit_range_is_idempotent(generator):
    once = unit_range(torch.rand(3, 3, 8, 9, generator=generator) * 255)
    assert torch.equal(unit_range(once), once)


def test_unit_range_of_no_slices():
    assert unit_range(torch.zeros(0, 1, 4, 4)).shape == (0, 1, 4, 4)
