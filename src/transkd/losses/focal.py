"""Focal loss with the labels, as a term."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from transkd.layers.upsampled_cross_entropy import upsampled_cross_entropy
from transkd.losses.shared.checks import check_share
from transkd.losses.shared.labelled import checked_weights, labelled_logits
from transkd.outputs import IGNORE, SegmentationOutput

__all__ = ["TaskFocal"]


class TaskFocal(nn.Module):
    """Focal loss between the student's logits and the labels; the teacher is not used.

    ``Σ_x w[y_x] · (1 − p_x)^γ · −log p_x / Σ_x w[y_x]``, p_x the softmax probability of the label at the valid pixel x;
    0 if there are none. With γ = 0 it is the cross-entropy (`TaskCrossEntropy`). It is computed in bands as that is,
    and can be differentiated only once. The mean is over a process's own pixels, so several processes differ from one
    with the joined batch.

    Source: Lin et al., arXiv 1708.02002, section 3, for several classes by the softmax.

    Args:
        gamma: γ ≥ 0, how much less a pixel counts that is right already.
        class_weights: w, one per class; None means equal weights.
        resolution: where to compare: "labels" upsamples the logits bilinearly to the labels' size, "logits"
            resizes the labels to the logits by nearest neighbour.

    Shapes:
        Logits [B, K, h, w], floating, and target [B, H, W], int64, to a scalar, float32 or float64.

    Raises:
        UserError: a setting is wrong, or logits or labels are missing or do not fit.

    Example:
        >>> student = SegmentationOutput(torch.zeros(1, 2, 2, 2), (), (), torch.rand(1, 3, 8, 8))
        >>> TaskFocal(gamma=2.0)(student, None, torch.zeros(1, 8, 8, dtype=torch.int64))  # ¼ · log 2
        tensor(0.1733)
    """

    needs: frozenset[str] = frozenset()
    class_weights: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        class_weights: Sequence[float] | Literal["auto", "median", "sqrt"] | None = None,
        resolution: str = "labels",
    ) -> None:
        super().__init__()
        check_share(self, "gamma", gamma)
        self.gamma, self.resolution = float(gamma), resolution
        self.register_buffer("class_weights", checked_weights(self, class_weights, resolution), persistent=False)

    def forward(
        self,
        student: SegmentationOutput,
        teacher: SegmentationOutput | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Compare the student's logits with the labels."""
        logits, target, weights = labelled_logits(self, student, target, self.class_weights, self.resolution)
        return upsampled_cross_entropy(logits, target, weights, IGNORE, self._losses_and_slopes)

    def _losses_and_slopes(self, log_p: Tensor) -> tuple[Tensor, Tensor]:
        wrong = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)  # 1 − p; 0^γ has no derivative for γ < 1
        factor = wrong**self.gamma
        return -log_p * factor, factor * (1 - self.gamma * log_p * log_p.exp() / wrong)
