"""Shared by the commands: path of conf/, start under Hydra, errors and signals in one line."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from transkd.command.composing import CONF
from transkd.command.folders import Refusal
from transkd.command.jobs import Jobs
from transkd.command.stopping import listening
from transkd.errors import UserError
from transkd.settings import ProcessSettings

__all__ = ["CONF", "hydra_command"]


def hydra_command(
    config_name: str, settings: type[ProcessSettings]
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make ``main(cfg)`` a command: Hydra composes ``conf/<config_name>.yaml``, errors are printed on one line.

    The configuration is checked against ``settings`` before ``main`` imports torch. With HYDRA_FULL_ERROR=1 errors keep
    their traceback.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        def command() -> None:
            wish = os.environ.get("HYDRA_FULL_ERROR", "0")
            jobs = Jobs(sys.argv[1:], full=wish != "0")

            def job(cfg: DictConfig) -> None:
                with jobs.one(cfg):  # Hydra would add a line to the message
                    import_plugins(settings.read(cfg).plugins)
                    main(cfg)

            logging.raiseExceptions = False  # a full disk is reported once, not at every line of the log
            os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them and exiting
            try:
                with listening(), jobs.all():
                    try:
                        hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(job)()
                    except Refusal as refusal:
                        raise refusal.error from None
            finally:
                os.environ["HYDRA_FULL_ERROR"] = wish

        return command

    return decorate


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


def save_resolved(cfg: DictConfig, path: Path) -> None:
    """Write a configuration with all interpolations resolved."""
    path.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
