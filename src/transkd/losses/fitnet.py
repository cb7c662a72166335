"""FitNets: regression of the teacher's features from the student's."""

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
    """Mean squared error between the student's projected features and the teacher's.

    ``Σ_stages mean of (regressor(f_s) − f_t)²`` over images, the teacher's channels and positions.

    Source: Romero et al., arXiv 1412.6550, section 2.2. The paper trains with this hint first and distils afterwards;
    for segmentation, CIRKD (weight 10, 1 for SegFormer) and this library add it to the task loss from the start.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stages: stages to compare, counted from 1; their values are summed.
        adapter: the regressor: "conv", a 1×1 convolution without bias, also where the channels are equal; None for
            equal channels without a projection.
        grid: size at which to compare: that of the "teacher" features, the "student" features or the "labels"; maps of
            another size are resized bilinearly, align_corners=False.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. For grid "labels" a target
        [B, H, W] gives the size.

    Raises:
        UserError: the adapter or grid is unknown, a stage does not exist, channels differ without an adapter or from
            those given, or labels are missing for grid "labels".

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
