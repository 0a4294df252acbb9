"""Connected components: leaving out of masks what is too small to be a structure, or all but the largest.

The published preparation of the training data leaves small ones out, and the option is off by default: small structures
are real too, and an evaluation that leaves them out is another one.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_numpy
from scipy import ndimage

from scripts.errors import ConfigError

_IN_VOLUME = np.ones((3, 3, 3), dtype=bool)  # 26 neighbours
_IN_SLICE = np.zeros((3, 3, 3), dtype=bool)  # 8 neighbours, none of them in another slice
_IN_SLICE[:, :, 1] = True


def remove_small_components(masks: np.ndarray, *, voxels: int, pixels: int) -> np.ndarray:
    """Take small connected objects out of masks, each class by itself.

    First objects of fewer than `voxels` voxels, with 26 neighbours, over all slices; then, of what is left, objects of
    fewer than `pixels` pixels, with 8 neighbours, in each slice. MedSAM's preparation of CT and MR uses 1000 and 100.

    The slices of a stack of pictures are neighbours as those of a volume are: they come in order, and counting voxels
    needs no spacing. A single slice is no volume: there `pixels` alone counts, or every lesion of less than 1000 pixels
    would be gone from a picture.

    Args:
        masks: `(K, H, W, D)`, foreground above 0, slices along D.
        voxels: size of the smallest object that stays; 0 or 1 for all.
        pixels: size of the smallest object of a slice that stays; 0 or 1 for all.

    Returns:
        A copy of the same shape and type, zeros where an object was.

    Source: https://github.com/bowang-lab/MedSAM (data preparation of MedSAM and LiteMedSAM).
    """
    kept = masks.copy()
    for mask in kept:  # (H, W, D), a view
        if masks.shape[3] > 1:
            _clear_small(mask, smallest=voxels, neighbours=_IN_VOLUME)
        _clear_small(mask, smallest=pixels, neighbours=_IN_SLICE)
    return kept


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Keep the largest connected object of a mask, with 26 neighbours.

    Args:
        mask: three axes, bool.

    Returns:
        A mask of the same shape, bool; of objects of one size the first in the order of the axes.
    """
    labels, count = ndimage.label(mask, structure=_IN_VOLUME)
    if count < 2:
        return mask.copy()
    sizes = np.bincount(labels.ravel())
    return labels == 1 + np.argmax(sizes[1:])


def _clear_small(mask: np.ndarray, *, smallest: int, neighbours: np.ndarray) -> None:
    """Set the small objects of one mask (H, W, D) to 0, in place."""
    if smallest <= 1:
        return
    labels, _ = ndimage.label(mask, structure=neighbours)
    small = np.bincount(labels.ravel()) < smallest  # by label; 0 is the background
    small[0] = False
    mask[small[labels]] = 0


class RemoveSmallComponentsd(MapTransform):
    """Runs `remove_small_components`.

    Args:
        keys: of the masks (K, H, W, D), slices last: after axes have been brought into order.
        smallest: voxels in the volume and pixels in the slice of the smallest object that stays; [0, 0] leaves all.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ConfigError: `smallest` is not two whole numbers of 0 or more.
    """

    def __init__(
        self, keys: KeysCollection = "label", *, smallest: Sequence[int] = (0, 0), allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.voxels, self.pixels = smallest_sizes(smallest)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of `data`; masks keep type, device and metadata."""
        result = dict(data)
        if max(self.voxels, self.pixels) <= 1:
            return result
        for key in self.key_iterator(result):
            kept = remove_small_components(convert_to_numpy(result[key]), voxels=self.voxels, pixels=self.pixels)
            result[key] = convert_to_dst_type(kept, result[key])[0]
        return result


def smallest_sizes(smallest: Sequence[int]) -> tuple[int, int]:
    """Check a setting `[voxels, pixels]` of the smallest object that stays.

    Raises:
        ConfigError: not two whole numbers of 0 or more.
    """
    sizes = list(smallest) if isinstance(smallest, Sequence) else [smallest]
    if len(sizes) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes):
        raise ConfigError(
            "the smallest component is given by two whole numbers of 0 or more, [voxels in the volume, pixels in the "
            f"slice], such as [1000, 100], not {smallest!r}"
        )
    return sizes[0], sizes[1]
