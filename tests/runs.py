"""What the tests of whole runs share: tiny drawn data, short recipes, configurations composed as the commands do."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from transkd.cli import CONF
from transkd.run import run
from transkd.training.distiller import Distiller

TINY = [
    "+experiment=demo",
    "distill=transkd_cwd",
    "student=segformer_b0",
    "teacher=segformer_b0",
    "data.prepare.train=8",
    "data.prepare.val=3",
    "data.prepare.height=32",
    "data.prepare.width=64",
    "data.train_transform.transforms.0.height=32",
    "data.train_transform.transforms.0.width=64",
    "data.batch_size=2",
    "data.eval_batch_size=1",
    "data.num_workers=0",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "trainer.enable_progress_bar=false",
    "~callbacks.progress",
    "teacher.min_miou=0",
    "teacher.fit.max_epochs=1",
    "pictures=1",
]


def composed(root: Path, run: str, *overrides: str, config: str = "train"):
    """Compose a command's configuration for a tiny run in ``root/<run>``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        folder = root / run
        folder.mkdir(parents=True, exist_ok=True)
        where = [f"run_dir={folder}", f"data.root={root / 'data'}", f"teacher.fit.folder={root / 'teachers'}"]
        return compose(config, [*TINY, *where, *overrides])


def results(root: Path, run: str) -> dict:
    return json.loads((root / run / "results.json").read_text())


def student(root: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(root / run / "student.safetensors")


def run_until_killed(cfg, epoch: int, monkeypatch) -> None:
    """Run a configuration whose training dies in the first step of an epoch."""

    class Killed(Exception):  # noqa: N818
        pass

    def dies(self, batch, batch_idx):
        if self.current_epoch == epoch:
            raise Killed
        return step(self, batch, batch_idx)

    step = Distiller.training_step
    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "training_step", dies)
        with pytest.raises(Killed):
            run(cfg)


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
