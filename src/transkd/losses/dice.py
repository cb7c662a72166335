"""Soft Dice loss with the labels, as a term."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from transkd.losses.shared.checks import check_share
from transkd.losses.shared.labelled import checked_weights, logits_at_labels
from transkd.outputs import SegmentationOutput

__all__ = ["TaskDice"]


class TaskDice(nn.Module):
    """Soft Dice loss between the student's probabilities and the labels; the teacher is not used.

    ``Σ_c w[c] · (1 − (2 Σ_x p_c(x) y_c(x) + s) / (Σ_x p_c(x) + Σ_x y_c(x) + s)) / Σ_c w[c]`` over the classes c that
    occur in the batch's labels, with sums over all valid pixels x of the batch; 0 if no class occurs. A small class
    counts as much as a large one. Since the sums go over the batch, several processes differ from one with the joined
    batch. Logits are stored at the labels' size.

    Source: Milletari et al., arXiv 1606.04797, section 3, without their squares and for several classes.

    Args:
        smooth: s ≥ 0.
        class_weights: w, one per class; None means equal weights.
        resolution: where to compare: "labels" upsamples the logits bilinearly to the labels' size, "logits"
            resizes the labels to the logits by nearest neighbour.

    Shapes:
        Logits [B, K, h, w], floating, and target [B, H, W], int64, to a scalar, float32 or float64.

    Raises:
        UserError: a setting is wrong, or logits or labels are missing or do not fit.

    Example:
        >>> student = SegmentationOutput(torch.zeros(1, 2, 2, 2), (), (), torch.rand(1, 3, 8, 8))
        >>> TaskDice()(student, None, torch.zeros(1, 8, 8, dtype=torch.int64))  # 1 − 2 · 32 / (32 + 64)
        tensor(0.3333)
    """

    needs: frozenset[str] = frozenset()
    class_weights: Tensor | None

    def __init__(
        self,
        smooth: float = 0.0,
        class_weights: Sequence[float] | Literal["auto", "median", "sqrt"] | None = None,
        resolution: str = "labels",
    ) -> None:
        super().__init__()
        check_share(self, "smooth", smooth)
        self.smooth, self.resolution = float(smooth), resolution
        self.register_buffer("class_weights", checked_weights(self, class_weights, resolution), persistent=False)

    def forward(
        self,
        student: SegmentationOutput,
        teacher: SegmentationOutput | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Compare the student's probabilities with the labels."""
        logits, labels, valid, weights = logits_at_labels(self, student, target, self.class_weights, self.resolution)
        probabilities = logits.softmax(1) * valid[:, None]
        of_label = probabilities.gather(1, labels[:, None]).flatten()
        chosen, counted = labels.flatten(), valid.flatten().to(logits)
        both = logits.new_zeros(len(weights)).index_add(0, chosen, of_label)
        present = logits.new_zeros(len(weights)).index_add(0, chosen, counted)
        tiny = torch.finfo(logits.dtype).tiny
        total = probabilities.sum((0, 2, 3)) + present
        dice = (2 * both + self.smooth) / (total + self.smooth).clamp_min(tiny)
        shares = weights * (present > 0)
        return (shares * (1 - dice)).sum() / shares.sum().clamp_min(tiny)
