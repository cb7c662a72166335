"""Maps and class ids at another size, the latter without logits of that size."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_upsampled", "upsampled", "upsampled_argmax"]

# numbers at once; blocks of twice that size go back to the system and come cleared, which takes longer than the work
AT_ONCE = 2**22


def upsampled(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, C, h, w] brought to a size (H, W) bilinearly (align_corners=False).

    ``F.interpolate``, also under ``torch.compile``, whose own code for its gradient adds up pixel by pixel and takes
    several times as long on a GPU.
    """
    if torch.compiler.is_dynamo_compiling() and maps.requires_grad:
        result: Tensor = _Upsampled.apply(maps, size)
        return result
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def add_upsampled(total: Tensor, maps: Tensor) -> None:
    """Add maps [B, C, h, w] to ``total`` [B, C, H, W] in place, brought to its size bilinearly (align_corners=False).

    On a CPU, where nobody wants a gradient, some channels at a time.

    Example:
        >>> total = torch.ones(1, 1, 1, 4)
        >>> add_upsampled(total, torch.tensor([[[[0.0, 4.0]]]]))
        >>> total
        tensor([[[[1., 2., 4., 5.]]]])
    """
    size = total.shape[-2:]
    learns = torch.is_grad_enabled() and (total.requires_grad or maps.requires_grad)
    if learns or total.device.type != "cpu" or torch.compiler.is_compiling():
        total += upsampled(maps, size)
        return
    channels = max(32, AT_ONCE // max(1, total[:, 0].numel()))
    for sums, added in zip(torch.split(total, channels, 1), torch.split(maps, channels, 1), strict=True):
        sums += upsampled(added, size)


class _Upsampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, size: Sequence[int]) -> Tensor:
        ctx.shape, ctx.size = maps.shape, size
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        grown = torch.ops.aten.upsample_bilinear2d_backward(gradient, ctx.size, ctx.shape, False, None, None)
        return grown, None


@torch.no_grad()
def upsampled_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The class with the highest score of logits upsampled bilinearly (align_corners=False), in float32.

    ``F.interpolate(logits, …).argmax(1)`` to the bit: classes are upsampled one at a time, each by `F.interpolate`,
    and only the best so far is kept. Of equal scores the first class is taken.

    Args:
        logits: [B, K, h, w].
        size: (H, W).

    Returns:
        int64 [B, H, W].

    Example:
        >>> upsampled_argmax(torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]]), (1, 4))
        tensor([[[0, 0, 1, 1]]])
    """
    best = _upsampled(logits, 0, size)
    winner = torch.zeros_like(best, dtype=torch.int64)
    for k in range(1, logits.shape[1]):
        best = _overtaken(best, _upsampled(logits, k, size), winner, k)
    return winner


def _upsampled(logits: Tensor, k: int, size: Sequence[int]) -> Tensor:
    scores = logits[:, k : k + 1].float()
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def _overtaken(best: Tensor, scores: Tensor, winner: Tensor, k: int) -> Tensor:
    winner.masked_fill_(scores > best, k)
    return torch.maximum(best, scores, out=best)
