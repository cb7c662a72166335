"""Decoupled knowledge distillation of the target class and of the non-target classes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.losses.shared.checks import check_choice, check_positive, check_share, require_target
from transkd.losses.shared.grids import GRIDS, labels_on_grid, logits_pair
from transkd.outputs import SegmentationOutput

__all__ = ["DKDLoss", "Split", "decoupled", "log_shares", "mean_over_valid", "split"]


class DKDLoss(nn.Module):
    """Decoupled distillation: KL divergence of the target class and, separately, of the non-target classes.

    ``α·TCKD + β·NCKD``, at each position with label y and scaled logits z = logits / τ:

        π = (softmax(z)_y, 1 − softmax(z)_y)     q = softmax of z over the classes other than y
        TCKD = τ² · mean over valid positions of KL(π_t ‖ π_s)
        NCKD = τ² · mean over valid positions of KL(q_t ‖ q_s)

    In plain distillation the weight of NCKD at a position is 1 − softmax(z_t)_y, so a confident teacher gives little
    supervision on the non-target classes; here that weight is β. The reference implementation removes class y by
    subtracting 1000 from its logit and takes logarithms of sums of probabilities, which are infinite for a confidently
    wrong student; here y is excluded from the sums and everything is computed from log-probabilities.

    Source: Zhao et al., arXiv 2203.08679, section 3, applied at each position.

    Args:
        alpha: weight of TCKD; 1 in the reference implementation.
        beta: weight of NCKD; 8 in the reference implementation at temperature 4, 0.5 to 2 at temperature 1 for
            ImageNet.
        temperature: τ > 0; larger values flatten the distributions; 4 in the reference implementation.
        grid: size at which to compare: "teacher", "student" or "labels"; logits of another size are resized bilinearly,
            align_corners=False, labels by nearest neighbour.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, and a target [B, H, W], 255 or negative = ignored, to a scalar, float32
        or float64. With two classes NCKD is 0.

    Raises:
        UserError: a setting is out of range, labels or logits are missing, or the networks have different numbers of
            classes or a single class.

    Example:
        >>> output = SegmentationOutput(torch.randn(1, 4, 8, 8), (), (), torch.rand(1, 3, 32, 32))
        >>> DKDLoss()(output, output, torch.zeros(1, 32, 32, dtype=torch.int64))
        tensor(0.)
    """

    needs = frozenset({"logits"})

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, grid: str = "teacher") -> None:
        super().__init__()
        check_share(self, "alpha", alpha)
        check_share(self, "beta", beta)
        check_positive(self, "temperature", temperature)
        check_choice(self, "grid", grid, GRIDS)
        self.alpha, self.beta, self.temperature, self.grid = alpha, beta, temperature, grid

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the logits."""
        target = require_target(self, target)
        logits, teacher_logits = logits_pair(self, student, teacher, self.grid, target)
        labels, valid = labels_on_grid(target, logits.shape[-2:])
        tckd, nckd = decoupled(logits, teacher_logits, labels, valid, self.temperature)
        return self.alpha * tckd + self.beta * nckd


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of `DKDLoss`, both multiplied by τ².

    Args:
        student: logits [B, K, h, w], at least float32.
        teacher: the same shape; detached.
        labels: int64 [B, h, w]; any class at invalid positions.
        valid: bool [B, h, w], positions to include.
        temperature: τ > 0.

    Example:
        >>> student, teacher = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 100.0])
        >>> place = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool)
        >>> decoupled(student.view(1, 3, 1, 1), teacher.view(1, 3, 1, 1), *place)  # log 3/2 and log 2
        (tensor(0.4055), tensor(0.6931))
    """
    t = split(teacher.detach(), labels, valid, temperature)
    q = t.others.softmax(1)  # exactly 0 for the label
    negative_entropy = (q * t.others).sum(1) - t.lse
    teacher_margin = t.margin
    del t  # frees a map before the student's logits are split
    s = split(student, labels, valid, temperature)
    nckd = negative_entropy + (s.lse - (q * s.others).sum(1))
    tckd = torch.zeros_like(nckd)
    for log_t, log_s in zip(log_shares(teacher_margin), log_shares(s.margin), strict=True):
        tckd = tckd + log_t.exp() * (log_t - log_s)
    return temperature**2 * mean_over_valid(tckd, valid), temperature**2 * mean_over_valid(nckd, valid)


class Split(NamedTuple):
    """Scaled logits, split into the label's and those of the other classes.

    Attributes:
        others: [B, K, h, w], the label's entry replaced by the lowest finite number: its exp is exactly 0, and unlike
            −∞ its product with 0 is 0.
        lse: [B, h, w], log-sum-exp of the other classes.
        margin: [B, h, w], the label's logit minus `lse`: the log-odds of the label.
    """

    others: Tensor
    lse: Tensor
    margin: Tensor


def split(logits: Tensor, labels: Tensor, valid: Tensor, temperature: float = 1.0) -> Split:
    """Split the scaled logits of each position; they are 0 at invalid positions. Autograd stores one map, `others`."""
    scores = (logits / temperature).masked_fill_(~valid[:, None], 0)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, labels[:, None], True)
    label = torch.where(chosen, scores, 0).sum(1)  # unlike gather, it does not store the scores for the backward pass
    others = scores.masked_fill_(chosen, torch.finfo(scores.dtype).min)
    lse = others.logsumexp(1)
    return Split(others, lse, label - lse)


def log_shares(margin: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the label and of all other classes together, from the log-odds of the label."""
    return F.logsigmoid(margin), F.logsigmoid(-margin)


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of [B, h, w] over the valid positions of the batch; 0 without a valid position."""
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp_min(1)
