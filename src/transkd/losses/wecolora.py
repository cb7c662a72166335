"""Feature distillation of WeCoLoRA, and which blocks its student copies and answers for."""

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
    """Compare the features of a student with those of the teacher of which it is a shortened copy.

    ``mean |F − F^t|``, or with distance "mae_kl" ``½ (mean |F − F^t| + KL(softmax_C(F^t) ‖ softmax_C(F)))``, the KL a
    mean over positions; with several stages their mean. No parameters: the student has the teacher's widths.

    The method is a way to build the student first: it keeps every r-th block of each stage (`copied_blocks`), all
    copied weights are frozen, and low-rank terms beside them are trained (``transkd.models.lora``).
    ``distill=wecolora`` is all of it.

    The publication compares the output of the last block before the final norm, or, as an option, of each block with
    the last one of those that it stands for (`matched_teacher_blocks`). Networks show their stages here, after the
    stage's norm, which is copied too: the last stage is the former, and `stages` with all of them the nearest to the
    latter, each stage a block. The published KL takes log-probabilities for probabilities and gives NaN.

    Source: Grigore et al., arXiv 2404.09326.

    Args:
        stages: which stages to compare, counted from 1.
        distance: "mae" or "mae_kl".

    Shapes:
        Stage features [B, C_i, H_i, W_i] of as many channels in both, floating, to a scalar, float32 or float64. The
        student's maps are resized bilinearly to the teacher's where sizes differ. `target` is not read.

    Raises:
        UserError: an unknown distance, networks without these stages, or of other widths than each other.

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
    """Mean absolute difference of two maps, averaged with the KL between their channels for "mae_kl".

    Args:
        student: [B, C, …], float32 or float64.
        teacher: the same shape; a constant.
        distance: "mae" or "mae_kl".

    Example:
        >>> feature_error(torch.full((1, 2, 4, 4), 3.0), torch.zeros(1, 2, 4, 4), "mae_kl")  # channels alike: KL is 0
        tensor(1.5000)
    """
    absolute = F.l1_loss(student, teacher.detach())
    return absolute if distance == "mae" else (absolute + spatial_kl(student, teacher)) / 2


def copied_blocks(depth: int, ratio: int) -> list[int]:
    """Which of a stage's blocks, counted from 0, a student of ``⌈depth / ratio⌉`` blocks copies.

    Example:
        >>> copied_blocks(6, 2), copied_blocks(3, 2)
        ([0, 2, 4], [0, 2])
    """
    _check_counts(depth, ratio)
    return list(range(0, depth, ratio))


def matched_teacher_blocks(depth: int, ratio: int) -> list[int]:
    """For each block of the student, the last of the teacher's that it stands for: the one to compare its output with.

    The published code counts from 1 in steps of `ratio`, which is this for a ratio of 2 alone.

    Example:
        >>> matched_teacher_blocks(6, 2), matched_teacher_blocks(4, 3)
        ([1, 3, 5], [2, 3])
    """
    return [min(first + ratio, depth) - 1 for first in copied_blocks(depth, ratio)]


def _check_counts(depth: int, ratio: int) -> None:
    if depth < 1 or ratio < 1:
        raise UserError(f"Blocks are copied from a depth and at a ratio of 1 or more; got {depth} and {ratio}.")
