"""Decode head of SegFormer, and its form for inference."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.layers.upsampling import add_upsampled

__all__ = ["FusedSegformerHead", "SegformerHead"]


class _Linear(nn.Module):
    """Linear layer of a stage under the published parameter name ``linear_c{i}.proj``."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, width)


class _Fuse(nn.Module):
    """Fusing 1×1 convolution and BatchNorm under the published parameter name ``linear_fuse``."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)


class SegformerHead(nn.Module):
    """All-MLP decode head of SegFormer (arXiv 2105.15203, section 3.2) with folded linear layers.

    In the reference implementation each stage passes through a linear layer to ``width`` channels and is upsampled to
    stage 1; the four maps are concatenated (deepest first) and a 1×1 convolution maps 4·width to ``width`` channels.
    These operations are linear, and bilinear upsampling commutes with a 1×1 convolution (its weights sum to one, so
    with biases too). Hence

        Σ_i conv_i(up(linear_i(F_i)))  =  Σ_i up((conv_i ∘ linear_i)(F_i))

    with conv_i the slice of the convolution for stage i: a single C_i→width convolution per stage, at the stage's
    resolution. Parameters are the same, values and gradients are equal up to rounding, with about half the operations.

    Layers have PyTorch's default initialisation. With MiT's (σ = sqrt(2 / fan_out)) the initial logits of a classifier
    with few outputs are so large that training from random weights loses several points of mIoU (docs/results.md).

    Args:
        in_channels: channels of each stage, shallowest first.
        width: channels inside the head.
        num_classes: number of outputs K.
        dropout: channel dropout before the classifier.

    Shapes:
        features, stage i [B, C_i, H_i, W_i] -> logits [B, K, H_1, W_1].

    Example:
        >>> import torch
        >>> head = SegformerHead((8, 16), width=16, num_classes=5)
        >>> head((torch.zeros(2, 8, 16, 24), torch.zeros(2, 16, 8, 12))).shape
        torch.Size([2, 5, 16, 24])
    """

    def __init__(self, in_channels: Sequence[int], width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linears = [f"linear_c{i}" for i in range(1, len(in_channels) + 1)]
        for name, channels in zip(self.linears, in_channels, strict=True):
            self.add_module(name, _Linear(channels, width))
        self.linear_fuse = _Fuse(len(in_channels) * width, width)
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(width, num_classes, 1)

    def fold(self) -> tuple[list[Tensor], Tensor]:
        """Return the folded weights [width, C_i, 1, 1], shallowest first, and the bias [width] of the sum."""
        # reversed: the convolution's input starts with the deepest stage
        slices = reversed(self.linear_fuse.conv.weight.flatten(1).chunk(len(self.linears), dim=1))
        linears = [cast(nn.Linear, self.get_submodule(f"{name}.proj")) for name in self.linears]
        pairs = list(zip(slices, linears, strict=True))
        weights = [(part @ linear.weight)[:, :, None, None] for part, linear in pairs]
        return weights, torch.stack([part @ linear.bias for part, linear in pairs]).sum(0)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits at the resolution of the first feature."""
        weights, bias = self.fold()
        maps = [F.conv2d(feature, weight) for feature, weight in zip(features, weights, strict=True)]
        # added to the smallest map, where its gradient is cheapest, in the map's type: autocast keeps biases in float32
        maps[-1] = maps[-1] + bias.to(maps[-1].dtype)[:, None, None]
        fused = _upsampled_sum(maps)
        activated = F.relu(self.linear_fuse.bn(fused), inplace=True)
        logits: Tensor = self.linear_pred(self.dropout(activated))
        return logits

    def fuse(self) -> "FusedSegformerHead":
        """Return the head for inference: a convolution per stage with linear layers, BatchNorm and biases folded in."""
        bn = self.linear_fuse.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        weights, bias = self.fold()
        shift = bn.bias + scale * (bias - bn.running_mean)
        head = FusedSegformerHead([weight.shape[1] for weight in weights], len(shift), self.linear_pred.out_channels)
        head.to(shift)
        with torch.no_grad():
            for stage, weight in zip(head.maps, weights, strict=True):
                cast(nn.Conv2d, stage).weight.copy_(scale[:, None, None, None] * weight)
            cast(Tensor, head.maps[0].bias).copy_(shift)
        head.linear_pred.load_state_dict(self.linear_pred.state_dict())
        return head.eval()


class FusedSegformerHead(nn.Module):
    """Result of ``SegformerHead.fuse``, for inference: a 1×1 convolution per stage, sum, ReLU, classifier.

    Args:
        in_channels: channels of each stage, shallowest first.
        width: channels inside the head.
        num_classes: number of outputs K.
    """

    def __init__(self, in_channels: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(n, width, 1, bias=i == 0) for i, n in enumerate(in_channels))
        self.linear_pred = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits at the resolution of the first feature."""
        fused = _upsampled_sum([stage(feature) for stage, feature in zip(self.maps, features, strict=True)])
        logits: Tensor = self.linear_pred(fused.relu_())
        return logits


def _upsampled_sum(maps: Sequence[Tensor]) -> Tensor:
    """Sum of maps, upsampled to the first, which is overwritten: these are the largest maps of the network."""
    total = maps[0]
    for smaller in maps[1:]:
        add_upsampled(total, smaller)
    return total
