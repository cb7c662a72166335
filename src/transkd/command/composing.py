"""Errors of Hydra, OmegaConf and YAML in one line: the command line and the configuration before a run begins."""

import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

__all__ = ["CONF", "explain_composition", "is_a", "one_line", "plain_message", "unknown_target"]

PACKAGE = Path(__file__).parents[1]
# A wheel has conf/ inside the package, a checkout at the top of the repository.
CONF = next((path for path in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if path.is_dir()), PACKAGE / "conf")
MISSING = re.compile(r"Could not (?:find|load) '(.+)/(.*?)'")
NOT_A_NAME = re.compile(r"=(null|true|false|[-+.\d]+|\{.*)$", re.IGNORECASE)
NO_GROUP_OPTION = "Config group override must be a string or a list"


def explain_composition(error: BaseException, causes: Sequence[BaseException], arguments: Sequence[str]) -> str | None:
    """Return the message for an error of the command line or of a configuration file; None for any other error.

    Args:
        error: the error.
        causes: the error and its causes, outermost first.
        arguments: the command line, to find the argument that an error does not name.
    """
    for cause in causes:
        if isinstance(cause, MissingMandatoryValue | InterpolationKeyError):
            key = getattr(cause, "full_key", None) or ""
            if isinstance(cause, InterpolationKeyError):
                return f"{key}: {first_line(cause)}; a reference ${{…}} names another setting"
            return f"{key} has no value; give it on the command line: {key}=…"
        if is_a(cause, "YAMLError"):
            return _bad_yaml(cause)
        if isinstance(cause, OmegaConfBaseException) and "not in struct" in str(cause):
            return _unknown_key(cause)
    if isinstance(error, OverrideParseException):
        return _bad_grammar(error)
    if isinstance(error, MissingConfigException) and MISSING.search(str(error)):
        return _unknown_option(error)
    if isinstance(error, ValueError) and NO_GROUP_OPTION in str(error):
        return _no_option(arguments)
    if isinstance(error, UnicodeDecodeError) and (path := _local(error, "full_path")):
        return f"{path} is not UTF-8 text ({error})"
    if isinstance(error, ConfigCompositionException | HydraException) and not isinstance(error, InstantiationException):
        return one_line(" ".join(dict.fromkeys(plain_message(cause) for cause in causes)))
    if isinstance(error, OmegaConfBaseException):
        key = getattr(error, "full_key", None)
        return f"{key}: {first_line(error)}" if key else first_line(error)
    return None


def plain_message(error: BaseException) -> str:
    """Message of an error without the last lines of OmegaConf and Hydra, which are about their own classes."""
    return re.split(r"\n\s*(?:full_key|reference_type|object_type)\b", str(error))[0] or type(error).__name__


def is_a(error: BaseException, name: str) -> bool:
    """Whether a class of this name is among the error's; for libraries that are not imported for this."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def one_line(text: object, limit: int = 600) -> str:
    """Put a text on one line and shorten it."""
    words = " ".join(str(text).split())
    return words if len(words) <= limit else f"{words[:limit]} …"


def first_line(error: BaseException) -> str:
    """First line of a message; OmegaConf's further lines are about its own classes."""
    return one_line(next(iter(str(error).splitlines()), "") or type(error).__name__)


def unknown_target(target: str, key: str) -> str:
    """Message for a ``_target_`` that cannot be imported."""
    parent, _, name = target.rpartition(".")
    try:
        names = sorted(getattr(import_module(parent), "__all__", ()))
    except (ImportError, ValueError):
        return f"{key}._target_={target}: there is no module {parent or target} to import it from"
    return f"{key}._target_={target}: {parent} has no {name}{_alternatives(name, names)}"


def _bad_grammar(error: OverrideParseException) -> str:
    """Say what is wrong with an argument and, where quotes help, how to write it."""
    argument = error.override
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{argument}: expected an argument such as {argument}=…"
    problem = one_line(str(error).split("\nSee https://")[0].replace(f"Error parsing override '{argument}'", ""))
    quoted = f'{key}="{_escape(value)}"'
    try:
        OverridesParser.create().parse_override(quoted).value()
    except HydraException:
        return f"{argument}: expected name=value; {problem}"
    close = "close the bracket or quote, or write the text" if value[:1] in ("[", "{", "'", '"') else "write text"
    return f"{argument}: not a value in Hydra's grammar; {close} in quotes of its own: {shlex.quote(quoted)}"


def _escape(value: str) -> str:
    return re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', value)


def _bad_yaml(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"a configuration file is not YAML: {one_line(error)}"
    problem = one_line(getattr(error, "problem", error))
    return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: not YAML: {problem}"


def _unknown_key(error: OmegaConfBaseException) -> str:
    key = str(getattr(error, "full_key", None) or getattr(error, "key", None))
    parent = getattr(error, "parent_node", None)
    names = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    return f"unknown setting {key}{_alternatives(key.rsplit('.', 1)[-1], names)} A new one is added with +{key}=…"


def _unknown_option(error: MissingConfigException) -> str:
    found = MISSING.search(str(error))
    assert found is not None
    group, name = found.groups()
    options = sorted(option for option in _options(error, group) if not option.startswith("_"))
    more = "; more come with Hydra's plugins, which pip installs" if group.startswith("hydra/") else ""
    return f"unknown {group} {group}/{name}; there are: {', '.join(options)}{more}"


def _options(error: MissingConfigException, group: str) -> Sequence[str]:
    """Names in a group: those that Hydra found, or where it does not say those of the package."""
    return error.options or [path.stem for path in (CONF / group).glob("*.yaml")]


def _no_option(arguments: Sequence[str]) -> str:
    parts = [part for part in arguments if (CONF / part.partition("=")[0].lstrip("+")).is_dir()]
    named = parts[0] if len(parts) == 1 else next((part for part in parts if NOT_A_NAME.search(part)), "a group")
    return (
        f"{named}: expected the name of one of the group's files, or a list of them; --help lists them. "
        f"A group is left out with ~{named.partition('=')[0].lstrip('+')}"
    )


def _local(error: BaseException, name: str) -> Any:
    """Value of a variable in the innermost frame that has it."""
    found, step = None, error.__traceback__
    while isinstance(step, TracebackType):
        found = step.tb_frame.f_locals.get(name, found)
        step = step.tb_next
    return found


def _alternatives(name: str, names: Sequence[str]) -> str:
    """End of a message: the closest name and all names."""
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{hint} There are: {', '.join(names)}." if names else hint
