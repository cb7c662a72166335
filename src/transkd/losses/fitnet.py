"""FitNets: the student's features regress the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transkd.losses.shared.adapters import adapt, stage_adapters
from transkd.losses.shared.checks import check_choice, check_stages, paired_channels, stage_pairs
from transkd.losses.shared.distances import mean_squared_error
from transkd.losses.shared.grids import GRIDS, on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["FitNetLoss"]


class FitNetLoss(nn.Module):
    """Project the student's features to the teacher's width and compare position by position.

    ``Σ_stages mean of (regressor(f_s) − f_t)²`` over images, the teacher's channels and positions.

    Source: Romero et al., arXiv 1412.6550, section 2.2. The paper trains on this hint first and distils afterwards;
    segmentation (CIRKD, whose weight is 10, 1 for SegFormer) adds it to the task's loss from the start, and so do we.

    Args:
        student_channels: channels of each of the student's stages, shallowest first; all of them.
        teacher_channels: channels of each of the teacher's stages; all of them.
        stages: which stages to compare, counted from 1; their values are summed.
        adapter: the regressor: "conv", a 1×1 convolution without bias, also where the channels are equal; None
            compares features of equal channels as they are.
        grid: where to compare: "teacher" resizes the student's features to the teacher's, "student" the teacher's to
            the student's, "labels" both to the labels; bilinear, align_corners=False.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. A target [B, H, W] is read for
        its size alone, for grid "labels".

    Raises:
        UserError: an unknown adapter or grid, stages that do not exist, channels that differ without an adapter, or
            are other than those given, or no labels where they are the grid.

    Example:
        >>> def output(*widths):
        ...     maps = tuple(torch.rand(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(widths))
        ...     return SegmentationOutput(None, maps, (), torch.rand(2, 3, 32, 32))
        >>> term = FitNetLoss(student_channels=(8, 16), teacher_channels=(12, 24), stages=(2,))
        >>> term(output(8, 16), output(12, 24)).shape
        torch.Size([])
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = (4,),
        adapter: str | None = "conv",
        grid: str = "teacher",
    ) -> None:
        super().__init__()
        check_choice(self, "adapter", adapter, ("conv", None))
        check_choice(self, "grid", grid, GRIDS)
        self.grid = grid
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        self.stages = check_stages(self, stages)
        self.adapters = stage_adapters(
            self, adapter, self.stages, self.student_channels, self.teacher_channels, equal_too=True
        )

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's projected features with the teacher's."""
        pairs = stage_pairs(self, "features", student, teacher)
        losses = []
        for stage in self.stages:
            maps, teacher_maps = on_grid(self, *pairs[stage - 1], self.grid, target)
            losses.append(mean_squared_error(adapt(self, self.adapters, stage, maps), teacher_maps))
        return torch.stack(losses).sum()
