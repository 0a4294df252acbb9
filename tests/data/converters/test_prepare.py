"""`prepare` on small trees in every owner's layout, and on the real sets where they are at hand."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import trees
from monai.bundle import ConfigParser
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from scripts.data.converters.layouts import names_of_sets
from scripts.data.converters.prepare import Request, Tables, prepare
from scripts.data.datalist import read_datalist
from scripts.engines.evaluators import intended_error
from scripts.errors import ConfigError, InputError


def run(name: str, source: Path, output: Path, tables: Tables, **options: object) -> dict:
    output.mkdir(parents=True, exist_ok=True)
    return prepare(Request(name=name, source=source, output=output, progress=False, **options), tables)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_set_has_a_tree(tables):
    assert set(trees.OWNERS) == set(names_of_sets(tables.layouts)) - {"shared", "generic"}


@pytest.mark.parametrize("name", trees.OWNERS)
def test_an_owners_layout_is_found_whole(name, tables, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    expected = trees.OWNERS[name](source)
    record = run(name, source, tmp_path / "a", tables, **expected.options)
    datalist = json.loads((tmp_path / "a/datalist.json").read_text())
    sections = {key: len(entries) for key, entries in datalist.items() if isinstance(entries, list)}
    assert sections == expected.sections
    assert len(record["skipped"]) == expected.skipped
    assert {name for case in record["cases"] for name in case["voxels"]} == expected.classes
    # Every class that is annotated anywhere was drawn somewhere in the tree, and must have come through.
    totals = {name: sum(case["voxels"].get(name, 0) for case in record["cases"]) for name in expected.classes}
    assert all(total > 0 for name, total in totals.items() if (name, record["name"]) != ("spleen", "medsam_npz")), (
        totals
    )
    cases = read_datalist(tmp_path / "a/datalist.json", section=list(sections), vocabulary=tables.vocabulary)
    assert len(cases) == sum(expected.sections.values())
    run(name, source, tmp_path / "b", tables, **expected.options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ------------------------------------------------------------------------------------------- nothing is lost on the way


def pictures(root: Path, numbers, *, folder="images", suffix="png") -> None:
    """Images of a polyp with their masks, in `images/` and `masks/`; the same number is the same image."""
    for number in numbers:
        trees.save_picture(trees.colour(number), root / f"{folder}/{number}.{suffix}")
        trees.save_picture(trees.mask(number % 12), root / f"{folder.replace('images', 'masks')}/{number}.png")


POLYPS = {"modality": "endoscopy", "classes": ["polyp"], "labels": "masks/{case}.{suffix}"}
STACKS = {
    "modality": "MR",
    "images": "images/{patient}_{slice}.png",
    "labels": "labels/{patient}_{slice}.png",
    "label_map": {1: "liver", 2: "spleen"},
    "fractions": (1, 0, 0),
}


def stacks(root: Path, **numbers) -> None:
    """Stacks of slices: patient -> numbers of the slices. Each slice shows 48 pixels of liver and 12 of spleen."""
    for place, (patient, slices) in enumerate(numbers.items()):
        for number in slices:
            trees.save_picture(trees.grey(100 * place + number), root / f"images/{patient}_{number}.png")
            labels = (trees.mask(4) > 0).astype(np.uint8)
            labels[0:3, 0:4] = 2
            trees.save_picture(labels, root / f"labels/{patient}_{number}.png")


def read_as_configured(bundle_root: Path, datalist: Path) -> list[dict]:
    """Read the training cases through the transforms of configs/train.json."""
    parser = ConfigParser()
    parser.read_config(str(bundle_root / "configs/train.json"))
    parser.update({"bundle_root": str(bundle_root), "datalist": str(datalist), "dataset_dir": str(datalist.parent)})
    parser["validation_section"] = "training"
    preprocessing = parser.get_parsed_content("validate#preprocessing")
    return [preprocessing(case) for case in parser.get_parsed_content("validate#cases")]


def why_refused(bundle_root: Path, datalist: Path) -> str:
    with pytest.raises((RuntimeError, InputError)) as caught:
        read_as_configured(bundle_root, datalist)
    reason = intended_error(caught.value)
    assert isinstance(reason, InputError)
    return str(reason)


def test_training_reads_what_was_counted(bundle_root, tables, tmp_path):
    stacks(tmp_path / "in", p1=range(4), p2=range(2, 5))
    record = run("generic", tmp_path / "in", tmp_path / "out", tables, **STACKS)
    assert [(case["case"], case["slices"], case["voxels"]) for case in record["cases"]] == [
        ("p1", 4, {"liver": 192, "spleen": 48}),
        ("p2", 3, {"liver": 144, "spleen": 36}),
    ]
    read = read_as_configured(bundle_root, tmp_path / "out/datalist.json")
    assert [case["label"].sum(dim=(1, 2, 3)).tolist()[:2] for case in read] == [[192, 48], [144, 36]]


def test_a_mask_that_is_lost_after_preparation_is_refused_in_training(bundle_root, tables, tmp_path):
    stacks(tmp_path / "in", p1=range(4), p2=range(4))
    run("generic", tmp_path / "in", tmp_path / "out", tables, **STACKS)
    path = tmp_path / "in/labels/p2_2.png"
    with Image.open(path) as picture:
        labels = np.array(picture)
    labels[labels == 2] = 0
    trees.save_picture(labels, path)
    # Spleen is class 2; one of the four slices has lost its 12 pixels.
    assert why_refused(bundle_root, tmp_path / "out/datalist.json").startswith(
        "p2: expected 48 voxels of class 2, got 36"
    )


def test_a_slice_that_is_lost_after_preparation_is_refused_in_training(bundle_root, tables, tmp_path):
    stacks(tmp_path / "in", p1=range(4), p2=range(4))
    run("generic", tmp_path / "in", tmp_path / "out", tables, **STACKS)
    path = tmp_path / "out/datalist.json"
    datalist = json.loads(path.read_text())
    for key in ("image", "label"):
        datalist["training"][1][key].pop()
    path.write_text(json.dumps(datalist))
    assert why_refused(bundle_root, path).startswith("p2: expected 4 slices, got 3")
    (tmp_path / "in/images/p1_0.png").unlink()
    assert "p1_0.png, which is missing" in why_refused(bundle_root, path)


def test_a_truncated_volume_is_refused_in_training(bundle_root, tables, tmp_path):
    trees.flare22(tmp_path / "in")
    run("flare22", tmp_path / "in", tmp_path / "out", tables, fractions=(1, 0, 0))
    folder = tmp_path / "in/FLARE22Train"
    for path in (folder / "images/FLARE22_Tr_0002_0000.nii.gz", folder / "labels/FLARE22_Tr_0002.nii.gz"):
        shorter = nibabel.load(path).slicer[:, :, :5]
        nibabel.save(nibabel.Nifti1Image(np.asarray(shorter.dataobj), shorter.affine), path)
    reason = why_refused(bundle_root, tmp_path / "out/datalist.json")
    assert reason.startswith("FLARE22_Tr_0002: expected 6 slices, got 5")


def test_a_gap_in_a_stack_is_a_warning_and_strictly_an_error(tables, tmp_path):
    stacks(tmp_path / "in", p1=(0, 1, 3), p2=(4, 5, 6))
    record = run("generic", tmp_path / "in", tmp_path / "out", tables, **STACKS)
    found = {case["case"]: [finding["check"] for finding in case["findings"]] for case in record["cases"]}
    assert found == {"p1": ["gap"], "p2": []}
    with pytest.raises(InputError, match=r"1 of 2 cases have errors\. p1: expected the slices 0 to 3 in steps of 1"):
        run("generic", tmp_path / "in", tmp_path / "strict", tables, **STACKS, strict=True)
    assert not (tmp_path / "strict/datalist.json").exists()
    record = run("generic", tmp_path / "in", tmp_path / "strict", tables, **STACKS, strict=True, leave_out_errors=True)
    assert {case["case"]: case["section"] for case in record["cases"]} == {"p1": None, "p2": "training"}


def test_a_broken_image_among_good_ones_is_named_once(tables, tmp_path):
    pictures(tmp_path / "in", range(6))
    (tmp_path / "in/images/2.png").write_bytes((tmp_path / "in/images/2.png").read_bytes()[:200])
    trees.save_picture(np.full((20, 24, 3), 7, np.uint8), tmp_path / "in/images/4.png")
    with pytest.raises(InputError) as caught:
        run("generic", tmp_path / "in", tmp_path / "out", tables, **POLYPS)
    text = str(caught.value)
    assert text.startswith("2 of 6 cases have errors. 2: 2.png: expected a complete .png file")
    assert "; 4: expected an image with contrast, got the value 7 everywhere" in text
    assert text.endswith("leave these cases out with --leave-out-errors")
    assert contents(tmp_path / "out") == {}
    record = run("generic", tmp_path / "in", tmp_path / "out", tables, **POLYPS, leave_out_errors=True)
    assert [case["case"] for case in record["cases"] if case["section"] is None] == ["2", "4"]
    datalist = json.loads((tmp_path / "out/datalist.json").read_text())
    assert sum(len(entries) for entries in datalist.values() if isinstance(entries, list)) == 4


def test_when_all_cases_have_errors_there_is_no_datalist(tables, tmp_path):
    pictures(tmp_path / "in", range(3))
    for path in (tmp_path / "in/images").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"all 3 cases have errors; the first, 0: 0\.png"):
        run("generic", tmp_path / "in", tmp_path / "out", tables, **POLYPS, leave_out_errors=True)
    assert contents(tmp_path / "out") == {}


def test_a_broken_npz_is_left_out_like_any_other_case(tables, tmp_path):
    trees.medsam_npz(tmp_path / "in")
    broken = next((tmp_path / "in").rglob("*Case_00002.npz"))
    broken.write_bytes(broken.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"1 of 12 cases have errors. CT_AbdomenCT_Case_00002: .*complete .npz"):
        run("medsam_npz", tmp_path / "in", tmp_path / "out", tables)
    record = run("medsam_npz", tmp_path / "in", tmp_path / "out", tables, leave_out_errors=True)
    assert Counter(case["section"] is None for case in record["cases"]) == {False: 11, True: 1}


# --------------------------------------------------------------------------------------------------------------- sides


def turn(path: Path, axes: str) -> None:
    """Write a volume anew in other axes; the patient stays the same."""
    image = nibabel.load(path)
    change = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
    turned = image.as_reoriented(change)
    nibabel.save(nibabel.Nifti1Image(np.asarray(turned.dataobj), turned.affine), path)


def test_kidneys_are_divided_by_the_patients_side_in_any_axes(tables, tmp_path):
    trees.abdomenct1k(tmp_path / "in")
    axes = {1: "LPS", 2: "RAS", 3: "LAS", 4: "ASR", 5: "SLP"}
    for number, codes in axes.items():
        turn(next((tmp_path / "in").rglob(f"Case_{number:05d}_0000.nii.gz")), codes)
        turn(tmp_path / f"in/Mask/Case_{number:05d}.nii.gz", codes)
    record = run("abdomenct1k", tmp_path / "in", tmp_path / "out", tables, fractions=(0.6, 0.2, 0.2))
    expected = trees.label_volume(5, 1, 3, 4, 2)  # the first block is to the right and has the new value
    for number, codes in axes.items():
        path = tmp_path / f"out/converted/labels/Case_{number:05d}.nii.gz"
        assert "".join(nibabel.aff2axcodes(nibabel.load(path).affine)) == codes
        turn(path, "LPS")
        assert np.array_equal(nibabel.load(path).get_fdata(), expected)
    assert {tuple(sorted(case["voxels"].items())) for case in record["cases"]} == {
        tuple((name, 32) for name in ("left kidney", "liver", "pancreas", "right kidney", "spleen"))
    }
    assert not any(case["findings"] for case in record["cases"])


def test_a_mask_off_its_image_is_an_error_where_it_is_divided_too(tables, tmp_path):
    trees.abdomenct1k(tmp_path / "in")
    path = tmp_path / "in/Mask/Case_00002.nii.gz"
    moved = trees.AFFINE.copy()
    moved[1, 3] += 0.5
    trees.save_volume(trees.label_volume(2, 1, 3, 4, 2), path, moved)
    with pytest.raises(InputError, match=r"1 of 5 cases have errors. Case_00002: .*image's affine within"):
        run("abdomenct1k", tmp_path / "in", tmp_path / "out", tables, fractions=(0.6, 0.2, 0.2))


# -------------------------------------------------------------------------------------------------------------- splits

FOLDERS = {**POLYPS, "images": "{split}/images/{case}.png", "labels": "{split}/masks/{case}.png"}


def test_a_copy_across_official_sections_is_an_error_that_names_the_pair(tables, tmp_path):
    pictures(tmp_path / "in", (1, 2, 3), folder="train/images")
    pictures(tmp_path / "in", (7, 8), folder="test/images")
    shutil.copy(tmp_path / "in/train/images/2.png", tmp_path / "in/test/images/8.png")
    options = {**FOLDERS, "fractions": (1, 0, 0)}
    with pytest.raises(InputError, match="2: the same image as 8 of the section test, while this one is of training"):
        run("generic", tmp_path / "in", tmp_path / "out", tables, **options)
    record = run("generic", tmp_path / "in", tmp_path / "out", tables, **options, leave_out_errors=True)
    sections = {case["case"]: case["section"] for case in record["cases"]}
    assert sections == {"1": "training", "2": None, "3": "training", "7": "test", "8": "test"}
    findings = {case["case"]: case["findings"] for case in record["cases"] if case["findings"]}
    assert {name: found[0]["severity"] for name, found in findings.items()} == {"2": "error", "8": "warn"}


@pytest.mark.parametrize("official", [False, True])
def test_copies_are_never_drawn_apart(tables, tmp_path, official):
    """Twenty images under two names each, drawn by name into one section each."""
    options = dict(FOLDERS if official else {**POLYPS, "images": "train/images/{case}.png"})
    options |= {} if official else {"labels": "train/masks/{case}.png"}
    pictures(tmp_path / "in", range(20), folder="train/images")
    for number in range(20):
        for kind in ("images", "masks"):
            folder = tmp_path / f"in/train/{kind}"
            shutil.copy(folder / f"{number}.png", folder / f"{number + 100}.png")
    if official:
        pictures(tmp_path / "in", (900,), folder="test/images")
    record = run("generic", tmp_path / "in", tmp_path / "out", tables, **options, fractions=(0.6, 0.2, 0.2))
    sections = {int(case["case"]): case["section"] for case in record["cases"]}
    assert all(sections[number] == sections[number + 100] for number in range(20))
    shares = Counter(sections[number] for number in range(20))
    assert shares == ({"training": 15, "validation": 5} if official else {"training": 12, "validation": 4, "test": 4})
    findings = {case["case"]: case["findings"] for case in record["cases"]}
    assert [finding["text"] for finding in findings["0"]] == ["the same image as 100"]
    assert all(case["patient"] == case["case"] for case in record["cases"])  # nobody is renamed


def test_a_patient_in_two_official_sections_is_refused_before_anything_is_read(tables, tmp_path):
    for path in ("train/p1_a.png", "train/p2_b.png", "test/p1_c.png"):
        trees.save_picture(trees.mask(), tmp_path / "in/masks" / Path(path).name)
        (tmp_path / "in" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / path).write_bytes(b"not read")
    options = {**POLYPS, "images": "{split}/{patient}_{eye}.png", "labels": "masks/{patient}_{eye}.png"}
    with pytest.raises(InputError, match="cases p1_c of test and p1_a of training are of the same patient; keep"):
        run("generic", tmp_path / "in", tmp_path / "out", tables, **options)


def test_an_official_split_is_written_as_it_is_whatever_the_seed(tables, tmp_path):
    trees.isic2018(tmp_path / "in")
    for seed in (0, 9):
        run("isic2018", tmp_path / "in", tmp_path / f"{seed}", tables, seed=seed, fractions=(0.2, 0.4, 0.4))
    assert contents(tmp_path / "0") == contents(tmp_path / "9")


# ------------------------------------------------------------------------------------------------------- same and safe


@pytest.mark.parametrize("place", ["", "prepared"])
def test_results_within_the_source_are_no_input(tables, tmp_path, place):
    """`converted/images/` and `converted/labels/` would fit the usual patterns."""
    trees.busi(tmp_path / "in")
    shutil.move(tmp_path / "in/Dataset_BUSI_with_GT/benign", tmp_path / "in/images")
    options = {"modality": "ultrasound", "classes": ["breast lesion"], "images": "images/benign ({case}).png"}
    options |= {"labels": "images/benign ({case})_mask*.png", "fractions": (1, 0, 0)}
    written = []
    for _ in range(2):
        run("generic", tmp_path / "in", tmp_path / "in" / place, tables, **options)
        (tmp_path / "in" / place / "converted/images").mkdir(exist_ok=True)
        trees.save_picture(trees.grey(3), tmp_path / "in" / place / "converted/images/benign (9).png")
        written.append(contents(tmp_path / "in"))
    assert written[0] == written[1]


def test_source_and_datalist_can_be_moved_together(tables, tmp_path):
    pictures(tmp_path / "old/in", range(3))
    run("generic", tmp_path / "old/in", tmp_path / "old/lists/a", tables, **POLYPS)
    (tmp_path / "old").rename(tmp_path / "new")
    cases = read_datalist(tmp_path / "new/lists/a/datalist.json", section="training", vocabulary=tables.vocabulary)
    assert Path(cases[0]["image"]).parent == tmp_path / "new/in/images"


def test_an_older_datalist_stays_when_preparation_fails(tables, tmp_path):
    pictures(tmp_path / "in", range(3))
    run("generic", tmp_path / "in", tmp_path / "out", tables, **POLYPS)
    before = contents(tmp_path / "out")
    (tmp_path / "in/images/1.png").write_bytes(b"x")
    with pytest.raises(InputError):
        run("generic", tmp_path / "in", tmp_path / "out", tables, **POLYPS)
    assert contents(tmp_path / "out") == before


def test_every_case_of_the_record_is_counted_in_the_datalist(tables, tmp_path):
    trees.chaos_mr(tmp_path / "in")
    record = run("chaos_mr", tmp_path / "in", tmp_path / "out", tables)
    datalist = json.loads((tmp_path / "out/datalist.json").read_text())
    entries = {entry["case"]: (name, entry) for name in ("training", "validation", "test") for entry in datalist[name]}
    assert len(entries) == len(record["cases"]) == 4
    for case in record["cases"]:
        section, entry = entries[case["case"]]
        assert section == case["section"]
        assert entry["counts"] == {"slices": case["slices"], "voxels": case["voxels"]}


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("nothing", {}, ConfigError, "'nothing' is unknown; known are shared, generic, medsam_npz, msd, abdomenct1k"),
        ("shared", {}, ConfigError, "'in' is unknown; known are kvasir_seg, ph2_dermoscopy"),
        ("polyp", {}, InputError, r"holds no image of polyp: expected TrainDataset/.* see docs/data.md"),
        ("medsam_npz", {}, InputError, r"holds no \.npz file"),
        ("msd", {}, InputError, "expected the task's dataset.json"),
        ("polyp", {"images": "x/{case}.png"}, ConfigError, "--images is for generic, not for polyp"),
        ("msd", {"classes": ["liver"]}, ConfigError, "--classes is for generic, not for msd"),
        ("msd", {"modality": "CT"}, ConfigError, "--modality is for generic, medsam_npz, not for msd"),
        ("amos", {"label_map": {1: "liver"}}, ConfigError, "--label-map is for generic, medsam_npz, msd, not for amos"),
        ("medsam_npz", {"split_table": "s.csv"}, ConfigError, "--split-table is for generic"),
        ("medsam_npz", {"sequence": "flair"}, ConfigError, "--sequence is for MR data sets"),
        ("polyp", {"sequence": "flair"}, ConfigError, "polyp has no option sequence"),
        ("medsam_npz", {"modality": "CT"}, ConfigError, "both --label-map and --modality"),
        ("generic", {}, ConfigError, "say what the images are with --modality"),
        ("generic", {"modality": "CT", "classes": ["polyp"]}, InputError, "holds no image of in"),
        ("polyp", {"fractions": (0.5, 0.5)}, ConfigError, "--fractions are three shares"),
        ("polyp", {"seed": -1}, ConfigError, "--seed is a whole number of 0 or more, not -1"),
        ("polyp", {"seed": 1.5}, ConfigError, "--seed is a whole number"),
        ("polyp", {"strict": "false"}, ConfigError, "--strict is True or False, not 'false'"),
        ("polyp", {"leave_out_errors": "no"}, ConfigError, "--leave-out-errors is True or False"),
        ("polyp", {"workers": 0}, ConfigError, "--workers is a whole number of 1 or more, not 0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tables, tmp_path, name, options, error, text):
    (tmp_path / "in").mkdir()
    with pytest.raises(error, match=text):
        run(name, tmp_path / "in", tmp_path / "out", tables, **options)
    assert contents(tmp_path / "out") == {}


def test_a_class_that_the_images_cannot_show_is_refused_before_they_are_read(tables, tmp_path):
    pictures(tmp_path / "in", range(3))
    for path in (tmp_path / "in/images").iterdir():
        path.write_bytes(b"not read")
    with pytest.raises(InputError, match="the class 'polyp' cannot occur in CT, only in endoscopy; correct"):
        run("generic", tmp_path / "in", tmp_path / "out", tables, **{**POLYPS, "modality": "CT"})


def test_the_source_must_be_a_folder(tables, tmp_path):
    with pytest.raises(InputError, match="is no folder; give the folder of the data set as --source"):
        run("polyp", tmp_path / "nowhere", tmp_path / "out", tables)


@pytest.mark.parametrize("name", ["covid_chest_xray", "ph2_dermoscopy", "chaos_t2_mr"])
def test_real_sets_are_prepared_whole(shared, tables, tmp_path, name):
    """Their tables of the split say what has to come out."""
    with open(shared / f"data/{name}/split.csv") as table:
        rows = [line.split(",") for line in table.read().splitlines()]
    wanted = Counter(row[1].replace("train", "training") for row in rows[1:])
    record = run("shared", shared / "data" / name, tmp_path / "out", tables)
    assert Counter(case["section"] for case in record["cases"]) == wanted
    assert not any(finding["severity"] == "error" for case in record["cases"] for finding in case["findings"])
    assert os.listdir(tmp_path / "out") in (
        ["datalist.json", "preparation.json"],
        ["preparation.json", "datalist.json"],
    )


def test_radiographs_of_one_person_stay_together(tables, tmp_path):
    """By the readings of Montgomery; a split that parts them would test on whom it was trained."""
    folder = tmp_path / "Lung Segmentation"
    for number in (113, 117, *range(1, 7)):
        trees.save_picture(trees.grey(number), folder / f"CXR_png/MCUCXR_{number:04d}_1.png")
        trees.save_picture(trees.mask(), folder / f"masks/MCUCXR_{number:04d}_1.png")
    for seed in range(6):
        record = run("chest_xray_masks", tmp_path, tmp_path / f"out{seed}", tables, seed=seed)
        sections = {case["case"]: case["section"] for case in record["cases"]}
        assert sections["MCUCXR_0113_1"] == sections["MCUCXR_0117_1"]
