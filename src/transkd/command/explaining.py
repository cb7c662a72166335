"""The one place that turns an exception of a command into one line, and knows whose mistake it is."""

import errno
import re
import site
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import InstantiationException

from transkd.command.composing import explain_composition, is_a, one_line, plain_message, unknown_target
from transkd.errors import UserError

__all__ = ["explain"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
WORKER_ENDED = re.compile(r"DataLoader worker .*(?:exited unexpectedly|killed by signal)", re.DOTALL)
OTHER_ENDED = re.compile(r"(?:closed|reset) by peer|[Bb]roken pipe|remote process exit")
LIBRARIES = {
    "lightning": "trainer, callbacks, logger",
    "lightning_fabric": "trainer",
    "pytorch_lightning": "trainer, callbacks, logger",
    "albumentations": "data.train_transform, data.eval_transform",
    "albucore": "data.train_transform, data.eval_transform",
    "wandb": "logger.wandb",
    "tensorboard": "logger.tensorboard",
    "timm": "student.network, teacher.network",
    "torch.optim": "optim.optimizer, optim.scheduler",
    "torch.multiprocessing": "trainer.strategy",
    "torch.distributed": "trainer.devices, trainer.strategy",
    "torch._dynamo": "compile",
    "torch._inductor": "compile",
    "hydra": "the command line",
    "omegaconf": "the configuration",
    "antlr4": "the command line",
}
"""Libraries that settings are handed to, and which."""
STANDARD = Path(sysconfig.get_paths()["stdlib"]).resolve()
INSTALLED = [Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())]
PACKAGE = Path(__file__).resolve().parents[1]


def explain(error: BaseException, arguments: Sequence[str] = ()) -> str | None:
    """Return one line about a mistake of the user or of their machine; None for a fault of transkd.

    Args:
        error: any exception of a command.
        arguments: the command line.

    Example:
        >>> explain(UserError("data.root=nowhere: expected a folder"))
        'data.root=nowhere: expected a folder'
        >>> explain(OSError(28, "No space left on device", "run/last.ckpt"))
        'cannot write run/last.ckpt: No space left on device; free some, or choose another folder'
        >>> explain(ZeroDivisionError()) is None
        True
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, UserError):  # errors of DataLoader workers have their traceback as a prefix
            return one_line(str(cause).rsplit("transkd.errors.UserError: ", 1)[-1], 2000)
    return (
        explain_composition(error, causes, arguments)
        or next((found for cause in reversed(causes) if (found := _machine(cause))), None)
        or next((_target(cause, causes) for cause in causes if isinstance(cause, InstantiationException)), None)
        or _misconfiguration(causes)
        or _elsewhere(causes[-1])
    )


def _machine(error: BaseException) -> str | None:
    """Disk, memory, permissions, files."""
    text = str(error)
    if (
        isinstance(error, MemoryError)
        or is_a(error, "OutOfMemoryError")
        or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text))
    ):
        return (
            f"out of memory ({one_line(text, 200) or 'of the CPU'}); lower data.batch_size or data.eval_batch_size, "
            "the crop, or the network, or set student.checkpointing=true"
        )
    if isinstance(error, RuntimeError) and WORKER_ENDED.search(text):
        return (
            f"a process that reads data ended ({one_line(text, 200)}): mostly too little memory or shared memory; "
            "lower data.num_workers, with 0 the run reads by itself"
        )
    if isinstance(error, RuntimeError) and OTHER_ENDED.search(text):
        return (
            "another process of this run has ended without a word: mostly killed, for want of memory (the system's log "
            "says so); lower data.batch_size, data.eval_batch_size or data.num_workers"
        )
    if not isinstance(error, OSError) or error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        return None
    reason, path = error.strerror or text, error.filename2 or error.filename
    if error.errno in FULL:
        return f"cannot write{f' {path}' if path else ''}: {reason}; free some, or choose another folder"
    if error.errno in CLOSED:
        advice = "check its permissions, or name another with hydra.run.dir=FOLDER or output=FOLDER"
        return f"no access to {path or 'a file'}: {reason}; {advice}"
    return f"{path}: {reason}" if path else one_line(text)


def _target(error: BaseException, causes: Sequence[BaseException]) -> str:
    """An object of the configuration that could not be built from its arguments."""
    text = str(error)
    unlocated = re.search(r"Error locating target '(.+?)'.*?full_key: (\S+)", text, re.DOTALL)
    if unlocated:
        return unknown_target(*unlocated.groups())
    cause = causes[-1]
    key = re.search(r"\nfull_key: (\S+)$", text)
    where = f"{key[1]}: " if key else ""
    if "Expected a callable target" in text:
        return f"{where}its _target_ is no class and no function; it needs the path of one, such as torch.optim.AdamW"
    called = re.search(r"Error in call to target '(.+?)'", text)
    detail = f"{type(cause).__name__}: {plain_message(cause)}" if cause is not error else plain_message(error)
    return f"{where}{called[1]} does not accept this: {one_line(detail)}" if called else one_line(f"{where}{detail}")


def _misconfiguration(causes: Sequence[BaseException]) -> str | None:
    """Lightning's exception for settings that it does not accept; its class is not imported."""
    for cause in causes:
        if is_a(cause, "MisconfigurationException"):
            return f"Lightning does not accept this: {one_line(cause)} (trainer, callbacks, logger)"
    return None


def _elsewhere(error: BaseException) -> str | None:
    """An exception raised in the user's own code, or in a library that was handed a setting; None otherwise."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_standard(Path(frame.filename))]
    if not frames:
        return None
    last, what = frames[-1], f"{type(error).__name__}: {one_line(error)}"
    path = Path(last.filename)
    if not _is_within(path, (*INSTALLED, PACKAGE)):
        return f"{path}, line {last.lineno}: {what} (HYDRA_FULL_ERROR=1 shows more)"
    library = next((name for name in LIBRARIES if f"/{name.replace('.', '/')}/" in path.as_posix()), None)
    if library is None:
        return None
    if library == "hydra" and isinstance(error, TypeError) and "argument" in what:  # a _partial_ is called by Hydra
        return f"a _target_ was called with other arguments than it takes: {what} (HYDRA_FULL_ERROR=1 shows more)"
    return f"{library} does not accept this: {what} ({LIBRARIES[library]}; HYDRA_FULL_ERROR=1 shows more)"


def _is_standard(path: Path) -> bool:
    """Whether a file is of the standard library, or none at all (frozen modules)."""
    return not path.is_file() or (_is_within(path, [STANDARD]) and not _is_within(path, INSTALLED))


def _is_within(path: Path, folders: Sequence[Path]) -> bool:
    return any(folder in path.resolve().parents for folder in folders)
