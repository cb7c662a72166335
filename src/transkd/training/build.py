"""Build the parts of a run from its configuration: networks, criterion, optimization, trainer."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from transkd.command.stopping import takes_along
from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.losses import Criterion
from transkd.metrics import PROTOCOLS, Protocol
from transkd.models import MappedClasses, Network, load_weights
from transkd.models.class_map import read_class_map
from transkd.models.storage.lineage import check_license_policy
from transkd.models.storage.sources import read_weights
from transkd.settings import StudentSettings, TeacherSettings, TrainSettings
from transkd.training import teaching
from transkd.training.averaging import StudentAverage
from transkd.training.device import device_of
from transkd.training.optimization import Optimization
from transkd.training.precision import choose_precision
from transkd.training.process import EndOnSignal, check_processes
from transkd.training.seeding import EpochSeed

__all__ = [
    "Parts",
    "build_criterion",
    "build_data",
    "build_optimization",
    "build_side_trainer",
    "build_student",
    "build_task",
    "build_teacher",
    "build_trainer",
    "enter_protocol",
    "instantiated",
    "teacher_source",
]

log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """Parts of a run; the teacher is None if neither a term nor the student's initialisation reads it."""

    data: SegmentationDataModule
    student: Network
    teacher: Network | None
    criterion: Criterion


def enter_protocol(name: str, protocols: Mapping[str, Any]) -> None:
    """Enter the chosen protocol in ``PROTOCOLS``, if the configuration's ``protocols`` describe it.

    Raises:
        UserError: what is built from the description is no ``transkd.metrics.Protocol``.
    """
    if name in protocols:
        built = instantiated(protocols[name])
        if not isinstance(built, Protocol):
            raise UserError(
                f"protocols.{name}: expected a _target_ that gives a transkd.metrics.Protocol, got "
                f"{type(built).__name__}"
            )
        PROTOCOLS[name] = built


def instantiated(node: DictConfig, **changes: Any) -> Any:
    """Instantiate a node; every list and mapping in it becomes a plain one, since OmegaConf's cannot be written."""
    return instantiate(node, _convert_="all", **changes)


def build_data(cfg: DictConfig) -> SegmentationDataModule:
    """Build the data module."""
    return instantiated(cfg.data)


def build_student(cfg: DictConfig, settings: StudentSettings, license_policy: str = "any") -> Network:
    """Build the student and load its initial weights.

    Args:
        cfg: the whole configuration; ``student.network`` is instantiated.
        settings: the student's settings.
        license_policy: policy that the licence of its weights must meet.

    Raises:
        UserError: LoRA without initial weights, weights that do not fit, or a licence that the policy excludes.
    """
    if settings.lora.rank is not None and settings.weights is None and not settings.from_teacher:
        raise UserError(
            f"student.lora.rank={settings.lora.rank} adapts trained weights, but the student starts from random "
            "ones; give a file with student.weights=PATH, or start from the teacher with student.from_teacher=true"
        )
    student = _build_network(cfg, "student")
    if settings.weights is not None:
        load_weights(student, settings.weights, settings.classifier, settings.license)
    check_license_policy(student.lineage, license_policy, f"the student {student.name}")
    if settings.checkpointing:
        student.checkpoint_activations()
    return student


def build_teacher(
    cfg: DictConfig, settings: TeacherSettings | None = None, classes: Sequence[str] = ()
) -> Network | None:
    """Build the teacher with random weights; None if no term reads it and the student does not start from it.

    Args:
        cfg: the whole configuration; ``teacher.network`` is instantiated.
        settings: the teacher's settings, with the map of its classes.
        classes: names of the data's classes, to which they are mapped.

    Raises:
        UserError: the map of classes is wrong, or there are no trained weights whose classes it could map.
    """
    if len(cfg.criterion.terms) == 1 and not cfg.student.from_teacher:
        return None
    teacher = _build_network(cfg, "teacher")
    if settings is None or settings.class_map is None:
        return teacher
    if settings.weights is None:
        raise UserError(
            "teacher.class_map maps the classes of trained weights, but there are none: give them with "
            "teacher.weights=PATH, or set teacher.class_map=null"
        )
    theirs = read_weights(settings.weights).card.get("class_names")
    sources = read_class_map(settings.class_map, classes, theirs, teacher.num_classes)
    dropped = sorted(set(range(teacher.num_classes)).difference(*sources))
    names = [theirs[i] if theirs is not None else str(i) for i in dropped]
    log.info("teacher: its classes are mapped to ours; dropped: %s", ", ".join(names) or "none")
    return MappedClasses(teacher, sources)


def _build_network(cfg: DictConfig, role: str) -> Network:
    network = instantiated(cfg[role].network)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{role}.network has no _target_ that is a network; name a file of conf/{role} with {role}=NAME"
        )
    return cast(Network, network)


def build_criterion(cfg: DictConfig, student: Sequence[int], teacher: Sequence[int]) -> Criterion:
    """Build the weighted terms; the given channels are available to them as ``${channels.student}`` and so on."""
    cfg.channels.student, cfg.channels.teacher = list(student), list(teacher)
    return instantiated(cfg.criterion)


def build_task(cfg: DictConfig) -> Criterion:
    """Build a criterion of the task's term only, to train the teacher with."""
    return Criterion({"task": {"term": instantiated(cfg.criterion.terms.task.term), "weight": 1.0}})


def build_optimization(cfg: DictConfig) -> Optimization:
    """Build optimizer and schedule.

    Raises:
        UserError: one of them cannot be called, or does not accept its arguments.
    """
    optim = cfg.optim
    optimizer, scheduler = instantiated(optim.optimizer), instantiated(optim.scheduler)
    for name, built in (("optimizer", optimizer), ("scheduler", scheduler)):
        if built is not None and not callable(built):
            raise UserError(
                f"optim.{name} has no _target_: expected a class such as torch.optim.AdamW, _partial_: true"
            )
    optimization = Optimization(optimizer, scheduler, optim.interval, optim.horizon)
    optimization.build_both(nn.Linear(1, 1).parameters(), total=1000)  # raises for wrong arguments
    return optimization


def build_trainer(cfg: DictConfig, **changes: Any) -> L.Trainer:
    """Build Lightning's Trainer with the configured callbacks and loggers; ``changes`` override arguments.

    Callbacks that the other settings exclude are left out: a progress bar without ``trainer.enable_progress_bar``, the
    log of the learning rate without a logger, checkpoints without ``trainer.enable_checkpointing``.

    Raises:
        UserError: torchrun started another number of processes than the Trainer expects.
    """
    if "logger" not in changes:
        changes["logger"] = _build_all(cfg, "logger", Logger)
    if "callbacks" not in changes:
        changes["callbacks"] = _build_all(cfg, "callbacks", L.Callback)
        if cfg.student.get("ema") is not None:
            changes["callbacks"].append(StudentAverage(cfg.student.ema))
    excluded: list[type] = [] if cfg.trainer.get("enable_progress_bar", True) else [ProgressBar]
    excluded += [] if changes["logger"] else [LearningRateMonitor]
    excluded += [] if cfg.trainer.get("enable_checkpointing", True) else [Checkpoint]
    kept = [part for part in changes["callbacks"] if not isinstance(part, tuple(excluded))]
    changes["callbacks"] = [*kept, EpochSeed(cfg.seed), EndOnSignal()]
    changes.setdefault("precision", precision(cfg))
    trainer = instantiated(cfg.trainer, **changes)
    if not isinstance(trainer, L.Trainer):
        raise UserError(f"trainer._target_={cfg.trainer.get('_target_')}: expected lightning.Trainer")
    check_processes(trainer, cfg.trainer.get("sync_batchnorm", False))
    if trainer.strategy.launcher is not None:
        takes_along(trainer.strategy.launcher)
    return trainer


def _build_all(cfg: DictConfig, group: str, kind: type) -> list[Any]:
    """Build every entry of a group; none where the group is left out or null."""
    built = []
    for name, part in (cfg.get(group) or {}).items():
        entry = instantiated(part) if isinstance(part, DictConfig) else part
        if not isinstance(entry, kind):
            raise UserError(
                f"{group}.{name} is no {kind.__name__} of Lightning: its _target_ must name one, got {part}; "
                f"an entry is left out with ~{group}.{name}"
            )
        built.append(entry)
    return built


def build_side_trainer(cfg: DictConfig, trains: bool = False, **changes: Any) -> L.Trainer:
    """Build a Trainer that writes no files, for evaluation and (``trains``) for training the teacher."""
    callbacks: Any = cfg.get("callbacks") or {}
    progress = [instantiated(callbacks.progress)] if "progress" in callbacks else []
    changes.setdefault("precision", precision(cfg, trains))
    return build_trainer(cfg, callbacks=progress, logger=False, enable_checkpointing=False, **changes)


def precision(cfg: DictConfig, trains: bool = True) -> str | int:
    """Precision of a Trainer; see ``choose_precision``."""
    trainer = cfg.trainer
    return choose_precision(trainer.get("precision", "32-true"), device_of(trainer.get("accelerator", "auto")), trains)


def teacher_source(cfg: DictConfig, settings: TrainSettings, network: Network) -> str | Path:
    """The teacher's weights as given, or the path of the teacher that the run trains itself; it need not exist."""
    if settings.teacher.weights is not None:
        return settings.teacher.weights
    task, trainer = cfg.criterion.terms.task.term, teaching.shaping(plain(cfg.trainer)[0])
    parts = plain(cfg.data, cfg.teacher.network, cfg.teacher.fit, cfg.optim, task)
    parts[0] = {key: value for key, value in parts[0].items() if key not in ("cache", "augment")}  # the same data
    return teaching.kept_teacher(settings.teacher, settings.name, network.name, [parts, trainer, settings.seed])


def plain(*parts: DictConfig) -> list[Any]:
    """Convert configuration to plain Python values with interpolations resolved and text as keys."""
    return [_with_text_keys(OmegaConf.to_container(part, resolve=True)) for part in parts]


def _with_text_keys(value: Any) -> Any:
    """A map of label values may have numbers and text as keys, which cannot be sorted."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(part) for key, part in value.items()}
    return [_with_text_keys(part) for part in value] if isinstance(value, list) else value
