"""What the network says of a case, slice by slice and class by class, in one or in several draws of noise."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from scripts.data.components import largest_component
from scripts.errors import PromptError

ABSENT_LOGIT = -1e4  # of a class that was not asked for: probability 0 in half precision too
_SURE = 1e-7  # how near to 0 and 1 a mean of probabilities counts, so that its logit is a number


class SampledLogits(NamedTuple):
    """What several draws of the diffusion noise say together.

    Attributes:
        logits: of the mean probability, `(1, K, H, W, D)` in half precision.
        uncertainty: standard deviation of the probability between the draws, 0 to 0.5, of the same shape and type.
    """

    logits: torch.Tensor
    uncertainty: torch.Tensor


class SliceQuality(NamedTuple):
    """What the network's answers say of their own quality, slice by slice and class by class.

    Attributes:
        iou: the decoder's estimate of the mask's intersection over union, mean of the draws, `(D, K)`; NaN of what was
            not asked for.
        area: predicted pixels `(D, K)`, probability above one half.
        overlaps: pixels that the masks of two of the S draws share, `(D, K, S, S)`; on the diagonal those of each.
    """

    iou: torch.Tensor
    area: torch.Tensor
    overlaps: torch.Tensor


class JudgedLogits(NamedTuple):
    """Answers with what they say of their own quality.

    Attributes:
        logits: `(1, K, H, W, D)` in half precision; of several draws, of the mean probability.
        uncertainty: as in `SampledLogits`; None of a single draw.
        quality: of the masks.
    """

    logits: torch.Tensor
    uncertainty: torch.Tensor | None
    quality: SliceQuality


class CaseAnswers:
    """A case's answers as they come in.

    In half precision, which keeps on which side of 0 a logit lies and the probability to 1e-4: of a CT of
    512 x 512 x 300 voxels, five classes take 0.8 GB.

    Args:
        shape: of the case, `(H, W, D)`.
        classes: K.
        samples: draws of noise for each slice and class.
        device: where the answers are.
        judged: whether to keep what the answers say of their own quality.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, classes: int, samples: int, device: torch.device, judged: bool = False
    ) -> None:
        height, width, depth = shape
        of_slices = (depth, classes, height, width)  # a slice's answers lie together
        self.logits = torch.full(of_slices, ABSENT_LOGIT, dtype=torch.float16, device=device)
        self.uncertainty = torch.zeros_like(self.logits) if samples > 1 else None
        self.quality = _no_quality(depth, classes, samples) if judged else None

    def put(
        self,
        places: Sequence[int],
        columns: Sequence[int],
        draws: Sequence[torch.Tensor],
        qualities: Sequence[torch.Tensor] = (),
    ) -> None:
        """Write down what each draw says of some slices and classes.

        Args:
            places: n slices.
            columns: k of the classes.
            draws: logits `(n, k, H, W)` of each.
            qualities: the decoder's estimates `(n, k)` of each, where they are to be kept.
        """
        where = torch.tensor(places)[:, None], torch.tensor(columns)
        self._put_logits(where, draws)
        if self.quality is not None:
            self.quality.iou[where] = torch.stack(list(qualities)).float().mean(dim=0).cpu()
            self.quality.area[where] = (self.logits[where] > 0).sum(dim=(2, 3)).cpu()
            self.quality.overlaps[where] = _shared_pixels(draws).cpu()

    def _put_logits(self, where: tuple[torch.Tensor, torch.Tensor], draws: Sequence[torch.Tensor]) -> None:
        if self.uncertainty is None:
            (logits,) = draws
            self.logits[where] = logits.half()
            return
        probabilities = torch.stack([torch.sigmoid(logits.float()) for logits in draws])
        spread, mean = torch.std_mean(probabilities, dim=0, correction=0)
        self.logits[where] = logit_of_mean(mean).half()
        self.uncertainty[where] = spread.half()

    def repeat(self, place: int, source: int) -> None:
        """Give a slice the answers of another one."""
        for values in (self.logits, self.uncertainty, *(self.quality or ())):
            if values is not None:
                values[place] = values[source]

    def keep_largest(self, columns: Sequence[int]) -> None:
        """Keep of some classes, in a case of several slices, the largest connected body; elsewhere they are absent."""
        if self.logits.shape[0] == 1:
            return
        for column in columns:
            logits = self.logits[:, column]  # (D, H, W), a view
            mask = (logits > 0).cpu().numpy()
            gone = torch.from_numpy(mask & ~largest_component(mask)).to(logits.device)
            logits[gone] = ABSENT_LOGIT
            if self.quality is not None:
                area = (logits > 0).sum(dim=(1, 2)).cpu()
                self.quality.area[:, column] = area
                self.quality.overlaps[area == 0, column] = 0

    def result(self) -> torch.Tensor | SampledLogits | JudgedLogits:
        """Give all answers as `(1, K, H, W, D)`: the logits, what several draws say together, or with the quality."""
        logits = self.logits.permute(1, 2, 3, 0).unsqueeze(0)  # (D, K, H, W) -> (1, K, H, W, D)
        spread = None if self.uncertainty is None else self.uncertainty.permute(1, 2, 3, 0).unsqueeze(0)
        if self.quality is not None:
            return JudgedLogits(logits, spread, self.quality)
        return logits if spread is None else SampledLogits(logits, spread)


def logit_of_mean(probability: torch.Tensor) -> torch.Tensor:
    """Give the logit of a mean of probabilities, which stays a number where all are 0 or 1."""
    return torch.logit(probability, _SURE)


def merge_channels(
    answer: torch.Tensor | SampledLogits | JudgedLogits, groups: Sequence[Sequence[int]]
) -> torch.Tensor | SampledLogits | JudgedLogits:
    """Let the answers to some questions share a channel: in each pixel the largest logit holds, with its uncertainty.

    Args:
        answer: to Q questions.
        groups: of which of them each of K channels is made.

    Returns:
        The same with K channels.

    Raises:
        PromptError: the quality of a channel of several answers, of which each has its own.
    """
    if isinstance(answer, JudgedLogits):
        if any(len(group) > 1 for group in groups):
            raise PromptError("the quality is known of each object by itself: name each one differently, or none")
        order = [group[0] for group in groups]
        quality = SliceQuality(*(part[:, order] for part in answer.quality))
        spread = None if answer.uncertainty is None else answer.uncertainty[:, order]
        return JudgedLogits(answer.logits[:, order], spread, quality)
    if isinstance(answer, SampledLogits):
        logits, winners = zip(*(answer.logits[:, list(group)].max(dim=1) for group in groups), strict=True)
        spreads = [
            answer.uncertainty[:, list(group)].gather(1, winner.unsqueeze(1)).squeeze(1)
            for group, winner in zip(groups, winners, strict=True)
        ]
        return SampledLogits(torch.stack(logits, dim=1), torch.stack(spreads, dim=1))
    return torch.stack([answer[:, list(group)].amax(dim=1) for group in groups], dim=1)


def _no_quality(depth: int, classes: int, samples: int) -> SliceQuality:
    """Give what holds of a case of which nothing has been asked yet."""
    return SliceQuality(
        iou=torch.full((depth, classes), torch.nan),
        area=torch.zeros((depth, classes), dtype=torch.int64),
        overlaps=torch.zeros((depth, classes, samples, samples), dtype=torch.int64),
    )


def _shared_pixels(draws: Sequence[torch.Tensor]) -> torch.Tensor:
    """Count the pixels that the masks of each two draws `(n, k, H, W)` share: `(n, k, S, S)`."""
    masks = torch.stack(list(draws), dim=2).flatten(3) > 0  # (n, k, S, H W)
    rows = [(masks & masks[:, :, draw : draw + 1]).sum(dim=3) for draw in range(len(draws))]
    return torch.stack(rows, dim=2)
