"""Folders of runs: each belongs to one run, also of two that begin in the same second."""

import atexit
import errno
import hashlib
import json
import os
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from transkd.errors import UserError
from transkd.settings import plain_name

__all__ = ["Refusal", "RunFolder", "enter", "rank"]

LOCK = ".lock"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
TORCHRUN = "TORCHELASTIC_RUN_ID"
TRAINED = ("checkpoints/*.ckpt", "student.safetensors")
"""Files of a training run that are worth keeping; metrics.csv alone is left by one that ended in its first epoch."""
PATIENCE = 60.0
"""Seconds to wait for the process with rank 0 under torchrun or srun."""
_held: dict[Path, int] = {}


def rank() -> int:
    """Rank of this process among those of a run, as torchrun, Lightning and SLURM give it in the environment."""
    return int(next((found for name in RANKS if (found := os.environ.get(name))), 0))


class Refusal(BaseException):
    """Carries an error out of Hydra's callbacks, where Hydra would turn an ``Exception`` into a warning.

    Attributes:
        error: the error.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def enter(folder: Path, ckpt_path: str | Path | None = None, scores_only: bool = False, jobs: bool = False) -> None:
    """Make the folder of a run and take it for this process, until it ends.

    Args:
        folder: the run's folder.
        ckpt_path: checkpoint to resume; with one of this folder, or ``last``, the run in it goes on.
        scores_only: an evaluation, which may write its results.json again.
        jobs: the folder is a sweep's and has those of its jobs inside.

    Raises:
        UserError: another process runs in the folder, or it holds a run that is not resumed.
        OSError: the folder cannot be made.
    """
    if rank() > 0:
        return
    if not _take(folder):
        raise UserError(f"another run is at work in {folder}; give this one a folder of its own: hydra.run.dir=FOLDER")
    if ckpt_path == "last" or (ckpt_path and folder.absolute() in Path(ckpt_path, "_").absolute().parents):
        return
    names = TRAINED if scores_only else (*TRAINED, "results.json")
    found = next((path for name in names for path in folder.glob(f"*/{name}" if jobs else name)), None)
    if found is not None:
        raise UserError(
            f"{folder} holds a run already, whose {found.relative_to(folder)} would be overwritten: resume it with "
            f"ckpt_path=last, or give this one a folder of its own with hydra.{'sweep' if jobs else 'run'}.dir=FOLDER"
        )


class RunFolder(Callback):
    """Hydra's callback that gives a run or a sweep a folder of its own, before Hydra writes into it.

    A folder named by the time that is taken becomes ``<time>_2`` and so on; one that was named by the user is refused.
    The processes of torchrun and srun share the folder of rank 0.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose ``hydra.run.dir``."""
        _choose(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose ``hydra.sweep.dir``."""
        _choose(config, "hydra.sweep.dir")


def _choose(config: DictConfig, key: str) -> None:
    times = OmegaConf.get_cache(config)["now"]  # what ${now:…} gave, shared by all that refers to it
    try:
        _check_name(config)
        if rank() == 0:
            _find_free(config, key, times)
            _tell_others(times)
        elif (meeting_point := _meeting_point()) is not None:
            times.update(_ask_first(meeting_point))
    except Exception as error:
        raise Refusal(error) from error


def _check_name(config: DictConfig) -> None:
    """Check the name before it becomes a folder."""
    name = OmegaConf.select(config, "name")
    if isinstance(name, str):
        try:
            plain_name(name)
        except ValueError as error:
            raise UserError(f"name={name}: expected {error}") from None


def _find_free(config: DictConfig, key: str, times: dict[tuple[str, ...], str]) -> None:
    options = {
        "ckpt_path": OmegaConf.select(config, "ckpt_path"),
        "scores_only": "weights" in config,
        "jobs": key == "hydra.sweep.dir",
    }
    first = OmegaConf.select(config, key)
    original = {pattern: value for pattern, value in times.items() if "%S" in "".join(pattern)}
    for number in range(2, 100):
        try:
            return enter(Path(OmegaConf.select(config, key)), **options)
        except UserError:
            times.update({pattern: f"{value}_{number}" for pattern, value in original.items()})
            if OmegaConf.select(config, key) == first:  # the name does not hold the time
                raise
    raise UserError(f"{first}: this folder and the next ones are taken")


def _take(folder: Path) -> bool:
    """Lock the folder for this process; False where another process holds it. Processes that it forks have no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    where = folder.resolve()
    if where in _held or os.name != "posix":
        return True
    handle = os.open(where / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    locking = import_module("fcntl")
    try:
        locking.lockf(handle, locking.LOCK_EX | locking.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # any other: this file system has no locks
    _held[where] = handle
    return True


# torchrun and srun start all processes at once; the first one tells the others which time names the folder.


def _meeting_point() -> Path | None:
    """File that the processes of one start by torchrun or srun agree on; None for a process that was started alone."""
    known = os.environ.get
    if TORCHRUN in os.environ:
        processes, one_machine = known("WORLD_SIZE", "1"), known("LOCAL_WORLD_SIZE") == known("WORLD_SIZE")
        names = (TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        start = [known(name, "") for name in names] + [str(os.getppid()) if one_machine else ""]
    else:
        processes, one_machine = known("SLURM_NTASKS", "1"), known("SLURM_NNODES") == "1"
        start = [known(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    if processes == "1":
        return None
    name = f".transkd_{hashlib.sha256('/'.join(start).encode()).hexdigest()[:16]}.json"
    return (Path(tempfile.gettempdir()) if one_machine else Path.cwd()) / name


def _tell_others(times: dict[tuple[str, ...], str]) -> None:
    path = _meeting_point()
    if path is None:
        return
    content = json.dumps([[list(pattern), value] for pattern, value in times.items()])
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write(content)
    os.replace(temporary, path)
    atexit.register(path.unlink, missing_ok=True)


def _ask_first(path: Path) -> dict[tuple[str, ...], str]:
    until = time.monotonic() + PATIENCE
    while not (path.is_file() and path.stat().st_uid == os.getuid()):
        if time.monotonic() > until:
            raise UserError(
                f"rank {rank()} did not hear from rank 0 for {PATIENCE:g} s which folder the run has; name it with "
                "hydra.run.dir=FOLDER"
            )
        time.sleep(0.05)
    return {tuple(pattern): value for pattern, value in json.loads(path.read_text())}
