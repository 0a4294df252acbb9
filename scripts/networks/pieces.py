"""Work in pieces that stay in a processor's cache, where the result is the same.

A wide intermediate of a whole image is written to memory and read back by each operation, and above 32 MiB the system
maps and clears its pages anew each time. Rows that do not depend on each other can be taken a few at a time instead.
An accelerator, a compiler and the backward pass want them whole.
"""

from collections.abc import Callable, Sequence

import torch

PIECE_VALUES = 2**20  # of the widest intermediate: 4 MiB in single precision


def traced() -> bool:
    """Say whether a graph is being recorded, for a compiler or for export, which should not see pieces."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def pays(values: torch.Tensor) -> bool:
    """Say whether to work in pieces: on a CPU, without gradients, and not while a graph is being recorded."""
    return values.device.type == "cpu" and not torch.is_grad_enabled() and not traced()


def rows_at_once(width: int) -> int:
    """Say how many rows make up a piece.

    Args:
        width: values of the widest intermediate for one row.
    """
    return max(1, PIECE_VALUES // width)


def slices(count: int, *, width: int, like: torch.Tensor) -> list[slice]:
    """Cut rows into pieces where that pays, and else give them all at once.

    Args:
        count: number of rows.
        width: values of the widest intermediate for one row.
        like: a tensor where the rows are.
    """
    if not pays(like):
        return [slice(0, count)]
    step = rows_at_once(width)
    return [slice(first, min(first + step, count)) for first in range(0, max(count, 1), step)]  # no rows: an empty one


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put the rows of pieces together again; a single piece is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def row_by_row(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, *, width: int) -> torch.Tensor:
    """Apply a function that maps each row by itself, a few rows at a time where that pays.

    Args:
        function: maps `(n, channels)` to `(n, channels)`.
        rows: `(..., channels)`.
        width: values of the function's widest intermediate for one row.

    Returns:
        What the function gives for all rows at once, `(..., channels)`.
    """
    if not pays(rows):
        return function(rows)
    flat = rows.flatten(0, -2)
    return join([function(flat[piece]) for piece in slices(len(flat), width=width, like=rows)]).reshape(rows.shape)
