"""Types and ranges of all settings of transkd, checked before anything is built.

A command reads its composed configuration into one of the classes below; the code behind it gets typed values instead
of the configuration. Arguments of Lightning, PyTorch and Albumentations are ``Any``, except where a mistake is costly.
"""

import math
import re
import types
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self

from transkd.errors import UserError

__all__ = [
    "EvaluateSettings",
    "ExportSettings",
    "PredictSettings",
    "StudentSettings",
    "TeacherSettings",
    "TrainSettings",
]

AUTO_WEIGHT = re.compile(r"auto\((.+)\)")

Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""Text; a number from the command line is converted to text."""
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


def _has_task(terms: dict[str, Any]) -> dict[str, Any]:
    if "task" not in terms:
        raise ValueError("the term 'task' (the cross-entropy); switch it off with criterion.terms.task.weight=0")
    return terms


def _is_weight(value: Any) -> float | str:
    automatic = AUTO_WEIGHT.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not (automatic or (isinstance(value, int | float) and 0 <= value < math.inf)):
        raise ValueError("a number of at least 0, or 'auto(s)' for s times the gradient of the task")
    return value


class Settings(BaseModel):
    """Base class of all groups: strict types, no NaN or infinity; unknown keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True)

    @classmethod
    def read(cls, cfg: DictConfig) -> Self:
        """Check a composed configuration and return its values.

        Raises:
            UserError: a value has the wrong type or is out of range; names the setting and what is allowed.
        """
        try:
            return cls.model_validate(_without_missing(resolved(cfg)))
        except ValidationError as error:
            raise UserError(_one_line(error, cls)) from None


class LoraSettings(Settings):
    """LoRA of the student's initial weights."""

    rank: Positive | None = None
    train: list[str] = ["head"]
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
    fit: TeacherFitSettings = TeacherFitSettings()


class OptimSettings(Settings):
    """Optimizer and schedule; Hydra builds both."""

    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None = None
    interval: Literal["step", "epoch"] = "step"
    horizon: Positive | None = None


class DataSettings(Settings):
    """Settings shared by our data modules; a user's data module may lack any of them."""

    batch_size: Positive = 1
    eval_batch_size: Positive = 1
    num_workers: Count = 0
    num_classes: Positive = 1
    seed: Count = 0
    void: list[Annotated[int, Field(ge=0, le=255)]] = []


class TermSettings(Settings):
    """One entry of ``criterion.terms``."""

    term: dict[str, Any]
    weight: Annotated[Any, AfterValidator(_is_weight)]
    schedule: dict[str, Any] | None = None


class CriterionSettings(Settings):
    """Weighted terms by name."""

    terms: Annotated[dict[str, TermSettings], AfterValidator(_has_task)]


class TrainerSettings(Settings):
    """Arguments of Lightning's Trainer in which a mistake costs hours."""

    max_epochs: Annotated[int, Field(ge=-1)] | None = None
    accumulate_grad_batches: Positive = 1
    check_val_every_n_epoch: Positive | None = 1
    gradient_clip_val: NonNegative | None = None
    log_every_n_steps: Count | None = 10
    accelerator: str = "auto"
    enable_progress_bar: bool = True


class ProcessSettings(Settings):
    """Settings shared by all commands that run a network."""

    keep_freed_memory: bool = True
    license_policy: Literal["any", "commercial"] = "any"
    plugins: list[str] = []


class TrainSettings(ProcessSettings):
    """``python -m transkd.train``."""

    name: Text
    run_dir: Text
    seed: Count = 0
    protocol: str = "full-res"
    ckpt_path: Text | None = None
    gradients_every: Count = 0
    compile: bool | str = False
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


class PredictSettings(ProcessSettings):
    """``python -m transkd.predict``."""

    weights: Text
    input: Text
    output: Text = "predictions"
    resize: bool = True
    opacity: Share = 0.5
    device: str = "auto"


class ExportSettings(ProcessSettings):
    """``python -m transkd.export``."""

    weights: Text
    format: str
    output: Text
    images: Text | None = None
    tolerance: NonNegative = 1e-4
    fuse: bool = False
    opset: Positive = 20
    license: Text | None = None


def resolved(cfg: DictConfig) -> Any:
    """Plain values of a composed configuration; the networks' channels are empty until the networks are built."""
    cfg = cfg.copy()
    if "channels" in cfg:
        cfg.channels = {"student": [], "teacher": []}
    return OmegaConf.to_container(cfg, resolve=True)


def _without_missing(value: Any) -> Any:
    """Remove mandatory values that are not given (``???``); pydantic then reports required ones as missing."""
    if isinstance(value, dict):
        return {key: _without_missing(part) for key, part in value.items() if part != "???"}
    return value


# Messages

PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}


def _one_line(error: ValidationError, settings: type[Settings]) -> str:
    """Describe the first wrong setting: its name on the command line, its value, what is allowed."""
    first = error.errors()[0]
    path, allowed = _find(first["loc"], settings)
    name = ".".join(path)
    if first["type"] == "missing":
        return f"{name} has no value; give it on the command line: {name}=…"
    expected = str(first["ctx"]["error"]) if first["type"] == "value_error" else describe_type(allowed)
    got = {None: "null", True: "true", False: "false"}[first["input"]] if _is_word(first["input"]) else first["input"]
    return f"{name}={shorten(str(got), 80, placeholder=' …')}: expected {expected}"


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _find(location: tuple[int | str, ...], settings: type[Settings]) -> tuple[list[str], Any]:
    """Keys of a location and the annotation there; skips names of union members, which pydantic adds."""
    keys: list[str] = []
    allowed: Any = settings
    for part in location:
        inside = _inside(allowed, part)
        if inside is None:
            break
        keys.append(str(part))
        allowed = inside
    return keys, allowed


def _inside(annotation: Any, key: int | str) -> Any:
    """Annotation of a key within another annotation; None if there is no such key."""
    for option, _ in type_options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel) and key in option.model_fields:
            field = option.model_fields[str(key)]
            return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        if get_origin(option) in (dict, list):
            return get_args(option)[-1]
    return None


def type_options(annotation: Any, limits: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """Members of a union, each with its limits from ``Annotated``."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return type_options(inner, (*limits, *more))
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in type_options(part, limits)]
    return [(annotation, limits)]


def describe_type(annotation: Any) -> str:
    """Describe in words what an annotation allows."""
    return " or ".join(_describe_option(option, limits) for option, limits in type_options(annotation))


def _describe_option(option: Any, limits: tuple[Any, ...]) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(str, get_args(option)))
    if get_origin(option) in (list, tuple, Sequence):
        return f"a list [a,b] of {describe_type(get_args(option)[0])}"
    parts = [part for limit in limits for part in getattr(limit, "metadata", [limit])]
    found = {name: getattr(part, name) for part in parts for name in ("ge", "le", "lt") if hasattr(part, name)}
    least, most = found.get("ge"), found.get("le", found.get("lt"))
    words = PLAIN.get(option, "a group of settings")
    if least is not None and most is not None:
        return f"{words} from {least} to {'below ' if 'lt' in found else ''}{most}"
    return words if least is None else f"{words} of at least {least}"
