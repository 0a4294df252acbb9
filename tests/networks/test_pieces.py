"""Work in pieces gives what the whole gives, and only where it pays."""

import pytest
import torch
from torch import nn

from scripts.networks import pieces


@pytest.fixture
def tiny_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", 10)


@pytest.mark.parametrize(
    ("count", "width", "expected"),
    [
        (7, 4, [(0, 2), (2, 4), (4, 6), (6, 7)]),
        (4, 5, [(0, 2), (2, 4)]),
        (2, 11, [(0, 1), (1, 2)]),  # a row wider than a piece is one
        (10, 1, [(0, 10)]),
        (1, 3, [(0, 1)]),
        (0, 3, [(0, 0)]),
    ],
)
def test_pieces_cover_all_rows_once(tiny_pieces, count, width, expected):
    with torch.no_grad():
        found = pieces.slices(count, width=width, like=torch.zeros(1))
    assert [(piece.start, piece.stop) for piece in found] == expected


def test_with_gradients_there_is_one_piece(tiny_pieces):
    assert pieces.slices(7, width=4, like=torch.zeros(1)) == [slice(0, 7)]


def test_an_accelerator_has_one_piece(tiny_pieces):
    with torch.no_grad():
        assert pieces.slices(7, width=4, like=torch.zeros(1, device="meta")) == [slice(0, 7)]


@pytest.mark.parametrize("shape", [(3, 5, 4), (7, 4), (1, 4), (0, 4), (2, 0, 3, 4)])
def test_row_by_row_is_all_rows_at_once(tiny_pieces, shape, generator):
    rows = torch.randn(shape, generator=generator)
    seen = []

    def double(some: torch.Tensor) -> torch.Tensor:
        seen.append(some.shape[:-1].numel())
        return 2 * some

    with torch.no_grad():
        assert torch.equal(pieces.row_by_row(double, rows, width=4), 2 * rows)
    assert all(count <= 2 for count in seen)
    assert sum(seen) == rows.shape[:-1].numel()


def test_row_by_row_has_a_gradient(tiny_pieces, generator):
    layer = nn.Linear(4, 4)
    rows = torch.randn((3, 5, 4), generator=generator)
    pieces.row_by_row(layer, rows, width=4).sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows.sum(dim=(0, 1)).expand(4, 4))


class RowByRow(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return pieces.row_by_row(torch.relu, rows, width=4)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # deprecated, and still how some tools export
@torch.no_grad()
def test_a_graph_has_one_piece(tiny_pieces):
    rows = torch.randn(6, 4)
    exported = torch.export.export(RowByRow(), (rows,)).graph
    traced = torch.jit.trace(RowByRow(), (rows,)).graph
    assert sum("relu" in str(node.target) for node in exported.nodes) == 1
    assert str(traced).count("aten::relu") == 1


def test_a_single_piece_is_not_copied():
    part = torch.zeros(2)
    assert pieces.join([part]) is part
    assert torch.equal(pieces.join([part, part + 1]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
