"""A pattern fits what it says and nothing else, and a tree is listed the same way everywhere."""

import os
from pathlib import Path

import pytest

from scripts.data.converters.patterns import FileTree, PathPattern, grouped, natural_order
from scripts.errors import ConfigError


def fields(pattern, path, **gaps):
    match = PathPattern(pattern, fields=gaps).match(path)
    return None if match is None else dict(match.fields)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("images/{case}.png", "images/a.png", {"prefix": "", "case": "a"}),
        ("images/{case}.png", "x/y/images/a b (1).png", {"prefix": "x/y/", "case": "a b (1)"}),
        ("images/{case}.png", "Images/A.PNG", {"prefix": "", "case": "A"}),
        ("images/{case}.png", "images/a.png.bak", None),
        ("images/{case}.png", "images/b/a.png", None),
        ("images/{case}.png", "myimages/a.png", None),  # a folder's name is fitted whole
        ("images/{case}.png", "images/aXpng", None),  # a dot is a dot
        ("{case}/{case}.png", "7/7.png", {"prefix": "", "case": "7"}),
        ("{case}/{case}.png", "7/8.png", None),
        ("{case}_{slice}.png", "p_1_012.png", {"prefix": "", "case": "p_1", "slice": "012"}),
        ("{case}_{slice}.png", "p_x.png", None),
        ("{case}.{nifti}", "a.1.nii.gz", {"prefix": "", "case": "a.1", "nifti": "nii.gz"}),
        ("{case}.{nifti}", "a.nii", {"prefix": "", "case": "a", "nifti": "nii"}),
        ("{case}.{nifti}", "a.png", None),
        ("{case}.{picture}", "a.TIFF", {"prefix": "", "case": "a", "picture": "TIFF"}),
        ("{case}.{suffix}", "scan.1.nii.gz", {"prefix": "", "case": "scan.1", "suffix": "nii.gz"}),
        ("{case}.{suffix}", "scan.1.png", {"prefix": "", "case": "scan.1", "suffix": "png"}),
        ("{case}.{suffix}", "scan.mhd", {"prefix": "", "case": "scan", "suffix": "mhd"}),
        ("{case}.{suffix}", "scan.raw", None),  # voxels of scan.mhd
        ("m/*Mask/{case}.png", "m/leftMask/3.png", {"prefix": "", "case": "3"}),
        ("{case}_m*.png", "a_m.png", {"prefix": "", "case": "a"}),
        ("MR/{case}/", "MR/5/", {"prefix": "", "case": "5"}),
        ("MR/{case}/", "MR/5", None),
    ],
)
def test_a_pattern_fits_or_not(pattern, path, expected):
    assert fields(pattern, path) == expected


def test_a_gap_holds_what_its_expression_says():
    assert fields("images{split}/{case}.png", "imagesTr/4.png", split="Tr|Va")["split"] == "Tr"
    assert fields("images{split}/{case}.png", "imagesTs/4.png", split="Tr|Va") is None


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        ("TestDataset/TestDataset/a.png", ""),
        ("x/TestDataset/TestDataset/a.png", "x/"),
        ("x/TestDataset/a.png", "x/"),
        ("MyTestDataset/TestDataset/a.png", "MyTestDataset/"),
        ("TestDataset/x/TestDataset/a.png", "TestDataset/x/"),
    ],
)
def test_a_folder_unpacked_into_its_double_is_one(path, prefix):
    assert fields("TestDataset/{case}.png", path)["prefix"] == prefix


@pytest.mark.parametrize("text", ["{case.png", "case}.png", "{Case}.png", "{}.png", "{case1}.png"])
def test_a_brace_without_its_partner_is_refused(text):
    with pytest.raises(ConfigError, match="brace"):
        PathPattern(text)


def test_a_broken_expression_is_refused():
    with pytest.raises(ConfigError, match=r"\{case\}.*cannot be read"):
        PathPattern("{case}", fields={"case": "("})


def test_numbers_within_names_count_as_numbers():
    names = ["s10", "s9", "s2b", "s2", "t1", "s02", "1", "a/10", "a/9"]
    assert sorted(names, key=natural_order) == ["1", "a/9", "a/10", "s02", "s2", "s2b", "s9", "s10", "t1"]
    # Names that are equal as numbers still have one order, whatever the file system hands out first.
    assert sorted(["s2", "s02"], key=natural_order) == sorted(["s02", "s2"], key=natural_order)


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def test_a_tree_leaves_out_what_archivers_and_systems_add(tmp_path):
    left = ("._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/x/a.png", "x/.ipynb_checkpoints/a.png", "out/b.png")
    tree = FileTree(make(tmp_path, "x/a10.png", "x/a9.png", "y.csv", *left), without=tmp_path / "out")
    assert tree.files == ["x/a9.png", "x/a10.png", "y.csv"]
    assert tree.folders == ["x/"]
    assert [match.path for match in tree.matches(PathPattern("{case}/"))] == ["x/"]
    assert tree.absolute("y.csv") == str(tmp_path / "y.csv")


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", "scan.nii")
    root = make(tmp_path / "root", "a/1.png", "b/2.png")
    for name, target in (("linked", elsewhere), ("a/up", root), ("a/above", tmp_path), ("a/b", root / "b")):
        os.symlink(target, root / name)
    os.symlink(root / "a", root / "b/a")
    files = FileTree(root).files
    assert {"a/1.png", "b/2.png", "linked/scan.nii"} <= set(files)
    assert max(path.count("/") for path in files) <= 3


def test_groups_know_no_upper_case():
    pattern = PathPattern("{patient}_{slice}.png")
    groups = grouped(pattern.matches(["A_1.png", "a_2.png", "b_1.png"]), ["patient"])
    assert {key: len(members) for key, members in groups.items()} == {("a",): 2, ("b",): 1}
