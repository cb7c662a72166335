"""Knowledge review: feature distillation with attention-based fusion."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.losses.shared.checks import check_positive, paired_channels, stage_pairs
from transkd.losses.shared.distances import hierarchical_context
from transkd.losses.shared.fusion import ConvNorm, check_normalisable, fuse_from_deepest
from transkd.losses.shared.grids import on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["ReviewKDLoss"]


class ReviewKDLoss(nn.Module):
    """Fuse the student's features from deep to shallow by attention and compare each with the teacher's.

    From the deepest stage to the shallowest, with a residual R of `mid_channels` channels:

        X_i = BN(conv1x1(F_i)),  U = nearest-upsample(R_{i+1})
        (p, q) = sigmoid(conv1x1([X_i ; U])), per position; p + q need not be 1
        R_i = p·X_i + q·U       (the deepest stage: R = X)
        loss = Σ_i hierarchical_context(BN(conv3x3(R_i)), teacher's F_i)

    A map whose size differs from the teacher's is resized to it bilinearly. The reference implementation selects the
    levels of the hierarchical context by the map's height alone and hard-codes square sizes for classification; here
    the shorter side is used and any size works. In distributed training each process uses the batch statistics of its
    own images unless `trainer.sync_batchnorm=true`.

    Source: Chen et al., arXiv 2104.09044, section 3; the fusion is that of its detection code.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        mid_channels: channels of the residual; 64 in TransKD for SegFormer-B0 with a B2 teacher; 256 in the paper's
            detection code, up to 512 in its classification code.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: `mid_channels` is not positive, the outputs have other stages or channels than given, or a batch of
            one has a 1×1 map in training mode.

    Example:
        >>> def output(widths):
        ...     maps = tuple(torch.rand(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(widths))
        ...     return SegmentationOutput(None, maps, (), torch.rand(2, 3, 32, 32))
        >>> term = ReviewKDLoss(student_channels=(8, 16), teacher_channels=(12, 24), mid_channels=16)
        >>> term(output((8, 16)), output((12, 24))).shape
        torch.Size([])
    """

    needs = frozenset({"features"})

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], mid_channels: int = 64
    ) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        check_positive(self, "mid_channels", mid_channels)
        deepest = len(self.student_channels)
        self.stages = nn.ModuleDict(
            {
                str(stage): _FusionStage(channels, target_channels, mid_channels, attends=stage < deepest)
                for stage, (channels, target_channels) in enumerate(
                    zip(self.student_channels, self.teacher_channels, strict=True), start=1
                )
            }
        )

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's fused features with the teacher's features."""
        features, teacher_features = zip(*stage_pairs(self, "features", student, teacher), strict=True)
        pairs = [on_grid(self, *pair) for pair in zip(self.fuse(features), teacher_features, strict=True)]
        return torch.stack([hierarchical_context(*pair) for pair in pairs]).sum()

    def fuse(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps to compare, [B, C_i of the teacher, H_i, W_i], shallowest first."""
        return fuse_from_deepest(self.stages.values(), features)


class _FusionStage(nn.Module):
    """One stage: maps the student's feature F_i and the residual R_{i+1} to R_i and BN(conv3x3(R_i))."""

    def __init__(self, channels: int, target_channels: int, mid_channels: int, *, attends: bool) -> None:
        super().__init__()
        self.reduce = _conv_norm(channels, mid_channels, kernel_size=1)
        self.expand = _conv_norm(mid_channels, target_channels, kernel_size=3)
        if attends:
            self.attention = nn.Conv2d(2 * mid_channels, 2, 1)

    def forward(self, feature: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fuse [B, C_i, H_i, W_i] with the deeper stage's residual [B, mid, H_{i+1}, W_{i+1}]."""
        check_normalisable("ReviewKDLoss", self, feature)
        reduced: Tensor = self.reduce(feature)
        if residual is not None:
            upsampled = F.interpolate(residual, size=reduced.shape[-2:], mode="nearest")
            p, q = self.attention(torch.cat((reduced, upsampled), 1)).sigmoid().split(1, dim=1)
            reduced = p * reduced + q * upsampled
        return reduced, self.expand(reduced)


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> ConvNorm:
    layer = ConvNorm(in_channels, out_channels, kernel_size)
    nn.init.kaiming_uniform_(layer.conv.weight, a=1)
    return layer
