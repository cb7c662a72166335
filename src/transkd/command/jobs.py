"""The jobs of a command: one, or those of a sweep, and how each ended."""

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from transkd.command.composing import one_line
from transkd.command.explaining import explain
from transkd.command.fault import ERROR_FILE, describe_fault, note_error
from transkd.command.folders import rank
from transkd.command.stopping import Stopped, end_children, received

__all__ = ["JobFailed", "Jobs"]

CLOCKS = 1.0
"""Seconds by which the time of a file may lie before that of the process that writes it."""


class JobFailed(Exception):  # noqa: N818
    """A job of a sweep failed and has said why; Hydra goes on with the next one."""


class Jobs:
    """Runs jobs, prints one line for each that fails, and ends the command with the right status.

    Args:
        arguments: the command line.
        full: errors keep their traceback.
        composes: Hydra composes a configuration first; False for a command that has none.
    """

    def __init__(self, arguments: Sequence[str], full: bool = False, composes: bool = True) -> None:
        self.arguments = arguments
        self.full = full
        self.begun = not composes
        self.kept = "nothing had begun"
        self.failed: list[str] = []

    @contextmanager
    def all(self) -> Iterator[None]:
        """Around everything: composition, start and all jobs.

        Raises:
            SystemExit: with the line of an error, or after a signal with its status.
        """
        try:
            yield
        except JobFailed as error:
            if not self.failed:  # of a launcher that runs jobs in other processes
                self.failed.append(str(error))
        except BrokenPipeError:  # whoever read the output has gone: `… --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except SystemExit:
            raise
        except BaseException as error:
            _exit_if_stopped(self.kept)
            if self.full or not isinstance(error, Exception):
                raise
            sys.exit(f"error: {self._line(error, None)}")
        if self.failed:
            sys.exit(f"error: {len(self.failed)} of the sweep's jobs failed: {'; '.join(self.failed)}")

    @contextmanager
    def one(self, cfg: DictConfig) -> Iterator[None]:
        """Around one job.

        Raises:
            SystemExit: the job failed and is the only one, or a signal arrived.
            JobFailed: it failed in a sweep whose launcher is not Hydra's own.
        """
        folder, sweeps, started = _folder(cfg), HydraConfig.get().mode == RunMode.MULTIRUN, time.time()
        line, done, self.begun, self.kept = "", False, True, "the jobs after it did not begin"
        if folder is not None and rank() == 0:
            (folder / ERROR_FILE).unlink(missing_ok=True)
        try:
            yield
            done = True
        except BaseException as error:
            end_children()
            _exit_if_stopped(what_is_kept(cfg, started), folder)
            if not isinstance(error, Exception) or (self.full and not sweeps):
                raise
            if self.full:
                traceback.print_exc()
            line = self._line(error, cfg, folder) if _is_first(folder) else ""
        finally:
            _end_loggers(failed=not done)
        if done:
            return
        if not line:  # another process of the run has said why
            sys.exit(1)
        if not sweeps:
            sys.exit(f"error: {line}")
        named = self._name()
        print(f"error: {named}: {line}", file=sys.stderr)
        self.failed.append(named)
        # Outside of except, since an error keeps the networks in memory. Hydra's own launcher needs none to go on.
        if "basic_launcher" not in HydraConfig.get().launcher._target_:
            raise JobFailed(f"{named}: {line}")

    def _name(self) -> str:
        """Number of the job, and what it has of the values that the sweep varies."""
        settings = [part for part in self.arguments if "=" in part and not part.startswith("-")]
        sweeps = [
            over.key_or_group for over in OverridesParser.create().parse_overrides(settings) if over.is_sweep_override()
        ]
        own = [part for part in HydraConfig.get().overrides.task if part.lstrip("+~").partition("=")[0] in sweeps]
        return f"job {HydraConfig.get().job.num} ({' '.join(own)})"

    def _line(self, error: BaseException, cfg: DictConfig | None, folder: Path | None = None) -> str:
        line = explain(error, self.arguments)
        if line is None and not self.begun:  # Hydra's own work, or a setting of its own
            line = (
                f"Hydra does not accept this: {type(error).__name__}: {one_line(error)} (hydra.*, or the command line)"
            )
        if line is None:
            return describe_fault(error, cfg, [path for path in (folder, Path.cwd()) if path is not None])
        if folder is not None:
            note_error(line, folder)
        return line


def _exit_if_stopped(what: str, folder: Path | None = None) -> None:
    """End after a signal, whatever exception a library made of it; say so unless another process has said why."""
    signum = received()
    if signum is not None:
        if folder is None or not (folder / ERROR_FILE).exists():
            print(f"{Stopped(signum)}: {what}", file=sys.stderr)
        sys.exit(128 + signum)


def _folder(cfg: DictConfig) -> Path | None:
    """Folder of the job, the same for all processes of a run; None for a command without one."""
    hydra = HydraConfig.get()
    if rank() > 0:  # Lightning starts it without Hydra's output_subdir
        return Path(cfg.run_dir) if "run_dir" in cfg else None
    return Path(hydra.runtime.output_dir) if hydra.output_subdir is not None else None


def _is_first(folder: Path | None) -> bool:
    """Whether this process is the first one of its run that fails; the others fail because it has gone."""
    if folder is None:
        return True
    try:
        (folder / ERROR_FILE).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk: every process says what it knows
        return True
    return True


def what_is_kept(cfg: DictConfig, started: float) -> str:
    """Say what of a run is left after a signal, and how to go on.

    Args:
        cfg: the configuration.
        started: time of the start; a student from before is of the run that was resumed.
    """
    try:
        run_dir, name = Path(OmegaConf.select(cfg, "run_dir") or ""), str(OmegaConf.select(cfg, "name"))
    except Exception:  # the configuration itself is wrong
        return "nothing had begun"
    if "run_dir" not in cfg or "weights" in cfg:
        return "what was written until then is whole"
    student = run_dir / "student.safetensors"
    if student.is_file() and student.stat().st_mtime >= started - CLOCKS:
        return f"the student is trained, {student}; score it with python -m transkd.evaluate"
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return "before the first checkpoint, so nothing of this run is kept"
    found = Path("outputs", name).absolute() in last.absolute().parents
    return f"go on with ckpt_path={'last' if found else last}"


def _end_loggers(failed: bool) -> None:
    """End the run of Weights & Biases, which lives as long as the process: each job of a sweep has its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(failed))
