"""What the network says of a case, slice by slice and class by class, in one or in several draws of noise."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

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


class CaseAnswers:
    """A case's answers as they come in.

    In half precision, which keeps on which side of 0 a logit lies and the probability to 1e-4: of a CT of
    512 x 512 x 300 voxels, five classes take 0.8 GB.

    Args:
        shape: of the case, `(H, W, D)`.
        classes: K.
        samples: draws of noise for each slice and class.
        device: where the answers are.
    """

    def __init__(self, shape: tuple[int, int, int], *, classes: int, samples: int, device: torch.device) -> None:
        height, width, depth = shape
        of_slices = (depth, classes, height, width)  # a slice's answers lie together
        self.logits = torch.full(of_slices, ABSENT_LOGIT, dtype=torch.float16, device=device)
        self.uncertainty = torch.zeros_like(self.logits) if samples > 1 else None

    def put(self, places: Sequence[int], columns: Sequence[int], draws: Sequence[torch.Tensor]) -> None:
        """Write down what each draw says of some slices and classes.

        Args:
            places: n slices.
            columns: k of the classes.
            draws: logits `(n, k, H, W)` of each.
        """
        where = torch.tensor(places)[:, None], torch.tensor(columns)
        if self.uncertainty is None:
            (logits,) = draws
            self.logits[where] = logits.half()
            return
        probabilities = torch.stack([torch.sigmoid(logits.float()) for logits in draws])
        spread, mean = torch.std_mean(probabilities, dim=0, correction=0)
        self.logits[where] = torch.logit(mean, _SURE).half()
        self.uncertainty[where] = spread.half()

    def repeat(self, place: int, source: int) -> None:
        """Give a slice the answers of another one."""
        for values in (self.logits, self.uncertainty):
            if values is not None:
                values[place] = values[source]

    def result(self) -> torch.Tensor | SampledLogits:
        """Give all answers as `(1, K, H, W, D)`: the logits, or what several draws say together."""
        logits = self.logits.permute(1, 2, 3, 0).unsqueeze(0)  # (D, K, H, W) -> (1, K, H, W, D)
        if self.uncertainty is None:
            return logits
        return SampledLogits(logits, self.uncertainty.permute(1, 2, 3, 0).unsqueeze(0))
