"""From logits to files: nothing may move between the network's answer and the voxels of the input."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import SaveImaged
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from scripts.data.vocabulary import Vocabulary
from scripts.engines.postprocessing import (
    LogitsToLabelMapd,
    LogitsToMasksd,
    SaveImageOverlayd,
    SaveImageSegmentationd,
    probabilities,
)
from scripts.errors import ConfigError, OutputError

SURE = 4.0  # a logit
IDS = [1, 3, 5]
DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture
def there_and_back(bundle_root, tmp_path):
    """The transforms before and after the network, as configs/inference.json has them, writing to tmp_path/out."""

    def build(**settings):
        parser = ConfigParser()
        parser.read_config(bundle_root / "configs" / "inference.json")
        parser.update({"bundle_root": str(bundle_root), "output_dir": str(tmp_path / "out"), **settings})
        return parser.get_parsed_content("preprocessing"), parser.get_parsed_content("postprocessing")

    return build


def logits_of(labels, class_ids=IDS):
    """Sure and right logits (K, H, W, D) of a label map (H, W, D), as plain tensors, which is what the engine gives."""
    masks = np.stack([labels == class_id for class_id in class_ids])
    return torch.from_numpy(np.where(masks, SURE, -SURE).astype(np.float32))


def test_masks_keep_overlaps_and_begin_above_one_half():
    logits = torch.tensor([[-9.0, 0.0, 1e-6, 9.0], [9.0, 9.0, -1e-6, 1.0]]).reshape(2, 1, 4, 1)
    data = {"pred": logits, "other": logits}
    result = LogitsToMasksd("pred")(data)
    assert result["pred"].dtype == torch.bool
    assert result["pred"].flatten(1).tolist() == [[False, False, True, True], [True, True, False, True]]
    assert result["other"] is logits
    assert data["pred"] is logits


def test_masks_are_plain_tensors():
    assert type(LogitsToMasksd("pred")({"pred": MetaTensor(torch.zeros(1, 2, 2, 1))})["pred"]) is torch.Tensor


def test_the_more_probable_class_wins_and_below_one_half_is_nothing():
    #                        none   one   other  both  both  border  not asked for
    logits = torch.tensor([[-0.1, 0.5, -3.0, 2.0, 1.0, 0.0, -1e4], [-2.0, -9.0, 0.2, 1.0, 1.5, -1.0, -1e4]])
    data = {"pred": logits.reshape(2, 1, 7, 1), "class_ids": [4, 10]}
    result = LogitsToLabelMapd()(data)
    assert result["pred"].shape == (1, 1, 7, 1)
    assert result["pred"].dtype == torch.uint8
    assert result["pred"].flatten().tolist() == [0, 4, 10, 4, 10, 0, 0]
    assert torch.equal(data["pred"].flatten(1), logits)
    assert "logits" not in result


def test_the_logits_go_on_where_they_are_wanted():
    logits = torch.randn((2, 3, 4, 2), generator=torch.Generator().manual_seed(0)).half()
    result = LogitsToLabelMapd(keep_logits=True)({"pred": logits, "class_ids": [2, 3]})
    assert torch.equal(result["logits"].as_tensor(), logits)
    assert isinstance(result["logits"], MetaTensor)


def test_probabilities_are_in_full_precision_class_by_class():
    logits = torch.tensor([[0.01, -2.0], [9.0, -1e4]]).half().reshape(2, 2, 1, 1)
    maps = list(probabilities(logits))
    assert [values.dtype for values in maps] == [np.float32] * 2
    expected = 1 / (1 + np.exp(-logits.double().numpy()))
    assert np.allclose(np.stack(maps), expected, atol=1e-7)


def test_each_slice_of_a_volume_has_its_own_competition():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((3, 5, 4, 6), generator=generator)
    expected = torch.where(logits.amax(0) > 0, torch.tensor(IDS)[logits.argmax(0)], 0)
    assert torch.equal(LogitsToLabelMapd()({"pred": logits, "class_ids": IDS})["pred"][0].long(), expected)


def two_islands():
    """Logits (2, 6, 8, 1): class 4 on 3 and on 12 pixels, and under the small island class 10, less probable."""
    logits = torch.full((2, 6, 8, 1), -SURE)
    logits[0, 0, :3] = SURE
    logits[0, 2:6, 5:8] = SURE
    logits[1, :2, :4] = SURE / 2
    return logits


@pytest.mark.parametrize("smallest", [(0, 0), (1000, 0), (0, 3)])
def test_islands_stay_that_are_large_enough(smallest):
    data = {"pred": two_islands(), "class_ids": [4, 10]}
    labels = LogitsToLabelMapd(smallest=smallest)(data)["pred"][0, ..., 0]
    assert torch.equal(labels, LogitsToLabelMapd()(data)["pred"][0, ..., 0])
    assert (labels[0, :4].tolist(), labels.count_nonzero()) == ([4, 4, 4, 10], 3 + 12 + 5)


def test_what_lies_under_a_small_island_comes_to_light():
    result = LogitsToLabelMapd(smallest=(0, 4), keep_logits=True)({"pred": two_islands(), "class_ids": [4, 10]})
    labels = result["pred"][0, ..., 0]
    assert labels[:2, :4].unique().tolist() == [10]
    assert labels[2:6, 5:8].unique().tolist() == [4]
    assert labels.count_nonzero() == 8 + 12
    assert torch.equal(result["logits"].as_tensor(), two_islands())


def test_islands_are_counted_in_space_too():
    logits = torch.full((1, 4, 4, 3), -SURE)
    logits[0, 0, 0] = SURE  # a column of 3 voxels
    logits[0, 3, 3, 0] = SURE  # a voxel
    labels = LogitsToLabelMapd(smallest=(2, 0))({"pred": logits, "class_ids": [7]})["pred"]
    assert (labels[0, 0, 0].tolist(), labels.count_nonzero()) == ([7, 7, 7], 3)


def test_a_smallest_island_that_is_no_pair_of_sizes():
    with pytest.raises(ConfigError, match="two whole numbers of 0 or more"):
        LogitsToLabelMapd(smallest=(1000,))


def blobs(shape, *, seed=0):
    """Labels without any symmetry: a block of each class, and single voxels of each at random places."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.uint8)
    for number, class_id in enumerate(IDS):
        start = [rng.integers(0, max(1, side - side // 3)) for side in shape]
        labels[tuple(slice(low, low + max(1, side // 3)) for low, side in zip(start, shape, strict=True))] = class_id
        labels[tuple(rng.integers(0, side, size=3 + number) for side in shape)] = class_id
    assert set(np.unique(labels)) == {0, *IDS}
    return labels


def write_volume(path, shape, codes, spacing=(0.7, 1.1, 2.5)):
    """A CT volume whose axes run as the codes say, with voxels of unequal edges."""
    affine = np.eye(4)
    for axis, (code, edge) in enumerate(zip(codes, spacing, strict=True)):
        affine[:3, axis] = edge * np.array(DIRECTIONS[code])
    affine[:3, 3] = (-31.0, 17.5, 240.25)
    hu = np.random.default_rng(1).integers(-900, 900, shape).astype(np.int16)
    volume = nibabel.Nifti1Image(hu, affine)
    volume.header.set_xyzt_units("mm")
    nibabel.save(volume, path)
    return nibabel.load(path).affine


def for_display(labels, affine):
    """Bring file axes to rows towards posterior, columns towards left, slices towards superior, by nibabel alone."""
    return apply_orientation(labels, ornt_transform(io_orientation(affine), axcodes2ornt(("P", "L", "S"))))


@pytest.mark.parametrize(
    ("codes", "depth"), [(codes, 6) for codes in ("LPS", "RAS", "LAI", "RPS", "PSR", "SLA", "IRP")] + [("RAS", 1)]
)
def test_volumes_come_back_to_their_own_voxels(there_and_back, tmp_path, codes, depth):
    labels = blobs((9, 14, depth))
    affine = write_volume(tmp_path / "scan.nii.gz", labels.shape, codes)
    before, after = there_and_back(probability_maps=True)
    case = before({"case": "scan", "image": str(tmp_path / "scan.nii.gz"), "modality": "CT"}) | {"class_ids": IDS}
    case["pred"] = logits_of(for_display(labels, affine))
    assert case["pred"].shape[1:] == case["image"].shape[1:]
    after(case)
    written = nibabel.load(tmp_path / "out" / "scan_seg.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), labels)
    assert np.allclose(written.affine, affine, atol=1e-4)
    assert nibabel.aff2axcodes(written.affine) == tuple(codes)
    for class_id, name in zip(IDS, ("liver", "pancreas", "right_kidney"), strict=True):
        probability = nibabel.load(tmp_path / "out" / f"scan_prob_{name}.nii.gz")
        assert np.allclose(probability.get_fdata(), 1 / (1 + np.exp(np.where(labels == class_id, -SURE, SURE))))
        assert np.allclose(probability.affine, affine, atol=1e-4)


def test_overlapping_classes_stay_apart_in_the_probability_maps(there_and_back, tmp_path):
    write_volume(tmp_path / "scan.nii.gz", (5, 6, 4), "RAS")
    before, after = there_and_back(probability_maps=True, classes="liver, pancreas", force=True)
    case = before({"case": "scan", "image": str(tmp_path / "scan.nii.gz"), "modality": "CT"})
    assert case["class_ids"] == [1, 3]
    after({**case, "pred": torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 6, 5, 4)})
    liver, pancreas = (
        nibabel.load(tmp_path / "out" / f"scan_prob_{name}.nii.gz").get_fdata() for name in ("liver", "pancreas")
    )
    assert (liver.min(), pancreas.min()) == pytest.approx((0.7311, 0.8808), abs=1e-4)
    assert np.unique(nibabel.load(tmp_path / "out" / "scan_seg.nii.gz").dataobj) == [3]


def test_no_probability_maps_unless_asked_for(there_and_back, tmp_path):
    write_volume(tmp_path / "scan.nii.gz", (5, 6, 4), "LPS")
    before, after = there_and_back()
    case = before({"case": "scan", "image": str(tmp_path / "scan.nii.gz"), "modality": "CT"})
    after({**case, "pred": torch.zeros(5, 6, 5, 4)})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "labels.ctbl",
        "labels.json",
        "scan_overlay.png",
        "scan_seg.nii.gz",
    ]


def test_uncertainties_come_back_to_their_own_voxels(there_and_back, tmp_path):
    labels = blobs((9, 14, 6))
    affine = write_volume(tmp_path / "scan.nii.gz", labels.shape, "RPS")
    before, after = there_and_back()
    case = before({"case": "scan", "image": str(tmp_path / "scan.nii.gz"), "modality": "CT"}) | {"class_ids": IDS}
    shown = for_display(labels, affine)
    masks = np.stack([shown == class_id for class_id in IDS])
    uncertainty = torch.from_numpy(np.where(masks, 0.5, 0.125)).half()
    after({**case, "pred": logits_of(shown), "uncertainty": uncertainty})
    for class_id, name in zip(IDS, ("liver", "pancreas", "right_kidney"), strict=True):
        written = nibabel.load(tmp_path / "out" / f"scan_uncertainty_{name}.nii.gz")
        assert np.array_equal(written.get_fdata(), np.where(labels == class_id, 0.5, 0.125))
        assert np.allclose(written.affine, affine, atol=1e-4)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_come_back_pixel_by_pixel(there_and_back, tmp_path, mode):
    labels = blobs((11, 17, 1))  # rows, columns
    pixels = np.random.default_rng(2).integers(0, 256, (11, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "frame.png")
    before, after = there_and_back(trained={"endoscopy": ["polyp"]}, probability_maps=True)
    case = before({"case": "frame", "image": str(tmp_path / "frame.png"), "modality": "endoscopy"})
    assert case["class_ids"] == [6]
    if mode == "RGB":
        assert np.array_equal(case["image"][..., 0].permute(1, 2, 0), pixels)
    polyp = labels.astype(bool) * np.uint8(6)
    after({**case, "pred": logits_of(polyp, [6])})
    written = Image.open(tmp_path / "out" / "frame_seg.png")
    assert (written.size, written.mode) == ((17, 11), "L")
    assert np.array_equal(written, polyp[..., 0])
    probability = np.asarray(Image.open(tmp_path / "out" / "frame_prob_polyp.png"))
    assert np.array_equal(probability >= 128, polyp[..., 0] > 0)


def test_stacks_of_pictures_become_one_volume_of_their_own_pixels(there_and_back, tmp_path):
    labels, files = blobs((8, 12, 3)), []
    for number in range(3):
        files.append(str(tmp_path / f"s{number}.png"))
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 12), dtype=np.uint8)).save(files[-1])
    before, after = there_and_back()
    case = before({"case": "stack", "image": files, "modality": "CT"}) | {"class_ids": IDS}
    after({**case, "pred": logits_of(labels)})
    written = np.asarray(nibabel.load(tmp_path / "out" / "stack_seg.nii.gz").dataobj)
    assert np.array_equal(written, labels.transpose(1, 0, 2))  # (row, column, slice) -> (X, Y, Z)


@pytest.fixture
def picture_case():
    """A black picture of 32 x 48 with a liver in its upper left part and a spleen on the right."""
    image = MetaTensor(torch.zeros(3, 32, 48, 1), meta={"original_affine": np.eye(4), "planar": True, "picture": True})
    labels = torch.zeros((1, 32, 48, 1), dtype=torch.uint8)
    labels[0, 4:10, 6:20] = 1
    labels[0, 20:28, 40:46] = 2
    return {"case": "p", "image": image, "pred": labels, "class_ids": [1, 2]}


def test_the_overlay_shows_the_prediction_where_it_is(vocabulary, picture_case, tmp_path):
    result = SaveImageOverlayd(vocabulary, output_dir=tmp_path / "out")(picture_case)
    assert result == picture_case
    picture = np.asarray(Image.open(tmp_path / "out" / "p_overlay.png"))
    panel = picture[: int(picture.shape[0] * 0.8)]  # the legend with its swatches lies below
    factor = 6  # from a longest side of 48 to the smallest panel's 256 or more
    corners = []
    for class_id, height, width in ((1, 6, 14), (2, 8, 6)):
        rows, columns = np.nonzero((panel == vocabulary.entry(class_id).colour).all(axis=2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height * factor, width * factor)
        corners.append((rows.min(), columns.min()))
    assert np.array_equal(np.diff(corners, axis=0), [[16 * factor, 34 * factor]])
    assert corners[0][1] < 8 * factor


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR"])
def test_the_overlay_shows_the_patient_from_below_face_up(there_and_back, vocabulary, tmp_path, codes):
    """A liver in the right front of the patient is in the upper left of the picture, however the file is stored."""
    shape = (24, 24, 24)
    affine = write_volume(tmp_path / "scan.nii.gz", shape, codes, spacing=(1, 1, 1))
    display = np.zeros(shape, dtype=np.uint8)
    display[3:9, 3:9, 20] = 1  # rows from front to back, columns from the patient's right to the left
    before, after = there_and_back()
    case = before({"case": "scan", "image": str(tmp_path / "scan.nii.gz"), "modality": "CT"})
    after({**case, "pred": logits_of(display, case["class_ids"])})
    written = nibabel.load(tmp_path / "out" / "scan_seg.nii.gz")
    voxels = np.argwhere(np.asarray(written.dataobj))
    middle = nibabel.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    towards = nibabel.affines.apply_affine(written.affine, voxels).mean(axis=0) - middle
    assert (towards > 0).all()  # right, anterior and superior
    picture = np.asarray(Image.open(tmp_path / "out" / "scan_overlay.png"))
    rows, columns = np.nonzero((picture == vocabulary.entry(1).colour).all(axis=2))
    panel = rows < picture.shape[0] * 0.75
    assert rows[panel].mean() < picture.shape[0] / 2
    assert columns[panel].mean() < picture.shape[1] / 2


def test_files_are_written_in_the_axes_of_the_file(vocabulary, picture_case, tmp_path):
    picture_case["pred"] = picture_case["pred"].transpose(1, 2)  # as Invertd leaves it: (1, X, Y, Z)
    result = SaveImageSegmentationd(vocabulary, output_dir=tmp_path / "new" / "out")(picture_case)
    assert result == picture_case
    written = np.asarray(Image.open(tmp_path / "new" / "out" / "p_seg.png"))
    assert np.array_equal(written, picture_case["pred"][0, ..., 0].T)


def test_names_and_colours_hold_for_every_case_of_the_folder(vocabulary, picture_case, tmp_path):
    save = SaveImageSegmentationd(vocabulary, output_dir=tmp_path)
    save(picture_case)
    save({**picture_case, "case": "q", "class_ids": [3]})
    assert json.loads((tmp_path / "labels.json").read_text()) == {
        "0": "background",
        "1": "liver",
        "2": "spleen",
        "3": "pancreas",
    }
    assert [line.split()[0] for line in (tmp_path / "labels.ctbl").read_text().splitlines()[2:]] == ["0", "1", "2", "3"]
    assert (tmp_path / "p_seg.png").exists()
    assert (tmp_path / "q_seg.png").exists()


@pytest.mark.parametrize("transform", [SaveImageOverlayd, SaveImageSegmentationd])
def test_a_place_that_is_no_folder_is_refused(vocabulary, picture_case, tmp_path, transform):
    place = Path(tmp_path / "file")
    place.write_text("in the way")
    with pytest.raises(OutputError, match="to be a folder"):
        transform(vocabulary, output_dir=place)(picture_case)


@pytest.mark.parametrize("transform", [SaveImageOverlayd, SaveImageSegmentationd])
def test_programs_that_write_by_themselves_know_what_to_leave_out(vocabulary, tmp_path, transform):
    assert isinstance(transform(vocabulary, output_dir=tmp_path), SaveImaged), "as MONAI Label asks"
    assert "SaveImage" in transform.__name__, "as MONAI Deploy asks"


# Classes that exclude one another


def test_exclusive_masks_are_those_of_the_label_map():
    #                        none   one   other  both  equal  border
    logits = torch.tensor([[-0.1, 0.5, -3.0, 2.0, 1.0, 0.0], [-2.0, -9.0, 0.2, 1.0, 1.0, -1.0]])
    data = {"pred": logits.reshape(2, 1, 6, 1), "class_ids": [4, 10]}
    masks = LogitsToMasksd("pred", exclusive=True)(data)["pred"]
    assert masks.flatten(1).tolist() == [
        [False, True, False, True, True, False],
        [False, False, True, False, False, False],
    ]
    labels = LogitsToLabelMapd()(data)["pred"]
    assert torch.equal((masks * torch.tensor([4, 10]).reshape(2, 1, 1, 1)).sum(dim=0), labels[0])


def test_exclusive_probabilities_are_a_softmax_with_the_background(generator):
    logits = torch.randn((3, 4, 5, 2), generator=generator)
    expected = torch.cat((torch.zeros(1, 4, 5, 2), logits)).softmax(dim=0)[1:]
    found = np.stack(list(probabilities(logits.half(), exclusive=True)))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)
    assert found.dtype == np.float32
