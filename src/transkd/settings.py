"""Types and ranges of all settings of transkd, checked before anything is built.

A command reads its composed configuration into one of the classes below; the code behind it gets typed values instead
of the configuration. Arguments of Lightning, PyTorch and Albumentations are ``Any``, except where a mistake is costly.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from transkd.typed import Settings

__all__ = [
    "CheckSettings",
    "EvaluateSettings",
    "ExportSettings",
    "NetworkSettings",
    "PredictSettings",
    "StudentSettings",
    "TeacherSettings",
    "TrainSettings",
    "plain_name",
]

AUTO_WEIGHT = re.compile(r"auto\((.+)\)")

Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""Text; a number from the command line is converted to text."""
Name = Annotated[Text, AfterValidator(lambda value: plain_name(value))]
"""Name of an experiment, which is a folder of ``outputs/``."""
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


def plain_name(value: str) -> str:
    """Return a name that is one folder, and not a path.

    Raises:
        ValueError: it is another one; says what is expected.
    """
    if value in ("", ".", "..") or not value.isprintable() or {"/", "\\"} & set(value):
        raise ValueError("a plain name, without / and \\; a run goes to another folder with hydra.run.dir=FOLDER")
    return value


def _has_task(terms: dict[str, Any]) -> dict[str, Any]:
    if "task" not in terms:
        raise ValueError("the term 'task' (the cross-entropy); switch it off with criterion.terms.task.weight=0")
    return terms


def _is_weight(value: Any) -> float | str:
    automatic = AUTO_WEIGHT.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not (automatic or (isinstance(value, int | float) and 0 <= value < math.inf)):
        raise ValueError("a number of at least 0, or 'auto(s)' for s times the gradient of the task")
    return value


def _group_of_its_own(value: Any) -> Any:
    raise ValueError("nothing: callbacks and loggers are groups of their own, +callbacks.NAME=… and +logger.NAME=…")


class LoraSettings(Settings):
    """LoRA of the student's initial weights."""

    rank: Positive | None = None
    train: list[str] = Field(default_factory=lambda: ["head"])
    keep_drop_path: bool = False


class SolveSettings(Settings):
    """Images to solve a student from its teacher on."""

    images: Positive = 64
    folder: Text | None = None


class StudentSettings(Settings):
    """Network, initialisation and training of the student."""

    network: dict[str, Any]
    weights: Text | None = None
    classifier: Literal["same", "new"] = "same"
    from_teacher: bool | Literal["copy", "select", "solve"] = False
    solve: SolveSettings = SolveSettings()
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    lora: LoraSettings = LoraSettings()
    checkpointing: bool = False
    license: Text | None = None


class TeacherFitSettings(Settings):
    """Training of the teacher in the same run."""

    max_epochs: Count = 0
    folder: Text = "outputs/teachers"


class TeacherSettings(Settings):
    """Network, weights and required quality of the teacher."""

    network: dict[str, Any]
    weights: Text | None = None
    license: Text | None = None
    min_miou: Share = 0.1
    standardise: bool | Literal["auto"] = "auto"
    class_map: dict[str | int, list[str | int] | str | int] | None = None
    fit: TeacherFitSettings = TeacherFitSettings()


BelowOne = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """Arguments of PyTorch's optimizers in which a mistake costs hours; an optimizer takes some of them."""

    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None
    betas: Annotated[list[BelowOne], Field(max_length=2)] | None = None
    fused: bool | None = None
    momentum: BelowOne | None = None
    dampening: NonNegative | None = None
    alpha: BelowOne | None = None
    eps: Annotated[float, Field(gt=0)] | None = None


class SchedulerSettings(Settings):
    """Arguments of schedules in which a mistake costs hours."""

    warmup: Count | None = None
    power: NonNegative | None = None
    T_max: Positive | None = None
    eta_min: NonNegative | None = None
    gamma: Annotated[float, Field(gt=0)] | None = None
    step_size: Positive | None = None


class OptimSettings(Settings):
    """Optimizer and schedule; Hydra builds both."""

    optimizer: OptimizerSettings
    scheduler: SchedulerSettings | None = None
    interval: Literal["step", "epoch"] = "step"
    horizon: Positive | None = None


class DataSettings(Settings):
    """Settings shared by our data modules; a user's data module may lack any of them."""

    batch_size: Positive = 1
    eval_batch_size: Positive = 1
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    cache: Text | None = None
    augment: Literal["cpu", "device", "auto"] = "auto"
    num_classes: Positive = 1
    seed: Count = 0
    labelled: Share = 1.0
    unlabelled: Text | None = None
    unlabelled_share: Share = 0.5
    void: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list)


class TermSettings(Settings):
    """One entry of ``criterion.terms``."""

    term: dict[str, Any]
    weight: Annotated[Any, AfterValidator(_is_weight)]
    schedule: dict[str, Any] | None = None


class CriterionSettings(Settings):
    """Weighted terms by name."""

    terms: Annotated[dict[str, TermSettings], AfterValidator(_has_task)]


Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true", 16, 32, 64, "bf16"]


class TrainerSettings(Settings):
    """Arguments of Lightning's Trainer in which a mistake costs hours."""

    max_epochs: Annotated[int, Field(ge=-1)] | None = None
    max_steps: Annotated[int, Field(ge=-1)] = -1
    limit_train_batches: Positive | Annotated[float, Field(gt=0, le=1)] | None = None
    fast_dev_run: bool | Positive = False
    precision: Precision = "auto"
    min_epochs: Count | None = None
    callbacks: Annotated[Any, AfterValidator(_group_of_its_own)] = None
    logger: Annotated[Any, AfterValidator(_group_of_its_own)] = None
    accumulate_grad_batches: Positive = 1
    check_val_every_n_epoch: Positive | None = 1
    gradient_clip_val: NonNegative | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    log_every_n_steps: Count | None = 10
    num_sanity_val_steps: Annotated[int, Field(ge=-1)] | None = None
    limit_val_batches: Count | Share | None = None
    overfit_batches: Count | Share = 0
    reload_dataloaders_every_n_epochs: Count = 0
    accelerator: str = "auto"
    enable_progress_bar: bool = True


class ProcessSettings(Settings):
    """Settings shared by all commands that run a network."""

    keep_freed_memory: bool = True
    license_policy: Literal["any", "commercial"] = "any"
    plugins: list[str] = Field(default_factory=list)


class TrainSettings(ProcessSettings):
    """``python -m transkd.train``."""

    name: Name
    run_dir: Text
    seed: Count = 0
    protocol: str = "full-res"
    protocols: dict[str, dict[str, Any]] = Field(default_factory=dict)
    ckpt_path: Text | None = None
    resume: Literal["strict", "force"] = "strict"
    gradients_every: Count = 0
    compile: bool | str = "auto"
    compile_regions: bool = False
    channels_last: bool | Literal["auto"] = "auto"
    pictures: Count = 4
    data: DataSettings
    student: StudentSettings
    teacher: TeacherSettings
    criterion: CriterionSettings
    optim: OptimSettings
    trainer: TrainerSettings = TrainerSettings()


class EvaluateSettings(TrainSettings):
    """``python -m transkd.evaluate``."""

    weights: Text


class CheckSettings(TrainSettings):
    """``python -m transkd.check``."""

    all: bool = False
    sample: Positive = 64
    images: Positive = 4
    steps: Positive = 3


class NetworkSettings(Settings):
    """Network of weights that do not say it; as ``student.network`` in training."""

    name: Text | None = None
    num_classes: Positive | None = None
    head: Text | None = None
    width: Positive | None = None
    encoder: dict[str, Any] = Field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None
    scale: Annotated[float, Field(gt=0)] = 1.0


class PredictSettings(ProcessSettings):
    """``python -m transkd.predict``."""

    weights: Text
    input: Text
    output: Text = "predictions"
    network: NetworkSettings = NetworkSettings()
    resize: bool = True
    tile: Literal["auto"] | Annotated[int, Field(ge=128)] | None = "auto"
    opacity: Share = 0.5
    archive: Literal["cityscapes", "acdc"] | None = None
    device: str = "auto"


class ExportSettings(ProcessSettings):
    """``python -m transkd.export``."""

    weights: Text
    network: NetworkSettings = NetworkSettings()
    format: str
    output: Text
    images: Text | None = None
    tolerance: NonNegative = 1e-4
    fuse: bool = False
    opset: Positive = 20
    license: Text | None = None
