"""Files: written whole or not at all; tensors read without executing anything."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transkd.errors import UserError

__all__ = ["read_tensor_file", "sha256", "tensors_in", "write_atomically"]


def write_atomically(path: str | Path, content: bytes | memoryview) -> None:
    """Replace a file by new content only once that lies complete on the same disk.

    A full disk or a kill at any moment leaves the previous file as it was.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = "; the file that was there is kept as it was" if path.exists() else ""
            raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from error
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def read_tensor_file(path: str | Path) -> tuple[Any, dict[str, str]]:
    """What a safetensors file or a PyTorch checkpoint holds; told apart by content, nothing in it is executed.

    Returns:
        The content (of a safetensors file: tensors by name) and a safetensors file's metadata.

    Raises:
        UserError: there is no such file, or it is damaged, or holds objects that would have to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file not found: {path}")
    with path.open("rb") as file:
        start = file.read(16)
    # A safetensors file begins with the length of its JSON header (8 bytes) and the header's brace.
    if start[8:9] == b"{":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # of damaged bytes torch raises whatever its parser trips over
        raise UserError(
            f"{path} is no readable weights file: expected safetensors or a PyTorch checkpoint of plain tensors, got "
            f"{path.stat().st_size} bytes that are damaged, foreign or hold other objects, which are never executed "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    import safetensors  # `transkd.losses` reads this module and needs torch alone

    try:
        with safetensors.safe_open(path, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            return tensors, archive.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is a damaged safetensors file ({error}); copy or download it again") from error


def tensors_in(content: Any, source: str | Path) -> dict[str, Tensor]:
    """The tensors by name in what a file holds, also under "state_dict" or "model".

    Raises:
        UserError: there is none.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{source} holds no weights: expected a mapping of names to tensors")
    return tensors


def sha256(path: str | Path) -> str | None:
    """Hash of a file, to tell later which one it was; None for a folder or a hub's address."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
