"""What the terms that compare positions share: full precision, and large sums in pieces."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["BUDGET", "full_precision", "positions_of", "sum_over_rows"]

BUDGET = 2**23
"""How many numbers one matrix of relations may hold at a time: 32 MiB in float32."""


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast, which would multiply matrices in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def positions_of(maps: Tensor) -> Tensor:
    """Maps [B, C, h, w] as one row per position, row by row of the image: [B, h·w, C].

    Example:
        >>> positions_of(torch.tensor([[1, 2], [3, 4]]).view(1, 2, 1, 2)).tolist()
        [[[1, 3], [2, 4]]]
    """
    return maps.flatten(2).mT


def sum_over_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], columns: int, *, budget: int = BUDGET
) -> Tensor:
    """``function(*rows)``, a sum over rows, piece by piece where the matrix that it builds would be large.

    With more than one piece nothing inside of a piece is kept for the backward pass; it is computed again there.

    Args:
        function: gives a scalar that is a sum over the rows of its arguments.
        rows: tensors with equally many rows.
        columns: how many numbers the function makes out of each row.
        budget: how many numbers may exist at a time.

    Example:
        >>> x = torch.arange(6.0)
        >>> sum_over_rows(lambda rows: (rows[:, None] - x).square().sum(), [x], columns=6, budget=12)
        tensor(210.)
    """
    length = max(1, budget // columns)
    pieces = list(zip(*(torch.split(tensor, length) for tensor in rows), strict=True))
    if len(pieces) == 1:
        return function(*pieces[0])
    sums = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.stack(sums).sum()
