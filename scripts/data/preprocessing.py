"""Intensities: from what a scanner or camera stored to 0..255, and from there to the [0, 1] of the network."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_dst_type, convert_to_tensor

from scripts.errors import InputError

_TOP = 255.0
_MR_PERCENTILES = (0.5, 99.5)
_PICTURE_MODALITIES = ("endoscopy", "dermoscopy", "xray")
_SMALLEST_RANGE = 1e-8


def scale_intensity(
    image: torch.Tensor, *, modality: str | None, window: tuple[float, float] = (40.0, 400.0)
) -> torch.Tensor:
    """Bring a whole case to 0..255 as MedSAM's data preparation does.

    - CT: clip to [level - width/2, level + width/2] HU, then the clipped volume's own extremes become 0 and 255. (So a
      scan that reaches no window edge is stretched.)
    - MR: clip to the percentiles 0.5 and 99.5 of the voxels above 0, the extremes become 0 and 255, voxels that were 0
      are 0 again.
    - endoscopy, dermoscopy, xray: 8-bit values stay; where a value lies outside 0..255 the extremes become 0 and 255.

    The authors store the result as 8-bit integers; here it stays float, because the next step stretches every slice
    again and the rounding (at most 1/255) would only take grey levels away from slices of low contrast.

    Args:
        image: any shape, e.g. ``(C, H, W, D)``; one whole case, for extremes and percentiles are taken over all of it.
            CT in HU.
        modality: canonical name of the modality.
        window: level and width of the CT window in HU: abdomen (40, 400), lung (-600, 1500), brain (40, 80).

    Returns:
        float32, 0..255, of the same shape; a MetaTensor keeps its metadata.

    Raises:
        InputError: an unknown modality, a window without width, or an MR image without a voxel above 0.

    Source: https://github.com/bowang-lab/MedSAM (data preparation of MedSAM and LiteMedSAM).
    """
    values = convert_to_tensor(image, dtype=torch.float32, track_meta=False)
    if modality == "CT":
        scaled = _scale_ct(values, window)
    elif modality == "MR":
        scaled = _scale_mr(values)
    elif modality in _PICTURE_MODALITIES:
        scaled = _scale_picture(values)
    else:
        known = ", ".join(("CT", "MR", *_PICTURE_MODALITIES))
        raise InputError(f"expected a modality out of {known}, got {modality!r}; name it with --modality")
    return convert_to_dst_type(scaled, image, dtype=torch.float32)[0]


def _scale_ct(values: torch.Tensor, window: tuple[float, float]) -> torch.Tensor:
    """Apply the window (level, width) in HU."""
    level, width = window
    if width <= 0:
        raise InputError(f"expected a CT window (level, width) with a width above 0 HU, got {window}")
    return _stretch(values.clamp(level - width / 2, level + width / 2))


def _scale_mr(values: torch.Tensor) -> torch.Tensor:
    """Cut both tails of the voxels above 0 and keep the background at 0."""
    positive = values[values > 0]
    if positive.numel() == 0:
        raise InputError(f"expected an MR image with voxels above 0, got a maximum of {values.max().item():g}")
    low, high = torch.as_tensor(percentile(positive, _MR_PERCENTILES))
    return _stretch(values.clamp(low, high))  # low is above 0, so what was 0 is the minimum and 0 again


def _scale_picture(values: torch.Tensor) -> torch.Tensor:
    """Leave 8-bit values alone, stretch all others."""
    return _stretch(values) if values.max() > _TOP or values.min() < 0 else values.clone()


def _stretch(values: torch.Tensor) -> torch.Tensor:
    """Map the extremes to 0 and 255; one value everywhere becomes 0."""
    low, high = torch.aminmax(values)
    return (values - low).div_((high - low).clamp_min(_SMALLEST_RANGE)).mul_(_TOP)


def unit_range(slices: torch.Tensor) -> torch.Tensor:
    """Stretch every slice to [0, 1], its channels together.

    Args:
        slices: ``(N, C, H, W)``.

    Returns:
        ``(N, C, H, W)`` float32; a slice with one value everywhere becomes 0.

    Source: (x - min) / max(max - min, 1e-8) per slice, https://github.com/bowang-lab/MedSAM (LiteMedSAM).
    """
    slices = slices.to(torch.float32)
    low = slices.amin(dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
    high = slices.amax(dim=(1, 2, 3), keepdim=True)
    return (slices - low) / (high - low).clamp_min(_SMALLEST_RANGE)


class ScaleIntensityByModalityd(MapTransform):
    """Runs ``scale_intensity`` with the modality of the case.

    Args:
        keys: keys of the images, each one whole case.
        modality_key: key of the modality's canonical name.
        window: level and width of the CT window in HU.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        InputError: see ``scale_intensity``.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        modality_key: str = "modality",
        window: tuple[float, float] = (40.0, 400.0),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.modality_key = modality_key
        self.window = window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with images in 0..255."""
        result = dict(data)
        for key in self.key_iterator(result):
            modality = result.get(self.modality_key)
            result[key] = scale_intensity(result[key], modality=modality, window=self.window)
        return result
