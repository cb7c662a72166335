"""The command ``check``: everything that a run would refuse, all at once, and what it would cost."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import lightning as L
from omegaconf import DictConfig

from transkd.arguments import check_arguments
from transkd.command.explaining import explain
from transkd.data import SegmentationDataModule
from transkd.data.inspection import Inspection, absent_classes, duplicates, inspect_split, open_split
from transkd.losses import Criterion
from transkd.models import FrozenTeacher, Network
from transkd.models.class_map import unmapped
from transkd.models.inherit.methods import allowed_method
from transkd.settings import CheckSettings
from transkd.training import build, teaching
from transkd.training.build import Parts
from transkd.training.checking_report import draw_sheet, report_check
from transkd.training.class_weights import fill_class_weights
from transkd.training.costs import ONE_DEVICE, measure_costs, without_workers
from transkd.training.device import Device
from transkd.training.probing import explain_failure, taps_and_readers, term_gradients
from transkd.training.process import prepare_process
from transkd.training.rehearsal import check_schedules, class_problems, dominating, rehearse, weighted
from transkd.training.resuming import find_checkpoint
from transkd.training.scoring import score
from transkd.training.starting import adapt, freeze_teacher, start_method

__all__ = ["Findings", "check"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Findings:
    """What a check found.

    Attributes:
        problems: one line for each thing that will go wrong.
        warnings: one line for each thing to look at.
        facts: what was measured, as it is written to ``check.json``.
        batch_size: the configured one, for messages.
        teacher_loaded: whether the teacher has its weights.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    teacher_loaded: bool = False

    def attempt(self, what: str, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Run a step of the check; note its error as a problem, and return None then."""
        try:
            return step(*args, **kwargs)
        except Exception as error:
            log.debug("%s failed", what, exc_info=True)
            self.problem(explain_failure(what, error, self.batch_size, explain))
            return None

    def problem(self, *lines: str) -> None:
        """Note problems, each once."""
        self.problems += [line for line in dict.fromkeys(lines) if line not in self.problems]


def check(cfg: DictConfig) -> Findings:
    """Check a training run before it starts: files, networks, terms, memory and time; print and write the findings."""
    settings = CheckSettings.read(cfg)
    check_arguments(cfg)
    device = Device.choose(
        settings.trainer.accelerator, settings.compile, settings.channels_last, settings.compile_regions
    )
    prepare_process(settings.keep_freed_memory, device.kind)
    L.seed_everything(settings.seed, verbose=False)
    findings = Findings(batch_size=settings.data.batch_size)
    build.enter_protocol(settings.protocol, settings.protocols)
    if device.compile_mode == "auto":  # compiling takes minutes
        device = replace(device, compile_mode=None)
    findings.attempt("compile", device.check)
    findings.attempt("ckpt_path", find_checkpoint, settings.ckpt_path, settings.name)
    folder = Path(settings.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data: SegmentationDataModule | None = findings.attempt("data", build.build_data, cfg)
    usable = data is not None and check_files(findings, data, settings, folder)
    parts = check_networks(findings, cfg, settings, data, device)
    if parts is not None and usable:
        check_training(findings, cfg, settings, parts, device)
    report_check(findings.problems, findings.warnings, findings.facts, folder)
    return findings


def check_files(findings: Findings, data: SegmentationDataModule, settings: CheckSettings, folder: Path) -> bool:
    """Read the files, draw the sheet, and leave broken files out from now on; return whether training can be tried."""
    findings.attempt("data.prepare", data.generate)
    inspections = []
    for split in ("train", "val"):
        opened = findings.attempt(split, open_split, data, split)
        if opened is None:
            continue
        dataset, unpaired = opened
        findings.problem(*unpaired)
        if not len(dataset):
            findings.problem(f"data: there are no images in the split {split}")
            continue
        sample = None if settings.all else settings.sample
        found = inspect_split(dataset, split, sample, workers=available_cores())
        findings.problem(*found.problems)
        inspections.append(found)
    describe_files(findings, data, inspections)
    data.cache = None  # frames that lie in the cache are used, the others are left for the run to write
    if len(inspections) < 2:
        return False
    fits = findings.attempt("data", data.train_dataloader) is not None
    for found in inspections:
        dataset = data.dataset(found.split)
        dataset.pairs = [pair for i, pair in enumerate(dataset.pairs) if i not in found.broken]
    usable = fits and data.batches() > 0 and len(data.dataset("val")) > 0
    if usable:
        findings.attempt("sheet", draw_sheet, data, folder / "sheet.png")
    return usable


def describe_files(findings: Findings, data: SegmentationDataModule, inspections: list[Inspection]) -> None:
    """Note what the files are: counts, sizes, classes, duplicates."""
    names = data.classes.names
    for found in inspections:
        findings.facts.setdefault("files", {})[found.split] = {
            "images": found.total,
            "read": found.checked,
            "unusable": len(found.broken),
            "sizes": {f"{height}×{width}": n for (height, width), n in found.sizes.most_common()},
            "pixels": dict(zip(names, found.pixels.tolist(), strict=True)),
        }
        if found.pixels.any():
            findings.warnings += absent_classes(found, names)
    findings.warnings += duplicates(inspections)


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_networks(
    findings: Findings, cfg: DictConfig, settings: CheckSettings, data: SegmentationDataModule | None, device: Device
) -> Parts | None:
    """Build both networks and the terms, and load the weights; return None if a part of them cannot be built."""
    student = findings.attempt("student", build.build_student, cfg, settings.student, settings.license_policy)
    if data is None:
        return None
    before = len(findings.problems)
    counts = Path(settings.run_dir).parent / "class_counts"
    findings.attempt("class_weights", fill_class_weights, cfg, data, counts, settings.trainer.enable_progress_bar)
    teacher = findings.attempt("teacher", build.build_teacher, cfg, settings.teacher, data.classes.names)
    criterion = None
    if student is not None and len(findings.problems) == before:
        channels = teacher.channels if teacher is not None else ()
        criterion = findings.attempt("criterion", build.build_criterion, cfg, student.channels, channels)
    if criterion is not None and not (criterion.ever_needs or settings.student.from_teacher):
        teacher = None
    device.lay_out(student, teacher, criterion)
    if teacher is not None:
        findings.attempt("teacher", check_teacher, findings, cfg, settings, teacher, data.classes.names)
    if student is None or criterion is None:
        return None
    if teacher is not None and settings.student.from_teacher:
        findings.attempt("student", allowed_method, unmapped(teacher), student, start_method(settings))
    start = settings.student.weights or "random weights"
    if settings.student.from_teacher:
        start += f"; the run starts it from its teacher ({start_method(settings)}), the check does not"
    findings.facts["start"] = start
    findings.attempt("student.lora", adapt, student, settings.student.lora)
    return Parts(data, student, teacher, criterion)


def check_teacher(
    findings: Findings, cfg: DictConfig, settings: CheckSettings, teacher: Network, classes: Sequence[str]
) -> None:
    """Load the teacher's weights, if the run would not train it first."""
    source = build.teacher_source(cfg, settings, teacher)
    if isinstance(source, Path) and not source.is_file():
        epochs = settings.teacher.fit.max_epochs
        findings.facts["teacher"] = f"{teacher.name}, trained first by the run (epochs: {epochs}); random here"
        return
    about = teaching.load_teacher(teacher, source, settings.teacher.license, settings.license_policy, classes)
    findings.facts["teacher"] = f"{teacher.name}, {about['teacher_weights']}"
    findings.teacher_loaded = True


def check_training(findings: Findings, cfg: DictConfig, settings: CheckSettings, parts: Parts, device: Device) -> None:
    """Run networks and terms on images as the run would, then real training steps, and estimate the whole."""
    data, student, teacher, criterion = parts
    read = teacher if criterion.ever_needs else None
    unfit = class_problems(student, read, criterion, data)
    findings.problem(*unfit)
    findings.attempt("schedule", check_schedules, criterion, data, settings.trainer)
    before = len(findings.problems)
    shown = findings.attempt("one image", rehearse, student, read, criterion, data)
    if unfit or shown is None or len(findings.problems) > before:
        return
    findings.facts["taps"] = [vars(tap) for tap in taps_and_readers(criterion, *shown)]
    frozen = findings.attempt("teacher", freeze_teacher, settings, parts, device, settings.images) if read else None
    findings.attempt("terms", check_terms, findings, student, frozen, criterion, data)
    findings.attempt(
        "training step", measure_costs, findings.facts, cfg, settings, parts._replace(teacher=None), frozen, device
    )
    if findings.teacher_loaded and teacher is not None and teaching.can_be_scored(teacher, data):
        findings.attempt("teacher", check_score, findings, cfg, settings, teacher, data, device)


def check_terms(
    findings: Findings,
    student: Network,
    teacher: FrozenTeacher | None,
    criterion: Criterion,
    data: SegmentationDataModule,
) -> None:
    """Note each term's value, weight and gradient."""
    values, statistics = term_gradients(student, teacher, criterion, data)
    findings.warnings += dominating(weighted(values, criterion))
    weights = criterion.weights
    findings.facts["terms"] = {
        name: {
            "value": value.item(),
            "weight": weights[name] if weights[name] is not None else f"auto({criterion.shares[name]:g})",
            "gradient": statistics[f"{name}/norm"].item(),
            "reads": sorted(getattr(criterion.terms[name], "needs", ())),
        }
        for name, value in values.items()
    }
    silent = [name for name, term in findings.facts["terms"].items() if term["gradient"] == 0]
    findings.warnings += [
        f"the term {name} gives the student no gradient on the first images: check what it reads" for name in silent
    ]


def check_score(
    findings: Findings,
    cfg: DictConfig,
    settings: CheckSettings,
    teacher: Network,
    data: SegmentationDataModule,
    device: Device,
) -> None:
    """Score the teacher on the first validation images."""
    batches = -(-settings.images // data.eval_batch_size)
    side = build.build_side_trainer(cfg, limit_val_batches=batches, **ONE_DEVICE)
    with without_workers(data):
        scores = score(teacher, data, settings.protocol, side, device)
    images = min(batches * data.eval_batch_size, len(data.dataset("val")))
    findings.facts["teacher_score"] = {
        "mIoU": scores.miou.item(),
        "pixel_accuracy": scores.pixel_accuracy.item(),
        "images": images,
        "protocol": settings.protocol,
    }
    teaching.check_scores(scores, settings.protocol, settings.teacher.min_miou, f"{images} validation images")
