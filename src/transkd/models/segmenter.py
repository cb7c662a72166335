"""The network that users build, train and deploy: normalise, encode, decode."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Segmenter"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """A semantic-segmentation network that owns its normalisation.

    Its ``state_dict`` is the plain network's: ``encoder.*`` and ``head.*``, nothing of the distillation and no
    normalisation constants.

    Args:
        encoder: has ``channels``, the width of each stage, and ``forward_stages(image) -> (features, embeddings)``,
            the embeddings empty where it has none (``MixTransformer``).
        head: features to logits (``SegformerHead``).
        num_classes: number of classes K.
        mean: subtracted from RGB in [0, 1].
        std: divides what is left.

    Shapes:
        image [B, 3, H, W], uint8 or float in [0, 1] -> SegmentationOutput.

    Example:
        >>> from transkd.models import create_segmenter
        >>> network = create_segmenter("segformer_b0", num_classes=19).eval()
        >>> network(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).logits.shape
        torch.Size([1, 19, 16, 24])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        num_classes: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.name: str | None = None  # set by create_segmenter; by it a file of weights can rebuild the network
        self.encoder: Any = encoder
        self.head = head
        self.channels: tuple[int, ...] = tuple(encoder.channels)  # type: ignore[arg-type]
        self.num_classes = num_classes
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """RGB [B, 3, H, W], uint8 or float in [0, 1], to the network's input."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"expected RGB images [B, 3, H, W], got a tensor of shape {list(image.shape)}")
        if image.dtype == torch.uint8:
            image = image.to(self.mean.dtype) / 255
        return (image - self.mean) / self.std

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the network; the decode head only when ``needs`` names "logits"."""
        image = self.normalise(image)
        features, embeddings = self.encoder.forward_stages(image)
        logits = self.head(features) if "logits" in needs else None
        return SegmentationOutput(logits, features, embeddings, image)

    @torch.no_grad()
    def predict(self, image: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Class ids [B, H, W] of images [B, 3, h, w]; ``size`` (H, W) is the image's own where not given."""
        logits = self(image, needs={"logits"}).logits
        size = tuple(size or image.shape[-2:])
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).argmax(1)
