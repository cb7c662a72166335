"""What the terms share: one grid for two maps, labels on it, the stages that a term compares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.layers.upsampling import upsampled
from transkd.losses.shared.checks import check_needs, name_of, require_target
from transkd.losses.shared.distances import widen
from transkd.outputs import IGNORE, SegmentationOutput

__all__ = [
    "GRIDS",
    "feature_pairs",
    "labels_on_grid",
    "logits_pair",
    "nearest",
    "nothing",
    "on_grid",
]

GRIDS = ("teacher", "student", "labels")


def on_grid(
    term: object, student: Tensor, teacher: Tensor, grid: str = "teacher", target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bring two maps to one grid, at least in float32, the teacher's detached.

    Args:
        term: the one that asks; its name goes into messages.
        student: [B, C, h, w].
        teacher: [B, C', h', w'].
        grid: "teacher" (the teacher's size), "student" or "labels"; whatever has another size is resized bilinearly,
            align_corners=False.
        target: [B, H, W]; needed for "labels".

    Raises:
        UserError: unlike batches, or labels that are the grid and not given.

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
    """Labels [B, H, W] at another size by nearest neighbour, and which of them are valid.

    Returns:
        labels int64 [B, h, w], 0 where invalid, so that they can index; valid bool [B, h, w].

    Example:
        >>> labels, valid = labels_on_grid(torch.tensor([[[1, 255], [2, 3]]]), (1, 2))
        >>> labels.tolist(), valid.tolist()
        ([[[1, 0]]], [[[True, False]]])
    """
    labels = nearest(target, size).long()
    valid = (labels != IGNORE) & (labels >= 0)
    return labels.masked_fill(~valid, 0), valid


def nearest(target: Tensor, size: Sequence[int]) -> Tensor:
    """Labels [B, H, W] as they are, at another size: source index ⌊q·H/h⌋."""
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
    """Both networks' logits [B, K, h, w] on one grid.

    Raises:
        UserError: a network shows no logits, or they have different numbers of classes, or just one.
    """
    shown = check_needs(term, frozenset({"logits"}), student, teacher)
    assert shown is not None
    assert student.logits is not None
    assert shown.logits is not None
    classes = student.logits.shape[1], shown.logits.shape[1]
    if classes[0] != classes[1]:
        raise UserError(
            f"{name_of(term)} compares class by class; the student has {classes[0]} classes, the teacher {classes[1]}. "
            "Choose a teacher that was trained on the same classes."
        )
    if classes[0] < 2:
        raise UserError(
            f"{name_of(term)} compares distributions over classes; with a single class there is nothing to."
        )
    return on_grid(term, student.logits, shown.logits, grid, target)


def feature_pairs(
    term: object, stages: Sequence[int], student: SegmentationOutput, teacher: SegmentationOutput | None
) -> list[tuple[Tensor, Tensor]]:
    """The features of the chosen stages (1 is the shallowest), each at its own size, the teacher's detached.

    Raises:
        UserError: a network shows no features or not so many stages.
    """
    shown = check_needs(term, frozenset({"features"}), student, teacher)
    assert shown is not None
    pairs = []
    for stage in stages:
        for who, output in (("student", student), ("teacher", shown)):
            if stage > len(output.features):
                raise UserError(
                    f"{name_of(term)} reads stage {stage}, but the {who} shows {len(output.features)} stages of "
                    f"features; choose among 1 to {len(output.features)}: stages=[…]."
                )
        pairs.append((student.features[stage - 1], shown.features[stage - 1].detach()))
    return pairs


def nothing(*tensors: Tensor) -> Tensor:
    """A differentiable 0, connected to what it would have been computed from.

    Example:
        >>> nothing(torch.tensor([float("inf")]))
        tensor(0.)
    """
    # 0 times the values would keep an infinity as NaN
    zeros = [widen(tensor).masked_fill(torch.ones_like(tensor, dtype=torch.bool), 0).sum() for tensor in tensors]
    return torch.stack(zeros).sum()
