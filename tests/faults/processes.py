"""Runs of the command ``train`` in a process of their own, which can be signalled, killed or short of disk.

They are forked from a server that has imported everything and computed nothing: a fork of the tests' own process could
compute no gradients.
"""

import multiprocessing
import os
import resource
import sys
from pathlib import Path

from door import SMALL

from transkd import train

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transkd.run"])


def command(folder: Path, *overrides: str, file_limit: int | None = None):
    """Start the command in a folder; it writes what it says into ``said.txt`` there."""
    process = SERVER.Process(target=_child, args=(folder, overrides, file_limit))
    process.start()
    return process


def _child(folder, overrides, file_limit):
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    sys.argv = ["transkd", *SMALL, "distill=none", *overrides]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    train.main()


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text()
