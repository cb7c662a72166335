"""Initialise a student with a subset of the teacher's weights: weight selection."""

import logging

import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.models.inherit.copying import block_sources, take_over
from transkd.models.network import Network

__all__ = ["start_from_subset"]

log = logging.getLogger(__name__)


@torch.no_grad()
def start_from_subset(student: Network, teacher: Network) -> None:
    """Take evenly spaced indices of the teacher's tensors, along every dimension.

    Weight selection, arXiv 2311.18823, section 3.2. Index i of n_s in the student is ``i·n_t // n_s`` of n_t in the
    teacher, the same for all tensors, so corresponding channels stay together. This also holds for concatenated
    tensors (keys and values of all heads in one matrix, the decode head's four maps in one convolution): their parts
    have equal sizes, and the rule selects equally many of each. Of deeper stages the same blocks as by "copy" are
    selected. If the classes differ, the classifier keeps its random weights.

    Args:
        student: changed in place; unchanged if an error is raised.
        teacher: has, for each tensor of the student, one of the same name that is at least as large in every dimension.

    Raises:
        UserError: a tensor is missing or too small in the teacher.

    Example:
        >>> from transkd.models import create_segmenter
        >>> teacher, student = create_segmenter("segformer_b1", 5), create_segmenter("segformer_b0", 5)
        >>> start_from_subset(student, teacher)
        >>> wide, narrow = (n.encoder.block1[0].attn.kv.weight for n in (teacher, student))
        >>> bool((narrow == wide[::2, ::2]).all())  # of 64 keys and 64 values 32 each
        True
    """
    theirs, ours = teacher.state_dict(), student.state_dict()
    taken = {}
    for name, source in block_sources(student, teacher).items():
        mine, its = ours[name], theirs.get(source)
        if its is not None and _is_classifier(mine, its, student, teacher):
            continue
        if its is None or its.ndim != mine.ndim or any(n > of for n, of in zip(mine.shape, its.shape, strict=True)):
            what = "missing" if its is None else list(its.shape)
            raise UserError(
                f"select: {name} is {list(mine.shape)} in {student.name} and {what} in {teacher.name}. A student takes "
                "a subset of the weights of a teacher of the same kind that is nowhere smaller, such as segformer_b0 "
                "of segformer_b1"
            )
        taken[name] = _spaced(its, mine.shape)
    if student.num_classes != teacher.num_classes:
        log.info(
            "select: the classes differ, %d and %d; the classifier starts from random weights",
            teacher.num_classes,
            student.num_classes,
        )
    take_over(student, teacher, taken)


def _is_classifier(mine: Tensor, its: Tensor, student: Network, teacher: Network) -> bool:
    """Whether a tensor has one entry per class and the networks' numbers of classes differ."""
    classes = student.num_classes, teacher.num_classes
    return classes[0] != classes[1] and mine.ndim > 0 and its.ndim > 0 and (len(mine), len(its)) == classes


def _spaced(tensor: Tensor, shape: torch.Size) -> Tensor:
    for dimension, (count, of) in enumerate(zip(shape, tensor.shape, strict=True)):
        if count != of:
            tensor = tensor.index_select(dimension, torch.arange(count, device=tensor.device) * of // count)
    return tensor
