"""Knowledge distillation of the logits at each pixel."""

from torch import Tensor, nn

from transkd.losses.shared.checks import check_choice, check_positive
from transkd.losses.shared.distances import spatial_kl
from transkd.losses.shared.grids import GRIDS, logits_pair, valid_on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["KDLoss", "pixel_kl"]


class KDLoss(nn.Module):
    """KL divergence between the softened class probabilities of both networks at each pixel.

    ``τ² · mean over pixels of KL(softmax(z_t / τ) ‖ softmax(z_s / τ))``, softmax over the classes; no parameters.

    Source: Hinton et al., arXiv 1503.02531, section 2, at each pixel as in CIRKD (arXiv 2204.06986). Published
    implementations differ in scale: a mean over images alone is h·w times larger, one over all elements K times
    smaller and often without τ². Their weights cannot be used here without rescaling.

    Args:
        temperature: τ > 0; larger values flatten the distributions. CIRKD uses 1, classification usually 4.
        grid: size at which to compare: that of the "teacher" logits, the "student" logits or the "labels"; logits of
            another size are resized bilinearly, align_corners=False.
        mask_ignored: average over the pixels that are not ignored. False by default, as published.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, to a scalar, float32 or float64. A target [B, H, W] is used for
        `mask_ignored` and for grid "labels". 0 without a labelled pixel.

    Raises:
        UserError: the grid is unknown, the temperature is not positive, logits or required labels are missing, or the
            networks have different numbers of classes or a single class.

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
        valid = valid_on_grid(self, target, logits) if self.mask_ignored else None
        return pixel_kl(logits, teacher_logits, self.temperature, valid)


def pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Mean of `spatial_kl` over the valid positions of the batch; 0 without a valid position.

    Args:
        student: [B, C, h, w], floating.
        teacher: [B, C, h, w]; detached.
        temperature: τ > 0.
        valid: bool [B, h, w], positions to include; None includes all.
    """
    if valid is None:
        return spatial_kl(student, teacher, temperature)
    hidden = ~valid[:, None]  # equal logits there: the KL divergence and its gradient are exactly 0
    mean_over_all = spatial_kl(student.masked_fill(hidden, 0), teacher.masked_fill(hidden, 0), temperature)
    return mean_over_all * valid.numel() / valid.sum().clamp_min(1)
