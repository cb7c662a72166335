"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from transkd.errors import UserError

__all__ = ["write_atomically"]


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
