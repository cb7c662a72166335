"""The length of a run, and the schedule of the learning rate that follows it."""

import functools

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from transkd.errors import UserError
from transkd.training.learning_rate import warmup_poly
from transkd.training.length import length_of
from transkd.training.optimization import Optimization


class Stopped(Exception):  # noqa: N818
    pass


class Looking(L.LightningModule):
    """Says at the start of a training what ``look`` makes of its trainer."""

    def __init__(self, look):
        super().__init__()
        self.layer, self.look = nn.Linear(1, 1), look

    def train_dataloader(self):
        return DataLoader(torch.zeros(5, 1), batch_size=1)

    def training_step(self, batch, batch_idx):
        raise AssertionError("trained")

    def configure_optimizers(self):
        self.seen = self.look(self.trainer)
        raise Stopped


def seen_by(look, **settings):
    module = Looking(look)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(Stopped):
        L.Trainer(accelerator="cpu", enable_model_summary=False, **silent, **settings).fit(module)
    return module.seen


@pytest.mark.parametrize(
    ("settings", "expected"),  # of 5 batches in an epoch
    [
        ({"max_epochs": 3}, (15, 3)),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, (9, 3)),
        ({"max_epochs": 100, "max_steps": 8}, (8, 1.6)),
        ({"max_epochs": -1, "max_steps": 8}, (8, 1.6)),
        ({"max_steps": 6, "accumulate_grad_batches": 2}, (6, 2)),
        ({"max_epochs": 2, "limit_train_batches": 2}, (4, 2)),
        ({"max_epochs": -1}, None),
        ({"max_time": "00:01:00:00"}, None),
    ],
)
def test_steps_and_epochs(settings, expected):
    assert seen_by(length_of, **settings) == (None if expected is None else pytest.approx(expected))


def rates_of(ticks, scheduler, interval, horizon=None, **settings):
    optimization = Optimization(functools.partial(torch.optim.SGD, lr=1.0), scheduler, interval, horizon)
    made = seen_by(lambda trainer: optimization.configure([nn.Parameter(torch.zeros(1))], trainer), **settings)
    schedule, rates = made["lr_scheduler"]["scheduler"], []
    for _ in range(ticks):
        rates += schedule.get_last_lr()
        made["optimizer"].step()
        schedule.step()
    return rates


@pytest.mark.parametrize("settings", [{"max_epochs": 100, "max_steps": 18}, {"max_steps": 18}, {"max_epochs": 4}])
def test_a_rate_that_decays_by_epochs_decays_over_the_epochs_of_the_run(settings):
    assert rates_of(5, warmup_poly, "epoch", **settings) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_run_without_a_length(interval):
    with pytest.raises(UserError, match=r"needs the length of the run: set trainer\.max_epochs, .* optim\.horizon"):
        rates_of(1, warmup_poly, interval, max_epochs=-1)
    assert rates_of(3, warmup_poly, interval, horizon=2, max_epochs=-1) == pytest.approx([1, 0.5, 0])
    halving = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)  # needs none
    assert rates_of(3, halving, interval, max_epochs=-1) == pytest.approx([1, 0.5, 0.25])
