"""Attention of tokens to a map, quick on a CPU where nobody wants its gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.token_linear import ONEDNN

__all__ = ["attend"]

ROWS = 4096  # queries at a time, whose scores stay in the processor's cache


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(Q Kᵀ / √d) V``, the heads side by side.

    ``F.scaled_dot_product_attention``, but for a frozen or deployed network in float32 on a CPU: there the products run
    as 1×1 convolutions with a group for each head, a third quicker (docs/performance.md).

    Args:
        query: [B, heads, N, d].
        key: [B, heads, M, d].
        value: [B, heads, M, d].

    Returns:
        [B, N, heads · d].

    Example:
        >>> attend(torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 4, 3), torch.ones(1, 2, 4, 3)).shape
        torch.Size([1, 5, 6])
    """
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    plain = not ONEDNN or query.device.type != "cpu" or query.dtype != torch.float32
    if learns or plain or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return torch.stack([_convolved(*image) for image in zip(query, key, value, strict=True)])


def _convolved(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention of one image: [heads, N, d] to [N, heads · d]."""
    heads, keys, width = key.shape
    scores_of = (key * width**-0.5).reshape(heads * keys, width, 1, 1)
    mean_of = value.mT.reshape(heads * width, keys, 1, 1)
    attended = []
    for rows in torch.split(query.transpose(0, 1).flatten(1), ROWS):  # [rows, heads · d]
        scores = F.conv2d(_as_image(rows), scores_of, groups=heads)
        shares = _as_rows(scores).view(-1, heads, keys).softmax(2).flatten(1)
        attended.append(_as_rows(F.conv2d(_as_image(shares), mean_of, groups=heads)))
    return torch.cat(attended)


def _as_image(rows: Tensor) -> Tensor:
    """[rows, C] as an image of one row, [1, C, 1, rows], channels-last in memory."""
    return rows[None, None].permute(0, 3, 1, 2)


def _as_rows(image: Tensor) -> Tensor:
    """The way back."""
    return image.permute(0, 2, 3, 1)[0, 0]
