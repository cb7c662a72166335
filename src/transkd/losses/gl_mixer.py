"""Global-Local Context Mixer: embedding distillation of the deepest stage in TransKD-GL."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.layers.token_linear import TokenLinear
from transkd.losses.shared.checks import check_stage, paired_channels, stage_pairs
from transkd.losses.shared.distances import mean_squared_error
from transkd.outputs import SegmentationOutput

__all__ = ["GLMixerLoss"]


class GLMixerLoss(nn.Module):
    """Mix global and local context into the student's patch embedding E, then compare it with the teacher's.

    ``MSE(Linear(α · Attn(E) + β · GLU(E) (+ E)), E^t)``: Attn is multi-head self-attention over all tokens, GLU is
    ``conv(E) · sigmoid(conv(E))`` with 1-d convolutions of kernel size 3 along the tokens in raster order, and α and β
    are trained, initialised with 0.5.

    Source: TransKD, arXiv 2202.13393, its section on the Global-Local Context Mixer.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stage: the stage to compare, counted from 1.
        num_heads: attention heads; must divide the student's channels at that stage.
        residual: whether to add E to the sum.

    Shapes:
        Embeddings [B, N_i, C_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: the stage does not exist, the heads do not divide the channels, or a network has no patch embeddings
            or other stages or channels than given.

    Example:
        >>> def output(width):
        ...     return SegmentationOutput(None, (), (torch.rand(2, 12, width),), torch.rand(2, 3, 12, 16))
        >>> term = GLMixerLoss(student_channels=(16,), teacher_channels=(24,), stage=1, num_heads=4)
        >>> term(output(16), output(24)).shape
        torch.Size([])
    """

    needs = frozenset({"embeddings"})

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stage: int = 4,
        num_heads: int = 8,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        self.stage, self.num_heads, self.residual = stage, num_heads, residual
        channels = self.student_channels[check_stage(self, stage, len(self.student_channels)) - 1]
        if num_heads < 1 or channels % num_heads:
            raise UserError(
                f"GLMixerLoss: num_heads must divide the student's {channels} channels at stage {stage}; "
                f"got {num_heads}."
            )
        self.qkv = TokenLinear(channels, 3 * channels, bias=False)
        self.proj = TokenLinear(channels, channels)
        self.value = nn.Conv1d(channels, channels, 3, padding=1)
        self.gate = nn.Conv1d(channels, channels, 3, padding=1)
        # shape [1], not a scalar: FSDP cannot shard parameters without dimensions
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.beta = nn.Parameter(torch.full((1,), 0.5))
        self.projection = TokenLinear(channels, self.teacher_channels[stage - 1])

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's mixed and projected embedding with the teacher's."""
        tokens, teacher_tokens = stage_pairs(self, "embeddings", student, teacher)[self.stage - 1]
        return mean_squared_error(self.projection(self.mix(tokens)), teacher_tokens)

    def mix(self, tokens: Tensor) -> Tensor:
        """Return α · Attn(E) + β · GLU(E) (+ E) of the student's tokens E [B, N, C], same shape."""
        mixed = self.alpha * self._attend(tokens) + self.beta * self._gated(tokens)
        return mixed + tokens if self.residual else mixed

    def _attend(self, tokens: Tensor) -> Tensor:
        batch, count, channels = tokens.shape
        heads = self.qkv(tokens).view(batch, count, 3, self.num_heads, channels // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, count, channels))

    def _gated(self, tokens: Tensor) -> Tensor:
        sequence = tokens.transpose(1, 2)
        gated: Tensor = self.value(sequence) * self.gate(sequence).sigmoid()
        return gated.transpose(1, 2)
