"""How the benchmark measures the memory of a process."""

import pytest
import torch
from benchmarks import measure


def test_peak_memory_sees_what_is_freed_again():
    before = measure.peak_memory_mb(lambda: None, torch.device("cpu"))
    if before is None:
        pytest.skip("this system does not tell")
    grown = measure.peak_memory_mb(lambda: torch.ones(64, 1024, 1024).sum(), torch.device("cpu"))
    assert grown > 200  # 268 MB
    assert before < 100
