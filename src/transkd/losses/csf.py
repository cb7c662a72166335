"""Cross Selective Fusion: feature distillation of TransKD."""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import paired_channels, stage_pairs
from transkd.losses.shared.distances import map_criterion, position_mean
from transkd.losses.shared.fusion import ConvNorm, check_normalisable, fuse_from_deepest
from transkd.losses.shared.grids import on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["CSFLoss"]

logger = logging.getLogger("transkd.losses")


class CSFLoss(nn.Module):
    """Fuse the student's features from deep to shallow and compare each fused map with the teacher's features.

    From the deepest stage to the shallowest, with a residual R of `mid_channels` channels:

        X_i = BN(conv1x1(F_i)),  U = nearest-upsample(R_{i+1}),  z = mean over positions of (X_i + U)
        (p, q) = softmax over the two of (conv1x1(a), conv1x1(a)),  a = ReLU(BN(conv1x1(z)))
        R_i = p·X_i + q·U       (the deepest stage: R = X)
        loss = Σ_i criterion(BN(conv3x3(R_i)), teacher's F_i)

    A map whose size differs from the teacher's is resized to it bilinearly; this is logged once. With a batch of one,
    the batch normalisation of z would see a single value per channel, so it uses its running statistics instead. In
    distributed training each process uses the batch statistics of its own images unless
    `trainer.sync_batchnorm=true`.

    Source: TransKD, arXiv 2202.13393, its section on Cross Selective Fusion.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        mid_channels: channels of the residual.
        criterion: distance between maps: "hierarchical_context", "channel_kl" or "spatial_kl".
        temperature: τ of the two KL divergences.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: the criterion is unknown, the outputs have other stages or channels than given, or a batch of one has
            a 1×1 map in training mode.

    Example:
        >>> def output(widths):
        ...     maps = tuple(torch.rand(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(widths))
        ...     return SegmentationOutput(None, maps, (), torch.rand(2, 3, 32, 32))
        >>> term = CSFLoss(student_channels=(8, 16), teacher_channels=(12, 24), mid_channels=16)
        >>> term(output((8, 16)), output((12, 24))).shape
        torch.Size([])
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        mid_channels: int = 64,
        criterion: str = "hierarchical_context",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if mid_channels < 1:
            raise UserError(f"CSFLoss: mid_channels must be at least 1, got {mid_channels}")
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        self.criterion = map_criterion(criterion, temperature)
        deepest = len(self.student_channels)
        self.stages = nn.ModuleDict(
            {
                str(stage): _FusionStage(channels, target_channels, mid_channels, selects=stage < deepest)
                for stage, (channels, target_channels) in enumerate(
                    zip(self.student_channels, self.teacher_channels, strict=True), start=1
                )
            }
        )
        self._resizing_logged = False

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's fused features with the teacher's features."""
        features, teacher_features = zip(*stage_pairs(self, "features", student, teacher), strict=True)
        pairs = zip(self.fuse(features), teacher_features, strict=True)
        losses = [self.criterion(self._resized(fused, target_map), target_map) for fused, target_map in pairs]
        return torch.stack(losses).sum()

    def fuse(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps to compare, [B, C_i of the teacher, H_i, W_i], shallowest first."""
        return fuse_from_deepest(self.stages.values(), features)

    def _resized(self, fused: Tensor, teacher: Tensor) -> Tensor:
        if fused.shape[-2:] == teacher.shape[-2:]:
            return fused
        if not self._resizing_logged:
            logger.warning(
                "CSFLoss: stage sizes differ (student %s, teacher %s, height and width); "
                "the student's maps are resized bilinearly to the teacher's.",
                tuple(fused.shape[-2:]),
                tuple(teacher.shape[-2:]),
            )
            self._resizing_logged = True
        return on_grid(self, fused, teacher)[0]


class _FusionStage(nn.Module):
    """One stage: maps the student's feature F_i and the residual R_{i+1} to R_i and BN(conv3x3(R_i))."""

    def __init__(self, channels: int, target_channels: int, mid_channels: int, *, selects: bool) -> None:
        super().__init__()
        self.reduce = ConvNorm(channels, mid_channels, kernel_size=1)
        self.expand = ConvNorm(mid_channels, target_channels, kernel_size=3)
        for layer in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(layer.conv.weight, a=1)
        if selects:
            squeezed = max(mid_channels // 16, 32)
            self.squeeze = ConvNorm(mid_channels, squeezed, kernel_size=1)
            self.student_branch = nn.Conv2d(squeezed, mid_channels, 1)
            self.residual_branch = nn.Conv2d(squeezed, mid_channels, 1)

    def forward(self, feature: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fuse [B, C_i, H_i, W_i] with the deeper stage's residual [B, mid, H_{i+1}, W_{i+1}]."""
        check_normalisable("CSFLoss", self, feature)
        reduced: Tensor = self.reduce(feature)
        if residual is not None:
            upsampled = F.interpolate(residual, size=reduced.shape[-2:], mode="nearest")
            reduced = self._select(reduced, upsampled)
        return reduced, self.expand(reduced)

    def _select(self, x: Tensor, u: Tensor) -> Tensor:
        """Compute R = p·X + q·U with the channel attention (p, q) of X + U."""
        z = position_mean(x + u)
        a = _squeeze(self.squeeze, z)
        p, q = torch.stack((self.student_branch(a), self.residual_branch(a))).softmax(0).unbind()
        return p * x + q * u


def _squeeze(layer: ConvNorm, pooled: Tensor) -> Tensor:
    """ReLU(BN(conv1x1(z))) of z [B, C, 1, 1]; a batch of one is normalised with the running statistics."""
    if len(pooled) > 1:
        return F.relu(layer(pooled))
    norm, convolved = layer.norm, layer.conv(pooled)
    normalised = F.batch_norm(convolved, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return F.relu(normalised)
