"""What an earlier version wrote still loads, resumes and composes: ``tests/earlier_run`` is never written anew."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from transkd.data.synthetic import write_road_scenes
from transkd.models import load_segmenter
from transkd.models.weights import read_weights
from transkd.run import run

EARLIER = Path(__file__).parent / "earlier_run"


def earlier_config(root, **changes):
    """The config.yaml of the earlier run, with the data drawn again in ``root``."""
    cfg = OmegaConf.load(EARLIER / "config.yaml")
    write_road_scenes(root / "data", train=8, val=3, height=32, width=64)
    (root / "run").mkdir()
    cfg.data.root, cfg.run_dir = str(root / "data"), str(root / "run")
    cfg.teacher.weights = str(EARLIER / "teacher.safetensors")
    cfg.callbacks.last.dirpath = cfg.callbacks.best.dirpath = str(root / "run" / "checkpoints")
    cfg.trainer.default_root_dir = cfg.logger.csv.save_dir = str(root / "run")
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def test_its_student_loads():
    network, card = load_segmenter(EARLIER / "student.safetensors")
    assert card["experiment"] == "demo"
    assert len(card["class_names"]) == network.num_classes == 19
    stored = load_file(EARLIER / "student.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())


def test_its_checkpoint_loads_as_the_same_student():
    network, card = load_segmenter(EARLIER / "checkpoints" / "last.ckpt")
    stored = load_file(EARLIER / "student.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())
    assert read_weights(EARLIER / "checkpoints" / "last.ckpt").card["teacher_name"] == card["teacher_name"]


def test_its_configuration_runs_again(tmp_path):
    run(earlier_config(tmp_path))
    now = json.loads((tmp_path / "run" / "results.json").read_text())
    then = json.loads((EARLIER / "results.json").read_text())
    assert now["parameters"] == then["parameters"]
    assert now["terms"] == then["terms"]
    assert (now["epochs"], now["steps"]) == (then["epochs"], then["steps"])


def test_it_goes_on_from_its_checkpoint(tmp_path):
    changes = {"ckpt_path": str(EARLIER / "checkpoints" / "last.ckpt"), "trainer__max_epochs": 2}
    run(earlier_config(tmp_path, **changes))
    now = json.loads((tmp_path / "run" / "results.json").read_text())
    assert now["epochs"] == 2
    assert now["steps"] == 8
    before, after = load_file(EARLIER / "student.safetensors"), load_file(tmp_path / "run" / "student.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
