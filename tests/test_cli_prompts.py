"""Boxes and points on the command line: volumes that lie in many ways, pictures, a published weights file."""

import json
import re

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image

from scripts import cli
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import PUBLISHED_PARTS, save_state_dict
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.model_card import ModelCard

AFFINE = np.array([[-2.0, 0, 0, 30], [0, -3.0, 0, 40], [0, 0, 5.0, -20], [0, 0, 0, 1]])
SHAPE = (40, 28, 6)  # X, Y, Z
BOX = (6, 5, 1, 30, 20, 4)
QUIET = ["--progress_bar", "false"]
TRAINED = {"CT": ["liver", "spleen"], "endoscopy": ["polyp"]}


@pytest.fixture
def run(capsys):
    """Run the command line in this process: exit code and error stream."""

    def run(*words):
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny network with random weights whose card says that it has learned boxes."""
    return write_model(tmp_path_factory.mktemp("model") / "model.pt", boxes_trained=True)


def write_model(path, *, boxes_trained):
    torch.manual_seed(4)
    network = AutoMedSAM(image_encoder="compact", image_size=32, channels=[8, 16, 32], class_ids=[1, 2, 6])
    save_state_dict(network.state_dict(), path)
    training = {"boxes_trained": boxes_trained}
    card = ModelCard(network=network.settings, preprocessing={}, trained=TRAINED, training=training)
    card.write(path.with_suffix(".json"))
    return path


@pytest.fixture
def volume(tmp_path):
    return write_volume(tmp_path / "scan.nii.gz", some_voxels())


def some_voxels():
    coarse = np.random.default_rng(11).uniform(-200, 300, (6, 4, 2))
    grid = torch.nn.functional.interpolate(torch.tensor(coarse)[None, None], size=SHAPE, mode="trilinear")
    return grid[0, 0].numpy().astype(np.int16)


def write_volume(path, voxels, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def label_map(folder, stem="scan"):
    return np.asarray(nibabel.load(folder / f"{stem}_seg.nii.gz").dataobj)


def names_beside(folder):
    return json.loads((folder / "labels.json").read_text())


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SLP", "AIR"])
def test_a_box_gives_the_same_mask_however_the_volume_lies_in_its_file(tmp_path, run, model, axes):
    """The same patient, stored along other axes; the box is written in each file's own pixels."""
    voxels = some_voxels()
    reference = nibabel.Nifti1Image(voxels, AFFINE)
    marked = np.zeros(SHAPE, dtype=np.int16)
    marked[6:31, 5:21, 1:5] = 1
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(axes))
    affine = AFFINE @ inv_ornt_aff(turn, SHAPE)
    turned = write_volume(tmp_path / "scan.nii.gz", nibabel.orientations.apply_orientation(voxels, turn), affine)
    inside = np.argwhere(nibabel.orientations.apply_orientation(marked, turn))
    boxes = [[*inside.min(axis=0).tolist(), *inside.max(axis=0).tolist()]]
    settings = ["--modality", "CT", "--checkpoint", model, *QUIET]
    assert run("infer", turned, "--boxes", boxes, "--output", tmp_path / "out", *settings)[0] == 0
    straight = tmp_path / "straight"
    straight.mkdir()
    nibabel.save(reference, straight / "scan.nii.gz")
    assert (
        run("infer", straight / "scan.nii.gz", "--boxes", [list(BOX)], "--output", tmp_path / "expected", *settings)[0]
        == 0
    )
    expected = nibabel.orientations.apply_orientation(label_map(tmp_path / "expected"), turn)
    assert set(np.unique(expected)) == {0, 201}
    np.testing.assert_array_equal(label_map(tmp_path / "out"), expected)


def test_classes_boxes_and_points_in_one_call(tmp_path, run, volume, model):
    boxes = [{"box": BOX, "name": "pancreas"}, list(BOX)]
    points = [{"points": [[10, 10, 0], [30, 20, 0]], "labels": [1, 0], "name": "left kidney"}]
    words = ["--classes", "liver", "--boxes", boxes, "--points", points, "--modality", "CT"]
    code, _ = run("infer", volume, *words, "--output", tmp_path / "out", "--checkpoint", model, *QUIET)
    assert code == 0
    names = {"0": "background", "1": "liver", "3": "pancreas", "4": "left kidney", "201": "object 1"}
    assert names_beside(tmp_path / "out") == names
    labels = label_map(tmp_path / "out")
    assert not np.isin(labels[..., [0, 5]], [3, 201]).any()  # slices outside of the box
    assert not (labels[..., 1:] == 4).any()


def test_prompts_from_a_file_are_those_of_the_command_line(tmp_path, run, volume, model):
    prompts = {"classes": ["liver"], "boxes": [list(BOX)]}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    settings = ["--modality", "CT", "--checkpoint", model, *QUIET]
    run("infer", volume, "--prompts", tmp_path / "prompts.json", "--output", tmp_path / "a", *settings)
    run("infer", volume, "--classes=liver", "--boxes", [list(BOX)], "--output", tmp_path / "b", *settings)
    np.testing.assert_array_equal(label_map(tmp_path / "a"), label_map(tmp_path / "b"))
    assert set(np.unique(label_map(tmp_path / "a"))) >= {0, 201}


def test_a_picture_has_columns_first(tmp_path, run, model):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    words = ["--boxes", "[30,2,39,10]", "--modality", "endoscopy", "--checkpoint", model, *QUIET]
    assert run("infer", tmp_path / "frame.png", *words, "--output", tmp_path / "out")[0] == 0
    code, error = run(
        "infer", tmp_path / "frame.png", "--boxes", "[2,30,10,39]", *words[2:], "--output", tmp_path / "no"
    )
    assert code == 1
    assert "boxes[0] lies outside of the image: y is 30, and goes from 0 to 27." in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--boxes", "[[1,2,3]]"], r"boxes\[0\].box: a box is"),
        (["--boxes", "[[1,2,3,4"], "Expected prompts as JSON or YAML"),
        (["--points", "[[1,2,3],[1,2]]"], r"points\[0\].points: points are"),
        (["--boxes", "[[1,2,3,4]]"], "has x and y alone, and the image has 6 slices"),
        (["--boxes", "[[1,2,0,40,4,5]]"], "x is 40, and goes from 0 to 39"),
        (["--boxes", "[{box: [1,2,0,4,4,5], name: livr}]"], "Did you mean 'liver'"),
        (["--prompts", "nothing.json"], "nothing.json cannot be read"),
        (["--prompts", "nothing.json", "--classes", "liver"], "give --prompts FILE, or --classes, --boxes"),
        (["--classes", "spleen,hart", "--boxes", "[[1,2,0,4,4,5]]"], "Class 'hart' is unknown"),
        (["--boxes", "[[1,2,0,4,4,5]]", "--runtime", "onnx"], "boxes and points have the runtime torch alone"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(tmp_path, run, volume, model, words, sentence):
    settings = ["--modality", "CT", "--checkpoint", model, "--output", tmp_path / "out", *QUIET]
    code, error = run("infer", volume, *words, *settings)
    last = error.replace("\r", "\n").strip().splitlines()[-1]
    assert code == 1
    assert last.startswith("automedsam: ")
    assert re.search(sentence, last)
    assert not list((tmp_path / "out").glob("*_seg*"))


def test_boxes_are_of_one_image_of_a_folder(tmp_path, run, model):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        write_volume(folder / f"{name}.nii.gz", some_voxels())
    settings = ["--modality", "CT", "--checkpoint", model, "--output", tmp_path / "out", *QUIET]
    code, error = run("infer", folder, "--boxes", [list(BOX)], *settings)
    assert code == 1
    assert "1 of 2 cases failed: b (boxes and points are of one image, and were used for a" in error
    assert (tmp_path / "out" / "a_seg.nii.gz").is_file()


def test_a_model_without_boxes_refuses_them_unless_forced(tmp_path, run, volume):
    plain = write_model(tmp_path / "model.pt", boxes_trained=False)
    words = ["infer", volume, "--boxes", [list(BOX)], "--modality", "CT", "--checkpoint", plain, *QUIET]
    code, error = run(*words, "--output", tmp_path / "out")
    assert code == 1
    assert "This model has learned classes, not boxes and points" in error
    assert run(*words, "--output", tmp_path / "forced", "--force")[0] == 0


def test_hsp_sam_takes_no_boxes(tmp_path, run, volume):
    torch.manual_seed(0)
    settings = {"image_encoder": "compact", "image_size": 64, "class_ids": [1], "train_image_encoder": True}
    network = HSPSAM(**settings)
    save_state_dict(network.state_dict(), tmp_path / "model.pt")
    ModelCard(network=network.settings, preprocessing={}, trained={"CT": ["liver"]}, architecture="hsp_sam").write(
        tmp_path / "model.json"
    )
    words = ["--boxes", [list(BOX)], "--force", "--modality", "CT", "--checkpoint", tmp_path / "model.pt", *QUIET]
    code, error = run("infer", volume, *words, "--output", tmp_path / "out")
    assert code == 1
    assert "leave boxes and points out" in error


class TestPublishedWeights:
    """A file in LiteMedSAM's published layout, which has boxes and no classes, and no card beside it."""

    @pytest.fixture(scope="class")
    @classmethod
    def published(cls, tmp_path_factory):
        torch.manual_seed(1)
        state = AutoMedSAM(image_encoder="lite_medsam").state_dict()
        path = tmp_path_factory.mktemp("published") / "lite_medsam.pth"
        torch.save({name: value for name, value in state.items() if name.startswith(PUBLISHED_PARTS)}, path)
        return path

    def test_it_is_asked_by_boxes_as_it_is(self, tmp_path, run, published):
        """The masks are those of the network that the file holds, called by hand."""
        pixels = np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frame.png")
        words = ["--boxes", "[8,10,40,50]", "--modality", "endoscopy", "--config", "networks/lite_medsam"]
        code, error = run(
            "infer", tmp_path / "frame.png", *words, "--checkpoint", published, "--output", tmp_path, *QUIET
        )
        assert code == 0, error
        network = AutoMedSAM(image_encoder="lite_medsam").eval()
        network.load_state_dict(torch.load(published, weights_only=True), strict=False)
        labels = np.asarray(Image.open(tmp_path / "frame_seg.png"))
        assert labels.shape == (64, 48)
        np.testing.assert_array_equal(labels == 201, mask_by_hand(network, pixels, (8, 10, 40, 50)))

    def test_it_knows_no_class(self, tmp_path, run, published, volume):
        words = ["--config", "networks/lite_medsam", "--checkpoint", published, "--modality", "CT", *QUIET]
        said = "This model knows no class by its name. Ask by boxes or points"
        for asked, answer in ([], said), (["--classes", "liver"], "This model was not trained for 'liver'"):
            code, error = run("infer", volume, *words, *asked, "--output", tmp_path / "out")
            assert code == 1
            assert answer in error

    def test_without_the_overlay_its_card_is_missed(self, tmp_path, run, published, volume):
        code, error = run("infer", volume, "--modality", "CT", "--checkpoint", published, "--output", tmp_path / "out")
        assert code == 1
        assert "lite_medsam.json is missing beside lite_medsam.pth" in error


def mask_by_hand(network, pixels, box):
    """What the network says of a grey picture of 64 rows and 48 columns, which fills the left 192 of 256 columns."""
    grey = torch.from_numpy(pixels.astype(np.float32))[None, None]
    unit = (grey - grey.min()) / (grey.max() - grey.min())
    resized = torch.nn.functional.interpolate(unit, (256, 192), mode="bilinear", align_corners=False, antialias=True)
    resized = (resized - resized.min()) / (resized.max() - resized.min())
    square = torch.nn.functional.pad(resized, (0, 64)).expand(1, 3, -1, -1)
    left, top, right, bottom = box  # four pixels of the square for each of the picture's
    corners = torch.tensor([[[4.0 * left, 4.0 * top, 4.0 * right + 3, 4.0 * bottom + 3]]])
    with torch.no_grad():
        logits, _ = network.decode(network.encode_image(square), network.encode_boxes(corners))
    small = torch.nn.functional.interpolate(logits[..., :192], (64, 48), mode="bilinear", align_corners=False)
    return (small[0, 0] > 0).numpy()
