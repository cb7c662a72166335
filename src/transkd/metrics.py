"""Scores from one confusion matrix over the whole split, under named protocols."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from transkd.layers.upsampling import upsampled_argmax

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Scores",
    "SegmentationScore",
    "at_labels",
    "at_logits",
    "scores_from_confusion",
]

PARTS = 8


def at_labels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and labels at the label's size [B, H, W]: logits [B, K, h, w] upsampled bilinearly."""
    return upsampled_argmax(logits, target.shape[-2:]), target


def at_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and labels at the logits' size [B, h, w]: the label resized by nearest neighbour."""
    resized = F.interpolate(target[:, None].float(), size=logits.shape[-2:])[:, 0]
    return logits.argmax(1), resized.long()


class Protocol(NamedTuple):
    """How predictions meet labels.

    Attributes:
        transform_labels: the label follows the validation transform (else it stays at its own size).
        compare: ``compare(logits, target)`` of one batch, logits [B, K, h, w] and labels [B, H, W], gives class ids
            and labels of one shape; labels of 255 are not counted.
        description: for tables and ``results.json``.
    """

    transform_labels: bool
    compare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    description: str


PROTOCOLS = {
    "full-res": Protocol(False, at_labels, "logits upsampled to the label's own size"),
    "input-res": Protocol(True, at_labels, "label resized to the network's input, logits upsampled to it"),
    "transkd-paper": Protocol(True, at_logits, "label resized by nearest neighbour to the logits (stride 4)"),
}
"""Protocols by the name that every score carries; a module named in ``plugins=[…]`` can add its own."""


class Scores(NamedTuple):
    """Fractions in [0, 1].

    Attributes:
        miou: mean IoU over the classes that occur in label or prediction; NaN where none does.
        iou: IoU per class [K]; NaN for a class in neither label nor prediction.
        pixel_accuracy: share of valid pixels predicted right.
    """

    miou: Tensor
    iou: Tensor
    pixel_accuracy: Tensor


def scores_from_confusion(confusion: Tensor) -> Scores:
    """Scores of a confusion matrix [K, K], rows the label, columns the prediction.

    Example:
        >>> import torch
        >>> scores_from_confusion(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])).iou
        tensor([0.7500, 0.8000,    nan], dtype=torch.float64)
    """
    confusion = confusion.cpu().double()
    right = confusion.diag()
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)  # 0/0 = NaN where the class never occurs
    return Scores(iou.nanmean(), iou, right.sum() / confusion.sum())


class SegmentationScore(MulticlassConfusionMatrix):
    """Streaming mIoU: sums one confusion matrix over batches and ranks, keeps no prediction.

    Full-size logits are never made (`upsampled_argmax`), and the matrix is exactly that of the plain way.

    Args:
        num_classes: number of classes K; 255 is ignored.
        protocol: a name in ``PROTOCOLS``.
    """

    def __init__(self, num_classes: int, protocol: str) -> None:
        super().__init__(num_classes, ignore_index=255, validate_args=False)
        self.protocol = protocol

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add logits [B, K, h, w] against labels [B, H, W]."""
        predicted, target = PROTOCOLS[self.protocol].compare(logits, target)
        # counting makes several int64 copies of what it is given, so it is given a part at a time
        for classes, labels in zip(predicted.flatten().chunk(PARTS), target.flatten().chunk(PARTS), strict=True):
            super().update(classes, labels)

    def compute(self) -> Any:
        """``Scores`` of everything seen."""
        return scores_from_confusion(super().compute())
