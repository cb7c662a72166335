"""Channel-wise distillation of logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses._checks import check_needs
from transkd.losses.criteria import channel_kl, widen
from transkd.outputs import SegmentationOutput

__all__ = ["CWDLoss"]

GRIDS = ("teacher", "labels")


class CWDLoss(nn.Module):
    """Compare where in the image each class's logits are large: `channel_kl` between the logits of two networks.

    ``τ² / (B·K) · Σ_b Σ_k KL(softmax_HW(z_t / τ) ‖ softmax_HW(z_s / τ))``, no parameters of its own.

    Source: Shu et al., arXiv 2011.13256, section 3; its weight for logits is 3 at τ = 4.

    Args:
        temperature: τ > 0; a larger one flattens the distributions.
        grid: where to compare: "teacher" resizes the student's logits to the teacher's, "labels" upsamples both to
            the labels; bilinear, align_corners=False.

    Shapes:
        Logits [B, K, h, w] of both, for grid "labels" a target [B, H, W], to a scalar, float32 or float64.

    Raises:
        UserError: an unknown grid, a temperature that is not positive, no logits, no labels where they are the
            grid, or networks with different numbers of classes.

    Example:
        >>> import torch
        >>> output = SegmentationOutput(torch.randn(1, 4, 8, 8), (), (), torch.rand(1, 3, 32, 32))
        >>> CWDLoss(temperature=4.0)(output, output)
        tensor(0.)
    """

    needs = frozenset({"logits"})

    def __init__(self, temperature: float = 4.0, grid: str = "teacher") -> None:
        super().__init__()
        if grid not in GRIDS:
            raise UserError(f"CWDLoss: grid must be one of {GRIDS}; got {grid!r}.")
        if not temperature > 0:
            raise UserError(f"CWDLoss: the temperature must be greater than 0; got {temperature}.")
        self.temperature, self.grid = temperature, grid

    def forward(self, student: SegmentationOutput, teacher: SegmentationOutput, target: Tensor | None = None) -> Tensor:
        """Compare the logits."""
        check_needs(self, self.needs, student, teacher)
        assert student.logits is not None
        assert teacher.logits is not None
        if student.logits.shape[1] != teacher.logits.shape[1]:
            raise UserError(
                f"CWDLoss compares class by class; the student has {student.logits.shape[1]} classes, the teacher "
                f"{teacher.logits.shape[1]}. Choose a teacher that was trained on the same classes."
            )
        if self.grid == "labels" and target is None:
            raise UserError("CWDLoss with grid='labels' takes its size from the labels: call it with target=labels.")
        like = target if self.grid == "labels" and target is not None else teacher.logits
        maps = [_resized(output.logits, like) for output in (student, teacher)]
        return channel_kl(maps[0], maps[1], self.temperature)


def _resized(logits: Tensor | None, like: Tensor) -> Tensor:
    assert logits is not None
    size = like.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(widen(logits), size=size, mode="bilinear", align_corners=False)
