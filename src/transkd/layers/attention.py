"""Attention with spatially reduced keys and values, as in MiT and LVT, with fast paths for float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.layers.choices import CHOICES
from transkd.layers.token_linear import ONEDNN, convolved_row

__all__ = ["attend", "attend_by_convolutions", "attend_by_kernel"]

BLOCKS = 256  # thread blocks to launch at least, about two per multiprocessor of a current GPU
SCORES = 2**19  # scores per chunk on a CPU, to fit its cache; below that per image PyTorch's kernel is faster


def attend(query: Tensor, pair: Tensor, heads: int) -> Tensor:
    """``softmax(Q Kᵀ / √d) V`` in each head, outputs of the heads concatenated.

    Calls ``F.scaled_dot_product_attention``, with two exceptions in float32 (docs/performance.md): in training on a GPU
    the queries are split into parts, and on a CPU without gradients the products are computed as 1×1 convolutions if
    these are faster (``transkd.layers.choices``).

    Args:
        query: [B, N, C], channels of the heads concatenated.
        pair: keys and values [B, M, 2·C].
        heads: number of heads; d = C / heads.

    Returns:
        [B, N, C].

    Example:
        >>> attend(torch.zeros(1, 5, 6), torch.ones(1, 4, 12), heads=2).shape
        torch.Size([1, 5, 6])
    """
    return (attend_by_convolutions if convolution_pays(query, pair, heads) else attend_by_kernel)(query, pair, heads)


def attend_by_kernel(query: Tensor, pair: Tensor, heads: int) -> Tensor:
    """``attend`` by ``F.scaled_dot_product_attention``."""
    shape, parts = query.shape, query_parts(query, heads, pair.shape[1])
    if parts > 1:  # move the parts into the batch dimension; each attends to all keys
        query, pair = query.reshape(len(query) * parts, -1, shape[2]), pair.repeat_interleave(parts, dim=0)
    query = torch.unflatten(query, 2, (heads, -1)).transpose(1, 2)
    key, value = torch.unflatten(pair, 2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(shape)


def query_parts(query: Tensor, heads: int, keys: int) -> int:
    """Number of parts to split the queries [B, N, C] into, so that the backward pass of attention occupies a GPU.

    PyTorch's float32 backward launches one thread block per image, head and 64 keys, and each loops over all queries.
    With spatially reduced keys these are too few blocks.
    """
    if query.device.type != "cuda" or query.dtype != torch.float32 or not query.requires_grad:
        return 1
    parts, blocks = 1, len(query) * heads * -(-keys // 64)
    while parts * blocks < BLOCKS and query.shape[1] % (2 * parts) == 0:
        parts *= 2
    return parts


def convolution_pays(query: Tensor, pair: Tensor, heads: int) -> bool:
    """Whether to compute attention as convolutions: on a CPU without gradients, where that was chosen."""
    if torch.is_grad_enabled() and (query.requires_grad or pair.requires_grad):
        return False
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if traced or torch.compiler.is_compiling():  # a trace would unroll the loop for one size
        return False
    usable = ONEDNN and CHOICES.attention and query.device.type == "cpu" and query.dtype == torch.float32
    return usable and heads * query.shape[1] * pair.shape[1] >= SCORES


def attend_by_convolutions(query: Tensor, pair: Tensor, heads: int) -> Tensor:
    """``attend`` with one 1×1 convolution of a group per head for each of the two products of an image."""
    return torch.stack([_convolved(*image, heads) for image in zip(query, pair, strict=True)])


def _convolved(query: Tensor, pair: Tensor, heads: int) -> Tensor:
    """Attention of one image as 1×1 convolutions with one group per head: [N, C] to [N, C]."""
    key, value = torch.unflatten(pair, 1, (2, heads, -1)).unbind(1)  # [M, heads, d]
    keys, _, width = key.shape
    scores_of = (key * width**-0.5).transpose(0, 1).reshape(heads * keys, width)
    mean_of = value.permute(1, 2, 0).reshape(heads * width, keys)
    attended = []
    for rows in torch.split(query, max(256, SCORES // (heads * keys))):
        scores = torch.unflatten(convolved_row(rows, scores_of, groups=heads), 1, (heads, keys))
        attended.append(convolved_row(scores.softmax(2).flatten(1), mean_of, groups=heads))
    return torch.cat(attended)
