"""Distillation of the labelled class and of the others, each by itself."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.losses.shared.checks import check_choice, check_positive, check_share, require_target
from transkd.losses.shared.grids import GRIDS, labels_on_grid, logits_pair
from transkd.outputs import SegmentationOutput

__all__ = ["DKDLoss", "Split", "decoupled", "log_shares", "mean_over_valid", "split"]


class DKDLoss(nn.Module):
    """Compare how likely the label is, and apart from that how the other classes rank among themselves.

    ``α·TCKD + β·NCKD``, at each position with label y and tempered scores z = logits / τ:

        π = (softmax(z)_y, 1 − softmax(z)_y)     q = softmax of z over the classes other than y
        TCKD = τ² · mean over valid positions of KL(π_t ‖ π_s)
        NCKD = τ² · mean over valid positions of KL(q_t ‖ q_s)

    In plain distillation NCKD's weight at a position is 1 − softmax(z_t)_y, so that a sure teacher hardly tells how
    the other classes rank; here it is β. The published code removes class y by subtracting 1000 from its score and
    takes logarithms of sums of probabilities, which is infinite for a student that is surely wrong; here y is left
    out of the sums and all is computed from logarithms.

    Source: Zhao et al., arXiv 2203.08679, section 3, at each position.

    Args:
        alpha: of the label against the rest; 1 is the published code's.
        beta: of the rest; 8 is the published code's, at temperature 4; 0.5 to 2 at temperature 1 for ImageNet.
        temperature: τ > 0; a larger one flattens the distributions; 4 is the published code's.
        grid: where to compare: "teacher", "student" or "labels"; logits of another size are resized bilinearly,
            align_corners=False, labels by nearest neighbour.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, and a target [B, H, W], 255 or negative = ignored, to a scalar, float32
        or float64. With two classes NCKD is 0.

    Raises:
        UserError: a setting out of range, no labels, no logits, a single class, or networks with different classes.

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
        ours, theirs = logits_pair(self, student, teacher, self.grid, target)
        tckd, nckd = decoupled(ours, theirs, *labels_on_grid(target, theirs.shape[-2:]), self.temperature)
        return self.alpha * tckd + self.beta * nckd


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of `DKDLoss`, both with their τ².

    Args:
        student: logits [B, K, h, w], at least float32.
        teacher: the same shape; a constant.
        labels: int64 [B, h, w]; any class where not valid.
        valid: bool [B, h, w]; nothing else counts.
        temperature: τ > 0.

    Example:
        >>> student, teacher = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 100.0])
        >>> place = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool)
        >>> decoupled(student.view(1, 3, 1, 1), teacher.view(1, 3, 1, 1), *place)  # log 3/2 and log 2
        (tensor(0.4055), tensor(0.6931))
    """
    theirs = split(teacher.detach(), labels, valid, temperature)
    q = theirs.others.softmax(1)  # exactly 0 for the label
    negative_entropy = (q * theirs.others).sum(1) - theirs.lse
    margin = theirs.margin
    del theirs  # one map less while the student's is split
    ours = split(student, labels, valid, temperature)
    nckd = negative_entropy + (ours.lse - (q * ours.others).sum(1))
    tckd = torch.zeros_like(nckd)
    for log_t, log_s in zip(log_shares(margin), log_shares(ours.margin), strict=True):
        tckd = tckd + log_t.exp() * (log_t - log_s)
    return temperature**2 * mean_over_valid(tckd, valid), temperature**2 * mean_over_valid(nckd, valid)


class Split(NamedTuple):
    """Tempered scores, parted into the label's and the others'.

    Attributes:
        others: [B, K, h, w], the label's own replaced by the lowest number there is: exp gives exactly 0, and
            unlike −∞ it stays 0 when multiplied by 0.
        lse: [B, h, w], log-sum-exp of the others.
        margin: [B, h, w], the label's score minus `lse`: the log-odds of the label.
    """

    others: Tensor
    lse: Tensor
    margin: Tensor


def split(logits: Tensor, labels: Tensor, valid: Tensor, temperature: float = 1.0) -> Split:
    """Part the scores of each position; they are 0 where it is not valid. The gradient needs one map, `others`."""
    scores = (logits / temperature).masked_fill_(~valid[:, None], 0)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, labels[:, None], True)
    label = torch.where(chosen, scores, 0).sum(1)  # gather would keep the scores for its gradient
    others = scores.masked_fill_(chosen, torch.finfo(scores.dtype).min)
    lse = others.logsumexp(1)
    return Split(others, lse, label - lse)


def log_shares(margin: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the label's probability and of all others' together, from the log-odds of the label."""
    return F.logsigmoid(margin), F.logsigmoid(-margin)


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of [B, h, w] over the valid positions of the whole batch; 0 without any."""
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp_min(1)
