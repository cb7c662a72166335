"""A training run, from a composed configuration to a deployable student."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from transkd.arguments import check_arguments
from transkd.cli import save_resolved
from transkd.data import SegmentationDataModule
from transkd.losses import Criterion
from transkd.metrics import Scores
from transkd.models import FrozenTeacher, MappedClasses, Network, add_lora, inherit, merge_lora, save_segmenter
from transkd.models.class_map import unmapped
from transkd.models.inherit.copying import take_normalisation
from transkd.models.storage.lineage import as_teacher, merge_lineage
from transkd.models.storage.loading import CLASSIFIERS
from transkd.report import describe_scores, log_sizes, report_run
from transkd.settings import LoraSettings, TrainSettings
from transkd.training import build, teaching
from transkd.training.build import Parts
from transkd.training.calibration import calibration_images
from transkd.training.class_weights import fill_class_weights
from transkd.training.compilation import keep_compiled_code
from transkd.training.device import Device
from transkd.training.distiller import Distiller
from transkd.training.fitting import find_checkpoint, fit
from transkd.training.process import prepare_process
from transkd.training.rehearsal import check_schedules, planned_steps, rehearse, weigh
from transkd.training.scoring import score

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Build everything, train, evaluate, and write the run's folder."""
    started = time.time()
    settings = TrainSettings.read(cfg)
    check_arguments(cfg)
    build.enter_protocol(settings.protocol, settings.protocols)
    ckpt_path = find_checkpoint(settings.ckpt_path, settings.name)
    device = Device.choose(
        settings.trainer.accelerator, settings.compile, settings.channels_last, settings.compile_regions
    )
    prepare_process(settings.keep_freed_memory, device.kind)
    keep_compiled_code(Path(settings.run_dir).parent / "compiled")
    device.check()
    L.seed_everything(settings.seed, verbose=False)

    parts = build_parts(cfg, settings, device)
    data, student, teacher, criterion = parts
    device = device.settled(planned_steps(data, settings.trainer), obstacles_to_graphs(settings, criterion))
    rehearse(student, teacher if criterion.ever_needs else None, criterion, data)
    notes: dict[str, Any] = {"experiment": settings.name, "eval_transform": serialise(data.eval_transform)}
    teacher_scores, frozen, start = None, None, None
    if teacher is not None:
        about, teacher_scores = prepare_teacher(cfg, settings, teacher, data, device)
        notes |= about
        if settings.student.from_teacher:
            start = start_student(cfg, settings, parts, device, resumed=ckpt_path is not None)
        if criterion.ever_needs:
            frozen = freeze_teacher(settings, parts, device)
        student.lineage = merge_lineage(student.lineage, as_teacher(teacher.lineage))
    weigh(student, frozen, criterion, data)
    adapt(student, settings.student.lora)

    looks_back = bool(settings.gradients_every or criterion.shares)
    device.compile(student, teacher, *criterion.terms.values(), keep_graph=looks_back)
    notes["classes"] = data.classes
    optimization = build.build_optimization(cfg)
    distiller = Distiller(
        student, criterion, frozen, optimization, settings.protocol, device, notes, settings.gradients_every
    )
    trainer = build.build_trainer(cfg)
    fit(trainer, distiller, data, ckpt_path)

    merge_lora(student)
    deployed = Path(settings.run_dir) / "student.safetensors"
    if trainer.is_global_zero:
        save_segmenter(student, deployed, **notes)  # before evaluation, since that may fail
    scores = score(student, data, settings.protocol, build.build_side_trainer(cfg), device)
    if trainer.is_global_zero:
        facts = {
            "name": settings.name,
            "seed": settings.seed,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "minutes": round((time.time() - started) / 60, 2),
            "resumed_from": ckpt_path,
            "start": start,
        }
        both = {"teacher": teacher_scores, "student": scores}
        report_run(Path(settings.run_dir), parts, both, facts, notes, settings.pictures)
        log.info("the deployable student is %s", deployed)


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


def adapt(student: Network, lora: LoraSettings) -> None:
    """Add LoRA to the student if configured."""
    if lora.rank is not None:
        add_lora(student, lora.rank, lora.train, lora.keep_drop_path)


def build_parts(cfg: DictConfig, settings: TrainSettings, device: Device) -> Parts:
    """Build data, networks and terms, and run all checks that need no training.

    Raises:
        UserError: the data, a network, a term or a schedule is wrong.
    """
    data: SegmentationDataModule = instantiate(cfg.data)
    kept = Path(settings.run_dir).parent / "class_counts"
    fill_class_weights(cfg, data, kept, settings.trainer.enable_progress_bar)
    # the student first, so that its random weights do not depend on the teacher
    student = build.build_student(cfg, settings.student, settings.license_policy)
    teacher = build.build_teacher(cfg, settings.teacher, data.classes.names)
    criterion = build.build_criterion(cfg, student.channels, teacher.channels if teacher is not None else ())
    device.lay_out(student, teacher, criterion)
    if getattr(rank_zero_only, "rank", 0) == 0:
        save_resolved(cfg, Path(settings.run_dir) / "config.yaml")
        data.prepare_data()
    data.dataset("train"), data.dataset("val")  # raises for missing or wrong data
    log_sizes(student, criterion, settings.student.lora)
    check_schedules(criterion, data, settings.trainer)
    # false if all terms that read the teacher have weight 0
    used = criterion.ever_needs or settings.student.from_teacher
    return Parts(data, student, teacher if used else None, criterion)


def start_student(
    cfg: DictConfig, settings: TrainSettings, parts: Parts, device: Device, resumed: bool
) -> dict[str, Any] | None:
    """Initialise the student from the teacher and evaluate it before training; return an entry for results.json.

    A resumed run loads the student's weights from the checkpoint later, and copies only the teacher's normalisation.
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
    scores = score(student, data, settings.protocol, build.build_side_trainer(cfg), device)
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


def prepare_teacher(
    cfg: DictConfig, settings: TrainSettings, network: Network, data: SegmentationDataModule, device: Device
) -> tuple[dict[str, Any], Scores | None]:
    """Load the teacher's weights, train it first if it has none and that is configured, and evaluate it."""
    source = teacher_source(cfg, settings, network)
    if isinstance(source, Path):
        if source.is_file():
            log.info("teacher: using %s, trained by an earlier run with the same settings", source)
        else:
            fit_teacher(cfg, settings, network, data, device, source)
    about = teaching.load_teacher(network, source, settings.teacher.license, settings.license_policy)
    if not teaching.can_be_scored(network, data):
        return about, None
    scores = score(network, data, settings.protocol, build.build_side_trainer(cfg), device)
    teaching.check_scores(scores, settings.protocol, settings.teacher.min_miou)
    return about, scores


def teacher_source(cfg: DictConfig, settings: TrainSettings, network: Network) -> str | Path:
    """The teacher's weights as given, or the path of the teacher that the run trains itself."""
    if settings.teacher.weights is not None:
        return settings.teacher.weights
    task = cfg.criterion.terms.task.term
    parts = build.plain(cfg.data, cfg.teacher.network, cfg.teacher.fit, cfg.optim, task)
    parts[0] = {key: value for key, value in parts[0].items() if key not in ("cache", "augment")}  # the same data
    recipe = [parts, settings.seed]
    return teaching.kept_teacher(settings.teacher, settings.name, network.name, recipe)


def fit_teacher(
    cfg: DictConfig,
    settings: TrainSettings,
    network: Network,
    data: SegmentationDataModule,
    device: Device,
    path: Path,
) -> None:
    """Train the teacher with the student's recipe and store it for later runs with the same settings."""
    epochs = settings.teacher.fit.max_epochs
    log.info("teacher: training %s for %d epochs first", network.name, epochs)
    task = build.build_task(cfg)
    device.compile(network, *task.terms.values(), keep_graph=bool(settings.gradients_every))
    optimization = build.build_optimization(cfg)
    distiller = Distiller(
        network, task, None, optimization, settings.protocol, device, gradients_every=settings.gradients_every
    )
    trainer = build.build_side_trainer(cfg, trains=True, max_epochs=epochs)
    fit(trainer, distiller, data)
    if trainer.is_global_zero:
        notes = {"experiment": f"{settings.name}, teacher", "eval_transform": serialise(data.eval_transform)}
        save_segmenter(network, path, data.classes, **notes)
    trainer.strategy.barrier("teacher saved")
    log.info("teacher: stored as %s; later runs with the same settings use it", path)


def serialise(transform: Any) -> dict[str, Any] | None:
    """Convert an Albumentations composition to JSON values, to store the preprocessing with the weights."""
    return transform.to_dict() if transform is not None else None
