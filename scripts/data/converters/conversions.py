"""Labels and images that no reader takes as they are: what is written anew, beside the datalist.

Everything else of a data set is read where it lies.
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image
from scipy import ndimage

from scripts.data.converters.finding import Files, Found, FoundCase
from scripts.data.converters.layouts import Meaning
from scripts.data.reading import dicom_series, read_image, read_mask
from scripts.errors import InputError
from scripts.files import atomic_path

CONVERTED = "converted"  # folder of the new files, beside the datalist
BODY_THRESHOLD = -300.0  # HU; what is denser is body, not air
# Share of a connected structure that must lie on the lesser side for it to be cut at the midline (a horseshoe kidney)
# instead of going whole to the other side.
_HORSESHOE_SHARE = 0.1
_EIGHT_BITS = 255
# What nibabel raises for a damaged or foreign file.
_NIFTI_ERRORS = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)


class Converter:
    """Writes the new files of a case, if it needs any, and gives the case that points to them.

    Args:
        found: what a source holds.
        output: the folder of the datalist; new files go into `converted/` in it.

    Attributes:
        label_map: value in label maps -> class name or None, as it holds after the conversion.
    """

    def __init__(self, found: Found, output: Path) -> None:
        self.folder = output / CONVERTED
        self.channel = found.channel
        self.sided, self.label_map = _sided_values(found.label_map)

    def __call__(self, case: FoundCase) -> FoundCase:
        """Convert one case.

        Raises:
            InputError: files that do not fit each other or cannot be read.
            OutputError: a file cannot be written.
        """
        if self.channel is not None:
            case = replace(case, image=_write_channel(case, self.channel, self.folder))
        if isinstance(case.label, dict):
            return replace(case, label={name: _united(case, name, self.folder) for name in case.label})
        if _is_series_with_pictures(case):
            case = replace(case, label=_write_series_label(case, self.folder))
        if self.sided:
            case = replace(case, label=_write_sides(case, self.sided, self.folder))
        return case


def _write_channel(case: FoundCase, channel: int, folder: Path) -> str:
    """Write one channel of an `(X, Y, Z, C)` image as a volume of its own."""
    name = Path(str(case.image)).name
    try:
        source: Any = nibabel.load(str(case.image))
        shape = source.shape
        if len(shape) != 4 or shape[3] <= channel:
            raise InputError(f"{name}: expected an image (X, Y, Z, C) with more than {channel} channels, got {shape}")
        voxels = np.asarray(source.dataobj[..., channel])
    except _NIFTI_ERRORS as error:
        raise InputError(f"{name}: expected a complete NIfTI file, got one that cannot be read") from error
    if voxels.dtype.itemsize > 4:  # of scaled values; no format of 64-bit whole numbers is read everywhere
        voxels = voxels.astype(np.float32)
    oriented = bool(source.header["sform_code"] > 0 or source.header["qform_code"] > 0)
    return save_nifti(voxels, source.affine, folder / "images" / f"{case.name}.nii.gz", oriented=oriented)


def _is_series_with_pictures(case: FoundCase) -> bool:
    return isinstance(case.image, str) and Path(case.image).is_dir() and isinstance(case.label, tuple)


def _write_series_label(case: FoundCase, folder: Path) -> str:
    """Lay pictures, one for each file of a DICOM series, onto the series as a label volume.

    A picture belongs to the DICOM file of its own name, and its rows and columns are that file's.
    """
    series = dicom_series(str(case.image))
    if len(series) != 1:
        raise InputError(f"{case.name}: expected one DICOM series in its folder, got {len(series)}")
    if len(series[0]) != len(case.label):
        raise InputError(
            f"{case.name}: expected a label picture for each of the {len(series[0])} DICOM files, got {len(case.label)}"
        )
    pictures = {Path(path).stem: path for path in map(str, case.label)}
    missing = [_file_name(file) for file in series[0] if Path(file).stem not in pictures]
    if missing:
        raise InputError(f"{case.name}: expected a label picture named like each DICOM file, got none for {missing[0]}")
    slices = [_read_values(pictures[Path(file).stem]).T for file in series[0]]  # (row, column) -> (X, Y)
    image = read_image(series[0])
    sizes = {values.shape for values in slices}
    if sizes != {tuple(image.shape[1:3])}:
        raise InputError(f"{case.name}: expected label pictures of {tuple(image.shape[1:3])}, got {sorted(sizes)}")
    voxels = np.stack(slices, axis=2)
    return save_nifti(voxels, image.affine.numpy(), folder / "labels" / f"{case.name}.nii.gz")


def _file_name(path: str) -> str:
    return Path(path).name


def _read_values(path: str) -> np.ndarray:
    """Read the stored numbers of a grey picture, `(row, column)` uint8."""
    try:
        with Image.open(path) as picture:
            values = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{_file_name(path)}: expected a complete picture, got one that cannot be read") from error
    if values.ndim != 2 or values.dtype not in (np.uint8, np.bool_):
        raise InputError(
            f"{_file_name(path)}: expected a label picture in 8-bit grey, got {values.shape} {values.dtype}"
        )
    return values.astype(np.uint8)


def _united(case: FoundCase, class_name: str, folder: Path) -> Files:
    """Give the mask of a class: as it is, or united from several files of one image."""
    files = case.label[class_name]  # type: ignore[index, call-overload]
    if isinstance(files, str) or isinstance(case.image, tuple):
        return files
    masks = [read_mask(file) for file in files]
    shapes = sorted({tuple(mask.shape[1:]) for mask in masks})
    if len(shapes) > 1 or shapes[0][2] > 1:
        raise InputError(
            f"{case.name}: expected several masks of {class_name} as pictures of one size (X, Y, 1), to unite them, "
            f"got {shapes}; unite them yourself"
        )
    union = np.logical_or.reduce([mask.numpy()[0, :, :, 0] for mask in masks])  # (1, X, Y, 1) -> (X, Y)
    path = folder / "labels" / class_name.replace(" ", "_") / f"{case.name}.png"
    return save_picture(union.T.astype(np.uint8) * _EIGHT_BITS, path)


# ------------------------------------------------------------------------------------------------------------- sides


def _sided_values(label_map: Mapping[int, Meaning]) -> tuple[dict[int, int], dict[int, str | None]]:
    """Find values that mean a left and a right structure in one, and give the right one a value of its own.

    Returns:
        value -> new value of the right structure, and the label map that holds after the division.
    """
    sided: dict[int, int] = {}
    result: dict[int, str | None] = {}
    free = max(label_map, default=0) + 1
    for value, meaning in label_map.items():
        if isinstance(meaning, tuple):
            left, right = sorted(meaning, key=lambda name: "left" not in name.casefold())
            sided[value] = free
            result |= {value: left, free: right}
            free += 1
        else:
            result[value] = meaning
    return sided, result


def _write_sides(case: FoundCase, sided: Mapping[int, int], folder: Path) -> str:
    """Write a label map in which left and right structures have values of their own."""
    # With its own affine, not the image's: whether the two fit each other is found out when the case is read.
    source = read_image(str(case.label))
    affine = source.affine.numpy()
    labels = _as_bytes(source.numpy()[0], case)
    foreign = [value for value in sided.values() if (labels == value).any()]
    if foreign:  # or it would be taken for the right structure
        raise InputError(f"{case.name}: the label values {foreign} are not in its label map; correct the file")
    image = read_image(case.image)
    midline = body_midline(image.numpy()[0], image.affine.numpy())
    for value, right_value in sided.items():
        labels[right_half(labels == value, affine, midline=midline)] = right_value
    return save_nifti(labels, affine, folder / "labels" / f"{case.name}.nii.gz")


def _as_bytes(values: np.ndarray, case: FoundCase) -> np.ndarray:
    """Make uint8 of label values `(X, Y, Z)`."""
    with np.errstate(invalid="ignore"):
        labels = values.astype(np.uint8)
    if not np.array_equal(labels, values):
        raise InputError(f"{case.name}: expected label values that are whole numbers in 0...255, got others")
    return labels


def body_midline(image: np.ndarray, affine: np.ndarray) -> float:
    """Estimate where the plane between left and right lies: the mean position of all that is denser than air.

    Args:
        image: CT `(X, Y, Z)` in HU.
        affine: `(4, 4)`, voxel indices to mm in RAS+.

    Returns:
        The R coordinate in mm.
    """
    body = image > BODY_THRESHOLD
    weights = [body.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    total = max(int(weights[0].sum()), 1)
    centre = [float(np.arange(len(weight)) @ weight) / total for weight in weights]
    return float(affine[0, :3] @ centre + affine[0, 3])


def right_half(mask: np.ndarray, affine: np.ndarray, *, midline: float) -> np.ndarray:
    """Find which voxels of a paired structure are the right one's.

    Each connected part goes to the side on which most of it lies. A part that reaches across the midline with a tenth
    of its volume or more, as a horseshoe kidney does, is cut there.

    Args:
        mask: bool `(X, Y, Z)`, both structures.
        affine: `(4, 4)`, voxel indices to mm in RAS+.
        midline: R coordinate of the plane between left and right in mm.

    Returns:
        bool `(X, Y, Z)`, a subset of `mask`.
    """
    right = np.zeros_like(mask)
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if not boxes:
        return right
    inner = mask[boxes[0]]  # numbering parts takes four bytes a voxel, so only where there are any
    parts, count = ndimage.label(inner, structure=np.ones((3, 3, 3)))
    corner = np.array([side.start for side in boxes[0]])
    for number, box in enumerate(ndimage.find_objects(parts, max_label=count), start=1):
        part = parts[box] == number
        indices = np.argwhere(part) + corner + [side.start for side in box]
        is_right = indices @ affine[0, :3] + affine[0, 3] > midline  # RAS+: larger R is further to the right
        on_right = int(is_right.sum())
        if min(on_right, len(indices) - on_right) < _HORSESHOE_SHARE * len(indices):
            is_right[:] = 2 * on_right > len(indices)
        chosen = indices[is_right]
        right[tuple(chosen.T)] = True
    return right


# ----------------------------------------------------------------------------------------------------------- writing


def save_nifti(voxels: np.ndarray, affine: np.ndarray, path: Path, *, oriented: bool = True) -> str:
    """Write a volume with its geometry in sform and qform; equal voxels give equal bytes.

    Args:
        voxels: `(X, Y, Z)` of a type that NIfTI has.
        affine: `(4, 4)`, voxel indices to mm in RAS+.
        path: the file, .nii.gz; its folder is made.
        oriented: whether the affine says where the patient's sides are; False keeps the codes of a file that does not.

    Returns:
        The path.

    Raises:
        OutputError: the file cannot be written.
    """
    volume = nibabel.Nifti1Image(voxels, affine)
    volume.header.set_xyzt_units("mm")
    code = "aligned" if oriented else "unknown"
    volume.set_sform(affine, code=code)
    volume.set_qform(affine, code=code)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        nibabel.save(volume, temporary)
    return str(path)


def save_picture(pixels: np.ndarray, path: Path) -> str:
    """Write a PNG.

    Args:
        pixels: uint8, `(row, column)` or `(row, column, 3)`.
        path: the file; its folder is made.

    Returns:
        The path.

    Raises:
        OutputError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
    return str(path)
