"""A fault of transkd itself: one line for the user, and a file with what its authors need."""

import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from transkd.command.composing import one_line

__all__ = ["ERROR_FILE", "describe_fault", "note_error"]

ERROR_FILE = "error.txt"
"""Of a run that failed: the line that was printed; for a fault of transkd also versions, configuration, traceback."""
PACKAGES = ("transkd", "torch", "torchvision", "lightning", "timm", "albumentations", "hydra-core", "omegaconf")
WHERE = "the issue tracker of the repository that you have transkd from"


def describe_fault(error: BaseException, cfg: DictConfig | None, folders: Iterable[Path]) -> str:
    """Write the report into the first folder that takes it, and return the line for the user.

    Args:
        error: what was raised.
        cfg: the composed configuration; None if there was none yet.
        folders: where to write, best first; the folder for temporary files comes last.
    """
    frame = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    place = f", {Path(frame.filename).name} line {frame.lineno}" if frame is not None else ""
    line = f"a fault of transkd, not of yours: {type(error).__name__}: {one_line(error, 300)}{place}"
    text = f"{line}\n\n{_details(error, cfg)}"
    for folder in (*folders, Path(tempfile.gettempdir())):
        path = note_error(text, folder)
        if path is not None:
            return f"{line}. Please report it in {WHERE}, with the file {path}"
    return f"{line}. Please report it in {WHERE}, with what HYDRA_FULL_ERROR=1 prints (no folder took a file)"


def note_error(text: str, folder: Path) -> Path | None:
    """Write ``error.txt`` into an existing folder; None where it cannot be written."""
    path = folder / ERROR_FILE
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError:
        return None
    return path.absolute()


def _details(error: BaseException, cfg: DictConfig | None) -> str:
    trace = "".join(traceback.format_exception(error))
    config = OmegaConf.to_yaml(cfg) if cfg is not None else "not composed yet\n"
    return "\n".join(
        [
            f"command: {shlex.join(sys.argv)}",
            f"folder: {os.getcwd()}",
            f"python: {platform.python_version()} on {platform.platform()}",
            *(f"{name}: {_version_of(name)}" for name in PACKAGES),
            "",
            trace,
            "configuration:",
            config,
        ]
    )


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
