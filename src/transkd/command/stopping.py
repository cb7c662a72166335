"""SIGINT and SIGTERM: an exception that ends the command in order, with exit status 130 and 143."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transkd.command.folders import rank

__all__ = ["Stopped", "again", "end_children", "listening", "received", "takes_along"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0
"""Seconds in which a second signal counts as the first: torchrun passes on the Ctrl-C that the terminal sent to all."""
PATIENCE = 5.0
"""Seconds that a process started by a launcher has to end."""


class Stopped(BaseException):
    """A signal asks the command to end; no ``Exception``, so that no library takes it for an error of a job.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class _State:
    """The process that listens, the signal it got and when, and what may have started other processes of the run."""

    owner: int | None = None
    signum: int | None = None
    since = 0.0
    launchers: tuple[Any, ...] = ()


@contextmanager
def listening() -> Iterator[None]:
    """Raise ``Stopped`` at the first SIGINT or SIGTERM; a second one ends the process at once.

    A signal that the caller ignores (SIGINT under nohup or in the background) stays ignored. Processes of a run other
    than the first have nothing to save and end at once, also inside a collective, which runs no handler of Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.owner, _State.signum, _State.launchers = os.getpid(), None, ()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    again()
    try:
        yield
    finally:
        _State.owner = None
        for number, handler in before.items():
            signal.signal(number, handler)


def again() -> None:
    """Set the handlers anew, over those of a library; does nothing in a process that does not listen."""
    if _State.owner == os.getpid():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _handle if rank() == 0 else signal.SIG_DFL)


def takes_along(launcher: Any) -> None:
    """Remember a launcher of Lightning: ``end_children`` ends the processes in its list ``procs``."""
    _State.launchers += (launcher,)


def end_children() -> None:
    """End the processes that launchers started, since a process in a collective would wait for this one for ever."""
    started = [getattr(launcher, "procs", []) for launcher in _State.launchers]
    children = [child for part in started for child in part if isinstance(child, subprocess.Popen)]
    for part in started:
        part.clear()  # Lightning watches this list, and would end this process with SIGKILL
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def received() -> int | None:
    """Number of the signal that arrived; None if none has."""
    return _State.signum


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.owner != os.getpid():  # a forked process, such as a DataLoader's: Ctrl-C reaches its parent too
        if signum == signal.SIGTERM:
            _end(signum)
        return
    if _State.signum is not None:
        if time.monotonic() - _State.since < SAME:
            return
        end_children()
        _end(signum)
    _State.signum, _State.since = signum, time.monotonic()
    raise Stopped(signum)


def _end(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
