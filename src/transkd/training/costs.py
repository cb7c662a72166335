"""Time and memory of a run, from some real training steps and validation batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from omegaconf import DictConfig

from transkd.data import SegmentationDataModule
from transkd.losses import Criterion
from transkd.models import FrozenTeacher, Network
from transkd.report import count_parameters
from transkd.settings import CheckSettings
from transkd.training import build
from transkd.training.build import Parts
from transkd.training.device import Device
from transkd.training.distiller import Distiller
from transkd.training.fitting import fit
from transkd.training.probing import StepTimer, ValidationTimer, loader_seconds
from transkd.training.scoring import score

__all__ = ["estimate_hours", "measure_costs", "without_workers"]

ONE_DEVICE: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
"""Arguments of Lightning's Trainer for measurements in this process."""


@contextmanager
def without_workers(data: SegmentationDataModule) -> Iterator[None]:
    """Read data in this process, where loading is not timed: workers take long to start and read ahead."""
    workers, data.num_workers = data.num_workers, 0
    try:
        yield
    finally:
        data.num_workers = workers


def measure_costs(
    facts: dict[str, Any],
    cfg: DictConfig,
    settings: CheckSettings,
    parts: Parts,
    teacher: FrozenTeacher | None,
    device: Device,
) -> None:
    """Train some steps of the configured batch with the run's own trainer, and note memory, speed and hours.

    Args:
        facts: gets the entries "parameters", "memory", "speed" and, if the length of the run is known, "hours".
        cfg: the whole configuration; trainer and optimization are built from it.
        settings: the settings of the check.
        parts: the parts of the run; the student is trained.
        teacher: the frozen teacher; None if no term reads it.
        device: the run's device.

    Raises:
        UserError: as the training does.
    """
    data, student, _, criterion = parts
    facts["parameters"] = parameter_counts(student, criterion)
    whole = build.build_side_trainer(cfg)  # the run's own, for its numbers of devices and batches
    seconds = loader_seconds(data)
    timer = StepTimer(settings.steps, device)
    looks_back = bool(settings.gradients_every or criterion.shares)
    device.compile(student, *criterion.terms.values(), keep_graph=looks_back)
    distiller = Distiller(
        student, criterion, teacher, build.build_optimization(cfg), settings.protocol, device,
        gradients_every=settings.gradients_every,
    )  # fmt: skip
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0, **ONE_DEVICE}
    options |= {"min_epochs": None, "min_steps": None}  # the timer stops the training, however long the run has to be
    if settings.trainer.max_epochs == 0:
        options["max_epochs"] = 1  # a run that only starts and scores its student has no step to time
    quiet = build.build_trainer(cfg, callbacks=[timer], enable_progress_bar=False, **options)
    with without_workers(data):
        fit(quiet, distiller, data)
    steps = timer.seconds[1:] or timer.seconds
    facts["memory"] = {"bytes": timer.peak, "measured": timer.memory.measured, "batch_size": data.batch_size}
    step = sum(steps) / len(steps)
    side = build.build_side_trainer(cfg, limit_val_batches=2, **ONE_DEVICE)
    validation = ValidationTimer(device)
    side.callbacks.append(validation)  # type: ignore[attr-defined]
    score(student, data, settings.protocol, side, device)
    facts["speed"] = {
        "loader_images_per_second": data.batch_size / seconds,
        "step_images_per_second": data.batch_size / step,
        "step_seconds": step,
        "steps_timed": len(steps),
        "validation_seconds": validation.seconds,
        "cache": settings.data.cache,
        "compiled": device.compile_mode is not None,
    }
    hours = estimate_hours(whole, data, step, seconds, validation.seconds)
    if hours is not None:
        facts["hours"] = hours


def parameter_counts(student: Network, criterion: Criterion) -> dict[str, int]:
    """Numbers of parameters: deployed, in training, and trained of the student."""
    count = count_parameters(student, criterion)
    return {
        "student": count["student"],
        "with_training_modules": sum(count.values()),
        "trained_of_the_student": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }


def estimate_hours(
    trainer: L.Trainer, data: SegmentationDataModule, step: float, loader: float, validation: float
) -> float | None:
    """Estimate the hours of training and validation; None if neither epochs nor steps are limited.

    Args:
        trainer: the run's trainer.
        data: determines the numbers of batches.
        step: seconds of a training step.
        loader: seconds of the loader per training batch; worker processes load while the step runs.
        validation: seconds per validation batch.
    """
    devices = trainer.world_size
    epoch = _limited(data.batches(devices), trainer.limit_train_batches)
    limits = [trainer.max_steps * trainer.accumulate_grad_batches] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs * epoch)
    if not limits or not epoch:
        return None
    batches = min(limits)
    training = batches * (max(step, loader) if data.num_workers else step + loader)
    validations = _validations(trainer, batches, epoch)
    scored = _limited(-(-_batches(data) // devices), trainer.limit_val_batches) * validation
    return (training + validations * scored) / 3600


def _validations(trainer: L.Trainer, batches: int, epoch: int) -> int:
    """Number of validations in so many training batches, with so many of them in an epoch."""
    interval: Any = trainer.val_check_interval  # batches, or a share of an epoch; None if a time is given
    each = interval if isinstance(interval, int) else max(1, int(epoch * (interval or 1.0)))
    if trainer.check_val_every_n_epoch is None:  # counted across epochs
        return batches // each
    return batches // epoch // trainer.check_val_every_n_epoch * max(1, epoch // each)


def _batches(data: SegmentationDataModule) -> int:
    return -(-len(data.dataset("val")) // data.eval_batch_size)


def _limited(batches: int, limit: float | None) -> int:
    """Number of batches under a limit of Lightning: a number of them, or a share as a float."""
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)
