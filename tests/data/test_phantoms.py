"""Phantoms: the same bytes for the same seed, and abdomens in which every organ is where and what it should be."""

import gzip
import hashlib
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from scripts.data import phantoms
from scripts.data.phantoms import LABEL_MAP, Phantom, make_phantom, write_phantoms
from scripts.errors import ConfigError, OutputError

LIVER, SPLEEN, PANCREAS, LEFT_KIDNEY, RIGHT_KIDNEY = range(1, 6)
CASES = 8
VOLUMES_ML = {LIVER: (1100, 1600), SPLEEN: (150, 350), PANCREAS: (60, 110), LEFT_KIDNEY: (130, 200)}
VOLUMES_ML[RIGHT_KIDNEY] = VOLUMES_ML[LEFT_KIDNEY]
MEANS_HU = {LIVER: (100, 122), SPLEEN: (108, 132), PANCREAS: (80, 110), LEFT_KIDNEY: (145, 195)}
MEANS_HU[RIGHT_KIDNEY] = MEANS_HU[LEFT_KIDNEY]
SMALL = {"size": 32, "slices": 12}


@pytest.fixture(scope="module")
def cases() -> list[Phantom]:
    return [make_phantom(np.random.default_rng((0, number))) for number in range(CASES)]


def patient_points(case: Phantom, mask: np.ndarray) -> np.ndarray:
    """Voxel centres of a mask in patient millimetres (N, 3): right, anterior, superior."""
    return nibabel.affines.apply_affine(case.affine, np.argwhere(mask))


def body_centre(case: Phantom) -> np.ndarray:
    return nibabel.affines.apply_affine(case.affine, np.argwhere(case.hu > -300).mean(axis=0))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_gives_the_same_bytes(tmp_path):
    write_phantoms(tmp_path / "a", training=1, validation=1, test=1, **SMALL)
    write_phantoms(tmp_path / "b", training=1, validation=1, test=1, **SMALL)
    first = digests(tmp_path / "a")
    assert len(first) == 7  # three images, three label maps, the datalist
    assert first == digests(tmp_path / "b")


def test_compressed_files_carry_no_time_stamp(tmp_path):
    write_phantoms(tmp_path, training=1, validation=0, test=0, **SMALL)
    content = (tmp_path / "images/phantom_000.nii.gz").read_bytes()
    assert content[4:8] == b"\0\0\0\0"  # RFC 1952: MTIME follows magic, method and flags


def test_a_case_depends_on_seed_and_number_alone(tmp_path):
    write_phantoms(tmp_path / "few", training=1, validation=0, test=1, **SMALL)
    write_phantoms(tmp_path / "many", training=2, validation=2, test=0, **SMALL)
    few, many = digests(tmp_path / "few"), digests(tmp_path / "many")
    shared_cases = [name for name in few if name.endswith(".nii.gz")]
    assert len(shared_cases) == 4
    assert all(few[name] == many[name] for name in shared_cases)


def test_another_seed_gives_other_patients(tmp_path):
    write_phantoms(tmp_path / "a", training=1, validation=0, test=0, **SMALL)
    write_phantoms(tmp_path / "b", training=1, validation=0, test=0, seed=1, **SMALL)
    first, second = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert first["images/phantom_000.nii.gz"] != second["images/phantom_000.nii.gz"]


def test_datalist_names_every_case_once_and_splits_are_distinct(tmp_path):
    path = write_phantoms(tmp_path, training=2, validation=1, test=2, **SMALL)
    datalist = json.loads(path.read_text())
    assert path == tmp_path / "datalist.json"
    assert datalist["name"] == "phantoms"
    assert datalist["label_map"] == {
        "1": "liver",
        "2": "spleen",
        "3": "pancreas",
        "4": "left kidney",
        "5": "right kidney",
    }
    assert [len(datalist[split]) for split in ("training", "validation", "test")] == [2, 1, 2]
    entries = [entry for split in ("training", "validation", "test") for entry in datalist[split]]
    assert [entry["case"] for entry in entries] == [f"phantom_{number:03d}" for number in range(5)]
    assert {entry["modality"] for entry in entries} == {"CT"}
    for kind in ("image", "label"):
        contents = {gzip.decompress((tmp_path / entry[kind]).read_bytes()) for entry in entries}
        assert len(contents) == 5


def test_files_hold_the_phantom(tmp_path):
    write_phantoms(tmp_path, training=0, validation=0, test=1, seed=3, **SMALL)
    image = nibabel.load(tmp_path / "images/phantom_000.nii.gz")
    label = nibabel.load(tmp_path / "labels/phantom_000.nii.gz")
    case = make_phantom(np.random.default_rng((3, 0)), **SMALL)
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(image.dataobj), case.hu)
    np.testing.assert_array_equal(np.asarray(label.dataobj), case.labels)
    np.testing.assert_allclose(image.affine, case.affine, atol=1e-4)
    np.testing.assert_array_equal(image.affine, label.affine)


def test_nothing_but_the_data_set_is_left_behind(tmp_path):
    write_phantoms(tmp_path, training=1, validation=0, test=0, **SMALL)
    assert set(digests(tmp_path)) == {
        "datalist.json",
        "images/phantom_000.nii.gz",
        "labels/phantom_000.nii.gz",
    }


def test_an_empty_set_is_a_datalist_without_cases(tmp_path):
    datalist = json.loads(write_phantoms(tmp_path, training=0, validation=0, test=0).read_text())
    assert datalist["training"] == datalist["validation"] == datalist["test"] == []


def test_geometry_is_that_of_an_abdominal_scan(cases):
    spacings = np.asarray([nibabel.affines.voxel_sizes(case.affine) for case in cases])
    assert all(case.hu.shape == case.labels.shape == (128, 128, 24) for case in cases)
    assert all(case.hu.dtype == np.int16 and case.labels.dtype == np.uint8 for case in cases)
    assert (spacings[:, 0] == spacings[:, 1]).all()
    assert ((spacings[:, 0] > 2.6) & (spacings[:, 0] < 3.0)).all()
    assert ((spacings[:, 2] > 5) & (spacings[:, 2] <= 7)).all()
    assert len(np.unique(spacings[:, 0])) == CASES


def test_files_come_in_several_orientations(cases):
    orientations = {"".join(nibabel.aff2axcodes(case.affine)) for case in cases}
    assert "LPS" in orientations
    assert len(orientations) >= 2
    assert orientations <= set(phantoms.ORIENTATIONS)


@pytest.mark.parametrize("label", LABEL_MAP)
def test_organs_have_the_volumes_of_an_adult(cases, label):
    for case in cases:
        voxel_ml = abs(np.linalg.det(case.affine[:3, :3])) / 1000
        low, high = VOLUMES_ML[label]
        assert low <= (case.labels == label).sum() * voxel_ml <= high


@pytest.mark.parametrize("label", LABEL_MAP)
def test_every_organ_is_one_piece_that_no_border_cuts(cases, label):
    for case in cases:
        mask = case.labels == label
        assert ndimage.label(mask)[1] == 1
        inner = np.zeros_like(mask)
        inner[1:-1, 1:-1] = True
        assert not (mask & ~inner).any()


@pytest.mark.parametrize("label", LABEL_MAP)
def test_every_organ_has_slices_with_and_without_it(cases, label):
    for case in cases:
        present = (case.labels == label).any(axis=(0, 1))
        assert present.any()
        assert not present.all()


def test_label_map_keeps_organs_apart(cases):
    for case in cases:
        assert set(np.unique(case.labels)) == {0, *LABEL_MAP}


@pytest.mark.parametrize(
    ("label", "side"), [(LIVER, 1), (RIGHT_KIDNEY, 1), (SPLEEN, -1), (LEFT_KIDNEY, -1)], ids=lambda value: str(value)
)
def test_organs_lie_on_their_side_of_the_patient(cases, label, side):
    for case in cases:
        distance = patient_points(case, case.labels == label).mean(axis=0)[0] - body_centre(case)[0]
        assert side * distance > 20


def test_organs_lie_in_front_of_and_above_each_other(cases):
    for case in cases:
        middle = {label: patient_points(case, case.labels == label).mean(axis=0) for label in LABEL_MAP}
        for kidney in (LEFT_KIDNEY, RIGHT_KIDNEY):
            assert middle[kidney][1] < middle[PANCREAS][1]
            assert middle[kidney][2] < middle[SPLEEN][2]


def test_the_lower_liver_stays_on_the_right(cases):
    for case in cases:
        points = patient_points(case, case.labels == LIVER)
        lower = points[points[:, 2] < points[:, 2].min() + 40]
        assert np.quantile(lower[:, 0], 0.1) > body_centre(case)[0] - 10


def test_pancreas_crosses_the_midline_in_front_of_the_aorta(cases):
    for case in cases:
        points = patient_points(case, case.labels == PANCREAS)
        spine = patient_points(case, case.hu > 200)
        centre = np.median(spine[np.abs(spine[:, 0] - body_centre(case)[0]) < 40], axis=0)
        assert points[:, 0].max() > centre[0] + 15
        assert points[:, 0].min() < centre[0] - 40
        across = points[np.abs(points[:, 0] - centre[0]) < 15]
        assert across[:, 1].min() > centre[1] + 25


def test_the_pancreas_is_thick_enough_to_be_resolved(cases):
    for case in cases:
        mask = (case.labels == PANCREAS).astype(int)
        mask = mask[ndimage.find_objects(mask)[0]]
        depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=nibabel.affines.voxel_sizes(case.affine))
        assert 2 * depth.max() > 20


def test_kidneys_differ_by_side_only(cases):
    sides = (LEFT_KIDNEY, RIGHT_KIDNEY)
    means = np.asarray([[case.hu[case.labels == side].mean() for side in sides] for case in cases])
    counts = np.asarray([[(case.labels == side).sum() for side in sides] for case in cases])
    assert abs(np.diff(means.mean(axis=0))[0]) < 10
    assert 0.85 < counts[:, 0].sum() / counts[:, 1].sum() < 1.18


def test_attenuation_runs_from_air_to_bone(cases):
    for case in cases:
        assert case.hu.min() >= -1024
        assert case.hu.max() <= 3071
        assert (case.hu > 300).sum() > 500
        assert abs(np.median(case.hu[:3]) + 1000) < 10
        assert abs(np.median(case.hu[-3:]) + 1000) < 10


@pytest.mark.parametrize("label", LABEL_MAP)
def test_organs_have_portal_venous_attenuation(cases, label):
    for case in cases:
        inner = ndimage.binary_erosion(case.labels == label, iterations=2)
        low, high = MEANS_HU[label]
        assert low <= case.hu[inner].mean() <= high


def test_noise_is_that_of_a_soft_tissue_scan(cases):
    for case in cases:
        inner = ndimage.binary_erosion(case.labels == LIVER, iterations=3)
        assert 11 <= case.hu[inner].std() <= 20


def test_kidney_cortex_is_brighter_than_the_medulla(cases):
    for case in cases:
        sampling = nibabel.affines.voxel_sizes(case.affine)
        depth = ndimage.distance_transform_edt(case.labels == RIGHT_KIDNEY, sampling=sampling)
        cortex, medulla = case.hu[(depth > 4) & (depth < 8)].mean(), case.hu[depth > 14].mean()
        assert cortex > medulla + 15


@pytest.mark.parametrize(("size", "slices"), [(32, 12), (64, 40)])
def test_other_grids_cover_the_same_abdomen(size, slices):
    case = make_phantom(np.random.default_rng((0, 0)), size=size, slices=slices)
    assert case.hu.shape == (size, size, slices)
    voxel_ml = abs(np.linalg.det(case.affine[:3, :3])) / 1000
    for label, (low, high) in VOLUMES_ML.items():
        assert 0.8 * low <= (case.labels == label).sum() * voxel_ml <= 1.2 * high


@pytest.mark.parametrize(("size", "slices"), [(31, 24), (128, 11)])
def test_a_grid_too_coarse_is_refused(size, slices):
    with pytest.raises(ConfigError, match=f"got size {size} and slices {slices}"):
        make_phantom(np.random.default_rng(0), size=size, slices=slices)


@pytest.mark.parametrize("option", ["training", "validation", "test", "seed"])
def test_negative_numbers_are_refused(tmp_path, option):
    with pytest.raises(ConfigError, match="0 or more"):
        write_phantoms(tmp_path, **{option: -1})
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError, match="writable folder"):
        write_phantoms(blocked, training=1, validation=0, test=0, **SMALL)
