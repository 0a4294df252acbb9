"""Every file that fits a layout is a case or a line of what was left out; what is ambiguous stops."""

from pathlib import Path

import pytest

from scripts.data.converters.finding import find_cases
from scripts.data.converters.layouts import make_layout
from scripts.data.converters.patterns import FileTree
from scripts.errors import ConfigError, InputError

MASKS = {"modality": "endoscopy", "image": "images/{case}.{picture}", "mask": {"polyp": "masks/{case}.{suffix}"}}
MAP = {
    "modality": "CT",
    "image": "images/{case}.{suffix}",
    "label": "labels/{case}.{suffix}",
    "label_map": {1: "liver"},
}
STACK = {**MAP, "image": "images/{case}_{slice}.png", "label": "labels/{case}_{slice}.png"}
TABLE = {"file": "split.csv", "case": "case", "section": "split", "sections": {"train": "training", "test": "test"}}
LUNGS = {"right lung": "masks/right/{case}.png", "left lung": "masks/left/{case}.png"}


class Place:
    """A folder of empty files, and what a layout finds in it."""

    def __init__(self, root, vocabulary):
        self.root, self.vocabulary = root, vocabulary

    def add(self, *paths):
        for path in paths:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            if not path.endswith("/"):
                (self.root / path).touch()
        return self

    def pairs(self, *names, image="images/{}.png", label="masks/{}.png"):
        return self.add(*(pattern.format(name) for name in names for pattern in (image, label)))

    def table(self, text):
        (self.root / "split.csv").write_text(text)
        return self

    def find(self, row, chosen=None):
        layout = make_layout("mine", row, self.vocabulary, source="a test")
        return find_cases(layout, FileTree(self.root), chosen=chosen)

    def below(self, files):
        """Paths of a case as they were written."""
        if isinstance(files, dict):
            return {name: self.below(members) for name, members in files.items()}
        if isinstance(files, tuple):
            return [self.below(file) for file in files]
        return Path(files).relative_to(self.root).as_posix()


@pytest.fixture
def place(tmp_path, vocabulary):
    return Place(tmp_path, vocabulary)


def names(found):
    return [case.name for case in found.cases]


def reasons(found):
    return dict(found.skipped)


# ----------------------------------------------------------------------------------------------------------- counting


def test_cases_come_with_their_files_in_natural_order(place):
    found = place.pairs("a10", "a9", "A.1").find(MASKS)
    assert names(found) == ["A.1", "a9", "a10"]
    assert found.skipped == ()
    case = found.cases[0]
    assert (case.patient, case.section, case.modality, case.findings) == ("A.1", None, "endoscopy", ())
    assert place.below(case.image) == "images/A.1.png"
    assert place.below(case.label) == {"polyp": "masks/A.1.png"}


@pytest.mark.parametrize("label", ["masks/a.jpg", "masks/A.PNG"])
def test_a_label_may_have_another_suffix_or_case(place, label):
    assert place.below(place.add("images/a.png", label).find(MASKS).cases[0].label) == {"polyp": label}


def test_every_file_is_a_case_or_a_line(place):
    place.pairs("a", "b").add("images/no mask.png", "masks/no image.png", "masks/a.txt.png", "notes.md", "images/x.md")
    found = place.find({**MASKS, "exclude": {"known to be broken": "b[.]"}})
    assert names(found) == ["a"]
    assert reasons(found) == {
        "images/b.png": "known to be broken",
        "images/no mask.png": "no label",
        "masks/no image.png": "label without a case",
        "masks/a.txt.png": "label without a case",
    }


def test_an_excluded_label_without_its_image_is_told(place):
    found = place.pairs("a", "b").add("masks/b2.png").find({**MASKS, "exclude": {"out": "b"}})
    assert reasons(found) == {"images/b.png": "out", "masks/b2.png": "label without a case"}


def test_labels_that_look_like_images_are_not_left_out_images(place):
    place.add("a.png", "a_mask.png", "b.png", "c_mask.png")
    found = place.find({**MASKS, "image": "{case}.png", "mask": {"polyp": "{case}_mask.png"}})
    assert names(found) == ["a"]
    assert reasons(found) == {"b.png": "no label", "c_mask.png": "no label"}


def test_several_masks_are_one_label_and_all_are_used(place):
    found = place.add("i/a (1).png", "m/a (1)_mask.png", "m/a (1)_mask_1.png", "m/a (10)_mask.png").find(
        {**MASKS, "image": "i/{case}.png", "mask": {"polyp": "m/{case}_mask*.png"}}
    )
    assert place.below(found.cases[0].label) == {"polyp": ["m/a (1)_mask.png", "m/a (1)_mask_1.png"]}
    assert reasons(found) == {"m/a (10)_mask.png": "label without a case"}


def test_the_first_pattern_of_a_label_counts_and_the_other_is_told(place):
    place.add("images/a.png", "images/b.png", "masks/a.png", "masks/a_mask.png", "masks/b.png")
    found = place.find({**MASKS, "mask": {"polyp": ["masks/{case}_mask.png", "masks/{case}.png"]}})
    assert [place.below(case.label["polyp"]) for case in found.cases] == ["masks/a_mask.png", "masks/b.png"]
    assert reasons(found) == {"masks/a.png": "label without a case"}


def test_a_class_may_be_missing_for_a_case_but_not_for_all(place):
    row = {"modality": "xray", "image": "images/{case}.png", "mask": LUNGS}
    place.add("images/a.png", "images/b.png", "masks/right/a.png", "masks/left/a.png", "masks/left/b.png")
    assert [list(case.label) for case in place.find(row).cases] == [["right lung", "left lung"], ["left lung"]]
    (place.root / "masks/right/a.png").unlink()
    with pytest.raises(InputError, match=r"no mask of the class 'right lung': expected masks/right/\{case\}.png"):
        place.find(row)


# ------------------------------------------------------------------------------------------------------------- stacks


def stack(place, *numbers, labels=None):
    return place.add(
        *(f"images/p_{number}.png" for number in numbers),
        *(f"labels/p_{number}.png" for number in (numbers if labels is None else labels)),
    )


def test_slices_are_in_the_order_of_their_numbers(place):
    case = stack(place, 10, 9, 8).find(STACK).cases[0]
    assert place.below(case.image) == ["images/p_8.png", "images/p_9.png", "images/p_10.png"]
    assert place.below(case.label) == ["labels/p_8.png", "labels/p_9.png", "labels/p_10.png"]
    assert case.findings == ()


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0, 1, 3), "the slices 0 to 3 in steps of 1, got none between 1 and 3;"),
        ((7, 5, 4, 1), "the slices 1 to 7 in steps of 1, got none between 1 and 4, between 5 and 7;"),
        ((0, 5, 10, 20), "steps of 5, got none between 10 and 20;"),
        ((0, 1, 3, 5, 7, 9), "between 1 and 3, between 3 and 5, between 5 and 7, ...;"),
        ((0, 1, 2), None),
        ((4, 6, 8), None),
        ((1, 9), None),
        ((3,), None),
    ],
)
def test_a_missing_slice_is_found(place, numbers, text):
    findings = stack(place, *numbers).find(STACK).cases[0].findings
    assert [(finding.severity, finding.check) for finding in findings] == ([("warn", "gap")] if text else [])
    assert text is None or text in findings[0].text


def test_a_stack_needs_a_label_for_each_slice(place):
    with pytest.raises(InputError, match=r"images/p_2.png has no label, though other slices"):
        stack(place, 1, 2, 3, labels=(1, 3)).find(STACK)


def test_a_slice_is_there_once(place):
    with pytest.raises(InputError, match=r"images/p_01.png and images/p_1.png are the same image"):
        stack(place, 0, 1, "01", 2).find(STACK)


def test_all_slices_of_a_stack_that_is_left_out_are_told(place):
    place.pairs("q_1", image="images/{}.png", label="labels/{}.png")
    assert reasons(stack(place, 1, 2, labels=()).find(STACK)) == {
        "images/p_1.png": "no label",
        "images/p_2.png": "no label",
    }


# ------------------------------------------------------------------------------------------------------ what is refused


def test_two_labels_of_an_image_are_refused(place):
    with pytest.raises(InputError, match=r"images/a.nii has two labels, labels/a.nii and labels/a.nii.gz; remove one"):
        place.add("images/a.nii", "labels/a.nii", "labels/a.nii.gz").find(MAP)


def test_two_images_of_a_case_are_refused(place):
    with pytest.raises(InputError, match=r"images/a.jpg and images/a.png are the same image of a case"):
        place.pairs("a").add("images/a.jpg").find(MASKS)


def test_two_copies_of_the_set_are_refused(place):
    place.pairs("a", image="x/images/{}.png", label="x/masks/{}.png")
    place.pairs("a", image="y/z/images/{}.png", label="y/z/masks/{}.png")
    with pytest.raises(InputError, match=r"in 2 places, such as x/ and y/z/; give one of them as --source"):
        place.find(MASKS)


@pytest.mark.parametrize("paths", [(), ("a.png", "b.txt"), ("images/",), ("images/sub/a.png",)])
def test_an_empty_or_wrong_folder_is_refused(place, paths):
    with pytest.raises(InputError, match=r"holds no image of mine: expected images/\{case\}.\{picture\} there"):
        place.add(*paths).find(MASKS)


def test_images_without_a_single_label_are_refused(place):
    with pytest.raises(InputError, match=r"all 2 images of mine are left out, the first, images/a.png, .*: no label"):
        place.add("images/a.png", "images/b.png").find(MASKS)


def test_two_cases_of_one_name_are_refused(place):
    place.add("1/x/images/a.png", "1/x/masks/a.png", "2/x/images/A.png", "2/x/masks/A.png")
    row = {**MASKS, "image": "{part}/x/images/{case}.png", "mask": {"polyp": "{part}/x/masks/{case}.png"}}
    with pytest.raises(InputError, match="holds the case 'A' twice"):
        place.find(row)


# ------------------------------------------------------------------------------------------------- splits and patients


def test_a_folder_of_the_path_is_the_section(place):
    row = {**MASKS, "image": "{split}/{case}.jpg", "mask": {"polyp": "{split}/{case}.png"}}
    place.add(*(f"{split}/{split[0]}.{suffix}" for split in ("TRAIN", "test", "extra") for suffix in ("jpg", "png")))
    found = place.find({**row, "sections": {"train": "training", "test": "test"}, "case": "{section}_{case}"})
    assert {case.name: case.section for case in found.cases} == {"training_T": "training", "test_t": "test"}
    assert reasons(found) == {
        "extra/e.jpg": "the official split does not name it",
        "extra/e.png": "label without a case",
    }


def test_a_table_gives_section_and_patient(place):
    place.pairs("a", "b.1", "c").table("\ufeffcase,split,who\nb.1,test,7\na,train,8\n")
    found = place.find({**MASKS, "split_table": {**TABLE, "patient": "who"}})
    assert [(case.name, case.section, case.patient) for case in found.cases] == [
        ("a", "training", "8"),
        ("b.1", "test", "7"),
    ]
    assert reasons(found) == {
        "images/c.png": "the official split does not name it",
        "masks/c.png": "label without a case",
    }


def test_a_row_of_a_volume_is_found_by_its_name_without_suffix(place):
    place.pairs("a", image="images/{}.nii.gz", label="labels/{}.nii.gz").table("case,split\na,train\n")
    assert place.find({**MAP, "split_table": TABLE}).cases[0].section == "training"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("case,split\na,train\nlost,test\n", "names 1 of 2 cases that are not there, such as lost"),
        ("case,split\na,train\na,test\n", "names a twice"),
        ("case;split\na;train\n", "expected rows with the columns case, split"),
        ("case,split\n", "expected rows with the columns case, split"),
        ("case,split\na\n", "expected rows with the columns case, split"),
        ("case,split\na,holdout\n", r"sections of a are \['holdout'\]; expected one of train, test"),
        ("case,split\nb,train\n", "all 1 images of mine are left out.*the official split does not name it"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(place, text, expected):
    with pytest.raises(InputError, match=expected):
        place.pairs("a").table(text).find({**MASKS, "split_table": TABLE})


def test_a_table_must_be_there_once_and_be_text(place):
    place.pairs("a")
    with pytest.raises(InputError, match=r"expected one table of the split, split\.csv, got 0"):
        place.find({**MASKS, "split_table": TABLE})
    (place.root / "split.csv").write_bytes(b"case,split\n\xff,train\n")
    with pytest.raises(InputError, match="CSV file in UTF-8"):
        place.find({**MASKS, "split_table": TABLE})
    (place.root / "images/split.csv").touch()
    with pytest.raises(InputError, match="got 2"):
        place.find({**MASKS, "split_table": TABLE})


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ("p_1,train\np_2,test", r"sections of p_1 are \['test', 'train'\]"),
        ("p_1,train", "no row of p_2, though it has"),
    ],
)
def test_all_slices_of_a_stack_are_in_one_section(place, rows, text):
    with pytest.raises(InputError, match=text):
        stack(place, 1, 2).table(f"case,split\n{rows}\n").find({**STACK, "split_table": TABLE})


def test_patients_come_from_paths_and_films_from_frame_numbers(place):
    place.pairs("p1_x", "p1_y", "p2_x")
    row = {"image": "images/{patient}_{eye}.png", "mask": {"polyp": "masks/{patient}_{eye}.png"}}
    found = place.find({**MASKS, **row, "case": "{patient}_{eye}", "patient": "{patient}"})
    assert [(case.name, case.patient) for case in found.cases] == [("p1_x", "p1"), ("p1_y", "p1"), ("p2_x", "p2")]


def test_frames_up_to_and_including_the_last_are_of_a_film(place):
    place.pairs("1", "25", "26", "612", "x")
    found = place.find({**MASKS, "sequences": {"": [25, 611, 612]}})
    assert {case.name: case.patient for case in found.cases} == {
        "1": "sequence 1",
        "25": "sequence 1",
        "26": "sequence 2",
        "612": "sequence 3",
        "x": "x",
    }


def test_doubled_folders_of_an_archive_are_found(tables, tmp_path):
    """PraNet's test archive unpacks into TestDataset/TestDataset on some systems."""
    paths = [f"TrainDataset/{kind}/1.png" for kind in ("image", "masks")]
    paths += [f"TestDataset/TestDataset/Kvasir/{kind}/cju1.png" for kind in ("images", "masks")]
    Place(tmp_path, tables.vocabulary).add(*paths)
    found = find_cases(tables.layouts["polyp"], FileTree(tmp_path))
    assert sorted(names(found)) == ["test_kvasir_cju1", "training_1"]


# ------------------------------------------------------------------------------------------------------------- choices


def test_a_choice_picks_files_and_its_first_value_is_usual(place):
    row = {**MAP, "image": "{case}-{sequence}.nii", "label": "{case}-seg.nii", "modality": "MR"}
    row["choices"] = {"sequence": {"flair": "t2f|flair", "t1ce": "t1c"}}
    place.add("a-t2f.nii", "a-t1c.nii", "a-seg.nii", "b-flair.nii", "b-seg.nii")
    assert [place.below(case.image) for case in place.find(row).cases] == ["a-t2f.nii", "b-flair.nii"]
    found = place.find(row, {"sequence": "t1ce"})
    assert [place.below(case.image) for case in found.cases] == ["a-t1c.nii"]
    assert reasons(found) == {"b-seg.nii": "label without a case"}
    assert found.source == {"layout": "mine", "sequence": "t1ce"}
    with pytest.raises(ConfigError, match="--sequence of mine is one of flair, t1ce, not 't9'"):
        place.find(row, {"sequence": "t9"})
    with pytest.raises(ConfigError, match="mine has no option phase"):
        place.find(row, {"phase": "in"})


def test_a_name_needs_its_gap_in_the_path(place):
    with pytest.raises(ConfigError, match=r"'\{eye\}' needs 'eye', which no path has"):
        place.pairs("a").find({**MASKS, "case": "{eye}"})
