"""Write an export to a temporary folder and move it into place once it is complete and checked."""

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
    """Yield a temporary folder next to ``output``; on success its contents are moved into place, on error deleted.

    Raises:
        UserError: ``output`` cannot be written, or exists and is not an export; before anything is created.
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
            with suppress(OSError):  # missing, or no longer empty
                folder.rmdir()


def _check_replaceable(output: Path, is_folder: bool) -> None:
    ancestor = next(folder for folder in output.parents if folder.exists())
    if not ancestor.is_dir():
        raise UserError(f"cannot write {output}: {ancestor} is a file; choose another output=…")
    if not is_folder:
        if output.is_dir() or beside(output).is_dir():
            raise UserError(f"cannot write the file {output}: a folder has that name; give a file name in output=…")
    elif output.is_dir() and any(output.iterdir()) and not _is_export(output):
        raise UserError(f"{output} contains other files, which are not overwritten; choose a new or empty folder")
    elif output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; format=hf writes a folder")


def _is_export(folder: Path) -> bool:
    try:
        return "transkd" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Convert an OSError to a user error that names the output."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Replace ``target`` by a file or folder; an old folder is moved to ``aside`` first, and restored on failure."""
    if target.is_dir():
        os.replace(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise


def beside(output: Path) -> Path:
    """Path of the file that describes the preprocessing."""
    return output.with_name(f"{output.name}.preprocess.json")
