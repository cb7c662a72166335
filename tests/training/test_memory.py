"""Freed memory stays with the process, in a fresh interpreter: the setting is the whole process's."""

import json
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from transkd.training.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 1024, 1024)  # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found = [[faults() for _ in range(30)][-1]]
if not keep_freed_memory():
    sys.exit("no glibc")
print([*found, [faults() for _ in range(30)][-1]])
"""


def test_a_freed_tensor_is_not_cleared_again():
    """Pages that the system has to clear when a tensor of 64 MB is made for the thirtieth time."""
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    if "no glibc" in found.stderr or sys.platform == "win32":
        pytest.skip("this C library cannot be told")
    assert found.returncode == 0, found.stderr
    before, after = json.loads(found.stdout)
    if before < 100:
        pytest.skip("this system keeps it by itself")
    assert after < before / 10


def test_other_systems_are_left_alone(monkeypatch):
    from transkd.training.memory import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
