"""What an image must be like before anything is computed from it."""

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from scripts.errors import InputError

logger = logging.getLogger(__name__)

# Cosine of the angle between two axes up to which they count as perpendicular: rounded DICOM directions stay far below,
# a tilted gantry (1 degree is 0.017) lies above.
_ORTHOGONALITY_TOLERANCE = 1e-2
# Voxel edges in mm that a clinical scanner can produce.
_SPACING_RANGE = (1e-2, 1e2)
# Air is -1000 HU and present around, if not in, every body part; only metal lies above 5000 HU.
_HU_RANGE = (-400.0, 5000.0)


def check_image(image: MetaTensor, *, case: str, modality: str | None) -> None:
    """Refuse an image that no network can make sense of.

    Args:
        image: ``(C, X, Y, Z)`` in file axes as ``read_image`` returns it.
        case: name for messages.
        modality: canonical name of the modality; None when unknown. CT values that do not look like HU are only worth
            a warning in the log.

    Raises:
        InputError: wrong number of axes or channels, no voxels, NaN or infinity, one value everywhere, an affine that
            is missing, singular or not orthogonal, a voxel size of 0 or beyond any scanner's, or a planar image that
            is not axial (its picture plane would be lost when axes are brought into order).
    """
    _check_shape(image, case)
    _check_values(image, case)
    _check_affine(image, case)
    if modality == "CT":
        _warn_if_not_hounsfield(image, case)


def _check_shape(image: torch.Tensor, case: str) -> None:
    """Refuse other shapes than (1 or 3, X, Y, Z) with voxels."""
    shape = tuple(image.shape)
    if len(shape) != 4 or shape[0] not in (1, 3):
        raise InputError(f"{case}: expected an image (channels, X, Y, Z) with 1 or 3 channels, got the shape {shape}")
    if image.numel() == 0:
        raise InputError(f"{case}: expected at least one voxel along every axis, got the shape {shape}")


def _check_values(image: torch.Tensor, case: str) -> None:
    """Refuse values that are not finite, or all the same."""
    low, high = torch.aminmax(_plain(image))
    if not (torch.isfinite(low) and torch.isfinite(high)):  # aminmax hands NaN on
        count = int((~torch.isfinite(_plain(image))).sum())
        raise InputError(f"{case}: expected finite values, got NaN or infinity in {count} of {image.numel()} voxels")
    if low == high:
        raise InputError(f"{case}: expected an image with contrast, got the value {low.item():g} everywhere")


def _check_affine(image: torch.Tensor, case: str) -> None:
    """Refuse an affine that is no right-angled grid of plausible size."""
    if not isinstance(image, MetaTensor):
        raise InputError(f"{case}: expected an image with an affine (voxel -> mm), got a plain {type(image).__name__}")
    affine = image.affine.cpu().numpy()
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{case}: expected a finite 4x4 affine (voxel -> mm), got {affine.tolist()}")
    axes = affine[:3, :3].astype(np.float64)
    spacing = np.linalg.norm(axes, axis=0)
    low, high = _SPACING_RANGE
    if not ((spacing >= low) & (spacing <= high)).all():
        raise InputError(
            f"{case}: expected voxel edges between {low:g} and {high:g} mm, got "
            f"{' x '.join(f'{edge:g}' for edge in spacing)}; correct the affine in the file's header"
        )
    cosines = (axes / spacing).T @ (axes / spacing)
    deviation = float(np.abs(cosines - np.eye(3)).max())
    if deviation > _ORTHOGONALITY_TOLERANCE:
        raise InputError(
            f"{case}: expected perpendicular axes in the affine, got a cosine of {deviation:.3g} between two of them "
            "(tilted gantry or damaged header); resample the volume to a right-angled grid"
        )
    _check_picture_plane(image, affine, case)


def _check_picture_plane(image: MetaTensor, affine: np.ndarray, case: str) -> None:
    """Refuse planar images whose normal is not the head-foot axis."""
    normal = nibabel.aff2axcodes(affine)[2]
    if image.meta.get("planar", False) and normal not in ("S", "I"):
        raise InputError(
            f"{case}: expected an axial slice or a picture without orientation, got slices that face "
            f"{normal}; save it as PNG or TIFF to segment it as a picture"
        )


def _warn_if_not_hounsfield(image: torch.Tensor, case: str) -> None:
    """Log when CT values cannot be HU of a whole field of view."""
    low, high = (float(value) for value in torch.aminmax(_plain(image)))
    if low > _HU_RANGE[0] or high > _HU_RANGE[1]:
        # Pictures never hold HU, and a set of them would fill the log.
        level = logging.INFO if getattr(image, "meta", {}).get("planar", False) else logging.WARNING
        logger.log(
            level,
            "%s: CT values from %g to %g do not look like Hounsfield units (expected air below %g and nothing above "
            "%g); check the rescale slope and intercept",
            case,
            low,
            high,
            *_HU_RANGE,
        )


def _plain(image: torch.Tensor) -> torch.Tensor:
    """Return the voxels without metadata."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


class Guardd(MapTransform):
    """Runs ``check_image`` on images as they come from the reader, before their axes are reordered.

    Args:
        keys: keys of the images.
        case_key: key of the case's name; the image's file name stands in where it is absent.
        modality_key: key of the modality's canonical name.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        InputError: see ``check_image``.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        case_key: str = "case",
        modality_key: str = "modality",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.case_key = case_key
        self.modality_key = modality_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` unchanged."""
        result = dict(data)
        for key in self.key_iterator(result):
            meta = getattr(result[key], "meta", {})
            case = result.get(self.case_key) or meta.get("filename_or_obj", str(key))
            check_image(result[key], case=str(case), modality=result.get(self.modality_key))
        return result
