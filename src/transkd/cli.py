"""Shared by the commands: path of conf/, start under Hydra, errors and signals in one line."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from transkd.command.composing import CONF
from transkd.command.folders import Refusal
from transkd.command.jobs import Jobs
from transkd.command.stopping import listening
from transkd.command.yaml_files import check_config_files
from transkd.errors import UserError
from transkd.settings import ProcessSettings

__all__ = ["CONF", "hydra_command", "plain_command"]

FULL = "HYDRA_FULL_ERROR"


def hydra_command(
    config_name: str, settings: type[ProcessSettings]
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make ``main(cfg)`` a command: Hydra composes ``conf/<config_name>.yaml``, errors are printed on one line.

    The configuration is checked against ``settings`` before ``main`` imports torch. With HYDRA_FULL_ERROR=1 errors keep
    their traceback.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        def command() -> None:
            wish = os.environ.get(FULL, "0")
            jobs = Jobs(sys.argv[1:], full=wish != "0")

            def job(cfg: DictConfig) -> None:
                os.environ[FULL] = wish  # for the processes that the job starts
                try:
                    with jobs.one(cfg):  # Hydra would add a line to the message
                        _check_config_name(config_name)
                        import_plugins(settings.read(cfg).plugins)
                        main(cfg)
                finally:
                    os.environ[FULL] = "1"

            logging.raiseExceptions = False  # a full disk is reported once, not at every line of the log
            os.environ[FULL] = "1"  # makes Hydra raise errors instead of printing them and exiting
            try:
                with listening(), jobs.all():
                    check_config_files(sys.argv[1:])
                    try:
                        hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(job)()
                    except Refusal as refusal:
                        raise refusal.error from None
            finally:
                os.environ[FULL] = wish

        return command

    return decorate


@contextmanager
def plain_command() -> Iterator[None]:
    """Around a command with arguments of its own instead of a configuration: errors and signals in one line, too."""
    with listening(), Jobs(sys.argv[1:], full=os.environ.get(FULL, "0") != "0", composes=False).all():
        yield


def _check_config_name(own: str) -> None:
    """Refuse another command's configuration; one of the user's own, with ``--config-dir``, is none of these."""
    name = HydraConfig.get().job.config_name
    if name is not None and name != own and (CONF / f"{name}.yaml").is_file():
        raise UserError(f"--config-name {name}: expected {own}; {name} is for the command python -m transkd.{name}")


def import_plugins(names: Iterable[str]) -> None:
    """Import a user's modules before anything is built, so that they can register networks and protocols.

    Raises:
        UserError: a module does not exist.
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
