"""Masked generative distillation of features."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.adapters import as_weights
from transkd.losses.shared.checks import check_choice, check_positive, check_stages, paired_channels, stage_pairs
from transkd.losses.shared.distances import widen
from transkd.losses.shared.grids import on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["MGDLoss", "draw_mask", "generation_error"]

MASKS = ("spatial", "channel")
REDUCTIONS = ("sum", "mean")


class MGDLoss(nn.Module):
    """Mask part of the student's features and generate the teacher's features from the rest.

    ``α / B · Σ (G(A(F) · M) − F^t)²`` over channels and positions, summed over the stages. A is a 1×1 convolution,
    omitted where both have the same channels; G is conv3x3, ReLU, conv3x3; M is 0 with probability `mask_ratio` and
    else 1, sampled at each call, also in eval mode, with torch's global generator. Unmasked features are not rescaled.
    Maps of another size are resized bilinearly to the teacher's; the reference implementation requires equal sizes. In
    distributed training each process samples M for its own images, so the masks differ from those of one process with
    the joined batch.

    The sum grows with channels and positions: α = 2e-5 is published for 2048 channels of 64×64 positions, where the
    value is 168 times the mean. Smaller maps need a larger α (512 channels of 16×16: 1.3e-3 for the same factor), or
    `reduction` "mean" with an α of about 168.

    Source: Yang et al., arXiv 2205.01529, section 3.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stages: stages to compare, counted from 1.
        mask: "spatial" masks positions in all channels, as for segmentation and detection, "channel" masks whole
            channels, as for classification.
        mask_ratio: probability of being masked, from 0 to 1; in the paper 0.75 for segmentation, 0.65 for detection and
            0.15 for classification.
        alpha: α > 0, applied with either reduction; in the paper 2e-5, and 7e-5 for classification.
        reduction: "sum" over channels and positions, as published, or their "mean", which is independent of the map
            size.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: a stage does not exist, the mask or reduction is unknown, `mask_ratio` is outside [0, 1], α is not
            positive, or the networks have other stages or channels than given.

    Example:
        >>> def output(widths):
        ...     maps = tuple(torch.rand(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(widths))
        ...     return SegmentationOutput(None, maps, (), torch.rand(2, 3, 32, 32))
        >>> term = MGDLoss(student_channels=(8, 16), teacher_channels=(12, 24), stages=(2,))
        >>> term(output((8, 16)), output((12, 24))).shape
        torch.Size([])
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = (4,),
        mask: str = "spatial",
        mask_ratio: float = 0.75,
        alpha: float = 2e-5,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        self.stages = check_stages(self, stages, len(self.student_channels))
        check_choice(self, "mask", mask, MASKS)
        check_choice(self, "reduction", reduction, REDUCTIONS)
        if not 0 <= mask_ratio <= 1:
            raise UserError(f"MGDLoss: mask_ratio is a probability from 0 to 1; got {mask_ratio}.")
        check_positive(self, "alpha", alpha)
        self.mask, self.mask_ratio, self.alpha, self.reduction = mask, mask_ratio, alpha, reduction
        widths = {str(i): (self.student_channels[i - 1], self.teacher_channels[i - 1]) for i in self.stages}
        self.align = nn.ModuleDict(
            {stage: nn.Conv2d(*pair, 1) if pair[0] != pair[1] else nn.Identity() for stage, pair in widths.items()}
        )
        self.generators = nn.ModuleDict({stage: _generator(width) for stage, (_, width) in widths.items()})

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the features generated from the student's masked features with the teacher's."""
        pairs = stage_pairs(self, "features", student, teacher)
        losses = []
        for stage, align in self.align.items():
            feature, teacher_feature = pairs[int(stage) - 1]
            aligned, teacher_feature = on_grid(self, align(feature), teacher_feature)
            mask = draw_mask(aligned, self.mask, self.mask_ratio)
            generator = self.generators[stage]
            losses.append(generation_error(aligned, teacher_feature, generator, mask=mask, reduction=self.reduction))
        return self.alpha * torch.stack(losses).sum()


def generation_error(
    student: Tensor,
    teacher: Tensor,
    generator: Callable[[Tensor], Tensor],
    *,
    mask: Tensor,
    reduction: str = "sum",
) -> Tensor:
    """Squared error between ``generator(student · mask)`` and the teacher's features, without α.

    Args:
        student: [B, C, h, w], with the teacher's channels and size, at least float32.
        teacher: [B, C, h, w], at least float32; detached.
        generator: [B, C, h, w] to [B, C, h, w].
        mask: 0 for masked, 1 for kept; [B, 1, h, w] or [B, C, 1, 1].
        reduction: "sum" over channels and positions, averaged over images, or "mean" over all elements.

    Example:
        >>> pair = torch.full((2, 3, 4, 4), 2.0), torch.zeros(2, 3, 4, 4)
        >>> generation_error(*pair, torch.nn.Identity(), mask=torch.ones(2, 1, 4, 4))  # 2² · 3 · 4 · 4
        tensor(192.)
    """
    error = F.mse_loss(widen(_generated(generator, student * mask)), teacher.detach(), reduction=reduction)
    return error / len(teacher) if reduction == "sum" else error


def _generated(generator: Callable[[Tensor], Tensor], masked: Tensor) -> Tensor:
    return generator(as_weights(generator, masked) if isinstance(generator, nn.Module) else masked)


def draw_mask(features: Tensor, kind: str, ratio: float) -> Tensor:
    """Sample a mask for features [B, C, h, w], 0 with probability `ratio` and else 1.

    Returns:
        [B, 1, h, w] for kind "spatial", [B, C, 1, 1] for "channel".

    Example:
        >>> draw_mask(torch.zeros(2, 3, 4, 5), "spatial", 0.75).shape
        torch.Size([2, 1, 4, 5])
    """
    batch, channels, height, width = features.shape
    if kind == "spatial":
        kept = torch.rand(batch, 1, height, width, device=features.device) <= 1 - ratio
    else:
        kept = torch.rand(batch, channels, 1, 1, device=features.device) >= ratio
    return kept.to(features.dtype)


def _generator(channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, channels, 3, padding=1),
            relu=nn.ReLU(),
            conv2=nn.Conv2d(channels, channels, 3, padding=1),
        )
    )
