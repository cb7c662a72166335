"""Check arguments in a configuration against the annotations of the callables they are passed to."""

import collections.abc
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from transkd.errors import UserError
from transkd.settings import TrainerSettings
from transkd.typed import describe_type, resolved, type_options

__all__ = ["check_arguments"]

PLAIN = (bool, int, float, str, Path, type(None))
LISTS = (list, tuple, collections.abc.Sequence)
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
CHECKED = ("transkd.", "lightning.", "torch.optim.", "albumentations.")
PROBABILITY: dict[str, Any] = {"p": Annotated[float, Field(ge=0, le=1)]}


def check_arguments(cfg: DictConfig) -> None:
    """Check names and types of plain values before anything is built.

    Checked is every ``_target_`` in transkd, Lightning, torch.optim and Albumentations. Ranges are checked
    by the classes themselves or by `transkd.settings`. Albumentations only warns of a wrong name, and what is built
    late, such as the optimizer, would fail late.

    Raises:
        UserError: an argument does not exist or has the wrong type; names it and what is allowed.
    """
    _walk("", resolved(cfg))


def _walk(key: str, value: Any) -> None:
    if isinstance(value, list):
        for i, part in enumerate(value):
            _walk(f"{key}.{i}", part)
    elif isinstance(value, dict):
        target = value.get("_target_")
        if isinstance(target, str) and target.startswith(CHECKED):
            _check(key, target, value)
        for name, part in value.items():
            _walk(f"{key}.{name}" if key else str(name), part)


def _check(key: str, target: str, values: dict[str, Any]) -> None:
    try:
        called = get_object(target)
    except Exception:  # Hydra reports it better when it builds the object
        return
    _check_names(key, target, called, values)
    hints = PROBABILITY if target.startswith("albumentations.") else _hints(called)
    for name, value in values.items():
        annotation = hints.get(name)
        ours = key == "trainer" and name in TrainerSettings.model_fields  # checked there, and some allow more
        if ours or annotation is None or value == "???" or not _is_plain(annotation):
            continue
        if not any(_fits(annotation, form) for form in (_as_python(value), value)):
            where = f"{key}.{name}"
            raise UserError(f"{where}={value}: expected {describe_type(annotation)} ({target})")


def _fits(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation, config=STRICT).validate_python(value)
    except ValidationError:
        return False
    return True


def _check_names(key: str, target: str, called: Callable[..., Any], values: dict[str, Any]) -> None:
    try:
        known = inspect.signature(called).parameters
    except (TypeError, ValueError):  # written in C
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name in values:
        if name not in known and not name.startswith("_"):
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UserError(f"{key}.{name}: {target} has no such argument{hint} There are: {', '.join(known)}")


def _hints(called: Any) -> dict[str, Any]:
    try:
        return get_type_hints(called.__init__ if isinstance(called, type) else called)  # type: ignore[misc]
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        return {}


def _is_plain(annotation: Any) -> bool:
    """Whether a plain YAML value can be checked against this annotation."""
    for option, _ in type_options(annotation):
        origin = get_origin(option)
        if origin in LISTS:
            if not all(part is Ellipsis or _is_plain(part) for part in get_args(option)):
                return False
        elif origin is not Literal and option not in PLAIN:
            return False
    return True


def _as_python(value: Any) -> Any:
    """Convert lists to tuples, which strict pydantic types accept as tuple and as sequence."""
    return tuple(map(_as_python, value)) if isinstance(value, list) else value
