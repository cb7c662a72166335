"""Soft Dice loss with the labels, as a term."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from transkd.layers.bands import gradient_for, over_bands, with_gradient
from transkd.layers.upsampled_cross_entropy import softmax_, subtract_at_labels
from transkd.losses.shared.checks import check_share
from transkd.losses.shared.labelled import checked_weights, labelled_logits
from transkd.outputs import IGNORE, SegmentationOutput

__all__ = ["TaskDice"]


class TaskDice(nn.Module):
    """Soft Dice loss between the student's probabilities and the labels; the teacher is not used.

    ``Σ_c w[c] · (1 − (2 Σ_x p_c(x) y_c(x) + s) / (Σ_x p_c(x) + Σ_x y_c(x) + s)) / Σ_c w[c]`` over the classes c that
    occur in the batch's labels, with sums over all valid pixels x of the batch; 0 if no class occurs. A small class
    counts as much as a large one. Since the sums go over the batch, several processes differ from one with the joined
    batch. Logits are upsampled in bands, twice: for the sums, then for the gradient. The value can be differentiated
    only once.

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
        logits, target, weights = labelled_logits(self, student, target, self.class_weights, self.resolution)
        ones, tiny = torch.ones_like(weights), torch.finfo(weights.dtype).tiny
        both, predicted, present = over_bands(_sums, logits, target, ones, IGNORE)
        total = (predicted + present + self.smooth).clamp_min(tiny)
        dice = (2 * both + self.smooth) / total
        shares = weights * (present > 0)
        shares /= shares.sum().clamp_min(tiny)
        gradient = gradient_for(logits)
        if gradient is not None:
            rule = partial(_gradient, everywhere=shares * dice / total, at_label=-2 * shares / total)
            over_bands(rule, logits, target, ones, IGNORE, gradient)
        return with_gradient((shares * (1 - dice)).sum(), logits, gradient)


def _sums(scores: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Σ_x p_c y_c, Σ_x p_c and Σ_x y_c of a band, [3, K]."""
    log_p, mass = softmax_(scores, labels)
    scores *= valid / mass
    rows = labels.flatten(0, 2)
    both, present = (  # row by row: adding a million numbers to one in float32 would round each of them
        scores.new_zeros(len(rows), scores.shape[1]).scatter_add_(1, rows, pixels.flatten(0, 2)).sum(0)
        for pixels in (log_p.exp() * valid, valid)
    )
    return torch.stack([both, scores.sum((0, 2, 3)), present])


def _gradient(scores: Tensor, labels: Tensor, valid: Tensor, everywhere: Tensor, at_label: Tensor) -> Tensor:
    """Overwrite the scores with the gradient by the logits, of ``everywhere[c] + at_label[c] · y_c(x)`` by p_c(x)."""
    log_p, mass = softmax_(scores, labels)
    everywhere, factor = everywhere[:, None, None], valid / mass
    own = log_p.exp() * valid * at_label.index_select(0, labels.flatten()).view(labels.shape)
    mean = (scores * everywhere).sum(1, keepdim=True) / mass + own
    scores *= torch.addcmul(-mean * factor, everywhere, factor)  # p · (slope − Σ p · slope), the softmax's derivative
    subtract_at_labels(scores, labels, -own)
    return scores.new_zeros(())
