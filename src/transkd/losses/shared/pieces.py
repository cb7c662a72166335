"""Memory-bounded sums over positions, and matrix products in full precision under autocast."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["BUDGET", "full_precision", "positions_of", "sum_over_rows"]

BUDGET = 2**23
"""Largest number of elements of a matrix of relations in memory at a time: 32 MiB in float32."""


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context that disables autocast, so that matrix products are not computed in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def positions_of(maps: Tensor) -> Tensor:
    """Reshape maps [B, C, h, w] to one row per position in raster order, [B, h·w, C].

    Example:
        >>> positions_of(torch.tensor([[1, 2], [3, 4]]).view(1, 2, 1, 2)).tolist()
        [[[1, 3], [2, 4]]]
    """
    return maps.flatten(2).mT


def sum_over_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], columns: int, *, budget: int = BUDGET
) -> Tensor:
    """Compute ``function(*rows)``, a sum over rows, in chunks of rows that bound the memory.

    With more than one chunk, activations are checkpointed: each chunk is recomputed in the backward pass.

    Args:
        function: returns a scalar that is a sum over the rows of its arguments.
        rows: tensors with the same number of rows.
        columns: number of elements that the function computes from each row.
        budget: largest number of computed elements in memory at a time.

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
