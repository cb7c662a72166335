"""On real CamVid frames (CAMVID_ROOT: train/, trainannot/, val/, valannot/) and NYUv2 images (NYUV2_ROOT)."""

import os
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from runs import results, student

from transkd.cli import CONF
from transkd.data import CAMVID, NYUV2, SegmentationDataset, find_camvid, find_nyuv2
from transkd.data.camvid import VOID
from transkd.run import run

ROOT, NYUV2_ROOT = os.environ.get("CAMVID_ROOT"), os.environ.get("NYUV2_ROOT")
pytestmark = pytest.mark.slow
needs_camvid = pytest.mark.skipif(
    not ROOT or not Path(ROOT).is_dir(), reason="no CamVid: set CAMVID_ROOT to its folder"
)
needs_nyuv2 = pytest.mark.skipif(
    not NYUV2_ROOT or not Path(NYUV2_ROOT, "train.txt").is_file(), reason="no NYUv2: set NYUV2_ROOT to its folder"
)


@needs_camvid
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


def distil_briefly(experiment, root, tmp_path):
    few = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.limit_val_batches=2", "data.batch_size=4"]
    teacher = ["teacher=segformer_b0", "teacher.fit.max_epochs=1", "teacher.min_miou=0"]
    where = [f"run_dir={tmp_path}", f"teacher.fit.folder={tmp_path}", f"data.root={root}", "~callbacks.progress"]
    recipe = [f"+experiment={experiment}", "distill=transkd_ea", "data.num_workers=0", *few, *teacher, *where]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run(compose("train", recipe))
    found = results(tmp_path, ".")
    assert found["protocol"] == "input-res"
    assert all(tensor.isfinite().all() for tensor in student(tmp_path, ".").values())
    return found["mIoU"]


@needs_camvid
def test_distillation_step_by_step(tmp_path):
    assert 0.02 < distil_briefly("camvid", ROOT, tmp_path) < 0.6


@needs_nyuv2
def test_every_pair_of_nyuv2_can_be_read():
    for split, count in (("train", 795), ("val", len(Path(NYUV2_ROOT, "val.txt").read_text().split()))):
        dataset = SegmentationDataset(find_nyuv2(NYUV2_ROOT, split), NYUV2)
        assert len(dataset) == count
        seen = set()
        for i in range(count):
            image, label = dataset.read(i)
            assert image.shape == (*label.shape, 3)
            seen |= set(np.unique(label).tolist())
        assert {*range(39), 255} <= seen <= {*range(40), 255}


@needs_nyuv2
def test_distillation_on_nyuv2(tmp_path):
    assert 0.001 < distil_briefly("nyuv2", NYUV2_ROOT, tmp_path) < 0.4
