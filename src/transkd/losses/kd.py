"""Knowledge distillation of the logits, pixel by pixel."""

from torch import Tensor, nn

from transkd.losses.shared.checks import check_choice, check_positive, require_target
from transkd.losses.shared.distances import spatial_kl
from transkd.losses.shared.grids import GRIDS, labels_on_grid, logits_pair
from transkd.outputs import SegmentationOutput

__all__ = ["KDLoss", "pixel_kl"]


class KDLoss(nn.Module):
    """Compare which classes are likely at each pixel: KL between the softened predictions of two networks.

    ``τ² · mean over pixels of KL(softmax(z_t / τ) ‖ softmax(z_s / τ))``, soft-maxes over the classes; no parameters.

    Source: Hinton et al., arXiv 1503.02531, section 2, at each pixel as CIRKD (arXiv 2204.06986) does. Published codes
    differ in scale: a mean over images alone is h·w times larger, one over all elements K times smaller and often
    without τ². Their weights belong to their scaling, not to this one.

    Args:
        temperature: τ > 0; a larger one flattens the distributions. CIRKD takes 1, classification usually 4.
        grid: where to compare: "teacher" resizes the student's logits to the teacher's, "student" the teacher's to the
            student's, "labels" both to the labels; bilinear, align_corners=False.
        mask_ignored: take the mean over the pixels that have a label, not over all. Off by default, as published.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, to a scalar, float32 or float64. A target [B, H, W] is read for
        `mask_ignored` and for grid "labels". No labelled pixel at all gives 0.

    Raises:
        UserError: an unknown grid, a temperature that is not positive, no logits, no labels where they are read,
            networks with different numbers of classes, or with a single one.

    Example:
        >>> import torch
        >>> def output(*logits):
        ...     return SegmentationOutput(torch.tensor(logits).view(1, -1, 1, 1), (), (), torch.rand(1, 3, 4, 4))
        >>> KDLoss()(output(1000.0, 0.0), output(0.0, 0.0))  # 500 - log 2
        tensor(499.3068)
    """

    needs = frozenset({"logits"})

    def __init__(self, temperature: float = 1.0, grid: str = "teacher", mask_ignored: bool = False) -> None:
        super().__init__()
        check_positive(self, "temperature", temperature)
        check_choice(self, "grid", grid, GRIDS)
        self.temperature, self.grid, self.mask_ignored = temperature, grid, mask_ignored

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the logits."""
        logits, teacher_logits = logits_pair(self, student, teacher, self.grid, target)
        valid = None
        if self.mask_ignored:
            _, valid = labels_on_grid(require_target(self, target), logits.shape[-2:])
        return pixel_kl(logits, teacher_logits, self.temperature, valid)


def pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """`spatial_kl` as a mean over the valid positions of the whole batch; 0 where there are none.

    Args:
        student: [B, C, h, w], floating.
        teacher: [B, C, h, w]; a constant.
        temperature: τ > 0.
        valid: bool [B, h, w]; None takes all positions.
    """
    if valid is None:
        return spatial_kl(student, teacher, temperature)
    hidden = ~valid[:, None]  # both uniform there: their KL is exactly 0, and so is its gradient
    mean_over_all = spatial_kl(student.masked_fill(hidden, 0), teacher.masked_fill(hidden, 0), temperature)
    return mean_over_all * valid.numel() / valid.sum().clamp_min(1)
