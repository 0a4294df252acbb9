"""From masks in memory to files a viewer opens: label maps, maps of each class and the names of their values."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
from PIL import Image

from scripts.data.vocabulary import ClassEntry
from scripts.errors import OutputError
from scripts.files import atomic_path

BACKGROUND = "background"
LARGEST_BYTE = 255


def prepare_output_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder for results, parents included, and prove by a trial file that it can be written to.

    Call it before anything is computed. The trial file has no name of its own or is removed at once.

    Args:
        path: the folder; it may exist already.

    Returns:
        The folder as a path.

    Raises:
        OutputError: a file stands at the path or above it, or the folder cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(
            f"expected the output path {folder} to be a folder, but a file stands there or above it; "
            "choose another folder or move that file"
        ) from error
    except OSError as error:
        raise OutputError(
            f"expected an output folder that can be written to, but the system answered '{error.strerror}' for "
            f"{folder}; choose another folder or change its permissions"
        ) from error
    return folder


def write_label_map(labels: np.ndarray, *, folder: Path, stem: str, affine: np.ndarray, planar: bool) -> Path:
    """Write class ids in the geometry of the file they were predicted from.

    A planar image becomes ``<stem>_seg.png``, 8-bit grey, of the input's width and height, whose grey values are the
    ids. Everything else, a stack of planar images included, becomes ``<stem>_seg.nii.gz`` of the same shape and type
    with the affine in sform and qform.

    Args:
        labels: ids, ``(X, Y, Z)`` in the axes of the file, uint8 or uint16; X is the column of a planar image.
        folder: an existing folder.
        stem: beginning of the file name.
        affine: ``(4, 4)``, voxel indices to mm (RAS+); a PNG has no place for it.
        planar: the input had no through-plane spacing.

    Returns:
        The file written.

    Raises:
        OutputError: the file cannot be written, or an id does not fit into an 8-bit PNG. Nothing is left behind.
        ValueError: the array is not of the shape or type above.
    """
    if labels.ndim != 3 or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"expected labels (X, Y, Z) of uint8 or uint16, got {labels.shape} of {labels.dtype}")
    if _is_picture(labels.shape, planar):
        return _write_png(_to_byte_ids(labels), folder / f"{stem}_seg.png")
    return _write_nifti(labels, affine, folder / f"{stem}_seg.nii.gz")


def write_class_maps(
    maps: Iterable[np.ndarray],
    *,
    kind: Literal["prob", "uncertainty"],
    class_names: Sequence[str],
    folder: Path,
    stem: str,
    affine: np.ndarray,
    planar: bool,
) -> list[Path]:
    """Write one map a class of probabilities or their uncertainties, unmerged, so that overlaps stay apart.

    Volumes and stacks become ``<stem>_<kind>_<class>.nii.gz`` in float32 (NIfTI has no half precision, and scaled
    integers would move the decision border). A planar image becomes ``<stem>_<kind>_<class>.png``, 8-bit grey, with the
    value times 255 rounded: of a probability, 128 and above is at least 0.5. Spaces in a class name become underscores.

    Args:
        maps: K of ``(X, Y, Z)`` in the axes of the file, floating, 0 to 1, taken one by one.
        kind: what they are.
        class_names: K names in the same order.
        folder: an existing folder.
        stem: beginning of the file names.
        affine: ``(4, 4)``, voxel indices to mm (RAS+).
        planar: the input had no through-plane spacing.

    Returns:
        The files written, in the order of the classes.

    Raises:
        OutputError: a file cannot be written. The maps of the classes before it are removed again.
        ValueError: a map is not 3D, or there are more or fewer than names.
    """
    with contextlib.ExitStack() as undo:
        written = []
        for name, values in zip(class_names, maps, strict=True):
            if values.ndim != 3:
                raise ValueError(f"expected a map (X, Y, Z), got {values.shape}")
            path = _write_values(values, folder / f"{stem}_{kind}_{_one_word(name)}", affine, planar)
            undo.callback(path.unlink, missing_ok=True)
            written.append(path)
        undo.pop_all()
    return written


def write_labels_json(classes: Iterable[ClassEntry], folder: Path) -> Path:
    """Write ``labels.json``: from each value of the label maps, as text, to its class name, 0 being the background.

    Args:
        classes: the classes asked for, in any order.
        folder: an existing folder.

    Returns:
        The file written.

    Raises:
        OutputError: the file cannot be written. Nothing is left behind.
    """
    names = {"0": BACKGROUND} | {str(entry.id): entry.name for entry in _by_id(classes)}
    return _write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", folder / "labels.json")


def write_colour_table(classes: Iterable[ClassEntry], folder: Path) -> Path:
    """Write ``labels.ctbl``, the colours of the values for 3D Slicer.

    A line holds id, name, red, green, blue and opacity (0 to 255), divided by spaces, which is why a name has
    underscores in place of its own (https://slicer.readthedocs.io/en/5.6/developer_guide/modules/colors.html).

    Args:
        classes: the classes asked for, in any order.
        folder: an existing folder.

    Returns:
        The file written.

    Raises:
        OutputError: the file cannot be written. Nothing is left behind.
    """
    rows = [f"0 {BACKGROUND} 0 0 0 0"]
    rows += [f"{entry.id} {_one_word(entry.name)} {' '.join(map(str, entry.colour))} 255" for entry in _by_id(classes)]
    header = ["# Color table file labels.ctbl", f"# {len(rows)} values"]
    return _write_text("\n".join(header + rows) + "\n", folder / "labels.ctbl")


def _is_picture(shape: tuple[int, ...], planar: bool) -> bool:
    return planar and shape[-1] == 1


def _to_byte_ids(labels: np.ndarray) -> np.ndarray:
    largest = int(labels.max(initial=0))
    if largest > LARGEST_BYTE:
        raise OutputError(
            f"expected class ids up to {LARGEST_BYTE} in the 8-bit PNG of a 2D image, got {largest}; "
            "give the class a smaller id in the vocabulary, or the input as NIfTI"
        )
    return labels.astype(np.uint8)


def _write_values(values: np.ndarray, path: Path, affine: np.ndarray, planar: bool) -> Path:
    """Write one class, ``(X, Y, Z)``; the path comes without its suffix."""
    if _is_picture(values.shape, planar):
        scaled = np.rint(values.clip(0, 1) * LARGEST_BYTE).astype(np.uint8)
        return _write_png(scaled, path.with_name(f"{path.name}.png"))
    return _write_nifti(values.astype(np.float32), affine, path.with_name(f"{path.name}.nii.gz"))


def _write_png(pixels: np.ndarray, path: Path) -> Path:
    """Write ``(X, Y, 1)`` bytes; X is the column, while a picture in memory starts with the row."""
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0].T))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


def _write_nifti(voxels: np.ndarray, affine: np.ndarray, path: Path) -> Path:
    volume = nibabel.Nifti1Image(voxels, affine)
    volume.header.set_xyzt_units("mm")
    volume.set_sform(affine, code="scanner")
    volume.set_qform(affine, code="scanner")
    # A qform cannot hold shear (a tilted gantry): say that it is not to be used, instead of giving two geometries.
    if not np.allclose(volume.get_qform(), affine, atol=1e-3):
        volume.set_qform(None, code="unknown")
    with atomic_path(path) as temporary:
        nibabel.save(volume, temporary)
    return path


def _write_text(text: str, path: Path) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _by_id(classes: Iterable[ClassEntry]) -> list[ClassEntry]:
    return sorted(classes, key=lambda entry: entry.id)


def _one_word(name: str) -> str:
    """Replace what would split a line of a table or a path."""
    return re.sub(r"[^\w.-]+", "_", name)
