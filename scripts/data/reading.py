"""From files to tensors: which inputs a path holds, one image as ``(C, X, Y, Z)``, one label as ``(K, X, Y, Z)``.

Three of MONAI's readers do the work: NibabelReader for NIfTI, ITKReader for the other volumes and for DICOM, PILReader
for pictures (ITK 5.4 reads a grey PNG with alpha as zeros, a palette TIFF as wrong numbers and a 1-bit BMP not at all).
Of a file's metadata only geometry, modality and the file's base name are kept, so no patient-identifying tag gets in.
"""

import logging
import os
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import itk
import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor, NibabelReader, PILReader
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.transforms import LoadImage, MapTransform
from monai.utils import ensure_tuple
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, ImageDataError
from PIL import Image

from scripts.errors import InputError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
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
    "MET_MOD_CT": "CT",
    "MET_MOD_MR": "MR",
}

# A picture has no geometry; this is the affine under which "PLS" is the transposition to (row, column).
_PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])

# Largest difference (mm) between the entries of two affines that still count as one geometry.
_AFFINE_TOLERANCE = 1e-3

# Everything the three readers raise for a damaged or foreign file.
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
    """Voxels as they come from one file: ``(C, X, Y, Z)`` float32, affine ``(4, 4)`` voxel -> mm in RAS."""

    voxels: torch.Tensor
    affine: np.ndarray
    picture: bool
    modality: str | None = None
    stacked: bool = False

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
        return itk.imread(files if len(files) > 1 else files[0], **kwargs)


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
    if not _suffix(path) and not _is_dicom(path):
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
    if not any(_may_be_dicom(file) and _is_dicom(file) for file in files):
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


def _is_dicom(path: str) -> bool:
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
        image or stack of them: no through-plane spacing), ``picture`` (PNG, JPEG, TIFF, BMP: no geometry at all),
        ``spacing`` (3 floats along the file axes; mm, or 1 pixel when planar), ``spatial_shape``, ``original_affine``,
        ``space``, ``filename_or_obj`` (base name of the first file) and ``modality`` if the file tells it.

    Raises:
        InputError: missing, unreadable, empty or damaged file, more than three axes, channels that are neither grey
            nor RGB (with alpha), or slices of a stack that do not fit each other.
    """
    grid = _read(path)
    _check_channels(grid, _described(path))
    return _as_meta_tensor(grid, filename=_name(_first(path)))


def _as_meta_tensor(grid: _Grid, *, filename: str) -> MetaTensor:
    """Attach the harmless part of the metadata."""
    spacing = (1.0, 1.0, 1.0) if grid.planar else tuple(float(edge) for edge in affine_to_spacing(grid.affine))
    meta = {
        "original_affine": torch.as_tensor(grid.affine),
        "spatial_shape": np.asarray(grid.voxels.shape[1:]),
        "space": "RAS",
        "planar": grid.planar,
        "picture": grid.picture,
        "spacing": spacing,
        "filename_or_obj": filename,
    }
    if grid.modality is not None:
        meta["modality"] = grid.modality
    return MetaTensor(grid.voxels, affine=torch.as_tensor(grid.affine), meta=meta)


def _read(path: Paths, *, indexed: bool = False) -> _Grid:
    """Read a file, a DICOM series or a stack; ``indexed`` keeps the indices of palette pictures (label maps)."""
    if isinstance(path, str | os.PathLike):
        return _read_file(os.fspath(path), indexed=indexed)
    files = [os.fspath(file) for file in path]
    if not files:
        raise InputError("expected at least one file of a stack, got an empty list")
    for file in files:
        _check_present(file)
    if _may_be_dicom(files[0]) and _is_dicom(files[0]):
        return _read_with_itk(files)
    return _stack([_read_file(file, indexed=indexed) for file in files], files)


def _read_file(path: str, *, indexed: bool = False) -> _Grid:
    """Read one file, or the only series of a folder."""
    _check_present(path)
    if os.path.isdir(path):
        return _read_with_itk(_only_series(path))
    suffix = _suffix(path)
    if suffix in PICTURE_SUFFIXES:
        return _read_picture(path, indexed=indexed)
    return _read_nifti(path) if suffix in NIFTI_SUFFIXES else _read_with_itk([path])


def _read_picture(path: str, *, indexed: bool) -> _Grid:
    """Read a PNG, JPEG, TIFF or BMP file as ``(C, X, Y, 1)``."""
    image = _load(path, _PictureReader(converter=_plain_index if indexed else _plain_colour))
    return _Grid(_channel_first(image, path, channel_last=image.ndim == 3), _PICTURE_AFFINE, picture=True)


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


def _check_pages(picture: Image.Image) -> None:
    """Refuse multi-page TIFF files, of which the first page would be taken silently."""
    pages = getattr(picture, "n_frames", 1)
    if picture.format == "TIFF" and pages > 1:
        name = _name(getattr(picture, "filename", "TIFF"))
        raise InputError(f"{name}: expected one page, got {pages}; save them as single files or as one NIfTI volume")


def _read_nifti(path: str) -> _Grid:
    """Read a NIfTI file; a fifth axis after a fourth of length 1 holds the channels, as the format defines it."""
    try:
        header: Any = nibabel.load(path)
        shape, kind = header.shape, header.get_data_dtype().kind
    except _READER_ERRORS as error:
        raise _unreadable(path, error) from error
    if kind not in "buif":
        raise InputError(f"{_name(path)}: expected plain numbers per voxel, got NIfTI colour or complex voxels")
    image = _load(path, NibabelReader())
    voxels = _channel_first(image, path, channel_last=len(shape) == 5 and shape[3] == 1 and shape[4] > 1)
    return _Grid(voxels, to_affine_nd(3, image.affine.numpy()), picture=False)


def _read_with_itk(files: list[str]) -> _Grid:
    """Read a volume file, a DICOM file, or the files of a DICOM series."""
    channels, alpha, modality = _itk_header(files[0])
    if channels not in (1, 3) and not alpha:  # ITK is slow to refuse what it has no pixel type for
        raise _wrong_channels(_name(files[0]), channels)
    image = _load(files, _SeriesReader())
    voxels = _channel_first(image, files[0], channel_last=channels > 1)
    voxels = voxels[:-1] if alpha else voxels  # the last component is alpha
    return _Grid(voxels, to_affine_nd(3, image.affine.numpy()), picture=False, modality=modality)


def _itk_header(path: str) -> tuple[int, bool, str | None]:
    """Return the number of channels, whether the last is alpha, and the modality, without reading voxels."""
    try:
        reader = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
        if reader is None:
            raise InputError(f"{_name(path)}: not an image that can be read; expected {_expected_kinds()}")
        reader.SetFileName(path)
        reader.ReadImageInformation()
    except _READER_ERRORS as error:
        raise _unreadable(path, error) from error
    # The dictionary belongs to the reader, which must outlive it. Only this one entry is ever looked at.
    tags = reader.GetMetaDataDictionary()
    stored = next((str(tags[tag]).strip() for tag in (_MODALITY_TAG, "Modality") if tags.HasKey(tag)), "")
    alpha = reader.GetPixelType() == itk.CommonEnums.IOPixel_RGBA
    return reader.GetNumberOfComponents(), alpha, _MODALITY_NAMES.get(stored)


@cache
def _loader() -> LoadImage:
    """Return MONAI's loader; the reader is given at each call, for else it would try all others after a failure."""
    return LoadImage(image_only=True, dtype=np.float32, expanduser=False)


def _load(path: str | list[str], reader: Any) -> MetaTensor:
    """Read voxels and affine with one of MONAI's readers."""
    try:
        return _loader()(path, reader=reader)
    except _READER_ERRORS as error:
        raise _unreadable(_first(path), error) from error


def _channel_first(image: torch.Tensor, path: str, *, channel_last: bool) -> torch.Tensor:
    """Bring voxels to ``(C, X, Y, Z)``, without metadata."""
    voxels = image.as_tensor() if isinstance(image, MetaTensor) else image
    voxels = voxels.movedim(-1, 0) if channel_last else voxels[None]
    shape = tuple(voxels.shape[1:])
    if len(shape) < 2 or any(length != 1 for length in shape[3:]):
        raise InputError(
            f"{_name(path)}: expected a 2D image or a 3D volume, got {len(shape)} axes {shape}; "
            "save one time point or channel per file"
        )
    if voxels.numel() == 0:
        raise InputError(f"{_name(path)}: expected at least one voxel along every axis, got the shape {shape}")
    voxels = voxels.reshape(-1, *(*shape, 1)[:3])  # (C, X, Y[, Z[, 1...]]) -> (C, X, Y, Z)
    # Readers hand out their own memory in Fortran order; the rest of the way is faster in C order.
    return voxels.clone(memory_format=torch.contiguous_format)


def _stack(parts: Sequence[_Grid], files: Sequence[str]) -> _Grid:
    """Put the images of a stack together along Z, in the order given."""
    wanted = (*parts[0].voxels.shape[:3], 1)
    for part, file in zip(parts, files, strict=True):
        if tuple(part.voxels.shape) != wanted:
            raise InputError(
                f"{_name(file)}: expected a 2D image of shape {wanted} (channels, X, Y, Z) as the stack's first file, "
                f"{_name(files[0])}, got {tuple(part.voxels.shape)}"
            )
    return replace(parts[0], voxels=torch.cat([part.voxels for part in parts], dim=3), stacked=True)


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

    The entry is a label map (a path, or the paths of a stack) whose values ``label_map`` (``{value: class id}``)
    explains, or ``{class id: path(s)}`` with one mask per class; a mask's foreground is value > 0 where its file's
    maximum is 1, else value >= 128 (JPEG masks). The image must have been read before: shape and, unless one of them
    is planar, affine must agree within 1e-3. So labels are read before any transform changes the image's axes.

    Args:
        class_ids: ids of the model's classes; channel k of the result is the k-th in ascending order. Masks of other
            classes are left out.
        keys: keys of the labels; a label without a file (None) is left alone.
        image_key: key of the image, a MetaTensor ``(C, X, Y, Z)``.
        label_map_key: key of the label map.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        InputError: no label, a file that cannot be read, a geometry other than the image's, values that ``label_map``
            does not explain, or a colour picture.
    """

    def __init__(
        self,
        class_ids: Sequence[int],
        keys: KeysCollection = "label",
        *,
        image_key: str = "image",
        label_map_key: str = "label_map",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.class_ids = sorted({int(class_id) for class_id in class_ids})
        self.image_key = image_key
        self.label_map_key = label_map_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with ``(K, X, Y, Z)`` uint8 labels of {0, 1} in the image's geometry."""
        result = dict(data)
        missing = [str(key) for key in self.keys if key not in result]
        if missing and not self.allow_missing_keys:
            raise InputError(f"{result.get('case', 'a case')}: expected a {missing[0]} in the datalist, got none")
        for key in self.key_iterator(result):
            if result[key] is None:
                continue
            image: MetaTensor = result[self.image_key]
            if isinstance(result[key], Mapping):
                label = self._from_masks(result[key], image)
            else:
                label = self._from_label_map(result[key], result.get(self.label_map_key), image)
            meta = {name: value for name, value in image.meta.items() if name != "affine"}
            result[key] = MetaTensor(label, affine=image.affine.clone(), meta=meta)
        return result

    def _empty(self, image: MetaTensor) -> torch.Tensor:
        """Return a label without foreground, ``(K, X, Y, Z)``."""
        return torch.zeros((len(self.class_ids), *image.shape[1:]), dtype=torch.uint8)

    def _from_masks(self, masks: Mapping[Any, Paths], image: MetaTensor) -> torch.Tensor:
        """Read one mask per class into ``(K, X, Y, Z)``."""
        label = self._empty(image)
        for class_id, path in masks.items():
            if int(class_id) in self.class_ids:
                mask = _read_mask(path)
                _check_geometry(mask, image, _described(path))
                label[self.class_ids.index(int(class_id))] = mask.voxels[0]
        return label

    def _from_label_map(self, path: Paths, label_map: Mapping[Any, int] | None, image: MetaTensor) -> torch.Tensor:
        """Split a label map into ``(K, X, Y, Z)``; several values may mean one class."""
        name = _described(path)
        if not label_map:
            raise InputError(f"{name}: expected a label_map that names the values of the label, got none")
        grid = _read(path, indexed=True)
        _check_geometry(grid, image, name)
        values = _whole_numbers(_one_channel(grid, name).voxels[0], name)
        classes = {int(value): int(class_id) for value, class_id in label_map.items()}
        _check_values(values, classes, name)
        label = self._empty(image)
        for value, class_id in classes.items():
            if class_id in self.class_ids:
                label[self.class_ids.index(class_id)] |= torch.from_numpy(values == value)
        return label


def _read_mask(path: Paths) -> _Grid:
    """Read the mask of one class, the foreground of each file by its own maximum, as ``(1, X, Y, Z)`` of {0, 1}."""
    files = [path] if isinstance(path, str | os.PathLike) else list(path)
    parts = [_one_channel(_read(file, indexed=True), _described(file)) for file in files]
    parts = [replace(part, voxels=_foreground(part.voxels)) for part in parts]
    return parts[0] if len(parts) == 1 else _stack(parts, [os.fspath(file) for file in files])


def _foreground(voxels: torch.Tensor) -> torch.Tensor:
    """Apply the rule for binary masks; returns uint8 of {0, 1}."""
    return (voxels > 0 if voxels.max() == 1 else voxels >= 128).to(torch.uint8)


def _one_channel(grid: _Grid, name: str) -> _Grid:
    """Reduce a grey label that was saved as RGB to ``(1, X, Y, Z)``."""
    first = grid.voxels[:1]
    if len(grid.voxels) > 1 and not torch.equal(first.expand_as(grid.voxels), grid.voxels):
        raise InputError(f"{name}: expected a label of one channel, got a colour image of {len(grid.voxels)} channels")
    return replace(grid, voxels=first)


def _whole_numbers(voxels: torch.Tensor, name: str) -> np.ndarray:
    """Return label values as int32."""
    stored = voxels.numpy()
    if not np.isfinite(stored).all() or not np.array_equal(values := stored.astype(np.int32), stored):
        raise InputError(f"{name}: expected whole numbers as label values, got fractions, NaN or infinity")
    return values


def _check_values(values: np.ndarray, classes: Mapping[int, int], name: str) -> None:
    """Refuse label values that nobody has explained; 0 is background."""
    known = np.array([0, *classes], dtype=np.int32)
    foreign = np.unique(values[~np.isin(values, known)])
    if foreign.size:
        raise InputError(
            f"{name}: the label values {foreign[:10].tolist()} are not in label_map, which knows "
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
