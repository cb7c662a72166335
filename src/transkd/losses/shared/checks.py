"""Checks of a term's settings and of the network outputs that it reads; each failure is a `UserError`."""

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
    "check_stage",
    "check_stages",
    "name_of",
    "paired_channels",
    "require_target",
    "stage_pairs",
]

CHANNEL_DIM = {"features": 1, "embeddings": 2}
ADVICE = {
    "logits": "request the logits of that network, or choose a term that reads features, such as csf",
    "features": "choose a network that returns stage features, or a term that reads logits",
    "embeddings": "choose a term that reads features, such as csf, or a network with patch embeddings, "
    "such as segformer_b0",
}


class StagewiseTerm(Protocol):
    """Attributes of a term that compares stage by stage."""

    needs: frozenset[str]
    student_channels: tuple[int, ...]
    teacher_channels: tuple[int, ...]


def paired_channels(
    term: object, student: Sequence[int], teacher: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Validate both lists of stage channels in a term's constructor and return them as tuples.

    Raises:
        UserError: the lists differ in length or are empty.
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
    """Check that both networks return every kind of output that a term reads; return the teacher's output.

    Raises:
        UserError: a network does not return a required kind of output, or there is no teacher.
    """
    if needs and teacher is None:
        raise UserError(
            f"{name_of(term)} reads the teacher's {', '.join(sorted(needs))}, but there is no teacher. "
            "Choose a teacher, or train without distillation (distill=none)."
        )
    for kind in sorted(needs):
        for role, output in (("student", student), ("teacher", teacher)):
            if getattr(output, kind) is None or len(getattr(output, kind)) == 0:
                raise UserError(f"{name_of(term)} compares {kind}, but the {role} returns none: {ADVICE[kind]}.")
    return teacher


def stage_pairs(
    term: StagewiseTerm, kind: str, student: SegmentationOutput, teacher: SegmentationOutput | None
) -> list[tuple[Tensor, Tensor]]:
    """Pair the student's stages with the teacher's detached stages, shallowest first.

    Args:
        term: the calling term; its class name appears in error messages, its channels are the expected ones.
        kind: "features" or "embeddings".
        student: the student's output.
        teacher: the teacher's output.

    Raises:
        UserError: an output is missing, or the number of stages or their channels differ from those that the term was
            built for.
    """
    teacher = check_needs(term, term.needs, student, teacher)
    student_stages: tuple[Tensor, ...] = getattr(student, kind)
    teacher_stages: tuple[Tensor, ...] = getattr(teacher, kind)
    if not len(student_stages) == len(teacher_stages) == len(term.student_channels):
        raise UserError(
            f"{name_of(term)} was built for {len(term.student_channels)} stages and pairs them one to one; "
            f"the student returns {len(student_stages)} stages of {kind}, the teacher {len(teacher_stages)}. "
            "Choose networks with the same number of stages."
        )
    _check_channels(term, "student", kind, student_stages, term.student_channels)
    _check_channels(term, "teacher", kind, teacher_stages, term.teacher_channels)
    if kind == "embeddings":  # terms resize maps, but not token sequences
        _check_grids(term, student, teacher)
    return [(s, t.detach()) for s, t in zip(student_stages, teacher_stages, strict=True)]


def _check_channels(
    term: StagewiseTerm, role: str, kind: str, maps: tuple[Tensor, ...], expected: tuple[int, ...]
) -> None:
    got = tuple(stage.shape[CHANNEL_DIM[kind]] for stage in maps)
    if got != expected:
        raise UserError(
            f"{name_of(term)} was built with {role}_channels={expected}, but the {role}'s {kind} have {got}. "
            f"Build it with {role}_channels={got}."
        )


def _check_grids(term: StagewiseTerm, student: SegmentationOutput, teacher: SegmentationOutput | None) -> None:
    assert teacher is not None
    for i, (student_tokens, teacher_tokens) in enumerate(
        zip(student.embeddings, teacher.embeddings, strict=True), start=1
    ):
        counts = student_tokens.shape[1], teacher_tokens.shape[1]
        if counts[0] != counts[1]:
            raise UserError(
                f"{name_of(term)} pairs patch embeddings position by position, but stage {i} has "
                f"{counts[0]} tokens in the student ({_image_size(student)}) and {counts[1]} in the teacher "
                f"({_image_size(teacher)}). Choose networks whose stages have the same strides and give both the same "
                "images, or choose a term that reads features or logits, such as csf or cwd."
            )


def _image_size(output: SegmentationOutput) -> str:
    return "image {}×{}".format(*output.image.shape[-2:])


def name_of(term: object) -> str:
    """Return the class name of a term, for error messages."""
    return type(term).__name__


def require_target(term: object, target: Tensor | None) -> Tensor:
    """Return the labels; raise a `UserError` if they are None."""
    if target is None:
        raise UserError(f"{name_of(term)} reads the labels: call it with target=labels.")
    return target


def check_choice(term: object, setting: str, value: object, known: Sequence[object]) -> None:
    """Raise a `UserError` unless the value is one of those listed."""
    if value not in known:
        raise UserError(f"{name_of(term)}: {setting} must be one of {', '.join(map(repr, known))}; got {value!r}.")


def check_positive(term: object, setting: str, value: float) -> None:
    """Raise a `UserError` unless the value is finite and greater than 0."""
    if not 0 < value < float("inf"):
        raise UserError(f"{name_of(term)}: the {setting} must be a number greater than 0; got {value}.")


def check_share(term: object, setting: str, value: float) -> None:
    """Raise a `UserError` unless the value, the weight of a part of a term, is finite and at least 0."""
    if not 0 <= value < float("inf"):
        raise UserError(f"{name_of(term)}: {setting} must be a number of at least 0; got {value}.")


def check_stage(term: object, stage: int, count: int) -> int:
    """Return the number of a stage; raise a `UserError` unless it is from 1 to `count`."""
    if stage not in range(1, count + 1):
        raise UserError(f"{name_of(term)}: stage must be from 1 to {count}; got {stage!r}.")
    return stage


def check_stages(term: object, stages: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """Return the numbers of stages as a tuple.

    Args:
        term: the calling term; its class name appears in error messages.
        stages: numbers of stages, counted from 1.
        count: how many stages there are; None if that is not known yet.

    Raises:
        UserError: there is no number, one occurs twice, is below 1, or greater than `count`.
    """
    if not stages or len(set(stages)) != len(stages) or min(stages) < 1:
        raise UserError(f"{name_of(term)}: stages must be distinct numbers from 1, at least one; got {list(stages)}.")
    if count is not None and max(stages) > count:
        raise UserError(f"{name_of(term)}: stages must be from 1 to {count}; got {list(stages)}.")
    return tuple(stages)


def check_count(term: object, setting: str, value: object, least: int = 1) -> None:
    """Raise a `UserError` unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name_of(term)}: {setting} must be a whole number of at least {least}; got {value!r}.")
