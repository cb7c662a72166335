"""Feature distillation of WeCoLoRA, and the correspondence between its student's and teacher's blocks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_choice, check_stages
from transkd.losses.shared.distances import spatial_kl
from transkd.losses.shared.grids import feature_pairs, on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["WeCoLoRALoss", "copied_blocks", "feature_error", "matched_teacher_blocks"]

DISTANCES = ("mae", "mae_kl")


class WeCoLoRALoss(nn.Module):
    """Compare the features of a student that is a shortened copy of its teacher with the teacher's features.

    ``mean |F − F^t|``, or with distance "mae_kl" ``½ (mean |F − F^t| + KL(softmax_C(F^t) ‖ softmax_C(F)))``, the KL
    averaged over positions; the mean over several stages. No parameters: the student has the teacher's widths.

    The method first builds the student: it copies every r-th block of each stage (`copied_blocks`), freezes the copied
    weights and trains low-rank adapters (``transkd.models.lora``). ``distill=wecolora`` applies the complete method.

    The paper compares the output of the last block before the final norm or, as an option, the output of each student
    block with that of the last teacher block it replaces (`matched_teacher_blocks`). Networks here return stages after
    the stage's norm, which is copied too: the last stage corresponds to the former, all `stages` approximate the
    latter. The reference implementation passes log-probabilities where the KL expects probabilities, and returns NaN.

    Source: Grigore et al., arXiv 2404.09326.

    Args:
        stages: stages to compare, counted from 1.
        distance: "mae" or "mae_kl".

    Shapes:
        Stage features [B, C_i, H_i, W_i] with the same channels in both networks, floating, to a scalar, float32 or
        float64. The student's maps are resized bilinearly to the teacher's where sizes differ. `target` is not used.

    Raises:
        UserError: the distance is unknown, a stage does not exist, or the networks' channels differ.

    Example:
        >>> def output(value):
        ...     return SegmentationOutput(None, (torch.full((2, 8, 4, 6), value),), (), torch.rand(2, 3, 16, 24))
        >>> WeCoLoRALoss(stages=(1,))(output(1.0), output(3.0))
        tensor(2.)
    """

    needs = frozenset({"features"})

    def __init__(self, stages: Sequence[int] = (4,), distance: str = "mae") -> None:
        super().__init__()
        check_choice(self, "distance", distance, DISTANCES)
        self.stages, self.distance = check_stages(self, stages), distance

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the features."""
        losses = []
        for stage, pair in zip(self.stages, feature_pairs(self, self.stages, student, teacher), strict=True):
            widths = pair[0].shape[1], pair[1].shape[1]
            if widths[0] != widths[1]:
                raise UserError(
                    f"WeCoLoRALoss compares a student with the teacher that it is copied from; stage {stage} has "
                    f"{widths[0]} channels in the student and {widths[1]} in the teacher. Choose a teacher of the same "
                    "widths, such as segformer_b2 for segformer_b1, or a term that projects, such as csf."
                )
            losses.append(feature_error(*on_grid(self, *pair), self.distance))
        return torch.stack(losses).mean()


def feature_error(student: Tensor, teacher: Tensor, distance: str = "mae") -> Tensor:
    """Mean absolute difference of two maps; for "mae_kl" averaged with `spatial_kl` between them.

    Args:
        student: [B, C, …], float32 or float64.
        teacher: the same shape; detached.
        distance: "mae" or "mae_kl".

    Example:
        >>> feature_error(torch.full((1, 2, 4, 4), 3.0), torch.zeros(1, 2, 4, 4), "mae_kl")  # equal channels: KL is 0
        tensor(1.5000)
    """
    absolute = F.l1_loss(student, teacher.detach())
    return absolute if distance == "mae" else (absolute + spatial_kl(student, teacher)) / 2


def copied_blocks(depth: int, ratio: int) -> list[int]:
    """Indices of the blocks of a stage that a student with ``⌈depth / ratio⌉`` blocks copies.

    Example:
        >>> copied_blocks(6, 2), copied_blocks(3, 2)
        ([0, 2, 4], [0, 2])
    """
    _check_counts(depth, ratio)
    return list(range(0, depth, ratio))


def matched_teacher_blocks(depth: int, ratio: int) -> list[int]:
    """Index of the teacher block whose output each student block is compared with: the last one that it replaces.

    The reference implementation counts from 1 in steps of `ratio`, which is equal only for a ratio of 2.

    Example:
        >>> matched_teacher_blocks(6, 2), matched_teacher_blocks(4, 3)
        ([1, 3, 5], [2, 3])
    """
    return [min(first + ratio, depth) - 1 for first in copied_blocks(depth, ratio)]


def _check_counts(depth: int, ratio: int) -> None:
    if depth < 1 or ratio < 1:
        raise UserError(f"Copying blocks requires a depth and a ratio of 1 or more; got {depth} and {ratio}.")
