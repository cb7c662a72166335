"""Segmentation network of an encoder and a decode head."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from transkd.errors import UserError
from transkd.models.heads.segformer import SegformerHead
from transkd.models.network import Network
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["Segmenter"]


class Segmenter(Network):
    """Network that normalises an image, encodes it in stages and decodes the stages to logits.

    Its ``state_dict`` contains only ``encoder.*`` and ``head.*``: no distillation modules, no normalisation constants.

    Args:
        encoder: module with ``channels``, the channels of each stage, and
            ``forward_stages(image) -> (features, embeddings)``, embeddings empty if it has none; see
            ``MixTransformer``.
        head: module from features to logits, see ``SegformerHead``.
        num_classes: number of classes K.
        mean: subtracted from RGB in [0, 1]; by default ImageNet's.
        std: divides the difference; by default ImageNet's.
        scale: factor by which images are resized first.

    Shapes:
        image [B, 3, H, W], uint8 or float in [0, 1] -> SegmentationOutput.

    Example:
        >>> import torch
        >>> from transkd.models import create_segmenter
        >>> network = create_segmenter("segformer_b0", num_classes=19).eval()
        >>> network(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).logits.shape
        torch.Size([1, 19, 16, 24])
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        num_classes: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(encoder.channels, num_classes, mean, std, scale)  # type: ignore[arg-type]
        self.encoder: Any = encoder
        self.head = head

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the network; the decode head only if "logits" is in ``needs``."""
        image = self.normalise(image)
        features, embeddings = self.encoder.forward_stages(image)
        logits = self.head(features) if "logits" in needs else None
        return SegmentationOutput(logits, features, embeddings, image)

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing in the encoder; see ``Network.checkpoint_activations``."""
        try:
            self.encoder.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):  # timm networks without checkpointing raise AssertionError
            super().checkpoint_activations()

    def fuse(self) -> "Segmenter":
        """Return a copy for inference with the BatchNorm of the head folded into its convolutions.

        Raises:
            UserError: the head is not a ``SegformerHead``.
        """
        if not isinstance(self.head, SegformerHead):
            raise UserError(f"fuse() is for the SegFormer head; {self.name} has a {type(self.head).__name__}")
        fused = copy.deepcopy(self)
        fused.head = self.head.fuse()
        fused.recipe = None  # the recipe would rebuild the unfused head
        return fused.eval()
