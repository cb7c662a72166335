"""Decode head of Semantic FPN."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from transkd.layers.upsampling import upsampled

__all__ = ["SemanticFPNHead"]


class SemanticFPNHead(nn.Module):
    """Decode head of Panoptic FPN's semantic branch (Kirillov et al., arXiv 1901.02446, section 3 and figure 3).

    A feature pyramid maps every stage to ``width`` channels, top down. Each level then passes through 3×3 convolutions
    to ``width // 2`` channels (GroupNorm, ReLU), each followed by bilinear upsampling by two up to the size of stage 1:
    one convolution without upsampling for stage 1, one with upsampling for stage 2, two for stage 3, three for stage 4.
    A 1×1 convolution maps the sum of the levels to the classes.

    Args:
        in_channels: channels of each stage, shallowest first.
        width: channels of the pyramid; even. GroupNorm uses the largest of 32, 16, 8, 4, 2, 1 groups that divides half
            of it.
        num_classes: number of outputs K.
        dropout: channel dropout before the classifier.

    Shapes:
        features, stage i [B, C_i, H_i, W_i] -> logits [B, K, H_1, W_1].

    Example:
        >>> import torch
        >>> head = SemanticFPNHead((8, 16), width=64, num_classes=5)
        >>> head((torch.zeros(2, 8, 16, 24), torch.zeros(2, 16, 8, 12))).shape
        torch.Size([2, 5, 16, 24])
    """

    def __init__(self, in_channels: Sequence[int], width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(in_channels), width)
        self.branches = nn.ModuleList(_branch(width, width // 2, max(i, 1)) for i in range(len(in_channels)))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width // 2, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits at the resolution of the first feature."""
        levels = list(self.pyramid(OrderedDict((str(i), feature) for i, feature in enumerate(features))).values())
        sizes = [level.shape[-2:] for level in levels]
        total = self.branches[0](levels[0])
        for i, branch in enumerate(self.branches[1:], start=1):
            level = levels[i]
            # after each convolution, upsample to the size of the next shallower stage
            for j, convolution in enumerate(branch.children(), start=1):
                level = upsampled(convolution(level), sizes[i - j])
            total = total + level
        logits: Tensor = self.classifier(self.dropout(total))
        return logits


def _branch(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(_convolution(channels if i else in_channels, channels) for i in range(depth)))


def _convolution(in_channels: int, channels: int) -> nn.Sequential:
    groups = next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU()
    )
