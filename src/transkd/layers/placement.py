"""Scores of transformed images, brought back to the images' own pixels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["restored"]


def restored(scores: Tensor, place: Tensor, size: Sequence[int]) -> Tensor:
    """Scores of transformed images at the places of the pixels that the images had before.

    Interpolates bilinearly (align_corners=False), as a resize of the scores does.

    Args:
        scores: [B, K, h, w] of the transformed images, at any stride.
        place: [B, 2, 3], from an image's pixels to the result's, both as (x, y) from -1 to 1 between the outer edges
            (``torch.nn.functional.affine_grid``).
        size: (H, W) before the transform.

    Returns:
        [B, K, *size], in float32 at least.

    Example:
        >>> left_half = torch.tensor([[[0.5, 0.0, -0.5], [0.0, 1.0, 0.0]]])
        >>> restored(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), left_half, (1, 2))
        tensor([[[[1., 2.]]]])
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    grid = F.affine_grid(place.to(scores), [len(scores), 1, *size], align_corners=False)
    return F.grid_sample(scores, grid, mode="bilinear", padding_mode="border", align_corners=False)
