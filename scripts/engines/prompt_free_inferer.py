"""From a whole case to the logits of every class, by a network that needs no prompt (HSP-SAM)."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from scripts.data.fitting import restore_from_square
from scripts.engines.answers import CaseAnswers
from scripts.engines.inferers import CaseSlices, ClassPromptInferer
from scripts.errors import ConfigError
from scripts.networks.hsp_sam import HSPSAM


class PromptFreeInferer(ClassPromptInferer):
    """Segment every slice of a case, all classes at once; slices that are alike to the network only once.

    Classes can still be asked for: what is not asked for counts as background.

    Args:
        settings: of `ClassPromptInferer`. There are no prompts to put together, so that `prompts_at_once` and
            `noise_seed` change nothing.

    Raises:
        ConfigError: what this network has not: several samples, a runtime other than torch, a quality, or what is made
            of the answers to prompts.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.samples > 1 or self.quality or self.smallest_quality > 0:
            raise ConfigError(
                "HSP-SAM draws no noise and does not judge its masks: leave samples, quality and smallest_quality out"
            )
        if self.positions or self.largest_component:
            raise ConfigError("HSP-SAM answers as it is: leave averaged_orientations and largest_component out")
        if self.runtime != "torch":
            raise ConfigError(f"HSP-SAM has the runtime torch alone, not {self.runtime}: leave runtime out")

    def _segment(self, model: Any, slices: CaseSlices, answers: CaseAnswers) -> None:
        """Segment n slices."""
        network = cast(HSPSAM, model)
        if not slices.places:
            return
        channels = _channels(network, cast(Sequence[int], slices.questions))
        squares = network(slices.pixels, known_only=True)  # (n, classes of the network, S, S)
        logits = restore_from_square(squares.float(), size=network.image_size, original=slices.original)
        chosen = asked_alone(logits, channels)
        for row, place in enumerate(slices.places):
            columns = slices.asked[:, row].nonzero().flatten().tolist()
            answers.put([place], columns, [chosen[row : row + 1, columns]])


def asked_alone(logits: torch.Tensor, channels: Sequence[int]) -> torch.Tensor:
    """Keep the channels that are asked for; the other classes join the background.

    Args:
        logits: `(n, K, H, W)` relative to the background's; their softmax, with the background's 0, is the probability.
        channels: k of the K.

    Returns:
        `(n, k, H, W)`, relative to the background together with what is not asked for.
    """
    others = [channel for channel in range(logits.shape[1]) if channel not in channels]
    if not others:
        return logits[:, list(channels)]
    ground = torch.zeros_like(logits[:, :1])
    rest = torch.cat((ground, logits[:, others]), dim=1).logsumexp(dim=1, keepdim=True)  # (n, 1, H, W)
    return logits[:, list(channels)] - rest


def _channels(network: HSPSAM, class_ids: Sequence[int]) -> list[int]:
    """Find the network's channels of some classes."""
    unknown = [class_id for class_id in class_ids if class_id not in network.class_ids]
    if unknown:
        raise ConfigError(
            f"this network segments the classes {list(network.class_ids)}, and was asked for {unknown}: train it with "
            "these too, or leave them out of class_ids"
        )
    return [network.class_ids.index(class_id) for class_id in class_ids]
