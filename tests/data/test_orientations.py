"""How pictures can lie: what is drawn, what is turned, and that it comes back."""

import numpy as np
import pytest
import torch

from scripts.data.orientations import POSITIONS, UPRIGHT, Position, draw_orientation, read_orientations, reoriented
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError

SIDE = 16


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", {(False, 0)}),
        ("mirror", {(False, 0), (True, 0)}),
        ("all", {(mirrored, turns) for mirrored in (False, True) for turns in range(4)}),
    ],
)
def test_orientations_are_drawn_alike(kind, expected):
    rng = np.random.default_rng(0)
    drawn = [draw_orientation(kind, rng) for _ in range(800)]
    assert set(drawn) == expected
    assert min(drawn.count(one) for one in expected) > 800 / len(expected) * 0.7
    if kind == "none":
        assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("content", [(SIDE, SIDE), (5, SIDE), (SIDE, 7), (1, SIDE), (SIDE, 1), (1, 1)])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_what_is_turned_is_the_content_and_the_padding_stays(content, mirrored, turns):
    rows, columns = content
    layers = np.zeros((2, SIDE, SIDE))
    layers[:, :rows, :columns] = np.arange(1, 2 * rows * columns + 1).reshape(2, rows, columns)
    found = reoriented(torch.from_numpy(layers), content=content, mirrored=mirrored, turns=turns).numpy()
    inner = layers[:, :rows, :columns]
    inner = inner[:, :, ::-1] if mirrored else inner
    for _ in range(turns):  # anticlockwise: the last column becomes the first row
        inner = inner.transpose(0, 2, 1)[:, ::-1]
    assert np.array_equal(found[:, : inner.shape[1], : inner.shape[2]], inner)
    assert np.count_nonzero(found) == inner.size


def test_turned_by_hand():
    layers = torch.tensor([[[1, 2, 3], [4, 5, 6], [0, 0, 0]]])
    found = {
        (mirrored, turns): reoriented(layers, content=(2, 3), mirrored=mirrored, turns=turns)[0].tolist()
        for mirrored in (False, True)
        for turns in (0, 1, 2)
    }
    assert found == {
        (False, 0): [[1, 2, 3], [4, 5, 6], [0, 0, 0]],
        (False, 1): [[3, 6, 0], [2, 5, 0], [1, 4, 0]],
        (False, 2): [[6, 5, 4], [3, 2, 1], [0, 0, 0]],
        (True, 0): [[3, 2, 1], [6, 5, 4], [0, 0, 0]],
        (True, 1): [[1, 4, 0], [2, 5, 0], [3, 6, 0]],
        (True, 2): [[4, 5, 6], [1, 2, 3], [0, 0, 0]],
    }


@pytest.mark.parametrize("content", [(SIDE, SIDE), (5, SIDE), (SIDE, 7)])
def test_mirroring_twice_and_turning_round_change_nothing(content, generator):
    layers = torch.zeros(3, SIDE, SIDE)
    layers[:, : content[0], : content[1]] = torch.rand((3, *content), generator=generator)
    once = reoriented(layers, content=content, mirrored=True, turns=0)
    assert not torch.equal(once, layers)
    assert torch.equal(reoriented(once, content=content, mirrored=True, turns=0), layers)
    turned, place = layers, content
    for _ in range(4):
        turned, place = reoriented(turned, content=place, mirrored=False, turns=1), place[::-1]
    assert torch.equal(turned, layers)


@pytest.mark.parametrize("content", [(SIDE, SIDE), (5, SIDE), (SIDE, 7), (2, SIDE)])
@pytest.mark.parametrize("position", POSITIONS["all"])
def test_what_was_laid_is_laid_upright_again(content, position, generator):
    layers = torch.zeros(2, 3, SIDE, SIDE)
    layers[..., : content[0], : content[1]] = torch.rand((2, 3, *content), generator=generator)
    laid = position.lay(layers, content=content)
    assert torch.equal(laid, layers) == (position == UPRIGHT)
    assert torch.equal(position.undo(laid, content=content), layers)


def test_positions_are_those_that_are_drawn():
    for kind, positions in POSITIONS.items():
        rng = np.random.default_rng(1)
        drawn = {Position(*draw_orientation(kind, rng)) for _ in range(200)}
        assert drawn == set(positions)
        assert positions[0] == UPRIGHT
        assert len(set(positions)) == len(positions)


def test_modalities_get_their_canonical_names(vocabulary):
    assert read_orientations({"mri": "mirror", "CT": "all"}, vocabulary) == {"MR": "mirror", "CT": "all"}
    assert read_orientations({}, vocabulary) == {}


@pytest.mark.parametrize(
    ("orientations", "message"),
    [
        ({"MR": "flip"}, "turned: the orientation of MR is one of none, mirror, all, not 'flip'"),
        ({"PT": "all"}, "turned: Modality 'PT' is unknown"),
        ("CT", r"turned says how the images of each modality lie, such as {CT: all}, not 'CT'"),
    ],
)
def test_what_is_none_is_refused(vocabulary, orientations, message):
    with pytest.raises(ConfigError, match=message):
        read_orientations(orientations, vocabulary, setting="turned")
