"""What terms between the student's logits and the labels share: checks, class weights, a common size."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.losses.shared.checks import check_choice, name_of
from transkd.losses.shared.distances import widen
from transkd.losses.shared.grids import nearest
from transkd.outputs import SegmentationOutput

__all__ = ["RESOLUTIONS", "checked_weights", "labelled_logits"]

RESOLUTIONS = ("labels", "logits")


def checked_weights(term: object, class_weights: Sequence[float] | str | None, resolution: str) -> Tensor | None:
    """Check the settings of a term between logits and labels, and return the class weights [K].

    Raises:
        UserError: the weights are a rule and no numbers, negative or not finite, or the resolution is unknown.
    """
    check_choice(term, "resolution", resolution, RESOLUTIONS)
    if isinstance(class_weights, str):
        raise UserError(
            f"{name_of(term)}: class_weights={class_weights} is counted on the training labels by transkd.train; "
            "elsewhere give one number per class, see transkd.data.class_weights"
        )
    if class_weights is None:
        return None
    given = [float(weight) for weight in class_weights]
    if not (all(0 <= weight < math.inf for weight in given) and any(given)):
        raise UserError(f"{name_of(term)}: class_weights must be numbers of at least 0, not all 0; got {given}.")
    return torch.tensor(given)


def labelled_logits(
    term: Any, student: SegmentationOutput, target: Tensor | None, class_weights: Tensor | None, resolution: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [B, K, h, w] in float32 at least, labels and class weights.

    Args:
        term: the calling term; its class name appears in error messages.
        student: provides the logits.
        target: labels [B, H, W].
        class_weights: [K], or None for equal weights.
        resolution: "logits" resizes the labels to the logits by nearest neighbour.

    Raises:
        UserError: logits or labels are missing, the labels have another shape, batch size or type, or the number of
            class weights is not K.
    """
    name = name_of(term)
    if student.logits is None:
        raise UserError(f"{name} reads the student's logits, but the student returned none: request its logits.")
    if target is None:
        raise UserError(f"{name} reads labels, but there are none: call it with target=labels.")
    logits = widen(student.logits)
    if class_weights is not None and len(class_weights) != logits.shape[1]:
        raise UserError(
            f"{name} has {len(class_weights)} class weights, the student {logits.shape[1]} classes: set class_weights "
            "to one weight per class, or to null."
        )
    if target.ndim != 3 or len(target) != len(logits):
        raise UserError(
            f"{name} compares logits of {len(logits)} images with labels [B, H, W] of as many; "
            f"got labels of shape {list(target.shape)}."
        )
    if target.dtype != torch.int64:
        raise UserError(f"{name} reads labels as int64, got {str(target.dtype)[6:]}: give target.long().")
    if resolution == "logits":
        target = nearest(target, logits.shape[-2:])
    weights = logits.new_ones(logits.shape[1]) if class_weights is None else class_weights.to(logits)
    return logits, target, weights
