"""Attention transfer: spatial attention maps of the features."""

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
    """Compare the spatial attention maps of both networks' features.

    ``Σ_stages 1 / (B·N) · Σ_b ‖A(f_s) − A(f_t)‖²`` with ``A(f) = a / ‖a‖``, ``a = mean over channels of |f|^p``, a
    vector over the N positions of an image. No parameters; the channels may differ. Where the sizes differ, both maps
    are average-pooled to the smaller height and the smaller width before the attention map is computed.

    The value decreases as 1 / N, so weights are large: CIRKD uses 10000 for maps of 64×128 positions, classification
    usually 1000. Scale the weight with N.

    After a LayerNorm over the channels, as at the end of MiT's stages, every position has about the same mean square:
    the attention map is nearly constant and the term gives little supervision.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928, section 3.1. One published implementation pools to a
    square of the smaller height; some omit the absolute value, although an odd p needs it.

    Args:
        stages: stages to compare, counted from 1; their values are summed.
        p: exponent, at least 1; larger values give strong channels more influence.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: p is below 1, or a stage does not exist.

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
        """Compare the attention maps of the selected stages."""
        losses = []
        for pair in feature_pairs(self, self.stages, student, teacher):
            height, width = (min(maps.shape[dim] for maps in pair) for dim in (2, 3))
            student_map, teacher_map = (attention_map(_pooled(maps, height, width), self.p) for maps in pair)
            losses.append(mean_squared_error(student_map, teacher_map))
        return torch.stack(losses).sum()


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Attention map of features [B, C, h, w], one unit vector per image [B, h·w]: the mean over channels of |f|^p.

    The norm in the denominator is at least 1e-12, so features that are all 0 give 0.

    Example:
        >>> attention_map(torch.tensor([3.0**0.5, -2.0]).view(1, 1, 1, 2))
        tensor([[0.6000, 0.8000]])
    """
    return F.normalize(features.abs().pow(p).mean(dim=1).flatten(1), dim=1, eps=1e-12)


def _pooled(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[-2:] == (height, width):  # skip: the gradient of pooling is not deterministic on CUDA
        return widen(maps)
    return F.adaptive_avg_pool2d(widen(maps), (height, width))
