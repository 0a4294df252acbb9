"""Folders of label maps against each other: what is paired, what is refused, and that the scores are right."""

import csv
import json
import re
from dataclasses import astuple, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from scripts import cli
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError
from scripts.metrics.scores import score_case
from scripts.report.tables import read_scores_csv
from scripts.scoring_files import Request, find_masks, read_label_names, read_patients, score_files, score_folders

SPACING = (0.8, 1.2, 3.0)
SHAPE = (20, 16, 6)
AFFINE = np.diag([-0.8, -1.2, 3.0, 1.0])  # x to the left, y to the back, z to the head


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture
def folders(tmp_path):
    """Empty folders of predictions and truth."""
    for name in ("predictions", "truth"):
        (tmp_path / name).mkdir()
    return tmp_path / "predictions", tmp_path / "truth"


def labels_of(seed, shape=SHAPE):
    """Two boxes of 4 and 5, (x, y, z)."""
    generator = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for value, (x, y) in ((4, generator.integers(1, 5, 2)), (5, generator.integers(9, 12, 2))):
        labels[x : x + 6, y : y + 4, 1:5] = value
    return labels


def write(path, labels, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(labels, affine), path)
    return path


def write_pair(folders, case, seed=0, **changes):
    """Write a truth, and a prediction that is moved along x."""
    labels = labels_of(seed)
    write(folders[1] / f"{case}.nii.gz", labels)
    write(folders[0] / f"{case}_seg.nii.gz", np.roll(labels, 1, axis=0), **changes)
    return labels


def by_hand(case, prediction, truth, values=(4, 5), names=("value_4", "value_5"), **changes):
    """The scores in the file's own axes (x, y, z), of which y is the row and x the column."""
    masks = [np.stack([labels.transpose(1, 0, 2) == value for value in values]) for labels in (prediction, truth)]
    place = {"case": case, "class_ids": values, "class_names": names}
    spacing = (SPACING[1], SPACING[0], SPACING[2])
    return score_case(*masks, **({"spacing": spacing, "planar": False} | place | changes))


def same(found, expected):
    """Whether scores agree, but for the float32 of the spacing in a header."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for value, wanted in zip(astuple(one), astuple(other), strict=True):
            number = isinstance(wanted, float)
            assert value == (pytest.approx(wanted, rel=1e-6, nan_ok=True) if number else wanted)
    return True


def run(*words):
    cli.main([str(word) for word in words])


def score(folders, output, *words):
    predictions, truth = folders
    run("score", "--predictions", predictions, "--truth", truth, "--output", output, "--progress_bar", "false", *words)


def test_scores_are_those_of_the_masks(folders, vocabulary):
    pairs = {case: write_pair(folders, case, seed) for seed, case in enumerate(("b", "a"))}
    scored = score_files(*folders, vocabulary=vocabulary, tolerance=1.0)
    expected = [
        score
        for case in ("a", "b")
        for score in by_hand(case, np.roll(pairs[case], 1, axis=0), pairs[case], tolerance=1.0)
    ]
    assert same(scored.scores, expected)
    assert 0 < expected[0].dsc < 1
    assert score_files(*folders, vocabulary=vocabulary, tolerance=0.1).scores[0].nsd < 1
    assert scored.failures == {}


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SLA"])
def test_other_axes_with_their_affine_are_the_same_voxels(folders, vocabulary, codes):
    truth = labels_of(3)
    write(folders[1] / "a.nii.gz", truth)
    moved = nibabel.Nifti1Image(np.roll(truth, 1, axis=0), AFFINE)
    there = nibabel.orientations.axcodes2ornt(codes)
    turned = moved.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(AFFINE), there))
    nibabel.save(turned, folders[0] / "a_seg.nii.gz")
    found = score_files(*folders, vocabulary=vocabulary).scores
    assert same(found, by_hand("a", np.roll(truth, 1, axis=0), truth))


def test_pictures_are_measured_in_pixels(folders, vocabulary):
    truth = labels_of(1)[:, :, 2].T  # (row, column)
    for folder, labels in zip(folders, (np.roll(truth, 3, axis=0), truth), strict=True):
        Image.fromarray(labels).save(folder / "a.png")
    found = score_files(*folders, vocabulary=vocabulary).scores
    flat = [labels.T[..., None] for labels in (np.roll(truth, 3, axis=0), truth)]
    assert same(found, by_hand("a", *flat, spacing=None, planar=True))
    assert {entry.unit for entry in found} == {"px"}


def test_names_and_sides_come_from_labels_and_vocabulary(folders, vocabulary, tmp_path):
    labels = write_pair(folders, "a")
    names = {"0": "background", "4": "L. kidney", "5": "Right_Kidney", "9": "own class"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    found = score_files(*folders, vocabulary=vocabulary, labels=tmp_path / "names.json").scores
    assert [(entry.class_name, entry.class_id) for entry in found] == [
        ("left kidney", 4),
        ("right kidney", 5),
        ("own class", 9),
    ]
    swapped = [entry.swapped_voxels for entry in found]
    predicted = np.roll(labels, 1, axis=0)
    assert swapped == [
        int(((predicted == 4) & (labels == 5)).sum()),
        int(((predicted == 5) & (labels == 4)).sum()),
        None,
    ]
    assert found[2].absent_slices == SHAPE[2]


def test_swapped_sides_are_seen(folders, vocabulary, tmp_path):
    labels = labels_of(0)
    write(folders[1] / "a.nii.gz", labels)
    write(folders[0] / "a.nii.gz", np.choose(labels, [0, 0, 0, 0, 5, 4]).astype(np.uint8))
    (tmp_path / "names.json").write_text(json.dumps({"4": "left kidney", "5": "right kidney"}))
    found = score_files(*folders, vocabulary=vocabulary, labels=tmp_path / "names.json").scores
    assert [entry.swapped_share for entry in found] == [1.0, 1.0]
    assert [entry.dsc for entry in found] == [0.0, 0.0]


def test_several_values_of_one_name_are_one_class(folders, vocabulary, tmp_path):
    labels = write_pair(folders, "a")
    (tmp_path / "names.json").write_text(json.dumps({"4": "kidneys", "5": "kidneys"}))
    (found,) = score_files(*folders, vocabulary=vocabulary, labels=tmp_path / "names.json").scores
    whole = (np.roll(labels, 1, axis=0) > 0).astype(np.uint8)
    assert same([found], by_hand("a", whole * 4, (labels > 0) * 4, values=(4,), names=("kidneys",)))


def test_labels_beside_the_predictions_are_taken(folders, vocabulary):
    write_pair(folders, "a")
    (folders[0] / "labels.json").write_text(json.dumps({"0": "background", "4": "liver", "5": None}))
    assert [entry.class_name for entry in score_files(*folders, vocabulary=vocabulary).scores] == ["liver"]


def test_cases_belong_to_patients(folders, vocabulary, tmp_path):
    for case in ("a", "b", "c"):
        write_pair(folders, case)
    (tmp_path / "patients.csv").write_text("case,patient\na,p\nb,p\nelsewhere,q\n")
    found = score_files(*folders, vocabulary=vocabulary, patients=tmp_path / "patients.csv").scores
    assert [entry.patient for entry in found[::2]] == ["a", "a", "c"]


@pytest.mark.parametrize(
    ("names", "cases"),
    [
        (["a_seg.png", "b_GT.png", "c_mask.nii.gz", "d.png"], {"a": 1, "b": 1, "c": 1, "d": 1}),
        (["a_seg.png", "a_overlay.png", "a.png", "a_prob_liver.png", "ab.png"], {"a": 1, "ab": 1}),
        (["a_seg.png", "a_gt.png"], {"a": 2}),
        (["seg.png", "a_segment.png"], {"seg": 1, "a_segment": 1}),
    ],
)
def test_files_are_named_after_their_cases(tmp_path, names, cases):
    for name in names:
        (tmp_path / name).write_bytes(b"not looked into")
    assert {case: len(files) for case, files in find_masks(tmp_path).items()} == cases


def spoil(kind, folders):
    """Make the files of the case `bad` wrong."""
    predictions, truth = folders
    labels = write_pair(folders, "bad", seed=5)
    path = predictions / "bad_seg.nii.gz"
    if kind == "no truth":
        (truth / "bad.nii.gz").unlink()
    elif kind == "no prediction":
        path.unlink()
    elif kind == "two predictions":
        write(predictions / "bad_pred.nii.gz", labels)
    elif kind == "another grid":
        write(path, labels[:-1])
    elif kind == "swapped axes":
        write(path, np.ascontiguousarray(labels.transpose(2, 1, 0)))
    elif kind == "another affine":
        write(path, labels, AFFINE + np.diag([0, 0, 0.5, 0]))
    elif kind.startswith("unknown ids"):
        write(truth / "bad.nii.gz" if kind.endswith("truth") else path, labels + (labels > 0) * np.uint8(3))
    elif kind == "fractions":
        write(path, labels * np.float32(0.5) + np.float32(0.1))
    elif kind == "damaged":
        path.write_bytes(path.read_bytes()[:100])


BAD = [
    ("no truth", "prediction without truth"),
    ("no prediction", "truth without prediction"),
    ("two predictions", "expected one prediction, got 2 files"),
    ("another grid", r"expected the truth's \(16, 20, 6\) voxels .* got \(16, 19, 6\); resample"),
    ("swapped axes", r"got \(16, 6, 20\); the same lengths in another order: swapped axes"),
    ("another affine", r"affine within 0.001 mm in the prediction, got one that differs by up to 0.5;"),
    ("unknown ids", r"expected values of \[0, 4, 5\] in the prediction, got \[7, 8\] too"),
    ("unknown ids in the truth", r"expected values of \[0, 4, 5\] in the truth, got \[7, 8\] too"),
    ("fractions", "whole numbers"),
    ("damaged", "bad_seg.nii.gz: expected a complete .nii.gz file"),
]


@pytest.mark.parametrize(("kind", "message"), BAD)
def test_a_bad_case_is_named_and_the_others_are_scored(folders, tmp_path, capsys, kind, message):
    write_pair(folders, "good")
    spoil(kind, folders)
    (tmp_path / "names.json").write_text(json.dumps({"4": "left kidney", "5": "right kidney"}))
    with pytest.raises(SystemExit) as ended:
        score(folders, tmp_path / "out", "--labels", tmp_path / "names.json")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert re.search(rf"automedsam: 1 of 2 cases failed: bad \(.*{message}", printed.err), printed.err
    assert re.search(r"^left kidney +0\.\d{4}", printed.out, re.MULTILINE)
    assert {entry.case for entry in read_scores_csv(tmp_path / "out" / "metrics.csv")} == {"good"}
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(record["failed"]) == ["bad"]


def test_pictures_of_swapped_sides_are_named_as_such(folders, vocabulary):
    truth = labels_of(1)[:, :, 2]
    Image.fromarray(truth).save(folders[1] / "a.png")
    Image.fromarray(np.ascontiguousarray(truth.T)).save(folders[0] / "a.png")
    with pytest.raises(InputError, match=r"1 of 1 cases failed: a \(.*swapped axes"):
        score_files(*folders, vocabulary=vocabulary)


def test_names_that_do_not_match(folders, vocabulary):
    write(folders[0] / "x_seg.nii.gz", labels_of(0))
    write(folders[1] / "y_gt.nii.gz", labels_of(0))
    with pytest.raises(InputError, match="none in common: x against y; name them alike"):
        score_files(*folders, vocabulary=vocabulary)


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_folder(folders, vocabulary, empty):
    write(folders[1 - empty] / "a.nii.gz", labels_of(0))
    with pytest.raises(InputError, match=rf"{folders[empty].name}: no image in this folder"):
        score_files(*folders, vocabulary=vocabulary)


def test_a_folder_that_is_not_there(folders, vocabulary, tmp_path):
    with pytest.raises(InputError, match="elsewhere: no such file or folder"):
        score_files(tmp_path / "elsewhere", folders[1], vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected names by value"),
        ('{"one": "liver"}', "expected names by value"),
        ('{"1": 2}', "expected names by value"),
        ('{"0": "background", "1": null}', "name of at least one class"),
        ("{", "expected a JSON file"),
    ],
)
def test_labels_that_are_none(tmp_path, vocabulary, content, message):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_label_names(tmp_path / "names.json", vocabulary)
    with pytest.raises(InputError, match=r"absent\.json"):
        read_label_names(tmp_path / "absent.json", vocabulary)


@pytest.mark.parametrize("content", ["case\na\n", "case,patient\na,\n", "case,patient\na,p\na,q\n"])
def test_patients_that_are_none(tmp_path, content):
    (tmp_path / "patients.csv").write_text(content)
    with pytest.raises(InputError, match=r"in row [23] of .*patients\.csv"):
        read_patients(tmp_path / "patients.csv")
    with pytest.raises(InputError, match=r"absent\.csv"):
        read_patients(tmp_path / "absent.csv")


def test_the_command_writes_what_it_prints(folders, tmp_path, capsys):
    for seed, case in enumerate(("a", "b", "c")):
        write_pair(folders, case, seed)
    score(folders, tmp_path / "out", "--tolerance", "1", "--averaging", "slice", "--presence", "oracle")
    printed = capsys.readouterr().out
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {"metrics.csv", "summary.json", "run.json"}
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [(c, f"value_{k}") for c in "abc" for k in (4, 5)]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["protocol"] == "oracle"
    entry = summary["units"]["mm"]["classes"]["value_4"]
    assert entry["dsc"] == pytest.approx(np.mean([float(row["dsc"]) for row in rows[::2]]))
    found = re.search(r"^value_4 +([\d.]+) +([\d.]+)", printed, re.MULTILINE)
    assert [float(value) for value in found.groups()] == pytest.approx([entry["dsc_per_slice"], entry["nsd"]], abs=5e-5)
    assert "NSD @ 1 mm" in printed
    assert 'Protocol "oracle"' in printed
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"] == {"tolerance": 1, "protocol": "oracle", "averaging": "slice", "pooled_batch": 40}
    assert set(record["files"]) == {"predictions", "truth"}


def test_batch_pooled_scores_are_those_of_the_files_joined(folders, vocabulary, tmp_path):
    pairs = {case: write_pair(folders, case, seed) for seed, case in enumerate("abc")}
    write(folders[0] / "a_seg.nii.gz", np.roll(pairs["a"], 4, axis=0))
    request = Request(*folders, None, None, 2.0, "all", "batch-pooled", pooled_batch=2)
    scored, tables = score_folders(request, tmp_path, vocabulary=vocabulary)
    predictions = np.stack([np.roll(pairs[case], 4 if case == "a" else 1, axis=0) == 4 for case in "abc"])
    truths = np.stack([pairs[case] == 4 for case in "abc"])
    both, either = predictions & truths, predictions | truths
    iou = (2 * both[:2].sum() / either[:2].sum() + both[2].sum() / either[2].sum()) / 3
    content = json.loads((tmp_path / "summary.json").read_text())["units"]["mm"]
    entry = content["classes"]["value_4"]
    assert (content["pooled_batch"], entry["batch-pooled"]["iou"]) == (2, pytest.approx(iou))
    assert entry["iou"] == pytest.approx(np.mean([score.iou for score in scored.scores[::2]]))
    assert entry["iou"] != pytest.approx(iou)
    printed = re.search(r"^value_4 +([\d.]+)", tables, re.MULTILINE)
    assert float(printed[1]) == pytest.approx(entry["batch-pooled"]["dsc"], abs=5e-5)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["pooled_batch"] == 2
    with pytest.raises(ConfigError, match="pooled_batch"):
        score_folders(replace(request, pooled_batch=0), tmp_path, vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tolerance", "-1"), "tolerance"),
        (("--averaging", "none"), "averaging"),
        (("--presence", "some"), "protocol"),
    ],
)
def test_settings_that_cannot_be(folders, tmp_path, capsys, words, message):
    write_pair(folders, "a")
    with pytest.raises(SystemExit):
        score(folders, tmp_path / "out", *words)
    assert message in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def two_runs(folders, tmp_path):
    """Runs over six cases, the second with the truth itself as prediction."""
    predictions, truth = folders
    for seed in range(6):
        write_pair(folders, f"c{seed}", seed)
    score((predictions, truth), tmp_path / "first")
    score((truth, truth), tmp_path / "second")
    return tmp_path / "first", tmp_path / "second"


def test_two_runs_are_compared(two_runs, tmp_path, capsys):
    capsys.readouterr()
    run("compare", *two_runs, "--output", tmp_path / "compared")
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    dsc = next(entry for entry in content["scores"] if entry["score"] == "dsc")
    first = [entry.dsc for entry in read_scores_csv(two_runs[0] / "metrics.csv")]
    assert dsc["mean"]["first"] == pytest.approx(np.mean(first))
    assert dsc["mean"]["second"] == 1.0
    assert dsc["classes"]["value_4"]["verdict"] == "better"
    assert dsc["classes"]["value_4"]["p_value"] == pytest.approx(2 / 2**6)
    assert re.search(r"^value_4 .*better$", printed, re.MULTILINE)


def test_only_the_common_cases_on_request(two_runs, tmp_path, capsys):
    path = two_runs[1] / "metrics.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("c3,")))
    with pytest.raises(SystemExit):
        run("compare", *two_runs, "--output", tmp_path / "compared")
    assert "value_4 in c3, value_5 in c3 in one run only" in capsys.readouterr().err
    run("compare", *two_runs, "--output", tmp_path / "compared", "--common")
    assert "1 cases (c3)" in capsys.readouterr().out
    content = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert content["scores"][0]["mean"]["cases"] == 5


def test_runs_of_two_protocols_are_not_compared(two_runs, tmp_path, capsys):
    summary = two_runs[1] / "summary.json"
    summary.write_text(summary.read_text().replace('"protocol": "all"', '"protocol": "oracle"'))
    with pytest.raises(SystemExit):
        run("compare", *two_runs, "--output", tmp_path / "compared")
    assert "expected runs of one protocol, got 'all' in" in capsys.readouterr().err


def test_a_folder_without_a_run_is_not_compared(two_runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("compare", two_runs[0], Path(tmp_path) / "truth", "--output", tmp_path / "compared")
    assert re.search(r"expected \S*truth/summary\.json of a finished evaluation", capsys.readouterr().err)
