"""The ways a picture can lie: mirrored left to right, and then turned by quarters of a circle.

Training draws them, inference averages over them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, PromptError

Orientation = Literal["none", "mirror", "all"]


@dataclass(frozen=True)
class Position:
    """One way to lay a picture.

    Attributes:
        mirrored: left to right, before turning.
        turns: quarter turns, anticlockwise.
    """

    mirrored: bool = False
    turns: int = 0

    def lay(self, layers: torch.Tensor, *, content: tuple[int, int]) -> torch.Tensor:
        """Lay upright layers `(..., S, S)` so; `content`: as for `reoriented`."""
        return reoriented(layers, content=content, mirrored=self.mirrored, turns=self.turns)

    def undo(self, layers: torch.Tensor, *, content: tuple[int, int]) -> torch.Tensor:
        """Lay layers `(..., S, S)` upright again; `content`: rows and columns of the upright content."""
        rows, columns = content
        turned = (columns, rows) if self.turns % 2 else (rows, columns)
        straight = reoriented(layers, content=turned, mirrored=False, turns=-self.turns)
        return reoriented(straight, content=content, mirrored=self.mirrored, turns=0)


UPRIGHT = Position()
POSITIONS: dict[Orientation, tuple[Position, ...]] = {
    "none": (UPRIGHT,),
    "mirror": (UPRIGHT, Position(mirrored=True)),
    "all": tuple(Position(mirrored, turns) for mirrored in (False, True) for turns in range(4)),
}


def draw_orientation(kind: Orientation, rng: np.random.Generator) -> tuple[bool, int]:
    """Draw how to lay a picture: whether mirrored left to right, and then by how many quarter turns.

    Args:
        kind: "none" draws nothing, "mirror" one of two, "all" one of eight.
        rng: source of the draw.
    """
    positions = POSITIONS[kind]
    chosen = positions[int(rng.integers(len(positions)))] if len(positions) > 1 else UPRIGHT
    return chosen.mirrored, chosen.turns


def reoriented(layers: torch.Tensor, *, content: tuple[int, int], mirrored: bool, turns: int) -> torch.Tensor:
    """Mirror and turn what a square holds, so that its padding stays at the bottom and on the right.

    Args:
        layers: `(..., S, S)` with the content at the top left.
        content: rows and columns of the content.
        mirrored: left to right, before turning.
        turns: quarter turns, anticlockwise.

    Returns:
        `(..., S, S)`; after an odd number of turns rows and columns of the content have changed places.
    """
    rows, columns = content
    inner = layers[..., :rows, :columns]
    if mirrored:
        inner = inner.flip(-1)
    inner = torch.rot90(inner, turns, dims=(-2, -1))
    result = torch.zeros_like(layers)
    result[..., : inner.shape[-2], : inner.shape[-1]] = inner
    return result


def read_orientations(
    orientations: Mapping[str, Any], vocabulary: Vocabulary, *, setting: str = "orientations"
) -> dict[str, Orientation]:
    """Check how the images of some modalities may lie.

    Args:
        orientations: modality -> "none", "mirror" (left to right) or "all" (the eight rotations and mirrorings).
        vocabulary: knows the modalities.
        setting: where they stand, for errors.

    Returns:
        The same by the modalities' canonical names.

    Raises:
        ConfigError: an unknown modality or kind, or no mapping.
    """
    if not isinstance(orientations, Mapping):
        raise ConfigError(
            f"{setting} says how the images of each modality lie, such as {{CT: all}}, not {orientations!r}"
        )
    kinds: dict[str, Orientation] = {}
    for name, kind in orientations.items():
        if kind not in get_args(Orientation):
            known = ", ".join(get_args(Orientation))
            raise ConfigError(f"{setting}: the orientation of {name} is one of {known}, not {kind!r}")
        try:
            kinds[vocabulary.modality(name).name] = kind
        except PromptError as error:
            raise ConfigError(f"{setting}: {error}") from error
    return kinds
