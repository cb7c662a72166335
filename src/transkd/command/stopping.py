"""SIGINT and SIGTERM: an exception that ends the command in order, with exit status 130 and 143."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "again", "listening", "received", "takes_along"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asks the command to end; no ``Exception``, so that no library takes it for an error of a job.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class _State:
    """The process that listens, the signal it got, and what else has to end."""

    owner: int | None = None
    signum: int | None = None
    others: Callable[[int], object] | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Raise ``Stopped`` at the first SIGINT or SIGTERM; a second one ends the process at once.

    A signal that the caller ignores (SIGINT under nohup or in the background) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.owner, _State.signum, _State.others = os.getpid(), None, None
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
                signal.signal(number, _handle)


def takes_along(others: Callable[[int], object]) -> None:
    """Pass the signal on to processes that this one started: ``others(signum)``."""
    _State.others = others


def received() -> int | None:
    """Number of the signal that arrived; None if none has."""
    return _State.signum


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.owner != os.getpid():  # a forked process, such as a DataLoader's: Ctrl-C reaches its parent too
        if signum == signal.SIGTERM:
            _end(signum)
        return
    if _State.signum is not None:
        _end(signum)
    _State.signum = signum
    if _State.others is not None:
        _State.others(signum)
    raise Stopped(signum)


def _end(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
