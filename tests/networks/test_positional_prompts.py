"""Predicted boxes and points: where they lie by hand, their tokens against SAM's own, and that gradients reach them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import PromptEncoder

from scripts.networks.mask_decoding import build_prompt_encoder
from scripts.networks.positional_prompts import PositionHead, Positions, embed_positions

SATURATED = 200.0  # a logit at which a sigmoid or softmax in single precision is exactly 0 or 1


def head_of(points: int, seed: int = 0) -> PositionHead:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PositionHead(points)


def sam_prompt_encoder(height: int = 64, width: int = 64) -> PromptEncoder:
    """SAM's own, for images of any shape."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = PromptEncoder(256, (height // 16, width // 16), (height, width), 16)
    return encoder.requires_grad_(False)


def random_positions(generator: torch.Generator, count: int, points: int, *, whole_labels: bool = True) -> Positions:
    corners = torch.rand((count, 2, 2), generator=generator).sort(dim=1).values
    labels = torch.rand((count, points), generator=generator)
    places = torch.rand((count, points, 2), generator=generator)
    return Positions(corners.flatten(1), places, labels.round() if whole_labels else labels)


def clear_head() -> PositionHead:
    """Two points; heat map m is hot where channel m of the features is not 0, and labels depend on nothing."""
    head = head_of(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        for channel in range(6):
            head.hidden.weight[channel, channel, 1, 1] = 1.0
            head.heat.weight[channel, channel, 0, 0] = SATURATED
        head.labels.bias[:] = torch.tensor([SATURATED, -SATURATED])
    return head


def clear_features() -> torch.Tensor:
    """Two images of 2 x 4 cells, the second the first turned by half a circle."""
    features = torch.zeros(1, 256, 2, 4)
    features[0, 0, 0, 1] = 10.0  # the left edge
    features[0, 1, 0, [0, 3]] = 10.0  # the upper one
    features[0, 2, 1, [2, 3]] = 10.0  # the right one, between two columns
    features[0, 3, 1, 2] = 10.0  # the lower one
    features[0, 4, 0, [0, 3]] = 10.0  # the first point, between two cells
    features[0, 5, 1, 3] = 10.0
    return torch.cat((features, features.flip(2, 3)))


# Where they lie.


def test_a_box_and_points_by_hand():
    found = clear_head()(clear_features())
    torch.testing.assert_close(found.boxes[0], torch.tensor([3 / 8, 1 / 4, 3 / 4, 3 / 4]))
    torch.testing.assert_close(found.points[0], torch.tensor([[1 / 2, 1 / 4], [7 / 8, 3 / 4]]))
    # Turned, the left edge's map lies on the right: an edge is whichever comes first.
    torch.testing.assert_close(found.boxes[1], torch.tensor([1 / 4, 1 / 4, 5 / 8, 3 / 4]))
    torch.testing.assert_close(found.points[1], torch.tensor([[1 / 2, 3 / 4], [1 / 8, 1 / 4]]))
    assert torch.equal(found.positive, torch.tensor([[1.0, 0.0]]).expand(2, 2))


def test_their_tokens_are_those_of_sams_prompt_encoder_in_pixels():
    """64 pixels a side: the pixel whose centre is a share u of the side away is 64 u - 1/2."""
    encoder = sam_prompt_encoder()
    found = embed_positions(clear_head()(clear_features()), encoder)
    points = torch.tensor([[[31.5, 15.5], [55.5, 47.5]]])
    box = torch.tensor([[23.5, 15.5, 47.5, 47.5]])
    expected, _ = encoder(points=(points, torch.tensor([[1, 0]])), boxes=box, masks=None)
    torch.testing.assert_close(found[:1], expected)
    assert (found[1] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("points", [0, 1, 5])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_the_head_is_its_description(grid, points, generator):
    """Each map in turn, in double precision."""
    head = head_of(points)
    features = 3 * torch.randn((2, 256, *grid), generator=generator)
    with torch.no_grad():
        found = head(features)
        hidden = F.gelu(head.hidden(features))
        heat = head.heat(hidden).double().numpy()
        labels = head.labels(hidden).double().numpy() if points else None
    rows, columns = ((np.arange(length) + 0.5) / length for length in grid)
    slopes = head.slopes.detach().double().numpy()
    for image in range(2):
        places = []
        for index in range(4 + points):
            tilted = heat[image, index] + slopes[index, 0] * columns[None] + slopes[index, 1] * rows[:, None]
            shares = np.exp(tilted - tilted.max())
            shares /= shares.sum()
            places.append(((shares * columns[None]).sum(), (shares * rows[:, None]).sum()))
            if index >= 4:
                label = 1 / (1 + np.exp(-(shares * labels[image, index - 4]).sum()))
                np.testing.assert_allclose(found.positive[image, index - 4], label, rtol=1e-4)
        left, right = sorted((places[0][0], places[2][0]))
        upper, lower = sorted((places[1][1], places[3][1]))
        np.testing.assert_allclose(found.boxes[image], (left, upper, right, lower), rtol=1e-5)
        np.testing.assert_allclose(found.points[image], np.reshape(places[4:], (points, 2)), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_all_lies_in_the_image_however_large_the_features(size, generator):
    found = head_of(16)(size * torch.randn((3, 256, 4, 6), generator=generator))
    assert [values.shape for values in found] == [(3, 4), (3, 16, 2), (3, 16)]
    for values in found:
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert (values <= 1).all()
    assert (found.boxes[:, :2] <= found.boxes[:, 2:]).all()


def test_at_first_points_lie_apart_and_the_box_around_the_middle(generator):
    heads = [head_of(16, seed) for seed in range(5)]
    features = F.layer_norm(torch.randn((1, 16, 16, 256), generator=generator), (256,)).movedim(3, 1)
    with torch.no_grad():
        found = [head(features) for head in heads]
    spread = torch.cat([positions.points[0] for positions in found]).std(dim=0)
    assert (spread > 0.1).all()
    assert (spread < 0.3).all()
    middle = torch.tensor([1 / 4, 1 / 4, 3 / 4, 3 / 4])
    assert all((positions.boxes - middle).abs().max() < 0.1 for positions in found)


def test_the_count_for_two_points():
    with torch.device("meta"):
        head = PositionHead(2)
    hidden, heat, labels, slopes = 256 * 64 * 9 + 64, 64 * 6, 64 * 2 + 2, 6 * 2
    assert sum(parameter.numel() for parameter in head.parameters()) == hidden + heat + labels + slopes == 148_046


# Their tokens.


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96)])
@pytest.mark.parametrize("points", [0, 1, 16])
def test_whole_labels_give_sams_own_tokens(points, height, width, generator):
    encoder = sam_prompt_encoder(height, width)
    positions = random_positions(generator, 3, points)
    side = torch.tensor([width, height])
    pixels, boxes = positions.points * side - 0.5, positions.boxes * side.repeat(2) - 0.5
    given = (pixels, positions.positive) if points else None
    expected, _ = encoder(points=given, boxes=boxes, masks=None)
    found = embed_positions(positions, encoder)
    assert found.shape == (3, points + 2, 256)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_labels_between_are_mixed(generator):
    encoder = sam_prompt_encoder()
    positions = random_positions(generator, 2, 3, whole_labels=False)
    negative, positive = (
        embed_positions(positions._replace(positive=torch.full((2, 3), label)), encoder) for label in (0.0, 1.0)
    )
    share = torch.cat((positions.positive, torch.ones(2, 2)), dim=1).unsqueeze(2)
    found = embed_positions(positions, encoder)
    torch.testing.assert_close(found, share * positive + (1 - share) * negative)
    assert torch.equal(negative[:, 3:], positive[:, 3:])  # labels are none of the box's business


def test_gradients_reach_places_and_labels(generator):
    """By hand: a token's parts are sin and cos of 2 pi (2 u - 1) . g, whose slopes along u are 4 pi g cos and -sin."""
    encoder = build_prompt_encoder(grid_size=4, image_size=64).requires_grad_(False)
    places, labels = torch.rand((1, 1, 2), generator=generator), torch.tensor([[0.3]])
    box = torch.tensor([[0.1, 0.2, 0.6, 0.9]])
    for tensor in (places, labels, box):
        tensor.requires_grad_()
    weights = torch.randn((1, 3, 256), generator=generator)
    (embed_positions(Positions(box, places, labels), encoder) * weights).sum().backward()
    matrix = encoder.pe_layer.positional_encoding_gaussian_matrix  # (2, 128)
    given = torch.cat((places, box.unflatten(1, (2, 2))), dim=1).detach()
    phases = 2 * math.pi * ((2 * given - 1) @ matrix)
    slopes = weights[..., :128] * phases.cos() - weights[..., 128:] * phases.sin()
    expected = 4 * math.pi * slopes @ matrix.T  # (1, 3, 2)
    torch.testing.assert_close(places.grad, expected[:, :1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(box.grad, expected[:, 1:].flatten(1), rtol=1e-4, atol=1e-3)
    difference = encoder.point_embeddings[1].weight - encoder.point_embeddings[0].weight
    torch.testing.assert_close(labels.grad, (weights[:, 0] * difference).sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-3)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_places_keep_their_precision_in_mixed_precision(generator):
    head, encoder = head_of(4), sam_prompt_encoder()
    positions = random_positions(generator, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = embed_positions(positions, encoder)
        found = head(torch.randn((2, 256, 4, 4), generator=generator))
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, embed_positions(positions, encoder))
    assert all(values.dtype == torch.float32 for values in found)


# Learning.


def test_a_head_learns_where_something_lies_from_tokens_alone(generator):
    """Targets are SAM's tokens of a box and a point, so that all it learns comes through SAM's positional encoding."""
    encoder, head = sam_prompt_encoder(), head_of(1)
    texture = torch.randn((256, 1, 1), generator=generator)

    def batch(count: int) -> tuple[torch.Tensor, Positions]:
        rows, columns = torch.randint(0, 8, (2, count), generator=generator)
        features = 0.1 * torch.randn((count, 256, 8, 8), generator=generator)
        features[torch.arange(count), :, rows, columns] += texture.flatten()
        place = (torch.stack((columns, rows), dim=1) + 0.5) / 8
        box = torch.cat((place - 1 / 16, place + 1 / 16), dim=1)
        return features, Positions(box, place.unsqueeze(1), torch.ones(count, 1))

    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(150):
        features, wanted = batch(16)
        optimiser.zero_grad()
        F.mse_loss(embed_positions(head(features), encoder), embed_positions(wanted, encoder)).backward()
        optimiser.step()
    features, wanted = batch(64)
    with torch.no_grad():
        found = head(features)
    assert (found.points - wanted.points).abs().mean() < 1 / 16  # half a cell
    assert (found.boxes - wanted.boxes).abs().mean() < 1 / 16
    assert (found.positive > 0.8).all()
