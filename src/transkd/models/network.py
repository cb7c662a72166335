"""Base class of all networks: normalisation, number of classes, recipe and licence lineage."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.layers.placement import restored
from transkd.layers.upsampling import upsampled_argmax
from transkd.models.storage.lineage import Lineage
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Network"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_PARTS = 64  # of a scale as a fraction


class Network(nn.Module):
    """Segmentation network from an image to a ``SegmentationOutput``.

    Subclasses are ``Segmenter`` (an encoder and a head) and ``Tapped`` (any module with named taps). The normalisation
    constants are not part of the ``state_dict``.

    Args:
        channels: channels of each stage, shallowest first.
        num_classes: number of classes K; 0 for a network without logits.
        mean: subtracted from RGB in [0, 1].
        std: divides the difference.
        scale: factor by which images are resized first, bilinearly with antialiasing.

    Attributes:
        name: name of the network in messages, logs and files.
        recipe: arguments of ``create_segmenter`` that rebuild the network; None if it was built otherwise.
        normalisation_chosen: whether mean and std were given; loading encoder weights then keeps them.
        lineage: origins and licences of its code and weights.
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
        if not 0 < scale <= 16:
            raise UserError(f"a network's scale must be a number greater than 0 and at most 16; got {scale}")
        if std is not None and not all(0 < value < float("inf") for value in std):
            raise UserError(f"a network's std must be numbers greater than 0; got {list(std)}")
        self.scale = scale
        self.name: str = type(self).__name__
        self.recipe: dict[str, Any] | None = None
        self.lineage: Lineage = []
        self.channels = tuple(channels)
        self.num_classes = num_classes
        self.normalisation_chosen = mean is not None
        dtype = torch.get_default_dtype()  # also for whole numbers
        self.register_buffer("mean", torch.tensor(mean or IMAGENET_MEAN, dtype=dtype).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or IMAGENET_STD, dtype=dtype).view(3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """Convert RGB [B, 3, H, W], uint8 or float in [0, 1], to the network's input."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"expected RGB images [B, 3, H, W], got a tensor of shape {list(image.shape)}")
        floating = image.to(self.mean.dtype)  # a float image too: protocols give float32 to a network in bfloat16
        image = floating / 255 if image.dtype == torch.uint8 else floating
        if self.scale != 1:
            size = [_scaled(side, self.scale) for side in image.shape[-2:]]
            wide = image.float() if image.itemsize < 4 else image  # antialiasing of halves is not on every device
            image = F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True).to(image)
        return (image - self.mean) / self.std

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the network; kinds of output that are not in ``needs`` may be omitted."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing: the backward pass recomputes activations, which saves memory and costs time.

        Raises:
            UserError: the network does not support it.
        """
        raise UserError(
            f"{self.name} cannot recompute activations: expected an encoder with set_grad_checkpointing, such as that "
            "of segformer_b0, lvt or pvt_v2_b0; choose one, or set student.checkpointing=false"
        )

    @torch.no_grad()
    def predict(self, image: Tensor, size: Sequence[int] | None = None, place: Tensor | None = None) -> Tensor:
        """Predict class ids [B, H, W] of images [B, 3, h, w].

        Args:
            image: RGB, uint8 or float in [0, 1].
            size: (H, W), by default the images' size.
            place: what undoes their transform, if it padded, flipped or turned them (``transkd.layers.restored``).
        """
        logits = self(image, needs={"logits"}).logits
        if logits is None:
            raise UserError(f"{self.name} has no logits, so it cannot predict classes")
        size = size or image.shape[-2:]
        return upsampled_argmax(logits if place is None else restored(logits, place, size), size)


def _scaled(side: int, scale: float) -> int:
    """Side times scale, rounded up; in whole numbers for halves, quarters and the like, which exporters can write."""
    parts, whole = scale.as_integer_ratio()
    return -(-side * parts // whole) if whole <= MOST_PARTS else math.ceil(scale * side)
