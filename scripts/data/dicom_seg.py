"""DICOM Segmentation objects: a label map laid onto the slices of the DICOM series it was predicted from.

highdicom writes them; it is an extra (`pip install automedsam[dicom]`) and imported only where one is asked for. Unlike
everything else that the bundle writes, such an object names the patient: DICOM keeps it with its series by that.
"""

import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from scripts.data.reading import NIFTI_SUFFIXES, PICTURE_SUFFIXES, VOLUME_SUFFIXES, is_dicom
from scripts.data.vocabulary import ClassEntry, Code, Codes
from scripts.errors import ConfigError, InputError
from scripts.files import atomic_path

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SEG = "dicom-seg"
OUTPUT_FORMATS = ("nifti", DICOM_SEG)
PRIVATE_SCHEME = "99AUTOMEDSAM"
# What an object without a name is: a place that somebody pointed at. Of DICOM's context group 7150.
PLACE = Code("SCT", "309825002", "Spatial and Relational Concept")
ARTIFICIAL_INTELLIGENCE = Code("DCM", "123110", "Artificial Intelligence")  # of context group 7162
SERIES_OFFSET = 1000  # to the source's series number, so that the two do not lie under one number in a viewer
LONGEST_LABEL = 64  # letters of a DICOM long string

# What DICOM lets a file leave empty, and highdicom reads all the same.
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns")
# How far, in pixels and in slices, a source slice may lie from the place that the affine gives it: positions are often
# rounded to 0.1 mm, and distances may differ by a tenth, see `reading`.
_NEAR = 0.5
_FOREIGN = 255  # no segment's number: of the classes of a label map in bytes and its objects there are fewer

logger = logging.getLogger(__name__)

# DICOM's x and y point left and back, those of the affine right and front.
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Algorithm:
    """What made a segmentation.

    Attributes:
        name: as its viewers show it.
        version: of the bundle.
    """

    name: str
    version: str

    @classmethod
    def read(cls, path: str | Path) -> "Algorithm":
        """Read name and version from a bundle's metadata.json.

        Raises:
            ConfigError: it cannot be read or does not say.
        """
        try:
            metadata = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(str(metadata["name"]), str(metadata["version"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected the bundle's metadata with name and version, which a DICOM Segmentation states as "
                f"its algorithm, got a file that cannot be used ({type(error).__name__})"
            ) from error


def require_highdicom() -> Any:
    """Import highdicom.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise ConfigError(
            f"the output format {DICOM_SEG} needs highdicom, which is not installed: pip install 'automedsam[dicom]', "
            "or pip install highdicom, or use --output_format nifti"
        ) from error
    return highdicom


# --------------------------------------------------------------------------------------------------------- reading


class LoadSeriesd(MapTransform):
    """Read the headers of the DICOM series under an image's path(s), before the image takes the place of the path(s).

    Args:
        keys: of the path, or the paths of a series.
        series_key: of the headers, a list of pydicom data sets without their pixels, in the order of the paths.

    Raises:
        ConfigError: highdicom is not installed.
        InputError: the input is no DICOM series, or one that a segmentation cannot refer to, see `read_headers`.
    """

    def __init__(self, keys: KeysCollection = "image", *, series_key: str = "series") -> None:
        super().__init__(keys)
        self.series_key = series_key
        require_highdicom()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the headers."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[self.series_key] = read_headers([os.fspath(path) for path in ensure_tuple(result[key])])
        return result


def read_headers(files: Sequence[str]) -> list["Dataset"]:
    """Read the headers of a DICOM series.

    Args:
        files: of one series, in any order.

    Returns:
        One header a file, in the order of the files; what may be empty and is missing is there and empty.

    Raises:
        InputError: a file is no DICOM, holds several frames or lacks what a segmentation refers to.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    headers: list[Dataset] = []
    for file in files:
        _require_dicom(file)
        try:
            # `force`: ITK reads files without DICOM's preamble, too.
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        except (OSError, InvalidDicomError, ValueError, EOFError) as error:
            name = os.path.basename(file)
            raise InputError(f"{name}: expected a DICOM file, got one whose header cannot be read") from error
        _require_references(header, os.path.basename(file))
        for keyword in _MAY_BE_EMPTY:
            if keyword not in header:
                setattr(header, keyword, None)
        headers.append(header)
    return headers


def _require_dicom(file: str) -> None:
    """Refuse a file of another kind by its name, or by its content where the name tells nothing."""
    name = os.path.basename(file)
    others = dict.fromkeys(NIFTI_SUFFIXES, "NIfTI")
    others |= {suffix: suffix.strip(".").upper() for suffix in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES)}
    kind = next((kind for suffix, kind in others.items() if name.lower().endswith(suffix)), None)
    if kind is None and not is_dicom(file):
        kind = "no DICOM"
    if kind is not None:
        raise InputError(
            f"{DICOM_SEG} needs a DICOM series; {name} is {kind}: give the folder of the series, or use "
            "--output_format nifti"
        )


def _require_references(header: "Dataset", name: str) -> None:
    """Refuse what a segmentation cannot refer to slice by slice."""
    missing = [keyword for keyword in _NEEDED if header.get(keyword) in (None, "")]
    if "ImagePositionPatient" in header and header.get("FrameOfReferenceUID") in (None, ""):
        missing.append("FrameOfReferenceUID")
    if missing:
        raise InputError(
            f"{name}: a DICOM Segmentation refers to its source by {', '.join(missing)}, which the file lacks; export "
            "the series again, or use --output_format nifti"
        )
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise InputError(
            f"{name}: {DICOM_SEG} needs a series with one frame a file, got {frames} frames in one; convert it to a "
            "classic series, or use --output_format nifti"
        )


# --------------------------------------------------------------------------------------------------------- placing


def arrange(
    headers: Sequence["Dataset"], affine: np.ndarray, shape: tuple[int, int, int], *, name: str
) -> list["Dataset"]:
    """Find the source slice of each slice of a label map by where both lie in the patient, whatever the files' order.

    Args:
        headers: of the series, in any order.
        affine: `(4, 4)` of the label map, voxel indices to mm (RAS+).
        shape: of the label map, (X, Y, Z).
        name: of the case, for messages.

    Returns:
        The headers in the order of the label map's third axis.

    Raises:
        InputError: other numbers of slices, rows or columns than the label map's, or slices in other places.
    """
    sizes = {(int(header.Columns), int(header.Rows)) for header in headers}
    if sizes != {shape[:2]} or len(headers) != shape[2]:
        raise InputError(
            f"{name}: expected {shape[2]} source slices of {shape[0]} columns and {shape[1]} rows, got {len(headers)} "
            f"of {sorted(sizes)}; give one complete series"
        )
    placed = ["ImagePositionPatient" in header and "ImageOrientationPatient" in header for header in headers]
    if len(headers) == 1 and not any(placed):
        return list(headers)  # a radiograph, or a photograph: there is no other slice to confuse it with
    if not all(placed):
        raise InputError(f"{name}: expected the position and the orientation of every source slice, got files without")
    to_voxel = np.linalg.inv(_RAS_TO_LPS @ np.asarray(affine, dtype=float))
    corners = np.stack([_corners(header) @ to_voxel.T for header in headers])[..., :3]  # (slices, 3 corners, 3)
    order = np.argsort(corners[:, 0, 2], kind="stable")
    expected = np.zeros((shape[2], 3, 3))
    expected[:, 1, 0], expected[:, 2, 1] = shape[0] - 1, shape[1] - 1
    expected[..., 2] = np.arange(shape[2])[:, None]
    distance = np.abs(corners[order] - expected)
    # Between the ends distances may drift, within the tenth that the reader allows; order and ends settle the rest.
    ends_fit = bool((distance[[0, -1], :, 2] < _NEAR).all())
    if not ends_fit or not (distance[..., :2] < _NEAR).all() or (np.diff(corners[order, 0, 2]) < _NEAR).any():
        raise InputError(
            f"{name}: expected the source slices where the label map's slices are, got some that lie elsewhere; give "
            "one complete series of parallel slices"
        )
    return [headers[index] for index in order]


def _corners(header: "Dataset") -> np.ndarray:
    """Place the first pixel, the last of its row and the last of its column: (3, 4) in mm, LPS+, homogeneous."""
    first = np.asarray(header.ImagePositionPatient, dtype=float)
    along_row, along_column = np.asarray(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
    between_rows, between_columns = (float(step) for step in header.get("PixelSpacing") or (1, 1))
    last_of_row = first + along_row * between_columns * (int(header.Columns) - 1)
    last_of_column = first + along_column * between_rows * (int(header.Rows) - 1)
    return np.c_[np.stack([first, last_of_row, last_of_column]), np.ones(3)]


# --------------------------------------------------------------------------------------------------------- writing


def write_dicom_seg(
    labels: np.ndarray,
    headers: Sequence["Dataset"],
    entries: Sequence[ClassEntry],
    path: Path,
    *,
    affine: np.ndarray,
    algorithm: Algorithm,
) -> Path:
    """Write a label map as one DICOM Segmentation of its source series, a binary segment for each class.

    The object lies in the study and the frame of reference of the series. Its frames refer to the source slices that
    they lie on; slices without a class have no frame of it. A class that was asked for and not found is a segment
    without frames. Where nothing at all was found, every segment has a frame of zeros on every slice, for DICOM wants
    at least one frame.

    Args:
        labels: class ids, (X, Y, Z) in the axes of the file as it was read, X the column and Y the row; 0 for none.
        headers: of the source series, in any order, see `read_headers`.
        entries: the classes asked for; segments are numbered in the order of their ids.
        path: the file, ending in .dcm, in an existing folder.
        affine: `(4, 4)` of the labels, voxel indices to mm (RAS+).
        algorithm: what made them.

    Returns:
        The file written.

    Raises:
        ConfigError: highdicom is not installed.
        InputError: the series is not the one of the labels, see `arrange`, or its headers contradict DICOM.
        OutputError: the file cannot be written. Nothing is left behind.
        ValueError: labels of another shape, or ids that are none of the entries'.
    """
    highdicom = require_highdicom()
    if labels.ndim != 3:
        raise ValueError(f"expected labels (X, Y, Z), got {labels.shape}")
    chosen = sorted(entries, key=lambda entry: entry.id)
    frames = _numbered(labels, chosen).transpose(2, 1, 0)  # slices, rows, columns
    found = bool(frames.any())
    if not found:
        logger.warning("%s: nothing was found; every segment is empty", path.name)
    sources = arrange(headers, affine, labels.shape, name=path.name)
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=frames,
            omit_empty_frames=found,
            segmentation_type="BINARY",
            segment_descriptions=[_describe(number, entry, algorithm) for number, entry in enumerate(chosen, 1)],
            content_label="SEGMENTATION",
            content_creator_name=f"{algorithm.name}^",  # the caret: a name of one part, and meant so
            coding_schemes=_private_schemes(highdicom, chosen),
            **_identity(highdicom, sources[0], algorithm),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # highdicom's own text stays in the cause, for it can hold what the headers say of the patient.
        raise InputError(
            f"{path.name}: expected a series whose headers are as DICOM has them, got one that highdicom refuses as "
            f"the source of a segmentation ({type(error).__name__}); look at it with a DICOM validator, or use "
            "--output_format nifti"
        ) from error
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary, enforce_file_format=True)
    return path


def _numbered(labels: np.ndarray, entries: Sequence[ClassEntry]) -> np.ndarray:
    """Turn class ids into segment numbers, 1 for the first entry."""
    known = {0, *(entry.id for entry in entries)}
    largest = max(int(labels.max(initial=0)), *known)
    table = np.full(largest + 1, _FOREIGN, dtype=np.uint8)
    table[0] = 0
    for number, entry in enumerate(entries, 1):
        table[entry.id] = number
    numbers = table[labels]
    if numbers.max(initial=0) == _FOREIGN:
        raise ValueError(f"expected the ids {sorted(known)} in the labels, got others up to {largest}")
    return numbers


def codes_of(entry: ClassEntry) -> Codes:
    """Give a class's codes: the vocabulary's, or else its id and name in the bundle's private scheme."""
    if entry.codes is not None:
        return entry.codes
    return Codes(category=PLACE, type=Code(PRIVATE_SCHEME, str(entry.id), entry.name[:LONGEST_LABEL]))


def _describe(number: int, entry: ClassEntry, algorithm: Algorithm) -> "Dataset":
    """Describe one segment: what it is, its colour, and what made it."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    codes = codes_of(entry)
    description: Dataset = SegmentDescription(
        segment_number=number,
        segment_label=entry.name[:LONGEST_LABEL],
        segmented_property_category=_concept(codes.category),
        segmented_property_type=_concept(codes.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=algorithm.name, family=_concept(ARTIFICIAL_INTELLIGENCE), version=algorithm.version
        ),
        anatomic_regions=None if codes.anatomy is None else [_concept(codes.anatomy)],
        display_color=CIELabColor.from_rgb(*entry.colour),
    )
    if codes.modifier is not None:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(codes.modifier)]
    return description


def _concept(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def _private_schemes(highdicom: Any, entries: Sequence[ClassEntry]) -> list[Any] | None:
    """Say what the private scheme is, where a segment has a code of it."""
    if all(codes_of(entry).type.scheme != PRIVATE_SCHEME for entry in entries):
        return None
    name = "Classes of the AutoMedSAM bundle without a code of SNOMED CT, and objects without a name"
    return [highdicom.coding_schemes.CodingSchemeIdentificationItem(PRIVATE_SCHEME, name=name)]


def _identity(highdicom: Any, source: "Dataset", algorithm: Algorithm) -> dict[str, Any]:
    """Give the object a series of its own, and what DICOM wants to know of its maker."""
    return {
        "series_instance_uid": highdicom.UID(),
        "series_number": int(source.get("SeriesNumber") or 0) + SERIES_OFFSET,
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": "The contributors of the AutoMedSAM bundle",
        "manufacturer_model_name": algorithm.name,
        "software_versions": algorithm.version,
        "device_serial_number": algorithm.version,  # DICOM wants one; of software there are only versions
        "series_description": f"{algorithm.name} segmentation",
    }
