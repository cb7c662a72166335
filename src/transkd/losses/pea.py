"""Patch Embedding Alignment: embedding distillation of TransKD."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.layers.token_linear import TokenLinear
from transkd.losses.shared.checks import check_stages, paired_channels, stage_pairs
from transkd.losses.shared.distances import mean_squared_error
from transkd.outputs import SegmentationOutput

__all__ = ["DEFAULT_STAGE_WEIGHTS", "PEALoss"]

DEFAULT_STAGE_WEIGHTS = (0.1, 0.1, 0.5, 1.0)
"""Published weights of stages 1 to 4."""


class PEALoss(nn.Module):
    """Mean squared error between the student's projected patch embeddings and the teacher's.

    ``Σ_i w_i · MSE(Linear_i(E_i), E_i^t)`` over the selected stages.

    Source: TransKD, arXiv 2202.13393, its section on Patch Embedding Alignment.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stages: stages to compare, counted from 1.
        stage_weights: one weight per selected stage; None uses 0.1, 0.1, 0.5 and 1 for stages 1 to 4.

    Shapes:
        Embeddings [B, N_i, C_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: a stage does not exist, the number of weights is not that of the stages, or a network has no patch
            embeddings or other stages or channels than given.

    Example:
        >>> def output(widths):
        ...     tokens = tuple(torch.rand(2, 64 // 4**i, c) for i, c in enumerate(widths))
        ...     return SegmentationOutput(None, (), tokens, torch.rand(2, 3, 32, 32))
        >>> term = PEALoss(student_channels=(8, 16), teacher_channels=(12, 24), stages=(1, 2))
        >>> term(output((8, 16)), output((12, 24))).shape
        torch.Size([])
    """

    needs = frozenset({"embeddings"})

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = (1, 2, 3, 4),
        stage_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        stages = check_stages(self, stages, len(self.student_channels))
        self.stage_weights = _weights_by_stage(stages, stage_weights)
        self.projections = nn.ModuleDict(
            {
                str(stage): TokenLinear(self.student_channels[stage - 1], self.teacher_channels[stage - 1])
                for stage in self.stage_weights
            }
        )

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's projected embeddings with the teacher's."""
        pairs = stage_pairs(self, "embeddings", student, teacher)
        losses = []
        for stage, weight in self.stage_weights.items():
            tokens, teacher_tokens = pairs[stage - 1]
            losses.append(weight * mean_squared_error(self.projections[str(stage)](tokens), teacher_tokens))
        return torch.stack(losses).sum()


def _weights_by_stage(stages: Sequence[int], weights: Sequence[float] | None) -> dict[int, float]:
    if weights is None:
        if max(stages) > len(DEFAULT_STAGE_WEIGHTS):
            raise UserError(f"PEALoss: stages above 4 have no default weight; set stage_weights for {list(stages)}.")
        weights = [DEFAULT_STAGE_WEIGHTS[stage - 1] for stage in stages]
    if len(weights) != len(stages):
        raise UserError(
            f"PEALoss: stage_weights must give one weight per selected stage; got {len(weights)} weights "
            f"{list(weights)} for {len(stages)} stages {list(stages)}."
        )
    return dict(zip(stages, weights, strict=True))
