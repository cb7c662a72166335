"""Modules shared by the terms that fuse features from deep to shallow: CSF and ReviewKD."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from transkd.errors import UserError

__all__ = ["ConvNorm", "check_normalisable", "fuse_from_deepest"]


class ConvNorm(nn.Module):
    """Convolution with padding that keeps height and width, then batch normalisation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve and normalise maps [B, C, H, W] to [B, C', H, W]."""
        normalised: Tensor = self.norm(self.conv(maps))
        return normalised


def check_normalisable(term: str, stage: nn.Module, feature: Tensor) -> None:
    """Raise a `UserError` in training mode for a map [B, C, H, W] with a single value per channel."""
    if stage.training and feature[:, 0].numel() == 1:
        raise UserError(
            f"{term} cannot normalise a batch of one whose map is 1 x 1: it has one value per channel. "
            "Use larger images or a larger batch."
        )


def fuse_from_deepest(stages: Iterable[nn.Module], features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Call ``residual, compared = stage(feature, residual)`` from the deepest stage to the shallowest.

    Args:
        stages: shallowest first; the deepest stage receives None as its residual.
        features: one map per stage, shallowest first.

    Returns:
        The maps to compare, shallowest first.
    """
    fused: list[Tensor] = []
    residual: Tensor | None = None
    for stage, feature in reversed(list(zip(stages, features, strict=True))):
        residual, compared = stage(feature, residual)
        fused.insert(0, compared)
    return tuple(fused)
