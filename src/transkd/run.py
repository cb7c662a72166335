"""A training run, from a composed configuration to a deployable student."""

import logging
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from transkd.arguments import check_arguments
from transkd.command.folders import enter
from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.files import write_atomically
from transkd.losses import Criterion
from transkd.metrics import Scores
from transkd.models import Network, merge_lora, save_segmenter
from transkd.models.storage.lineage import as_teacher, merge_lineage
from transkd.report import log_sizes, report_run
from transkd.settings import TrainSettings
from transkd.training import build, teaching
from transkd.training.build import Parts
from transkd.training.capture import Capture
from transkd.training.class_weights import fill_class_weights
from transkd.training.compilation import keep_compiled_code
from transkd.training.device import Device
from transkd.training.distiller import Distiller
from transkd.training.fitting import fit
from transkd.training.history import History
from transkd.training.process import prepare_data, prepare_process
from transkd.training.rehearsal import (
    check_labels,
    check_schedules,
    planned_steps,
    rehearse,
    rehearse_writing,
    weigh,
)
from transkd.training.resuming import check_teacher, locate, prepare_resuming
from transkd.training.scoring import score
from transkd.training.starting import adapt, freeze_teacher, start_student

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Build everything, train, evaluate, and write the run's folder."""
    started = time.time()
    settings = TrainSettings.read(cfg)
    check_arguments(cfg)
    build.enter_protocol(settings.protocol, settings.protocols)
    enter(Path(settings.run_dir), locate(settings.ckpt_path, settings.name))
    checkpoint = prepare_resuming(cfg, settings)
    device = Device.choose(
        settings.trainer.accelerator, settings.compile, settings.channels_last, settings.compile_regions
    )
    prepare_process(settings.keep_freed_memory, device.kind)
    keep_compiled_code(Path(settings.run_dir).parent / "compiled")
    device.check()
    L.seed_everything(settings.seed, verbose=False)

    data, student, teacher, criterion = parts = build_parts(cfg, settings, device)
    device = device.settled(planned_steps(data, settings.trainer), obstacles_to_graphs(settings, criterion))
    rehearse(student, teacher if criterion.ever_needs else None, criterion, data)
    optimization, trainer = build.build_optimization(cfg), build.build_trainer(cfg)
    notes: dict[str, Any] = {"experiment": settings.name, "eval_transform": serialise(data.eval_transform)}
    notes["classes"] = data.classes
    rehearse_writing(student, notes, {})
    teacher_scores, frozen, start = None, None, None
    if teacher is not None:
        about, teacher_scores = prepare_teacher(cfg, settings, teacher, data, device)
        notes |= about
        if checkpoint is not None:
            check_teacher(checkpoint, about, settings.resume == "force")
        if settings.student.from_teacher:
            start = start_student(
                settings, parts, device, build.build_side_trainer(cfg), resumed=checkpoint is not None
            )
        if criterion.ever_needs:
            frozen = freeze_teacher(settings, parts, device)
        student.lineage = merge_lineage(student.lineage, as_teacher(teacher.lineage))
    weigh(student, frozen, criterion, data)
    adapt(student, settings.student.lora)

    looks_back = bool(settings.gradients_every or criterion.shares)
    device.compile(student, teacher, *criterion.terms.values(), keep_graph=looks_back)
    resumed_from = None if checkpoint is None else str(checkpoint.path)
    facts = {"name": settings.name, "seed": settings.seed, "resumed_from": resumed_from, "start": start}
    rehearse_writing(student, notes, facts)
    every, capture = settings.gradients_every, Capture(Path(settings.run_dir))
    distiller = Distiller(student, criterion, frozen, optimization, settings.protocol, device, notes, every, capture)
    if checkpoint is not None:
        trainer.callbacks.append(History(checkpoint.path, checkpoint.steps))  # type: ignore[attr-defined]
    log_configuration(cfg, trainer)
    fit(trainer, distiller, data, checkpoint, Path(settings.run_dir) / "student.safetensors")
    facts |= {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    finish(cfg, settings, parts, device, teacher_scores, notes, facts, started)


def finish(
    cfg: DictConfig,
    settings: TrainSettings,
    parts: Parts,
    device: Device,
    teacher_scores: Scores | None,
    notes: dict[str, Any],
    facts: dict[str, Any],
    started: float,
) -> None:
    """Save the student, then score and report it.

    Raises:
        UserError: scoring failed; student and results.json, which says so, are written nevertheless.
    """
    merge_lora(parts.student)
    deployed = Path(settings.run_dir) / "student.safetensors"
    side_trainer = build.build_side_trainer(cfg)
    if side_trainer.is_global_zero:
        save_segmenter(parts.student, deployed, **notes)
    scores, failure = None, None
    try:
        scores = score(parts.student, parts.data, settings.protocol, side_trainer, device)
    except Exception as error:  # whatever it is, the student is there
        failure = error
        facts["score_failed"] = " ".join(str(error).split())
    if side_trainer.is_global_zero:
        facts["minutes"] = round((time.time() - started) / 60, 2)
        both = {"teacher": teacher_scores, "student": scores}
        report_run(Path(settings.run_dir), parts, both, facts, notes, settings.pictures if failure is None else 0)
        log.info("the deployable student is %s", deployed)
    if isinstance(failure, UserError):
        raise UserError(
            f"the student is trained and saved as {deployed}, but it could not be scored: {failure}. Score it later "
            f"with python -m transkd.evaluate weights={deployed}"
        ) from failure
    if failure is not None:
        raise failure


def obstacles_to_graphs(settings: TrainSettings, criterion: Criterion) -> list[str]:
    """Settings under which ``compile=auto`` does without CUDA graphs; ``compile=reduce-overhead`` insists on them."""
    found = {
        "gradients_every": settings.gradients_every > 0,
        "automatic weights": bool(criterion.shares),
        "trainer.accumulate_grad_batches": settings.trainer.accumulate_grad_batches > 1,
        "student.checkpointing": settings.student.checkpointing,
        "several GPUs": torch.cuda.device_count() > 1,
    }
    return [name for name, present in found.items() if present]


def build_parts(cfg: DictConfig, settings: TrainSettings, device: Device) -> Parts:
    """Build data, networks and terms, and run all checks that need no training.

    Raises:
        UserError: the data, a network, a term or a schedule is wrong.
    """
    data = build.build_data(cfg)
    kept = Path(settings.run_dir).parent / "class_counts"
    fill_class_weights(cfg, data, kept, settings.trainer.enable_progress_bar)
    # the student first, so that its random weights do not depend on the teacher
    student = build.build_student(cfg, settings.student, settings.license_policy)
    teacher = build.build_teacher(cfg, settings.teacher, data.classes.names)
    criterion = build.build_criterion(cfg, student.channels, teacher.channels if teacher is not None else ())
    device.lay_out(student, teacher, criterion)
    if getattr(rank_zero_only, "rank", 0) == 0:
        save_resolved(cfg, Path(settings.run_dir) / "config.yaml")
    prepare_data(data, Path(settings.run_dir))
    data.dataset("train"), data.dataset("val")  # raises for missing or wrong data
    check_labels(criterion, data)
    log_sizes(student, criterion, settings.student.lora)
    check_schedules(criterion, data, settings.trainer)
    # false if all terms that read the teacher have weight 0
    used = criterion.ever_needs or settings.student.from_teacher
    return Parts(data, student, teacher if used else None, criterion)


def prepare_teacher(
    cfg: DictConfig, settings: TrainSettings, network: Network, data: SegmentationDataModule, device: Device
) -> tuple[dict[str, Any], Scores | None]:
    """Load the teacher's weights, train it first if it has none and that is configured, and evaluate it."""
    source = build.teacher_source(cfg, settings, network)
    kept: Path | None = None
    trained: Path | None = None
    if isinstance(source, Path):
        kept = source
        if kept.is_file():
            teaching.check_kept(kept)
            log.info("teacher: using %s, trained by an earlier run with the same settings", kept)
        else:
            source = trained = Path(settings.run_dir) / "teacher.safetensors"
            fit_teacher(cfg, settings, network, data, device, trained)
    about = teaching.load_teacher(
        network, source, settings.teacher.license, settings.license_policy, data.classes.names
    )
    if not teaching.can_be_scored(network, data):
        return about, None
    trainer = build.build_side_trainer(cfg)
    scores = score(network, data, settings.protocol, trainer, device)
    try:
        teaching.check_scores(scores, settings.protocol, settings.teacher.min_miou)
    except UserError as error:
        if trained is None:
            raise
        raise UserError(f"{error}. It is {trained}, and not kept for later runs") from error
    if trained is not None and kept is not None:
        about["teacher_weights"] = str(kept)
        if trainer.is_global_zero:
            about["teacher_weights"] = str(teaching.keep(trained, kept))
    return about, scores


def fit_teacher(
    cfg: DictConfig,
    settings: TrainSettings,
    network: Network,
    data: SegmentationDataModule,
    device: Device,
    path: Path,
) -> None:
    """Train the teacher with the student's recipe and store it in the run's folder, until its score is known."""
    epochs = settings.teacher.fit.max_epochs
    log.info("teacher: training %s for %d epochs first", network.name, epochs)
    task, dtype = build.build_task(cfg), network.mean.dtype
    device.compile(network, *task.terms.values(), keep_graph=bool(settings.gradients_every))
    distiller = Distiller(
        network,
        task,
        None,
        build.build_optimization(cfg),
        settings.protocol,
        device,
        gradients_every=settings.gradients_every,
        capture=Capture(path.parent, "teacher"),
    )
    trainer = build.build_side_trainer(cfg, trains=True, max_epochs=epochs)
    fit(trainer, distiller, data)
    if trainer.is_global_zero:
        notes = {"experiment": f"{settings.name}, teacher", "eval_transform": serialise(data.eval_transform)}
        save_segmenter(network, path, data.classes, **notes)
    network.to(dtype)  # as in a later run, which loads the file: Lightning converts it for precisions such as 64-true
    trainer.strategy.barrier("teacher saved")
    log.info("teacher: trained, and stored as %s until it is scored", path)


def save_resolved(cfg: DictConfig, path: Path) -> None:
    """Write a configuration with all interpolations resolved."""
    write_atomically(path, OmegaConf.to_yaml(cfg, resolve=True).encode())


def log_configuration(cfg: DictConfig, trainer: L.Trainer) -> None:
    """Give the resolved configuration to the loggers that do not write beside ``config.yaml``."""
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger | TensorBoardLogger):
            logger.log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)))


def serialise(transform: Any) -> dict[str, Any] | None:
    """Convert an Albumentations composition to JSON values, to store the preprocessing with the weights."""
    if transform is None:
        return None
    if not hasattr(transform, "to_dict"):
        raise UserError(f"data.eval_transform: expected a transform of Albumentations, got {type(transform).__name__}")
    return transform.to_dict()
