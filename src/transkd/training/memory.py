"""The C library's memory under training on a CPU."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free for the next ones, until the process ends.

    By itself glibc hands every block above 32 MB back to the system when it is freed, and the system clears its pages
    again at the next allocation: a tenth to a fifth of a training step on a CPU at 512×1024
    (docs/performance.md). No value changes.

    Returns:
        Whether this C library can be told so; only glibc (Linux) can.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
