"""From files to tensors: which inputs a path holds, one image as ``(C, X, Y, Z)``, one label as ``(K, X, Y, Z)``.

NIfTI is read with nibabel itself (MONAI's NibabelReader makes float64 of scaled voxels, twice over), the other volumes
and DICOM with MONAI's ITKReader, pictures with MONAI's PILReader (ITK 5.4 reads a grey PNG with alpha as zeros, a
palette TIFF as wrong numbers and a 1-bit BMP not at all). Voxels stay as they are stored while nothing else is needed:
a CT of 512 x 512 x 400 takes 420 MB as float32. Of a file's metadata only geometry, modality and the file's base name
are kept, so no patient-identifying tag gets in.
"""

import logging
import os
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import itk
import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageReader, ITKReader, MetaTensor, PILReader
from monai.data.utils import affine_to_spacing, correct_nifti_header_if_necessary, to_affine_nd
from monai.transforms import MapTransform
from monai.utils import ensure_tuple
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, ImageDataError
from PIL import Image

from scripts.data.guard import Finding, enforce
from scripts.errors import InputError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
VOLUME_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr", ".hdr", ".gipl", ".gipl.gz")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
KNOWN_SUFFIXES = NIFTI_SUFFIXES + VOLUME_SUFFIXES + DICOM_SUFFIXES + PICTURE_SUFFIXES

# Voxel files that a header file of the same stem points to; they are no inputs of their own.
_DETACHED_VOXELS = {".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",), ".raw.gz": (".nhdr",), ".img": (".hdr",)}

# What DICOM (0008,0060) and MetaImage headers call the modalities that this bundle knows. A test keeps the DICOM codes
# equal to those of configs/classes.yaml. Any other text of that entry stays out.
_MODALITY_TAG = "0008|0060"
_MODALITY_NAMES = {
    "CT": "CT",
    "MR": "MR",
    "CR": "xray",
    "DX": "xray",
    "RG": "xray",
    "RF": "xray",
    "ES": "endoscopy",
    "DMS": "dermoscopy",
    "OP": "fundus",
    "US": "ultrasound",
    "SM": "microscopy",
    "GM": "microscopy",
    "MET_MOD_CT": "CT",
    "MET_MOD_MR": "MR",
}

# A picture has no geometry; this is the affine under which "PLS" is the transposition to (row, column).
_PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])

# Largest difference (mm) between the entries of two affines that still count as one geometry.
_AFFINE_TOLERANCE = 1e-3

# Share of the distance between two slices by which the distances of a DICOM series may differ: some round positions to
# 0.1 mm; where a slice is missing the difference is a whole distance.
_UNEVEN_SLICES = 0.1
# What ITK notes in an image's dictionary when it has read a series of uneven distances, in mm.
_UNEVEN_TAG = "ITK_non_uniform_sampling_deviation"

# Value from which a grey mask is foreground; how far compression leaves the values of a mask from 0 and 255.
_MASK_THRESHOLD = 128
_MASK_NOISE = 16

# Everything the readers raise for a damaged or foreign file.
_READER_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    OverflowError,
    zlib.error,
    ImageFileError,
    ImageDataError,
    HeaderDataError,
    Image.DecompressionBombError,
)

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Paths = PathLike | Sequence[PathLike]
Converter = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class InputFile:
    """One image to segment.

    Attributes:
        name: unique in its list and fit for a file name; taken from the file's or folder's name, never from content.
        image: path of the file, or the paths of a DICOM series in slice order; what ``read_image`` takes.
    """

    name: str
    image: str | list[str]


class InputList(list[InputFile]):
    """Inputs found under a path, and what was left out.

    Attributes:
        skipped: base names of files and folders that are no input, each with the reason in brackets.
    """

    def __init__(self, inputs: Iterable[InputFile], *, skipped: Iterable[str] = ()) -> None:
        super().__init__(inputs)
        self.skipped = tuple(skipped)


@dataclass(frozen=True)
class _Grid:
    """Voxels as they come from one file: ``(C, X, Y, Z)`` as stored, affine ``(4, 4)`` voxel -> mm in RAS."""

    voxels: np.ndarray
    affine: np.ndarray
    picture: bool
    modality: str | None = None
    stacked: bool = False
    oriented: bool = True

    @property
    def planar(self) -> bool:
        """Tell whether there is no spacing between slices."""
        return self.picture or self.stacked or self.voxels.shape[3] == 1


class _PictureReader(PILReader):
    """PILReader whose array can be written to; Pillow lends its own memory."""

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Return a copy of the pixels, and the metadata."""
        pixels, meta = super().get_data(img)
        return np.array(pixels), meta


class _SeriesReader(ITKReader):
    """Reads a list of DICOM files as one volume, where ITKReader would make a channel of each."""

    def read(self, data: Paths, **kwargs: Any) -> Any:
        """Return the ITK image of the files, in the order given."""
        files = [os.fspath(name) for name in ensure_tuple(data)]
        if len(files) == 1:
            return itk.imread(files[0], **kwargs)
        # The third axis as the slices' positions have it. Otherwise ITK takes it to be perpendicular and to follow the
        # order of the files: a tilted gantry would vanish, and slices from head to foot would be mirrored.
        reader = itk.ImageSeriesReader.New(FileNames=files, ForceOrthogonalDirection=False, **kwargs)
        reader.Update()
        image = reader.GetOutput()
        _check_distances(image, files)
        return image


# --------------------------------------------------------------------------------------------------------- finding


def find_inputs(path: PathLike) -> InputList:
    """List the images that a file or a folder holds.

    A file is one input. In a folder (its sub-folders are not entered, hidden files are ignored) each DICOM series is
    one input, named after the folder (with ``_series1``, ``_series2``, ... in the order of their first file names when
    there are several), and so is each file with a known suffix. Files of the same stem get ``_2``, ``_3``, ... A file
    with a DICOM suffix that belongs to no series is listed too: reading it tells what is wrong.

    Args:
        path: a file or a folder.

    Returns:
        The inputs in alphabetical order; ``skipped`` names what was left out.

    Raises:
        InputError: the path is missing, the file is of an unknown kind, or the folder holds no input.
    """
    path = os.path.abspath(os.fspath(path))
    _check_present(path)
    if os.path.isdir(path):
        return _find_in_folder(path)
    if not _suffix(path) and not is_dicom(path):
        raise InputError(f"{_name(path)}: unknown kind of file; expected {_expected_kinds()}")
    return InputList([InputFile(_stem(path), path)])


def list_cases(path: PathLike, *, modality: str | None = None) -> list[dict[str, Any]]:
    """List the inputs under a path as cases of a data set; what is left out is named in the log.

    Args:
        path: a file or a folder, see ``find_inputs``.
        modality: of all of them; None leaves it to the files' metadata.

    Returns:
        ``{"case": name, "image": path or paths, "modality": modality}`` each.

    Raises:
        InputError: see ``find_inputs``.
    """
    inputs = find_inputs(path)
    if inputs.skipped:
        logger.warning("left out: %s", ", ".join(inputs.skipped))
    return [{"case": item.name, "image": item.image, "modality": modality} for item in inputs]


def _find_in_folder(folder: str) -> InputList:
    """List the inputs directly inside a folder."""
    names = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    series = dicom_series(folder)
    of_series = {_name(file) for files in series for file in files}
    found = [InputFile(name, files) for name, files in zip(_series_names(folder, len(series)), series, strict=True)]
    skipped = []
    for name in names:
        reason = _reason_to_skip(folder, name)
        if name in of_series or reason == "":
            continue
        if reason is None:
            found.append(InputFile(_stem(name), os.path.join(folder, name)))
        else:
            skipped.append(f"{name} ({reason})")
    if not found:
        left = f" ({len(skipped)} other entries, e.g. {', '.join(skipped[:3])})" if skipped else ""
        raise InputError(f"{_name(folder)}: no image in this folder{left}; expected {_expected_kinds()}")
    return InputList(_with_unique_names(found), skipped=skipped)


def _reason_to_skip(folder: str, name: str) -> str | None:
    """Tell why a folder's entry is no input: None when it is one, empty when nobody needs to know."""
    if os.path.isdir(os.path.join(folder, name)):
        return "folder"
    if _suffix(name):
        return None
    for suffix, headers in _DETACHED_VOXELS.items():
        stem = os.path.join(folder, name[: -len(suffix)])
        if name.lower().endswith(suffix) and any(os.path.exists(stem + header) for header in headers):
            return ""
    return "unknown kind of file"


def dicom_series(folder: PathLike) -> list[list[str]]:
    """Group the DICOM files directly inside a folder.

    Args:
        folder: folder that may hold DICOM slices, with or without a suffix.

    Returns:
        One list of paths per series, ordered along the slice normal; the series in the order of their file names.
    """
    folder = os.fspath(folder)
    files = [entry.path for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    if not any(_may_be_dicom(file) and is_dicom(file) for file in files):
        return []  # GDCM would complain on the error stream
    finder = itk.GDCMSeriesFileNames.New()
    # As MONAI's ITKReader: slices that differ in size, spacing, orientation or date make different volumes.
    finder.SetUseSeriesDetails(True)
    finder.AddSeriesRestriction("0008|0021")
    finder.SetDirectory(folder)
    return sorted(([str(file) for file in finder.GetFileNames(uid)] for uid in finder.GetSeriesUIDs()), key=min)


def _series_names(folder: str, count: int) -> list[str]:
    """Name the series of a folder after the folder."""
    base = _name(folder) or "series"
    return [base] if count == 1 else [f"{base}_series{number}" for number in range(1, count + 1)]


def _with_unique_names(inputs: Sequence[InputFile]) -> list[InputFile]:
    """Number inputs of the same name, for results are named after them (upper and lower case may be one on disk)."""
    taken: set[str] = set()
    unique = []
    for item in sorted(inputs, key=lambda item: item.name):
        name, number = item.name, 2
        while name.casefold() in taken:
            name, number = f"{item.name}_{number}", number + 1
        taken.add(name.casefold())
        unique.append(replace(item, name=name))
    return unique


def is_dicom(path: str) -> bool:
    """Tell whether a file's content is DICOM."""
    return bool(itk.GDCMImageIO.New().CanReadFile(path))


def _name(path: PathLike) -> str:
    """Return the last part of a path, which is what messages may show."""
    return os.path.basename(os.path.normpath(path))


def _suffix(path: PathLike) -> str:
    """Return the known suffix of a file name in lower case; empty when there is none."""
    name = _name(path).lower()
    return max((suffix for suffix in KNOWN_SUFFIXES if name.endswith(suffix)), key=len, default="")


def _stem(path: PathLike) -> str:
    """Return the file name without its known suffix."""
    name = _name(path)
    return name[: len(name) - len(_suffix(name))] or name


def _expected_kinds() -> str:
    """Say what can be read."""
    return f"a DICOM series or a file ending in {', '.join(KNOWN_SUFFIXES)}"


# --------------------------------------------------------------------------------------------------------- reading


def read_image(path: Paths) -> MetaTensor:
    """Read one image.

    Pictures keep their stored raster (an EXIF rotation is not applied), so that a result fits the file. Alpha is
    dropped, palette colours are resolved, 1-bit becomes 0 and 255.

    Args:
        path: a file, a folder with one DICOM series, the files of a DICOM series in slice order, or the 2D files of a
            stack in order (equal size).

    Returns:
        ``(C, X, Y, Z)`` float32 in file axes with C 1 (grey) or 3 (RGB), Z = 1 for one 2D image, stored intensities
        (HU for CT). Its ``affine`` ``(4, 4)`` maps voxels to mm in RAS+. Its ``meta`` holds besides: ``planar`` (2D
        image or stack of them: no through-plane spacing), ``picture`` (PNG, JPEG, TIFF, BMP, GIF, PPM: no geometry at
        all), ``oriented`` (the file says where the patient's sides are: not a picture, nor a NIfTI file whose sform and
        qform codes are 0), ``spacing`` (3 floats along the file axes; mm, or 1 pixel when planar), ``spatial_shape``,
        ``original_affine``, ``space``, ``filename_or_obj`` (base name of the first file) and ``modality`` if the file
        tells it.

    Raises:
        InputError: missing, unreadable, empty or damaged file, more than three axes, channels that are neither grey
            nor RGB (with alpha), slices of a stack that do not fit each other, or of a series at uneven distances.
    """
    grid = _read(path)
    _check_channels(grid, _described(path))
    return _as_meta_tensor(grid, filename=_name(_first(path)))


def _as_meta_tensor(grid: _Grid, *, filename: str, dtype: Any = np.float32) -> MetaTensor:
    """Make float32, or another type, of the voxels and attach the harmless part of the metadata."""
    spacing = (1.0, 1.0, 1.0) if grid.planar else tuple(float(edge) for edge in affine_to_spacing(grid.affine))
    meta = {
        "original_affine": torch.as_tensor(grid.affine),
        "spatial_shape": np.asarray(grid.voxels.shape[1:]),
        "space": "RAS",
        "planar": grid.planar,
        "picture": grid.picture,
        "oriented": grid.oriented,
        "spacing": spacing,
        "filename_or_obj": filename,
    }
    if grid.modality is not None:
        meta["modality"] = grid.modality
    voxels = torch.from_numpy(_in_c_order(grid.voxels, dtype))
    return MetaTensor(voxels, affine=torch.as_tensor(grid.affine), meta=meta)


def _in_c_order(
    stored: np.ndarray, dtype: Any, *, convert: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Copy voxels ``(C, X, Y, Z)`` to C order, in which the rest of the way is faster than in the files' Fortran order.

    It goes plane by plane: a plane fits into the processor's cache, where reading along one axis and writing along the
    other is ten times as fast as in a whole volume; and no whole copy in a third type is made on the way.

    Args:
        stored: in any order and type.
        dtype: of the result.
        convert: what becomes of a plane ``(C, X, Z)`` before it is stored.

    Returns:
        The copy; ``stored`` itself where nothing is to be done.
    """
    if convert is None and stored.flags.c_contiguous and stored.dtype == dtype:
        return stored
    result = np.empty(stored.shape, dtype)
    for index in range(stored.shape[2]):
        plane = stored[:, :, index].copy(order="K")
        result[:, :, index] = plane if convert is None else convert(plane)
    return result


def _read(path: Paths, *, converter: Converter | None = None) -> _Grid:
    """Read a file, a DICOM series or a stack; ``converter`` says what becomes of a picture (default: an image)."""
    converter = converter or _plain_colour
    if isinstance(path, str | os.PathLike):
        return _read_file(os.fspath(path), converter)
    files = [os.fspath(file) for file in path]
    if not files:
        raise InputError("expected at least one file of a stack, got an empty list")
    for file in files:
        _check_present(file)
    if _may_be_dicom(files[0]) and is_dicom(files[0]):
        return _read_with_itk(files)
    return _stack([_read_file(file, converter) for file in files], files)


def _read_file(path: str, converter: Converter) -> _Grid:
    """Read one file, or the only series of a folder."""
    _check_present(path)
    if os.path.isdir(path):
        return _read_with_itk(_only_series(path))
    suffix = _suffix(path)
    if suffix in PICTURE_SUFFIXES:
        return _read_picture(path, converter)
    return _read_nifti(path) if suffix in NIFTI_SUFFIXES else _read_with_itk([path])


def _read_picture(path: str, converter: Converter) -> _Grid:
    """Read a PNG, JPEG, TIFF, BMP, GIF or PPM file as ``(C, X, Y, 1)``."""
    pixels, _ = _load(path, _PictureReader(converter=converter))
    voxels = _channel_first(pixels, path, channel_last=pixels.ndim == 3)
    return _Grid(voxels, _PICTURE_AFFINE, picture=True, oriented=False)


def _plain_colour(picture: Image.Image) -> Image.Image:
    """Resolve palettes and bits, drop alpha; grey of any depth and RGB stay as they are."""
    _check_pages(picture)
    if picture.mode in ("1", "LA", "La"):
        return picture.convert("L")
    return picture if picture.mode in ("L", "I", "F", "RGB") or picture.mode[:4] == "I;16" else picture.convert("RGB")


def _plain_index(picture: Image.Image) -> Image.Image:
    """Keep the stored numbers of a label picture (palette indices, bits as 0 and 1), drop alpha."""
    _check_pages(picture)
    if picture.mode in ("LA", "La"):
        return picture.convert("L")
    return picture.convert("RGB") if picture.mode in ("RGBA", "RGBX", "RGBa", "CMYK", "YCbCr") else picture


def _plain_mask(picture: Image.Image) -> Image.Image:
    """Resolve a palette of greys, in which white need not have the larger index; else as ``_plain_index``."""
    if picture.mode == "P":
        colours = np.asarray(picture.convert("RGB"))
        if (colours == colours[..., :1]).all():
            return _plain_index(picture).convert("L")
    return _plain_index(picture)


def _check_pages(picture: Image.Image) -> None:
    """Refuse files of several pages or frames, of which the first would be taken silently."""
    pages = getattr(picture, "n_frames", 1)
    if pages > 1 and picture.format != "MPO":  # a camera's JPEG, with previews of the same picture
        name = _name(getattr(picture, "filename", "a picture"))
        raise InputError(f"{name}: expected one page, got {pages}; save them as single files or as one NIfTI volume")


def _read_nifti(path: str) -> _Grid:
    """Read a NIfTI file; a fifth axis after a fourth of length 1 holds the channels, as the format defines it."""
    try:
        stored: Any = nibabel.load(path, mmap=False)
        if stored.get_data_dtype().kind not in "buif":
            raise InputError(f"{_name(path)}: expected plain numbers per voxel, got NIfTI colour or complex voxels")
        oriented = bool(stored.header["sform_code"] > 0 or stored.header["qform_code"] > 0)
        stored = correct_nifti_header_if_necessary(stored)
        shape, voxels = stored.shape, stored.dataobj.get_unscaled()
    except _READER_ERRORS as error:
        raise _unreadable(path, error) from error
    voxels = _channel_first(voxels, path, channel_last=len(shape) == 5 and shape[3] == 1 and shape[4] > 1)
    slope, intercept = stored.dataobj.slope, stored.dataobj.inter
    if (slope, intercept) != (1, 0):
        voxels = _in_c_order(voxels, np.float32, convert=lambda plane: plane * np.float64(slope) + intercept)
    return _Grid(voxels, to_affine_nd(3, stored.affine), picture=False, oriented=oriented)


def _read_with_itk(files: list[str]) -> _Grid:
    """Read a volume file, a DICOM file, or the files of a DICOM series."""
    channels, alpha, modality, oriented = _itk_header(files[0])
    if channels not in (1, 3) and not alpha:  # ITK is slow to refuse what it has no pixel type for
        raise _wrong_channels(_name(files[0]), channels)
    voxels, meta = _load(files, _SeriesReader())
    voxels = _channel_first(voxels, files[0], channel_last=channels > 1)
    voxels = voxels[:-1] if alpha else voxels  # the last component is alpha
    return _Grid(voxels, to_affine_nd(3, meta["affine"]), picture=False, modality=modality, oriented=oriented)


def _itk_header(path: str) -> tuple[int, bool, str | None, bool]:
    """Return the number of channels, whether the last is alpha, the modality, and whether an orientation is stored."""
    reader = _open_with_itk(path)
    # The dictionary belongs to the reader, which must outlive it. Only these entries are ever looked at.
    tags = reader.GetMetaDataDictionary()
    stored = next((str(tags[tag]).strip() for tag in (_MODALITY_TAG, "Modality") if tags.HasKey(tag)), "")
    codes = [str(tags[tag]) for tag in ("sform_code", "qform_code") if tags.HasKey(tag)]  # a NIfTI pair, or Analyze
    oriented = not codes or any(code != "0" for code in codes)
    alpha = reader.GetPixelType() == itk.CommonEnums.IOPixel_RGBA
    return reader.GetNumberOfComponents(), alpha, _MODALITY_NAMES.get(stored), oriented


def _open_with_itk(path: str) -> Any:
    """Return ITK's reader of a file after it has read the header, and no voxels."""
    try:
        reader = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
        if reader is None:
            raise InputError(f"{_name(path)}: not an image that can be read; expected {_expected_kinds()}")
        reader.SetFileName(path)
        reader.ReadImageInformation()
    except _READER_ERRORS as error:
        raise _unreadable(path, error) from error
    return reader


def _check_distances(image: Any, files: Sequence[str]) -> None:
    """Refuse the ITK image of a DICOM series with a missing, foreign or repeated slice, whose affine is wrong."""
    readers = [_open_with_itk(file) for file in (files[0], files[-1])]
    first, last = ([reader.GetOrigin(axis) for axis in range(3)] for reader in readers)
    tags = image.GetMetaDataDictionary()
    deviation = float(tags[_UNEVEN_TAG]) if tags.HasKey(_UNEVEN_TAG) else 0.0
    if first != last and deviation <= _UNEVEN_SLICES * image.GetSpacing()[2]:
        return
    came = "all in one place" if first == last else f"distances that are off by up to {deviation:.3g} mm"
    raise InputError(
        f"{_described(files)}: expected slices at even distances, got {came}; a slice is missing or there twice, or "
        "several series are mixed"
    )


def _load(path: str | list[str], reader: ImageReader) -> tuple[np.ndarray, dict[str, Any]]:
    """Read voxels, in file axes, and metadata with one of MONAI's readers."""
    try:
        return reader.get_data(reader.read(path))
    except _READER_ERRORS as error:
        raise _unreadable(_first(path), error) from error


def _channel_first(voxels: np.ndarray, path: str, *, channel_last: bool) -> np.ndarray:
    """Bring voxels to ``(C, X, Y, Z)`` without a copy."""
    voxels = np.moveaxis(voxels, -1, 0) if channel_last else voxels[None]
    shape = tuple(voxels.shape[1:])
    if len(shape) < 2 or any(length != 1 for length in shape[3:]):
        raise InputError(
            f"{_name(path)}: expected a 2D image or a 3D volume, got {len(shape)} axes {shape}; "
            "save one time point or channel per file"
        )
    if voxels.size == 0:
        raise InputError(f"{_name(path)}: expected at least one voxel along every axis, got the shape {shape}")
    return voxels.reshape(-1, *(*shape, 1)[:3])  # (C, X, Y[, Z[, 1...]]) -> (C, X, Y, Z)


def _stack(parts: Sequence[_Grid], files: Sequence[str]) -> _Grid:
    """Put the images of a stack together along Z, in the order given."""
    wanted = (*parts[0].voxels.shape[:3], 1)
    for part, file in zip(parts, files, strict=True):
        if part.voxels.shape != wanted:
            raise InputError(
                f"{_name(file)}: expected a 2D image of shape {wanted} (channels, X, Y, Z) as the stack's first file, "
                f"{_name(files[0])}, got {part.voxels.shape}"
            )
    return replace(parts[0], voxels=np.concatenate([part.voxels for part in parts], axis=3), stacked=True)


def _check_channels(grid: _Grid, name: str) -> None:
    """Refuse images that are neither grey nor RGB."""
    if len(grid.voxels) not in (1, 3):
        raise _wrong_channels(name, len(grid.voxels))


def _wrong_channels(name: str, count: int) -> InputError:
    """Say how many channels an image may have."""
    return InputError(f"{name}: expected 1 channel (grey) or 3 (RGB), got {count}; save the one to segment on its own")


def _only_series(folder: str) -> list[str]:
    """Return the files of a folder's one DICOM series."""
    series = dicom_series(folder)
    if len(series) != 1:
        raise InputError(f"{_name(folder)}: expected a folder with one DICOM series, got {len(series)}")
    return series[0]


def _may_be_dicom(path: str) -> bool:
    """Tell from a file name whether looking for DICOM is worth while."""
    return _suffix(path) in ("", *DICOM_SUFFIXES)


def _check_present(path: str) -> None:
    """Refuse paths that do not exist and files without content."""
    if not os.path.exists(path):
        raise InputError(f"{_name(path)}: no such file or folder; check the path")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise InputError(f"{_name(path)}: expected an image, got an empty file (0 bytes)")


def _unreadable(path: str, error: BaseException) -> InputError:
    """Say that a file is damaged; the reader's own text stays in the cause, for it can hold paths and tags."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or not what its name says"
    kind = _suffix(path) or "DICOM"
    return InputError(f"{_name(path)}: expected a complete {kind} file, got one that cannot be read ({reason})")


def _first(path: Paths) -> str:
    """Return the first path of a stack or series, or the path itself."""
    return os.fspath(path if isinstance(path, str | os.PathLike) else path[0])


def _described(path: Paths) -> str:
    """Name a path or a list of paths in a message."""
    return _name(_first(path)) if len(ensure_tuple(path)) == 1 else f"{_name(_first(path))} and the files with it"


# ------------------------------------------------------------------------------------------------------ transforms


class LoadImageCased(MapTransform):
    """Replaces the path(s) of an image by what ``read_image`` returns.

    The entry ``modality`` is filled from the file's metadata where it is absent or None. (The name holds "LoadImage"
    because MONAI Deploy's bundle operator drops transforms of that name and feeds its own images.)

    Args:
        keys: keys of the paths.
        modality_key: key of the modality's name.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        InputError: see ``read_image``.
    """

    def __init__(
        self, keys: KeysCollection = "image", *, modality_key: str = "modality", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.modality_key = modality_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with ``(C, X, Y, Z)`` images."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = read_image(result[key])
            if result.get(self.modality_key) is None and "modality" in result[key].meta:
                result[self.modality_key] = result[key].meta["modality"]
        return result


class LoadLabeld(MapTransform):
    """Replaces a label's path(s) by one binary channel per class.

    The entry is a label map (a path, or the paths of a stack) whose values ``label_map`` (``{value: class id}``, with
    None for a value that is none of the classes and is ignored) explains, or ``{class id: path(s)}`` with one mask per
    class. Of a mask with one value besides 0 that value is the foreground, whatever it is; of a grey one, and of every
    JPEG, what is 128 and more (above 0 where the maximum is 1). Greys in between are a warning ("lossy-mask"), which is
    appended to the list ``findings`` of the case.

    The image must have been read before: shape and, unless one of them is planar, affine must agree within 1e-3. So
    labels are read before any transform changes the image's axes. Where the case has ``counts`` (``{"slices": int,
    "voxels": {class id: int}}``, what was counted when the datalist was made), slices (Z) and voxels must be as many.

    Args:
        class_ids: ids of the model's classes; channel k of the result is the k-th in ascending order. Masks of other
            classes are left out.
        keys: keys of the labels; a label without a file (None) is left alone.
        image_key: key of the image, a MetaTensor ``(C, X, Y, Z)``.
        label_map_key: key of the label map.
        counts_key: key of the counts.
        case_key: key of the case's name, for messages.
        strict: refuse what is doubtful as well.
        log: whether warnings go to the log.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        InputError: no label, a file that cannot be read, a geometry other than the image's, values that ``label_map``
            does not explain, a label map in JPEG, grey masks all below 128, a colour picture, or other counts.
    """

    def __init__(
        self,
        class_ids: Sequence[int],
        keys: KeysCollection = "label",
        *,
        image_key: str = "image",
        label_map_key: str = "label_map",
        counts_key: str = "counts",
        case_key: str = "case",
        strict: bool = False,
        log: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.class_ids = sorted({int(class_id) for class_id in class_ids})
        self.image_key = image_key
        self.label_map_key = label_map_key
        self.counts_key = counts_key
        self.case_key = case_key
        self.strict = strict
        self.log = log

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with ``(K, X, Y, Z)`` uint8 labels of {0, 1} in the image's geometry."""
        result = dict(data)
        result["findings"] = list(result.get("findings", []))
        case = str(result.get(self.case_key, "a case"))
        missing = [str(key) for key in self.keys if key not in result]
        if missing and not self.allow_missing_keys:
            raise InputError(f"{case}: expected a {missing[0]} in the datalist, got none")
        for key in self.key_iterator(result):
            if result[key] is None:
                continue
            image: MetaTensor = result[self.image_key]
            label, found = self._read(result[key], result.get(self.label_map_key), image)
            enforce(found, case=case, strict=self.strict, log=self.log)
            self._check_counts(label, result.get(self.counts_key), case)
            meta = {name: value for name, value in image.meta.items() if name != "affine"}
            result[key] = MetaTensor(label, affine=image.affine.clone(), meta=meta)
            result["findings"] += found
        return result

    def _read(
        self, entry: Any, label_map: Mapping[Any, int | None] | None, image: MetaTensor
    ) -> tuple[torch.Tensor, list[Finding]]:
        """Read the label into ``(K, X, Y, Z)``; returns what is to be known about its files besides."""
        # numpy's zeros, unlike torch's, take no memory before they are written to, while files are read.
        label = torch.from_numpy(np.zeros((len(self.class_ids), *image.shape[1:]), np.uint8))
        if isinstance(entry, Mapping):
            return label, self._draw_masks(label, entry, image)
        self._draw_label_map(label, entry, label_map, image)
        return label, []

    def _draw_masks(self, label: torch.Tensor, masks: Mapping[Any, Paths], image: MetaTensor) -> list[Finding]:
        """Read one mask per class into ``label``."""
        found = []
        for class_id, path in masks.items():
            if int(class_id) in self.class_ids:
                mask, unclear = _read_mask(path)
                _check_geometry(mask, image, _described(path))
                label[self.class_ids.index(int(class_id))] = torch.from_numpy(mask.voxels[0])
                found += _describe_unclear(unclear, mask.voxels.size, _described(path))
        return found

    def _draw_label_map(
        self, label: torch.Tensor, path: Paths, label_map: Mapping[Any, int | None] | None, image: MetaTensor
    ) -> None:
        """Split a label map into the channels of ``label``; several values may mean one class."""
        name = _described(path)
        if not label_map:
            raise InputError(f"{name}: expected a label_map that names the values of the label, got none")
        values = _read_values(path, image)
        present = _distinct(values)
        classes = {int(value): class_id for value, class_id in label_map.items()}
        _check_values(present, classes, name)
        for value, class_id in classes.items():
            if value in present and class_id is not None and int(class_id) in self.class_ids:
                label[self.class_ids.index(int(class_id))] |= torch.from_numpy(values == value)

    def _check_counts(self, label: torch.Tensor, counts: Mapping[str, Any] | None, case: str) -> None:
        """Compare slices and voxels with what was counted earlier."""
        if counts is None:
            return
        expected = {"slices": counts.get("slices", label.shape[3])}
        found = {"slices": label.shape[3]}
        voxels = {int(class_id): number for class_id, number in counts.get("voxels", {}).items()}
        for index, class_id in enumerate(self.class_ids):
            if class_id in voxels:
                expected[f"voxels of class {class_id}"] = voxels[class_id]
                found[f"voxels of class {class_id}"] = int(label[index].count_nonzero())
        for what, number in expected.items():
            if found[what] != number:
                raise InputError(
                    f"{case}: expected {number} {what}, got {found[what]}: the label has changed since it was "
                    "prepared, or part of it was lost; prepare the data set again or restore the file"
                )


def _read_values(path: Paths, image: MetaTensor) -> np.ndarray:
    """Read the values ``(X, Y, Z)`` of a label map that lies on the image's grid."""
    name = _described(path)
    grid = _one_channel(_read(path, converter=_plain_index), name)
    _check_lossless(path)
    _check_geometry(grid, image, name)
    return _whole_numbers(grid.voxels, name)[0]


def read_label_map(path: Paths) -> MetaTensor:
    """Read a label map on its own grid, whatever its values mean.

    Args:
        path: a file, or the 2D files of a stack in order. Of a palette picture the values are the indices, of a 1-bit
            one 0 and 1.

    Returns:
        ``(1, X, Y, Z)`` int32 in file axes with the affine and the ``meta`` of ``read_image``.

    Raises:
        InputError: a file that cannot be read, colours, fractions, or a format with losses (JPEG).
    """
    name = _described(path)
    grid = _one_channel(_read(path, converter=_plain_index), name)
    _check_lossless(path)
    values = replace(grid, voxels=_whole_numbers(grid.voxels, name))
    return _as_meta_tensor(values, filename=_name(_first(path)), dtype=np.int32)


def read_mask(path: Paths) -> torch.Tensor:
    """Read the mask of one class by the rule of ``LoadLabeld``.

    Args:
        path: a file, or the 2D files of a stack in order.

    Returns:
        ``(1, X, Y, Z)`` uint8 of {0, 1} in file axes.

    Raises:
        InputError: see ``LoadLabeld``.
    """
    return torch.from_numpy(_read_mask(path)[0].voxels)


def _read_mask(path: Paths) -> tuple[_Grid, int]:
    """Read the mask of one class, each file judged by its own values.

    Returns:
        The mask, ``(1, X, Y, Z)`` uint8 of {0, 1}, and how many pixels were neither background nor foreground.
    """
    files = [os.fspath(file) for file in ensure_tuple(path)]
    parts, unclear = [], 0
    for file in files:
        grid = _one_channel(_read(file, converter=_plain_mask), _name(file))
        foreground, number = _foreground(grid.voxels, _name(file), lossy=_is_jpeg(file))
        parts.append(replace(grid, voxels=foreground.astype(np.uint8)))
        unclear += number
    return (parts[0] if len(parts) == 1 else _stack(parts, files)), unclear


def _foreground(values: np.ndarray, name: str, *, lossy: bool) -> tuple[np.ndarray, int]:
    """Apply the rule for masks; returns bool, and how many values were neither background nor foreground."""
    low, high = values.min(), values.max()
    if not (low >= 0 and np.isfinite(high)):
        raise InputError(f"{name}: expected a mask of 0 and more, got values from {low} to {high}; correct the file")
    unclear = int(np.count_nonzero(_is_between(values, high, lossy=lossy)))
    if not lossy and (unclear == 0 or high == 1):
        return values > 0, unclear
    if (_MASK_NOISE if lossy else 0) < high < _MASK_THRESHOLD:
        raise InputError(
            f"{name}: expected a mask of two values, or of greys up to 255, got greys up to {high:g}; take the "
            "original, or name its values in label_map if it is a label map"
        )
    return values >= _MASK_THRESHOLD, unclear


def _is_between(values: np.ndarray, high: Any, *, lossy: bool) -> np.ndarray:
    """Tell which values of a mask are neither background nor foreground; ``high`` is the largest."""
    if not lossy:
        return (values != 0) & (values != high)
    if high <= _MASK_NOISE:  # all of it is taken as background, which may be the end of a mask of 0 and 1
        return values != 0
    return (values > _MASK_NOISE) & (values < 255 - _MASK_NOISE)


def _describe_unclear(unclear: int, size: int, name: str) -> list[Finding]:
    """Report the pixels of a mask that were neither background nor foreground."""
    if unclear == 0:
        return []
    text = (
        f"{name}: expected a mask of two values, got others in {unclear / size:.2%} of the pixels, as JPEG or "
        f"resampling leaves them; what is {_MASK_THRESHOLD} and more (above 0 where the maximum is 1) was taken as "
        "foreground; take the original, or look whether that is right"
    )
    return [Finding("warn", "lossy-mask", text)]


def _is_jpeg(path: str) -> bool:
    """Tell whether a picture was compressed with losses, whatever it is called."""
    if _suffix(path) not in PICTURE_SUFFIXES:
        return False
    with Image.open(path) as picture:
        return picture.format in ("JPEG", "MPO") or "jpeg" in str(picture.info.get("compression", ""))


def _check_lossless(path: Paths) -> None:
    """Refuse label maps in JPEG: a value that changes by 1 is another class."""
    for file in map(os.fspath, ensure_tuple(path)):
        if _is_jpeg(file):
            raise InputError(
                f"{_name(file)}: expected a label map in a format without losses, got JPEG, which changes values; take "
                "the original, or for one class give it as a mask ({class: file})"
            )


def _one_channel(grid: _Grid, name: str) -> _Grid:
    """Reduce a grey label that was saved as RGB to ``(1, X, Y, Z)``."""
    first = grid.voxels[:1]
    if any(not np.array_equal(channel, first[0]) for channel in grid.voxels[1:]):
        raise InputError(f"{name}: expected a label of one channel, got a colour image of {len(grid.voxels)} channels")
    return replace(grid, voxels=first)


def _whole_numbers(stored: np.ndarray, name: str) -> np.ndarray:
    """Return label values ``(1, X, Y, Z)`` in C order, integers as they are stored and others as int32."""

    def whole(plane: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            values = plane.astype(np.int32)
        if not np.array_equal(values, plane):  # NaN is not even equal to itself
            raise InputError(f"{name}: expected whole numbers as label values, got fractions, NaN or infinity")
        return values

    if stored.dtype.kind in "bui":
        return _in_c_order(stored, stored.dtype)
    return _in_c_order(stored, np.int32, convert=whole)


def _distinct(values: np.ndarray) -> set[int]:
    """Return the different values of a label ``(X, Y, Z)``, a plane at a time: sorting needs a copy."""
    return {int(value) for plane in values for value in np.unique(plane)}


def _check_values(present: Iterable[int], classes: Mapping[int, Any], name: str) -> None:
    """Refuse label values that nobody has explained; 0 is background."""
    foreign = sorted(set(present) - {0, *classes})
    if foreign:
        raise InputError(
            f"{name}: the label values {foreign[:10]} are not in label_map, which knows "
            f"{sorted(classes)}; add them or correct the file"
        )


def _check_geometry(label: _Grid, image: MetaTensor, name: str) -> None:
    """Refuse a label that does not lie on the image's grid."""
    expected, came = tuple(image.shape[1:]), tuple(label.voxels.shape[1:])
    if came != expected:
        raise InputError(f"{name}: expected the image's shape {expected} (X, Y, Z), got {came}")
    if label.planar or image.meta.get("planar", False):
        return
    difference = float(np.abs(label.affine - image.affine.numpy()).max())
    if not difference <= _AFFINE_TOLERANCE:
        raise InputError(
            f"{name}: expected the image's affine within {_AFFINE_TOLERANCE} mm, got one that differs by up to "
            f"{difference:.4g}; resample the label onto the image's grid"
        )
