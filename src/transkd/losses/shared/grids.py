"""Resize the maps and labels that a term compares to one grid, and select the stages that it compares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.layers.upsampling import upsampled
from transkd.losses.shared.checks import check_needs, name_of, require_target
from transkd.losses.shared.distances import widen
from transkd.outputs import IGNORE, UNLABELLED, SegmentationOutput

__all__ = [
    "GRIDS",
    "class_members",
    "connected_zero",
    "feature_pairs",
    "labels_on_grid",
    "logits_pair",
    "nearest",
    "on_grid",
    "valid_on_grid",
]

GRIDS = ("teacher", "student", "labels")


def on_grid(
    term: object, student: Tensor, teacher: Tensor, grid: str = "teacher", target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Resize two maps to one grid, in float32 or float64, and detach the teacher's.

    Args:
        term: the calling term; its class name appears in error messages.
        student: [B, C, h, w].
        teacher: [B, C', h', w'].
        grid: "teacher" (the teacher's size), "student" or "labels"; maps of another size are resized bilinearly,
            align_corners=False.
        target: [B, H, W]; required for "labels".

    Raises:
        UserError: the batch sizes differ, or grid is "labels" and target is None.

    Example:
        >>> pair = on_grid(None, torch.zeros(1, 2, 4, 6), torch.zeros(1, 3, 8, 12))
        >>> [tuple(maps.shape) for maps in pair]
        [(1, 2, 8, 12), (1, 3, 8, 12)]
    """
    if len(student) != len(teacher):
        raise UserError(
            f"{name_of(term)} got {len(student)} images from the student and {len(teacher)} from the teacher."
        )
    if grid == "labels":
        target = require_target(term, target)
    size = {"teacher": teacher, "student": student, "labels": target}[grid].shape[-2:]  # type: ignore[union-attr]
    return _resized(student, size), _resized(teacher.detach(), size)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    if maps.shape[-2:] == torch.Size(size):
        return widen(maps)
    return upsampled(widen(maps), size)


def labels_on_grid(target: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Resize labels [B, H, W] by nearest neighbour and mark the valid ones.

    Returns:
        labels int64 [B, h, w], 0 where invalid so that they can be used as indices; valid bool [B, h, w].

    Example:
        >>> labels, valid = labels_on_grid(torch.tensor([[[1, 255], [2, 3]]]), (1, 2))
        >>> labels.tolist(), valid.tolist()
        ([[[1, 0]]], [[[True, False]]])
    """
    labels = nearest(target, size).long()
    valid = (labels != IGNORE) & (labels >= 0)
    return labels.masked_fill(~valid, 0), valid


def valid_on_grid(term: object, target: Tensor | None, maps: Tensor) -> Tensor:
    """Mask of the positions of maps [B, C, h, w] that are not ignored, bool [B, h, w].

    These are the positions with a label, and all positions of an image without labels (``transkd.outputs.UNLABELLED``).

    Raises:
        UserError: target is None.
    """
    labels = nearest(require_target(term, target), maps.shape[-2:])
    return ((labels != IGNORE) & (labels >= 0)) | (labels == UNLABELLED)


def class_members(labels: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Mask of the positions of each class, bool [B, K, h·w], from labels and valid [B, h, w].

    Example:
        >>> labels, valid = torch.tensor([[[1, 0]]]), torch.tensor([[[True, False]]])
        >>> class_members(labels, valid, 2).tolist()
        [[[False, False], [True, False]]]
    """
    classes = torch.arange(num_classes, device=labels.device)[:, None]
    return (labels.flatten(1)[:, None] == classes) & valid.flatten(1)[:, None]


def nearest(target: Tensor, size: Sequence[int]) -> Tensor:
    """Resize labels [B, H, W] by nearest neighbour, source index ⌊q·H/h⌋, with ignored labels unchanged."""
    height, width = size
    rows = torch.arange(height, device=target.device) * target.shape[-2] // height
    columns = torch.arange(width, device=target.device) * target.shape[-1] // width
    return target[:, rows[:, None], columns]


def logits_pair(
    term: object,
    student: SegmentationOutput,
    teacher: SegmentationOutput | None,
    grid: str = "teacher",
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return both networks' logits [B, K, h, w] on one grid.

    Raises:
        UserError: a network returns no logits, the numbers of classes differ, or there is a single class.
    """
    teacher = check_needs(term, frozenset({"logits"}), student, teacher)
    assert teacher is not None
    assert student.logits is not None
    assert teacher.logits is not None
    classes = student.logits.shape[1], teacher.logits.shape[1]
    if classes[0] != classes[1]:
        raise UserError(
            f"{name_of(term)} compares class by class; the student has {classes[0]} classes, the teacher {classes[1]}. "
            "Choose a teacher that was trained on the same classes."
        )
    if classes[0] < 2:
        raise UserError(f"{name_of(term)} compares distributions over classes; the networks have a single class.")
    return on_grid(term, student.logits, teacher.logits, grid, target)


def feature_pairs(
    term: object, stages: Sequence[int], student: SegmentationOutput, teacher: SegmentationOutput | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the features of the selected stages (1 is the shallowest), not resized, the teacher's detached.

    Raises:
        UserError: a network returns no features or fewer stages.
    """
    teacher = check_needs(term, frozenset({"features"}), student, teacher)
    assert teacher is not None
    pairs = []
    for stage in stages:
        for role, output in (("student", student), ("teacher", teacher)):
            if stage > len(output.features):
                raise UserError(
                    f"{name_of(term)} reads stage {stage}, but the {role} returns {len(output.features)} stages of "
                    f"features; choose among 1 to {len(output.features)}: stages=[…]."
                )
        pairs.append((student.features[stage - 1], teacher.features[stage - 1].detach()))
    return pairs


def connected_zero(*tensors: Tensor) -> Tensor:
    """Return a 0 that is connected to the tensors in the autograd graph; its gradients are 0.

    Example:
        >>> connected_zero(torch.tensor([float("inf")]))
        tensor(0.)
    """
    # masked, not multiplied by 0: 0 · ∞ is NaN
    zeros = [widen(tensor).masked_fill(torch.ones_like(tensor, dtype=torch.bool), 0).sum() for tensor in tensors]
    return torch.stack(zeros).sum()
