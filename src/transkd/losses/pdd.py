"""Pixel-wise Decoupled Distillation of C2VKD."""

import math

from torch import Tensor, nn

from transkd.losses.dkd import decoupled, log_shares, mean_over_valid, split
from transkd.losses.shared.checks import check_choice, check_share, require_target
from transkd.losses.shared.grids import GRIDS, labels_on_grid, logits_pair
from transkd.outputs import SegmentationOutput

__all__ = ["PDDLoss", "mixture_divergence"]

VARIANTS = ("mixture", "dkd")
LOWEST_LOG_SHARE = -100.0


class PDDLoss(nn.Module):
    """Divergence of the student's target / non-target probabilities from those of teacher and label.

    At each position, with the two probabilities π = (of the label, of all other classes together):

        variant "mixture":  m = ½·(π_t + (1, 0))
                            mean over valid positions of  α·π_s[0]·ln(π_s[0] / m[0]) + β·π_s[1]·ln(π_s[1] / m[1])
        variant "dkd":      α·TCKD + β·NCKD of `DKDLoss`, at temperature 1

    With α = β the mixture variant is α·KL(π_s ‖ m), with its minimum 0 at π_s = m; with α ≠ β it can be negative. Only
    "dkd" compares the ranking of the other classes.

    The method is only partly published. According to the abstract, labels and the teacher's predictions together
    supervise the student, decoupled into target and non-target classes. The authors' training script calls a function
    with α = β = 0.5 and temperature 1 on logits upsampled to the labels, without a cross-entropy; that function is not
    in their repository, and the equations of the paper were not available to us. "mixture" follows a secondary
    description of equations 8 and 9 (a divergence of the student from "teacher plus ground truth" over the two
    probabilities); the ½ is our addition, which makes m a distribution and with α = β changes the value by a constant.
    "dkd" is what the call in the script suggests. In "mixture", ln π_t[1] of a confident teacher is clamped at −100, so
    that single positions do not dominate the mean.

    Source: Zheng et al., C2VKD, arXiv 2310.07265, its Pixel-wise Decoupled Distillation.

    Args:
        alpha: weight of the label's summand; 0.5 in the authors' script.
        beta: weight of the other classes' summand; 0.5 in the authors' script.
        variant: "mixture" or "dkd".
        grid: size at which to compare: "labels" as in the script, "teacher" or "student"; logits of another size are
            resized bilinearly, align_corners=False, labels by nearest neighbour.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, and a target [B, H, W], 255 or negative = ignored, to a scalar, float32
        or float64.

    Raises:
        UserError: a setting is out of range, labels or logits are missing, or the networks have different numbers of
            classes or a single class.

    Example:
        >>> import torch
        >>> def output(*scores):
        ...     return SegmentationOutput(torch.tensor(scores).view(1, -1, 1, 1), (), (), torch.rand(1, 3, 4, 4))
        >>> label = torch.zeros(1, 4, 4, dtype=torch.int64)
        >>> value = PDDLoss()(output(math.log(3.0), 0.0), output(0.0, 0.0), label)
        >>> value.round(decimals=4)  # 3/4 is halfway between the teacher's 1/2 and the label's 1
        tensor(0.)
    """

    needs = frozenset({"logits"})

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, variant: str = "mixture", grid: str = "labels") -> None:
        super().__init__()
        check_share(self, "alpha", alpha)
        check_share(self, "beta", beta)
        check_choice(self, "variant", variant, VARIANTS)
        check_choice(self, "grid", grid, GRIDS)
        self.alpha, self.beta, self.variant, self.grid = alpha, beta, variant, grid

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the logits."""
        target = require_target(self, target)
        logits, teacher_logits = logits_pair(self, student, teacher, self.grid, target)
        divergence = mixture_divergence if self.variant == "mixture" else decoupled
        label, others = divergence(logits, teacher_logits, *labels_on_grid(target, logits.shape[-2:]))
        return self.alpha * label + self.beta * others


def mixture_divergence(student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two summands of KL(π_s ‖ m) of `PDDLoss`: of the label, and of all other classes together.

    Args:
        student: logits [B, K, h, w], at least float32.
        teacher: the same shape; detached.
        labels: int64 [B, h, w]; any class at invalid positions.
        valid: bool [B, h, w], positions to include.

    Example:
        >>> import torch
        >>> place = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool)
        >>> even = torch.zeros(1, 2, 1, 1)
        >>> mixture_divergence(even, even, *place)  # 1/2·log(2/3) and 1/2·log 2
        (tensor(-0.2027), tensor(0.3466))
    """
    log_label, log_others = log_shares(split(teacher.detach(), labels, valid).margin)
    log_mixture = (
        log_label.exp().log1p() - math.log(2),
        log_others.clamp_min(LOWEST_LOG_SHARE) - math.log(2),
    )
    log_student = log_shares(split(student, labels, valid).margin)
    label, others = (
        mean_over_valid(log_s.exp() * (log_s - log_m), valid)
        for log_s, log_m in zip(log_student, log_mixture, strict=True)
    )
    return label, others
