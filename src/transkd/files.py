"""Atomic writing of files, and reading of tensor files without executing code."""

import hashlib
import importlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from transkd.errors import UserError

__all__ = ["is_being_written", "read_tensor_file", "sha256", "tensors_in", "write_atomically"]


LOCKS: Any = importlib.import_module("fcntl") if os.name == "posix" else None


def write_atomically(path: str | Path, content: bytes | memoryview) -> None:
    """Write to a temporary file in the same folder, then rename it to the target.

    A full disk or a killed process leaves the previous file unchanged.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            _lock(file)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp creates files with mode 0600
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = "; the previous file is kept" if path.exists() else ""
            raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from error
        raise


def is_being_written(path: Path) -> bool:
    """Whether a living process writes a temporary file of `write_atomically`; True where that cannot be told."""
    try:
        with path.open("rb") as file:
            return not _lock(file)
    except OSError:
        return True


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed, if the system can; the end of the process unlocks it."""
    if LOCKS is None:
        return False
    try:
        LOCKS.flock(file, LOCKS.LOCK_EX | LOCKS.LOCK_NB)
    except OSError:
        return False
    return True


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def read_tensor_file(path: str | Path) -> tuple[Any, dict[str, str]]:
    """Read a safetensors file or a PyTorch checkpoint, detected by content, without executing code in it.

    Returns:
        The content (of a safetensors file: tensors by name), and the metadata of a safetensors file.

    Raises:
        UserError: the file does not exist, is damaged, or contains pickled objects other than plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file not found: {path}")
    with path.open("rb") as file:
        head = file.read(16)
    # A safetensors file begins with the length of its JSON header (8 bytes) and the header's opening brace.
    if head[8:9] == b"{":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # damaged files raise many types of exceptions
        raise UserError(
            f"{path} is not a readable weights file: expected safetensors or a PyTorch checkpoint of plain tensors, "
            f"got {path.stat().st_size} bytes that are damaged, of another format, or contain pickled objects, which "
            "are never executed "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    import safetensors  # imported here: `transkd.losses` imports this module and depends on torch only

    try:
        with safetensors.safe_open(path, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            return tensors, archive.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is a damaged safetensors file ({error}); copy or download it again") from error


def tensors_in(content: Any, source: str | Path) -> dict[str, Tensor]:
    """Return the tensors by name of a file's content, also if they are under "state_dict" or "model".

    Raises:
        UserError: there are none.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{source} contains no weights: expected a mapping of names to tensors")
    return tensors


def sha256(path: str | Path) -> str | None:
    """SHA-256 of a file; None for a folder or a hub address."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
