"""Cross Selective Fusion: feature distillation of TransKD."""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.losses.shared.checks import paired_channels, stage_pairs
from transkd.losses.shared.distances import map_criterion
from transkd.losses.shared.fusion import ConvNorm, check_normalisable, fuse_from_deepest
from transkd.losses.shared.grids import on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["CSFLoss"]

logger = logging.getLogger("transkd.losses")


class CSFLoss(nn.Module):
    """Fuse the student's features from deep to shallow and compare each with the teacher's.

    From the deepest stage to the shallowest, with a residual R of `mid_channels`:

        X_i = BN(conv1x1(F_i)),  U = nearest-upsample(R_{i+1}),  z = mean over positions of (X_i + U)
        (p, q) = softmax over the two of (conv1x1(a), conv1x1(a)),  a = ReLU(BN(conv1x1(z)))
        R_i = p·X_i + q·U       (the deepest stage: R = X)
        loss = Σ_i criterion(BN(conv3x3(R_i)), teacher's F_i)

    A map whose size differs from the teacher's is resized to it bilinearly, which is logged once. With a
    batch of one, the normalisation of z sees a single value per channel, so it uses its running statistics.
    Each of several processes normalises by the statistics of its own images alone, unless
    `trainer.sync_batchnorm=true` synchronises them.

    Source: TransKD, arXiv 2202.13393, its section on Cross Selective Fusion.

    Args:
        student_channels: channels of each of the student's stages, shallowest first.
        teacher_channels: channels of each of the teacher's stages.
        mid_channels: width of the residual.
        criterion: distance between maps: "hierarchical_context", "channel_kl" or "spatial_kl".
        temperature: of the two KLs.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not read.

    Raises:
        UserError: an unknown criterion; stages or channels other than those given; in training, a batch of
            one with a 1×1 map.

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
        self._told_of_resizing = False

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the student's fused features with the teacher's features."""
        own, others = zip(*stage_pairs(self, "features", student, teacher), strict=True)
        fused = self.fuse(own)
        losses = [self.criterion(self._resized(a, b), b) for a, b in zip(fused, others, strict=True)]
        return torch.stack(losses).sum()

    def fuse(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Give the maps that are compared, [B, C_i of the teacher, H_i, W_i], shallowest first."""
        return fuse_from_deepest(self.stages.values(), features)

    def _resized(self, fused: Tensor, teacher: Tensor) -> Tensor:
        if fused.shape[-2:] == teacher.shape[-2:]:
            return fused
        if not self._told_of_resizing:
            logger.warning(
                "CSFLoss: stage sizes differ (student %s, teacher %s, height and width); "
                "the student's maps are resized bilinearly to the teacher's.",
                tuple(fused.shape[-2:]),
                tuple(teacher.shape[-2:]),
            )
            self._told_of_resizing = True
        return on_grid(self, fused, teacher)[0]


class _FusionStage(nn.Module):
    """One stage: the student's map and the deeper residual to the own residual and the map to compare."""

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
            residual = F.interpolate(residual, size=reduced.shape[-2:], mode="nearest")
            reduced = self._select(reduced, residual)
        return reduced, self.expand(reduced)

    def _select(self, reduced: Tensor, residual: Tensor) -> Tensor:
        pooled = _position_mean(reduced + residual)
        squeezed = _squeeze(self.squeeze, pooled)
        scores = torch.stack((self.student_branch(squeezed), self.residual_branch(squeezed)))
        keep, take = scores.softmax(0).unbind()
        return keep * reduced + take * residual


def _squeeze(layer: ConvNorm, pooled: Tensor) -> Tensor:
    """Apply a layer to [B, C, 1, 1]; a batch of one has no statistics of its own to normalise with."""
    if len(pooled) > 1:
        return F.relu(layer(pooled))
    norm, convolved = layer.norm, layer.conv(pooled)
    normalised = F.batch_norm(convolved, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return F.relu(normalised)


def _position_mean(maps: Tensor) -> Tensor:
    """``maps.mean((2, 3), keepdim=True)``, whose own gradient is not laid out as the maps are: adding it is slow."""
    wide = torch.promote_types(maps.dtype, torch.float32)  # a sum of many halves has no place in a half
    return (maps.sum((2, 3), keepdim=True, dtype=wide) / maps[0, 0].numel()).to(maps.dtype)
