"""``inherit``: initialise a student from its teacher by one of three methods."""

import copy
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from transkd.errors import UserError
from transkd.models.inherit.activations import Activations
from transkd.models.inherit.checks import Images, check_finite, check_pair, image_batches
from transkd.models.inherit.copying import start_from_teacher, take_normalisation
from transkd.models.inherit.decoder import solve_head
from transkd.models.inherit.encoder import solve_encoder
from transkd.models.inherit.fits import Solving
from transkd.models.inherit.report import InheritReport, compare
from transkd.models.inherit.selecting import start_from_subset
from transkd.models.network import Network

__all__ = ["METHODS", "allowed_method", "inherit"]

log = logging.getLogger(__name__)

METHODS = ("solve", "copy", "select", "best")


def inherit(
    teacher: Network,
    student: Network,
    images: Images | None = None,
    how: str = "solve",
    *,
    ridge: float = 1e-3,
    mirror: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> InheritReport:
    """Give a student its first weights from its teacher, before any step of training.

    "solve" solves each layer of a narrower, shallower student of the teacher's family (MiT or PVTv2) by least squares
    on what both networks make of unlabelled images (docs/inherit.md). "copy" takes the teacher's weights as they
    are, for the same widths and at most its depth (``start_from_teacher``). "select" takes a subset of them, for any
    two networks whose parameters correspond by name. "best" is the first of these three that the networks allow.

    The student takes over the teacher's normalisation, and the origin of its weights.

    Args:
        teacher: trained; is not changed.
        student: changed in place; left as it is when anything does not fit.
        images: RGB [N, 3, H, W], uint8 or float in [0, 1], of the size that the student will see; or a sequence of
            images or batches, gone through twice. "copy" and "select" need them for the report alone.
        how: "solve", "copy", "select" or "best".
        ridge: of all least squares, in units of the inputs' mean variance.
        mirror: solve on the mirror images as well.
        seed: the same seed and images give the same student.
        progress: show a progress bar.

    Returns:
        What it took, and how like its teacher the student is.

    Raises:
        UserError: networks that do not correspond, no images or too small ones, NaN in weights or activations.

    Example:
        >>> from transkd.models import create_segmenter
        >>> widths = [8, 16, 40, 64], [4, 8, 20, 32]
        >>> teacher, student = (create_segmenter("segformer_b0", 5, encoder={"channels": width}) for width in widths)
        >>> inherit(teacher, student, torch.rand(4, 3, 64, 96), progress=False).how
        'solve'
    """
    if how not in METHODS:
        raise UserError(f"unknown way to inherit {how!r}; there are: {', '.join(METHODS)}")
    check_finite(teacher)
    how = allowed_method(teacher, student, how, images is not None) if how == "best" else how
    return _start(teacher, student, images, how, Solving(ridge, torch.Generator().manual_seed(seed)), mirror, progress)


def _start(
    teacher: Network,
    student: Network,
    images: Images | None,
    how: str,
    solving: Solving,
    mirror: bool,
    progress: bool,
) -> InheritReport:
    started = time.perf_counter()
    expert, draft = _frozen(teacher), _frozen(student)
    if expert.mean.device.type == "mps":  # has no float64
        expert.cpu()
    draft.to(expert.mean.device)
    with Progress(disable=not progress, transient=True) as bar, torch.no_grad():
        if how == "solve":
            _solve(expert, draft, images, mirror, solving, bar)
            student.load_state_dict(draft.state_dict())
            take_normalisation(student, teacher)
        else:
            (start_from_teacher if how == "copy" else start_from_subset)(student, teacher)
            draft = _frozen(student).to(expert.mean.device)
        compared: tuple[int, tuple[float, ...], float | None] = (0, (), None)
        if images is not None:
            task = bar.add_task("comparing the student to its teacher", total=None)
            compared = compare(expert, draft, _on(images, expert), partial(bar.advance, task))
    count, errors, agreement = compared
    warnings = tuple(solving.warnings(count))
    for warning in warnings:
        log.warning("inherit: %s", warning)
    return InheritReport(how, count, time.perf_counter() - started, errors, agreement, warnings)


def _frozen(network: Network) -> Network:
    """Copy a network in eval mode and float32."""
    return copy.deepcopy(network).eval().float()


def allowed_method(teacher: Network, student: Network, how: str, solvable: bool = True) -> str:
    """The method that ``inherit`` uses; with "best" the first that the networks allow. Neither network is changed.

    Args:
        teacher: its weights do not matter.
        student: is not changed.
        how: as in ``inherit``.
        solvable: whether "solve" is among the choices of "best"; it needs images.

    Raises:
        UserError: the networks do not allow it.
    """
    attempts: dict[str, Callable[[], object]] = {
        "solve": lambda: check_pair(teacher, student),
        "copy": lambda: start_from_teacher(copy.deepcopy(student), teacher),
        "select": lambda: start_from_subset(copy.deepcopy(student), teacher),
    }
    if how != "best":
        attempts[how]()
        return how
    reasons = []
    for how, attempt in attempts.items():
        if how == "solve" and not solvable:
            continue
        try:
            attempt()
        except UserError as error:
            reasons.append(str(error))
        else:
            return how
    raise UserError(f"no way to start {student.name} from {teacher.name}. " + "; ".join(reasons))


def _solve(teacher: Any, student: Any, images: Images | None, mirror: bool, solving: Solving, bar: Progress) -> None:
    """Solve the student in place."""
    pair = check_pair(teacher, student)
    task = bar.add_task("solving the student", total=1 + sum(1 + len(stage.blocks) for stage in pair.student))
    solving.advance = partial(bar.advance, task)
    solving.names = {module: name for name, module in student.named_modules()}
    student.mean.copy_(teacher.mean)
    student.std.copy_(teacher.std)
    with closing(Activations()) as batches:
        for batch in _on(images, teacher):
            for seen in (batch, batch.flip(-1))[: 1 + mirror]:
                image = teacher.normalise(seen)
                batches.append(teacher_0=image, student_0=image)
        readers = solve_encoder(pair.teacher, pair.student, batches, solving)
        solve_head(teacher.head, student.head, readers, batches, solving)
        solving.advance()
    if teacher.num_classes != student.num_classes:
        solving.notes.append(
            f"the teacher has {teacher.num_classes} classes, the student {student.num_classes}; the classifier starts "
            "from random weights"
        )


def _on(images: Images | None, network: Network) -> Iterable[Tensor]:
    return (batch.to(network.mean.device) for batch in image_batches(images))
