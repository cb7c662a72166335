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
    require_target,
    stage_pairs,
)
from transkd.losses.shared.distances import channel_kl, mean_squared_error, widen
from transkd.losses.shared.grids import GRIDS, labels_on_grid, logits_pair, on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["CWDFeatureLoss", "CWDLoss", "normalised_distance"]

NORMALISERS = ("channel", "spatial", "channel_mean")


class CWDLoss(nn.Module):
    """Compare where in the image each class's logits are large: `channel_kl` between the logits of two networks.

    ``τ² / (B·K) · Σ_b Σ_k KL(softmax_HW(z_t / τ) ‖ softmax_HW(z_s / τ))``, no parameters of its own.

    Source: Shu et al., arXiv 2011.13256, section 3; its weight for logits is 3 at τ = 4 (0.3 for SegFormer in CIRKD).
    Published codes take log(softmax), infinite for large logits; here it is a log-soft-max.

    Args:
        temperature: τ > 0; a larger one flattens the distributions.
        grid: where to compare: "teacher" resizes the student's logits to the teacher's, "student" the teacher's to the
            student's, "labels" both to the labels; bilinear, align_corners=False.
        normaliser: what is compared: "channel" as above; "spatial" the soft-max over the classes at each pixel, which
            is `KDLoss`; "channel_mean" each class's mean over the pixels, by squared error and without τ.
        mask_ignored: leave out the pixels without a label, as if they were not there; an image without any labelled
            pixel adds 0. Off by default, as published.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, to a scalar, float32 or float64. A target [B, H, W] is read for
        `mask_ignored` and for grid "labels".

    Raises:
        UserError: an unknown grid or normaliser, a temperature that is not positive, no logits, no labels where they
            are read, networks with different numbers of classes, or with a single one.

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
        valid = _valid(self, target, logits) if self.mask_ignored else None
        return normalised_distance(logits, teacher_logits, self.normaliser, self.temperature, valid)


class CWDFeatureLoss(nn.Module):
    """Compare where in the image each channel of the teacher's features is large: `channel_kl` between features.

    ``Σ_stages τ² / (B·C_t) · Σ_b Σ_c KL(softmax_HW(f_t / τ) ‖ softmax_HW(adapter(f_s) / τ))``, C_t the teacher's
    channels.

    Source: Shu et al., arXiv 2011.13256, section 3; its weight for features is 50 at τ = 4 (5 for SegFormer in CIRKD).
    CIRKD divides by the student's channels before the adapter: its weights times C_t / C_s have its strength here.
    It also builds the adapter where none is needed, which leaves parameters without a gradient.

    Args:
        student_channels: channels of each of the student's stages, shallowest first; all of them.
        teacher_channels: channels of each of the teacher's stages; all of them.
        stages: which stages to compare, counted from 1; their values are summed.
        adapter: what brings a stage's channels to the teacher's where they differ: "conv", a 1×1 convolution without
            bias (CIRKD); "conv_bn_relu", with batch normalisation and ReLU behind it (TorchDistiller, TransKD); None
            for channels that are equal.
        temperature: τ > 0; a larger one flattens the distributions.
        grid: where to compare: "teacher" resizes the student's features to the teacher's, "student" the teacher's to
            the student's, "labels" both to the labels; bilinear, align_corners=False, before the adapter.
        normaliser: what is compared: "channel" as above; "spatial" the soft-max over the channels at each position;
            "channel_mean" each channel's mean over the positions, by squared error and without τ.
        mask_ignored: leave out the positions without a label, as if they were not there; an image without any adds 0.
            Off by default, as published.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. A target [B, H, W] is read for
        `mask_ignored` and for grid "labels".

    Raises:
        UserError: an unknown adapter, grid or normaliser, a temperature that is not positive, stages that do not
            exist, channels that differ without an adapter, or are other than those given, no labels where they are
            read; in training, "conv_bn_relu" on a batch of one with a 1×1 map.

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
        """Compare the features of the chosen stages."""
        pairs = stage_pairs(self, "features", student, teacher)
        losses = []
        for stage in self.stages:
            maps, teacher_maps = on_grid(self, *pairs[stage - 1], self.grid, target)
            adapted = adapt(self, self.adapters, stage, maps)
            valid = _valid(self, target, maps) if self.mask_ignored else None
            losses.append(normalised_distance(adapted, teacher_maps, self.normaliser, self.temperature, valid))
        return torch.stack(losses).sum()


def normalised_distance(
    student: Tensor,
    teacher: Tensor,
    normaliser: str = "channel",
    temperature: float = 4.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Compare two maps after one of the normalisers of CWD.

    Args:
        student: [B, C, h, w], floating.
        teacher: [B, C, h, w]; a constant.
        normaliser: "channel" is `channel_kl`, "spatial" `pixel_kl`, "channel_mean" the mean squared error between the
            channels' means over the positions.
        temperature: τ > 0; "channel_mean" has none.
        valid: bool [B, h, w], the positions that count; None takes all.

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
        student, teacher = (_without(maps, valid, temperature) for maps in (student, teacher))
    return channel_kl(student, teacher, temperature)


def _without(maps: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Take positions out of a soft-max over the positions.

    What is left there is so low that its share is exactly 0, yet finite after the division by τ: −∞ would give
    0·(∞ − ∞) in the KL.
    """
    lowest = torch.finfo(maps.dtype).min * min(temperature, 1.0) / 2
    return maps.masked_fill(~valid[:, None], lowest)


def _means(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Means over the valid positions [B, C], 0 for an image that has none."""
    if valid is None:
        return maps.mean(dim=(2, 3))
    count = valid.sum(dim=(1, 2)).clamp_min(1)
    return maps.masked_fill(~valid[:, None], 0).sum(dim=(2, 3)) / count[:, None]


def _valid(term: object, target: Tensor | None, maps: Tensor) -> Tensor:
    return labels_on_grid(require_target(term, target), maps.shape[-2:])[1]
