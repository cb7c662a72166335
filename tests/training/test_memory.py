"""Freed memory stays with the process, in a fresh interpreter each: the setting is the whole process's."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from transkd.training.memory import keep_freed_memory
if {keep} and not keep_freed_memory():
    sys.exit("no glibc")
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 1024, 1024)  # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(30)][-1])
"""


def last_time(keep):
    """Pages that the system has to clear when a tensor of 64 MB is made for the thirtieth time."""
    found = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True)
    if "no glibc" in found.stderr or sys.platform == "win32":
        pytest.skip("this C library cannot be told")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_a_freed_tensor_is_not_cleared_again():
    pages = last_time(keep=False)
    if pages < 100:
        pytest.skip("this system keeps it by itself")
    assert last_time(keep=True) < pages / 10


def test_other_systems_are_left_alone(monkeypatch):
    from transkd.training.memory import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
