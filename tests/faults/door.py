"""Calls ``train`` in this process with one mistake, as a user would, and says how it ended."""

import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from runs import TINY

from transkd import train
from transkd.cli import CONF, import_plugins
from transkd.command.explaining import explain
from transkd.run import run
from transkd.settings import TrainSettings

BUDGET = 20  # seconds for one mistake
SMALL = [
    *TINY,
    "+student.network.encoder.channels=[8,16,20,32]",
    "+student.network.encoder.depths=[1,1,1,1]",
    "+teacher.network.encoder.channels=[8,16,20,32]",
    "+teacher.network.encoder.depths=[1,1,1,1]",
    "data.prepare.train=2",
    "data.prepare.val=1",
    "trainer.max_epochs=1",
    "pictures=0",
    "distill=transkd_cwd",
]


class TooSlow(BaseException):
    """A mistake took longer than its budget."""


@contextmanager
def budget():
    def too_slow(signum, frame):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(BUDGET)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Door:
    """Takes one mistake after the other, each on top of a small run that works."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = [*SMALL, f"data.root={root / 'data'}", f"teacher.fit.folder={root / 'teachers'}"]
        self.base = self.compose(f"run_dir={root / 'run'}")

    def compose(self, *overrides: str):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", [*self.settings, *overrides])

    def answer(self, mistake: str) -> str:
        """How the command ends: "runs", the line of the error, or what else happened."""
        before = Path.cwd()
        here = self.root / "here"
        here.mkdir()
        os.chdir(here)
        try:
            with budget():
                found = self.command(mistake) if mistake.startswith("hydra") else self.job(mistake)
        except TooSlow:
            found = f"TOO SLOW: more than {BUDGET} s"
        except BaseException as error:
            found = f"TRACEBACK: {type(error).__name__}: {error}"
        finally:
            os.chdir(before)
            shutil.rmtree(here)
            shutil.rmtree(self.root / "run", ignore_errors=True)
        return found.replace(str(self.root), "ROOT")

    def job(self, mistake: str) -> str:
        """The work of the command without Hydra's logs, and composed anew only where a group or a name is wrong."""
        try:
            key = mistake.partition("=")[0].lstrip("+")
            if mistake.startswith("~") or "." not in key:
                cfg = self.compose(f"run_dir={self.root / 'run'}", mistake)
            else:
                cfg = self.base.copy()
                ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([mistake]), cfg)
            import_plugins(TrainSettings.read(cfg).plugins)
            run(cfg)
        except Exception as error:
            return explain(error, [mistake]) or f"FAULT: {type(error).__name__}: {error}"
        return "runs"

    def command(self, mistake: str) -> str:
        arguments, sys.argv = sys.argv, ["transkd", *self.settings, mistake]
        try:
            train.main()
        except SystemExit as stop:
            return str(stop.code).removeprefix("error: ")
        finally:
            sys.argv = arguments
        return "runs"
