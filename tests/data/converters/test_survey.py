"""What a case holds is counted by hand here, and what is wrong with it is said once."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import trees

from scripts.data.converters.finding import FoundCase
from scripts.data.converters.survey import CaseSurvey, Surveyor, content_hash, mark_copies
from scripts.data.guard import Finding

KIDNEYS = {1: "left kidney", 2: "right kidney", 3: None}


@pytest.fixture
def survey(vocabulary):
    def make(image, label, modality="CT", label_map=None, **changes):
        case = FoundCase("case_1", "p", None, image, label, modality, **changes)
        return Surveyor(vocabulary, label_map=label_map or {1: "liver"}, convert=lambda found: found)(case)[1]

    return make


def volume(path: Path, voxels, affine=trees.AFFINE) -> str:
    trees.save_volume(voxels, path, affine)
    return str(path)


def picture(path: Path, pixels) -> str:
    trees.save_picture(pixels, path)
    return str(path)


# ------------------------------------------------------------------------------------------------------------ counting


def test_a_volume_by_hand(tmp_path, survey):
    labels = np.zeros(trees.SHAPE, np.uint8)
    labels[3:5, 4:9, 1:3] = 1  # 2 x 5 x 2
    labels[18:20, 4:6, 5] = 2  # 2 x 2
    labels[0, 0, 0] = 3
    image = trees.ct_volume(1)
    image[10, 10, 2] = 900
    found = survey(volume(tmp_path / "i.nii", image), volume(tmp_path / "l.nii", labels), label_map=KIDNEYS)
    assert found.voxels == {"left kidney": 20, "right kidney": 4}
    assert found.class_slices == {"left kidney": 2, "right kidney": 1}
    assert (found.slices, found.spacing, found.planar, found.intensity) == (6, (1.5, 1.5, 4.0), False, (-1000, 900))
    assert [finding.check for finding in found.findings] == ["sides"]  # low X is to the right in LPS axes


def test_a_stack_by_hand(tmp_path, survey):
    images = tuple(picture(tmp_path / f"i{number}.png", trees.grey(number)) for number in range(3))
    tops = (trees.mask(3), trees.mask(0) * 0, trees.mask(1))
    masks = tuple(picture(tmp_path / f"m{number}.png", pixels) for number, pixels in enumerate(tops))
    found = survey(images, {"R lung": masks}, modality="xray")
    assert (found.voxels, found.class_slices) == ({"right lung": 2 * 6 * 8}, {"right lung": 2})
    assert (found.slices, found.spacing, found.planar) == (3, (1, 1, 1), True)
    values = np.stack([trees.grey(number) for number in range(3)])
    assert found.intensity == (values.min(), values.max())


def test_a_class_is_annotated_where_the_case_says_so(tmp_path, survey):
    image, label = volume(tmp_path / "i.nii", trees.ct_volume(1)), volume(tmp_path / "l.nii", trees.label_volume(1))
    label_map = {1: "hepar", 2: "spleen"}
    assert survey(image, label, label_map=label_map).voxels == {"liver": 32, "spleen": 0}
    assert list(survey(image, label, label_map=label_map, annotated=("hepar",)).voxels) == ["liver"]


# ---------------------------------------------------------------------------------------------------- what is wrong


def test_an_error_is_told_once_and_nothing_is_counted(tmp_path, survey):
    label = volume(tmp_path / "l.nii", trees.label_volume(1))
    flat = survey(volume(tmp_path / "i.nii", trees.ct_volume(1) * 0), label)
    assert (flat.voxels, flat.content, flat.slices) == ({}, "", 0)
    (finding,) = flat.findings
    assert (finding.severity, finding.check) == ("error", "values")
    assert finding.text.startswith("expected an image with contrast")  # not "case_1: expected ..."
    assert flat.error == finding.text
    (tmp_path / "b.nii.gz").write_bytes(b"no image")
    assert "b.nii.gz: expected a complete" in survey(str(tmp_path / "b.nii.gz"), label).error


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_label_elsewhere_is_an_error(tmp_path, survey, axis):
    image = volume(tmp_path / "i.nii", trees.ct_volume(1))
    moved = trees.AFFINE.copy()
    moved[axis, 3] += 0.01
    assert "image's affine within" in survey(image, volume(tmp_path / "l.nii", trees.label_volume(1), moved)).error


def test_what_was_found_before_comes_first_and_an_error_stops_the_reading(survey, tmp_path):
    image, label = volume(tmp_path / "i.nii", trees.ct_volume(1)), volume(tmp_path / "l.nii", trees.label_volume(1))
    gap, broken = Finding("warn", "gap", "a gap"), Finding("error", "reading", "broken")
    assert survey(image, label, findings=(gap,)).findings == (gap,)
    assert survey("nowhere.nii", label, findings=(gap,)).findings[1:] == (gap,)
    assert survey("", "", findings=(gap, broken)) == CaseSurvey(case="case_1", findings=(gap, broken))


@pytest.mark.parametrize(
    ("values", "warned"),
    [((2, 1), False), ((1, 2), True), ((2,), False), ((1,), False), ((3,), False)],
)
@pytest.mark.parametrize("axes", ["LPS", "RAS", "SLA"])
def test_exchanged_sides_are_a_warning(tmp_path, survey, values, warned, axes):
    """The first block lies to the right."""
    change = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(trees.AFFINE), nibabel.orientations.axcodes2ornt(axes)
    )
    for name, voxels in (("i", trees.ct_volume(1)), ("l", trees.label_volume(*values))):
        nibabel.save(nibabel.Nifti1Image(voxels, trees.AFFINE).as_reoriented(change), tmp_path / f"{name}.nii")
    found = survey(str(tmp_path / "i.nii"), str(tmp_path / "l.nii"), label_map=KIDNEYS)
    assert [finding.text for finding in found.findings] == (
        ["the left kidney lies to the right of its partner: sides exchanged in the label, or a wrong affine"]
        if warned
        else []
    )


def test_the_patients_right_is_the_pictures_left(tmp_path, survey):
    image = picture(tmp_path / "i.png", trees.grey(1))
    left, right = np.zeros((20, 24), np.uint8), np.zeros((20, 24), np.uint8)
    left[4:9, 2:6], right[4:9, 14:20] = 255, 255
    masks = {"at the left": picture(tmp_path / "l.png", left), "at the right": picture(tmp_path / "r.png", right)}
    usual = survey(image, {"right lung": masks["at the left"], "left lung": masks["at the right"]}, modality="xray")
    swapped = survey(image, {"left lung": masks["at the left"], "right lung": masks["at the right"]}, modality="xray")
    assert [len(usual.findings), len(swapped.findings)] == [0, 1]


# -------------------------------------------------------------------------------------------------------------- copies


def test_content_is_shape_and_voxels():
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert content_hash(image) == content_hash(image.clone())
    assert content_hash(image.permute(0, 3, 2, 1)) == content_hash(image.permute(0, 3, 2, 1).contiguous())
    others = [image.reshape(1, 3, 2, 4), image + 1e-6 * image, image.double(), image.flip(1), image.permute(0, 3, 2, 1)]
    assert len({content_hash(other) for other in [image, *others]}) == 6


def test_copies_are_found_whatever_their_files(tmp_path, survey):
    label = volume(tmp_path / "l.nii", trees.label_volume(1))
    ways = [volume(tmp_path / name, trees.ct_volume(1)) for name in ("a.nii", "b.nii.gz")]
    ways.append(volume(tmp_path / "c.nii", trees.ct_volume(1).astype(np.float32)))
    assert len({survey(image, label).content for image in ways}) == 1
    assert survey(volume(tmp_path / "d.nii", trees.ct_volume(2)), label).content != survey(ways[0], label).content


def copies(**sections):
    """Cases of one content, by name and section; what is said of each."""
    surveys = [CaseSurvey(case=name, content="same") for name in sections]
    marked = mark_copies([*surveys, CaseSurvey(case="z", content="other"), CaseSurvey(case="y")], sections=sections)
    assert [survey.findings for survey in marked[-2:]] == [(), ()]
    return {
        survey.case: [(finding.severity, finding.text.partition(",")[0]) for finding in survey.findings]
        for survey in marked[:-2]
    }


def test_copies_without_a_split_are_warnings():
    assert copies(a=None, b=None) == {"a": [("warn", "the same image as b")], "b": [("warn", "the same image as a")]}
    assert copies(a=None) == {"a": []}


@pytest.mark.parametrize(
    ("own", "other", "severities"),
    [
        ("training", "training", ("warn", "warn")),
        ("training", "validation", ("error", "warn")),
        ("training", "test", ("error", "warn")),
        ("validation", "test_etis", ("error", "warn")),
        ("test_kvasir", "test_etis", ("warn", "warn")),
    ],
)
def test_a_copy_across_sections_is_an_error_where_it_teaches(own, other, severities):
    assert tuple(copies(a=own, b=other)[name][0][0] for name in "ab") == severities
    assert tuple(copies(a=other, b=own)[name][0][0] for name in "ba") == severities


def test_the_error_names_both_and_their_sections():
    surveys = [CaseSurvey(case="a", content="x"), CaseSurvey(case="b", content="x")]
    marked = mark_copies(surveys, sections={"a": "training", "b": "test"})
    assert marked[0].error == "the same image as b of the section test, while this one is of training"
    assert marked[1].error is None


def test_of_three_copies_the_test_one_stays():
    assert copies(a="validation", b="training", c="test", d="training") == {
        "a": [("error", "the same image as c of the section test")],
        "b": [("error", "the same image as c of the section test")],
        "c": [("warn", "the same image as a")],
        "d": [("error", "the same image as c of the section test")],
    }
