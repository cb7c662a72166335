"""Shared by the commands: path of conf/, start under Hydra, one-line messages for user errors."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import hydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from transkd.errors import UserError
from transkd.settings import ProcessSettings

__all__ = ["CONF", "hydra_command"]

PACKAGE = Path(__file__).parent
# A wheel has conf/ inside the package, a checkout at the top of the repository.
CONF = next((path for path in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if path.is_dir()), PACKAGE / "conf")


def hydra_command(
    config_name: str, settings: type[ProcessSettings]
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make ``main(cfg)`` a command: Hydra composes ``conf/<config_name>.yaml``, user errors are printed on one line.

    The configuration is checked against ``settings`` before ``main`` imports torch. Other errors keep their traceback,
    and with HYDRA_FULL_ERROR=1 so do user errors.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        def command() -> None:
            wish = os.environ.get("HYDRA_FULL_ERROR", "0")

            @contextmanager
            def mistakes_explained() -> Iterator[None]:
                try:
                    yield
                except Exception as error:
                    message = explain(error) if wish == "0" else None
                    if message is None:
                        raise
                    sys.exit(f"error: {message}")
                finally:
                    os.environ["HYDRA_FULL_ERROR"] = wish

            def job(cfg: DictConfig) -> None:
                with mistakes_explained():  # also inside the job: Hydra would add a line to the message
                    import_plugins(settings.read(cfg).plugins)
                    main(cfg)

            with mistakes_explained():
                os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them and exiting
                hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(job)()

        return command

    return decorate


def import_plugins(names: Iterable[str]) -> None:
    """Import a user's modules before anything is built, so that they can register networks and protocols.

    Raises:
        UserError: a module does not exist; errors raised inside a module keep their traceback.
    """
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"plugins=[{name}]: there is no module {error.name} to import; install it, or start the command in the "
                "folder that contains it"
            ) from error


def explain(error: BaseException) -> str | None:
    """Return the message of a user error, None for any other error."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, UserError):  # errors of DataLoader workers have their traceback as a prefix
            return str(cause).rsplit("transkd.errors.UserError: ", 1)[-1].strip()
    for cause in causes:
        if isinstance(cause, MissingMandatoryValue | InterpolationKeyError):
            key = getattr(cause, "full_key", None) or ""
            return f"{key} has no value; give it on the command line: {key}=…"
    unknown = next((c for c in causes if isinstance(c, OmegaConfBaseException) and "not in struct" in str(c)), None)
    if unknown is not None:
        return _unknown_key(unknown)
    missing = re.search(r"Could not (?:find|load) '(.+)/(.+?)'", str(error))
    if isinstance(error, ConfigCompositionException | HydraException) and missing:
        group, name = missing.groups()
        options = sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
        return f"unknown {group} {group}/{name}; there are: {', '.join(options)}"
    unlocated = re.search(r"Error locating target '(.+?)'.*?full_key: (\S+)", str(error), re.DOTALL)
    if isinstance(error, InstantiationException) and unlocated:
        return _unknown_target(*unlocated.groups())
    if isinstance(error, ConfigCompositionException | HydraException) and not isinstance(error, InstantiationException):
        return " ".join(str(error).replace("\n\t", " ").split())
    if isinstance(error, InstantiationException) and isinstance(causes[-1], TypeError):
        return " ".join(str(error).split())
    return None


def _unknown_key(error: OmegaConfBaseException) -> str:
    key = str(getattr(error, "full_key", None) or getattr(error, "key", None))
    parent = getattr(error, "parent_node", None)
    names = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    return f"unknown setting {key}{_alternatives(key.rsplit('.', 1)[-1], names)} A new one is added with +{key}=…"


def _unknown_target(target: str, key: str) -> str:
    parent, _, name = target.rpartition(".")
    try:
        names = sorted(getattr(import_module(parent), "__all__", ()))
    except ImportError:
        return f"{key}._target_={target}: there is no module {parent} to import it from"
    return f"{key}._target_={target}: {parent} has no {name}{_alternatives(name, names)}"


def _alternatives(name: str, names: Sequence[str]) -> str:
    """End of a message: the closest name and all names."""
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{hint} There are: {', '.join(names)}." if names else hint


def save_resolved(cfg: DictConfig, path: Path) -> None:
    """Write a configuration with all interpolations resolved."""
    path.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
