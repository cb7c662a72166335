"""Typed groups of settings: strict validation, and messages that name the setting and what it allows."""

import types
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from transkd.errors import UserError

__all__ = ["Settings", "describe_type", "resolved", "type_options"]


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
    found = {name: getattr(part, name) for part in parts for name in ("ge", "gt", "le", "lt") if hasattr(part, name)}
    least, most = found.get("ge"), found.get("le", found.get("lt"))
    words = PLAIN.get(option, "a group of settings")
    if least is not None and most is not None:
        return f"{words} from {least} to {'below ' if 'lt' in found else ''}{most}"
    if "gt" in found:
        return f"{words} above {found['gt']}" + ("" if most is None else f" to {most}")
    return words if least is None else f"{words} of at least {least}"
