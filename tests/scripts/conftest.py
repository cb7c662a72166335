"""No benchmark measures the machine."""

import pytest
from benchmarks import measure


@pytest.fixture(autouse=True)
def _few_operations(monkeypatch):
    monkeypatch.setattr(measure, "matmul_gflop_per_s", lambda device, dtype, calm: 1.0)
