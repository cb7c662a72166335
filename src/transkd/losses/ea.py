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
    """Add an assistant embedding at the teacher's width to the student's patch embeddings, then compare.

    ``Σ_i w_i · MSE(u_i · Linear_i(E_i) + v_i · M_i, E_i^t)``, where M_1 is a patch embedding of the image (7×7,
    stride 4) and M_i one of the student's features of stage i − 1 (3×3, stride 2). u and v are trained, initialised
    with 0.1, 0.2, … and 0.5, 0.6, …

    Source: TransKD, arXiv 2202.13393, its section on the Embedding Assistant.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stage_weights: w, one per stage.

    Shapes:
        Image [B, 3, H, W], features [B, C_i, H_i, W_i] and embeddings [B, N_i, C_i], floating, to a scalar,
        float32 or float64. `target` is not used.

    Raises:
        UserError: the number of weights is not that of the stages, a network has no patch embeddings or other stages or
            channels than given, or the student's strides are not 4, 8, 16, 32.

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
        input_channels = (3, *self.student_channels)
        for index, (width, teacher_width) in enumerate(zip(self.student_channels, self.teacher_channels, strict=True)):
            kernel_size, stride = (7, 4) if index == 0 else (3, 2)
            self.projections[str(index + 1)] = TokenLinear(width, teacher_width)
            self.assistants[str(index + 1)] = OverlapPatchEmbedding(
                input_channels[index], teacher_width, kernel_size, stride
            )
        self.assistants.apply(init_vision_weights)
        self.student_share = nn.Parameter(torch.arange(1, count + 1) / 10)  # u = 0.1, 0.2, …
        self.assistant_share = nn.Parameter(torch.arange(5, count + 5) / 10)  # v = 0.5, 0.6, …

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's assisted embeddings with the teacher's embeddings."""
        pairs = stage_pairs(self, "embeddings", student, teacher)
        assisted = self.assist(student)
        losses = [
            weight * mean_squared_error(tokens, teacher_tokens)
            for weight, tokens, (_, teacher_tokens) in zip(self.stage_weights, assisted, pairs, strict=True)
        ]
        return torch.stack(losses).sum()

    def assist(self, student: SegmentationOutput) -> tuple[Tensor, ...]:
        """Return u · Linear(E) + v · M of each stage: [B, N_i, C_i of the teacher]."""
        inputs = (student.image, *student.features[:-1])
        assisted = []
        for index, (source, tokens) in enumerate(zip(inputs, student.embeddings, strict=True)):
            projected = self.projections[str(index + 1)](tokens)
            assistant, grid = self.assistants[str(index + 1)](source)
            _check_grid(index + 1, grid, projected.shape[1])
            # slices of shape [1], not scalars: they promote the sum to float32 under autocast
            u, v = self.student_share[index : index + 1], self.assistant_share[index : index + 1]
            assisted.append(u * projected + v * assistant)
        return tuple(assisted)


def _check_grid(stage: int, grid: tuple[int, int], tokens: int) -> None:
    if grid[0] * grid[1] != tokens:
        raise UserError(
            f"EALoss requires a student with strides 4, 8, 16, 32: at stage {stage} it makes "
            f"{grid[0]} x {grid[1]} tokens, but the student has {tokens}. "
            "Choose such a student, or the term pea."
        )
