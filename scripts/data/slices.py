"""Training samples: one slice and the classes asked for in it.

A sample depends on (seed, epoch, index) alone. So a resumed run sees what an uninterrupted one would have seen, with
any number of workers and of processes.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import CacheDataset
from monai.transforms import Compose, MapTransform
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset

from scripts.data.fitting import fit_masks_to_square, network_slices
from scripts.errors import ConfigError, InputError
from scripts.losses.shape_distance import DistanceMap, distance_map

LARGEST_SEED = 2**31 - 1


class SlicesToSquared(MapTransform):
    """Cut a case into slices of the network's size, kept as bytes so that many cases fit into memory.

    Args:
        keys: `image` and `label`.
        size: side S of the network's input in pixels.
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), *, size: int) -> None:
        super().__init__(keys)
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace `image` (C, H, W, D) in 0...255 and `label` (K, H, W, D) in {0, 1} by their slices.

        Returns:
            The case with `image` `(D, C, S, S)` and `label` `(D, K, S, S)`, both plain uint8 tensors.
        """
        case = dict(data)
        channels = case["image"].shape[0]
        slices = network_slices(case["image"], self.size)[:, :channels]  # the copies of a grey channel are made later
        case["image"] = (slices * 255).round().to(torch.uint8)
        masks = convert_to_tensor(case["label"], track_meta=False).permute(3, 0, 1, 2)  # (K, H, W, D) -> (D, K, H, W)
        case["label"] = fit_masks_to_square(masks.to(torch.uint8), self.size)
        return case


def choose_prompts(
    present: np.ndarray, askable: np.ndarray, *, count: int, absent_share: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw the classes to ask for in a slice, none twice while others are left.

    Args:
        present: `(K,)` bool, the classes in the slice.
        askable: `(K,)` bool, the classes that the case's annotation tells about.
        count: how many to draw.
        absent_share: chance of each draw to be a class that is not there, where there is a choice.
        rng: source of the draws.

    Returns:
        `(count,)` positions in 0...K-1.
    """
    drawn: list[int] = []
    pools: list[list[int]] = [[], []]
    while len(drawn) < count:
        if not any(pools):
            pools = [_shuffled(askable & ~present, rng), _shuffled(askable & present, rng)]
        wants_present = int(rng.random() >= absent_share)
        drawn.append((pools[wants_present] or pools[1 - wants_present]).pop())
    return np.array(drawn)


def _shuffled(chosen: np.ndarray, rng: np.random.Generator) -> list[int]:
    return rng.permutation(np.flatnonzero(chosen)).tolist()


def grown_box(mask: np.ndarray, *, growth: int, rng: np.random.Generator) -> np.ndarray:
    """Give the tight box of a mask, each side moved outwards at random, within the picture.

    The growth of 0 to 5 pixels is that of the MedSAM family's training.

    Args:
        mask: `(H, W)`; an empty one has no box and gives zeros.
        growth: largest growth of a side in pixels.
        rng: source of the growth.

    Returns:
        `(4,)` float32: x_min, y_min, x_max, y_max in pixels, corners inclusive.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, right, bottom = rng.integers(0, growth + 1, size=4)
    if rows.size == 0:
        return np.zeros(4, dtype=np.float32)
    height, width = mask.shape
    box = (
        max(columns[0] - left, 0),
        max(rows[0] - top, 0),
        min(columns[-1] + right, width - 1),
        min(rows[-1] + bottom, height - 1),
    )
    return np.array(box, dtype=np.float32)


class PromptedSlices(Dataset):
    """The slices of all cases, each with the classes asked for in it.

    Args:
        data: cases as `read_datalist` gives them, with `annotated` class ids.
        transform: reads and prepares a case, once; `SlicesToSquared` ends it.
        class_ids: the classes of the labels' channels, ascending.
        classes_per_image: K, how many classes are asked for in a slice.
        absent_share: share of the questions that ask for a class which is not there.
        box_growth: largest random growth of a box's side in pixels.
        augmentation: random transforms of `image` (3, S, S) and `label` (K, S, S); None for none.
        distance_form: the distance map of the Shape Distance loss.
        seed: of everything random in here.
        progress: whether to show a bar while the cases are read.

    Raises:
        InputError: no case, or a case that annotates none of the classes.
        ConfigError: a share that is none, or fewer than one class.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Compose,
        *,
        class_ids: Sequence[int],
        classes_per_image: int = 1,
        absent_share: float = 0.25,
        box_growth: int = 5,
        augmentation: Compose | None = None,
        distance_form: DistanceMap = "soft",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not 0 <= absent_share <= 1 or classes_per_image < 1:
            raise ConfigError(
                "absent_share lies in 0...1 and classes_per_image is at least 1, "
                f"not {absent_share} and {classes_per_image}"
            )
        self.class_ids = np.array(sorted(class_ids))
        self._require_questions(data)
        self.cases = CacheDataset(data, transform, progress=progress, num_workers=None)
        self.classes_per_image = classes_per_image
        self.absent_share = absent_share
        self.box_growth = box_growth
        self.augmentation = augmentation
        self.distance_form = distance_form
        self.seed = seed
        self.epoch = 0
        self.places, self.present = self._index()

    def __len__(self) -> int:
        """Count the slices."""
        return len(self.places)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: the samples of another epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Draw the questions about slice `index`.

        Returns:
            `image` (3, S, S) float32 in [0, 1]; for each of K questions `class_id` (K,), `label` (K, S, S) in {0, 1},
            `present` (K,), `box` (K, 4) xyxy in pixels and `distance` (K, S, S); and `noise_seed`, from which the
            question's diffusion noise is drawn.
        """
        rng = np.random.default_rng([self.seed, self.epoch, index])
        number, place = self.places[index]
        case = self.cases[number]
        askable = np.isin(self.class_ids, case["annotated"])
        chosen = choose_prompts(
            self.present[index], askable, count=self.classes_per_image, absent_share=self.absent_share, rng=rng
        )
        image, masks = self._augmented(case["image"][place].float() / 255, case["label"][place][chosen], rng)
        layers = masks.numpy()
        boxes = np.stack([grown_box(layer, growth=self.box_growth, rng=rng) for layer in layers])
        distances = np.stack([distance_map(layer, form=self.distance_form) for layer in layers])
        return {
            "image": image.expand(3, -1, -1).contiguous(),
            "label": masks.float(),
            "class_id": torch.as_tensor(self.class_ids[chosen]),
            "present": masks.bool().flatten(1).any(dim=1),
            "box": torch.as_tensor(boxes),
            "distance": torch.as_tensor(distances),
            "noise_seed": torch.tensor(rng.integers(LARGEST_SEED)),
        }

    def _require_questions(self, data: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a case that tells about none of the classes, before any file is read."""
        for case in data:
            if not np.isin(self.class_ids, case["annotated"]).any():
                raise InputError(
                    f"case {case['case']}: annotates the classes {list(case['annotated'])}, but the network is to "
                    f"learn {self.class_ids.tolist()}; give the case a label of these, or set class_ids to the "
                    "classes of the datalist"
                )

    def _index(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """List all slices as (case, slice), and which classes each has."""
        places, present = [], []
        for number in range(len(self.cases)):
            found = self.cases[number]["label"].bool().flatten(2).any(dim=2).numpy()  # (D, K, S, S) -> (D, K)
            places += [(number, place) for place in range(len(found))]
            present.append(found)
        if not places:
            raise InputError("the training section has no slice to learn from")
        return places, np.concatenate(present)

    def _augmented(
        self, image: torch.Tensor, masks: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the random transforms, seeded by the sample's own generator."""
        if self.augmentation is None:
            return image, masks
        self.augmentation.set_random_state(seed=int(rng.integers(LARGEST_SEED)))
        sample = self.augmentation({"image": image, "label": masks})
        image, masks = (convert_to_tensor(sample[name], track_meta=False) for name in ("image", "label"))
        return image.clamp(0, 1), masks.to(torch.uint8)
