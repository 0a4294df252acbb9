"""From a whole case to the logits of every class asked for: each slice is encoded once for all its classes."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from tqdm import tqdm

from scripts.data.fitting import network_slices, restore_from_square
from scripts.engines.batches import diffusion_noise
from scripts.networks.automedsam import AutoMedSAM

ABSENT_LOGIT = -1e4  # of a class that was not asked for: probability 0 in half precision too


def _seed_of(*parts: object) -> int:
    """Make one seed of several numbers or names, the same everywhere."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


class ClassPromptInferer(Inferer):
    """Ask for classes in every slice of a case.

    Args:
        class_ids: the classes to ask for where the call names none; None for all that the network knows.
        slices_at_once: slices that go through the image encoder together.
        prompts_at_once: prompts that go through the class prompt encoder and the mask decoder together, the bound on
            memory.
        noise_seed: None for no diffusion noise, so that the answer is one function of the image; else the noise is
            drawn for each slice and class from this seed, the case, the slice and the class.
        progress: whether to show a bar of the slices of a volume.
    """

    def __init__(
        self,
        *,
        class_ids: Sequence[int] | None = None,
        slices_at_once: int = 4,
        prompts_at_once: int = 16,
        noise_seed: int | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.class_ids = class_ids
        self.slices_at_once = slices_at_once
        self.prompts_at_once = prompts_at_once
        self.noise_seed = noise_seed
        self.progress = progress

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: torch.nn.Module,
        class_ids: Sequence[int] | torch.Tensor | None = None,
        presence: torch.Tensor | None = None,
        case: str = "",
        **_: Any,
    ) -> torch.Tensor:
        """Segment one case.

        Args:
            inputs: `(1, C, H, W, D)`, intensities in 0...255, C = 1 or 3.
            network: an `AutoMedSAM`, wrapped for several processes or not.
            class_ids: the K classes to ask for.
            presence: `(1, K, D)` bool, which class to ask for in which slice; None for all everywhere. What is not
                asked for comes out absent.
            case: its name, which seeds the noise.

        Returns:
            Logits `(1, K, H, W, D)` in the case's own pixels.
        """
        model = cast(AutoMedSAM, getattr(network, "module", network))
        ids = [int(i) for i in (class_ids if class_ids is not None else self.class_ids or model.class_ids)]
        image = convert_to_tensor(inputs, track_meta=False)[0]  # (C, H, W, D)
        _, height, width, depth = image.shape
        logits = image.new_full((len(ids), height, width, depth), ABSENT_LOGIT)
        for start in self._chunks(depth):
            chunk = slice(start, start + self.slices_at_once)
            asked = None if presence is None else presence[0, :, chunk]
            answer = self._segment(model, image[..., chunk], ids, asked, start, case)
            logits[..., chunk] = answer.permute(1, 2, 3, 0)  # (n, K, H, W) -> (K, H, W, n)
        return logits.unsqueeze(0)

    def _chunks(self, depth: int) -> Iterable[int]:
        """Give the first slice of each chunk, with a bar where there are several."""
        starts = range(0, depth, self.slices_at_once)
        hidden = not self.progress or len(starts) == 1
        return tqdm(starts, desc="slices", unit_scale=self.slices_at_once, leave=False, disable=hidden)

    def _segment(
        self,
        model: AutoMedSAM,
        image: torch.Tensor,
        ids: Sequence[int],
        asked: torch.Tensor | None,
        first: int,
        case: str,
    ) -> torch.Tensor:
        """Segment n slices (C, H, W, n): logits (n, K, H, W)."""
        _, height, width, count = image.shape
        embedding = model.encode_image(network_slices(image, model.image_size).to(image.device))
        answer = image.new_full((count, len(ids), height, width), ABSENT_LOGIT)
        for rows, columns in self._questions(count, len(ids), asked):
            asked_ids = torch.tensor([ids[column] for column in columns], device=image.device)
            places = [(case, first + row, ids[column]) for row in rows for column in columns]
            noise = self._noise(model, places, (len(rows), len(columns)), image.device)
            prompts = model.encode_classes(embedding[rows], asked_ids.expand(len(rows), -1), noise=noise)
            squares, _ = model.decode(embedding[rows], prompts)  # (B, K, S, S)
            restored = restore_from_square(squares, size=model.image_size, original=(height, width))
            answer[torch.tensor(rows)[:, None], torch.tensor(columns)] = restored.to(answer.dtype)
        return answer

    def _questions(self, count: int, classes: int, asked: torch.Tensor | None) -> Iterator[tuple[list[int], list[int]]]:
        """Bundle what is asked: slices with the same classes, so that each slice's classes share what they can.

        Args:
            count: n slices.
            classes: K classes.
            asked: `(K, n)` bool; None for all.

        Yields:
            Slices and classes, of which each slice is asked for each class: at most `prompts_at_once` questions.
        """
        bundles: dict[tuple[int, ...], list[int]] = {}
        for row in range(count):
            columns = tuple(column for column in range(classes) if asked is None or bool(asked[column, row]))
            bundles.setdefault(columns, []).append(row)
        for columns, rows in bundles.items():
            for start in range(0, len(columns), self.prompts_at_once):
                some = list(columns[start : start + self.prompts_at_once])
                step = max(1, self.prompts_at_once // len(some))
                for place in range(0, len(rows), step):
                    yield rows[place : place + step], some

    def _noise(
        self,
        model: AutoMedSAM,
        places: Sequence[tuple[str, int, int]],
        shape: tuple[int, int],
        device: torch.device,
    ) -> torch.Tensor | None:
        """Draw the noise (B, K, 256, h, w) of B x K (case, slice, class), each from a seed of its own."""
        if self.noise_seed is None:
            return None
        seeds = torch.tensor([_seed_of(self.noise_seed, *place) for place in places])
        noise = diffusion_noise(seeds, prompts=1, grid_size=model.grid_size)  # (B K, 1, C, h, w)
        return noise.reshape(*shape, *noise.shape[2:]).to(device)
