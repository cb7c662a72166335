"""The moving average of the student's weights."""

import lightning as L
import pytest
import torch
from runs import assert_identical, composed, results, student
from torch import nn

from transkd.errors import UserError
from transkd.run import run
from transkd.training.averaging import StudentAverage
from transkd.training.distiller import Distiller

TINY_NETWORKS = [
    f"+{who}.network.encoder.{setting}"
    for who in ("student", "teacher")
    for setting in ("channels=[8,16,40,64]", "depths=[1,1,1,1]")
]


class Module(L.LightningModule):
    """A student of one number, which follows a given path."""

    def __init__(self):
        super().__init__()
        self.student, self.other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)


class Trainer:
    global_step = 0


def test_the_average_by_hand():
    module, trainer, callback = Module(), Trainer(), StudentAverage(0.5)
    module.student.weight.data.fill_(1.0)
    callback.on_fit_start(trainer, module)
    expected = 1.0
    for n, weight in enumerate((3.0, -2.0, 8.0), start=1):
        module.student.weight.data.fill_(weight)
        trainer.global_step = n
        callback.on_train_batch_end(trainer, module, None, None, 0)
        callback.on_train_batch_end(trainer, module, None, None, 1)  # a batch without a step counts nothing
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    assert callback.average.module.weight.item() == pytest.approx(expected)
    callback.on_validation_epoch_start(trainer, module)
    assert module.student.weight.item() == pytest.approx(expected)
    callback.on_validation_epoch_end(trainer, module)
    assert module.student.weight.item() == 8.0
    callback.on_train_end(trainer, module)
    assert module.student.weight.item() == pytest.approx(expected)


def test_a_batch_without_a_step_counts_nothing_at_the_start_of_a_run_either():
    module, trainer, callback = Module(), Trainer(), StudentAverage(0.5)
    callback.on_fit_start(trainer, module)
    callback.on_load_checkpoint(trainer, module, {"student_average_count": 5})
    trainer.global_step = 5
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, None, 0)  # gradients are accumulated
    assert callback._count == 5
    trainer.global_step = 6
    callback.on_train_batch_end(trainer, module, None, None, 1)
    assert callback._count == 6


def test_a_decay_of_zero_is_the_last_weights(tmp_path):
    settings = ["distill=none", *TINY_NETWORKS, "trainer.max_epochs=1", "pictures=0"]
    run(composed(tmp_path, "plain", *settings))
    run(composed(tmp_path, "averaged", *settings, "student.ema=0"))
    assert_identical(student(tmp_path, "plain"), student(tmp_path, "averaged"))
    assert results(tmp_path, "plain")["mIoU"] == results(tmp_path, "averaged")["mIoU"]


@pytest.mark.parametrize(
    "length",
    [
        ["trainer.max_epochs=3", "trainer.accumulate_grad_batches=3"],
        ["trainer.max_epochs=-1", "+trainer.max_steps=11"],
        pytest.param(["trainer.max_epochs=3", "trainer.precision=64-true"], marks=pytest.mark.slow),
    ],
    ids=["accumulating", "by steps", "float64"],
)
def test_a_resumed_run_ends_with_the_undisturbed_average(tmp_path, monkeypatch, length):
    settings = ["distill=none", *TINY_NETWORKS, *length, "student.ema=0.9", "pictures=0"]
    run(composed(tmp_path, "undisturbed", *settings))
    step = Distiller.training_step

    class Killed(BaseException):
        pass

    def dies(self, batch, batch_idx):
        if self.current_epoch == 2:
            raise Killed
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Distiller, "training_step", dies)
    with pytest.raises(Killed):
        run(composed(tmp_path, "killed", *settings))
    monkeypatch.undo()
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    held = torch.load(last, weights_only=True)
    name = "head.linear_pred.weight"
    assert not torch.equal(held["state_dict"][f"student.{name}"], held["current_student"][name])
    run(composed(tmp_path, "resumed", *settings, f"ckpt_path={last}"))
    assert_identical(student(tmp_path, "undisturbed"), student(tmp_path, "resumed"))
    files = [(tmp_path / name / "metrics.csv").read_text() for name in ("undisturbed", "resumed")]
    assert files[0] == files[1]


def test_a_decay_out_of_range():
    with pytest.raises(UserError, match=r"student\.ema=1\.5: expected a number from 0 to below 1"):
        StudentAverage(1.5)
