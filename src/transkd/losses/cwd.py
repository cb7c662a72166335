"""Channel-wise distillation, of logits and of features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transkd.losses.kd import pixel_kl
from transkd.losses.shared.adapters import adapt, stage_adapters
from transkd.losses.shared.checks import (
    check_choice,
    check_positive,
    check_stages,
    paired_channels,
    stage_pairs,
)
from transkd.losses.shared.distances import channel_kl, mean_squared_error, widen
from transkd.losses.shared.grids import GRIDS, logits_pair, on_grid, valid_on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["CWDFeatureLoss", "CWDLoss", "normalised_distance"]

NORMALISERS = ("channel", "spatial", "channel_mean")


class CWDLoss(nn.Module):
    """`channel_kl` between the logits of two networks: the spatial distribution of each class.

    ``τ² / (B·K) · Σ_b Σ_k KL(softmax_HW(z_t / τ) ‖ softmax_HW(z_s / τ))``, no parameters.

    Source: Shu et al., arXiv 2011.13256, section 3; its weight for logits is 3 at τ = 4 (0.3 for SegFormer in CIRKD).
    Published implementations compute log(softmax), which is infinite for large logits; here log_softmax is used.

    Args:
        temperature: τ > 0; larger values flatten the distributions.
        grid: size at which to compare: that of the "teacher" logits, the "student" logits or the "labels"; logits of
            another size are resized bilinearly, align_corners=False.
        normaliser: "channel" as above; "spatial" is the softmax over the classes at each pixel, as in `KDLoss`;
            "channel_mean" the squared error between the means of each class over the pixels, without τ.
        mask_ignored: exclude ignored pixels; an image with ignored pixels alone contributes 0. False by
            default, as published.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, to a scalar, float32 or float64. A target [B, H, W] is used for
        `mask_ignored` and for grid "labels".

    Raises:
        UserError: the grid or normaliser is unknown, the temperature is not positive, logits or required labels are
            missing, or the networks have different numbers of classes or a single class.

    Example:
        >>> import torch
        >>> output = SegmentationOutput(torch.randn(1, 4, 8, 8), (), (), torch.rand(1, 3, 32, 32))
        >>> CWDLoss(temperature=4.0)(output, output)
        tensor(0.)
    """

    needs = frozenset({"logits"})

    def __init__(
        self,
        temperature: float = 4.0,
        grid: str = "teacher",
        normaliser: str = "channel",
        mask_ignored: bool = False,
    ) -> None:
        super().__init__()
        check_positive(self, "temperature", temperature)
        check_choice(self, "grid", grid, GRIDS)
        check_choice(self, "normaliser", normaliser, NORMALISERS)
        self.temperature, self.grid = temperature, grid
        self.normaliser, self.mask_ignored = normaliser, mask_ignored

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the logits."""
        logits, teacher_logits = logits_pair(self, student, teacher, self.grid, target)
        valid = valid_on_grid(self, target, logits) if self.mask_ignored else None
        return normalised_distance(logits, teacher_logits, self.normaliser, self.temperature, valid)


class CWDFeatureLoss(nn.Module):
    """`channel_kl` between the features of two networks: the spatial distribution of each channel.

    ``Σ_stages τ² / (B·C_t) · Σ_b Σ_c KL(softmax_HW(f_t / τ) ‖ softmax_HW(adapter(f_s) / τ))``, with C_t the
    teacher's channels.

    Source: Shu et al., arXiv 2011.13256, section 3; its weight for features is 50 at τ = 4 (5 for SegFormer in CIRKD).
    CIRKD divides by the student's channels before the adapter: multiply its weights by C_t / C_s for the same
    strength. It also builds an adapter where none is needed, whose parameters get no gradient.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stages: stages to compare, counted from 1; their values are summed.
        adapter: projection of a stage to the teacher's channels where they differ: "conv", a 1×1 convolution without
            bias (CIRKD); "conv_bn_relu", followed by batch normalisation and ReLU (TorchDistiller, TransKD); None if
            the channels are equal.
        temperature: τ > 0; larger values flatten the distributions.
        grid: size at which to compare: that of the "teacher" features, the "student" features or the "labels"; maps of
            another size are resized bilinearly, align_corners=False, before the adapter.
        normaliser: "channel" as above; "spatial" is the softmax over the channels at each position; "channel_mean" the
            squared error between the means of each channel over the positions, without τ.
        mask_ignored: exclude ignored positions; an image with ignored positions alone contributes 0. False by
            default, as published.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. A target [B, H, W] is used for
        `mask_ignored` and for grid "labels".

    Raises:
        UserError: the adapter, grid or normaliser is unknown, the temperature is not positive, a stage does not exist,
            channels differ without an adapter or from those given, required labels are missing, or "conv_bn_relu" gets
            a batch of one with a 1×1 map in training mode.

    Example:
        >>> def output(*widths):
        ...     maps = tuple(torch.rand(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(widths))
        ...     return SegmentationOutput(None, maps, (), torch.rand(2, 3, 32, 32))
        >>> term = CWDFeatureLoss(student_channels=(8, 16), teacher_channels=(12, 24), stages=(2,))
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
        temperature: float = 4.0,
        grid: str = "teacher",
        normaliser: str = "channel",
        mask_ignored: bool = False,
    ) -> None:
        super().__init__()
        check_positive(self, "temperature", temperature)
        check_choice(self, "grid", grid, GRIDS)
        check_choice(self, "normaliser", normaliser, NORMALISERS)
        self.temperature, self.grid = temperature, grid
        self.normaliser, self.mask_ignored = normaliser, mask_ignored
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        self.stages = check_stages(self, stages)
        self.adapters = stage_adapters(self, adapter, self.stages, self.student_channels, self.teacher_channels)

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the features of the selected stages."""
        pairs = stage_pairs(self, "features", student, teacher)
        losses = []
        for stage in self.stages:
            maps, teacher_maps = on_grid(self, *pairs[stage - 1], self.grid, target)
            adapted = adapt(self, self.adapters, stage, maps)
            valid = valid_on_grid(self, target, maps) if self.mask_ignored else None
            losses.append(normalised_distance(adapted, teacher_maps, self.normaliser, self.temperature, valid))
        return torch.stack(losses).sum()


def normalised_distance(
    student: Tensor,
    teacher: Tensor,
    normaliser: str = "channel",
    temperature: float = 4.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Distance between two maps under one of CWD's normalisers.

    Args:
        student: [B, C, h, w], floating.
        teacher: [B, C, h, w]; detached.
        normaliser: "channel" is `channel_kl`, "spatial" `pixel_kl`, "channel_mean" the mean squared error between the
            channels' means over the positions.
        temperature: τ > 0; not used by "channel_mean".
        valid: bool [B, h, w], positions to include; None includes all.

    Returns:
        A scalar, float32 or float64.

    Example:
        >>> peak, flat = torch.tensor([[[[0.0, 1000.0]]]]), torch.zeros(1, 1, 1, 2)
        >>> normalised_distance(peak, flat, "channel_mean")  # 500²
        tensor(250000.)
    """
    student, teacher = widen(student), widen(teacher)
    if normaliser == "channel_mean":
        return mean_squared_error(_means(student, valid), _means(teacher, valid))
    if normaliser == "spatial":
        return pixel_kl(student, teacher, temperature, valid)
    if valid is not None:
        student, teacher = (_masked(maps, valid, temperature) for maps in (student, teacher))
    return channel_kl(student, teacher, temperature)


def _masked(maps: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Exclude positions from a softmax over the positions.

    The fill value gives a probability of exactly 0 and stays finite after the division by τ: −∞ would give 0·(∞ − ∞)
    in the KL divergence.
    """
    lowest = torch.finfo(maps.dtype).min * min(temperature, 1.0) / 2
    return maps.masked_fill(~valid[:, None], lowest)


def _means(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid positions [B, C], 0 for an image without one."""
    if valid is None:
        return maps.mean(dim=(2, 3))
    count = valid.sum(dim=(1, 2)).clamp_min(1)
    return maps.masked_fill(~valid[:, None], 0).sum(dim=(2, 3)) / count[:, None]
