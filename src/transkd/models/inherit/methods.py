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
from transkd.models.inherit.checks import Images, check_finite, check_images, check_pair, image_batches
from transkd.models.inherit.copying import start_from_teacher, take_normalisation
from transkd.models.inherit.decoder import solve_head
from transkd.models.inherit.encoder import solve_encoder
from transkd.models.inherit.fits import Solving
from transkd.models.inherit.report import InheritReport, compare
from transkd.models.inherit.selecting import start_from_subset
from transkd.models.network import Network

__all__ = ["METHODS", "inherit"]

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

    "solve": each layer of a narrower, shallower student of the teacher's family is solved by linear least squares on
    what both networks make of some unlabelled images (docs/inherit.md); MiT and PVTv2. "copy": the teacher's weights
    as they are, for the same widths and at most its depth (``start_from_teacher``). "select": a subset of the
    teacher's weights, for any two networks whose parameters correspond by name. "best": the first of these three that
    the networks allow.

    The student takes over the teacher's normalisation, and the origin of its weights.

    Args:
        teacher: trained; is not changed.
        student: changed in place; left as it is when anything does not fit.
        images: RGB [N, 3, H, W], uint8 or float in [0, 1], or a sequence of such images or batches, which is gone
            through several times and may load them as it goes; of the size that the student will see. "copy" and
            "select" use them for the report alone and do without.
        how: "solve", "copy", "select" or "best".
        ridge: of all least squares, in units of the inputs' mean variance.
        mirror: solve on the mirror images as well.
        seed: of all random numbers; the same seed and images give the same student.
        progress: show a progress bar.

    Returns:
        What it took and what is left of the teacher.

    Raises:
        UserError: the networks do not correspond, images are too small or too few, NaN in weights or activations.

    Example:
        >>> from transkd.models import create_segmenter
        >>> _ = torch.manual_seed(0)
        >>> teacher, student = (create_segmenter("segformer_b0", 5, encoder={"channels": c, "depths": [1, 1, 1, 1]},
        ...                     width=16) for c in ([8, 16, 40, 64], [4, 8, 20, 32]))
        >>> report = inherit(teacher, student, torch.rand(4, 3, 64, 96), progress=False)
        >>> report.how, report.images, len(report.feature_errors)
        ('solve', 4, 4)
    """
    if how not in METHODS:
        raise UserError(f"unknown way to inherit {how!r}; there are: {', '.join(METHODS)}")
    started = time.perf_counter()
    check_finite(teacher)
    if images is not None or how == "solve":
        check_images(images)
    how = _best(teacher, student, images) if how == "best" else how
    count = 0 if images is None else sum(len(batch) for batch in image_batches(images))
    expert, draft = _frozen(teacher), _frozen(student)
    device = expert.mean.device
    draft.to(device)
    warnings: list[str] = []
    with Progress(disable=not progress, transient=True) as bar, torch.no_grad():
        if how == "solve":
            warnings = _solve(expert, draft, _on(images, device, mirror), ridge, seed, bar)
            student.load_state_dict(draft.state_dict())
            take_normalisation(student, teacher)
        else:
            (start_from_teacher if how == "copy" else start_from_subset)(student, teacher)
        errors, agreement = _compared(expert, student, images, bar)
    for warning in warnings:
        log.warning("inherit: %s", warning)
    return InheritReport(how, count, time.perf_counter() - started, errors, agreement, tuple(warnings))


def _frozen(network: Network) -> Network:
    """Copy a network in eval mode and float32."""
    return copy.deepcopy(network).eval().float()


def _best(teacher: Network, student: Network, images: Images | None) -> str:
    """The first method that the networks allow; solving needs images."""
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("copy", lambda: start_from_teacher(copy.deepcopy(student), teacher)),
        ("select", lambda: start_from_subset(copy.deepcopy(student), teacher)),
    ]
    if images is not None:
        attempts.insert(0, ("solve", lambda: check_pair(teacher, student)))
    reasons = []
    for how, attempt in attempts:
        try:
            attempt()
        except UserError as error:
            reasons.append(str(error))
        else:
            return how
    raise UserError(f"no way to start {student.name} from {teacher.name}. " + "; ".join(reasons))


def _solve(teacher: Any, student: Any, images: Iterable[Tensor], ridge: float, seed: int, bar: Progress) -> list[str]:
    """Solve the student in place; return warnings."""
    pair = check_pair(teacher, student)
    stages = pair.student
    task = bar.add_task("solving the student", total=1 + sum(1 + len(stage.blocks) for stage in stages))
    solving = Solving(
        ridge,
        torch.Generator().manual_seed(seed),
        partial(bar.advance, task),
        {module: name for name, module in student.named_modules()},
    )
    warnings = []
    with closing(Activations()) as batches:
        for batch in images:
            seen = teacher.normalise(batch)
            batches.append(teacher_0=seen, student_0=seen)
        readers = solve_encoder(pair.teacher, stages, batches, solving)
        solve_head(teacher.head, student.head, readers, batches, solving)
        solving.advance()
    if teacher.num_classes != student.num_classes:
        warnings.append(
            f"the teacher has {teacher.num_classes} classes, the student {student.num_classes}; the classifier starts "
            "from random weights"
        )
    return warnings + solving.warnings()


def _compared(
    teacher: Network, student: Network, images: Images | None, bar: Progress
) -> tuple[tuple[float, ...], float | None]:
    if images is None:
        return (), None
    task = bar.add_task("comparing it to the teacher", total=sum(1 for _ in image_batches(images)))
    device = teacher.mean.device
    batches = _on(images, device)
    return compare(teacher, _frozen(student).to(device), batches, partial(bar.advance, task))


def _on(images: Images | None, device: torch.device, mirror: bool = False) -> Iterable[Tensor]:
    return (batch.to(device) for batch in image_batches(images if images is not None else [], mirror))
