"""Settings of the whole session, and small data sets on disk in the layouts that users have."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports Albumentations

import numpy as np
import pytest
import torch
from small_data import write_pair

SPLITS = {"train": 4, "val": 3}

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--trials", type=int, default=2, help="kills of the campaign in tests/faults")


@pytest.fixture(autouse=True, scope="session")
def same_layers():
    """No measurement changes the layers between tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transkd.training.process.choose_layers", lambda: None)
        yield


@pytest.fixture
def camvid_root(tmp_path):
    """A tiny CamVid: 4 training and 3 validation images, labels 0…10 and 11 = void."""
    root, rng = tmp_path / "CamVid", np.random.default_rng(0)
    for split, count in SPLITS.items():
        for i in range(count):
            name = f"{split}_{i:02}.png"
            write_pair(root / split / name, root / f"{split}annot" / name, range(12), rng)
    return root


@pytest.fixture
def acdc_root(tmp_path):
    """A tiny ACDC: for each condition 4 training and 3 validation images, labels 0…18 and 255."""
    root, rng = tmp_path / "ACDC", np.random.default_rng(1)
    for condition in ("fog", "night", "rain", "snow"):
        for split, count in SPLITS.items():
            for i in range(count):
                folder, name = f"{condition}/{split}/GOPR{i % 2:04}", f"GOPR{i % 2:04}_frame_{i:06}"
                image = root / "rgb_anon" / folder / f"{name}_rgb_anon.png"
                label = root / "gt" / folder / f"{name}_gt_labelTrainIds.png"
                write_pair(image, label, (*range(19), 255), rng)
    return root


@pytest.fixture
def few_operations(monkeypatch):
    """No benchmark measures what the machine can do, or collects garbage to see the process grow."""
    from benchmarks import measure

    monkeypatch.setattr(measure, "_growth", lambda run: 1e6)

    monkeypatch.setattr(measure, "choose_layers", lambda: None)
    monkeypatch.setattr(measure, "matmul_gflop_per_s", lambda device, dtype, calm: 1.0)
