"""Positional prompts that the network makes for itself: what HSP-SAM (arXiv 2506.02854) sets its abstract ones against.

Earlier self-prompting predicts boxes, points or masks and hands them to SAM's own prompt encoder: few-shot
self-prompting (arXiv 2308.07624), MaskSAM (arXiv 2403.14103), UN-SAM (https://github.com/CUHK-AIM-Group/UNSAM). How
the paper built the positional side of its comparison is not public. The head here is this bundle's own reading: a box
and points at each level, made so that the loss on the masks alone can teach it. SAM's prompt encoder stays frozen;
without published weights its embeddings are random, which tells labels and corners apart all the same.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from segment_anything.modeling import PromptEncoder
from torch import nn

from scripts.networks.mask_decoding import PROMPT_CHANNELS

HIDDEN_CHANNELS = 64
EDGES = ((-1.0, 0.0), (0.0, -1.0), (1.0, 0.0), (0.0, 1.0))  # left, upper, right and lower, seen from the middle
EDGE_SLOPE = 3.6  # of their first heat, in logits a side: edges then begin a quarter of the side from the image's
POINT_SLOPE_DEVIATION = 4.0  # of the points' first slopes: they then begin about a fifth of the side around the middle


class Positions(NamedTuple):
    """A box and N points in each of B images.

    Places are shares of the image's side, from 0 at its left or upper edge to 1 at the other: S times as much in
    pixels, if the first pixel reaches from 0 to 1.

    Attributes:
        boxes: `(B, 4)`, x and y of the upper left corner, then of the lower right one.
        points: `(B, N, 2)`, x and y.
        positive: `(B, N)`, what a point means, from 0 for SAM's negative label to 1 for its positive one.
    """

    boxes: torch.Tensor
    points: torch.Tensor
    positive: torch.Tensor


class PositionHead(nn.Module):
    """Predict a box and N points from the features of a level.

    Each edge of the box and each point has a heat map, and lies at the mean of the map's softmax (integral regression,
    arXiv 1711.08229): inside the image, and with a gradient everywhere. An edge needs one coordinate of the mean, so
    that its map may spread along that side of a shape (as in ExtremeNet, arXiv 1901.08043); it comes within half a cell
    of the image's own edge. A point's label is read from a further map, where the point's heat is.

    Each heat map has a learned slope across the image on top. At first the slopes put the edges a quarter of the side
    inwards, and those of the points are random: without them all would begin in the middle of the image, where nothing
    tells one from another.

    There is one box and one set of points for all classes together. No loss asks where they are, so that a box
    encloses what helps the decoder, be it one class or several.

    Args:
        points: N.
    """

    def __init__(self, points: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(PROMPT_CHANNELS, HIDDEN_CHANNELS, 3, padding=1)
        self.heat = nn.Conv2d(HIDDEN_CHANNELS, len(EDGES) + points, 1, bias=False)  # a softmax does not notice a bias
        self.labels = nn.Conv2d(HIDDEN_CHANNELS, points, 1) if points else None
        edges = EDGE_SLOPE * torch.tensor(EDGES)
        self.slopes = nn.Parameter(torch.cat((edges, POINT_SLOPE_DEVIATION * torch.randn(points, 2))))

    def forward(self, features: torch.Tensor) -> Positions:
        """Predict positions from features `(B, 256, h, w)`, in single precision."""
        hidden = F.gelu(self.hidden(features))
        columns, rows = (_centres(length, like=self.slopes) for length in (hidden.shape[3], hidden.shape[2]))
        heat = self._shares(self.heat(hidden).float(), columns, rows)  # (B, 4 + N, h, w)
        x, y = (heat.sum(dim=2) * columns).sum(dim=2), (heat.sum(dim=3) * rows).sum(dim=2)  # (B, 4 + N)
        first, second = torch.stack((x[:, 0], y[:, 1]), dim=1), torch.stack((x[:, 2], y[:, 3]), dim=1)  # (B, 2)
        boxes = torch.cat((torch.minimum(first, second), torch.maximum(first, second)), dim=1)
        points = torch.stack((x[:, len(EDGES) :], y[:, len(EDGES) :]), dim=2)
        return Positions(boxes, points, self._labels(hidden, heat[:, len(EDGES) :]))

    def _shares(self, heat: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Turn heat `(B, 4 + N, h, w)` into shares of each map, given where columns and rows lie."""
        across, down = self.slopes[:, :1] * columns, self.slopes[:, 1:] * rows  # (4 + N, w) and (4 + N, h)
        sloping = across.unsqueeze(1) + down.unsqueeze(2)  # (4 + N, h, w)
        return (heat + sloping).flatten(2).softmax(dim=2).unflatten(2, heat.shape[2:])

    def _labels(self, hidden: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
        """Read the labels `(B, N)` where the points' heat `(B, N, h, w)` is."""
        if self.labels is None:
            return heat.new_zeros(heat.shape[:2])
        return (heat * self.labels(hidden).float()).sum(dim=(2, 3)).sigmoid()


def embed_positions(positions: Positions, prompt_encoder: PromptEncoder) -> torch.Tensor:
    """Embed positions as SAM's prompt encoder does, with gradients to the places and the labels.

    For labels of 0 and 1 the tokens are those of `prompt_encoder(points, boxes, None)`, which takes S times the places
    less the half pixel that it adds. It sets its embeddings by whole labels, so that labels in between have to be
    mixed here.

    Args:
        positions: of B images.
        prompt_encoder: SAM's.

    Returns:
        Tokens `(B, N + 2, 256)`, the points before the two corners of the box.
    """
    corners = positions.boxes.unflatten(1, (2, 2))
    places = torch.cat((positions.points, corners), dim=1)  # (B, N + 2, 2)
    kinds = cast(Iterable[nn.Embedding], prompt_encoder.point_embeddings)
    negative, positive, first, second = (kind.weight for kind in kinds)  # (1, 256)
    labels = torch.lerp(negative, positive, positions.positive.unsqueeze(2))  # (B, N, 256)
    of_corners = torch.cat((first, second)).expand(places.shape[0], -1, -1)
    with _full_precision(places.device):
        encoded = prompt_encoder.pe_layer.forward_with_coords(places, (1, 1))
    return encoded + torch.cat((labels, of_corners), dim=1)


def _centres(length: int, *, like: torch.Tensor) -> torch.Tensor:
    """Give the places of the centres of so many cells, `(length,)`, as shares of their side."""
    return (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Leave mixed precision, in which places of large images would fall together."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
