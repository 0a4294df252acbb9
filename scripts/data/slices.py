"""Training samples: one slice, with the masks of all classes or with the classes asked for in it.

A sample depends on (seed, epoch, index) alone. So a resumed run sees what an uninterrupted one would have seen, with
any number of workers and of processes.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import CacheDataset
from monai.transforms import Compose, MapTransform
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset

from scripts.data.embeddings import SliceEmbeddings
from scripts.data.fitting import fit_masks_to_square, fitted_shape, network_slices
from scripts.data.orientations import Orientation, draw_orientation, read_orientations, reoriented
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError
from scripts.losses.shape_distance import DistanceMap, distance_map

logger = logging.getLogger(__name__)
LARGEST_SEED = 2**31 - 1
_OF_VERSIONS = 2**31  # keeps the draws of fixed versions apart from those of epochs


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
            The case with `image` `(D, C, S, S)` and `label` `(D, K, S, S)`, both plain uint8 tensors; `content`, the
            rows and columns that they fill at the top left; and `drawn` `(D, K)` bool, the classes that each slice of
            the label has at its own size: of a small one nothing may be left at the network's.

        Raises:
            InputError: image and label differ in their pixels or slices.
        """
        case = dict(data)
        if case["image"].shape[1:] != case["label"].shape[1:]:
            raise InputError(
                f"case {case.get('case', '')}: expected a label of {tuple(case['image'].shape[1:])} pixels as the "
                f"image has, got {tuple(case['label'].shape[1:])}; a slice must not be lost on the way"
            )
        channels, height, width, _ = case["image"].shape
        slices = network_slices(case["image"], self.size)[:, :channels]  # the copies of a grey channel are made later
        case["image"] = (slices * 255).round().to(torch.uint8)
        masks = convert_to_tensor(case["label"], track_meta=False).permute(3, 0, 1, 2)  # (K, H, W, D) -> (D, K, H, W)
        case["label"] = fit_masks_to_square(masks.to(torch.uint8), self.size)
        case["drawn"] = masks.bool().flatten(2).any(dim=2)
        case["content"] = fitted_shape(height, width, self.size)
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
    return np.array(drawn, dtype=int)


def choose_impossible(impossible: np.ndarray, *, count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw classes that cannot be in an image at all, none twice while others are left.

    Args:
        impossible: `(K,)` bool, the classes that cannot be there.
        count: how many questions are asked about the image.
        share: chance of each of them to be about such a class, where there is one.
        rng: source of the draws; not used where there is none.

    Returns:
        Positions in 0...K-1, as many as the chance would have it: 0 to `count`.
    """
    drawn: list[int] = []
    pool: list[int] = []
    asked = int(rng.binomial(count, share)) if share > 0 and impossible.any() else 0
    while len(drawn) < asked:
        pool = pool or _shuffled(impossible, rng)
        drawn.append(pool.pop())
    return np.array(drawn, dtype=int)


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


class LabelledSlices(Dataset):
    """The slices of all cases, each with the masks of all classes.

    Args:
        data: cases as `read_datalist` gives them, with `annotated` class ids.
        transform: reads and prepares a case, once; `SlicesToSquared` ends it.
        class_ids: the classes of the labels' channels, ascending.
        augmentation: random transforms of `image` (3, S, S) and `label` (K, S, S); None for none.
        vocabulary: tells which class is another one's partner; needed for `orientations`.
        orientations: modality -> "none", "mirror" (left to right) or "all" (the eight rotations and mirrorings); none
            where it says nothing. In a mirrored image lateral partners exchange their names.
        augment: False switches `augmentation` and `orientations` off.
        seed: of everything random in here.
        progress: whether to show a bar while the cases are read.

    Attributes:
        present: `(N, K)` bool, the annotated classes that each slice shows at the network's size.
        sets: the data set of each slice, N names.

    Raises:
        InputError: no case, a case that does not annotate all the classes, or one whose slices were lost on the way.
        ConfigError: an unknown orientation, or one that would turn a class into a partner which is not among the
            classes.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Compose,
        *,
        class_ids: Sequence[int],
        augmentation: Compose | None = None,
        vocabulary: Vocabulary | None = None,
        orientations: Mapping[str, Orientation] | None = None,
        augment: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if vocabulary is None and orientations:
            raise ConfigError(f"orientations need the vocabulary; give {type(self).__name__} vocabulary")
        self.class_ids = np.array(sorted(class_ids))
        self._require_annotation(data)
        self.askable = self._table(data, lambda case: np.isin(self.class_ids, case["annotated"]))
        self.partners = np.arange(len(self.class_ids))
        self.orientations: list[Orientation] = ["none"] * len(data)
        if vocabulary is not None:
            self.partners = _partner_positions(self.class_ids, vocabulary)
            kinds = _read_orientations(orientations or {} if augment else {}, self.class_ids, vocabulary)
            self.orientations = [kinds.get(case["modality"], "none") for case in data]
        self.cases = CacheDataset(data, transform, progress=progress, num_workers=None)
        self.augmentation = augmentation if augment else None
        self.seed = seed
        self.epoch = 0
        self.places, self.present = self._index()
        self.sets = [str(data[number].get("set", "")) for number, _ in self.places]

    def __len__(self) -> int:
        """Count the slices."""
        return len(self.places)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: the samples of another epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Draw how slice `index` is shown.

        Returns:
            `image` (3, S, S) float32 in [0, 1] and `label` (K, S, S) in {0, 1}, the classes in the order of their ids.
        """
        rng = np.random.default_rng([self.seed, self.epoch, index])
        number, place = self.places[index]
        mirrored, turns = draw_orientation(self.orientations[number], rng)
        channels = self._channels(mirrored)
        image, masks = self._layers(number, place, channels, mirrored=mirrored, turns=turns)
        image, masks = self._augmented(image, masks, rng)
        return {"image": _in_colour(image), "label": masks.float()}

    def _channels(self, mirrored: bool) -> np.ndarray:
        """Say which channel of the label each class has: in a mirrored image that of its partner."""
        return self.partners if mirrored else np.arange(len(self.class_ids))

    def _layers(
        self, number: int, place: int, channels: np.ndarray, *, mirrored: bool, turns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the pixels (C, S, S) in [0, 1] and some channels' masks of a case's slice, laid as drawn."""
        case = self.cases[number]
        image, masks = case["image"][place].float() / 255, case["label"][place][channels]
        # Of a class that cannot be there, a label may still say something; it was not annotated.
        masks = masks * torch.as_tensor(self.askable[number][channels]).reshape(-1, 1, 1)
        return self._turned(image, masks, case, mirrored=mirrored, turns=turns)

    @staticmethod
    def _turned(
        image: torch.Tensor, masks: torch.Tensor, case: Mapping[str, Any], *, mirrored: bool, turns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lay the content of image and masks as drawn."""
        if not mirrored and not turns:
            return image, masks
        content = case.get("content", image.shape[-2:])
        return (
            reoriented(image, content=content, mirrored=mirrored, turns=turns),
            reoriented(masks, content=content, mirrored=mirrored, turns=turns),
        )

    def _require_annotation(self, data: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a case that does not tell about each of the classes, before any file is read."""
        for case in data:
            if not np.isin(self.class_ids, case["annotated"]).all():
                raise InputError(
                    f"case {case['case']}: annotates the classes {list(case['annotated'])}, but the network learns "
                    f"{self.class_ids.tolist()} from each image together; give the case a label of all of them, or set "
                    "class_ids to those that every case has"
                )

    def _table(self, data: Sequence[Mapping[str, Any]], row: Callable[[Mapping[str, Any]], np.ndarray]) -> np.ndarray:
        """Ask something of each case for each class: (cases, K) bool."""
        rows = [row(case) for case in data]
        return np.array(rows, dtype=bool).reshape(len(data), len(self.class_ids))

    def _index(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """List all slices as (case, slice), and which annotated classes each has; count what was lost on the way."""
        places, present = [], []
        drawn, vanished = 0, 0
        for number, askable in enumerate(self.askable):
            case = self.cases[number]
            found = case["label"].bool().flatten(2).any(dim=2).numpy() & askable  # (D, K, S, S) -> (D, K)
            before = np.asarray(case.get("drawn", found)) & askable
            _require_all_slices(case, len(before))
            places += [(number, place) for place in range(len(found))]
            present.append(found)
            drawn += int(before.sum())
            vanished += int((before & ~found).sum())
        if not places:
            raise InputError("the training section has no slice to learn from")
        if vanished:
            size = self.cases[0]["label"].shape[-1]
            logger.info("%d of %d (slice, class) pairs are too small to be seen at %d pixels", vanished, drawn, size)
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


class PromptedSlices(LabelledSlices):
    """The slices of all cases, each with the classes asked for in it.

    Args:
        data: as for `LabelledSlices`.
        transform: as for `LabelledSlices`.
        class_ids: as for `LabelledSlices`.
        classes_per_image: K, how many classes are asked for in a slice.
        absent_share: share of the questions that ask for a class which is not there.
        box_growth: largest random growth of a box's side in pixels.
        vocabulary: tells which classes cannot occur in a case, from its `modality` and `regions`, and which class is
            another one's partner; needed for `impossible_share` and `orientations`.
        impossible_share: share of the questions about a case that ask for a class which cannot occur in it, where
            `class_ids` has one; all others are about annotated classes.
        versions: 0 augments a slice anew each time that it is drawn; n gives it n fixed versions, the slice as it is
            and n - 1 augmented ones, of which each draw takes one, as for embeddings that are computed before.
        distance_form: the distance map of the Shape Distance loss.
        settings: further ones of `LabelledSlices`.

    Attributes:
        embeddings: of the slices' versions; None as long as there are none.

    Raises:
        InputError: no case, a case that annotates none of the classes, or one whose slices were lost on the way.
        ConfigError: a share that is none, fewer than one class, an unknown orientation, or one that would turn a class
            into a partner which is not among the classes.
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
        vocabulary: Vocabulary | None = None,
        impossible_share: float = 0.0,
        versions: int = 0,
        distance_form: DistanceMap = "soft",
        **settings: Any,
    ) -> None:
        _require_shares(absent_share, impossible_share, classes_per_image)
        if vocabulary is None and impossible_share:
            raise ConfigError("impossible_share needs the vocabulary; give PromptedSlices vocabulary")
        self.classes_per_image = classes_per_image
        self.absent_share = absent_share
        self.impossible_share = impossible_share
        self.box_growth = box_growth
        self.versions = versions
        self.embeddings: SliceEmbeddings | None = None
        self.distance_form = distance_form
        super().__init__(data, transform, class_ids=class_ids, vocabulary=vocabulary, **settings)
        self.impossible = np.zeros_like(self.askable)
        if vocabulary is not None:
            self.impossible = self._table(data, lambda case: _cannot_occur(self.class_ids, case, vocabulary))
            self.impossible &= ~self.askable

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Draw the questions about slice `index`.

        Returns:
            `image` (3, S, S) float32 in [0, 1]; for each of K questions `class_id` (K,), `label` (K, S, S) in {0, 1},
            `present` (K,), `box` (K, 4) xyxy in pixels and `distance` (K, S, S); and `noise_seed`, from which the
            question's diffusion noise is drawn. Where embeddings have been computed, `embedding` (256, h, w) float16
            takes the place of `image`.
        """
        rng = np.random.default_rng([self.seed, self.epoch, index])
        number, place = self.places[index]
        version = int(rng.integers(self.versions)) if self.versions else None
        look = rng if version is None else self._look(index, version)
        mirrored, turns = self._orientation(number, version, look)
        channels = self._channels(mirrored)
        chosen = self._choose(index, channels, rng)
        image, masks = self._layers(number, place, channels[chosen], mirrored=mirrored, turns=turns)
        image, masks = (image, masks) if version == 0 else self._augmented(image, masks, look)
        layers = masks.numpy()
        boxes = np.stack([grown_box(layer, growth=self.box_growth, rng=rng) for layer in layers])
        distances = np.stack([distance_map(layer, form=self.distance_form) for layer in layers])
        seen = (
            {"image": _in_colour(image)}
            if self.embeddings is None
            else {"embedding": self.embeddings.read(index, version or 0)}
        )
        return {
            **seen,
            "label": masks.float(),
            "class_id": torch.as_tensor(self.class_ids[chosen]),
            "present": masks.bool().flatten(1).any(dim=1),
            "box": torch.as_tensor(boxes),
            "distance": torch.as_tensor(distances),
            "noise_seed": torch.tensor(rng.integers(LARGEST_SEED)),
        }

    def image(self, index: int, version: int) -> torch.Tensor:
        """Give the pixels (3, S, S) in [0, 1] of a slice in one of its fixed versions, as `__getitem__` shows them."""
        look = self._look(index, version)
        number, place = self.places[index]
        mirrored, turns = self._orientation(number, version, look)
        image, nothing = self._layers(number, place, np.arange(1), mirrored=mirrored, turns=turns)
        return _in_colour(image if version == 0 else self._augmented(image, nothing, look)[0])

    def _orientation(self, number: int, version: int | None, look: np.random.Generator) -> tuple[bool, int]:
        """Draw how a case's slice is laid; the first of fixed versions is as it is."""
        return (False, 0) if version == 0 else draw_orientation(self.orientations[number], look)

    def _look(self, index: int, version: int) -> np.random.Generator:
        """Give the source of a version's orientation and augmentation, the same in every epoch."""
        return np.random.default_rng([self.seed, _OF_VERSIONS, version, index])

    def _require_annotation(self, data: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a case that tells about none of the classes, before any file is read."""
        for case in data:
            if not np.isin(self.class_ids, case["annotated"]).any():
                raise InputError(
                    f"case {case['case']}: annotates the classes {list(case['annotated'])}, but the network is to "
                    f"learn {self.class_ids.tolist()}; give the case a label of these, or set class_ids to the "
                    "classes of the datalist"
                )

    def _choose(self, index: int, channels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the classes to ask for in a slice, as positions (classes_per_image,)."""
        number, _ = self.places[index]
        count = self.classes_per_image
        impossible = self.impossible[number][channels]
        foreign = choose_impossible(impossible, count=count, share=self.impossible_share, rng=rng)
        own = choose_prompts(
            self.present[index][channels],
            self.askable[number][channels],
            count=count - len(foreign),
            absent_share=self.absent_share,
            rng=rng,
        )
        return np.concatenate([own, foreign])


def with_data(dataset: LabelledSlices, data: Any) -> LabelledSlices:  # noqa: ARG001
    """Give a dataset that was made of `data`.

    In configs/train.json it is `train#dataset`, whose `data` MONAI Label sets, while the dataset itself is `slices`.
    """
    return dataset


def _in_colour(image: torch.Tensor) -> torch.Tensor:
    """Repeat a grey channel: (1 or 3, S, S) to (3, S, S)."""
    return image.expand(3, -1, -1).contiguous()


def _require_all_slices(case: Mapping[str, Any], drawn: int) -> None:
    """Refuse a case that has other slices than its files had, as far as anybody counted them."""
    counted = case.get("counts", {}).get("slices", drawn)
    found = {"image": len(case["image"]), "label": len(case["label"]), "label as drawn": drawn}
    if set(found.values()) != {counted}:
        listed = ", ".join(f"{name} {number}" for name, number in found.items())
        raise InputError(
            f"case {case['case']}: expected {counted} slices, got {listed}; the files have changed since they were "
            "prepared, or a transform has lost some"
        )


def _require_shares(absent_share: float, impossible_share: float, classes_per_image: int) -> None:
    if not 0 <= absent_share <= 1 or classes_per_image < 1:
        raise ConfigError(
            "absent_share lies in 0...1 and classes_per_image is at least 1, "
            f"not {absent_share} and {classes_per_image}"
        )
    if not 0 <= impossible_share <= 1:
        raise ConfigError(f"impossible_share lies in 0...1, not {impossible_share}")


def _cannot_occur(class_ids: np.ndarray, case: Mapping[str, Any], vocabulary: Vocabulary) -> np.ndarray:
    """Tell which classes an image of the case's modality and regions cannot show, (K,) bool."""
    where = {"modality": case["modality"], "regions": case.get("regions")}
    return np.array([not vocabulary.can_occur(class_id, **where) for class_id in class_ids.tolist()])


def _read_orientations(
    orientations: Mapping[str, Orientation], class_ids: np.ndarray, vocabulary: Vocabulary
) -> dict[str, Orientation]:
    """Check how images may be laid, by the canonical name of their modality."""
    kinds = read_orientations(orientations, vocabulary)
    for modality, kind in kinds.items():
        if kind != "none":
            _require_partners(modality, class_ids, vocabulary)
    return kinds


def _require_partners(modality: str, class_ids: np.ndarray, vocabulary: Vocabulary) -> None:
    """Refuse to mirror what has a partner without a channel."""
    for entry in map(vocabulary.entry, class_ids.tolist()):
        if modality in entry.modalities and entry.partner is not None and entry.partner not in class_ids:
            raise ConfigError(
                f"a mirrored {modality} image shows {vocabulary.entry(entry.partner).name!r} where {entry.name!r} was, "
                f"but class_ids is {class_ids.tolist()}: add {entry.partner} to class_ids, or set the orientation of "
                f"{modality} to none"
            )


def _partner_positions(class_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Give the position of each class's lateral partner, (K,); its own where there is none among the classes."""
    ids = class_ids.tolist()
    partners = [vocabulary.entry(class_id).partner for class_id in ids]
    return np.array([ids.index(partner) if partner in ids else k for k, partner in enumerate(partners)], dtype=int)
