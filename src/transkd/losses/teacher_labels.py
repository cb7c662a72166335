"""The teacher's predictions as labels."""

import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_choice
from transkd.losses.shared.grids import GRIDS, logits_pair, valid_on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["TeacherLabelsLoss"]


class TeacherLabelsLoss(nn.Module):
    """Cross-entropy with the classes that the teacher predicts, at the positions where it is confident.

    With p = softmax(z_t), q = softmax(z_s) and the N positions x:

        hard: 1/N · Σ_x [max p ≥ threshold] · −log q of the teacher's class
        soft: 1/N · Σ_x [max p ≥ threshold] · KL(p ‖ q)

    The sum is divided by all positions, not by the confident ones, so that an uncertain teacher counts less. Images
    without labels (``data.unlabelled``) are compared like all others.

    Source: pseudo-labels with a threshold as in FixMatch (Sohn et al., arXiv 2001.07685), at each pixel, with the
    teacher instead of the network itself. Soft without a threshold is `KDLoss` at τ = 1.

    Args:
        soft: compare with the teacher's probabilities instead of its class.
        threshold: smallest probability of the teacher's class at which a position counts, from 0 to 1.
        grid: size at which to compare: that of the "teacher" logits, the "student" logits or the "labels"; logits of
            another size are resized bilinearly, align_corners=False.
        mask_ignored: leave out the positions of labelled images whose label is ignored, in N too.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, to a scalar, float32 or float64. A target [B, H, W] is used for
        `mask_ignored` and for grid "labels".

    Raises:
        UserError: the grid is unknown, the threshold is not from 0 to 1, logits or required labels are missing, or the
            networks have different numbers of classes or a single class.

    Example:
        >>> import torch
        >>> def output(*logits):
        ...     return SegmentationOutput(torch.tensor(logits).view(1, -1, 1, 1), (), (), torch.rand(1, 3, 4, 4))
        >>> TeacherLabelsLoss()(output(0.0, 0.0), output(9.0, 0.0))  # log 2
        tensor(0.6931)
        >>> TeacherLabelsLoss()(output(0.0, 0.0), output(1.0, 0.0))  # the teacher's 0.73 is below 0.9
        tensor(0.)
    """

    needs = frozenset({"logits"})

    def __init__(
        self, soft: bool = False, threshold: float = 0.9, grid: str = "teacher", mask_ignored: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise UserError(f"TeacherLabelsLoss: threshold must be a number from 0 to 1; got {threshold}.")
        check_choice(self, "grid", grid, GRIDS)
        self.soft, self.threshold, self.grid, self.mask_ignored = soft, threshold, grid, mask_ignored

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's logits with the teacher's classes."""
        logits, teacher_logits = logits_pair(self, student, teacher, self.grid, target)
        log_q, log_p = F.log_softmax(logits, 1), F.log_softmax(teacher_logits, 1)
        best, classes = log_p.max(1)
        counted = best.exp() >= self.threshold
        if self.soft:
            values = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        else:
            values = F.nll_loss(log_q, classes, reduction="none")
        positions: Tensor | int = counted.numel()
        if self.mask_ignored:
            valid = valid_on_grid(self, target, logits)
            counted, positions = counted & valid, valid.sum().clamp_min(1)
        return values.masked_fill(~counted, 0).sum() / positions
