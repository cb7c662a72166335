"""Runs that go on: what may differ, and what their folder holds at the end."""

import csv
import logging
import shutil
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from runs import assert_identical, composed, results, student

from transkd.data import CITYSCAPES
from transkd.errors import UserError
from transkd.models import load_segmenter
from transkd.run import run
from transkd.settings import TrainerSettings
from transkd.training.history import History
from transkd.training.resuming import (
    Checkpoint,
    check_length,
    check_settings,
    check_teacher,
    differences,
    find_checkpoint,
)

ROADS = [f"{name} of mine" for name in CITYSCAPES.names]
CLASSES = (
    f"data.classes={{_target_:transkd.data.ClassSet,names:{ROADS},palette:{[list(c) for c in CITYSCAPES.palette]}}}"
)
SETTINGS = [
    "distill=none",
    "name=long",
    "trainer.log_every_n_steps=1",
    "pictures=0",
    "optim.scheduler.warmup=0",
    CLASSES,
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with one finished run of two epochs, whose classes are given in yaml."""
    root = tmp_path_factory.mktemp("runs")
    run(composed(root, "outputs/long/first", *SETTINGS))
    return root


@pytest.fixture(scope="module")
def last(base):
    return base / "outputs/long/first/checkpoints/last.ckpt"


@lru_cache
def plain_settings(base):
    return composed(base, "changed", *SETTINGS)


def changed(base, change):
    cfg = plain_settings(base).copy()
    key, _, value = change.partition("=")
    parts = key.split(".")
    node = cfg
    for part in parts[:-1]:
        node = node[int(part) if part.isdigit() else part]
    node[parts[-1]] = yaml.safe_load(value)
    return cfg


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_classes_in_yaml_reach_student_and_checkpoint(base, last):
    _, card = load_segmenter(last.parents[1] / "student.safetensors")
    assert card["class_names"] == ROADS
    assert card["palette"][13] == [0, 0, 142]
    _, stored = load_segmenter(last)
    assert stored["class_names"] == ROADS
    assert list(results(base, "outputs/long/first")["iou"]) == ROADS


def test_a_longer_run_goes_on_with_its_history(base, last, caplog):
    caplog.set_level(logging.INFO)
    (last.parent / ".last.ckpt.killed_1").touch()
    run(composed(base, "outputs/long/second", *SETTINGS, "trainer.max_epochs=3", f"ckpt_path={last}"))
    folder = base / "outputs/long/second"
    assert "trainer.max_epochs was 2, is 3" in caplog.text
    assert not (last.parent / ".last.ckpt.killed_1").exists()
    rows, before = rows_of(folder), rows_of(last.parents[1])
    rates = {int(row["step"]): float(row["lr-AdamW"]) for row in rows if row["lr-AdamW"]}
    assert list(rates) == list(range(12))
    # of twelve steps the ninth to twelfth, by hand: 1 - t/12 of the rate
    assert [rates[step] for step in (8, 9, 10, 11)] == pytest.approx([1e-3 * (12 - t) / 12 for t in (8, 9, 10, 11)])
    assert [{k: v for k, v in row.items() if v} for row in rows[: len(before)]] == [
        {k: v for k, v in row.items() if v} for row in before
    ]
    scores = [float(row["val/full-res/mIoU"]) for row in rows if row["val/full-res/mIoU"]]
    assert len(scores) == 3
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    (state,) = [state for state in best["callbacks"].values() if state["monitor"]]
    assert state["best_model_score"].item() == pytest.approx(max(scores))
    assert best["epoch"] == scores.index(max(scores))


def test_the_best_score_is_that_of_best_ckpt_since_last_ckpt_is_older(last, tmp_path):
    """The last checkpoint of an epoch is written before the best one of the same epoch."""
    callback = ModelCheckpoint(tmp_path / "new", monitor="val/full-res/mIoU", mode="max", filename="best")
    trainer = SimpleNamespace(checkpoint_callbacks=[callback], is_global_zero=True)
    content = torch.load(last, weights_only=True)
    stale = content["callbacks"][callback.state_key]
    stale |= {"best_model_score": torch.tensor(0.0), "kth_value": torch.tensor(0.0)}
    stale["best_k_models"] = {path: torch.tensor(0.0) for path in stale["best_k_models"]}
    History(last, 8).on_load_checkpoint(trainer, None, content)
    callback.load_state_dict(content["callbacks"][callback.state_key])
    stored = torch.load(last.with_name("best.ckpt"), weights_only=True)["callbacks"][callback.state_key]
    assert callback.best_model_score == stored["best_model_score"] > 0
    assert callback.best_model_path == str(tmp_path / "new" / "best.ckpt")
    assert list(callback.best_k_models) == [str(tmp_path / "new" / "best.ckpt")]
    assert (tmp_path / "new" / "best.ckpt").read_bytes() == last.with_name("best.ckpt").read_bytes()


def test_a_finished_run_only_scores_again(base, last):
    run(composed(base, "outputs/long/again", *SETTINGS, f"ckpt_path={last.parents[1]}"))
    assert_identical(student(base, "outputs/long/first"), student(base, "outputs/long/again"))
    assert len(rows_of(base / "outputs/long/first")) > 0
    assert (base / "outputs/long/again/checkpoints/best.ckpt").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optim.optimizer.lr=0.5", r"optim\.optimizer\.lr was 0\.001, is 0\.5\. Give that run's settings"),
        ("seed=3", r"seed was 0, is 3; data\.seed was 0, is 3\."),
        ("data.batch_size=4", r"data\.batch_size was 2, is 4\."),
        ("student=segformer_b1", r"student\.network\.name was segformer_b0, is segformer_b1"),
        ("term=[kd]", r"criterion\.terms\.kd was null, is \{.weight.: 1"),
        ("data.train_transform.transforms.1.p=0.1", r"data\.train_transform\.transforms\.1\.p was 0\.5, is 0\.1"),
        ("trainer.precision=bf16-mixed", r"trainer\.precision was auto, is bf16-mixed"),
        ("trainer.accumulate_grad_batches=2", r"trainer\.accumulate_grad_batches was 1, is 2"),
        ("optim.horizon=99", r"optim\.horizon was null, is 99"),
    ],
)
def test_a_setting_that_changes_the_past_is_refused(base, last, caplog, change, said):
    group = change.startswith(("student=", "term="))
    cfg, found = (
        changed(base, change) if not group else composed(base, "x", *SETTINGS, change),
        Checkpoint(last, {}, 2, 8),
    )
    with pytest.raises(UserError, match=f"of a run with other settings: .*{said}.*resume=force") as error:
        check_settings(cfg, found, force=False)
    assert "\n" not in str(error.value)
    check_settings(cfg, found, force=True)
    assert "going on with other settings than the run began with: " in caplog.text


@pytest.mark.parametrize(
    "change",
    ["pictures=3", "data.num_workers=3", "teacher.weights=x", "gradients_every=2", "trainer.log_every_n_steps=7"],
)
def test_a_setting_that_does_not_is_said(base, last, caplog, change):
    caplog.set_level(logging.INFO)
    check_settings(changed(base, change), Checkpoint(last, {}, 2, 8), force=False)
    assert f"which do not change what was trained: {change.split('=')[0]} was" in caplog.text


def test_a_longer_run_under_a_schedule_that_stores_its_length(base, last, tmp_path):
    cfg = composed(tmp_path, "cosine", *SETTINGS)
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True, "T_max": 8}
    OmegaConf.set_struct(cfg, False)
    cfg.optim.scheduler, cfg.channels = cosine, {"student": [], "teacher": []}
    OmegaConf.save(cfg, tmp_path / "cosine" / "config.yaml", resolve=True)
    found = Checkpoint(tmp_path / "cosine" / "checkpoints" / "last.ckpt", {}, 2, 8)
    check_settings(cfg, found, force=False)
    cfg.trainer.max_epochs = 3
    with pytest.raises(UserError, match=r"trainer\.max_epochs was 2, is 3"):
        check_settings(cfg, found, force=False)
    cfg.optim.horizon = 20  # not the length of the run: another matter
    with pytest.raises(UserError, match=r"settings: optim\.horizon was null, is 20\. Give"):
        check_settings(cfg, found, force=False)


def test_a_rule_for_class_weights_stands_for_its_numbers(base, tmp_path):
    cfg = plain_settings(base).copy()
    cfg.channels = {"student": [], "teacher": []}
    cfg.criterion.terms.task.term.class_weights = [1.0, 2.0]
    (tmp_path / "run").mkdir()
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml", resolve=True)
    found = Checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", {}, 2, 8)
    cfg.criterion.terms.task.term.class_weights = "auto"
    check_settings(cfg, found, force=False)
    cfg.criterion.terms.task.term.class_weights = [2.0, 1.0]
    with pytest.raises(UserError, match=r"class_weights\.0 was 1\.0, is 2\.0"):
        check_settings(cfg, found, force=False)


def test_fewer_epochs_than_done(last):
    found = Checkpoint(last, {}, 2, 8)
    check_length(found, TrainerSettings(max_epochs=-1))
    check_length(found, TrainerSettings(max_epochs=2))
    with pytest.raises(
        UserError, match=r"trainer\.max_epochs=1, but .*last\.ckpt has 2 of them done; expected 2 or more"
    ):
        check_length(found, TrainerSettings(max_epochs=1))
    with pytest.raises(UserError, match=r"trainer\.max_steps=7, but .* has 8 of them done"):
        check_length(found, TrainerSettings(max_epochs=5, max_steps=7))


def test_another_teacher(last):
    found = Checkpoint(last, {"teacher_sha256": "1", "teacher_weights": "old"}, 2, 8)
    about = {"teacher_sha256": "2", "teacher_weights": "new"}
    with pytest.raises(
        UserError, match=r"the teacher new is not the one .* was trained with, old: their SHA-256 differ"
    ):
        check_teacher(found, about, force=False)
    check_teacher(found, about, force=True)
    check_teacher(found, {"teacher_sha256": "1", "teacher_weights": "moved"}, force=False)


def test_the_last_checkpoint_is_not_resumed_into_the_folder_of_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = composed(tmp_path, "other", "name=demo", "ckpt_path=last")
    for file in ("outputs/demo/newest/checkpoints/last.ckpt", "other/student.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=r"other holds a run already, whose student\.safetensors would be overwritten"):
        run(cfg)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.9])
def test_a_flipped_bit_in_a_checkpoint(last, tmp_path, place):
    content = bytearray(last.read_bytes())
    content[int(place * len(content))] ^= 16
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"ckpt_path: .*last\.ckpt is .*damaged.*copy .* again, or give .*best\.ckpt"):
        find_checkpoint(str(tmp_path / "last.ckpt"), "long")


def test_a_truncated_checkpoint_and_files_that_are_none(base, last, tmp_path):
    (tmp_path / "half.ckpt").write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(UserError, match=r"half\.ckpt is no checkpoint of a run, or only a part of one"):
        find_checkpoint(str(tmp_path / "half.ckpt"), "long")
    with pytest.raises(UserError, match=r"student\.safetensors is no checkpoint of a run"):
        find_checkpoint(str(last.parents[1] / "student.safetensors"), "long")
    with pytest.raises(
        UserError, match=r"there is no file .*/checkpoints/last\.ckpt; expected a checkpoint, the folder"
    ):
        find_checkpoint(str(tmp_path), "long")
    content = torch.load(last, weights_only=True)
    del content["optimizer_states"]
    torch.save(content, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match=r"is no checkpoint of a run; to start from its weights use student\.weights="):
        find_checkpoint(str(tmp_path / "weights.ckpt"), "long")


def test_differences():
    earlier = {"a": 1, "b": {"c": [1, {"d": 2}]}, "gone": {"x": 1}, "none": None}
    now = {"a": 1.0, "b": {"c": [1, {"d": 3}]}, "new": [1]}
    assert differences(earlier, now) == {"b.c.1.d": (2, 3), "gone": ({"x": 1}, None), "new": (None, [1])}


def test_a_score_that_fails_leaves_the_student(base):
    short = [*SETTINGS, "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=0"]
    with pytest.raises(UserError, match=r"saved as .*student\.safetensors, but it could not be scored: no validation"):
        run(composed(base, "unscored", *short))
    network, _ = load_segmenter(base / "unscored" / "student.safetensors")
    assert network.name == "segformer_b0"
    found = results(base, "unscored")
    assert found["score_failed"].startswith("no validation image was scored")
    assert "mIoU" not in found
    assert found["steps"] == 1


def test_a_validation_image_that_is_damaged_meanwhile_leaves_the_student(base, tmp_path, monkeypatch):
    shutil.copytree(base / "data", tmp_path / "data")
    broken = sorted((tmp_path / "data" / "rgb_anon").glob("*/val/*/*.png"))[-1]
    broken.write_bytes(broken.read_bytes()[:300])
    short = [*SETTINGS, "trainer.max_epochs=1", "trainer.limit_train_batches=1", f"data.root={tmp_path / 'data'}"]
    with pytest.raises(
        UserError, match=r"cannot read the image .*The student after step 1, not scored, is .*safetensors"
    ):
        run(composed(base, "damaged", *short))
    _, card = load_segmenter(base / "damaged" / "student.safetensors")
    assert card["unfinished"] == "epoch 0, step 1"
