"""Atomic writing of files, and reading of tensor files without executing code."""

import hashlib
import importlib
import os
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from transkd.errors import UserError

__all__ = [
    "check_archive",
    "check_regular_file",
    "is_being_written",
    "one_at_a_time",
    "read_tensor_file",
    "sha256",
    "tensors_in",
    "write_atomically",
]


LOCKS: Any = importlib.import_module("fcntl") if os.name == "posix" else None


def write_atomically(path: str | Path, content: bytes | memoryview, sync: bool = True) -> None:
    """Write to a temporary file in the same folder, then rename it to the target.

    A full disk or a killed process leaves the previous file unchanged.

    Args:
        path: file to write or replace; missing folders are made.
        content: the whole file.
        sync: wait until the disk has it; False for many small files that can be written again.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.")
        with os.fdopen(handle, "wb") as file:
            _lock(file)
            file.write(content)
            file.flush()
            if sync:
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


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process is in a block under the same file, which is made; no wait where nothing locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if LOCKS is not None:
            with suppress(OSError):  # a file system without locks
                LOCKS.flock(file, LOCKS.LOCK_EX)
        yield


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def check_regular_file(path: str | Path, what: str) -> None:
    """Require a file that can be read to its end: no folder, pipe or device.

    Raises:
        UserError: it is missing or of another kind; the message calls it ``what``.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"{what} not found: {path}{reason}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise UserError(f"{path} is a {kinds.get(stat.S_IFMT(mode), 'device')}, not a regular file ({what})")


def check_archive(path: str | Path) -> None:
    """Compare the checksum of every entry of a file by ``torch.save``, which ``torch.load`` does not do.

    Files in the format of PyTorch before 1.6 are no zip archives and have no checksums; they pass.

    Raises:
        UserError: an entry differs from its checksum, or the archive is not one that PyTorch writes.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress, so that no small file can unpack to a huge one
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            broken = None if packed else archive.testzip()
    except Exception as error:  # a damaged directory raises many types of exceptions
        raise UserError(
            f"{path} is not a readable weights file: damaged ({_reason(error)}); copy or download it again"
        ) from error
    if packed:
        raise UserError(
            f"{path} is not a readable weights file: {packed[0]} is compressed, which torch.save never does"
        )
    if broken is not None:
        raise UserError(f"{path} is damaged: {broken} differs from its checksum; copy or download it again")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_tensor_file(path: str | Path) -> tuple[Any, dict[str, str]]:
    """Read a safetensors file or a PyTorch checkpoint, detected by content, without executing code in it.

    Returns:
        The content (of a safetensors file: tensors by name), and the metadata of a safetensors file.

    Raises:
        UserError: the file does not exist, is damaged, or contains pickled objects other than plain tensors.
    """
    path = Path(path)
    check_regular_file(path, "weights file")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    # A safetensors file begins with the length of its JSON header (8 bytes) and the header's opening brace.
    if head[8:9] == b"{":
        return _read_safetensors(path)
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats; what is not readable is an error below
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # damaged files raise many types of exceptions
        raise UserError(
            f"{path} is not a readable weights file: expected safetensors or a PyTorch checkpoint of plain tensors, "
            f"got {path.stat().st_size} bytes that are damaged, of another format, or contain pickled objects, which "
            f"are never executed ({_reason(error)})"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    import safetensors  # imported here: `transkd.losses` imports this module and depends on torch only

    try:
        with safetensors.safe_open(path, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            return tensors, archive.metadata() or {}
    except Exception as error:  # types that torch lacks raise others than SafetensorError
        raise UserError(
            f"{path} is a damaged safetensors file ({_reason(error)}); copy or download it again"
        ) from error


def tensors_in(content: Any, source: str | Path) -> dict[str, Tensor]:
    """Return the tensors by name of a file's content, also from under "state_dict", "model_state_dict" or "model".

    Raises:
        UserError: there are none.
    """
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{source} contains no weights: expected a mapping of names to tensors")
    return tensors


def sha256(path: str | Path) -> str | None:
    """SHA-256 of a file; None for a folder or a hub address."""
    if not os.path.isfile(path):
        return None
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
