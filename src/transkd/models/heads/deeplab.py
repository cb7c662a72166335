"""The decode head of DeepLabV3+."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from transkd.errors import UserError
from transkd.layers.upsampling import upsampled

__all__ = ["DeepLabV3PlusHead"]


class DeepLabV3PlusHead(nn.Module):
    """Atrous spatial pyramid pooling and a decoder on stage 1 (Chen et al., arXiv 1802.02611, sections 3.1 and 4.1).

    The deepest stage passes through ASPP (torchvision's) to ``width`` channels and is upsampled to stage 1; stage 1,
    reduced to 48 channels by a 1×1 convolution, is concatenated; two 3×3 convolutions and the classifier follow.
    Every convolution but the classifier has BatchNorm and ReLU. The paper's output stride of 16 is the encoder's
    (``output_stride=16``).

    Args:
        in_channels: channels of each stage, shallowest first; the first and the last are used.
        width: channels of ASPP and of the decoder.
        num_classes: number of outputs K.
        rates: dilations of ASPP; the paper's for output stride 16.

    Shapes:
        features, stage i [B, C_i, H_i, W_i] -> logits [B, K, H_1, W_1].

    Raises:
        UserError: a batch of one in training mode: the batch normalisation of ASPP's pooled branch needs two images.

    Example:
        >>> head = DeepLabV3PlusHead((8, 16), width=32, num_classes=5)
        >>> head((torch.zeros(2, 8, 16, 24), torch.zeros(2, 16, 4, 6))).shape
        torch.Size([2, 5, 16, 24])
    """

    def __init__(
        self, in_channels: Sequence[int], width: int, num_classes: int, rates: Sequence[int] = (6, 12, 18)
    ) -> None:
        super().__init__()
        self.aspp = ASPP(in_channels[-1], list(rates), width)
        self.reduce = _convolution(in_channels[0], 48, 1)
        self.decode = nn.Sequential(_convolution(48 + width, width, 3), _convolution(width, width, 3))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits at the resolution of the first feature."""
        shallow, deep = features[0], features[-1]
        if self.training and len(deep) == 1:
            raise UserError(
                "DeepLabV3+ cannot train on a batch of one image (BatchNorm of its pooled branch); use two or more"
            )
        context = upsampled(self.aspp(deep), shallow.shape[-2:])
        logits: Tensor = self.classifier(self.decode(torch.cat([self.reduce(shallow), context], dim=1)))
        return logits


def _convolution(in_channels: int, channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
