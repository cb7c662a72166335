"""Attention transfer: where the features are active."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_stages
from transkd.losses.shared.distances import mean_squared_error, widen
from transkd.losses.shared.grids import feature_pairs
from transkd.outputs import SegmentationOutput

__all__ = ["ATLoss", "attention_map"]


class ATLoss(nn.Module):
    """Compare where in the image the features are active, whatever their channels mean.

    ``Σ_stages 1 / (B·N) · Σ_b ‖A(f_s) − A(f_t)‖²`` with ``A(f) = a / ‖a‖``, ``a = mean over channels of |f|^p``, a
    vector over the N positions of an image. No parameters; the channels may differ. Where the sizes differ the larger
    map is average-pooled to the smaller, height and width by themselves, before the attention is formed.

    The value falls as 1 / N, which is why weights are large: CIRKD's 10000 belongs to maps of 64×128 positions,
    1000 is usual in classification. Scale the weight with N.

    On maps that come out of a LayerNorm over the channels, as MiT's stages do, every position has about the same mean
    square, so the attention is nearly flat and there is little to learn from it.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928, section 3.1. One published code pools to a square of the smaller
    height, and some leave out the absolute value, which an odd p needs.

    Args:
        stages: which stages to compare, counted from 1; their values are summed.
        p: the power, at least 1; a larger one counts the strongest channels more.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not read.

    Raises:
        UserError: a power below 1, or stages that do not exist.

    Example:
        >>> def output(*activity):
        ...     return SegmentationOutput(None, (torch.tensor(activity).view(1, 1, 1, 2),), (), torch.rand(1, 3, 4, 4))
        >>> ATLoss(stages=(1,))(output(1.0, 0.0), output(0.0, 5.0))
        tensor(1.)
    """

    needs = frozenset({"features"})

    def __init__(self, stages: Sequence[int] = (4,), p: float = 2.0) -> None:
        super().__init__()
        if not 1 <= p < float("inf"):
            raise UserError(f"ATLoss: the power p must be a number of at least 1; got {p}.")
        self.stages, self.p = check_stages(self, stages), p

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the attention of the chosen stages."""
        losses = []
        for pair in feature_pairs(self, self.stages, student, teacher):
            height, width = (min(maps.shape[dim] for maps in pair) for dim in (2, 3))
            mine, other = (attention_map(_pooled(maps, height, width), self.p) for maps in pair)
            losses.append(mean_squared_error(mine, other))
        return torch.stack(losses).sum()


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Features [B, C, h, w] as one vector of unit length per image [B, h·w]: mean over the channels of |f|^p.

    The length is at least 1e-12, so that an image without any activity gives 0.

    Example:
        >>> attention_map(torch.tensor([3.0**0.5, -2.0]).view(1, 1, 1, 2))
        tensor([[0.6000, 0.8000]])
    """
    return F.normalize(features.abs().pow(p).mean(dim=1).flatten(1), dim=1, eps=1e-12)


def _pooled(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[-2:] == (height, width):  # pooling has no deterministic gradient on a GPU; most pairs need none
        return widen(maps)
    return F.adaptive_avg_pool2d(widen(maps), (height, width))
