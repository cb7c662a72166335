"""Writing an export into place only once it is complete and checked."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transkd.errors import UserError

__all__ = ["beside", "staged", "writing"]


@contextmanager
def staged(output: Path, is_folder: bool) -> Iterator[Path]:
    """A temporary folder beside ``output``; what lies in it at the end moves into place, after an error nothing does.

    Raises:
        UserError: ``output`` cannot be written, or is something that is not ours to replace; before anything is made.
    """
    with writing(output):
        _check_replaceable(output, is_folder)
        made = [folder for folder in output.parents if not folder.exists()]
    stage = None
    try:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        yield stage
        with writing(output):
            for item in list(stage.iterdir()):
                _replace(item, output.with_name(item.name), stage / ".replaced")
        made = []
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not there, or not empty by now
                folder.rmdir()


def _check_replaceable(output: Path, is_folder: bool) -> None:
    ancestor = next(folder for folder in output.parents if folder.exists())
    if not ancestor.is_dir():
        raise UserError(f"cannot write {output}: {ancestor} is a file; choose another output=…")
    if not is_folder:
        if output.is_dir() or beside(output).is_dir():
            raise UserError(f"cannot write the file {output}: there is a folder; name a file in output=…")
    elif output.is_dir() and any(output.iterdir()) and not _is_export(output):
        raise UserError(f"{output} holds other files, which are not overwritten; choose a new or empty folder")
    elif output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; format=hf writes a folder")


def _is_export(folder: Path) -> bool:
    try:
        return "transkd" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn what the system refuses into one line that names the output."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Move a file or folder over another; a folder that is replaced goes ``aside`` first, and back if that fails."""
    if target.is_dir():
        os.replace(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise


def beside(output: Path) -> Path:
    """Where the description of a file's preprocessing lies."""
    return output.with_suffix(".preprocess.json")
