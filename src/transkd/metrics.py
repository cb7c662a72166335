"""Scores from the confusion matrix of a whole split, under named protocols."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from transkd.errors import UserError
from transkd.inference import Logits, at_scales, in_windows, whole
from transkd.layers.upsampling import upsampled_argmax
from transkd.outputs import IGNORE

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Scores",
    "SegmentationScore",
    "at_boundaries",
    "at_labels",
    "at_logits",
    "boundary",
    "ms_flip",
    "scores_from_confusion",
    "slide",
]

CHUNKS = 8
OUTSIDE = 2**16 - 1  # differs from every class id


def at_labels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and labels at the label's size [B, H, W]: logits [B, K, h, w] upsampled bilinearly."""
    return upsampled_argmax(logits, target.shape[-2:]), target


def at_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and labels at the logits' size [B, h, w]: the label resized by nearest neighbour."""
    resized = F.interpolate(target[:, None].float(), size=logits.shape[-2:])[:, 0]
    return logits.argmax(1), resized.long()


def at_boundaries(logits: Tensor, target: Tensor, dilation_ratio: float = 0.02) -> tuple[Tensor, Tensor]:
    """Class ids and labels [B, H, W] near boundaries between regions; K, the id of no class, elsewhere.

    The boundary of a region is what an erosion by d pixels takes off it, d = ``dilation_ratio`` of the diagonal; the
    image's edge and pixels without a label bound regions too. The IoU of these ids is Boundary IoU (Cheng et al., arXiv
    2103.16562) of each class over all images.

    Args:
        logits: [B, K, h, w], upsampled bilinearly.
        target: [B, H, W]; 255 is ignored.
        dilation_ratio: d over the diagonal, at least 1 pixel.
    """
    predicted, target = at_labels(logits, target)
    ignored, nowhere = target == IGNORE, logits.shape[1]
    distance = max(1, round(dilation_ratio * math.hypot(*target.shape[-2:])))
    maps = []
    for ids in (predicted.masked_fill(ignored, IGNORE), target):
        near = np.stack([_near_boundary(one, distance) for one in ids.cpu().numpy().astype(np.uint16)])
        maps.append(ids.masked_fill(~torch.from_numpy(near).to(ids.device), nowhere))
    predicted, target = maps
    return predicted, target.masked_fill(ignored | ((predicted == nowhere) & (target == nowhere)), IGNORE)


def _near_boundary(ids: npt.NDArray[np.uint16], distance: int) -> npt.NDArray[np.bool_]:
    """Whether another id, or the outside, is within a square of that many pixels around each pixel [H, W]."""
    framed = cv2.copyMakeBorder(ids, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=OUTSIDE)
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    different: npt.NDArray[np.bool_] = cv2.dilate(framed, square) != cv2.erode(framed, square)
    return different[1:-1, 1:-1]


class Protocol(NamedTuple):
    """Evaluation protocol: how a network is run, and how predictions and labels are compared.

    Attributes:
        transform_labels: whether the validation transform is applied to the label (else it keeps its original size).
        compare: ``compare(logits, target)`` of one batch, logits [B, K, h, w] and labels [B, H, W], returns class ids
            and labels of one shape; labels of 255 are ignored.
        description: text for tables and ``results.json``, settings included: scores of the same name and description
            can be compared.
        infer: ``infer(network, image)`` of a network from images to logits and a batch of images, returns logits, or
            scores of the classes, [B, K, h, w].
        no_class: whether ``compare`` may also return the id K, for pixels that belong to no class.
    """

    transform_labels: bool
    compare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    description: str
    infer: Callable[[Logits, Tensor], Tensor] = whole
    no_class: bool = False


def slide(window: int = 512, stride: int = 341) -> Protocol:
    """Protocol ``full-res`` with the mean of the logits in overlapping square windows (``transkd.inference``).

    Args:
        window: side of a window in pixels of the network's input.
        stride: distance between windows.

    Raises:
        UserError: the stride leaves pixels between windows.
    """
    if not 1 <= stride <= window:
        raise UserError(f"protocols.slide: expected a stride from 1 to the window, {window}; got {stride}")
    description = f"full-res, logits averaged over windows of {window}×{window} every {stride} pixels"
    return Protocol(False, at_labels, description, partial(in_windows, window=window, stride=stride))


def ms_flip(scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip: bool = True) -> Protocol:
    """Protocol ``full-res`` with the mean of the probabilities at several sizes and of mirror images.

    Args:
        scales: factors of the size of the network's input.
        flip: whether to add mirror images.

    Raises:
        UserError: there is no scale, or one is not positive.
    """
    scales = [float(scale) for scale in scales]
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise UserError(f"protocols.ms-flip: expected scales greater than 0, at least one; got {scales}")
    sizes = ", ".join(f"{scale:g}" for scale in scales)
    description = f"full-res, probabilities averaged over the scales {sizes}" + (" and mirror images" if flip else "")
    return Protocol(False, at_labels, description, partial(at_scales, scales=scales, flip=flip))


def boundary(dilation_ratio: float = 0.02) -> Protocol:
    """Protocol of Boundary IoU at the label's own size (``at_boundaries``).

    Args:
        dilation_ratio: distance from the boundary over the image's diagonal.

    Raises:
        UserError: the ratio is not between 0 and 1.
    """
    if not 0 < dilation_ratio < 1:
        raise UserError(f"protocols.boundary: expected a dilation_ratio between 0 and 1; got {dilation_ratio}")
    description = f"full-res, IoU of the pixels within {dilation_ratio:g} of the diagonal from a boundary"
    return Protocol(False, partial(at_boundaries, dilation_ratio=dilation_ratio), description, no_class=True)


PROTOCOLS = {
    "full-res": Protocol(False, at_labels, "logits upsampled to the label's own size"),
    "input-res": Protocol(True, at_labels, "label resized to the network's input, logits upsampled to it"),
    "transkd-paper": Protocol(True, at_logits, "label resized by nearest neighbour to the logits (stride 4)"),
    "slide": slide(),
    "ms-flip": ms_flip(),
    "boundary": boundary(),
}
"""Protocols by the name that every score carries.

The configuration's ``protocols`` and a module named in ``plugins=[…]`` add their own.
"""


class Scores(NamedTuple):
    """Scores as fractions in [0, 1].

    Attributes:
        miou: mean IoU over the classes that occur in labels or predictions; NaN if none occurs.
        iou: IoU per class [K]; NaN for a class in neither labels nor predictions.
        pixel_accuracy: fraction of valid pixels with the correct class.
        conditions: scores of the images of each condition, such as fog, by its name.
    """

    miou: Tensor
    iou: Tensor
    pixel_accuracy: Tensor
    conditions: Mapping[str, "Scores"] = {}


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
        conditions: names of conditions to score separately too.
    """

    by_condition: Tensor

    def __init__(self, num_classes: int, protocol: str, conditions: Sequence[str] = ()) -> None:
        self.rule = PROTOCOLS[protocol]
        super().__init__(num_classes + self.rule.no_class, ignore_index=IGNORE, validate_args=False)
        self.protocol, self.conditions = protocol, tuple(conditions)
        if conditions:
            self.add_state("by_condition", torch.stack([self.confmat] * len(conditions)), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, conditions: Sequence[str | None] = ()) -> None:
        """Add logits [B, K, h, w] against labels [B, H, W]; ``conditions`` are those of the images, None for none."""
        predicted, target = self.rule.compare(logits, target)
        if not self.conditions:
            self._count(predicted, target)
            return
        for ids, labels, condition in zip(predicted, target, conditions, strict=True):
            before = self.confmat.clone()
            self._count(ids, labels)
            if condition is not None:
                self.by_condition[self.conditions.index(condition)] += self.confmat - before

    def _count(self, predicted: Tensor, target: Tensor) -> None:
        # update in chunks: the base class makes several int64 copies of its input
        for classes, labels in zip(predicted.flatten().chunk(CHUNKS), target.flatten().chunk(CHUNKS), strict=True):
            super().update(classes, labels)

    def compute(self) -> Any:
        """Compute the ``Scores`` of all batches."""
        parts = {name: self._scores(self.by_condition[i]) for i, name in enumerate(self.conditions)}
        return self._scores(super().compute())._replace(conditions=parts)

    def _scores(self, confusion: Tensor) -> Scores:
        scores = scores_from_confusion(confusion)
        if not self.rule.no_class:
            return scores
        iou = scores.iou[:-1]  # the last is no class
        return scores._replace(iou=iou, miou=iou.nanmean())
