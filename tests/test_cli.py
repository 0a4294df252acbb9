"""The command line: what a person types, reads and finds in the output folder."""

import copy
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import itk
import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image

from scripts import cli
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import save_state_dict
from scripts.networks.model_card import ModelCard
from scripts.workflow import as_setting

ABDOMEN = ["liver", "spleen", "pancreas", "left kidney", "right kidney"]
CHEST = ["right lung", "left lung", "cardiomediastinum"]
TRAINED = {"CT": ABDOMEN, "endoscopy": ["polyp"], "xray": CHEST}
TINY = ["--image_size", "32", "--channels", "[8,16,32]", "--class_code", "scalar"]
TINY += ["--progress_bar", "false", "--tensorboard", "false"]
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -3.0, 0, 40], [0, 0, 5.0, -20], [0, 0, 0, 1]])
# What a scanner writes about a person, and nobody may find in what the bundle writes.
SECRETS = {
    "0008|0018": "1.2.826.0.1.3680043.2.1125.77001",
    "0008|0050": "ACC-55512",
    "0008|0080": "St Elsewhere Hospital",
    "0008|0090": "REFERRER^RITA",
    "0010|0010": "DOEXAMPLE^JANE",
    "0010|0020": "PID-4711-SECRET",
    "0010|0030": "19610430",
    "0020|000d": "1.2.826.0.1.3680043.2.1125.77002",
    "0020|000e": "1.2.826.0.1.3680043.2.1125.77003",
}


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Run the command line in this process: exit code, output and error stream."""

    def run(*words):
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny network that nobody trained: unlike one trained for a few steps, it finds something everywhere."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    return write_model(path, seed=4)


def write_model(path, *, seed, **settings):
    torch.manual_seed(seed)
    arguments = {"image_encoder": "compact", "image_size": 32, "channels": [8, 16, 32], "class_ids": [*range(1, 11)]}
    network = AutoMedSAM(**{**arguments, **settings})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state_dict(network.state_dict(), path)
    ModelCard(network=network.settings, preprocessing={}, trained=TRAINED).write(path.with_suffix(".json"))
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def smooth(rng, shape):
    """Blobs of -200 to 300 HU: an image that a network has an opinion about."""
    coarse = rng.uniform(-200, 300, [max(2, length // 6) for length in shape])
    grid = torch.nn.functional.interpolate(torch.tensor(coarse)[None, None], size=shape, mode="trilinear")
    return grid[0, 0].numpy().astype(np.int16)


def write_volume(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def write_picture(path, rng, size=(40, 28), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def write_series(folder, voxels, tags=SECRETS, modality="CT"):
    """Write `(Z, Y, X)` as one DICOM file a slice, named so that their order is not the slices' order."""
    folder.mkdir(parents=True)
    for index, pixels in enumerate(voxels):
        image = itk.image_from_array(np.ascontiguousarray(pixels[None]))
        image.SetSpacing([2.0, 3.0, 5.0])
        image.SetOrigin([-30.0, -40.0, -20.0 + 5.0 * index])
        dictionary = image.GetMetaDataDictionary()
        own = {"0008|0018": f"{tags['0008|0018']}.{index}", "0008|0060": modality}
        for tag, value in {**tags, **own}.items():
            dictionary[tag] = value
        image.SetMetaDataDictionary(dictionary)
        codec = itk.GDCMImageIO.New()
        codec.KeepOriginalUIDOn()
        name = folder / f"{(index * 5) % len(voxels)}.dcm"
        itk.ImageFileWriter[type(image)].New(Input=image, FileName=str(name), ImageIO=codec).Update()
    return folder


@pytest.fixture
def volume(tmp_path, rng):
    return write_volume(tmp_path / "in" / "scan.nii.gz", smooth(rng, (40, 28, 6)))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in files(folder)}


def names_beside(folder):
    return json.loads((folder / "labels.json").read_text())


def check_refused(outcome, *texts, output=None):
    """One line on the error stream says what was wrong, and nothing is left behind."""
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("automedsam: ")]
    assert outcome.code == 1
    assert own == lines[-1:], outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for text in texts:
        assert re.search(text, own[0]), own[0]
    if output is not None:
        assert not Path(output).is_dir() or files(output) == []


# ------------------------------------------------------------------------------------------------- the command itself


def call(*command, cwd):
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=settings, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_installed_command_works_in_any_folder(tmp_path, volume, model):
    command = Path(sys.executable).with_name("automedsam")
    line = ["infer", "in/scan.nii.gz", "--classes", "liver,spleen", "--output", "out/", "--checkpoint", model]
    outcome = call(command, *line, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"label maps, names and pictures are in {tmp_path / 'out'}\n"
    assert files(tmp_path / "out") == ["labels.ctbl", "labels.json", "scan_overlay.png", "scan_seg.nii.gz"]
    # Progress bars and the bundle's own words, but nothing that the libraries have to say.
    lines = [line for line in re.split(r"[\r\n]+", outcome.err) if line.strip() and not line.startswith("segmenting")]
    assert lines[-1] == "wrote scan_seg.nii.gz"
    assert not re.search(r"warn|Traceback|\d\d:\d\d:\d\d,\d", "\n".join(lines), re.IGNORECASE), outcome.err


def test_one_bad_file_in_a_folder_does_not_stop_the_others(tmp_path, bundle_root, rng, model):
    folder = tmp_path / "in"
    for name in ("alpha", "gamma"):
        write_volume(folder / f"{name}.nii.gz", smooth(rng, (20, 16, 3)))
    (folder / "beta.nii.gz").write_bytes(b"this is no volume")
    (folder / "notes.txt").write_text("left out")
    output = tmp_path / "out"
    line = ["infer", folder, "--modality", "CT", "--output", output, "--checkpoint", model]
    outcome = call(sys.executable, "-m", "scripts", *line, cwd=bundle_root)
    check_refused(outcome, r"1 of 3 cases failed", r"beta\.nii\.gz: expected a complete \.nii\.gz file")
    assert "alpha" not in outcome.err.splitlines()[-1]
    assert re.search(r"left out: .*notes\.txt", outcome.err)
    assert [name for name in files(output) if "seg" in name] == ["alpha_seg.nii.gz", "gamma_seg.nii.gz"]


# ------------------------------------------------------------------------------------------------------------- infer


@pytest.mark.parametrize("axes", ["LAS", "RPS", "LPI", "AIR"])
def test_label_map_lies_on_the_grid_of_the_file(tmp_path, rng, run, model, axes):
    """However its axes run, the same volume is given the same labels."""
    reference = nibabel.Nifti1Image(smooth(rng, (40, 28, 6)), AFFINE)
    turn = ornt_transform(io_orientation(reference.affine), axcodes2ornt(axes))
    nibabel.save(reference, tmp_path / "reference.nii.gz")
    nibabel.save(reference.as_reoriented(turn), tmp_path / "turned.nii.gz")
    words = ["--classes", "liver,spleen", "--modality", "CT", "--checkpoint", model, "--output", tmp_path]
    assert run("infer", tmp_path / "reference.nii.gz", *words).code == 0
    assert run("infer", tmp_path / "turned.nii.gz", *words).code == 0
    image, labels = (nibabel.load(tmp_path / name) for name in ("turned.nii.gz", "turned_seg.nii.gz"))
    assert labels.shape == image.shape
    assert np.allclose(labels.affine, image.affine)
    assert np.allclose(labels.header.get_zooms(), image.header.get_zooms())
    expected = nibabel.load(tmp_path / "reference_seg.nii.gz").as_reoriented(turn)
    assert np.array_equal(np.asarray(labels.dataobj), np.asarray(expected.dataobj))
    assert len(np.unique(np.asarray(labels.dataobj))) > 1
    assert np.allclose(reference.affine @ inv_ornt_aff(turn, reference.shape), image.affine)


@pytest.mark.parametrize("name", ["frame.png", "frame.jpg", "frame.tif"])
def test_picture_gives_a_png_of_its_size(tmp_path, rng, run, model, name):
    picture = write_picture(tmp_path / name, rng, size=(40, 28))
    output = tmp_path / "out"
    outcome = run("infer", picture, "--modality", "endoscopy", "--output", output, "--checkpoint", model)
    assert outcome.code == 0
    with Image.open(output / "frame_seg.png") as labels:
        assert (labels.size, labels.mode) == ((40, 28), "L")
        assert set(np.unique(labels)) == {0, 6}
    assert names_beside(output) == {"0": "background", "6": "polyp"}


def test_picture_is_not_mirrored_or_turned(tmp_path, rng, run, model):
    """The label map of the same picture in a NIfTI file, whose axes are (column, row), is the transposed one."""
    picture = write_picture(tmp_path / "frame.png", rng, size=(40, 28), mode="L")
    with Image.open(picture) as image:
        pixels = np.asarray(image)
    write_volume(tmp_path / "volume.nii.gz", pixels.T[..., None], np.diag([-1.0, -1.0, 1.0, 1.0]))
    words = ["--classes", "right lung", "--modality", "xray", "--checkpoint", model, "--output", tmp_path]
    assert run("infer", picture, *words).code == 0
    assert run("infer", tmp_path / "volume.nii.gz", *words).code == 0
    in_nifti = np.asarray(nibabel.load(tmp_path / "volume_seg.nii.gz").dataobj)
    with Image.open(tmp_path / "frame_seg.png") as labels:
        assert np.array_equal(np.asarray(labels), in_nifti[:, :, 0].T)
    assert len(np.unique(in_nifti)) > 1


def test_dicom_folder_is_one_volume_and_tells_its_modality(tmp_path, rng, run, model):
    series = write_series(tmp_path / "study", smooth(rng, (6, 28, 40)))
    output = tmp_path / "out"
    assert run("infer", series, "--output", output, "--checkpoint", model).code == 0
    labels = nibabel.load(output / "study_seg.nii.gz")
    assert labels.shape == (40, 28, 6)
    assert np.allclose(labels.affine, AFFINE)
    assert list(names_beside(output).values()) == ["background", *ABDOMEN]


def test_mixed_folder(tmp_path, rng, run, model):
    folder, output = tmp_path / "in", tmp_path / "out"
    write_picture(folder / "a.png", rng, mode="L")
    write_picture(folder / "a.jpg", rng, mode="L", size=(30, 44))
    write_volume(folder / "b.nii", smooth(rng, (20, 16, 3)))
    outcome = run("infer", folder, "--classes", "liver", "--modality", "CT", "--output", output, "--checkpoint", model)
    assert outcome.code == 0
    assert {"a_seg.png", "a_2_seg.png", "b_seg.nii.gz"} <= set(files(output))
    with Image.open(output / "a_seg.png") as first, Image.open(output / "a_2_seg.png") as second:
        assert {first.size, second.size} == {(40, 28), (30, 44)}


@pytest.mark.parametrize("asked", ["liver,spleen", "1,2", "[2, liver]", "Spleen, LIVER", "hepar,2"])
def test_classes_are_names_or_ids(tmp_path, run, volume, model, asked):
    outcome = run("infer", volume, f"--classes={asked}", "--output", tmp_path / "out", "--checkpoint", model)
    assert outcome.code == 0
    assert names_beside(tmp_path / "out") == {"0": "background", "1": "liver", "2": "spleen"}


@pytest.mark.parametrize("asked", ["liver", "1", "liver,"])
def test_single_class(tmp_path, run, volume, model, asked):
    words = ["--classes", asked, "--output", tmp_path / "out", "--checkpoint", model]
    assert run("infer", volume, *words).code == 0
    assert names_beside(tmp_path / "out") == {"0": "background", "1": "liver"}


def test_no_class_means_those_trained_for_the_modality(tmp_path, run, volume, model):
    output = tmp_path / "out"
    assert run("infer", volume, "--modality", "ct", "--output", output, "--checkpoint", model).code == 0
    assert list(names_beside(output).values()) == ["background", *ABDOMEN]


def test_every_value_has_a_name_and_a_colour(tmp_path, run, volume, model):
    output = tmp_path / "out"
    run("infer", volume, "--modality", "CT", "--output", output, "--checkpoint", model)
    values = np.unique(np.asarray(nibabel.load(output / "scan_seg.nii.gz").dataobj))
    rows = [line.split() for line in (output / "labels.ctbl").read_text().splitlines() if not line.startswith("#")]
    assert len(values) > 2
    assert {str(value) for value in values} <= set(names_beside(output)) == {row[0] for row in rows}
    assert {row[1].replace("_", " ") for row in rows} == set(names_beside(output).values())
    with Image.open(output / "scan_overlay.png") as picture:
        assert min(picture.size) > 28


def test_label_map_is_the_most_probable_class(tmp_path, rng, run, model):
    picture, output = write_picture(tmp_path / "chest.png", rng, mode="L"), tmp_path / "out"
    words = ["--modality", "xray", "--probability_maps", "--output", output, "--checkpoint", model]
    assert run("infer", picture, *words).code == 0
    maps = [np.asarray(Image.open(output / f"chest_prob_{name.replace(' ', '_')}.png")) for name in CHEST]
    labels = np.asarray(Image.open(output / "chest_seg.png"))
    highest = np.max(maps, axis=0)
    sure = np.abs(highest.astype(int) - 127.5) > 1  # bytes, rounded
    assert np.array_equal((labels > 0)[sure], (highest > 127)[sure])
    for value in (8, 9, 10):
        own = maps[value - 8][labels == value].astype(int)
        assert (own >= highest[labels == value] - 1).all()
    # Lungs and mediastinum are there unmerged: more than one class claims the same pixel.
    assert (np.sum([single > 128 for single in maps], axis=0) > 1).any()


def test_probability_maps_of_a_volume(tmp_path, run, volume, model):
    output = tmp_path / "out"
    words = ["--classes", "left kidney,liver", "--probability_maps", "--output", output, "--checkpoint", model]
    assert run("infer", volume, *words).code == 0
    image = nibabel.load(volume)
    for name in ("liver", "left_kidney"):
        probability = nibabel.load(output / f"scan_prob_{name}.nii.gz")
        assert probability.shape == image.shape
        assert np.allclose(probability.affine, image.affine)
        assert 0 <= probability.get_fdata().min() < probability.get_fdata().max() <= 1


def test_two_runs_give_the_same_bytes(tmp_path, run, volume, model):
    for name in ("first", "second"):
        words = ["--modality", "CT", "--probability_maps", "--output", tmp_path / name, "--checkpoint", model]
        assert run("infer", volume, *words).code == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_noise_of_the_diffusion_is_drawn_from_its_seed(tmp_path, run, volume, model):
    for name, seed in (("none", "null"), ("first", 1), ("again", 1), ("second", 2)):
        words = ["--classes", "liver", "--probability_maps", "--noise_seed", seed, "--output", tmp_path / name]
        assert run("infer", volume, *words, "--checkpoint", model).code == 0
    maps = {name: (tmp_path / name / "scan_prob_liver.nii.gz").read_bytes() for name in ("none", "first", "second")}
    assert len(set(maps.values())) == 3
    assert contents(tmp_path / "first") == contents(tmp_path / "again")


# ------------------------------------------------------------------------------------------- which classes may be asked


def test_several_draws_of_the_noise_leave_a_map_of_uncertainty(tmp_path, run, volume, model):
    words = ["--classes", "liver,left kidney", "--samples", "3", "--checkpoint", model]
    for name in ("first", "second"):
        assert run("infer", volume, *words, "--output", tmp_path / name).code == 0
    for organ in ("liver", "left_kidney"):
        path = f"scan_uncertainty_{organ}.nii.gz"
        spread = nibabel.load(tmp_path / "first" / path)
        assert spread.shape == nibabel.load(volume).shape
        assert 0 < spread.get_fdata().max() <= 0.5
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes()


def test_unknown_runtime(tmp_path, run, volume, model):
    words = ["--classes", "liver", "--runtime", "tensorflow", "--checkpoint", model, "--output", tmp_path]
    code, _, err = run("infer", volume, *words)
    assert code == 1
    assert "the runtime is one of torch, onnx, not 'tensorflow'" in err


def test_unknown_class_lists_the_known_ones_and_the_nearest(tmp_path, run, volume, model):
    output = tmp_path / "out"
    outcome = run("infer", volume, "--classes", "liver,splen", "--output", output, "--checkpoint", model)
    check_refused(outcome, r"'splen' is unknown", r"Did you mean 'spleen'\?", r"1 liver, 2 spleen, .*15 lung")
    assert not output.exists()


def test_unknown_class_is_reported_once_for_a_folder(tmp_path, rng, run, model):
    for name in ("a", "b"):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", smooth(rng, (20, 16, 3)))
    outcome = run("infer", tmp_path / "in", "--classes", "99", "--output", tmp_path / "out", "--checkpoint", model)
    check_refused(outcome, r"Class id 99 is unknown")
    assert outcome.err.count("99") == 1


@pytest.mark.parametrize("name", ["frame.png", "scan.nii.gz"])
def test_unknown_modality_is_asked_for_in_one_line(tmp_path, rng, run, model, name):
    path = tmp_path / name
    write_picture(path, rng) if name.endswith("png") else write_volume(path, smooth(rng, (20, 16, 3)))
    outcome = run("infer", path, "--output", tmp_path / "out", "--checkpoint", model)
    check_refused(outcome, r"modality is unknown.*give --modality, one of CT, endoscopy, xray", output=tmp_path / "out")


def test_modality_that_does_not_exist(tmp_path, run, volume, model):
    outcome = run("infer", volume, "--modality", "sonar", "--output", tmp_path / "out", "--checkpoint", model)
    check_refused(outcome, r"'sonar' is unknown", r"CT, MR, endoscopy, dermoscopy, xray")


def test_class_that_was_not_trained_in_the_modality(tmp_path, run, volume, model):
    output = tmp_path / "out"
    words = ["infer", volume, "--classes", "liver,polyp", "--modality", "CT", "--output", output, "--checkpoint", model]
    outcome = run(*words)
    check_refused(outcome, r"not trained for 'polyp' in CT", r"CT: liver, .*endoscopy: polyp", r"--force")
    assert not output.exists()
    assert run(*words, "--force").code == 0
    assert list(names_beside(output).values()) == ["background", "liver", "polyp"]


def test_class_not_trained_in_the_modality_that_the_file_tells(tmp_path, rng, run, model):
    series = write_series(tmp_path / "study", smooth(rng, (3, 16, 20)))
    words = ["infer", series, "--classes", "polyp", "--output", tmp_path / "out", "--checkpoint", model]
    check_refused(run(*words), r"not trained for 'polyp' in CT", output=tmp_path / "out")
    assert run(*words, "--force").code == 0


def test_modality_without_any_trained_class(tmp_path, run, volume, model):
    outcome = run("infer", volume, "--modality", "MR", "--output", tmp_path / "out", "--checkpoint", model)
    check_refused(outcome, r"not trained on MR; it knows CT, endoscopy, xray")


# ----------------------------------------------------------------------------------------------------------- bad input


def volume_of(voxels):
    def write(folder, rng):
        return write_volume(folder / "bad.nii.gz", voxels(rng))

    return write


def bytes_of(name, content):
    def write(folder, rng):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def truncated(folder, rng):
    path = write_volume(folder / "bad.nii.gz", smooth(rng, (20, 16, 3)))
    path.write_bytes(path.read_bytes()[:-200])
    return path


def with_one(value):
    def voxels(rng):
        image = smooth(rng, (20, 16, 3)).astype(np.float32)
        image[3, 2, 1] = value
        return image

    return voxels


def channels(count):
    """As NIfTI has them: on a fifth axis."""

    def voxels(rng):
        return np.stack([smooth(rng, (20, 16, 3)) for _ in range(count)], axis=-1)[:, :, :, None]

    return voxels


BAD_INPUTS = {
    "missing": (lambda folder, rng: folder / "bad.nii.gz", r"bad\.nii\.gz: no such file or folder"),
    "empty file": (bytes_of("bad.nii.gz", b""), r"empty file \(0 bytes\)"),
    "garbage": (bytes_of("bad.nii.gz", b"no volume"), r"expected a complete \.nii\.gz file"),
    "garbage picture": (bytes_of("bad.png", b"no picture"), r"expected a complete \.png file"),
    "garbage DICOM": (bytes_of("bad.dcm", b"no slice"), r"bad\.dcm: "),
    "truncated": (truncated, r"expected a complete \.nii\.gz file"),
    "another kind of file": (bytes_of("bad.txt", b"no image"), r"unknown kind of file; expected a DICOM series or"),
    "empty folder": (lambda folder, rng: folder, r"no image in this folder"),
    "NaN": (volume_of(with_one(np.nan)), r"expected finite values, got NaN or infinity in 1 of 960"),
    "infinite": (volume_of(with_one(np.inf)), r"expected finite values, got NaN or infinity in 1 of 960"),
    "constant": (volume_of(lambda rng: np.full((20, 16, 3), 7, np.int16)), r"got the value 7 everywhere"),
    "zero size": (volume_of(lambda rng: np.zeros((20, 0, 3), np.int16)), r"expected .*\(0,\)"),
    "4D": (volume_of(lambda rng: rng.integers(0, 9, (9, 8, 3, 2), dtype=np.int16)), r"expected a 2D image or a 3D"),
    "two channels": (volume_of(channels(2)), r"expected 1 channel \(grey\) or 3 \(RGB\), got 2"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_image(tmp_path, rng, run, model, kind):
    write, reason = BAD_INPUTS[kind]
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    words = ["--modality", "CT", "--output", output, "--checkpoint", model]
    check_refused(run("infer", write(folder, rng), *words), reason, output=output)


def no_model(folder):
    return folder / "gone.pt"


def no_card(folder):
    path = write_model(folder / "model.pt", seed=0)
    path.with_suffix(".json").unlink()
    return path


def no_weights(folder):
    path = write_model(folder / "model.pt", seed=0)
    path.write_bytes(b"these are no weights")
    return path


def code_instead_of_weights(folder):
    path = write_model(folder / "model.pt", seed=0)
    torch.save({"model": Path("x")}, path)
    return path


def other_architecture(folder):
    other = write_model(folder / "other.pt", seed=0, channels=[8, 16, 24])
    other.replace(write_model(folder / "model.pt", seed=0))
    return folder / "model.pt"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_model, r"there is no weights file .*gone\.pt"),
        (no_card, r"model\.json is missing beside model\.pt"),
        (no_weights, r"model\.pt is not a whole PyTorch weights file"),
        (code_instead_of_weights, r"holds a Python object"),
        (other_architecture, r"class_prompt_encoder\.\S+.*\(8?\d"),
    ],
)
def test_bad_checkpoint(tmp_path, run, volume, make, reason):
    words = ["--modality", "CT", "--output", tmp_path / "out", "--checkpoint", make(tmp_path)]
    check_refused(run("infer", volume, *words), reason, output=tmp_path / "out")


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize("verb", ["infer", "train", "evaluate", "phantoms", "demo"])
def test_output_folder_that_cannot_be_written_to(tmp_path, run, volume, model, tiny_phantoms, verb, place):
    (tmp_path / "file").write_text("keep me")
    words = {
        "infer": [volume, "--modality", "CT", "--checkpoint", model],
        "train": [tiny_phantoms, "--from_scratch"],
        "evaluate": [tiny_phantoms, "--checkpoint", model],
        "phantoms": [tmp_path / place],
        "demo": [],
    }[verb]
    words = words if verb == "phantoms" else [*words, "--output", tmp_path / place]
    check_refused(run(verb, *words), r"expected the output path .*file")
    assert (tmp_path / "file").read_text() == "keep me"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_output_folder_without_permission(tmp_path, run, volume, model):
    (tmp_path / "locked").mkdir(mode=0o500)
    words = ["--modality", "CT", "--output", tmp_path / "locked", "--checkpoint", model]
    check_refused(run("infer", volume, *words), r"output folder that can be written to")


def test_full_disk_leaves_nothing_half_written(tmp_path, run, volume, model, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scripts.files.os.replace", fail)
    words = ["--modality", "CT", "--output", tmp_path / "out", "--checkpoint", model]
    check_refused(run("infer", volume, *words), r"No space left on device", output=tmp_path / "out")


# ------------------------------------------------------------------------------------------------ bad labels, datalists


@pytest.fixture
def dataset(tmp_path, rng):
    """A datalist of three volumes of four slices, with a liver and a spleen; `change` edits it in place."""
    label = np.zeros((20, 16, 4), np.uint8)
    label[3:12, 3:12, :3] = 1
    label[12:18, 4:9, 1:] = 2
    entries = []
    for name in ("a", "b", "c"):
        write_volume(tmp_path / "data" / f"{name}.nii.gz", smooth(rng, label.shape))
        write_volume(tmp_path / "data" / f"{name}_label.nii.gz", label)
        image, truth = f"{name}.nii.gz", f"{name}_label.nii.gz"
        entries.append({"case": name, "image": image, "label": truth, "modality": "CT", "patient": f"DOE-{name}"})
    content = {"name": "tiny", "label_map": {"1": "liver", "2": "spleen"}}
    content |= {"training": entries[:1], "validation": entries[1:2], "test": entries[2:]}
    path = tmp_path / "data" / "datalist.json"
    path.write_text(json.dumps(content))
    return path


def change_label(dataset, voxels=None, affine=AFFINE):
    for name in ("a", "c"):
        path = dataset.parent / f"{name}_label.nii.gz"
        write_volume(path, np.asarray(nibabel.load(path).dataobj) if voxels is None else voxels, affine)


def change_datalist(dataset, **changes):
    dataset.write_text(json.dumps({**json.loads(dataset.read_text()), **changes}))


def move(affine):
    moved = affine.copy()
    moved[0, 3] += 1
    return moved


BAD_DATA = {
    "label of another shape": (
        lambda dataset: change_label(dataset, np.ones((20, 16, 3), np.uint8)),
        r"_label\.nii\.gz: expected the image's shape \(20, 16, 4\).*got \(20, 16, 3\)",
    ),
    "label of another affine": (
        lambda dataset: change_label(dataset, affine=move(AFFINE)),
        r"_label\.nii\.gz: expected the image's affine within 0\.001 mm, got one that differs by up to 1\b",
    ),
    "label ids not in the class map": (
        lambda dataset: change_label(dataset, np.full((20, 16, 4), 7, np.uint8)),
        r"_label\.nii\.gz: the label values \[7\] are not in label_map, which knows \[1, 2\]",
    ),
    "missing image": (lambda dataset: (dataset.parent / "b.nii.gz").unlink(), r"b\.nii\.gz, which is missing"),
    "no JSON": (lambda dataset: dataset.write_text("{"), r"is not valid JSON"),
    "no datalist": (lambda dataset: dataset.unlink(), r"datalist\.json cannot be read: No such file"),
    "unknown class": (
        lambda dataset: change_datalist(dataset, label_map={"1": "liver", "2": "splen"}),
        r"'splen' is unknown.*Did you mean 'spleen'",
    ),
}


@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_set(tmp_path, run, dataset, model, kind, verb):
    change, reason = BAD_DATA[kind]
    change(dataset)
    words = {"train": ["--from_scratch", *TINY], "evaluate": ["--checkpoint", model, "--section", "test"]}[verb]
    if (kind, verb) == ("missing image", "evaluate"):
        words[-1] = "validation"
    output = tmp_path / "out"
    check_refused(run(verb, dataset, *words, "--output", output), reason, output=output)


def test_section_that_is_not_there(tmp_path, run, dataset, model):
    words = ["--checkpoint", model, "--section", "holdout", "--output", tmp_path / "out"]
    outcome = run("evaluate", dataset, *words)
    check_refused(outcome, r"no section 'holdout'.*'training', 'validation', 'test'", output=tmp_path / "out")


def test_training_needs_weights_or_from_scratch(tmp_path, run, dataset):
    words = ["--pretrained", "null", *TINY, "--output", tmp_path / "out"]
    check_refused(run("train", dataset, *words), r"frozen.*--from_scratch", output=tmp_path / "out")


@pytest.mark.parametrize(("make", "reason"), [(other_architecture, r"class_prompt_encoder"), (no_model, r"gone\.pt")])
def test_pretrained_weights_that_do_not_fit(tmp_path, run, dataset, make, reason):
    words = ["--pretrained", make(tmp_path), *TINY, "--output", tmp_path / "out"]
    check_refused(run("train", dataset, *words), reason, output=tmp_path / "out")


# ----------------------------------------------------------------------------------------------- words of the command


@pytest.mark.parametrize(
    ("verb", "setting", "near"),
    [("infer", "window_", "window"), ("train", "max_epoch", "max_epochs"), ("evaluate", "presense", "presence")],
)
def test_unknown_setting_names_the_nearest(tmp_path, run, volume, dataset, model, verb, setting, near):
    words = {
        "infer": [volume, "--modality", "CT", "--checkpoint", model],
        "train": [dataset, "--from_scratch"],
        "evaluate": [dataset, "--checkpoint", model],
    }[verb]
    outcome = run(verb, *words, f"--{setting}", 3, "--output", tmp_path / "out")
    check_refused(outcome, rf"no setting '{setting}' .*did you mean '{near}'\?", output=tmp_path / "out")


@pytest.mark.parametrize(
    "words", [["infer", "a.nii", "b.nii"], ["demo", "--outptu", "x"], ["phantoms", "p", "--trainning", "1"]]
)
def test_nothing_runs_where_a_word_has_no_place(tmp_path, run, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    outcome = run(*words)
    assert outcome.code == 2
    assert "Could not consume" in outcome.err
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "words", [["--help"], ["infer", "--help"], ["infer", "scan.nii.gz", "--help"], ["train", "-h"]]
)
def test_help_is_help_wherever_it_stands(run, words):
    outcome = run(*words)
    assert outcome.code == 0
    assert "NAME" in outcome.err
    assert words[0] == "--help" or f"automedsam {words[0]} - " in outcome.err
    assert "FIRE" not in outcome.err


def test_every_verb_is_described(run):
    shown = run("--help").err
    for verb in ("infer", "train", "evaluate", "phantoms", "classes", "half", "demo"):
        assert re.search(rf"^ +{verb}\n +\w.*\.$", shown, re.MULTILINE), verb


@pytest.mark.parametrize("name", ["2024", "2024.10", "1e3", "None", "a,b", "it's", "a@b $c%d#e"])
def test_paths_stay_as_they_are_typed(tmp_path, rng, run, model, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_volume(tmp_path / name / "scan.nii.gz", smooth(rng, (20, 16, 3)))
    assert run("infer", name, "--modality=CT", f"--output=to {name}", "--checkpoint", model).code == 0
    assert "scan_seg.nii.gz" in files(tmp_path / f"to {name}")
    assert run("infer", name, "--modality", "CT", "--output", f"{name}.out", "--checkpoint", model).code == 0
    assert "scan_seg.nii.gz" in files(tmp_path / f"{name}.out")


def test_settings_are_read_as_in_a_config():
    assert as_setting("false", True) is False
    assert as_setting("null", 3) is None
    assert as_setting(6, [1, 2]) == [6]
    assert as_setting((40, 400), [0.0, 1.0]) == [40, 400]
    assert as_setting("liver", None) == "liver"
    assert as_setting("$[1, 2]", [3]) == "$[1, 2]"
    assert as_setting(3, 4) == 3
    assert as_setting("none", None) is None
    assert as_setting("none", "$@bundle_root + '/model.pt'") is None
    assert as_setting("none", "feature_skip") == "none"  # one of the words that this setting may have


def test_nested_settings_of_a_caller_stay_as_they_are(tmp_path, dataset):
    """MONAI writes `::` for `#` in them; a study that runs twice would take them for others."""
    schedule = {
        "_target_": "torch.optim.lr_scheduler.StepLR",
        "optimizer": "@optimizer",
        "step_size": "$len(@train#dataloader)",
    }
    settings = {"lr_scheduler": schedule, "schedule_by_loss": "$lambda engine: ()", "max_epochs": 1, "image_size": 32}
    before = copy.deepcopy(settings)
    cli.train(str(dataset), output=str(tmp_path / "run"), from_scratch=True, progress_bar=False, **settings)
    assert settings == before


def test_interruption(tmp_path, run, volume, model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.engines.inferers.ClassPromptInferer.__call__", interrupt)
    output = tmp_path / "out"
    outcome = run("infer", volume, "--modality", "CT", "--output", output, "--checkpoint", model)
    assert outcome.code == 130
    assert outcome.err.replace("\r", "\n").splitlines()[-1] == "automedsam: interrupted"
    assert files(output) == []


def test_interruption_while_a_file_is_written(tmp_path, run, volume, model, monkeypatch):
    def interrupt(_, path):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.data.writing.nibabel.save", interrupt)
    output = tmp_path / "out"
    assert run("infer", volume, "--modality", "CT", "--output", output, "--checkpoint", model).code == 130
    assert files(output) == ["scan_overlay.png"]


def test_a_defect_keeps_its_traceback(tmp_path, volume, model, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("scripts.engines.inferers.ClassPromptInferer.__call__", fail)
    words = ["infer", str(volume), "--modality=CT", f"--output={tmp_path / 'out'}", f"--checkpoint={model}"]
    with pytest.raises(RuntimeError) as caught:
        cli.main(words)
    assert "ZeroDivisionError" in repr(caught.getrepr(chain=True))


# ------------------------------------------------------------------------------------------------------------- privacy


def readable(path):
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def check_no_secret(secrets, folder, outcome):
    """Look for each text, and for its parts, in every byte that a command left."""
    parts = {part.encode() for secret in secrets for part in [secret, *secret.split("^")]}
    for name in files(folder):
        content = name.encode() + readable(Path(folder) / name)
        assert not [part for part in parts if part.lower() in content.lower()], name
    streams = (outcome.out + outcome.err).encode().lower()
    assert not [part for part in parts if part.lower() in streams]


def test_no_tag_of_a_patient_reaches_any_output(tmp_path, rng, bundle_root, model):
    study = tmp_path / "study"
    for number in (1, 2):
        tags = {**SECRETS, "0020|000e": f"{SECRETS['0020|000e']}.{number}"}
        series = write_series(study / str(number), smooth(rng, (3, 16, 20)), tags)
        for path in series.iterdir():
            path.rename(study / f"{number}_{path.name}")
        series.rmdir()
    planted = (study / "1_0.dcm").read_bytes()
    assert all(secret.encode() in planted for secret in SECRETS.values())
    broken = study / "3_0.dcm"
    broken.write_bytes(planted[: len(planted) // 2])
    output = tmp_path / "out"
    line = ["infer", study, "--probability_maps", "--output", output, "--checkpoint", model]
    outcome = call(sys.executable, "-m", "scripts", *line, cwd=bundle_root)
    assert [name for name in files(output) if "seg" in name]
    check_no_secret(SECRETS.values(), output, outcome)


def test_no_patient_of_a_datalist_reaches_any_report(tmp_path, run, dataset):
    output = tmp_path / "out"
    trained = run("train", dataset, "--from_scratch", *TINY, "--max_epochs", 1, "--output", output)
    assert trained.code == 0
    words = ["--checkpoint", output / "model.pt", "--output", output]
    evaluated = run("evaluate", dataset, *words)
    assert evaluated.code == 0
    check_no_secret(["DOE-a", "DOE-b", "DOE-c"], output, Outcome(0, trained.out + evaluated.out, ""))


# --------------------------------------------------------------------------------------------------------- other verbs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_phantoms):
    """A run of one epoch on phantoms."""
    output = tmp_path_factory.mktemp("run")
    words = ["--from_scratch", *TINY, "--max_epochs", "1", "--output", str(output)]
    cli.main(["train", str(tiny_phantoms), *words])
    return output


def test_training_leaves_model_card_state_and_curves(trained):
    assert files(trained) == ["epochs.csv", "last.pt", "losses.csv", "model.json", "model.pt"]
    card = json.loads((trained / "model.json").read_text())
    assert card["trained"] == {"CT": ABDOMEN}
    assert card["network"]["class_ids"] == [1, 2, 3, 4, 5]
    assert card["training"]["image_encoder_trained"] is True
    assert len((trained / "epochs.csv").read_text().splitlines()) == 2


def test_training_learns_the_classes_of_the_datalist(tmp_path, run, dataset):
    outcome = run("train", dataset, "--from-scratch", *TINY, "--max-epochs", 1, "--output", tmp_path / "out")
    assert outcome.code == 0
    assert str(tmp_path / "out" / "model.pt") in outcome.out
    assert json.loads((tmp_path / "out" / "model.json").read_text())["network"]["class_ids"] == [1, 2]


def test_a_single_class_id_is_a_list_of_one(tmp_path, run, dataset):
    words = ["--from_scratch", *TINY, "--max_epochs", 1, "--class_ids", 2, "--output", tmp_path / "out"]
    assert run("train", dataset, *words).code == 0
    assert json.loads((tmp_path / "out" / "model.json").read_text())["network"]["class_ids"] == [2]


def test_overlays_by_name_and_by_path(tmp_path, run, dataset):
    (tmp_path / "mine.yaml").write_text("max_epochs: 1\ngradient_clipping: 1.0\n")
    words = [f"--config=experiments/from_scratch,{tmp_path / 'mine.yaml'}", *TINY, "--output", tmp_path / "out"]
    assert run("train", dataset, *words).code == 0
    assert (
        len((tmp_path / "out" / "epochs.csv").read_text().splitlines()) == 2
    )  # the head, and one epoch instead of 100


def test_overlay_that_is_not_there(tmp_path, run, dataset):
    outcome = run("train", dataset, "--config", "experiments/nothing", "--output", tmp_path / "out")
    check_refused(outcome, r"no overlay 'experiments/nothing'", output=tmp_path / "out")


def test_training_goes_on_where_it_stopped(tmp_path, run, tiny_phantoms, trained):
    words = ["--from_scratch", *TINY, "--max_epochs", 2, "--resume", trained / "last.pt", "--output", tmp_path / "out"]
    assert run("train", tiny_phantoms, *words).code == 0
    assert [row.split(",")[0] for row in (tmp_path / "out" / "epochs.csv").read_text().splitlines()] == ["epoch", "2"]


def test_loss_that_is_no_number_ends_in_one_line(tmp_path, run, tiny_phantoms):
    words = ["--from_scratch", *TINY, "--max_epochs", 3, "--learning_rate", 1e30, "--output", tmp_path / "out"]
    check_refused(run("train", tiny_phantoms, *words, "--progress_bar", "true"), r"the loss is not finite")
    assert not any("partial" in name for name in files(tmp_path / "out"))


def test_embedding_beforehand_spares_training_and_evaluation_the_encoder(
    tmp_path, run, tiny_phantoms, model, monkeypatch
):
    store = tmp_path / "store"
    same = [*TINY, "--image_encoder", "compact"]
    outcome = run("embed", tiny_phantoms, "--checkpoint", model, "--embeddings", store, *same)
    assert outcome.code == 0
    assert f"train with --embeddings_dir {store}" in outcome.out
    asked = []
    original = AutoMedSAM.encode_image
    monkeypatch.setattr(AutoMedSAM, "encode_image", lambda *words: asked.append(1) or original(*words))
    settings = ["--embeddings_dir", store, "--section", "validation", "--progress_bar", "false"]
    words = ["--checkpoint", model, "--output", tmp_path / "scores", *settings]
    assert run("evaluate", tiny_phantoms, *words).code == 0
    words = ["--pretrained", model, "--output", tmp_path / "run", "--embeddings_dir", store, "--max_epochs", "1", *same]
    assert run("train", tiny_phantoms, *words).code == 0
    assert asked == []


def test_evaluation_prints_what_it_writes(tmp_path, run, tiny_phantoms, model):
    outcome = run("evaluate", tiny_phantoms, "--checkpoint", model, "--output", tmp_path)
    assert outcome.code == 0
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["protocol"] == "all"
    summary = content["units"]["mm"]
    assert set(summary["classes"]) == set(ABDOMEN)
    assert outcome.out.count('Protocol "all"') == 1
    printed = re.search(r"^liver +([\d.]+) +([\d.]+)", outcome.out, re.MULTILINE)
    assert float(printed[1]) == pytest.approx(summary["classes"]["liver"]["dsc"], abs=1e-4)
    assert float(printed[2]) == pytest.approx(summary["classes"]["liver"]["nsd"], abs=1e-4)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(ABDOMEN)


def test_oracle_presence_is_another_protocol(tmp_path, run, tiny_phantoms, model):
    for protocol in ("all", "oracle"):
        words = ["--checkpoint", model, "--presence", protocol, "--output", tmp_path / protocol]
        outcome = run("evaluate", tiny_phantoms, *words)
        assert outcome.code == 0
        assert f'Protocol "{protocol}"' in outcome.out
    scores = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in ("all", "oracle")}
    assert scores["oracle"]["protocol"] == "oracle"
    scores = {name: content["units"]["mm"] for name, content in scores.items()}
    assert scores["oracle"]["mean"]["dsc"] > scores["all"]["mean"]["dsc"]
    assert sum(entry["false_positive_slices"] for entry in scores["oracle"]["classes"].values()) == 0


def test_presence_is_one_of_two(tmp_path, run, tiny_phantoms, model):
    outcome = run("evaluate", tiny_phantoms, "--checkpoint", model, "--presence", "some", "--output", tmp_path / "out")
    check_refused(outcome, r"presence is 'all' or 'oracle', not 'some'", output=tmp_path / "out")


def test_evaluation_survives_one_bad_case(tmp_path, run, tiny_phantoms, model):
    content = json.loads(tiny_phantoms.read_text())
    bad = write_volume(tmp_path / "bad.nii.gz", np.full((8, 8, 3), 5, np.int16))
    content["test"][0]["image"] = str(bad)
    datalist = tmp_path / "datalist.json"
    datalist.write_text(json.dumps(content))
    words = ["--dataset_dir", tiny_phantoms.parent, "--checkpoint", model, "--output", tmp_path / "out"]
    outcome = run("evaluate", datalist, *words)
    check_refused(outcome, r"1 of 2 cases failed", content["test"][0]["case"])
    rows = (tmp_path / "out" / "metrics.csv").read_text()
    assert content["test"][1]["case"] in rows
    assert content["test"][0]["case"] not in rows


def test_half_precision_is_half_the_file_and_still_segments(tmp_path, run, volume, model):
    smaller = tmp_path / "small" / "model.pt"
    assert run("half", model, "--output", smaller).out == f"wrote {smaller}\n"
    assert smaller.stat().st_size < 0.65 * model.stat().st_size
    assert smaller.with_suffix(".json").read_text() == model.with_suffix(".json").read_text()
    for name, checkpoint in (("full", model), ("half", smaller)):
        words = ["--classes=liver", "--probability_maps", "--checkpoint", checkpoint, "--output", tmp_path / name]
        assert run("infer", volume, *words).code == 0
    full, half = (nibabel.load(tmp_path / name / "scan_prob_liver.nii.gz").get_fdata() for name in ("full", "half"))
    assert 0 < np.abs(full - half).max() < 0.01


def test_half_of_nothing(tmp_path, run):
    outcome = run("half", tmp_path / "gone.pt", "--output", tmp_path / "out" / "half.pt")
    check_refused(outcome, r"gone\.json is missing", output=tmp_path / "out")


def test_phantoms_are_written_where_asked(tmp_path, run):
    words = ["--training", 1, "--validation", 1, "--test", 1, "--size", 32, "--slices", 12]
    outcome = run("phantoms", tmp_path / "here", *words)
    assert outcome.out == f"the datalist is {tmp_path / 'here' / 'datalist.json'}\n"
    assert len(files(tmp_path / "here")) == 7


def test_classes_of_the_vocabulary_and_of_the_shipped_model(run):
    outcome = run("classes")
    assert outcome.code == 0
    assert re.search(r"^ +1 +liver +occurs in CT, MR; known in CT, MR$", outcome.out, re.MULTILINE)
    assert re.search(r"^ +3 +pancreas +occurs in CT, MR; not known to the shipped model$", outcome.out, re.MULTILINE)


def test_a_reader_that_has_seen_enough_is_no_defect(bundle_root):
    words = [sys.executable, "-m", "scripts", "classes"]
    with subprocess.Popen(words, cwd=bundle_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        complaint = process.stderr.read().decode()
        process.wait()
    assert "Traceback" not in complaint
    assert "BrokenPipe" not in complaint
