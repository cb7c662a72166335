"""On real CamVid frames, where CAMVID_ROOT says they lie (train/, trainannot/, val/, valannot/)."""

import os
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from runs import results, student

from transkd.cli import CONF
from transkd.data import CAMVID, SegmentationDataset, find_camvid
from transkd.data.camvid import VOID
from transkd.run import run

ROOT = os.environ.get("CAMVID_ROOT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROOT or not Path(ROOT).is_dir(), reason="no CamVid: set CAMVID_ROOT to its folder"),
]


@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_every_pair_can_be_read(split, count):
    dataset = SegmentationDataset(find_camvid(ROOT, split), CAMVID, void=(VOID,))
    assert len(dataset) == count
    seen = set()
    for i in range(count):
        image, label = dataset.read(i)
        assert image.shape == (360, 480, 3)
        seen |= set(np.unique(label).tolist())
    assert seen == {*range(11), 255}


def test_distillation_step_by_step(tmp_path):
    few = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.limit_val_batches=2", "data.batch_size=4"]
    teacher = ["teacher=segformer_b0", "teacher.fit.max_epochs=1", "teacher.min_miou=0"]
    where = [f"run_dir={tmp_path}", f"teacher.fit.folder={tmp_path}", f"data.root={ROOT}", "~callbacks.progress"]
    recipe = ["+experiment=camvid", "distill=transkd_ea", "data.num_workers=0", *few, *teacher, *where]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run(compose("train", recipe))
    found = results(tmp_path, ".")
    assert found["protocol"] == "input-res"
    assert 0.02 < found["mIoU"] < 0.6
    assert all(tensor.isfinite().all() for tensor in student(tmp_path, ".").values())
