"""A set of one's own by configuration alone: trained with its teacher, resumed, scored, and used to predict."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import TINY
from test_reading import save, stored_as

from transkd import evaluate, predict, train

SMALL = [
    *(setting for setting in TINY if setting.startswith(("trainer.", "teacher.", "pictures", "student=", "teacher="))),
    "~callbacks.progress",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.train_transform=null",
    "data.eval_transform=null",
    "data.root=Yard",
    "data.find.images='all/*.jpg'",
    "data.find.labels='all/*_mask.png'",
    "data.find.index='{split}.txt'",
    "data.classes.names=[ground,building]",
    "data.num_classes=2",
    "data.label.ids={50:ground,100:building,200:building,other:null}",
]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a command's main in a folder of its own."""

    def call(module, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["transkd", *map(str, arguments)])
        module.main()

    return call


def draw(root):
    """A building on a ground, in grey masks; every other photograph is stored on its side, one label too."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 4, "val": 2}.items():
        for i in range(count):
            label = np.full((32, 64), 50, np.uint8)
            label[4:20, 8 + i : 28 + i] = 100 if i % 2 else 200
            label[0] = 7
            image = np.stack([label] * 3, axis=-1) + rng.integers(0, 20, (32, 64, 3), dtype=np.uint8)
            (root / "all").mkdir(parents=True, exist_ok=True)
            turned = i % 2 == 1
            save(root / "all" / f"{split}{i}.jpg", stored_as(image, 6) if turned else image, 6 if turned else None)
            save(root / "all" / f"{split}{i}_mask.png", stored_as(label, 6) if split == "val" and turned else label)
        (root / f"{split}.txt").write_text("".join(f"{split}{i}\n" for i in range(count)))


@pytest.mark.slow
def test_a_set_of_ones_own_from_training_to_prediction(call, tmp_path):
    draw(tmp_path / "Yard")
    arguments = ["name=yard", "data=folder", "distill=transkd_cwd", *SMALL]
    call(train, *arguments, "trainer.max_epochs=1")
    call(train, *arguments, "trainer.max_epochs=2", "ckpt_path=last")
    newest = max(Path("outputs/yard").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(newest.read_text())
    assert results["resumed_from"].endswith("last.ckpt")
    assert set(results["iou"]) == {"ground", "building"}
    weights = newest.parent / "student.safetensors"
    call(evaluate, f"weights={weights}", "hydra.run.dir=scores", *arguments)
    assert json.loads(Path("scores/results.json").read_text())["mIoU"] == pytest.approx(results["mIoU"])
    call(predict, f"weights={weights}", "input=Yard/all/val1.jpg", "output=out")
    ids = np.asarray(Image.open(tmp_path / "out" / "ids" / "val1.png"))
    assert ids.shape == (32, 64)
    assert set(np.unique(ids)) <= {0, 1}
