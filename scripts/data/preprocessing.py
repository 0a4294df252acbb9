"""Intensities: from what a scanner or camera stored to 0..255, and from there to the [0, 1] of the network."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from scripts.errors import ConfigError, InputError

_TOP = 255.0
# Level and width in HU, https://github.com/bowang-lab/MedSAM (data preparation).
WINDOWS = {"abdomen": (40.0, 400.0), "lung": (-600.0, 1500.0), "brain": (40.0, 80.0)}
_MR_PERCENTILES = (0.5, 99.5)
_MR_MODALITIES = ("MR", "ultrasound")
_PICTURE_MODALITIES = ("endoscopy", "dermoscopy", "xray", "fundus", "microscopy")
_SMALLEST_RANGE = 1e-8

Window = str | Sequence[float]


def window_of(window: Window) -> tuple[float, float]:
    """Look up a CT window.

    Args:
        window: "abdomen" (40, 400), "lung" (-600, 1500) or "brain" (40, 80); or level and width in HU.

    Returns:
        Level and width in HU.

    Raises:
        ConfigError: an unknown name, or no pair of a level and a width above 0.
    """
    if isinstance(window, str):
        if window not in WINDOWS:
            raise ConfigError(f"expected a CT window out of {', '.join(WINDOWS)}, or [level, width], got {window!r}")
        return WINDOWS[window]
    try:
        level, width = (float(value) for value in window)
    except (TypeError, ValueError):
        level = width = math.nan
    if not (math.isfinite(level) and math.isfinite(width) and width > 0):
        raise ConfigError(f"expected a CT window [level, width] in HU with a width above 0, got {window}")
    return level, width


def scale_intensity(image: torch.Tensor, *, modality: str | None, window: Window = "abdomen") -> torch.Tensor:
    """Bring a whole case to 0..255 as MedSAM's data preparation does.

    - CT: clip to [level - width/2, level + width/2] HU, then the clipped volume's own extremes become 0 and 255. (So a
      scan that reaches no window edge is stretched.) Where all values lie in 0..255 they are taken as windowed already
      and stay.
    - MR, ultrasound: clip to the percentiles 0.5 and 99.5 of the voxels above 0, the extremes become 0 and 255, voxels
      that were 0 are 0 again.
    - endoscopy, dermoscopy, xray, fundus, microscopy: 8-bit values stay; where a value lies outside 0..255 the extremes
      become 0 and 255.

    The authors store the result as 8-bit integers; here it stays float, because the next step stretches every slice
    again and the rounding (at most 1/255) would only take grey levels away from slices of low contrast.

    Args:
        image: any shape, e.g. ``(C, H, W, D)``; one whole case, for extremes and percentiles are taken over all of it.
            CT in HU. It stays as it is; besides it, about one copy is held at a time.
        modality: canonical name of the modality.
        window: see ``window_of``.

    Returns:
        float32, 0..255, of the same shape; a MetaTensor keeps its metadata.

    Raises:
        ConfigError: no window, see ``window_of``.
        InputError: an unknown modality, or an MR or ultrasound image without a voxel above 0.

    Source: https://github.com/bowang-lab/MedSAM (data preparation of MedSAM and LiteMedSAM).
    """
    values = image.as_tensor() if isinstance(image, MetaTensor) else image
    level, width = window_of(window)
    if modality == "CT":
        limits = None if _is_8_bit(values) else (level - width / 2, level + width / 2)
    elif modality in _MR_MODALITIES:
        limits = _mr_limits(values)
    elif modality in _PICTURE_MODALITIES:
        limits = None if _is_8_bit(values) else (-math.inf, math.inf)
    else:
        known = ", ".join(("CT", *_MR_MODALITIES, *_PICTURE_MODALITIES))
        raise InputError(f"expected a modality out of {known}, got {modality!r}; name it with --modality")
    scaled = torch.empty(values.shape, dtype=torch.float32, device=values.device).copy_(values)
    if limits is not None:
        _stretch_(scaled.clamp_(*limits))
    return convert_to_dst_type(scaled, image, dtype=torch.float32)[0]


def _is_8_bit(values: torch.Tensor) -> bool:
    """Tell whether all values lie in 0..255."""
    low, high = torch.aminmax(values)
    return bool(low >= 0 and high <= _TOP)


def _mr_limits(values: torch.Tensor) -> tuple[float, float]:
    """Return the percentiles that cut both tails of the voxels above 0, so that what was 0 is below both."""
    stored = values.cpu().numpy()
    positive = stored[stored > 0]  # torch would list the indices, eight times as large as the volume
    if positive.size == 0:
        raise InputError(f"expected an MR or ultrasound image with voxels above 0, got a maximum of {stored.max():g}")
    low, high = np.percentile(positive, _MR_PERCENTILES, overwrite_input=True)  # sorting would need another copy
    return float(low), float(high)


def _stretch_(values: torch.Tensor) -> torch.Tensor:
    """Map the extremes to 0 and 255, in place; one value everywhere becomes 0."""
    low, high = torch.aminmax(values)
    return values.sub_(low).div_((high - low).clamp_min(_SMALLEST_RANGE)).mul_(_TOP)


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
        window: the CT window, see ``window_of``.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ConfigError: no window, see ``window_of``.
        InputError: see ``scale_intensity``.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        modality_key: str = "modality",
        window: Window = "abdomen",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.modality_key = modality_key
        self.window = window_of(window)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with images in 0..255."""
        result = dict(data)
        for key in self.key_iterator(result):
            modality = result.get(self.modality_key)
            result[key] = scale_intensity(result[key], modality=modality, window=self.window)
        return result
