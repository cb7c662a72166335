"""What a term must find in the networks' outputs, said clearly where it is not there."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from transkd.errors import UserError
from transkd.outputs import SegmentationOutput

__all__ = [
    "check_choice",
    "check_count",
    "check_needs",
    "check_positive",
    "check_share",
    "check_stages",
    "name_of",
    "paired_channels",
    "require_target",
    "stage_pairs",
]

CHANNEL_DIM = {"features": 1, "embeddings": 2}
INSTEAD = {
    "logits": "ask that network for its logits, or choose a term that reads features, such as csf",
    "features": "choose a network that shows stage features, or a term that reads logits",
    "embeddings": "choose a term that reads features, such as csf, or a network with patch embeddings, "
    "such as segformer_b0",
}


class StagewiseTerm(Protocol):
    """A term that compares stage by stage."""

    needs: frozenset[str]
    student_channels: tuple[int, ...]
    teacher_channels: tuple[int, ...]


def paired_channels(
    term: object, student: Sequence[int], teacher: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give both lists of channels as tuples; for a term's constructor.

    Raises:
        UserError: the lists differ in length, or are empty.
    """
    if len(student) != len(teacher) or not student:
        raise UserError(
            f"{name_of(term)} pairs each stage of the student with one of the teacher; got {len(student)} "
            f"student_channels {list(student)} and {len(teacher)} teacher_channels {list(teacher)}. "
            "Choose networks with the same number of stages."
        )
    return tuple(student), tuple(teacher)


def check_needs(
    term: object, needs: frozenset[str], student: SegmentationOutput, teacher: SegmentationOutput | None
) -> SegmentationOutput | None:
    """Give the teacher back after seeing that both networks show what a term reads.

    Raises:
        UserError: a network shows nothing of a kind that is needed, or there is no teacher.
    """
    if needs and teacher is None:
        raise UserError(
            f"{name_of(term)} reads the teacher's {', '.join(sorted(needs))}, but there is no teacher. "
            "Choose a teacher, or train without distillation (distill=none)."
        )
    for kind in sorted(needs):
        for who, output in (("student", student), ("teacher", teacher)):
            if getattr(output, kind) is None or len(getattr(output, kind)) == 0:
                raise UserError(f"{name_of(term)} compares {kind}, but the {who} shows none: {INSTEAD[kind]}.")
    return teacher


def stage_pairs(
    term: StagewiseTerm, kind: str, student: SegmentationOutput, teacher: SegmentationOutput | None
) -> list[tuple[Tensor, Tensor]]:
    """Pair the student's stages with the teacher's, the teacher's detached, shallowest first.

    Args:
        term: the one that asks; its name goes into the messages, its channels are what is expected.
        kind: "features" or "embeddings".
        student: what the student shows.
        teacher: what the teacher shows.

    Raises:
        UserError: something is missing, or the stages or their channels are not those that the term was
            built for.
    """
    shown = check_needs(term, term.needs, student, teacher)
    ours: tuple[Tensor, ...] = getattr(student, kind)
    theirs: tuple[Tensor, ...] = getattr(shown, kind)
    if not len(ours) == len(theirs) == len(term.student_channels):
        raise UserError(
            f"{name_of(term)} was built for {len(term.student_channels)} stages and pairs them one to one; "
            f"the student shows {len(ours)} stages of {kind}, the teacher {len(theirs)}. "
            "Choose networks with the same number of stages."
        )
    _check_channels(term, "student", kind, ours, term.student_channels)
    _check_channels(term, "teacher", kind, theirs, term.teacher_channels)
    if kind == "embeddings":  # maps can be resized, tokens cannot
        _check_grids(term, student, shown)
    return [(mine, other.detach()) for mine, other in zip(ours, theirs, strict=True)]


def _check_channels(
    term: StagewiseTerm, who: str, kind: str, maps: tuple[Tensor, ...], expected: tuple[int, ...]
) -> None:
    got = tuple(stage.shape[CHANNEL_DIM[kind]] for stage in maps)
    if got != expected:
        raise UserError(
            f"{name_of(term)} was built with {who}_channels={expected}, but the {who}'s {kind} have {got}. "
            f"Build it with {who}_channels={got}."
        )


def _check_grids(term: StagewiseTerm, student: SegmentationOutput, teacher: SegmentationOutput | None) -> None:
    assert teacher is not None
    for i, (ours, theirs) in enumerate(zip(student.embeddings, teacher.embeddings, strict=True), start=1):
        if ours.shape[1] != theirs.shape[1]:
            raise UserError(
                f"{name_of(term)} pairs patch embeddings position by position, but stage {i} has "
                f"{ours.shape[1]} tokens in the student ({_image_size(student)}) and {theirs.shape[1]} in the teacher "
                f"({_image_size(teacher)}). Choose networks whose stages have the same strides and give both the same "
                "images, or choose a term that reads features or logits, such as csf or cwd."
            )


def _image_size(output: SegmentationOutput) -> str:
    return "image {}×{}".format(*output.image.shape[-2:])


def name_of(term: object) -> str:
    """What messages call a term."""
    return type(term).__name__


def require_target(term: object, target: Tensor | None) -> Tensor:
    """The labels, or a word that they are missing."""
    if target is None:
        raise UserError(f"{name_of(term)} reads the labels: call it with target=labels.")
    return target


def check_choice(term: object, setting: str, value: object, known: Sequence[object]) -> None:
    """Refuse a setting that is none of those known."""
    if value not in known:
        raise UserError(f"{name_of(term)}: {setting} must be one of {', '.join(map(repr, known))}; got {value!r}.")


def check_positive(term: object, setting: str, value: float) -> None:
    """Refuse zero, negative numbers, NaN and infinity."""
    if not 0 < value < float("inf"):
        raise UserError(f"{name_of(term)}: the {setting} must be a number greater than 0; got {value}.")


def check_share(term: object, setting: str, value: float) -> None:
    """Refuse a part's weight that is negative, NaN or infinite."""
    if not 0 <= value < float("inf"):
        raise UserError(f"{name_of(term)}: {setting} must be a number of at least 0; got {value}.")


def check_stages(term: object, stages: Sequence[int]) -> tuple[int, ...]:
    """Stages as a tuple: different numbers from 1 on, one at least."""
    if not stages or len(set(stages)) != len(stages) or min(stages) < 1:
        raise UserError(
            f"{name_of(term)}: stages must be different numbers from 1 on, one at least; got {list(stages)}."
        )
    return tuple(stages)


def check_count(term: object, setting: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name_of(term)}: {setting} must be a whole number of at least {least}; got {value!r}.")
