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
    """Compare how likely the student finds the label with what teacher and label together say.

    At each position, with the two shares π = (probability of the label, probability of all other classes together):

        variant "mixture":  m = ½·(π_t + (1, 0))
                            mean over valid positions of  α·π_s[0]·ln(π_s[0] / m[0]) + β·π_s[1]·ln(π_s[1] / m[1])
        variant "dkd":      α·TCKD + β·NCKD of `DKDLoss`, at temperature 1

    With α = β the mixture is α·KL(π_s ‖ m), whose minimum 0 lies at π_s = m; with α ≠ β it can be negative. How the
    other classes rank among themselves is seen by "dkd" alone.

    What is published: the abstract says that labels and the teacher's predictions together supervise the student,
    decoupled into target and non-target classes. The authors' training script calls a function with α = β = 0.5 and
    temperature 1 on logits upsampled to the labels, and adds no cross-entropy; the file with that function is not in
    their repository, and we have not seen the paper's equations. "mixture" follows what others report of
    equations 8 and 9 (a divergence of the student from "teacher plus ground truth" over these two shares); the ½ is
    ours, for m to be a distribution, and with α = β changes the value by a constant alone. "dkd" is what the call in
    the script suggests. Under "mixture" the logarithm of a sure teacher's π_t[1] counts as −100 at least, so that no
    single position rules the mean.

    Source: Zheng et al., C2VKD, arXiv 2310.07265, its Pixel-wise Decoupled Distillation.

    Args:
        alpha: of the label's share; 0.5 is the script's.
        beta: of the other classes; 0.5 is the script's.
        variant: "mixture" or "dkd".
        grid: where to compare: "labels" as in the script, "teacher" or "student"; logits of another size are resized
            bilinearly, align_corners=False, labels by nearest neighbour.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, and a target [B, H, W], 255 or negative = ignored, to a scalar, float32
        or float64.

    Raises:
        UserError: a setting out of range, no labels, no logits, a single class, or networks with different classes.

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
        ours, theirs = logits_pair(self, student, teacher, self.grid, target)
        compare = mixture_divergence if self.variant == "mixture" else decoupled
        label, others = compare(ours, theirs, *labels_on_grid(target, theirs.shape[-2:]))
        return self.alpha * label + self.beta * others


def mixture_divergence(student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The two summands of KL(π_s ‖ m) of `PDDLoss`: that of the label and that of all other classes together.

    Args:
        student: logits [B, K, h, w], at least float32.
        teacher: the same shape; a constant.
        labels: int64 [B, h, w]; any class where not valid.
        valid: bool [B, h, w]; nothing else counts.

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
