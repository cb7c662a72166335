"""The network that users build, train and deploy: normalise, encode, decode."""

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
    """An encoder of stages and a decode head.

    Its ``state_dict`` is the plain network's: ``encoder.*`` and ``head.*``, nothing of the distillation and no
    normalisation constants.

    Args:
        encoder: has ``channels``, the width of each stage, and ``forward_stages(image) -> (features, embeddings)``,
            the embeddings empty where it has none (``MixTransformer``).
        head: features to logits (``SegformerHead``).
        num_classes: number of classes K.
        mean: subtracted from RGB in [0, 1]; ImageNet's where not given.
        std: divides what is left; ImageNet's where not given.
        scale: of the image that the network looks at.

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
        """Run the network; the decode head only when ``needs`` names "logits"."""
        image = self.normalise(image)
        features, embeddings = self.encoder.forward_stages(image)
        logits = self.head(features) if "logits" in needs else None
        return SegmentationOutput(logits, features, embeddings, image)

    def checkpoint_activations(self) -> None:
        """Keep few activations of the encoder in training; see ``Network.checkpoint_activations``."""
        try:
            self.encoder.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):  # timm asserts where a network has none
            super().checkpoint_activations()

    def fuse(self) -> "Segmenter":
        """A copy for inference whose head has its BatchNorm folded in: same output, fewer operations.

        Raises:
            UserError: the head has no such form (only SegFormer's has).
        """
        if not isinstance(self.head, SegformerHead):
            raise UserError(f"fuse() is for the SegFormer head; {self.name} has a {type(self.head).__name__}")
        fused = copy.deepcopy(self)
        fused.head = self.head.fuse()
        fused.recipe = None  # it builds the head as it was
        return fused.eval()
