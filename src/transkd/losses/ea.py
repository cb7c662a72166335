"""Embedding Assistant: embedding distillation of TransKD-EA."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.layers.patch_embedding import OverlapPatchEmbedding, init_vision_weights
from transkd.layers.token_linear import TokenLinear
from transkd.losses.pea import DEFAULT_STAGE_WEIGHTS
from transkd.losses.shared.checks import paired_channels, stage_pairs
from transkd.losses.shared.distances import mean_squared_error
from transkd.outputs import SegmentationOutput

__all__ = ["EALoss"]


class EALoss(nn.Module):
    """Help the student's patch embeddings with a second embedding at the teacher's width before comparing.

    ``Σ_i w_i · MSE(u_i · Linear_i(E_i) + v_i · M_i, E_i^t)``, where M_1 embeds the image (7×7, stride 4) and
    M_i the student's features of stage i − 1 (3×3, stride 2). u and v are learnt; they start at 0.1, 0.2, …
    and 0.5, 0.6, …

    Source: TransKD, arXiv 2202.13393, its section on the Embedding Assistant.

    Args:
        student_channels: channels of each of the student's stages, shallowest first.
        teacher_channels: channels of each of the teacher's stages.
        stage_weights: w, one per stage.

    Shapes:
        Image [B, 3, H, W], features [B, C_i, H_i, W_i] and embeddings [B, N_i, C_i], floating, to a scalar,
        float32 or float64. `target` is not read.

    Raises:
        UserError: weights that do not fit the stages, networks without patch embeddings, with stages or
            channels other than those given, or a student whose strides are not 4, 8, 16, 32.

    Example:
        >>> def output(widths):
        ...     maps = tuple(torch.rand(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(widths))
        ...     tokens = tuple(m.flatten(2).mT for m in maps)
        ...     return SegmentationOutput(None, maps, tokens, torch.rand(2, 3, 32, 32))
        >>> term = EALoss(student_channels=(8, 16), teacher_channels=(12, 24), stage_weights=(0.5, 1.0))
        >>> term(output((8, 16)), output((12, 24))).shape
        torch.Size([])
    """

    needs = frozenset({"embeddings"})

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stage_weights: Sequence[float] = DEFAULT_STAGE_WEIGHTS,
    ) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        count = len(self.student_channels)
        if len(stage_weights) != count:
            raise UserError(
                f"EALoss: stage_weights must give one weight per stage; got {len(stage_weights)} weights "
                f"{list(stage_weights)} for {count} stages."
            )
        self.stage_weights = tuple(stage_weights)
        self.projections = nn.ModuleDict()
        self.assistants = nn.ModuleDict()
        below = (3, *self.student_channels)
        for index, (own, other) in enumerate(zip(self.student_channels, self.teacher_channels, strict=True)):
            kernel_size, stride = (7, 4) if index == 0 else (3, 2)
            self.projections[str(index + 1)] = TokenLinear(own, other)
            self.assistants[str(index + 1)] = OverlapPatchEmbedding(below[index], other, kernel_size, stride)
        self.assistants.apply(init_vision_weights)
        self.student_share = nn.Parameter(torch.arange(1, count + 1) / 10)  # u = 0.1, 0.2, …
        self.assistant_share = nn.Parameter(torch.arange(5, count + 5) / 10)  # v = 0.5, 0.6, …

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's assisted embeddings with the teacher's."""
        pairs = stage_pairs(self, "embeddings", student, teacher)
        assisted = self.assist(student)
        losses = [
            weight * mean_squared_error(mine, other)
            for weight, mine, (_, other) in zip(self.stage_weights, assisted, pairs, strict=True)
        ]
        return torch.stack(losses).sum()

    def assist(self, student: SegmentationOutput) -> tuple[Tensor, ...]:
        """Give u · Linear(E) + v · M of each stage: [B, N_i, C_i of the teacher]."""
        inputs = (student.image, *student.features[:-1])
        assisted = []
        for index, (below, tokens) in enumerate(zip(inputs, student.embeddings, strict=True)):
            projected = self.projections[str(index + 1)](tokens)
            helper, grid = self.assistants[str(index + 1)](below)
            _check_grid(index + 1, grid, projected.shape[1])
            # a slice keeps its dimension, and with it the sum is float32 under autocast
            u, v = self.student_share[index : index + 1], self.assistant_share[index : index + 1]
            assisted.append(u * projected + v * helper)
        return tuple(assisted)


def _check_grid(stage: int, grid: tuple[int, int], tokens: int) -> None:
    if grid[0] * grid[1] != tokens:
        raise UserError(
            f"EALoss assists students with strides 4, 8, 16, 32: at stage {stage} it makes "
            f"{grid[0]} x {grid[1]} tokens, but the student has {tokens}. "
            "Choose such a student, or the term pea."
        )
