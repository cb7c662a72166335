"""Scores from the confusion matrix of a whole split, under named protocols."""

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

CHUNKS = 8


def at_labels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and labels at the label's size [B, H, W]: logits [B, K, h, w] upsampled bilinearly."""
    return upsampled_argmax(logits, target.shape[-2:]), target


def at_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and labels at the logits' size [B, h, w]: the label resized by nearest neighbour."""
    resized = F.interpolate(target[:, None].float(), size=logits.shape[-2:])[:, 0]
    return logits.argmax(1), resized.long()


class Protocol(NamedTuple):
    """Evaluation protocol: how predictions and labels are compared.

    Attributes:
        transform_labels: whether the validation transform is applied to the label (else it keeps its original size).
        compare: ``compare(logits, target)`` of one batch, logits [B, K, h, w] and labels [B, H, W], returns class ids
            and labels of one shape; labels of 255 are ignored.
        description: text for tables and ``results.json``.
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
    """Scores as fractions in [0, 1].

    Attributes:
        miou: mean IoU over the classes that occur in labels or predictions; NaN if none occurs.
        iou: IoU per class [K]; NaN for a class in neither labels nor predictions.
        pixel_accuracy: fraction of valid pixels with the correct class.
    """

    miou: Tensor
    iou: Tensor
    pixel_accuracy: Tensor


def scores_from_confusion(confusion: Tensor) -> Scores:
    """Compute the scores of a confusion matrix [K, K]; rows are labels, columns predictions.

    Example:
        >>> import torch
        >>> scores_from_confusion(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])).iou
        tensor([0.7500, 0.8000,    nan], dtype=torch.float64)
    """
    confusion = confusion.cpu().double()
    correct = confusion.diag()
    iou = correct / (confusion.sum(0) + confusion.sum(1) - correct)  # 0/0 = NaN for a class that does not occur
    return Scores(iou.nanmean(), iou, correct.sum() / confusion.sum())


class SegmentationScore(MulticlassConfusionMatrix):
    """Streaming mIoU: accumulates a confusion matrix over batches and processes.

    Predictions at full resolution come from `upsampled_argmax`, which does not store upsampled logits.

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
        # update in chunks: the base class makes several int64 copies of its input
        for classes, labels in zip(predicted.flatten().chunk(CHUNKS), target.flatten().chunk(CHUNKS), strict=True):
            super().update(classes, labels)

    def compute(self) -> Any:
        """Compute the ``Scores`` of all batches."""
        return scores_from_confusion(super().compute())
