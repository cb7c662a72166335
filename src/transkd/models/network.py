"""What every network of transkd has in common: it owns its normalisation and knows its classes and origin."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.layers.upsampling import upsampled_argmax
from transkd.models.storage.lineage import Lineage
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Network"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Network(nn.Module):
    """A segmentation network: image in, ``SegmentationOutput`` out.

    ``Segmenter`` (an encoder and a head) and ``Tapped`` (any module with named taps) are the two there are. The
    constants of the normalisation are no part of the ``state_dict``, which stays the plain network's.

    Args:
        channels: width of each stage, shallowest first.
        num_classes: number of classes K; 0 for a network that gives no logits.
        mean: subtracted from RGB in [0, 1].
        std: divides what is left.
        scale: the network looks at the image at this scale, resized bilinearly with antialiasing.

    Attributes:
        name: what the network is called in messages, logs and files.
        recipe: the arguments of ``create_segmenter`` that build it again; None where there are none.
        normalisation_chosen: whether mean and std were given; weights of an encoder alone then leave them.
        lineage: where its code and its weights come from, and under which licences.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise UserError(f"a network's scale must be a number greater than 0; got {scale}")
        self.scale = scale
        self.name: str = type(self).__name__
        self.recipe: dict[str, Any] | None = None
        self.lineage: Lineage = []
        self.channels = tuple(channels)
        self.num_classes = num_classes
        self.normalisation_chosen = mean is not None
        self.register_buffer("mean", torch.tensor(mean or IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or IMAGENET_STD).view(3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """RGB [B, 3, H, W], uint8 or float in [0, 1], to the network's input."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"expected RGB images [B, 3, H, W], got a tensor of shape {list(image.shape)}")
        if image.dtype == torch.uint8:
            image = image.to(self.mean.dtype) / 255
        if self.scale != 1:
            size = [math.ceil(self.scale * side) for side in image.shape[-2:]]
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
        return (image - self.mean) / self.std

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the network; what ``needs`` does not name may be left out."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Keep few activations in training: the backward pass computes them again, for memory at the price of time.

        Raises:
            UserError: the network cannot.
        """
        raise UserError(
            f"{self.name} cannot recompute activations: expected an encoder with set_grad_checkpointing, such as that "
            "of segformer_b0, lvt or pvt_v2_b0; choose one, or say student.checkpointing=false"
        )

    @torch.no_grad()
    def predict(self, image: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Class ids [B, H, W] of images [B, 3, h, w]; ``size`` (H, W) is the image's own where not given."""
        logits = self(image, needs={"logits"}).logits
        if logits is None:
            raise UserError(f"{self.name} gives no logits, so it predicts no classes")
        return upsampled_argmax(logits, size or image.shape[-2:])
