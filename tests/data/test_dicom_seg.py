"""DICOM Segmentations: read back through the source's own instances, and compared with what those instances hold."""

import os
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from scripts import cli
from scripts.data.dicom_seg import Algorithm, LoadSeriesd, codes_of, read_headers, write_dicom_seg
from scripts.data.phantoms import make_phantom
from scripts.data.reading import find_inputs, read_image
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError, OutputError

IDS = (1, 2, 4)  # ids and segment numbers differ from the third on
ALGORITHM = Algorithm("AutoMedSAM", "0.1.0")
STUDY, SERIES, FRAME = "1.2.826.0.1.3680043.2.1125.1", "1.2.826.0.1.3680043.2.1125.2", "1.2.826.0.1.3680043.2.1125.3"
ORIGIN = (-31.5, 42.25, 103.5)
SPACING = (0.7, 0.9, 2.5)  # along a row, along a column, between slices


def turned(degrees):
    """Rows and columns of no patient axis."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]) @ np.array(
        [[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]
    )


# Directions in DICOM's axes (left, back, head): of a row, of a column, and from slice to slice.
DIRECTIONS = {
    "axial": np.eye(3),
    "axial from head to foot": np.diag([1.0, 1.0, -1.0]),
    "axial, prone": np.diag([-1.0, -1.0, 1.0]),
    "axial, feet first": np.diag([-1.0, 1.0, 1.0]),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], dtype=float),
    "sagittal from left to right": np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], dtype=float),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=float),
    "oblique": turned(20),
    "tilted gantry": np.array([[1, 0, 0], [0, 1, 0.2], [0, 0, 1]]),
}


def affine_of(directions, spacing=SPACING, origin=ORIGIN):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions * spacing, origin
    return affine


def save_series(folder, voxels, affine, *, seed=0, sop_class=CTImageStorage, modality="CT", uid=SERIES, **attributes):
    """Write (X, Y, Z) with an affine to mm (LPS+) as one file a slice; names and numbers say nothing of the places."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(voxels.shape[2])
    steps = np.linalg.norm(affine[:3, :2], axis=0)
    for index, name in enumerate(names):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = sop_class, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"{uid}.{index + 1}"
        header = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        header.SOPClassUID, header.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = STUDY, uid, FRAME
        header.Modality, header.SeriesNumber, header.InstanceNumber = modality, 7, int(name) + 1
        header.PatientID, header.PatientName, header.PatientBirthDate, header.PatientSex = "P1", "DOE^JANE", "", "F"
        header.StudyDate, header.StudyTime, header.SeriesDate, header.AccessionNumber = "20240102", "", "20240102", ""
        header.StudyID, header.Manufacturer, header.ReferringPhysicianName = "", "", ""
        header.PositionReferenceIndicator = ""
        header.ImagePositionPatient = [round(float(x), 6) for x in affine[:3] @ [0, 0, index, 1]]
        header.ImageOrientationPatient = [round(float(x), 8) for x in (affine[:3, :2] / steps).T.ravel()]
        header.PixelSpacing = [float(steps[1]), float(steps[0])]
        header.SliceThickness = float(np.linalg.norm(affine[:3, 2]))
        pixels = np.ascontiguousarray(voxels[:, :, index].T.astype(np.int16))
        header.Rows, header.Columns = pixels.shape
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.RescaleIntercept, header.RescaleSlope = 0, 1
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.PixelData = pixels.tobytes()
        for keyword, value in attributes.items():
            if value is None:
                delattr(header, keyword)
            else:
                setattr(header, keyword, value)
        header.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture
def random():
    return np.random.default_rng(20250602)


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture(scope="module")
def entries(vocabulary):
    return [vocabulary.entry(class_id) for class_id in IDS]


def ids_in(values):
    """What a network would find: the class whose place in `IDS` a voxel's value names, 0 for none."""
    return np.array([0, *IDS], dtype=np.uint8)[values.astype(int) % (len(IDS) + 1)]


def segment(folder, entries, path, *, ids=ids_in):
    """Read the series as the bundle does, label it voxel by voxel and write the labels."""
    (found,) = find_inputs(folder)
    image = read_image(found.image)
    headers = read_headers(found.image if isinstance(found.image, list) else [found.image])
    return write_dicom_seg(
        ids(image.numpy()[0]), headers[::-1], entries, path, affine=image.affine.numpy(), algorithm=ALGORITHM
    )


def sources_of(folder):
    return {header.SOPInstanceUID: header for header in map(pydicom.dcmread, folder.iterdir())}


def frames_of(written):
    """The frames of a segmentation, each with the segment and the source that it says it is of."""
    shared = written.SharedFunctionalGroupsSequence[0]
    pixels = written.pixel_array.reshape(-1, written.Rows, written.Columns)
    for frame, group in zip(pixels, written.PerFrameFunctionalGroupsSequence, strict=True):
        (derivation,) = group.DerivationImageSequence
        (source,) = derivation.SourceImageSequence
        number = (group if "SegmentIdentificationSequence" in group else shared).SegmentIdentificationSequence[0]
        yield frame, number.ReferencedSegmentNumber, source.ReferencedSOPInstanceUID, group


def assert_equal_in_the_sources_frames(written, sources, ids=IDS):
    """Every voxel of every source slice is in the segment that its own stored value names, and in no other."""
    found = {}
    for frame, number, uid, group in frames_of(written):
        assert (uid, number) not in found
        found[uid, number] = frame
        position = group.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose(position, sources[uid].ImagePositionPatient, atol=1e-4)
    for uid, source in sources.items():
        expected = ids_in(source.pixel_array)
        for number, class_id in enumerate(ids, 1):
            frame = found.pop((uid, number), np.zeros(expected.shape, np.uint8))
            assert np.array_equal(frame == 1, expected == class_id)
    assert not found


@pytest.mark.parametrize("name", DIRECTIONS)
def test_voxels_lie_on_the_slices_they_came_from(tmp_path, random, entries, name):
    voxels = random.integers(0, 400, (7, 5, 6))
    voxels[:, :, 3] //= 4
    voxels[:, :, 3] *= 4  # nothing on this slice
    folder = save_series(tmp_path / "scan", voxels, affine_of(DIRECTIONS[name]))
    sources = sources_of(folder)
    written = pydicom.dcmread(segment(folder, entries, tmp_path / "scan_seg.dcm"))
    assert_equal_in_the_sources_frames(written, sources)
    orientation = written.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    assert np.allclose(orientation, next(iter(sources.values())).ImageOrientationPatient, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_highdicom_reads_the_same_by_source_instance(tmp_path, random, entries, seed):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)), seed=seed)
    segment(folder, entries, tmp_path / "scan_seg.dcm")
    read = highdicom.seg.segread(tmp_path / "scan_seg.dcm")
    uids, headers = zip(*sorted(sources_of(folder).items()), strict=True)
    pixels = read.get_pixels_by_source_instance(list(uids))  # (instances, rows, columns, segments)
    for place, header in enumerate(headers):
        expected = np.stack([ids_in(header.pixel_array) == class_id for class_id in IDS], axis=-1)
        assert np.array_equal(pixels[place] == 1, expected)


def test_study_frame_of_reference_and_patient_are_the_sources(tmp_path, random, entries):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)))
    written = pydicom.dcmread(segment(folder, entries, tmp_path / "scan_seg.dcm"))
    assert (written.StudyInstanceUID, written.FrameOfReferenceUID) == (STUDY, FRAME)
    assert (written.PatientID, written.PatientName, written.StudyDate) == ("P1", "DOE^JANE", "20240102")
    assert (written.SOPClassUID.name, written.Modality) == ("Segmentation Storage", "SEG")
    assert written.SegmentationType == "BINARY"
    assert written.SeriesInstanceUID != SERIES
    (series,) = written.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == set(sources_of(folder))


def test_segments_say_what_they_are_and_what_made_them(tmp_path, random, entries):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)))
    written = pydicom.dcmread(segment(folder, entries[::-1], tmp_path / "scan_seg.dcm"))
    assert [item.SegmentNumber for item in written.SegmentSequence] == [1, 2, 3]
    assert [item.SegmentLabel for item in written.SegmentSequence] == ["liver", "spleen", "left kidney"]
    for item, entry in zip(written.SegmentSequence, entries, strict=True):
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        (made,) = item.SegmentationAlgorithmIdentificationSequence
        assert (made.AlgorithmName, made.AlgorithmVersion) == ("AutoMedSAM", "0.1.0")
        shown = highdicom.color.CIELabColor(0, 0, 0)
        shown._value = tuple(item.RecommendedDisplayCIELabValue)
        assert np.abs(np.subtract(shown.to_rgb(clip=True), entry.colour)).max() <= 1
    codes = [code_of(item.SegmentedPropertyTypeCodeSequence) for item in written.SegmentSequence]
    assert codes == [("SCT", "10200004", "Liver"), ("SCT", "78961009", "Spleen"), ("SCT", "64033007", "Kidney")]
    sides = written.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert code_of(sides) == ("SCT", "7771000", "Left")
    for item in written.SegmentSequence:
        assert code_of(item.SegmentedPropertyCategoryCodeSequence) == ("SCT", "91723000", "Anatomical Structure")
    assert "CodingSchemeIdentificationSequence" not in written


def code_of(sequence):
    (item,) = sequence
    return item.CodingSchemeDesignator, item.CodeValue, item.CodeMeaning


def test_a_red_liver_is_red_in_cielab(tmp_path, random, vocabulary):
    # The well-known value of sRGB's red under its own white, D65, which highdicom, dcmqi and viewers compute with.
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (4, 4, 3)), affine_of(np.eye(3)))
    liver = [vocabulary.entry(1)]
    path = segment(folder, liver, tmp_path / "a.dcm", ids=lambda values: (values % 2).astype(np.uint8))
    stored = np.array(pydicom.dcmread(path).SegmentSequence[0].RecommendedDisplayCIELabValue) / 65535
    assert np.allclose(stored * (100, 255, 255) - (0, 128, 128), (53.24, 80.09, 67.20), atol=0.1)


def test_codes_are_those_of_dicom(vocabulary):
    """Values and meanings agree with pydicom's copy of PS3.16, except where classes.yaml says otherwise."""
    from pydicom.sr._concepts_dict import concepts

    known = {(value, text[0]) for codes in concepts["SCT"].values() for value, text in codes.items()}
    elsewhere = {("41329004", "Polyp")}
    for entry in vocabulary.entries:
        codes = codes_of(entry)
        for code in filter(None, (codes.category, codes.type, codes.modifier, codes.anatomy)):
            if code.scheme == "SCT" and (code.value, code.meaning) not in elsewhere:
                assert (code.value, code.meaning) in known, entry.name
    private = [entry.name for entry in vocabulary.entries if codes_of(entry).type.scheme != "SCT"]
    assert private == ["cardiomediastinum"]


def test_objects_without_a_name_have_private_codes(tmp_path, random, vocabulary):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)))
    ids = (1, 201, 254)
    named = np.array([0, *ids], dtype=np.uint8)
    path = segment(
        folder,
        [vocabulary.entry(class_id) for class_id in ids],
        tmp_path / "a.dcm",
        ids=lambda values: named[values.astype(int) % 4],
    )
    written = pydicom.dcmread(path)
    kinds = [code_of(item.SegmentedPropertyTypeCodeSequence) for item in written.SegmentSequence]
    assert kinds[1:] == [("99AUTOMEDSAM", "201", "object 1"), ("99AUTOMEDSAM", "254", "object 54")]
    (scheme,) = written.CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99AUTOMEDSAM"
    for frame, number, uid, _ in frames_of(written):
        assert np.array_equal(frame == 1, sources_of(folder)[uid].pixel_array % 4 == number)


def test_a_class_that_is_not_there_is_a_segment_without_frames(tmp_path, random, entries):
    folder = save_series(tmp_path / "scan", random.integers(0, 100, (7, 5, 6)) * 4 + 1, affine_of(np.eye(3)))
    written = pydicom.dcmread(segment(folder, entries, tmp_path / "scan_seg.dcm"))
    assert len(written.SegmentSequence) == 3
    assert [number for _, number, _, _ in frames_of(written)] == [1] * 6


def test_nothing_found_is_a_segmentation_of_zeros(tmp_path, random, entries, caplog):
    folder = save_series(tmp_path / "scan", random.integers(0, 100, (7, 5, 6)) * 4, affine_of(np.eye(3)))
    written = pydicom.dcmread(segment(folder, entries, tmp_path / "scan_seg.dcm"))
    assert [item.SegmentLabel for item in written.SegmentSequence] == ["liver", "spleen", "left kidney"]
    assert int(written.NumberOfFrames) == 18
    assert not written.pixel_array.any()
    assert caplog.messages == ["scan_seg.dcm: nothing was found; every segment is empty"]
    assert_equal_in_the_sources_frames(written, sources_of(folder))


def test_one_class_alone(tmp_path, random, vocabulary):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)))
    path = segment(
        folder, [vocabulary.entry(2)], tmp_path / "a.dcm", ids=lambda values: 2 * (values % 4 == 1).astype(np.uint8)
    )
    for frame, number, uid, _ in frames_of(pydicom.dcmread(path)):
        assert number == 1
        assert np.array_equal(frame == 1, sources_of(folder)[uid].pixel_array % 4 == 1)


def test_a_radiograph_has_no_place_in_the_patient(tmp_path, random, entries):
    folder = save_series(
        tmp_path / "scan",
        random.integers(0, 400, (7, 5, 1)),
        affine_of(np.eye(3)),
        sop_class=DigitalXRayImageStorageForPresentation,
        modality="DX",
        **dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID")),
    )
    written = pydicom.dcmread(segment(folder, entries, tmp_path / "scan_seg.dcm"))
    (source,) = sources_of(folder).values()
    found = {number: frame for frame, number, _, _ in frames_of(written)}
    for number, class_id in enumerate(IDS, 1):
        assert np.array_equal(found[number] == 1, ids_in(source.pixel_array) == class_id)


def test_positions_rounded_to_a_tenth_and_drifting_distances(tmp_path, random, entries):
    """Half the distances are 4 % longer than the other half: in the middle, slices lie far off an even grid."""
    voxels = random.integers(0, 400, (7, 5, 60))
    affine = affine_of(turned(10), spacing=(0.35, 0.4, 2.5))
    folder = save_series(tmp_path / "scan", voxels, affine)
    steps = np.r_[0, np.cumsum(np.where(np.arange(59) < 30, 1.04, 0.96))]
    for header in map(pydicom.dcmread, sorted(folder.iterdir())):
        place = affine[:3] @ [0, 0, steps[int(header.SOPInstanceUID.split(".")[-1]) - 1], 1]
        header.ImagePositionPatient = [round(float(x), 1) for x in place]
        header.save_as(folder / f"{header.InstanceNumber - 1}.dcm")
    written = pydicom.dcmread(segment(folder, entries, tmp_path / "scan_seg.dcm"))
    assert_equal_in_the_sources_frames(written, sources_of(folder))


def test_a_missing_slice_is_refused_as_by_the_reader(tmp_path, random, entries):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)))
    gone = next(path for path in folder.iterdir() if pydicom.dcmread(path).SOPInstanceUID.endswith(".3"))
    gone.unlink()
    with pytest.raises(InputError, match="expected slices at even distances"):
        segment(folder, entries, tmp_path / "scan_seg.dcm")
    assert not (tmp_path / "scan_seg.dcm").exists()


def of_a_series(folder):
    (found,) = find_inputs(folder)
    return read_image(found.image), read_headers(found.image)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda headers: headers[:-1], "expected 6 source slices of 7 columns and 5 rows, got 5"),
        (lambda headers: [*headers[:-1], headers[0]], "source slices where the label map's slices are"),
        (lambda headers: [moved(header, [0, 0, 2.5]) for header in headers], "source slices where the label map's"),
        (lambda headers: [moved(header, [0.7, 0, 0]) for header in headers], "source slices where the label map's"),
        (lambda headers: [mirrored(header) for header in headers], "source slices where the label map's slices are"),
        (lambda headers: [without(headers[0], "ImagePositionPatient"), *headers[1:]], "the position and the orient"),
    ],
)
def test_slices_of_another_place_are_refused(tmp_path, random, entries, change, reason):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)))
    image, headers = of_a_series(folder)
    with pytest.raises(InputError, match=reason):
        write_dicom_seg(
            ids_in(image.numpy()[0]),
            change(headers),
            entries,
            tmp_path / "a.dcm",
            affine=image.affine.numpy(),
            algorithm=ALGORITHM,
        )
    assert not (tmp_path / "a.dcm").exists()


def moved(header, by):
    header.ImagePositionPatient = [x + step for x, step in zip(header.ImagePositionPatient, by, strict=True)]
    return header


def mirrored(header):
    """The same plane, its rows running the other way from the same corner."""
    header.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]
    return header


def without(header, keyword):
    delattr(header, keyword)
    return header


def test_labels_of_other_classes_are_a_defect(tmp_path, random, entries):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)))
    with pytest.raises(ValueError, match=r"expected the ids \[0, 1, 2\] in the labels, got others up to 4"):
        segment(folder, entries[:2], tmp_path / "a.dcm")


def test_what_a_file_may_leave_empty_may_be_missing(tmp_path, random, entries):
    gone = dict.fromkeys(["PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"])
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 6)), affine_of(np.eye(3)), **gone)
    written = pydicom.dcmread(segment(folder, entries, tmp_path / "scan_seg.dcm"))
    assert_equal_in_the_sources_frames(written, sources_of(folder))
    assert not written.PatientID


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"FrameOfReferenceUID": None}, "by FrameOfReferenceUID, which the file lacks"),
        ({"StudyInstanceUID": None}, "by StudyInstanceUID, which the file lacks"),
        ({"NumberOfFrames": 2}, "needs a series with one frame a file, got 2 frames"),
    ],
)
def test_files_that_nothing_can_refer_to(tmp_path, random, attributes, reason):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 2)), affine_of(np.eye(3)), **attributes)
    with pytest.raises(InputError, match=reason):
        read_headers([str(path) for path in folder.iterdir()])


def test_headers_that_highdicom_refuses(tmp_path, random, entries):
    folder = save_series(
        tmp_path / "scan", random.integers(0, 400, (7, 5, 2)), affine_of(np.eye(3)), PatientSex="SECRET"
    )
    with pytest.raises(InputError, match="highdicom refuses") as caught:
        segment(folder, entries, tmp_path / "a.dcm")
    assert "SECRET" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_gone(tmp_path, random, entries):
    folder = save_series(tmp_path / "scan", random.integers(0, 400, (7, 5, 2)), affine_of(np.eye(3)))
    with pytest.raises(OutputError, match=r"a\.dcm"):
        segment(folder, entries, tmp_path / "gone" / "a.dcm")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("scan.nii.gz", "NIfTI"), ("scan.nii", "NIfTI"), ("a.png", "PNG"), ("a.mha", "MHA"), ("x", "no DICOM")],
)
def test_what_is_no_dicom_is_refused_by_name(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(InputError, match=rf"dicom-seg needs a DICOM series; {name} is {kind}: give the folder"):
        LoadSeriesd()({"image": str(tmp_path / name)})


@pytest.mark.parametrize("content", ["", "{}", '{"name": "AutoMedSAM"}', "[1]"])
def test_metadata_without_name_and_version(tmp_path, content):
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(ConfigError, match="expected the bundle's metadata with name and version"):
        Algorithm.read(tmp_path / "metadata.json")


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The series of a phantom."""
    phantom = make_phantom(np.random.default_rng(5), size=64, slices=12)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ phantom.affine
    return save_series(tmp_path_factory.mktemp("phantom") / "study", phantom.hu, affine)


def infer(*words):
    cli.main(["infer", *map(str, words), "--progress_bar", "false"])


def test_the_command_line_writes_what_it_writes_as_nifti(tmp_path, study, phantom_model, capsys):
    words = [study, "--checkpoint", phantom_model, "--noise_seed", 0]
    infer(*words, "--output", tmp_path / "dicom", "--output_format", "dicom-seg")
    infer(*words, "--output", tmp_path / "nifti")
    assert sorted(path.name for path in (tmp_path / "dicom").iterdir()) == ["study_overlay.png", "study_seg.dcm"]
    volume = nibabel.load(tmp_path / "nifti" / "study_seg.nii.gz")
    labels = np.asarray(volume.dataobj)
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4, 5}
    written = pydicom.dcmread(tmp_path / "dicom" / "study_seg.dcm")
    ids = {"liver": 1, "spleen": 2, "pancreas": 3, "left kidney": 4, "right kidney": 5}
    segments = {item.SegmentNumber: ids[item.SegmentLabel] for item in written.SegmentSequence}
    assert sorted(segments.values()) == [1, 2, 3, 4, 5]
    assert written.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0.1.0"
    to_voxel = np.linalg.inv(volume.affine)
    found = np.zeros_like(labels)
    for frame, number, uid, group in frames_of(written):
        left, back, up = group.PlanePositionSequence[0].ImagePositionPatient
        x, y, place = np.rint(to_voxel @ [-left, -back, up, 1])[:3].astype(int)
        assert (x, y) == (0, 0)
        assert uid in sources_of(study)
        assert not (found[:, :, place][frame.T == 1]).any()
        found[:, :, place][frame.T == 1] = segments[number]
    assert np.array_equal(found, labels)


def test_a_file_of_another_kind_is_refused_before_anything_is_computed(tmp_path, study, capsys):
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 3), np.int16), np.eye(4)), study.parent / "scan.nii.gz")
    with pytest.raises(SystemExit):
        infer(study.parent / "scan.nii.gz", "--output", tmp_path / "out", "--output_format=dicom-seg", "--modality=CT")
    assert "dicom-seg needs a DICOM series; scan.nii.gz is NIfTI" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_series_with_a_slice_elsewhere_leaves_the_others_alone(tmp_path, phantom_model, capsys):
    """The volume can be read, for its ends fit; where its segmentation would lie is seen at the end."""
    everything = tmp_path / "studies"
    everything.mkdir()
    for number in range(3):
        phantom = make_phantom(np.random.default_rng(number), size=32, slices=12)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ phantom.affine
        series = save_series(tmp_path / str(number), phantom.hu, affine, uid=f"{SERIES}.{number}")
        for file in series.iterdir():
            header = pydicom.dcmread(file)
            left, back, up = header.ImagePositionPatient
            within = header.SOPInstanceUID.endswith(".6")
            header.ImagePositionPatient = [left + 9 * (number == 1 and within), back, up]
            header.save_as(everything / f"{number}_{file.name}")
    words = ["--checkpoint", phantom_model, "--output", tmp_path / "out", "--output_format", "dicom-seg"]
    with pytest.raises(SystemExit) as ended:
        infer(everything, *words)
    assert ended.value.code == 1
    assert "1 of 3 cases failed: " in capsys.readouterr().err
    written = [pydicom.dcmread(path) for path in (tmp_path / "out").glob("*.dcm")]
    referred = {item.ReferencedSeriesSequence[0].SeriesInstanceUID for item in written}
    assert referred == {f"{SERIES}.0", f"{SERIES}.2"}


def test_another_format_is_refused(tmp_path, study, capsys):
    with pytest.raises(SystemExit):
        infer(study, "--output", tmp_path / "out", "--output_format", "dicom")
    assert "the output format is one of nifti, dicom-seg, not 'dicom'" in capsys.readouterr().err


@pytest.mark.slow  # a process of its own
def test_without_highdicom_the_message_says_what_to_install(tmp_path, study, bundle_root):
    program = "import sys; sys.modules.update(highdicom=None, pydicom=None); from scripts.cli import main; main()"
    words = ["infer", study, "--output", tmp_path / "out", "--output_format", "dicom-seg"]
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=bundle_root,
        env={**os.environ, "PYTHONPATH": str(Path(bundle_root))},
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("or pip install highdicom, or use --output_format nifti")
    assert "needs highdicom, which is not installed: pip install 'automedsam[dicom]'" in ended.stderr
