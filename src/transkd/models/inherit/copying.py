"""Initialise a student by copying the teacher's weights: same widths, at most as many blocks."""

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from transkd.errors import UserError
from transkd.models.network import Network
from transkd.models.storage.lineage import merge_lineage

__all__ = ["block_sources", "start_from_teacher", "take_normalisation", "take_over"]

log = logging.getLogger(__name__)


def start_from_teacher(student: Network, teacher: Network) -> None:
    """Copy the teacher's weights into a student of the same widths and, stage by stage, at most its depth.

    Of a stage with d_t blocks in the teacher and d_s in the student, the student takes blocks 0, r, 2r, … of the
    teacher with ``r = ⌈d_t / d_s⌉``, as DistilBERT (arXiv 1910.01108, section 3) and WeCoLoRA (arXiv 2404.09326) do.
    Where these are fewer than d_s, as for 3 of 4, block j takes ``j·d_t // d_s``, spread evenly. A decode head of
    another size keeps its random weights, which is logged.

    Args:
        student: changed in place; unchanged if an error is raised.
        teacher: has the same kind of encoder.

    Raises:
        UserError: the encoders differ in more than depth, such as in width.

    Example:
        >>> from transkd.models import create_segmenter
        >>> teacher, student = create_segmenter("segformer_b1", 5), create_segmenter("segformer_b1", 5)
        >>> start_from_teacher(student, teacher)
        >>> bool((student.head.linear_pred.weight == teacher.head.linear_pred.weight).all())
        True
    """
    theirs, ours = teacher.state_dict(), student.state_dict()
    sources = block_sources(student, teacher)
    unlike = [
        name for name, source in sources.items() if source not in theirs or theirs[source].shape != ours[name].shape
    ]
    if any(not name.startswith("head.") for name in unlike):
        name = next(name for name in unlike if not name.startswith("head."))
        raise UserError(
            f"student.from_teacher: {name} is {list(ours[name].shape)} in {student.name} and "
            f"{_shape(theirs.get(sources[name]))} in {teacher.name}. A student can start from a teacher of the same "
            "kind and widths that is at least as deep, such as segformer_b1 from segformer_b2"
        )
    if unlike:  # the head differs in width: copy none of it, since its layers depend on each other
        log.info("student.from_teacher: the decode heads differ in size; the student's starts from random weights")
        sources = {name: source for name, source in sources.items() if not name.startswith("head.")}
    take_over(student, teacher, {name: theirs[source] for name, source in sources.items()})


def block_sources(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Map names of the student's tensors to the teacher's; in deeper stages the numbers of the blocks differ."""
    blocks = _shortened_lists(student, teacher)
    return {name: _source_name(name, blocks) for name in student.state_dict()}


def take_over(student: Network, teacher: Network, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors from the teacher into the student, and copy the normalisation and lineage."""
    student.load_state_dict({**student.state_dict(), **tensors})
    for name, taken in _shortened_lists(student, teacher).items():
        of = len(list(teacher.get_submodule(name).children()))
        log.info("student.from_teacher: %s takes the teacher's blocks %s of %d", name, taken, of)
    take_normalisation(student, teacher)


def take_normalisation(student: Network, teacher: Network) -> None:
    """Copy the teacher's normalisation, as copied weights need it, and merge its lineage."""
    student.mean.copy_(teacher.mean)
    student.std.copy_(teacher.std)
    student.lineage = merge_lineage(student.lineage, teacher.lineage)


def _shortened_lists(student: nn.Module, teacher: nn.Module) -> dict[str, list[int]]:
    """Names of lists of blocks that are shorter in the student, with the indices of the teacher's blocks to copy."""
    lists = (nn.ModuleList, nn.Sequential)
    deeper = {name: len(module) for name, module in teacher.named_modules() if isinstance(module, lists)}
    return {
        name: _taken(deeper[name], len(module))
        for name, module in student.named_modules()
        if isinstance(module, lists) and 0 < len(module) < deeper.get(name, 0)
    }


def _taken(depth: int, count: int) -> list[int]:
    """Indices of ``count`` blocks to copy from a stage of ``depth`` blocks."""
    every = list(range(0, depth, -(-depth // count)))
    return every if len(every) == count else [j * depth // count for j in range(count)]


def _source_name(name: str, blocks: dict[str, list[int]]) -> str:
    for prefix, taken in blocks.items():
        if name.startswith(f"{prefix}."):
            index, rest = name[len(prefix) + 1 :].split(".", 1)
            return f"{prefix}.{taken[int(index)]}.{rest}"
    return name


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
