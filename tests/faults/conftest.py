"""What the tests of faults share."""

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """SIGINT arrives, here and in started commands, also if the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
