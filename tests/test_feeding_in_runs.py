"""Whole runs fed from the cache, and augmented on the device."""

import pytest
from runs import assert_identical, composed, results, student

from transkd.run import run
from transkd.training.evaluation import evaluate

pytestmark = pytest.mark.slow


def test_a_run_from_the_cache_is_the_run_from_the_files(tmp_path):
    cache = f"data.cache={tmp_path / 'cache'}"
    run(composed(tmp_path, "files", "distill=none"))
    run(composed(tmp_path, "cache", "distill=none", cache))
    assert_identical(student(tmp_path, "cache"), student(tmp_path, "files"))
    frames = sorted((tmp_path / "cache").glob("*/*.image.npy"))
    assert len(frames) == 8 + 3
    run(composed(tmp_path, "device", "distill=none", cache, "data.augment=device", "data.num_workers=1"))
    assert_identical(student(tmp_path, "device"), student(tmp_path, "files"))  # crops and flips: nothing is rounded


def test_evaluation_reads_the_validation_split_alone(tmp_path):
    run(composed(tmp_path, "run", "distill=none", "trainer.max_epochs=1"))
    weights = f"weights={tmp_path / 'run' / 'student.safetensors'}"
    evaluate(composed(tmp_path, "scores", weights, f"data.cache={tmp_path / 'cache'}", config="evaluate"))
    assert [folder.name[:4] for folder in (tmp_path / "cache").iterdir()] == ["val_"]
    ours, again = (results(tmp_path, name) for name in ("run", "scores"))
    assert ours["mIoU"] == again["mIoU"]
