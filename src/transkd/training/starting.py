"""What a run does with its networks before step 1: the student starts from its teacher, which is frozen."""

import logging
from typing import Any

import lightning as L

from transkd.models import FrozenTeacher, MappedClasses, Network, add_lora, inherit
from transkd.models.class_map import unmapped
from transkd.models.inherit.copying import take_normalisation
from transkd.models.storage.loading import CLASSIFIERS
from transkd.report import describe_scores
from transkd.settings import LoraSettings, TrainSettings
from transkd.training.build import Parts
from transkd.training.calibration import calibration_images
from transkd.training.device import Device
from transkd.training.scoring import score

__all__ = ["adapt", "freeze_teacher", "start_method", "start_student"]

log = logging.getLogger(__name__)


def start_student(
    settings: TrainSettings, parts: Parts, device: Device, trainer: L.Trainer, resumed: bool
) -> dict[str, Any] | None:
    """Initialise the student from the teacher and evaluate it before training; return an entry for results.json.

    Args:
        settings: of the run.
        parts: of the run, with a teacher.
        device: of the run.
        trainer: to evaluate with.
        resumed: the checkpoint brings the student's weights later; only the teacher's normalisation is copied.
    """
    data, student, teacher, _ = parts
    assert teacher is not None
    if resumed:
        take_normalisation(student, teacher)
        return None
    how = start_method(settings)
    solve = settings.student.solve
    images = calibration_images(data, solve.images, solve.folder, settings.seed)
    teacher.to(device.local)
    fresh = {name: tensor.clone() for name, tensor in student.state_dict().items() if name.startswith(CLASSIFIERS)}
    progress = settings.trainer.enable_progress_bar
    report = inherit(unmapped(teacher), student, images, how, seed=settings.seed, progress=progress)
    if isinstance(teacher, MappedClasses):
        student.load_state_dict({**student.state_dict(), **fresh})
        log.info("student: the classifier starts from random weights, since the teacher has other classes")
    teacher.cpu()  # Lightning moves it to the device later
    log.info("student: %s", report.summary())
    scores = score(student, data, settings.protocol, trainer, device)
    log.info("student: mIoU %.2f %% before any step (%s)", 100 * scores.miou, settings.protocol)
    return {**report.as_dict(), **describe_scores(scores, settings.protocol, data.classes.names)}


def start_method(settings: TrainSettings) -> str:
    """How the student starts from its teacher, as ``inherit`` calls it."""
    return "best" if settings.student.from_teacher is True else str(settings.student.from_teacher)


def freeze_teacher(settings: TrainSettings, parts: Parts, device: Device, count: int | None = None) -> FrozenTeacher:
    """Freeze the teacher and, depending on ``teacher.standardise``, standardise its features on ``count`` images."""
    assert parts.teacher is not None
    frozen = FrozenTeacher(parts.teacher, parts.criterion.ever_needs, cast_once=device.compile_mode is None)
    parts.teacher.to(device.local)
    count = count or settings.student.solve.images
    images = calibration_images(parts.data, count, seed=settings.seed, device=device.local)
    scales = frozen.standardise(images, settings.teacher.standardise)
    parts.teacher.cpu()
    if scales:
        log.info(
            "teacher: features are standardised per channel; their standard deviations were %s (teacher.standardise)",
            ", ".join(f"{scale:.2g}" for scale in scales),
        )
    return frozen


def adapt(student: Network, lora: LoraSettings) -> None:
    """Add LoRA to the student if configured."""
    if lora.rank is not None:
        add_lora(student, lora.rank, lora.train, lora.keep_drop_path)
