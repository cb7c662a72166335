"""The parts of a run, built from its configuration: networks, criterion, optimization, trainer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.losses import Criterion
from transkd.models import Network, load_weights
from transkd.models.storage.lineage import check_license_policy
from transkd.settings import StudentSettings
from transkd.training.averaging import StudentAverage
from transkd.training.optimization import Optimization
from transkd.training.seeding import EpochSeed

__all__ = [
    "Parts",
    "build_criterion",
    "build_optimization",
    "build_side_trainer",
    "build_student",
    "build_task",
    "build_teacher",
    "build_trainer",
]


class Parts(NamedTuple):
    """What a run is made of; the teacher is None where nothing reads one."""

    data: SegmentationDataModule
    student: Network
    teacher: Network | None
    criterion: Criterion


def build_student(cfg: DictConfig, settings: StudentSettings, license_policy: str = "any") -> Network:
    """The student with the weights that it starts from.

    Args:
        cfg: the whole configuration, of which ``student.network`` is instantiated.
        settings: of the student.
        license_policy: that its weights are held to.
    """
    if settings.lora.rank is not None and settings.weights is None and not settings.from_teacher:
        raise UserError(
            f"student.lora.rank={settings.lora.rank} adapts weights that are there, but the student starts from "
            "random ones; name some with student.weights=PATH, or copy the teacher's with student.from_teacher=true"
        )
    student: Network = instantiate(cfg.student.network)
    if settings.weights is not None:
        load_weights(student, settings.weights, settings.classifier, settings.license)
    check_license_policy(student.lineage, license_policy, f"the student {student.name}")
    if settings.checkpointing:
        student.checkpoint_activations()
    return student


def build_teacher(cfg: DictConfig) -> Network | None:
    """The teacher's network at random weights; None where no term reads it and the student does not start from it."""
    used = len(cfg.criterion.terms) > 1 or cfg.student.from_teacher
    return instantiate(cfg.teacher.network) if used else None


def build_criterion(cfg: DictConfig, student: Sequence[int], teacher: Sequence[int]) -> Criterion:
    """The weighted terms for networks of these widths, which terms refer to as ``${channels.student}``."""
    cfg.channels.student, cfg.channels.teacher = list(student), list(teacher)
    return instantiate(cfg.criterion)


def build_task(cfg: DictConfig) -> Criterion:
    """The task's term alone, for the teacher's own training."""
    return Criterion({"task": {"term": instantiate(cfg.criterion.terms.task.term), "weight": 1.0}})


def build_optimization(cfg: DictConfig) -> Optimization:
    """Optimizer and schedule."""
    optim = cfg.optim
    return Optimization(
        instantiate(optim.optimizer, _convert_="all"), instantiate(optim.scheduler), optim.interval, optim.horizon
    )


def build_trainer(cfg: DictConfig, **changes: Any) -> L.Trainer:
    """Lightning's Trainer with the configured callbacks and loggers, unless ``changes`` say otherwise."""
    if "callbacks" not in changes:
        changes["callbacks"] = [instantiate(part) for part in cfg.callbacks.values()]
        if cfg.student.get("ema") is not None:
            changes["callbacks"].append(StudentAverage(cfg.student.ema))
    if "logger" not in changes:
        changes["logger"] = [instantiate(part) for part in cfg.logger.values()]
    changes["callbacks"].append(EpochSeed(cfg.seed))
    return instantiate(cfg.trainer, **changes)


def build_side_trainer(cfg: DictConfig, **changes: Any) -> L.Trainer:
    """The same Trainer, writing nothing: for scores and for the teacher's own training."""
    progress = [instantiate(cfg.callbacks.progress)] if "progress" in cfg.callbacks else []
    return build_trainer(cfg, callbacks=progress, logger=False, enable_checkpointing=False, **changes)


def plain(*parts: DictConfig) -> list[Any]:
    """Configuration as plain Python values, references filled in."""
    return [OmegaConf.to_container(part, resolve=True) for part in parts]
