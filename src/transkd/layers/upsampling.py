"""Bilinear upsampling of maps, with a fast gradient per device, and of logits to class ids."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_upsampled", "products_pay", "resize_gradient", "resize_matrix", "upsampled", "upsampled_argmax"]

# Chunk of 16 MiB in float32 on a CPU: larger blocks return to the OS and are zeroed again, which costs more time.
AT_ONCE = 2**22


def products_pay(maps: Tensor) -> bool:
    """Whether matrix products are faster than PyTorch's own gradient of bilinear upsampling.

    They are on a GPU, where PyTorch accumulates the gradient pixel by pixel with atomic operations
    (docs/performance.md).
    """
    return maps.device.type == "cuda"


def upsampled(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps [B, C, h, w] to (H, W) bilinearly: ``F.interpolate`` with align_corners=False.

    On a GPU the gradient is two matrix products (``resize_gradient``). Elsewhere it is PyTorch's kernel, also under
    ``torch.compile``, because Inductor's code for it accumulates pixel by pixel.

    Example:
        >>> upsampled(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
        tensor([[[[0., 1., 3., 4.]]]])
    """
    if maps.requires_grad and torch.is_grad_enabled() and (products_pay(maps) or torch.compiler.is_dynamo_compiling()):
        result: Tensor = _Upsampled.apply(maps, tuple(size))
        return result
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def add_upsampled(total: Tensor, maps: Tensor) -> None:
    """Resize maps [B, C, h, w] bilinearly (align_corners=False) and add them to ``total`` [B, C, H, W] in place.

    On a CPU without gradients this is done in chunks of channels.

    Example:
        >>> total = torch.ones(1, 1, 1, 4)
        >>> add_upsampled(total, torch.tensor([[[[0.0, 4.0]]]]))
        >>> total
        tensor([[[[1., 2., 4., 5.]]]])
    """
    size = total.shape[-2:]
    requires_grad = torch.is_grad_enabled() and (total.requires_grad or maps.requires_grad)
    if requires_grad or total.device.type != "cpu" or torch.compiler.is_compiling():
        widens = total.device.type == "cuda" and torch.is_autocast_enabled("cuda")  # the maps to float32
        with torch.autocast("cuda", enabled=False) if widens else contextlib.nullcontext():
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
        if products_pay(gradient):
            return resize_gradient(gradient, ctx.shape[-2:]), None
        grown = torch.ops.aten.upsample_bilinear2d_backward(gradient, ctx.size, ctx.shape, False, None, None)
        return grown, None


def resize_gradient(gradient: Tensor, size: Sequence[int]) -> Tensor:
    """Gradient [B, C, h, w] of the maps from the gradient [B, C, H, W] of the upsampled maps.

    Bilinear upsampling is ``R X Cᵀ`` with constant matrices R [H, h] for rows and C [W, w] for columns, so its gradient
    is ``Rᵀ G C``. The result has the memory layout (channels-last or contiguous) and dtype of G.

    Example:
        >>> resize_gradient(torch.ones(1, 1, 1, 4), (1, 2))
        tensor([[[[2., 2.]]]])
    """
    batch, channels, height, width = gradient.shape
    # asked for before autocast is off: in there torch.compile would leave it off for what follows the upsampling
    channels_last = gradient.is_contiguous(memory_format=torch.channels_last) and not gradient.is_contiguous()
    with torch.autocast(gradient.device.type, enabled=False):
        rows = resize_matrix(size[0], height, gradient).T
        columns = resize_matrix(size[1], width, gradient)
        if channels_last:
            maps = gradient.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
            maps = rows.expand(batch, -1, -1).bmm(maps).view(batch * size[0], width, channels)
            maps = columns.T.expand(len(maps), -1, -1).bmm(maps)
            return maps.view(batch, size[0], size[1], channels).permute(0, 3, 1, 2)
        maps = (gradient.reshape(-1, width) @ columns).view(batch * channels, height, size[1])
        return rows.expand(len(maps), -1, -1).bmm(maps).view(batch, channels, *size)


def resize_matrix(small: int, large: int, like: Tensor) -> Tensor:
    """Matrix [large, small] of linear interpolation from ``small`` to ``large`` values, align_corners=False.

    Each row has at most two non-zero entries, and they sum to 1. Device and dtype are those of ``like``; eager code
    caches the matrix.

    Example:
        >>> resize_matrix(2, 4, torch.zeros(()))
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]])
    """
    if torch.compiler.is_compiling():  # compute it inside the graph
        return _resize_matrix(small, large, like.device, like.dtype)
    return _kept_resize_matrix(small, large, like.device, like.dtype)


def _resize_matrix(small: int, large: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # y + ½ on the large grid is (y + ½) · small / large on the small one; rounds as F.interpolate does
    exact = torch.promote_types(dtype, torch.float32)
    centre = (torch.arange(large, device=device, dtype=exact) + 0.5) * (small / large) - 0.5
    centre = centre.clamp(0, small - 1)[:, None]
    return (1 - (centre - torch.arange(small, device=device, dtype=exact)).abs()).clamp_min(0).to(dtype)


@functools.lru_cache(maxsize=64)
def _kept_resize_matrix(small: int, large: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _resize_matrix(small, large, device, dtype)


@torch.no_grad()
def upsampled_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Argmax over the classes of logits upsampled bilinearly (align_corners=False), in float32.

    Bit-identical to ``F.interpolate(logits, …).argmax(1)``: classes are upsampled one at a time by ``F.interpolate``,
    and only the running maximum is stored. Of equal scores the first class wins.

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
    return upsampled(logits[:, k : k + 1].float(), size)[:, 0]


def _overtaken(best: Tensor, scores: Tensor, winner: Tensor, k: int) -> Tensor:
    winner.masked_fill_(scores > best, k)
    return torch.maximum(best, scores, out=best)
